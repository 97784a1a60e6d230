//! `weightcast model convert`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::output::{bytes, data, fail, json as print_json};
use crate::app::{
    ConvertRequest, DEFAULT_SHARD_BYTES, GgufRequest, GgufType, convert_ckpt, convert_model, convert_to_gguf,
};
use crate::config::{ConfigError, QuantizationConfig, QuantizationFormat};
use crate::types::DType;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Target {
    /// Plain weights, as transformers saves them
    Hf,
    /// bitsandbytes' 4-bit NormalFloat
    BnbNf4,
    /// bitsandbytes' LLM.int8
    BnbInt8,
    /// HQQ's groups
    Hqq,
    /// MLX's affine groups
    Mlx,
    /// One file for llama.cpp
    Gguf,
}

/// `weightcast model convert`
#[derive(Debug, Args)]
#[command(after_help = "\
With --to, a model becomes another one with the same weights in another format; without it, nanoGPT's ckpt.pt becomes a model
directory, and nothing that is in it is run.

  weightcast model convert HuggingFaceTB/SmolLM2-135M --to bnb-nf4 --double --output smollm2-nf4
  weightcast model convert HuggingFaceTB/SmolLM2-135M --to gguf --type q4_k_m --output smollm2-q4_k_m.gguf

A conversion that was interrupted leaves .NAME.part beside the output; the same command goes on with it, file by file, and makes
a GGUF file anew.")]
pub struct ConvertFlags {
    /// Model directory, GGUF file or hub id; without --to the checkpoint that torch.save wrote
    model: String,
    /// The format to write
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<Target>,
    /// What most matrices of a GGUF file become, q4_k_m by default; the others as llama.cpp chooses them
    #[arg(long = "type", value_enum, value_name = "TYPE", requires = "to")]
    file_type: Option<GgufType>,
    /// Where to write it: a directory, or FILE.gguf (gguf); without --to a directory named
    /// {architecture}-{size}-{dataset}-{training_type}[-{version}]
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Quantize the statistics too (bnb-nf4)
    #[arg(long, requires = "to")]
    double: bool,
    /// Bits of a code (hqq, mlx); 4 by default
    #[arg(long, value_name = "N", requires = "to")]
    bits: Option<u8>,
    /// Weights that share a scale; 64 by default
    #[arg(long, value_name = "N", requires = "to")]
    block: Option<u32>,
    /// How groups lie (hqq): 1 along rows, 0 across
    #[arg(long, value_name = "AXIS", requires = "to")]
    axis: Option<u8>,
    /// A module that stays as it is; may be given several times
    #[arg(long, value_name = "NAME", requires = "to")]
    skip: Vec<String>,
    /// Type of what is not quantized: float32, bfloat16, float16; by default as it is, or bfloat16 of a quantized model
    #[arg(long, value_parser = super::adapter::parse_dtype, requires = "to")]
    dtype: Option<DType>,
    /// Bytes of tensors in one file at most
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_SHARD_BYTES)]
    max_shard_bytes: u64,
    /// The function within the MLP, which a ckpt.pt does not say: gelu (nanoGPT since 2023), gelu_new (before)
    #[arg(long, default_value = "gelu", value_parser = ["gelu", "gelu_new"], conflicts_with = "to")]
    activation: String,
    /// Print JSON on stdout
    #[arg(long)]
    json: bool,
}

impl ConvertFlags {
    fn quantization(&self, target: Target) -> QuantizationConfig {
        let format = match target {
            Target::Hf | Target::Gguf => QuantizationFormat::None,
            Target::BnbNf4 => QuantizationFormat::Nf4,
            Target::BnbInt8 => QuantizationFormat::Int8,
            Target::Hqq => QuantizationFormat::Hqq,
            Target::Mlx => QuantizationFormat::Mlx,
        };
        QuantizationConfig {
            format,
            double: self.double,
            block: self.block,
            bits: self.bits,
            axis: self.axis,
            skip: self.skip.clone(),
            ..QuantizationConfig::default()
        }
    }
}

pub(super) fn run(flags: &ConvertFlags) -> u8 {
    super::arm_faults("convert");
    let target = match flags.to {
        None => return from_ckpt(flags),
        Some(Target::Gguf) => return to_gguf(flags),
        Some(target) => target,
    };
    if let Some(file_type) = flags.file_type {
        let (expected, found) = ("nothing; it is for gguf", file_type.name().to_owned());
        return fail(&ConfigError::Value { key: "--type", expected, found });
    }
    let request = ConvertRequest {
        model: flags.model.clone(),
        quantization: flags.quantization(target),
        dtype: flags.dtype,
        output: flags.output.clone(),
        max_file_bytes: flags.max_shard_bytes,
    };
    let converted = match convert_model(&request, &super::output::download) {
        Ok(converted) => converted,
        Err(error) => return fail(&error),
    };
    if flags.json {
        print_json(&json!({
            "output": flags.output, "bytes": converted.bytes, "files": converted.files,
            "kept_files": converted.kept_files,
        }));
    } else {
        let kept = match converted.kept_files {
            0 => String::new(),
            kept => format!(", {kept} of them from an interrupted conversion"),
        };
        let (size, files) = (bytes(converted.bytes), converted.files);
        data(&format!("{}: {size} in {files} file{}{kept}", flags.output.display(), if files == 1 { "" } else { "s" }));
    }
    0
}

impl ConvertFlags {
    /// The first flag given that a GGUF file's type decides.
    fn not_for_gguf(&self) -> Option<(&'static str, String)> {
        let text = |value: &dyn std::fmt::Display| value.to_string();
        let skipped = (!self.skip.is_empty()).then(|| ("--skip", self.skip.join(", ")));
        let double = self.double.then(|| ("--double", "it".to_owned()));
        let bits = self.bits.map(|bits| ("--bits", text(&bits)));
        let block = self.block.map(|block| ("--block", text(&block)));
        let axis = self.axis.map(|axis| ("--axis", text(&axis)));
        let dtype = self.dtype.map(|dtype| ("--dtype", text(&dtype)));
        double.or(bits).or(block).or(axis).or(skipped).or(dtype)
    }
}

fn to_gguf(flags: &ConvertFlags) -> u8 {
    if let Some((key, found)) = flags.not_for_gguf() {
        let expected = "nothing, because the format is gguf; --type says all";
        return fail(&ConfigError::Value { key, expected, found });
    }
    let request = GgufRequest {
        model: flags.model.clone(),
        file_type: flags.file_type.unwrap_or(GgufType::Q4KM),
        output: flags.output.clone(),
    };
    let written = match convert_to_gguf(&request, &super::output::download) {
        Ok(written) => written,
        Err(error) => return fail(&error),
    };
    if flags.json {
        print_json(&json!({"output": written.path, "bytes": written.bytes, "tensors": written.tensors, "files": 1}));
    } else {
        data(&format!("{}: {} in {} tensors", written.path.display(), bytes(written.bytes), written.tensors));
    }
    0
}

fn from_ckpt(flags: &ConvertFlags) -> u8 {
    let converted = match convert_ckpt(flags.model.as_ref(), &flags.output, &flags.activation) {
        Ok(converted) => converted,
        Err(error) => return fail(&error),
    };
    let (parameters, size) = (converted.parameters, converted.bytes);
    if flags.json {
        print_json(&json!({
            "output": flags.output, "name": converted.name, "parameters": parameters, "bytes": size,
        }));
    } else {
        data(&format!("{}: {parameters} parameters, {}", flags.output.display(), bytes(size)));
    }
    0
}
