//! A linear layer with its adapter, on the CPU: only the gradients that somebody wants.

use candle_core::{Result, Tensor, Var};
use rayon::prelude::*;

use super::dropout::Dropout;
use super::fused::Gradients;
use super::matrix::{Held, Matrix, View};
use super::vector::{column_sums, sum2, update};
use crate::nn::layers::{Linear, Order};
use crate::nn::{Lora, Parameter, Pass};

/// What the backward needs of an adapter's forward.
#[derive(Debug)]
pub(in crate::nn) struct AdapterSaved {
    /// The adapter's input where dropout changed it.
    dropped: Option<Matrix>,
    /// `A x`, `[rows, rank]`.
    low: Matrix,
    /// `DoRA`: the output before the magnitude, `[rows, out]`, and the ratio of magnitude and norm, `[out]`.
    scaled: Option<(Matrix, Vec<f32>, Vec<f32>)>,
}

/// The weight as `[in, out]`.
fn right<'a>(layer: &Linear, weight: &'a Held<'_>) -> Result<View<'a>> {
    let view = weight.view()?;
    Ok(if layer.order == Order::OutIn { view.t() } else { view })
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
fn scale_of(adapter: &Lora) -> f32 {
    adapter.scale as f32
}

/// `x Wᵀ + bias`, with the adapter, of `x` as `[rows, in]`.
pub(in crate::nn) fn forward(
    layer: &Linear,
    x: View<'_>,
    values: &[f32],
    pass: &Pass,
) -> Result<(Matrix, Option<AdapterSaved>)> {
    let weight = layer.weight.tensor()?;
    let weight = Held::new(&weight)?;
    let mut out = x.times(right(layer, &weight)?)?;
    let saved = match &layer.adapter {
        Some(adapter) => {
            let dropped = dropped(layer, adapter, values, pass);
            Some(adapt(layer, adapter, (x, dropped), &weight, &mut out)?)
        }
        None => None,
    };
    if let Some(bias) = &layer.bias {
        let bias = bias.tensor()?;
        let bias = Held::new(&bias)?;
        let bias = bias.data()?;
        out.data_mut().par_chunks_mut(bias.len()).with_min_len(16).for_each(|line| {
            line.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        });
    }
    Ok((out, saved))
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

/// Adds the adapter's part to the base's product `out`.
fn adapt(
    layer: &Linear,
    adapter: &Lora,
    (x, dropped): (View<'_>, Option<Matrix>),
    weight: &Held<'_>,
    out: &mut Matrix,
) -> Result<AdapterSaved> {
    let input = dropped.as_ref().map_or(x, Matrix::view);
    let (a, b) = (adapter.a.as_tensor().detach(), adapter.b.as_tensor().detach());
    let (a, b) = (Held::new(&a)?, Held::new(&b)?);
    let low = input.times(a.view()?.t())?;
    let high = low.view().times(b.view()?.t())?;
    let scale = scale_of(adapter);
    let Some(magnitude) = &adapter.magnitude else {
        update(out.data_mut(), high.data(), |out, high| out + scale * high);
        return Ok(AdapterSaved { dropped, low, scaled: None });
    };
    let norms = direction_norms(layer, weight, (a.view()?, b.view()?, scale))?;
    let magnitude = magnitude.as_tensor().detach();
    let magnitude = Held::new(&magnitude)?;
    let ratios: Vec<f32> = magnitude.data()?.iter().zip(&norms).map(|(magnitude, norm)| magnitude / norm).collect();
    // With dropout PEFT scales only the product of what dropout left, and keeps the rest of the base's product.
    let mut scaled = high;
    if let Some(dropped) = &dropped {
        let base = dropped.view().times(right(layer, weight)?)?;
        update(out.data_mut(), base.data(), |out, base| out - base);
        update(scaled.data_mut(), base.data(), |high, base| base + scale * high);
    } else {
        update(scaled.data_mut(), out.data(), |high, base| base + scale * high);
        out.data_mut().fill(0.0);
    }
    let columns = ratios.len();
    out.data_mut().par_chunks_mut(columns).zip(scaled.data().par_chunks(columns)).for_each(|(out, scaled)| {
        for ((out, scaled), ratio) in out.iter_mut().zip(scaled).zip(&ratios) {
            *out += scaled * ratio;
        }
    });
    Ok(AdapterSaved { dropped, low, scaled: Some((scaled, ratios, norms)) })
}

/// The length of each output's row of `W + scale * B A`, `[out]`.
fn direction_norms(layer: &Linear, weight: &Held<'_>, (a, b, scale): (View<'_>, View<'_>, f32)) -> Result<Vec<f32>> {
    let values = weight.data()?;
    if layer.order == Order::OutIn {
        let low = b.times(a)?;
        let rows = values.par_chunks(layer.inputs).zip(low.data().par_chunks(layer.inputs));
        return Ok(rows
            .map(|(weight, low)| sum2(weight, low, |w, l| (w + scale * l) * (w + scale * l)).sqrt())
            .collect());
    }
    let low = a.t().times(b.t())?;
    let sums = column_sums(layer.inputs, layer.outputs, |row, sums| {
        let range = row * layer.outputs..(row + 1) * layer.outputs;
        for ((sum, w), l) in sums.iter_mut().zip(&values[range.clone()]).zip(&low.data()[range]) {
            *sum += (w + scale * l) * (w + scale * l);
        }
    });
    Ok(sums.into_iter().map(f32::sqrt).collect())
}

/// The gradient of the input; those of parameters go to `gradients`.
pub(in crate::nn) fn backward(
    layer: &Linear,
    (x, pass): (View<'_>, &Pass),
    saved: Option<&AdapterSaved>,
    gradient: &Matrix,
    gradients: &mut Gradients,
) -> Result<Matrix> {
    let columns = gradient.columns();
    let sums = |function: &(dyn Fn(usize, &mut [f32]) + Sync)| column_sums(gradient.rows(), columns, function);
    let line = |row: usize| row * columns..(row + 1) * columns;
    if let Some(Parameter::Trainable(bias)) = &layer.bias {
        let total = sums(&|row, sums| {
            sums.iter_mut().zip(&gradient.data()[line(row)]).for_each(|(sum, gradient)| *sum += gradient);
        });
        gradients.put_vector(bias, total)?;
    }
    // DoRA scales each output, so its gradient on the way in too.
    let scaled = saved.and_then(|saved| saved.scaled.as_ref());
    let inner = match (scaled, layer.adapter.as_ref().and_then(|adapter| adapter.magnitude.as_ref())) {
        (Some((outputs, ratios, norms)), Some(magnitude)) => {
            let total = sums(&|row, sums| {
                for ((sum, gradient), output) in
                    sums.iter_mut().zip(&gradient.data()[line(row)]).zip(&outputs.data()[line(row)])
                {
                    *sum += gradient * output;
                }
            });
            gradients.put_vector(magnitude, total.iter().zip(norms).map(|(sum, norm)| sum / norm).collect())?;
            let mut inner = gradient.clone();
            inner.data_mut().par_chunks_mut(columns).for_each(|inner| {
                inner.iter_mut().zip(ratios).for_each(|(inner, ratio)| *inner *= ratio);
            });
            Some(inner)
        }
        _ => None,
    };
    let inner = inner.as_ref().unwrap_or(gradient);
    let dropped = saved.and_then(|saved| saved.dropped.as_ref());
    let split = scaled.is_some() && dropped.is_some();
    if let Parameter::Trainable(weight) = &layer.weight {
        let product = |x: View<'_>, gradient: View<'_>| match layer.order {
            Order::OutIn => gradient.t().times(x),
            Order::InOut => x.t().times(gradient),
        };
        let mut total = product(x, if split { gradient.view() } else { inner.view() })?;
        if let Some(dropped) = dropped.filter(|_| split) {
            let difference = difference(inner, gradient);
            update(total.data_mut(), product(dropped.view(), difference.view())?.data(), |total, part| total + part);
        }
        gradients.put(weight, total)?;
    }
    let weight = layer.weight.tensor()?;
    let weight = Held::new(&weight)?;
    let back = right(layer, &weight)?.t();
    let mut out = if split { gradient.view() } else { inner.view() }.times(back)?;
    if let (Some(adapter), Some(saved)) = (&layer.adapter, saved) {
        let mut input = adapter_backward(adapter, (x, saved), inner, gradients)?;
        if split {
            let part = difference(inner, gradient).view().times(back)?;
            update(input.data_mut(), part.data(), |input, part| input + part);
        }
        add_dropped(layer, adapter, (&input, pass), saved.dropped.is_some(), &mut out);
    }
    Ok(out)
}

impl Linear {
    /// Everything that is trained in it.
    pub(in crate::nn) fn variables(&self) -> Vec<Var> {
        let own = [Some(&self.weight), self.bias.as_ref()].into_iter().flatten().filter_map(Parameter::variable);
        let adapter = self
            .adapter
            .iter()
            .flat_map(|adapter| [adapter.a.clone(), adapter.b.clone()].into_iter().chain(adapter.magnitude.clone()));
        own.chain(adapter).collect()
    }
}

fn difference(left: &Matrix, right: &Matrix) -> Matrix {
    let mut out = left.clone();
    update(out.data_mut(), right.data(), |left, right| left - right);
    out
}

/// The gradient of the adapter's input, and those of its matrices.
fn adapter_backward(
    adapter: &Lora,
    (x, saved): (View<'_>, &AdapterSaved),
    gradient: &Matrix,
    gradients: &mut Gradients,
) -> Result<Matrix> {
    let (a, b): (Tensor, Tensor) = (adapter.a.as_tensor().detach(), adapter.b.as_tensor().detach());
    let (a, b) = (Held::new(&a)?, Held::new(&b)?);
    let scale = scale_of(adapter);
    let mut low = gradient.view().times(b.view()?)?;
    low.data_mut().iter_mut().for_each(|value| *value *= scale);
    let mut second = gradient.view().t().times(saved.low.view())?;
    second.data_mut().iter_mut().for_each(|value| *value *= scale);
    gradients.put(&adapter.b, second)?;
    let input = saved.dropped.as_ref().map_or(x, Matrix::view);
    gradients.put(&adapter.a, low.view().t().times(input)?)?;
    low.view().times(a.view()?)
}

/// Adds the gradient of the adapter's input to that of the layer's, through dropout.
fn add_dropped(layer: &Linear, adapter: &Lora, (input, pass): (&Matrix, &Pass), active: bool, out: &mut Matrix) {
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
