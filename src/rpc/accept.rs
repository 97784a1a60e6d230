//! Connections of the gRPC listener: accepted, wrapped in TLS, and closed when they stay strangers (`LM-1`).
//!
//! Owns: the accept loop and the stream that tonic serves. Refuses to know: tokens, calls.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::limits::{Ended, LOG_INTERVAL, MAX_CONNECTIONS, Peer, STRANGER_DEADLINE, Strangers};
use crate::clock::Seldom;
use crate::tasks::Tasks;
use crate::tls::{Tls, explain_io};

/// Connections that wait for tonic, which takes them at once.
pub(super) const QUEUE: usize = 64;
/// After the system gave no connection: it has no descriptors left, and some must be closed first.
const PAUSE: Duration = Duration::from_millis(20);

static LATE: Seldom = Seldom::every(LOG_INTERVAL);
static FULL: Seldom = Seldom::every(LOG_INTERVAL);
static HANDSHAKE: Seldom = Seldom::every(LOG_INTERVAL);
static MUTE: Seldom = Seldom::every(LOG_INTERVAL);
static SYSTEM: Seldom = Seldom::every(LOG_INTERVAL);

/// What tonic serves.
pub(super) type Arrived = Result<Guarded, Infallible>;

/// Accepts connections until nobody serves them any more.
pub(super) async fn accept(listener: TcpListener, tls: Option<Tls>, served: mpsc::Sender<Arrived>) {
    let (strangers, slots) = (Strangers::default(), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    let mut handshakes = Tasks::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = served.closed() => return,
        };
        handshakes.reap();
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(held_back) = SYSTEM.pass() {
                    tracing::warn!(%error, held_back, "a connection could not be accepted");
                }
                strangers.evict_oldest();
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            if let Some(held_back) = FULL.pass() {
                tracing::warn!(peer = %address, held_back, limit = MAX_CONNECTIONS, "too many connections: closed one");
            }
            continue;
        };
        // Fails only when the connection is gone already.
        let _ = stream.set_nodelay(true);
        let guard = Guard { peer: strangers.admit(address), _slot: slot, reported: false };
        match &tls {
            None => drop(served.send(Ok(Guarded::new(Transport::Plain(stream), guard))).await),
            Some(tls) => {
                let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(&tls.configs().call_server));
                handshakes.spawn("tls handshake", handshake(acceptor, stream, guard, served.clone()));
            }
        }
    }
}

async fn handshake(
    acceptor: tokio_rustls::TlsAcceptor,
    stream: TcpStream,
    mut guard: Guard,
    served: mpsc::Sender<Arrived>,
) {
    let ended = guard.peer.clone().ended();
    // Cancel safe: what loses is dropped, and the connection with it.
    let result = tokio::select! {
        result = acceptor.accept(stream) => result,
        why = ended => return guard.report(why),
    };
    match result {
        Ok(stream) => drop(served.send(Ok(Guarded::new(Transport::Tls(Box::new(stream)), guard))).await),
        Err(error) => {
            guard.reported = true;
            if let Some(held_back) = HANDSHAKE.pass() {
                let (peer, reason) = (guard.peer.address(), explain_io(&error));
                tracing::warn!(%peer, reason, held_back, "refused a connection");
            }
        }
    }
}

/// A connection's place among all, given back when it is dropped.
struct Guard {
    peer: Peer,
    _slot: OwnedSemaphorePermit,
    /// Whether its end was logged.
    reported: bool,
}

impl Guard {
    fn report(&mut self, why: Ended) {
        self.reported = true;
        // Those that were crowded out are logged where they are.
        if why == Ended::Late
            && let Some(held_back) = LATE.pass()
        {
            let (peer, seconds) = (self.peer.address(), STRANGER_DEADLINE.as_secs());
            tracing::warn!(%peer, seconds, held_back, "closed a connection that made no accepted call in time");
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.peer.is_accepted() {
            return;
        }
        self.peer.forget();
        if !self.reported
            && let Some(held_back) = MUTE.pass()
        {
            tracing::warn!(peer = %self.peer.address(), held_back, "a connection ended without an accepted call");
        }
    }
}

enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that ends by itself when it stays a stranger.
pub(super) struct Guarded {
    transport: Transport,
    guard: Guard,
    probation: Option<Pin<Box<dyn Future<Output = Ended> + Send>>>,
}

impl Guarded {
    fn new(transport: Transport, guard: Guard) -> Self {
        let probation = Some(Box::pin(guard.peer.clone().ended()) as Pin<Box<_>>);
        Self { transport, guard, probation }
    }

    /// An error once it must go.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.guard.reported {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let Some(probation) = &mut self.probation else { return Ok(()) };
        if self.guard.peer.is_accepted() {
            self.probation = None;
        } else if let Poll::Ready(why) = probation.as_mut().poll(context) {
            self.guard.report(why);
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl Connected for Guarded {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.guard.peer.clone()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(context),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(context),
        }
    }
}

/// The peer of a request that came over a [`Guarded`] connection.
pub(super) fn address_of(peer: Option<&Peer>) -> SocketAddr {
    peer.map_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)), Peer::address)
}
