//! Values of generated tensors: a hash of (seed, tensor, element), so that any thread can fill any range (`MO-3`).

use half::{bf16, f16};

use crate::types::{DType, as_u64, as_usize};

/// Elements that share one pair of hash keys; a power of two.
const KEY_ELEMENTS: u64 = 1 << 16;

/// The sum of four uniform bytes takes this many values: 0 to 4 * 255.
const LEVELS: usize = 1021;

/// The standard deviation of generated weights, which transformers calls `initializer_range`.
const STANDARD_DEVIATION: f64 = 0.02;

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Init {
    /// Bell-shaped around 0: the sum of four uniform bytes.
    Normal,
    /// All 1: the weight of a norm.
    Ones,
    /// All 0: a bias.
    Zeros,
}

/// The elements of one dtype, as bytes.
#[derive(Clone, Debug)]
pub(super) struct Values {
    size: usize,
    seed: u64,
    /// Little-endian elements by sum of bytes.
    levels: Vec<[u8; 4]>,
    one: [u8; 4],
}

impl Values {
    /// Values of `dtype`, which must be F16, BF16 or F32; nothing for another type.
    pub(super) fn new(dtype: DType, seed: u64) -> Option<Self> {
        let encode: fn(f32) -> [u8; 4] = match dtype {
            DType::F32 => f32::to_le_bytes,
            DType::F16 => |value| widen(f16::from_f32(value).to_le_bytes()),
            DType::BF16 => |value| widen(bf16::from_f32(value).to_le_bytes()),
            _ => return None,
        };
        // Four bytes, each of variance (256^2 - 1) / 12.
        let scale = STANDARD_DEVIATION / (65535.0_f64 / 3.0).sqrt();
        let level = |sum: u16| narrow((f64::from(sum) - 510.0) * scale);
        let levels = (0_u16..).take(LEVELS).map(|sum| encode(level(sum))).collect();
        Some(Self { size: as_usize(dtype.size_bytes()), seed, levels, one: encode(1.0) })
    }

    /// Fills `out` with the bytes of tensor number `tensor` from byte `offset`.
    pub(super) fn fill(&self, tensor: u64, init: Init, offset: u64, out: &mut [u8]) {
        match init {
            Init::Zeros => out.fill(0),
            Init::Ones => {
                let skip = as_usize(offset) % self.size;
                let element = self.one.iter().take(self.size).cycle().skip(skip);
                out.iter_mut().zip(element).for_each(|(byte, &one)| *byte = one);
            }
            Init::Normal if self.size == 2 => self.fill_normal::<2>(tensor, offset, out),
            Init::Normal => self.fill_normal::<4>(tensor, offset, out),
        }
    }

    fn fill_normal<const SIZE: usize>(&self, tensor: u64, offset: u64, out: &mut [u8]) {
        let mut table = [[0_u8; SIZE]; 1024];
        for (entry, level) in table.iter_mut().zip(&self.levels) {
            *entry = *level.first_chunk().expect("SIZE is at most 4");
        }
        let mut element = offset / as_u64(SIZE);
        let skip = as_usize(offset % as_u64(SIZE));
        let mut rest = out;
        if skip > 0 {
            // The range begins within an element.
            let bytes = table[level(self.keys(tensor, element), within(element))];
            let head = rest.len().min(SIZE - skip);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(head);
            now.copy_from_slice(&bytes[skip..skip + head]);
            (rest, element) = (later, element + 1);
        }
        while !rest.is_empty() {
            let keys = self.keys(tensor, element);
            let here = as_usize(KEY_ELEMENTS - element % KEY_ELEMENTS).saturating_mul(SIZE).min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(here);
            let first = within(element);
            let (whole, tail) = now.as_chunks_mut::<SIZE>();
            for (index, bytes) in (first..).zip(whole.iter_mut()) {
                *bytes = table[level(keys, index)];
            }
            element += as_u64(whole.len());
            if !tail.is_empty() {
                // It ends within one; only the last round has such a tail.
                let bytes = table[level(keys, within(element))];
                tail.copy_from_slice(&bytes[..tail.len()]);
            }
            rest = later;
        }
    }

    fn keys(&self, tensor: u64, element: u64) -> [u32; 2] {
        let mixed = splitmix64(splitmix64(self.seed ^ splitmix64(tensor)).wrapping_add(element / KEY_ELEMENTS));
        let [low, high] = [mixed & u64::from(u32::MAX), mixed >> 32];
        [low, high].map(|half| u32::try_from(half).expect("32 bits"))
    }
}

/// The element's number among those that share its keys.
fn within(element: u64) -> u32 {
    u32::try_from(element % KEY_ELEMENTS).expect("below KEY_ELEMENTS")
}

/// The sum of the four bytes of a hash of `index`; two rounds of multiply and shift mix every bit into every byte.
#[inline]
fn level([first, second]: [u32; 2], index: u32) -> usize {
    let mut hash = index.wrapping_mul(0x9e37_79b1) ^ first;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x7feb_352d).wrapping_add(second);
    hash = (hash ^ (hash >> 15)).wrapping_mul(0x846c_a68b);
    hash ^= hash >> 16;
    let pairs = (hash & 0x00ff_00ff) + ((hash >> 8) & 0x00ff_00ff);
    // At most 4 * 255, below the table's 1024.
    ((pairs & 0xffff) + (pairs >> 16)) as usize & 1023
}

/// The output function of SplitMix64 (Steele, Lea, Flood, 2014).
fn splitmix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn widen([low, high]: [u8; 2]) -> [u8; 4] {
    [low, high, 0, 0]
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(values: &Values, init: Init, range: std::ops::Range<usize>) -> Vec<u8> {
        let mut out = vec![0xaa; range.len()];
        values.fill(7, init, as_u64(range.start), &mut out);
        out
    }

    proptest! {
        /// MO-3: any cut gives the bytes of the whole, also within elements and across key blocks.
        #[test]
        fn mo_3_ranges_give_the_whole(start in 0_usize..300_000, len in 0_usize..2000, f32_too in any::<bool>()) {
            let dtype = if f32_too { DType::F32 } else { DType::BF16 };
            let values = Values::new(dtype, 3).expect("a float");
            for init in [Init::Normal, Init::Ones, Init::Zeros] {
                // Cut at odd places around `start`, and around the border of a key block.
                for start in [start, as_usize(KEY_ELEMENTS) * 2 - len / 2, as_usize(KEY_ELEMENTS) * 4 - 3] {
                    let whole = bytes(&values, init, start - start % 4..start + len);
                    prop_assert_eq!(&bytes(&values, init, start..start + len)[..], &whole[start % 4..]);
                }
            }
        }
    }

    /// The moments of a bell of standard deviation 0.02: over a million values the mean is within 5 standard errors
    /// (0.02 / 1000 each) of 0, and the standard deviation within 1 %.
    #[test]
    fn values_are_bell_shaped() {
        let values = Values::new(DType::F32, 0).expect("a float");
        let bytes = bytes(&values, Init::Normal, 0..4_000_000);
        let floats: Vec<f64> = bytes.as_chunks().0.iter().map(|one| f64::from(f32::from_le_bytes(*one))).collect();
        let mean = floats.iter().sum::<f64>() / 1e6;
        let deviation = (floats.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 1e6).sqrt();
        assert!(mean.abs() < 1e-4, "{mean}");
        assert!((deviation - 0.02).abs() < 2e-4, "{deviation}");
        // 68.3 % of a normal distribution lie within one standard deviation; four bytes come close.
        let within = floats.iter().filter(|value| value.abs() < 0.02).count();
        assert!((660_000..700_000).contains(&within), "{within}");
        // Neighbours are not correlated: 5 standard errors of 1 / 1000.
        let product: f64 = floats.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / 1e6;
        assert!((product / 4e-4).abs() < 5e-3, "{product}");
    }

    #[test]
    fn seeds_and_tensors_differ_and_norms_are_one() {
        let values = Values::new(DType::BF16, 1).expect("a float");
        let other_seed = Values::new(DType::BF16, 2).expect("a float");
        let mut other_tensor = vec![0; 64];
        values.fill(8, Init::Normal, 0, &mut other_tensor);
        assert_ne!(bytes(&values, Init::Normal, 0..64), bytes(&other_seed, Init::Normal, 0..64));
        assert_ne!(bytes(&values, Init::Normal, 0..64), other_tensor);
        // 1.0 is 0x3f80 in bf16.
        assert_eq!(bytes(&values, Init::Ones, 1..4), [0x3f, 0x80, 0x3f]);
        assert!(Values::new(DType::I32, 0).is_none());
    }
}
