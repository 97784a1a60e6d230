//! A linear layer with its adapter, on the CPU: only the gradients that somebody wants.

use candle_core::{Result, Var};
use rayon::prelude::*;

use super::adapter::{self, AdapterSaved};
use super::fused::Gradients;
use super::matrix::{Held, Matrix, View};
use super::vector::{column_sums, update, wide};
use crate::nn::layers::{Linear, Order};
use crate::nn::{Parameter, Pass};

impl Linear {
    /// The weight as `[in, out]`.
    pub(super) fn right<'a>(&self, weight: &'a Held<'_>) -> Result<View<'a>> {
        Ok(self.as_right(weight.view()?))
    }

    fn as_right<'a>(&self, weight: View<'a>) -> View<'a> {
        if self.order == Order::OutIn { weight.t() } else { weight }
    }

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

/// `x Wᵀ + bias`, with the adapter, of `x` as `[rows, in]`; with what a backward needs where one is `wanted`.
pub(in crate::nn) fn forward(
    layer: &Linear,
    (x, pass): (&Matrix, &Pass),
    wanted: bool,
) -> Result<(Matrix, Option<AdapterSaved>)> {
    let weight = layer.weight.tensor()?;
    let weight = Held::new(&weight)?;
    let (view, values) = (x.view(), x.data());
    let (mut out, saved) = match (&layer.adapter, adapter::merged(layer, &weight, x.rows(), pass)?) {
        (Some(adapter), Some(merged)) => {
            let out = view.times(layer.as_right(merged.view()));
            drop(merged);
            (out, if wanted { Some(adapter::recall(layer, adapter, (view, values), pass)?) } else { None })
        }
        (Some(adapter), None) => {
            let mut out = view.times(layer.right(&weight)?);
            let saved = adapter::add(layer, adapter, (view, values, pass), &weight, &mut out)?;
            (out, Some(saved))
        }
        (None, _) => (view.times(layer.right(&weight)?), None),
    };
    if let Some(bias) = &layer.bias {
        let bias = bias.tensor()?;
        let bias = Held::new(&bias)?;
        let bias = bias.data()?;
        out.data_mut().par_chunks_mut(bias.len()).with_min_len(16).for_each(|line| {
            wide(|| line.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias));
        });
    }
    Ok((out, saved))
}

/// What [`backward`] needs of a forward whose output nobody reads.
pub(in crate::nn) fn recall(layer: &Linear, x: &Matrix, pass: &Pass) -> Result<Option<AdapterSaved>> {
    match &layer.adapter {
        None => Ok(None),
        // A magnitude's gradient is made of the output.
        Some(adapter) if adapter.magnitude.is_some() => Ok(forward(layer, (x, pass), true)?.1),
        Some(adapter) => adapter::recall(layer, adapter, (x.view(), x.data()), pass).map(Some),
    }
}

/// The gradient of the input, added to `onto` where there is one; those of parameters go to `gradients`.
pub(in crate::nn) fn backward(
    layer: &Linear,
    (x, pass): (&Matrix, &Pass),
    saved: Option<&AdapterSaved>,
    (gradient, onto): (&Matrix, Option<Matrix>),
    gradients: &mut Gradients,
) -> Result<Matrix> {
    let columns = gradient.columns();
    if let Some(Parameter::Trainable(bias)) = &layer.bias {
        let total = column_sums(gradient.rows(), columns, |row, sums| {
            let line = &gradient.data()[row * columns..(row + 1) * columns];
            sums.iter_mut().zip(line).for_each(|(sum, gradient)| *sum += gradient);
        });
        gradients.put_vector(bias, total)?;
    }
    // DoRA scales each output, so its gradient on the way in too.
    let scaled = saved.and_then(|saved| saved.scaled.as_ref());
    let inner = match (scaled, &layer.adapter) {
        (Some(scaled), Some(adapter)) => Some(adapter::magnitude_backward(adapter, scaled, gradient, gradients)?),
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
        let mut total = product(x.view(), if split { gradient.view() } else { inner.view() });
        if let Some(dropped) = dropped.filter(|_| split) {
            let difference = difference(inner, gradient);
            update(total.data_mut(), product(dropped.view(), difference.view()).data(), |total, part| total + part);
        }
        gradients.put(weight, total)?;
    }
    let weight = layer.weight.tensor()?;
    let weight = Held::new(&weight)?;
    let low = match (&layer.adapter, saved) {
        (Some(adapter), Some(saved)) => Some(adapter::backward(adapter, (x.view(), saved), inner, gradients)?),
        _ => None,
    };
    if let Some(merged) = adapter::merged(layer, &weight, x.rows(), pass)? {
        return Ok(added(onto, inner.view(), layer.as_right(merged.view()).t()));
    }
    let back = layer.right(&weight)?.t();
    let mut out = added(onto, if split { gradient.view() } else { inner.view() }, back);
    if let (Some(adapter), Some(low)) = (&layer.adapter, &low) {
        match pass.dropout.filter(|_| dropped.is_some()) {
            None => adapter::add_input_gradient(adapter, low, &mut out)?,
            Some(key) => {
                let part = split.then(|| difference(inner, gradient).view().times(back));
                adapter::add_dropped(layer, adapter, (low, key, pass.seq), part, &mut out)?;
            }
        }
    }
    Ok(out)
}

/// The product, added to what is there.
fn added(onto: Option<Matrix>, left: View<'_>, right: View<'_>) -> Matrix {
    match onto {
        None => left.times(right),
        Some(mut out) => {
            out.add_product(left, right, 1.0);
            out
        }
    }
}

fn difference(left: &Matrix, right: &Matrix) -> Matrix {
    let mut out = left.clone();
    update(out.data_mut(), right.data(), |left, right| left - right);
    out
}
