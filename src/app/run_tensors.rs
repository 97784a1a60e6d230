//! The tensors of a training run's checkpoint, read one at a time, whatever ranks wrote them. Bytes are verified (`CK-3`).
//!
//! Owns: which checkpoint is meant, and the way from a tensor's name to its bytes. Refuses to know: what the tensors are.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::{self, Checkpoint, CheckpointError, VerifiedFile};
use crate::error::{Classify, Kind};
use crate::manifest::{SavedChunk, TrainingState};
use crate::plan::Encoding;
use crate::store::{Store, StoreError, open_root};
use crate::types::{DType, Fqn, Shape, Step, as_usize};

/// Which checkpoint of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepChoice {
    /// The newest that holds.
    Newest,
    /// That of the evaluation with the lowest loss.
    Best,
    /// This one.
    Step(Step),
}

/// Why the tensors of a run cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunTensorsError {
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No evaluation was made before the checkpoint.
    #[error("{place}: no evaluation has a lowest loss yet, so no step is the best")]
    NoBest {
        /// The newest checkpoint.
        place: String,
    },
    /// A tensor is not stored as plain numbers.
    #[error("tensor {fqn}: expected plain elements, found {encoding}")]
    Encoded {
        /// The tensor.
        fqn: Fqn,
        /// How it is stored.
        encoding: String,
    },
}

impl Classify for RunTensorsError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Checkpoint(source) => source.kind(),
            Self::NoBest { .. } => Kind::NotFound,
            Self::Encoded { .. } => Kind::Invalid,
        }
    }
}

/// A checkpoint whose table of contents was read, but no tensor.
#[derive(Debug)]
pub(super) struct RunTensors {
    /// Its directory in words.
    pub(super) place: String,
    /// The step.
    pub(super) step: Step,
    /// The state of the run; none in the checkpoint of a model that was only loaded.
    pub(super) training: Option<Box<TrainingState>>,
    /// The text of the base's config.json.
    pub(super) config_json: Option<String>,
    files: Vec<VerifiedFile>,
    tensors: BTreeMap<Fqn, (Encoding, Shape, Vec<SavedChunk>)>,
}

impl RunTensors {
    /// Whether the checkpoint has the tensor.
    pub(super) fn contains(&self, fqn: &Fqn) -> bool {
        self.tensors.contains_key(fqn)
    }

    /// Opens a checkpoint below `root`.
    pub(super) fn open(root: &Path, choice: StepChoice) -> Result<Self, RunTensorsError> {
        let store = open_root(root)?.store;
        let Checkpoint { directory, manifest } = choose(store.as_ref(), choice)?;
        let mut files = Vec::with_capacity(manifest.files.len());
        for file in &manifest.files {
            let name = format!("{directory}/{}", file.name);
            files.push(VerifiedFile::open(store.as_ref(), &name, file.bytes, file.digest_table)?);
        }
        let chunks = |tensor: &crate::manifest::SavedTensor| {
            tensor.parts.iter().flat_map(|part| &part.chunks).copied().collect::<Vec<_>>()
        };
        let tensors = manifest.tensors.iter().map(|tensor| {
            let of_tensor = (tensor.encoding, tensor.shape.clone(), chunks(tensor));
            (tensor.fqn.clone(), of_tensor)
        });
        Ok(Self {
            place: store.describe(&directory),
            step: manifest.step,
            training: manifest.trainer.training.clone(),
            config_json: manifest.config_json.clone(),
            files,
            tensors: tensors.collect(),
        })
    }

    /// Element type and shape of the tensors that are `wanted`.
    pub(super) fn plain(
        &self,
        wanted: impl Fn(&Fqn) -> bool,
    ) -> Result<BTreeMap<Fqn, (DType, Shape)>, RunTensorsError> {
        let plain = |(fqn, (encoding, shape, _)): (&Fqn, &(Encoding, Shape, _))| match encoding {
            Encoding::Plain { dtype } => Ok((fqn.clone(), (*dtype, shape.clone()))),
            _ => Err(RunTensorsError::Encoded { fqn: fqn.clone(), encoding: encoding.name() }),
        };
        self.tensors.iter().filter(|(fqn, _)| wanted(fqn)).map(plain).collect()
    }

    /// Fills `bytes`, which has the tensor's size, with a plain tensor.
    pub(super) fn read(&self, fqn: &Fqn, bytes: &mut [u8]) -> Result<(), RunTensorsError> {
        for chunk in self.tensors.get(fqn).map_or(&[][..], |(_, _, chunks)| chunks.as_slice()) {
            let file = self.files.get(as_usize(u64::from(chunk.file)));
            let file = file.expect("FM-3 was checked when the manifest was read");
            let into = as_usize(chunk.at)..as_usize(chunk.at.saturating_add(chunk.range.len()));
            let into = bytes.get_mut(into).expect("FM-3 was checked when the manifest was read");
            file.read_exact_at(chunk.range.start(), into, fqn.as_str())?;
        }
        Ok(())
    }
}

fn choose(store: &dyn Store, choice: StepChoice) -> Result<Checkpoint, RunTensorsError> {
    let newest = || -> Result<Checkpoint, CheckpointError> {
        let (checkpoint, skipped) = checkpoint::newest(store)?;
        for skipped in skipped {
            tracing::warn!(
                directory = skipped.directory,
                reason = skipped.reason,
                "a newer checkpoint was passed over"
            );
        }
        Ok(checkpoint)
    };
    Ok(match choice {
        StepChoice::Newest => newest()?,
        StepChoice::Step(step) => checkpoint::open(store, step)?,
        StepChoice::Best => {
            let newest = newest()?;
            let place = store.describe(&newest.directory);
            let best = newest.manifest.trainer.training.as_ref().and_then(|training| training.best);
            let best = best.ok_or(RunTensorsError::NoBest { place })?;
            checkpoint::open(store, best.step)?
        }
    })
}
