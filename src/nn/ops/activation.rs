//! The activations of MLPs.

use rayon::prelude::*;

use super::matrix::copy;
use super::vector::{TASK, exp, map, update, wide};

/// sqrt(2 / pi).
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

/// `silu(gate) * up`.
pub(in crate::nn) fn silu_mul(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(TASK).zip(gate.par_chunks(TASK)).zip(up.par_chunks(TASK)).for_each(|((out, gate), up)| {
        wide(|| {
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * up / (1.0 + exp(-gate));
            }
        });
    });
    out
}

/// The gradients of gate and up, written over gate and up.
pub(in crate::nn) fn silu_mul_backward(gate: &mut [f32], up: &mut [f32], gradient: &[f32]) {
    gate.par_chunks_mut(TASK).zip(up.par_chunks_mut(TASK)).zip(gradient.par_chunks(TASK)).for_each(
        |((gate, up), gradient)| {
            wide(|| {
                for ((gate, up), &gradient) in gate.iter_mut().zip(up).zip(gradient) {
                    let sigmoid = 1.0 / (1.0 + exp(-*gate));
                    let silu = *gate * sigmoid;
                    let slope = sigmoid + silu * (1.0 - sigmoid);
                    (*gate, *up) = (gradient * *up * slope, gradient * silu);
                }
            });
        },
    );
}

/// GPT-2's approximation by tanh: `x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`.
pub(in crate::nn) fn gelu(x: &[f32]) -> Vec<f32> {
    let mut out = copy(x);
    map(&mut out, |x| x * gate(x));
    out
}

/// The gradient, written over `x`.
pub(in crate::nn) fn gelu_backward(x: &mut [f32], gradient: &[f32]) {
    update(x, gradient, |x, gradient| {
        let gate = gate(x);
        // With g = (1 + tanh u) / 2: g' = 2 g (1 - g) u'.
        let inner = 2.0 * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x * x);
        gradient * (gate + x * gate * (1.0 - gate) * inner)
    });
}

/// `(1 + tanh(u)) / 2 = 1 / (1 + e^(-2u))`.
#[inline(always)]
fn gate(x: f32) -> f32 {
    1.0 / (1.0 + exp(-2.0 * GELU_SCALE * (x + GELU_CUBE * x * x * x)))
}

/// The exact function: `x * Phi(x)`, Phi being the distribution function of the normal distribution.
pub(in crate::nn) fn gelu_exact(x: &[f32]) -> Vec<f32> {
    let mut out = copy(x);
    map(&mut out, |x| x * normal(x).0);
    out
}

/// The gradient, written over `x`.
pub(in crate::nn) fn gelu_exact_backward(x: &mut [f32], gradient: &[f32]) {
    update(x, gradient, |x, gradient| {
        let (below, density) = normal(x);
        gradient * (below + x * density)
    });
}

/// The normal distribution's Phi and density at `x`, within 2e-7.
///
/// Abramowitz and Stegun, 7.1.26: `erfc(z) = (a1 t + … + a5 t^5) e^(-z^2)` with `t = 1 / (1 + p z)`, for z at least 0.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    /// 1 / sqrt(2 pi).
    const DENSITY: f32 = 0.398_942_3;
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let series = -1.453_152 + t * 1.061_405_4;
    let series = 1.421_413_7 + t * series;
    let series = -0.284_496_74 + t * series;
    let series = 0.254_829_6 + t * series;
    let fall = exp(-0.5 * x * x);
    let tail = 0.5 * t * series * fall;
    (if x < 0.0 { tail } else { 1.0 - tail }, DENSITY * fall)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.nn.functional.gelu` and its gradient, torch 2.15, f32.
    const TORCH: [(f32, f32, f32); 11] = [
        (-6.0, 0.0, 0.0),
        (-3.0, -0.004_050_225, -0.011_945_605),
        (-1.5, -0.100_210_86, -0.127_469_15),
        (-0.75, -0.169_970_51, 0.000_774_204_73),
        (-0.1, -0.046_017_22, 0.420_476_82),
        (0.0, 0.0, 0.5),
        (0.1, 0.053_982_783, 0.579_523_15),
        (0.75, 0.580_029_5, 0.999_225_8),
        (1.5, 1.399_789_1, 1.127_469_2),
        (3.0, 2.995_949_7, 1.011_945_6),
        (6.0, 6.0, 1.0),
    ];

    #[test]
    fn the_exact_gelu_is_torchs() {
        let mut x: Vec<f32> = TORCH.iter().map(|row| row.0).collect();
        let values = gelu_exact(&x);
        gelu_exact_backward(&mut x, &[1.0; TORCH.len()]);
        for ((row, value), slope) in TORCH.iter().zip(values).zip(x) {
            assert!((value - row.1).abs() <= 1e-6 && (slope - row.2).abs() <= 1e-6, "{row:?}: {value} {slope}");
        }
        let far = gelu_exact(&[-40.0, 40.0]);
        assert!(far[0] == 0.0 && far[1] == 40.0, "{far:?}");
    }
}
