//! The key of an entry (`CA-1`).

use std::fmt::Write as _;

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::CacheError;
use crate::format::FileEntry;
use crate::plan::{Encoding, Input, LoadPlan};
use crate::store::{LocalStore, Store as _};
use crate::types::{Fqn, Shape, TensorDigest, as_usize};

/// Raised when the same plan makes other bytes than before, or an entry's files have another form.
const FORMAT: u32 = 1;
/// Of each local file this many runs of this many bytes, evenly over the file, tell its content beside its time.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4 << 10;

#[derive(Serialize)]
struct Key<'a> {
    format: u32,
    program: &'static str,
    files: &'a [FileEntry],
    versions: Vec<String>,
    tensors: Vec<(&'a Fqn, &'a Shape, Encoding, &'a Input)>,
}

/// The key of what `plan` makes, 32 hexadecimal digits: the same for every number of ranks, placement and strategy, and
/// wherever the model's directory is.
///
/// # Errors
/// A file of the model cannot be read.
pub(super) fn key(plan: &LoadPlan) -> Result<String, CacheError> {
    let versions = if plan.versions.is_empty() { local_versions(plan)? } else { plan.versions.clone() };
    let kept = plan.tensors.iter().filter(|tensor| super::keeps(plan, tensor));
    let key = Key {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION"),
        files: &plan.files,
        versions,
        tensors: kept.map(|tensor| (&tensor.fqn, &tensor.shape, tensor.encoding, &tensor.input)).collect(),
    };
    let text = serde_json::to_vec(&key).expect("strings and integers always become JSON");
    Ok(hex(&Sha256::digest(text), 16))
}

/// What tells the files of `plan`, and of the models beside it, from others of the same names and sizes; empty when nothing
/// does.
pub(super) fn files_id(plan: &LoadPlan) -> Result<String, CacheError> {
    let mut versions = Vec::new();
    for plan in std::iter::once(plan).chain(plan.others.iter().map(|other| &other.plan)) {
        match (plan.versions.is_empty(), crate::store::is_remote(&plan.root)) {
            (false, _) => versions.extend_from_slice(&plan.versions),
            (true, false) => versions.extend(local_versions(plan)?),
            (true, true) => return Ok(String::new()),
        }
    }
    let text = serde_json::to_vec(&versions).expect("strings always become JSON");
    Ok(hex(&Sha256::digest(text), 16))
}

/// The first `bytes` of a digest in hexadecimal digits.
pub(super) fn hex(digest: &[u8], bytes: usize) -> String {
    digest.iter().take(bytes).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// When each file was changed last, and the digest of samples of it.
fn local_versions(plan: &LoadPlan) -> Result<Vec<String>, CacheError> {
    let store = LocalStore::new(&plan.root);
    let version = |file: &FileEntry| {
        let open = store.open(&file.name)?;
        let len = open.len_bytes();
        let mut digest = TensorDigest::empty();
        let mut sample = Vec::new();
        for number in 0..SAMPLES {
            let start = len.saturating_sub(SAMPLE_BYTES) / (SAMPLES - 1) * number;
            sample.resize(as_usize(SAMPLE_BYTES.min(len - start)), 0);
            open.read_exact_at(start, &mut sample)?;
            digest = digest.append(TensorDigest::of(&sample));
        }
        Ok(format!("{}:{digest}", store.modified_ns(&file.name)?))
    };
    plan.files.iter().map(version).collect()
}
