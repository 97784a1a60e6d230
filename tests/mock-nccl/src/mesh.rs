//! How the ranks of a mock communicator find and reach each other.
//!
//! Owns: the rendezvous, one connection between each two ranks, a thread for each that reads what arrives.
//! Refuses to know: operations.
//!
//! Messages are a length of 8 bytes and the bytes. Everything that arrives is kept in memory at once, so sending never
//! waits for the receiver's operation.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::fault::Fault;
use crate::id::UniqueId;

/// How long the rendezvous waits for the next rank; then its thread ends.
const RENDEZVOUS_PATIENCE: Duration = Duration::from_secs(120);
/// The longest message; larger ones are a defect of the test.
const MAX_MESSAGE_BYTES: u64 = 1 << 32;

/// What the rendezvous and the connections can be cut short with.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<(bool, Vec<TcpStream>, Vec<TcpListener>)>);

impl Sockets {
    fn lock(&self) -> MutexGuard<'_, (bool, Vec<TcpStream>, Vec<TcpListener>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, stream: &TcpStream) -> io::Result<()> {
        let mut sockets = self.lock();
        if sockets.0 {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        sockets.1.push(stream.try_clone()?);
        Ok(())
    }

    fn add_listener(&self, listener: &TcpListener) -> io::Result<()> {
        let mut sockets = self.lock();
        if sockets.0 {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        sockets.2.push(listener.try_clone()?);
        Ok(())
    }

    /// Ends all connections, and those that are being made.
    pub(crate) fn shut(&self) {
        let mut sockets = self.lock();
        sockets.0 = true;
        for stream in sockets.1.drain(..) {
            let _already_gone = stream.shutdown(Shutdown::Both);
        }
        for listener in sockets.2.drain(..) {
            let _already_gone = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
        }
    }
}

/// The other ranks, once connected.
#[derive(Debug)]
pub(crate) struct Mesh {
    peers: Vec<Option<Peer>>,
}

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    inbox: Arc<Inbox>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Inbox {
    state: Mutex<(VecDeque<Vec<u8>>, bool)>,
    changed: Condvar,
}

/// Opens a place for the ranks to meet and gives its id.
pub(crate) fn start_rendezvous(fault: Fault) -> io::Result<UniqueId> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // On Linux the receive timeout of a listener bounds accept.
    let limit = Some(RENDEZVOUS_PATIENCE);
    rustix::net::sockopt::set_socket_timeout(&listener, rustix::net::sockopt::Timeout::Recv, limit)?;
    let mut token = [0; 8];
    let _filled = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    let token = u64::from_le_bytes(token);
    let id = UniqueId::new(listener.local_addr()?.port(), token, fault);
    std::thread::Builder::new().name("mock-nccl-meet".into()).spawn(move || {
        // The ranks see their connections end when this fails.
        let _failed = meet(&listener, token);
    })?;
    Ok(id)
}

/// Waits for all ranks and tells everybody the ports of all.
fn meet(listener: &TcpListener, token: u64) -> io::Result<()> {
    let mut arrived: Vec<(u32, u16, TcpStream)> = Vec::new();
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(RENDEZVOUS_PATIENCE))?;
        if u64::from_le_bytes(read(&mut stream)?) != token {
            continue;
        }
        let (rank, ranks) = (u32::from_le_bytes(read(&mut stream)?), u32::from_le_bytes(read(&mut stream)?));
        let port = u16::from_le_bytes(read(&mut stream)?);
        arrived.push((rank, port, stream));
        if u32::try_from(arrived.len()).is_ok_and(|count| count == ranks) {
            break;
        }
    }
    arrived.sort_by_key(|(rank, ..)| *rank);
    let ports: Vec<u8> = arrived.iter().flat_map(|(_, port, _)| port.to_le_bytes()).collect();
    arrived.iter_mut().try_for_each(|(.., stream)| stream.write_all(&ports))
}

fn read<const N: usize>(stream: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Mesh {
    /// Meets the others and connects with each. `sockets` can cut this short.
    pub(crate) fn connect(id: &UniqueId, rank: u32, ranks: u32, sockets: &Sockets) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        sockets.add_listener(&listener)?;
        let mut meeting = TcpStream::connect((Ipv4Addr::LOCALHOST, id.port()))?;
        sockets.add(&meeting)?;
        meeting.write_all(&id.token().to_le_bytes())?;
        meeting.write_all(&rank.to_le_bytes())?;
        meeting.write_all(&ranks.to_le_bytes())?;
        meeting.write_all(&listener.local_addr()?.port().to_le_bytes())?;
        let ports: Vec<u16> =
            (0..ranks).map(|_| read(&mut meeting).map(u16::from_le_bytes)).collect::<io::Result<_>>()?;
        let mut mesh = Self { peers: (0..ranks).map(|_| None).collect() };
        // Everybody dials the lower ranks, in order, and then waits for the higher ones.
        for (lower, &port) in (0..rank).zip(&ports) {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            sockets.add(&stream)?;
            stream.write_all(&rank.to_le_bytes())?;
            mesh.add(lower, stream)?;
        }
        for _ in rank + 1..ranks {
            let (mut stream, _) = listener.accept()?;
            sockets.add(&stream)?;
            let from = u32::from_le_bytes(read(&mut stream)?);
            mesh.add(from, stream)?;
        }
        Ok(mesh)
    }

    fn add(&mut self, rank: u32, stream: TcpStream) -> io::Result<()> {
        let inbox = Arc::new(Inbox::default());
        let (mut reading, filled) = (stream.try_clone()?, Arc::clone(&inbox));
        stream.set_nodelay(true)?;
        let reader = std::thread::Builder::new().name(format!("mock-nccl-from-{rank}")).spawn(move || {
            while let Ok(message) = read_message(&mut reading) {
                filled.lock().0.push_back(message);
                filled.changed.notify_all();
            }
            filled.lock().1 = true;
            filled.changed.notify_all();
        })?;
        let slot = usize::try_from(rank).ok().and_then(|rank| self.peers.get_mut(rank));
        *slot.ok_or(io::ErrorKind::InvalidData)? = Some(Peer { stream, inbox, reader: Some(reader) });
        Ok(())
    }

    /// Sends a message.
    pub(crate) fn send(&mut self, to: u32, bytes: &[u8]) -> io::Result<()> {
        let peer = self.peer(to)?;
        let length = u64::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        peer.stream.write_all(&length.to_le_bytes())?;
        peer.stream.write_all(bytes)
    }

    /// The next message; an error when the peer is gone.
    pub(crate) fn receive(&mut self, from: u32) -> io::Result<Vec<u8>> {
        let inbox = &self.peer(from)?.inbox;
        let mut state = inbox.lock();
        loop {
            if let Some(message) = state.0.pop_front() {
                return Ok(message);
            }
            if state.1 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            state = inbox.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn peer(&mut self, rank: u32) -> io::Result<&mut Peer> {
        let peer = usize::try_from(rank).ok().and_then(|rank| self.peers.get_mut(rank)).and_then(Option::as_mut);
        peer.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for peer in self.peers.iter_mut().flatten() {
            let _already_gone = peer.stream.shutdown(Shutdown::Both);
            if let Some(reader) = peer.reader.take() {
                let _panicked = reader.join();
            }
        }
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, (VecDeque<Vec<u8>>, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = u64::from_le_bytes(read(stream)?);
    if length > MAX_MESSAGE_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; usize::try_from(length).map_err(|_| io::ErrorKind::InvalidData)?];
    stream.read_exact(&mut message)?;
    Ok(message)
}
