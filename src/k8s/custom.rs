//! An object of a kind that is not Kubernetes' own.
//!
//! Owns: the frame. Refuses to know: any kind.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

/// An object with a specification.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Custom<S> {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Name, namespace, labels, annotations.
    pub metadata: ObjectMeta,
    /// What is wanted.
    pub spec: S,
}

impl<S> Custom<S> {
    /// An object of `api_version` and `kind`.
    pub(super) fn new((api_version, kind): (&str, &str), metadata: ObjectMeta, spec: S) -> Self {
        Self { api_version: api_version.to_owned(), kind: kind.to_owned(), metadata, spec }
    }
}
