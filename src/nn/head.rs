//! The last norm and the loss over the head; on the CPU as one function with its own backward.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor, Var};

use super::layers::Norm;
use super::ops::cross_entropy::{Loss, Wanted, cross_entropy};
use super::ops::fused::{Function, Gradients, apply};
use super::ops::matrix::{Held, Matrix};
use super::ops::norm::NormSaved;
use super::ops::vector;
use super::{Parameter, Tokens, composed, norm};

/// The last norm and the output matrix `[vocab, hidden]`.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) norm: Norm,
    pub(super) weight: Parameter,
    pub(super) vocab: usize,
}

/// Logits of activations `[rows, hidden]`.
pub(super) fn logits(head: &Head, x: &Tensor) -> Result<Tensor> {
    composed::logits(&head.weight, &composed::norm(&head.norm, x)?)
}

/// The sum of the negative log likelihoods.
pub(super) fn loss(head: &Arc<Head>, x: &Tensor, tokens: &Tokens) -> Result<Tensor> {
    if x.device().is_cpu() {
        apply(LossFunction { head: Arc::clone(head), targets: tokens.targets.clone() }, x)
    } else {
        composed::loss(&composed::norm(&head.norm, x)?, &head.weight, tokens)
    }
}

struct LossFunction {
    head: Arc<Head>,
    targets: Vec<u32>,
}

impl Function for LossFunction {
    type Saved = (NormSaved, Loss);

    const NAME: &'static str = "loss";

    fn variables(&self) -> Vec<Var> {
        self.head.norm.variables().into_iter().chain(self.head.weight.variable()).collect()
    }

    fn forward(&self, x: &Tensor, wanted: bool) -> Result<(Vec<f32>, Shape, Self::Saved)> {
        let held = Held::new(x)?;
        let (normed, saved) = norm::forward(&self.head.norm, held.data()?)?;
        if normed.rows() != self.targets.len() {
            candle_core::bail!("activations of {} tokens, {} targets", normed.rows(), self.targets.len());
        }
        let weight = self.head.weight.tensor()?;
        let weight = Held::new(&weight)?;
        let wanted = Wanted { input: wanted, head: wanted && !self.head.weight.is_frozen() };
        let loss = cross_entropy(&normed, (weight.view()?, self.head.vocab), &self.targets, wanted)?;
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
        let total = loss.total as f32;
        Ok((vec![total], Shape::from(()), (saved, loss)))
    }

    fn backward(
        &self,
        x: &Tensor,
        (saved, loss): Self::Saved,
        gradient: &Tensor,
        found: &mut Gradients,
    ) -> Result<Tensor> {
        let factor: f32 = gradient.to_scalar()?;
        let scale = |mut matrix: Matrix| {
            vector::map(matrix.data_mut(), |value| value * factor);
            matrix
        };
        if let (Parameter::Trainable(weight), Some(gradient)) = (&self.head.weight, loss.head) {
            found.put(weight, scale(gradient))?;
        }
        let Some(input) = loss.input.map(scale) else { candle_core::bail!("the loss kept no gradient") };
        let held = Held::new(x)?;
        norm::backward(&self.head.norm, held.data()?, &saved, input.data(), found)?.into_tensor()
    }
}
