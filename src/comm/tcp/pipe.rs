//! One connection, plain or in TLS.
//!
//! Owns: the socket, and where there are certificates the TLS session on it. Refuses to know: frames, handshakes of ranks.
//!
//! Nothing here waits: what cannot be done now is [`io::ErrorKind::WouldBlock`]. In TLS bytes are taken before they are sent,
//! so who has written waits for [`Pipe::flush`] too; and reads go on until they would wait, because bytes that were decrypted
//! already wake nobody. The session is behind a mutex, because a goodbye may come from any thread (`CM-3`).

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SendAncillaryBuffer, SendFlags};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};

use super::handshake::Wants;
use super::wire::{FRAME_BYTES, HEADER_BYTES};
use crate::tls::{Tls, explain};

/// What binds a rank's proof to the TLS session that it is given in (RFC 5705).
const BINDING_LABEL: &[u8] = b"EXPORTER-weightcast-data";
/// Bytes of it.
pub(super) const BINDING_BYTES: usize = 32;

/// A connection.
#[derive(Debug)]
pub(super) struct Pipe {
    stream: TcpStream,
    session: Option<Mutex<Connection>>,
}

impl Pipe {
    /// The dialer's end.
    pub(super) fn dialed(stream: TcpStream, tls: Option<&Tls>) -> io::Result<Self> {
        let session = match tls {
            None => None,
            Some(tls) => {
                // No name is checked on the data plane (`TL-3`); one must be given.
                let name = ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into());
                let session = ClientConnection::new(Arc::clone(&tls.configs().data_client), name);
                Some(Connection::Client(session.map_err(io::Error::other)?))
            }
        };
        Ok(Self::new(stream, session))
    }

    /// The acceptor's end.
    pub(super) fn accepted(stream: TcpStream, tls: Option<&Tls>) -> io::Result<Self> {
        let session = match tls {
            None => None,
            Some(tls) => {
                let session = ServerConnection::new(Arc::clone(&tls.configs().data_server));
                Some(Connection::Server(session.map_err(io::Error::other)?))
            }
        };
        Ok(Self::new(stream, session))
    }

    fn new(stream: TcpStream, session: Option<Connection>) -> Self {
        let session = session.map(|mut session| {
            // A whole frame is taken at once.
            session.set_buffer_limit(Some(2 * FRAME_BYTES + HEADER_BYTES));
            Mutex::new(session)
        });
        Self { stream, session }
    }

    /// The TLS session, if there is one.
    fn session(&self) -> Option<MutexGuard<'_, Connection>> {
        self.session.as_ref().map(|session| session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes on with the TLS handshake; what it waits for, if it is not done. A plain connection has none.
    pub(super) fn shake_hands(&self) -> io::Result<Option<Wants>> {
        let Some(mut session) = self.session() else { return Ok(None) };
        loop {
            if would_block(self.flush_session(&mut session))? {
                return Ok(Some(Wants::Write));
            }
            if !session.is_handshaking() {
                return Ok(None);
            }
            if would_block(self.fill(&mut session))? {
                return Ok(Some(Wants::Read));
            }
        }
    }

    /// A secret of this TLS session that both ends know; zeros without TLS.
    pub(super) fn binding(&self) -> io::Result<[u8; BINDING_BYTES]> {
        match self.session() {
            None => Ok([0; BINDING_BYTES]),
            Some(session) => {
                session.export_keying_material([0; BINDING_BYTES], BINDING_LABEL, None).map_err(io::Error::other)
            }
        }
    }

    /// Sends what is taken of `parts`; the number of bytes.
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(mut session) = self.session() else {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let sent = rustix::net::sendmsg(&self.stream, parts, &mut SendAncillaryBuffer::default(), flags);
            return sent.map_err(io::Error::from);
        };
        self.flush_session(&mut session)?;
        let taken = session.writer().write_vectored(parts)?;
        // What is not sent now, a flush sends.
        would_block(self.flush_session(&mut session))?;
        Ok(taken)
    }

    /// Sends what was taken and not sent yet.
    pub(super) fn flush(&self) -> io::Result<()> {
        match self.session() {
            None => Ok(()),
            Some(mut session) => self.flush_session(&mut session),
        }
    }

    /// Reads what has arrived.
    pub(super) fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        match self.session() {
            None => (&self.stream).read(into),
            Some(mut session) => self.read_session(&mut session, into),
        }
    }

    /// Reads what has arrived into the first of `parts`, and perhaps the others.
    pub(super) fn read_vectored(&self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self.session() {
            None => (&self.stream).read_vectored(parts),
            Some(mut session) => match parts.iter_mut().find(|part| !part.is_empty()) {
                Some(part) => self.read_session(&mut session, part),
                None => Ok(0),
            },
        }
    }

    fn read_session(&self, session: &mut Connection, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match session.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.fill(session)?,
                // A peer that was killed says no goodbye, in TLS either; that is the end of the connection as any other.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
        }
    }

    /// Takes what has arrived and decrypts it.
    fn fill(&self, session: &mut Connection) -> io::Result<()> {
        let count = session.read_tls(&mut &self.stream)?;
        if let Err(error) = session.process_new_packets() {
            // The other side hears why, as far as it goes.
            let _unheard = self.flush_session(session);
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {}", explain(&error))));
        }
        if count == 0 && session.is_handshaking() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // An answer to a change of keys; it may wait for the next write.
        would_block(self.flush_session(session)).map(drop)
    }

    fn flush_session(&self, session: &mut Connection) -> io::Result<()> {
        while session.wants_write() {
            match session.write_tls(&mut Unsignalled(&self.stream)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Says something as far as the socket takes it.
    pub(super) fn say(&self, message: &[u8]) {
        // A peer whose buffer is full sees the end of the connection instead.
        let _unheard = self.send(&[IoSlice::new(message)]);
    }

    /// Ends the connection in both directions.
    pub(super) fn shut(&self) {
        // Fails only when the connection is gone already.
        let _already_gone = self.stream.shutdown(Shutdown::Both);
    }

    pub(super) fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.stream.take_error()
    }

    pub(super) fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Writes without SIGPIPE.
struct Unsignalled<'a>(&'a TcpStream);

impl io::Write for Unsignalled<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(rustix::net::sendmsg(self.0, parts, &mut SendAncillaryBuffer::default(), flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether something could not go on; other errors stay errors.
fn would_block(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}
