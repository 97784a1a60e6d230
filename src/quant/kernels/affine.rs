//! The inner loop of the HQQ solver: one body, compiled for what every processor has and for AVX2.
//!
//! Owns: the loop. Refuses to know: groups, means, when to stop. Nothing is fused and sums have fixed lanes, so both give the
//! same bits (`QU-1`).

/// Sums of errors that a group keeps apart.
const LANES: usize = 8;

/// 2^23: adding and subtracting it rounds a value of 0 to 2^22 to an integer, ties to even.
const ROUNDER: f32 = 8_388_608.0;

/// What the codes of a group are made with: `clamp(round(w * scale + zero), 0, max_code)`.
#[derive(Clone, Copy, Debug)]
pub(in crate::quant) struct HqqGroup {
    /// The inverse of the scale that is stored.
    pub(in crate::quant) scale: f32,
    pub(in crate::quant) zero: f32,
    pub(in crate::quant) max_code: f32,
}

/// The errors `|W - Wr|` of a group.
#[derive(Clone, Copy, Debug)]
pub(in crate::quant) struct HqqErrors {
    pub(in crate::quant) sum: f64,
    pub(in crate::quant) largest: f32,
}

impl HqqGroup {
    /// The code as f32. Clamping before rounding gives the same as after, because the bounds are integers.
    #[inline(always)]
    pub(in crate::quant) fn level(self, weight: f32) -> f32 {
        ((weight * self.scale + self.zero).clamp(0.0, self.max_code) + ROUNDER) - ROUNDER
    }
}

/// The code of a value from 0 to 255, ties to even; `mask` is the greatest code, and NaN gives some code.
#[inline(always)]
pub(in crate::quant) fn round_to_code(value: f32, mask: u8) -> u8 {
    // The integer stands in the lowest bits of the sum; a cast from float to integer would not be vectorized.
    (value + ROUNDER).to_bits().to_le_bytes()[0] & mask
}

/// Fills in `Wq - W * s`: the targets of a group whose errors all shrink to zero.
pub(super) fn hqq_targets(group: HqqGroup, weights: &[f32], targets: &mut [f32]) -> HqqErrors {
    body(group, weights, targets)
}

/// The same with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(super) fn hqq_targets_avx2(group: HqqGroup, weights: &[f32], targets: &mut [f32]) -> HqqErrors {
    body(group, weights, targets)
}

#[inline(always)]
fn body(group: HqqGroup, weights: &[f32], targets: &mut [f32]) -> HqqErrors {
    let (mut sums, mut largest) = ([0.0; LANES], [0.0; LANES]);
    // Runs of a known length are vectorized.
    let (runs, rest) = weights.as_chunks::<LANES>();
    let (target_runs, target_rest) = targets.as_chunks_mut::<LANES>();
    for (weights, targets) in runs.iter().zip(target_runs) {
        run(group, weights, targets, &mut sums, &mut largest);
    }
    run(group, rest, target_rest, &mut sums, &mut largest);
    let largest = largest.into_iter().fold(0.0, |largest, error| if error > largest { error } else { largest });
    HqqErrors { sum: sums.iter().sum(), largest }
}

#[inline(always)]
fn run(group: HqqGroup, weights: &[f32], targets: &mut [f32], sums: &mut [f64; LANES], largest: &mut [f32; LANES]) {
    let lanes = sums.iter_mut().zip(largest);
    for ((weight, target), (sum, largest)) in weights.iter().zip(targets).zip(lanes) {
        let level = group.level(*weight);
        let error = (weight - (level - group.zero) / group.scale).abs();
        *target = level - weight * group.scale;
        *sum += f64::from(error);
        *largest = if error > *largest { error } else { *largest };
    }
}
