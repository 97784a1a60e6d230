//! Sockets and their options. Owns: how a connection is begun, and when a silent host counts as gone.
//! Refuses to know: what is said over it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// When a silent connection is first probed, then every [`KEEPALIVE_INTERVAL`]; after [`KEEPALIVE_PROBES`] unanswered
/// ones the peer's host counts as gone: after 30 s. A killed process is seen at once; this is for hosts that vanish.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// The same 30 s for a host that vanishes while bytes to it are unacknowledged.
const UNACKNOWLEDGED_MS: u32 = 30_000;

/// A socket that is connecting to `address`.
pub(super) fn start_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    let stream = TcpStream::from(socket);
    prepare(&stream)?;
    match rustix::net::connect(&stream, &address) {
        // A refused connection shows when the handshake looks at the socket.
        Ok(()) | Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::INTR) => Ok(stream),
        Err(error) => Err(error.into()),
    }
}

/// The options of every connection. Buffer sizes are left to the kernel, which grows them as the connection needs.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS)?;
    Ok(())
}
