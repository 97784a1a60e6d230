//! `weightcast adapter`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::output::{bytes, data, fail, json as print_json, say};
use crate::adapter::TargetModules;
use crate::app::{
    AdapterSource, AdapterSourceError, DEFAULT_SHARD_BYTES, MergeRequest, StepChoice, export_adapter, merge_adapter,
    open_model, recipe_code,
};
use crate::quant::FourBitCode;
use crate::types::{DType, Step};

/// `weightcast adapter …`
#[derive(Debug, Subcommand)]
pub enum AdapterCommand {
    /// Write a training checkpoint as a PEFT adapter
    Export {
        /// The checkpoint directory of a training run
        #[arg(long, value_name = "DIR")]
        checkpoint: PathBuf,
        /// Which step: a number, or best; without it the newest
        #[arg(long, value_parser = parse_step)]
        step: Option<StepChoice>,
        /// Where to write the adapter
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        /// Element type: float32, bfloat16, float16
        #[arg(long, value_parser = parse_dtype, default_value = "float32")]
        dtype: DType,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Merge an adapter into its full-precision base model
    Merge(Box<MergeFlags>),
    /// Show an adapter's configuration and modules
    Inspect {
        #[command(flatten)]
        source: SourceFlags,
        /// Check the adapter against this model
        #[arg(long, value_name = "MODEL")]
        base: Option<String>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
}

/// Which adapter.
#[derive(Debug, Args)]
pub struct SourceFlags {
    /// A PEFT adapter: a directory or a hub id
    #[arg(long, value_name = "ADAPTER", required_unless_present = "checkpoint", conflicts_with = "checkpoint")]
    pub adapter: Option<String>,
    /// The checkpoint directory of a training run
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Which step of it: a number, or best; without it the newest
    #[arg(long, value_parser = parse_step, requires = "checkpoint")]
    pub step: Option<StepChoice>,
}

/// `weightcast adapter merge`
#[derive(Debug, Args)]
pub struct MergeFlags {
    #[command(flatten)]
    source: SourceFlags,
    /// The base model; without it the one that adapter_config.json names
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Where to write the merged model
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Element type: float32, bfloat16, float16; without it the base's
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    /// Bytes of tensors in one file at most, such as 5GB or 500MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    shard_size: Option<u64>,
    /// The 4-bit format of the base that the adapter was trained on (nf4, fp4), where the checkpoint does not say it
    #[arg(long, value_name = "FORMAT", value_parser = parse_code)]
    trained_on: Option<FourBitCode>,
    /// Print JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: &AdapterCommand) -> u8 {
    match command {
        AdapterCommand::Export { checkpoint, step, output, dtype, json } => {
            export(checkpoint, step.unwrap_or(StepChoice::Newest), (output, *dtype), *json)
        }
        AdapterCommand::Merge(flags) => merge(flags),
        AdapterCommand::Inspect { source, base, json } => inspect(source, base.as_deref(), *json),
    }
}

fn open(flags: &SourceFlags) -> Result<AdapterSource, AdapterSourceError> {
    match (&flags.checkpoint, &flags.adapter) {
        (Some(root), _) => AdapterSource::open_checkpoint(root, flags.step.unwrap_or(StepChoice::Newest)),
        (None, reference) => {
            AdapterSource::open_peft(reference.as_deref().unwrap_or_default(), &super::output::download)
        }
    }
}

fn export(root: &Path, step: StepChoice, (output, dtype): (&Path, DType), as_json: bool) -> u8 {
    let source = match AdapterSource::open_checkpoint(root, step) {
        Ok(source) => source,
        Err(error) => return fail(&error),
    };
    let exported = match export_adapter(&source, dtype, output) {
        Ok(exported) => exported,
        Err(error) => return fail(&error),
    };
    if as_json {
        print_json(&json!({
            "output": output, "step": source.step, "modules": exported.modules, "parameters": exported.parameters,
            "bytes": exported.bytes, "dtype": dtype.torch_name(),
            "base_model": source.config.base_model_name_or_path,
        }));
    } else {
        let step = source.step.map_or_else(String::new, |step| format!(" of step {step}"));
        data(&format!(
            "{}: adapter{step}: {} parameters on {} modules, {}",
            output.display(),
            exported.parameters,
            exported.modules,
            bytes(exported.bytes)
        ));
    }
    0
}

fn merge(flags: &MergeFlags) -> u8 {
    let adapter = match open(&flags.source) {
        Ok(adapter) => adapter,
        Err(error) => return fail(&error),
    };
    let of_run = adapter.training.as_ref().and_then(|training| recipe_code(&training.recipe));
    let request = MergeRequest {
        adapter: &adapter,
        base: flags.base.as_deref(),
        dtype: flags.dtype,
        max_file_bytes: flags.shard_size.unwrap_or(DEFAULT_SHARD_BYTES),
        trained_on: flags.trained_on.or(of_run),
    };
    let merged = match merge_adapter(&request, &flags.output, &super::output::download) {
        Ok(merged) => merged,
        Err(error) => return fail(&error),
    };
    if let Some(figure) = &merged.quantization {
        let worst = figure
            .worst
            .as_ref()
            .map_or_else(String::new, |fqn| format!(", at most {:.2} % ({fqn})", 100.0 * figure.worst_relative_error));
        say(&format!(
            "warning: the adapter was trained beside {} weights, which differ from these by {:.2} % over the merged \
             matrices{worst}; the merged model is not exactly the one that was trained",
            figure.format,
            100.0 * figure.relative_error,
        ));
    }
    if flags.json {
        print_json(&json!({
            "output": flags.output, "base_model": merged.base, "modules": merged.modules, "files": merged.files,
            "bytes": merged.bytes, "quantization": merged.quantization,
        }));
    } else {
        data(&format!(
            "{}: {} with {} merged modules, {} in {} files",
            flags.output.display(),
            merged.base,
            merged.modules,
            bytes(merged.bytes),
            merged.files
        ));
    }
    0
}

fn inspect(flags: &SourceFlags, base: Option<&str>, as_json: bool) -> u8 {
    let source = match open(flags) {
        Ok(source) => source,
        Err(error) => return fail(&error),
    };
    let linears = match base {
        None => source.own_modules(),
        Some(base) => match open_model(base, &super::output::download) {
            Ok(model) => crate::adapter::linears(&model.skeleton),
            Err(error) => return fail(&error),
        },
    };
    // The values are read too: an adapter with a NaN in it is better found here.
    let adapter = match source.read(&linears) {
        Ok(adapter) => adapter,
        Err(error) => return fail(&error),
    };
    let config = &adapter.config;
    if as_json {
        let module = |module: &crate::adapter::LoadedModule| {
            let target = &module.target;
            json!({
                "module": target.module, "out_features": target.out_features, "in_features": target.in_features,
                "r": target.r, "alpha": target.alpha, "scale": target.scale,
            })
        };
        let modules: Vec<Value> = adapter.modules.iter().map(module).collect();
        print_json(&json!({
            "place": source.place, "step": source.step, "parameters": adapter.parameters(),
            "bytes": source.stored_bytes(), "config": config.to_value(), "modules": modules,
        }));
        return 0;
    }
    let targets = match &config.target_modules {
        TargetModules::AllLinear => "all-linear".to_owned(),
        TargetModules::Pattern(pattern) => pattern.clone(),
        TargetModules::Names(names) => names.join(", "),
    };
    let variants = [(config.use_dora, "DoRA"), (config.use_rslora, "rsLoRA")];
    let variants: Vec<&str> = variants.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect();
    data(&format!("adapter       {}", if variants.is_empty() { "LoRA".to_owned() } else { variants.join(", ") }));
    data(&format!("base model    {}", config.base_model_name_or_path.as_deref().unwrap_or("not named")));
    data(&format!("rank, alpha   {}, {}", config.r, config.lora_alpha));
    data(&format!("targets       {targets}"));
    data(&format!("modules       {}", adapter.modules.len()));
    data(&format!("parameters    {}, {}", adapter.parameters(), bytes(source.stored_bytes())));
    if let Some(step) = source.step {
        data(&format!("step          {step}"));
    }
    0
}

pub(super) fn parse_step(text: &str) -> Result<StepChoice, String> {
    match text {
        "best" => Ok(StepChoice::Best),
        _ => text.parse().map(|step| StepChoice::Step(Step(step))).map_err(|_| "expected a step or best".to_owned()),
    }
}

pub(super) fn parse_dtype(text: &str) -> Result<DType, String> {
    let four_bit = ["nf4", "fp4", "4bit", "4-bit", "int4"].contains(&text.to_lowercase().as_str());
    if four_bit || text.eq_ignore_ascii_case("int8") {
        return Err("a quantized type would round base and adapter together and lose what was trained; merge into \
                    bfloat16, float16 or float32, and quantize when the model is loaded"
            .to_owned());
    }
    let dtype = text.parse::<DType>().ok().filter(|dtype| dtype.is_weight_float());
    dtype.ok_or_else(|| "expected float32, bfloat16 or float16".to_owned())
}

fn parse_code(text: &str) -> Result<FourBitCode, String> {
    FourBitCode::from_name(text).ok_or_else(|| "expected nf4 or fp4".to_owned())
}

/// Bytes with the decimal units that transformers takes.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|character: char| !character.is_ascii_digit());
    let unit = match text.get(digits.len()..).unwrap_or_default().to_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => 0,
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).filter(|size| *size > 0);
    size.ok_or_else(|| "expected a size such as 5GB or 500MB".to_owned())
}
