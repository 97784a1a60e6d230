//! `kustomization.yaml` of a directory of manifests.
//!
//! Owns: that one file. Refuses to know: overlays and components, which people write.

use serde::{Deserialize, Serialize};

use super::Object;
use super::settings::file_name;

/// A kustomization, `kustomize.config.k8s.io/v1beta1`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kustomization {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Files.
    pub resources: Vec<String>,
}

/// The kustomization of these objects, each in the file that [`file_name`] says.
#[must_use]
pub fn kustomization(objects: &[Object]) -> Kustomization {
    Kustomization {
        api_version: "kustomize.config.k8s.io/v1beta1".to_owned(),
        kind: "Kustomization".to_owned(),
        resources: objects.iter().map(file_name).collect(),
    }
}
