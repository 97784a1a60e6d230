//! The work of a reader, cut into jobs that threads take one by one.

use crate::plan::{Input, LoadPlan, Part, SourceSpan, Strategy, TensorPlan};
use crate::types::{ByteRange, Rank};

/// One piece of [`Part::Weight`] (from elements) or of any component (from a checkpoint) to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    /// Index into the plan's tensors.
    pub(super) tensor: usize,
    /// What is read.
    pub(super) work: Work,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Elements, to be encoded.
    Encode(SourceSpan),
    /// Bytes of a component, as they are.
    Copy { component: usize, range: ByteRange },
}

/// The jobs of `rank` in the order in which their results are used.
pub(super) fn jobs(plan: &LoadPlan, rank: Rank) -> impl Iterator<Item = Job> + '_ {
    plan.tensors
        .iter()
        .enumerate()
        .filter(move |(_, tensor)| plan.strategy == Strategy::Full || tensor.reader == rank)
        .flat_map(move |(index, tensor)| tensor_jobs(plan, rank, index, tensor))
}

fn tensor_jobs(plan: &LoadPlan, rank: Rank, index: usize, tensor: &TensorPlan) -> Vec<Job> {
    let chunk_bytes = plan.chunking.chunk_bytes;
    let alone = plan.strategy == Strategy::Full;
    let work: Vec<Work> = match &tensor.input {
        Input::Elements { .. } => {
            // Alone, a rank encodes only what it keeps, unless a value depends on the whole tensor.
            let mine = tensor.elements_of(rank, plan.world);
            let all = !alone || tensor.encoding.needs_whole_tensor();
            tensor
                .spans(chunk_bytes)
                .filter_map(|span| {
                    let elements = if all { span.elements } else { span.elements.intersect(mine)? };
                    Some(Work::Encode(tensor.span(elements)))
                })
                .collect()
        }
        Input::Stored { .. } => {
            let holdings = tensor.holdings(rank, plan.world);
            tensor
                .pieces(chunk_bytes)
                .into_iter()
                .filter_map(|piece| {
                    let holding = holdings.get(piece.component)?;
                    let wanted = if alone { piece.range.intersect(holding.kept)? } else { piece.range };
                    let stored = holding.component.part != Part::NestedOffset;
                    stored.then_some(Work::Copy { component: piece.component, range: wanted })
                })
                .collect()
        }
    };
    work.into_iter().map(|work| Job { tensor: index, work }).collect()
}

/// The number of jobs that `rank` has for the tensor at `index`.
pub(super) fn jobs_of(plan: &LoadPlan, rank: Rank, index: usize) -> usize {
    plan.tensors.get(index).map_or(0, |tensor| tensor_jobs(plan, rank, index, tensor).len())
}
