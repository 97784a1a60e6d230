//! The frozen base: gathered from the ranks block by block, turned into f32, and let go again.
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

/// The base as this rank holds it.
pub(super) struct Base<'a> {
    plan: &'a LoadPlan,
    state: &'a StateDict,
    index: BTreeMap<Fqn, usize>,
    slots: BTreeMap<Fqn, FrozenWeight>,
    /// By tensor, by component: the bytes that each rank owns.
    owned: Vec<Vec<Vec<usize>>>,
    device: candle_core::Device,
    kernels: Kernels,
    sent: Vec<u8>,
    gathered: Vec<u8>,
}

impl<'a> Base<'a> {
    /// The base in `state`, to be filled into `slots`.
    pub(super) fn new(
        plan: &'a LoadPlan,
        state: &'a StateDict,
        slots: BTreeMap<Fqn, FrozenWeight>,
        device: candle_core::Device,
    ) -> Self {
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
        Self { plan, state, index, slots, owned, device, kernels, sent: Vec::new(), gathered: Vec::new() }
    }

    /// Gathers the tensors `fqns` and fills their slots with f32. Names without a slot are trained, not frozen.
    pub(super) fn fill(&mut self, fqns: &[Fqn], exchange: &mut Exchange<'_>) -> Result<(), TrainError> {
        let tensors = self.tensors(fqns);
        let parts = self.gather(&tensors, exchange)?;
        for (&tensor, parts) in tensors.iter().zip(parts) {
            let planned = &self.plan.tensors[tensor];
            let values = self.values(tensor, &parts)?;
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
        self.gather(&tensors, exchange).map(drop)
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
        let parts = self.gather(&[tensor], exchange)?.pop().unwrap_or_default();
        self.values(tensor, &parts)
    }

    /// The digest of all bytes of the base, whatever ranks it lies on.
    pub(super) fn digest(&self, exchange: &mut Exchange<'_>) -> Result<String, TrainError> {
        let own = self.state.owned_digests()?;
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

    fn tensors(&self, fqns: &[Fqn]) -> Vec<usize> {
        fqns.iter().filter(|fqn| self.slots.contains_key(*fqn)).filter_map(|fqn| self.index.get(fqn).copied()).collect()
    }

    /// The components of `tensors`, whole: where they lie, or gathered from their owners in one collective.
    fn gather(
        &mut self,
        tensors: &[usize],
        exchange: &mut Exchange<'_>,
    ) -> Result<Vec<Vec<Cow<'a, [u8]>>>, TrainError> {
        let state = self.state;
        let is_cut = |tensor: usize, component: usize| {
            let planned = &self.plan.tensors[tensor];
            let part = state.parts(tensor).get(component).map(|placed| placed.holding.component.part);
            planned.sharded && self.plan.world.get() > 1 && part != Some(Part::NestedOffset)
        };
        let mut counts = vec![0_usize; self.plan.world.count()];
        self.sent.clear();
        for &tensor in tensors {
            for component in (0..state.parts(tensor).len()).filter(|&component| is_cut(tensor, component)) {
                self.sent.extend_from_slice(&state.owned_bytes(tensor, component)?);
                for (count, own) in counts.iter_mut().zip(&self.owned[tensor][component]) {
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
        let mut all = Vec::with_capacity(tensors.len());
        for &tensor in tensors {
            let mut parts = Vec::new();
            for component in 0..state.parts(tensor).len() {
                if !is_cut(tensor, component) {
                    parts.push(state.kept_bytes(tensor, component)?);
                    continue;
                }
                let mut whole = Vec::with_capacity(self.owned[tensor][component].iter().sum());
                for (next, own) in next.iter_mut().zip(&self.owned[tensor][component]) {
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
    fn values(&self, tensor: usize, parts: &[Cow<'_, [u8]>]) -> Result<Vec<f32>, TrainError> {
        let planned = &self.plan.tensors[tensor];
        let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        let nested_offset = self.state.nested_offset(tensor)?;
        let (encoding, shape) = (planned.encoding, &planned.shape);
        let whole = WholeTensor { encoding, shape, parts: &parts, nested_offset };
        whole
            .dequantize(self.kernels)
            .map_err(|error| TrainError::Weight { fqn: planned.fqn.clone(), reason: error.to_string() })
    }
}
