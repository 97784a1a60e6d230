//! Kubernetes manifests of a job: what `weightcast k8s render` prints.
//!
//! Owns: the objects, every field of them typed ([`k8s_openapi`] for Kubernetes' own kinds, structs of ours for others), how they
//! are written as YAML, and how they differ from others. Refuses to know: job files, plans, clusters; it is given numbers
//! and names ([`Settings`]) and talks to nobody.
//!
//! - K8-1: no object holds a secret value. The token is a Secret that somebody else makes.
//! - K8-2: what the pods are told is what the program takes: `tests/k8s.rs` holds every flag, variable, port, probe and exit
//!   code against the code.
//! - K8-3: the same settings give the same bytes, so `k8s/base` in the repository can be compared with what is rendered.

mod addons;
mod beside;
mod custom;
mod diff;
mod flavors;
mod jobset;
mod kustomize;
mod pods;
mod settings;
mod sizing;
mod trainer;
mod yaml;

pub use addons::{Certificate, Issuer, PodMonitor};
pub use custom::Custom;
pub use diff::{Difference, differences};
pub use flavors::Flavor;
pub use jobset::{JobSet, JobSetSpec};
pub use kustomize::{Kustomization, kustomization};
pub use settings::{Claim, GRPC_PORT, HEALTH_PORT, HTTP_PORT, Mount, NameError, Settings, check_name, file_name};
pub use sizing::{RankNeed, Sizes, Sizing};
pub use trainer::{TrainJob, TrainingRuntime};
pub use yaml::{YamlError, parse, write};

/// One object, as it stands in a manifest.
pub type Object = serde_json::Value;

/// All objects of a job, in the order in which they are to be applied.
#[must_use]
pub fn render(settings: &Settings) -> Vec<Object> {
    let mut objects = beside::before(settings);
    objects.extend(addons::render(settings));
    objects.extend(flavors::render(settings));
    objects
}

/// A typed object as a value. Every kind here has keys that are text, so that it cannot fail.
fn object<T: serde::Serialize>(typed: &T) -> Object {
    serde_json::to_value(typed).expect("manifests have text keys and finite numbers")
}
