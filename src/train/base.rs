//! The frozen base: gathered from the ranks block by block (read before, where it streams), turned into f32, and let go again.
//!
//! Owns: the gather (one collective per block). Refuses to know: what is computed.
//!
//! `BW-1`: a block's collective is made by every rank, also by one that has nothing to compute (`TR-1`).

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::load::WholeTensor;
use crate::nn::FrozenWeight;
use crate::plan::{LoadPlan, Part};
use crate::quant::Kernels;
use crate::state::StateDict;
use crate::types::{Fqn, TensorDigest, as_usize};

use super::TrainError;
use super::exchange::Exchange;
use super::stream::Stream;

/// The base as this rank holds it.
pub(super) struct Base<'a> {
    plan: &'a LoadPlan,
    /// What stays in memory.
    state: &'a StateDict,
    /// By tensor: its number in `state`; nothing for one that streams.
    resident: Vec<Option<usize>>,
    stream: Option<Stream>,
    index: BTreeMap<Fqn, usize>,
    slots: BTreeMap<Fqn, FrozenWeight>,
    /// By tensor, by component: the bytes that each rank owns.
    owned: Vec<Vec<Vec<usize>>>,
    device: candle_core::Device,
    kernels: Kernels,
    sent: Vec<u8>,
    gathered: Vec<u8>,
}

/// Where this rank's bytes of a tensor are.
struct Place<'s> {
    /// In the plan.
    tensor: usize,
    state: &'s StateDict,
    /// In `state`.
    number: usize,
}

impl<'a> Base<'a> {
    /// The base, to be filled into `slots`; `state` is of the plan's resident part.
    ///
    /// # Errors
    /// The place that weights stream from cannot be opened.
    pub(super) fn new(
        plan: &'a LoadPlan,
        state: &'a StateDict,
        slots: BTreeMap<Fqn, FrozenWeight>,
        device: candle_core::Device,
    ) -> Result<Self, TrainError> {
        let stream = Stream::of(plan, state.rank())?;
        let mut next = 0..;
        let resident =
            plan.tensors.iter().map(|tensor| if plan.streams(tensor) { None } else { next.next() }).collect();
        let index = plan.tensors.iter().enumerate().map(|(index, tensor)| (tensor.fqn.clone(), index)).collect();
        let owned = plan.tensors.iter().map(|tensor| {
            let by_rank: Vec<_> = plan.world.ranks().map(|rank| tensor.holdings(rank, plan.world)).collect();
            let components = by_rank.first().map_or(0, Vec::len);
            (0..components)
                .map(|component| {
                    by_rank
                        .iter()
                        .map(|holdings| holdings.get(component).map_or(0, |holding| as_usize(holding.owned.len())))
                        .collect()
                })
                .collect()
        });
        let owned = owned.collect();
        let kernels = Kernels::detect();
        let (sent, gathered) = (Vec::new(), Vec::new());
        Ok(Self { plan, state, resident, stream, index, slots, owned, device, kernels, sent, gathered })
    }

    /// Gathers the tensors `fqns` and fills their slots with f32. Names without a slot are trained, not frozen.
    pub(super) fn fill(&mut self, fqns: &[Fqn], exchange: &mut Exchange<'_>) -> Result<(), TrainError> {
        let tensors = self.tensors(fqns);
        let fetched = self.fetch(&tensors)?;
        let places = self.places(&tensors, fetched.as_ref());
        let parts = self.gather(&places, exchange)?;
        for (place, parts) in places.iter().zip(parts) {
            let planned = &self.plan.tensors[place.tensor];
            let values = self.values(place, &parts)?;
            let dims: Vec<usize> = planned.shape.0.iter().map(|&size| as_usize(size)).collect();
            let value = Tensor::from_vec(values, dims, &self.device)?;
            if let Some(slot) = self.slots.get(&planned.fqn) {
                slot.fill(value);
            }
        }
        Ok(())
    }

    /// Takes part in the gather of `fqns` without using them.
    pub(super) fn take_part(&mut self, fqns: &[Fqn], exchange: &mut Exchange<'_>) -> Result<(), TrainError> {
        let tensors = self.tensors(fqns);
        let fetched = self.fetch(&tensors)?;
        let places = self.places(&tensors, fetched.as_ref());
        self.gather(&places, exchange).map(drop)
    }

    /// Empties the slots of `fqns`.
    pub(super) fn clear(&self, fqns: &[Fqn]) {
        fqns.iter().filter_map(|fqn| self.slots.get(fqn)).for_each(FrozenWeight::clear);
    }

    /// One tensor as f32, whole; every rank calls this for the same tensor.
    pub(super) fn tensor(&mut self, fqn: &Fqn, exchange: &mut Exchange<'_>) -> Result<Vec<f32>, TrainError> {
        let tensor = self.index.get(fqn).copied().ok_or_else(|| TrainError::Plan {
            what: "the base",
            expected: format!("a tensor {fqn}"),
            found: "none".to_owned(),
        })?;
        let fetched = self.fetch(&[tensor])?;
        let places = self.places(&[tensor], fetched.as_ref());
        let parts = self.gather(&places, exchange)?.pop().unwrap_or_default();
        places.first().map_or_else(|| Ok(Vec::new()), |place| self.values(place, &parts))
    }

    /// The digest of all bytes of the base, whatever ranks it lies on.
    pub(super) fn digest(&self, exchange: &mut Exchange<'_>) -> Result<String, TrainError> {
        let own = self.owned_digests()?;
        // As text a digest has the same length on every rank only if lengths are fixed: gather one line per component.
        let mut digest = TensorDigest::empty();
        let width = 48;
        let mut line = String::new();
        let mut components = 0;
        for tensor in &own {
            for component in tensor {
                line.push_str(&format!("{:<width$}", component.to_string()));
                components += 1;
            }
        }
        let all = exchange.all_gather_text(&line)?;
        for component in 0..components {
            for rank in &all {
                let text = rank.get(component * width..(component + 1) * width).unwrap_or_default().trim();
                let part: TensorDigest = text.parse().map_err(|_| TrainError::Plan {
                    what: "a digest of the base",
                    expected: "a digest".to_owned(),
                    found: text.to_owned(),
                })?;
                digest = digest.append(part);
            }
        }
        Ok(digest.to_string())
    }

    /// Of all tensors in the plan's order; of those that stream layer by layer.
    fn owned_digests(&self) -> Result<Vec<Vec<TensorDigest>>, TrainError> {
        let mut resident = self.state.owned_digests()?.into_iter();
        if self.stream.is_none() {
            return Ok(resident.collect());
        }
        let mut all = Vec::with_capacity(self.plan.tensors.len());
        let layer = |index: &usize| self.plan.tensors.get(*index).and_then(|tensor| tensor.fqn.layer());
        let order: Vec<usize> = (0..self.plan.tensors.len()).collect();
        for group in order.chunk_by(|one, other| layer(one) == layer(other)) {
            match self.fetch(group)? {
                Some(fetched) => all.extend(fetched.owned_digests()?),
                None => all.extend(resident.by_ref().take(group.len())),
            }
        }
        Ok(all)
    }

    fn tensors(&self, fqns: &[Fqn]) -> Vec<usize> {
        fqns.iter().filter(|fqn| self.slots.contains_key(*fqn)).filter_map(|fqn| self.index.get(fqn).copied()).collect()
    }

    /// Reads those of `tensors` that stream, in their order; nothing when none does.
    fn fetch(&self, tensors: &[usize]) -> Result<Option<StateDict>, TrainError> {
        let streams = |tensor: &usize| self.resident.get(*tensor).is_some_and(Option::is_none);
        let wanted: Vec<usize> = tensors.iter().copied().filter(streams).collect();
        let stream = self.stream.as_ref().filter(|_| !wanted.is_empty());
        stream.map(|stream| stream.fetch(self.plan, &wanted)).transpose()
    }

    /// Where this rank's bytes of each of `tensors` are.
    fn places<'s>(&self, tensors: &[usize], fetched: Option<&'s StateDict>) -> Vec<Place<'s>>
    where
        'a: 's,
    {
        let mut next = 0..;
        let place = |&tensor: &usize| {
            let (state, number) = match (self.resident.get(tensor).copied().flatten(), fetched) {
                (None, Some(fetched)) => (fetched, next.next().unwrap_or_default()),
                (number, _) => (self.state, number.unwrap_or_default()),
            };
            Place { tensor, state, number }
        };
        tensors.iter().map(place).collect()
    }

    /// The components of tensors, whole: where they lie, or gathered from their owners in one collective.
    fn gather<'s>(
        &mut self,
        places: &[Place<'s>],
        exchange: &mut Exchange<'_>,
    ) -> Result<Vec<Vec<Cow<'s, [u8]>>>, TrainError> {
        let is_cut = |place: &Place<'_>, component: usize| {
            let planned = &self.plan.tensors[place.tensor];
            let part = place.state.parts(place.number).get(component).map(|placed| placed.holding.component.part);
            planned.sharded && self.plan.world.get() > 1 && part != Some(Part::NestedOffset)
        };
        let mut counts = vec![0_usize; self.plan.world.count()];
        self.sent.clear();
        for place in places {
            let components = 0..place.state.parts(place.number).len();
            for component in components.filter(|&component| is_cut(place, component)) {
                self.sent.extend_from_slice(&place.state.owned_bytes(place.number, component)?);
                for (count, own) in counts.iter_mut().zip(&self.owned[place.tensor][component]) {
                    *count += own;
                }
            }
        }
        let total: usize = counts.iter().sum();
        if total > 0 {
            self.gathered.resize(total, 0);
            exchange.all_gather(&self.sent, &mut self.gathered, &counts)?;
        }
        // Where each rank's next byte is.
        let mut next: Vec<usize> = counts
            .iter()
            .scan(0, |end, count| {
                let start = *end;
                *end += count;
                Some(start)
            })
            .collect();
        let mut all = Vec::with_capacity(places.len());
        for place in places {
            let mut parts = Vec::new();
            for component in 0..place.state.parts(place.number).len() {
                if !is_cut(place, component) {
                    parts.push(place.state.kept_bytes(place.number, component)?);
                    continue;
                }
                let owned = &self.owned[place.tensor][component];
                let mut whole = Vec::with_capacity(owned.iter().sum());
                for (next, own) in next.iter_mut().zip(owned) {
                    whole.extend_from_slice(&self.gathered[*next..*next + own]);
                    *next += own;
                }
                parts.push(Cow::Owned(whole));
            }
            all.push(parts);
        }
        Ok(all)
    }

    /// The f32 values of a tensor from its whole components.
    fn values(&self, place: &Place<'_>, parts: &[Cow<'_, [u8]>]) -> Result<Vec<f32>, TrainError> {
        let planned = &self.plan.tensors[place.tensor];
        let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        let nested_offset = place.state.nested_offset(place.number)?;
        let (encoding, shape) = (planned.encoding, &planned.shape);
        let whole = WholeTensor { encoding, shape, parts: &parts, nested_offset };
        whole
            .dequantize(self.kernels)
            .map_err(|error| TrainError::Weight { fqn: planned.fqn.clone(), reason: error.to_string() })
    }
}
