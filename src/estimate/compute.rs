//! From model and workload to the memory of each rank.

use super::base::{kept, plan_without_files, trained_tensors};
use super::error::EstimateError;
use super::report::{Estimate, Moment, RankEstimate};
use super::sizes::{self, Block};
use super::workload::{Attention, MemoryKind, Method, Purpose, TrainEngine, Training, Workload};
use super::{NCCL_BYTES, RESERVED_PERCENT, pytorch};
use crate::model::{ModelConfig, ModelHead, Skeleton};
use crate::plan::{
    CUDA_CONTEXT_BYTES, LoadPlan, Placement, QuantizationRule, StepSizes, Strategy, TrainMemory, state_plan,
};
use crate::types::{DType, Fqn, Rank, Shape};

/// The memory of every rank for `workload` with the model of `skeleton`.
///
/// ```
/// use weightcast::estimate::{ModelProfile, Workload, estimate};
/// use weightcast::types::WorldSize;
///
/// let model = ModelProfile::published("llama-2-7b")?;
/// let workload = Workload::load(WorldSize::ONE, model.dtype());
/// let answer = estimate(&model.skeleton(), &workload)?;
/// assert_eq!(answer.ranks[0].weights_bytes, 2 * 6_738_415_616);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`EstimateError`].
pub fn estimate(skeleton: &Skeleton, workload: &Workload) -> Result<Estimate, EstimateError> {
    check(skeleton, workload)?;
    let plan = plan_without_files(skeleton, workload)?;
    let parameters = skeleton.parameters();
    let ranks = plan.world.ranks();
    let (trained_parameters, ranks) = match &workload.purpose {
        Purpose::Load => (0, ranks.map(|rank| load(&plan, rank)).collect()),
        Purpose::Inference { cache_dtype, attention } => {
            let config = config_of(skeleton)?;
            let of = |rank| generate((skeleton, config), workload, &plan, (rank, *cache_dtype, *attention));
            (0, ranks.map(of).collect())
        }
        Purpose::Train(training) => {
            let config = config_of(skeleton)?;
            let trained = trained_tensors(skeleton, &training.method)?;
            let count = elements(&trained);
            let ranks = match training.engine {
                TrainEngine::Weightcast => own_trainer(config, workload, (&plan, &trained), training),
                TrainEngine::PyTorch { .. } => pytorch::ranks(config, workload, (&plan, &trained), training),
            };
            (count, ranks)
        }
    };
    Ok(Estimate { parameters, trained_parameters, ranks })
}

pub(super) fn elements(tensors: &[(Fqn, Shape)]) -> u64 {
    tensors.iter().map(|(_, shape)| shape.elements().unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
}

fn config_of(skeleton: &Skeleton) -> Result<&ModelConfig, EstimateError> {
    skeleton.config.as_ref().ok_or_else(|| EstimateError::Unsupported {
        what: "a model without config.json".to_owned(),
        with: "for training or inference",
        reason: "activations follow from its configuration",
    })
}

/// That the workload can be at all.
fn check(skeleton: &Skeleton, workload: &Workload) -> Result<(), EstimateError> {
    for (field, found) in [("batch", workload.batch_sequences), ("sequence", workload.sequence_tokens)] {
        if found == 0 {
            return Err(EstimateError::Value { field, expected: "at least 1".to_owned(), found: "0".to_owned() });
        }
    }
    if workload.tokens() > MAX_TOKENS {
        let expected = format!("batch times sequence of at most {MAX_TOKENS} tokens");
        return Err(EstimateError::Value { field: "batch", expected, found: workload.tokens().to_string() });
    }
    let layers = skeleton.layers();
    if workload.placement == Placement::Layers && workload.world.get() > layers {
        let expected = format!("at most {layers}, the number of layers, because whole layers go to ranks");
        return Err(EstimateError::Value { field: "ranks", expected, found: workload.world.get().to_string() });
    }
    let Some(config) = &skeleton.config else { return Ok(()) };
    // Only these have a table of positions, which ends.
    let table = config.rope.is_none() && config.encoder_decoder.is_none();
    if table && workload.purpose != Purpose::Load && workload.sequence_tokens > config.max_position_embeddings {
        let expected = format!("at most {}, the positions that the model knows", config.max_position_embeddings);
        return Err(EstimateError::Value { field: "sequence", expected, found: workload.sequence_tokens.to_string() });
    }
    match &workload.purpose {
        Purpose::Train(training) => check_training(config, workload, training),
        _ => Ok(()),
    }
}

/// More than any batch has, and few enough that products with sizes of models fit 64 bits.
pub(super) const MAX_TOKENS: u64 = 1 << 28;

fn check_training(config: &ModelConfig, workload: &Workload, training: &Training) -> Result<(), EstimateError> {
    let refuse = |what: &str, with, reason| Err(EstimateError::Unsupported { what: what.to_owned(), with, reason });
    if training.method == Method::Full && workload.quantization != QuantizationRule::None {
        return refuse(
            "training all weights",
            "with quantization",
            "quantized weights are not trained; train an adapter",
        );
    }
    let pytorch = matches!(training.engine, TrainEngine::PyTorch { .. });
    if pytorch && matches!(workload.placement, Placement::Layers | Placement::Experts) {
        return refuse(
            "training in PyTorch",
            "with layers or experts on ranks",
            "FSDP cuts all; choose shard or replicate",
        );
    }
    if !pytorch && !config.is_trainable() {
        let what = format!("training {} with weightcast's trainer", config.architecture.name());
        let reason = "it trains causal models of llama, mistral, qwen2, qwen3 and gpt2";
        return Err(EstimateError::Unsupported { what, with: "at all", reason });
    }
    Ok(())
}

/// A rank that loads, exactly as its plan has it.
fn load(plan: &LoadPlan, rank: Rank) -> RankEstimate {
    let (memory, (weights_bytes, statistics_bytes)) = (plan.memory(rank), kept(plan, rank));
    let base = RankEstimate {
        weights_bytes,
        statistics_bytes,
        padding_bytes: memory.padding_bytes,
        ..RankEstimate::empty(rank)
    };
    if memory.peak_device_bytes > 0 {
        let context_bytes = CUDA_CONTEXT_BYTES;
        return RankEstimate { context_bytes, host_bytes: memory.peak_host_bytes, ..base }.summed();
    }
    let (window_bytes, process_bytes) = (memory.window_bytes, memory.overhead_bytes);
    RankEstimate { window_bytes, process_bytes, ..base }.summed()
}

/// This project's trainer: what its plan counts (`plan::TrainMemory`), beside the base.
fn own_trainer(
    config: &ModelConfig,
    workload: &Workload,
    (plan, trained): (&LoadPlan, &[(Fqn, Shape)]),
    training: &Training,
) -> Vec<RankEstimate> {
    let state = state_plan(plan, trained);
    let layers = u64::from(config.num_hidden_layers);
    let a = trained.iter().filter(|(fqn, _)| fqn.as_str().ends_with(".lora_A.weight"));
    let sizes = StepSizes {
        tokens: workload.tokens(),
        layers,
        hidden: config.hidden_size,
        query: config.query_size(),
        key_value: config.key_value_size(),
        intermediate: config.intermediate_size,
        vocabulary: config.vocab_size,
        adapter_ranks: a.map(|(_, shape)| shape.rows()).sum::<u64>() / layers.max(1),
        checkpointing: training.activation_checkpointing,
    };
    let of = |rank| {
        let loading = load(plan, rank);
        let train = TrainMemory::new(plan, &state, &sizes, rank);
        let on_device = loading.context_bytes > 0;
        let streams = plan.strategy == Strategy::Streaming;
        let window = plan.memory(rank).window_bytes;
        if !on_device && !streams && train.total_bytes() < loading.window_bytes {
            // The window is free again before training begins, so the larger of both counts.
            return loading;
        }
        RankEstimate {
            moment: Moment::LastBlock,
            parameter_bytes: train.parameters_bytes,
            gradient_bytes: train.gradient_bytes,
            optimizer_bytes: if on_device { 0 } else { train.optimizer_bytes },
            snapshot_bytes: if on_device { 0 } else { train.snapshot_bytes },
            block_bytes: train.activation_bytes,
            gather_bytes: train.block_bytes,
            // What streams is read while the rank trains.
            window_bytes: if streams { window } else { 0 },
            host_bytes: if on_device {
                loading.host_bytes - window + window.max(train.beside_device_bytes())
            } else {
                0
            },
            ..loading
        }
        .summed()
    };
    plan.world.ranks().map(of).collect()
}

/// A rank that generates.
fn generate(
    (skeleton, config): (&Skeleton, &ModelConfig),
    workload: &Workload,
    plan: &LoadPlan,
    (rank, dtype, attention): (Rank, DType, Attention),
) -> RankEstimate {
    let loading = load(plan, rank);
    let (batch, sequence) = (workload.batch_sequences, workload.sequence_tokens);
    let exact = attention == Attention::Exact;
    let block = workload.tokens() * Block::new(config).forward_bytes(sequence, exact);
    let logits =
        if config.head == ModelHead::Base { 0 } else { batch * config.vocab_size * (sizes::F32 + sizes::BF16) };
    let gather_bytes = pytorch::gathered(plan);
    let block_bytes = block + pytorch::dequantized(plan);
    let device = workload.memory == MemoryKind::Device;
    // Weights and cache are taken once; what comes and goes leaves holes.
    let rounding = if device { (block_bytes + logits + gather_bytes) * (RESERVED_PERCENT - 100) / 100 } else { 0 };
    let several = workload.world.get() > 1;
    RankEstimate {
        moment: Moment::Generate,
        cache_bytes: batch * rank_cache((skeleton, config), plan, rank, (sequence, dtype)),
        logits_bytes: logits,
        block_bytes,
        gather_bytes,
        rounding_bytes: rounding,
        // It is free again before anything is generated.
        window_bytes: 0,
        collective_bytes: if device && several { NCCL_BYTES } else { 0 },
        ..loading
    }
    .summed()
}

/// Keys and values of one sequence that `rank` keeps: of its layers where whole layers go to ranks, else of all.
fn rank_cache(
    (skeleton, config): (&Skeleton, &ModelConfig),
    plan: &LoadPlan,
    rank: Rank,
    (tokens, dtype): (u64, DType),
) -> u64 {
    let all = sizes::cache_bytes(config, tokens, dtype) + sizes::cross_cache_bytes(config, tokens, dtype);
    if plan.placement != Placement::Layers {
        return all;
    }
    // T5's decoder, which keeps them, follows its encoder.
    let first = if config.encoder_decoder.is_some() { config.num_hidden_layers } else { 0 };
    let layers = sizes::cached_layers(config);
    let owned = (0..layers).filter(|layer| {
        let of_layer = |tensor: &&crate::model::SkeletonTensor| tensor.layer == Some(first + layer);
        let mut names = skeleton.tensors.iter().filter(of_layer).map(|tensor| &tensor.fqn);
        names.any(|fqn| plan.tensors.iter().any(|tensor| tensor.fqn == *fqn && tensor.owner == Some(rank)))
    });
    let cross = sizes::cross_cache_bytes(config, tokens, dtype) / u64::from(layers.max(1));
    owned.map(|layer| sizes::layer_cache_bytes(config, layer, tokens, dtype) + cross).sum()
}
