//! Scanning: the headers of a model's files become its index. Megabytes are read, not gigabytes.

use crate::error::{Classify, Kind};
use crate::format::{FileEntry, FormatError, IndexJson, ModelIndex, merge, safetensors};
use crate::store::{Store, StoreError};
use crate::types::as_usize;

/// Why the files of a model cannot be indexed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A header does not hold.
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl Classify for ScanError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Format(source) => source.kind(),
        }
    }
}

/// Reads the headers of safetensors files `names` and merges them.
///
/// # Errors
/// [`ScanError`], naming file and tensor; a file that the index names and that is not there is
/// [`FormatError::MissingFile`].
pub fn scan(store: &dyn Store, names: &[String], index: Option<&IndexJson>) -> Result<ModelIndex, ScanError> {
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let file = match store.open(name) {
            Err(error) if error.kind() == Kind::NotFound && index.is_some() => {
                // The merge below names the index and a tensor of the missing file.
                continue;
            }
            result => result?,
        };
        let path = store.describe(name);
        let len_bytes = file.len_bytes();
        let mut first = vec![0; as_usize(safetensors::LENGTH_BYTES.min(len_bytes))];
        file.read_exact_at(0, &mut first)?;
        let header_bytes = safetensors::header_len(&path, &first, len_bytes)?;
        let mut json = vec![0; as_usize(header_bytes)];
        file.read_exact_at(safetensors::LENGTH_BYTES, &mut json)?;
        let header = safetensors::parse_header(&path, &json, len_bytes)?;
        files.push((FileEntry { name: name.clone(), len_bytes }, header));
    }
    Ok(merge(files, index)?)
}
