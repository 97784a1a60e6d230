//! How to run a model on what there is: strategy, placement, quantization, readers and batch, with a reason for each.
//!
//! Owns: the order in which possibilities are tried. Refuses to know: what runs it; texts are data.

use serde::Serialize;

use super::error::EstimateError;
use super::fit::{Change, Fit, Fitted, nf4};
use super::other_tools::{OtherTool, generators, trainers};
use super::surroundings::Surroundings;
use super::workload::{MemoryKind, Method, Purpose, Training, Workload};
use crate::model::Skeleton;
use crate::plan::{Placement, QuantizationRule, Strategy};
use crate::types::WorldSize;

/// No larger batch is recommended for generation: beyond it a batch is a matter of latency, not of memory.
const MOST_SEQUENCES: u64 = 64;

/// Sequences of an optimizer step over all ranks, as the QLoRA paper has them (table 9, 7B to 33B).
const STEP_SEQUENCES: u64 = 16;

/// How to run it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recommendation {
    /// Ranks, all on one host.
    pub ranks: u32,
    /// Whether weights lie on CUDA devices, and not in host memory.
    pub on_devices: bool,
    /// Which ranks read.
    pub strategy: Strategy,
    /// What ranks keep.
    pub placement: Placement,
    /// The ranks' parts in proportion, for [`Placement::Layers`].
    pub split: Vec<u32>,
    /// What is quantized.
    pub quantization: QuantizationRule,
    /// Threads of each rank that reads.
    pub reader_threads: u32,
    /// Sequences that a rank computes on at once.
    pub batch_sequences: u64,
    /// Of training, sequences of an optimizer step over all ranks.
    pub step_sequences: Option<u64>,
    /// Tokens of a sequence.
    pub sequence_tokens: u64,
    /// A sentence for each choice.
    pub reasons: Vec<String>,
    /// The largest peak of a rank with this batch, in bytes.
    pub peak_bytes: u64,
    /// Flags and files of other tools that do the like.
    pub other_tools: Vec<OtherTool>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Advice {
    /// So.
    Run(Box<Recommendation>),
    /// Nothing fits.
    Nothing {
        /// What the possibility that takes least has too much on its fullest rank, in bytes.
        over_bytes: u64,
        /// A change beyond placement and quantization that would make it fit.
        change: Option<Change>,
    },
}

/// The first possibility that fits: on the devices before the host; without quantization before int8 before NF4; whole
/// copies before weights that are cut; weights that stay in memory before weights that stream; and with it the largest batch.
///
/// ```
/// use weightcast::estimate::{Advice, MemoryKind, ModelProfile, Storage, Surroundings, Workload, recommend};
/// use weightcast::types::WorldSize;
///
/// let model = ModelProfile::published("llama-2-7b")?;
/// let workload = Workload { memory: MemoryKind::Device, ..Workload::load(WorldSize::ONE, model.dtype()) };
/// let around = Surroundings {
///     device_bytes: vec![8 << 30],
///     host_bytes: None,
///     processors: 8,
///     storage: Storage::Files { bytes_per_second: 3_000_000_000 },
/// };
/// let Advice::Run(found) = recommend(&model.skeleton(), &workload, &around)? else { panic!("int8 fits in 8 GiB") };
/// assert_eq!((found.ranks, found.reader_threads), (1, 3));
/// assert!(found.reasons.iter().any(|reason| reason.starts_with("int8: ")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`EstimateError`] when no possibility can be at all.
pub fn recommend(skeleton: &Skeleton, workload: &Workload, around: &Surroundings) -> Result<Advice, EstimateError> {
    let (mut refusal, mut least) = (None, None);
    let was_asked = workload.is_quantized();
    for workload in possibilities(workload, around) {
        let fit = Fit { skeleton, budget_bytes: budgets(&workload, around), workload };
        let answer = match fit.answer() {
            Ok(answer) => answer,
            Err(error) => {
                refusal.get_or_insert(error);
                continue;
            }
        };
        let over = over_bytes(&answer, &fit.workload, around);
        if over == 0 {
            return Ok(Advice::Run(Box::new(choose(fit, was_asked, around)?)));
        }
        if least.as_ref().is_none_or(|(bytes, _)| over < *bytes) {
            least = Some((over, fit));
        }
    }
    match (least, refusal) {
        (Some((over_bytes, fit)), _) => Ok(Advice::Nothing { over_bytes, change: fit.smallest_change()? }),
        (None, Some(error)) => Err(error),
        (None, None) => Ok(Advice::Nothing { over_bytes: 0, change: None }),
    }
}

/// Of each rank: its device's memory, or its part of the host's.
fn budgets(workload: &Workload, around: &Surroundings) -> Vec<u64> {
    match workload.memory {
        MemoryKind::Device => around.device_bytes.clone(),
        MemoryKind::Host => vec![around.host_bytes.unwrap_or(u64::MAX) / u64::from(workload.world.get())],
    }
}

/// What is too much for a device, or for the host beside the devices.
fn over_bytes(answer: &Fitted, workload: &Workload, around: &Surroundings) -> u64 {
    let most = answer.over_bytes.iter().max().copied().unwrap_or(0);
    let host: u64 = answer.estimate.ranks.iter().map(|rank| rank.host_bytes).sum();
    match (workload.memory, around.host_bytes) {
        (MemoryKind::Device, Some(bytes)) => most.max(host.saturating_sub(bytes)),
        _ => most,
    }
}

/// What can be tried, the best first.
fn possibilities(asked: &Workload, around: &Surroundings) -> Vec<Workload> {
    let training = match &asked.purpose {
        Purpose::Train(training) => Some(training),
        _ => None,
    };
    let mut rules = vec![asked.quantization.clone()];
    match training.map(|training| training.method == Method::Full) {
        _ if asked.is_quantized() => {}
        Some(true) => {}
        // The trainer's adapters are over what the files have, or over 4 bits.
        Some(false) => rules.push(nf4()),
        None => rules.extend([QuantizationRule::Int8 { skip: Vec::new() }, nf4()]),
    }
    let unequal = around.device_bytes.iter().any(|bytes| Some(bytes) != around.device_bytes.first());
    let mut placements = vec![Placement::Replicate];
    if asked.world > WorldSize::ONE {
        match training {
            Some(_) if unequal && asked.memory == MemoryKind::Device => {
                placements.extend([Placement::Shard, Placement::Layers]);
            }
            Some(_) => placements.push(Placement::Shard),
            None => placements.push(Placement::Layers),
        }
    }
    let with = |quantization: &QuantizationRule, placement, strategy| Workload {
        placement,
        strategy,
        quantization: quantization.clone(),
        batch_sequences: 1,
        split: Vec::new(),
        ..asked.clone()
    };
    let strategy = Strategy::LowMemory;
    let mut found: Vec<Workload> = rules
        .iter()
        .flat_map(|rule| placements.iter().map(move |&placement| (rule, placement)))
        .map(|(rule, placement)| with(rule, placement, strategy))
        .collect();
    let host = around.host_bytes.is_some() && training.is_some();
    if host && asked.memory == MemoryKind::Device {
        let alone = |workload: Workload| Workload { world: WorldSize::ONE, memory: MemoryKind::Host, ..workload };
        found.extend(rules.iter().map(|rule| alone(with(rule, Placement::Replicate, strategy))));
    }
    // What streams is read again in every step, as it is in the files or the cache.
    if host && let Some(last) = found.last().cloned().filter(|last| last.memory == MemoryKind::Host) {
        found.push(Workload { strategy: Strategy::Streaming, ..last });
    }
    found
}

/// The largest batch, and the reasons.
fn choose(mut fit: Fit<'_>, was_asked: bool, around: &Surroundings) -> Result<Recommendation, EstimateError> {
    let most = if fit.workload.purpose == Purpose::Load { None } else { fit.largest_batch_sequences()? };
    let ranks = fit.workload.world.get();
    let is_training = matches!(fit.workload.purpose, Purpose::Train(_));
    let step_sequences = is_training.then_some(STEP_SEQUENCES.max(u64::from(ranks)));
    let useful = step_sequences.map_or(MOST_SEQUENCES, |sequences| sequences.div_ceil(u64::from(ranks)));
    fit.workload.batch_sequences = most.unwrap_or(1).min(useful);
    let answer = fit.answer()?;
    let workload = &fit.workload;
    let (reader_threads, readers) = around.readers();
    let mut reasons = vec![strategy_reason(workload), placement_reason(workload, around)];
    reasons.push(quantization_reason(workload, was_asked));
    reasons.push(readers);
    if let Some(most) = most {
        reasons.push(batch_reason(workload.batch_sequences, most, step_sequences));
    }
    let other_tools = match &workload.purpose {
        _ if workload.memory == MemoryKind::Host => Vec::new(),
        Purpose::Train(training) => trainers(fit.skeleton, workload, training, around),
        _ => generators(&fit, &answer),
    };
    Ok(Recommendation {
        ranks,
        on_devices: workload.memory == MemoryKind::Device,
        strategy: workload.strategy,
        placement: workload.placement,
        split: answer.split.clone(),
        quantization: workload.quantization.clone(),
        reader_threads,
        batch_sequences: workload.batch_sequences,
        step_sequences,
        sequence_tokens: workload.sequence_tokens,
        reasons,
        peak_bytes: answer.estimate.ranks.iter().map(|rank| rank.peak_bytes).max().unwrap_or(0),
        other_tools,
    })
}

fn strategy_reason(workload: &Workload) -> String {
    match (workload.strategy, workload.world > WorldSize::ONE) {
        (Strategy::Streaming, _) => {
            "streaming: the base does not fit in memory even in NF4, so each layer is read when it is needed"
        }
        (_, true) => {
            "low-memory: rank 0 reads each byte once and sends it; no other rank ever holds more than it keeps"
        }
        (_, false) => "low-memory: the one rank reads each byte once",
    }
    .to_owned()
}

fn placement_reason(workload: &Workload, around: &Surroundings) -> String {
    let several = workload.world > WorldSize::ONE;
    match (workload.placement, workload.memory) {
        (_, MemoryKind::Host) if !around.device_bytes.is_empty() => {
            "one rank on the host: it fits on the devices in no way, and in host memory it does"
        }
        (Placement::Replicate, MemoryKind::Host) if !several => {
            "one rank on the host, whose products use all processors"
        }
        (Placement::Replicate, _) if several => {
            "replicate: a whole copy fits on each rank, and nothing needs to be gathered"
        }
        (Placement::Replicate, _) => "one rank on the device, which holds all of it",
        (Placement::Layers, _) if matches!(workload.purpose, Purpose::Train(_)) => {
            "layers: equal parts do not fit on devices of unequal memory, whole layers in proportion do"
        }
        (Placement::Layers, _) => {
            "layers: a whole copy does not fit, and generation passes from rank to rank by layers"
        }
        _ => "shard: a whole copy does not fit, and training gathers a block at a time",
    }
    .to_owned()
}

fn quantization_reason(workload: &Workload, was_asked: bool) -> String {
    let full = matches!(&workload.purpose, Purpose::Train(Training { method: Method::Full, .. }));
    match &workload.quantization {
        _ if was_asked => "quantized as was asked",
        QuantizationRule::None if full => "no quantization: all weights are trained",
        QuantizationRule::None => "no quantization: it fits without",
        QuantizationRule::Int8 { .. } => "int8: it does not fit without quantization, and 8 bits cost the least",
        _ if matches!(workload.purpose, Purpose::Train(_)) => {
            "nf4 with double quantization: it does not fit without quantization, and adapters are trained over 4 bits"
        }
        _ => "nf4 with double quantization: it does not fit with 8 bits",
    }
    .to_owned()
}

fn batch_reason(batch: u64, most: u64, step: Option<u64>) -> String {
    match step {
        Some(step) if most > batch => format!(
            "batch {step} over all ranks, {batch} at a time: {most} would fit, and {step} is what the QLoRA paper trains with"
        ),
        Some(step) => format!("batch {step} over all ranks, {batch} at a time: the largest that fits"),
        None if most > batch => {
            format!("batch {batch}: {most} would fit, and beyond {MOST_SEQUENCES} it is a matter of latency")
        }
        None => format!("batch {batch}: the largest that fits"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::surroundings::{LOCAL_BYTES_PER_SECOND, Storage};
    use super::super::{Attention, ModelProfile, Optimizer, TrainEngine};
    use super::*;
    use crate::adapter::{AdapterConfig, TargetModules};
    use crate::types::DType;

    const GIB: u64 = 1 << 30;

    fn around(device_gib: &[u64], host_gib: Option<u64>) -> Surroundings {
        Surroundings {
            device_bytes: device_gib.iter().map(|gib| gib * GIB).collect(),
            host_bytes: host_gib.map(|gib| gib * GIB),
            processors: 8,
            storage: Storage::Files { bytes_per_second: LOCAL_BYTES_PER_SECOND },
        }
    }

    fn advice(model: &str, purpose: Purpose, around: &Surroundings) -> Option<Recommendation> {
        let ranks = u32::try_from(around.device_bytes.len().max(1)).expect("few");
        let workload = Workload {
            sequence_tokens: 512,
            memory: if around.device_bytes.is_empty() { MemoryKind::Host } else { MemoryKind::Device },
            purpose,
            ..Workload::load(WorldSize::new(ranks).expect("not zero"), DType::F16)
        };
        let skeleton = ModelProfile::published(model).expect("published").skeleton();
        match recommend(&skeleton, &workload, around).expect("it can be") {
            Advice::Run(found) => Some(*found),
            Advice::Nothing { over_bytes, .. } => {
                assert!(over_bytes > 0);
                None
            }
        }
    }

    fn generation() -> Purpose {
        Purpose::Inference { cache_dtype: DType::F16, attention: Attention::Flash }
    }

    fn adapter() -> Purpose {
        Purpose::Train(Training {
            method: Method::Lora(Box::new(AdapterConfig::new(8, 16.0, TargetModules::AllLinear))),
            engine: TrainEngine::Weightcast,
            optimizer: Optimizer::F32,
            activation_checkpointing: true,
            attention: Attention::Flash,
        })
    }

    /// By hand: 13.5 GB in f16 fit on 24 GiB twice; on 8 GiB they do in int8, 7 GB, only with little else.
    #[test]
    fn the_first_that_fits_is_recommended() {
        let of = |gib: &[u64]| advice("llama-2-7b", generation(), &around(gib, None));
        let large = of(&[24, 24]).expect("it fits");
        assert_eq!((large.placement, &large.quantization), (Placement::Replicate, &QuantizationRule::None));
        let apart = of(&[12, 8]).expect("it fits");
        assert_eq!((apart.placement, &apart.quantization), (Placement::Layers, &QuantizationRule::None));
        assert!(apart.split[0] > apart.split[1] && apart.batch_sequences >= 1);
        assert_eq!(apart.other_tools[0].tool, "accelerate");
        assert!(apart.other_tools[0].settings.contains("\"0\":\"11059MiB\""), "{}", apart.other_tools[0].settings);
        assert!(apart.other_tools[1].settings.starts_with("-ngl 33 --split-mode layer --tensor-split 1."));
        assert_eq!(of(&[6]).expect("it fits").quantization, nf4());
        assert_eq!(of(&[2]), None);
        for one in [large, apart] {
            assert!(one.peak_bytes <= 24 * GIB && one.reasons.len() == 5 && one.reader_threads == 3, "{one:?}");
        }
    }

    /// By hand: 7B in f16 are 13.5 GB, in NF4 3.6; with the largest block in f32, 0.8 GB, and the head 0.5 the host must have
    /// more than 6 GiB to hold it; with less it streams.
    #[test]
    fn training_goes_to_the_host_where_devices_are_too_small() {
        let of = |gib: &[u64], host| advice("llama-2-7b", adapter(), &around(gib, host));
        let device = of(&[24], Some(64)).expect("it fits");
        assert!(device.on_devices && device.quantization == QuantizationRule::None);
        let host = of(&[2, 2], Some(12)).expect("it fits");
        assert_eq!((host.on_devices, host.ranks, &host.quantization), (false, 1, &nf4()));
        assert_eq!((host.strategy, host.step_sequences), (Strategy::LowMemory, Some(16)));
        assert!(host.peak_bytes <= 12 * GIB && host.batch_sequences <= 16);
        let streamed = of(&[], Some(4)).expect("it fits");
        assert_eq!((streamed.strategy, &streamed.quantization), (Strategy::Streaming, &nf4()));
        assert!(streamed.peak_bytes <= 4 * GIB);
        assert_eq!(of(&[], Some(1)), None);
        // Without a figure of the host's memory it is not relied on.
        assert_eq!(of(&[2], None), None);
    }
}
