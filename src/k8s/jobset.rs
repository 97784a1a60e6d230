//! JobSet, `jobset.x-k8s.io/v1alpha2` (github.com/kubernetes-sigs/jobset, release 0.12), as far as a job uses it.
//!
//! Owns: the fields and their names. Refuses to know: what goes into them.

use k8s_openapi::api::batch::v1::JobTemplateSpec;
use serde::{Deserialize, Serialize};

use super::custom::Custom;

/// Group, version and kind.
pub(super) const JOB_SET: (&str, &str) = ("jobset.x-k8s.io/v1alpha2", "JobSet");

/// A set of jobs that start, fail and end together.
pub type JobSet = Custom<JobSetSpec>;

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JobSetSpec {
    /// Seconds after which a finished set is removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<i32>,
    /// Names of pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Which pod's name stands in the annotation `jobset.sigs.k8s.io/coordinator` of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<Coordinator>,
    /// When the set has succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_policy: Option<SuccessPolicy>,
    /// What a failed job means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_policy: Option<FailurePolicy>,
    /// The jobs.
    pub replicated_jobs: Vec<ReplicatedJob>,
}

/// `spec.network`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Network {
    /// Pods have names in DNS, by a headless service of the set's name.
    #[serde(rename = "enableDNSHostnames")]
    pub enable_dns_hostnames: bool,
    /// Also those that are not ready yet: ranks meet before they are.
    pub publish_not_ready_addresses: bool,
}

/// `spec.coordinator`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Coordinator {
    /// Its replicated job.
    pub replicated_job: String,
    /// The job's index.
    pub job_index: i32,
    /// The pod's index.
    pub pod_index: i32,
}

/// `spec.successPolicy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SuccessPolicy {
    /// `All` or `Any`.
    pub operator: String,
    /// Whose success counts.
    pub target_replicated_jobs: Vec<String>,
}

/// `spec.failurePolicy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailurePolicy {
    /// How often the set is started again.
    pub max_restarts: i32,
    /// `Recreate` or `BlockingRecreate` (all pods of before are gone first).
    pub restart_strategy: String,
    /// Failures that are something else than a restart.
    pub rules: Vec<FailureRule>,
}

/// One of `spec.failurePolicy.rules`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailureRule {
    /// Its name.
    pub name: String,
    /// `FailJobSet`, `RestartJobSet` or `RestartJobSetAndIgnoreMaxRestarts`.
    pub action: String,
    /// The reasons of a job's failure that it is for.
    pub on_job_failure_reasons: Vec<String>,
}

/// One of `spec.replicatedJobs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplicatedJob {
    /// Its name, part of the names of its pods.
    pub name: String,
    /// Jobs of this template.
    pub replicas: i32,
    /// What must be there before it is started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<DependsOn>,
    /// The job.
    pub template: JobTemplateSpec,
}

/// One of `dependsOn`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DependsOn {
    /// A replicated job that stands before this one.
    pub name: String,
    /// `Ready` or `Complete`.
    pub status: String,
}
