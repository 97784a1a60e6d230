//! config.json of a converted model: what transformers, bitsandbytes, hqq and mlx-lm read in it.

use serde_json::{Map, Value, json};

use crate::config::{QuantizationConfig, QuantizationFormat};
use crate::types::DType;

/// Modules that transformers leaves as they are, and we too.
const SKIPPED: [&str; 1] = ["lm_head"];

/// The configuration `text` of a model whose weights are quantized as `quantization` says; what it said of an earlier
/// quantization is gone. `dtype` is the type of the other weights, where it is not the model's own.
pub(super) fn config_json(text: &str, quantization: &QuantizationConfig, dtype: Option<DType>) -> Value {
    let mut config: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
    config.remove("quantization_config");
    config.remove("quantization");
    if let Some(dtype) = dtype {
        // transformers before version 5 writes torch_dtype.
        let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        config.insert(key.to_owned(), Value::from(dtype.torch_name()));
    }
    let compute =
        config.get("dtype").or_else(|| config.get("torch_dtype")).cloned().unwrap_or_else(|| json!("bfloat16"));
    let section = match quantization.format {
        QuantizationFormat::Nf4 => Some(four_bit("nf4", quantization, &compute)),
        QuantizationFormat::Fp4 => Some(four_bit("fp4", quantization, &compute)),
        QuantizationFormat::Int8 => Some(json!({
            "quant_method": "bitsandbytes", "load_in_8bit": true, "load_in_4bit": false,
            "llm_int8_threshold": 6.0, "llm_int8_skip_modules": skipped(quantization),
            "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false,
        })),
        QuantizationFormat::Hqq => Some(json!({
            "quant_method": "hqq", "skip_modules": skipped(quantization),
            "quant_config": {
                "weight_quant_params": {
                    "nbits": quantization.bits.unwrap_or(4), "channel_wise": true,
                    "group_size": quantization.block.unwrap_or(64), "optimize": true,
                    "round_zero": quantization.bits.unwrap_or(4) == 4, "axis": quantization.axis.unwrap_or(1),
                    "view_as_float": false,
                },
                "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false,
            },
        })),
        QuantizationFormat::Mlx => {
            let section = json!({
                "group_size": quantization.block.unwrap_or(64), "bits": quantization.bits.unwrap_or(4), "mode": "affine",
            });
            config.insert("quantization".to_owned(), section.clone());
            // mlx-lm writes it under both names.
            Some(section)
        }
        _ => None,
    };
    if let Some(section) = section {
        config.insert("quantization_config".to_owned(), section);
    }
    Value::Object(config)
}

fn four_bit(code: &str, quantization: &QuantizationConfig, compute: &Value) -> Value {
    json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
        "bnb_4bit_quant_type": code, "bnb_4bit_use_double_quant": quantization.double,
        "bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped(quantization), "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false,
    })
}

fn skipped(quantization: &QuantizationConfig) -> Vec<String> {
    let own = quantization.skip.iter().cloned();
    own.chain(SKIPPED.map(str::to_owned)).collect()
}
