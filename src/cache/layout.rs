//! One file of an entry: whole tensors in the order in which a load makes them, as a safetensors file whose header fills
//! whole digest blocks.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use super::CacheError;
use super::key::hex;
use crate::checkpoint::table_name;
use crate::format::FormatError;
use crate::format::safetensors::{LENGTH_BYTES, build_header, header_len, parse_header};
use crate::manifest::part_name;
use crate::plan::{Component, LoadPlan, Part, StoredChunk, TensorPlan, f32Bits};
use crate::store::Store;
use crate::types::{ByteRange, DIGEST_BLOCK_BYTES, DType, DigestTable, Fqn, Shape, as_u64, as_usize, crc32c};

/// What is to be written becomes about this many files, so that little is lost when a load is interrupted,
const FILES: u64 = 16;
/// of no fewer bytes than this, but for the last,
const MIN_FILE_BYTES: u64 = 256 << 10;
/// and of no more than this, but for a tensor that has more.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// How names of files end.
pub(super) const SUFFIX: &str = ".safetensors";
/// Before the name of a tensor, in the header: its nested offset, the bits of an f32 in hexadecimal digits.
const OFFSET_KEY: &str = "nested_offset:";

/// A file that is to be written.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) name: String,
    /// Of the plan, in order.
    pub(super) tensors: Vec<usize>,
    pub(super) header_bytes: u64,
    pub(super) data_bytes: u64,
    /// By tensor and component, from the file's start.
    places: BTreeMap<(usize, usize), u64>,
}

/// The components that lie in the file as tensors; the nested offset stands in the header.
fn stored(tensor: &TensorPlan) -> impl Iterator<Item = (usize, Component)> {
    let components = tensor.components().into_iter().enumerate();
    components.filter(|(_, component)| component.part != Part::NestedOffset)
}

/// The files that hold `tensors` of the plan, in this order.
pub(super) fn layouts(plan: &LoadPlan, tensors: impl Iterator<Item = usize>) -> Vec<Layout> {
    let bytes = |index: usize| -> u64 {
        plan.tensors.get(index).map_or(0, |tensor| stored(tensor).map(|(_, component)| component.bytes).sum())
    };
    let sized: Vec<(usize, u64)> = tensors.map(|index| (index, bytes(index))).collect();
    let total: u64 = sized.iter().map(|(_, bytes)| bytes).sum();
    let file_bytes = (total / FILES).clamp(MIN_FILE_BYTES, MAX_FILE_BYTES);
    let mut groups: Vec<(u64, Vec<usize>)> = Vec::new();
    for (index, bytes) in sized {
        match groups.last_mut() {
            Some((filled, group)) if *filled + bytes <= file_bytes => {
                *filled += bytes;
                group.push(index);
            }
            _ => groups.push((bytes, vec![index])),
        }
    }
    groups.into_iter().map(|(_, tensors)| Layout::new(plan, tensors)).collect()
}

impl Layout {
    fn new(plan: &LoadPlan, tensors: Vec<usize>) -> Self {
        let mut names = Sha256::new();
        for tensor in tensors.iter().filter_map(|&index| plan.tensors.get(index)) {
            names.update(tensor.fqn.as_str());
            names.update([0]);
        }
        let first = tensors.first().copied().unwrap_or(0);
        let name = format!("{first:05}-{}{SUFFIX}", hex(&names.finalize(), 6));
        let mut layout = Self { name, tensors, header_bytes: 0, data_bytes: 0, places: BTreeMap::new() };
        layout.header_bytes = as_u64(layout.header(plan, &BTreeMap::new()).len());
        let mut end = layout.header_bytes;
        for &index in &layout.tensors {
            for (number, component) in plan.tensors.get(index).into_iter().flat_map(stored) {
                layout.places.insert((index, number), end);
                end += component.bytes;
            }
        }
        layout.data_bytes = end - layout.header_bytes;
        layout
    }

    /// Where a component starts in the file; nothing for the one that stands in the header.
    pub(super) fn place(&self, tensor: usize, component: usize) -> Option<u64> {
        self.places.get(&(tensor, component)).copied()
    }

    /// The header, whose length does not depend on the offsets.
    pub(super) fn header(&self, plan: &LoadPlan, offsets: &BTreeMap<usize, u32>) -> Vec<u8> {
        let of_file = || self.tensors.iter().filter_map(|&index| Some((index, plan.tensors.get(index)?)));
        let tensors: Vec<(Fqn, DType, Shape)> = of_file()
            .flat_map(|(_, tensor)| {
                stored(tensor).map(|(_, component)| {
                    let name = part_name(&tensor.fqn, &tensor.encoding, component.part);
                    (Fqn::from(name.as_str()), component.dtype, component.shape)
                })
            })
            .collect();
        let has_offset = |tensor: &TensorPlan| tensor.components().iter().any(|part| part.part == Part::NestedOffset);
        let nested: Vec<(String, String)> = of_file()
            .filter(|(_, tensor)| has_offset(tensor))
            .map(|(index, tensor)| {
                let bits = offsets.get(&index).copied().unwrap_or(0);
                (format!("{OFFSET_KEY}{}", tensor.fqn), format!("{bits:08x}"))
            })
            .collect();
        let metadata: Vec<(&str, &str)> = nested.iter().map(|(key, bits)| (key.as_str(), bits.as_str())).collect();
        let mut bytes = build_header(&tensors, &metadata).expect("the plan's sizes were checked");
        bytes.resize(bytes.len().next_multiple_of(as_usize(DIGEST_BLOCK_BYTES)), b' ');
        let json_bytes = as_u64(bytes.len()) - LENGTH_BYTES;
        bytes.splice(0..as_usize(LENGTH_BYTES), json_bytes.to_le_bytes());
        bytes
    }
}

/// A file that is there.
#[derive(Debug)]
pub(super) struct FileOnDisk {
    pub(super) name: String,
    pub(super) len_bytes: u64,
    pub(super) digest_table: DigestTable,
    tensors: BTreeMap<Fqn, (DType, Shape, ByteRange)>,
    offsets: BTreeMap<String, f32Bits>,
}

impl FileOnDisk {
    /// Reads what the file `name` says of itself.
    pub(super) fn open(store: &dyn Store, name: &str) -> Result<Self, CacheError> {
        let file = store.open(name)?;
        let invalid = |error: FormatError| CacheError::Header { path: store.describe(name), reason: error.to_string() };
        let mut first = vec![0; as_usize(LENGTH_BYTES.min(file.len_bytes()))];
        file.read_exact_at(0, &mut first)?;
        let json_bytes = header_len(name, &first, file.len_bytes()).map_err(invalid)?;
        let mut json = vec![0; as_usize(json_bytes)];
        file.read_exact_at(LENGTH_BYTES, &mut json)?;
        let header = parse_header(name, &json, file.len_bytes()).map_err(invalid)?;
        let table = crate::store::read_small(store, &table_name(name), file.len_bytes())?;
        let expected_bytes = file.len_bytes().div_ceil(DIGEST_BLOCK_BYTES) * 4;
        if as_u64(table.len()) != expected_bytes {
            let path = store.describe(&table_name(name));
            let reason = format!("expected {expected_bytes} bytes of digests, found {}", table.len());
            return Err(CacheError::Header { path, reason });
        }
        let offsets = header.metadata.iter().filter_map(|(key, bits)| {
            let fqn = key.strip_prefix(OFFSET_KEY)?;
            Some((fqn.to_owned(), f32Bits(u32::from_str_radix(bits, 16).ok()?)))
        });
        Ok(Self {
            name: name.to_owned(),
            len_bytes: file.len_bytes(),
            digest_table: DigestTable { bytes: as_u64(table.len()), crc32c: crc32c(&table) },
            offsets: offsets.collect(),
            tensors: header
                .tensors
                .into_iter()
                .map(|(fqn, tensor)| (fqn, (tensor.dtype, tensor.shape, tensor.range)))
                .collect(),
        })
    }

    /// The chunks of each component of `tensor` in this file, which is number `file` of a plan, and the nested offset;
    /// nothing when the file does not have all of it.
    pub(super) fn parts(&self, tensor: &TensorPlan, file: u32) -> Option<(Vec<Vec<StoredChunk>>, Option<f32Bits>)> {
        let mut nested_offset = None;
        let mut parts = Vec::new();
        for component in tensor.components() {
            if component.part == Part::NestedOffset {
                nested_offset = Some(*self.offsets.get(tensor.fqn.as_str())?);
                parts.push(Vec::new());
                continue;
            }
            let name = part_name(&tensor.fqn, &tensor.encoding, component.part);
            let (dtype, shape, range) = self.tensors.get(name.as_str())?;
            if (*dtype, shape) != (component.dtype, &component.shape) || range.len() != component.bytes {
                return None;
            }
            parts.push(vec![StoredChunk { file, range: *range, at: 0 }]);
        }
        Some((parts, nested_offset))
    }
}
