//! The GGUF header. Input: 8 bytes, the length of what follows the given bytes in the file (little-endian); then the file's
//! first bytes.
//!
//! What is accepted has its tensors within the file, apart from one another, with room for their elements. A part of the
//! header asks for more bytes, never for more than there are, and never says what the whole does not say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weightcast::format::gguf::{Gguf, MAX_HEAD_BYTES, parse};
use weightcast::format::{Encoding, GgufHead, ModelIndex};
use weightcast::model::ModelConfig;
use weightcast::types::ByteRange;

const NAME: &str = "model.gguf";

fuzz_target!(|input: &[u8]| {
    let Some((rest_bytes, head)) = input.split_first_chunk::<8>() else { return };
    // No file is longer than 2^62 bytes.
    let rest_bytes = u64::from_le_bytes(*rest_bytes) >> 2;
    let head_bytes = u64::try_from(head.len()).expect("64 bits");
    let file_bytes = head_bytes + rest_bytes;
    let whole = parse(NAME, head, file_bytes);
    match &whole {
        Ok(GgufHead::Whole(gguf)) => check_whole(gguf, file_bytes),
        Ok(GgufHead::Longer { read_bytes }) => {
            assert!(*read_bytes > head_bytes, "a step forward");
            assert!(*read_bytes <= file_bytes.min(MAX_HEAD_BYTES));
        }
        Err(error) => assert!(error.to_string().contains(NAME), "{error}"),
    }
    for part in [head.len() / 2, head.len().saturating_sub(1)] {
        match (parse(NAME, &head[..part], file_bytes), &whole) {
            (Ok(GgufHead::Whole(part)), Ok(GgufHead::Whole(whole))) => assert_eq!(part, *whole),
            (Ok(GgufHead::Whole(_)), other) => panic!("a part is whole, the whole is {other:?}"),
            (Err(_), Ok(other)) => panic!("a part is damaged, the whole is {other:?}"),
            _ => {}
        }
    }
});

fn check_whole(gguf: &Gguf, file_bytes: u64) {
    let index = match gguf.index(NAME) {
        Ok(index) => index,
        Err(error) => return assert!(error.to_string().contains(NAME), "{error}"),
    };
    check_index(&index, file_bytes);
    match gguf.config_json(NAME) {
        // What the header was turned into is a configuration that is taken or refused in words, as one from a file.
        Ok(json) => {
            serde_json::from_str::<serde_json::Value>(&json).expect("JSON");
            let _ = ModelConfig::parse(json.as_bytes());
        }
        Err(error) => assert!(error.to_string().contains(NAME), "{error}"),
    }
}

fn check_index(index: &ModelIndex, file_bytes: u64) {
    let mut ranges: Vec<ByteRange> = Vec::new();
    for (fqn, tensor) in &index.tensors {
        assert_eq!(tensor.file, 0);
        assert!(tensor.range.end() <= file_bytes, "{fqn} leaves the file");
        let elements: u128 = tensor.shape.0.iter().map(|&size| u128::from(size)).product();
        let Encoding::Ggml(ggml) = &tensor.encoding else { continue };
        let (block, bytes) = (ggml.ggml_type.block_elements(), ggml.ggml_type.block_bytes());
        assert_eq!(u128::from(tensor.range.len()) * u128::from(block), elements * u128::from(bytes), "{fqn}");
        for row in [0, 1, tensor.shape.rows() - 1] {
            assert!(ggml.source_row(row % tensor.shape.rows()) < tensor.shape.rows(), "{fqn}: row {row}");
        }
        ranges.push(tensor.range);
    }
    ranges.sort();
    for pair in ranges.windows(2) {
        assert!(pair[0].end() <= pair[1].start(), "tensors overlap: {} {}", pair[0], pair[1]);
    }
}
