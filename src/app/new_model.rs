//! `weightcast model new`: a Hugging Face directory with seeded random weights, written in seconds.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Classify, Kind};
use crate::model::{GenerateError, GenerateRequest, NewModel, generate};
use crate::store::{LocalStore, Store, StoreError, write_small};
use crate::types::{as_u64, as_usize};

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
}

impl Classify for NewModelError {
    fn kind(&self) -> Kind {
        match self {
            Self::Generate(source) => source.kind(),
            Self::Store(source) => source.kind(),
        }
    }
}

/// Writes a new model into `directory`, which must not have one. config.json goes last, so that a directory with one is
/// complete.
///
/// # Errors
/// [`NewModelError`]; the files written so far stay.
pub fn new_model(request: &GenerateRequest, directory: &Path) -> Result<NewModel, NewModelError> {
    let model = generate(request)?;
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
