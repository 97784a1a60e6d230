//! What other controllers make of a job: certificates (cert-manager, `cert-manager.io/v1`) and scraping (Prometheus operator,
//! `monitoring.coreos.com/v1`).
//!
//! Owns: these kinds as far as they are used, and the objects of a job. Refuses to know: pods.
//! - KA-1: a name with a wildcard has three labels at least, because verifiers refuse fewer; the short names that pods call
//!   each other by are listed one by one.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};

use super::custom::Custom;
use super::flavors::Flavor;
use super::settings::Settings;
use super::{Object, object};

const ISSUER: (&str, &str) = (CERT_MANAGER, "Issuer");
const CERTIFICATE: (&str, &str) = (CERT_MANAGER, "Certificate");
const CERT_MANAGER: &str = "cert-manager.io/v1";
const POD_MONITOR: (&str, &str) = ("monitoring.coreos.com/v1", "PodMonitor");

/// Who signs certificates.
pub type Issuer = Custom<IssuerSpec>;
/// A certificate and the Secret that it is kept in.
pub type Certificate = Custom<CertificateSpec>;
/// Which pods Prometheus asks.
pub type PodMonitor = Custom<PodMonitorSpec>;

/// `spec` of an issuer: one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IssuerSpec {
    /// Signs with the requested key itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub self_signed: Option<SelfSigned>,
    /// Signs with the key of a Secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<Ca>,
}

/// `spec.selfSigned`: empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfSigned {}

/// `spec.ca`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ca {
    /// The Secret.
    pub secret_name: String,
}

/// `spec` of a certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CertificateSpec {
    /// The Secret that gets `tls.crt`, `tls.key` and `ca.crt`.
    pub secret_name: String,
    /// Whether it signs others.
    #[serde(rename = "isCA", default, skip_serializing_if = "std::ops::Not::not")]
    pub is_ca: bool,
    /// A name for an authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub common_name: Option<String>,
    /// How long it holds.
    pub duration: String,
    /// How long before its end it is made anew.
    pub renew_before: String,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_names: Vec<String>,
    /// What it is for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub usages: Vec<String>,
    /// Its key.
    pub private_key: PrivateKey,
    /// Who signs it.
    pub issuer_ref: IssuerRef,
}

/// `spec.privateKey`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PrivateKey {
    /// `ECDSA`.
    pub algorithm: String,
    /// Bits.
    pub size: i32,
    /// `Always`: a new certificate has a new key.
    pub rotation_policy: String,
}

/// `spec.issuerRef`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IssuerRef {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: String,
    /// Group.
    pub group: String,
}

/// `spec` of a pod monitor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodMonitorSpec {
    /// The pods.
    pub selector: LabelSelector,
    /// Their ports.
    pub pod_metrics_endpoints: Vec<MetricsEndpoint>,
}

/// One of `spec.podMetricsEndpoints`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MetricsEndpoint {
    /// The port's name.
    pub port: String,
    /// Where the metrics are.
    pub path: String,
    /// How often they are asked for.
    pub interval: String,
}

/// What the settings ask for.
pub(super) fn render(settings: &Settings) -> Vec<Object> {
    let mut objects = Vec::new();
    if settings.tls {
        objects.extend(certificates(settings));
    }
    if settings.monitoring {
        let spec = PodMonitorSpec {
            selector: settings.selector(),
            pod_metrics_endpoints: vec![MetricsEndpoint {
                port: "http".to_owned(),
                path: "/metrics".to_owned(),
                interval: "15s".to_owned(),
            }],
        };
        objects.push(object(&Custom::new(POD_MONITOR, settings.metadata(""), spec)));
    }
    objects
}

/// An authority of the job's own, and a certificate of it for the coordinator and one for the workers.
fn certificates(settings: &Settings) -> Vec<Object> {
    let (root, authority) = (settings.named("self-signed"), settings.named("ca"));
    let self_signed = IssuerSpec { self_signed: Some(SelfSigned {}), ca: None };
    let by_authority = IssuerSpec { self_signed: None, ca: Some(Ca { secret_name: authority.clone() }) };
    let of_authority = CertificateSpec {
        is_ca: true,
        common_name: Some(authority.clone()),
        // Ten years: it is the job's, and goes with it.
        duration: "87600h".to_owned(),
        renew_before: "8760h".to_owned(),
        ..certificate(&authority, &root)
    };
    let leaf = |role: &str, names: Vec<String>| {
        let spec = CertificateSpec {
            dns_names: names,
            usages: vec!["server auth".to_owned(), "client auth".to_owned()],
            ..certificate(&settings.tls_secret(role), &authority)
        };
        object(&Custom::new(CERTIFICATE, settings.metadata(role), spec))
    };
    vec![
        object(&Custom::new(ISSUER, settings.metadata("self-signed"), self_signed)),
        object(&Custom::new(CERTIFICATE, settings.metadata("ca"), of_authority)),
        object(&Custom::new(ISSUER, settings.metadata("ca"), by_authority)),
        leaf("coordinator", settings.dns_names(&[settings.coordinator_host()])),
        leaf("workers", settings.dns_names(&(0..settings.nodes).map(|n| settings.worker_host(n)).collect::<Vec<_>>())),
    ]
}

fn certificate(secret: &str, issuer: &str) -> CertificateSpec {
    CertificateSpec {
        secret_name: secret.to_owned(),
        duration: "2160h".to_owned(),
        renew_before: "720h".to_owned(),
        private_key: PrivateKey { algorithm: "ECDSA".to_owned(), size: 256, rotation_policy: "Always".to_owned() },
        issuer_ref: IssuerRef {
            name: issuer.to_owned(),
            kind: "Issuer".to_owned(),
            group: "cert-manager.io".to_owned(),
        },
        ..CertificateSpec::default()
    }
}

impl Settings {
    /// The names of pods with these host names: short, and whole where the namespace is known.
    fn dns_names(&self, hosts: &[String]) -> Vec<String> {
        let service = &self.name;
        let mut names: Vec<String> = hosts.iter().map(|host| format!("{host}.{service}")).collect();
        if let Some(namespace) = &self.namespace {
            let whole = format!("{service}.{namespace}.svc");
            names.extend(hosts.iter().map(|host| format!("{host}.{whole}")));
            names.extend(hosts.iter().map(|host| format!("{host}.{whole}.cluster.local")));
        }
        names
    }

    /// The coordinator's pod.
    pub(super) fn coordinator_host(&self) -> String {
        match self.flavor {
            Flavor::IndexedJob => format!("{}-coordinator-0", self.name),
            Flavor::Jobset | Flavor::Trainjob => format!("{}-coordinator-0-0", self.name),
        }
    }

    /// The pod of a node.
    pub(super) fn worker_host(&self, node: u32) -> String {
        match self.flavor {
            Flavor::IndexedJob => format!("{}-workers-{node}", self.name),
            Flavor::Jobset => format!("{}-workers-0-{node}", self.name),
            Flavor::Trainjob => format!("{}-node-0-{node}", self.name),
        }
    }
}
