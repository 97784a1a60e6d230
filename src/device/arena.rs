//! One allocation on a device that is filled and read in order, through page-locked buffers.
//!
//! Owns: [`Arena`]: its memory, two lanes (a buffer with a stream of its own each), what is on its way.
//! Refuses to know: tensors, files, collectives.
//!
//! On the host a write is a copy and a read is a view. On a CUDA device writes are gathered in a lane's buffer while they
//! follow one another, and sent when it is full; meanwhile the other lane's copy is under way. Reads do the same the other
//! way round: the next chunk is copied while the caller works on this one.
//!
//! `AR-1`: while a lane's copy is under way nobody else touches its buffer or has a view of the arena's memory: every
//! access waits for the lanes first, and the lanes are dropped, which waits too, before the memory.
#![expect(unsafe_code, reason = "copies that go on after the call that started them")]

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cuda::{Cuda, Pinned};
use super::{Device, DeviceContext, DeviceError, Memory, OutOfRange, Slice, SliceMut};

/// The page-locked bytes of one lane. Copies of some megabytes reach the full rate of the bus; two lanes are within the
/// plan's figure for staging.
pub const LANE_BYTES: usize = 4 << 20;

/// Bytes on a device, written and read in order. Zeroed when new.
#[derive(Debug)]
pub struct Arena {
    /// None on the host. Before `memory`, so that it is dropped first (`AR-1`).
    lanes: Option<Mutex<Lanes>>,
    memory: Memory,
}

#[derive(Debug)]
struct Lanes {
    lanes: [Lane; 2],
    /// The lane that is being filled.
    current: usize,
    /// Where the bytes in the current lane's buffer belong; they start at the buffer's start.
    gathered: Range<usize>,
}

struct Lane {
    cuda: Cuda,
    buffer: Pinned,
    busy: bool,
}

impl Arena {
    /// `bytes` zeroed bytes on `device`.
    ///
    /// # Errors
    /// Those of [`DeviceContext::open`] and [`DeviceContext::allocate`].
    pub fn allocate(device: Device, bytes: usize) -> Result<Self, DeviceError> {
        let memory = DeviceContext::open(device)?.allocate(bytes)?;
        let lanes = match device {
            Device::Host => None,
            Device::Cuda { ordinal } => {
                let lanes = [Lane::open(ordinal)?, Lane::open(ordinal)?];
                Some(Mutex::new(Lanes { lanes, current: 0, gathered: 0..0 }))
            }
        };
        Ok(Self { lanes, memory })
    }

    /// Where the bytes lie.
    #[must_use]
    pub const fn device(&self) -> Device {
        self.memory.device()
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts `bytes` at `at`. On a device they may still be on their way on return; see [`Self::flush`].
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`], [`DeviceError::Driver`].
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.check(&(at..at.saturating_add(bytes.len())))?;
        if let Some(host) = self.memory.as_host_mut() {
            host[at..at + bytes.len()].copy_from_slice(bytes);
            return Ok(());
        }
        let (lanes, address) = self.lanes();
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            if lanes.gathered.end != at || lanes.gathered.len() == LANE_BYTES {
                lanes.send(address)?;
                lanes.gathered = at..at;
            }
            let filled = lanes.gathered.len();
            let (now, later) = rest.split_at(rest.len().min(LANE_BYTES - filled));
            lanes.buffer()?[filled..filled + now.len()].copy_from_slice(now);
            at += now.len();
            (lanes.gathered.end, rest) = (at, later);
        }
        Ok(())
    }

    /// Lets `receive` fill the bytes `range` in host memory: their own, or a page-locked buffer that is sent afterwards.
    ///
    /// # Errors
    /// What `receive` returns, and as [`Self::write`].
    pub fn fill<E: From<DeviceError>>(
        &mut self,
        range: Range<usize>,
        receive: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(&range)?;
        if let Some(host) = self.memory.as_host_mut() {
            return receive(&mut host[range]);
        }
        if range.len() > LANE_BYTES {
            let mut bytes = vec![0; range.len()];
            receive(&mut bytes)?;
            return Ok(self.write(range.start, &bytes)?);
        }
        let (lanes, address) = self.lanes();
        if lanes.gathered.end != range.start || lanes.gathered.len() + range.len() > LANE_BYTES {
            lanes.send(address)?;
            lanes.gathered = range.start..range.start;
        }
        let filled = lanes.gathered.len();
        receive(&mut lanes.buffer()?[filled..filled + range.len()])?;
        lanes.gathered.end = range.end;
        Ok(())
    }

    /// Returns when all that was written is there.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        if self.lanes.is_none() {
            return Ok(());
        }
        let (lanes, address) = self.lanes();
        lanes.finish(address)
    }

    /// The bytes `range` where they lie, after all that was written is there.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn view_mut(&mut self, range: Range<usize>) -> Result<SliceMut<'_>, DeviceError> {
        self.flush()?;
        Ok(self.memory.as_slice_mut().range(range)?)
    }

    /// All bytes, when they lie in host memory.
    #[must_use]
    pub const fn host(&self) -> Option<&[u8]> {
        self.memory.as_host()
    }

    /// Gives the bytes `range` to `each` in order, in chunks of at most `chunk` bytes.
    ///
    /// # Errors
    /// The first of `each`, and as [`Self::write`].
    pub fn read<E: From<DeviceError>>(
        &self,
        range: Range<usize>,
        chunk: usize,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(&range)?;
        let Some(lanes) = &self.lanes else {
            let host = self.memory.as_host().unwrap_or_default();
            return host[range].chunks(chunk.max(1)).try_for_each(each);
        };
        let mut lanes = lock(lanes);
        let address = address(&self.memory);
        lanes.finish(address)?;
        let chunk = chunk.clamp(1, LANE_BYTES);
        let mut next = range.start;
        let mut ask = |lane: &mut Lane| {
            let len = chunk.min(range.end - next);
            // SAFETY: AR-1, the lane is idle (`finish`, or `wait` below), and nobody writes the memory while `self` is
            // borrowed; the range was checked against the allocation.
            unsafe { lane.start_download(address + crate::types::as_u64(next), len)? };
            next += len;
            Ok::<_, DeviceError>(len)
        };
        let [now, later] = &mut lanes.lanes;
        let (mut now, mut later) = (now, later);
        let mut here = ask(now)?;
        while here > 0 {
            let following = ask(later)?;
            now.wait()?;
            each(&now.buffer.as_slice()[..here])?;
            here = following;
            std::mem::swap(&mut now, &mut later);
        }
        Ok(())
    }

    /// The lanes, and the address of the memory; only for arenas on a device.
    fn lanes(&mut self) -> (&mut Lanes, u64) {
        let address = address(&self.memory);
        let lanes = self.lanes.as_mut().expect("memory that is not the host's has lanes");
        (lanes.get_mut().unwrap_or_else(PoisonError::into_inner), address)
    }

    fn check(&self, range: &Range<usize>) -> Result<(), DeviceError> {
        if range.start <= range.end && range.end <= self.len() {
            Ok(())
        } else {
            Err(OutOfRange { start: range.start, end: range.end, len: self.len() }.into())
        }
    }
}

/// A panic between two calls leaves no copy that its lane does not know of, so the content stays valid.
fn lock(lanes: &Mutex<Lanes>) -> MutexGuard<'_, Lanes> {
    lanes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(memory: &Memory) -> u64 {
    match memory.as_slice() {
        Slice::Host(_) => 0,
        Slice::Cuda(view) => view.address(),
    }
}

impl Lanes {
    /// The current lane's buffer, once its last copy has ended.
    fn buffer(&mut self) -> Result<&mut [u8], DeviceError> {
        let lane = &mut self.lanes[self.current];
        lane.wait()?;
        Ok(lane.buffer.as_mut_slice())
    }

    /// Starts the copy of what was gathered, and goes on with the other lane.
    fn send(&mut self, address: u64) -> Result<(), DeviceError> {
        let gathered = std::mem::take(&mut self.gathered);
        if gathered.is_empty() {
            return Ok(());
        }
        let target = address + crate::types::as_u64(gathered.start);
        // SAFETY: AR-1, the range was checked when it was gathered, and views of the memory are given out after `finish`
        // only. Two lanes may write at once: what was written later to the same place waits in `write`'s caller, which
        // writes every byte once between two flushes.
        unsafe { self.lanes[self.current].start_upload(target, gathered.len())? };
        self.current = 1 - self.current;
        Ok(())
    }

    /// Sends what was gathered and waits for both lanes.
    fn finish(&mut self, address: u64) -> Result<(), DeviceError> {
        self.send(address)?;
        self.lanes.iter_mut().try_for_each(Lane::wait)
    }
}

impl Lane {
    fn open(ordinal: u32) -> Result<Self, DeviceError> {
        let cuda = Cuda::open(ordinal)?;
        let buffer = cuda.allocate_pinned(LANE_BYTES)?;
        Ok(Self { cuda, buffer, busy: false })
    }

    /// # Safety
    /// The device bytes are live and nobody else's until [`Lane::wait`] returns.
    unsafe fn start_upload(&mut self, target: u64, len: usize) -> Result<(), DeviceError> {
        self.wait()?;
        self.busy = true;
        // SAFETY: The caller's promise; the buffer is ours, and not touched before `wait`.
        unsafe { self.cuda.start_copy_in(target, &self.buffer.as_slice()[..len]) }
    }

    /// # Safety
    /// The device bytes are live and not written until [`Lane::wait`] returns.
    unsafe fn start_download(&mut self, source: u64, len: usize) -> Result<(), DeviceError> {
        self.wait()?;
        if len == 0 {
            return Ok(());
        }
        self.busy = true;
        // SAFETY: The caller's promise; the buffer is ours, and not touched before `wait`.
        unsafe { self.cuda.start_copy_out(&mut self.buffer.as_mut_slice()[..len], source) }
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        if self.busy {
            self.cuda.wait()?;
            self.busy = false;
        }
        Ok(())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // AR-1: the buffer is freed after its copy. A device that is gone copies nothing any more.
        let _device_is_gone = self.wait();
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("busy", &self.busy).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The host's arena, and a device's where there is one.
    fn arenas(bytes: usize) -> Vec<Arena> {
        let devices = super::super::probe().devices.into_iter().take(2);
        devices.map(|info| Arena::allocate(info.device, bytes).expect("a few megabytes")).collect()
    }

    fn contents(arena: &Arena, range: Range<usize>, chunk: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let read = arena.read(range, chunk, |bytes| {
            assert!(bytes.len() <= chunk);
            all.extend_from_slice(bytes);
            Ok::<_, DeviceError>(())
        });
        read.expect("readable");
        all
    }

    /// Writes that follow one another, that jump, and that are longer than a lane.
    #[test]
    fn what_was_written_is_read() {
        let bytes = 2 * LANE_BYTES + 1000;
        let pattern: Vec<u8> = (0..bytes).map(|index| u8::try_from(index % 251).expect("below 251")).collect();
        for mut arena in arenas(bytes + 50) {
            arena.write(0, &pattern[..10]).expect("within");
            arena.write(10, &pattern[10..]).expect("within");
            arena.write(bytes + 40, &[7; 10]).expect("within");
            arena
                .fill(bytes..bytes + 5, |into| {
                    into.fill(9);
                    Ok::<_, DeviceError>(())
                })
                .expect("within");
            for chunk in [999, LANE_BYTES, usize::MAX] {
                assert!(contents(&arena, 0..bytes, chunk) == pattern, "{:?} {chunk}", arena.device());
            }
            assert_eq!(contents(&arena, bytes - 1..bytes + 6, 64)[1..], [9, 9, 9, 9, 9, 0]);
            assert_eq!(contents(&arena, bytes + 38..bytes + 42, 64), [0, 0, 7, 7]);
            assert_eq!(contents(&arena, 5..5, 64), [0_u8; 0]);
        }
    }

    #[test]
    fn what_is_outside_is_refused() {
        for mut arena in arenas(10) {
            let expected = Err(DeviceError::OutOfRange { source: OutOfRange { start: 8, end: 11, len: 10 } });
            assert_eq!(arena.write(8, &[0; 3]), expected);
            assert_eq!(arena.read(8..11, 1, |_| Ok(())), expected);
            assert!(arena.view_mut(8..11).is_err());
        }
    }
}
