//! The model from the tensor library's own differentiable operations: what runs on devices, and what the operations on
//! the CPU are held against.

use candle_core::{D, Device, Result, Tensor};

use super::layers::{Attention, Block, Gelu, Linear, Mlp, Norm, Order, Projections};
use super::ops::{FrozenLinear, dropout_mask};
use super::{Lora, Parameter, Pass, Tokens};

/// One block over `[rows, hidden]`.
pub(super) fn block(block: &Block, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    let x = (x + attention(&block.attention, &norm(&block.attention_norm, x)?, pass)?)?;
    let normed = norm(&block.mlp_norm, &x)?;
    let mlp = match &block.mlp {
        Mlp::Gated { gate, up, down } => {
            let inner = (linear(gate, &normed, pass)?.silu()? * linear(up, &normed, pass)?)?;
            linear(down, &inner, pass)?
        }
        Mlp::Plain { up, down, gelu } => {
            let up = linear(up, &normed, pass)?;
            let inner = match gelu {
                Gelu::Tanh => up.gelu()?,
                Gelu::Exact => up.gelu_erf()?,
            };
            linear(down, &inner, pass)?
        }
    };
    x + mlp
}

/// RMS norm or layer norm over the last dim.
pub(super) fn norm(norm: &Norm, x: &Tensor) -> Result<Tensor> {
    let weight = norm.weight.tensor()?;
    let Some(bias) = &norm.bias else {
        let scale = ((x.sqr()?.mean_keepdim(D::Minus1)? + norm.eps)?).sqrt()?;
        return x.broadcast_div(&scale)?.broadcast_mul(&weight);
    };
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let scale = ((centred.sqr()?.mean_keepdim(D::Minus1)? + norm.eps)?).sqrt()?;
    centred.broadcast_div(&scale)?.broadcast_mul(&weight)?.broadcast_add(&bias.tensor()?)
}

/// A linear layer with its adapter.
pub(super) fn linear(layer: &Linear, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    let base = |x: &Tensor| product(&layer.weight, layer.order, x);
    let with_bias = |y: Tensor| match &layer.bias {
        Some(bias) => y.broadcast_add(&bias.tensor()?),
        None => Ok(y),
    };
    let Some(adapter) = &layer.adapter else { return with_bias(base(x)?) };
    let mask = match pass.dropout {
        Some(key) if adapter.dropout > 0.0 => {
            Some(dropout_mask(adapter, key, pass.seq, (x.dim(0)?, layer.inputs), x.device())?)
        }
        _ => None,
    };
    let dropped = mask.as_ref().map_or_else(|| Ok(x.clone()), |mask| x * mask)?;
    let low = (dropped.matmul(&adapter.a.t()?)?.matmul(&adapter.b.t()?)? * adapter.scale)?;
    let Some(magnitude) = &adapter.magnitude else { return with_bias((base(x)? + low)?) };
    let ratio = magnitude.as_tensor().broadcast_div(&direction_norm(layer, adapter)?)?;
    let adapted = (base(&dropped)? + low)?.broadcast_mul(&ratio)?;
    // PEFT applies dropout to DoRA's whole input, and keeps the base's own product of the part that dropout took away.
    with_bias(if mask.is_some() { (adapted + base(&(x - &dropped)?)?)? } else { adapted })
}

/// `x Wᵀ`.
fn product(weight: &Parameter, order: Order, x: &Tensor) -> Result<Tensor> {
    match (weight, order) {
        (Parameter::Frozen(weight), order) => x.apply_op1(FrozenLinear { weight: weight.clone(), order }),
        (Parameter::Trainable(weight), Order::OutIn) => x.matmul(&weight.t()?),
        (Parameter::Trainable(weight), Order::InOut) => x.matmul(weight),
    }
}

/// The length of each output's row of `W + scale * B A`, `[out]`, without a gradient.
pub(super) fn direction_norm(layer: &Linear, adapter: &Lora) -> Result<Tensor> {
    let weight = layer.weight.tensor()?.detach();
    let weight = if layer.order == Order::InOut { weight.t()? } else { weight };
    let low = (adapter.b.detach().matmul(&adapter.a.detach())? * adapter.scale)?;
    (weight + low)?.sqr()?.sum(1)?.sqrt()
}

fn attention(attention: &Attention, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    let shape = &attention.shape;
    let (query, key, value) = match &attention.projections {
        Projections::Separate { query, key, value } => {
            (linear(query, x, pass)?, linear(key, x, pass)?, linear(value, x, pass)?)
        }
        Projections::Joint(joint) => {
            let joint = linear(joint, x, pass)?;
            let (first, second) = (shape.query_size(), shape.key_value_size());
            (joint.narrow(1, 0, first)?, joint.narrow(1, first, second)?, joint.narrow(1, first + second, second)?)
        }
    };
    let (batch, seq) = (pass.batch, pass.seq);
    let heads = |x: Tensor, count: usize, head_norm: Option<&Norm>| -> Result<Tensor> {
        let x = x.reshape((batch, seq, count, shape.head_dim))?;
        let x = head_norm.map_or_else(|| Ok(x.clone()), |head_norm| norm(head_norm, &x))?;
        x.transpose(1, 2)?.contiguous()
    };
    let norms = attention.head_norms.as_ref();
    let query = rotate(&heads(query, shape.heads, norms.map(|norms| &norms.0))?, pass)?;
    let key = rotate(&heads(key, shape.kv_heads, norms.map(|norms| &norms.1))?, pass)?;
    let value = heads(value, shape.kv_heads, None)?;
    let groups = shape.heads / shape.kv_heads;
    let spread = |x: Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(2)?.broadcast_as((batch, shape.kv_heads, groups, seq, shape.head_dim))?;
        x.reshape((batch, shape.heads, seq, shape.head_dim))
    };
    let (key, value) = (spread(key)?, spread(value)?);
    #[expect(clippy::cast_precision_loss, reason = "a head has few dims")]
    let scale = 1.0 / (shape.head_dim as f64).sqrt();
    let scores = (query.matmul(&key.t()?)? * scale)?.broadcast_add(&pass.mask(shape.window, x.device())?)?;
    let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&value)?;
    linear(&attention.output, &mixed.transpose(1, 2)?.reshape((batch * seq, shape.query_size()))?, pass)
}

/// Rotary embedding of the first dims of `[batch, heads, seq, dim]`, pairing the halves.
pub(super) fn rotate(x: &Tensor, pass: &Pass) -> Result<Tensor> {
    let Some((cos, sin)) = &pass.rotary else { return Ok(x.clone()) };
    let half = cos.dim(1)?;
    let table = |table: &Tensor| table.reshape((pass.batch, 1, pass.seq, half));
    let (cos, sin) = (table(cos)?, table(sin)?);
    let (low, high) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    let rest = x.dim(3)? - 2 * half;
    if rest == 0 {
        Tensor::cat(&[first, second], 3)
    } else {
        Tensor::cat(&[first, second, x.narrow(3, 2 * half, rest)?], 3)
    }
}

/// The sum of the negative log likelihoods of the counted targets, of normed activations, over a head `[vocab, hidden]`.
pub(super) fn loss(x: &Tensor, head: &Parameter, tokens: &Tokens) -> Result<Tensor> {
    let logits = product(head, Order::OutIn, x)?;
    let device: &Device = x.device();
    let targets: Vec<u32> =
        tokens.targets.iter().map(|&target| if target == Tokens::IGNORED { 0 } else { target }).collect();
    let counted: Vec<f32> =
        tokens.targets.iter().map(|&target| f32::from(u8::from(target != Tokens::IGNORED))).collect();
    let rows = targets.len();
    let targets = Tensor::from_vec(targets, (rows, 1), device)?;
    let counted = Tensor::from_vec(counted, (rows, 1), device)?;
    let likelihood = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?;
    (likelihood * counted)?.sum_all()?.neg()
}

/// Rows of a table `[count, hidden]`.
pub(super) fn lookup(table: &Parameter, ids: &[u32], device: &Device) -> Result<Tensor> {
    table.tensor()?.embedding(&Tensor::from_slice(ids, ids.len(), device)?)
}

/// `x Wᵀ` of a head `[vocab, hidden]`.
pub(super) fn logits(head: &Parameter, x: &Tensor) -> Result<Tensor> {
    product(head, Order::OutIn, x)
}
