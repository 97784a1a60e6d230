//! `weightcast model new`: a Hugging Face directory with seeded random weights, written in seconds.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::model_directory::{ExportMeta, ModelName, Stage, write_meta};
use super::model_directory_error::DirectoryError;
use super::model_export::{model_args, pretty};
use crate::error::{Classify, Kind};
use crate::model::{GenerateError, GenerateRequest, ModelConfig, NewModel, Preset, generate, generate_preset};
use crate::store::{LocalStore, Store, StoreError, write_small};
use crate::types::{DType, as_u64, as_usize};

/// Bytes made and written together.
const CHUNK_BYTES: u64 = 4 << 20;

/// A model cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NewModelError {
    /// The request cannot be met.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory's name does not fit.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
}

impl Classify for NewModelError {
    fn kind(&self) -> Kind {
        match self {
            Self::Generate(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Directory(source) => source.kind(),
        }
    }
}

/// Writes a new model into `directory`, which must not have one. config.json goes last, so that a directory with one is
/// complete.
///
/// # Errors
/// [`NewModelError`]; the files written so far stay.
pub fn new_model(request: &GenerateRequest, directory: &Path) -> Result<NewModel, NewModelError> {
    write_model(generate(request)?, directory)
}

/// As [`new_model`], of a preset. A directory whose name is of the form gets `model_args.json`, `export_meta.json` and
/// `adapters/` too.
///
/// # Errors
/// [`NewModelError`]; the files written so far stay.
pub fn new_preset(preset: Preset, dtype: DType, seed: u64, directory: &Path) -> Result<NewModel, NewModelError> {
    let model = generate_preset(preset, dtype, seed)?;
    if let Ok(name) = ModelName::of(directory) {
        if name.size != preset.name() {
            let (expected, found) = (name.size.clone(), preset.to_string());
            return Err(DirectoryError::Size { name: name.to_string(), expected, found }.into());
        }
        let store = LocalStore::new(directory);
        store.create_dir("adapters")?;
        if let Ok(config) = ModelConfig::parse(model.config_json.as_bytes()) {
            write_small(&store, "model_args.json", pretty(&model_args(&config)).as_bytes())?;
        }
        let from = format!("preset {preset}, seed {seed}");
        write_meta(&store, &ExportMeta::new(&name, Stage::Pretrain, model.parameters, &from))?;
    }
    write_model(model, directory)
}

fn write_model(model: NewModel, directory: &Path) -> Result<NewModel, NewModelError> {
    let store = LocalStore::new(directory);
    store.create_dir("")?;
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(model.files.len());
    std::thread::scope(|scope| {
        let write = || -> Result<(), StoreError> {
            loop {
                let file = next.fetch_add(1, Ordering::Relaxed);
                if file >= model.files.len() {
                    return Ok(());
                }
                write_file(&model, file, &store)?;
            }
        };
        let writers: Vec<_> = (0..threads).map(|_| scope.spawn(write)).collect();
        // A panic of a writer is this thread's panic.
        writers
            .into_iter()
            .try_for_each(|writer| writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    if let Some(index) = &model.index_json {
        write_small(&store, "model.safetensors.index.json", index.as_bytes())?;
    }
    write_small(&store, "config.json", model.config_json.as_bytes())?;
    Ok(model)
}

fn write_file(model: &NewModel, number: usize, store: &LocalStore) -> Result<(), StoreError> {
    let Some(file) = model.files.get(number) else { return Ok(()) };
    let mut target = store.create(&file.name, file.len_bytes)?;
    let mut buffer = vec![0; as_usize(CHUNK_BYTES.min(file.len_bytes))];
    let mut offset = 0;
    while offset < file.len_bytes {
        let len = as_usize((file.len_bytes - offset).min(CHUNK_BYTES));
        let part = buffer.get_mut(..len).unwrap_or_default();
        model.fill(number, offset, part);
        target.write_all_at(offset, part)?;
        offset += as_u64(len);
    }
    target.finish()
}
