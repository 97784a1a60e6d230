//! A norm with its parameters, on the CPU.

use candle_core::{Result, Var};

use super::Parameter;
use super::layers::Norm;
use super::ops::fused::Gradients;
use super::ops::matrix::{Held, Matrix};
use super::ops::norm::{self, NormSaved, Wanted};

/// The norm of rows as long as its weight.
pub(super) fn forward(layer: &Norm, x: &[f32]) -> Result<(Matrix, NormSaved)> {
    let weight = layer.weight.tensor()?;
    let weight = Held::new(&weight)?;
    match &layer.bias {
        None => Ok(norm::forward(x, weight.data()?, None, layer.eps)),
        Some(bias) => {
            let bias = bias.tensor()?;
            let bias = Held::new(&bias)?;
            Ok(norm::forward(x, weight.data()?, Some(bias.data()?), layer.eps))
        }
    }
}

/// The gradient of the input; those of the parameters go to `found`.
pub(super) fn backward(
    layer: &Norm,
    x: &[f32],
    saved: &NormSaved,
    gradient: &[f32],
    found: &mut Gradients,
) -> Result<Matrix> {
    let weight = layer.weight.tensor()?;
    let weight = Held::new(&weight)?;
    let wanted =
        Wanted { weight: !layer.weight.is_frozen(), bias: layer.bias.as_ref().is_some_and(|bias| !bias.is_frozen()) };
    let gradients = norm::backward(x, weight.data()?, saved, gradient, (layer.bias.is_some(), wanted));
    if let (Parameter::Trainable(variable), Some(gradient)) = (&layer.weight, gradients.weight) {
        found.put_vector(variable, gradient)?;
    }
    if let (Some(Parameter::Trainable(variable)), Some(gradient)) = (&layer.bias, gradients.bias) {
        found.put_vector(variable, gradient)?;
    }
    Ok(gradients.input)
}

impl Norm {
    pub(super) fn variables(&self) -> Vec<Var> {
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten().filter_map(Parameter::variable).collect()
    }
}
