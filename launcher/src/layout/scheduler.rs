//! What the scheduler that started this launcher says about the job.
//!
//! Owns: the variables of JobSet and indexed Jobs, LeaderWorkerSet, Slurm, Open MPI and PMI, looked for in this order.
//! Refuses to know: the launcher's flags, which override all of it.
//! - A scheduler starts either one launcher per node, or one launcher per rank (`srun -n 8`, `mpirun -np 8`): then the
//!   launcher starts one rank, whose place on the node is [`Task`].

use super::hostlist;
use crate::environment::Environment;
use crate::error::LaunchError;

/// One launcher among those that the scheduler started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Which scheduler, in words.
    pub(crate) source: &'static str,
    /// Launchers of the job, when the scheduler says so.
    pub(crate) nnodes: Option<u32>,
    /// Which of them this is.
    pub(crate) node_rank: u32,
    /// Where rank 0 runs.
    pub(crate) master_addr: Option<String>,
    /// What tells this job from others that may run on rank 0's host at the same time, where hosts are shared.
    pub(crate) sharer: u32,
    /// The scheduler's id of the job.
    pub(crate) run_id: Option<String>,
    /// Present when the scheduler starts one launcher per rank.
    pub(crate) task: Option<Task>,
}

/// The place of a single rank on its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    /// Its index on the node.
    pub(crate) local_rank: u32,
    /// Ranks on the node.
    pub(crate) local_world_size: u32,
}

/// Finds the scheduler's description of this launcher.
pub(crate) fn find(environment: &Environment) -> Result<Option<Placement>, LaunchError> {
    for reader in [jobset, leader_worker_set, slurm, open_mpi, pmi] {
        if let Some(placement) = reader(environment)? {
            return Ok(Some(placement));
        }
    }
    Ok(None)
}

/// Job controller and JobSet: `JOB_COMPLETION_INDEX`; the pod's host name is `<jobset>-<job>-<job index>-<index>`, and the
/// subdomain of its siblings comes from the annotation `jobset.sigs.k8s.io/coordinator` (by the downward API in
/// `WEIGHTCAST_COORDINATOR`) or from the JobSet's name (`JOBSET_NAME`).
fn jobset(environment: &Environment) -> Result<Option<Placement>, LaunchError> {
    let Some(node_rank) = number(environment, "JOB_COMPLETION_INDEX")? else { return Ok(None) };
    let coordinator = environment.get("WEIGHTCAST_COORDINATOR").and_then(|host| Some(host.split_once('.')?.1));
    let subdomain = coordinator.or_else(|| environment.get("JOBSET_NAME"));
    // The subdomain carries no port, the annotation may.
    let subdomain = subdomain.map(|name| name.split(':').next().unwrap_or(name));
    let stem = environment.hostname.split('.').next().and_then(|host| host.strip_suffix(&format!("-{node_rank}")));
    let master_addr = stem.zip(subdomain).map(|(stem, subdomain)| format!("{stem}-0.{subdomain}"));
    let run_id = environment.get("JOBSET_NAME").map(str::to_owned);
    Ok(Some(Placement {
        source: "JOB_COMPLETION_INDEX",
        nnodes: None,
        node_rank,
        master_addr,
        sharer: 0,
        run_id,
        task: None,
    }))
}

fn leader_worker_set(environment: &Environment) -> Result<Option<Placement>, LaunchError> {
    let Some(leader) = environment.get("LWS_LEADER_ADDRESS") else { return Ok(None) };
    let node_rank = required(environment, "LWS_WORKER_INDEX")?;
    let nnodes = Some(required(environment, "LWS_GROUP_SIZE")?);
    let run_id = leader.split('.').next().map(str::to_owned);
    let master_addr = Some(leader.to_owned());
    Ok(Some(Placement { source: "LWS_LEADER_ADDRESS", nnodes, node_rank, master_addr, sharer: 0, run_id, task: None }))
}

/// A step that `srun` started. In a batch script outside of `srun` there is no step, and the script's launcher is alone.
fn slurm(environment: &Environment) -> Result<Option<Placement>, LaunchError> {
    const SOURCE: &str = "SLURM_STEP_NODELIST";
    let Some(list) = environment.get(SOURCE) else { return Ok(None) };
    let hosts = hostlist::expand(list).ok_or_else(|| LaunchError::BadValue {
        origin: SOURCE.to_owned(),
        expected: "a list of hosts such as node[01-03,07]",
        found: list.to_owned(),
    })?;
    let either = |step: &str, job: &str| match number(environment, step)? {
        Some(count) => Ok(Some(count)),
        None => number(environment, job),
    };
    let nodes = either("SLURM_STEP_NUM_NODES", "SLURM_NNODES")?;
    let nodes = nodes.unwrap_or_else(|| u32::try_from(hosts.len()).unwrap_or(u32::MAX));
    let tasks = either("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")?.unwrap_or(nodes);
    let (master_addr, run_id) = (hosts.first().cloned(), environment.get("SLURM_JOB_ID").map(str::to_owned));
    // Jobs and steps that follow each other have numbers that do.
    let of = |name| Ok(number(environment, name)?.unwrap_or(0));
    let sharer = of("SLURM_JOB_ID")?.wrapping_add(of("SLURM_STEP_ID")?);
    if tasks <= nodes {
        let node_rank = required(environment, "SLURM_NODEID")?;
        let nnodes = Some(nodes);
        return Ok(Some(Placement { source: SOURCE, nnodes, node_rank, master_addr, sharer, run_id, task: None }));
    }
    let (node_rank, local_rank) = (required(environment, "SLURM_PROCID")?, required(environment, "SLURM_LOCALID")?);
    let node = usize::try_from(required(environment, "SLURM_NODEID")?).unwrap_or(usize::MAX);
    let per_node = environment.get("SLURM_STEP_TASKS_PER_NODE").or_else(|| environment.get("SLURM_TASKS_PER_NODE"));
    let local_world_size = per_node.and_then(|text| tasks_of_node(text, node)).unwrap_or_else(|| tasks.div_ceil(nodes));
    let task = Some(Task { local_rank, local_world_size });
    Ok(Some(Placement { source: SOURCE, nnodes: Some(tasks), node_rank, master_addr, sharer, run_id, task }))
}

/// Slurm's `4(x2),3`: two nodes of four tasks, one of three.
fn tasks_of_node(text: &str, node: usize) -> Option<u32> {
    let mut before = 0_usize;
    for group in text.split(',') {
        let (tasks, repeat) = match group.split_once("(x") {
            Some((tasks, repeat)) => (tasks, repeat.strip_suffix(')')?.parse().ok()?),
            None => (group, 1_usize),
        };
        before = before.checked_add(repeat)?;
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

fn open_mpi(environment: &Environment) -> Result<Option<Placement>, LaunchError> {
    const SOURCE: &str = "OMPI_COMM_WORLD_RANK";
    let Some(node_rank) = number(environment, SOURCE)? else { return Ok(None) };
    let size = required(environment, "OMPI_COMM_WORLD_SIZE")?;
    let local_rank = required(environment, "OMPI_COMM_WORLD_LOCAL_RANK")?;
    let local_world_size = required(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")?;
    let run_id = environment.get("PMIX_NAMESPACE").map(str::to_owned);
    let task = Some(Task { local_rank, local_world_size });
    let master_addr = (local_world_size == size).then(|| "127.0.0.1".to_owned());
    Ok(Some(Placement { source: SOURCE, nnodes: Some(size), node_rank, master_addr, sharer: 0, run_id, task }))
}

/// MPICH's Hydra and other users of PMI.
fn pmi(environment: &Environment) -> Result<Option<Placement>, LaunchError> {
    const SOURCE: &str = "PMI_RANK";
    let Some(node_rank) = number(environment, SOURCE)? else { return Ok(None) };
    let size = required(environment, "PMI_SIZE")?;
    let local_rank = number(environment, "MPI_LOCALRANKID")?.unwrap_or(node_rank);
    let local_world_size = number(environment, "MPI_LOCALNRANKS")?.unwrap_or(size);
    let master_addr = (local_world_size == size).then(|| "127.0.0.1".to_owned());
    let task = Some(Task { local_rank, local_world_size });
    Ok(Some(Placement { source: SOURCE, nnodes: Some(size), node_rank, master_addr, sharer: 0, run_id: None, task }))
}

fn number(environment: &Environment, name: &str) -> Result<Option<u32>, LaunchError> {
    let Some(text) = environment.get(name) else { return Ok(None) };
    let bad = || LaunchError::BadValue { origin: name.to_owned(), expected: "a number", found: text.to_owned() };
    text.trim().parse().map(Some).map_err(|_| bad())
}

fn required(environment: &Environment, name: &str) -> Result<u32, LaunchError> {
    let missing = || LaunchError::BadValue { origin: name.to_owned(), expected: "a number", found: String::new() };
    number(environment, name)?.ok_or_else(missing)
}
