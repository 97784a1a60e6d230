//! `weightcast adapter export`: a training checkpoint as PEFT's files.

use std::path::Path;

use super::adapter_source::{AdapterSource, AdapterSourceError, narrow};
use super::weight_files::WeightFiles;
use crate::adapter::{AdapterConfig, LoadedAdapter};
use crate::error::{Classify, Kind};
use crate::quant::QuantError;
use crate::store::{LocalStore, Store, StoreError, write_small};
use crate::types::{DType, Fqn};

/// Why an adapter cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The adapter cannot be read.
    #[error(transparent)]
    Source(#[from] AdapterSourceError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A tensor has no such element type.
    #[error("tensor {fqn}: {source}")]
    Convert {
        /// The tensor.
        fqn: Fqn,
        /// The reason.
        source: QuantError,
    },
}

impl Classify for ExportError {
    fn kind(&self) -> Kind {
        match self {
            Self::Source(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Convert { source, .. } => source.kind(),
        }
    }
}

/// What was exported.
#[derive(Clone, Debug)]
pub struct Exported {
    /// The number of modules with an adapter.
    pub modules: usize,
    /// The number of trained parameters.
    pub parameters: usize,
    /// The bytes of the tensors.
    pub bytes: u64,
}

/// Writes `adapter_model.safetensors` in `dtype`, a README.md and, last, `adapter_config.json` into `output`, which must not
/// have them.
///
/// # Errors
/// [`ExportError`]; the files written so far stay.
pub fn export_adapter(source: &AdapterSource, dtype: DType, output: &Path) -> Result<Exported, ExportError> {
    // The base need not be at hand: the adapter's own tensors say which modules there are and how large.
    let adapter = source.read(&source.own_modules())?;
    let store = LocalStore::new(output);
    store.create_dir("")?;
    let targets: Vec<_> = adapter.modules.iter().map(|module| module.target.clone()).collect();
    let mut tensors = adapter.config.tensors(&targets);
    // safetensors of Python sorts by name.
    tensors.sort_by(|one, other| one.fqn.cmp(&other.fqn));
    let outputs = tensors.iter().map(|tensor| (tensor.fqn.clone(), dtype, tensor.shape.clone())).collect();
    let files = WeightFiles::one("adapter_model.safetensors", outputs);
    files.write(&store, |(fqn, dtype, _), bytes| {
        let tensor = tensors.iter().find(|tensor| tensor.fqn == *fqn).expect("the files were made of these tensors");
        let values = adapter.modules.get(tensor.target).map_or(&[][..], |module| module.part(tensor.part));
        narrow(values, *dtype, bytes).map_err(|source| ExportError::Convert { fqn: fqn.clone(), source })
    })?;
    write_small(&store, "README.md", model_card(&adapter, source).as_bytes())?;
    let config = AdapterConfig { inference_mode: true, ..adapter.config.clone() };
    write_small(&store, "adapter_config.json", config.to_json().as_bytes())?;
    store.sync_dir("")?;
    Ok(Exported { modules: adapter.modules.len(), parameters: adapter.parameters(), bytes: files.total_bytes() })
}

/// A model card with the fields that the hub reads of adapters.
fn model_card(adapter: &LoadedAdapter, source: &AdapterSource) -> String {
    let config = &adapter.config;
    let base = config.base_model_name_or_path.as_deref().unwrap_or("unknown");
    let kind = match (config.use_dora, config.use_rslora) {
        (true, true) => "DoRA (rank-stabilized)",
        (true, false) => "DoRA",
        (false, true) => "rsLoRA",
        (false, false) => "LoRA",
    };
    let step = source.step.map_or_else(String::new, |step| format!(", of step {step}"));
    // A JSON string is a YAML string, whatever a path has in it.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        "---\nbase_model: {}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- {}\n- lora\n- transformers\n---\n\n\
         # {kind} adapter\n\nA {kind} adapter of rank {} and alpha {} on {} modules of `{base}`, with {} parameters{step}.\n\n\
         ```python\nfrom peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(\".\")\n```\n",
        quoted(base),
        quoted(&format!("base_model:adapter:{base}")),
        config.r,
        config.lora_alpha,
        adapter.modules.len(),
        adapter.parameters(),
    )
}
