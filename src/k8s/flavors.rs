//! What starts the pods, starts them again, and knows when they are done: a JobSet, two Jobs, or a TrainJob.
//!
//! Owns: restarts and what exit codes mean to them. Refuses to know: containers.
//! - KF-1: an eviction is no failure, and comes first; exit codes that no restart helps end the job for good; anything else
//!   starts all again, from the last checkpoint.
//! - KF-2: the pods of before are gone before others take their places: a journal and a rank have one owner.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, JobTemplateSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{PodTemplateSpec, Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::custom::Custom;
use super::jobset::{
    Coordinator, DependsOn, FailurePolicy, FailureRule, JOB_SET, JobSetSpec, Network, ReplicatedJob, SuccessPolicy,
};
use super::settings::{GRPC_PORT, Settings, texts};
use super::trainer::{
    GROUP, JobSetTemplate, MlPolicy, RuntimeRef, RuntimeSpec, TRAIN_JOB, TRAINING_RUNTIME, Torch, TrainJobSpec, Trainer,
};
use super::{Object, object, pods};

/// What starts the pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavor {
    /// A JobSet.
    #[default]
    Jobset,
    /// Two Jobs and a Service, where there is no JobSet.
    IndexedJob,
    /// A TrainJob of Kubeflow Trainer with a runtime of its own.
    Trainjob,
}

/// How often all is started again. A fault that comes back each time should reach a person within hours.
const MAX_RESTARTS: i32 = 10;
/// A day, to look at what is left.
const KEPT_SECONDS: i32 = 86_400;
/// Wrong usage, a configuration that cannot work, and a program that asks not to be restarted (`weightcast_launcher`,
/// `end.rs`).
const FATAL_CODES: [i32; 3] = [64, 78, 93];
/// Kueue's queue of a job.
const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";

/// The objects that run the job.
pub(super) fn render(settings: &Settings) -> Vec<Object> {
    match settings.flavor {
        Flavor::Jobset => {
            vec![object(&Custom::new(JOB_SET, queued(settings, ""), job_set(settings, "workers")))]
        }
        Flavor::IndexedJob => indexed_jobs(settings),
        Flavor::Trainjob => train_job(settings),
    }
}

/// The metadata of what Kueue admits.
fn queued(settings: &Settings, role: &str) -> ObjectMeta {
    let mut metadata = settings.metadata(role);
    if let Some(queue) = &settings.queue {
        metadata.labels.get_or_insert_default().insert(QUEUE_LABEL.to_owned(), queue.clone());
    }
    metadata
}

fn job_set(settings: &Settings, workers: &str) -> JobSetSpec {
    JobSetSpec {
        ttl_seconds_after_finished: Some(KEPT_SECONDS),
        network: Some(Network { enable_dns_hostnames: true, publish_not_ready_addresses: true }),
        coordinator: Some(Coordinator { replicated_job: "coordinator".to_owned(), job_index: 0, pod_index: 0 }),
        success_policy: Some(SuccessPolicy {
            operator: "All".to_owned(),
            target_replicated_jobs: vec![workers.to_owned()],
        }),
        failure_policy: Some(FailurePolicy {
            max_restarts: MAX_RESTARTS,
            restart_strategy: "BlockingRecreate".to_owned(),
            rules: vec![FailureRule {
                name: "fatal".to_owned(),
                action: "FailJobSet".to_owned(),
                on_job_failure_reasons: vec!["PodFailurePolicy".to_owned()],
            }],
        }),
        replicated_jobs: vec![
            ReplicatedJob {
                name: "coordinator".to_owned(),
                replicas: 1,
                depends_on: Vec::new(),
                template: JobTemplateSpec { metadata: None, spec: Some(coordinator_job(pods::coordinator(settings))) },
            },
            ReplicatedJob {
                name: workers.to_owned(),
                replicas: 1,
                depends_on: vec![DependsOn { name: "coordinator".to_owned(), status: "Ready".to_owned() }],
                template: JobTemplateSpec { metadata: None, spec: Some(workers_job(settings, pods::worker(settings))) },
            },
        ],
    }
}

fn coordinator_job(pod: PodTemplateSpec) -> JobSpec {
    JobSpec {
        completions: Some(1),
        parallelism: Some(1),
        completion_mode: Some("Indexed".to_owned()),
        // It comes back in its pod; a job that failed is the workers' to tell.
        backoff_limit: Some(i32::MAX),
        pod_replacement_policy: Some("Failed".to_owned()),
        template: pod,
        ..JobSpec::default()
    }
}

fn workers_job(settings: &Settings, pod: PodTemplateSpec) -> JobSpec {
    let nodes = i32::try_from(settings.nodes).ok();
    let eviction = PodFailurePolicyRule {
        action: "Ignore".to_owned(),
        on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
            type_: "DisruptionTarget".to_owned(),
            status: None,
        }]),
        on_exit_codes: None,
    };
    let fatal = PodFailurePolicyRule {
        action: "FailJob".to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(pods::worker_container(settings.flavor).to_owned()),
            operator: "In".to_owned(),
            values: FATAL_CODES.to_vec(),
        }),
        on_pod_conditions: None,
    };
    JobSpec {
        completions: nodes,
        parallelism: nodes,
        completion_mode: Some("Indexed".to_owned()),
        backoff_limit: Some(0),
        pod_replacement_policy: Some("Failed".to_owned()),
        pod_failure_policy: Some(PodFailurePolicy { rules: vec![eviction, fatal] }),
        template: pod,
        ..JobSpec::default()
    }
}

/// Two Jobs, and the Service that gives their pods names. Nobody starts all of them together here: when a rank fails, every
/// launcher ends, each pod is replaced, and the coordinator begins again in its own pod.
fn indexed_jobs(settings: &Settings) -> Vec<Object> {
    let named = |mut pod: PodTemplateSpec| {
        if let Some(spec) = &mut pod.spec {
            spec.subdomain = Some(settings.name.clone());
        }
        pod
    };
    let service = Service {
        metadata: settings.metadata(""),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            publish_not_ready_addresses: Some(true),
            selector: Some(settings.labels()),
            ports: Some(vec![ServicePort {
                name: Some("grpc".to_owned()),
                port: i32::from(GRPC_PORT),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let job = |role: &str, spec: JobSpec| {
        let spec = JobSpec { ttl_seconds_after_finished: Some(KEPT_SECONDS), ..spec };
        object(&Job { metadata: queued(settings, role), spec: Some(spec), status: None })
    };
    let workers = workers_job(settings, named(pods::worker(settings)));
    let restarts = i32::try_from(settings.nodes).unwrap_or(i32::MAX).saturating_mul(MAX_RESTARTS);
    vec![
        object(&service),
        job("coordinator", coordinator_job(named(pods::coordinator(settings)))),
        job("workers", JobSpec { backoff_limit: Some(restarts), ..workers }),
    ]
}

/// A runtime of the job's own, and the run.
fn train_job(settings: &Settings) -> Vec<Object> {
    let nodes = i32::try_from(settings.nodes).unwrap_or(i32::MAX);
    let mut set = job_set(settings, "node");
    if let Some(node) = set.replicated_jobs.last_mut() {
        // By this label Trainer knows the job that trains.
        let step: BTreeMap<String, String> = texts(&[("trainer.kubeflow.org/trainjob-ancestor-step", "trainer")]);
        node.template.metadata = Some(ObjectMeta { labels: Some(step), ..ObjectMeta::default() });
    }
    let runtime = RuntimeSpec {
        ml_policy: MlPolicy { num_nodes: nodes, torch: Torch {} },
        template: JobSetTemplate { metadata: ObjectMeta::default(), spec: set },
    };
    let run = TrainJobSpec {
        runtime_ref: RuntimeRef {
            api_group: GROUP.to_owned(),
            kind: TRAINING_RUNTIME.1.to_owned(),
            name: settings.name.clone(),
        },
        trainer: Trainer { num_nodes: nodes, resources_per_node: pods::worker_resources(settings) },
    };
    vec![
        object(&Custom::new(TRAINING_RUNTIME, settings.metadata(""), runtime)),
        object(&Custom::new(TRAIN_JOB, queued(settings, ""), run)),
    ]
}
