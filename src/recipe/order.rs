//! The order of the training sequences as a function of (seed, epoch).
//!
//! Owns: [`Order`]. Refuses to know: what a sequence is, ranks, batches.
//!
//! Invariants:
//! - `OR-1`: within an epoch every sequence comes exactly once.
//! - `OR-2`: the order depends on the seed, the epoch and the number of sequences alone: nothing is stored, so any number
//!   of ranks, and a resumed run, see the same samples at the same cursor.

use std::num::NonZeroU64;

/// Rounds of the Feistel network. Four make a pseudorandom permutation of good round functions (Luby and Rackoff 1988);
/// two more cost little and help where halves have few bits.
const ROUNDS: u64 = 6;

/// The order in which a run visits `len` training sequences, epoch after epoch. One global cursor counts the sequences
/// since the first step, over all ranks.
///
/// ```
/// use std::num::NonZeroU64;
/// use weightcast::recipe::order::Order;
///
/// let order = Order::shuffled(7, NonZeroU64::new(3).expect("three"));
/// let mut first: Vec<u64> = (0..3).map(|cursor| order.sample(cursor).1).collect();
/// first.sort();
/// assert_eq!(first, [0, 1, 2]);
/// assert_eq!(order.sample(3).0, 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    len: NonZeroU64,
    /// Absent: the sequences come as they are.
    seed: Option<u64>,
}

impl Order {
    /// Another pseudorandom permutation of `0..len` in every epoch.
    #[must_use]
    pub const fn shuffled(seed: u64, len: NonZeroU64) -> Self {
        Self { len, seed: Some(seed) }
    }

    /// `0..len` as it is, in every epoch.
    #[must_use]
    pub const fn sequential(len: NonZeroU64) -> Self {
        Self { len, seed: None }
    }

    /// The number of sequences of an epoch.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an order is never empty")]
    pub const fn len(&self) -> u64 {
        self.len.get()
    }

    /// The epoch, counted from 0, and the index of the sequence at a global cursor, counted from 0.
    #[must_use]
    pub fn sample(&self, cursor: u64) -> (u64, u64) {
        let (epoch, position) = (cursor / self.len, cursor % self.len);
        (epoch, self.index(epoch, position))
    }

    /// The index of the sequence at `position` of an epoch.
    fn index(&self, epoch: u64, position: u64) -> u64 {
        let Some(seed) = self.seed else { return position };
        let key = mix(mix(seed).wrapping_add(epoch));
        let half_bits = half_bits(self.len.get());
        // Cycle walking: a permutation of a domain at most four times as large, applied until it falls below `len`,
        // is a permutation of `0..len` (Black and Rogaway 2002).
        let mut value = feistel(position, half_bits, key);
        while value >= self.len.get() {
            value = feistel(value, half_bits, key);
        }
        value
    }
}

/// Bits of one half of the smallest even number of bits that holds `0..len`.
const fn half_bits(len: u64) -> u32 {
    let half = (u64::BITS - (len - 1).leading_zeros()).div_ceil(2);
    if half == 0 { 1 } else { half }
}

/// A permutation of the values of `2 * half_bits` bits: in each round one half is changed by a hash of the other.
fn feistel(value: u64, half_bits: u32, key: u64) -> u64 {
    let mask = (1 << half_bits) - 1;
    let (mut left, mut right) = (value >> half_bits, value & mask);
    for round in 0..ROUNDS {
        let round_key = mix(key.wrapping_add(round));
        (left, right) = (right, left ^ (mix(round_key ^ right) & mask));
    }
    (left << half_bits) | right
}

/// One output of SplitMix64 (Steele, Lea and Flood 2014) for the state `value`: a hash of 64 bits.
pub(crate) const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::as_usize;
    use proptest::prelude::*;

    fn len(len: u64) -> NonZeroU64 {
        NonZeroU64::new(len).expect("not zero")
    }

    fn epoch(order: Order, epoch: u64) -> Vec<u64> {
        (0..order.len()).map(|position| order.sample(epoch * order.len() + position).1).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// OR-1 for any number of sequences, and no two epochs or seeds alike once there are enough permutations.
        #[test]
        fn or_1_each_epoch_is_a_permutation(n in 1_u64..3000, seed: u64, number in 0_u64..1000) {
            let order = Order::shuffled(seed, len(n));
            let found = epoch(order, number);
            let mut sorted = found.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            prop_assert_eq!(&found, &epoch(Order::shuffled(seed, len(n)), number));
            prop_assert_eq!(order.sample(number * n + n - 1).0, number);
            if n >= 30 {
                prop_assert_ne!(&found, &epoch(order, number + 1));
                prop_assert_ne!(&found, &epoch(Order::shuffled(seed ^ 1, len(n)), number));
                prop_assert_ne!(&found, &(0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn sequential_is_the_identity() {
        let order = Order::sequential(len(5));
        let found: Vec<(u64, u64)> = (0..7).map(|cursor| order.sample(cursor)).collect();
        assert_eq!(found, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]);
    }

    /// The first three outputs of SplitMix64 for the seed 1234567, as its authors' C code prints them.
    #[test]
    fn mix_is_splitmix64() {
        let gamma = 0x9e37_79b9_7f4a_7c15_u64;
        let outputs = [0, 1, 2].map(|i: u64| mix(1_234_567_u64.wrapping_add(gamma.wrapping_mul(i))));
        assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    /// Every sequence comes about equally often at every position: 6000 epochs of 6, expected 1000 in each of 36 cells.
    /// Chi-square with 25 degrees of freedom is below 60 except once in 10,000 (tables: 99.99 % at 59.7).
    #[test]
    fn every_position_is_fair() {
        let order = Order::shuffled(3, len(6));
        let mut cells = [[0_i32; 6]; 6];
        for number in 0..6000 {
            for (position, index) in epoch(order, number).into_iter().enumerate() {
                cells[position][as_usize(index)] += 1;
            }
        }
        let chi: f64 = cells.iter().flatten().map(|&found| f64::from(found - 1000).powi(2) / 1000.0).sum();
        assert!(chi < 60.0, "chi-square {chi}: {cells:?}");
    }

    /// The largest number of sequences still has halves whose shifts are defined.
    #[test]
    fn very_many_sequences() {
        for n in [u64::from(u32::MAX), 1 << 40, u64::MAX] {
            let order = Order::shuffled(1, len(n));
            assert!(order.sample(0).1 < n && order.sample(n - 1).1 < n && order.sample(0) != order.sample(1));
        }
    }
}
