//! Reading a shard file through its table of block digests. Input: 16 bytes that say how long the file is, which bytes are
//! read, and where up to 32 neighbouring bits are changed, in the file or in its table; then what the file is made of.
//!
//! A CRC32 finds every error of at most 32 neighbouring bits. So a damaged table never opens, a read that touches a damaged
//! block fails and names file and block, and every other read gives the bytes that were written.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use weightcast::checkpoint::{CheckpointError, VerifiedFile};
use weightcast::store::{NewFile, ReadAt, Store, StoreError};
use weightcast::types::{BlockDigests, DIGEST_BLOCK_BYTES, DigestTable, crc32c};

const SHARD: &str = "shard-00001-model-00001-of-00001.safetensors";
const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == DIGEST_BLOCK_BYTES);

fuzz_target!(|input: &[u8]| {
    let Some((plan, pattern)) = input.split_first_chunk::<16>() else { return };
    if pattern.is_empty() {
        return;
    }
    let number = |at: usize| usize::from(u16::from_le_bytes([plan[at], plan[at + 1]]));
    let length = number(0);
    let written: Vec<u8> = (0..length).map(|at| pattern[at % pattern.len()].wrapping_add((at / 251) as u8)).collect();
    let mut blocks = BlockDigests::new();
    for part in written.chunks(1 + number(2)) {
        blocks.update(part);
    }
    let digests = blocks.finish();
    let expected: Vec<u32> = written.chunks(BLOCK).map(by_the_bit).collect();
    assert_eq!(digests, expected, "the digests do not depend on how the bytes came");
    let table: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
    let manifest = DigestTable { bytes: table.len() as u64, crc32c: crc32c(&table) };

    let (mut file, mut stored_table) = (written.clone(), table.clone());
    let in_table = plan[4] & 1 == 1;
    let damaged = flip(if in_table { &mut stored_table } else { &mut file }, number(6), &plan[8..12]);
    let store = Files { file: file.into(), table: stored_table.into() };
    let opened = VerifiedFile::open(&store, SHARD, length as u64, manifest);
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            assert!(in_table && damaged.is_some() && matches!(error, CheckpointError::Table { .. }), "{error}");
            return;
        }
    };
    assert!(!in_table || damaged.is_none(), "a damaged table was opened");

    let start = number(12) % (length + 1);
    let end = start + number(14) % (length - start + 1);
    let mut found = vec![0; end - start];
    let touched = start / BLOCK * BLOCK..end.next_multiple_of(BLOCK).min(length);
    let hit = damaged.as_ref().filter(|damaged| start < end && touched.start < damaged.end && damaged.start < touched.end);
    match (opened.read_exact_at(start as u64, &mut found, "w"), hit) {
        (Ok(()), None) => assert_eq!(found, written[start..end]),
        (Err(CheckpointError::Block { path, block, tensor, .. }), Some(damaged)) => {
            assert!(path.ends_with(SHARD) && tensor.contains("tensor w"));
            let block = usize::try_from(block).expect("64 bits");
            assert!(damaged.start / BLOCK <= block && block <= damaged.end.saturating_sub(1) / BLOCK);
        }
        (result, hit) => panic!("bytes {start}..{end}, damage in {hit:?}: {result:?}"),
    }
    let mut all = Vec::new();
    let whole = opened.read_all(|at, bytes| {
        assert_eq!(at, all.len() as u64);
        all.extend_from_slice(bytes);
    });
    assert_eq!(whole.is_ok(), damaged.is_none());
    assert!(whole.is_err() || all == written);
});

/// Changes up to four bytes; where something changed, if it did.
fn flip(bytes: &mut [u8], at: usize, mask: &[u8]) -> Option<std::ops::Range<usize>> {
    if bytes.is_empty() {
        return None;
    }
    let at = at % bytes.len();
    let mut changed: Option<std::ops::Range<usize>> = None;
    for (offset, &mask) in mask.iter().enumerate() {
        if let Some(byte) = bytes.get_mut(at + offset).filter(|_| mask != 0) {
            *byte ^= mask;
            let start = changed.map_or(at + offset, |range| range.start);
            changed = Some(start..at + offset + 1);
        }
    }
    changed
}

/// CRC32C from its parameters: reflected polynomial 0x82f63b78, all ones before and after.
fn by_the_bit(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
}

/// Two files in memory.
#[derive(Debug)]
struct Files {
    file: Arc<[u8]>,
    table: Arc<[u8]>,
}

#[derive(Debug)]
struct Bytes(Arc<[u8]>);

impl ReadAt for Bytes {
    fn len_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let start = usize::try_from(offset).expect("64 bits");
        into.copy_from_slice(&self.0[start..start + into.len()]);
        Ok(())
    }
}

impl Store for Files {
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>, StoreError> {
        Ok(Box::new(Bytes(if name.ends_with(".crc32c") { self.table.clone() } else { self.file.clone() })))
    }

    fn describe(&self, name: &str) -> String {
        name.to_owned()
    }

    fn create(&self, _: &str, _: u64) -> Result<Box<dyn NewFile>, StoreError> {
        unreachable!("a reader creates nothing")
    }

    fn create_dir(&self, _: &str) -> Result<(), StoreError> {
        unreachable!("a reader creates nothing")
    }

    fn list(&self, _: &str) -> Result<Vec<String>, StoreError> {
        unreachable!("a reader of one file lists nothing")
    }

    fn publish(&self, _: &str, _: &str) -> Result<(), StoreError> {
        unreachable!("a reader publishes nothing")
    }

    fn sync_dir(&self, _: &str) -> Result<(), StoreError> {
        unreachable!("a reader syncs nothing")
    }

    fn remove(&self, _: &str) -> Result<(), StoreError> {
        unreachable!("a reader removes nothing")
    }
}
