//! One rank writes its part of a checkpoint.

use super::CheckpointError;
use super::layout::{Content, entries, header};
use super::names::{shard_name, table_name};
use crate::manifest::{ReceiptChunk, SavedChunk, ShardFile, ShardReceipt};
use crate::plan::LoadPlan;
use crate::state::StateDict;
use crate::store::{Store, write_small};
use crate::types::{BlockDigests, ByteRange, DigestTable, Step, TensorDigest, as_u64, as_usize, crc32c};

/// Bytes digested and written together: in cache for the second use, and few system calls.
const WRITE_CHUNK_BYTES: usize = 1 << 20;

/// What a rank writes, and where.
#[derive(Debug)]
pub struct WriteRequest<'a> {
    /// The plan that the state follows.
    pub plan: &'a LoadPlan,
    /// The rank's state.
    pub state: &'a StateDict,
    /// The checkpoint root.
    pub store: &'a dyn Store,
    /// The attempt's directory, which the coordinator made.
    pub directory: &'a str,
    /// The step.
    pub step: Step,
}

/// Writes and syncs the rank's shard file and its digest table, straight from the rank's memory (a device's through two
/// page-locked buffers, whatever the size); `progress` is called
/// with the bytes done.
///
/// # Errors
/// [`CheckpointError::Store`]; what was written stays in the attempt's directory and is never used.
pub fn write_shard(request: &WriteRequest<'_>, progress: &dyn Fn(u64)) -> Result<ShardReceipt, CheckpointError> {
    let WriteRequest { plan, state, store, directory, step } = *request;
    let rank = state.rank();
    let mut nested_offsets = Vec::new();
    for (tensor, _) in plan.tensors.iter().enumerate().filter(|(_, planned)| planned.reader == rank) {
        nested_offsets.extend(state.nested_offset(tensor)?.map(|offset| (tensor, offset)));
    }
    let entries = entries(plan, state)?;
    if entries.is_empty() {
        return Ok(ShardReceipt { rank, file: None, chunks: Vec::new(), nested_offsets, training: None });
    }

    // The digests' lengths are known, so the header's is: its room is left free and filled at the end.
    let unknown: Vec<TensorDigest> =
        entries.iter().map(|entry| TensorDigest::unknown(as_u64(entry.len(state)))).collect();
    let data_start = as_u64(header(&entries, &unknown, step, rank).len());
    let data_bytes: u64 = unknown.iter().map(|digest| digest.bytes()).sum();
    let name = shard_name(rank);
    let path = format!("{directory}/{name}");
    let mut file = store.create(&path, data_start + data_bytes)?;

    let mut blocks = BlockDigests::new();
    let mut digests = Vec::with_capacity(entries.len());
    let mut offset = data_start;
    for entry in &entries {
        let mut digest = TensorDigest::empty();
        entry.read(state, WRITE_CHUNK_BYTES, |chunk| {
            blocks.update(chunk);
            digest = digest.append(TensorDigest::of(chunk));
            file.write_all_at(offset, chunk)?;
            offset += as_u64(chunk.len());
            progress(offset - data_start);
            Ok(())
        })?;
        digests.push(digest);
    }
    let header = header(&entries, &digests, step, rank);
    assert_eq!(as_u64(header.len()), data_start, "FM-1: a header's length does not depend on digests");
    file.write_all_at(0, &header)?;
    file.finish()?;

    let mut table = BlockDigests::new();
    table.update(&header);
    let table: Vec<u8> = table.finish().into_iter().chain(blocks.finish()).flat_map(u32::to_le_bytes).collect();
    write_small(store, &table_name(&path), &table)?;
    store.sync_dir(directory)?;

    let mut start = data_start;
    let mut chunks = Vec::new();
    for (entry, &digest) in entries.iter().zip(&digests) {
        if let Content::Chunk { tensor, component, at } = entry.content {
            let range = ByteRange::with_len(start, digest.bytes()).expect("the file's length fits 64 bits");
            chunks.push(ReceiptChunk { tensor, component, chunk: SavedChunk { file: 0, range, at, digest } });
        }
        start += digest.bytes();
    }
    let digest_table = DigestTable { bytes: as_u64(table.len()), crc32c: crc32c(&table) };
    let file = ShardFile { name, rank, bytes: data_start + data_bytes, digest_table };
    Ok(ShardReceipt { rank, file: Some(file), chunks, nested_offsets, training: None })
}

/// The bytes that `state` will write, for progress.
#[must_use]
pub(crate) fn data_bytes(plan: &LoadPlan, state: &StateDict) -> u64 {
    (0..plan.tensors.len())
        .flat_map(|tensor| (0..state.parts(tensor).len()).map(move |component| (tensor, component)))
        .map(|(tensor, component)| as_u64(state.owned_len(tensor, component)))
        .sum()
}

const _: () = assert!(as_usize(crate::types::DIGEST_BLOCK_BYTES) <= WRITE_CHUNK_BYTES);
