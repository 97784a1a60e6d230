//! Sealing: receipts of all ranks and the plan in, a manifest out, or what is missing.

use super::{
    CoverageError, MANIFEST_VERSION, Manifest, ReceiptChunk, SavedPart, SavedTensor, ShardReceipt, TrainerState,
    part_name,
};
use crate::error::{Classify, Kind};
use crate::plan::{LoadPlan, Part, f32Bits};
use crate::types::{Attempt, Fqn, Generation, Rank, Step, TensorDigest};

/// Which checkpoint is sealed.
#[derive(Clone, Copy, Debug)]
pub struct SealRequest<'a> {
    /// The plan whose tensors were written.
    pub plan: &'a LoadPlan,
    /// The step.
    pub step: Step,
    /// The try.
    pub attempt: Attempt,
    /// The generation.
    pub generation: Generation,
}

/// Why receipts do not make a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// A rank's receipt is missing or there are two.
    #[error("checkpoint of step {step}: expected one receipt of rank {rank}, found {found}")]
    Receipts {
        /// The step.
        step: Step,
        /// The rank.
        rank: Rank,
        /// How many there are.
        found: usize,
    },
    /// A receipt speaks of a tensor or component that the plan does not have.
    #[error("receipt of rank {rank} names tensor {tensor} component {component}, which the plan does not have")]
    Unknown {
        /// The rank.
        rank: Rank,
        /// Tensor index.
        tensor: usize,
        /// Component index.
        component: usize,
    },
    /// No rank reported the nested offset of a tensor.
    #[error("tensor {fqn}: no receipt has its nested offset")]
    NoOffset {
        /// The tensor.
        fqn: Fqn,
    },
    /// The chunks do not cover the model exactly once.
    #[error("the ranks' files do not make a whole checkpoint: {source}")]
    Coverage {
        /// What is wrong.
        source: CoverageError,
    },
}

impl Classify for SealError {
    fn kind(&self) -> Kind {
        Kind::Internal
    }
}

/// Makes the manifest of a checkpoint from one receipt per rank.
///
/// # Errors
/// [`SealError`] when the receipts do not cover every byte of the plan exactly once.
pub fn seal(request: &SealRequest<'_>, mut receipts: Vec<ShardReceipt>) -> Result<Manifest, SealError> {
    let plan = request.plan;
    for rank in plan.world.ranks() {
        let found = receipts.iter().filter(|receipt| receipt.rank == rank).count();
        if found != 1 {
            return Err(SealError::Receipts { step: request.step, rank, found });
        }
    }
    receipts.sort_by_key(|receipt| receipt.rank);

    let mut tensors: Vec<SavedTensor> = plan.tensors.iter().map(empty_tensor).collect();
    let mut files = Vec::new();
    let mut training = None;
    for mut receipt in receipts {
        training = training.or_else(|| receipt.training.take());
        let file = u32::try_from(files.len()).unwrap_or(u32::MAX);
        files.extend(receipt.file);
        for ReceiptChunk { tensor, component, mut chunk } in receipt.chunks {
            let unknown = SealError::Unknown { rank: receipt.rank, tensor, component };
            let part = tensors.get_mut(tensor).and_then(|tensor| tensor.parts.get_mut(component)).ok_or(unknown)?;
            chunk.file = file;
            part.chunks.push(chunk);
        }
        for (tensor, bits) in receipt.nested_offsets {
            let unknown = SealError::Unknown { rank: receipt.rank, tensor, component: 0 };
            tensors.get_mut(tensor).ok_or(unknown)?.nested_offset = Some(bits);
        }
    }
    for (tensor, planned) in tensors.iter_mut().zip(&plan.tensors) {
        let wants_offset = planned.components().iter().any(|component| component.part == Part::NestedOffset);
        if wants_offset && tensor.nested_offset.is_none() {
            return Err(SealError::NoOffset { fqn: tensor.fqn.clone() });
        }
        tensor.finish();
    }
    let manifest = Manifest {
        weightcast_manifest: MANIFEST_VERSION,
        step: request.step,
        attempt: request.attempt,
        generation: request.generation,
        world: plan.world,
        placement: plan.placement,
        model: plan.model.clone(),
        config_json: plan.config_json.clone(),
        trainer: TrainerState { step: request.step, training },
        files,
        tensors,
        aliases: plan.aliases.clone(),
    };
    manifest.check_coverage().map_err(|source| SealError::Coverage { source })?;
    Ok(manifest)
}

fn empty_tensor(tensor: &crate::plan::TensorPlan) -> SavedTensor {
    let parts = tensor
        .components()
        .into_iter()
        .filter(|component| component.part != Part::NestedOffset)
        .map(|component| SavedPart {
            part: component.part,
            name: part_name(&tensor.fqn, &tensor.encoding, component.part),
            dtype: component.dtype,
            shape: component.shape,
            chunks: Vec::new(),
        })
        .collect();
    SavedTensor {
        fqn: tensor.fqn.clone(),
        shape: tensor.shape.clone(),
        encoding: tensor.encoding,
        sharded: tensor.sharded,
        nested_offset: None,
        digest: TensorDigest::empty(),
        parts,
    }
}

impl SavedTensor {
    fn finish(&mut self) {
        for part in &mut self.parts {
            part.chunks.sort_by_key(|chunk| chunk.at);
        }
        let chunks = self.parts.iter().flat_map(|part| &part.chunks).map(|chunk| chunk.digest);
        let offset = self.nested_offset.map(|f32Bits(bits)| TensorDigest::of(&bits.to_le_bytes()));
        self.digest = chunks.chain(offset).fold(TensorDigest::empty(), TensorDigest::append);
    }
}
