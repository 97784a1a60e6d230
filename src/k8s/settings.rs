//! What a job's manifests are made of.
//!
//! Owns: [`Settings`], the ports, and how objects are named and labelled. Refuses to know: job files and plans.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use super::Object;
use super::flavors::Flavor;
use super::sizing::Sizes;

/// The coordinator's gRPC.
pub const GRPC_PORT: u16 = 29_400;
/// The kubelet's probes: `grpc.health.v1`, in the clear.
pub const HEALTH_PORT: u16 = 29_401;
/// The status page and the metrics.
pub const HTTP_PORT: u16 = 29_402;

/// The longest name of a job: its pods are called `<name>-coordinator-0-0-<5 characters>`, and a label takes 63.
const MAX_NAME: usize = 63 - "-coordinator-0-0-xxxxx".len();

/// A volume claim and where pods see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The claim's name.
    pub claim: String,
    /// An absolute path.
    pub path: String,
    /// Whether nobody writes there.
    pub read_only: bool,
}

/// A volume claim that is made with the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub name: String,
    /// How much, such as `10Gi`.
    pub size: String,
    /// Whether pods of several nodes use it at a time.
    pub is_shared: bool,
}

/// All that manifests are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The job's name: a DNS label.
    pub name: String,
    /// The namespace; where none is given, objects go where they are applied.
    pub namespace: Option<String>,
    /// Whether the namespace is made too, with Pod Security's "restricted".
    pub makes_namespace: bool,
    /// The container image.
    pub image: String,
    /// What runs the pods.
    pub flavor: Flavor,
    /// Nodes.
    pub nodes: u32,
    /// Ranks on each.
    pub ranks_per_node: u32,
    /// GPUs of each; 0 for the processor alone.
    pub gpus_per_node: u32,
    /// Threads of a reader, as planned: the window that was counted depends on them.
    pub reader_threads: u32,
    /// The job file's text.
    pub job_file: String,
    /// What the pods take.
    pub sizes: Sizes,
    /// Volume claims that all pods see.
    pub mounts: Vec<Mount>,
    /// Claims that are made with the job, beside the coordinator's state.
    pub claims: Vec<Claim>,
    /// The storage class of claims that are made; the cluster's default where none is given.
    pub storage_class: Option<String>,
    /// What the coordinator's journal takes.
    pub state_size: String,
    /// Where hub models are kept: a path below a mount.
    pub hub_home: Option<String>,
    /// Whether the job speaks to hubs or object stores.
    pub reaches_out: bool,
    /// Kueue's queue.
    pub queue: Option<String>,
    /// mTLS with certificates of cert-manager.
    pub tls: bool,
    /// A PodMonitor.
    pub monitoring: bool,
    /// A NetworkPolicy.
    pub network_policy: bool,
}

impl Settings {
    /// Ranks on all nodes.
    #[must_use]
    pub const fn ranks(&self) -> u32 {
        self.nodes.saturating_mul(self.ranks_per_node)
    }

    /// The name of the job's object of this role.
    pub(super) fn named(&self, role: &str) -> String {
        if role.is_empty() { self.name.clone() } else { format!("{}-{role}", self.name) }
    }

    /// The Secret with the job's token, under the key `token`.
    #[must_use]
    pub fn token_secret(&self) -> String {
        self.named("token")
    }

    /// The Secret with a role's certificate.
    pub(super) fn tls_secret(&self, role: &str) -> String {
        self.named(&format!("{role}-tls"))
    }

    /// The labels of everything.
    pub(super) fn labels(&self) -> BTreeMap<String, String> {
        texts(&[("app.kubernetes.io/instance", &self.name), ("app.kubernetes.io/name", "weightcast")])
    }

    /// The metadata of the job's object of this role.
    pub(super) fn metadata(&self, role: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(self.named(role)),
            namespace: self.namespace.clone(),
            labels: Some(self.labels()),
            ..ObjectMeta::default()
        }
    }

    /// The labels of pods of a role.
    pub(super) fn pod_labels(&self, role: &str) -> BTreeMap<String, String> {
        let mut labels = self.labels();
        labels.insert("app.kubernetes.io/component".to_owned(), role.to_owned());
        labels
    }

    /// All pods of the job.
    pub(super) fn selector(&self) -> LabelSelector {
        LabelSelector { match_labels: Some(self.labels()), ..LabelSelector::default() }
    }
}

/// Texts by names.
pub(super) fn texts(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A name that cannot be a job's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {found:?}: expected at most {MAX_NAME} lower-case letters, digits and -, with a letter first and none but a letter \
     or digit last"
)]
pub struct NameError {
    /// The name.
    pub found: String,
}

/// Checks a job's name, of which the names of pods and their host names are made.
///
/// # Errors
/// [`NameError`].
pub fn check_name(name: &str) -> Result<(), NameError> {
    let fits = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if fits { Ok(()) } else { Err(NameError { found: name.to_owned() }) }
}

/// The file of an object in a directory of manifests.
#[must_use]
pub fn file_name(object: &Object) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Object::as_str).unwrap_or("unnamed");
    format!("{}-{}.yaml", text("/kind").to_lowercase(), text("/metadata/name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_pods() {
        for name in ["a", "llama-70b", &"x".repeat(41)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "7b", "Llama", "a_b", "a.b", "a-", "-a", &"x".repeat(42)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
