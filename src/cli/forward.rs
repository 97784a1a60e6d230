//! `weightcast model forward`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::{data, fail, json as print_json};
use super::quantize::QuantizeFlags;
use crate::app::{ForwardRequest, forward};

/// `weightcast model forward`
#[derive(Debug, Args)]
#[command(after_help = "\
The model is loaded in this process as a job on one rank loads it, and computed in f32 as training computes it, without
dropout. So the results can be held against those of another tool for the same tokens:

  from safetensors.torch import load_file, save_file
  save_file({\"input_ids\": tokenizer(text, return_tensors=\"pt\").input_ids}, \"tokens.safetensors\")
  # weightcast model forward --model DIR --input tokens.safetensors --output results.safetensors
  load_file(\"results.safetensors\")[\"logits\"]   # AutoModelForCausalLM.from_pretrained(DIR)(input_ids).logits

Every row of input_ids is one document, without padding.")]
pub struct ForwardFlags {
    /// Model directory, GGUF file, or hub id (`org/name[@revision]`): Llama, Mistral, Qwen2, Qwen3 or GPT-2
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// A PEFT adapter beside it: a directory or a hub id
    #[arg(long, value_name = "ADAPTER")]
    adapter: Option<String>,
    /// How it is quantized; it is computed with what the quantized weights stand for.
    #[command(flatten)]
    quantize: QuantizeFlags,
    /// Read each layer's weights when it is computed, and let them go afterwards: for models that do not fit
    #[arg(long)]
    stream: bool,
    /// A safetensors file with "input_ids", int64 [batch, seq]
    #[arg(long, value_name = "PATH")]
    input: PathBuf,
    /// The safetensors file to write, with "logits", f32 [batch, seq, vocab]
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Write "loss" too, the mean over all next tokens in nats, and its gradient by every tensor of the adapter, under
    /// PEFT's names
    #[arg(long, requires = "adapter")]
    gradients: bool,
    /// Print JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(flags: &ForwardFlags) -> u8 {
    let request = ForwardRequest {
        model: flags.model.clone(),
        adapter: flags.adapter.clone(),
        quantization: flags.quantize.config(),
        streams: flags.stream,
        input: flags.input.clone(),
        output: flags.output.clone(),
        gradients: flags.gradients,
    };
    let done = match forward(&request, &super::output::download) {
        Ok(done) => done,
        Err(error) => return fail(&error),
    };
    if flags.json {
        print_json(&json!({
            "output": flags.output, "shape": done.shape, "loss": done.loss, "gradients": done.gradients,
        }));
        return 0;
    }
    let [batch, seq, vocab] = done.shape;
    let loss = done.loss.map_or_else(String::new, |loss| format!(", loss {loss}, {} gradients", done.gradients));
    data(&format!("{}: logits [{batch}, {seq}, {vocab}]{loss}", flags.output.display()));
    0
}
