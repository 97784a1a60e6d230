//! `[train] output`: the model directory that a finished run leaves.
//!
//! Owns: what can be refused of it before a process starts, and what is written when the run is done: the model of a run that
//! trains all weights; the adapter, in `adapters/`, of one that trains an adapter. A model directory is written once: a run
//! that is trained further needs another version.

use std::path::{Path, PathBuf};

use super::adapter_export::export_adapter;
use super::adapter_source::AdapterSource;
use super::model_directory::{
    ModelName, Stage, check_size, is_model, parameters_of, read_meta_of, refuse_other_sizes, write_meta,
};
use super::model_directory_error::DirectoryError;
use super::model_export::{ModelExportError, TrainedRun, export_model, publish_directory, real};
use super::run_tensors::StepChoice;
use crate::coordinator::JobRecord;
use crate::model::Skeleton;
use crate::store::{LocalStore, write_small};
use crate::train::{Method, Recipe};
use crate::types::DType;

/// What became of a run's output.
#[derive(Clone, Debug)]
pub enum RunOutput {
    /// It was written.
    Written {
        /// The directory of the model, or of the adapter.
        directory: PathBuf,
        /// The step.
        step: u64,
    },
    /// It is there already, of this step of this run.
    Unchanged {
        /// The directory.
        directory: PathBuf,
    },
    /// It is there already, of another step of this run, and was left as it is.
    Older {
        /// The directory.
        directory: PathBuf,
        /// The step that was not written.
        step: u64,
    },
}

impl RunOutput {
    /// The directory of the model or the adapter.
    #[must_use]
    pub fn directory(&self) -> &Path {
        match self {
            Self::Written { directory, .. } | Self::Unchanged { directory } | Self::Older { directory, .. } => {
                directory
            }
        }
    }
}

/// Where a run's output goes, said before it starts.
#[derive(Clone, Debug)]
pub(super) struct OutputPlace {
    output: PathBuf,
    method: Method,
    /// The root of the run's checkpoints.
    root: PathBuf,
    /// Where the base's files are.
    base: PathBuf,
}

impl OutputPlace {
    /// The output of a job, if it trains and has one.
    pub(super) fn of(record: &JobRecord) -> Option<Self> {
        let recipe: Recipe = serde_json::from_value(record.plan.train.as_ref()?.recipe.clone()).ok()?;
        let (output, method) = (recipe.output?, recipe.method);
        let root = record.checkpoint_root.clone()?;
        Some(Self { output, method, root, base: PathBuf::from(&record.plan.root) })
    }

    /// Refuses an output whose name is not of the form, or that does not fit the model or what is there. `root` is that of the
    /// run's checkpoints.
    pub(super) fn check(recipe: &Recipe, skeleton: &Skeleton, root: &Path) -> Result<(), DirectoryError> {
        let Some(output) = recipe.output.clone() else { return Ok(()) };
        let name = ModelName::of(&output)?;
        check_size(&name, skeleton)?;
        refuse_other_sizes(&output, &name)?;
        let place = Self { output, method: recipe.method, root: root.to_owned(), base: PathBuf::new() };
        let target = place.target();
        let directory = || target.display().to_string();
        if target.exists() && !place.is_of_run(&target, &real(root))? {
            return Err(DirectoryError::Exists { directory: directory() });
        }
        if place.method != Method::Full && place.output.exists() {
            if !is_model(&place.output)? {
                return Err(DirectoryError::Exists { directory: place.output.display().to_string() });
            }
            let (expected, found) = (skeleton.parameters(), parameters_of(&place.output)?);
            if let Some(found) = found.filter(|found| *found != expected) {
                let (expected, found) = (format!("{expected} parameters"), format!("{found}"));
                return Err(DirectoryError::Size { name: name.to_string(), expected, found });
            }
        }
        Ok(())
    }

    /// The directory that the run makes: the model's, or the adapter's, which has the name of the directory of checkpoints.
    fn target(&self) -> PathBuf {
        match self.method {
            Method::Full => self.output.clone(),
            Method::Lora | Method::Qlora => {
                self.output.join("adapters").join(real(&self.root).file_name().unwrap_or_default())
            }
        }
    }

    /// Whether `target` was made from `from`, a checkpoint or a root of checkpoints.
    fn is_of_run(&self, target: &Path, from: &Path) -> Result<bool, DirectoryError> {
        let from = from.display().to_string();
        // What follows is the step's directory, the words on the adapter, or nothing.
        let made_from = |place: &str| {
            let rest = place.strip_prefix(&from);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || rest.starts_with(" (r "))
        };
        Ok(read_meta_of(target)?.is_some_and(|meta| meta.history.iter().any(|entry| made_from(&entry.from))))
    }

    /// Writes the output from the newest checkpoint of the run, which is done.
    pub(super) fn write(&self) -> Result<RunOutput, ModelExportError> {
        let run = TrainedRun::open(&self.root, StepChoice::Newest)?.with_base(&self.base);
        let (directory, step) = (self.target(), run.step().0);
        if directory.exists() {
            return Ok(match self.is_of_run(&directory, Path::new(&run.tensors.place))? {
                true => RunOutput::Unchanged { directory },
                false => RunOutput::Older { directory, step },
            });
        }
        match self.method {
            Method::Full => {
                export_model(&run, DType::F32, &self.output)?;
            }
            Method::Lora | Method::Qlora => self.write_adapter(&run, &directory)?,
        }
        Ok(RunOutput::Written { directory, step })
    }

    /// The adapter into a model directory that is there, or into a new one without weights.
    fn write_adapter(&self, run: &TrainedRun, directory: &Path) -> Result<(), ModelExportError> {
        let adapter = |to: &LocalStore| -> Result<(), ModelExportError> {
            let source = AdapterSource::open_checkpoint(&self.root, StepChoice::Step(run.step()))
                .map_err(super::adapter_export::ExportError::from)?;
            export_adapter(&source, DType::F32, to.root())?;
            Ok(write_meta(to, &run.meta(&ModelName::of(&self.output)?, Stage::Lora)?)?)
        };
        if self.output.exists() {
            return publish_directory(directory, adapter);
        }
        publish_directory(&self.output, |to| {
            run.write_records(to, &run.meta(&ModelName::of(&self.output)?, Stage::Lora)?)?;
            let name = directory.file_name().unwrap_or_default();
            publish_directory(&to.root().join("adapters").join(name), adapter)?;
            Ok::<(), ModelExportError>(write_small(to, "config.json", run.config_json(None).as_bytes())?)
        })
    }
}
