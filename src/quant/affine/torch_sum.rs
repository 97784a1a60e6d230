//! Sums of f32 in the order of torch's CPU kernels, so that means have the bits of the reference.
//!
//! Owns: the order. Refuses to know: what is summed.
//!
//! torch (`aten/src/ATen/native/cpu/SumKernel.cpp`; the order was confirmed against torch 2.15 with its default, AVX2 and
//! AVX-512 kernels: all of them sum f32 with 8 lanes) adds in cascades: up to four levels of accumulators, each emptied into
//! the next after `2^level_power` additions. A contiguous dim is summed with 8 lanes, each in four interleaved cascades; the
//! elements after the last whole vector are added first, then the lanes in order. A strided dim is summed for each column
//! alone: in one cascade for columns in whole blocks of 32, and in four interleaved ones for the columns after them.

const LANES: usize = 8;
const LEVELS: usize = 4;
const INTERLEAVED: usize = 4;

/// Which of torch's orders applies to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SumOrder {
    /// The group is contiguous.
    Contiguous,
    /// The group is a column in a whole block of columns.
    OneCascade,
    /// The group is a column after the last whole block.
    FourCascades,
}

impl SumOrder {
    /// The order for column `column` of a matrix of `columns` columns that is summed along its rows.
    pub(super) const fn of_column(column: usize, columns: usize) -> Self {
        // A matrix of one column is contiguous. Fewer columns than lanes are summed by the scalar code, four at a time.
        let block = if columns < LANES { INTERLEAVED } else { INTERLEAVED * LANES };
        match columns {
            1 => Self::Contiguous,
            _ if column < columns / block * block => Self::OneCascade,
            _ => Self::FourCascades,
        }
    }

    /// The mean of `values` in this order: the sum divided by the count, both in f32.
    #[expect(clippy::cast_precision_loss, reason = "torch divides by the count as f32 too")]
    pub(super) fn mean(self, values: &[f32]) -> f32 {
        self.sum(values) / values.len() as f32
    }

    fn sum(self, values: &[f32]) -> f32 {
        match self {
            Self::Contiguous if values.len() >= LANES => contiguous(values),
            Self::OneCascade => cascade(values.as_chunks::<1>().0, 0, 1)[0],
            Self::Contiguous | Self::FourCascades => interleaved(values.as_chunks::<1>().0)[0],
        }
    }
}

fn contiguous(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<LANES>();
    let lanes = interleaved(vectors);
    // Not `sum`: the start is +0.0 in torch, and this order is the point.
    rest.iter().chain(&lanes).fold(0.0, |sum, value| sum + value)
}

/// Four cascades over every fourth vector; what does not fill four goes to the first.
fn interleaved<const N: usize>(vectors: &[[f32; N]]) -> [f32; N] {
    let whole = vectors.len() / INTERLEAVED * INTERLEAVED;
    let (head, rest) = vectors.split_at(whole);
    let mut first = cascade(head, 0, INTERLEAVED);
    rest.iter().for_each(|vector| add(&mut first, vector));
    for start in 1..INTERLEAVED {
        add(&mut first, &cascade(head, start, INTERLEAVED));
    }
    first
}

/// The cascade over vectors `start, start + step, ...`.
fn cascade<const N: usize>(vectors: &[[f32; N]], start: usize, step: usize) -> [f32; N] {
    let count = vectors.len() / step;
    if count < 16 {
        // No level is ever whole; the empty upper ones add +0.0, which changes nothing.
        let mut sum = [0.0; N];
        vectors.iter().skip(start).step_by(step).for_each(|vector| add(&mut sum, vector));
        return sum;
    }
    let level_power = (ceil_log2(count) / LEVELS).max(4);
    let per_level = 1 << level_power;
    let mut levels = [[0.0; N]; LEVELS];
    let mut taken = 0;
    for vector in vectors.iter().skip(start).step_by(step) {
        add(&mut levels[0], vector);
        taken += 1;
        // After a whole first level it is emptied into the second, that into the third when it too is whole, and so on.
        let mut level = 1;
        while level < LEVELS && taken % (per_level << ((level - 1) * level_power)) == 0 {
            let full = std::mem::replace(&mut levels[level - 1], [0.0; N]);
            add(&mut levels[level], &full);
            level += 1;
        }
    }
    let [mut sum, upper @ ..] = levels;
    upper.iter().for_each(|level| add(&mut sum, level));
    sum
}

fn add<const N: usize>(sum: &mut [f32; N], vector: &[f32; N]) {
    sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
}

fn ceil_log2(count: usize) -> usize {
    if count <= 1 { 0 } else { crate::types::as_usize(u64::from((count - 1).ilog2() + 1)) }
}
