//! `weightcast model convert --to gguf`: a model in one file, as llama.cpp loads it.
//!
//! Owns: which tensor of the model lies where in the file, and the order of its rows. In memory is the reader's window, the
//! header, and one matrix of GPT-2, which llama.cpp has transposed.
//!
//! `CG-1`: as `CV-1`, for one file: it is written beside its place and renamed when it is durable, and every byte is a
//! function of the model and the request. Rows are encoded one by one, so rows of blocks in another order are the blocks of
//! rows in that order.

mod keys;
mod place;
mod pre;
mod tokenizer;
mod types;

use std::path::{Path, PathBuf};

use self::place::{File, Transposed};
pub use self::types::GgufType;
use super::{ConvertError, plan_of, split};
use crate::app::model_directory_error::DirectoryError;
use crate::app::source::{ModelSource, open_model};
use crate::format::gguf::{self, HeaderValue, layout};
use crate::hub::Progress;
use crate::load::{LoadError, LoadOptions, stream};
use crate::model::ModelConfig;
use crate::plan::{DTypeRule, LoadPlan, QuantizationRule};
use crate::store::{LocalStore, NewFile, Store, open_root};
use crate::types::{Rank, as_u64, as_usize};

/// What is asked for.
#[derive(Clone, Debug)]
pub struct GgufRequest {
    /// The model: a directory, a file or a hub id.
    pub model: String,
    /// What most matrices become.
    pub file_type: GgufType,
    /// The file, which must not be there; or a directory, in which it is named after the model and its type.
    pub output: PathBuf,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenGguf {
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
}

/// Writes a model as a GGUF file.
///
/// # Errors
/// [`ConvertError`]. What is unfinished stays beside the output, as `.<name>.part`, and is written anew by the next attempt.
pub fn convert_to_gguf(request: &GgufRequest, progress: &dyn Fn(Progress<'_>)) -> Result<WrittenGguf, ConvertError> {
    let name = model_name(&request.model);
    let path = output_file(request, &name);
    let (parent, file_name) = split(&path);
    let to = LocalStore::new(&parent);
    to.create_dir("")?;
    if to.list("")?.contains(&file_name) {
        return Err(DirectoryError::Exists { directory: path.display().to_string() }.into());
    }
    let source = open_model(&request.model, progress)?;
    let Some(config) = &source.skeleton.config else {
        return Err(ConvertError::NoConfig { model: request.model.clone() });
    };
    let from = open_root(&source.root)?.store;
    let mut plan = plan_of(&request.model, &source, DTypeRule::Keep, QuantizationRule::None)?;
    let mut values = keys::keys((&request.model, &name), config, request.file_type.file_type())?;
    let file = File::new(request, config, &mut plan)?;
    values.extend(tokenizer_keys(&source, config, from.as_ref())?);
    let made = layout(&path.display().to_string(), &values, &file.tensors)?;
    drop(values);
    let unfinished = format!(".{file_name}.part");
    to.remove(&unfinished)?;
    let mut writer = to.create(&unfinished, made.file_bytes)?;
    writer.write_all_at(0, &made.header)?;
    let starts: Vec<u64> = made.places.iter().map(|place| place.start()).collect();
    write_tensors(&plan, (&file, &starts), from.as_ref(), writer.as_mut())?;
    writer.finish()?;
    crate::faults::point("convert.written");
    to.publish(&unfinished, &file_name)?;
    Ok(WrittenGguf { path, bytes: made.file_bytes, tensors: file.tensors.len() })
}

/// The last part of a path or a hub id, without `.gguf`.
fn model_name(model: &str) -> String {
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model);
    let name = last.strip_suffix(".gguf").unwrap_or(last);
    if matches!(name, "" | "." | "..") { "model".to_owned() } else { name.to_owned() }
}

fn output_file(request: &GgufRequest, name: &str) -> PathBuf {
    let is_file = request.output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    match is_file {
        true => request.output.clone(),
        false => request.output.join(format!("{name}-{}.gguf", request.file_type.name().to_uppercase())),
    }
}

/// The tokenizer of a GGUF file as it is there, else that of the files beside the weights.
fn tokenizer_keys(
    source: &ModelSource,
    config: &ModelConfig,
    from: &dyn Store,
) -> Result<Vec<(String, HeaderValue)>, ConvertError> {
    if let [file] = source.index.files.as_slice()
        && Path::new(&file.name).extension().is_some_and(|extension| extension == "gguf")
    {
        let head = gguf_head(from, &file.name)?;
        let found = gguf::raw_values(&from.describe(&file.name), &head, file.len_bytes, "tokenizer.")?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    tokenizer::keys(from, source.config_json.as_deref(), config.vocab_size)
}

/// As much of a GGUF file as its header takes.
fn gguf_head(from: &dyn Store, name: &str) -> Result<Vec<u8>, ConvertError> {
    let file = from.open(name)?;
    let mut wanted = gguf::FIRST_HEAD_BYTES;
    loop {
        let mut head = vec![0; as_usize(wanted.min(file.len_bytes()))];
        file.read_exact_at(0, &mut head)?;
        match gguf::parse(&from.describe(name), &head, file.len_bytes())? {
            gguf::GgufHead::Whole(_) => return Ok(head),
            gguf::GgufHead::Longer { read_bytes } => wanted = read_bytes,
        }
    }
}

/// Writes the bytes of every tensor to its place.
fn write_tensors(
    plan: &LoadPlan,
    (file, starts): (&File, &[u64]),
    from: &dyn Store,
    writer: &mut dyn NewFile,
) -> Result<(), ConvertError> {
    let start = |tensor: usize| starts.get(tensor).copied().unwrap_or_default();
    if let Some((tensor, factors)) = &file.rope_factors {
        writer.write_all_at(start(*tensor), bytemuck::cast_slice(factors))?;
    }
    let options = LoadOptions::on_host(Rank::ZERO, from);
    let mut whole = Vec::new();
    let mut sink = |(tensor, _): (usize, usize), at: usize, bytes: &[u8]| -> Result<(), LoadError> {
        crate::faults::point("convert.piece");
        let slot = file.slots.get(tensor).expect("a slot for each tensor of the plan");
        let base = start(slot.tensor);
        let Some(transposed) = &slot.transposed else {
            return slot.write(as_u64(at), bytes, &mut |offset, part| writer.write_all_at(base + offset, part));
        };
        whole.extend_from_slice(bytes);
        if as_u64(whole.len()) == transposed.source_bytes() {
            let fqn = &plan.tensors.get(tensor).expect("a tensor of the plan").fqn;
            Transposed::write(*transposed, fqn, &whole, &mut |offset, part| writer.write_all_at(base + offset, part))?;
            whole.clear();
        }
        Ok(())
    };
    stream(plan, &options, &mut sink)?;
    Ok(())
}
