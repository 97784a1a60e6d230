//! Reading shard files with every touched block verified (`CK-3`).

use std::sync::PoisonError;

use super::CheckpointError;
use super::edges::Edges;
use super::names::table_name;
use crate::store::{ReadAt, Store};
use crate::types::{ByteRange, DIGEST_BLOCK_BYTES, DigestTable, as_u64, as_usize, crc32c};

/// Bytes read and verified together at most: large enough for the disk, small enough to verify from cache.
const READ_CHUNK_BYTES: u64 = 1 << 20;

/// A shard file with its block digests.
#[derive(Debug)]
pub struct VerifiedFile {
    file: Box<dyn ReadAt>,
    name: String,
    path: String,
    table: Vec<u32>,
    edges: Edges,
}

impl VerifiedFile {
    /// Opens the shard file `name` of `len_bytes` and checks its length and its table of digests.
    ///
    /// # Errors
    /// [`CheckpointError::Length`], [`CheckpointError::Table`], or storage's error.
    pub fn open(store: &dyn Store, name: &str, len_bytes: u64, table: DigestTable) -> Result<Self, CheckpointError> {
        let path = store.describe(name);
        let file = store.open(name)?;
        check_length(&path, len_bytes, file.len_bytes())?;

        let table_name = table_name(name);
        let table_path = store.describe(&table_name);
        let table_file = store.open(&table_name)?;
        let table_bytes = len_bytes.div_ceil(DIGEST_BLOCK_BYTES) * 4;
        check_length(&table_path, table_bytes, table.bytes)?;
        check_length(&table_path, table_bytes, table_file.len_bytes())?;
        let mut bytes = vec![0; as_usize(table_bytes)];
        table_file.read_exact_at(0, &mut bytes)?;
        let (expected, found) = (table.crc32c, crc32c(&bytes));
        if expected != found {
            return Err(CheckpointError::Table { path: table_path, expected, found });
        }
        let table = bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
        Ok(Self { file, name: name.to_owned(), path, table, edges: Edges::default() })
    }

    /// Its name in the store.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Fills `into` with the file's bytes from `offset`; `tensor` names what is read, for the message.
    ///
    /// # Errors
    /// [`CheckpointError::Block`] when a touched block is damaged; `into` must then not be used.
    pub fn read_exact_at(&self, offset: u64, into: &mut [u8], tensor: &str) -> Result<(), CheckpointError> {
        let end = offset.saturating_add(as_u64(into.len()));
        let (mut at, mut rest) = (offset, into);
        while at < end {
            let block_start = at / DIGEST_BLOCK_BYTES * DIGEST_BLOCK_BYTES;
            let block_end = (block_start + DIGEST_BLOCK_BYTES).min(self.file.len_bytes());
            let whole_end =
                if end >= self.file.len_bytes() { end } else { end / DIGEST_BLOCK_BYTES * DIGEST_BLOCK_BYTES };
            if at == block_start && whole_end > at {
                // Whole blocks go straight to where they belong.
                let len = (whole_end - at).min(READ_CHUNK_BYTES);
                let (now, later) = std::mem::take(&mut rest).split_at_mut(as_usize(len));
                self.file.read_exact_at(at, now)?;
                self.verify(at, now, tensor)?;
                (at, rest) = (at + len, later);
            } else {
                // A block of which only a part is wanted.
                let slot = self.edges.slot(block_start / DIGEST_BLOCK_BYTES);
                let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
                let block = match slot.as_ref() {
                    Some(block) => block,
                    None => {
                        let mut block = vec![0_u8; as_usize(block_end.saturating_sub(block_start))];
                        self.file.read_exact_at(block_start, &mut block)?;
                        self.verify(block_start, &block, tensor)?;
                        slot.insert(block)
                    }
                };
                let stop = end.min(block_end);
                let (now, later) = std::mem::take(&mut rest).split_at_mut(as_usize(stop - at));
                let wanted = as_usize(at - block_start)..as_usize(stop - block_start);
                now.copy_from_slice(block.get(wanted).unwrap_or_default());
                (at, rest) = (stop, later);
            }
        }
        Ok(())
    }

    /// Reads and verifies the whole file; `each` gets every run of blocks with its offset.
    ///
    /// # Errors
    /// As [`VerifiedFile::read_exact_at`].
    pub fn read_all(&self, mut each: impl FnMut(u64, &[u8])) -> Result<(), CheckpointError> {
        let mut buffer = vec![0_u8; as_usize(READ_CHUNK_BYTES)];
        let mut at = 0;
        while at < self.file.len_bytes() {
            let len = (self.file.len_bytes() - at).min(READ_CHUNK_BYTES);
            let now = buffer.get_mut(..as_usize(len)).unwrap_or_default();
            self.file.read_exact_at(at, now)?;
            self.verify(at, now, "")?;
            each(at, now);
            at += len;
        }
        Ok(())
    }

    fn verify(&self, start: u64, bytes: &[u8], tensor: &str) -> Result<(), CheckpointError> {
        for (index, block) in bytes.chunks(as_usize(DIGEST_BLOCK_BYTES)).enumerate() {
            let block_index = start / DIGEST_BLOCK_BYTES + as_u64(index);
            let expected = self.table.get(as_usize(block_index)).copied();
            let found = crc32c(block);
            if expected != Some(found) {
                let range =
                    ByteRange::with_len(block_index * DIGEST_BLOCK_BYTES, as_u64(block.len())).unwrap_or_default();
                return Err(CheckpointError::Block {
                    path: self.path.clone(),
                    block: block_index,
                    start: range.start(),
                    end: range.end(),
                    tensor: if tensor.is_empty() { String::new() } else { format!(" in tensor {tensor}") },
                    expected: expected.unwrap_or_default(),
                    found,
                });
            }
        }
        Ok(())
    }
}

pub(super) fn check_length(path: &str, expected_bytes: u64, found_bytes: u64) -> Result<(), CheckpointError> {
    if expected_bytes == found_bytes {
        Ok(())
    } else {
        Err(CheckpointError::Length { path: path.to_owned(), expected_bytes, found_bytes })
    }
}
