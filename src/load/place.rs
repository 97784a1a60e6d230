//! Moving pieces: from a reader to the ranks that keep them, and into this rank's memory.

use super::LoadError;
use super::report::{Meters, timed};
use crate::comm::{Communicator, Scatter};
use crate::device::{Slice, SliceMut};
use crate::plan::{Holding, LoadPlan, Part, Piece, TensorPlan};
use crate::state::StateDict;
use crate::types::{ByteRange, Fqn, Rank, as_u64, as_usize};

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

/// One rank's end of all routes.
pub(super) struct Mover<'a, 'c> {
    pub(super) rank: Rank,
    pub(super) comm: Option<&'c mut dyn Communicator>,
    pub(super) state: &'a mut StateDict,
    pub(super) meters: &'a Meters,
}

impl Mover<'_, '_> {
    /// Keeps this rank's part of a piece and sends the others theirs. `bytes` is the piece.
    pub(super) fn deliver(&mut self, route: &Route<'_>, piece: Piece, bytes: &mut [u8]) -> Result<(), LoadError> {
        crate::faults::point("load.deliver");
        self.keep(route, piece, bytes);
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
        let into = self.state.kept_mut(route.index, piece.component);
        let into = within_mut(into, kept, part);
        let len = as_u64(into.len());
        let moved = timed(&self.meters.exchange_ns, || {
            if route.is_shared(piece.component) {
                comm.broadcast(root, SliceMut::from(into))
            } else {
                comm.scatter(root, Scatter::Receive { into: SliceMut::from(into) })
            }
        });
        self.meters.done_bytes.fetch_add(len, std::sync::atomic::Ordering::Relaxed);
        moved.map_err(|source| comm_error(&route.tensor.fqn, source))
    }

    fn keep(&mut self, route: &Route<'_>, piece: Piece, bytes: &[u8]) {
        let kept = route.kept(self.rank, piece.component);
        let Some(part) = kept.intersect(piece.range) else { return };
        let into = within_mut(self.state.kept_mut(route.index, piece.component), kept, part);
        timed(&self.meters.place_ns, || into.copy_from_slice(within(bytes, piece.range, part)));
        self.meters.done_bytes.fetch_add(part.len(), std::sync::atomic::Ordering::Relaxed);
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

fn within_mut(buffer: &mut [u8], whole: ByteRange, part: ByteRange) -> &mut [u8] {
    let start = as_usize(part.start() - whole.start());
    buffer.get_mut(start..start + as_usize(part.len())).expect("the part was intersected with the whole")
}
