//! Use cases: what the commands do, put together from the flows.
//!
//! Owns: resolving a model, preparing a job, launching it, the demo. Refuses to know: flags and how results are printed.

mod adapter_export;
mod adapter_figure;
mod adapter_merge;
mod adapter_source;
mod alone;
mod companions;
mod convert;
mod coordinate;
pub mod demo;
mod forward;
mod join;
mod k8s;
mod k8s_files;
mod launch;
mod lines;
mod model_directory;
mod model_directory_convert;
mod model_directory_error;
mod model_directory_pickle;
mod model_directory_zip;
mod model_expand;
mod model_export;
mod new_model;
mod observe;
mod prepare;
mod pull;
mod quality;
mod queue;
mod remote_model;
mod run_tensors;
mod running;
mod source;
mod train;
mod train_output;
mod weight_files;

pub use adapter_export::{ExportError, Exported, export_adapter};
pub use adapter_figure::{QuantizationFigure, recipe_code};
pub use adapter_merge::{DEFAULT_SHARD_BYTES, MergeError, MergeRequest, Merged, merge_adapter};
pub use adapter_source::{AdapterSource, AdapterSourceError};
pub use convert::{
    ConvertError, ConvertRequest, ConvertedModel, GgufRequest, GgufType, WrittenGguf, convert_model, convert_to_gguf,
};
pub use coordinate::{CoordinateError, Coordinated, CoordinatorPlace, coordinate};
pub use forward::{ForwardError, ForwardRequest, Forwarded, forward};
pub use join::{CoordinatorAddress, join};
pub use k8s::{RenderError, RenderRequest, Rendered, render_job};
pub use k8s_files::{ManifestError, read_manifests, write_manifests};
pub use launch::{Audience, LaunchJob, LaunchJobError, Launched, launch};
pub use model_directory::{
    ExportMeta, HistoryEntry, Lifecycle, LifecycleStage, ListedModel, ModelName, Stage, lifecycle, list_models,
    record_stage,
};
pub use model_directory_convert::{Converted, convert_ckpt};
pub use model_directory_error::{CkptError, DirectoryError};
pub use model_expand::{ExpandError, ExpandedModel, expand_model};
pub use model_export::{ExportedModel, ModelExportError, TrainedRun, export_model};
pub use new_model::{NewModelError, new_model, new_preset};
pub use observe::ObservePlaces;
pub use prepare::{PrepareError, Prepared, prepare, prepare_peek, prepare_with};
pub use pull::{PullError, PullPlan, plan_pull, pull};
pub use quality::{
    QualityError, QualityFormat, QualityRequest, QualityRow, QualityText, UnknownFormat, measure_quality,
};
pub use run_tensors::{RunTensorsError, StepChoice};
pub use running::{RunFile, RunFileError};
pub use source::{ModelSource, Peeked, SourceError, open_model, peek_model};
pub use train_output::RunOutput;
