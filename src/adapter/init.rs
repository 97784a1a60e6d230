//! The first values of an adapter: A uniform, B zero, DoRA's magnitude the norms of the base's rows.
//!
//! PEFT draws A by `kaiming_uniform_(a=sqrt(5))`, which is uniform in ±1/sqrt(in). Ours is a hash of (seed, module,
//! element): the same on every rank, at every cut, with no state to save (`AD-2`).

use super::merge::{Matrix, Orientation};
use crate::types::as_usize;

/// `lora_A` of a module, `[r, in_features]` row-major.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "53 bits at most; rounding to f32 is the point"
)]
pub fn initial_a(seed: u64, module: &str, r: u64, in_features: u64) -> Vec<f32> {
    /// 2^-53: a hash's upper 53 bits become a number in [0, 1).
    const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
    let bound = 1.0 / (in_features as f64).sqrt();
    let key = splitmix64(seed ^ splitmix64(fnv_1a(module)));
    let value = |element: u64| {
        let hash = splitmix64(key.wrapping_add(element.wrapping_mul(GOLDEN_GAMMA)));
        let uniform = (hash >> 11) as f64 * UNIT;
        ((2.0 * uniform - 1.0) * bound) as f32
    };
    (0..r.saturating_mul(in_features)).map(value).collect()
}

/// The Euclidean norms of a weight's `out` rows (its columns, where it is stored `[in, out]`): DoRA's first magnitude.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
pub fn row_norms(weight: &[f32], matrix: Matrix) -> Vec<f32> {
    let (out, columns) = (as_usize(matrix.out_features), as_usize(matrix.in_features).max(1));
    let mut squares = vec![0.0_f64; out];
    match matrix.orientation {
        Orientation::OutIn => {
            for (sum, row) in squares.iter_mut().zip(weight.chunks(columns)) {
                *sum = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            }
        }
        Orientation::InOut => {
            for row in weight.chunks(out.max(1)) {
                squares.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value) * f64::from(value));
            }
        }
    }
    squares.into_iter().map(|sum| sum.sqrt() as f32).collect()
}

/// The step of SplitMix64's state: 2^64 over the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea, Flood, 2014).
const fn splitmix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(GOLDEN_GAMMA);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a of the name's bytes, 64 bits.
fn fnv_1a(name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}
