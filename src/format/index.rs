//! One index over the files of a model, and the JSON index of a sharded one.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::json::Pairs;
use super::{Encoding, FileEntry, FormatError, Header, ModelIndex, TensorEntry};
use crate::types::{Fqn, as_usize};

/// `model.safetensors.index.json`: which tensor is in which file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexJson {
    /// The index file's name, for messages.
    pub name: String,
    /// Tensor to file.
    pub weight_map: BTreeMap<Fqn, String>,
}

impl IndexJson {
    /// The files that the index names, each once, sorted.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        let unique: BTreeSet<&String> = self.weight_map.values().collect();
        unique.into_iter().cloned().collect()
    }
}

/// Reads a sharded model's index. The names in it are not checked here: the caller must confine them to its directory.
///
/// # Errors
/// [`FormatError::Json`] and [`FormatError::DuplicateKey`].
pub fn parse_index_json(name: &str, bytes: &[u8]) -> Result<IndexJson, FormatError> {
    #[derive(Deserialize)]
    struct Raw {
        weight_map: Pairs<String>,
    }
    let raw: Raw =
        serde_json::from_slice(bytes).map_err(|source| FormatError::Json { file: name.to_owned(), source })?;
    if let Some(key) = raw.weight_map.duplicate() {
        let object = "weight_map".to_owned();
        return Err(FormatError::DuplicateKey { file: name.to_owned(), key: key.to_owned(), object });
    }
    let weight_map = raw.weight_map.0.into_iter().map(|(fqn, file)| (fqn.into(), file)).collect();
    Ok(IndexJson { name: name.to_owned(), weight_map })
}

/// Merges the headers of a model's files. With an index, it and the headers must name the same tensors.
///
/// # Errors
/// [`FormatError::TensorTwice`], [`FormatError::MissingFile`], [`FormatError::NotInFile`], [`FormatError::NotInIndex`].
pub fn merge(files: Vec<(FileEntry, Header)>, weight_map: Option<&IndexJson>) -> Result<ModelIndex, FormatError> {
    let mut merged = ModelIndex::default();
    for (number, (entry, header)) in (0_u32..).zip(files) {
        for (fqn, tensor) in header.tensors {
            let here = TensorEntry {
                dtype: tensor.dtype,
                shape: tensor.shape,
                file: number,
                range: tensor.range,
                encoding: Encoding::Plain,
            };
            if let Some(other) = merged.tensors.insert(fqn.clone(), here) {
                let first = merged.file_name(other.file).to_owned();
                return Err(FormatError::TensorTwice { tensor: fqn.to_string(), first, second: entry.name });
            }
        }
        // The metadata of all files together; the files of one model agree where they share a key.
        merged.metadata.extend(header.metadata);
        merged.files.push(entry);
    }
    if let Some(index) = weight_map {
        check_index(&merged, index)?;
    }
    Ok(merged)
}

fn check_index(merged: &ModelIndex, index: &IndexJson) -> Result<(), FormatError> {
    let names: BTreeSet<&str> = merged.files.iter().map(|file| file.name.as_str()).collect();
    for (fqn, name) in &index.weight_map {
        let (index, tensor, file) = (index.name.clone(), fqn.to_string(), name.clone());
        if !names.contains(name.as_str()) {
            return Err(FormatError::MissingFile { index, file, tensor });
        }
        let found = merged.tensors.get(fqn).map(|tensor| merged.file_name(tensor.file));
        if found != Some(name) {
            return Err(FormatError::NotInFile { index, tensor, file });
        }
    }
    match merged.tensors.iter().find(|(fqn, _)| !index.weight_map.contains_key(*fqn)) {
        None => Ok(()),
        Some((fqn, tensor)) => Err(FormatError::NotInIndex {
            index: index.name.clone(),
            tensor: fqn.to_string(),
            file: merged.file_name(tensor.file).to_owned(),
        }),
    }
}

impl ModelIndex {
    /// The bytes of all tensors as they are stored.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(TensorEntry::stored_bytes).sum()
    }

    /// The name of a file, for messages; empty when `file` is no index into [`ModelIndex::files`].
    #[must_use]
    pub fn file_name(&self, file: u32) -> &str {
        self.files.get(as_usize(u64::from(file))).map_or("", |entry| &entry.name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::safetensors::{build_header, parse_header};
    use super::*;
    use crate::types::{DType, Shape, as_u64};

    fn file(name: &str, tensors: &[&str]) -> (FileEntry, Header) {
        let tensors: Vec<_> = tensors.iter().map(|&name| (name.into(), DType::U8, Shape::from([1]))).collect();
        let bytes = build_header(&tensors, &[("format", "pt")]).expect("a small header");
        let len_bytes = as_u64(bytes.len() + tensors.len());
        let header = parse_header(name, &bytes[8..], len_bytes).expect("our own header");
        (FileEntry { name: name.to_owned(), len_bytes }, header)
    }

    #[test]
    fn files_merge_and_must_agree_with_the_index() {
        let files = || vec![file("1.safetensors", &["a", "b"]), file("2.safetensors", &["c"])];
        let merged = merge(files(), None).expect("two good files");
        assert_eq!(merged.tensors["c"].file, 1);
        assert_eq!((merged.total_bytes(), merged.metadata["format"].as_str()), (3, "pt"));

        let check = |weight_map: &str, expected: &str| {
            let json = format!(r#"{{"metadata":{{"total_size":3}},"weight_map":{weight_map}}}"#);
            let index = parse_index_json("index.json", json.as_bytes());
            let found = index.and_then(|index| merge(files(), Some(&index)));
            let message = found.map_or_else(|error| error.to_string(), |_| "fine".to_owned());
            assert!(message.contains(expected), "{weight_map}: {message}");
        };
        check(r#"{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}"#, "fine");
        check(r#"{"a":"1.safetensors","b":"1.safetensors","c":"1.safetensors"}"#, "puts tensor c into 1.safetensors");
        check(r#"{"a":"1.safetensors","c":"2.safetensors"}"#, "does not name tensor b, which stands in 1.safetensors");
        check(r#"{"a":"9.safetensors"}"#, "names 9.safetensors (for tensor a), which is missing");
        check(r#"{"a":"1.safetensors","a":"2.safetensors"}"#, "key \"a\" stands twice in weight_map");
        check(r#"{"a":1}"#, "header cannot be read");
    }

    #[test]
    fn a_tensor_in_two_files_is_refused_with_both_names() {
        let files = vec![file("1.safetensors", &["a"]), file("2.safetensors", &["a"])];
        let message = merge(files, None).expect_err("twice").to_string();
        assert_eq!(message, "tensor a stands in two files: 1.safetensors and 2.safetensors");
    }
}
