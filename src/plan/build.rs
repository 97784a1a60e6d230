//! Making the plan: index, skeleton and rules in, [`LoadPlan`] out, or the reason why not.

use super::{
    Chunking, DTypeRule, DeviceBudget, DeviceRule, Encoding, Input, LoadPlan, MemoryBudget, PLAN_VERSION, Placement,
    QuantizationRule, RankMemory, SourceEncoding, StoredChunk, Strategy, TensorPlan,
};
use crate::error::{Classify, Kind};
use crate::format::{ModelIndex, PackedTensor, TensorEntry};
use crate::model::{Binding, Role, Skeleton, SkeletonTensor};
use crate::types::{ByteRange, DType, Fqn, Rank, Shape, ShapeOverflow, WorldSize};

/// A sharded tensor has at least this many elements; smaller ones cost less to keep everywhere than to gather.
const SHARD_MIN_ELEMENTS: u64 = 4096;

/// Results that may wait to be sent where one of them may be a whole tensor.
const WHOLE_TENSORS_QUEUED: u32 = 2;

/// What a plan is made for.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The model in words, for messages.
    pub model: String,
    /// The directory that the index's file names are relative to.
    pub root: String,
    /// The text of config.json.
    pub config_json: Option<String>,
    /// The number of ranks.
    pub world: WorldSize,
    /// Which ranks read.
    pub strategy: Strategy,
    /// What ranks keep.
    pub placement: Placement,
    /// The element type of what is not quantized.
    pub dtype: DTypeRule,
    /// What is quantized.
    pub quantization: QuantizationRule,
    /// What becomes of weights that are quantized already where `quantization` says another form.
    pub quantized: Quantized,
    /// Sizes of chunks.
    pub chunking: Chunking,
    /// Whether ranks report digests.
    pub digests: bool,
    /// Where the weights are to lie.
    pub device: DeviceRule,
    /// With [`Placement::Layers`], the ranks' parts of the model in proportion; a rank that is not listed has 1.
    pub split: Vec<u32>,
}

/// What becomes of weights that are quantized already, in another form than the one asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quantized {
    /// The plan is refused, because quantizing twice loses more than the user may know; GGUF's blocks are made anew.
    #[default]
    Refuse,
    /// They stay as they are.
    Keep,
    /// They are dequantized, and become what was asked for.
    Redo,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A rank would need more memory than it may use.
    #[error(
        "rank {} does not fit: it needs {} bytes of host memory ({} of weights, {} of reader window, {} of training, {} of overhead), and may use {budget_bytes}",
        needed.rank, needed.peak_host_bytes, needed.host_weights_bytes(), needed.window_bytes, needed.training_bytes, needed.overhead_bytes
    )]
    RankDoesNotFit {
        /// What the rank needs.
        needed: RankMemory,
        /// What it may use.
        budget_bytes: u64,
    },
    /// All ranks together would need more memory than the host has.
    #[error(
        "{world} ranks do not fit on this host: they need {needed_bytes} bytes together, and {budget_bytes} are available"
    )]
    HostDoesNotFit {
        /// The number of ranks.
        world: WorldSize,
        /// What all ranks need.
        needed_bytes: u64,
        /// What the host has.
        budget_bytes: u64,
    },
    /// The ranks of one device would need more memory than it has free.
    #[error(
        "device cuda:{device}: its {ranks} ranks do not fit: they need {needed_bytes} bytes, and {budget_bytes} are free"
    )]
    DeviceDoesNotFit {
        /// The device's index.
        device: u32,
        /// The number of ranks on it.
        ranks: usize,
        /// What they need.
        needed_bytes: u64,
        /// What is free.
        budget_bytes: u64,
    },
    /// A shape's size does not fit 64 bits.
    #[error("tensor {fqn}: {source}")]
    Shape {
        /// The tensor.
        fqn: Fqn,
        /// The overflow.
        source: ShapeOverflow,
    },
    /// The placement is by experts, and the model has none.
    #[error("load.placement: expected shard, replicate or layers, because {model} has no experts, found experts")]
    NoExperts {
        /// The model.
        model: String,
    },
    /// The job asks for another quantization than the weights have.
    #[error(
        "tensor {fqn} is quantized already: expected no quantization in the job, or {found}; found {expected} in the job"
    )]
    Quantized {
        /// The tensor.
        fqn: Fqn,
        /// How it is quantized.
        found: String,
        /// How the job would have it.
        expected: String,
    },
    /// A rule for some modules is for none.
    #[error("quantization.rules: expected modules of {model}, found {pattern:?}, which names none of its tensors")]
    NoModule {
        /// The model.
        model: String,
        /// The pattern.
        pattern: String,
    },
    /// There is nothing to load.
    #[error("{model} has no tensors")]
    Empty {
        /// The model.
        model: String,
    },
}

impl Classify for PlanError {
    fn kind(&self) -> Kind {
        match self {
            Self::RankDoesNotFit { .. } | Self::HostDoesNotFit { .. } | Self::DeviceDoesNotFit { .. } => {
                Kind::Exhausted
            }
            // A configuration that cannot work, not a bad input.
            Self::NoExperts { .. } | Self::NoModule { .. } => Kind::Conflict,
            Self::Shape { .. } | Self::Quantized { .. } | Self::Empty { .. } => Kind::Invalid,
        }
    }
}

/// Plans the load of a model whose keys were bound to its skeleton.
///
/// The order of tensors is the skeleton's: as the layers follow one another.
///
/// # Errors
/// [`PlanError::Empty`], [`PlanError::NoExperts`], [`PlanError::NoModule`], [`PlanError::Quantized`] and [`PlanError::Shape`].
pub fn plan(
    request: LoadRequest,
    index: &ModelIndex,
    skeleton: &Skeleton,
    binding: &Binding,
) -> Result<LoadPlan, PlanError> {
    if let Some(pattern) = request.quantization.idle_pattern(&skeleton.tensors) {
        return Err(PlanError::NoModule { model: request.model, pattern: pattern.to_owned() });
    }
    let mut tensors = Vec::new();
    let layers = skeleton.layers();
    for tensor in &skeleton.tensors {
        let Some(entry) = binding.source(&tensor.fqn).and_then(|name| index.tensors.get(name)) else { continue };
        tensors.push(request.tensor(tensor, layers, entry)?);
    }
    assemble(request, index.files.clone(), tensors, aliases(skeleton))
}

fn elements(entry: &TensorEntry) -> Input {
    // What is packed is dequantized to f32.
    let packed = matches!(entry.encoding, SourceEncoding::Packed(_));
    let dtype = if packed { DType::F32 } else { entry.dtype };
    Input::Elements { file: entry.file, range: entry.range, dtype, encoding: entry.encoding.clone() }
}

impl PackedTensor {
    /// Its components as they are.
    fn input(&self) -> Input {
        let part = |&(file, range): &(u32, ByteRange)| vec![StoredChunk { file, range, at: 0 }];
        let mut parts: Vec<_> = self.parts.iter().map(part).collect();
        if self.nested_offset.is_some() {
            // The last component, which is in the plan.
            parts.push(Vec::new());
        }
        Input::Stored { parts, nested_offset: self.nested_offset }
    }
}

fn aliases(skeleton: &Skeleton) -> Vec<(Fqn, Fqn)> {
    skeleton.aliases.iter().map(|alias| (alias.alias.clone(), alias.target.clone())).collect()
}

/// Puts the parts of a plan together: checks sizes and assigns the readers.
///
/// # Errors
/// As [`plan`].
pub(crate) fn assemble(
    request: LoadRequest,
    files: Vec<crate::format::FileEntry>,
    mut tensors: Vec<TensorPlan>,
    aliases: Vec<(Fqn, Fqn)>,
) -> Result<LoadPlan, PlanError> {
    if tensors.is_empty() {
        return Err(PlanError::Empty { model: request.model });
    }
    for tensor in &tensors {
        tensor
            .encoding
            .components(&tensor.shape)
            .map_err(|source| PlanError::Shape { fqn: tensor.fqn.clone(), source })?;
    }
    assign_readers(&mut tensors, request.strategy, request.world);
    let mut chunking = request.chunking;
    if tensors.iter().any(|tensor| matches!(tensor.input, Input::Elements { .. }) && tensor.is_made_at_once()) {
        chunking.queue_chunks = chunking.queue_chunks.min(WHOLE_TENSORS_QUEUED);
    }
    match request.placement {
        Placement::Layers => super::layers::assign_owners(&mut tensors, request.world, &request.split),
        Placement::Experts if !super::experts::assign_owners(&mut tensors, request.world) => {
            return Err(PlanError::NoExperts { model: request.model });
        }
        _ => {}
    }
    Ok(LoadPlan {
        version: PLAN_VERSION,
        model: request.model,
        config_json: request.config_json,
        world: request.world,
        strategy: request.strategy,
        placement: request.placement,
        chunking,
        digests: request.digests,
        device: request.device,
        root: request.root,
        cache: None,
        files,
        versions: Vec::new(),
        digest_tables: Vec::new(),
        tensors,
        aliases,
        train: None,
        others: Vec::new(),
    })
}

/// Ranks go to devices in turn, as `device::assign` deals them out.
fn check_devices(needs: &[RankMemory], devices: DeviceBudget) -> Result<(), PlanError> {
    let count = crate::types::as_usize(u64::from(devices.count.max(1)));
    for device in 0..devices.count {
        let first = crate::types::as_usize(u64::from(device));
        let here = needs.iter().skip(first).step_by(count);
        let (ranks, needed_bytes) = (here.clone().count(), here.map(|needed| needed.peak_device_bytes).sum());
        if needed_bytes > devices.free_bytes {
            let budget_bytes = devices.free_bytes;
            return Err(PlanError::DeviceDoesNotFit { device, ranks, needed_bytes, budget_bytes });
        }
    }
    Ok(())
}

impl LoadRequest {
    fn tensor(&self, tensor: &SkeletonTensor, layers: u32, entry: &TensorEntry) -> Result<TensorPlan, PlanError> {
        let rule = &self.quantization;
        let wanted = rule.encoding(tensor, layers, entry.dtype, self.dtype);
        let keep =
            self.quantized == Quantized::Keep || (*rule == QuantizationRule::None && self.quantized != Quantized::Redo);
        let (encoding, input) = match &entry.encoding {
            SourceEncoding::Packed(packed) if keep || wanted == packed.encoding => (packed.encoding, packed.input()),
            SourceEncoding::Packed(_) if self.quantized == Quantized::Redo => (wanted, elements(entry)),
            SourceEncoding::Packed(packed) => {
                let (found, expected) = (packed.encoding.name(), wanted.name());
                return Err(PlanError::Quantized { fqn: tensor.fqn.clone(), found, expected });
            }
            // Blocks stay as they are unless another form is asked for.
            SourceEncoding::Ggml(blocks)
                if keep && self.dtype == DTypeRule::Keep && blocks.ggml_type.block_elements() > 1 =>
            {
                (Encoding::Ggml { ggml_type: blocks.ggml_type }, elements(entry))
            }
            SourceEncoding::Ggml(_) | SourceEncoding::Plain => (wanted, elements(entry)),
        };
        Ok(TensorPlan {
            fqn: tensor.fqn.clone(),
            shape: tensor.shape.clone(),
            encoding,
            sharded: self.shards(&tensor.shape, tensor.role),
            owner: None,
            reader: Rank::ZERO,
            input,
        })
    }

    /// Whether a tensor is cut over the ranks: large matrices are, norms and biases are not.
    pub(crate) fn shards(&self, shape: &Shape, role: Role) -> bool {
        let matrix = matches!(role, Role::Linear | Role::Embedding | Role::Head) && shape.dims() >= 2;
        let large = shape.elements().is_ok_and(|elements| elements >= SHARD_MIN_ELEMENTS);
        self.placement != Placement::Replicate && matrix && large
    }
}

/// Gives every tensor its reader: rank 0, or for striped reading the rank with the fewest bytes so far, largest tensors
/// first. For `full`, where nobody sends, the same balance decides who writes a replicated tensor into a checkpoint.
fn assign_readers(tensors: &mut [TensorPlan], strategy: Strategy, world: WorldSize) {
    if strategy == Strategy::LowMemory {
        return;
    }
    let mut largest_first: Vec<usize> = (0..tensors.len()).collect();
    largest_first.sort_by_key(|&index| std::cmp::Reverse(tensors.get(index).map_or(0, TensorPlan::elements)));
    let mut load = vec![0_u64; world.count()];
    for index in largest_first {
        let least = world.ranks().min_by_key(|rank| load.get(rank.index()).copied()).unwrap_or(Rank::ZERO);
        if let (Some(tensor), Some(bytes)) = (tensors.get_mut(index), load.get_mut(least.index())) {
            tensor.reader = least;
            *bytes += tensor.elements();
        }
    }
}

impl LoadPlan {
    /// Refuses the plan where a rank, or the host with `ranks_on_host` ranks, does not have the memory.
    ///
    /// # Errors
    /// [`PlanError::RankDoesNotFit`], [`PlanError::HostDoesNotFit`] and [`PlanError::DeviceDoesNotFit`], with the numbers.
    pub fn check_memory(&self, budget: MemoryBudget) -> Result<(), PlanError> {
        let needs: Vec<RankMemory> = self.world.ranks().map(|rank| self.memory(rank)).collect();
        if let Some(budget_bytes) = budget.per_rank_bytes
            && let Some(&needed) = needs.iter().find(|needed| needed.peak_host_bytes > budget_bytes)
        {
            return Err(PlanError::RankDoesNotFit { needed, budget_bytes });
        }
        if let Some(devices) = budget.devices {
            check_devices(&needs, devices)?;
        }
        let needed_bytes = needs.iter().map(|needed| needed.peak_host_bytes).sum();
        match budget.host_bytes {
            Some(budget_bytes) if needed_bytes > budget_bytes => {
                Err(PlanError::HostDoesNotFit { world: self.world, needed_bytes, budget_bytes })
            }
            _ => Ok(()),
        }
    }

    /// SHA-256 of the plan's canonical bytes, which all ranks must agree on.
    #[must_use]
    pub fn sha256(bytes: &[u8]) -> [u8; 32] {
        use sha2::Digest as _;
        sha2::Sha256::digest(bytes).into()
    }

    /// The plan's bytes: JSON.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a plan has only strings and integers, which JSON can hold")
    }
}
