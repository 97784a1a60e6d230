//! From llama.cpp's keys and tensors to Hugging Face's, for the families whose skeleton we know.
//! Source: llama.cpp's `convert_hf_to_gguf` and gguf-py's `constants` (tensor names and keys).

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::tensor_names::hugging_face_name;
use super::{Gguf, Tensor, Value};
use crate::format::{Encoding, FileEntry, FormatError, GgmlTensor, GgmlType, ModelIndex, RowOrder, TensorEntry};
use crate::types::{DType, Shape};

/// Hugging Face has it as a matrix of one row, llama.cpp as a vector.
const SHARED_GATE: &str = ".ffn_gate_inp_shexp.";

/// Divisors of the rotary frequencies, computed by the converter from config.json; no parameter.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// What those divisors are made of, in files that we write: `factor`, `low_freq_factor`, `high_freq_factor`.
pub const LLAMA3_KEYS: [&str; 3] = [
    "weightcast.rope.llama3.factor",
    "weightcast.rope.llama3.low_freq_factor",
    "weightcast.rope.llama3.high_freq_factor",
];

/// `original_max_position_embeddings`, likewise.
pub const LLAMA3_LENGTH: &str = "weightcast.rope.llama3.original_max_position_embeddings";

/// A family as both name it: llama.cpp, the class and the type in config.json.
#[derive(Clone, Copy, Debug)]
struct Family {
    name: &'static str,
    class: &'static str,
    model_type: &'static str,
    /// Whether layers are mixtures of experts.
    experts: bool,
    /// Whether the converter interleaves the rows of query and key.
    interleaves: bool,
    /// The default of `rms_norm_eps`, `rope_theta` in config.json.
    theta: f64,
}

/// Mistral's files say `llama` too, and differ in nothing that weights depend on.
const FAMILIES: [Family; 5] = [
    LLAMA,
    Family { name: "qwen2", class: "Qwen2ForCausalLM", model_type: "qwen2", interleaves: false, ..LLAMA },
    Family { name: "qwen3", class: "Qwen3ForCausalLM", model_type: "qwen3", interleaves: false, ..LLAMA },
    Family { name: "qwen2moe", class: "Qwen2MoeForCausalLM", model_type: "qwen2_moe", ..QWEN3_MOE },
    QWEN3_MOE,
];

const LLAMA: Family = Family {
    name: "llama",
    class: "LlamaForCausalLM",
    model_type: "llama",
    experts: false,
    interleaves: true,
    theta: 10_000.0,
};

/// Its files say `llama`, and state a number of experts.
const MIXTRAL: Family = Family { class: "MixtralForCausalLM", model_type: "mixtral", experts: true, ..LLAMA };

const QWEN3_MOE: Family = Family {
    name: "qwen3moe",
    class: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    experts: true,
    interleaves: false,
    ..LLAMA
};

/// The header's figures, read under the family's name.
#[derive(Clone, Copy, Debug)]
struct Figures<'a> {
    gguf: &'a Gguf,
    file: &'a str,
    family: Family,
}

impl Gguf {
    /// Every tensor under Hugging Face's name and shape, with the order of its rows.
    ///
    /// # Errors
    /// [`FormatError::Gguf`] for an unknown architecture, a missing figure or a tensor that it does not have.
    pub fn index(&self, file: &str) -> Result<ModelIndex, FormatError> {
        let figures = self.figures(file)?;
        let head_rows = figures.head_dim()?;
        let mut index = ModelIndex::default();
        for tensor in self.tensors.iter().filter(|tensor| tensor.name != ROPE_FACTORS) {
            let Some(fqn) = hugging_face_name(&tensor.name) else {
                let what = format!("tensor {} is none that {} has", tensor.name, figures.family.name);
                return Err(figures.error(what));
            };
            let rotary = [".attn_q.", ".attn_k."].iter().any(|part| tensor.name.contains(part));
            let row_order = match figures.family.interleaves && rotary {
                true => RowOrder::InterleavedHalves { head_rows },
                false => RowOrder::Same,
            };
            let entry = entry(tensor, row_order);
            if row_order != RowOrder::Same
                && !(head_rows.is_multiple_of(2) && entry.shape.rows().is_multiple_of(head_rows))
            {
                let what = format!("tensor {}: shape {} is not of heads of {head_rows} rows", tensor.name, entry.shape);
                return Err(figures.error(what));
            }
            index.tensors.insert(fqn, entry);
        }
        index.files.push(FileEntry { name: file.to_owned(), len_bytes: self.file_bytes });
        Ok(index)
    }

    /// A config.json, in the form of transformers 5, with everything that the skeleton and the trainer need.
    ///
    /// # Errors
    /// [`FormatError::Gguf`] for an unknown architecture or a missing figure, and where the rotary frequencies are scaled
    /// in a way that the header does not state; then the model's own config.json is needed.
    pub fn config_json(&self, file: &str) -> Result<String, FormatError> {
        let figures = self.figures(file)?;
        let heads = figures.size("attention.head_count")?;
        let Some(embedding) = self.tensor("token_embd.weight") else {
            return Err(figures.error("there is no tensor token_embd.weight".to_owned()));
        };
        let kv_heads = figures.optional("attention.head_count_kv")?.unwrap_or(heads);
        let mut keys: BTreeMap<&str, Json> = BTreeMap::from([
            ("architectures", json!([figures.family.class])),
            ("dtype", json!(DType::F32.torch_name())),
            ("head_dim", json!(figures.head_dim()?)),
            ("hidden_act", json!("silu")),
            ("hidden_size", json!(figures.size("embedding_length")?)),
            ("intermediate_size", json!(figures.size("feed_forward_length")?)),
            ("max_position_embeddings", json!(figures.size("context_length")?)),
            ("model_type", json!(figures.family.model_type)),
            ("num_attention_heads", json!(heads)),
            ("num_hidden_layers", json!(figures.size("block_count")?)),
            ("num_key_value_heads", json!(kv_heads)),
            ("rms_norm_eps", json!(figures.number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6))),
            ("rope_parameters", figures.rope()?),
            ("tie_word_embeddings", json!(self.tensor("output.weight").is_none())),
            ("vocab_size", json!(embedding.dims.get(1))),
        ]);
        let biased = json!(self.tensor("blk.0.attn_q.bias").is_some());
        match figures.family.model_type {
            "qwen2" => {}
            "qwen2_moe" => _ = keys.insert("qkv_bias", biased),
            _ => _ = keys.insert("attention_bias", biased),
        }
        if figures.family.model_type == "llama" {
            keys.insert("mlp_bias", json!(self.tensor("blk.0.ffn_gate.bias").is_some()));
        }
        if figures.family.experts {
            keys.extend(figures.experts()?);
        }
        for (token, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(Value::Unsigned(id)) = self.values.get(&format!("tokenizer.ggml.{id}_token_id")) {
                keys.insert(token, json!(id));
            }
        }
        let mut text = serde_json::to_string_pretty(&keys).expect("strings and numbers always become JSON");
        text.push('\n');
        Ok(text)
    }

    fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn figures<'a>(&'a self, file: &'a str) -> Result<Figures<'a>, FormatError> {
        let found = match self.values.get("general.architecture") {
            Some(Value::Text(name)) => name.as_str(),
            _ => "nothing",
        };
        let mixture = self.values.contains_key("llama.expert_count");
        match FAMILIES.into_iter().find(|family| family.name == found) {
            Some(family) if family.name == LLAMA.name && mixture => Ok(Figures { gguf: self, file, family: MIXTRAL }),
            Some(family) => Ok(Figures { gguf: self, file, family }),
            None => {
                let known = FAMILIES.map(|family| family.name).join(", ");
                let what = format!("general.architecture: expected one of {known}, found {found:?}");
                Err(FormatError::Gguf { file: file.to_owned(), what })
            }
        }
    }
}

impl Figures<'_> {
    fn error(&self, what: String) -> FormatError {
        FormatError::Gguf { file: self.file.to_owned(), what }
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.gguf.values.get(&format!("{}.{key}", self.family.name))
    }

    /// A whole number from 1 to 2^31, or absent.
    fn optional(&self, key: &str) -> Result<Option<u64>, FormatError> {
        match self.value(key) {
            None => Ok(None),
            Some(&Value::Unsigned(size)) if (1..=1 << 31).contains(&size) => Ok(Some(size)),
            Some(found) => {
                let key = format!("{}.{key}", self.family.name);
                Err(self.error(format!("{key}: expected one whole number from 1 to 2^31, found {found:?}")))
            }
        }
    }

    fn size(&self, key: &str) -> Result<u64, FormatError> {
        self.optional(key)?.ok_or_else(|| self.error(format!("there is no key {}.{key}", self.family.name)))
    }

    fn number(&self, key: &str) -> Option<f64> {
        match self.value(key) {
            Some(&Value::Float(number)) => Some(number),
            _ => None,
        }
    }

    fn head_dim(&self) -> Result<u64, FormatError> {
        if let Some(head_dim) = self.optional("attention.key_length")? {
            return Ok(head_dim);
        }
        let (hidden, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        if hidden.is_multiple_of(heads) {
            return Ok(hidden / heads);
        }
        Err(self.error(format!("embedding_length {hidden} is no multiple of attention.head_count {heads}")))
    }

    /// The fields of config.json that only mixtures of experts have.
    fn experts(&self) -> Result<Vec<(&'static str, Json)>, FormatError> {
        let count = json!(self.size("expert_count")?);
        let per_token = ("num_experts_per_tok", json!(self.size("expert_used_count")?));
        if self.family.model_type == MIXTRAL.model_type {
            return Ok(vec![("num_local_experts", count), per_token]);
        }
        let qwen3 = self.family.model_type == QWEN3_MOE.model_type;
        let mut fields = vec![
            ("num_experts", count),
            per_token,
            ("moe_intermediate_size", json!(self.size("expert_feed_forward_length")?)),
            // The header does not say; llama.cpp computes the two families so.
            ("norm_topk_prob", json!(qwen3)),
        ];
        if !qwen3 {
            let shared = self.size("expert_shared_feed_forward_length")?;
            fields.push(("shared_expert_intermediate_size", json!(shared)));
        }
        Ok(fields)
    }

    /// `rope_parameters`. What cannot be said in it must not be lost silently: training would go on with wrong positions.
    fn rope(&self) -> Result<Json, FormatError> {
        let theta = self.number("rope.freq_base").unwrap_or(self.family.theta);
        if self.gguf.tensor(ROPE_FACTORS).is_some() {
            return self.llama3(theta).ok_or_else(|| {
                self.error(format!("{ROPE_FACTORS} scales the rotary frequencies: the model's config.json is needed"))
            });
        }
        let head_dim = self.head_dim()?;
        let rotated = self.optional("rope.dimension_count")?.unwrap_or(head_dim);
        if rotated != head_dim {
            return Err(self.error(format!("rope.dimension_count: expected the head's {head_dim}, found {rotated}")));
        }
        let scaling = match self.value("rope.scaling.type") {
            None => "none",
            Some(Value::Text(name)) => name,
            Some(_) => "of another type than text",
        };
        let factor = self.number("rope.scaling.factor");
        match (scaling, factor) {
            ("none", _) => Ok(json!({"rope_theta": theta, "rope_type": "default"})),
            ("linear", Some(factor)) => Ok(json!({"factor": factor, "rope_theta": theta, "rope_type": "linear"})),
            ("yarn", Some(factor)) => {
                let original = self.size("rope.scaling.original_context_length")?;
                let beta = |name, default| self.number(&format!("rope.scaling.yarn_beta_{name}")).unwrap_or(default);
                Ok(json!({"beta_fast": beta("fast", 32.0), "beta_slow": beta("slow", 1.0), "factor": factor,
                    "original_max_position_embeddings": original, "rope_theta": theta, "rope_type": "yarn"}))
            }
            (found, _) => {
                Err(self.error(format!("rope.scaling: expected none, linear or yarn with a factor, found {found}")))
            }
        }
    }
}

impl Figures<'_> {
    /// Llama 3's scaling, where the file is one of ours.
    fn llama3(&self, theta: f64) -> Option<Json> {
        let number = |key: &str| match self.gguf.values.get(key) {
            Some(&Value::Float(number)) => Some(number),
            _ => None,
        };
        let [factor, low, high] = LLAMA3_KEYS;
        let Some(&Value::Unsigned(original)) = self.gguf.values.get(LLAMA3_LENGTH) else { return None };
        Some(json!({"factor": number(factor)?, "high_freq_factor": number(high)?, "low_freq_factor": number(low)?,
            "original_max_position_embeddings": original, "rope_theta": theta, "rope_type": "llama3"}))
    }
}

fn entry(tensor: &Tensor, row_order: RowOrder) -> TensorEntry {
    let ggml = Encoding::Ggml(GgmlTensor { ggml_type: tensor.ggml_type, row_order });
    let (dtype, encoding) = match (tensor.ggml_type, row_order) {
        (GgmlType::F32, RowOrder::Same) => (DType::F32, Encoding::Plain),
        (GgmlType::F16, RowOrder::Same) => (DType::F16, Encoding::Plain),
        (GgmlType::BF16, RowOrder::Same) => (DType::BF16, Encoding::Plain),
        _ => (DType::F32, ggml),
    };
    let mut shape = Shape(tensor.dims.iter().rev().copied().collect());
    if tensor.name.contains(SHARED_GATE) && shape.dims() == 1 {
        shape.0.insert(0, 1);
    }
    TensorEntry { dtype, shape, file: 0, range: tensor.range, encoding }
}
