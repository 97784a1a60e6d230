//! RMS norm and layer norm over rows.

use rayon::prelude::*;

use super::matrix::Matrix;
use super::vector::{ROW_BLOCK, column_sums, sum, sum2, wide};

/// What a norm's backward needs beside its input: of each row the mean (0 for RMS norm) and the inverse deviation.
#[derive(Debug)]
pub(in crate::nn) struct NormSaved(Vec<(f32, f32)>);

/// The gradients of a norm.
pub(in crate::nn) struct NormGradients {
    pub(in crate::nn) input: Matrix,
    pub(in crate::nn) weight: Option<Vec<f32>>,
    pub(in crate::nn) bias: Option<Vec<f32>>,
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, or without a bias `x / sqrt(mean of squares + eps) * weight`, over
/// rows as long as the weight.
pub(in crate::nn) fn forward(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f64) -> (Matrix, NormSaved) {
    let width = weight.len();
    let rows = x.len() / width;
    let mut out = vec![0.0; x.len()];
    let mut saved = vec![(0.0, 0.0); rows];
    let block = ROW_BLOCK * width;
    out.par_chunks_mut(block).zip(x.par_chunks(block)).zip(saved.par_chunks_mut(ROW_BLOCK)).for_each(
        |((out, x), saved)| {
            wide(|| {
                for ((out, x), saved) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(saved) {
                    *saved = statistics(x, bias.is_some(), eps);
                    normalize(out, x, *saved, (weight, bias));
                }
            });
        },
    );
    (Matrix::new(out, width), NormSaved(saved))
}

/// One row by its mean and inverse deviation.
#[inline(always)]
fn normalize(out: &mut [f32], x: &[f32], (mean, inverse): (f32, f32), (weight, bias): (&[f32], Option<&[f32]>)) {
    match bias {
        None => {
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * inverse * weight;
            }
        }
        Some(bias) => {
            for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                *out = (x - mean) * inverse * weight + bias;
            }
        }
    }
}

/// Mean and inverse deviation of a row.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "widths are small; f32 is the result")]
fn statistics(x: &[f32], centred: bool, eps: f64) -> (f32, f32) {
    let width = x.len() as f64;
    let mean = if centred { (f64::from(sum(x)) / width) as f32 } else { 0.0 };
    let squares = sum2(x, x, |x, _| (x - mean) * (x - mean));
    (mean, (1.0 / (f64::from(squares) / width + eps).sqrt()) as f32)
}

/// Which gradients of parameters are wanted.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct Wanted {
    pub(in crate::nn) weight: bool,
    pub(in crate::nn) bias: bool,
}

/// With `n = (x - mean) * inverse` and `h = gradient * weight`: `dx = inverse * (h - mean(h) - n * mean(h * n))`, where an
/// RMS norm has no `mean(h)`.
pub(in crate::nn) fn backward(
    x: &[f32],
    weight: &[f32],
    saved: &NormSaved,
    gradient: &[f32],
    (centred, wanted): (bool, Wanted),
) -> NormGradients {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(width).zip(x.par_chunks(width)).zip(gradient.par_chunks(width)).zip(&saved.0).for_each(
        |(((out, x), gradient), &(mean, inverse))| {
            #[expect(clippy::cast_precision_loss, reason = "widths are small")]
            let count = width as f32;
            wide(|| {
                for ((out, &gradient), &weight) in out.iter_mut().zip(gradient).zip(weight) {
                    *out = gradient * weight;
                }
                let offset = if centred { sum(out) / count } else { 0.0 };
                let along = sum2(out, x, |scaled, x| scaled * (x - mean)) * inverse / count;
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = inverse * (*out - offset - (x - mean) * inverse * along);
                }
            });
        },
    );
    let rows = saved.0.len();
    let row = |row: usize| (row * width)..((row + 1) * width);
    let weight = wanted.weight.then(|| {
        column_sums(rows, width, |index, sums| {
            let (mean, inverse) = saved.0[index];
            for ((sum, &gradient), &x) in sums.iter_mut().zip(&gradient[row(index)]).zip(&x[row(index)]) {
                *sum += gradient * (x - mean) * inverse;
            }
        })
    });
    let bias = wanted.bias.then(|| {
        column_sums(rows, width, |index, sums| {
            sums.iter_mut().zip(&gradient[row(index)]).for_each(|(sum, gradient)| *sum += gradient);
        })
    });
    NormGradients { input: Matrix::new(out, width), weight, bias }
}
