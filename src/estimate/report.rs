//! The answer: the memory of each rank at its worst moment, by terms.

use serde::Serialize;

use crate::types::Rank;

/// The memory of all ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Parameters of the model, tied ones once.
    pub parameters: u64,
    /// Parameters that are trained; 0 without training.
    pub trained_parameters: u64,
    /// Each rank's memory.
    pub ranks: Vec<RankEstimate>,
}

/// When a rank's memory is at its largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// While weights are read.
    #[default]
    Load,
    /// While prompts of all sequences are computed, with keys and values of their full length.
    Generate,
    /// Where forward and backward pass meet: logits and their gradients.
    Loss,
    /// The backward pass of the last block: all kept activations, no gradients yet.
    LastBlock,
    /// The backward pass of the first block: all gradients, no other kept activations.
    FirstBlock,
    /// The optimizer's step.
    Step,
}

/// The memory of one rank in bytes at its worst moment (`ES-2`): a term that is not there at that moment is 0, and the
/// terms add up to [`RankEstimate::peak_bytes`]. Where they come from is in docs/ESTIMATES.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RankEstimate {
    /// The rank.
    pub rank: Rank,
    /// Which moment.
    pub moment: Moment,
    /// Weights that it keeps, in their encoding. Exact: the sum of the kept bytes of `Part::Weight` in the load plan.
    pub weights_bytes: u64,
    /// Statistics of quantized weights. Exact, likewise; in PyTorch every rank has all of them, because bitsandbytes keeps
    /// them beside the parameters that FSDP cuts.
    pub statistics_bytes: u64,
    /// Padding between tensors, to multiples of 64 bytes (`plan::ARENA_ALIGN_BYTES`); exact, 0 in PyTorch.
    pub padding_bytes: u64,
    /// Parameters that are trained beside the weights. Here: all of them in f32, whole. In PyTorch: an adapter's in bf16,
    /// cut over the ranks.
    pub parameter_bytes: u64,
    /// Gradients of what is trained, and what their exchange takes (`plan::TrainMemory`); in PyTorch bf16, cut over the
    /// ranks, and those of one block whole.
    pub gradient_bytes: u64,
    /// Moments of the optimizer, and here the rows of parameters that the rank owns: `Optimizer::moments_bytes`.
    pub optimizer_bytes: u64,
    /// Here, the copy that a checkpoint is written from; in PyTorch, at its step, the denominator that `foreach` AdamW makes of
    /// all parameters at once (torch's documentation: "about the size of the parameters").
    pub snapshot_bytes: u64,
    /// Inputs of all blocks, kept for the backward pass with activation checkpointing: tokens · hidden · (layers + 1) · bytes
    /// of an element.
    pub residual_bytes: u64,
    /// Activations of one block and their gradients, and the weights that it makes of packed ones; of all blocks without
    /// activation checkpointing.
    pub block_bytes: u64,
    /// Logits: in training tokens · vocabulary · 4 bytes, four times at the loss (logits, their shifted copy or its gradient,
    /// log-probabilities, the gradient of those), once afterwards; in generation those of one token of each sequence.
    pub logits_bytes: u64,
    /// Keys and values: 2 · layers · key-value size · tokens · element size.
    pub cache_bytes: u64,
    /// Weights that are gathered from all ranks to be computed with: in PyTorch the embedding and the head for all the time,
    /// and two blocks, the one at work and the one that is fetched.
    pub gather_bytes: u64,
    /// Bytes in flight while a reader reads (`LoadPlan::window_bytes`); exact.
    pub window_bytes: u64,
    /// What PyTorch's allocator has reserved beyond what is allocated: [`super::RESERVED_PERCENT`].
    pub rounding_bytes: u64,
    /// The device's own memory of a process: `plan::CUDA_CONTEXT_BYTES`.
    pub context_bytes: u64,
    /// NCCL's buffers: [`super::NCCL_BYTES`].
    pub collective_bytes: u64,
    /// Program, threads and sockets on a host: `plan::PROCESS_OVERHEAD_BYTES`, beside other ranks `plan::STAGING_BYTES`.
    pub process_bytes: u64,
    /// The sum of the terms: memory of the device, or of the host where there is none.
    pub peak_bytes: u64,
    /// Beside a device: memory of the host, at its worst moment.
    pub host_bytes: u64,
}

impl RankEstimate {
    /// A rank that takes nothing yet.
    pub(super) const fn empty(rank: Rank) -> Self {
        Self {
            rank,
            moment: Moment::Load,
            weights_bytes: 0,
            statistics_bytes: 0,
            padding_bytes: 0,
            parameter_bytes: 0,
            gradient_bytes: 0,
            optimizer_bytes: 0,
            snapshot_bytes: 0,
            residual_bytes: 0,
            block_bytes: 0,
            logits_bytes: 0,
            cache_bytes: 0,
            gather_bytes: 0,
            window_bytes: 0,
            rounding_bytes: 0,
            context_bytes: 0,
            collective_bytes: 0,
            process_bytes: 0,
            peak_bytes: 0,
            host_bytes: 0,
        }
    }

    /// The terms by name, in order; together [`Self::peak_bytes`].
    #[must_use]
    pub const fn terms(&self) -> [(&'static str, u64); 16] {
        [
            ("weights", self.weights_bytes),
            ("statistics", self.statistics_bytes),
            ("padding", self.padding_bytes),
            ("trained parameters", self.parameter_bytes),
            ("gradients", self.gradient_bytes),
            ("optimizer", self.optimizer_bytes),
            ("snapshot", self.snapshot_bytes),
            ("kept block inputs", self.residual_bytes),
            ("block at work", self.block_bytes),
            ("logits", self.logits_bytes),
            ("keys and values", self.cache_bytes),
            ("gathered weights", self.gather_bytes),
            ("reader window", self.window_bytes),
            ("allocator rounding", self.rounding_bytes),
            ("device context", self.context_bytes),
            ("NCCL and process", self.collective_bytes + self.process_bytes),
        ]
    }

    /// What PyTorch calls allocated: all but rounding, context and NCCL.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.peak_bytes - self.rounding_bytes - self.context_bytes - self.collective_bytes - self.process_bytes
    }

    /// What PyTorch calls reserved, which its tools and many published figures state.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        self.allocated_bytes() + self.rounding_bytes
    }

    /// With the sum of its terms.
    pub(super) fn summed(mut self) -> Self {
        self.peak_bytes = self.terms().iter().map(|(_, bytes)| bytes).fold(0, |sum, bytes| sum.saturating_add(*bytes));
        self
    }
}
