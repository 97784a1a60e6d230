//! `adapter_config.json`: what is read, what is kept, what is written.

use serde_json::{Map, Value, json};

use super::{AdapterError, check, python_json};

/// The largest rank that is accepted; adapters in use have 4 to 512.
pub const MAX_RANK: u64 = 1 << 16;

/// Which modules an adapter is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Every linear layer but the output head.
    AllLinear,
    /// Every linear layer whose whole name the regular expression matches.
    Pattern(String),
    /// Every linear layer of one of these names, or whose name ends with one of them after a dot.
    Names(Vec<String>),
}

/// PEFT's configuration of a LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank of modules that `rank_pattern` does not name.
    pub r: u64,
    /// Alpha of modules that `alpha_pattern` does not name.
    pub lora_alpha: f64,
    /// The probability with which an input of the adapter is dropped in training.
    pub lora_dropout: f64,
    /// Which modules the adapter is on.
    pub target_modules: TargetModules,
    /// Modules that it is not on, whatever `target_modules` says.
    pub exclude_modules: Option<TargetModules>,
    /// Only these layers, where `target_modules` is a list.
    pub layers_to_transform: Option<Vec<u64>>,
    /// The names of the lists of layers that `layers_to_transform` counts in; empty for any.
    pub layers_pattern: Vec<String>,
    /// Whether the scale is alpha / sqrt(r).
    pub use_rslora: bool,
    /// Whether the merged rows get a learned magnitude.
    pub use_dora: bool,
    /// Ranks of modules that a regular expression matches, first match first.
    pub rank_pattern: Vec<(String, u64)>,
    /// Alphas of modules, as `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// PEFT's word for weights that are stored `[in, out]`. PEFT corrects it by the layer's type; see
    /// [`super::LinearModule::orientation`].
    pub fan_in_fan_out: bool,
    /// The base model: a directory or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision on the hub.
    pub revision: Option<String>,
    /// `CAUSAL_LM`, or nothing.
    pub task_type: Option<String>,
    /// Whether the adapter is frozen when PEFT loads it; true in what PEFT saves.
    pub inference_mode: bool,
    /// All other fields, as they were read.
    pub extra: Map<String, Value>,
}

impl AdapterConfig {
    /// A causal language model's adapter of rank `r` on `target_modules`, with PEFT's defaults otherwise.
    #[must_use]
    pub fn new(r: u64, lora_alpha: f64, target_modules: TargetModules) -> Self {
        Self {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            use_rslora: false,
            use_dora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            fan_in_fan_out: false,
            base_model_name_or_path: None,
            revision: None,
            task_type: Some("CAUSAL_LM".to_owned()),
            inference_mode: true,
            extra: default_extra(),
        }
    }

    /// Reads the text of `adapter_config.json`.
    ///
    /// # Errors
    /// [`AdapterError`], naming the field that is missing, senseless or not supported (`AD-1`).
    pub fn parse(json: &[u8]) -> Result<Self, AdapterError> {
        Self::from_value(&serde_json::from_slice(json)?)
    }

    /// Reads the object of `adapter_config.json`, as a checkpoint's manifest holds it.
    ///
    /// # Errors
    /// As [`AdapterConfig::parse`].
    pub fn from_value(value: &Value) -> Result<Self, AdapterError> {
        let mut fields = Fields::new(value)?;
        check::supported(&fields.0)?;
        let config = Self {
            r: fields.rank()?,
            lora_alpha: fields.number("lora_alpha", 8.0)?,
            lora_dropout: fields.number("lora_dropout", 0.0)?,
            target_modules: fields
                .modules("target_modules")?
                .ok_or(AdapterError::Missing { field: "target_modules" })?,
            exclude_modules: fields.modules("exclude_modules")?,
            layers_to_transform: fields.layers()?,
            layers_pattern: fields.words("layers_pattern")?,
            use_rslora: fields.flag("use_rslora", false)?,
            use_dora: fields.flag("use_dora", false)?,
            rank_pattern: fields.ranks()?,
            alpha_pattern: fields.alphas()?,
            fan_in_fan_out: fields.flag("fan_in_fan_out", false)?,
            base_model_name_or_path: fields.text("base_model_name_or_path")?,
            revision: fields.text("revision")?,
            task_type: fields.text("task_type")?,
            inference_mode: fields.flag("inference_mode", false)?,
            extra: Map::new(),
        };
        if !(0.0..1.0).contains(&config.lora_dropout) {
            let found = config.lora_dropout.to_string();
            return Err(AdapterError::Field { field: "lora_dropout", expected: "0 or more, and less than 1", found });
        }
        let mut extra = fields.0;
        extra.remove("peft_type");
        extra.remove("bias");
        Ok(Self { extra, ..config })
    }

    /// The object that `adapter_config.json` holds.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut fields = self.extra.clone();
        let ranks: Map<String, Value> = self.rank_pattern.iter().map(|(key, r)| (key.clone(), json!(r))).collect();
        let alphas: Map<String, Value> =
            self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), whole(*alpha))).collect();
        let patterns = if self.layers_pattern.is_empty() { Value::Null } else { json!(self.layers_pattern) };
        let own = [
            ("peft_type", json!("LORA")),
            ("bias", json!("none")),
            ("r", json!(self.r)),
            ("lora_alpha", whole(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("target_modules", modules(&self.target_modules)),
            ("exclude_modules", self.exclude_modules.as_ref().map_or(Value::Null, modules)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("layers_pattern", patterns),
            ("use_rslora", json!(self.use_rslora)),
            ("use_dora", json!(self.use_dora)),
            ("rank_pattern", Value::Object(ranks)),
            ("alpha_pattern", Value::Object(alphas)),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            ("revision", json!(self.revision)),
            ("task_type", json!(self.task_type)),
            ("inference_mode", json!(self.inference_mode)),
        ];
        fields.extend(own.into_iter().map(|(key, value)| (key.to_owned(), value)));
        Value::Object(fields)
    }

    /// The text of `adapter_config.json`, as PEFT writes it: indented by 2, keys sorted, no newline at the end.
    #[must_use]
    pub fn to_json(&self) -> String {
        python_json::dumps(&self.to_value())
    }
}

/// PEFT's alphas are integers unless somebody chose otherwise.
fn whole(value: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "taken only when nothing is lost")]
    let integer = value as i64;
    #[expect(clippy::cast_precision_loss, reason = "compared with what it came from")]
    if integer as f64 == value { json!(integer) } else { json!(value) }
}

fn modules(modules: &TargetModules) -> Value {
    match modules {
        TargetModules::AllLinear => json!("all-linear"),
        TargetModules::Pattern(pattern) => json!(pattern),
        TargetModules::Names(names) => json!(names),
    }
}

/// The fields that PEFT 0.21 writes and this build does not use, at PEFT's defaults. `peft_version` is not among them: PEFT
/// fills it in when it is absent.
fn default_extra() -> Map<String, Value> {
    const NULL: [&str; 15] = [
        "alora_invocation_tokens",
        "arrow_config",
        "auto_mapping",
        "corda_config",
        "eva_config",
        "kasa_config",
        "layer_replication",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "velora_config",
    ];
    let values = [
        ("ensure_weight_tying", json!(false)),
        ("init_lora_weights", json!(true)),
        ("loftq_config", json!({})),
        ("lora_bias", json!(false)),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
        ("use_qalora", json!(false)),
    ];
    let nulls = NULL.into_iter().map(|key| (key, Value::Null));
    nulls.chain(values).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The fields that were not taken yet. An absent field and `null` are the same.
struct Fields(Map<String, Value>);

impl Fields {
    fn new(value: &Value) -> Result<Self, AdapterError> {
        match value {
            Value::Object(fields) => Ok(Self(fields.clone())),
            other => Err(field("the file", "an object", other)),
        }
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key).filter(|value| !value.is_null())
    }

    fn flag(&mut self, key: &'static str, default: bool) -> Result<bool, AdapterError> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| field(key, "true or false", &value)),
        }
    }

    fn number(&mut self, key: &'static str, default: f64) -> Result<f64, AdapterError> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => finite(key, &value),
        }
    }

    fn text(&mut self, key: &'static str) -> Result<Option<String>, AdapterError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(field(key, "a string", &other)),
        }
    }

    fn rank(&mut self) -> Result<u64, AdapterError> {
        let value = self.take("r").ok_or(AdapterError::Missing { field: "r" })?;
        rank("r", &value)
    }

    fn modules(&mut self, key: &'static str) -> Result<Option<TargetModules>, AdapterError> {
        Ok(match self.0.get(key) {
            None | Some(Value::Null) => {
                self.take(key);
                None
            }
            Some(Value::String(text)) if key == "target_modules" && text.to_lowercase() == "all-linear" => {
                self.take(key);
                Some(TargetModules::AllLinear)
            }
            Some(Value::String(_)) => self.text(key)?.map(TargetModules::Pattern),
            Some(_) => Some(TargetModules::Names(self.words(key)?)),
        })
    }

    /// A list of strings; one string is a list of one.
    fn words(&mut self, key: &'static str) -> Result<Vec<String>, AdapterError> {
        let value = match self.take(key) {
            None => return Ok(Vec::new()),
            Some(Value::String(word)) => return Ok(vec![word]),
            Some(value) => value,
        };
        let words = value.as_array().and_then(|items| {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<String>>>()
        });
        words.ok_or_else(|| field(key, "strings", &value))
    }

    fn layers(&mut self) -> Result<Option<Vec<u64>>, AdapterError> {
        let key = "layers_to_transform";
        let Some(value) = self.take(key) else { return Ok(None) };
        if let Some(layer) = value.as_u64() {
            return Ok(Some(vec![layer]));
        }
        let layers = value.as_array().and_then(|items| items.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
        let layers = layers.ok_or_else(|| field(key, "a layer or a list of layers", &value))?;
        Ok(if layers.is_empty() { None } else { Some(layers) })
    }

    fn pattern(&mut self, key: &'static str) -> Result<Map<String, Value>, AdapterError> {
        match self.take(key) {
            None => Ok(Map::new()),
            Some(Value::Object(map)) => Ok(map),
            Some(other) => Err(field(key, "an object", &other)),
        }
    }

    fn ranks(&mut self) -> Result<Vec<(String, u64)>, AdapterError> {
        let entries = self.pattern("rank_pattern")?.into_iter();
        entries.map(|(pattern, value)| Ok((pattern, rank("rank_pattern", &value)?))).collect()
    }

    fn alphas(&mut self) -> Result<Vec<(String, f64)>, AdapterError> {
        let entries = self.pattern("alpha_pattern")?.into_iter();
        entries.map(|(pattern, value)| Ok((pattern, finite("alpha_pattern", &value)?))).collect()
    }
}

fn finite(key: &'static str, value: &Value) -> Result<f64, AdapterError> {
    value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| field(key, "a number", value))
}

fn rank(key: &'static str, value: &Value) -> Result<u64, AdapterError> {
    let rank = value.as_u64().filter(|rank| (1..=MAX_RANK).contains(rank));
    rank.ok_or_else(|| field(key, "a rank of 1 to 65536", value))
}

fn field(field: &'static str, expected: &'static str, found: &Value) -> AdapterError {
    AdapterError::Field { field, expected, found: found.to_string() }
}
