//! The files of a model in an object store or on a web server. Nothing is downloaded: headers are read here, and the ranges
//! of the plan by the ranks.
//!
//! Owns: which files are the model's, without a listing where there is none. Refuses to know: how they are read.

use crate::error::{Classify as _, Kind};
use crate::store::{RemoteAddress, Store, StoreError, read_small};

use super::source::SourceError;

/// The one file of an unsharded model.
const SINGLE_NAME: &str = "model.safetensors";
/// The index of a sharded one.
const INDEX_NAME: &str = "model.safetensors.index.json";
/// As for the hub: the largest published index has 70 MB.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// The files of a model, named within their place.
#[derive(Debug)]
pub(super) struct RemoteModel {
    pub(super) names: Vec<String>,
    pub(super) config_json: Option<Vec<u8>>,
    pub(super) index_json: Option<(String, Vec<u8>)>,
}

/// The place of a model and, where the address is that of one file, the file's name.
pub(super) fn place(reference: &str) -> Result<(RemoteAddress, Option<String>), SourceError> {
    let address = RemoteAddress::parse(reference)?;
    if address.prefix.ends_with(".gguf") {
        // Its rows are read one by one, which would be a request for each of thousands of bytes.
        return Err(SourceError::RemoteGguf { address: address.to_string() });
    }
    if address.prefix.ends_with(".safetensors") {
        let (place, name) = address.split_file();
        return Ok((place, Some(name)));
    }
    Ok((address, None))
}

/// Finds the files of the model in `store`, at `address`.
pub(super) fn find(
    store: &dyn Store,
    address: &RemoteAddress,
    file: Option<String>,
) -> Result<RemoteModel, SourceError> {
    let config_json = optional(store, "config.json")?;
    if let Some(name) = file {
        return Ok(RemoteModel { names: vec![name], config_json, index_json: None });
    }
    match store.open(SINGLE_NAME) {
        Ok(_) => return Ok(RemoteModel { names: vec![SINGLE_NAME.to_owned()], config_json, index_json: None }),
        Err(error) if error.kind() == Kind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    if let Some(text) = optional(store, INDEX_NAME)? {
        let index_json = Some((INDEX_NAME.to_owned(), text));
        return Ok(RemoteModel { names: Vec::new(), config_json, index_json });
    }
    let mut names = if address.scheme.is_web() { Vec::new() } else { store.list("")? };
    names.retain(|name| name.ends_with(".safetensors"));
    if names.is_empty() {
        return Err(SourceError::NoWeights { address: address.to_string() });
    }
    Ok(RemoteModel { names, config_json, index_json: None })
}

fn optional(store: &dyn Store, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    match read_small(store, name, MAX_JSON_BYTES) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
