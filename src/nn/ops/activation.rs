//! The activations of MLPs.

use rayon::prelude::*;

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
    let mut out = x.to_vec();
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
