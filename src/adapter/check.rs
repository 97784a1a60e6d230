//! What a configuration may not ask for (`AD-1`).
//!
//! PEFT's variants change the forward pass or the base weights; an adapter of one of them, used as plain LoRA, would give
//! wrong numbers without any error.

use serde_json::{Map, Value};

use super::AdapterError;

/// Fields that must be absent, null, false or empty, each with the reason.
const OFF: [(&str, &str); 14] = [
    ("modules_to_save", "whole modules beside the adapter are not supported"),
    ("lora_bias", "a bias in lora_B is not supported"),
    ("layer_replication", "replicated layers are not supported"),
    ("trainable_token_indices", "trained tokens are not supported"),
    ("target_parameters", "adapters on bare parameters are not supported"),
    ("alora_invocation_tokens", "activated LoRA is not supported"),
    ("use_qalora", "QALoRA is not supported"),
    ("use_bdlora", "block-diagonal LoRA is not supported"),
    ("arrow_config", "Arrow routing is not supported"),
    ("kasa_config", "KaSA changes the base weights, which is not supported"),
    ("velora_config", "VeLoRA is not supported"),
    ("monteclora_config", "MonteCLoRA is not supported"),
    ("megatron_config", "Megatron's parallel layers are not supported"),
    ("auto_mapping", "a base class of its own is not supported"),
];

/// Initializations that leave the base weights as they are.
const INITIALIZATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Refuses what changes the meaning of the adapter's tensors.
pub(super) fn supported(fields: &Map<String, Value>) -> Result<(), AdapterError> {
    let get = |key: &str| fields.get(key).filter(|value| !value.is_null());
    let one_of = |key: &'static str, expected: &str, reason| match get(key) {
        Some(Value::String(found)) if found == expected => Ok(()),
        Some(other) => Err(unsupported(key, other, reason)),
        None => Ok(()),
    };
    if get("peft_type").is_none() {
        return Err(AdapterError::Missing { field: "peft_type" });
    }
    one_of("peft_type", "LORA", "only LORA is supported")?;
    one_of("bias", "none", "trained biases are not supported")?;
    one_of("task_type", "CAUSAL_LM", "only CAUSAL_LM is supported")?;
    for (key, reason) in OFF {
        if let Some(value) = get(key)
            && !is_off(value)
        {
            return Err(unsupported(key, value, reason));
        }
    }
    let plain = |value: &Value| {
        value.is_boolean() || value.as_str().is_some_and(|name| INITIALIZATIONS.contains(&name.to_lowercase().as_str()))
    };
    match get("init_lora_weights") {
        Some(value) if !plain(value) => {
            let reason = "it changes the base weights; save the adapter as plain LoRA (path_initial_model_for_weight_conversion)";
            Err(unsupported("init_lora_weights", value, reason))
        }
        _ => Ok(()),
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Bool(on) => !on,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn unsupported(key: &str, value: &Value, reason: &'static str) -> AdapterError {
    AdapterError::Unsupported { field: key.to_owned(), found: value.to_string(), reason }
}
