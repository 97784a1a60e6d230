//! Sockets and their options. Owns: how a connection is begun, and when a silent host counts as gone.
//! Refuses to know: what is said over it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// When a silent connection is first probed, then every [`KEEPALIVE_INTERVAL`]; after [`KEEPALIVE_PROBES`] unanswered
/// ones the way to the peer counts as cut: after 5 s. The peer's kernel answers, however busy the peer is. A killed process is
/// seen at once, and a host that vanishes by its rank's lease; this is for the way between two hosts.
///
/// Who sends is not timed: the other side of a cut waits for these bytes, is idle, and so finds out. `TCP_USER_TIMEOUT` would end
/// connections to a peer that is alive and does not read for that long, because it computes (measured on Linux 6.18: the window
/// stays closed, and the connection ends although every probe of it is answered).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 3;

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
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rank that computed for more than 30 s was taken for lost by one that had sent it more than its buffers hold.
    #[test]
    fn a_peer_may_take_its_time_to_read() {
        use rustix::net::sockopt;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let stream = start_connect(listener.local_addr().expect("its address")).expect("a socket");
        assert_eq!(sockopt::tcp_user_timeout(&stream).expect("an option"), 0);
        let probes = sockopt::tcp_keepcnt(&stream).expect("an option");
        let silence = sockopt::tcp_keepidle(&stream).expect("an option")
            + sockopt::tcp_keepintvl(&stream).expect("an option") * probes;
        assert_eq!(silence, Duration::from_secs(5));
    }
}
