//! AdamW on slices: one pass over parameter, gradient and both moments, all f32.
//!
//! Source: "Decoupled Weight Decay Regularization", arXiv 1711.05101, in the order of operations of torch.optim.AdamW.

use super::config::OptimizerRecipe;

/// The constants of one step.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdamW {
    /// The second beta, and what both leave: computed in f64, because 1 - 0.999 has few digits in f32.
    beta2: f32,
    rests: (f32, f32),
    epsilon: f32,
    /// Learning rate over the correction of the first moment.
    step_size: f32,
    /// Root of the correction of the second moment.
    root_correction: f32,
    learning_rate: f64,
}

impl AdamW {
    /// The constants of optimizer step `step`, counted from 1.
    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32's")]
    pub(super) fn at(recipe: &OptimizerRecipe, step: u64, learning_rate: f64) -> Self {
        let (beta1, beta2) = recipe.betas;
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        let step_size = learning_rate / (1.0 - beta1.powi(power));
        let root_correction = (1.0 - beta2.powi(power)).sqrt();
        Self {
            beta2: beta2 as f32,
            rests: ((1.0 - beta1) as f32, (1.0 - beta2) as f32),
            epsilon: recipe.epsilon as f32,
            step_size: step_size as f32,
            root_correction: root_correction as f32,
            learning_rate,
        }
    }

    /// Updates `parameter` and its moments by `gradient`, scaled by `scale` first.
    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32's")]
    pub(super) fn update(
        self,
        parameter: &mut [f32],
        (first, second): (&mut [f32], &mut [f32]),
        (gradient, scale): (&[f32], f32),
        weight_decay: f64,
    ) {
        let keep = (1.0 - self.learning_rate * weight_decay) as f32;
        let (rest1, rest2) = self.rests;
        let moments = first.iter_mut().zip(second);
        for ((parameter, (first, second)), gradient) in parameter.iter_mut().zip(moments).zip(gradient) {
            let gradient = gradient * scale;
            *first += (gradient - *first) * rest1;
            *second = *second * self.beta2 + gradient * gradient * rest2;
            let denominator = second.sqrt() / self.root_correction + self.epsilon;
            *parameter = *parameter * keep - self.step_size * *first / denominator;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From torch 2.15: `p = torch.tensor([1., -2., 0.5], requires_grad=True)`, `torch.optim.AdamW([p], lr=0.1,
    /// weight_decay=0.01)`, gradients [0.5, -1, 2], [0.1, 0.2, -0.3], [0, 1, 1] in three steps.
    #[test]
    fn three_steps_equal_torch() {
        let recipe = OptimizerRecipe { ..OptimizerRecipe::default() };
        let (mut p, mut m, mut v) = ([1.0, -2.0, 0.5], [0.0; 3], [0.0; 3]);
        for (step, gradient) in (1..).zip([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3], [0.0, 1.0, 1.0]]) {
            AdamW::at(&recipe, step, 0.1).update(&mut p, (&mut m, &mut v), (&gradient, 1.0), 0.01);
        }
        for (found, expected) in p.iter().zip(EXPECTED) {
            assert!((found - expected).abs() <= 2e-7 * expected.abs().max(1.0), "{p:?} {EXPECTED:?}");
        }
    }

    const EXPECTED: [f32; 3] = [0.754_903_85, -1.859_711_3, 0.276_943_86];
}
