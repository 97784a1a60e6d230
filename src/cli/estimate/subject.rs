//! What is estimated: a published profile, a profile of one's own, sizes, a model of a hub or one that is here.

use std::path::Path;

use super::super::args::PlanFlags;
use super::super::output::download;
use super::{EstimateFlags, Refusal, named};
use crate::app::peek_model;
use crate::config::{ConfigError, JobConfig};
use crate::estimate::{ModelProfile, ProfileFields};
use crate::model::Skeleton;
use crate::store::{absolute, is_remote};
use crate::types::DType;

/// A model to estimate.
pub(super) struct Subject {
    pub(super) name: String,
    /// What a job names it.
    pub(super) source: String,
    pub(super) skeleton: Skeleton,
    /// Of its weights in files.
    pub(super) dtype: DType,
}

/// The model that flags and job file name.
pub(super) fn subject(flags: &PlanFlags, config: &JobConfig) -> Result<Subject, Refusal> {
    let estimate = &flags.estimate;
    let of = |profile: &ModelProfile| Subject {
        name: profile.name().to_owned(),
        source: profile.source().map_or_else(|| profile.name().to_owned(), hub_id),
        skeleton: profile.skeleton(),
        dtype: profile.dtype(),
    };
    if let Some(arch) = &estimate.arch {
        return Ok(of(&ModelProfile::new(arch, fields(estimate, arch))?));
    }
    if let Some(path) = &estimate.profile {
        return Ok(of(&own_profile(path, named(flags))?));
    }
    let is_toml = |name: &str| name.ends_with(".toml");
    let Some(name) = named(flags).filter(|name| !is_toml(name)).or(config.model.source.as_deref()) else {
        let (key, expected) = ("model", "a profile's name, --arch with sizes, --profile FILE, or a model");
        return Err(ConfigError::Value { key, expected, found: "nothing".to_owned() }.into());
    };
    // A hub id has a slash; what is here is taken as it is.
    if !name.contains('/') && !Path::new(name).exists() {
        return Ok(of(&ModelProfile::published(name)?));
    }
    let (source, _) = peek_model(name, &download)?;
    let dtype = source.index.tensors.values().map(|entry| entry.dtype).find(|dtype| dtype.is_weight_float());
    // A job file may lie elsewhere.
    let is_here = !is_remote(Path::new(name)) && Path::new(name).exists();
    let local = || absolute(Path::new(name)).display().to_string();
    Ok(Subject {
        name: name.to_owned(),
        source: if is_here { local() } else { name.to_owned() },
        skeleton: source.skeleton,
        dtype: dtype.unwrap_or(DType::BF16),
    })
}

/// The id of a page of the hub.
fn hub_id(address: &str) -> String {
    address.trim_start_matches("https://huggingface.co/").to_owned()
}

fn own_profile(path: &Path, name: Option<&str>) -> Result<ModelProfile, Refusal> {
    let failed = |message: String| ConfigError::File { path: path.display().to_string(), message };
    #[expect(clippy::disallowed_methods, reason = "a profile is configuration, not data")]
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8(text).map_err(|error| failed(error.to_string()))?;
    let profiles = ModelProfile::parse(&path.display().to_string(), &text)?;
    match (profiles.as_slice(), name) {
        ([only], None) => Ok(only.clone()),
        _ => Ok(ModelProfile::find(profiles, name.unwrap_or_default())?),
    }
}

fn fields(flags: &EstimateFlags, arch: &str) -> ProfileFields {
    ProfileFields {
        model_type: Some(arch.to_owned()),
        hidden_size: flags.hidden,
        num_hidden_layers: flags.layers,
        num_attention_heads: flags.heads,
        num_key_value_heads: flags.kv_heads,
        head_dim: flags.head_dim,
        intermediate_size: flags.intermediate,
        moe_intermediate_size: flags.experts.and(flags.intermediate),
        shared_expert_intermediate_size: flags.experts.and(flags.intermediate),
        vocab_size: flags.vocab,
        num_experts: flags.experts,
        num_experts_per_tok: flags.experts.and(flags.experts_per_token),
        tie_word_embeddings: flags.tied.then_some(true),
        ..ProfileFields::default()
    }
}
