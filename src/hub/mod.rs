//! Model references: what a user names in, files on this machine out, downloaded into the Hugging Face cache if need be.
//!
//! Owns: the forms of a reference, the cache's layout (that of Python's `huggingface_hub`, which may use it at the same
//! time), the hub's HTTP interface, the choice of the weight files of a directory or repository.
//! Refuses to know: what is in the files, except for the list of files in an index; the environment ([`HubConfig`] takes
//! a function that looks variables up).
//!
//! - `HU-1`: what stands under `snapshots/` is complete: a blob gets its name only after its size, and where the etag is
//!   a SHA-256 its digest too, agreed with the server's.
//! - `HU-2`: one process at a time writes a blob; the others wait, and find it complete.
//! - `HU-3`: offline, nothing is asked of any server; online, the revision is pinned to a commit before any file.
//! - `HU-4`: no name from an index, a listing or a header leads outside its directory.
//!
//! The crate hf-hub is not used. It gives up a lock after five seconds, appends a whole answer to a partial file when a
//! server ignores the range, checks no size, sets no timeout and knows no offline mode; each would have to be replaced.

#![expect(clippy::disallowed_methods, reason = "hub owns the files of the cache")]

mod cache;
mod config;
mod download;
mod error;
mod http;
mod inventory;
mod local;
mod peek;
mod reference;
mod remote;
mod select;

use std::path::PathBuf;

pub use config::{CONNECT_TIMEOUT, HubConfig, RESPONSE_TIMEOUT, STALL_TIMEOUT, Timeouts, Token};
pub use error::HubError;
pub use inventory::{CachedModel, Freed, inventory, prune_cache};
pub use peek::{HubPeek, PeekedFile, PeekedModel};
pub use reference::Reference;

/// The files of a model, all of them on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// The directory that they are in; a tokenizer, if there is one, is here too.
    pub root: PathBuf,
    /// The weight files, sorted by name.
    pub files: Vec<ModelFile>,
    /// config.json, if there is one.
    pub config_json: Option<Vec<u8>>,
    /// The sharded index's name and text, if there is one.
    pub index_json: Option<(String, Vec<u8>)>,
    /// The format of the weight files.
    pub kind: ModelKind,
    /// The commit of a repository; none for a local path.
    pub commit: Option<String>,
}

/// One weight file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// Its path within [`ModelFiles::root`], with `/`.
    pub name: String,
    /// Where it is, links resolved.
    pub path: PathBuf,
    /// Its length, through links.
    pub len_bytes: u64,
}

/// The format of the weight files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelKind {
    /// safetensors.
    Safetensors,
    /// One GGUF file.
    Gguf,
}

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file that is being downloaded, or waited for while another process downloads it.
    pub file: &'a str,
    /// Bytes of the model that are here.
    pub done_bytes: u64,
    /// Bytes of all its files.
    pub total_bytes: u64,
}

/// Finds the files of a model, downloading those that are missing. Blocks; `progress` is called from the same thread.
///
/// # Errors
/// [`HubError`], naming the path, file or address.
pub fn resolve(
    reference: &Reference,
    config: &HubConfig,
    progress: &dyn Fn(Progress<'_>),
) -> Result<ModelFiles, HubError> {
    match reference {
        Reference::Directory(path) => local::directory(path),
        Reference::File(path) => local::file(path),
        Reference::Hub { id, revision } => remote::resolve(id, revision, config, progress),
    }
}

#[cfg(test)]
mod tests;
