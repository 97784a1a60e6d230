//! The connections of one rank, made when they are first needed, and the one place that waits.
//!
//! Owns: dialing, accepting, sending and receiving single frames, waiting with a deadline, telling peers of an end.
//! Refuses to know: the order of frames in a collective.
//!
//! - `CM-2`: [`Mesh::drive`] alone blocks, in `poll`, on the abort event, the listener and whatever the call needs.
//! - Connections are made lazily, so a rank of a large world holds as many as its collectives use: two neighbours for
//!   rings and chains, the owners it sends to, log2 of the world for barriers.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::handshake::{Answer, Dial, HandshakeError, Identity, Step, Wants};
use super::link::{InLink, LinkError, OutLink};
use super::pipe::Pipe;
use super::shared::Shared;
use super::socket::{prepare, start_connect};
use super::wire::{Frame, HEADER_BYTES, Header};
use crate::clock::Seldom;
use crate::comm::abort::AbortFlag;
use crate::comm::error::Goodbye;
use crate::comm::patience::Patience;
use crate::comm::{CommError, Counters, Operation};
use crate::tls::Tls;
use crate::types::Rank;

/// How long a connection may take to say who it is. It says so without waiting for anybody, so this is round trips only.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a connection may take to be made before another one is tried: where packets were lost that comes through sooner than the
/// kernel's next attempt, which it makes after 1, 2, 4, 8 s and so on.
const DIAL_AGAIN: Duration = Duration::from_secs(2);
/// Handshakes in progress besides one for every rank: room for strangers, such as port scanners. When there is none left
/// the oldest one goes, so that a peer, which speaks at once, comes through whatever others do.
const MAX_STRANGERS: usize = 64;
/// Connections that are accepted before everything else is looked at again.
const MAX_ACCEPTED: usize = 32;
/// Log lines of one kind about strangers: one a second.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

static SILENT: Seldom = Seldom::every(LOG_INTERVAL);
static CROWDED: Seldom = Seldom::every(LOG_INTERVAL);
static REFUSED: Seldom = Seldom::every(LOG_INTERVAL);

/// The connections of one rank.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) identity: Identity,
    peers: Vec<SocketAddr>,
    pub(super) shared: Arc<Shared>,
    pub(super) aborted: AbortFlag,
    pub(super) counters: Counters,
    outgoing: Vec<Outgoing>,
    incoming: Vec<Option<InLink>>,
    arrivals: Vec<Arrival>,
    /// What the current call could not go on with.
    blocked: Vec<Blocked>,
    /// Grows with everything that the current call gets done.
    pub(super) moved: usize,
    operation: Operation,
    /// The certificates, if connections are encrypted.
    tls: Option<Tls>,
}

#[derive(Debug)]
enum Outgoing {
    Idle,
    Dialing {
        dial: Dial,
        stream: Arc<Pipe>,
        wants: Wants,
        patience: Patience,
    },
    Ready(OutLink),
    /// The peer has said that it has made all its calls.
    Finished,
}

#[derive(Debug)]
struct Arrival {
    answer: Answer,
    stream: Pipe,
    wants: Wants,
    patience: Patience,
}

/// A side of a peer that the current call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blocked {
    Sending(Rank),
    Receiving(Rank),
}

/// What a polled descriptor stands for.
enum Source {
    Abort,
    Listener,
    Arrival,
    Out(Rank),
    In,
}

/// The descriptors of one poll, and what each stands for.
#[derive(Default)]
struct Polls<'a> {
    sources: Vec<Source>,
    descriptors: Vec<PollFd<'a>>,
}

impl<'a> Polls<'a> {
    fn add(&mut self, source: Source, descriptor: BorrowedFd<'a>, flags: PollFlags) {
        self.sources.push(source);
        self.descriptors.push(PollFd::from_borrowed_fd(descriptor, flags));
    }
}

impl Mesh {
    pub(super) fn new(
        (identity, tls): (Identity, Option<Tls>),
        peers: Vec<SocketAddr>,
        shared: Arc<Shared>,
        aborted: AbortFlag,
    ) -> Self {
        let world = identity.group.world.count();
        shared.set_own(identity.group.rank);
        Self {
            identity,
            peers,
            shared,
            aborted,
            counters: Counters::default(),
            outgoing: (0..world).map(|_| Outgoing::Idle).collect(),
            incoming: (0..world).map(|_| None).collect(),
            arrivals: Vec::new(),
            blocked: Vec::new(),
            moved: 0,
            operation: Operation::Connect,
            tls,
        }
    }

    /// Calls `advance` until it is done, waiting in between for what it could not go on with. Fails when nothing moves
    /// for `limit`.
    pub(super) fn drive(
        &mut self,
        operation: Operation,
        limit: Duration,
        mut advance: impl FnMut(&mut Self) -> Result<bool, CommError>,
    ) -> Result<(), CommError> {
        self.operation = operation;
        let mut patience = Patience::new(limit);
        loop {
            self.check_abort()?;
            self.blocked.clear();
            self.moved = 0;
            if advance(self)? {
                return Ok(());
            }
            if self.moved > 0 {
                patience.renew();
            }
            self.wait(&patience)?;
        }
    }

    /// Forgets what was blocked, before everything is tried again.
    pub(super) fn retry(&mut self) {
        self.blocked.clear();
    }

    /// Sends what can be sent of a frame; true when all of it is.
    pub(super) fn send(&mut self, to: Rank, header: &Header, payload: &[u8]) -> Result<bool, CommError> {
        self.check_abort()?;
        loop {
            match self.outgoing.get_mut(to.index()) {
                Some(Outgoing::Ready(link)) => {
                    return match link.send(header, payload, &mut self.moved) {
                        Ok(true) => {
                            self.counters.sent(payload.len(), HEADER_BYTES);
                            self.moved += 1;
                            Ok(true)
                        }
                        Ok(false) => {
                            self.block(Blocked::Sending(to));
                            Ok(false)
                        }
                        Err(error) => Err(self.lost(to, error)),
                    };
                }
                Some(Outgoing::Finished) | None => return Err(Goodbye::Finished.into_error(self.operation, to)),
                Some(Outgoing::Idle) => self.start_dial(to)?,
                Some(Outgoing::Dialing { .. }) => {
                    if !self.continue_dial(to)? {
                        self.block(Blocked::Sending(to));
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Receives what has arrived of a frame; its checksum when all of it has.
    pub(super) fn receive(&mut self, from: Rank, frame: &Frame, into: &mut [u8]) -> Result<Option<u32>, CommError> {
        self.check_abort()?;
        let Some(Some(link)) = self.incoming.get_mut(from.index()) else {
            self.block(Blocked::Receiving(from));
            return Ok(None);
        };
        match link.receive(frame, into, &mut self.moved) {
            Ok(Some(crc)) => {
                self.counters.received(into.len(), HEADER_BYTES);
                self.moved += 1;
                Ok(Some(crc))
            }
            Ok(None) => {
                self.block(Blocked::Receiving(from));
                Ok(None)
            }
            Err(error) => Err(self.lost(from, error)),
        }
    }

    /// Ends all connections; peers are told why, those in the middle of a frame as far as possible.
    pub(super) fn close(&mut self, goodbye: &Goodbye) {
        let message = super::wire::encode_goodbye(goodbye, self.identity.group.rank);
        for outgoing in &self.outgoing {
            if let Outgoing::Ready(link) = outgoing
                && link.is_between_frames()
            {
                link.stream.say(&message);
            }
        }
        self.shared.close(goodbye);
    }

    fn block(&mut self, side: Blocked) {
        if !self.blocked.contains(&side) {
            self.blocked.push(side);
        }
    }

    fn check_abort(&self) -> Result<(), CommError> {
        let (operation, rank) = (self.operation, self.identity.group.rank);
        match self.aborted.reason() {
            Some(reason) => Err(CommError::Aborted { operation, rank, reason: reason.to_owned() }),
            None => Ok(()),
        }
    }

    /// The error for a link to or from `peer` that failed. Of several explanations the best known one counts: our own
    /// abort, then what the peer itself said, then what the connection shows.
    fn lost(&mut self, peer: Rank, error: LinkError) -> CommError {
        if let Err(aborted) = self.check_abort() {
            return aborted;
        }
        let operation = self.operation;
        let source = match error {
            LinkError::Mismatch { expected, found } => return CommError::Mismatch { rank: peer, expected, found },
            LinkError::Corrupt(bad) => {
                let (expected, found) = (bad.expected, bad.found);
                return CommError::Corrupt { operation, rank: peer, what: bad.what, expected, found };
            }
            LinkError::Goodbye(goodbye) => return goodbye.into_error(operation, peer),
            LinkError::Closed => None,
            LinkError::Io(error) => Some(Arc::new(error)),
        };
        if let Some(Outgoing::Ready(link)) = self.outgoing.get_mut(peer.index())
            && let Some(LinkError::Goodbye(goodbye)) = link.hear()
        {
            return goodbye.into_error(operation, peer);
        }
        CommError::PeerLost { operation, rank: peer, reported_by: None, source }
    }

    fn start_dial(&mut self, to: Rank) -> Result<(), CommError> {
        let error = |source: io::Error| CommError::io(format!("connection to rank {to}"), source);
        let Some(&address) = self.peers.get(to.index()) else {
            return Err(error(io::ErrorKind::AddrNotAvailable.into()));
        };
        let stream =
            start_connect(address).and_then(|stream| Pipe::dialed(stream, self.tls.as_ref())).map_err(error)?;
        let stream = Arc::new(stream);
        self.shared.add_outgoing(&stream);
        let dial = Dial::new(&self.identity, to).map_err(error)?;
        let patience = Patience::new(DIAL_AGAIN);
        self.outgoing[to.index()] = Outgoing::Dialing { dial, stream, wants: Wants::Write, patience };
        Ok(())
    }

    /// Whether the connection is ready.
    fn continue_dial(&mut self, to: Rank) -> Result<bool, CommError> {
        let Some(Outgoing::Dialing { dial, stream, wants, patience }) = self.outgoing.get_mut(to.index()) else {
            return Ok(true);
        };
        match dial.advance(stream, &self.identity) {
            Ok(Step::Blocked(_)) if dial.is_connecting() && patience.left().is_none() => {
                self.start_dial(to)?;
                Ok(false)
            }
            Ok(Step::Blocked(now_wants)) => {
                *wants = now_wants;
                Ok(false)
            }
            Ok(Step::Done(())) => {
                let stream = Arc::clone(stream);
                self.outgoing[to.index()] = Outgoing::Ready(OutLink::new(stream));
                self.moved += 1;
                Ok(true)
            }
            Err(HandshakeError::Refused(refusal)) => Err(CommError::Refused { rank: to, refusal }),
            Err(HandshakeError::Io(error)) => Err(self.lost(to, LinkError::Io(error))),
        }
    }

    /// Waits for the abort event, an arriving connection, or anything that the call is blocked on.
    fn wait(&mut self, patience: &Patience) -> Result<(), CommError> {
        let Some(left) = patience.left() else { return Err(self.out_of_patience(patience)) };
        let sources = self.poll(left)?;
        for (source, found) in sources {
            match source {
                Source::Abort => self.check_abort()?,
                Source::Listener => self.accept()?,
                Source::Arrival | Source::In => {}
                Source::Out(rank)
                    if found.intersects(PollFlags::IN | PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) =>
                {
                    self.hear(rank)?;
                }
                Source::Out(_) => {}
            }
        }
        self.continue_arrivals();
        Ok(())
    }

    fn out_of_patience(&self, patience: &Patience) -> CommError {
        let mut waiting_for = Vec::new();
        for &(Blocked::Sending(rank) | Blocked::Receiving(rank)) in &self.blocked {
            if !waiting_for.contains(&rank) {
                waiting_for.push(rank);
            }
        }
        CommError::Deadline { operation: self.operation, waiting_for, waited: patience.waited() }
    }

    /// Polls once, for at most `left`; gives the sources that something happened to.
    fn poll(&self, left: Duration) -> Result<Vec<(Source, PollFlags)>, CommError> {
        let mut polls = Polls::default();
        polls.add(Source::Abort, self.shared.wake.as_fd(), PollFlags::IN);
        polls.add(Source::Listener, self.shared.listener.as_fd(), PollFlags::IN);
        for arrival in &self.arrivals {
            polls.add(Source::Arrival, arrival.stream.as_fd(), flags_of(arrival.wants));
        }
        for (rank, outgoing) in self.identity.group.world.ranks().zip(&self.outgoing) {
            let sending = self.blocked.contains(&Blocked::Sending(rank));
            match outgoing {
                Outgoing::Dialing { stream, wants, .. } if sending => {
                    polls.add(Source::In, stream.as_fd(), flags_of(*wants));
                }
                Outgoing::Ready(link) => {
                    let writable = if sending { PollFlags::OUT } else { PollFlags::empty() };
                    let flags = writable | PollFlags::IN | PollFlags::RDHUP;
                    polls.add(Source::Out(rank), link.stream.as_fd(), flags);
                }
                Outgoing::Idle | Outgoing::Finished | Outgoing::Dialing { .. } => {}
            }
        }
        for (rank, incoming) in self.identity.group.world.ranks().zip(&self.incoming) {
            if let Some(link) = incoming
                && self.blocked.contains(&Blocked::Receiving(rank))
            {
                polls.add(Source::In, link.stream.as_fd(), PollFlags::IN);
            }
        }
        // While handshakes are pending, their deadlines are looked at, too.
        let left = if self.arrivals.is_empty() { left } else { left.min(HANDSHAKE_DEADLINE) };
        let dials = self.outgoing.iter().any(|outgoing| matches!(outgoing, Outgoing::Dialing { .. }));
        let left = if dials { left.min(DIAL_AGAIN) } else { left };
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        match rustix::event::poll(&mut polls.descriptors, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(CommError::io("poll", error.into())),
        }
        let found = polls.descriptors.iter().map(PollFd::revents);
        Ok(polls.sources.into_iter().zip(found).filter(|(_, flags)| !flags.is_empty()).collect())
    }

    /// Something came against the direction of the data: the peer leaves, or is gone.
    fn hear(&mut self, rank: Rank) -> Result<(), CommError> {
        let Some(Outgoing::Ready(link)) = self.outgoing.get_mut(rank.index()) else { return Ok(()) };
        match link.hear() {
            None => Ok(()),
            // A peer that needs nothing more is no error, unless this call needs it.
            Some(LinkError::Goodbye(Goodbye::Finished)) if !self.blocked.contains(&Blocked::Sending(rank)) => {
                self.outgoing[rank.index()] = Outgoing::Finished;
                Ok(())
            }
            Some(error) => Err(self.lost(rank, error)),
        }
    }

    /// Accepts some of the connections that wait.
    fn accept(&mut self) -> Result<(), CommError> {
        let error = |source: io::Error| CommError::io("accepting a connection", source);
        for _ in 0..MAX_ACCEPTED {
            match self.shared.listener.accept() {
                Ok((stream, _)) => {
                    // A connection that is gone again is its dialer's concern.
                    if let Ok(stream) = prepare(&stream).and_then(|()| Pipe::accepted(stream, self.tls.as_ref())) {
                        let answer = Answer::new().map_err(error)?;
                        let patience = Patience::new(HANDSHAKE_DEADLINE);
                        self.make_room();
                        self.arrivals.push(Arrival { answer, stream, wants: Wants::Read, patience });
                    }
                }
                Err(found) => match found.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    // The listener was shut down by an abort.
                    io::ErrorKind::InvalidInput => return self.check_abort(),
                    _ => return Err(error(found)),
                },
            }
        }
        Ok(())
    }

    /// Drops the oldest handshake when there are too many. They are in the order of their arrival.
    fn make_room(&mut self) {
        if self.arrivals.len() < self.identity.group.world.count() + MAX_STRANGERS {
            return;
        }
        self.arrivals.remove(0);
        if let Some(held_back) = CROWDED.pass() {
            tracing::warn!(held_back, "too many connections that did not say who they are: closed the oldest");
        }
    }

    /// Takes all handshakes as far as they go. One that fails is dropped: a stranger must not end the group.
    fn continue_arrivals(&mut self) {
        for mut arrival in std::mem::take(&mut self.arrivals) {
            let incoming = &self.incoming;
            let is_taken = |rank: Rank| incoming.get(rank.index()).is_none_or(Option::is_some);
            match arrival.answer.advance(&arrival.stream, &self.identity, is_taken) {
                Ok(Step::Blocked(_)) if arrival.patience.left().is_none() => {
                    if let Some(held_back) = SILENT.pass() {
                        let seconds = HANDSHAKE_DEADLINE.as_secs();
                        tracing::warn!(seconds, held_back, "a connection did not say who it is");
                    }
                }
                Ok(Step::Blocked(wants)) => {
                    arrival.wants = wants;
                    self.arrivals.push(arrival);
                }
                Ok(Step::Done(rank)) => self.admit(rank, arrival.stream),
                Err(error) => {
                    let Some(held_back) = REFUSED.pass() else { continue };
                    match error {
                        HandshakeError::Refused(refusal) => {
                            tracing::warn!(%refusal, held_back, "refused a connection");
                        }
                        HandshakeError::Io(error) => {
                            tracing::warn!(%error, held_back, "a connection broke before it said who it is");
                        }
                    }
                }
            }
        }
    }

    fn admit(&mut self, rank: Rank, stream: Pipe) {
        // Two connections of one rank may have been under way at once; the first to finish counts.
        if let Some(slot @ None) = self.incoming.get_mut(rank.index()) {
            let stream = Arc::new(stream);
            self.shared.add_incoming(&stream);
            *slot = Some(InLink::new(stream));
            self.moved += 1;
        }
    }
}

const fn flags_of(wants: Wants) -> PollFlags {
    match wants {
        Wants::Read => PollFlags::IN,
        Wants::Write => PollFlags::OUT,
    }
}
