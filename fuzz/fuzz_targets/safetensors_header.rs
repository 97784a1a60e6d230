//! The safetensors header. Input: 8 bytes, the length of the data after the header (little-endian); then the file's first
//! bytes, length included.
//!
//! What is accepted covers the file from the header's end to its own end, exactly once, is accepted by the reference
//! reader, is read the same again after it was written anew, and can be planned onto ranks.
#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use weightcast::format::safetensors::{LENGTH_BYTES, MAX_HEADER_BYTES, build_header, header_len, parse_header};
use weightcast::format::{FileEntry, Header, HeaderTensor, merge};
use weightcast::model::Skeleton;
use weightcast::plan::plan;
use weightcast::types::{DType, Fqn, Shape};

const NAME: &str = "model-00001-of-00002.safetensors";
/// The reference reader sees files with at most so many bytes of data.
const MAX_DATA_BYTES: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((data_bytes, file)) = input.split_first_chunk::<8>() else { return };
    // No file is longer than 2^62 bytes.
    let data_bytes = u64::from_le_bytes(*data_bytes) >> 2;
    let head_bytes = u64::try_from(file.len()).expect("64 bits");
    check_length(file, head_bytes + data_bytes);
    // The header itself, whatever the length before it says: a mutation would rarely get both right.
    let Some(json) = file.get(8..) else { return };
    let file_bytes = head_bytes + data_bytes;
    match parse_header(NAME, json, file_bytes) {
        Ok(header) => {
            check_header(json, &header, file_bytes);
            check_plan(header, file_bytes);
        }
        Err(error) => assert!(error.to_string().contains(NAME), "{error}"),
    }
});

/// As a model without a config.json, whose tensors are taken as they are.
fn check_plan(header: Header, file_bytes: u64) {
    if file_bytes > shared::MAX_MODEL_BYTES || header.tensors.is_empty() {
        return;
    }
    let index = merge(vec![(FileEntry { name: NAME.to_owned(), len_bytes: file_bytes }, header)], None);
    let index = index.expect("one file disagrees with none");
    let skeleton = Skeleton::generic(&index);
    let binding = skeleton.bind(&index).expect("it was made of these tensors");
    let made = plan(shared::request(), &index, &skeleton, &binding);
    shared::check_plan(&made.expect("its bytes were counted before"));
}

fn check_length(file: &[u8], file_bytes: u64) {
    match header_len(NAME, file, file_bytes) {
        Ok(length) => {
            assert!(length <= MAX_HEADER_BYTES && LENGTH_BYTES + length <= file_bytes);
            assert_eq!(file.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)), Some(length));
        }
        Err(error) => assert!(error.to_string().contains(NAME), "{error}"),
    }
}

fn check_header(json: &[u8], header: &Header, file_bytes: u64) {
    let data_start = LENGTH_BYTES + u64::try_from(json.len()).expect("64 bits");
    let mut tensors: Vec<(&Fqn, &HeaderTensor)> = header.tensors.iter().collect();
    tensors.sort_by_key(|(name, tensor)| (tensor.range, *name));
    let mut next = data_start;
    for (name, tensor) in &tensors {
        assert_eq!(tensor.range.start(), next, "{name} neither overlaps nor leaves a hole");
        let elements: u128 = tensor.shape.0.iter().map(|&size| u128::from(size)).product();
        let bytes = elements * u128::from(tensor.dtype.size_bytes());
        assert_eq!(u128::from(tensor.range.len()), bytes, "{name}: {:?}", tensor.shape);
        next = tensor.range.end();
    }
    assert_eq!(next, file_bytes, "the last tensor ends the file");

    // The reference reader wants the data too.
    if let Ok(data_bytes @ ..=MAX_DATA_BYTES) = usize::try_from(file_bytes - data_start) {
        let mut whole = (json.len() as u64).to_le_bytes().to_vec();
        whole.extend_from_slice(json);
        whole.resize(whole.len() + data_bytes, 0);
        if let Err(error) = safetensors::SafeTensors::read_metadata(&whole) {
            panic!("accepted, but not by the reference reader: {error}");
        }
    }

    let list: Vec<(Fqn, DType, Shape)> =
        tensors.iter().map(|(name, tensor)| ((*name).clone(), tensor.dtype, tensor.shape.clone())).collect();
    let metadata: Vec<(&str, &str)> =
        header.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let again = build_header(&list, &metadata).expect("its bytes were counted before");
    let data_bytes = file_bytes - data_start;
    let again_bytes = u64::try_from(again.len()).expect("64 bits") + data_bytes;
    let parsed = parse_header(NAME, &again[8..], again_bytes).expect("what was written from a good header");
    assert_eq!(parsed.metadata, header.metadata);
    assert_eq!(parsed.tensors.len(), header.tensors.len());
    let moved = u64::try_from(again.len()).expect("64 bits");
    for (name, tensor) in tensors {
        let found = &parsed.tensors[name];
        assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape));
        assert_eq!(found.range.start() - moved, tensor.range.start() - data_start, "{name}");
    }
}
