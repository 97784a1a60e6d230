//! Which ranks this launcher starts, and their place in the world.
//!
//! Owns: [`Layout`] and [`resolve`], a pure function of the flags and the environment.
//! Refuses to know: processes and sockets. Order of precedence, value by value: flag, `PET_*`, scheduler, `MASTER_*`.
//!
//! - LY-1: an absent value is an error that names its flag, never a silent fall-back to localhost or to one node.

mod hostlist;
mod scheduler;

use serde::Serialize;

use crate::args::LaunchArgs;
use crate::environment::Environment;
use crate::error::LaunchError;
use crate::settings::{Setting, is_on};
use scheduler::{Placement, Task};

/// The port of the rendezvous when `--rdzv-endpoint` names none: torchrun's.
const ENDPOINT_PORT: u16 = 29_400;
/// The port of the rendezvous when it is derived from rank 0's address: not torchrun's `MASTER_PORT` (29500), and not that
/// of a coordinator on the same host (29400, 29401).
const DERIVED_PORT: u16 = 29_402;
/// Where a scheduler lets jobs share hosts, theirs follow it: as many ports, up to torchrun's `MASTER_PORT`.
const DERIVED_PORTS: u32 = 98;
/// No launcher starts more ranks.
const RANKS_LIMIT: u32 = 4096;

/// The place of this launcher's ranks in the world. With several nodes, what is said here of ranks holds for nodes of equal
/// size; the rendezvous has the last word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Layout {
    /// The smallest number of nodes that the job may run on.
    pub nnodes_min: u32,
    /// The number of nodes that the job wants.
    pub nnodes: u32,
    /// Which node this is; `None` when the rendezvous decides.
    pub node_rank: Option<u32>,
    /// Ranks that this launcher starts.
    pub nproc_per_node: u32,
    /// The local rank of the first of them: not 0 only when a scheduler starts one launcher per rank.
    pub first_local_rank: u32,
    /// Ranks of this host, started by this launcher or by its siblings.
    pub local_world_size: u32,
    /// The rank of the first of them.
    pub first_rank: u32,
    /// Ranks of the job.
    pub world_size: u32,
    /// The address of rank 0; `None` when the rendezvous decides.
    pub master_addr: Option<String>,
    /// The port for rank 0; `None` for a free one.
    pub master_port: Option<u16>,
    /// The id of the job.
    pub run_id: String,
    /// The name of the role.
    pub role: String,
    /// The name of this host.
    pub hostname: String,
    /// Where the nodes meet; `None` for one node.
    pub endpoint: Option<Endpoint>,
    /// What decided, in words.
    pub source: String,
}

/// The place of a process that a scheduler started as one rank, without a launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledRank {
    /// Its rank in the job.
    pub rank: u32,
    /// Ranks of the job.
    pub world_size: u32,
    /// Its index on its host.
    pub local_rank: u32,
    /// Ranks of its host.
    pub local_world_size: u32,
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// A name or an address.
    pub host: String,
    /// A TCP port.
    pub port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// The place that the scheduler gave to this process as one rank (`srun weightcast worker`); nothing where there is no scheduler,
/// or one that does not say how many it has started.
///
/// # Errors
/// [`LaunchError::BadValue`] for a variable of the scheduler that does not parse.
pub fn scheduled_rank(environment: &Environment) -> Result<Option<ScheduledRank>, LaunchError> {
    let Some(placement) = scheduler::find(environment)? else { return Ok(None) };
    let (rank, task) = (placement.node_rank, placement.task);
    let (local_rank, local_world_size) = task.map_or((0, 1), |task| (task.local_rank, task.local_world_size));
    Ok(placement.nnodes.map(|world_size| ScheduledRank { rank, world_size, local_rank, local_world_size }))
}

/// Decides the layout.
///
/// # Errors
/// [`LaunchError::BadValue`] for a value that does not parse, [`LaunchError::Unknown`] for one that is needed and absent,
/// [`LaunchError::Usage`] for values that exclude each other.
pub fn resolve(args: &LaunchArgs, environment: &Environment) -> Result<Layout, LaunchError> {
    let setting = |flag: &str, given: &Option<String>| Setting::find(flag, given.as_deref(), environment);
    let standalone = is_on("--standalone", args.standalone, environment)?;
    let given_nodes = match setting("--nnodes", &args.nnodes) {
        Some(setting) => Some(setting.parse("a number of nodes, or MIN:MAX", node_range)?),
        None => None,
    };
    let given_rank = match setting("--node-rank", &args.node_rank) {
        Some(setting) => Some(setting.parse("a number", |text| text.parse().ok())?),
        None => None,
    };
    let placement = if standalone { None } else { scheduler::find(environment)? };
    let (nnodes_min, nnodes) = nodes(standalone, given_nodes, placement.as_ref())?;
    // A launcher that stands for one node of the only one is node 0, whatever it is in the scheduler's larger world.
    let node_rank =
        if nnodes == 1 { Some(0) } else { given_rank.or_else(|| placement.as_ref().map(|place| place.node_rank)) };
    if let Some(rank) = node_rank.filter(|rank| *rank >= nnodes) {
        return Err(LaunchError::Usage {
            message: format!("node rank {rank} is not below the number of nodes, {nnodes}"),
        });
    }
    let task = placement.as_ref().and_then(|place| place.task).filter(|_| nnodes > 1);
    let wanted = setting("--nproc-per-node", &args.nproc_per_node).or_else(|| {
        let text = args.default_nproc_per_node.filter(|_| task.is_none())?.to_string();
        Some(Setting { origin: "the job".to_owned(), text })
    });
    let nproc_per_node = ranks_here(wanted, task, environment)?;
    let world_size = nnodes.checked_mul(nproc_per_node).ok_or_else(too_many_ranks)?;

    // What the scheduler and MASTER_* say of a larger job is not for one node that stands aside from it.
    let among_others = |name: &str| environment.get(name).filter(|_| nnodes > 1);
    let from_scheduler = placement.as_ref().filter(|_| nnodes > 1).and_then(|place| place.master_addr.clone());
    let master_addr = setting("--master-addr", &args.master_addr).map(|setting| setting.text);
    let master_addr = master_addr.or(from_scheduler).or_else(|| among_others("MASTER_ADDR").map(str::to_owned));
    let master_addr = master_addr.or_else(|| (nnodes == 1).then(|| "127.0.0.1".to_owned()));
    let master_port = setting("--master-port", &args.master_port).or_else(|| {
        let text = among_others("MASTER_PORT")?.to_owned();
        Some(Setting { origin: "MASTER_PORT".to_owned(), text })
    });
    let master_port = match master_port {
        Some(setting) => Some(setting.parse("a port", |text| text.parse::<u16>().ok())?).filter(|port| *port != 0),
        None => None,
    };
    let endpoint = match setting("--rdzv-endpoint", &args.rdzv_endpoint).filter(|_| nnodes > 1) {
        Some(setting) => Some(setting.parse("HOST[:PORT]", endpoint_of)?),
        None if args.has_coordinator && node_rank.is_some() => None,
        None => {
            let sharer = placement.as_ref().map_or(0, |place| place.sharer);
            let port = DERIVED_PORT + u16::try_from(sharer % DERIVED_PORTS).unwrap_or(0);
            master_addr.clone().filter(|_| nnodes > 1).map(|host| Endpoint { host, port })
        }
    };
    let source = words(standalone, given_nodes.is_some(), args, placement.as_ref());
    if nnodes > 1 && endpoint.is_none() && !(args.has_coordinator && node_rank.is_some()) {
        return Err(LaunchError::Unknown {
            source_words: source,
            missing: "the address where the nodes meet",
            flag: "--rdzv-endpoint or --master-addr",
        });
    }
    Ok(Layout {
        nnodes_min,
        nnodes,
        node_rank,
        nproc_per_node,
        first_local_rank: task.map_or(0, |task| task.local_rank),
        local_world_size: task.map_or(nproc_per_node, |task| task.local_world_size),
        first_rank: node_rank.unwrap_or(0).checked_mul(nproc_per_node).ok_or_else(too_many_ranks)?,
        world_size,
        master_addr,
        master_port,
        run_id: run_id(setting("--rdzv-id", &args.rdzv_id), placement.as_ref(), nnodes, environment),
        role: setting("--role", &args.role).map_or_else(|| "default".to_owned(), |setting| setting.text),
        hostname: environment.hostname.clone(),
        endpoint,
        source,
    })
}

/// The range of nodes, smallest and wanted.
fn nodes(
    standalone: bool,
    given: Option<(u32, u32)>,
    placement: Option<&Placement>,
) -> Result<(u32, u32), LaunchError> {
    match (standalone, given, placement) {
        (true, Some((_, most)), _) if most > 1 => {
            Err(LaunchError::Usage { message: format!("--standalone means one node, but {most} are asked for") })
        }
        (true, ..) | (false, None, None) => Ok((1, 1)),
        (false, Some(range), _) => Ok(range),
        (false, None, Some(place)) => match place.nnodes {
            Some(count) => Ok((count, count)),
            None => Err(LaunchError::Unknown {
                source_words: format!("{} is set", place.source),
                missing: "the number of nodes",
                flag: "--nnodes, or --standalone for one",
            }),
        },
    }
}

/// Ranks that this launcher starts.
fn ranks_here(setting: Option<Setting>, task: Option<Task>, environment: &Environment) -> Result<u32, LaunchError> {
    let is_number = setting.as_ref().is_some_and(|setting| setting.text.trim() != "auto");
    if task.is_some() && !is_number {
        return Ok(1);
    }
    let Some(setting) = setting else { return Ok(1) };
    let origin = setting.origin.clone();
    let count = setting.parse("a number of ranks, auto, cpu or gpu", |text| match text {
        "auto" => Some(if environment.gpus > 0 { environment.gpus } else { environment.processors }),
        "cpu" => Some(environment.processors),
        "gpu" => Some(environment.gpus),
        number => number.parse().ok().filter(|count| (1..=RANKS_LIMIT).contains(count)),
    })?;
    match (count, task) {
        (0, _) => Err(LaunchError::Unknown {
            source_words: origin,
            missing: "a GPU of this node",
            flag: "--nproc-per-node N",
        }),
        (2.., Some(_)) => Err(LaunchError::Usage {
            message: format!("{origin} asks for {count} ranks, but the scheduler already starts one launcher per rank"),
        }),
        (count, _) => Ok(count),
    }
}

fn run_id(given: Option<Setting>, placement: Option<&Placement>, nnodes: u32, environment: &Environment) -> String {
    let given = given.map(|setting| setting.text).or_else(|| placement.and_then(|place| place.run_id.clone()));
    // Nodes must agree on the id, so several of them cannot draw one; torchrun's word for it is `none`.
    given.unwrap_or_else(|| if nnodes > 1 { "none".to_owned() } else { format!("{:016x}", environment.nonce) })
}

fn words(standalone: bool, nodes_given: bool, args: &LaunchArgs, placement: Option<&Placement>) -> String {
    let base = match (standalone, placement) {
        (true, _) => "--standalone".to_owned(),
        (false, Some(place)) => place.source.to_owned(),
        (false, None) if !nodes_given => return "the default, one node".to_owned(),
        (false, None) => return if args.nnodes.is_some() { "flags".to_owned() } else { "PET_* variables".to_owned() },
    };
    if nodes_given { format!("{base}, with the number of nodes from flags or PET_* variables") } else { base }
}

fn too_many_ranks() -> LaunchError {
    LaunchError::Usage { message: "the number of ranks does not fit 32 bits".to_owned() }
}

fn node_range(text: &str) -> Option<(u32, u32)> {
    let (least, most) = text.split_once(':').unwrap_or((text, text));
    let (least, most) = (least.parse::<u32>().ok()?, most.parse::<u32>().ok()?);
    (least >= 1 && least <= most).then_some((least, most))
}

fn endpoint_of(text: &str) -> Option<Endpoint> {
    if let Some((host, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        let port = if rest.is_empty() { ENDPOINT_PORT } else { rest.strip_prefix(':')?.parse().ok()? };
        return Some(Endpoint { host: host.to_owned(), port });
    }
    let (host, port) = match text.split_once(':') {
        // More than one colon is an IPv6 address without a port.
        Some((_, port)) if port.contains(':') => (text, ENDPOINT_PORT),
        Some((host, port)) => (host, port.parse().ok()?),
        None => (text, ENDPOINT_PORT),
    };
    (!host.is_empty()).then(|| Endpoint { host: host.to_owned(), port })
}
