//! `weightcast k8s render`: a job file becomes manifests.
//!
//! Owns: what the pods will see of the job's paths, and what they need, by the job's plan, which is made here as the coordinator
//! will make it there. Refuses to know: how manifests look.
//! - KR-1: a job whose pods could not find or write a path of it is refused here.

use std::path::{Path, PathBuf};

use serde::Deserialize as _;

use super::prepare::{PrepareError, RESUME_CHUNK_BYTES, RESUME_QUEUE_CHUNKS, prepare_peek};
use crate::config::{ConfigError, JobConfig, ResumePolicy};
use crate::error::{Classify, Kind};
use crate::k8s::{Claim, Flavor, Mount, NameError, Object, RankNeed, Settings, Sizing, check_name, render};
use crate::plan::{Chunking, Input, LoadPlan, TensorPlan};
use crate::store::is_remote;
use crate::train::Method;
use crate::types::{DeviceWish, WorldSize};

/// Threads of a reader where the job says nothing: what the program takes itself on a node of four processors or more. It is
/// said to the coordinator, because what a rank needs depends on it.
const READER_THREADS: u32 = 4;
/// Stands for the job's checkpoints while it is planned: pods may find some, this machine does not look.
const NO_CHECKPOINTS: &str = "/nonexistent/weightcast-checkpoints";
/// The checkpoints that a volume of our own making has room for.
const KEPT_CHECKPOINTS: u64 = 8;
/// What pods have below the root beside mounts.
const TAKEN: [&str; 5] = ["/etc/weightcast", "/state", "/run/weightcast", "/tmp", "/dev"];

/// What is to be rendered.
#[derive(Clone, Debug)]
pub struct RenderRequest {
    /// The job file.
    pub job_file: PathBuf,
    /// The name; the job's, else the file's.
    pub name: Option<String>,
    /// The namespace.
    pub namespace: Option<String>,
    /// Whether the namespace is made too.
    pub makes_namespace: bool,
    /// The container image.
    pub image: String,
    /// What runs the pods.
    pub flavor: Flavor,
    /// Nodes.
    pub nodes: u32,
    /// GPUs of each; 0 for the processor alone.
    pub gpus_per_node: u32,
    /// Ranks on each; one for each GPU, or one.
    pub ranks_per_node: Option<u32>,
    /// What pods see below the first path is on this machine below the second.
    pub here: Vec<(String, PathBuf)>,
    /// Volume claims that exist.
    pub mounts: Vec<Mount>,
    /// A claim that exists, for the job's checkpoint directory; one is made otherwise.
    pub checkpoint_claim: Option<String>,
    /// The size of the one that is made.
    pub checkpoint_size: Option<String>,
    /// How long a checkpoint takes, measured.
    pub checkpoint_seconds: Option<u64>,
    /// What all ranks together write in a second.
    pub checkpoint_bytes_per_second: u64,
    /// The storage class of claims that are made.
    pub storage_class: Option<String>,
    /// The size of the coordinator's.
    pub state_size: String,
    /// Where hub models are kept.
    pub hub_home: Option<String>,
    /// Kueue's queue.
    pub queue: Option<String>,
    /// mTLS with cert-manager.
    pub tls: bool,
    /// A PodMonitor.
    pub monitoring: bool,
    /// A NetworkPolicy.
    pub network_policy: bool,
}

/// A job's manifests.
#[derive(Clone, Debug)]
pub struct Rendered {
    /// What they were made of.
    pub settings: Settings,
    /// The objects.
    pub objects: Vec<Object>,
}

/// Why there are no manifests.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RenderError {
    /// The job file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The plan.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The name.
    #[error("{0}; say another with --name")]
    Name(#[from] NameError),
    /// A path of the job that pods would not find.
    #[error("{key}: {path}: expected {expected}")]
    Path {
        /// The key in the job file, or the flag.
        key: &'static str,
        /// What it is.
        path: String,
        /// What it must be.
        expected: &'static str,
    },
    /// The number of ranks is out of range.
    #[error("{nodes} nodes of {ranks_per_node} ranks: expected 1 to 4096 ranks")]
    Ranks {
        /// Nodes.
        nodes: u32,
        /// Ranks on each.
        ranks_per_node: u32,
    },
}

impl Classify for RenderError {
    fn kind(&self) -> Kind {
        match self {
            Self::Config(source) => source.kind(),
            Self::Prepare(source) => source.kind(),
            Self::Name(_) | Self::Path { .. } | Self::Ranks { .. } => Kind::Conflict,
        }
    }
}

/// Makes the manifests.
///
/// # Errors
/// [`RenderError`].
pub fn render_job(request: RenderRequest) -> Result<Rendered, RenderError> {
    let (text, table) = read(&request.job_file)?;
    let asked = config(table.clone(), &request.job_file)?;
    let ranks_per_node = request.ranks_per_node.unwrap_or_else(|| request.gpus_per_node.max(1));
    let nodes = request.nodes;
    let world = nodes.checked_mul(ranks_per_node).filter(|ranks| *ranks <= 4096);
    let world =
        world.and_then(|ranks| WorldSize::new(ranks).ok()).ok_or(RenderError::Ranks { nodes, ranks_per_node })?;
    let name = name(&request, &asked)?;
    let mut places = Places { mounts: request.mounts.clone(), claims: Vec::new(), reaches_out: false };
    places.take_checkpoints(&request, &asked, &name)?;
    places.check(&request, &asked)?;

    let seen_here = config(seen_from_here(table, &request.here), &request.job_file)?;
    let plan = plan_of(seen_here, &request, world)?;
    let mut sizing = sizing(&plan, asked.checkpoint.directory.is_some());
    (sizing.ranks_per_node, sizing.gpus_per_node) = (ranks_per_node, request.gpus_per_node);
    sizing.checkpoint_seconds = request.checkpoint_seconds;
    sizing.checkpoint_bytes_per_second = request.checkpoint_bytes_per_second;
    if let Some(recipe) = asked.train.as_ref().filter(|recipe| recipe.output.is_some()) {
        (sizing.output_bytes, sizing.output_tensor_bytes) = output(&plan, recipe.method);
    }
    let sizes = sizing.sizes();
    if let Some(claim) = places.claims.first_mut().filter(|claim| claim.size.is_empty()) {
        claim.size = format!("{}Gi", (KEPT_CHECKPOINTS * sizes.checkpoint_bytes).div_ceil(1 << 30).max(10));
    }
    let settings = Settings {
        name,
        namespace: request.namespace,
        makes_namespace: request.makes_namespace,
        image: request.image,
        flavor: request.flavor,
        nodes,
        ranks_per_node,
        gpus_per_node: request.gpus_per_node,
        reader_threads: sizing.reader_threads,
        job_file: text,
        sizes,
        mounts: places.mounts,
        claims: places.claims,
        storage_class: request.storage_class,
        state_size: request.state_size,
        hub_home: request.hub_home,
        reaches_out: places.reaches_out,
        queue: request.queue,
        tls: request.tls,
        monitoring: request.monitoring,
        network_policy: request.network_policy,
    };
    let objects = render(&settings);
    Ok(Rendered { settings, objects })
}

fn read(path: &Path) -> Result<(String, toml::Table), ConfigError> {
    let failed = |message: String| ConfigError::File { path: path.display().to_string(), message };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let table = toml::from_str(&text).map_err(|error: toml::de::Error| failed(error.to_string().trim().to_owned()))?;
    Ok((text, table))
}

/// The job without a directory of its own: what is relative stays so.
fn config(table: toml::Table, path: &Path) -> Result<JobConfig, ConfigError> {
    let failed = |message: String| ConfigError::File { path: path.display().to_string(), message };
    JobConfig::deserialize(table).map_err(|error| failed(error.to_string().trim().to_owned()))
}

fn name(request: &RenderRequest, asked: &JobConfig) -> Result<String, NameError> {
    let stem = || request.job_file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = request.name.clone().or_else(|| asked.job.name.clone()).or_else(stem).unwrap_or_default();
    check_name(&name)?;
    Ok(name)
}

/// Every text that is a path below one of those in `here` becomes what it is on this machine.
fn seen_from_here(table: toml::Table, here: &[(String, PathBuf)]) -> toml::Table {
    fn walk(value: toml::Value, here: &[(String, PathBuf)]) -> toml::Value {
        match value {
            toml::Value::String(text) => toml::Value::String(local(&text, here)),
            toml::Value::Array(all) => toml::Value::Array(all.into_iter().map(|value| walk(value, here)).collect()),
            toml::Value::Table(table) => toml::Value::Table(seen_from_here(table, here)),
            other => other,
        }
    }
    table.into_iter().map(|(key, value)| (key, walk(value, here))).collect()
}

fn local(text: &str, here: &[(String, PathBuf)]) -> String {
    let found = here.iter().find_map(|(seen, local)| Some(local.join(Path::new(text).strip_prefix(seen).ok()?)));
    found.map_or_else(|| text.to_owned(), |path| path.display().to_string())
}

/// The plan that the coordinator will make, of a job that starts from its model.
fn plan_of(mut config: JobConfig, request: &RenderRequest, world: WorldSize) -> Result<LoadPlan, RenderError> {
    let device = if request.gpus_per_node > 0 { DeviceWish::Cuda } else { DeviceWish::Cpu };
    if config.load.device != DeviceWish::Auto && config.load.device != device {
        let found = config.load.device.name().to_owned();
        let expected = "what --gpus-per-node says: cuda with GPUs, cpu without, or auto";
        return Err(ConfigError::Value { key: "load.device", expected, found }.into());
    }
    config.load.device = device;
    if !config.model.source.as_deref().is_some_and(is_remote) {
        config.load.reader_threads.get_or_insert(READER_THREADS);
    }
    config.load.cache = None;
    config.checkpoint.resume = ResumePolicy::Never;
    if config.checkpoint.directory.is_some() {
        config.checkpoint.directory = Some(NO_CHECKPOINTS.into());
    }
    if let Some(recipe) = &mut config.train {
        recipe.output = None;
    }
    config.check_streaming()?;
    // The nodes' memory is not known: whether they have it, the scheduler decides by what the pods ask for.
    Ok(prepare_peek(&config, world, None)?.0.plan)
}

/// What ranks and checkpoints take. A job that has checkpoints may start from one, and then every rank reads.
fn sizing(plan: &LoadPlan, has_checkpoints: bool) -> Sizing {
    let state = plan.train.as_ref().map(|train| &train.state);
    let saved = state.unwrap_or(plan);
    let resumed = if has_checkpoints { resumed_window(saved) } else { 0 };
    let ranks = plan.world.ranks().map(|rank| {
        let memory = plan.memory(rank);
        let counted = memory.window_bytes.max(memory.training_bytes);
        let host_bytes = memory.peak_host_bytes - counted + counted.max(resumed);
        RankNeed { host_bytes, device_bytes: memory.peak_device_bytes }
    });
    Sizing {
        ranks: ranks.collect(),
        reader_threads: plan.chunking.reader_threads,
        checkpoint_bytes: if has_checkpoints { saved.tensors.iter().map(bytes).sum() } else { 0 },
        ..Sizing::default()
    }
}

/// What a rank has in flight that reads a checkpoint of this plan.
fn resumed_window(saved: &LoadPlan) -> u64 {
    let stored = |tensor: &TensorPlan| TensorPlan {
        input: Input::Stored { parts: Vec::new(), nested_offset: None },
        ..tensor.clone()
    };
    let chunking = Chunking { chunk_bytes: RESUME_CHUNK_BYTES, queue_chunks: RESUME_QUEUE_CHUNKS, ..saved.chunking };
    LoadPlan { chunking, tensors: saved.tensors.iter().map(stored).collect(), ..saved.clone() }.window_bytes()
}

fn bytes(tensor: &TensorPlan) -> u64 {
    tensor.components().iter().map(|component| component.bytes).sum()
}

/// What the coordinator writes of a run that is done, in f32: all, and the largest tensor.
fn output(plan: &LoadPlan, method: Method) -> (u64, u64) {
    let state = plan.train.as_ref().map_or(&[][..], |train| &train.state.tensors);
    // Parameters come first, then their two moments.
    let written = if method == Method::Full { &plan.tensors[..] } else { state.get(..state.len() / 3).unwrap_or(&[]) };
    let sizes = written.iter().map(|tensor| tensor.elements().saturating_mul(4));
    (sizes.clone().sum(), sizes.max().unwrap_or(0))
}

/// What pods see of the file system, and what they need of it.
struct Places {
    mounts: Vec<Mount>,
    claims: Vec<Claim>,
    reaches_out: bool,
}

impl Places {
    /// The checkpoint directory is a claim's, where no mount has it.
    fn take_checkpoints(&mut self, request: &RenderRequest, asked: &JobConfig, name: &str) -> Result<(), RenderError> {
        let Some(directory) = asked.checkpoint.directory.as_deref().filter(|directory| !is_remote(directory)) else {
            return match &request.checkpoint_claim {
                Some(claim) => {
                    let expected = "a job with a local checkpoint.directory, which it would be mounted at";
                    Err(RenderError::Path { key: "--checkpoint-claim", path: claim.clone(), expected })
                }
                None => Ok(()),
            };
        };
        if self.mount_of(directory).is_some() {
            return Ok(());
        }
        let claim = request.checkpoint_claim.clone().unwrap_or_else(|| {
            let made = format!("{name}-checkpoints");
            let size = request.checkpoint_size.clone().unwrap_or_default();
            self.claims.push(Claim { name: made.clone(), size, is_shared: true });
            made
        });
        self.mounts.push(Mount { claim, path: directory.display().to_string(), read_only: false });
        Ok(())
    }

    fn mount_of(&self, path: &Path) -> Option<&Mount> {
        self.mounts.iter().find(|mount| path.starts_with(&mount.path))
    }

    /// Looks at every path of the job.
    fn check(&mut self, request: &RenderRequest, asked: &JobConfig) -> Result<(), RenderError> {
        for mount in &self.mounts {
            let is_taken = TAKEN.iter().any(|taken| Path::new(&mount.path).starts_with(taken)) || mount.path == "/";
            if is_taken || !mount.path.starts_with('/') {
                let expected = "an absolute path that is not the program's own (/, /etc/weightcast, /state, /run/weightcast, \
                                /tmp, /dev)";
                return Err(RenderError::Path { key: "mount", path: mount.path.clone(), expected });
            }
        }
        let others = asked.models.values().map(|model| ("models.source", &model.source));
        for (key, source) in asked.model.source.iter().map(|source| ("model.source", source)).chain(others) {
            if is_remote(source) {
                self.reaches_out = true;
            } else if source.starts_with(['/', '.', '~']) {
                self.expect(key, Path::new(source), Use::Read)?;
            } else if let Some(home) = &request.hub_home {
                self.reaches_out = true;
                self.expect("--hub-home", Path::new(home), Use::Write)?;
            } else {
                let expected = "--hub-home PATH below a --mount, because all pods read what the coordinator fetches from a hub; \
                                or an absolute path below a --mount";
                return Err(RenderError::Path { key, path: source.clone(), expected });
            }
        }
        let path = |key, path: &Option<PathBuf>, how| path.clone().map(|path| (key, path, how));
        let mut paths = vec![
            path("checkpoint.directory", &asked.checkpoint.directory, Use::Write),
            path("load.cache", &asked.load.cache, Use::Write),
        ];
        if let Some(recipe) = &asked.train {
            paths.push(path("train.output", &recipe.output, Use::Write));
            paths.push(path("train.tokenizer", &recipe.tokenizer, Use::Read));
            paths.push(path("train.lora.adapter", &recipe.lora.adapter, Use::Read));
            let data = recipe.data.train.iter().chain(&recipe.data.evaluation);
            paths.extend(data.map(|file| Some(("train.data", file.clone(), Use::Read))));
        }
        for (key, path, how) in paths.into_iter().flatten() {
            if is_remote(&path) {
                self.reaches_out = true;
            } else {
                self.expect(key, &path, how)?;
            }
        }
        Ok(())
    }

    fn expect(&self, key: &'static str, path: &Path, how: Use) -> Result<(), RenderError> {
        let expected = match (path.is_absolute(), self.mount_of(path), how) {
            (false, ..) => "an absolute path, as pods see it",
            (_, None, _) => "a path below a --mount CLAIM=PATH, which pods have",
            (_, Some(mount), Use::Write) if mount.read_only => {
                "a path below a --mount that is not :ro, because it is written to"
            }
            _ => return Ok(()),
        };
        Err(RenderError::Path { key, path: path.display().to_string(), expected })
    }
}

/// What pods do with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Read,
    Write,
}
