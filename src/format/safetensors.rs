//! The safetensors header: u64 little-endian length, a JSON object, then the tensors without holes.
//!
//! Source of the rules: the safetensors crate 0.8. Unknown fields of a tensor are tolerated and kept, as other readers
//! tolerate them; unknown dtypes are not.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::FormatError;
use super::json::Pairs;
use crate::types::{ByteRange, DType, Fqn, Shape, ShapeOverflow, as_u64};

/// A longer header is refused: the limit of the safetensors crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes before the JSON.
pub const LENGTH_BYTES: u64 = 8;

/// The data starts at a multiple of this many bytes, as the safetensors crate writes it.
const HEADER_ALIGN_BYTES: usize = 8;

const METADATA: &str = "__metadata__";

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors.
    pub tensors: BTreeMap<Fqn, HeaderTensor>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// One tensor of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderTensor {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Shape,
    /// Its bytes, from the file's start.
    pub range: ByteRange,
    /// Fields beyond `dtype`, `shape` and `data_offsets`, such as a digest; mostly empty.
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// The length of the JSON that follows, from the first eight bytes of a file of `file_bytes`.
///
/// # Errors
/// [`FormatError::Truncated`] and [`FormatError::HeaderTooLong`].
pub fn header_len(file: &str, first: &[u8], file_bytes: u64) -> Result<u64, FormatError> {
    let truncated =
        |expected_bytes| FormatError::Truncated { file: file.to_owned(), expected_bytes, found_bytes: file_bytes };
    let length = *first.first_chunk::<8>().ok_or_else(|| truncated(LENGTH_BYTES))?;
    let found_bytes = u64::from_le_bytes(length);
    if found_bytes > MAX_HEADER_BYTES {
        let limit_bytes = MAX_HEADER_BYTES;
        return Err(FormatError::HeaderTooLong { file: file.to_owned(), limit_bytes, found_bytes });
    }
    if found_bytes + LENGTH_BYTES > file_bytes {
        return Err(truncated(found_bytes + LENGTH_BYTES));
    }
    Ok(found_bytes)
}

/// Reads the JSON of a header, which must be all of it, and checks every tensor against the file's length (`FO-1`).
///
/// # Errors
/// [`FormatError`], naming file and tensor.
pub fn parse_header(file: &str, json: &[u8], file_bytes: u64) -> Result<Header, FormatError> {
    if as_u64(json.len()) > MAX_HEADER_BYTES {
        let (limit_bytes, found_bytes) = (MAX_HEADER_BYTES, as_u64(json.len()));
        return Err(FormatError::HeaderTooLong { file: file.to_owned(), limit_bytes, found_bytes });
    }
    if json.first() != Some(&b'{') {
        let found = json.first().copied().unwrap_or_default();
        return Err(FormatError::HeaderStart { file: file.to_owned(), found });
    }
    let entries: Entries =
        serde_json::from_slice(json).map_err(|source| FormatError::Json { file: file.to_owned(), source })?;
    entries.check_duplicates(file)?;
    let data_start = LENGTH_BYTES + as_u64(json.len());
    let Some(data_bytes) = file_bytes.checked_sub(data_start) else {
        return Err(FormatError::Truncated {
            file: file.to_owned(),
            expected_bytes: data_start,
            found_bytes: file_bytes,
        });
    };
    let mut header = Header::default();
    for Pairs(pairs) in entries.metadata {
        header.metadata.extend(pairs);
    }
    let data = Data { file, start: data_start, bytes: data_bytes };
    for (name, raw) in entries.tensors.0 {
        let tensor = data.check_tensor(&name, raw)?;
        header.tensors.insert(name.into(), tensor);
    }
    data.check_contiguous(&header)?;
    Ok(header)
}

/// The JSON of a header before any check, duplicates included.
#[derive(Debug)]
struct Entries {
    tensors: Pairs<RawTensor>,
    metadata: Vec<Pairs<String>>,
}

impl Entries {
    fn check_duplicates(&self, file: &str) -> Result<(), FormatError> {
        let error = |key: &str, object: &str| {
            Err(FormatError::DuplicateKey { file: file.to_owned(), key: key.to_owned(), object: object.to_owned() })
        };
        if self.metadata.len() > 1 {
            return error(METADATA, "the header");
        }
        if let Some(key) = self.tensors.duplicate() {
            return error(key, "the header");
        }
        if let Some(key) = self.metadata.iter().find_map(Pairs::duplicate) {
            return error(key, METADATA);
        }
        match self.tensors.0.iter().find_map(|(name, raw)| Some((name, raw.duplicate.as_deref()?))) {
            Some((name, key)) => error(key, &format!("tensor {name}")),
            None => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Entries, A::Error> {
                let mut entries = Entries { tensors: Pairs(Vec::new()), metadata: Vec::new() };
                while let Some(key) = access.next_key::<String>()? {
                    if key == METADATA {
                        entries.metadata.push(access.next_value()?);
                    } else {
                        let tensor = access.next_value().map_err(|error| name_tensor(&key, &error))?;
                        entries.tensors.0.push((key, tensor));
                    }
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

fn name_tensor<E: serde::de::Error>(tensor: &str, error: &E) -> E {
    E::custom(format_args!("tensor {tensor}: {error}"))
}

/// One tensor's entry before any check.
#[derive(Debug, Default)]
struct RawTensor {
    dtype: Option<String>,
    shape: Option<Vec<u64>>,
    data_offsets: Option<[u64; 2]>,
    extra: BTreeMap<String, serde_json::Value>,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TensorVisitor;
        impl<'de> Visitor<'de> for TensorVisitor {
            type Value = RawTensor;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<RawTensor, A::Error> {
                let mut raw = RawTensor::default();
                while let Some(key) = access.next_key::<String>()? {
                    let twice = match key.as_str() {
                        "dtype" => raw.dtype.replace(access.next_value()?).is_some(),
                        "shape" => raw.shape.replace(access.next_value()?).is_some(),
                        "data_offsets" => raw.data_offsets.replace(access.next_value()?).is_some(),
                        _ => raw.extra.insert(key.clone(), access.next_value()?).is_some(),
                    };
                    if twice {
                        raw.duplicate = Some(key);
                    }
                }
                Ok(raw)
            }
        }
        deserializer.deserialize_map(TensorVisitor)
    }
}

/// The part of the file after the header.
#[derive(Clone, Copy, Debug)]
struct Data<'a> {
    file: &'a str,
    start: u64,
    bytes: u64,
}

impl Data<'_> {
    fn check_tensor(self, name: &str, raw: RawTensor) -> Result<HeaderTensor, FormatError> {
        let (file, tensor) = (self.file.to_owned(), name.to_owned());
        let missing = |field| FormatError::MissingField { file: self.file.to_owned(), tensor: name.to_owned(), field };
        let dtype = raw.dtype.ok_or_else(|| missing("dtype"))?;
        let [start, end] = raw.data_offsets.ok_or_else(|| missing("data_offsets"))?;
        let shape = Shape(raw.shape.ok_or_else(|| missing("shape"))?);
        // Only safetensors' own names: a header with PyTorch's is not one that other readers take.
        let Some(dtype) = DType::ALL.into_iter().find(|known| known.name() == dtype) else {
            return Err(FormatError::UnknownDType { file, tensor, found: dtype });
        };
        let Some(within) = ByteRange::new(start, end) else {
            return Err(FormatError::Reversed { file, tensor, start, end });
        };
        // `end` is at most the data's length, so adding the data's start cannot pass the file's length.
        let absolute = self.start.checked_add(start).filter(|_| end <= self.bytes);
        let Some(range) = absolute.and_then(|start| ByteRange::with_len(start, within.len())) else {
            return Err(FormatError::OutOfRange { file, tensor, start, end, data_bytes: self.bytes });
        };
        let expected_bytes = match shape.bytes(dtype) {
            Ok(bytes) => bytes,
            Err(source) => return Err(FormatError::Shape { file, tensor, source }),
        };
        let found_bytes = within.len();
        if expected_bytes != found_bytes {
            return Err(FormatError::Size { file, tensor, dtype, shape, expected_bytes, found_bytes });
        }
        Ok(HeaderTensor { dtype, shape, range, extra: raw.extra })
    }

    /// In the order of their offsets, each tensor starts where the one before it ends, and the last one ends the file.
    fn check_contiguous(self, header: &Header) -> Result<(), FormatError> {
        let mut in_order: Vec<(ByteRange, &Fqn)> =
            header.tensors.iter().map(|(name, tensor)| (tensor.range, name)).collect();
        in_order.sort_unstable();
        let mut next = self.start;
        let mut previous: Option<&Fqn> = None;
        for (range, name) in in_order {
            if range.start() != next {
                return Err(self.gap(name, range, next, previous));
            }
            next = range.end();
            previous = Some(name);
        }
        let found_bytes = self.start + self.bytes;
        if next != found_bytes {
            return Err(FormatError::TrailingBytes { file: self.file.to_owned(), expected_bytes: next, found_bytes });
        }
        Ok(())
    }

    fn gap(self, name: &Fqn, range: ByteRange, next: u64, previous: Option<&Fqn>) -> FormatError {
        let (file, tensor) = (self.file.to_owned(), name.to_string());
        let overlaps = range.start() < next;
        let range = ByteRange::with_len(range.start() - self.start, range.len()).unwrap_or_default();
        let expected_start = next - self.start;
        let previous = previous.map_or_else(|| "the header".to_owned(), |name| format!("tensor {name}"));
        if overlaps {
            FormatError::Overlap { file, tensor, range, expected_start, previous }
        } else {
            FormatError::Hole { file, tensor, range, expected_start, previous }
        }
    }
}

/// A whole header, length included, for `tensors` in this order, padded with spaces so that the data is aligned.
/// Names must differ from one another.
///
/// # Errors
/// [`ShapeOverflow`] when the tensors have more bytes than 64 bits can count.
pub fn build_header(tensors: &[(Fqn, DType, Shape)], metadata: &[(&str, &str)]) -> Result<Vec<u8>, ShapeOverflow> {
    let mut layout = Vec::with_capacity(tensors.len());
    let mut start = 0_u64;
    for (name, dtype, shape) in tensors {
        let end = start.checked_add(shape.bytes(*dtype)?).ok_or_else(|| ShapeOverflow { shape: shape.clone() })?;
        layout.push((name, TensorJson { dtype: dtype.name(), shape, data_offsets: [start, end] }));
        start = end;
    }
    let mut json = serde_json::to_vec(&HeaderJson { metadata, tensors: &layout })
        .expect("strings and integers always become JSON");
    json.resize(json.len().next_multiple_of(HEADER_ALIGN_BYTES), b' ');
    let mut bytes = as_u64(json.len()).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

#[derive(Serialize)]
struct TensorJson<'a> {
    dtype: &'static str,
    shape: &'a Shape,
    data_offsets: [u64; 2],
}

/// Written by hand so that the order of the keys is ours, whatever map type serde_json is built with.
struct HeaderJson<'a> {
    metadata: &'a [(&'a str, &'a str)],
    tensors: &'a [(&'a Fqn, TensorJson<'a>)],
}

impl Serialize for HeaderJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            let metadata: BTreeMap<&str, &str> = self.metadata.iter().copied().collect();
            map.serialize_entry(METADATA, &metadata)?;
        }
        for (name, tensor) in self.tensors {
            map.serialize_entry(name, tensor)?;
        }
        map.end()
    }
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
