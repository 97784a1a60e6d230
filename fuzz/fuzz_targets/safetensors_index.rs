//! The index of a sharded model, as text.
//!
//! What is accepted names every file once in `files`, is read the same again after it was written anew, agrees with headers
//! that have exactly its tensors, and disagrees as soon as one of them lacks a tensor or has one more.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use weightcast::format::{FileEntry, FormatError, Header, HeaderTensor, IndexJson, merge, parse_index_json};
use weightcast::types::{ByteRange, DType, Fqn, Shape};

const NAME: &str = "model.safetensors.index.json";

fuzz_target!(|input: &[u8]| {
    let index = match parse_index_json(NAME, input) {
        Ok(index) => index,
        Err(error) => return assert!(error.to_string().contains(NAME), "{error}"),
    };
    let files = index.files();
    assert!(files.is_sorted_by(|one, next| one < next), "each once, sorted");
    assert!(index.weight_map.values().all(|file| files.binary_search(file).is_ok()));

    let text = serde_json::json!({"weight_map": index.weight_map.iter().map(|(fqn, file)| (fqn.to_string(), file)).collect::<BTreeMap<_, _>>()});
    let again = parse_index_json(NAME, text.to_string().as_bytes()).expect("what was written from a good index");
    assert_eq!(again, index);

    let merged = merge(headers(&index, &files), Some(&index)).expect("headers with exactly its tensors");
    assert_eq!(merged.tensors.len(), index.weight_map.len());
    for (fqn, file) in &index.weight_map {
        assert_eq!(merged.file_name(merged.tensors[fqn].file), file);
    }
    let Some((fqn, file)) = index.weight_map.first_key_value() else { return };
    let at = files.binary_search(file).expect("it is one of them");
    let mut lacking = headers(&index, &files);
    lacking[at].1.tensors.remove(fqn);
    assert!(matches!(merge(lacking, Some(&index)), Err(FormatError::NotInFile { .. })));
    let mut absent = headers(&index, &files);
    absent.remove(at);
    assert!(matches!(merge(absent, Some(&index)), Err(FormatError::MissingFile { .. })));
    let mut more = headers(&index, &files);
    let other: Fqn = format!("{fqn}.{}", index.weight_map.len()).into();
    if !index.weight_map.contains_key(&other) {
        more[at].1.tensors.insert(other, tensor());
        assert!(matches!(merge(more, Some(&index)), Err(FormatError::NotInIndex { .. })));
    }
});

fn tensor() -> HeaderTensor {
    HeaderTensor { dtype: DType::U8, shape: Shape(vec![0]), range: ByteRange::default(), extra: BTreeMap::new() }
}

fn headers(index: &IndexJson, files: &[String]) -> Vec<(FileEntry, Header)> {
    let header = |file: &String| {
        let tensors = index.weight_map.iter().filter(|(_, other)| *other == file);
        let tensors = tensors.map(|(fqn, _)| (fqn.clone(), tensor())).collect();
        (FileEntry { name: file.clone(), len_bytes: 0 }, Header { tensors, ..Header::default() })
    };
    files.iter().map(header).collect()
}
