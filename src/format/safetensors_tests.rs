//! Tests of the safetensors header.

use proptest::prelude::*;

use super::*;
use crate::error::{Classify, Kind};
use crate::types::as_usize;

fn parse(json: &str, data_bytes: u64) -> Result<Header, FormatError> {
    parse_header("m.safetensors", json.as_bytes(), LENGTH_BYTES + as_u64(json.len()) + data_bytes)
}

/// Each fault by hand, with the words that must name it.
#[test]
fn every_fault_has_its_error() {
    let check = |json: &str, data: u64, expected: &str| {
        let message = parse(json, data).expect_err(json).to_string();
        assert!(message.contains(expected), "{json}: {message}");
    };
    let one = |fields: &str| format!(r#"{{"a":{{{fields}}}}}"#);
    let ok = one(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#);
    assert!(parse(&ok, 8).is_ok());
    assert!(parse("{}   ", 0).is_ok(), "no tensors, padded");
    check(&ok, 4, "tensor a: offsets 0..8 lie outside the data of 4 bytes");
    check(&ok, 9, "bytes after its last tensor: expected 70 bytes, found 71");
    check(&one(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), 8, "F32 [3] takes 12 bytes, its offsets give 8");
    check(&one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), 8, "tensor a: offsets are reversed");
    check(&one(r#""dtype":"Q9","shape":[2],"data_offsets":[0,8]"#), 8, "tensor a: unknown dtype \"Q9\"");
    check(&one(r#""dtype":"float32","shape":[2],"data_offsets":[0,8]"#), 8, "unknown dtype \"float32\"");
    check(&one(r#""dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,8]"#), 8, "64 bits can count");
    check(&one(r#""dtype":"F32","shape":[2]"#), 8, "tensor a has no data_offsets");
    check(&one(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#), 8, "tensor a: invalid value");
    check(&one(r#""dtype":"F32","shape":[2],"data_offsets":[0,8,9]"#), 8, "header cannot be read: tensor a: ");
    check(
        &one(r#""dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]"#),
        8,
        "\"shape\" stands twice in tensor a",
    );
    check(r#"{"a":{},"a":{}}"#, 0, "key \"a\" stands twice in the header");
    check(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, "key \"k\" stands twice in __metadata__");
    check(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "\"__metadata__\" stands twice");
    check(r#"{"__metadata__":{"k":1}}"#, 0, "header cannot be read");
    check("[]", 0, "begins with '{', found byte 0x5b");
    check(" {}", 0, "begins with '{', found byte 0x20");
    check("", 0, "begins with '{'");
    check("{", 0, "header cannot be read");
    let two = |second: &str| {
        let entry = r#"{"dtype":"U8","shape":[4],"data_offsets":"#;
        format!(r#"{{"a":{entry}[0,4]}},"b":{entry}{second}}}}}"#)
    };
    assert!(parse(&two("[4,8]"), 8).is_ok());
    check(&two("[2,6]"), 8, "tensor b at 2..6 overlaps tensor a, which ends at 4");
    check(&two("[5,9]"), 9, "tensor b at 5..9 leaves a hole: expected it at 4, where tensor a ends");
}

#[test]
fn lengths_are_checked_before_anything_is_read() {
    let too_long = header_len("m", &(MAX_HEADER_BYTES + 1).to_le_bytes(), u64::MAX);
    assert!(matches!(too_long, Err(FormatError::HeaderTooLong { .. })));
    assert!(matches!(header_len("m", &100_u64.to_le_bytes(), 50), Err(FormatError::Truncated { .. })));
    assert!(matches!(header_len("m", &[0; 3], 3), Err(FormatError::Truncated { .. })));
    assert!(matches!(header_len("m", &u64::MAX.to_le_bytes(), 50), Err(FormatError::HeaderTooLong { .. })));
    assert_eq!(header_len("m", &42_u64.to_le_bytes(), 50).expect("exactly the file"), 42);
    assert_eq!(header_len("m", &[0; 3], 3).expect_err("short").kind(), Kind::Corrupt);
}

const REAL: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama/model-00001-of-00003.safetensors"));

fn read_real() -> Header {
    let len = header_len("m", REAL, as_u64(REAL.len())).expect("a real header");
    parse_header("m", &REAL[8..8 + as_usize(len)], as_u64(REAL.len())).expect("a real header")
}

/// The header of a file that transformers wrote. Its figures were taken from the JSON by hand.
#[test]
fn a_real_header_is_read() {
    let header = read_real();
    assert_eq!(header.tensors.len(), 15);
    assert_eq!(header.tensors["model.layers.0.mlp.gate_proj.weight"].shape, Shape::from([512, 192]));
    assert_eq!(header.metadata["format"], "pt");
    let total: u64 = header.tensors.values().map(|tensor| tensor.range.len()).sum();
    let start = header.tensors.values().map(|tensor| tensor.range.start()).min();
    assert_eq!(start.map(|start| start + total), Some(as_u64(REAL.len())));
}

/// Our own header of the same tensors in the same order has the very bytes that transformers wrote.
#[test]
fn built_headers_are_what_the_safetensors_crate_writes() {
    let header = read_real();
    let mut order: Vec<_> = header.tensors.iter().map(|(name, tensor)| (tensor.range, name, tensor)).collect();
    order.sort_by_key(|&(range, ..)| range);
    let tensors: Vec<_> =
        order.iter().map(|(_, name, tensor)| ((*name).clone(), tensor.dtype, tensor.shape.clone())).collect();
    let ours = build_header(&tensors, &[("format", "pt")]).expect("a small header");
    assert_eq!(String::from_utf8_lossy(&ours[8..]), String::from_utf8_lossy(&REAL[8..ours.len()]));
    assert_eq!(ours[..8], REAL[..8]);
}

#[test]
fn extra_fields_are_kept_and_oversized_layouts_refused() {
    let json = r#"{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"digest":"crc64nvme:00:1","global_shape":[2]}}"#;
    let header = parse(json, 1).expect("extra fields are tolerated");
    assert_eq!(header.tensors["a"].extra["digest"], "crc64nvme:00:1");
    let huge = ("w".into(), DType::F32, Shape::from([u64::MAX / 4]));
    assert!(build_header(&[huge.clone(), ("v".into(), DType::U8, Shape::from([8]))], &[]).is_err());
    assert!(build_header(&[huge], &[]).is_ok());
}

fn check_accepted(header: &Header, json_bytes: u64, file_bytes: u64) -> Result<(), TestCaseError> {
    let mut ranges: Vec<ByteRange> = header.tensors.values().map(|tensor| tensor.range).collect();
    ranges.sort();
    let mut next = LENGTH_BYTES + json_bytes;
    for range in ranges {
        prop_assert_eq!(range.start(), next);
        next = range.end();
    }
    prop_assert_eq!(next, file_bytes);
    for tensor in header.tensors.values() {
        prop_assert_eq!(tensor.shape.bytes(tensor.dtype).ok(), Some(tensor.range.len()));
    }
    Ok(())
}

proptest! {
    /// FO-1: a damaged header never panics, and what is accepted covers the data exactly once.
    #[test]
    fn fo_1_damage_never_panics(
        edits in prop::collection::vec((0_usize..400, any::<u8>()), 0..4), cut in 0_usize..400, file_bytes in 0_u64..500,
    ) {
        let tensors = [("a".into(), DType::F32, Shape::from([4])), ("b".into(), DType::U8, Shape::from([16]))];
        let mut json = build_header(&tensors, &[("format", "pt")]).expect("a small header").split_off(8);
        for (position, byte) in edits {
            let len = json.len();
            json[position % len] = byte;
        }
        if cut < json.len() / 4 {
            json.truncate(cut);
        }
        let json_bytes = as_u64(json.len());
        for file_bytes in [file_bytes, json_bytes + 8 + 32] {
            if let Ok(header) = parse_header("m", &json, file_bytes) {
                check_accepted(&header, json_bytes, file_bytes)?;
            }
        }
    }

    /// FO-1 with offsets chosen freely, so that overlaps, holes and overflows are frequent.
    #[test]
    fn fo_1_offsets_are_exact(
        offsets in prop::collection::vec((0_u64..6, 0_u64..6), 1..4), far in any::<u64>(), data in 0_u64..8,
    ) {
        let entry = |(index, &(start, end)): (usize, &(u64, u64))| {
            let end = if start == 5 { far } else { end };
            let size = end.wrapping_sub(start);
            format!(r#""t{index}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
        };
        let json = format!("{{{}}}", offsets.iter().enumerate().map(entry).collect::<Vec<_>>().join(","));
        if let Ok(header) = parse(&json, data) {
            let json_bytes = as_u64(json.len());
            check_accepted(&header, json_bytes, LENGTH_BYTES + json_bytes + data)?;
        }
    }
}
