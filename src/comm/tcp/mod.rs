//! A communicator between processes and hosts over TCP.
//!
//! Owns: [`TcpPort`], [`TcpConfig`], [`TcpCommunicator`] and the shape of each collective: a chain for broadcast, a ring
//! for all_gather, direct exchange for sums, dissemination for barriers.
//! Refuses to know: how ranks learn each other's addresses and secret (the coordinator's task), device memory.
//!
//! A rank first binds a [`TcpPort`], publishes its address, and calls [`connect`] once it knows all addresses.
//! Connections are made when they are first needed, encrypted where there are certificates, authenticated in both
//! directions by the generation's secret, and carry data in one direction each. Every payload is checksummed (`CM-1` to `CM-5` in [`super`]).

mod handshake;
mod link;
mod mesh;
mod pipe;
mod shared;
mod socket;
mod steps;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
mod wire;

use std::fmt;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use self::handshake::Identity;
use self::mesh::Mesh;
use self::shared::Shared;
use self::steps::{Relay, Scratch, Sending, Sequences, Sum};
use super::abort::AbortFlag;
use super::error::Goodbye;
use super::{AbortHandle, CommError, Communicator, Counters, F32_BYTES, Group, Operation, Scatter};
use super::{check, check_len, check_root, check_scatter, even_counts, host, host_mut, layout, place_own};
use crate::device::{Slice, SliceMut};
use crate::tls::Tls;
use crate::types::{Generation, Rank};

/// How long all ranks together may take to connect. They do so after all have published their addresses, so this is
/// dialing and a few round trips, on hosts that are busy starting a job.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// How long a call waits without any byte moving. The same 10 minutes that torch gives NCCL: a dead process is seen at
/// once and a vanished host within 30 s, so this is for a peer that lives and does not come.
pub const DEFAULT_IDLE_DEADLINE: Duration = Duration::from_secs(600);
/// Connections that the kernel holds for us until we accept them: all ranks of a large job may dial at once.
const BACKLOG: i32 = 4096;

/// A bound port, whose address can be published before any peer is known.
#[derive(Debug)]
pub struct TcpPort {
    shared: Arc<Shared>,
    aborted: AbortFlag,
    address: SocketAddr,
}

impl TcpPort {
    /// Binds a free port of `ip`.
    ///
    /// # Errors
    /// [`CommError::Io`] when the address is not ours.
    pub fn bind(ip: IpAddr) -> Result<Self, CommError> {
        let error = |source| CommError::io(format!("binding a port of {ip}"), source);
        let listener = TcpListener::bind((ip, 0)).map_err(error)?;
        rustix::net::listen(&listener, BACKLOG).map_err(|errno| error(errno.into()))?;
        listener.set_nonblocking(true).map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        let shared = Arc::new(Shared::new(listener).map_err(error)?);
        Ok(Self { shared, aborted: AbortFlag::default(), address })
    }

    /// A handle that ends [`connect`] on this port, and later the calls of the communicator that it gives.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        abort_handle(&self.aborted, &self.shared)
    }

    /// The address to publish. When the port was bound on all interfaces, the publisher puts in the address that peers
    /// reach this host by.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What a rank must know to connect.
#[derive(Clone)]
pub struct TcpConfig {
    /// Who we are.
    pub group: Group,
    /// The incarnation of the group; ranks of another one are refused.
    pub generation: Generation,
    /// Known to the ranks of this generation only.
    pub secret: [u8; 32],
    /// The address of every rank's port, in the order of ranks.
    pub peers: Vec<SocketAddr>,
    /// Encrypts every connection, if there are certificates; all ranks of a group have some, or none has.
    pub tls: Option<Tls>,
    /// How long connecting may take without progress; see [`DEFAULT_DEADLINE`].
    pub deadline: Duration,
    /// How long a call may take without progress; see [`DEFAULT_IDLE_DEADLINE`].
    pub idle_deadline: Duration,
}

impl fmt::Debug for TcpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, generation, secret: _, peers, tls, deadline, idle_deadline } = self;
        f.debug_struct("TcpConfig")
            .field("group", group)
            .field("generation", generation)
            .field("peers", peers)
            .field("tls", tls)
            .field("deadline", deadline)
            .field("idle_deadline", idle_deadline)
            .finish_non_exhaustive()
    }
}

/// One rank's end of the group.
#[derive(Debug)]
pub struct TcpCommunicator {
    group: Group,
    idle_deadline: Duration,
    mesh: Mesh,
    sequences: Sequences,
    scratch: Option<Scratch>,
    failed: Option<CommError>,
}

/// Connects this rank with the others and returns when all ranks have done so.
///
/// # Errors
/// [`CommError::Refused`] when a peer and we do not belong together, [`CommError::Deadline`] when one does not come,
/// [`CommError::BadArgument`] when the configuration contradicts itself.
pub fn connect(config: TcpConfig, port: TcpPort) -> Result<TcpCommunicator, CommError> {
    let TcpConfig { group, generation, secret, peers, tls, deadline, idle_deadline } = config;
    let operation = Operation::Connect;
    check(group.world.contains(group.rank), operation, || {
        format!("rank {} in a world of {}", group.rank, group.world)
    })?;
    check(peers.len() == group.world.count(), operation, || {
        format!("expected {} addresses, one for each rank, found {}", group.world, peers.len())
    })?;
    let mut communicator = TcpCommunicator {
        group,
        idle_deadline,
        mesh: Mesh::new((Identity { group, generation, secret }, tls), peers, port.shared, port.aborted),
        sequences: Sequences::new(group.world.count()),
        scratch: None,
        failed: None,
    };
    communicator.call(|this| this.disseminate(operation, deadline))?;
    Ok(communicator)
}

impl TcpCommunicator {
    /// The byte counts of this rank.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.mesh.counters.clone()
    }

    /// Runs a call: refuses it when closed, and closes the communicator when it fails (`CM-3`).
    fn call(&mut self, call: impl FnOnce(&mut Self) -> Result<(), CommError>) -> Result<(), CommError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        call(self).inspect_err(|error| {
            if error.is_fatal() {
                self.mesh.close(&Goodbye::after(error, self.group.rank));
                self.failed = Some(error.clone());
            }
        })
    }

    /// The rank `steps` after ours, around the world.
    fn after(&self, steps: u32) -> Rank {
        Rank((self.group.rank.0 + steps) % self.group.world.get())
    }

    /// The rank `steps` before ours, around the world; `steps` is at most the world's size.
    fn before(&self, steps: u32) -> Rank {
        self.after(self.group.world.get() - steps)
    }

    /// A barrier in log2(world) rounds: in each, everybody tells a rank twice as far away, so that in the end everybody
    /// has heard, directly or not, of everybody. (Hensgen, Finkel, Manber 1988)
    fn disseminate(&mut self, operation: Operation, limit: Duration) -> Result<(), CommError> {
        let mut distance = 1;
        let mut round = Rank::ZERO;
        while distance < self.group.world.get() {
            let mut sending = self.sequences.sending(operation, round, self.after(distance), 0);
            let mut receiving = self.sequences.receiving(operation, round, self.before(distance), 0);
            self.mesh.drive(operation, limit, |mesh| {
                let sent = sending.advance(mesh, &[])?;
                Ok(receiving.advance(mesh, &mut [])? && sent)
            })?;
            distance = distance.saturating_mul(2);
            round = Rank(round.0 + 1);
        }
        Ok(())
    }

    /// Gathers everybody's range of `buffer` around the ring: each rank sends its own part to the next one, then all
    /// that it receives but the last, each frame as soon as it has arrived.
    fn ring(&mut self, operation: Operation, buffer: &mut [u8], ranges: &[Range<usize>]) -> Result<(), CommError> {
        let world = self.group.world.get();
        if world == 1 {
            return Ok(());
        }
        let mut relay = Relay::default();
        let (next, previous) = (self.after(1), self.before(1));
        for step in 0..world {
            let root = self.before(step);
            let range = ranges[root.index()].clone();
            if step > 0 {
                relay.receive(self.sequences.receiving(operation, root, previous, range.len()), range.clone());
            }
            if step + 1 < world {
                let message = self.sequences.sending(operation, root, next, range.len());
                if step == 0 { relay.send_own(message, range) } else { relay.forward(message, range) }
            }
        }
        self.mesh.drive(operation, self.idle_deadline, |mesh| relay.advance(mesh, buffer))
    }

    /// Sums `own` over all ranks; `part_of` gives our values for another rank's part.
    fn sum<'a>(
        &mut self,
        operation: Operation,
        ranges: &[Range<usize>],
        part_of: &impl Fn(Rank) -> &'a [u8],
        own: &mut [u8],
    ) -> Result<(), CommError> {
        let mut sum = Sum::new(operation, self.group.rank, ranges, &mut self.sequences);
        let scratch = self.scratch.get_or_insert_with(Scratch::new);
        self.mesh.drive(operation, self.idle_deadline, |mesh| sum.advance(mesh, part_of, own, scratch))
    }

    fn send_parts(&mut self, root: Rank, parts: &[Slice<'_>]) -> Result<(), CommError> {
        let operation = Operation::Scatter;
        let mut messages: Vec<(Sending, &[u8])> = Vec::new();
        for (to, part) in self.group.world.ranks().zip(parts).filter(|(_, part)| !part.is_empty()) {
            let part = host(*part, operation)?;
            messages.push((self.sequences.sending(operation, root, to, part.len()), part));
        }
        self.mesh.drive(operation, self.idle_deadline, |mesh| {
            // All owners at once, so that a slow one does not hold up the others.
            messages.iter_mut().try_fold(true, |done, (message, part)| Ok(message.advance(mesh, part)? && done))
        })
    }
}

impl Communicator for TcpCommunicator {
    fn group(&self) -> Group {
        self.group
    }

    fn broadcast(&mut self, root: Rank, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let operation = Operation::Broadcast;
        check_root(self.group, root, operation)?;
        let bytes = host_mut(buffer, operation)?;
        // A chain from the root around the world: every rank sends at most once, and frames flow through it.
        let mut relay = Relay::default();
        let (is_first, is_last) = (self.group.rank == root, self.after(1) == root);
        self.call(|this| {
            if !is_first {
                let message = this.sequences.receiving(operation, root, this.before(1), bytes.len());
                relay.receive(message, 0..bytes.len());
            }
            if !is_last {
                let message = this.sequences.sending(operation, root, this.after(1), bytes.len());
                if is_first { relay.send_own(message, 0..bytes.len()) } else { relay.forward(message, 0..bytes.len()) }
            }
            this.mesh.drive(operation, this.idle_deadline, |mesh| relay.advance(mesh, bytes))
        })
    }

    fn scatter(&mut self, root: Rank, parts: Scatter<'_>) -> Result<(), CommError> {
        let operation = Operation::Scatter;
        check_scatter(self.group, root, &parts)?;
        match parts {
            Scatter::Send { parts } => {
                parts.iter().try_for_each(|part| host(*part, operation).map(drop))?;
                self.call(|this| this.send_parts(root, parts))
            }
            Scatter::Receive { into } if into.is_empty() => Ok(()),
            Scatter::Receive { into } => {
                let into = host_mut(into, operation)?;
                self.call(|this| {
                    let mut message = this.sequences.receiving(operation, root, root, into.len());
                    this.mesh.drive(operation, this.idle_deadline, |mesh| message.advance(mesh, into))
                })
            }
        }
    }

    fn all_gather(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError> {
        let operation = Operation::AllGather;
        let (send, recv) = (host(send, operation)?, host_mut(recv, operation)?);
        let ranges = layout(operation, self.group.world, counts, 1, recv.len())?;
        place_own(self.group, operation, send, recv, &ranges)?;
        self.call(|this| this.ring(operation, recv, &ranges))
    }

    fn reduce_scatter(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError> {
        let operation = Operation::ReduceScatter;
        let (send, recv) = (host(send, operation)?, host_mut(recv, operation)?);
        let ranges = layout(operation, self.group.world, counts, F32_BYTES, send.len())?;
        let own = ranges[self.group.rank.index()].clone();
        check_len(operation, recv.len(), own.len())?;
        recv.copy_from_slice(&send[own]);
        self.call(|this| this.sum(operation, &ranges, &|rank| &send[ranges[rank.index()].clone()], recv))
    }

    fn all_reduce(&mut self, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let operation = Operation::AllReduce;
        let bytes = host_mut(buffer, operation)?;
        let counts = even_counts(self.group.world, bytes.len() / F32_BYTES);
        let ranges = layout(operation, self.group.world, &counts, F32_BYTES, bytes.len())?;
        let own = ranges[self.group.rank.index()].clone();
        self.call(|this| {
            let (before, rest) = bytes.split_at_mut(own.start);
            let (sum, after) = rest.split_at_mut(own.len());
            let (before, after) = (&*before, &*after);
            let part_of = |rank: Rank| {
                let range = ranges[rank.index()].clone();
                if range.end <= own.start { &before[range] } else { &after[range.start - own.end..range.end - own.end] }
            };
            this.sum(operation, &ranges, &part_of, sum)?;
            this.ring(operation, bytes, &ranges)
        })
    }

    fn barrier(&mut self) -> Result<(), CommError> {
        self.call(|this| this.disseminate(Operation::Barrier, this.idle_deadline))
    }

    fn abort_handle(&self) -> AbortHandle {
        abort_handle(&self.mesh.aborted, &self.mesh.shared)
    }
}

fn abort_handle(aborted: &AbortFlag, shared: &Arc<Shared>) -> AbortHandle {
    let shared = Arc::clone(shared);
    aborted.handle(move |reason| shared.abort(reason))
}

impl Drop for TcpCommunicator {
    fn drop(&mut self) {
        self.mesh.close(&Goodbye::Finished);
    }
}
