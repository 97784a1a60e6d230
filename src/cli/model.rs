//! `weightcast model`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::json;

use super::output::{bytes, data, fail, json as print_json, say};
use crate::app::{
    DEFAULT_SHARD_BYTES, NewModelError, Stage, StepChoice, TrainedRun, expand_model, export_model, lifecycle,
    list_models, new_model, new_preset, open_model, record_stage,
};
use crate::model::{
    Architecture, DEFAULT_FILE_BYTES, GENERATED, GenerateRequest, NewModel, Preset, inspect, parse_parameters,
};
use crate::types::DType;

/// `weightcast model …`
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Parameters, bytes by dtype, layers and tied weights, from the headers alone
    Inspect {
        /// Model directory, file, or hub id
        model: String,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Make a model with seeded random weights, in seconds
    New {
        /// The family
        #[arg(long, value_parser = parse_architecture, default_value = "llama")]
        arch: Architecture,
        /// About how many parameters, such as 135M or 1B
        #[arg(long, required_unless_present = "preset")]
        params: Option<String>,
        /// A GPT-2 model of a fixed size: 38M, 124M, 350M
        #[arg(long, conflicts_with_all = ["params", "arch"])]
        preset: Option<Preset>,
        /// Element type: bfloat16, float16, float32
        #[arg(long, default_value = "bfloat16")]
        dtype: String,
        /// What the values follow from
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Where to write it
        directory: PathBuf,
    },
    /// Download a model into the cache, and say before what that takes
    Pull(super::pull::PullFlags),
    /// List the hub's cache, and make it smaller
    Cache {
        /// What to do
        #[command(subcommand)]
        command: super::model_cache::ModelCacheCommand,
    },
    /// Write a model in another format, or make a model directory of nanoGPT's ckpt.pt
    Convert(Box<super::convert::ConvertFlags>),
    /// What each format costs a model: bytes, errors of its weights, perplexity on a text
    Quality(Box<super::quality::QualityFlags>),
    /// Write the weights that a run of type full has trained as a model
    Export {
        /// The checkpoint directory of a training run
        #[arg(long, value_name = "DIR")]
        checkpoint: PathBuf,
        /// Which step: a number, or best; without it the newest
        #[arg(long, value_parser = super::adapter::parse_step)]
        step: Option<StepChoice>,
        /// Where to write the model; a name of the form {architecture}-{size}-{dataset}-{training_type}[-{version}] makes
        /// it a model directory
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        /// Element type: float32, bfloat16, float16
        #[arg(long, value_parser = super::adapter::parse_dtype, default_value = "float32")]
        dtype: DType,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Insert blocks that change nothing at first (LLaMA Pro), to be trained alone with layers = "expanded"
    Expand {
        /// Model directory, file, or hub id
        model: String,
        /// How many blocks; a number that divides the model's
        #[arg(long, value_name = "N")]
        blocks: u32,
        /// Where to write the larger model
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// The model directories in a directory
    List {
        /// The directory
        #[arg(default_value = ".")]
        directory: PathBuf,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// What there is of each stage of a model: pretrain, lora, merged, deployed
    Lifecycle {
        /// A model directory, or a directory of the stages of one model
        directory: PathBuf,
        /// Record that the model directory is deployed, and where
        #[arg(long, value_name = "WHERE")]
        deployed: Option<String>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Compute logits, and the gradients of an adapter, to check that a model is computed right
    Forward(Box<super::forward::ForwardFlags>),
}

pub(super) fn run(command: &ModelCommand) -> u8 {
    match command {
        ModelCommand::Inspect { model, json } => show(model, *json),
        ModelCommand::Forward(flags) => super::forward::run(flags),
        ModelCommand::New { arch, params, preset, dtype, seed, directory } => {
            let Ok(dtype) = dtype.parse::<DType>() else {
                say(&format!("error: --dtype: expected bfloat16, float16 or float32, found {dtype:?}"));
                return super::EXIT_USAGE;
            };
            let seed = *seed;
            let made = match (preset, params) {
                (Some(preset), _) => new_preset(*preset, dtype, seed, directory),
                (None, params) => {
                    let parameters = match parse_parameters(params.as_deref().unwrap_or_default()) {
                        Ok(parameters) => parameters,
                        Err(error) => return fail(&error),
                    };
                    let (architecture, max_file_bytes) = (*arch, DEFAULT_FILE_BYTES);
                    new_model(&GenerateRequest { architecture, parameters, dtype, seed, max_file_bytes }, directory)
                }
            };
            show_new(made, directory)
        }
        ModelCommand::Pull(flags) => super::pull::run(flags),
        ModelCommand::Cache { command } => super::model_cache::run(command),
        ModelCommand::Convert(flags) => super::convert::run(flags),
        ModelCommand::Quality(flags) => super::quality::run(flags),
        ModelCommand::Export { checkpoint, step, output, dtype, json } => {
            export(checkpoint, step.unwrap_or(StepChoice::Newest), (output, *dtype), *json)
        }
        ModelCommand::Expand { model, blocks, output, json } => expand(model, *blocks, output, *json),
        ModelCommand::List { directory, json } => list(directory, *json),
        ModelCommand::Lifecycle { directory, deployed, json } => show_lifecycle(directory, deployed.as_deref(), *json),
    }
}

fn show_new(made: Result<NewModel, NewModelError>, directory: &Path) -> u8 {
    match made {
        Ok(model) => {
            let (size, files) = (bytes(model.len_bytes()), model.files.len());
            data(&format!("{}: {} parameters, {size} in {files} files", directory.display(), model.parameters));
            0
        }
        Err(error) => fail(&error),
    }
}

fn export(root: &Path, step: StepChoice, (output, dtype): (&Path, DType), as_json: bool) -> u8 {
    let exported = TrainedRun::open(root, step).and_then(|run| export_model(&run, dtype, output));
    let exported = match exported {
        Ok(exported) => exported,
        Err(error) => return fail(&error),
    };
    if as_json {
        print_json(&json!({
            "output": output, "step": exported.step, "parameters": exported.parameters, "bytes": exported.bytes,
            "dtype": dtype.torch_name(),
        }));
    } else {
        let (step, parameters, size) = (exported.step, exported.parameters, bytes(exported.bytes));
        data(&format!("{}: model of step {step}: {parameters} parameters, {size}", output.display()));
    }
    0
}

fn expand(model: &str, blocks: u32, output: &Path, as_json: bool) -> u8 {
    let expanded = match expand_model(model, blocks, (output, DEFAULT_SHARD_BYTES), &super::output::download) {
        Ok(expanded) => expanded,
        Err(error) => return fail(&error),
    };
    let (inserted, parameters) = (&expanded.inserted, expanded.parameters);
    if as_json {
        print_json(&json!({
            "output": output, "inserted": inserted, "parameters": parameters, "bytes": expanded.bytes,
        }));
    } else {
        let numbers: Vec<String> = inserted.iter().map(u32::to_string).collect();
        let size = bytes(expanded.bytes);
        data(&format!("{}: {parameters} parameters, {size}; new blocks {}", output.display(), numbers.join(", ")));
    }
    0
}

fn list(directory: &Path, as_json: bool) -> u8 {
    let models = match list_models(directory) {
        Ok(models) => models,
        Err(error) => return fail(&error),
    };
    if as_json {
        print_json(&models);
        return 0;
    }
    if models.is_empty() {
        say(&format!("no model directory in {}", directory.display()));
    }
    for model in models {
        let parameters = model.parameters.map_or_else(|| "?".to_owned(), |count| count.to_string());
        let (stage, adapters) = (model.stage.name(), model.adapters.len());
        data(&format!("{:<48} {stage:<9} {parameters:>13} parameters  {adapters} adapters", model.directory));
    }
    0
}

fn show_lifecycle(directory: &Path, deployed: Option<&str>, as_json: bool) -> u8 {
    if let Some(place) = deployed
        && let Err(error) = record_stage(directory, Stage::Deployed, place)
    {
        return fail(&error);
    }
    let lifecycle = match lifecycle(directory) {
        Ok(lifecycle) => lifecycle,
        Err(error) => return fail(&error),
    };
    if as_json {
        print_json(&lifecycle);
        return 0;
    }
    data(&format!("size      {}", lifecycle.size));
    for stage in &lifecycle.stages {
        let models = if stage.models.is_empty() { "-".to_owned() } else { stage.models.join(", ") };
        data(&format!("{:<9} {models}", stage.stage.name()));
    }
    0
}

fn show(model: &str, as_json: bool) -> u8 {
    let source = match open_model(model, &super::output::download) {
        Ok(source) => source,
        Err(error) => return fail(&error),
    };
    let inspection = inspect(&source.skeleton, &source.index, &source.binding);
    if as_json {
        print_json(&inspection);
        return 0;
    }
    data(&format!("architecture  {}", inspection.architecture));
    data(&format!("parameters    {}", inspection.parameters));
    data(&format!("layers        {}", inspection.layers));
    if let Some(experts) = inspection.experts {
        let (count, per_token, active) = (experts.count, experts.per_token, experts.active_parameters);
        data(&format!("experts       {count} in a layer, {per_token} for a token: {active} parameters active"));
    }
    data(&format!("stored        {} in {} files", bytes(source.index.total_bytes()), source.index.files.len()));
    for (dtype, count) in &inspection.bytes_by_dtype {
        data(&format!("  {dtype:<11} {}", bytes(*count)));
    }
    for tie in &inspection.tied {
        data(&format!("tied          {} is {}", tie.alias, tie.target));
    }
    0
}

fn parse_architecture(text: &str) -> Result<Architecture, String> {
    let found = GENERATED.into_iter().find(|architecture| architecture.name() == text);
    found.ok_or_else(|| format!("expected one of {}", GENERATED.map(Architecture::name).join(", ")))
}
