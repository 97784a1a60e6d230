//! Whether it fits, what is the most that does, and the smallest change that would help.
//!
//! Owns: the searches over [`estimate`]. Refuses to know: how answers look.

use serde::Serialize;

use super::base::{plan_without_files, whole};
use super::compute::{MAX_TOKENS, estimate};
use super::device_map::{DeviceMap, DeviceMapError, Objective, Place, Unit};
use super::error::EstimateError;
use super::report::Estimate;
use super::sizes;
use super::workload::{MemoryKind, Method, Optimizer, Purpose, TrainEngine, Workload};
use crate::adapter::{AdapterConfig, TargetModules};
use crate::model::Skeleton;
use crate::plan::{Placement, QuantizationRule, TensorPlan, aligned};
use crate::quant::{BlockSize, FourBitCode};
use crate::types::{Rank, WorldSize};

/// More devices than these are no small change.
const MOST_DEVICES: u32 = 64;

/// A model, what is to be done with it, and the memory that each rank may use.
#[derive(Clone, Debug)]
pub struct Fit<'a> {
    /// The model.
    pub skeleton: &'a Skeleton,
    /// What is to be done.
    pub workload: Workload,
    /// The memory of each rank's device, or of its part of the host, in bytes; ranks that are not listed have the last.
    pub budget_bytes: Vec<u64>,
}

/// A change that makes a workload fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Change {
    ActivationCheckpointing,
    Batch { sequences: u64 },
    EightBitOptimizer,
    Adapter,
    Nf4,
    Offload,
    Sequence { tokens: u64 },
    Devices { count: u32 },
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ActivationCheckpointing => write!(f, "compute blocks again in the backward pass"),
            Self::Batch { sequences } => write!(f, "a batch of {sequences}"),
            Self::EightBitOptimizer => write!(f, "an optimizer with moments of 8 bits"),
            Self::Adapter => write!(f, "train an adapter over NF4 (QLoRA) instead of all weights"),
            Self::Nf4 => write!(f, "quantize to NF4 with double quantization"),
            Self::Sequence { tokens } => write!(f, "sequences of {tokens} tokens"),
            Self::Offload => write!(f, "keep parameters and optimizer in host memory (CPU offload)"),
            Self::Devices { count } => write!(f, "{count} devices like the smallest"),
        }
    }
}

/// What CPU offload would buy a training run in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct OffloadGain {
    /// The largest peak of a rank's device with it.
    pub peak_bytes: u64,
    /// How much less that is than without.
    pub saved_bytes: u64,
    /// What lies in host memory for each rank.
    pub host_bytes: u64,
    /// The largest batch that fits with it.
    pub largest_batch_sequences: Option<u64>,
}

/// An answer with its placement.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// The memory of each rank.
    pub estimate: Estimate,
    /// What each rank has beyond its budget; 0 where it fits.
    pub over_bytes: Vec<u64>,
    /// With [`Placement::Layers`] and no split of one's own, the best placement of layers; nothing where none fits.
    pub map: Option<DeviceMap>,
    /// The proportions that give it.
    pub split: Vec<u32>,
}

impl Fitted {
    /// Whether every rank fits.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.over_bytes.iter().all(|&over| over == 0)
    }
}

impl Fit<'_> {
    /// The memory of each rank against its budget. Whole layers go to ranks by the best [`DeviceMap`] unless the workload has
    /// a split of its own.
    ///
    /// # Errors
    /// [`EstimateError`].
    pub fn answer(&self) -> Result<Fitted, EstimateError> {
        self.with(&self.workload)
    }

    fn with(&self, workload: &Workload) -> Result<Fitted, EstimateError> {
        let mut workload = workload.clone();
        let mut map = None;
        if workload.placement == Placement::Layers && workload.split.is_empty() {
            let (split, found) = self.place(&workload)?;
            workload.split = split;
            map = found;
        }
        let estimate = estimate(self.skeleton, &workload)?;
        let over = |rank: &super::RankEstimate| rank.peak_bytes.saturating_sub(self.budget(rank.rank));
        Ok(Fitted { over_bytes: estimate.ranks.iter().map(over).collect(), estimate, map, split: workload.split })
    }

    fn budget(&self, rank: Rank) -> u64 {
        self.budget_bytes.get(rank.index()).or_else(|| self.budget_bytes.last()).copied().unwrap_or(0)
    }

    /// The proportions of the best placement of layers, or those of the budgets where none fits.
    fn place(&self, workload: &Workload) -> Result<(Vec<u32>, Option<DeviceMap>), EstimateError> {
        // What every rank has whatever its layers are.
        let alike = estimate(self.skeleton, workload)?;
        let fixed = alike.ranks.first().map_or(0, |rank| {
            let layers = rank.weights_bytes + rank.statistics_bytes + rank.padding_bytes + rank.cache_bytes;
            rank.peak_bytes - layers
        });
        let plan = plan_without_files(self.skeleton, workload)?;
        let by_all: u64 = plan.tensors.iter().filter(|tensor| !tensor.sharded).map(padded).sum();
        let groups = groups(self.skeleton, workload, &plan.tensors);
        let units: Vec<Unit> = groups.iter().map(|group| group.unit).collect();
        let budgets: Vec<u64> = workload.world.ranks().map(|rank| self.budget(rank)).collect();
        let room = |&budget: &u64| Place { bytes: budget.saturating_sub(fixed + by_all), speed: 1 };
        let places: Vec<Place> = budgets.iter().map(room).collect();
        let scale = budgets.iter().max().copied().unwrap_or(0) / u64::from(u32::MAX) + 1;
        let by_budget = budgets.iter().map(|&budget| u32::try_from(budget / scale).unwrap_or(u32::MAX)).collect();
        match DeviceMap::new(&units, &places, None, Objective::UsedFraction) {
            Ok(map) => {
                // A split is of weights; the map was of weights and caches.
                let mut held = vec![0; places.len()];
                for (owner, group) in map.owners.iter().zip(&groups) {
                    if let Some(sum) = owner.and_then(|owner| held.get_mut(owner)) {
                        *sum += group.weights;
                    }
                }
                let split = DeviceMap { used_bytes: held, ..map.clone() }.split();
                Ok((split, Some(map)))
            }
            Err(DeviceMapError::DoesNotFit { .. } | DeviceMapError::Empty { .. }) => Ok((by_budget, None)),
            Err(error) => Err(EstimateError::Value {
                field: "devices",
                expected: "some to place layers on".to_owned(),
                found: error.to_string(),
            }),
        }
    }

    /// The largest batch that fits, in sequences; nothing when not even one does. Memory grows with the batch (`ES-3`), so the
    /// search halves.
    ///
    /// # Errors
    /// [`EstimateError`].
    pub fn largest_batch_sequences(&self) -> Result<Option<u64>, EstimateError> {
        let most = MAX_TOKENS / self.workload.sequence_tokens.max(1);
        self.largest(most, |workload, batch_sequences| Workload { batch_sequences, ..workload })
    }

    /// The longest sequence that fits, in tokens, with the batch as it is; nothing when not even one token does.
    ///
    /// # Errors
    /// [`EstimateError`].
    pub fn largest_sequence_tokens(&self) -> Result<Option<u64>, EstimateError> {
        let positions = self.skeleton.config.as_ref().map_or(1, |config| config.max_position_embeddings);
        let most = (MAX_TOKENS / self.workload.batch_sequences.max(1)).min(positions);
        self.largest(most, |workload, sequence_tokens| Workload { sequence_tokens, ..workload })
    }

    fn largest(&self, most: u64, with: impl Fn(Workload, u64) -> Workload) -> Result<Option<u64>, EstimateError> {
        let fits = |value| Ok::<bool, EstimateError>(self.with(&with(self.workload.clone(), value))?.fits());
        if most == 0 || !fits(1)? {
            return Ok(None);
        }
        // `low` fits; from `high` on nothing does, or nothing can be.
        let (mut low, mut high) = (1, 2);
        while high <= most && fits(high)? {
            (low, high) = (high, high.saturating_mul(2));
        }
        high = high.min(most.saturating_add(1));
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(Some(low))
    }

    /// The smallest change that makes it fit, if one does: in the order of [`Change`], which begins with what costs least
    /// (time) and ends with what costs most (devices).
    ///
    /// # Errors
    /// [`EstimateError`].
    pub fn smallest_change(&self) -> Result<Option<Change>, EstimateError> {
        for (change, workload) in self.switches(true) {
            if self.with(&workload)?.fits() {
                return Ok(Some(change));
            }
        }
        if self.workload.batch_sequences > 1
            && let Some(sequences) = self.largest_batch_sequences()?
        {
            return Ok(Some(Change::Batch { sequences }));
        }
        for (change, workload) in self.switches(false) {
            // With fewer sequences each of them would do as well; the batch stays.
            if self.with(&workload)?.fits() {
                return Ok(Some(change));
            }
        }
        if self.workload.purpose != Purpose::Load
            && let Some(tokens) = self.largest_sequence_tokens()?
        {
            return Ok(Some(Change::Sequence { tokens }));
        }
        self.more_devices()
    }

    /// What CPU offload would buy; nothing where there is none, or it is on already.
    ///
    /// # Errors
    /// [`EstimateError`].
    pub fn offload_gain(&self) -> Result<Option<OffloadGain>, EstimateError> {
        let Purpose::Train(training) = &self.workload.purpose else { return Ok(None) };
        if training.engine != (TrainEngine::PyTorch { offload: false }) {
            return Ok(None);
        }
        let engine = TrainEngine::PyTorch { offload: true };
        let workload = train(&self.workload, super::Training { engine, ..training.clone() });
        let fit = Fit { workload, ..self.clone() };
        let (without, with) = (self.answer()?.estimate, fit.answer()?.estimate);
        let most = |of: fn(&super::RankEstimate) -> u64, ranks: &[super::RankEstimate]| {
            ranks.iter().map(of).max().unwrap_or(0)
        };
        let peak_bytes = most(|rank| rank.peak_bytes, &with.ranks);
        Ok(Some(OffloadGain {
            peak_bytes,
            saved_bytes: most(|rank| rank.peak_bytes, &without.ranks).saturating_sub(peak_bytes),
            host_bytes: most(|rank| rank.host_bytes, &with.ranks),
            largest_batch_sequences: fit.largest_batch_sequences()?,
        }))
    }

    /// What can be switched: what costs time only, or the rest.
    fn switches(&self, time_only: bool) -> Vec<(Change, Workload)> {
        let mut found = Vec::new();
        let changed = |change: &dyn Fn(&mut Workload)| {
            let mut workload = self.workload.clone();
            change(&mut workload);
            workload
        };
        if let Purpose::Train(training) = &self.workload.purpose {
            if time_only {
                if !training.activation_checkpointing {
                    let training = super::Training { activation_checkpointing: true, ..training.clone() };
                    found.push((Change::ActivationCheckpointing, train(&self.workload, training)));
                }
                return found;
            }
            let pytorch = matches!(training.engine, TrainEngine::PyTorch { .. });
            if pytorch && training.optimizer != Optimizer::EightBit {
                let training = super::Training { optimizer: Optimizer::EightBit, ..training.clone() };
                found.push((Change::EightBitOptimizer, train(&self.workload, training)));
            }
            if training.method == Method::Full {
                let adapter = AdapterConfig::new(8, 16.0, TargetModules::AllLinear);
                let training = super::Training { method: Method::Lora(Box::new(adapter)), ..training.clone() };
                let workload = Workload { quantization: nf4(), ..train(&self.workload, training) };
                found.push((Change::Adapter, workload));
            } else if !self.workload.is_quantized() {
                found.push((Change::Nf4, changed(&|workload| workload.quantization = nf4())));
            }
            if training.engine == (TrainEngine::PyTorch { offload: false }) {
                let engine = TrainEngine::PyTorch { offload: true };
                let training = super::Training { engine, ..training.clone() };
                found.push((Change::Offload, train(&self.workload, training)));
            }
        } else if !time_only && !self.workload.is_quantized() {
            found.push((Change::Nf4, changed(&|workload| workload.quantization = nf4())));
        }
        found
    }

    /// More devices like the smallest, where devices share the weights.
    fn more_devices(&self) -> Result<Option<Change>, EstimateError> {
        let shares = self.workload.placement != Placement::Replicate && self.workload.memory == MemoryKind::Device;
        let smallest = self.budget_bytes.iter().min().copied().unwrap_or(0);
        let most = match self.workload.placement {
            Placement::Layers => self.skeleton.layers().min(MOST_DEVICES),
            _ => MOST_DEVICES,
        };
        let mut count = self.workload.world.get() + 1;
        while shares && count <= most {
            let Ok(world) = WorldSize::new(count) else { break };
            let workload = Workload { world, split: Vec::new(), ..self.workload.clone() };
            let fit = Fit { skeleton: self.skeleton, workload, budget_bytes: vec![smallest] };
            if fit.answer()?.fits() {
                return Ok(Some(Change::Devices { count }));
            }
            count += 1;
        }
        Ok(None)
    }
}

fn train(workload: &Workload, training: super::Training) -> Workload {
    Workload { purpose: Purpose::Train(training), ..workload.clone() }
}

/// QLoRA's quantization, as a job has it by default.
pub(super) fn nf4() -> QuantizationRule {
    let block = BlockSize::new(64).expect("64 is a block size");
    QuantizationRule::FourBit { code: FourBitCode::Nf4, block, nested: true, skip: Vec::new() }
}

fn padded(tensor: &TensorPlan) -> u64 {
    tensor.components().iter().map(|component| aligned(component.bytes)).sum()
}

/// What goes to a device whole: a layer, or a tensor outside layers.
struct Group {
    /// With its keys and values.
    unit: Unit,
    /// Its weights and statistics alone.
    weights: u64,
    is_layer: bool,
}

/// The groups in the model's order, as `plan` finds them when it assigns owners.
fn groups(skeleton: &Skeleton, workload: &Workload, tensors: &[TensorPlan]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut last = None;
    for tensor in tensors {
        let layer = tensor.fqn.layer();
        if layer.is_none() || layer != last || groups.is_empty() {
            groups.push(Group { unit: Unit { bytes: 0, work: 0 }, weights: 0, is_layer: layer.is_some() });
        }
        last = layer;
        if let Some(group) = groups.last_mut().filter(|_| tensor.sharded) {
            let (packed, statistics) = whole(tensor);
            group.unit.bytes += padded(tensor);
            group.unit.work += tensor.elements();
            group.weights += packed + statistics;
        }
    }
    let (Purpose::Inference { cache_dtype, .. }, Some(config)) = (&workload.purpose, &skeleton.config) else {
        return groups;
    };
    let (tokens, layers) = (workload.sequence_tokens, sizes::cached_layers(config));
    let cross = sizes::cross_cache_bytes(config, tokens, *cache_dtype) / u64::from(layers.max(1));
    // The last layers keep them: all, or T5's decoder.
    let with_cache = groups.iter_mut().rev().filter(|group| group.is_layer);
    for (layer, group) in (0..layers).rev().zip(with_cache) {
        let cache = sizes::layer_cache_bytes(config, layer, tokens, *cache_dtype) + cross;
        group.unit.bytes = group.unit.bytes.saturating_add(workload.batch_sequences.saturating_mul(cache));
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Attention, ModelProfile, Training};
    use super::*;
    use crate::plan::DTypeRule;
    use crate::types::DType;

    const GIB: u64 = 1 << 30;

    fn inference(world: u32) -> Workload {
        Workload {
            placement: Placement::Layers,
            sequence_tokens: 2048,
            memory: MemoryKind::Device,
            purpose: Purpose::Inference { cache_dtype: DType::F16, attention: Attention::Flash },
            ..Workload::load(WorldSize::new(world).expect("not zero"), DType::F16)
        }
    }

    fn training(method: Method) -> Workload {
        let training = Training {
            method,
            engine: TrainEngine::PyTorch { offload: false },
            optimizer: Optimizer::F32,
            activation_checkpointing: false,
            attention: Attention::Flash,
        };
        Workload {
            placement: Placement::Shard,
            dtype: DTypeRule::Convert(DType::BF16),
            purpose: Purpose::Train(training),
            ..inference(2)
        }
    }

    /// By hand: a layer of Llama-2 7B has 4 · 4096² + 3 · 4096 · 11008 = 202,375,168 elements in matrices, embedding and head have
    /// 131,072,000 each. 24 and 12 GiB take 13 GB in f16 with about twice as much on the larger device.
    #[test]
    fn layers_go_to_devices_by_their_memory() {
        let skeleton = ModelProfile::published("llama-2-7b").expect("published").skeleton();
        let fit = Fit { skeleton: &skeleton, workload: inference(2), budget_bytes: vec![24 * GIB, 12 * GIB] };
        let answer = fit.answer().expect("it can be");
        assert!(answer.fits());
        let map = answer.map.expect("a placement");
        // The embedding, 32 layers, the last norm and the head.
        assert_eq!(map.owners.len(), 35);
        let on_first = map.owners.iter().filter(|owner| **owner == Some(0)).count();
        assert!((21..=24).contains(&on_first), "{on_first}");
        // The plan with this split places what the map says: weights of whole layers, and small tensors on both.
        let layers = u64::try_from(on_first - 1).expect("few");
        let small = 2 * 4096 * (2 * 32 + 1);
        assert_eq!(answer.estimate.ranks[0].weights_bytes, 2 * (131_072_000 + layers * 202_375_168) + small);
        assert_eq!(answer.estimate.ranks[0].cache_bytes, layers * 2048 * 2 * 4096 * 2);
        let both: u64 = answer.estimate.ranks.iter().map(|rank| rank.weights_bytes).sum();
        assert_eq!(both, 2 * 6_738_415_616 + small);
    }

    #[test]
    fn the_largest_batch_and_sequence_are_the_largest() {
        let skeleton = ModelProfile::published("llama-2-7b").expect("published").skeleton();
        let fit = |workload: &Workload| {
            let fit = Fit { skeleton: &skeleton, workload: workload.clone(), budget_bytes: vec![24 * GIB] };
            fit.answer().expect("it can be").fits()
        };
        let base = inference(1);
        let whole = Fit { skeleton: &skeleton, workload: base.clone(), budget_bytes: vec![24 * GIB] };
        let batch = whole.largest_batch_sequences().expect("it can be").expect("one fits");
        assert!(fit(&Workload { batch_sequences: batch, ..base.clone() }));
        assert!(!fit(&Workload { batch_sequences: batch + 1, ..base.clone() }));
        let longer = Workload { batch_sequences: 4, ..base };
        let whole = Fit { skeleton: &skeleton, workload: longer.clone(), budget_bytes: vec![24 * GIB] };
        let tokens = whole.largest_sequence_tokens().expect("it can be").expect("one fits");
        assert!(fit(&Workload { sequence_tokens: tokens, ..longer.clone() }));
        assert!(tokens == 4096 || !fit(&Workload { sequence_tokens: tokens + 1, ..longer }));
        let none = Fit { skeleton: &skeleton, workload: inference(1), budget_bytes: vec![8 * GIB] };
        assert_eq!(none.largest_batch_sequences().expect("it can be"), None);
    }

    #[test]
    fn the_smallest_change_makes_it_fit() {
        let skeleton = ModelProfile::published("llama-2-7b").expect("published").skeleton();
        let change = |workload: Workload, gib: u64| {
            let fit = Fit { skeleton: &skeleton, workload, budget_bytes: vec![gib * GIB] };
            fit.smallest_change().expect("it can be")
        };
        let lora = || Method::Lora(Box::new(AdapterConfig::new(8, 16.0, TargetModules::AllLinear)));
        assert_eq!(change(training(lora()), 24), Some(Change::ActivationCheckpointing));
        assert_eq!(change(training(Method::Full), 24), Some(Change::Adapter));
        // 13.5 GB in f16 and 12 GiB: NF4 takes a quarter.
        assert_eq!(change(inference(1), 12), Some(Change::Nf4));
        assert_eq!(change(inference(1), 1), None);
        let large = ModelProfile::published("llama-2-70b").expect("published").skeleton();
        let workload = Workload { quantization: nf4(), ..inference(1) };
        let fit = Fit { skeleton: &large, workload, budget_bytes: vec![24 * GIB] };
        assert_eq!(fit.smallest_change().expect("it can be"), Some(Change::Devices { count: 2 }));
    }

    /// By hand: in bf16 the base's halves, 2 · 6,738,415,616 / 2 bytes, are on the host, beside the adapter's.
    #[test]
    fn offload_buys_what_then_lies_on_the_host() {
        let skeleton = ModelProfile::published("llama-2-7b").expect("published").skeleton();
        let lora = Method::Lora(Box::new(AdapterConfig::new(8, 16.0, TargetModules::AllLinear)));
        let mut workload = training(lora);
        if let Purpose::Train(training) = &mut workload.purpose {
            training.activation_checkpointing = true;
        }
        let fit = Fit { skeleton: &skeleton, workload, budget_bytes: vec![48 * GIB] };
        let gain = fit.offload_gain().expect("it can be").expect("there is some");
        // 2 bytes of parameters, 8 of moments, 2 of gradients for each of the adapter's parameters, on two ranks.
        let adapter = fit.answer().expect("it can be").estimate.trained_parameters;
        assert_eq!(gain.host_bytes, 6_738_415_616 + 12 * adapter / 2);
        assert!(gain.saved_bytes > 6_000_000_000, "{gain:?}");
        assert!(gain.largest_batch_sequences > fit.largest_batch_sequences().expect("it can be"));
        let without = Fit { skeleton: &skeleton, workload: inference(1), budget_bytes: vec![24 * GIB] };
        assert_eq!(without.offload_gain().expect("it can be"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// ES-3: more sequences or longer ones never take less.
        #[test]
        fn es_3_memory_grows_with_the_workload(
            batch in 1_u64..64, sequence in 1_u64..1000, more in 1_u64..24, kind in 0_u8..4,
        ) {
            let skeleton = ModelProfile::published("gpt2").expect("published").skeleton();
            let workload = match kind {
                0 => inference(2),
                1 => training(Method::Full),
                2 => training(Method::Lora(Box::new(AdapterConfig::new(8, 16.0, TargetModules::AllLinear)))),
                _ => {
                    let mut workload = training(Method::Full);
                    if let Purpose::Train(training) = &mut workload.purpose {
                        training.engine = TrainEngine::Weightcast;
                    }
                    workload
                }
            };
            let peak = |batch_sequences, sequence_tokens| {
                let workload = Workload { batch_sequences, sequence_tokens, ..workload.clone() };
                estimate(&skeleton, &workload).expect("it can be").ranks[0].peak_bytes
            };
            let least = peak(batch, sequence);
            prop_assert!(peak(batch + more, sequence) >= least);
            prop_assert!(peak(batch, sequence + more) >= least);
        }
    }
}
