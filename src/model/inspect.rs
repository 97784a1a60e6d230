//! Figures of a model, for people and for `--json`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Alias, Binding, Skeleton};
use crate::format::{ModelIndex, TensorEntry};
use crate::types::as_u64;

/// What a model is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// The family, as `model_type` names it.
    pub architecture: &'static str,
    /// Parameters that are read, tied ones once.
    pub parameters: u64,
    /// Tensors that are read.
    pub tensors: usize,
    /// Layers.
    pub layers: u32,
    /// Of a mixture of experts, its experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertFigures>,
    /// Files.
    pub files: usize,
    /// Bytes of the tensors that are read, as stored.
    pub stored_bytes: u64,
    /// Those bytes by element or block type.
    pub bytes_by_dtype: BTreeMap<String, u64>,
    /// Tied names.
    pub tied: Vec<Alias>,
    /// Names in the files that are not read.
    pub ignored: Vec<crate::types::Fqn>,
}

/// Figures of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ExpertFigures {
    /// Experts of a sparse layer.
    pub count: u64,
    /// Experts that compute one token.
    pub per_token: u64,
    /// Parameters that compute one token: all but those of the other experts.
    pub active_parameters: u64,
}

impl ExpertFigures {
    pub(super) fn new(skeleton: &Skeleton) -> Option<Self> {
        let config = skeleton.config.as_ref()?;
        let experts = config.experts.as_ref()?;
        let layers = (0..config.num_hidden_layers).filter(|&layer| experts.is_sparse(layer)).count();
        let idle =
            [as_u64(layers), experts.count - experts.per_token, 3, config.hidden_size, experts.intermediate_size];
        let idle = idle.into_iter().fold(1, u64::saturating_mul);
        let active_parameters = skeleton.parameters().saturating_sub(idle);
        Some(Self { count: experts.count, per_token: experts.per_token, active_parameters })
    }
}

/// The figures of a model whose keys were bound.
#[must_use]
pub fn inspect(skeleton: &Skeleton, index: &ModelIndex, binding: &Binding) -> Inspection {
    let read: Vec<&TensorEntry> = skeleton
        .tensors
        .iter()
        .filter_map(|tensor| binding.source(&tensor.fqn).and_then(|source| index.tensors.get(source)))
        .collect();
    let mut bytes_by_dtype = BTreeMap::new();
    for entry in &read {
        *bytes_by_dtype.entry(entry.format_name()).or_insert(0) += entry.stored_bytes();
    }
    Inspection {
        architecture: skeleton.architecture.name(),
        parameters: read.iter().map(|entry| entry.shape.elements().unwrap_or(0)).fold(0, u64::saturating_add),
        tensors: read.len(),
        layers: skeleton.layers(),
        experts: ExpertFigures::new(skeleton),
        files: index.files.len(),
        stored_bytes: read.iter().map(|entry| entry.stored_bytes()).sum(),
        bytes_by_dtype,
        tied: skeleton.aliases.clone(),
        ignored: binding.ignored.clone(),
    }
}
