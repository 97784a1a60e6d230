//! The memory of a rank that trains on the host: exact for what it holds all the time, modelled for what comes and goes.
//!
//! Owns: the figures. Refuses to know: the recipe; it is given the few sizes that matter.

use serde::{Deserialize, Serialize};

use super::{LoadPlan, aligned};
use crate::types::{Fqn, Rank};

/// Bytes of an f32.
const F32: u64 = 4;
/// Logits of the loss that are there at once, and as much again for their probabilities (`nn`'s chunks).
const LOGITS_BYTES: u64 = 2 * (F32 << 24);

/// What a step computes on at once, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSizes {
    /// Tokens of a micro-batch.
    pub tokens: u64,
    /// Layers.
    pub layers: u64,
    /// Size of the residual stream.
    pub hidden: u64,
    /// Outputs of the query projection.
    pub query: u64,
    /// Outputs of the key projection.
    pub key_value: u64,
    /// Size within the MLP.
    pub intermediate: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// The sum of the adapters' ranks in one block.
    pub adapter_ranks: u64,
    /// Whether blocks are computed again in the backward pass.
    pub checkpointing: bool,
}

/// The memory of training in bytes, beside base and process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainMemory {
    /// Trained parameters, which every rank computes with: exact.
    pub parameters_bytes: u64,
    /// This rank's rows of parameters and both moments of AdamW: exact.
    pub optimizer_bytes: u64,
    /// The snapshot that is written while training goes on: exact.
    pub snapshot_bytes: u64,
    /// Gradients, and the buffers of their exchange: exact.
    pub gradient_bytes: u64,
    /// One block's weights, gathered and as f32, and the largest of them with its adapter merged.
    pub block_bytes: u64,
    /// Activations and their gradients at the worst moment.
    pub activation_bytes: u64,
}

impl TrainMemory {
    /// All of it.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.parameters_bytes
            + self.optimizer_bytes
            + self.snapshot_bytes
            + self.gradient_bytes
            + self.block_bytes
            + self.activation_bytes
    }

    /// Of `rank` that trains the state `state` over `base`.
    #[must_use]
    pub fn new(base: &LoadPlan, state: &LoadPlan, sizes: &StepSizes, rank: Rank) -> Self {
        let count = state.tensors.len() / 3;
        let trained: u64 = state.tensors.iter().take(count).map(super::TensorPlan::elements).sum();
        let own: u64 = state.tensors.iter().take(count).map(|tensor| tensor.kept_bytes(rank, state.world)).sum();
        let snapshot = state
            .tensors
            .iter()
            .flat_map(|tensor| tensor.holdings(rank, state.world))
            .map(|holding| aligned(holding.kept.len()));
        Self {
            parameters_bytes: F32 * trained,
            optimizer_bytes: 3 * own,
            snapshot_bytes: snapshot.sum(),
            gradient_bytes: 3 * F32 * trained + own,
            block_bytes: largest_group(base, state, rank) + largest_merged(base, sizes),
            activation_bytes: sizes.activation_bytes(),
        }
    }
}

impl StepSizes {
    /// Kept inputs of all blocks, and the worse of: a block's forward with what its backward needs, or the loss.
    fn activation_bytes(&self) -> u64 {
        let Self { tokens, hidden, query, key_value, intermediate, .. } = *self;
        let kept = tokens * hidden * (self.layers + 1);
        // Both norms' outputs and the middle; queries, keys, values and their mixture; gate, up and their product.
        let saved = 3 * hidden + 2 * query + 2 * key_value + 3 * intermediate + self.adapter_ranks;
        // The incoming and two outgoing gradients, and those of the wider inner activations.
        let flowing = 4 * hidden + (3 * intermediate).max(2 * query + 2 * key_value);
        let blocks_saved = if self.checkpointing { 1 } else { self.layers };
        let block = tokens * (blocks_saved * saved + flowing);
        let logits = (2 * tokens * self.vocabulary * F32).min(LOGITS_BYTES);
        let loss = 3 * tokens * hidden * F32 + logits;
        F32 * kept + loss.max(F32 * block)
    }
}

/// The most that one group of tensors (a block, or one of the tensors outside blocks) takes: packed as gathered and as put
/// together, where it is cut over ranks, this rank's part as read where it streams, and as f32. What is trained is no part of it.
fn largest_group(base: &LoadPlan, state: &LoadPlan, rank: Rank) -> u64 {
    let is_trained = |fqn: &Fqn| state.tensors.iter().any(|tensor| &tensor.fqn == fqn);
    let mut largest = 0;
    let mut group: (Option<u32>, u64) = (None, 0);
    for tensor in base.tensors.iter().filter(|tensor| !is_trained(&tensor.fqn)) {
        let packed: u64 = tensor.components().iter().map(|component| component.bytes).sum();
        let gathered = if tensor.sharded && base.world.get() > 1 { 2 * packed } else { 0 };
        let streamed = tensor.holdings(rank, base.world).iter().map(|holding| aligned(holding.kept.len())).sum();
        let fetched = if base.streams(tensor) { streamed } else { 0 };
        let bytes = F32 * tensor.elements() + gathered + fetched;
        let layer = tensor.fqn.layer();
        group = if layer.is_some() && layer == group.0 { (layer, group.1 + bytes) } else { (layer, bytes) };
        largest = largest.max(group.1);
    }
    largest
}

/// The largest matrix of a block, where an adapter may be merged into a copy of it.
fn largest_merged(base: &LoadPlan, sizes: &StepSizes) -> u64 {
    let matrices = base.tensors.iter().filter(|tensor| tensor.fqn.layer().is_some());
    if sizes.adapter_ranks == 0 { 0 } else { F32 * matrices.map(super::TensorPlan::elements).max().unwrap_or(0) }
}
