//! What stands beside the pods: namespace, accounts, the job file, volumes, the budget of disruptions, the network's rules.
//!
//! Owns: these objects. Refuses to know: containers and what starts them.
//! - K8-1 (see the module): the Secret with the token is not among them.

use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, PersistentVolumeClaim, PersistentVolumeClaimSpec, ServiceAccount, VolumeResourceRequirements,
};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::settings::{Claim, HTTP_PORT, Settings, texts};
use super::{Object, object};

/// The objects that pods need before they start.
pub(super) fn before(settings: &Settings) -> Vec<Object> {
    let mut objects = Vec::new();
    if let Some(namespace) = settings.namespace.as_deref().filter(|_| settings.makes_namespace) {
        objects.push(object(&restricted(namespace)));
    }
    objects.extend(["coordinator", "workers"].map(|role| object(&account(settings, role))));
    objects.extend(role(settings));
    objects.push(object(&ConfigMap {
        metadata: settings.metadata("job"),
        data: Some(texts(&[("job.toml", &settings.job_file)])),
        ..ConfigMap::default()
    }));
    let state = Claim { name: settings.named("state"), size: settings.state_size.clone(), is_shared: false };
    let claims = std::iter::once(&state).chain(&settings.claims);
    objects.extend(claims.map(|claim| object(&volume_claim(settings, claim))));
    objects.push(object(&budget(settings)));
    if settings.network_policy {
        objects.push(object(&network_policy(settings)));
    }
    objects
}

fn restricted(namespace: &str) -> Namespace {
    let labels = texts(&[
        ("pod-security.kubernetes.io/enforce", "restricted"),
        ("pod-security.kubernetes.io/enforce-version", "latest"),
    ]);
    Namespace {
        metadata: ObjectMeta { name: Some(namespace.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        ..Namespace::default()
    }
}

fn account(settings: &Settings, role: &str) -> ServiceAccount {
    ServiceAccount {
        metadata: settings.metadata(role),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// The most that a coordinator may ever do in the cluster: one lease of its name, and events. It does neither today, and its
/// pod has no token of its account.
fn role(settings: &Settings) -> [Object; 2] {
    let name = settings.named("coordinator");
    let rule = |group: &str, resource: &str, only: Option<&str>, verbs: &[&str]| PolicyRule {
        api_groups: Some(vec![group.to_owned()]),
        resources: Some(vec![resource.to_owned()]),
        resource_names: only.map(|name| vec![name.to_owned()]),
        verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
        ..PolicyRule::default()
    };
    let role = Role {
        metadata: settings.metadata("coordinator"),
        rules: Some(vec![
            rule("coordination.k8s.io", "leases", None, &["create"]),
            rule("coordination.k8s.io", "leases", Some(&name), &["get", "update", "patch"]),
            rule("events.k8s.io", "events", None, &["create", "patch"]),
        ]),
    };
    let binding = RoleBinding {
        metadata: settings.metadata("coordinator"),
        role_ref: RoleRef {
            api_group: Some("rbac.authorization.k8s.io".to_owned()),
            kind: "Role".to_owned(),
            name: name.clone(),
        },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".to_owned(),
            name,
            namespace: settings.namespace.clone(),
            ..Subject::default()
        }]),
    };
    [object(&role), object(&binding)]
}

fn volume_claim(settings: &Settings, claim: &Claim) -> PersistentVolumeClaim {
    let access = if claim.is_shared { "ReadWriteMany" } else { "ReadWriteOnce" };
    let mut metadata = settings.metadata("");
    metadata.name = Some(claim.name.clone());
    PersistentVolumeClaim {
        metadata,
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec![access.to_owned()]),
            storage_class_name: settings.storage_class.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), Quantity(claim.size.clone()))].into()),
                ..VolumeResourceRequirements::default()
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

/// Whoever drains a node waits for the coordinator's, whose end costs all nodes their work since the last checkpoint. Pods of
/// jobs take an integer here, and no `maxUnavailable`.
fn budget(settings: &Settings) -> PodDisruptionBudget {
    let selector = LabelSelector { match_labels: Some(settings.pod_labels("coordinator")), ..LabelSelector::default() };
    PodDisruptionBudget {
        metadata: settings.metadata("coordinator"),
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(1)),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            selector: Some(selector),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}

/// The job's pods speak with each other, with DNS, and are asked by Prometheus; with hubs and object stores where the job
/// names one.
fn network_policy(settings: &Settings) -> NetworkPolicy {
    let pods =
        |selector: LabelSelector| NetworkPolicyPeer { pod_selector: Some(selector), ..NetworkPolicyPeer::default() };
    let labelled = |name: &str, value: &str| LabelSelector {
        match_labels: Some(texts(&[(name, value)])),
        ..LabelSelector::default()
    };
    let namespace = |name: &str| Some(labelled("kubernetes.io/metadata.name", name));
    let port = |port: u16, protocol: &str| NetworkPolicyPort {
        port: Some(IntOrString::Int(i32::from(port))),
        protocol: Some(protocol.to_owned()),
        end_port: None,
    };
    let own = || Some(vec![pods(settings.selector())]);
    let prometheus = NetworkPolicyPeer { namespace_selector: namespace("monitoring"), ..NetworkPolicyPeer::default() };
    let dns = NetworkPolicyPeer {
        namespace_selector: namespace("kube-system"),
        pod_selector: Some(labelled("k8s-app", "kube-dns")),
        ip_block: None,
    };
    let mut egress = vec![
        NetworkPolicyEgressRule { to: own(), ports: None },
        NetworkPolicyEgressRule { to: Some(vec![dns]), ports: Some(vec![port(53, "UDP"), port(53, "TCP")]) },
    ];
    if settings.reaches_out {
        egress.push(NetworkPolicyEgressRule { to: None, ports: Some(vec![port(443, "TCP")]) });
    }
    NetworkPolicy {
        metadata: settings.metadata(""),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(settings.selector()),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: Some(vec![
                NetworkPolicyIngressRule { from: own(), ports: None },
                NetworkPolicyIngressRule { from: Some(vec![prometheus]), ports: Some(vec![port(HTTP_PORT, "TCP")]) },
            ]),
            egress: Some(egress),
        }),
    }
}
