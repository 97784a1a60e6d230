//! One host's namespaces: making them, entering them, and sockets in them (`NT-1`).
//!
//! Owns: what asks the kernel, and with it all unsafe code of this crate. Refuses to know: packets.
//!
//! A process with threads cannot change its user namespace, so everything here happens in a child between fork and exec; what it
//! makes there (the TUN device's other end, a socket) it sends back over a socket pair.
#![expect(unsafe_code, reason = "work between fork and exec, and one ioctl, which no library has")]

use std::ffi::{CStr, c_int, c_short};
use std::io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, socket_with, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};

use crate::NetError;

/// Sets the device up, says so, and then holds the namespaces until nobody has the other end of its standard input.
const HOLD: &str = r#"set -e
ip link set lo up
ip address add "$ADDRESS/24" dev net0
ip link set net0 mtu 9000 up
mount --bind "$NAMES" /etc/hosts
echo ready
exec cat
"#;
/// The name of a host's device.
const DEVICE: &[u8] = b"net0";
/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);
/// `IFF_TUN | IFF_NO_PI` of linux/if_tun.h: IP packets, as they are.
const TUN_FLAGS: c_short = 0x1001;
/// All that a host has of its own.
const KINDS: ThreadNameSpaceType = ThreadNameSpaceType::USER
    .union(ThreadNameSpaceType::NETWORK)
    .union(ThreadNameSpaceType::MOUNT)
    .union(ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME);
const NEW_KINDS: UnshareFlags =
    UnshareFlags::NEWUSER.union(UnshareFlags::NEWNET).union(UnshareFlags::NEWNS).union(UnshareFlags::NEWUTS);
/// Linux has no longer paths.
const PATH_BYTES: usize = 4096;

/// `struct ifreq` of net/if.h.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: c_short,
    rest: [u8; 22],
}

/// A host's namespaces, and the process that holds them.
#[derive(Debug)]
pub(crate) struct Namespace {
    holder: Child,
    process: Arc<OwnedFd>,
}

impl Namespace {
    /// Makes the namespaces; with them comes the other end of the host's device.
    pub(crate) fn open(name: &str, address: Ipv4Addr, names: &Path) -> Result<(Self, OwnedFd), NetError> {
        let refused = |action| {
            let host = name.to_owned();
            move |source: io::Error| NetError::NotPermitted { host, action, source }
        };
        let (ours, theirs) = pair().map_err(refused("make a socket pair"))?;
        let mut command = Command::new("sh");
        command.args(["-c", HOLD]).env("ADDRESS", address.to_string()).env("NAMES", names);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let (users, groups) = (format!("0 {user} 1").into_bytes(), format!("0 {group} 1").into_bytes());
        let host_name = name.as_bytes().to_vec();
        let make = move || {
            // SAFETY: a child that was just forked has one thread, and the file table is not unshared.
            unsafe { unshare_unsafe(NEW_KINDS) }?;
            write(c"/proc/self/setgroups", b"deny")?;
            write(c"/proc/self/uid_map", &users)?;
            write(c"/proc/self/gid_map", &groups)?;
            rustix::system::sethostname(&host_name)?;
            send(&theirs, &open_device()?)
        };
        // SAFETY: `make` calls the kernel and nothing else: it takes no lock and allocates nothing.
        unsafe { command.pre_exec(make) };
        let mut holder = command.spawn().map_err(refused("make its namespaces"))?;
        // The other end, so that a child that sent nothing is an error here and no wait.
        drop(command);
        let found = expect_ready(&mut holder).map_err(|said| NetError::SetUp { host: name.to_owned(), said });
        let device = found.and_then(|()| receive(&ours).map_err(refused("hand over its device")));
        let process = i32::try_from(holder.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput);
        let process = process.map_err(io::Error::from).and_then(|id| Ok(pidfd_open(id, PidfdFlags::empty())?));
        match (device, process.map_err(refused("refer to its process"))) {
            (Ok(device), Ok(process)) => Ok((Self { holder, process: Arc::new(process) }, device)),
            (Err(error), _) | (_, Err(error)) => {
                end(&mut holder);
                Err(error)
            }
        }
    }

    /// Has a command run in these namespaces, in the directory that it would have run in.
    pub(crate) fn enter(&self, command: &mut Command) {
        let process = self.process.clone();
        // SAFETY: `move_in` calls the kernel and nothing else: it takes no lock and allocates nothing.
        unsafe { command.pre_exec(move || move_in(&process)) };
    }

    /// A TCP socket of these namespaces.
    pub(crate) fn socket(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = pair()?;
        let process = self.process.clone();
        let mut command = Command::new("true");
        let make = move || {
            move_in(&process)?;
            send(&theirs, &socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
        };
        // SAFETY: as above.
        unsafe { command.pre_exec(make) };
        let status = command.status();
        drop(command);
        status?;
        receive(&ours)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        end(&mut self.holder);
    }
}

fn end(holder: &mut Child) {
    // It may have ended by itself.
    let _ = holder.kill();
    let _ = holder.wait();
}

fn expect_ready(holder: &mut Child) -> Result<(), String> {
    let mut line = String::new();
    let read = holder.stdout.as_mut().map(|stdout| BufReader::new(stdout).read_line(&mut line));
    if matches!(read, Some(Ok(_))) && line == "ready\n" {
        return Ok(());
    }
    let mut said = String::new();
    let _ = holder.stderr.as_mut().map(|stderr| stderr.read_to_string(&mut said));
    Err(said.trim().to_owned())
}

fn move_in(process: &OwnedFd) -> io::Result<()> {
    // The last byte stays 0.
    let (mut text, mut path) = ([0; PATH_BYTES], [MaybeUninit::uninit(); PATH_BYTES - 1]);
    let (directory, _) = rustix::fs::readlinkat_raw(CWD, c"/proc/self/cwd", &mut path)?;
    text.iter_mut().zip(&*directory).for_each(|(place, byte)| *place = *byte);
    let directory = CStr::from_bytes_until_nul(&text).map_err(|_| io::ErrorKind::InvalidFilename)?;
    move_into_thread_name_spaces(process.as_fd(), KINDS)?;
    // Another mount namespace begins at its root.
    Ok(rustix::process::chdir(directory)?)
}

fn write(path: &CStr, text: &[u8]) -> io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let written = rustix::io::write(&file, text)?;
    if written == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn open_device() -> io::Result<OwnedFd> {
    let device = rustix::fs::open(c"/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut request = InterfaceRequest { name: [0; 16], flags: TUN_FLAGS, rest: [0; 22] };
    for (place, byte) in request.name.iter_mut().zip(DEVICE) {
        *place = *byte;
    }
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is.
    unsafe { ioctl(&device, Updater::<TUNSETIFF, _>::new(&mut request)) }?;
    Ok(device)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn send(socket: &OwnedFd, file: &OwnedFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&files));
    rustix::net::sendmsg(socket, &[IoSlice::new(b"f")], &mut control, SendFlags::empty())?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    files.next().and_then(|mut files| files.next()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Connects a socket, within a limit.
pub(crate) fn connect(socket: &OwnedFd, address: SocketAddr, limit: Duration) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, true)?;
    match rustix::net::connect(socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let seconds = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX);
    let limit = Timespec { tv_sec: seconds, tv_nsec: limit.subsec_nanos().into() };
    if poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&limit))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    rustix::net::sockopt::socket_error(socket)??;
    rustix::io::ioctl_fionbio(socket, false)?;
    Ok(())
}
