//! A placement in the words of other tools.

use serde::Serialize;
use serde_json::json;

use super::fit::{Fit, Fitted, nf4};
use super::surroundings::Surroundings;
use super::workload::{MemoryKind, Method, Purpose, TrainEngine, Training, Workload};
use crate::model::Skeleton;
use crate::plan::{DTypeRule, Placement, QuantizationRule};
use crate::types::{DType, as_f64};

/// Of a device's memory, what other tools are told to use: the rest is for their own context.
const USABLE_PERCENT: u64 = 90;

/// What another tool is told.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OtherTool {
    /// The tool.
    pub tool: &'static str,
    /// Flags of a command line, or a text in JSON.
    pub settings: String,
}

/// How PyTorch would train it on the devices: the first of data parallel, FSDP, NF4 and CPU offload that fits.
pub(super) fn trainers(
    skeleton: &Skeleton,
    workload: &Workload,
    training: &Training,
    around: &Surroundings,
) -> Vec<OtherTool> {
    let quantizations = match workload.is_quantized() || training.method == Method::Full {
        true => vec![workload.quantization.clone()],
        false => vec![QuantizationRule::None, nf4()],
    };
    let placements = [(Placement::Replicate, false), (Placement::Shard, false), (Placement::Shard, true)];
    let ranks = workload.world.get();
    for (placement, offload) in
        placements.into_iter().filter(|(placement, _)| *placement == Placement::Replicate || ranks > 1)
    {
        for quantization in &quantizations {
            let engine = TrainEngine::PyTorch { offload };
            let workload = Workload {
                placement,
                quantization: quantization.clone(),
                split: Vec::new(),
                memory: MemoryKind::Device,
                // PyTorch's trainer computes and keeps in bf16.
                dtype: DTypeRule::Convert(DType::BF16),
                batch_sequences: 1,
                purpose: Purpose::Train(Training { engine, ..training.clone() }),
                ..workload.clone()
            };
            let fit = Fit { skeleton, workload, budget_bytes: around.device_bytes.clone() };
            let Ok(Some(batch)) = fit.largest_batch_sequences() else { continue };
            let how = match (placement, offload) {
                (Placement::Replicate, _) if ranks == 1 => "one process",
                (Placement::Replicate, _) => "DistributedDataParallel",
                (_, false) => "FSDP with ShardingStrategy.FULL_SHARD",
                (_, true) => "FSDP with ShardingStrategy.FULL_SHARD and CPUOffload(offload_params=True)",
            };
            let base = if quantization == &QuantizationRule::None { "bf16" } else { "bitsandbytes NF4" };
            let settings = format!("torchrun --nproc-per-node {ranks}, {how}, base in {base}, batch {batch} at most");
            return vec![OtherTool { tool: "torchrun", settings }];
        }
    }
    Vec::new()
}

/// The same placement for tools that generate.
pub(super) fn generators(fit: &Fit<'_>, answer: &Fitted) -> Vec<OtherTool> {
    let ranks = fit.workload.world.get();
    let tool = |tool, settings| OtherTool { tool, settings };
    let budgets: Vec<u64> = fit.budget_bytes.iter().take(crate::types::as_usize(u64::from(ranks))).copied().collect();
    let usable = |bytes: &u64| format!("{}MiB", (bytes >> 20) * USABLE_PERCENT / 100);
    let max_memory: serde_json::Map<String, serde_json::Value> =
        budgets.iter().enumerate().map(|(device, bytes)| (device.to_string(), json!(usable(bytes)))).collect();
    let accelerate = json!({"device_map": "auto", "max_memory": max_memory}).to_string();
    let layers = fit.skeleton.layers();
    let parts: Vec<String> = match answer.split.is_empty() {
        true => vec!["1".to_owned()],
        false => {
            let least = answer.split.iter().filter(|part| **part > 0).min().copied().unwrap_or(1);
            let part = |&part: &u32| format!("{:.2}", f64::from(part) / f64::from(least));
            answer.split.iter().map(part).collect()
        }
    };
    // One more than the layers: the head.
    let llama_cpp = format!("-ngl {} --split-mode layer --tensor-split {}", layers + 1, parts.join(","));
    let smallest = budgets.iter().min().copied().unwrap_or(1);
    let equal = budgets.iter().all(|&bytes| bytes == smallest);
    let heads = fit.skeleton.config.as_ref().map_or(1, |config| config.num_attention_heads);
    let mut tools = vec![tool("accelerate", accelerate), tool("llama.cpp", llama_cpp)];
    if equal && heads.is_multiple_of(u64::from(ranks)) {
        let used = as_f64(USABLE_PERCENT) / 100.0;
        tools.push(tool("vLLM", format!("--tensor-parallel-size {ranks} --gpu-memory-utilization {used:.2}")));
    }
    tools
}
