//! The state dict of one rank: the bytes that it keeps of every tensor, in one arena.
//!
//! Owns: the layout of the arena, which follows the plan, and the access to it by tensor and component.
//! Refuses to know: where bytes come from or go to.
//!
//! `SD-1`: components lie in the plan's order, each at a multiple of [`ARENA_ALIGN_BYTES`], so that the arena can be
//! split into disjoint mutable parts without bookkeeping, and its size is the plan's figure exactly.

use crate::device::{Device, DeviceError, Memory};
use crate::plan::{ARENA_ALIGN_BYTES, Holding, LoadPlan, Part, TensorPlan, aligned, f32Bits};
use crate::types::{Rank, TensorDigest, as_usize};

/// What a rank keeps.
#[derive(Debug)]
pub struct StateDict {
    rank: Rank,
    arena: Memory,
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
    fn owned(&self) -> std::ops::Range<usize> {
        let start = self.holding.owned.start().saturating_sub(self.holding.kept.start());
        if self.holding.owned.is_empty() {
            return 0..0;
        }
        as_usize(start)..as_usize(start + self.holding.owned.len())
    }
}

impl StateDict {
    /// Room for all that `rank` keeps under `plan`, on the host, not yet filled.
    ///
    /// # Errors
    /// [`DeviceError`] when the memory cannot be had.
    pub fn allocate(plan: &LoadPlan, rank: Rank) -> Result<Self, DeviceError> {
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
        let arena = Memory::allocate(Device::Host, as_usize(end))?;
        Ok(Self { rank, arena, tensors })
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

    /// The kept bytes of a component; empty when the rank keeps none.
    #[must_use]
    pub fn kept(&self, tensor: usize, component: usize) -> &[u8] {
        self.placed(tensor, component)
            .map_or(&[], |placed| self.host().get(placed.offset..placed.offset + placed.len()).unwrap_or_default())
    }

    /// The bytes of a component that the rank owns.
    #[must_use]
    pub fn owned(&self, tensor: usize, component: usize) -> &[u8] {
        let owned = self.placed(tensor, component).map_or(0..0, Placed::owned);
        self.kept(tensor, component).get(owned).unwrap_or_default()
    }

    /// The kept bytes of a component, to be filled.
    pub fn kept_mut(&mut self, tensor: usize, component: usize) -> &mut [u8] {
        let Some(range) = self.placed(tensor, component).map(|placed| placed.offset..placed.offset + placed.len())
        else {
            return &mut [];
        };
        self.host_mut().get_mut(range).unwrap_or_default()
    }

    /// All components at once as disjoint mutable parts, for filling by several threads (`SD-1`).
    pub fn split_mut(&mut self) -> Vec<Vec<&mut [u8]>> {
        let lengths: Vec<Vec<usize>> =
            self.tensors.iter().map(|parts| parts.iter().map(Placed::len).collect()).collect();
        let mut rest = self.host_mut();
        let mut take = |len: usize| {
            let padded = len.div_ceil(as_usize(ARENA_ALIGN_BYTES)) * as_usize(ARENA_ALIGN_BYTES);
            let (part, later) = std::mem::take(&mut rest).split_at_mut(padded);
            rest = later;
            part.split_at_mut(len).0
        };
        lengths.into_iter().map(|parts| parts.into_iter().map(&mut take).collect()).collect()
    }

    /// The mean of the nested statistics of a tensor, where its encoding has one.
    #[must_use]
    pub fn nested_offset(&self, tensor: usize) -> Option<f32Bits> {
        let component =
            self.parts(tensor).iter().position(|placed| placed.holding.component.part == Part::NestedOffset)?;
        let bytes: [u8; 4] = self.kept(tensor, component).try_into().ok()?;
        Some(f32Bits(u32::from_le_bytes(bytes)))
    }

    /// The digest of the owned bytes of each component of each tensor; the nested offset, which all ranks keep, is left
    /// out.
    #[must_use]
    pub fn owned_digests(&self) -> Vec<Vec<TensorDigest>> {
        (0..self.tensors.len())
            .map(|tensor| {
                (0..self.parts(tensor).len()).map(|component| TensorDigest::of(self.owned(tensor, component))).collect()
            })
            .collect()
    }

    /// The size of the arena in bytes.
    #[must_use]
    pub fn arena_bytes(&self) -> usize {
        self.arena.len()
    }

    fn placed(&self, tensor: usize, component: usize) -> Option<&Placed> {
        self.tensors.get(tensor)?.get(component)
    }

    fn host(&self) -> &[u8] {
        self.arena.as_host().expect("a state dict is allocated on the host")
    }

    fn host_mut(&mut self) -> &mut [u8] {
        self.arena.as_host_mut().expect("a state dict is allocated on the host")
    }
}
