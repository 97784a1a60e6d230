//! The layout of one rank's shard file: which chunks and extras, in which order, and the safetensors header over them.
//!
//! `FM-1`: the data starts at a multiple of the digest block, so header and data share no block.

use serde_json::{Map, Value, json};

use super::CheckpointError;
use crate::manifest::{Extra, extras, part_name};
use crate::plan::{Holding, LoadPlan, Part, TensorPlan};
use crate::state::StateDict;
use crate::types::{DIGEST_BLOCK_BYTES, DType, Rank, Step, TensorDigest, as_u64, as_usize};

/// One tensor of a shard file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<u64>,
    pub(super) offsets: Vec<u64>,
    pub(super) content: Content,
}

/// Where an entry's bytes come from.
#[derive(Debug)]
pub(super) enum Content {
    /// Owned bytes of a component of the plan.
    Chunk { tensor: usize, component: usize, at: u64 },
    /// Small bytes for other tools.
    Extra(Vec<u8>),
}

impl Entry {
    pub(super) fn len(&self, state: &StateDict) -> usize {
        match &self.content {
            Content::Chunk { tensor, component, .. } => state.owned_len(*tensor, *component),
            Content::Extra(bytes) => bytes.len(),
        }
    }

    /// Gives the bytes to `each` in chunks; a device's come through its page-locked buffers.
    pub(super) fn read(
        &self,
        state: &StateDict,
        chunk: usize,
        mut each: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        match &self.content {
            Content::Chunk { tensor, component, .. } => state.read_owned((*tensor, *component), chunk, each),
            Content::Extra(bytes) => bytes.chunks(chunk).try_for_each(&mut each),
        }
    }
}

impl From<Extra> for Entry {
    fn from(extra: Extra) -> Self {
        let (name, dtype, shape) = (extra.name, extra.dtype, extra.shape.0);
        let offsets = vec![0; shape.len()];
        Self { name, dtype, shape, offsets, content: Content::Extra(extra.bytes) }
    }
}

/// All entries of the rank's file, widest elements first so that every tensor is aligned to its element.
pub(super) fn entries(plan: &LoadPlan, state: &StateDict) -> Result<Vec<Entry>, CheckpointError> {
    let mut entries = Vec::new();
    for (index, tensor) in plan.tensors.iter().enumerate() {
        for (component, placed) in state.parts(index).iter().enumerate() {
            let part = placed.holding.component.part;
            if part != Part::NestedOffset && !placed.holding.owned.is_empty() {
                entries.push(chunk_entry(tensor, &placed.holding, index, component));
            }
        }
        if tensor.reader == state.rank() {
            let extras = extras(&tensor.fqn, &tensor.encoding, &tensor.shape, state.nested_offset(index)?);
            entries.extend(extras.into_iter().map(Entry::from));
        }
    }
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.size_bytes()));
    Ok(entries)
}

fn chunk_entry(tensor: &TensorPlan, holding: &Holding, index: usize, component: usize) -> Entry {
    let whole = &holding.component;
    let mut shape = whole.shape.0.clone();
    let mut offsets = vec![0; shape.len()];
    if let (Some(rows), Some(first)) = (shape.first_mut(), offsets.first_mut()) {
        let row_bytes = (whole.bytes / (*rows).max(1)).max(1);
        *rows = holding.owned.len() / row_bytes;
        *first = holding.owned.start() / row_bytes;
    }
    Entry {
        name: part_name(&tensor.fqn, &tensor.encoding, whole.part),
        dtype: whole.dtype,
        shape,
        offsets,
        content: Content::Chunk { tensor: index, component, at: holding.owned.start() },
    }
}

/// The header with its length, padded to a multiple of the digest block (`FM-1`). Its length depends on the entries
/// alone, not on the digests, so that it can be written after the data.
pub(super) fn header(entries: &[Entry], digests: &[TensorDigest], step: Step, rank: Rank) -> Vec<u8> {
    let mut sharding = Map::new();
    let mut tensors = Map::new();
    let mut offset = 0;
    for (entry, digest) in entries.iter().zip(digests) {
        let end = offset + digest.bytes();
        sharding.insert(entry.name.clone(), json!({"saved_offsets": entry.offsets}));
        tensors.insert(
            entry.name.clone(),
            json!({
                "dtype": entry.dtype.name(),
                "shape": entry.shape,
                "data_offsets": [offset, end],
                "digest": digest.to_string(),
            }),
        );
        offset = end;
    }
    let mut all = Map::new();
    all.insert(
        "__metadata__".to_owned(),
        json!({
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": Value::Object(sharding).to_string(),
            "weightcast_step": step.to_string(),
            "weightcast_rank": rank.to_string(),
        }),
    );
    all.extend(tensors);
    let text = Value::Object(all).to_string().into_bytes();
    let block = as_usize(DIGEST_BLOCK_BYTES);
    let total = (text.len() + 8).div_ceil(block) * block;
    let mut bytes = Vec::with_capacity(total);
    bytes.extend_from_slice(&as_u64(total - 8).to_le_bytes());
    bytes.extend_from_slice(&text);
    bytes.resize(total, b' ');
    bytes
}
