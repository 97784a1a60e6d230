//! The thread that carries packets from one host's device to another's (`NT-2`).
//!
//! Owns: the devices, packets that are late, the counts. Refuses to know: which packets pass (see `rules`).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::NetError;
use crate::rules::Rules;

/// Longer than any packet.
const PACKET_BYTES: usize = 1 << 16;
/// Packets that are late and wait; more are lost, as in any queue.
const QUEUE: usize = 1 << 14;
/// Packets of one host that are carried before the next host has its turn.
const TURN: usize = 64;
/// Where in an IPv4 header the addresses of sender and receiver are.
const ADDRESSES: [std::ops::Range<usize>; 2] = [12..16, 16..20];

/// Packets so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Carried to their host.
    pub forwarded: u64,
    /// Dropped by a rule, lost in bad weather, or for nobody.
    pub dropped: u64,
}

/// A packet that is late: when it is due, its place among those that are due then, from, to, and its bytes.
type Late = Reverse<(Instant, u64, Ipv4Addr, Ipv4Addr, Vec<u8>)>;

#[derive(Debug)]
struct State {
    rules: Rules,
    devices: BTreeMap<Ipv4Addr, Arc<OwnedFd>>,
    late: BinaryHeap<Late>,
    sent: u64,
    counts: Counts,
    is_over: bool,
}

/// The thread's handle; it ends with it.
#[derive(Debug)]
pub(crate) struct Switch {
    state: Arc<Mutex<State>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Switch {
    pub(crate) fn start(seed: u64) -> Result<Self, NetError> {
        let failed = |action| move |source: std::io::Error| NetError::System { action, source };
        let state = State {
            rules: Rules::new(seed),
            devices: BTreeMap::new(),
            late: BinaryHeap::new(),
            sent: 0,
            counts: Counts::default(),
            is_over: false,
        };
        let state = Arc::new(Mutex::new(state));
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(std::io::Error::from).map_err(failed("make an event"))?);
        let (of_thread, waker) = (state.clone(), wake.clone());
        let builder = std::thread::Builder::new().name("switch".to_owned());
        let thread = builder.spawn(move || run(&of_thread, &waker)).map_err(failed("start the switch"))?;
        Ok(Self { state, wake, thread: Some(thread) })
    }

    /// How many hosts are plugged in.
    pub(crate) fn hosts(&self) -> usize {
        lock(&self.state).devices.len()
    }

    pub(crate) fn plug(&self, address: Ipv4Addr, device: OwnedFd) -> Result<(), NetError> {
        let failed = |errno: rustix::io::Errno| NetError::System { action: "set up a device", source: errno.into() };
        rustix::io::ioctl_fionbio(&device, true).map_err(failed)?;
        lock(&self.state).devices.insert(address, Arc::new(device));
        self.wake();
        Ok(())
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut lock(&self.state).rules);
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    fn wake(&self) {
        // It fails only when it was woken up 2^64 times.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        lock(&self.state).is_over = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(state: &Mutex<State>, wake: &OwnedFd) {
    let mut packet = vec![0_u8; PACKET_BYTES];
    loop {
        let (devices, due) = {
            let mut state = lock(state);
            if state.is_over {
                return;
            }
            state.deliver_late(now());
            let devices: Vec<Arc<OwnedFd>> = state.devices.values().cloned().collect();
            (devices, state.late.peek().map(|Reverse((due, ..))| *due))
        };
        let readable = wait(wake, &devices, due);
        for (device, _) in devices.iter().zip(readable).filter(|(_, readable)| *readable) {
            for _ in 0..TURN {
                // Nothing left, or the device went with its host.
                let Ok(length) = rustix::io::read(&**device, &mut packet[..]) else { break };
                lock(state).carry(packet.get(..length).unwrap_or_default(), now());
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "packets are late by the clock")]
fn now() -> Instant {
    Instant::now()
}

/// Waits for packets, for a change, or until a packet is due; which devices have packets.
fn wait(wake: &OwnedFd, devices: &[Arc<OwnedFd>], due: Option<Instant>) -> Vec<bool> {
    let mut waited: Vec<PollFd<'_>> = devices.iter().map(|device| PollFd::new(&**device, PollFlags::IN)).collect();
    waited.push(PollFd::new(wake, PollFlags::IN));
    let left = due.map(|due| due.saturating_duration_since(now()));
    let left = left.map(|left| Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    });
    // An interruption is a look too many.
    let _ = poll(&mut waited, left.as_ref());
    if waited.pop().is_some_and(|wake| wake.revents().contains(PollFlags::IN)) {
        let _ = rustix::io::read(wake, &mut [0_u8; 8]);
    }
    waited.iter().map(|device| device.revents().contains(PollFlags::IN)).collect()
}

impl State {
    /// A host has sent a packet.
    fn carry(&mut self, packet: &[u8], now: Instant) {
        // A new device asks for IPv6 routers; nobody has any business with IPv6 here.
        let Some([from, to]) = addresses(packet) else { return };
        let is_known = self.devices.contains_key(&to);
        match self.rules.delay(from, to).filter(|_| is_known && self.late.len() < QUEUE) {
            None => self.counts.dropped += 1,
            Some(Duration::ZERO) => self.deliver(to, packet),
            Some(delay) => {
                self.sent += 1;
                self.late.push(Reverse((now + delay, self.sent, from, to, packet.to_vec())));
            }
        }
    }

    fn deliver_late(&mut self, now: Instant) {
        while self.late.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            let Some(Reverse((_, _, from, to, packet))) = self.late.pop() else { return };
            // What was under way when the link was cut does not arrive.
            if self.rules.is_cut(from, to) {
                self.counts.dropped += 1;
            } else {
                self.deliver(to, &packet);
            }
        }
    }

    fn deliver(&mut self, to: Ipv4Addr, packet: &[u8]) {
        // A full queue loses packets, as any does.
        let is_taken = self.devices.get(&to).is_some_and(|device| rustix::io::write(&**device, packet).is_ok());
        let count = if is_taken { &mut self.counts.forwarded } else { &mut self.counts.dropped };
        *count += 1;
    }
}

/// The addresses of sender and receiver of an IPv4 packet.
fn addresses(packet: &[u8]) -> Option<[Ipv4Addr; 2]> {
    packet.first().filter(|first| **first >> 4 == 4)?;
    let [from, to] = ADDRESSES.map(|range| packet.get(range).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()));
    Some([from?.into(), to?.into()])
}
