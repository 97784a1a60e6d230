//! The keys of a GGUF file that say what the model is: llama.cpp's, of config.json's.
//! Source: llama.cpp's `convert_hf_to_gguf` and gguf-py's `constants`.
//!
//! Owns: which models llama.cpp computes as transformers does, and the refusal of the others. Refuses to know: tokenizers.

use crate::app::convert::ConvertError;
use crate::format::gguf::{HeaderValue, LLAMA3_KEYS, LLAMA3_LENGTH};
use crate::model::{Architecture, AttentionBias, Experts, ModelConfig, ModelHead, RopeParameters, RopeScaling, Yarn};
use crate::types::as_f64;

/// `GGML_QNT_VERSION`: the version of the blocks.
const QUANTIZATION_VERSION: u32 = 2;

/// The betas of YaRN that llama.cpp takes where the file has none.
const YARN_BETAS: (f64, f64) = (32.0, 1.0);

/// What llama.cpp calls the family of a model.
pub(super) fn family(model: &str, config: &ModelConfig) -> Result<&'static str, ConvertError> {
    let refuse = |place: &str, expected, found: &str| refusal(model, place, expected, found.to_owned());
    if config.head != ModelHead::CausalLm {
        return Err(refuse("architectures", "a decoder with a language head (ForCausalLM)", "another class"));
    }
    Ok(match config.architecture {
        Architecture::Llama | Architecture::Mistral | Architecture::Mixtral => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Qwen2Moe => "qwen2moe",
        Architecture::Qwen3Moe => "qwen3moe",
        Architecture::Gpt2 => "gpt2",
        Architecture::Bert | Architecture::T5 | Architecture::Generic => {
            let expected = "llama, mistral, mixtral, qwen2, qwen3, qwen2_moe, qwen3_moe or gpt2";
            return Err(refuse("model_type", expected, config.architecture.name()));
        }
    })
}

/// All keys but those of the tokenizer.
pub(super) fn keys(
    (model, name): (&str, &str),
    config: &ModelConfig,
    file_type: u32,
) -> Result<Vec<(String, HeaderValue)>, ConvertError> {
    let family = family(model, config)?;
    check(model, config)?;
    let mut keys = Keys { model, family, list: Vec::new() };
    keys.general("architecture", HeaderValue::Text(family.to_owned()));
    keys.general("type", HeaderValue::Text("model".to_owned()));
    keys.general("name", HeaderValue::Text(name.to_owned()));
    keys.general("file_type", HeaderValue::U32(file_type));
    keys.general("quantization_version", HeaderValue::U32(QUANTIZATION_VERSION));
    keys.size("block_count", config.num_hidden_layers.into())?;
    keys.size("context_length", config.max_position_embeddings)?;
    keys.size("embedding_length", config.hidden_size)?;
    keys.size("feed_forward_length", config.intermediate_size)?;
    keys.size("attention.head_count", config.num_attention_heads)?;
    keys.size("attention.head_count_kv", config.num_key_value_heads)?;
    keys.size("vocab_size", config.vocab_size)?;
    let norm = if family == "gpt2" { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    keys.number(norm, config.norm_eps);
    if let Some(rope) = &config.rope {
        keys.size("attention.key_length", config.head_dim)?;
        keys.size("attention.value_length", config.head_dim)?;
        keys.rope(rope, config.head_dim)?;
    }
    if let Some(experts) = &config.experts {
        keys.experts(config, experts)?;
    }
    Ok(keys.list)
}

/// What llama.cpp computes otherwise than the model wants.
fn check(model: &str, config: &ModelConfig) -> Result<(), ConvertError> {
    let activation = config.hidden_act.as_str();
    let gpt2 = config.architecture == Architecture::Gpt2;
    match (gpt2, activation) {
        (false, "silu" | "swish") | (true, "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => {}
        (true, "gelu") => tracing::warn!("{model}: llama.cpp computes gpt2 with gelu_new, and the model has gelu"),
        (true, found) => return Err(refusal(model, "activation_function", "gelu_new", found.to_owned())),
        (false, found) => return Err(refusal(model, "hidden_act", "silu", found.to_owned())),
    }
    let biased = config.attention_bias != AttentionBias::None || config.mlp_bias;
    if matches!(config.architecture, Architecture::Qwen3 | Architecture::Qwen3Moe) && biased {
        return Err(refusal(model, "attention_bias", "false", "true".to_owned()));
    }
    if let Some(window) = config.sliding_window.filter(|&window| window < config.max_position_embeddings) {
        tracing::warn!("{model}: llama.cpp looks at all positions, and the model at the last {window}");
    }
    Ok(())
}

fn refusal(model: &str, place: &str, expected: &'static str, found: String) -> ConvertError {
    ConvertError::NoCounterpart { model: model.to_owned(), place: place.to_owned(), expected, found }
}

struct Keys<'a> {
    model: &'a str,
    family: &'static str,
    list: Vec<(String, HeaderValue)>,
}

impl Keys<'_> {
    fn general(&mut self, key: &str, value: HeaderValue) {
        self.list.push((format!("general.{key}"), value));
    }

    fn of_family(&mut self, key: &str, value: HeaderValue) {
        self.list.push((format!("{}.{key}", self.family), value));
    }

    fn size(&mut self, key: &str, size: u64) -> Result<(), ConvertError> {
        let value = u32::try_from(size).map_err(|_| self.refuse(key, "a number below 2^32", size.to_string()))?;
        self.of_family(key, HeaderValue::U32(value));
        Ok(())
    }

    fn number(&mut self, key: &str, number: f64) {
        self.of_family(key, HeaderValue::F32(narrow(number)));
    }

    fn refuse(&self, place: &str, expected: &'static str, found: String) -> ConvertError {
        refusal(self.model, place, expected, found)
    }

    fn rope(&mut self, rope: &RopeParameters, head_dim: u64) -> Result<(), ConvertError> {
        if rope.dim != head_dim {
            let found = format!("{} of {head_dim} dims", rope.dim);
            return Err(self.refuse("partial_rotary_factor", "all dims of a head to be rotated", found));
        }
        self.size("rope.dimension_count", rope.dim)?;
        self.number("rope.freq_base", rope.theta);
        match &rope.scaling {
            RopeScaling::Default => Ok(()),
            // Its divisors are a tensor. llama.cpp asks for no more; these keys are for us.
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let numbers = [*factor, *low_freq_factor, *high_freq_factor];
                let keys = LLAMA3_KEYS.into_iter().zip(numbers);
                self.list.extend(keys.map(|(key, number)| (key.to_owned(), HeaderValue::F32(narrow(number)))));
                let length = u32::try_from(*original_max_position_embeddings).unwrap_or(u32::MAX);
                self.list.push((LLAMA3_LENGTH.to_owned(), HeaderValue::U32(length)));
                Ok(())
            }
            RopeScaling::Dynamic { .. } => {
                tracing::warn!("{}: llama.cpp does not stretch dynamically beyond the trained length", self.model);
                Ok(())
            }
            RopeScaling::Linear { factor } => {
                self.scaling("linear", *factor);
                Ok(())
            }
            RopeScaling::Yarn(yarn) => self.yarn(yarn),
        }
    }

    fn scaling(&mut self, kind: &str, factor: f64) {
        self.of_family("rope.scaling.type", HeaderValue::Text(kind.to_owned()));
        self.number("rope.scaling.factor", factor);
    }

    fn yarn(&mut self, yarn: &Yarn) -> Result<(), ConvertError> {
        let usual = if yarn.factor > 1.0 { 0.1 * yarn.factor.ln() + 1.0 } else { 1.0 };
        if (yarn.attention_factor - usual).abs() > 1e-6 {
            let found = yarn.attention_factor.to_string();
            return Err(self.refuse("rope_parameters.attention_factor", "0.1 ln(factor) + 1", found));
        }
        if !yarn.truncate {
            return Err(self.refuse("rope_parameters.truncate", "true", "false".to_owned()));
        }
        self.scaling("yarn", yarn.factor);
        self.size("rope.scaling.original_context_length", yarn.original_max_position_embeddings)?;
        if (yarn.beta_fast, yarn.beta_slow) != YARN_BETAS {
            self.number("rope.scaling.yarn_beta_fast", yarn.beta_fast);
            self.number("rope.scaling.yarn_beta_slow", yarn.beta_slow);
        }
        Ok(())
    }

    fn experts(&mut self, config: &ModelConfig, experts: &Experts) -> Result<(), ConvertError> {
        // The file does not say; llama.cpp computes the families so.
        let scaled = config.architecture != Architecture::Qwen2Moe;
        if experts.norm_topk_prob != scaled {
            let expected = if scaled { "true" } else { "false" };
            return Err(self.refuse("norm_topk_prob", expected, experts.norm_topk_prob.to_string()));
        }
        if let Some(dense) = (0..config.num_hidden_layers).find(|&layer| !experts.is_sparse(layer)) {
            let found = format!("layer {dense} without");
            return Err(self.refuse("decoder_sparse_step, mlp_only_layers", "experts in every layer", found));
        }
        self.size("expert_count", experts.count)?;
        self.size("expert_used_count", experts.per_token)?;
        if config.architecture != Architecture::Mixtral {
            self.size("expert_feed_forward_length", experts.intermediate_size)?;
        }
        if let Some(size) = experts.shared_intermediate_size {
            self.size("expert_shared_feed_forward_length", size)?;
        }
        Ok(())
    }
}

/// `rope_freqs.weight`: what each frequency is divided by, for the scaling that no key says.
pub(super) fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    let rope = config.rope.as_ref()?;
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
        rope.scaling
    else {
        return None;
    };
    let plain = RopeParameters { scaling: RopeScaling::Default, ..rope.clone() };
    let original = as_f64(original_max_position_embeddings);
    let divisor = |freq: f32| {
        let turns = original * f64::from(freq) / std::f64::consts::TAU;
        // 0 divides by the factor, 1 keeps the frequency.
        let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
        narrow(1.0 / ((1.0 - keep) / factor + keep))
    };
    Some(plain.inv_freq().into_iter().map(divisor).collect())
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
const fn narrow(number: f64) -> f32 {
    number as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ModelConfig {
        let base = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":64,"num_hidden_layers":2,"num_attention_heads":4,
            "num_key_value_heads":2,"intermediate_size":96,"vocab_size":100,"max_position_embeddings":512"#;
        ModelConfig::parse(format!("{base}{json}}}").as_bytes()).expect("a configuration")
    }

    fn refused(json: &str) -> String {
        keys(("m", "name"), &config(json), 0).expect_err("refused").to_string()
    }

    #[test]
    fn llama_keys() {
        let found = keys(("m", "name"), &config(r#","rope_theta":500000.0,"rms_norm_eps":1e-5"#), 15).expect("a llama");
        let value = |key: &str| found.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        assert_eq!(value("general.architecture"), Some(HeaderValue::Text("llama".to_owned())));
        assert_eq!(value("general.file_type"), Some(HeaderValue::U32(15)));
        assert_eq!(value("llama.block_count"), Some(HeaderValue::U32(2)));
        assert_eq!(value("llama.attention.head_count_kv"), Some(HeaderValue::U32(2)));
        assert_eq!(value("llama.attention.key_length"), Some(HeaderValue::U32(16)));
        assert_eq!(value("llama.rope.freq_base"), Some(HeaderValue::F32(5e5)));
        assert_eq!(value("llama.attention.layer_norm_rms_epsilon"), Some(HeaderValue::F32(1e-5)));
        assert_eq!(value("llama.rope.scaling.type"), None);
    }

    #[test]
    fn yarn_is_said_or_refused() {
        let yarn = |more: &str| format!(r#","rope_scaling":{{"rope_type":"yarn","factor":4.0{more}}}"#);
        let found = keys(("m", "name"), &config(&yarn(r#","beta_fast":16.0"#)), 0).expect("YaRN");
        let value = |key: &str| found.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        assert_eq!(value("llama.rope.scaling.type"), Some(HeaderValue::Text("yarn".to_owned())));
        assert_eq!(value("llama.rope.scaling.factor"), Some(HeaderValue::F32(4.0)));
        assert_eq!(value("llama.rope.scaling.yarn_beta_fast"), Some(HeaderValue::F32(16.0)));
        assert_eq!(
            refused(&yarn(r#","attention_factor":1.5"#)),
            "m: rope_parameters.attention_factor: expected 0.1 ln(factor) + 1, which llama.cpp has; found 1.5"
        );
    }

    #[test]
    fn what_llama_cpp_computes_otherwise_is_refused() {
        assert!(refused(r#","hidden_act":"relu""#).contains("hidden_act: expected silu"));
        assert!(refused(r#","partial_rotary_factor":0.5"#).contains("8 of 16 dims"));
    }

    /// Llama 3.1's parameters by hand, as in `model::rope`: frequencies 1, 1e-2, 1e-4, 1e-6 are kept or divided by 8.
    #[test]
    fn llama3_factors_by_hand() {
        let scaled = config(
            r#","head_dim":8,"rope_theta":1e8,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
            "high_freq_factor":4.0,"original_max_position_embeddings":8192}"#,
        );
        assert_eq!(rope_factors(&scaled), Some(vec![1.0, 1.0, 8.0, 8.0]));
        let keys = keys(("m", "name"), &scaled, 0).expect("Llama 3");
        let own: Vec<_> =
            keys.into_iter().filter(|(key, _)| key.starts_with("weightcast.")).map(|(_, value)| value).collect();
        let number = HeaderValue::F32;
        assert_eq!(own, [number(8.0), number(1.0), number(4.0), HeaderValue::U32(8192)]);
        assert_eq!(rope_factors(&config("")), None);
    }
}
