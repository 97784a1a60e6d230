//! HQQ: the half-quadratic quantizer (Badri and Shaji 2023), with the bits of hqq 0.2.8 on CPU.
//!
//! Owns: the start from minimum and maximum, one iteration, the codes. Refuses to know: packing, how parts are shared out;
//! the caller drives the iterations ([`HqqStop`] says how long). Everything is f32, as in the reference:
//!
//! - start: `s = (1 / (max - min)) * (2^bits - 1)`, 1 where `max - min <= 1e-4`, at most 2e4; `z = -min * s`, to an integer
//!   (ties to even) when asked for;
//! - iteration: `Wq = clamp(round(W*s + z))`, `Wr = (Wq - z) / s`, `We = shrink(W - Wr)`, `z = mean(Wq - (W - We) * s)`,
//!   `shrink(x) = sign(x) * max(|x| - 0.1 * |x|^-0.3, 0)`, for p = 0.7 and beta = 10 (hqq declares a growth of beta and
//!   never applies it);
//! - result: codes from the last `z` and the weights themselves; the scale is stored as `1 / s`.
//!
//! The order of the mean is torch's (`torch_sum.rs`). The power is rounded correctly here; torch's is within 1 ulp, so a zero
//! may differ by an ulp or so in groups with an error above 0.17, below which `shrink` is 0 and no power is taken.

use std::borrow::Cow;

use super::hqq_error::{ErrorSum, HqqStop};
use super::torch_sum::SumOrder;
use super::{CodeBits, GroupAxis};
use crate::quant::error::expect_len;
use crate::quant::kernels::{HqqErrors, HqqGroup, round_to_code};
use crate::quant::{Kernels, QuantError};
use crate::types::as_u64;

/// Ranges up to this keep scale 1.
const LEAST_RANGE: f32 = 1e-4;
/// The largest scale: its inverse still fits f16.
const MAX_SCALE: f32 = 2e4;
/// `x^1.3 <= 0.1` for magnitudes up to this (the root is 0.17013): `shrink` is 0.
const SHRINKS_TO_ZERO: f32 = 0.17;
/// `p - 1` as torch passes it to its kernel.
const EXPONENT: f32 = -0.3;
/// `1 / beta`.
const INVERSE_BETA: f32 = 0.1;

/// What is asked of a quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HqqRule {
    /// Bits of a code.
    pub bits: CodeBits,
    /// Weights per group.
    pub group: usize,
    /// Whether the first zero is an integer; hqq's default is that it is for 4 bits only.
    pub round_zero: bool,
}

impl HqqRule {
    /// hqq's defaults for these bits and groups.
    #[must_use]
    pub fn new(bits: CodeBits, group: usize) -> Self {
        Self { bits, group, round_zero: bits == CodeBits::B4 }
    }

    /// The number of groups of `values` weights.
    fn groups(self, values: usize) -> Result<usize, QuantError> {
        match values.checked_div(self.group) {
            Some(groups) if groups * self.group == values => Ok(groups),
            _ => Err(QuantError::GroupSize { found: self.group, values }),
        }
    }
}

/// Some whole groups of a tensor on their way to codes. Parts of a tensor may be on several threads or ranks.
#[derive(Clone, Debug)]
pub struct HqqSolver<'w> {
    rule: HqqRule,
    axis: GroupAxis,
    /// Group after group.
    weights: Cow<'w, [f32]>,
    /// The column of group 0 and the number of columns of the whole tensor; both 0 for runs.
    first: usize,
    total: usize,
    /// The inverse of what is stored.
    scale: Vec<f32>,
    zero: Vec<f32>,
}

impl<'w> HqqSolver<'w> {
    /// `axis=1`: whole groups, each a run of `rule.group` weights.
    ///
    /// # Errors
    /// [`QuantError::GroupSize`] when a group is cut.
    pub fn runs(rule: HqqRule, weights: &'w [f32]) -> Result<Self, QuantError> {
        rule.groups(weights.len())?;
        Ok(Self::start(rule, GroupAxis::Runs, Cow::Borrowed(weights), 0, 0))
    }

    /// `axis=0`: columns `columns` of the whole tensor seen as `[rule.group, total]`, of which `weights` has the rows from
    /// the first to the last, `stride` elements from row to row, beginning with element `(0, columns.start)`. A thread passes
    /// the tensor from that element on and `stride == total`; a rank that holds its columns only, their number as `stride`.
    /// The weights are copied, column after column.
    ///
    /// A column holds every `total`-th element of the tensor. So a cut along dim 1 of `[out, in]` keeps columns whole if the
    /// group divides `out`; one along dim 0 never does: such a tensor must be quantized whole, or by columns.
    ///
    /// # Errors
    /// [`QuantError::GroupSize`] for groups of 0, [`QuantError::Range`] when columns or rows lie outside.
    pub fn columns(
        rule: HqqRule,
        weights: &[f32],
        stride: usize,
        columns: std::ops::Range<usize>,
        total: usize,
    ) -> Result<HqqSolver<'static>, QuantError> {
        rule.groups(0)?;
        let count = columns.len();
        if columns.end > total || columns.start > columns.end || count > stride {
            let bound = total.min(columns.start.saturating_add(stride));
            return Err(QuantError::Range { what: "columns", start: columns.start, count, bound });
        }
        let last = (rule.group - 1).checked_mul(stride).and_then(|start| start.checked_add(count));
        if last.is_none_or(|end| end > weights.len()) {
            return Err(QuantError::Range {
                what: "rows",
                start: 0,
                count: rule.group,
                bound: weights.len() / stride.max(1),
            });
        }
        let mut grouped = vec![0.0; count * rule.group];
        for (row, weights) in weights.chunks(stride.max(1)).take(rule.group).enumerate() {
            let places = grouped.iter_mut().skip(row).step_by(rule.group);
            places.zip(&weights[..count]).for_each(|(place, weight)| *place = *weight);
        }
        Ok(HqqSolver::start(rule, GroupAxis::Columns, Cow::Owned(grouped), columns.start, total))
    }

    fn start(rule: HqqRule, axis: GroupAxis, weights: Cow<'w, [f32]>, first: usize, total: usize) -> Self {
        let (scale, zero) = weights.chunks_exact(rule.group).map(|group| start_of_group(rule, group)).unzip();
        Self { rule, axis, weights, first, total, scale, zero }
    }

    /// One iteration over all groups: the errors of the zeros so far, and better zeros.
    #[must_use]
    pub fn step(&mut self, kernels: Kernels) -> ErrorSum {
        let mut targets = vec![0.0; self.rule.group];
        let mut total = ErrorSum::default();
        for (index, weights) in self.weights.chunks_exact(self.rule.group).enumerate() {
            let errors = targets_of_group(kernels, self.group(index), weights, &mut targets);
            total = total.merge(ErrorSum::of_group(errors.sum, as_u64(weights.len())));
            self.zero[index] = self.order(index).mean(&targets);
        }
        total
    }

    fn group(&self, index: usize) -> HqqGroup {
        let max_code = f32::from(self.rule.bits.max_code());
        HqqGroup { scale: self.scale[index], zero: self.zero[index], max_code }
    }

    fn order(&self, group: usize) -> SumOrder {
        match self.axis {
            GroupAxis::Runs => SumOrder::Contiguous,
            GroupAxis::Columns => SumOrder::of_column(self.first + group, self.total),
        }
    }

    /// The number of weights.
    #[must_use]
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Whether there is no group.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// The zeros so far, one for each group.
    #[must_use]
    pub fn zero(&self) -> &[f32] {
        &self.zero
    }

    /// The scales as stored, one for each group: `w = (q - zero) * scale`.
    #[must_use]
    pub fn scale(&self) -> Vec<f32> {
        self.scale.iter().map(|scale| 1.0 / scale).collect()
    }

    /// Writes one code for each weight in the order of the part: runs one after the other, or rows of its columns. A weight
    /// that is NaN, or whose group holds something not finite, gets some code.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `codes` has not one element for each weight.
    pub fn codes(&self, codes: &mut [u8]) -> Result<(), QuantError> {
        expect_len("codes", codes.len(), self.len())?;
        let mask = self.rule.bits.max_code();
        let max_code = f32::from(mask);
        for (index, weights) in self.weights.chunks_exact(self.rule.group).enumerate() {
            let HqqGroup { scale, zero, .. } = self.group(index);
            let of = |weight: &f32| round_to_code((weight * scale + zero).clamp(0.0, max_code), mask);
            match self.axis {
                GroupAxis::Runs => {
                    let run = codes[index * self.rule.group..].iter_mut().zip(weights);
                    run.for_each(|(code, weight)| *code = of(weight));
                }
                GroupAxis::Columns => {
                    let places = codes.iter_mut().skip(index).step_by(self.scale.len());
                    places.zip(weights).for_each(|(code, weight)| *code = of(weight));
                }
            }
        }
        Ok(())
    }
}

/// Quantizes a whole tensor on this thread; the solver after the last iteration holds codes, scales and zeros.
///
/// # Errors
/// [`QuantError::GroupSize`] when the weights are not whole groups.
pub fn quantize_hqq(
    kernels: Kernels,
    rule: HqqRule,
    axis: GroupAxis,
    weights: &[f32],
) -> Result<HqqSolver<'_>, QuantError> {
    let groups = rule.groups(weights.len())?;
    let mut solver = match axis {
        GroupAxis::Runs => HqqSolver::runs(rule, weights)?,
        GroupAxis::Columns => HqqSolver::columns(rule, weights, groups, 0..groups, groups)?,
    };
    let mut stop = HqqStop::new();
    while stop.goes_on(solver.step(kernels)) {}
    Ok(solver)
}

/// The first scale and zero.
fn start_of_group(rule: HqqRule, weights: &[f32]) -> (f32, f32) {
    let (min, max) = weights.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), weight| {
        // Comparisons, not `min` and `max`: a NaN that comes is kept, as in torch.
        (
            if *weight < min || weight.is_nan() { *weight } else { min },
            if *weight > max || weight.is_nan() { *weight } else { max },
        )
    });
    let range = max - min;
    // `if !(range > ...)` would give a NaN scale 1.
    let scale = if range <= LEAST_RANGE { 1.0 } else { (1.0 / range) * f32::from(rule.bits.max_code()) };
    let scale = if scale > MAX_SCALE { MAX_SCALE } else { scale };
    let zero = -min * scale;
    (scale, if rule.round_zero { zero.round_ties_even() } else { zero })
}

/// Fills in `Wq - (W - We) * s`, whose mean is the next zero.
fn targets_of_group(kernels: Kernels, group: HqqGroup, weights: &[f32], targets: &mut [f32]) -> HqqErrors {
    let errors = kernels.hqq_targets(group, weights, targets);
    if errors.largest > SHRINKS_TO_ZERO {
        for (target, weight) in targets.iter_mut().zip(weights) {
            let level = group.level(*weight);
            let shrunk = shrink(weight - (level - group.zero) / group.scale);
            *target = level - (weight - shrunk) * group.scale;
        }
    }
    errors
}

fn shrink(error: f32) -> f32 {
    let magnitude = error.abs();
    #[expect(clippy::cast_possible_truncation, reason = "the power is rounded to f32, as in the reference")]
    let power = f64::from(magnitude).powf(f64::from(EXPONENT)) as f32;
    let rest = (magnitude - INVERSE_BETA * power).max(0.0);
    if error < 0.0 { -rest } else { rest }
}
