//! The worker: the process of one rank. It joins, does what the coordinator's snapshots say, and reports.
//!
//! Owns: the session with the coordinator, and the thread that owns communicator and shards.
//! Refuses to know: who decides what is done, and the launcher that started it.
//!
//! `WK-1`: snapshots are levels, not edges: the worker compares what it should be doing with what it has done, so a
//! snapshot that is repeated, or missed because a later one came, changes nothing.

mod calls;
mod data;
mod error;
mod figures;
mod joining;
mod leaving;
mod models;
mod plane;
mod proc_stat;
mod renewing;
mod reports;
mod session;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use error::WorkerError;
pub(crate) use proc_stat::peak_resident_bytes;
pub use session::{Ended, run};

use crate::device::LocalRank;
use crate::rpc::Token;
use crate::tls::Tls;
use crate::types::{DeviceWish, Rank, Sharing, WorldSize};

/// What a worker is started with.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Its rank.
    pub rank: Rank,
    /// The number of ranks.
    pub world: WorldSize,
    /// The coordinator's `host:port`.
    pub coordinator: String,
    /// The job's token.
    pub token: Token,
    /// The certificates of control plane and data plane; none means that neither is encrypted.
    pub tls: Option<Tls>,
    /// The address that the data plane listens on, with a free port; by default this host's address on the way to the
    /// coordinator.
    pub data_ip: Option<IpAddr>,
    /// This host's name.
    pub host: String,
    /// Where checkpoints go, if this host has them under another path than the coordinator's.
    pub checkpoint_root: Option<PathBuf>,
    /// Where its weights may lie, before the plan is known.
    pub device: DeviceWish,
    /// Whether ranks may share a device.
    pub sharing: Sharing,
    /// Its place among the ranks of its host.
    pub local: LocalRank,
    /// The path of libnccl, unless the dynamic linker finds it.
    pub nccl_library: Option<PathBuf>,
    /// How long the coordinator is looked for at the beginning.
    pub join_deadline: Duration,
    /// How long the coordinator may be out of reach before the rank gives up, if the coordinator does not grant more.
    pub coordinator_deadline: Duration,
}
