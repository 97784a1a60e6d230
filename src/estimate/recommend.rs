//! How to run a model on some devices: placement, quantization and batch, with a reason for each, and the same for other tools.
//!
//! Owns: the order in which possibilities are tried. Refuses to know: what runs it; texts are data.

use serde::Serialize;
use serde_json::json;

use super::error::EstimateError;
use super::fit::{Fit, Fitted, nf4};
use super::workload::{Purpose, TrainEngine, Workload};
use crate::model::Skeleton;
use crate::plan::{Placement, QuantizationRule};
use crate::types::as_f64;

/// No larger batch is recommended: beyond it a batch is a matter of the recipe, not of memory.
const MOST_SEQUENCES: u64 = 64;
/// Of a device's memory, what other tools are told to use: the rest is for their own context.
const USABLE_PERCENT: u64 = 90;

/// How to run it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recommendation {
    /// What ranks keep.
    pub placement: Placement,
    /// The ranks' parts in proportion, for [`Placement::Layers`].
    pub split: Vec<u32>,
    /// What is quantized.
    pub quantization: QuantizationRule,
    /// Whether parameters and optimizer lie in host memory.
    pub offload: bool,
    /// Sequences that a rank computes on at once.
    pub batch_sequences: u64,
    /// A sentence for each choice.
    pub reasons: Vec<String>,
    /// The largest peak of a rank with this batch, in bytes.
    pub peak_bytes: u64,
    /// Flags and files of other tools that do the like.
    pub other_tools: Vec<OtherTool>,
}

/// What another tool is told.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OtherTool {
    /// The tool.
    pub tool: &'static str,
    /// Flags of a command line, or a text in JSON.
    pub settings: String,
}

/// The first possibility that fits: without quantization before int8 before NF4; whole copies on each device before weights that
/// are cut (training) or whole layers (generation), before host memory; and with it the largest batch. Nothing when none fits.
///
/// # Errors
/// [`EstimateError`].
pub fn recommend(
    skeleton: &Skeleton,
    workload: &Workload,
    budget_bytes: &[u64],
) -> Result<Option<Recommendation>, EstimateError> {
    for workload in possibilities(workload) {
        let fit = Fit { skeleton, workload, budget_bytes: budget_bytes.to_vec() };
        let Ok(answer) = fit.answer() else { continue };
        if !answer.fits() {
            continue;
        }
        let most = if fit.workload.purpose == Purpose::Load { None } else { fit.largest_batch_sequences()? };
        let batch_sequences = most.unwrap_or(fit.workload.batch_sequences).min(MOST_SEQUENCES);
        let workload = Workload { batch_sequences, ..fit.workload.clone() };
        let fit = Fit { workload, ..fit };
        let answer = fit.answer()?;
        return Ok(Some(describe(&fit, &answer, most)));
    }
    Ok(None)
}

fn offloads(workload: &Workload) -> bool {
    matches!(&workload.purpose, Purpose::Train(training) if training.engine == TrainEngine::PyTorch { offload: true })
}

/// What can be tried, the best first.
fn possibilities(workload: &Workload) -> Vec<Workload> {
    let full = matches!(&workload.purpose, Purpose::Train(training) if training.method == super::Method::Full);
    let mut rules = vec![workload.quantization.clone()];
    if !workload.is_quantized() && !full {
        rules.push(QuantizationRule::Int8 { skip: Vec::new() });
        rules.push(nf4());
    }
    let several = workload.world.get() > 1;
    let apart = if matches!(workload.purpose, Purpose::Train(_)) { Placement::Shard } else { Placement::Layers };
    let placements = if several { vec![Placement::Replicate, apart] } else { vec![Placement::Replicate] };
    let mut found = Vec::new();
    for quantization in &rules {
        for &placement in &placements {
            found.push(Workload {
                placement,
                quantization: quantization.clone(),
                batch_sequences: 1,
                split: Vec::new(),
                ..workload.clone()
            });
        }
    }
    let last = found.last().cloned();
    if let Some(mut last) = last
        && let Purpose::Train(training) = &mut last.purpose
        && training.engine == (TrainEngine::PyTorch { offload: false })
    {
        training.engine = TrainEngine::PyTorch { offload: true };
        found.push(last);
    }
    found
}

fn describe(fit: &Fit<'_>, answer: &Fitted, most: Option<u64>) -> Recommendation {
    let workload = &fit.workload;
    let peak_bytes = answer.estimate.ranks.iter().map(|rank| rank.peak_bytes).max().unwrap_or(0);
    let offload = offloads(workload);
    let mut reasons = vec![
        match workload.placement {
            Placement::Replicate => "replicate: a whole copy fits on each device, and nothing needs to be gathered",
            Placement::Layers => {
                "layers: a whole copy does not fit, and generation passes from device to device by layers"
            }
            _ => "shard: a whole copy does not fit, and training gathers a block at a time",
        }
        .to_owned(),
        match &workload.quantization {
            QuantizationRule::None => "no quantization: it fits without".to_owned(),
            QuantizationRule::Int8 { .. } => {
                "int8: it does not fit without quantization, and 8 bits cost the least".to_owned()
            }
            _ => "nf4 with double quantization: it does not fit with 8 bits".to_owned(),
        },
    ];
    if offload {
        reasons.push("offload: parameters do not fit on the devices beside activations".to_owned());
    }
    if let Some(most) = most {
        let batch = workload.batch_sequences;
        reasons.push(match most > batch {
            true => format!("batch {batch}: {most} would fit, and more than {MOST_SEQUENCES} is the recipe's choice"),
            false => format!("batch {batch}: the largest that fits"),
        });
    }
    Recommendation {
        placement: workload.placement,
        split: answer.split.clone(),
        quantization: workload.quantization.clone(),
        offload,
        batch_sequences: workload.batch_sequences,
        reasons,
        peak_bytes,
        other_tools: other_tools(fit, answer, offload),
    }
}

/// The same placement in the words of other tools.
fn other_tools(fit: &Fit<'_>, answer: &Fitted, offload: bool) -> Vec<OtherTool> {
    let ranks = fit.workload.world.get();
    let tool = |tool, settings| OtherTool { tool, settings };
    if matches!(fit.workload.purpose, Purpose::Train(_)) {
        let mut settings = format!("torchrun --nproc-per-node {ranks}");
        settings += match (fit.workload.placement, offload) {
            (Placement::Replicate, _) => ", DistributedDataParallel",
            (_, false) => ", FSDP with ShardingStrategy.FULL_SHARD",
            (_, true) => ", FSDP with ShardingStrategy.FULL_SHARD and CPUOffload(offload_params=True)",
        };
        return vec![tool("torchrun", settings)];
    }
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

#[cfg(test)]
mod tests {
    use super::super::{Attention, MemoryKind, ModelProfile};
    use super::*;
    use crate::types::{DType, WorldSize};

    const GIB: u64 = 1 << 30;

    fn generation(gib: &[u64], model: &str) -> Option<Recommendation> {
        let world = WorldSize::new(u32::try_from(gib.len()).expect("few")).expect("not zero");
        let workload = Workload {
            sequence_tokens: 2048,
            memory: MemoryKind::Device,
            purpose: Purpose::Inference { cache_dtype: DType::F16, attention: Attention::Flash },
            ..Workload::load(world, DType::F16)
        };
        let skeleton = ModelProfile::published(model).expect("published").skeleton();
        let budget: Vec<u64> = gib.iter().map(|gib| gib * GIB).collect();
        recommend(&skeleton, &workload, &budget).expect("it can be")
    }

    /// By hand: 13.5 GB in f16 fit on 24 GiB twice; on 8 GiB in int8 they are 7 GB, and with cache and context no more than NF4 fits.
    #[test]
    fn the_first_that_fits_is_recommended() {
        let large = generation(&[24, 24], "llama-2-7b").expect("it fits");
        assert_eq!((large.placement, &large.quantization), (Placement::Replicate, &QuantizationRule::None));
        let apart = generation(&[12, 8], "llama-2-7b").expect("it fits");
        assert_eq!((apart.placement, &apart.quantization), (Placement::Layers, &QuantizationRule::None));
        assert!(apart.split[0] > apart.split[1] && apart.batch_sequences >= 1);
        assert_eq!(apart.other_tools[0].tool, "accelerate");
        assert!(apart.other_tools[0].settings.contains("\"0\":\"11059MiB\""), "{}", apart.other_tools[0].settings);
        assert!(apart.other_tools[1].settings.starts_with("-ngl 33 --split-mode layer --tensor-split 1."));
        assert_eq!(generation(&[8], "llama-2-7b").expect("it fits").quantization, nf4());
        assert_eq!(generation(&[2], "llama-2-7b"), None);
        for one in [large, apart] {
            assert!(one.peak_bytes <= 24 * GIB && one.reasons.len() == 3, "{one:?}");
        }
    }
}
