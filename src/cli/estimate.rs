//! `weightcast plan` before there is a model: by a published profile, a profile of one's own, or sizes; and for devices that
//! are not here.

mod subject;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use self::subject::{Subject, subject};
use super::args::PlanFlags;
use super::machine::{Machine, MachineFlags};
use super::output::{bytes, data, fail, json as print_json, say};
use super::recommend::{JobOf, TrainOf};
use crate::adapter::{AdapterConfig, TargetModules};
use crate::config::{ConfigError, JobConfig, QuantizationConfig};
use crate::error::{Classify, Kind};
use crate::estimate::{
    Advice, Attention, EstimateError, Fit, Fitted, MemoryKind, Method, ModelProfile, Optimizer, Picture, ProfileError,
    Purpose, RankEstimate, TrainEngine, Training, Workload, recommend,
};
use crate::plan::{DTypeRule, Placement, QuantizationRule};
use crate::types::{DType, WorldSize, as_f64, as_u64};

/// Flags that say what is estimated.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Estimate")]
pub struct EstimateFlags {
    /// Take profiles from this TOML file; with one profile in it, that is the model
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// The family of a model that is given by its sizes: llama, mistral, qwen2, qwen3, gpt2, bert, t5, mixtral …
    #[arg(long, value_name = "FAMILY")]
    arch: Option<String>,
    /// Size of the residual stream
    #[arg(long, value_name = "N", requires = "arch")]
    hidden: Option<u64>,
    /// Layers; of t5 in each of both stacks
    #[arg(long, value_name = "N", requires = "arch")]
    layers: Option<u64>,
    /// Query heads
    #[arg(long, value_name = "N", requires = "arch")]
    heads: Option<u64>,
    /// Key and value heads; the query heads by default
    #[arg(long, value_name = "N", requires = "arch")]
    kv_heads: Option<u64>,
    /// Size of a head; hidden / heads by default
    #[arg(long, value_name = "N", requires = "arch")]
    head_dim: Option<u64>,
    /// Size within the MLP, or within one expert
    #[arg(long, value_name = "N", requires = "arch")]
    intermediate: Option<u64>,
    /// Tokens of the vocabulary
    #[arg(long, value_name = "N", requires = "arch")]
    vocab: Option<u64>,
    /// Experts of a layer
    #[arg(long, value_name = "N", requires_all = ["arch", "experts_per_token"])]
    experts: Option<u64>,
    /// Experts that compute one token
    #[arg(long, value_name = "N", requires = "experts")]
    experts_per_token: Option<u64>,
    /// The output head is the embedding
    #[arg(long, requires = "arch")]
    tied: bool,
    /// What it is to run on.
    #[command(flatten)]
    machine: MachineFlags,
    /// Estimate training: all weights, an adapter, or an adapter over quantized weights (NF4 unless --quantize says another)
    #[arg(long, value_enum, value_name = "METHOD", conflicts_with = "inference")]
    train: Option<TrainMethod>,
    /// Estimate generation: weights, keys and values, a forward pass
    #[arg(long)]
    inference: bool,
    /// Sequences that a rank computes on at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u64,
    /// Tokens of a sequence; 2048 by default, or what the model has positions for
    #[arg(long, value_name = "N")]
    sequence: Option<u64>,
    /// Rank of the adapter, on all linear layers
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=65536))]
    lora_rank: u64,
    /// What keeps the optimizer's moments, with devices
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    moments: Moments,
    /// Keep the activations of all blocks
    #[arg(long)]
    no_checkpointing: bool,
    /// Keep all scores of attention
    #[arg(long)]
    exact_attention: bool,
    /// Keep parameters and optimizer in host memory, with devices
    #[arg(long)]
    offload: bool,
    /// Draw the memory of each rank as a bar
    #[arg(long)]
    bars: bool,
    /// Write a picture of it as an SVG file, with the layers by device
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Recommend strategy, placement, quantization, readers and batch, with reasons, and the like for other tools; for this
    /// host unless flags describe another
    #[arg(long)]
    recommend: bool,
    /// Write a job file that follows the recommendation
    #[arg(long, short, value_name = "FILE", requires = "recommend")]
    output: Option<PathBuf>,
    /// What a recommended job trains on: text or JSONL
    #[arg(long, value_name = "FILE", requires_all = ["recommend", "train"])]
    data: Option<PathBuf>,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TrainMethod {
    /// All weights
    Full,
    /// An adapter
    Lora,
    /// An adapter over quantized weights
    Qlora,
}

/// What keeps AdamW's moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Moments {
    /// 8 bytes a parameter
    #[default]
    F32,
    /// bitsandbytes' 8 bits
    #[value(name = "8bit")]
    EightBit,
    /// The parameters' own type
    Bf16,
}

/// Why there is no estimate.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Estimate(#[from] EstimateError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Source(#[from] crate::app::SourceError),
}

impl Classify for Refusal {
    fn kind(&self) -> Kind {
        match self {
            Self::Profile(source) => source.kind(),
            Self::Estimate(source) => source.kind(),
            Self::Config(source) => source.kind(),
            Self::Source(source) => source.kind(),
        }
    }
}

/// Whether `flags` ask for an estimate, and not for the plan of a job.
pub(super) fn is_asked(flags: &PlanFlags) -> bool {
    let estimate = &flags.estimate;
    let by_flags = estimate.profile.is_some()
        || estimate.arch.is_some()
        || estimate.train.is_some()
        || estimate.inference
        || estimate.recommend
        || estimate.machine.is_given();
    by_flags || named(flags).is_some_and(|name| !Path::new(name).exists() && ModelProfile::published(name).is_ok())
}

/// The model in words: the first argument, or `--model`; of a job file, its model.
fn named(flags: &PlanFlags) -> Option<&str> {
    flags.job_file.as_deref().and_then(Path::to_str).or(flags.job.model.as_deref())
}

pub(super) fn run(flags: &PlanFlags) -> u8 {
    let estimated = job(flags).and_then(|config| {
        let subject = subject(flags, &config)?;
        let machine = flags.estimate.machine.machine(flags.estimate.recommend)?;
        answer(flags, config, &subject, &machine)
    });
    match estimated {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

/// The job file, if one is given, and the flags over it.
fn job(flags: &PlanFlags) -> Result<JobConfig, Refusal> {
    let is_toml = |path: &&Path| path.extension().is_some_and(|extension| extension == "toml");
    let mut config = match flags.job_file.as_deref().filter(is_toml) {
        Some(path) => JobConfig::read(path)?,
        None => JobConfig::default(),
    };
    flags.job.clone().apply(&mut config);
    Ok(config)
}

/// What the flags ask for, of a model whose weights are `dtype`.
fn workload(
    flags: &PlanFlags,
    mut config: JobConfig,
    subject: &Subject,
    machine: &Machine,
) -> Result<Workload, Refusal> {
    let estimate = &flags.estimate;
    let devices = as_u64(machine.device_bytes.len());
    let ranks = flags.ranks(&config);
    if devices > 0 && ranks > 1 && u64::from(ranks) != devices {
        let (key, expected) = ("ranks", "as many as there are devices");
        return Err(ConfigError::Value { key, expected, found: ranks.to_string() }.into());
    }
    if devices == 0 && estimate.offload {
        let (key, expected) = ("offload", "devices, by --gpus or --max-memory");
        return Err(ConfigError::Value { key, expected, found: "none".to_owned() }.into());
    }
    let ranks = if devices > 0 { u32::try_from(devices).unwrap_or(u32::MAX) } else { ranks };
    let attention = if estimate.exact_attention { Attention::Exact } else { Attention::Flash };
    let on_devices = devices > 0;
    let training = estimate.train.map(|method| Training {
        method: match method {
            TrainMethod::Full => Method::Full,
            _ => Method::Lora(Box::new(AdapterConfig::new(estimate.lora_rank, 16.0, TargetModules::AllLinear))),
        },
        // What is recommended is a job of this project.
        engine: if on_devices && !estimate.recommend {
            TrainEngine::PyTorch { offload: estimate.offload }
        } else {
            TrainEngine::Weightcast
        },
        optimizer: match estimate.moments {
            Moments::F32 => Optimizer::F32,
            Moments::EightBit => Optimizer::EightBit,
            Moments::Bf16 => Optimizer::AsParameters,
        },
        activation_checkpointing: !estimate.no_checkpointing,
        attention,
    });
    let mut quantization = config.quantization_rule()?;
    if estimate.train == Some(TrainMethod::Qlora) && quantization == QuantizationRule::None {
        config.quantization.format = crate::config::QuantizationFormat::Nf4;
        config.quantization.double = true;
        quantization = config.quantization_rule()?;
    }
    let dtype = match (config.dtype_rule()?, on_devices && training.is_some() && !estimate.recommend) {
        // PyTorch's trainer computes and keeps in bf16.
        (DTypeRule::Keep, true) => DTypeRule::Convert(DType::BF16),
        (rule, _) => rule,
    };
    let world = WorldSize::new(ranks).unwrap_or(WorldSize::ONE);
    // A model that generates on several devices has whole layers on each.
    let by_layers = estimate.inference && ranks > 1;
    let placement = match flags.job.placement {
        None if by_layers => Placement::Layers,
        _ => config.load.placement,
    };
    let positions = subject.skeleton.config.as_ref().map_or(2048, |config| config.max_position_embeddings);
    Ok(Workload {
        strategy: config.load.strategy.unwrap_or_default(),
        placement,
        split: config.load.split.clone(),
        quantization,
        dtype,
        chunking: config.chunking()?,
        batch_sequences: estimate.batch,
        sequence_tokens: estimate.sequence.unwrap_or_else(|| positions.min(2048)),
        memory: if on_devices { MemoryKind::Device } else { MemoryKind::Host },
        purpose: match training {
            Some(training) => Purpose::Train(training),
            None if estimate.inference => Purpose::Inference { cache_dtype: DType::BF16, attention },
            None => Purpose::Load,
        },
        ..Workload::load(world, subject.dtype)
    })
}

/// Prints the estimate, and gives the exit code: that of exhausted memory when it does not fit.
fn answer(flags: &PlanFlags, config: JobConfig, subject: &Subject, machine: &Machine) -> Result<u8, Refusal> {
    let asked = config.quantization.clone();
    let workload = workload(flags, config, subject, machine)?;
    if flags.estimate.recommend {
        return recommended(flags, (subject, machine), &workload, &asked);
    }
    let given = !machine.device_bytes.is_empty() || machine.host_bytes.is_some();
    let budget_bytes = match (machine.device_bytes.is_empty(), machine.host_bytes) {
        (false, _) => machine.device_bytes.clone(),
        (true, Some(bytes)) => vec![bytes / u64::from(workload.world.get())],
        // Without any it is asked how much, not whether.
        (true, None) => vec![u64::MAX],
    };
    let fit = Fit { skeleton: &subject.skeleton, workload, budget_bytes };
    let fitted = fit.answer()?;
    let fits = fitted.fits();
    let change = if fits { None } else { fit.smallest_change()? };
    let counts = given && fit.workload.purpose != Purpose::Load;
    let batch = if counts { fit.largest_batch_sequences()? } else { None };
    let sequence = if counts { fit.largest_sequence_tokens()? } else { None };
    let offload = if given { fit.offload_gain()? } else { None };
    draw(&flags.estimate, subject, &fit, &fitted)?;
    if flags.json {
        let rank = |(rank, over): (&RankEstimate, &u64)| {
            let budget = fit.budget_bytes.get(rank.rank.index()).filter(|_| given);
            json!({"estimate": rank, "budget_bytes": budget, "over_bytes": over, "fits": *over == 0})
        };
        let ranks: Vec<_> = fitted.estimate.ranks.iter().zip(&fitted.over_bytes).map(rank).collect();
        print_json(&json!({
            "model": subject.name,
            "parameters": fitted.estimate.parameters,
            "trained_parameters": fitted.estimate.trained_parameters,
            "batch_sequences": fit.workload.batch_sequences,
            "sequence_tokens": fit.workload.sequence_tokens,
            "placement": fit.workload.placement,
            "split": fitted.split,
            "device_map": fitted.map,
            "ranks": ranks,
            "fits": fits,
            "smallest_change": change,
            "largest_batch_sequences": batch,
            "largest_sequence_tokens": sequence,
            "offload": offload,
        }));
    } else {
        print(subject, &fit, &fitted);
        let most = |value: Option<u64>| value.map_or_else(|| "none".to_owned(), |value| value.to_string());
        if counts {
            say(&format!("largest    batch {}, sequence {}", most(batch), most(sequence)));
        }
        if let Some(gain) = offload {
            let (peak, host, batch) = (bytes(gain.peak_bytes), bytes(gain.host_bytes), gain.largest_batch_sequences);
            say(&format!("offload    would leave {peak} on a device, put {host} on the host, batch {}", most(batch)));
        }
        if !fits {
            let over = fitted.over_bytes.iter().max().copied().unwrap_or(0);
            let advice = change.map_or_else(
                || "no single change would make it fit".to_owned(),
                |change| format!("the smallest change that would make it fit: {change}"),
            );
            say(&format!("does not fit: {:.2} GiB over; {advice}", as_f64(over) / as_f64(1 << 30)));
        }
    }
    Ok(if fits { 0 } else { Kind::Exhausted.exit_code() })
}

/// Pictures, where they are asked for.
fn draw(flags: &EstimateFlags, subject: &Subject, fit: &Fit<'_>, fitted: &Fitted) -> Result<(), Refusal> {
    let (budget_bytes, map) = (fit.budget_bytes.as_slice(), fitted.map.as_ref());
    let picture = Picture { title: &subject.name, estimate: &fitted.estimate, budget_bytes, map };
    if flags.bars {
        picture.lines().iter().for_each(|line| say(line));
    }
    if let Some(path) = &flags.svg {
        let failed =
            |error: std::io::Error| ConfigError::File { path: path.display().to_string(), message: error.to_string() };
        super::recommend::write(path, &picture.svg()).map_err(failed)?;
        say(&format!("written    {}", path.display()));
    }
    Ok(())
}

fn recommended(
    flags: &PlanFlags,
    (subject, machine): (&Subject, &Machine),
    workload: &Workload,
    asked: &QuantizationConfig,
) -> Result<u8, Refusal> {
    let estimate = &flags.estimate;
    if estimate.output.is_some() && estimate.train.is_some() && estimate.data.is_none() {
        let (key, expected) = ("data", "--data FILE, what the job trains on, because --output writes a job that runs");
        return Err(ConfigError::Value { key, expected, found: "nothing".to_owned() }.into());
    }
    if let Some(found) = &machine.found {
        say(found);
    }
    let around = estimate.machine.surroundings(machine, &subject.source);
    let found = match recommend(&subject.skeleton, workload, &around)? {
        Advice::Run(found) => found,
        Advice::Nothing { over_bytes, change } => {
            let advice = change.map_or_else(
                || "no single change would make it fit".to_owned(),
                |change| format!("the smallest change that would make it fit: {change}"),
            );
            let over = bytes(over_bytes);
            say(&format!("does not fit in any placement or quantization: {over} too much at least; {advice}"));
            return Ok(Kind::Exhausted.exit_code());
        }
    };
    if let Some(path) = &estimate.output {
        let failed = |message: String| ConfigError::File { path: path.display().to_string(), message };
        let stem = path.file_stem().map_or_else(|| "job".to_owned(), |stem| stem.to_string_lossy().into_owned());
        let train = estimate.data.as_deref().map(|data| TrainOf {
            full: estimate.train == Some(TrainMethod::Full),
            lora_rank: estimate.lora_rank,
            data,
            checkpoints: format!("{stem}-checkpoints"),
        });
        let job = JobOf { source: &subject.source, quantization: asked, train };
        let text = super::recommend::job_file(&found, &job).map_err(|error| failed(error.to_string()))?;
        super::recommend::write(path, &text).map_err(|error| failed(error.to_string()))?;
        say(&format!("written    {}, for `weightcast launch {}`", path.display(), path.display()));
    }
    super::recommend::print(&found, flags.json);
    Ok(0)
}

/// One line per rank and term, in bytes and for people.
fn print(subject: &Subject, fit: &Fit<'_>, fitted: &Fitted) {
    let Workload { batch_sequences, sequence_tokens, placement, .. } = &fit.workload;
    say(&format!("model      {}: {} parameters", subject.name, fitted.estimate.parameters));
    let placement = serde_json::to_value(placement).ok().and_then(|name| name.as_str().map(str::to_owned));
    say(&format!("placement  {} on {} ranks", placement.unwrap_or_default(), fit.workload.world));
    if fit.workload.purpose != Purpose::Load {
        say(&format!("batch      {batch_sequences} of {sequence_tokens} tokens"));
    }
    if let Some(map) = &fitted.map {
        let units = |device| map.owners.iter().filter(|owner| **owner == Some(device)).count();
        let counts: Vec<String> = (0..map.used_bytes.len()).map(|device| units(device).to_string()).collect();
        say(&format!("units      {} (embedding, layers, norm, head)", counts.join(", ")));
    }
    for (rank, over) in fitted.estimate.ranks.iter().zip(&fitted.over_bytes) {
        for (term, count) in rank.terms().into_iter().filter(|(_, count)| *count > 0) {
            data(&format!("{:>5}  {term:<20}  {count:>16}  {:>11}", rank.rank, bytes(count)));
        }
        data(&format!("{:>5}  {:<20}  {:>16}  {:>11}", rank.rank, "total", rank.peak_bytes, bytes(rank.peak_bytes)));
        if rank.host_bytes > 0 {
            let held = rank.host_bytes;
            data(&format!("{:>5}  {:<20}  {held:>16}  {:>11}", rank.rank, "on the host", bytes(held)));
        }
        let budget = fit.budget_bytes.get(rank.rank.index()).filter(|budget| **budget < u64::MAX);
        if let Some(budget) = budget {
            let word = if *over == 0 { "fits" } else { "does not fit" };
            say(&format!("rank {}: {word} in {}", rank.rank, bytes(*budget)));
        }
    }
}
