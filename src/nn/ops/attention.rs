//! Causal attention over documents in rows, by tiles of queries: no more scores at once than one tile's.
//!
//! The queries of the heads that share a key head are stacked, so that each tile is one product. The backward computes
//! scores again from the logarithms of the sums that the forward kept.

use rayon::prelude::*;

use super::matrix::Matrix;
use super::product::add_product;
use super::vector::{dot, exp, largest, sum, wide};
use crate::nn::Pass;
use crate::nn::layers::AttentionShape;
use crate::nn::tokens::first_key;

/// Queries of a tile; the scores of 3 heads on 512 keys are then 400 KB, within a core's second cache.
const TILE: usize = 64;

/// Rotated queries `[rows, heads * head_dim]`, rotated keys and values `[rows, kv heads * head_dim]`.
#[derive(Debug)]
pub(in crate::nn) struct Qkv {
    pub(in crate::nn) query: Matrix,
    pub(in crate::nn) key: Matrix,
    pub(in crate::nn) value: Matrix,
}

/// What the backward needs beside queries, keys and values.
#[derive(Debug)]
pub(in crate::nn) struct AttentionSaved {
    /// For each row and head the logarithm of the sum of exponentials, `[rows, heads]`.
    log_sums: Matrix,
}

/// A tile: queries `from..to` of batch row `batch`, of the heads that share `kv_head`; keys from `first` on.
#[derive(Clone, Copy)]
struct Tile {
    batch: usize,
    kv_head: usize,
    from: usize,
    to: usize,
    first: usize,
}

struct Attention<'a> {
    pass: &'a Pass,
    shape: AttentionShape,
    groups: usize,
    scale: f32,
}

impl<'a> Attention<'a> {
    fn new(shape: AttentionShape, pass: &'a Pass) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a head has few dims")]
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        Self { pass, shape, groups: shape.heads / shape.kv_heads, scale }
    }

    /// The first key that the query at `position` of a row sees.
    fn first(&self, batch: usize, position: usize) -> usize {
        first_key(self.pass.starts[batch * self.pass.seq + position], position, self.shape.window)
    }

    fn tile(&self, batch: usize, kv_head: usize, from: usize) -> Tile {
        let to = self.pass.seq.min(from + TILE);
        let first = (from..to).map(|position| self.first(batch, position)).min().unwrap_or(from);
        Tile { batch, kv_head, from, to, first }
    }

    fn tiles(&self, batch: usize, kv_head: usize) -> impl Iterator<Item = Tile> + '_ {
        (0..self.pass.seq).step_by(TILE).map(move |from| self.tile(batch, kv_head, from))
    }

    /// A tile's rows of a matrix of heads, stacked: `[groups * (to - from), head_dim]`.
    fn stack(&self, tile: Tile, matrix: &Matrix) -> Matrix {
        let (dim, columns) = (self.shape.head_dim, matrix.columns());
        let mut out = Vec::with_capacity(self.groups * (tile.to - tile.from) * dim);
        for group in 0..self.groups {
            let column = (tile.kv_head * self.groups + group) * dim;
            for position in tile.from..tile.to {
                let start = (tile.batch * self.pass.seq + position) * columns + column;
                out.extend_from_slice(&matrix.data()[start..start + dim]);
            }
        }
        Matrix::new(out, dim)
    }

    /// Scores of a tile's queries on the keys `first..to`, not yet scaled.
    fn scores(&self, tile: Tile, queries: &Matrix, qkv: &Qkv) -> Matrix {
        queries.view().times(self.keys(tile, &qkv.key).t())
    }

    /// A tile's keys or values, `[to - first, head_dim]`.
    fn keys<'m>(&self, tile: Tile, matrix: &'m Matrix) -> super::matrix::View<'m> {
        let view = matrix.view().narrow_rows(tile.batch * self.pass.seq + tile.first, tile.to - tile.first);
        view.narrow_columns(tile.kv_head * self.shape.head_dim, self.shape.head_dim)
    }

    /// For each stacked row of a tile: its index in `log_sums`, and its range of visible keys, from `tile.first` on.
    fn rows(&self, tile: Tile) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + '_ {
        (0..self.groups).flat_map(move |group| {
            (tile.from..tile.to).map(move |position| {
                let head = tile.kv_head * self.groups + group;
                let index = (tile.batch * self.pass.seq + position) * self.shape.heads + head;
                (index, self.first(tile.batch, position) - tile.first..position + 1 - tile.first)
            })
        })
    }

    /// The mixed values of one tile, stacked, and the logarithms of its sums.
    fn forward(&self, tile: Tile, qkv: &Qkv) -> (Matrix, Vec<f32>) {
        let queries = self.stack(tile, &qkv.query);
        let mut scores = self.scores(tile, &queries, qkv);
        let width = scores.columns();
        let mut log_sums = Vec::with_capacity(queries.rows());
        for ((_, visible), scores) in self.rows(tile).zip(scores.data_mut().chunks_exact_mut(width)) {
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let seen = &mut scores[visible];
            let (peak, total) = wide(|| {
                let peak = largest(seen) * self.scale;
                seen.iter_mut().for_each(|score| *score = exp(*score * self.scale - peak));
                let total = sum(seen);
                let inverse = 1.0 / total;
                seen.iter_mut().for_each(|score| *score *= inverse);
                (peak, total)
            });
            log_sums.push(peak + total.ln());
        }
        (scores.view().times(self.keys(tile, &qkv.value)), log_sums)
    }

    /// The gradient of one tile's queries, stacked; those of its keys and values, `[to - first, head_dim]`, are added.
    fn backward(
        &self,
        tile: Tile,
        (qkv, given): (&Qkv, &Given<'_>),
        (keys, values): (&mut [f32], &mut [f32]),
    ) -> Matrix {
        let queries = self.stack(tile, &qkv.query);
        let gradient = self.stack(tile, given.gradient);
        let mixed = self.stack(tile, given.mixed);
        let mut weights = self.scores(tile, &queries, qkv);
        let mut slopes = gradient.view().times(self.keys(tile, &qkv.value).t());
        let (width, dim) = (weights.columns(), self.shape.head_dim);
        let stacked = gradient.data().chunks_exact(dim).zip(mixed.data().chunks_exact(dim));
        let lines = weights.data_mut().chunks_exact_mut(width).zip(slopes.data_mut().chunks_exact_mut(width));
        for (((index, visible), (gradient, mixed)), (weights, slopes)) in self.rows(tile).zip(stacked).zip(lines) {
            for line in [&mut *weights, &mut *slopes] {
                line[..visible.start].fill(0.0);
                line[visible.end..].fill(0.0);
            }
            let log_sum = given.saved.log_sums.data()[index];
            wide(|| {
                let along = dot(gradient, mixed);
                for (weight, slope) in weights[visible.clone()].iter_mut().zip(&mut slopes[visible]) {
                    *weight = exp(*weight * self.scale - log_sum);
                    *slope = *weight * (*slope - along) * self.scale;
                }
            });
        }
        add_product(keys, slopes.view().t(), queries.view(), 1.0);
        add_product(values, weights.view().t(), gradient.view(), 1.0);
        slopes.view().times(self.keys(tile, &qkv.key))
    }
}

/// What a backward gets.
struct Given<'a> {
    saved: &'a AttentionSaved,
    mixed: &'a Matrix,
    gradient: &'a Matrix,
}

/// The mixed values, `[rows, heads * head_dim]`.
pub(in crate::nn) fn forward(qkv: &Qkv, shape: AttentionShape, pass: &Pass) -> (Matrix, AttentionSaved) {
    let attention = Attention::new(shape, pass);
    let tiles: Vec<Tile> = (0..pass.batch)
        .flat_map(|batch| (0..shape.kv_heads).map(move |kv_head| (batch, kv_head)))
        .flat_map(|(batch, kv_head)| attention.tiles(batch, kv_head))
        .collect();
    let parts: Vec<_> = tiles.par_iter().with_max_len(1).map(|&tile| attention.forward(tile, qkv)).collect();
    let (dim, per_row) = (shape.head_dim, pass.seq.div_ceil(TILE));
    let mut mixed = Matrix::zeros(pass.batch * pass.seq, shape.query_size());
    let mut log_sums = Matrix::zeros(pass.batch * pass.seq, shape.heads);
    let lines =
        mixed.data_mut().par_chunks_mut(shape.query_size()).zip(log_sums.data_mut().par_chunks_mut(shape.heads));
    lines.enumerate().with_min_len(TILE).for_each(|(row, (mixed, log_sums))| {
        let (batch, position) = (row / pass.seq, row % pass.seq);
        for (head, (mixed, log_sum)) in mixed.chunks_exact_mut(dim).zip(log_sums).enumerate() {
            let (kv_head, group) = (head / attention.groups, head % attention.groups);
            let number = (batch * shape.kv_heads + kv_head) * per_row + position / TILE;
            let (part, sums) = &parts[number];
            let line = group * (tiles[number].to - tiles[number].from) + position % TILE;
            mixed.copy_from_slice(&part.data()[line * dim..(line + 1) * dim]);
            *log_sum = sums[line];
        }
    });
    (mixed, AttentionSaved { log_sums })
}

/// The gradients of queries, keys and values, from the gradient of the mixed values.
pub(in crate::nn) fn backward(
    qkv: &Qkv,
    (shape, pass): (AttentionShape, &Pass),
    saved: &AttentionSaved,
    (mixed, gradient): (&Matrix, &Matrix),
) -> Qkv {
    let attention = Attention::new(shape, pass);
    let given = Given { saved, mixed, gradient };
    let dim = shape.head_dim;
    // One task for each key head, whose keys' gradients are summed over its tiles in their order (NN-3).
    let heads: Vec<(usize, usize)> =
        (0..pass.batch).flat_map(|batch| (0..shape.kv_heads).map(move |kv_head| (batch, kv_head))).collect();
    let part = |&(batch, kv_head): &(usize, usize)| {
        let (mut keys, mut values) = (vec![0.0; pass.seq * dim], vec![0.0; pass.seq * dim]);
        let mut queries = Vec::new();
        for tile in attention.tiles(batch, kv_head) {
            let range = tile.first * dim..tile.to * dim;
            let sums = (&mut keys[range.clone()], &mut values[range]);
            queries.push(attention.backward(tile, (qkv, &given), sums));
        }
        (queries, keys, values)
    };
    let parts: Vec<(Vec<Matrix>, Vec<f32>, Vec<f32>)> = heads.par_iter().with_max_len(1).map(part).collect();
    let rows = pass.batch * pass.seq;
    let mut query = Matrix::zeros(rows, shape.query_size());
    let mut key = Matrix::zeros(rows, shape.key_value_size());
    let mut value = Matrix::zeros(rows, shape.key_value_size());
    let queries = query.data_mut().par_chunks_mut(shape.query_size());
    let others = key.data_mut().par_chunks_mut(shape.key_value_size());
    let others = others.zip(value.data_mut().par_chunks_mut(shape.key_value_size()));
    queries.zip(others).enumerate().with_min_len(TILE).for_each(|(row, (query, (key, value)))| {
        let (batch, position) = (row / pass.seq, row % pass.seq);
        for (head, query) in query.chunks_exact_mut(dim).enumerate() {
            let (kv_head, group) = (head / attention.groups, head % attention.groups);
            let tile = &parts[batch * shape.kv_heads + kv_head].0[position / TILE];
            let line = group * (tile.rows() / attention.groups) + position % TILE;
            query.copy_from_slice(&tile.data()[line * dim..(line + 1) * dim]);
        }
        let range = position * dim..(position + 1) * dim;
        for (kv_head, (key, value)) in key.chunks_exact_mut(dim).zip(value.chunks_exact_mut(dim)).enumerate() {
            let (_, keys, values) = &parts[batch * shape.kv_heads + kv_head];
            key.copy_from_slice(&keys[range.clone()]);
            value.copy_from_slice(&values[range.clone()]);
        }
    });
    Qkv { query, key, value }
}
