//! Verifying a committed checkpoint.

use serde::Serialize;

use super::{Checkpoint, CheckpointError, VerifiedFile};
use crate::plan::f32Bits;
use crate::store::Store;
use crate::types::{ByteRange, TensorDigest, as_u64, as_usize};

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Manifest, lengths, and the tables of digests.
    Shallow,
    /// Every byte of every file: block digests and the digest of every tensor.
    Deep,
}

/// What was verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Shard files.
    pub files: u64,
    /// Logical tensors.
    pub tensors: u64,
    /// Bytes of shard files whose digests were checked.
    pub bytes: u64,
}

/// Verifies a checkpoint whose manifest was opened, and with it holds.
///
/// # Errors
/// [`CheckpointError`] naming file, block and tensor of the first damage.
pub fn verify(store: &dyn Store, checkpoint: &Checkpoint, depth: Depth) -> Result<Verified, CheckpointError> {
    let manifest = &checkpoint.manifest;
    let mut verified =
        Verified { files: as_u64(manifest.files.len()), tensors: as_u64(manifest.tensors.len()), bytes: 0 };
    let mut files = Vec::new();
    for file in &manifest.files {
        let name = format!("{}/{}", checkpoint.directory, file.name);
        files.push(VerifiedFile::open(store, &name, file.bytes, file.digest_table)?);
    }
    if depth == Depth::Shallow {
        return Ok(verified);
    }
    for (file, shard) in files.iter().zip(&manifest.files) {
        file.read_all(|_, _| {})?;
        verified.bytes += shard.bytes;
    }
    let mut buffer = Vec::new();
    for tensor in &manifest.tensors {
        let mut found = TensorDigest::empty();
        for chunk in tensor.parts.iter().flat_map(|part| &part.chunks) {
            let file = files.get(as_usize(u64::from(chunk.file))).expect("FM-3 was checked when the manifest was read");
            found = found.append(digest_of(file, chunk.range, &mut buffer, tensor.fqn.as_str())?);
        }
        if let Some(f32Bits(bits)) = tensor.nested_offset {
            found = found.append(TensorDigest::of(&bits.to_le_bytes()));
        }
        if found != tensor.digest {
            let (expected, found) = (tensor.digest.to_string(), found.to_string());
            return Err(CheckpointError::Tensor { fqn: tensor.fqn.to_string(), expected, found });
        }
    }
    Ok(verified)
}

fn digest_of(
    file: &VerifiedFile,
    range: ByteRange,
    buffer: &mut Vec<u8>,
    tensor: &str,
) -> Result<TensorDigest, CheckpointError> {
    const STEP_BYTES: u64 = 1 << 20;
    let mut digest = TensorDigest::empty();
    let mut at = range.start();
    while at < range.end() {
        let len = (range.end() - at).min(STEP_BYTES);
        buffer.resize(as_usize(len), 0);
        file.read_exact_at(at, buffer, tensor)?;
        digest = digest.append(TensorDigest::of(buffer));
        at += len;
    }
    Ok(digest)
}
