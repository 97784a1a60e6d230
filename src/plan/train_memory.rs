//! The memory of a rank that trains on the host: exact for what it holds all the time, modelled for what comes and goes.
//!
//! Owns: the figures. Refuses to know: the recipe; it is given the few sizes that matter.

use serde::{Deserialize, Serialize};

use super::{LoadPlan, aligned};
use crate::types::{Fqn, Rank};

/// Bytes of an f32.
const F32: u64 = 4;
/// Logits that the loss has at once, for which it needs no second copy (`nn`'s chunks); more where 32 tokens have more.
const LOGITS: u64 = 1 << 24;
const MIN_LOGIT_TOKENS: u64 = 32;

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
    /// Weights at the worst moment: as f32, put together where they are cut over ranks, and the largest with its adapter merged;
    /// and the buffers that they are gathered through, which stay.
    pub block_bytes: u64,
    /// Activations and their gradients at that moment.
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

    /// What of it lies on the device of a rank that computes there: what a step computes with.
    #[must_use]
    pub const fn device_bytes(&self) -> u64 {
        self.parameters_bytes + self.gradient_bytes + self.block_bytes + self.activation_bytes
    }

    /// What of it lies in host memory then: this rank's rows of the optimizer, the snapshot, and gradients on their way to
    /// other ranks, which go through the host.
    #[must_use]
    pub const fn beside_device_bytes(&self) -> u64 {
        self.optimizer_bytes + self.snapshot_bytes + self.gradient_bytes
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
        let groups = groups(base, state, rank);
        let most = |bytes: fn(&Group) -> u64| groups.iter().map(bytes).max().unwrap_or(0);
        let buffers = most(|group| group.gathered) + most(|group| group.own);
        // A block and a head that are trained have their values among the parameters.
        let trained_ones = [Group { layer: Some(0), ..Group::default() }, Group::default()];
        let merged = largest_merged(base, sizes);
        let moments = groups.iter().chain(&trained_ones).flat_map(|group| sizes.moments(group, merged));
        let worst = moments.max_by_key(|moment| moment.weights + moment.activations).unwrap_or_default();
        Self {
            parameters_bytes: F32 * trained,
            optimizer_bytes: 3 * own,
            snapshot_bytes: snapshot.sum(),
            gradient_bytes: 3 * F32 * trained + own,
            block_bytes: buffers + worst.weights,
            activation_bytes: worst.activations,
        }
    }
}

/// What is there at once at one moment of a step.
#[derive(Clone, Copy, Debug, Default)]
struct Moment {
    weights: u64,
    activations: u64,
}

/// Tensors of the base that come and go together: those of a block, or one outside blocks. In bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    layer: Option<u32>,
    /// As f32.
    values: u64,
    /// What is cut over ranks, from all of them.
    gathered: u64,
    /// This rank's part of that.
    own: u64,
    /// What this rank reads for it, where it streams.
    fetched: u64,
}

impl StepSizes {
    /// The moments of a step at which the weights of `group` are there: when they come, with all that they are made of, and
    /// when they are computed with. A matrix outside blocks may be the head.
    fn moments(&self, group: &Group, merged: u64) -> [Moment; 2] {
        let residual = F32 * self.tokens * self.hidden;
        let kept = residual * (self.layers + 1);
        let coming = Moment { weights: group.values + group.gathered + group.fetched, activations: kept + residual };
        let used = match group.layer {
            Some(_) => Moment { weights: group.values + merged, activations: kept + self.block_bytes() },
            // What the head was made of is free again, and used again where the logits fit into it: the heap does not move.
            None => {
                let lost = if group.gathered < self.logits_bytes() { group.gathered } else { 0 };
                Moment { weights: group.values + lost, activations: kept + self.loss_bytes() }
            }
        };
        [coming, used]
    }

    /// A block's forward with what its backward needs.
    fn block_bytes(&self) -> u64 {
        let Self { tokens, hidden, query, key_value, intermediate, .. } = *self;
        // Both norms' outputs and the middle; queries, keys, values and their mixture; gate, up and their product.
        let saved = 3 * hidden + 2 * query + 2 * key_value + 3 * intermediate + self.adapter_ranks;
        // The incoming and two outgoing gradients, and those of the wider inner activations.
        let flowing = 4 * hidden + (3 * intermediate).max(2 * query + 2 * key_value);
        let blocks_saved = if self.checkpointing { 1 } else { self.layers };
        F32 * tokens * (blocks_saved * saved + flowing)
    }

    /// The loss: the last norm's output, its input and the gradient, and of a chunk of tokens logits, inputs and gradients.
    fn loss_bytes(&self) -> u64 {
        let Self { tokens, hidden, .. } = *self;
        F32 * (3 * tokens * hidden + 2 * self.logit_tokens() * hidden) + self.logits_bytes()
    }

    fn logits_bytes(&self) -> u64 {
        F32 * self.logit_tokens() * self.vocabulary
    }

    /// Tokens of a chunk.
    fn logit_tokens(&self) -> u64 {
        (LOGITS / self.vocabulary.max(1)).max(MIN_LOGIT_TOKENS).min(self.tokens)
    }
}

/// The groups of the base; what is trained is no part of them.
fn groups(base: &LoadPlan, state: &LoadPlan, rank: Rank) -> Vec<Group> {
    let is_trained = |fqn: &Fqn| state.tensors.iter().any(|tensor| &tensor.fqn == fqn);
    let mut groups: Vec<Group> = Vec::new();
    for tensor in base.tensors.iter().filter(|tensor| !is_trained(&tensor.fqn)) {
        let packed: u64 = tensor.components().iter().map(|component| component.bytes).sum();
        let holdings = tensor.holdings(rank, base.world);
        let is_cut = tensor.sharded && base.world.get() > 1;
        let one = Group {
            layer: tensor.fqn.layer(),
            values: F32 * tensor.elements(),
            gathered: if is_cut { packed } else { 0 },
            own: if is_cut { holdings.iter().map(|holding| holding.owned.len()).sum() } else { 0 },
            fetched: if base.streams(tensor) {
                holdings.iter().map(|holding| aligned(holding.kept.len())).sum()
            } else {
                0
            },
        };
        match groups.last_mut() {
            Some(last) if last.layer.is_some() && last.layer == one.layer => {
                last.values += one.values;
                last.gathered += one.gathered;
                last.own += one.own;
                last.fetched += one.fetched;
            }
            _ => groups.push(one),
        }
    }
    groups
}

/// The largest matrix of a block, where an adapter may be merged into a copy of it.
fn largest_merged(base: &LoadPlan, sizes: &StepSizes) -> u64 {
    let matrices = base.tensors.iter().filter(|tensor| tensor.fqn.layer().is_some());
    if sizes.adapter_ranks == 0 { 0 } else { F32 * matrices.map(super::TensorPlan::elements).max().unwrap_or(0) }
}
