//! Arithmetic on slices in a form that compilers turn into vector instructions, in one fixed order (`NN-3`).
//!
//! [`wide`] compiles a loop once for each set of vector instructions and runs the widest that the processor has. Products and
//! sums stay apart, so that all of them give the same bits.

use rayon::prelude::*;

/// Partial sums that are kept apart.
const LANES: usize = 16;
/// Rows whose sums are formed by one thread, whatever the number of threads.
pub(super) const ROW_BLOCK: usize = 64;
/// Values of one task in an element-wise loop.
pub(super) const TASK: usize = 1 << 14;

/// Runs a loop as it is compiled for this processor's vector instructions. What the loop calls must be inlined into it.
#[inline]
pub(super) fn wide<R>(function: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(function)
}

/// The sum of `function(x, y)` over two slices of one length.
#[inline(always)]
pub(super) fn sum2(left: &[f32], right: &[f32], function: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (mut lefts, mut rights) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    for (left, right) in lefts.by_ref().zip(rights.by_ref()) {
        for lane in 0..LANES {
            lanes[lane] += function(left[lane], right[lane]);
        }
    }
    for (lane, (&left, &right)) in lefts.remainder().iter().zip(rights.remainder()).enumerate() {
        lanes[lane] += function(left, right);
    }
    lanes.iter().sum()
}

/// The sum of a slice.
#[inline(always)]
pub(super) fn sum(values: &[f32]) -> f32 {
    sum2(values, values, |value, _| value)
}

/// The scalar product.
#[inline(always)]
pub(super) fn dot(left: &[f32], right: &[f32]) -> f32 {
    sum2(left, right, |left, right| left * right)
}

/// The largest value; minus infinity for none.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in chunks.by_ref() {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    let rest = chunks.remainder().iter().chain(&lanes);
    rest.fold(f32::NEG_INFINITY, |largest, &value| if value > largest { value } else { largest })
}

/// The exponential, to about 1 ulp; 0 below -87.3 (the smallest normal number), `e^88` above 88. NaN stays NaN.
///
/// Cody and Waite's reduction by multiples of ln 2, then the Taylor polynomial of degree 7 on `[-ln 2 / 2, ln 2 / 2]`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "ln 2 is split in two parts on purpose")]
pub(in crate::nn) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the rounded number in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let bounded = if x > 88.0 { 88.0 } else { x };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = (bounded - whole * 0.693_359_375) + whole * 2.121_944_4e-4;
    let series = 1.0 / 720.0 + rest * (1.0 / 5040.0);
    let series = 1.0 / 120.0 + rest * series;
    let series = 1.0 / 24.0 + rest * series;
    let series = 1.0 / 6.0 + rest * series;
    let series = 0.5 + rest * series;
    let value = 1.0 + (rest + rest * rest * series);
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { value * power }
}

/// `out[i] = function(out[i], other[i])`, on all cores.
pub(in crate::nn) fn update(out: &mut [f32], other: &[f32], function: impl Fn(f32, f32) -> f32 + Sync) {
    assert!(out.len() == other.len(), "{} values against {}", out.len(), other.len());
    out.par_chunks_mut(TASK).zip(other.par_chunks(TASK)).for_each(|(out, other)| {
        wide(|| out.iter_mut().zip(other).for_each(|(out, &other)| *out = function(*out, other)));
    });
}

/// `out[i] = function(out[i])`, on all cores.
pub(in crate::nn) fn map(out: &mut [f32], function: impl Fn(f32) -> f32 + Sync) {
    out.par_chunks_mut(TASK).for_each(|out| wide(|| out.iter_mut().for_each(|value| *value = function(*value))));
}

/// For each column the sum over `rows` rows, where `accumulate(row, sums)` adds a row's part to the sums so far.
pub(in crate::nn) fn column_sums(
    rows: usize,
    columns: usize,
    accumulate: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let parts: Vec<Vec<f32>> = (0..rows.div_ceil(ROW_BLOCK))
        .into_par_iter()
        .map(|block| {
            let mut sums = vec![0.0; columns];
            wide(|| (block * ROW_BLOCK..rows.min((block + 1) * ROW_BLOCK)).for_each(|row| accumulate(row, &mut sums)));
            sums
        })
        .collect();
    let mut sums = vec![0.0; columns];
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    sums
}
