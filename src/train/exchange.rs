//! Collectives on host memory, whatever memory the communicator moves.
//!
//! Owns: the way of host buffers through a device where the communicator is a GPU's. Refuses to know: what is exchanged.

use crate::comm::{Communicator, Group};
use crate::device::{Device, DeviceContext};
use crate::types::{Rank, WorldSize};

use super::TrainError;

/// A rank's end of all collectives of a training run.
pub(super) struct Exchange<'c> {
    comm: Option<&'c mut dyn Communicator>,
    group: Group,
    device: Device,
}

impl<'c> Exchange<'c> {
    /// With the communicator that moves the memory of `device`; none for a world of one.
    pub(super) fn new(comm: Option<&'c mut dyn Communicator>, group: Group, device: Device) -> Self {
        Self { comm, group, device }
    }

    pub(super) const fn rank(&self) -> Rank {
        self.group.rank
    }

    pub(super) const fn world(&self) -> WorldSize {
        self.group.world
    }

    /// Puts the parts of all ranks one after the other into `recv`; `counts[r]` bytes are rank `r`'s.
    pub(super) fn all_gather(&mut self, send: &[u8], recv: &mut [u8], counts: &[usize]) -> Result<(), TrainError> {
        let Some(comm) = self.comm.as_mut() else {
            recv.copy_from_slice(send);
            return Ok(());
        };
        if self.device == Device::Host {
            return Ok(comm.all_gather(send.into(), recv.into(), counts)?);
        }
        let context = DeviceContext::open(self.device)?;
        let (mut from, mut into) = (context.allocate(send.len().max(1))?, context.allocate(recv.len().max(1))?);
        context.copy_from_host(from.as_slice_mut().range(0..send.len()).map_err(range)?, send)?;
        let sent = from.as_slice().range(0..send.len()).map_err(range)?;
        comm.all_gather(sent, into.as_slice_mut().range(0..recv.len()).map_err(range)?, counts)?;
        Ok(context.copy_to_host(recv, into.as_slice().range(0..send_len(counts)).map_err(range)?)?)
    }

    /// Sums `send` over the ranks; rank `r` gets its part of `counts[r]` elements.
    pub(super) fn reduce_scatter(
        &mut self,
        send: &[f32],
        recv: &mut [f32],
        counts: &[usize],
    ) -> Result<(), TrainError> {
        let Some(comm) = self.comm.as_mut() else {
            recv.copy_from_slice(send);
            return Ok(());
        };
        let (send, recv): (&[u8], &mut [u8]) = (bytemuck::cast_slice(send), bytemuck::cast_slice_mut(recv));
        if self.device == Device::Host {
            return Ok(comm.reduce_scatter(send.into(), recv.into(), counts)?);
        }
        let context = DeviceContext::open(self.device)?;
        let (mut from, mut into) = (context.allocate(send.len().max(1))?, context.allocate(recv.len().max(1))?);
        context.copy_from_host(from.as_slice_mut().range(0..send.len()).map_err(range)?, send)?;
        let sent = from.as_slice().range(0..send.len()).map_err(range)?;
        comm.reduce_scatter(sent, into.as_slice_mut().range(0..recv.len()).map_err(range)?, counts)?;
        let len = recv.len();
        Ok(context.copy_to_host(recv, into.as_slice().range(0..len).map_err(range)?)?)
    }

    /// Replaces everybody's `values` by their sum.
    pub(super) fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), TrainError> {
        let Some(comm) = self.comm.as_mut() else { return Ok(()) };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        if self.device == Device::Host {
            return Ok(comm.all_reduce(bytes.into())?);
        }
        let context = DeviceContext::open(self.device)?;
        let mut memory = context.allocate(bytes.len().max(1))?;
        let len = bytes.len();
        context.copy_from_host(memory.as_slice_mut().range(0..len).map_err(range)?, bytes)?;
        comm.all_reduce(memory.as_slice_mut().range(0..len).map_err(range)?)?;
        Ok(context.copy_to_host(bytes, memory.as_slice().range(0..len).map_err(range)?)?)
    }

    /// Every rank's value, in the order of ranks.
    pub(super) fn all_gather_f64(&mut self, value: f64) -> Result<Vec<f64>, TrainError> {
        let mut all = vec![0_u8; 8 * self.group.world.count()];
        self.all_gather(&value.to_le_bytes(), &mut all, &vec![8; self.group.world.count()])?;
        Ok(all.chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().expect("eight bytes"))).collect())
    }

    /// Every rank's text, in the order of ranks. All texts are as long.
    pub(super) fn all_gather_text(&mut self, text: &str) -> Result<Vec<String>, TrainError> {
        let world = self.group.world.count();
        let mut all = vec![0_u8; text.len() * world];
        self.all_gather(text.as_bytes(), &mut all, &vec![text.len(); world])?;
        Ok(all.chunks(text.len().max(1)).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect())
    }
}

fn send_len(counts: &[usize]) -> usize {
    counts.iter().sum()
}

fn range(error: crate::device::OutOfRange) -> crate::device::DeviceError {
    error.into()
}
