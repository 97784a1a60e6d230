//! Rotary embedding of the first dims of every head, in place.

use rayon::prelude::*;

use super::vector::wide;

/// Cosine and sine of each row's angles, `[rows, half]`; a backward is a rotation by the opposite angles.
#[derive(Clone, Copy)]
pub(in crate::nn) struct Rotation<'a> {
    pub(in crate::nn) cos: &'a [f32],
    pub(in crate::nn) sin: &'a [f32],
    pub(in crate::nn) half: usize,
    /// 1 for the forward, -1 for the backward.
    pub(in crate::nn) direction: f32,
}

impl Rotation<'_> {
    /// Rotates `x` of `[rows, heads * head_dim]`.
    pub(in crate::nn) fn apply(self, x: &mut [f32], columns: usize, head_dim: usize) {
        let half = self.half;
        let tables = self.cos.par_chunks(half).zip(self.sin.par_chunks(half));
        x.par_chunks_mut(columns).zip(tables).with_min_len(16).for_each(|(x, (cos, sin))| {
            wide(|| {
                for head in x.chunks_exact_mut(head_dim) {
                    let (low, high) = head[..2 * half].split_at_mut(half);
                    for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let sin = sin * self.direction;
                        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
                    }
                }
            });
        });
    }
}
