//! Dropout by a hash of what is dropped (`NN-4`): the same mask for any cut of a batch over ranks and threads.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::nn::{DropoutKey, Lora};
use crate::types::as_u64;

/// The odd constant of splitmix64, 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Features that one hash of 64 bits decides, 16 bits each.
const LANES: usize = 4;

/// Which inputs of one module's adapter are zeroed.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct Dropout {
    base: u64,
    first_sample: u64,
    seq: usize,
    /// A feature is zeroed when its 16 bits are below.
    threshold: u32,
    /// What the others are multiplied with; by the probability as 16 bits give it, so that the mean stays.
    grow: f32,
}

impl Dropout {
    pub(in crate::nn) fn new(adapter: &Lora, key: DropoutKey, seq: usize) -> Self {
        let probability = f64::from(adapter.dropout.clamp(0.0, 1.0));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 65535")]
        let threshold = (probability * 65_536.0).round().clamp(0.0, 65_535.0) as u32;
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
        let grow = (65_536.0 / f64::from(65_536 - threshold)) as f32;
        Self {
            base: mix(mix(mix(key.seed ^ GOLDEN) ^ key.step) ^ adapter.key),
            first_sample: key.first_sample,
            seq,
            threshold,
            grow,
        }
    }

    /// What each of a row's features is multiplied with: 0, or a little more than 1. `row` counts all rows of the batch.
    pub(in crate::nn) fn factors(&self, row: usize, out: &mut [f32]) {
        let sample = self.first_sample.wrapping_add(as_u64(row / self.seq));
        let state = mix(mix(self.base ^ sample.wrapping_mul(GOLDEN)) ^ as_u64(row % self.seq));
        let mut counter = state;
        for lanes in out.chunks_mut(LANES) {
            counter = counter.wrapping_add(GOLDEN);
            let mut bits = mix(counter);
            for factor in lanes {
                *factor = if (bits & 0xffff) < u64::from(self.threshold) { 0.0 } else { self.grow };
                bits >>= 16;
            }
        }
    }
}

/// The finalizer of splitmix64.
const fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The factors of all rows, f32 `[rows, features]`.
pub(in crate::nn) fn dropout_mask(
    adapter: &Lora,
    key: DropoutKey,
    seq: usize,
    (rows, features): (usize, usize),
    device: &Device,
) -> Result<Tensor> {
    let dropout = Dropout::new(adapter, key, seq);
    let mut mask = vec![0.0_f32; rows * features];
    mask.par_chunks_exact_mut(features).enumerate().for_each(|(row, out)| dropout.factors(row, out));
    Tensor::from_vec(mask, (rows, features), device)
}
