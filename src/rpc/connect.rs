//! A client's way to the coordinator over TLS.
//!
//! Owns: dialing, the handshake with our certificate, and waiting for the first byte of the answer: with TLS 1.3 a client
//! is done before the server has looked at its certificate, so only that byte says that it was accepted.
//! Refuses to know: HTTP/2, calls.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::codegen::{BoxFuture, Service, http};

use crate::tls::{Tls, explain_io};

/// The first bytes of HTTP/2's settings.
const FIRST_BYTES: usize = 64;

/// Makes connections for a channel.
#[derive(Clone, Debug)]
pub(super) struct TlsConnector {
    tls: Tls,
    /// `host:port`.
    address: String,
    /// Why the last handshake failed; tonic's own errors do not say.
    failure: Arc<Mutex<Option<String>>>,
}

impl TlsConnector {
    pub(super) fn new(tls: Tls, address: &str) -> Self {
        Self { tls, address: address.to_owned(), failure: Arc::default() }
    }

    /// Why the last handshake failed, if one did.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn connect(self) -> io::Result<TokioIo<Opened>> {
        let stream = TcpStream::connect(&self.address).await?;
        stream.set_nodelay(true)?;
        match self.shake_hands(stream).await {
            Ok(opened) => Ok(TokioIo::new(opened)),
            Err(error) => {
                let reason = explain_io(&error);
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.clone());
                // The files may have been rotated since they were read: the next try has what they hold now.
                let _ = crate::tasks::blocking(move || self.tls.refresh()).await;
                Err(io::Error::new(error.kind(), reason))
            }
        }
    }

    async fn shake_hands(&self, stream: TcpStream) -> io::Result<Opened> {
        let name = self.tls.files().server_name.as_deref().unwrap_or_else(|| host_of(&self.address));
        let name = ServerName::try_from(name.to_owned()).map_err(|_| {
            let reason = format!("{name:?} is no name that a certificate could have");
            io::Error::new(io::ErrorKind::InvalidInput, reason)
        })?;
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&self.tls.configs().call_client));
        let mut stream = connector.connect(name, stream).await?;
        let mut first = [0; FIRST_BYTES];
        let count = stream.read(&mut first).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Opened { stream, first, from: 0, to: count })
    }
}

/// The host of a `host:port`, without the brackets of an IPv6 address.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

impl Service<http::Uri> for TlsConnector {
    type Response = TokioIo<Opened>;
    type Error = io::Error;
    type Future = BoxFuture<Self::Response, io::Error>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: http::Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

/// A stream whose first bytes were read already.
#[derive(Debug)]
pub(super) struct Opened {
    stream: TlsStream<TcpStream>,
    first: [u8; FIRST_BYTES],
    from: usize,
    to: usize,
}

impl AsyncRead for Opened {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.from < self.to {
            let end = self.to.min(self.from + into.remaining());
            into.put_slice(self.first.get(self.from..end).unwrap_or_default());
            self.from = end;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Opened {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_an_address() {
        let hosts = ["127.0.0.1:1", "[::1]:1", "coordinator.svc:29400", "bare"].map(host_of);
        assert_eq!(hosts, ["127.0.0.1", "::1", "coordinator.svc", "bare"]);
    }
}
