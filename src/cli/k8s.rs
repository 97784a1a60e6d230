//! `weightcast k8s`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use super::output::{bytes, data, fail, refuse, say};
use crate::app::{RenderRequest, Rendered, read_manifests, render_job, write_manifests};
use crate::k8s::{Flavor, Mount, check_name, differences, write};

/// Manifests differ.
const EXIT_DIFFERENT: u8 = 1;

/// `weightcast k8s …`
#[derive(Debug, Subcommand)]
pub enum K8sCommand {
    /// Print the manifests of a job, with memory and grace periods from its plan
    Render(Box<RenderFlags>),
}

/// `weightcast k8s render`
#[derive(Debug, Args)]
pub struct RenderFlags {
    /// The job file; its paths are those that pods see
    pub job_file: PathBuf,
    /// The name of the set and of all else [default: the job's, or the file's]
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// The namespace [default: where it is applied]
    #[arg(long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Make the namespace too, with Pod Security's "restricted"
    #[arg(long, requires = "namespace")]
    pub create_namespace: bool,
    /// The container image
    #[arg(long, value_name = "IMAGE", default_value = "weightcast:latest")]
    pub image: String,
    /// What runs the pods
    #[arg(long, value_enum, default_value_t)]
    pub flavor: FlavorFlag,
    /// Nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub nodes: u32,
    /// GPUs of each node; 0 for the processor alone
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus_per_node: u32,
    /// Ranks on each node [default: one for each GPU, or one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub ranks_per_node: Option<u32>,
    /// A volume claim that exists, and where pods see it; `:ro` where nobody writes
    #[arg(long, value_name = "CLAIM=PATH[:ro]", value_parser = parse_mount)]
    pub mount: Vec<Mount>,
    /// What pods see at PATH is on this machine at DIR, where the plan is made
    #[arg(long, value_name = "PATH=DIR", value_parser = parse_here)]
    pub here: Vec<(String, PathBuf)>,
    /// Where pods keep models of a hub: a path below a mount
    #[arg(long, value_name = "PATH")]
    pub hub_home: Option<String>,
    /// A volume claim that exists, for the job's checkpoints [default: one is made]
    #[arg(long, value_name = "CLAIM")]
    pub checkpoint_claim: Option<String>,
    /// The size of the claim that is made [default: eight checkpoints, 10Gi at least]
    #[arg(long, value_name = "SIZE", conflicts_with = "checkpoint_claim")]
    pub checkpoint_size: Option<String>,
    /// How long a checkpoint takes, measured; the pods' grace is that and 30 s
    #[arg(long, value_name = "S")]
    pub checkpoint_seconds: Option<u64>,
    /// What all ranks together write in a second, in MiB, where it was not measured
    #[arg(long, value_name = "MIB", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub checkpoint_rate_mib: u64,
    /// The storage class of claims that are made [default: the cluster's]
    #[arg(long, value_name = "NAME")]
    pub storage_class: Option<String>,
    /// The size of the coordinator's journal
    #[arg(long, value_name = "SIZE", default_value = "1Gi")]
    pub state_size: String,
    /// Kueue's queue
    #[arg(long, value_name = "NAME")]
    pub queue: Option<String>,
    /// mTLS, with certificates of cert-manager
    #[arg(long)]
    pub tls: bool,
    /// Metrics for the Prometheus operator
    #[arg(long)]
    pub monitoring: bool,
    /// Let pods speak with each other, DNS and Prometheus alone
    #[arg(long)]
    pub network_policy: bool,
    /// Print what differs from manifests, key by key, instead of the manifests; exit code 1 when something does
    #[arg(long, requires = "against", conflicts_with = "output")]
    pub diff: bool,
    /// A file or directory of manifests
    #[arg(long, value_name = "PATH", requires = "diff")]
    pub against: Option<PathBuf>,
    /// Write to a file, or to a directory with a kustomization (one that exists, or ends with /) [default: stdout]
    #[arg(long, short = 'o', value_name = "FILE|DIR/")]
    pub output: Option<PathBuf>,
}

/// What runs the pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FlavorFlag {
    /// A JobSet
    #[default]
    Jobset,
    /// Two Jobs, where there is no JobSet
    IndexedJob,
    /// A TrainJob of Kubeflow Trainer
    Trainjob,
}

fn parse_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

fn parse_mount(text: &str) -> Result<Mount, String> {
    let (claim, path) = pair(text, "CLAIM=PATH or CLAIM=PATH:ro")?;
    let (path, read_only) = path.strip_suffix(":ro").map_or((path, false), |path| (path, true));
    Ok(Mount { claim: claim.to_owned(), path: path.to_owned(), read_only })
}

fn parse_here(text: &str) -> Result<(String, PathBuf), String> {
    let (seen, local) = pair(text, "PATH=DIR")?;
    Ok((seen.to_owned(), PathBuf::from(local)))
}

fn pair<'a>(text: &'a str, expected: &str) -> Result<(&'a str, &'a str), String> {
    let found = text.split_once('=').filter(|(one, other)| !one.is_empty() && !other.is_empty());
    found.ok_or_else(|| format!("expected {expected}"))
}

pub(super) fn run(command: &K8sCommand) -> u8 {
    let K8sCommand::Render(flags) = command;
    let rendered = match render_job(request(flags)) {
        Ok(rendered) => rendered,
        Err(error) => return refuse(&error),
    };
    if let Some(path) = &flags.against {
        return compare(&rendered, path);
    }
    let head = head(&rendered);
    match &flags.output {
        None => data(&format!("{head}{}", write(&rendered.objects).trim_end())),
        Some(path) => {
            if let Err(error) = write_manifests(path, &head, &rendered.objects) {
                return fail(&error);
            }
        }
    }
    explain(&rendered);
    0
}

fn request(flags: &RenderFlags) -> RenderRequest {
    RenderRequest {
        job_file: flags.job_file.clone(),
        name: flags.name.clone(),
        namespace: flags.namespace.clone(),
        makes_namespace: flags.create_namespace,
        image: flags.image.clone(),
        flavor: match flags.flavor {
            FlavorFlag::Jobset => Flavor::Jobset,
            FlavorFlag::IndexedJob => Flavor::IndexedJob,
            FlavorFlag::Trainjob => Flavor::Trainjob,
        },
        nodes: flags.nodes,
        gpus_per_node: flags.gpus_per_node,
        ranks_per_node: flags.ranks_per_node,
        here: flags.here.clone(),
        mounts: flags.mount.clone(),
        checkpoint_claim: flags.checkpoint_claim.clone(),
        checkpoint_size: flags.checkpoint_size.clone(),
        checkpoint_seconds: flags.checkpoint_seconds,
        checkpoint_bytes_per_second: flags.checkpoint_rate_mib << 20,
        storage_class: flags.storage_class.clone(),
        state_size: flags.state_size.clone(),
        hub_home: flags.hub_home.clone(),
        queue: flags.queue.clone(),
        tls: flags.tls,
        monitoring: flags.monitoring,
        network_policy: flags.network_policy,
    }
}

/// What a reader of the manifests must do that they do not say.
fn head(rendered: &Rendered) -> String {
    let settings = &rendered.settings;
    let into = settings.namespace.as_ref().map_or_else(String::new, |namespace| format!(" --namespace {namespace}"));
    format!(
        "# Made by `weightcast k8s render`. Before it is applied, make the job's token, which stands in no manifest:\n\
         #   kubectl create secret generic {}{into} --from-literal=token=\"$(openssl rand -hex 32)\"\n",
        settings.token_secret()
    )
}

/// The numbers behind the pods' requests, for people.
fn explain(rendered: &Rendered) {
    let sizes = &rendered.settings.sizes;
    say(&format!(
        "a worker pod asks for {}: {} for its ranks as planned, the launcher, 10 % beside, and {} of shared memory",
        bytes(sizes.worker_memory_bytes),
        bytes(sizes.planned_bytes),
        bytes(sizes.shared_memory_bytes)
    ));
    if sizes.device_bytes > 0 {
        say(&format!("a rank takes {} of its GPU", bytes(sizes.device_bytes)));
    }
    say(&format!(
        "a checkpoint has {}; pods have {} s to end",
        bytes(sizes.checkpoint_bytes),
        sizes.worker_grace_seconds
    ));
}

fn compare(rendered: &Rendered, path: &Path) -> u8 {
    let found = match read_manifests(path) {
        Ok(found) => found,
        Err(error) => return fail(&error),
    };
    let all = differences(&rendered.objects, &found);
    for difference in &all {
        data(&difference.to_string());
    }
    if all.is_empty() { 0 } else { EXIT_DIFFERENT }
}
