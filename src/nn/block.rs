//! One block, by the operations of the device that its input is on; on the CPU as one function with its own backward.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor, Var};

use super::layers::{Attention, Block, Gelu, Linear, Mlp, Norm, Projections};
use super::ops::adapter::AdapterSaved;
use super::ops::attention::{self, AttentionSaved, Qkv};
use super::ops::fused::{Function, Gradients, apply};
use super::ops::linear;
use super::ops::matrix::{self, Held, Matrix};
use super::ops::norm::NormSaved;
use super::ops::rotary::Rotation;
use super::ops::{activation, vector};
use super::{Pass, composed, norm, seed};

/// Block over activations f32 `[rows, hidden]`.
pub(super) fn forward(block: &Arc<Block>, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    check_rows(x, pass)?;
    if x.device().is_cpu() {
        apply(BlockFunction { block: Arc::clone(block), pass: pass.clone() }, x)
    } else {
        composed::block(block, x, pass)
    }
}

/// As [`forward`], without a graph.
pub(super) fn infer(block: &Arc<Block>, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    check_rows(x, pass)?;
    if !x.device().is_cpu() {
        return Ok(composed::block(block, &x.detach(), pass)?.detach());
    }
    let function = BlockFunction { block: Arc::clone(block), pass: pass.clone() };
    function.whole(Held::new(x)?.data()?, false)?.0.into_tensor()
}

/// The gradients of a block's input and variables from that of its output; the forward that they need is made here, but for
/// the last product, which none of them needs.
pub(super) fn backward(block: &Arc<Block>, x: &Tensor, gradient: &Tensor, pass: &Pass) -> Result<(Tensor, Gradients)> {
    check_rows(x, pass)?;
    let x = x.detach();
    if !x.device().is_cpu() {
        let leaf = Var::from_tensor(&x)?;
        let mut store = seed(&composed::block(block, &leaf, pass)?, gradient)?.backward()?;
        let input = store.remove(&leaf).map_or_else(|| x.zeros_like(), Ok)?;
        return Ok((input.detach(), Gradients::from_store(&mut store, &block.variables())));
    }
    let function = BlockFunction { block: Arc::clone(block), pass: pass.clone() };
    let saved = function.recall(Held::new(&x)?.data()?)?;
    let mut found = Gradients::default();
    let input = function.backward(&x, saved, &gradient.detach(), &mut found)?;
    Ok((input, found))
}

fn check_rows(x: &Tensor, pass: &Pass) -> Result<()> {
    let (rows, _) = x.dims2()?;
    if rows != pass.batch * pass.seq {
        candle_core::bail!("activations of {rows} tokens in a pass of {} x {}", pass.batch, pass.seq);
    }
    Ok(())
}

struct BlockFunction {
    block: Arc<Block>,
    pass: Pass,
}

type Adapter = Option<AdapterSaved>;

/// What the backward of a block needs beside its input.
struct Saved {
    attention_norm: (Matrix, NormSaved),
    attention: SavedAttention,
    /// The activations between attention and MLP.
    middle: Matrix,
    mlp_norm: (Matrix, NormSaved),
    mlp: SavedMlp,
}

struct SavedAttention {
    projections: Vec<Adapter>,
    /// Queries and keys before their norms.
    unnormed: Option<[(Matrix, NormSaved); 2]>,
    qkv: Qkv,
    kernel: AttentionSaved,
    mixed: Matrix,
    output: Adapter,
}

struct SavedMlp {
    /// Of gate, up and down.
    adapters: [Adapter; 3],
    gate: Option<Matrix>,
    up: Matrix,
    inner: Matrix,
}

impl Function for BlockFunction {
    type Saved = Saved;

    const NAME: &'static str = "block";

    fn variables(&self) -> Vec<Var> {
        self.block.variables()
    }

    fn forward(&self, x: &Tensor, wanted: bool) -> Result<(Vec<f32>, Shape, Saved)> {
        let (out, saved) = self.whole(Held::new(x)?.data()?, wanted)?;
        let shape = Shape::from((out.rows(), out.columns()));
        Ok((out.into_vec(), shape, saved))
    }

    fn backward(&self, x: &Tensor, saved: Saved, gradient: &Tensor, found: &mut Gradients) -> Result<Tensor> {
        let (held, given) = (Held::new(x)?, Held::new(gradient)?);
        let (x, given) = (held.data()?, given.data()?);
        let gradient = Matrix::new(matrix::copy(given), saved.middle.columns());
        let normed = self.mlp_backward(&saved.mlp_norm.0, saved.mlp, &gradient, found)?;
        let norm = &self.block.mlp_norm;
        let mut middle = norm::backward(norm, saved.middle.data(), &saved.mlp_norm.1, normed.data(), found)?;
        vector::update(middle.data_mut(), gradient.data(), |part, gradient| part + gradient);
        let normed = self.attend_backward(&saved.attention_norm.0, saved.attention, &middle, found)?;
        let norm = &self.block.attention_norm;
        let mut out = norm::backward(norm, x, &saved.attention_norm.1, normed.data(), found)?;
        vector::update(out.data_mut(), middle.data(), |part, gradient| part + gradient);
        out.into_tensor()
    }
}

impl BlockFunction {
    /// The block's output, with what a backward needs where one is `wanted`.
    fn whole(&self, x: &[f32], wanted: bool) -> Result<(Matrix, Saved)> {
        let mut saved = self.inner(x, wanted)?;
        let (mut out, adapter) = self.linear(self.down(), &saved.mlp.inner, wanted)?;
        saved.mlp.adapters[2] = adapter;
        vector::update(out.data_mut(), saved.middle.data(), |out, x| out + x);
        Ok((out, saved))
    }

    /// What a backward needs, without the output.
    fn recall(&self, x: &[f32]) -> Result<Saved> {
        let mut saved = self.inner(x, true)?;
        saved.mlp.adapters[2] = linear::recall(self.down(), &saved.mlp.inner, &self.pass)?;
        Ok(saved)
    }

    /// All but the last product.
    fn inner(&self, x: &[f32], wanted: bool) -> Result<Saved> {
        let attention_norm = norm::forward(&self.block.attention_norm, x)?;
        let (mut middle, attention) = self.attend(&attention_norm.0, wanted)?;
        vector::update(middle.data_mut(), x, |out, x| out + x);
        let mlp_norm = norm::forward(&self.block.mlp_norm, middle.data())?;
        let mlp = self.mlp(&mlp_norm.0, wanted)?;
        Ok(Saved { attention_norm, attention, middle, mlp_norm, mlp })
    }

    fn down(&self) -> &Linear {
        match &self.block.mlp {
            Mlp::Gated { down, .. } | Mlp::Plain { down, .. } => down,
        }
    }

    fn linear(&self, layer: &Linear, x: &Matrix, wanted: bool) -> Result<(Matrix, Adapter)> {
        linear::forward(layer, (x, &self.pass), wanted)
    }

    fn linear_backward(
        &self,
        (layer, x): (&Linear, &Matrix),
        saved: Option<&AdapterSaved>,
        (gradient, onto): (&Matrix, Option<Matrix>),
        found: &mut Gradients,
    ) -> Result<Matrix> {
        linear::backward(layer, (x, &self.pass), saved, (gradient, onto), found)
    }

    fn attend(&self, x: &Matrix, wanted: bool) -> Result<(Matrix, SavedAttention)> {
        let Attention { projections, head_norms, output, shape } = &self.block.attention;
        let (mut qkv, projections) = match projections {
            Projections::Separate { query, key, value } => {
                let linear = |layer| self.linear(layer, x, wanted);
                let (query, key, value) = (linear(query)?, linear(key)?, linear(value)?);
                (Qkv { query: query.0, key: key.0, value: value.0 }, vec![query.1, key.1, value.1])
            }
            Projections::Joint(joint) => {
                let (joint, adapter) = self.linear(joint, x, wanted)?;
                let sizes = [shape.query_size(), shape.key_value_size(), shape.key_value_size()];
                let [query, key, value] = split(&joint, sizes);
                (Qkv { query, key, value }, vec![adapter])
            }
        };
        let unnormed = match head_norms {
            Some((query, key)) => {
                let (sizes, x) = ([shape.query_size(), shape.key_value_size()], [&mut qkv.query, &mut qkv.key]);
                let mut saved = Vec::with_capacity(2);
                for ((norm, size), x) in [query, key].into_iter().zip(sizes).zip(x) {
                    let (out, statistics) = norm::forward(norm, x.data())?;
                    let before = std::mem::replace(x, Matrix::new(out.into_vec(), size));
                    saved.push((before, statistics));
                }
                <[_; 2]>::try_from(saved).ok()
            }
            None => None,
        };
        self.rotate(&mut qkv, 1.0)?;
        let (mixed, kernel) = attention::forward(&qkv, *shape, &self.pass);
        let (out, output) = self.linear(output, &mixed, wanted)?;
        Ok((out, SavedAttention { projections, unnormed, qkv, kernel, mixed, output }))
    }

    fn attend_backward(
        &self,
        x: &Matrix,
        saved: SavedAttention,
        gradient: &Matrix,
        found: &mut Gradients,
    ) -> Result<Matrix> {
        let Attention { projections, head_norms, output, shape } = &self.block.attention;
        let mixed = self.linear_backward((output, &saved.mixed), saved.output.as_ref(), (gradient, None), found)?;
        let mut slopes = attention::backward(&saved.qkv, (*shape, &self.pass), &saved.kernel, (&saved.mixed, &mixed));
        self.rotate(&mut slopes, -1.0)?;
        if let (Some((query, key)), Some(unnormed)) = (head_norms, &saved.unnormed) {
            let slopes = [&mut slopes.query, &mut slopes.key];
            for ((norm, (before, statistics)), slope) in [query, key].into_iter().zip(unnormed).zip(slopes) {
                let columns = slope.columns();
                let out = norm::backward(norm, before.data(), statistics, slope.data(), found)?;
                *slope = Matrix::new(out.into_vec(), columns);
            }
        }
        let adapter = |index: usize| saved.projections.get(index).and_then(Option::as_ref);
        match projections {
            Projections::Separate { query, key, value } => {
                let out = self.linear_backward((query, x), adapter(0), (&slopes.query, None), found)?;
                let out = self.linear_backward((key, x), adapter(1), (&slopes.key, Some(out)), found)?;
                self.linear_backward((value, x), adapter(2), (&slopes.value, Some(out)), found)
            }
            Projections::Joint(joint) => {
                let slopes = join([&slopes.query, &slopes.key, &slopes.value]);
                self.linear_backward((joint, x), adapter(0), (&slopes, None), found)
            }
        }
    }

    fn rotate(&self, qkv: &mut Qkv, direction: f32) -> Result<()> {
        let Some((cos, sin)) = &self.pass.rotary else { return Ok(()) };
        let half = cos.dim(1)?;
        let (cos, sin) = (Held::new(cos)?, Held::new(sin)?);
        let rotation = Rotation { cos: cos.data()?, sin: sin.data()?, half, direction };
        let head_dim = self.block.attention.shape.head_dim;
        for x in [&mut qkv.query, &mut qkv.key] {
            let columns = x.columns();
            rotation.apply(x.data_mut(), columns, head_dim);
        }
        Ok(())
    }

    /// The MLP up to its last product.
    fn mlp(&self, x: &Matrix, wanted: bool) -> Result<SavedMlp> {
        let (gate, up, inner) = match &self.block.mlp {
            Mlp::Gated { gate, up, .. } => {
                let (gate, up) = (self.linear(gate, x, wanted)?, self.linear(up, x, wanted)?);
                let inner = activation::silu_mul(gate.0.data(), up.0.data());
                ((Some(gate.0), gate.1), up, inner)
            }
            Mlp::Plain { up, gelu, .. } => {
                let up = self.linear(up, x, wanted)?;
                let inner = match gelu {
                    Gelu::Tanh => activation::gelu(up.0.data()),
                    Gelu::Exact => activation::gelu_exact(up.0.data()),
                };
                ((None, None), up, inner)
            }
        };
        let inner = Matrix::new(inner, up.0.columns());
        Ok(SavedMlp { adapters: [gate.1, up.1, None], gate: gate.0, up: up.0, inner })
    }

    fn mlp_backward(&self, x: &Matrix, saved: SavedMlp, gradient: &Matrix, found: &mut Gradients) -> Result<Matrix> {
        let SavedMlp { adapters: [gate_adapter, up_adapter, down_adapter], gate: saved_gate, up: mut slope, inner } =
            saved;
        let (gate, up, down, gelu) = match &self.block.mlp {
            Mlp::Gated { gate, up, down } => (Some(gate), up, down, Gelu::Tanh),
            Mlp::Plain { up, down, gelu } => (None, up, down, *gelu),
        };
        let inner = self.linear_backward((down, &inner), down_adapter.as_ref(), (gradient, None), found)?;
        let (Some(gate), Some(mut gate_slope)) = (gate, saved_gate) else {
            match gelu {
                Gelu::Tanh => activation::gelu_backward(slope.data_mut(), inner.data()),
                Gelu::Exact => activation::gelu_exact_backward(slope.data_mut(), inner.data()),
            }
            return self.linear_backward((up, x), up_adapter.as_ref(), (&slope, None), found);
        };
        activation::silu_mul_backward(gate_slope.data_mut(), slope.data_mut(), inner.data());
        let out = self.linear_backward((gate, x), gate_adapter.as_ref(), (&gate_slope, None), found)?;
        self.linear_backward((up, x), up_adapter.as_ref(), (&slope, Some(out)), found)
    }
}

/// Groups of columns as matrices of their own.
fn split(joint: &Matrix, sizes: [usize; 3]) -> [Matrix; 3] {
    let mut start = 0;
    sizes.map(|size| {
        let lines = joint.data().chunks_exact(joint.columns());
        let part = lines.flat_map(|line| &line[start..start + size]).copied().collect();
        start += size;
        Matrix::new(part, size)
    })
}

/// Matrices side by side.
fn join(parts: [&Matrix; 3]) -> Matrix {
    let mut out = Vec::with_capacity(parts.iter().map(|part| part.data().len()).sum());
    for row in 0..parts[0].rows() {
        for part in parts {
            out.extend_from_slice(&part.data()[row * part.columns()..(row + 1) * part.columns()]);
        }
    }
    Matrix::new(out, parts.iter().map(|part| part.columns()).sum())
}

impl Block {
    /// Everything that is trained in it.
    fn variables(&self) -> Vec<Var> {
        let mut found = Vec::new();
        let norms = [Some(&self.attention_norm), Some(&self.mlp_norm)].into_iter();
        let head_norms = self.attention.head_norms.as_ref();
        let norms = norms.chain([head_norms.map(|norms| &norms.0), head_norms.map(|norms| &norms.1)]).flatten();
        norms.for_each(|norm: &Norm| found.extend(norm.variables()));
        let mut linear = |layers: &[&Linear]| layers.iter().for_each(|layer| found.extend(layer.variables()));
        match &self.attention.projections {
            Projections::Separate { query, key, value } => linear(&[query, key, value]),
            Projections::Joint(joint) => linear(&[joint]),
        }
        linear(&[&self.attention.output]);
        match &self.mlp {
            Mlp::Gated { gate, up, down } => linear(&[gate, up, down]),
            Mlp::Plain { up, down, .. } => linear(&[up, down]),
        }
        found
    }
}
