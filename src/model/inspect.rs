//! Figures of a model, for people and for `--json`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Alias, Binding, Skeleton};
use crate::format::{ModelIndex, TensorEntry};

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
        files: index.files.len(),
        stored_bytes: read.iter().map(|entry| entry.stored_bytes()).sum(),
        bytes_by_dtype,
        tied: skeleton.aliases.clone(),
        ignored: binding.ignored.clone(),
    }
}
