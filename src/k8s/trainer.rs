//! Kubeflow Trainer, `trainer.kubeflow.org/v1alpha1` (release 2.3), as far as a job uses it.
//!
//! Owns: the fields and their names. Refuses to know: what goes into them.

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::custom::Custom;
use super::jobset::JobSetSpec;

/// Group, version and kind of a run.
pub(super) const TRAIN_JOB: (&str, &str) = (API_VERSION, "TrainJob");
/// Group, version and kind of what runs are made of.
pub(super) const TRAINING_RUNTIME: (&str, &str) = (API_VERSION, "TrainingRuntime");
/// The group alone.
pub(super) const GROUP: &str = "trainer.kubeflow.org";
const API_VERSION: &str = "trainer.kubeflow.org/v1alpha1";

/// A run.
pub type TrainJob = Custom<TrainJobSpec>;
/// What runs are made of, of one namespace.
pub type TrainingRuntime = Custom<RuntimeSpec>;

/// `spec` of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainJobSpec {
    /// What it is made of.
    pub runtime_ref: RuntimeRef,
    /// What it says over it.
    pub trainer: Trainer,
}

/// `spec.runtimeRef`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuntimeRef {
    /// Group.
    pub api_group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
}

/// `spec.trainer`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Trainer {
    /// Nodes; Trainer tells them to the pods as `PET_NNODES`.
    pub num_nodes: i32,
    /// What each takes.
    pub resources_per_node: ResourceRequirements,
}

/// `spec` of a runtime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuntimeSpec {
    /// Which variables pods get.
    pub ml_policy: MlPolicy,
    /// The set that a run becomes.
    pub template: JobSetTemplate,
}

/// `spec.mlPolicy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MlPolicy {
    /// Nodes, where a run says none.
    pub num_nodes: i32,
    /// The variables of torchrun, `PET_*`. Release 2.3 takes no `numProcPerNode` here: the ranks of a pod are in its arguments.
    pub torch: Torch,
}

/// `spec.mlPolicy.torch`: empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Torch {}

/// `spec.template`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JobSetTemplate {
    /// Labels and annotations of the set.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The set.
    pub spec: JobSetSpec,
}
