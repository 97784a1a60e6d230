//! What one caller, and all strangers together, may take of a listener.
//!
//! Owns: the limits with their names, and the list of strangers: connections without an accepted call yet.
//! Refuses to know: what a call does.
//!
//! `LM-1`: a connection is a stranger's until a call on it was accepted. Until then it has [`STRANGER_DEADLINE`] for
//! everything: TLS, HTTP/2's first frames, and the headers of a call with the token. Of [`MAX_STRANGERS`] the oldest makes
//! room for the newest, so that whoever opens connections and says nothing keeps nobody out who speaks at once.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::Seldom;

/// How long a connection may take from its first byte to its first accepted call: round trips, on busy hosts.
pub(super) const STRANGER_DEADLINE: Duration = Duration::from_secs(10);
/// Connections without an accepted call. A rank is one for a millisecond; with the usual limit of 1,024 open files this
/// many leave room for everything else.
pub(super) const MAX_STRANGERS: usize = 256;
/// Connections in all: two for each of 4,096 ranks, and people.
pub(super) const MAX_CONNECTIONS: usize = 10_000;
/// Calls at once on one connection: a rank has a watch and at most three others.
pub(super) const MAX_STREAMS: u32 = 32;
/// All headers of a call together; the token is at most 4 KiB.
pub(super) const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Streams that a caller resets before they are answered, at a time.
pub(super) const MAX_PENDING_RESETS: usize = 20;
/// Messages of every method but the two with lists that grow with the model.
pub(super) const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Receipts name every chunk of a rank, 200 bytes each, so this is room for 300,000; reports of loads have digests.
pub(super) const MAX_LARGE_MESSAGE_BYTES: usize = 64 << 20;
/// HTTP/2 pings find dead connections; liveness of ranks is the lease's business.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long the answer to a ping may take.
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Log lines of one kind about what strangers do: a few, then one a second with the number of those that were held back.
pub(super) const LOG_INTERVAL: Duration = Duration::from_secs(1);

static CROWDED: Seldom = Seldom::every(LOG_INTERVAL);

/// Why a stranger is sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// It made no call that was accepted in time.
    Late,
    /// Too many others came after it.
    Crowded,
}

/// One connection, as its calls see it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    standing: Arc<Standing>,
}

#[derive(Debug)]
struct Standing {
    address: SocketAddr,
    accepted: AtomicBool,
    evicted: Notify,
    strangers: Strangers,
}

impl Peer {
    /// Where it is.
    pub(super) fn address(&self) -> SocketAddr {
        self.standing.address
    }

    /// A call on it was accepted: it is no stranger.
    pub(super) fn accept(&self) {
        if !self.standing.accepted.swap(true, Ordering::Relaxed) {
            self.forget();
        }
    }

    /// Whether a call was accepted.
    pub(super) fn is_accepted(&self) -> bool {
        self.standing.accepted.load(Ordering::Relaxed)
    }

    /// It counts no longer.
    pub(super) fn forget(&self) {
        self.standing.strangers.list().retain(|known| !Arc::ptr_eq(&known.standing, &self.standing));
    }

    /// Waits until it must go, if it is a stranger still.
    pub(super) async fn ended(self) -> Ended {
        // Cancel safe: nothing is lost when the other wins.
        tokio::select! {
            () = tokio::time::sleep(STRANGER_DEADLINE) => Ended::Late,
            () = self.standing.evicted.notified() => Ended::Crowded,
        }
    }
}

/// All strangers of a listener, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Strangers {
    peers: Arc<Mutex<VecDeque<Peer>>>,
}

impl Strangers {
    fn list(&self) -> MutexGuard<'_, VecDeque<Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new connection in; the oldest goes when there are too many.
    pub(super) fn admit(&self, address: SocketAddr) -> Peer {
        let (accepted, evicted, strangers) = (AtomicBool::new(false), Notify::new(), self.clone());
        let peer = Peer { standing: Arc::new(Standing { address, accepted, evicted, strangers }) };
        let is_full = {
            let mut list = self.list();
            list.push_back(peer.clone());
            list.len() > MAX_STRANGERS
        };
        if is_full {
            self.evict_oldest();
        }
        peer
    }

    /// Sends the oldest away.
    pub(super) fn evict_oldest(&self) {
        if let Some(oldest) = self.list().pop_front() {
            oldest.standing.evicted.notify_one();
            if let Some(held_back) = CROWDED.pass() {
                let peer = oldest.address();
                tracing::warn!(
                    %peer, held_back, limit = MAX_STRANGERS,
                    "too many connections without an accepted call: closed the oldest"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[tokio::test]
    async fn the_oldest_stranger_makes_room() {
        let strangers = Strangers::default();
        let first = strangers.admit(address(1));
        let known = strangers.admit(address(2));
        known.accept();
        let others: Vec<Peer> = (0..MAX_STRANGERS).map(|_| strangers.admit(address(3))).collect();
        assert_eq!(first.ended().await, Ended::Crowded);
        assert!(known.is_accepted());
        assert_eq!(strangers.list().len(), MAX_STRANGERS);
        drop(others);
    }
}
