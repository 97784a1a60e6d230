//! The trained parameters and AdamW's moments, cut over the ranks.
//!
//! Owns: which elements a rank updates (the rows that the state's plan gives it), the order of ranks' parts in reductions,
//! and the way to and from a [`StateDict`].
//!
//! `TS-1`: "whole" buffers hold all tensors one after the other; "dealt" buffers hold rank 0's rows of all tensors, then
//! rank 1's, and so on, so that a collective gives each rank one contiguous part.

use std::ops::Range;

use crate::plan::LoadPlan;
use crate::state::StateDict;
use crate::types::{Fqn, Rank, as_usize};

use super::TrainError;
use super::adamw::AdamW;

/// Where every trained tensor is in the buffers.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Name, place in the whole buffer, and dims.
    tensors: Vec<(Fqn, Range<usize>, Vec<usize>)>,
    /// By rank, by tensor: the elements in the whole buffer.
    dealt: Vec<Vec<Range<usize>>>,
    rank: Rank,
}

impl Layout {
    /// The layout of the parameters in `plan`, whose tensors are parameters, first moments and second moments.
    pub(super) fn new(plan: &LoadPlan, rank: Rank) -> Self {
        let count = plan.tensors.len() / 3;
        let mut end = 0;
        let mut tensors = Vec::with_capacity(count);
        for tensor in plan.tensors.iter().take(count) {
            let start = end;
            end += as_usize(tensor.elements());
            let dims = tensor.shape.0.iter().map(|&size| as_usize(size)).collect();
            tensors.push((tensor.fqn.clone(), start..end, dims));
        }
        let rows = |rank: Rank| {
            plan.tensors
                .iter()
                .zip(&tensors)
                .map(|(tensor, (_, whole, _))| {
                    let own = tensor.elements_of(rank, plan.world);
                    whole.start + as_usize(own.start())..whole.start + as_usize(own.end())
                })
                .collect()
        };
        let dealt = plan.world.ranks().map(rows).collect();
        Self { tensors, dealt, rank }
    }

    /// Elements of all tensors.
    pub(super) fn elements(&self) -> usize {
        self.tensors.last().map_or(0, |(_, range, _)| range.end)
    }

    /// Name, place in the whole buffer, and dims of each tensor.
    pub(super) fn tensors(&self) -> &[(Fqn, Range<usize>, Vec<usize>)] {
        &self.tensors
    }

    /// Elements of each rank's part.
    pub(super) fn counts(&self) -> Vec<usize> {
        self.dealt.iter().map(|rows| rows.iter().map(Range::len).sum()).collect()
    }

    fn own(&self) -> &[Range<usize>] {
        self.dealt.get(self.rank.index()).map_or(&[], Vec::as_slice)
    }

    /// From whole to dealt.
    pub(super) fn deal(&self, whole: &[f32], dealt: &mut Vec<f32>) {
        dealt.clear();
        for range in self.dealt.iter().flatten() {
            dealt.extend_from_slice(whole.get(range.clone()).unwrap_or_default());
        }
    }

    /// From dealt to whole.
    pub(super) fn gather(&self, dealt: &[f32], whole: &mut [f32]) {
        let mut rest = dealt;
        for range in self.dealt.iter().flatten() {
            let (part, after) = rest.split_at(range.len());
            whole[range.clone()].copy_from_slice(part);
            rest = after;
        }
    }

    /// This rank's part of the parameters in a state dict that has them first.
    pub(super) fn own_parameters(&self, state: &StateDict) -> Result<Vec<f32>, TrainError> {
        self.owned_values(state, 0)
    }

    /// This rank's part of parameters (kind 0), first (1) or second (2) moments.
    fn owned_values(&self, state: &StateDict, kind: usize) -> Result<Vec<f32>, TrainError> {
        let count = self.tensors.len();
        let mut values = Vec::with_capacity(self.own().iter().map(Range::len).sum());
        for tensor in kind * count..(kind + 1) * count {
            values.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&state.owned_bytes(tensor, 0)?));
        }
        Ok(values)
    }

    /// This rank's part of a whole buffer.
    pub(super) fn own_part(&self, whole: &[f32]) -> Vec<f32> {
        self.own().iter().flat_map(|range| whole.get(range.clone()).unwrap_or_default()).copied().collect()
    }
}

/// A rank's part of parameters and moments, f32, in dealt order.
#[derive(Debug)]
pub(super) struct Shards {
    pub(super) parameters: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Shards {
    /// Fresh parameters: moments are zero.
    pub(super) fn fresh(parameters: Vec<f32>) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self { parameters, first: zeros.clone(), second: zeros }
    }

    /// The part that a checkpoint gave this rank.
    pub(super) fn from_state(layout: &Layout, state: &StateDict) -> Result<Self, TrainError> {
        let kind = |kind| layout.owned_values(state, kind);
        Ok(Self { parameters: kind(0)?, first: kind(1)?, second: kind(2)? })
    }

    /// Copies this rank's part into a state dict of the same plan.
    pub(super) fn copy_to(&self, layout: &Layout, state: &mut StateDict) -> Result<(), TrainError> {
        let count = layout.tensors.len();
        for (kind, values) in [&self.parameters, &self.first, &self.second].into_iter().enumerate() {
            let mut rest = values.as_slice();
            for (index, range) in layout.own().iter().enumerate() {
                let (part, after) = rest.split_at(range.len());
                state.write((kind * count + index, 0), 0, bytemuck::cast_slice(part))?;
                rest = after;
            }
        }
        Ok(state.flush()?)
    }

    /// One optimizer step with the gradients of this rank's part, each times `scale`.
    pub(super) fn update(&mut self, layout: &Layout, adam: AdamW, (gradients, scale): (&[f32], f32), decay: f64) {
        let mut start = 0;
        for (range, (_, _, dims)) in layout.own().iter().zip(&layout.tensors) {
            let part = start..start + range.len();
            start = part.end;
            // Biases, norms and magnitudes are not decayed, as transformers' Trainer has it.
            let decay = if dims.len() < 2 { 0.0 } else { decay };
            let moments = (&mut self.first[part.clone()], &mut self.second[part.clone()]);
            adam.update(&mut self.parameters[part.clone()], moments, (&gradients[part], scale), decay);
        }
    }
}
