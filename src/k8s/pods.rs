//! The pods: a coordinator, and a launcher for each node with its ranks.
//!
//! Owns: containers, their arguments, probes, volumes and security. Refuses to know: what starts the pods.
//! - KP-1: nothing is written but below the volumes: the root is read-only, and the program writes into `TMPDIR`,
//!   `XDG_RUNTIME_DIR`, the state directory, the hub's cache and the mounts.
//! - KP-2: the launcher has time to save before it is killed: its own patience ends [`FAREWELL_SECONDS`] before the pod's.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource,
    GRPCAction, Lifecycle, LifecycleHandler, ObjectFieldSelector, PersistentVolumeClaimVolumeSource,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile, SecretVolumeSource,
    SecurityContext, SleepAction, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use super::flavors::Flavor;
use super::settings::{GRPC_PORT, HEALTH_PORT, HTTP_PORT, Settings};

/// "nonroot" of distroless images.
const USER: i64 = 65_532;
/// Read by the group alone, which is the pod's.
const SECRET_MODE: i32 = 0o440;
/// Of the pod's grace, for the step before SIGTERM (one second) and for what comes after the ranks have ended.
const FAREWELL_SECONDS: u64 = 10;
/// A coordinator plans before it is ready. It may have to fetch a model from a hub first.
const START_SECONDS: i32 = 120;
const FETCH_SECONDS: i32 = 7200;

const JOB_DIRECTORY: &str = "/etc/weightcast/job";
const JOB_FILE: &str = "job.toml";
const TOKEN_DIRECTORY: &str = "/etc/weightcast/token";
const TLS_DIRECTORY: &str = "/etc/weightcast/tls";
const STATE_DIRECTORY: &str = "/state";
const RUN_DIRECTORY: &str = "/run/weightcast";

/// The container that starts a node's ranks. Trainer looks for one called `node`.
pub(super) const fn worker_container(flavor: Flavor) -> &'static str {
    match flavor {
        Flavor::Trainjob => "node",
        Flavor::Jobset | Flavor::IndexedJob => "worker",
    }
}

/// The coordinator's pod.
pub(super) fn coordinator(settings: &Settings) -> PodTemplateSpec {
    let sizes = &settings.sizes;
    let planning = if settings.hub_home.is_some() { FETCH_SECONDS } else { START_SECONDS };
    let container = Container {
        name: "coordinator".to_owned(),
        image: Some(settings.image.clone()),
        command: Some(vec!["weightcast".to_owned()]),
        args: Some(coordinator_args(settings)),
        env: Some(environment(settings)),
        ports: Some(ports(&[("grpc", GRPC_PORT), ("health", HEALTH_PORT), ("http", HTTP_PORT)])),
        startup_probe: Some(probe("startup", 1, planning)),
        readiness_probe: Some(probe("readiness", 2, 3)),
        liveness_probe: Some(probe("liveness", 10, 3)),
        resources: Some(ResourceRequirements {
            requests: Some(quantities(&[
                ("cpu", "500m".to_owned()),
                ("memory", memory(sizes.coordinator_memory_bytes)),
            ])),
            limits: Some(quantities(&[("memory", memory(sizes.coordinator_limit_bytes))])),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(mounts(settings, &[("job", JOB_DIRECTORY), ("state", STATE_DIRECTORY)])),
        ..container()
    };
    let job = ConfigMapVolumeSource { name: settings.named("job"), ..ConfigMapVolumeSource::default() };
    let own = vec![
        Volume { name: "job".to_owned(), config_map: Some(job), ..Volume::default() },
        claim("state", &settings.named("state"), false),
    ];
    let spec = PodSpec {
        // It goes on where it was: its journal is on a volume.
        restart_policy: Some("OnFailure".to_owned()),
        service_account_name: Some(settings.named("coordinator")),
        termination_grace_period_seconds: i64::try_from(sizes.coordinator_grace_seconds).ok(),
        containers: vec![container],
        volumes: Some(volumes(settings, "coordinator", own)),
        ..pod()
    };
    PodTemplateSpec { metadata: Some(pod_metadata(settings, "coordinator", None)), spec: Some(spec) }
}

/// A node's pod. Nobody probes it: a launcher lives as long as its ranks, and whether those live the coordinator knows from their
/// leases, sooner than a kubelet would.
pub(super) fn worker(settings: &Settings) -> PodTemplateSpec {
    let sizes = &settings.sizes;
    let container = Container {
        name: worker_container(settings.flavor).to_owned(),
        image: Some(settings.image.clone()),
        command: Some(vec!["weightcast".to_owned()]),
        args: Some(worker_args(settings)),
        env: Some(worker_environment(settings)),
        lifecycle: Some(Lifecycle {
            // Whoever still sends to this pod hears of its end first.
            pre_stop: Some(LifecycleHandler { sleep: Some(SleepAction { seconds: 1 }), ..LifecycleHandler::default() }),
            ..Lifecycle::default()
        }),
        resources: Some(worker_resources(settings)),
        volume_mounts: Some(mounts(settings, &[("shm", "/dev/shm")])),
        ..container()
    };
    let own = vec![empty("shm", Some("Memory"), &memory(sizes.shared_memory_bytes))];
    let spec = PodSpec {
        restart_policy: Some("Never".to_owned()),
        service_account_name: Some(settings.named("workers")),
        termination_grace_period_seconds: i64::try_from(sizes.worker_grace_seconds).ok(),
        tolerations: (settings.gpus_per_node > 0).then(|| {
            vec![Toleration {
                key: Some("nvidia.com/gpu".to_owned()),
                operator: Some("Exists".to_owned()),
                effect: Some("NoSchedule".to_owned()),
                ..Toleration::default()
            }]
        }),
        topology_spread_constraints: (settings.nodes > 1).then(|| vec![one_per_node(settings)]),
        containers: vec![container],
        volumes: Some(volumes(settings, "workers", own)),
        ..pod()
    };
    let planned = [
        ("weightcast/planned-host-bytes", sizes.planned_bytes),
        ("weightcast/planned-device-bytes-per-rank", sizes.device_bytes),
        ("weightcast/planned-checkpoint-bytes", sizes.checkpoint_bytes),
    ];
    let planned = planned.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())).collect();
    PodTemplateSpec { metadata: Some(pod_metadata(settings, "workers", Some(planned))), spec: Some(spec) }
}

/// What a node's pod asks for.
pub(super) fn worker_resources(settings: &Settings) -> ResourceRequirements {
    let sizes = &settings.sizes;
    let mut limits = vec![("memory", memory(sizes.worker_memory_bytes))];
    if settings.gpus_per_node > 0 {
        limits.push(("nvidia.com/gpu", settings.gpus_per_node.to_string()));
    }
    ResourceRequirements {
        requests: Some(quantities(&[
            ("cpu", sizes.worker_cpus.to_string()),
            ("memory", memory(sizes.worker_memory_bytes)),
        ])),
        limits: Some(quantities(&limits)),
        ..ResourceRequirements::default()
    }
}

fn coordinator_args(settings: &Settings) -> Vec<String> {
    let mut args = vec![
        "coordinator".to_owned(),
        format!("--ranks={}", settings.ranks()),
        format!("--listen=0.0.0.0:{GRPC_PORT}"),
    ];
    args.extend(watched());
    // Below the volume's root: the program makes it, and lets nobody else in.
    args.push(format!("--state-dir={STATE_DIRECTORY}/coordinator"));
    args.push(format!("--token-file={TOKEN_DIRECTORY}/token"));
    args.extend(device(settings));
    args.push(format!("--reader-threads={}", settings.reader_threads));
    args.push(format!("{JOB_DIRECTORY}/{JOB_FILE}"));
    // What a component changes comes last, so that it changes no other's place.
    if settings.tls {
        args.extend(tls());
    } else {
        args.push("--insecure".to_owned());
    }
    args
}

fn worker_args(settings: &Settings) -> Vec<String> {
    let patience = settings.sizes.worker_grace_seconds.saturating_sub(FAREWELL_SECONDS).max(1);
    let mut args = vec![
        "launch".to_owned(),
        format!("--nnodes={}", settings.nodes),
        format!("--nproc-per-node={}", settings.ranks_per_node),
    ];
    let coordinator = match settings.flavor {
        Flavor::Jobset | Flavor::Trainjob => "$(WEIGHTCAST_COORDINATOR)".to_owned(),
        Flavor::IndexedJob => format!("{}.{}", settings.coordinator_host(), settings.name),
    };
    args.push(format!("--shutdown-timeout={patience}"));
    args.push(format!("--coordinator={coordinator}:{GRPC_PORT}"));
    args.push(format!("--token-file={TOKEN_DIRECTORY}/token"));
    args.extend(device(settings));
    if settings.tls {
        args.extend(tls());
    }
    args
}

/// What is told of a process, to the kubelet and to people.
fn watched() -> [String; 2] {
    [format!("--health-listen=0.0.0.0:{HEALTH_PORT}"), format!("--http-listen=0.0.0.0:{HTTP_PORT}")]
}

/// Coordinator and ranks are told the same.
fn device(settings: &Settings) -> Vec<String> {
    let mut args = vec![format!("--device={}", if settings.gpus_per_node > 0 { "cuda" } else { "cpu" })];
    if settings.gpus_per_node > 0 && settings.ranks_per_node > settings.gpus_per_node {
        args.push("--share-devices".to_owned());
    }
    args
}

fn tls() -> [String; 3] {
    [
        format!("--tls-cert={TLS_DIRECTORY}/tls.crt"),
        format!("--tls-key={TLS_DIRECTORY}/tls.key"),
        format!("--tls-ca={TLS_DIRECTORY}/ca.crt"),
    ]
}

fn environment(settings: &Settings) -> Vec<EnvVar> {
    let variable =
        |name: &str, value: &str| EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None };
    let mut variables = vec![variable("TMPDIR", "/tmp"), variable("XDG_RUNTIME_DIR", RUN_DIRECTORY)];
    variables.extend(settings.hub_home.as_deref().map(|home| variable("HF_HOME", home)));
    variables
}

/// Before them, of whom the pod is part: arguments refer to these.
fn worker_environment(settings: &Settings) -> Vec<EnvVar> {
    let field = |name: &str, path: &str| EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { api_version: None, field_path: path.to_owned() }),
            ..EnvVarSource::default()
        }),
    };
    let mut variables = match settings.flavor {
        Flavor::Jobset | Flavor::Trainjob => {
            vec![field("WEIGHTCAST_COORDINATOR", "metadata.annotations['jobset.sigs.k8s.io/coordinator']")]
        }
        Flavor::IndexedJob => Vec::new(),
    };
    variables.push(field("WEIGHTCAST_DATA_ADDRESS", "status.podIP"));
    variables.extend(environment(settings));
    variables
}

fn ports(listed: &[(&str, u16)]) -> Vec<ContainerPort> {
    let port = |(name, port): &(&str, u16)| ContainerPort {
        name: Some((*name).to_owned()),
        container_port: i32::from(*port),
        ..ContainerPort::default()
    };
    listed.iter().map(port).collect()
}

/// A probe of a service of `grpc.health.v1`.
fn probe(service: &str, period_seconds: i32, failures: i32) -> Probe {
    Probe {
        grpc: Some(GRPCAction { port: i32::from(HEALTH_PORT), service: Some(service.to_owned()) }),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

fn container() -> Container {
    Container {
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
            ..SecurityContext::default()
        }),
        // Where the launcher writes its report; who writes none has its last lines there.
        termination_message_path: Some("/dev/termination-log".to_owned()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..Container::default()
    }
}

fn pod() -> PodSpec {
    PodSpec {
        // Nobody here speaks to the cluster.
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            // Otherwise the state directory is opened for the group at each start, and the coordinator refuses it.
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    }
}

fn pod_metadata(settings: &Settings, role: &str, annotations: Option<BTreeMap<String, String>>) -> ObjectMeta {
    ObjectMeta { labels: Some(settings.pod_labels(role)), annotations, ..ObjectMeta::default() }
}

/// Each launcher has a node's processors to itself, where there are nodes enough.
fn one_per_node(settings: &Settings) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "kubernetes.io/hostname".to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector {
            match_labels: Some(settings.pod_labels("workers")),
            ..LabelSelector::default()
        }),
        ..TopologySpreadConstraint::default()
    }
}

fn mounts(settings: &Settings, more: &[(&str, &str)]) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let mut all = vec![mount("token", TOKEN_DIRECTORY, true), mount("tmp", "/tmp", false)];
    all.push(mount("run", RUN_DIRECTORY, false));
    all.extend(more.iter().map(|(name, path)| mount(name, path, *path == JOB_DIRECTORY)));
    let claims = settings.mounts.iter().enumerate();
    all.extend(claims.map(|(place, claim)| mount(&format!("claim-{place}"), &claim.path, claim.read_only)));
    if settings.tls {
        all.push(mount("tls", TLS_DIRECTORY, true));
    }
    all
}

/// The volumes of a pod: those of every pod, `more`, and the mounts.
fn volumes(settings: &Settings, role: &str, more: Vec<Volume>) -> Vec<Volume> {
    let secret = |name: &str, secret_name: String| Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret_name),
            default_mode: Some(SECRET_MODE),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    };
    let mut all = vec![
        secret("token", settings.token_secret()),
        empty("tmp", None, "1Gi"),
        // The addresses and tokens of running jobs.
        empty("run", Some("Memory"), "16Mi"),
    ];
    all.extend(more);
    let claims = settings.mounts.iter().enumerate();
    all.extend(claims.map(|(place, mount)| claim(&format!("claim-{place}"), &mount.claim, mount.read_only)));
    if settings.tls {
        all.push(secret("tls", settings.tls_secret(role)));
    }
    all
}

fn empty(name: &str, medium: Option<&str>, size: &str) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: medium.map(str::to_owned),
            size_limit: Some(Quantity(size.to_owned())),
        }),
        ..Volume::default()
    }
}

fn claim(name: &str, claim_name: &str, read_only: bool) -> Volume {
    Volume {
        name: name.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim_name.to_owned(),
            read_only: read_only.then_some(true),
        }),
        ..Volume::default()
    }
}

/// Bytes as a quantity: whole GiB or MiB where it comes out even.
fn memory(bytes: u64) -> String {
    match (bytes % (1 << 30), bytes % (1 << 20)) {
        (0, _) => format!("{}Gi", bytes >> 30),
        (_, 0) => format!("{}Mi", bytes >> 20),
        _ => bytes.to_string(),
    }
}

fn quantities(pairs: &[(&str, String)]) -> BTreeMap<String, Quantity> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), Quantity(value.clone()))).collect()
}
