//! Moving pieces: from a reader to the ranks that keep them, and into this rank's memory.

use std::sync::atomic::Ordering;

use super::LoadError;
use super::report::{Meters, timed};
use crate::cache::CacheWriter;
use crate::comm::{Communicator, Scatter};
use crate::device::{Device, DeviceContext, DeviceError, Memory, Slice, SliceMut};
use crate::plan::{Holding, LoadPlan, Part, Piece, TensorPlan};
use crate::state::StateDict;
use crate::types::{ByteRange, Fqn, Rank, as_usize};

/// One tensor on its way: what every rank holds of it.
pub(super) struct Route<'a> {
    pub(super) index: usize,
    pub(super) tensor: &'a TensorPlan,
    /// By rank, then by component.
    holdings: Vec<Vec<Holding>>,
}

impl<'a> Route<'a> {
    pub(super) fn new(plan: &'a LoadPlan, index: usize, tensor: &'a TensorPlan) -> Self {
        let holdings = plan.world.ranks().map(|rank| tensor.holdings(rank, plan.world)).collect();
        Self { index, tensor, holdings }
    }

    fn kept(&self, rank: Rank, component: usize) -> ByteRange {
        self.holdings
            .get(rank.index())
            .and_then(|holdings| holdings.get(component))
            .map_or_else(ByteRange::default, |holding| holding.kept)
    }

    /// Whether every rank keeps the whole component.
    fn is_shared(&self, component: usize) -> bool {
        let part = self.holdings.first().and_then(|holdings| holdings.get(component));
        !self.tensor.sharded || part.is_some_and(|holding| holding.component.part == Part::NestedOffset)
    }
}

/// Gets the bytes of (tensor, component) from a place on.
pub type Sink<'a> = dyn FnMut((usize, usize), usize, &[u8]) -> Result<(), LoadError> + 'a;

/// Where this rank's bytes go.
pub(super) enum Keeper<'a> {
    /// Into its memory.
    State(&'a mut StateDict),
    /// Elsewhere; only for a rank that is alone.
    Sink(&'a mut Sink<'a>),
}

impl Keeper<'_> {
    pub(super) fn write(&mut self, place: (usize, usize), at: usize, bytes: &[u8]) -> Result<(), LoadError> {
        match self {
            Self::State(state) => Ok(state.write(place, at, bytes)?),
            Self::Sink(sink) => sink(place, at, bytes),
        }
    }

    fn state(&mut self) -> Result<&mut StateDict, LoadError> {
        match self {
            Self::State(state) => Ok(state),
            Self::Sink(_) => Err(LoadError::Plan { fqn: "".into(), what: "a rank that is alone receives nothing" }),
        }
    }
}

/// One rank's end of all routes.
pub(super) struct Mover<'a, 'c, 'p> {
    pub(super) rank: Rank,
    pub(super) comm: Option<&'c mut dyn Communicator>,
    pub(super) keeper: Keeper<'a>,
    /// Keeps what this rank makes for the next load.
    pub(super) cache: Option<CacheWriter<'p>>,
    pub(super) meters: &'a Meters,
    /// The memory that `comm` moves.
    pub(super) comm_device: Device,
    pub(super) scratch: Scratch,
}

impl Mover<'_, '_, '_> {
    /// Keeps this rank's part of a piece and sends the others theirs. `bytes` is the piece.
    pub(super) fn deliver(&mut self, route: &Route<'_>, piece: Piece, bytes: &mut [u8]) -> Result<(), LoadError> {
        crate::faults::point("load.deliver");
        if let Some(cache) = &mut self.cache {
            timed(&self.meters.place_ns, || cache.write((route.index, piece.component), piece.range.start(), bytes));
        }
        self.keep(route, piece, bytes)?;
        if self.comm.is_none() {
            return Ok(());
        }
        if self.comm_device != Device::Host {
            return self.deliver_from_device(route, piece, bytes);
        }
        let Some(comm) = self.comm.as_mut() else { return Ok(()) };
        let root = self.rank;
        let moved = timed(&self.meters.exchange_ns, || {
            if route.is_shared(piece.component) {
                return comm.broadcast(root, SliceMut::from(bytes));
            }
            let parts: Vec<Slice<'_>> = (0..route.holdings.len())
                .map(|index| Rank(u32::try_from(index).unwrap_or(u32::MAX)))
                .map(|rank| {
                    let range = route.kept(rank, piece.component).intersect(piece.range).filter(|_| rank != root);
                    range.map_or(&[][..], |range| within(bytes, piece.range, range)).into()
                })
                .collect();
            if parts.iter().all(Slice::is_empty) {
                return Ok(());
            }
            comm.scatter(root, Scatter::Send { parts: &parts })
        });
        moved.map_err(|source| comm_error(&route.tensor.fqn, source))
    }

    /// Receives this rank's part of a piece from `root`, straight into its memory.
    pub(super) fn receive(&mut self, route: &Route<'_>, piece: Piece, root: Rank) -> Result<(), LoadError> {
        crate::faults::point("load.receive");
        let kept = route.kept(self.rank, piece.component);
        let Some(part) = kept.intersect(piece.range) else { return Ok(()) };
        let Some(comm) = self.comm.as_mut() else { return Ok(()) };
        let place = (route.index, piece.component);
        let run = (as_usize(part.start() - kept.start()), as_usize(part.len()));
        let mut receive = |into: SliceMut<'_>| {
            let received = if route.is_shared(piece.component) {
                comm.broadcast(root, into)
            } else {
                comm.scatter(root, Scatter::Receive { into })
            };
            received.map_err(|source| comm_error(&route.tensor.fqn, source))
        };
        timed(&self.meters.exchange_ns, || match self.comm_device {
            Device::Host => self.keeper.state()?.fill(place, run, |into| receive(SliceMut::from(into))),
            Device::Cuda { .. } => receive(self.keeper.state()?.view_mut(place, run)?),
        })?;
        self.meters.done_bytes.fetch_add(part.len(), Ordering::Relaxed);
        Ok(())
    }

    fn keep(&mut self, route: &Route<'_>, piece: Piece, bytes: &[u8]) -> Result<(), LoadError> {
        let kept = route.kept(self.rank, piece.component);
        let Some(part) = kept.intersect(piece.range) else { return Ok(()) };
        let at = as_usize(part.start() - kept.start());
        let bytes = within(bytes, piece.range, part);
        timed(&self.meters.place_ns, || self.keeper.write((route.index, piece.component), at, bytes))?;
        self.meters.done_bytes.fetch_add(part.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Sends the others their parts of a piece from device memory, where a GPU's communicator takes them: what all keep
    /// from this rank's own memory, what is cut from a scratch buffer.
    fn deliver_from_device(&mut self, route: &Route<'_>, piece: Piece, bytes: &[u8]) -> Result<(), LoadError> {
        let Some(comm) = self.comm.as_mut() else { return Ok(()) };
        let root = self.rank;
        let failed = |source| comm_error(&route.tensor.fqn, source);
        if route.is_shared(piece.component) {
            let kept = route.kept(root, piece.component);
            let Some(part) = kept.intersect(piece.range) else { return Ok(()) };
            let run = (as_usize(part.start() - kept.start()), as_usize(part.len()));
            return timed(&self.meters.exchange_ns, || {
                let buffer = self.keeper.state()?.view_mut((route.index, piece.component), run)?;
                comm.broadcast(root, buffer).map_err(failed)
            });
        }
        timed(&self.meters.exchange_ns, || {
            let scratch = self.scratch.upload(self.comm_device, bytes)?;
            let mut parts = Vec::with_capacity(route.holdings.len());
            for rank in (0..).map(Rank).take(route.holdings.len()) {
                let part = route.kept(rank, piece.component).intersect(piece.range).filter(|_| rank != root);
                let start = part.map_or(0, |part| as_usize(part.start() - piece.range.start()));
                let len = part.map_or(0, |part| as_usize(part.len()));
                parts.push(scratch.range(start..start + len).map_err(DeviceError::from)?);
            }
            if parts.iter().all(Slice::is_empty) {
                return Ok(());
            }
            comm.scatter(root, Scatter::Send { parts: &parts }).map_err(failed)
        })
    }
}

/// Device memory for a piece on its way to other ranks; it grows to the largest piece.
#[derive(Debug, Default)]
pub(super) struct Scratch(Option<(DeviceContext, Memory)>);

impl Scratch {
    fn upload(&mut self, device: Device, bytes: &[u8]) -> Result<Slice<'_>, DeviceError> {
        if self.0.as_ref().is_none_or(|(_, memory)| memory.len() < bytes.len()) {
            let context = DeviceContext::open(device)?;
            let memory = context.allocate(bytes.len())?;
            self.0 = Some((context, memory));
        }
        let (context, memory) = self.0.as_mut().expect("made above");
        context.copy_from_host(memory.as_slice_mut().range(0..bytes.len())?, bytes)?;
        Ok(memory.as_slice().range(0..bytes.len())?)
    }
}

fn comm_error(fqn: &Fqn, source: crate::comm::CommError) -> LoadError {
    LoadError::Comm { fqn: fqn.clone(), source }
}

/// The bytes `part` of a buffer that holds the bytes `whole`.
fn within(buffer: &[u8], whole: ByteRange, part: ByteRange) -> &[u8] {
    let start = as_usize(part.start() - whole.start());
    buffer.get(start..start + as_usize(part.len())).expect("the part was intersected with the whole")
}
