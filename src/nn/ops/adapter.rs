//! Adapters of linear layers on the CPU: their part of a product, or merged into the weight, and their gradients.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::dropout::Dropout;
use super::fused::Gradients;
use super::matrix::{Held, Matrix, View};
use super::vector::{column_sums, map, sum2, update, wide};
use crate::nn::layers::{Linear, Order};
use crate::nn::{Lora, Pass};

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
    let mut merged = direction(layer, (Held::new(&a)?.view()?, Held::new(&b)?.view()?))?;
    let scale = scale_of(adapter);
    update(merged.data_mut(), weight.data()?, |low, weight| weight + scale * low);
    Ok(Some(merged))
}

/// `B A` as the weight lies.
fn direction(layer: &Linear, (a, b): (View<'_>, View<'_>)) -> Result<Matrix> {
    match layer.order {
        Order::OutIn => b.times(a),
        Order::InOut => a.t().times(b.t()),
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
    let low = dropped.as_ref().map_or(x, Matrix::view).times(Held::new(&a)?.view()?.t())?;
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
    let high = saved.low.view().times(b.view()?.t())?;
    let scale = scale_of(adapter);
    let Some(magnitude) = &adapter.magnitude else {
        update(out.data_mut(), high.data(), |out, high| out + scale * high);
        return Ok(saved);
    };
    let norms = direction_norms(layer, weight, (a.view()?, b.view()?, scale))?;
    let magnitude = magnitude.as_tensor().detach();
    let magnitude = Held::new(&magnitude)?;
    let ratios: Vec<f32> = magnitude.data()?.iter().zip(&norms).map(|(magnitude, norm)| magnitude / norm).collect();
    // With dropout PEFT scales only the product of what dropout left, and keeps the rest of the base's product.
    let mut outputs = high;
    if let Some(dropped) = &saved.dropped {
        let base = dropped.view().times(layer.right(weight)?)?;
        update(out.data_mut(), base.data(), |out, base| out - base);
        update(outputs.data_mut(), base.data(), |high, base| base + scale * high);
    } else {
        update(outputs.data_mut(), out.data(), |high, base| base + scale * high);
        out.data_mut().fill(0.0);
    }
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
    let low = direction(layer, (a, b))?;
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
    let mut low = gradient.view().times(Held::new(&b)?.view()?)?;
    map(low.data_mut(), |value| value * scale);
    // The transpose of B's gradient: the wide matrix is read along its rows.
    let mut across = saved.low.view().t().times(gradient.view())?;
    map(across.data_mut(), |value| value * scale);
    gradients.put(&adapter.b, across.transposed())?;
    let input = saved.dropped.as_ref().map_or(x, Matrix::view);
    gradients.put(&adapter.a, low.view().t().times(input)?)?;
    Ok(low)
}

/// The gradient of the adapter's input from what [`backward`] returned.
pub(super) fn input_gradient(adapter: &Lora, low: &Matrix) -> Result<Matrix> {
    let (a, _) = matrices(adapter);
    low.view().times(Held::new(&a)?.view()?)
}

/// Adds the gradient of the adapter's input to that of the layer's, through dropout.
pub(super) fn add_dropped(
    layer: &Linear,
    adapter: &Lora,
    (input, pass): (&Matrix, &Pass),
    active: bool,
    out: &mut Matrix,
) {
    match pass.dropout.filter(|_| active) {
        None => update(out.data_mut(), input.data(), |out, input| out + input),
        Some(key) => {
            let dropout = Dropout::new(adapter, key, pass.seq);
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
        }
    }
}
