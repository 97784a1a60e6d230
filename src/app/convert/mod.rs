//! `weightcast model convert --to …`: a model in another format, as the format's own tools load it.
//!
//! Owns: the order of the work, and that nothing is seen before all of it is there. In memory is the reader's window.
//!
//! `CV-1`: a file of weights is written beside its place and renamed when it is durable; a conversion that is started again
//! keeps the files that are there and makes the others, and every byte is a function of the model and the request.

mod config;
mod error;
mod gguf;
mod layout;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use self::error::ConvertError;
pub use self::gguf::{GgufRequest, GgufType, WrittenGguf, convert_to_gguf};
use self::layout::{OutputFile, layout};
use super::companions::copy_companions;
use super::model_directory_error::DirectoryError;
use super::model_export::pretty;
use super::source::{ModelSource, open_model};
use crate::config::{JobConfig, QuantizationConfig, QuantizationFormat};
use crate::error::{Classify as _, Kind};
use crate::format::Encoding as SourceEncoding;
use crate::hub::Progress;
use crate::load::{LoadOptions, stream};
use crate::manifest::extras;
use crate::plan::{
    DTypeRule, DeviceRule, LoadPlan, LoadRequest, Part, Placement, QuantizationRule, Quantized, Strategy, plan,
};
use crate::store::{LocalStore, NewFile, Store, StoreError, open_root, read_small, write_small};
use crate::types::{DType, Rank, WorldSize, as_u64, f32Bits};

/// A request is a few lines.
const MAX_REQUEST_BYTES: u64 = 1 << 20;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct ConvertRequest {
    /// The model: a directory, a file or a hub id.
    pub model: String,
    /// How the weights are to be quantized; none for plain weights.
    pub quantization: QuantizationConfig,
    /// The type of what is not quantized; by default that of the model, and bf16 where the model is quantized.
    pub dtype: Option<DType>,
    /// The directory that is written, which must not be there.
    pub output: PathBuf,
    /// Bytes of tensors in one file at most, unless one tensor has more.
    pub max_file_bytes: u64,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertedModel {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The number of files of weights.
    pub files: usize,
    /// Files that an earlier, interrupted conversion had finished.
    pub kept_files: usize,
}

/// Converts a model.
///
/// # Errors
/// [`ConvertError`]. What was finished stays beside the output, as `.<name>.part`, and is gone on with by the same request.
pub fn convert_model(
    request: &ConvertRequest,
    progress: &dyn Fn(Progress<'_>),
) -> Result<ConvertedModel, ConvertError> {
    let (parent, name) = split(&request.output);
    let beside = LocalStore::new(&parent);
    beside.create_dir("")?;
    let part = format!(".{name}.part");
    // Says what the unfinished conversion was asked for.
    let record = format!("{part}.json");
    if beside.list("")?.contains(&name) {
        beside.remove(&record)?;
        return Err(DirectoryError::Exists { directory: request.output.display().to_string() }.into());
    }
    let source = open_model(&request.model, progress)?;
    let plan = make_plan(request, &source)?;
    let files = layout(&plan, request.max_file_bytes);
    go_on_with(&beside, (&part, &record), &wanted(request, &plan))?;
    let to = LocalStore::new(parent.join(&part));
    let from = open_root(&source.root)?.store;
    let from = from.as_ref();
    let mut kept_files = 0;
    let present = to.list("")?;
    for file in &files {
        if present.contains(&file.name) {
            kept_files += 1;
        } else {
            write_file(&plan, file, from, &to)?;
        }
    }
    finish(request, &source, &files, (from, &to))?;
    to.sync_dir("")?;
    crate::faults::point("convert.written");
    beside.publish(&part, &name)?;
    beside.remove(&record)?;
    let bytes = files.iter().map(OutputFile::data_bytes).sum();
    Ok(ConvertedModel { bytes, files: files.len(), kept_files })
}

fn split(output: &Path) -> (PathBuf, String) {
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let parent = output.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
    (parent.to_owned(), name)
}

fn make_plan(request: &ConvertRequest, source: &ModelSource) -> Result<LoadPlan, ConvertError> {
    let quantized = source.index.tensors.values().any(|entry| entry.encoding != SourceEncoding::Plain);
    let dtype = request.dtype.or_else(|| quantized.then_some(DType::BF16));
    let dtype = dtype.map_or(DTypeRule::Keep, DTypeRule::Convert);
    plan_of(&request.model, source, dtype, request.quantization.rule()?)
}

/// The plan of one process that reads a model and makes of every tensor, quantized or not, what the rules say.
fn plan_of(
    model: &str,
    source: &ModelSource,
    dtype: DTypeRule,
    quantization: QuantizationRule,
) -> Result<LoadPlan, ConvertError> {
    let load = LoadRequest {
        model: model.to_owned(),
        root: source.root.display().to_string(),
        config_json: None,
        world: WorldSize::ONE,
        strategy: Strategy::LowMemory,
        placement: Placement::Replicate,
        dtype,
        quantization,
        quantized: Quantized::Redo,
        chunking: JobConfig::default().chunking()?,
        digests: false,
        device: DeviceRule::default(),
        split: Vec::new(),
    };
    let mut plan = plan(load, &source.index, &source.skeleton, &source.binding)?;
    plan.versions.clone_from(&source.versions);
    Ok(plan)
}

/// What decides every byte of the output.
fn wanted(request: &ConvertRequest, plan: &LoadPlan) -> Value {
    let digest: String = LoadPlan::sha256(&plan.encode()).iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"plan_sha256": digest, "max_file_bytes": request.max_file_bytes, "version": env!("CARGO_PKG_VERSION")})
}

/// Leaves a directory `part` that an interrupted conversion of the same request has begun, and else an empty one.
fn go_on_with(beside: &LocalStore, (part, record): (&str, &str), wanted: &Value) -> Result<(), StoreError> {
    let found = match read_small(beside, record, MAX_REQUEST_BYTES) {
        Ok(bytes) => serde_json::from_slice::<Value>(&bytes).ok(),
        Err(error) if error.kind() == Kind::NotFound => None,
        Err(error) => return Err(error),
    };
    if found.as_ref() == Some(wanted) {
        return beside.create_dir(part);
    }
    beside.remove(record)?;
    beside.remove(part)?;
    beside.create_dir(part)?;
    write_small(beside, record, wanted.to_string().as_bytes())
}

/// Makes one file of weights, which is there under its name when it is durable.
fn write_file(plan: &LoadPlan, file: &OutputFile, from: &dyn Store, to: &LocalStore) -> Result<(), ConvertError> {
    let unfinished = format!("{}.unfinished", file.name);
    to.remove(&unfinished)?;
    let header = file.header();
    let start = as_u64(header.len());
    let mut writer = to.create(&unfinished, start + file.data_bytes())?;
    writer.write_all_at(0, &header)?;
    let tensors = plan.tensors.get(file.tensors.clone()).unwrap_or_default().to_vec();
    let mut offsets: Vec<Option<f32Bits>> = vec![None; tensors.len()];
    let part = LoadPlan { tensors, ..plan.clone() };
    let options = LoadOptions::on_host(Rank::ZERO, from);
    stream(&part, &options, &mut |(tensor, component), at, bytes| {
        crate::faults::point("convert.piece");
        match file.place(tensor, component) {
            Some(offset) => writer.write_all_at(start + offset + as_u64(at), bytes)?,
            // The nested offset is told in a text beside the tensor.
            None => {
                let bits = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes).unwrap_or_default();
                offsets[tensor] = Some(f32Bits(bits));
            }
        }
        Ok(())
    })?;
    write_extras(&part, &offsets, (file, start), writer.as_mut())?;
    writer.finish()?;
    crate::faults::point("convert.file");
    to.publish(&unfinished, &file.name)?;
    Ok(())
}

fn write_extras(
    plan: &LoadPlan,
    offsets: &[Option<f32Bits>],
    (file, start): (&OutputFile, u64),
    writer: &mut dyn NewFile,
) -> Result<(), StoreError> {
    for (index, (tensor, offset)) in plan.tensors.iter().zip(offsets).enumerate() {
        for (number, extra) in extras(&tensor.fqn, &tensor.encoding, &tensor.shape, *offset).into_iter().enumerate() {
            if let Some(place) = file.extra_place(index, number) {
                writer.write_all_at(start + place, &extra.padded().bytes)?;
            }
        }
    }
    Ok(())
}

/// What goes with the weights: index, configuration, tokenizer.
fn finish(
    request: &ConvertRequest,
    source: &ModelSource,
    files: &[OutputFile],
    (from, to): (&dyn Store, &LocalStore),
) -> Result<(), ConvertError> {
    let present = to.list("")?;
    for name in present.iter().filter(|name| !files.iter().any(|file| file.name == **name)) {
        to.remove(name)?;
    }
    if let Some(index) = layout::index_json(files) {
        write_small(to, "model.safetensors.index.json", pretty(&index).as_bytes())?;
    }
    copy_companions(from, from, to)?;
    match &source.config_json {
        Some(text) => {
            let config = config::config_json(text, &request.quantization, written_dtype(request, source));
            write_small(to, "config.json", pretty(&config).as_bytes())?;
        }
        None if request.quantization.format == QuantizationFormat::None => {}
        None => return Err(ConvertError::NoConfig { model: request.model.clone() }),
    }
    Ok(())
}

/// The type that the configuration names.
fn written_dtype(request: &ConvertRequest, source: &ModelSource) -> Option<DType> {
    let quantized = source.index.tensors.values().any(|entry| entry.encoding != SourceEncoding::Plain);
    request.dtype.or_else(|| quantized.then_some(DType::BF16))
}

/// Whether a component is a tensor in a file.
const fn is_stored(part: Part) -> bool {
    !matches!(part, Part::NestedOffset)
}
