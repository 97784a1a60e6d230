//! Merging an adapter into a weight: W + s·B·A, and for DoRA its rows scaled to the learned magnitude. All in f32.

use rayon::prelude::*;

use super::AdapterError;
use super::init::row_norms;
use crate::types::as_usize;

/// How a linear layer's weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orientation {
    /// `[out, in]`, as `torch.nn.Linear`.
    OutIn,
    /// `[in, out]`, as GPT-2's `Conv1D`; PEFT's `fan_in_fan_out`.
    InOut,
}

/// The sizes of a linear layer's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The number of outputs.
    pub out_features: u64,
    /// The number of inputs.
    pub in_features: u64,
    /// How it is stored.
    pub orientation: Orientation,
}

/// An adapter on one module.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `lora_A`, `[r, in]`.
    pub a: &'a [f32],
    /// `lora_B`, `[out, r]`.
    pub b: &'a [f32],
    /// DoRA's magnitude, `[out]`.
    pub magnitude: Option<&'a [f32]>,
    /// Rank.
    pub r: u64,
    /// What the product is multiplied with.
    pub scale: f32,
}

/// Replaces `weight` by the weight with the adapter in it: `W + s·B·A` (hu2021, LoRA), or with a magnitude
/// `m/‖W + s·B·A‖_row · (W + s·B·A)` (liu2024, DoRA). Rows are independent and computed on rayon's threads.
///
/// # Errors
/// [`AdapterError::Length`] when a slice has not the length that the sizes say; `weight` is then unchanged.
pub fn merge(weight: &mut [f32], matrix: Matrix, adapter: &LowRank<'_>) -> Result<(), AdapterError> {
    let Matrix { out_features, in_features, orientation } = matrix;
    let (out, columns, r) = (as_usize(out_features), as_usize(in_features), as_usize(adapter.r));
    expect_len("weight", weight.len(), out.saturating_mul(columns))?;
    expect_len("lora_A", adapter.a.len(), r.saturating_mul(columns))?;
    expect_len("lora_B", adapter.b.len(), r.saturating_mul(out))?;
    if let Some(magnitude) = adapter.magnitude {
        expect_len("lora_magnitude_vector", magnitude.len(), out)?;
    }
    if weight.is_empty() {
        return Ok(());
    }
    // A stored row is B's row times A, or A's column times B transposed.
    match orientation {
        Orientation::OutIn => add_product(weight, adapter.b, adapter.a, (r, adapter.scale)),
        Orientation::InOut => {
            let (a, b) = (transposed(adapter.a, columns), transposed(adapter.b, r));
            add_product(weight, &a, &b, (r, adapter.scale));
        }
    }
    if let Some(magnitude) = adapter.magnitude {
        let norms = row_norms(weight, matrix);
        let factors: Vec<f32> = magnitude.iter().zip(&norms).map(|(magnitude, norm)| magnitude / norm).collect();
        match orientation {
            Orientation::OutIn => {
                let rows = weight.chunks_mut(columns).zip(&factors);
                rows.for_each(|(row, factor)| row.iter_mut().for_each(|value| *value *= factor));
            }
            Orientation::InOut => {
                let rows = weight.chunks_mut(out);
                rows.for_each(|row| row.iter_mut().zip(&factors).for_each(|(value, factor)| *value *= factor));
            }
        }
    }
    Ok(())
}

/// weight += scale · left · right, with `left` `[rows, r]` and `right` `[r, columns]`; the sum over r comes first, as PEFT
/// has it.
fn add_product(weight: &mut [f32], left: &[f32], right: &[f32], (r, scale): (usize, f32)) {
    if r == 0 {
        return;
    }
    let columns = right.len() / r;
    let row = |sum: &mut Vec<f32>, (row, left): (&mut [f32], &[f32])| {
        sum.clear();
        sum.resize(columns, 0.0);
        for (&factor, right) in left.iter().zip(right.chunks(columns)) {
            sum.iter_mut().zip(right).for_each(|(sum, value)| *sum += factor * value);
        }
        row.iter_mut().zip(sum.iter()).for_each(|(weight, sum)| *weight += scale * sum);
    };
    weight.par_chunks_mut(columns).zip(left.par_chunks(r)).for_each_init(Vec::new, row);
}

/// `[rows, columns]` as `[columns, rows]`.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}

fn expect_len(what: &'static str, found: usize, expected: usize) -> Result<(), AdapterError> {
    if found == expected { Ok(()) } else { Err(AdapterError::Length { what, expected, found }) }
}
