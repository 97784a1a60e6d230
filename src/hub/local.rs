//! Models that are on this machine already: a directory, or one file.

use std::path::{Path, PathBuf};

use super::select::{INDEX_NAME, Selection, confined, select};
use super::{HubError, ModelFile, ModelFiles, ModelKind};
use crate::format::parse_index_json;
use crate::types::as_u64;

/// A longer config.json or index is none. The largest published index, of 700,000 tensors, has 70 MB.
pub(super) const MAX_JSON_BYTES: u64 = 256 << 20;

/// The model in a directory.
pub(super) fn directory(root: &Path) -> Result<ModelFiles, HubError> {
    let place = root.display().to_string();
    let selection = select(&place, &names(root)?)?;
    let mut index_json = None;
    let (names, kind) = match selection {
        Selection::Gguf(name) => (vec![name], ModelKind::Gguf),
        Selection::Safetensors(names) => (names, ModelKind::Safetensors),
        Selection::Sharded => {
            let text = read_json(&root.join(INDEX_NAME))?;
            let names = indexed_names(&place, &text)?;
            index_json = Some((INDEX_NAME.to_owned(), text));
            (names, ModelKind::Safetensors)
        }
    };
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let path = root.join(&name);
        if index_json.is_some() && !path.exists() {
            let index = root.join(INDEX_NAME).display().to_string();
            return Err(HubError::MissingFile { index, file: name, place });
        }
        files.push(weight_file(name, &path)?);
    }
    Ok(ModelFiles { root: root.to_owned(), files, config_json: config_json(root)?, index_json, kind, commit: None })
}

/// The model in one file; the config.json beside it is its own, if there is one.
pub(super) fn file(path: &Path) -> Result<ModelFiles, HubError> {
    let kind = match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => ModelKind::Safetensors,
        Some("gguf") => ModelKind::Gguf,
        _ => return Err(HubError::NotWeights { path: path.to_owned() }),
    };
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let root = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let files = vec![weight_file(name, path)?];
    Ok(ModelFiles { config_json: config_json(&root)?, root, files, index_json: None, kind, commit: None })
}

/// The files that an index names, each confined to the index's directory.
pub(super) fn indexed_names(place: &str, text: &[u8]) -> Result<Vec<String>, HubError> {
    let index = parse_index_json(INDEX_NAME, text)
        .map_err(|source| HubError::Index { place: place.to_owned(), source: Box::new(source) })?;
    let names = index.files();
    for name in &names {
        confined(&format!("{place}/{INDEX_NAME}"), name)?;
    }
    if names.is_empty() { Err(HubError::NoWeights { place: place.to_owned() }) } else { Ok(names) }
}

/// Reads a small file whole.
pub(super) fn read_json(path: &Path) -> Result<Vec<u8>, HubError> {
    let found_bytes = path.metadata().map_err(HubError::io("read", path))?.len();
    if found_bytes > MAX_JSON_BYTES {
        let file = path.display().to_string();
        return Err(HubError::Size { file, expected_bytes: MAX_JSON_BYTES, found_bytes });
    }
    let bytes = std::fs::read(path).map_err(HubError::io("read", path))?;
    debug_assert!(as_u64(bytes.len()) <= MAX_JSON_BYTES, "its length was checked");
    Ok(bytes)
}

fn config_json(root: &Path) -> Result<Option<Vec<u8>>, HubError> {
    let path = root.join("config.json");
    if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
}

/// The names of the files, and links to files, that stand directly in a directory.
fn names(root: &Path) -> Result<Vec<String>, HubError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root).map_err(HubError::io("list", root))? {
        let entry = entry.map_err(HubError::io("list", root))?;
        // A broken link is kept, so that it is named when it is opened and not passed over in silence.
        if !entry.path().is_dir()
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// A weight file with its size, which is the size at the end of all links.
fn weight_file(name: String, path: &Path) -> Result<ModelFile, HubError> {
    let path = path.canonicalize().map_err(HubError::io("find", path))?;
    let metadata = path.metadata().map_err(HubError::io("find", &path))?;
    if !metadata.is_file() {
        return Err(HubError::NotWeights { path });
    }
    Ok(ModelFile { name, path, len_bytes: metadata.len() })
}
