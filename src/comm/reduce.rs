//! Adding `f32` values that lie in byte buffers.
//!
//! Owns: the one loop that adds (`CM-4`). Refuses to know: where the bytes came from.

use super::F32_BYTES;

/// Adds the `f32` values of `values` to those of `sum`, element by element, in native byte order: all ranks of a job run
/// the same build. Buffers need no alignment. Both have the same length, a multiple of 4.
pub(super) fn add(sum: &mut [u8], values: &[u8]) {
    debug_assert_eq!(sum.len(), values.len(), "both sides of a sum have one length");
    let (sums, _) = sum.as_chunks_mut::<F32_BYTES>();
    let (values, _) = values.as_chunks::<F32_BYTES>();
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum = (f32::from_ne_bytes(*sum) + f32::from_ne_bytes(*value)).to_ne_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_without_alignment() {
        let mut sum = [&[0xff][..], &1.5_f32.to_ne_bytes(), &(-2.0_f32).to_ne_bytes()].concat();
        let values = [0.25_f32.to_ne_bytes(), 2.0_f32.to_ne_bytes()].concat();
        add(&mut sum[1..], &values);
        assert_eq!(sum[1..], [1.75_f32.to_ne_bytes(), 0.0_f32.to_ne_bytes()].concat());
    }
}
