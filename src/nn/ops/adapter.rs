//! Adapters of linear layers on the CPU: their part of a product, or merged into the weight, and their gradients.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::dropout::Dropout;
use super::fused::Gradients;
use super::matrix::{Held, Matrix, View, copy};
use super::vector::{column_sums, sum2, update, wide};
use crate::nn::layers::{Linear, Order};
use crate::nn::{DropoutKey, Lora, Pass};

/// What the backward needs of an adapter's forward.
#[derive(Debug)]
pub(in crate::nn) struct AdapterSaved {
    /// The adapter's input where dropout changed it.
    pub(super) dropped: Option<Matrix>,
    /// `A x`, `[rows, rank]`.
    low: Matrix,
    /// `DoRA`.
    pub(super) scaled: Option<Scaled>,
}

/// What a magnitude's backward needs.
#[derive(Debug)]
pub(super) struct Scaled {
    /// The output before the magnitude, `[rows, out]`.
    outputs: Matrix,
    /// Magnitude by norm, `[out]`.
    ratios: Vec<f32>,
    /// The length of each output's row of the weight with its adapter, `[out]`.
    norms: Vec<f32>,
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
fn scale_of(adapter: &Lora) -> f32 {
    adapter.scale as f32
}

/// Both matrices, without a graph.
fn matrices(adapter: &Lora) -> (Tensor, Tensor) {
    (adapter.a.as_tensor().detach(), adapter.b.as_tensor().detach())
}

/// `W + scale * B A` as W lies, where a product with it costs less than two narrow ones beside a product with W: with more
/// rows than inputs, no dropout in this pass and no magnitude.
pub(super) fn merged(layer: &Linear, weight: &Held<'_>, rows: usize, pass: &Pass) -> Result<Option<Matrix>> {
    let Some(adapter) = &layer.adapter else { return Ok(None) };
    let drops = pass.dropout.is_some() && adapter.dropout > 0.0;
    if drops || adapter.magnitude.is_some() || rows <= layer.inputs {
        return Ok(None);
    }
    let (a, b) = matrices(adapter);
    let (a, b) = (Held::new(&a)?, Held::new(&b)?);
    let (left, right) = direction(layer, (a.view()?, b.view()?));
    let mut merged = Matrix::new(copy(weight.data()?), right.columns());
    merged.add_product(left, right, scale_of(adapter));
    Ok(Some(merged))
}

/// The factors of `B A` as the weight lies.
fn direction<'a>(layer: &Linear, (a, b): (View<'a>, View<'a>)) -> (View<'a>, View<'a>) {
    match layer.order {
        Order::OutIn => (b, a),
        Order::InOut => (a.t(), b.t()),
    }
}

/// What the backward needs where the adapter is merged or its output is not wanted; it has no magnitude.
pub(super) fn recall(
    layer: &Linear,
    adapter: &Lora,
    (x, values): (View<'_>, &[f32]),
    pass: &Pass,
) -> Result<AdapterSaved> {
    let dropped = dropped(layer, adapter, values, pass);
    let (a, _) = matrices(adapter);
    let low = dropped.as_ref().map_or(x, Matrix::view).times(Held::new(&a)?.view()?.t());
    Ok(AdapterSaved { dropped, low, scaled: None })
}

/// Adds the adapter's part to the base's product `out`.
pub(super) fn add(
    layer: &Linear,
    adapter: &Lora,
    (x, values, pass): (View<'_>, &[f32], &Pass),
    weight: &Held<'_>,
    out: &mut Matrix,
) -> Result<AdapterSaved> {
    let mut saved = recall(layer, adapter, (x, values), pass)?;
    let (a, b) = matrices(adapter);
    let (a, b) = (Held::new(&a)?, Held::new(&b)?);
    let scale = scale_of(adapter);
    let Some(magnitude) = &adapter.magnitude else {
        out.add_product(saved.low.view(), b.view()?.t(), scale);
        return Ok(saved);
    };
    let norms = direction_norms(layer, weight, (a.view()?, b.view()?, scale))?;
    let magnitude = magnitude.as_tensor().detach();
    let magnitude = Held::new(&magnitude)?;
    let ratios: Vec<f32> = magnitude.data()?.iter().zip(&norms).map(|(magnitude, norm)| magnitude / norm).collect();
    // With dropout PEFT scales only the product of what dropout left, and keeps the rest of the base's product.
    let mut outputs = match &saved.dropped {
        Some(dropped) => {
            let base = dropped.view().times(layer.right(weight)?);
            update(out.data_mut(), base.data(), |out, base| out - base);
            base
        }
        None => std::mem::replace(out, Matrix::zeros(out.rows(), out.columns())),
    };
    outputs.add_product(saved.low.view(), b.view()?.t(), scale);
    let columns = ratios.len();
    out.data_mut().par_chunks_mut(columns).zip(outputs.data().par_chunks(columns)).for_each(|(out, outputs)| {
        wide(|| {
            for ((out, output), ratio) in out.iter_mut().zip(outputs).zip(&ratios) {
                *out += output * ratio;
            }
        });
    });
    saved.scaled = Some(Scaled { outputs, ratios, norms });
    Ok(saved)
}

/// The adapter's input after dropout; nothing when that is its input.
fn dropped(layer: &Linear, adapter: &Lora, values: &[f32], pass: &Pass) -> Option<Matrix> {
    let key = pass.dropout.filter(|_| adapter.dropout > 0.0)?;
    let dropout = Dropout::new(adapter, key, pass.seq);
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(layer.inputs).zip(values.par_chunks(layer.inputs)).enumerate().with_min_len(16).for_each(
        |(row, (out, values))| {
            dropout.factors(row, out);
            out.iter_mut().zip(values).for_each(|(out, value)| *out *= value);
        },
    );
    Some(Matrix::new(out, layer.inputs))
}

/// The length of each output's row of `W + scale * B A`, `[out]`.
fn direction_norms(layer: &Linear, weight: &Held<'_>, (a, b, scale): (View<'_>, View<'_>, f32)) -> Result<Vec<f32>> {
    let values = weight.data()?;
    let (left, right) = direction(layer, (a, b));
    let low = left.times(right);
    if layer.order == Order::OutIn {
        let rows = values.par_chunks(layer.inputs).zip(low.data().par_chunks(layer.inputs));
        return Ok(rows
            .map(|(weight, low)| wide(|| sum2(weight, low, |w, l| (w + scale * l) * (w + scale * l))).sqrt())
            .collect());
    }
    let sums = column_sums(layer.inputs, layer.outputs, |row, sums| {
        let range = row * layer.outputs..(row + 1) * layer.outputs;
        for ((sum, w), l) in sums.iter_mut().zip(&values[range.clone()]).zip(&low.data()[range]) {
            *sum += (w + scale * l) * (w + scale * l);
        }
    });
    Ok(sums.into_iter().map(f32::sqrt).collect())
}

/// The gradient of the output before `DoRA`'s magnitude, whose own gradient goes to `gradients`.
pub(super) fn magnitude_backward(
    adapter: &Lora,
    scaled: &Scaled,
    gradient: &Matrix,
    gradients: &mut Gradients,
) -> Result<Matrix> {
    let Scaled { outputs, ratios, norms } = scaled;
    let columns = gradient.columns();
    let line = |row: usize| row * columns..(row + 1) * columns;
    if let Some(magnitude) = &adapter.magnitude {
        let total = column_sums(gradient.rows(), columns, |row, sums| {
            let (gradient, outputs) = (&gradient.data()[line(row)], &outputs.data()[line(row)]);
            for ((sum, gradient), output) in sums.iter_mut().zip(gradient).zip(outputs) {
                *sum += gradient * output;
            }
        });
        gradients.put_vector(magnitude, total.iter().zip(norms).map(|(sum, norm)| sum / norm).collect())?;
    }
    let mut inner = gradient.clone();
    inner.data_mut().par_chunks_mut(columns).for_each(|inner| {
        wide(|| inner.iter_mut().zip(ratios).for_each(|(inner, ratio)| *inner *= ratio));
    });
    Ok(inner)
}

/// Puts the gradients of both matrices; returns `scale * B gradient`, `[rows, rank]`.
pub(super) fn backward(
    adapter: &Lora,
    (x, saved): (View<'_>, &AdapterSaved),
    gradient: &Matrix,
    gradients: &mut Gradients,
) -> Result<Matrix> {
    let (_, b) = matrices(adapter);
    let scale = scale_of(adapter);
    let low = gradient.view().times_scaled(Held::new(&b)?.view()?, scale);
    // The transpose of B's gradient: the wide matrix is read along its rows.
    let across = saved.low.view().t().times_scaled(gradient.view(), scale);
    gradients.put(&adapter.b, across.transposed())?;
    let input = saved.dropped.as_ref().map_or(x, Matrix::view);
    gradients.put(&adapter.a, low.view().t().times(input))?;
    Ok(low)
}

/// Adds the gradient of the adapter's input, made of what [`backward`] returned, to that of the layer's.
pub(super) fn add_input_gradient(adapter: &Lora, low: &Matrix, out: &mut Matrix) -> Result<()> {
    let (a, _) = matrices(adapter);
    out.add_product(low.view(), Held::new(&a)?.view()?, 1.0);
    Ok(())
}

/// As [`add_input_gradient`], through the dropout of the forward; `part` is added before it.
pub(super) fn add_dropped(
    layer: &Linear,
    adapter: &Lora,
    (low, key, seq): (&Matrix, DropoutKey, usize),
    part: Option<Matrix>,
    out: &mut Matrix,
) -> Result<()> {
    let mut input = part.unwrap_or_else(|| Matrix::zeros(out.rows(), out.columns()));
    add_input_gradient(adapter, low, &mut input)?;
    let dropout = Dropout::new(adapter, key, seq);
    let lines = out.data_mut().par_chunks_mut(layer.inputs).zip(input.data().par_chunks(layer.inputs));
    lines.enumerate().with_min_len(16).for_each_init(
        || vec![0.0; layer.inputs],
        |factors, (row, (out, input))| {
            dropout.factors(row, factors);
            for ((out, input), factor) in out.iter_mut().zip(input).zip(&*factors) {
                *out += input * factor;
            }
        },
    );
    Ok(())
}
