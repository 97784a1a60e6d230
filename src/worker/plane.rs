//! The data plane of one rank: what it can use, which one the generation uses, and connecting it.
//!
//! Owns: the offer that a rank makes when it joins, and the choice. Refuses to know: what is moved.
//!
//! `DP-1`: all ranks choose alike, because they choose from the plan and from one snapshot of the coordinator: it has a
//! unique id only if every rank offered the same release of NCCL.

use std::net::SocketAddr;

use super::WorkerConfig;
use super::data::{Failure, Watched, comm_failure};
use crate::comm::nccl::{self, NcclConfig, NcclLibrary, NcclUniqueId};
use crate::comm::tcp::{self, DEFAULT_DEADLINE, DEFAULT_IDLE_DEADLINE, TcpConfig, TcpPort};
use crate::comm::{Communicator, Counters, Group};
use crate::device::{self, Device, DeviceError};
use crate::error::{Kind, chain};
use crate::membership::Blame;
use crate::plan::DeviceRule;
use crate::tls::Tls;
use crate::types::{BackendWish, Generation, Rank, Sharing};

/// What a rank has.
#[derive(Clone, Debug)]
pub(super) struct Offer {
    /// Its device.
    pub(super) device: Device,
    /// NCCL, or why not.
    library: Result<NcclLibrary, String>,
    /// Made by rank 0.
    unique_id: Option<NcclUniqueId>,
}

impl Offer {
    /// Looks for the rank's device and, where it is one that NCCL serves, for the library.
    pub(super) fn look(config: &WorkerConfig) -> Result<Self, DeviceError> {
        let device = device::assign(config.device, config.sharing, config.local, &device::probe())?;
        let none = |reason: &str| Self { device, library: Err(reason.to_owned()), unique_id: None };
        if device == Device::Host {
            return Ok(none("it has no CUDA device"));
        }
        if config.world.get() == 1 {
            return Ok(none("it is alone"));
        }
        let library = match NcclLibrary::load(config.nccl_library.as_deref()) {
            Ok(library) => library,
            Err(error) => {
                let reason = chain(&error);
                tracing::info!(rank = config.rank.0, reason, "NCCL cannot be used");
                return Ok(none(&reason));
            }
        };
        if config.rank != Rank::ZERO {
            return Ok(Self { device, library: Ok(library), unique_id: None });
        }
        // The process that makes the id must live until all have connected; rank 0 does, or the generation is over.
        match library.unique_id() {
            Ok(id) => Ok(Self { device, library: Ok(library), unique_id: Some(id) }),
            Err(error) => Ok(none(&chain(&error))),
        }
    }

    /// For another generation: an id names one group, once.
    pub(super) fn renew(&mut self) {
        if let (Ok(library), Some(_)) = (&self.library, &self.unique_id) {
            self.unique_id = library.unique_id().ok();
        }
    }

    /// The device as people read it in `weightcast status`.
    pub(super) fn device_words(&self) -> String {
        match self.device {
            Device::Host => "cpu".to_owned(),
            Device::Cuda { .. } => self.device.to_string(),
        }
    }

    /// The release of NCCL; empty when this rank cannot use it.
    pub(super) fn nccl_version(&self) -> String {
        self.library.as_ref().map_or_else(|_| String::new(), |library| library.version().to_string())
    }

    /// Rank 0's unique id; empty for others.
    pub(super) fn nccl_unique_id(&self) -> Vec<u8> {
        self.unique_id.map_or_else(Vec::new, |id| id.as_bytes().to_vec())
    }
}

/// What a rank needs to meet the others.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) group: Group,
    pub(super) generation: Generation,
    pub(super) secret: [u8; 32],
    pub(super) peers: Vec<SocketAddr>,
    /// Encrypts what the ranks say to each other over TCP.
    pub(super) tls: Option<Tls>,
    /// Empty unless every rank can use NCCL.
    pub(super) nccl_unique_id: Vec<u8>,
}

/// The data plane of a generation.
#[derive(Debug)]
pub(super) enum Plane {
    Nccl { library: NcclLibrary, unique_id: NcclUniqueId, device: Device },
    Tcp,
}

/// A connected communicator with its counters.
pub(super) type Connected = (Box<dyn Communicator>, Counters);

impl Plane {
    /// Which one it is (`DP-1`). `device` is where this rank's weights go.
    pub(super) fn choose(rule: DeviceRule, device: Device, offer: &Offer, meeting: &Meeting) -> Result<Self, Failure> {
        let wanted = match rule.backend {
            BackendWish::Tcp => false,
            BackendWish::Nccl => true,
            // Two ranks of one device are refused by NCCL unless its own variables say otherwise.
            BackendWish::Auto => {
                rule.sharing == Sharing::Refused && device != Device::Host && !meeting.nccl_unique_id.is_empty()
            }
        };
        if !wanted {
            return Ok(Self::Tcp);
        }
        let refused = |reason: &str| Failure {
            message: format!("the data plane is to be NCCL, and rank {} cannot: {reason}", meeting.group.rank),
            exit_code: Kind::Conflict.exit_code(),
            blame: Blame::Own,
        };
        let library = offer.library.as_ref().map_err(|reason| refused(reason))?.clone();
        if device == Device::Host {
            return Err(refused("its weights are on the host"));
        }
        let unique_id: [u8; NcclUniqueId::BYTES] = meeting.nccl_unique_id.as_slice().try_into().map_err(|_| {
            refused("not every rank of the job has a CUDA device and the same release of NCCL; their logs say why")
        })?;
        Ok(Self::Nccl { library, unique_id: NcclUniqueId::from_bytes(unique_id), device })
    }

    /// Its name in reports.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Nccl { .. } => "nccl",
            Self::Tcp => "tcp",
        }
    }

    /// The memory that it moves.
    pub(super) const fn device(&self) -> Device {
        match self {
            Self::Nccl { device, .. } => *device,
            Self::Tcp => Device::Host,
        }
    }

    /// Connects this rank with the others; `watched` can end that, and later every call.
    pub(super) fn connect(self, meeting: Meeting, port: TcpPort, watched: &Watched) -> Result<Connected, Failure> {
        let Meeting { group, generation, secret, peers, tls, .. } = meeting;
        let failed = |error| comm_failure(&error, group.rank);
        let (deadline, idle_deadline) = (DEFAULT_DEADLINE, DEFAULT_IDLE_DEADLINE);
        if group.rank == Rank::ZERO {
            tracing::info!(backend = self.name(), ranks = group.world.get(), "data plane");
        }
        match self {
            Self::Tcp => {
                watched.set_abort(port.abort_handle());
                let config = TcpConfig { group, generation, secret, peers, tls, deadline, idle_deadline };
                let comm = tcp::connect(config, port).map_err(failed)?;
                watched.set_abort(comm.abort_handle());
                let counters = comm.counters();
                Ok((Box::new(comm), counters))
            }
            Self::Nccl { library, unique_id, device } => {
                if tls.is_some() && group.rank == Rank::ZERO {
                    tracing::warn!("NCCL does not encrypt what ranks say to each other; --backend tcp does");
                }
                let config = NcclConfig { group, library, unique_id, device, deadline, idle_deadline };
                let connecting = nccl::start(config).map_err(failed)?;
                watched.set_abort(connecting.abort_handle());
                let comm = connecting.finish().map_err(failed)?;
                let counters = comm.counters();
                Ok((Box::new(comm), counters))
            }
        }
    }
}
