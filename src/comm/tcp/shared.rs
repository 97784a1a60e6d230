//! What the communicator's thread shares with its abort handles.
//!
//! Owns: the event that wakes the thread, and the list of its sockets, so that an abort from another thread closes them
//! all at once. Refuses to know: frames, collectives, who waits for what.
//!
//! `CM-2`: an abort is one write to an event descriptor that every wait polls.
//! `CM-3`: a goodbye travels against the direction of the data, where nothing else ever travels, so it can be written at
//! any moment by any thread.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::EventfdFlags;

use super::pipe::Pipe;
use super::wire::encode_goodbye;
use crate::comm::error::Goodbye;
use crate::types::Rank;

/// The sockets of one communicator.
#[derive(Debug)]
pub(super) struct Shared {
    /// Our rank, for goodbyes; known once the group is.
    own: OnceLock<Rank>,
    /// Readable once the communicator is aborted.
    pub(super) wake: OwnedFd,
    pub(super) listener: TcpListener,
    sockets: Mutex<Sockets>,
}

#[derive(Debug, Default)]
struct Sockets {
    closed: bool,
    /// Connections on which peers send to us, and we say goodbye.
    incoming: Vec<Arc<Pipe>>,
    /// Connections on which we send.
    outgoing: Vec<Arc<Pipe>>,
}

impl Shared {
    pub(super) fn new(listener: TcpListener) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { own: OnceLock::new(), wake, listener, sockets: Mutex::default() })
    }

    /// Says which rank this is; before that there are no peers to say goodbye to.
    pub(super) fn set_own(&self, own: Rank) {
        self.own.get_or_init(|| own);
    }

    /// What an abort does, from any thread: wakes ours and closes.
    pub(super) fn abort(&self, reason: &str) {
        self.wake();
        let culprit = self.own.get().copied().unwrap_or(Rank::ZERO);
        self.close(&Goodbye::Aborted { culprit, reason: reason.to_owned() });
    }

    /// Wakes the communicator's thread now and whenever it would wait again.
    fn wake(&self) {
        // The only failure of a first write to an event descriptor is a counter that is full, which wakes as well.
        let _already_awake = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub(super) fn add_incoming(&self, stream: &Arc<Pipe>) {
        self.add(stream, |sockets| &mut sockets.incoming);
    }

    pub(super) fn add_outgoing(&self, stream: &Arc<Pipe>) {
        self.add(stream, |sockets| &mut sockets.outgoing);
    }

    fn add(&self, stream: &Arc<Pipe>, list: impl FnOnce(&mut Sockets) -> &mut Vec<Arc<Pipe>>) {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        if sockets.closed {
            stream.shut();
        } else {
            list(&mut sockets).push(Arc::clone(stream));
        }
    }

    /// Says goodbye to everybody who sends to us and ends all connections, now and those to come. Never blocks; only the
    /// first call has an effect.
    pub(super) fn close(&self, goodbye: &Goodbye) {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut sockets.closed, true) {
            return;
        }
        let message = encode_goodbye(goodbye, self.own.get().copied().unwrap_or(Rank::ZERO));
        for stream in sockets.incoming.drain(..) {
            // A peer that cannot hear us any more has nothing to learn from us.
            stream.say(&message);
            stream.shut();
        }
        sockets.outgoing.drain(..).for_each(|stream| stream.shut());
        // On Linux this refuses connections that are still queued, so that their dialers do not wait for us.
        let _not_listening = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    /// Cuts all connections without a word, as the kernel does for a process that was killed.
    #[cfg(test)]
    pub(super) fn vanish(&self) {
        let mut sockets = self.sockets.lock().expect("no test panics in here");
        sockets.closed = true;
        sockets.incoming.drain(..).for_each(|stream| stream.shut());
        sockets.outgoing.drain(..).for_each(|stream| stream.shut());
    }
}
