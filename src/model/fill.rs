//! Values of generated tensors: a hash of (seed, tensor, element), so that any thread can fill any range (`MO-3`).

use half::{bf16, f16};

use crate::types::{DType, as_u64, as_usize};

/// Elements that take their bits from one hash: 16 bits each.
const GROUP: usize = 4;

/// Quantiles of the normal distribution in the table; a value is one of them, chosen by 12 of its 16 bits.
const LEVELS: u16 = 1 << 12;

/// The standard deviation of generated weights, which transformers calls `initializer_range`.
const STANDARD_DEVIATION: f64 = 0.02;

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Init {
    /// Normal around 0, to about 3.7 standard deviations.
    Normal,
    /// As [`Init::Normal`], smaller: a projection that adds to GPT-2's residual stream.
    Residual,
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
    /// Little-endian elements, by level.
    levels: Vec<[u8; 4]>,
    /// The same for [`Init::Residual`].
    residual: Vec<[u8; 4]>,
    one: [u8; 4],
}

impl Values {
    /// Values of `dtype`, which must be F16, BF16 or F32, nothing for another type; with the standard deviation of
    /// [`Init::Residual`] as a part of the others'.
    pub(super) fn new(dtype: DType, seed: u64, part: f64) -> Option<Self> {
        let encode: fn(f32) -> [u8; 4] = match dtype {
            DType::F32 => f32::to_le_bytes,
            DType::F16 => |value| widen(f16::from_f32(value).to_le_bytes()),
            DType::BF16 => |value| widen(bf16::from_f32(value).to_le_bytes()),
            _ => return None,
        };
        let table = |deviation: f64| normal_quantiles().map(|quantile| encode(narrow(quantile * deviation))).collect();
        let (levels, residual) = (table(STANDARD_DEVIATION), table(STANDARD_DEVIATION * part));
        Some(Self { size: as_usize(dtype.size_bytes()), seed, levels, residual, one: encode(1.0) })
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
            Init::Normal | Init::Residual => {
                let levels = if init == Init::Normal { &self.levels } else { &self.residual };
                match self.size {
                    2 => self.fill_normal::<2>(levels, (tensor, offset), out),
                    _ => self.fill_normal::<4>(levels, (tensor, offset), out),
                }
            }
        }
    }

    fn fill_normal<const SIZE: usize>(&self, levels: &[[u8; 4]], (tensor, offset): (u64, u64), out: &mut [u8]) {
        // A table of the element's own size: half the cache for the two-byte types.
        let table: Vec<[u8; SIZE]> =
            levels.iter().map(|level| *level.first_chunk().expect("SIZE is at most 4")).collect();
        let table: &[[u8; SIZE]; LEVELS as usize] = table.as_slice().try_into().expect("one entry per level");
        let key = splitmix64(self.seed ^ splitmix64(tensor));
        let write = |group: u64, elements: &mut [[u8; SIZE]]| {
            // The counter form of SplitMix64: the state after `group` steps.
            let mut hash = splitmix64(key.wrapping_add(group.wrapping_mul(GOLDEN_GAMMA)));
            for element in elements {
                *element = table[as_usize(hash % u64::from(LEVELS))];
                hash >>= 16;
            }
        };
        let group_bytes = SIZE * GROUP;
        let mut group = offset / as_u64(group_bytes);
        // The range may begin and end within a group; such a group is made whole, and a part of it is copied.
        let partial = |group: u64, skip: usize, out: &mut [u8]| {
            let mut elements = [[0; SIZE]; GROUP];
            write(group, &mut elements);
            out.iter_mut().zip(elements.as_flattened().iter().skip(skip)).for_each(|(byte, &made)| *byte = made);
        };
        let skip = as_usize(offset) % group_bytes;
        let head = if skip > 0 { out.len().min(group_bytes - skip) } else { 0 };
        let (first, rest) = out.split_at_mut(head);
        if !first.is_empty() {
            partial(group, skip, first);
            group += 1;
        }
        let mut groups = rest.chunks_exact_mut(group_bytes);
        for bytes in groups.by_ref() {
            write(group, bytes.as_chunks_mut().0);
            group += 1;
        }
        partial(group, 0, groups.into_remainder());
    }
}

/// The middle quantiles of [`LEVELS`] equal parts of the standard normal distribution, ascending.
fn normal_quantiles() -> impl Iterator<Item = f64> {
    /// Fine enough that a quantile is off by 1e-4 standard deviations at most.
    const STEP: f64 = 1e-4;
    let half = LEVELS / 2;
    let (mut x, mut mass) = (0.0_f64, 0.0_f64);
    let mut upper = Vec::with_capacity(usize::from(half));
    for level in 0..half {
        let wanted = (f64::from(level) + 0.5) / f64::from(LEVELS);
        while mass < wanted {
            // The midpoint rule for the integral of the density.
            let middle = x + STEP / 2.0;
            mass += STEP * (-middle * middle / 2.0).exp() / std::f64::consts::TAU.sqrt();
            x += STEP;
        }
        upper.push(x);
    }
    let lower: Vec<f64> = upper.iter().rev().map(|quantile| -quantile).collect();
    lower.into_iter().chain(upper)
}

/// The step of SplitMix64's state: 2^64 over the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea, Flood, 2014).
fn splitmix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(GOLDEN_GAMMA);
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
        /// MO-3: any cut gives the bytes of the whole, also within elements.
        #[test]
        fn mo_3_ranges_give_the_whole(start in 0_usize..300_000, len in 0_usize..70, f32_too in any::<bool>()) {
            let dtype = if f32_too { DType::F32 } else { DType::BF16 };
            let values = Values::new(dtype, 3, 0.5).expect("a float");
            for init in [Init::Normal, Init::Residual, Init::Ones, Init::Zeros] {
                // The whole begins with a group, whatever the element's size.
                let whole = bytes(&values, init, start - start % 16..start + len);
                prop_assert_eq!(&bytes(&values, init, start..start + len)[..], &whole[start % 16..]);
            }
        }
    }

    /// The moments of a normal of standard deviation 0.02: over a million values the mean is within 5 standard errors
    /// (0.02 / 1000 each) of 0, and the standard deviation within 1 %.
    #[test]
    fn values_are_normal() {
        let values = Values::new(DType::F32, 0, 0.5).expect("a float");
        let bytes = bytes(&values, Init::Normal, 0..4_000_000);
        let floats: Vec<f64> = bytes.as_chunks().0.iter().map(|one| f64::from(f32::from_le_bytes(*one))).collect();
        let mean = floats.iter().sum::<f64>() / 1e6;
        let deviation = (floats.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 1e6).sqrt();
        assert!(mean.abs() < 1e-4, "{mean}");
        assert!((deviation - 0.02).abs() < 2e-4, "{deviation}");
        // Of a normal distribution 68.27 % lie within one standard deviation and 95.45 % within two; 5 standard errors.
        let within = |bound: f64| floats.iter().filter(|value| value.abs() < bound).count();
        assert!((680_300..685_100).contains(&within(0.02)), "{}", within(0.02));
        assert!((953_400..955_600).contains(&within(0.04)), "{}", within(0.04));
        // Neighbours are not correlated: 5 standard errors of 1 / 1000.
        for distance in [1, 2, 3, 4, 8] {
            let products = floats.iter().zip(floats.iter().skip(distance)).map(|(one, other)| one * other);
            let correlation = products.sum::<f64>() / 1e6 / 4e-4;
            assert!(correlation.abs() < 5e-3, "{correlation} at distance {distance}");
        }
    }

    /// From a table of the normal distribution: 25 % lie above 0.6745, 2.5 % above 1.9600.
    #[test]
    fn quantiles_are_those_of_the_table() {
        let quantiles: Vec<f64> = normal_quantiles().collect();
        assert_eq!(quantiles.len(), 4096);
        assert!((quantiles[3072] - 0.6745).abs() < 1e-3, "{}", quantiles[3072]);
        assert!((quantiles[3994] - 1.9600).abs() < 5e-3, "{}", quantiles[3994]);
        assert!(quantiles.is_sorted() && quantiles[0] == -quantiles[4095]);
    }

    #[test]
    fn seeds_and_tensors_differ_and_norms_are_one() {
        let values = Values::new(DType::BF16, 1, 0.5).expect("a float");
        let other_seed = Values::new(DType::BF16, 2, 0.5).expect("a float");
        let mut other_tensor = vec![0; 64];
        values.fill(8, Init::Normal, 0, &mut other_tensor);
        assert_ne!(bytes(&values, Init::Normal, 0..64), bytes(&other_seed, Init::Normal, 0..64));
        assert_ne!(bytes(&values, Init::Normal, 0..64), other_tensor);
        // 1.0 is 0x3f80 in bf16.
        assert_eq!(bytes(&values, Init::Ones, 1..4), [0x3f, 0x80, 0x3f]);
        assert!(Values::new(DType::I32, 0, 0.5).is_none());
    }
}
