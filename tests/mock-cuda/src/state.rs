//! What the mock driver knows: allocations, streams with the work that waits on them, each thread's current device.
//!
//! Owns: the memory behind device addresses and page-locked buffers. Refuses to know: the C interface.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What a call is refused with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failure {
    InvalidValue,
    OutOfMemory,
    InvalidDevice,
    InvalidContext,
    InvalidHandle,
    IllegalAddress,
}

impl Failure {
    /// The number in `cuda.h`.
    pub(crate) const fn code(self) -> i32 {
        match self {
            Self::InvalidValue => 1,
            Self::OutOfMemory => 2,
            Self::InvalidDevice => 101,
            Self::InvalidContext => 201,
            Self::InvalidHandle => 400,
            Self::IllegalAddress => 700,
        }
    }
}

/// Work on a stream. Host addresses are exposed numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Copied {
    Set { into: u64, value: u8, bytes: usize },
    In { into: u64, from: usize, bytes: usize },
    Out { into: usize, from: u64, bytes: usize },
    Within { into: u64, from: u64, bytes: usize },
}

/// The one driver of this process.
#[derive(Debug)]
pub(crate) struct Driver {
    devices: usize,
    bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By address: the length, and the device, or none for page-locked host memory.
    allocations: BTreeMap<usize, (usize, Option<usize>)>,
    streams: BTreeMap<usize, VecDeque<Copied>>,
    next_stream: usize,
}

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The device whose context is current on this thread.
pub(crate) fn current() -> Option<usize> {
    CURRENT.get()
}

pub(crate) fn set_current(device: Option<usize>) {
    CURRENT.set(device);
}

pub(crate) fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        #[expect(clippy::disallowed_methods, reason = "a test library is told what to be through the environment")]
        let number = |name, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
        Driver {
            devices: number("WEIGHTCAST_MOCK_CUDA_DEVICES", 1),
            bytes: number("WEIGHTCAST_MOCK_CUDA_BYTES", 1 << 30),
            state: Mutex::default(),
        }
    })
}

const ALIGN: usize = 4096;

fn layout(bytes: usize) -> Result<Layout, Failure> {
    Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| Failure::InvalidValue)
}

impl Driver {
    pub(crate) const fn devices(&self) -> usize {
        self.devices
    }

    /// The memory of one device.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn check_device(&self, device: i32) -> Result<(), Failure> {
        let known = usize::try_from(device).is_ok_and(|device| device < self.devices);
        if known { Ok(()) } else { Err(Failure::InvalidDevice) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn free_bytes(&self) -> Result<usize, Failure> {
        let device = current().ok_or(Failure::InvalidContext)?;
        Ok(self.bytes.saturating_sub(self.state().used(device)))
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Result<u64, Failure> {
        let device = current().ok_or(Failure::InvalidContext)?;
        let mut state = self.state();
        if bytes == 0 {
            return Err(Failure::InvalidValue);
        }
        if state.used(device).saturating_add(bytes) > self.bytes {
            return Err(Failure::OutOfMemory);
        }
        let address = state.allocate(bytes, Some(device), 0xa5)?;
        Ok(u64::try_from(address.addr()).unwrap_or(0))
    }

    pub(crate) fn allocate_host(&self, bytes: usize) -> Result<*mut c_void, Failure> {
        current().ok_or(Failure::InvalidContext)?;
        if bytes == 0 {
            return Err(Failure::InvalidValue);
        }
        Ok(self.state().allocate(bytes, None, 0x5a)?.cast())
    }

    /// Ends what is under way, as the driver does, and frees.
    pub(crate) fn free(&self, address: u64) -> Result<(), Failure> {
        self.run_all()?;
        self.state().free(usize::try_from(address).unwrap_or(0), true)
    }

    pub(crate) fn free_host(&self, address: *mut c_void) -> Result<(), Failure> {
        self.run_all()?;
        self.state().free(address.addr(), false)
    }

    pub(crate) fn open_stream(&self) -> Result<*mut c_void, Failure> {
        current().ok_or(Failure::InvalidContext)?;
        let mut state = self.state();
        state.next_stream += 1;
        let stream = state.next_stream;
        state.streams.insert(stream, VecDeque::new());
        Ok(std::ptr::without_provenance_mut(stream))
    }

    pub(crate) fn close_stream(&self, stream: *mut c_void) -> Result<(), Failure> {
        self.run(stream)?;
        self.state().streams.remove(&stream.addr());
        Ok(())
    }

    pub(crate) fn put(&self, stream: *mut c_void, work: Copied) -> Result<(), Failure> {
        current().ok_or(Failure::InvalidContext)?;
        let mut state = self.state();
        state.check(work)?;
        state.streams.get_mut(&stream.addr()).ok_or(Failure::InvalidHandle)?.push_back(work);
        Ok(())
    }

    /// Carries out the next work of a stream; true when there is none left.
    pub(crate) fn step(&self, stream: *mut c_void) -> Result<bool, Failure> {
        let mut state = self.state();
        let waiting = state.streams.get_mut(&stream.addr()).ok_or(Failure::InvalidHandle)?;
        let Some(work) = waiting.pop_front() else { return Ok(true) };
        state.carry_out(work)?;
        Ok(false)
    }

    pub(crate) fn run(&self, stream: *mut c_void) -> Result<(), Failure> {
        while !self.step(stream)? {}
        Ok(())
    }

    pub(crate) fn run_all(&self) -> Result<(), Failure> {
        let streams: Vec<usize> = self.state().streams.keys().copied().collect();
        streams.into_iter().try_for_each(|stream| self.run(std::ptr::without_provenance_mut(stream)))
    }
}

impl State {
    fn used(&self, device: usize) -> usize {
        self.allocations.values().filter(|(_, owner)| *owner == Some(device)).map(|(bytes, _)| bytes).sum()
    }

    /// Memory filled with `pattern`: whoever takes fresh memory for zeros finds out.
    fn allocate(&mut self, bytes: usize, device: Option<usize>, pattern: u8) -> Result<*mut u8, Failure> {
        // SAFETY: The layout has at least one byte.
        let start = unsafe { alloc(layout(bytes)?) };
        if start.is_null() {
            return Err(Failure::OutOfMemory);
        }
        // SAFETY: Just allocated with as many bytes.
        unsafe { start.write_bytes(pattern, bytes) };
        self.allocations.insert(start.expose_provenance(), (bytes, device));
        Ok(start)
    }

    fn free(&mut self, address: usize, of_device: bool) -> Result<(), Failure> {
        match self.allocations.get(&address) {
            Some((bytes, device)) if device.is_some() == of_device => {
                let layout = layout(*bytes)?;
                self.allocations.remove(&address);
                // SAFETY: The address came from `allocate` with this layout, and is forgotten now.
                unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address), layout) };
                Ok(())
            }
            _ => Err(Failure::InvalidValue),
        }
    }

    /// The address of `bytes` live bytes of a device.
    fn device(&self, address: u64, bytes: usize) -> Result<*mut u8, Failure> {
        let address = usize::try_from(address).map_err(|_| Failure::IllegalAddress)?;
        let (start, (len, device)) = self.allocations.range(..=address).next_back().ok_or(Failure::IllegalAddress)?;
        let end = address.checked_add(bytes).ok_or(Failure::IllegalAddress)?;
        if device.is_none() || end > start + len {
            return Err(Failure::IllegalAddress);
        }
        Ok(std::ptr::with_exposed_provenance_mut(address))
    }

    fn check(&self, work: Copied) -> Result<(), Failure> {
        match work {
            Copied::Set { into, bytes, .. } | Copied::In { into, bytes, .. } => self.device(into, bytes).map(drop),
            Copied::Out { from, bytes, .. } => self.device(from, bytes).map(drop),
            Copied::Within { into, from, bytes } => {
                self.device(into, bytes)?;
                self.device(from, bytes).map(drop)
            }
        }
    }

    fn carry_out(&self, work: Copied) -> Result<(), Failure> {
        match work {
            Copied::Set { into, value, bytes } => {
                let into = self.device(into, bytes)?;
                // SAFETY: Live memory of as many bytes.
                unsafe { into.write_bytes(value, bytes) };
            }
            Copied::In { into, from, bytes } => {
                let (into, from) = (self.device(into, bytes)?, std::ptr::with_exposed_provenance::<u8>(from));
                // SAFETY: The device's side is live; the host's is by the promise of whoever put the copy on the stream.
                unsafe { into.copy_from(from, bytes) };
            }
            Copied::Out { into, from, bytes } => {
                let (into, from) = (std::ptr::with_exposed_provenance_mut::<u8>(into), self.device(from, bytes)?);
                // SAFETY: As above.
                unsafe { into.copy_from(from, bytes) };
            }
            Copied::Within { into, from, bytes } => {
                let (into, from) = (self.device(into, bytes)?, self.device(from, bytes)?);
                // SAFETY: Both sides are live.
                unsafe { into.copy_from(from, bytes) };
            }
        }
        Ok(())
    }
}
