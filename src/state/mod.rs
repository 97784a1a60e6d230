//! The state dict of one rank: the bytes that it keeps of every tensor, in one arena.
//!
//! Owns: the layout of the arena, which follows the plan, and the access to it by tensor and component.
//! Refuses to know: where bytes come from or go to, and on which device they lie.
//!
//! `SD-1`: components lie in the plan's order, each at a multiple of [`crate::plan::ARENA_ALIGN_BYTES`], so the arena's
//! size is the plan's figure exactly, and what is loaded in the plan's order is written in the order of memory.

use std::borrow::Cow;
use std::ops::Range;

use crate::device::{Arena, Device, DeviceError, OutOfRange, SliceMut};
use crate::plan::{Holding, LoadPlan, Part, TensorPlan, aligned, f32Bits};
use crate::types::{Rank, TensorDigest, as_usize};

/// Bytes that are digested at a time: what a device's lane takes.
const DIGEST_CHUNK_BYTES: usize = crate::device::LANE_BYTES;

/// What a rank keeps.
#[derive(Debug)]
pub struct StateDict {
    rank: Rank,
    arena: Arena,
    tensors: Vec<Vec<Placed>>,
}

/// One component in the arena.
#[derive(Clone, Debug)]
pub struct Placed {
    /// What it is and which bytes of it are here.
    pub holding: Holding,
    offset: usize,
}

impl Placed {
    fn len(&self) -> usize {
        as_usize(self.holding.kept.len())
    }

    /// The owned bytes, as a range of the kept ones.
    fn owned(&self) -> Range<usize> {
        let start = self.holding.owned.start().saturating_sub(self.holding.kept.start());
        if self.holding.owned.is_empty() {
            return 0..0;
        }
        as_usize(start)..as_usize(start + self.holding.owned.len())
    }
}

impl StateDict {
    /// Room for all that `rank` keeps under `plan`, on `device`, not yet filled.
    ///
    /// # Errors
    /// [`DeviceError`] when the memory cannot be had.
    pub fn allocate(plan: &LoadPlan, rank: Rank, device: Device) -> Result<Self, DeviceError> {
        let mut end = 0;
        let mut place = |tensor: &TensorPlan| {
            tensor
                .holdings(rank, plan.world)
                .into_iter()
                .map(|holding| {
                    let offset = as_usize(end);
                    end += aligned(holding.kept.len());
                    Placed { holding, offset }
                })
                .collect::<Vec<_>>()
        };
        let tensors = plan.tensors.iter().map(&mut place).collect();
        let arena = Arena::allocate(device, as_usize(end))?;
        Ok(Self { rank, arena, tensors })
    }

    /// Where the bytes lie.
    #[must_use]
    pub const fn device(&self) -> Device {
        self.arena.device()
    }

    /// The rank that this state is of.
    #[must_use]
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// The components of tensor `tensor` of the plan.
    #[must_use]
    pub fn parts(&self, tensor: usize) -> &[Placed] {
        self.tensors.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// Puts `bytes` at `at` of the kept bytes of a component. On a device they may still be on their way on return.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`] when they do not fit, [`DeviceError::Driver`].
    pub fn write(&mut self, (tensor, component): (usize, usize), at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let range = self.kept((tensor, component), at, bytes.len())?;
        self.arena.write(range.start, bytes)
    }

    /// Lets `receive` fill the `len` kept bytes from `at` on through host memory.
    ///
    /// # Errors
    /// What `receive` returns, and as [`Self::write`].
    pub fn fill<E: From<DeviceError>>(
        &mut self,
        component: (usize, usize),
        (at, len): (usize, usize),
        receive: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let range = self.kept(component, at, len)?;
        self.arena.fill(range, receive)
    }

    /// The `len` kept bytes from `at` on where they lie, when all that was written is there.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn view_mut(
        &mut self,
        component: (usize, usize),
        (at, len): (usize, usize),
    ) -> Result<SliceMut<'_>, DeviceError> {
        let range = self.kept(component, at, len)?;
        self.arena.view_mut(range)
    }

    /// Returns when all that was written is there.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        self.arena.flush()
    }

    /// The number of bytes of a component that the rank owns.
    #[must_use]
    pub fn owned_len(&self, tensor: usize, component: usize) -> usize {
        self.placed(tensor, component).map_or(0, |placed| placed.owned().len())
    }

    /// Gives the bytes of a component that the rank owns to `each`, in order, in chunks of at most `chunk` bytes.
    ///
    /// # Errors
    /// The first of `each`, or [`DeviceError`].
    pub fn read_owned<E: From<DeviceError>>(
        &self,
        (tensor, component): (usize, usize),
        chunk: usize,
        each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(placed) = self.placed(tensor, component) else { return Ok(()) };
        let owned = placed.owned();
        self.arena.read(placed.offset + owned.start..placed.offset + owned.end, chunk, each)
    }

    /// The kept bytes of a component: where they lie on the host, or copied from a device.
    ///
    /// # Errors
    /// [`DeviceError`] when a device does not give its bytes.
    pub fn kept_bytes(&self, tensor: usize, component: usize) -> Result<Cow<'_, [u8]>, DeviceError> {
        let Some(placed) = self.placed(tensor, component) else { return Ok(Cow::Borrowed(&[])) };
        self.bytes(placed.offset..placed.offset + placed.len())
    }

    /// The bytes of a component that the rank owns, as [`Self::kept_bytes`].
    ///
    /// # Errors
    /// As [`Self::kept_bytes`].
    pub fn owned_bytes(&self, tensor: usize, component: usize) -> Result<Cow<'_, [u8]>, DeviceError> {
        let Some(placed) = self.placed(tensor, component) else { return Ok(Cow::Borrowed(&[])) };
        let owned = placed.owned();
        self.bytes(placed.offset + owned.start..placed.offset + owned.end)
    }

    fn bytes(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, DeviceError> {
        if let Some(host) = self.arena.host() {
            return Ok(Cow::Borrowed(host.get(range).unwrap_or_default()));
        }
        let mut bytes = Vec::with_capacity(range.len());
        self.arena.read(range, DIGEST_CHUNK_BYTES, |chunk| {
            bytes.extend_from_slice(chunk);
            Ok::<_, DeviceError>(())
        })?;
        Ok(Cow::Owned(bytes))
    }

    /// The mean of the nested statistics of a tensor, where its encoding has one.
    ///
    /// # Errors
    /// [`DeviceError`] when it cannot be read.
    pub fn nested_offset(&self, tensor: usize) -> Result<Option<f32Bits>, DeviceError> {
        let offset = |placed: &&Placed| placed.holding.component.part == Part::NestedOffset;
        let Some(placed) = self.parts(tensor).iter().find(offset) else { return Ok(None) };
        let mut bytes = [0_u8; 4];
        self.arena.read(placed.offset..placed.offset + bytes.len(), bytes.len(), |chunk| {
            bytes.copy_from_slice(chunk);
            Ok::<_, DeviceError>(())
        })?;
        Ok(Some(f32Bits(u32::from_le_bytes(bytes))))
    }

    /// The digest of the owned bytes of each component of each tensor; the nested offset, which all ranks keep, is the
    /// reader's.
    ///
    /// # Errors
    /// [`DeviceError`] when a device does not give its bytes.
    pub fn owned_digests(&self) -> Result<Vec<Vec<TensorDigest>>, DeviceError> {
        let digest = |tensor: usize, component: usize| {
            let mut digest = TensorDigest::empty();
            self.read_owned((tensor, component), DIGEST_CHUNK_BYTES, |chunk| {
                digest = digest.append(TensorDigest::of(chunk));
                Ok::<_, DeviceError>(())
            })?;
            Ok(digest)
        };
        let digests =
            |tensor: usize| (0..self.parts(tensor).len()).map(|component| digest(tensor, component)).collect();
        (0..self.tensors.len()).map(digests).collect()
    }

    /// The size of the arena in bytes.
    #[must_use]
    pub fn arena_bytes(&self) -> usize {
        self.arena.len()
    }

    fn placed(&self, tensor: usize, component: usize) -> Option<&Placed> {
        self.tensors.get(tensor)?.get(component)
    }

    /// Where in the arena the `len` kept bytes from `at` on of a component are.
    fn kept(&self, (tensor, component): (usize, usize), at: usize, len: usize) -> Result<Range<usize>, DeviceError> {
        let placed = self.placed(tensor, component);
        let (offset, kept) = placed.map_or((0, 0), |placed| (placed.offset, placed.len()));
        let end = at.saturating_add(len);
        if end > kept {
            return Err(OutOfRange { start: at, end, len: kept }.into());
        }
        Ok(offset + at..offset + end)
    }
}
