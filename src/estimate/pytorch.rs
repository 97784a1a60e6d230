//! Training in PyTorch: pure bf16, FSDP with full sharding or data parallel, bitsandbytes' quantized layers.
//!
//! Owns: which tensors of the training loop are there at which moment; docs/ESTIMATES.md says why. Refuses to know: the plan's
//! own placement, whose rows FSDP does not cut: it cuts the flat parameters of a block into equal parts.

use super::base::whole;
use super::compute::elements;
use super::report::{Moment, RankEstimate};
use super::sizes::{AdapterInputs, BF16, Block, F32};
use super::workload::{Attention, Method, TrainEngine, Training, Workload};
use super::{NCCL_BYTES, RESERVED_PERCENT};
use crate::model::{ModelConfig, ModelHead};
use crate::plan::{CUDA_CONTEXT_BYTES, Encoding, LoadPlan, Placement};
use crate::types::{Fqn, Rank, Shape};

/// Logits-sized f32 tensors at the loss: the logits, which the training loop still holds; log-probabilities, which the loss
/// keeps; the gradient of those, and the gradient that it becomes.
const LOGITS_AT_LOSS: u64 = 4;
/// Blocks that are whole at once: one at work, one that is fetched meanwhile (`BACKWARD_PRE`, `limit_all_gathers`).
const BLOCKS_AT_ONCE: u64 = 2;

/// The largest block and all that is in no block, in bytes of weights.
struct Units {
    block: u64,
    root: u64,
}

fn units(plan: &LoadPlan) -> Units {
    let (mut block, mut root) = (0, 0);
    let mut group: (Option<u32>, u64) = (None, 0);
    for tensor in &plan.tensors {
        let (bytes, layer) = (whole(tensor).0, tensor.fqn.layer());
        if layer.is_none() {
            root += bytes;
        }
        group = if layer.is_some() && layer == group.0 { (layer, group.1 + bytes) } else { (layer, bytes) };
        if layer.is_some() {
            block = group.1.max(block);
        }
    }
    Units { block, root }
}

/// What is whole at once of weights that are cut over ranks: everything outside blocks, and [`BLOCKS_AT_ONCE`]; nothing
/// where weights are not cut.
pub(super) fn gathered(plan: &LoadPlan) -> u64 {
    let Units { block, root } = units(plan);
    let cut = plan.placement == Placement::Shard && plan.world.get() > 1;
    if cut { root + BLOCKS_AT_ONCE * block } else { 0 }
}

/// The largest matrix that is made of packed codes, in bf16; 0 when nothing is quantized.
pub(super) fn dequantized(plan: &LoadPlan) -> u64 {
    let packed = plan.tensors.iter().filter(|tensor| !matches!(tensor.encoding, Encoding::Plain { .. }));
    packed.map(|tensor| BF16 * tensor.elements()).max().unwrap_or(0)
}

/// What a rank has of activations: per token and for the batch.
struct Activations {
    /// Inputs of blocks that are kept.
    residual: u64,
    /// What all blocks keep after the forward pass, without checkpointing.
    kept: u64,
    /// One block in its backward pass.
    block: u64,
    /// One f32 tensor of all logits.
    logits: u64,
}

fn activations(
    config: &ModelConfig,
    workload: &Workload,
    trained: &[(Fqn, Shape)],
    training: &Training,
) -> Activations {
    let (tokens, layers) = (workload.tokens(), u64::from(config.blocks()));
    let block = Block::new(config);
    let adapter = match &training.method {
        Method::Full => None,
        Method::Lora(lora) => {
            let a = trained.iter().filter(|(fqn, _)| fqn.as_str().ends_with(".lora_A.weight"));
            let inputs: u64 = a.filter_map(|(_, shape)| shape.0.get(1)).sum();
            Some(AdapterInputs { inputs: inputs.div_ceil(layers.max(1)), dropout: lora.lora_dropout > 0.0 })
        }
    };
    let exact = training.attention == Attention::Exact;
    let saved = tokens * block.saved_bytes(workload.sequence_tokens, adapter, exact);
    let flowing = tokens * block.flowing_bytes();
    let head = if config.head == ModelHead::Base { 0 } else { config.vocab_size };
    let checkpointing = training.activation_checkpointing;
    Activations {
        residual: if checkpointing { tokens * config.hidden_size * BF16 * (layers + 1) } else { 0 },
        kept: if checkpointing { 0 } else { saved * layers },
        block: if checkpointing { saved + flowing } else { flowing },
        logits: tokens * head * F32,
    }
}

/// The memory of every rank; all have the same.
pub(super) fn ranks(
    config: &ModelConfig,
    workload: &Workload,
    (plan, trained): (&LoadPlan, &[(Fqn, Shape)]),
    training: &Training,
) -> Vec<RankEstimate> {
    let offload = training.engine == TrainEngine::PyTorch { offload: true };
    let world = u64::from(plan.world.get());
    let share = |bytes: u64| if plan.placement == Placement::Shard { bytes.div_ceil(world) } else { bytes };
    let (mut weights, mut statistics) = (0, 0);
    for tensor in &plan.tensors {
        let (packed, beside) = whole(tensor);
        weights += packed;
        statistics += beside;
    }
    let full = training.method == Method::Full;
    let count = elements(trained);
    // What is trained of one block, whole.
    let block_trained = BF16 * count.div_ceil(u64::from(config.blocks().max(1)));
    let adapter = if full { 0 } else { BF16 * count };
    let block_adapter = if full { 0 } else { block_trained };
    let cut = plan.placement == Placement::Shard && world > 1;
    let states =
        [share(weights), share(adapter), share(training.optimizer.moments_bytes(count, BF16)), share(BF16 * count)];
    let [weights_bytes, parameter_bytes, optimizer_bytes, gradient_bytes] = if offload { [0; 4] } else { states };
    let Units { block: block_weights, root } = units(plan);
    let whole_at_once = root + BLOCKS_AT_ONCE * (block_weights + block_adapter);
    // With offload a rank's own part comes from the host before the others' do.
    let fetched = if offload { share(block_weights + block_adapter) } else { 0 };
    let gather_bytes = if cut || offload { whole_at_once + fetched } else { 0 };
    let activations = activations(config, workload, trained, training);
    let always = RankEstimate {
        weights_bytes,
        statistics_bytes: statistics,
        parameter_bytes,
        optimizer_bytes,
        context_bytes: CUDA_CONTEXT_BYTES,
        collective_bytes: if world > 1 { NCCL_BYTES } else { 0 },
        host_bytes: if offload { states.iter().sum() } else { 0 },
        ..RankEstimate::empty(Rank::ZERO)
    };
    let block_bytes = activations.block + if workload.is_quantized() { dequantized(plan) } else { 0 };
    let moments = [
        RankEstimate {
            moment: Moment::Loss,
            residual_bytes: activations.residual,
            block_bytes: activations.kept,
            logits_bytes: LOGITS_AT_LOSS * activations.logits,
            // The root is whole from the first forward on; of blocks none is.
            gather_bytes: if cut || offload { root } else { 0 },
            ..always
        },
        RankEstimate {
            moment: Moment::LastBlock,
            residual_bytes: activations.residual,
            block_bytes: block_bytes + activations.kept,
            logits_bytes: activations.logits,
            gather_bytes,
            ..always
        },
        RankEstimate {
            moment: Moment::FirstBlock,
            gradient_bytes: gradient_bytes + if cut || offload { block_trained } else { 0 },
            block_bytes: block_bytes + activations.kept.div_ceil(u64::from(config.blocks().max(1))),
            logits_bytes: activations.logits,
            gather_bytes,
            ..always
        },
        RankEstimate {
            moment: Moment::Step,
            gradient_bytes,
            snapshot_bytes: if offload { 0 } else { share(BF16 * count) },
            ..always
        },
    ];
    let rounded = moments.map(|moment| {
        let allocated = moment.summed().allocated_bytes();
        RankEstimate { rounding_bytes: allocated * (RESERVED_PERCENT - 100) / 100, ..moment }.summed()
    });
    let worst = rounded.into_iter().max_by_key(|moment| moment.peak_bytes).unwrap_or(always);
    plan.world.ranks().map(|rank| RankEstimate { rank, ..worst }).collect()
}
