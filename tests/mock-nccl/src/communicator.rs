//! One mock communicator: a thread that carries out operations in the order of calls.
//!
//! Owns: the state that callers ask for, the operations, carrying out faults. Refuses to know: how ranks are connected.
//!
//! Buffers are addresses that the caller keeps alive until the operation has ended or the communicator was freed, which
//! is NCCL's own rule; both wait for the thread.

use std::collections::VecDeque;
use std::ffi::{CString, c_char, c_int};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use crate::fault::{Fault, Kind};
use crate::id::UniqueId;
use crate::mesh::{Mesh, Sockets};
use crate::{IN_PROGRESS, INTERNAL_ERROR, REMOTE_ERROR, SUCCESS, SYSTEM_ERROR};

/// One operation. Buffers are addresses; lengths are bytes.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    Send { send: usize, bytes: usize, to: u32 },
    Receive { recv: usize, bytes: usize, from: u32 },
    Broadcast { send: usize, recv: usize, bytes: usize, root: u32 },
    Reduce { send: usize, recv: usize, bytes: usize, root: u32 },
    AllReduce { send: usize, recv: usize, bytes: usize },
    AllGather { send: usize, recv: usize, bytes: usize },
    ReduceScatter { send: usize, recv: usize, bytes: usize },
}

/// What callers hold.
#[derive(Debug)]
pub struct Communicator {
    rank: u32,
    fault: Fault,
    state: Mutex<State>,
    changed: Condvar,
    sockets: Sockets,
    last_error: OnceLock<CString>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct State {
    /// Groups of operations that are not done yet, the current one included.
    pending: VecDeque<(Vec<Work>, Kind)>,
    ready: bool,
    stopped: bool,
    error: c_int,
    calls: u64,
}

impl Communicator {
    /// A communicator that is connecting.
    pub(crate) fn start(id: UniqueId, rank: u32, ranks: u32) -> io::Result<Arc<Self>> {
        let state = State { pending: VecDeque::new(), ready: false, stopped: false, error: SUCCESS, calls: 0 };
        let communicator = Arc::new(Self {
            rank,
            fault: id.fault(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            sockets: Sockets::default(),
            last_error: OnceLock::new(),
            thread: Mutex::new(None),
        });
        let this = Arc::clone(&communicator);
        let work = move || this.run(&id, ranks);
        let thread = std::thread::Builder::new().name(format!("mock-nccl-{rank}")).spawn(work)?;
        *communicator.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(communicator)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `ncclCommGetAsyncError` says.
    pub(crate) fn status(&self) -> c_int {
        let state = self.lock();
        match state.error {
            SUCCESS if state.ready && state.pending.is_empty() => SUCCESS,
            SUCCESS => IN_PROGRESS,
            error => error,
        }
    }

    pub(crate) fn last_error(&self) -> *const c_char {
        self.last_error.get().map_or(c"".as_ptr(), |text| text.as_ptr())
    }

    /// Puts operations, which belong together, after those before them.
    pub(crate) fn enqueue(&self, works: Vec<Work>) -> c_int {
        let mut state = self.lock();
        if state.error != SUCCESS {
            return state.error;
        }
        let first = state.calls;
        state.calls += u64::try_from(works.len()).unwrap_or(u64::MAX);
        let struck = (first..state.calls).any(|call| self.fault.strikes(self.rank, call));
        let kind = if struck { self.fault.kind } else { Kind::None };
        if kind == Kind::Refuse {
            self.say("mock fault: the call is refused");
            return SYSTEM_ERROR;
        }
        state.pending.push_back((works, kind));
        drop(state);
        self.changed.notify_all();
        IN_PROGRESS
    }

    /// Waits until everything is done or has failed.
    pub(crate) fn drain(&self) {
        let mut state = self.lock();
        while !state.stopped && state.error == SUCCESS && !state.pending.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends everything and waits for the thread, so that no buffer is touched any more.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
        self.sockets.shut();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _panicked = thread.join();
        }
    }

    fn say(&self, text: &str) {
        if let Ok(text) = CString::new(text) {
            let _an_earlier_one_stays = self.last_error.set(text);
        }
    }

    fn fail(&self, code: c_int, text: &str) {
        self.say(text);
        self.lock().error = code;
        self.changed.notify_all();
    }

    /// The thread: connects, then carries out one group of operations after the other.
    fn run(&self, id: &UniqueId, ranks: u32) {
        if self.fault.kind == Kind::HangInitialization && self.fault.rank == self.rank {
            self.wait_for_stop();
            return;
        }
        let mut mesh = match Mesh::connect(id, self.rank, ranks, &self.sockets) {
            Ok(mesh) => mesh,
            Err(error) => return self.fail(SYSTEM_ERROR, &format!("mock: the ranks did not meet: {error}")),
        };
        self.lock().ready = true;
        self.changed.notify_all();
        while let Some((works, kind)) = self.next() {
            match kind {
                Kind::Fail => return self.fail(REMOTE_ERROR, "mock fault: the operation failed"),
                Kind::Hang => return self.wait_for_stop(),
                Kind::Vanish => {
                    drop(mesh);
                    return self.wait_for_stop();
                }
                Kind::None | Kind::Refuse | Kind::HangInitialization => {}
            }
            let mut run = Run { mesh: &mut mesh, rank: self.rank, ranks, own: VecDeque::new() };
            if let Err(error) = run.carry_out(&works) {
                let code = if error.kind() == io::ErrorKind::InvalidData { INTERNAL_ERROR } else { REMOTE_ERROR };
                return self.fail(code, &format!("mock: {error}"));
            }
            self.lock().pending.pop_front();
            self.changed.notify_all();
        }
    }

    /// The next group, which stays pending until it is done.
    fn next(&self) -> Option<(Vec<Work>, Kind)> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(next) = state.pending.front() {
                return Some(next.clone());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wait_for_stop(&self) {
        let mut state = self.lock();
        while !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One group of operations under way.
struct Run<'a> {
    mesh: &'a mut Mesh,
    rank: u32,
    ranks: u32,
    /// Messages that this rank sent to itself, in order.
    own: VecDeque<Vec<u8>>,
}

impl Run<'_> {
    /// All sending first: it does not wait for anybody, so no order of operations can block.
    fn carry_out(&mut self, works: &[Work]) -> io::Result<()> {
        works.iter().try_for_each(|work| self.send(work))?;
        works.iter().try_for_each(|work| self.receive(work))
    }

    fn others(&self) -> impl Iterator<Item = u32> + use<> {
        let own = self.rank;
        (0..self.ranks).filter(move |&rank| rank != own)
    }

    fn send(&mut self, work: &Work) -> io::Result<()> {
        match *work {
            Work::Send { send, bytes, to } if to == self.rank => {
                self.own.push_back(view(send, bytes).to_vec());
                Ok(())
            }
            Work::Send { send, bytes, to } => self.mesh.send(to, view(send, bytes)),
            Work::Receive { .. } => Ok(()),
            Work::Broadcast { send, bytes, root, .. } if root == self.rank => {
                self.others().try_for_each(|to| self.mesh.send(to, view(send, bytes)))
            }
            Work::Reduce { send, bytes, root, .. } if root != self.rank => self.mesh.send(root, view(send, bytes)),
            Work::Broadcast { .. } | Work::Reduce { .. } => Ok(()),
            Work::AllReduce { send, bytes, .. } | Work::AllGather { send, bytes, .. } => {
                self.others().try_for_each(|to| self.mesh.send(to, view(send, bytes)))
            }
            Work::ReduceScatter { send, bytes, .. } => {
                self.others().try_for_each(|to| self.mesh.send(to, view(send + index(to) * bytes, bytes)))
            }
        }
    }

    fn receive(&mut self, work: &Work) -> io::Result<()> {
        match *work {
            Work::Send { .. } => Ok(()),
            Work::Receive { recv, bytes, from } if from == self.rank => {
                let message = self.own.pop_front().ok_or(io::ErrorKind::InvalidData)?;
                store(recv, bytes, &message)
            }
            Work::Receive { recv, bytes, from } => self.receive_into(from, recv, bytes),
            Work::Broadcast { send, recv, bytes, root } if root == self.rank => copy_own(send, recv, bytes),
            Work::Broadcast { recv, bytes, root, .. } => self.receive_into(root, recv, bytes),
            Work::Reduce { send, recv, bytes, root } if root == self.rank => self.sum(send, recv, bytes),
            Work::Reduce { .. } => Ok(()),
            Work::AllReduce { send, recv, bytes } => self.sum(send, recv, bytes),
            Work::ReduceScatter { send, recv, bytes } => self.sum(send + index(self.rank) * bytes, recv, bytes),
            Work::AllGather { send, recv, bytes } => {
                copy_own(send, recv + index(self.rank) * bytes, bytes)?;
                self.others().try_for_each(|from| self.receive_into(from, recv + index(from) * bytes, bytes))
            }
        }
    }

    fn receive_into(&mut self, from: u32, recv: usize, bytes: usize) -> io::Result<()> {
        let message = self.mesh.receive(from)?;
        store(recv, bytes, &message)
    }

    /// Adds everybody's values in the order of ranks.
    fn sum(&mut self, send: usize, recv: usize, bytes: usize) -> io::Result<()> {
        let mut sum: Option<Vec<u8>> = None;
        for rank in 0..self.ranks {
            let values = if rank == self.rank { view(send, bytes).to_vec() } else { self.mesh.receive(rank)? };
            sum = Some(match sum {
                None => values,
                Some(sum) if sum.len() == values.len() => add(&sum, &values),
                Some(_) => return Err(io::ErrorKind::InvalidData.into()),
            });
        }
        store(recv, bytes, &sum.unwrap_or_default())
    }
}

fn index(rank: u32) -> usize {
    usize::try_from(rank).unwrap_or(usize::MAX)
}

fn add(left: &[u8], right: &[u8]) -> Vec<u8> {
    let (left, _) = left.as_chunks::<4>();
    let (right, _) = right.as_chunks::<4>();
    let sums = left.iter().zip(right).map(|(left, right)| f32::from_ne_bytes(*left) + f32::from_ne_bytes(*right));
    sums.flat_map(f32::to_ne_bytes).collect()
}

/// Copies a rank's own bytes to where they belong in the result, unless they are there already.
fn copy_own(send: usize, recv: usize, bytes: usize) -> io::Result<()> {
    if send == recv {
        return Ok(());
    }
    store(recv, bytes, view(send, bytes))
}

/// The caller's bytes.
fn view<'a>(address: usize, bytes: usize) -> &'a [u8] {
    if bytes == 0 {
        return &[];
    }
    // SAFETY: NCCL's rule, which the caller follows: the buffer lives, and is not written by others, until the operation
    // has ended or the communicator was freed; both wait for this thread.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), bytes) }
}

/// Writes a message into the caller's buffer, when it has the expected length.
fn store(address: usize, bytes: usize, message: &[u8]) -> io::Result<()> {
    if message.len() != bytes {
        let text = format!("expected a message of {bytes} bytes, found {}", message.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    if bytes > 0 {
        let into = std::ptr::with_exposed_provenance_mut::<u8>(address);
        // SAFETY: As for `view`; the buffer is this operation's alone to write.
        unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), into, bytes) };
    }
    Ok(())
}
