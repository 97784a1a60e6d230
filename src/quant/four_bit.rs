//! NF4 and FP4: blocks of values as 4-bit codes and one f32 statistic, as bitsandbytes packs them.
//!
//! Owns: codebooks, thresholds, block sizes, the checks, the cut into full blocks and a short last one.
//! Refuses to know: how a kernel finds the codes.
//!
//! In f32: `absmax` is the largest magnitude of a block, `t = x * (1 / max(absmax, 1e-38))`, and the code is that of the
//! rank of `t`, the number of thresholds strictly below it. The short last block divides, `t = x / max(absmax, 1e-38)`, and
//! stores that maximum. bitsandbytes clamps `t` to [-1, 1]; no threshold lies outside, so the rank is the same without.
//! Element 2i is the high nibble; an odd tensor is completed with the code of 0.0.

use half::bf16;
use serde::{Deserialize, Serialize};

use super::error::expect_len;
use super::{Kernels, QuantError, Source};

/// The least divisor: bitsandbytes clamps the statistic to this before dividing. A subnormal, bits `0x006ce3ee`.
pub(super) const LEAST_ABSMAX: f32 = 1e-38;

/// The largest block size.
pub(super) const MAX_BLOCK: usize = 4096;

/// Values under which a thread costs more than it saves: about 30 us of AVX-512 work.
const MIN_VALUES_PER_THREAD: usize = 1 << 16;

/// One of the two 4-bit codes of bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FourBitCode {
    /// "Normal float": the quantiles of a normal distribution (Dettmers et al. 2023, QLoRA).
    Nf4,
    /// A float of one sign, two exponent and one mantissa bit, divided by 12.
    Fp4,
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// FP4's codes by value. The two zeros sort by index, so a small positive value gets the code of -0.0, as in bitsandbytes.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

const NF4_THRESHOLDS: [f32; 15] = midpoints(&NF4, &NF4_ORDER);
const FP4_THRESHOLDS: [f32; 15] = midpoints(&FP4, &FP4_ORDER);

const fn midpoints(values: &[f32; 16], order: &[u8; 16]) -> [f32; 15] {
    let mut midpoints = [0.0; 15];
    let mut rank = 0;
    while rank < 15 {
        midpoints[rank] = (values[order[rank] as usize] + values[order[rank + 1] as usize]) / 2.0;
        rank += 1;
    }
    midpoints
}

impl FourBitCode {
    /// The name in `quant_type` and in keys: `nf4` or `fp4`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The code of that name, or nothing.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Nf4, Self::Fp4].into_iter().find(|code| code.name() == name)
    }

    /// The value of each code, in units of the block's statistic: what a file holds as `quant_map`.
    #[must_use]
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// The f32 midpoints of neighbouring values, ascending.
    pub(crate) const fn thresholds(self) -> &'static [f32; 15] {
        match self {
            Self::Nf4 => &NF4_THRESHOLDS,
            Self::Fp4 => &FP4_THRESHOLDS,
        }
    }

    /// The code of each rank, 0 being the lowest value.
    pub(crate) const fn order(self) -> &'static [u8; 16] {
        match self {
            Self::Nf4 => &NF4_ORDER,
            Self::Fp4 => &FP4_ORDER,
        }
    }
}

/// The number of values that share one statistic: a power of two from 32 to 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
pub struct BlockSize(u32);

impl From<BlockSize> for u32 {
    fn from(block: BlockSize) -> Self {
        block.0
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = QuantError;

    fn try_from(values: u32) -> Result<Self, QuantError> {
        Self::new(values)
    }
}

impl BlockSize {
    /// bitsandbytes' default.
    pub const B64: Self = Self(64);

    /// Blocks of `values` values.
    ///
    /// # Errors
    /// [`QuantError::BlockSize`] unless `values` is 32, 64, 128, 256, 512, 1024, 2048 or 4096.
    pub const fn new(values: u32) -> Result<Self, QuantError> {
        if values.is_power_of_two() && values >= 32 && values as usize <= MAX_BLOCK {
            Ok(Self(values))
        } else {
            Err(QuantError::BlockSize { found: values as u64 })
        }
    }

    /// Values per block.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Values per block, for indexing.
    #[must_use]
    pub const fn values(self) -> usize {
        self.0 as usize
    }
}

/// How a tensor is packed: the code and the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FourBit {
    /// The codebook.
    pub code: FourBitCode,
    /// The number of values that share a statistic.
    pub block: BlockSize,
}

impl FourBit {
    /// The number of statistics of `values` values.
    #[must_use]
    pub const fn blocks(self, values: usize) -> usize {
        values.div_ceil(self.block.values())
    }

    /// The number of bytes of `values` codes.
    #[must_use]
    pub const fn packed_bytes(self, values: usize) -> usize {
        values.div_ceil(2)
    }

    fn check(self, values: usize, packed: usize, absmax: usize) -> Result<(), QuantError> {
        expect_len("packed", packed, self.packed_bytes(values))?;
        expect_len("absmax", absmax, self.blocks(values))
    }
}

impl Kernels {
    /// Quantizes a part of a tensor that starts at a block boundary; only the last part may end inside a block (`QU-2`).
    /// For n values `packed` has (n+1)/2 bytes, `absmax` ceil(n/block) statistics. Returns the number of values that are
    /// not finite; see the module's table for what becomes of them.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `packed` or `absmax` does not fit.
    pub fn quantize_4bit(
        self,
        format: FourBit,
        source: Source<'_>,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<u64, QuantError> {
        format.check(source.len(), packed.len(), absmax.len())?;
        let full_blocks = source.len() / format.block.values();
        let full = full_blocks * format.block.values();
        let (head, tail) = source.split_at(full);
        let (packed, packed_tail) = packed.split_at_mut(full / 2);
        let (absmax, absmax_tail) = absmax.split_at_mut(full_blocks);
        let mut not_finite = self.quantize_full_blocks(format, head, packed, absmax);
        if let [absmax] = absmax_tail {
            not_finite += super::kernels::quantize_short_block(format.code, tail, packed_tail, absmax);
        }
        Ok(not_finite)
    }

    /// As [`Self::quantize_4bit`], on at most `threads` scoped threads; the bytes do not depend on their number (`QU-2`).
    ///
    /// # Errors
    /// As [`Self::quantize_4bit`].
    ///
    /// # Panics
    /// When the system cannot start a thread.
    pub fn quantize_4bit_threads(
        self,
        format: FourBit,
        threads: usize,
        source: Source<'_>,
        mut packed: &mut [u8],
        mut absmax: &mut [f32],
    ) -> Result<u64, QuantError> {
        format.check(source.len(), packed.len(), absmax.len())?;
        let threads = threads.min(source.len() / MIN_VALUES_PER_THREAD).max(1);
        if threads == 1 {
            return self.quantize_4bit(format, source, packed, absmax);
        }
        let values_per_thread = format.blocks(source.len()).div_ceil(threads) * format.block.values();
        std::thread::scope(move |scope| {
            let mut workers = Vec::with_capacity(threads);
            for part in source.chunks(values_per_thread) {
                let (part_packed, rest) = packed.split_at_mut(format.packed_bytes(part.len()));
                packed = rest;
                let (part_absmax, rest) = absmax.split_at_mut(format.blocks(part.len()));
                absmax = rest;
                workers.push(scope.spawn(move || self.quantize_4bit(format, part, part_packed, part_absmax)));
            }
            // A panic of a worker is this thread's panic.
            workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
        })
    }

    /// The f32 values of a part that starts at a block boundary: `value(code) * absmax`, rounded once. The length of `out`
    /// is the number of values.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `packed` or `absmax` does not fit `out`.
    pub fn dequantize_4bit(
        self,
        format: FourBit,
        packed: &[u8],
        absmax: &[f32],
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        format.check(out.len(), packed.len(), absmax.len())?;
        self.dequantize_blocks(format, packed, absmax, out);
        Ok(())
    }

    /// As [`Self::dequantize_4bit`], with each f32 value rounded to nearest even as bf16.
    ///
    /// # Errors
    /// As [`Self::dequantize_4bit`].
    pub fn dequantize_4bit_bf16(
        self,
        format: FourBit,
        packed: &[u8],
        absmax: &[f32],
        out: &mut [bf16],
    ) -> Result<(), QuantError> {
        format.check(out.len(), packed.len(), absmax.len())?;
        self.dequantize_blocks_bf16(format, packed, absmax, out);
        Ok(())
    }
}
