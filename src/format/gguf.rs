//! The header of a GGUF file, versions 2 and 3, little-endian (the format's description stands in ggml, docs/gguf.md).
//!
//! Owns: the parser with its limits, in `names` the way from llama.cpp's keys to Hugging Face's, in `tensor_names` that of
//! names in both directions, and in `write` the header of a new file.
//! Refuses to know: how the file is read, and what blocks decode to.
//!
//! `GG-1`: nothing is allocated by a count that the file gives; memory grows with the bytes that are really there.
//! `GG-2`: tensors lie one after the other in the file, each at the next aligned byte, and none leaves the file.

mod copy;
mod names;
mod tensor_names;
mod write;

use std::collections::{BTreeMap, BTreeSet};

pub use copy::raw_values;
pub use names::{LLAMA3_KEYS, LLAMA3_LENGTH, ROPE_FACTORS};
pub use tensor_names::{LlamaCppName, llama_cpp_name};
pub use write::{HeaderValue, NewFileLayout, NewTensor, layout};

use super::{FormatError, GgmlType, ModelIndex};
use crate::types::{ByteRange, as_u64, as_usize};

/// How much of a file to read first. Tokenizers of 128,000 tokens take about 8 MiB, of 32,000 less than 1 MiB.
pub const FIRST_HEAD_BYTES: u64 = 2 << 20;

/// A longer header is refused; the longest published ones, of 256,000 tokens, have less than 20 MiB.
pub const MAX_HEAD_BYTES: u64 = 256 << 20;

/// Each further attempt reads this many times more than the one before.
const HEAD_GROWTH: u64 = 4;

/// More tensors, or more keys, are refused. The largest published models have some thousands.
const MAX_ENTRIES: u64 = 1 << 20;
/// ggml has no tensor of more dims.
const MAX_DIMS: u32 = 4;
/// Names and keys are shorter: ggml's limits are 64 and 65,535 bytes.
const MAX_NAME_BYTES: u64 = 65_535;
/// Texts that are longer are skipped, such as chat templates; none of them says anything about weights.
const MAX_TEXT_BYTES: u64 = 1024;
/// Arrays within arrays, which no writer makes, end here.
const MAX_NESTING: u32 = 4;
/// Data and tensors start at multiples of this many bytes, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// What a GGUF file's header says.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    values: BTreeMap<String, Value>,
    /// In the order of their bytes.
    tensors: Vec<Tensor>,
    file_bytes: u64,
}

/// What the beginning of a file held.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufHead {
    /// The whole header.
    Whole(Gguf),
    /// Only a part: read this many bytes from the file's start and parse again.
    Longer {
        /// Bytes to read, from the file's start; at most [`MAX_HEAD_BYTES`] and the file's length.
        read_bytes: u64,
    },
}

#[derive(Clone, Debug, PartialEq)]
struct Tensor {
    name: String,
    /// Innermost first, as ggml has them.
    dims: Vec<u64>,
    ggml_type: GgmlType,
    /// From the file's start.
    range: ByteRange,
}

/// A value of the header. Arrays and long texts are skipped.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Unsigned(u64),
    Float(f64),
    Bool(bool),
    Text(String),
    Skipped,
}

/// Parses the header in the first bytes of a file of `file_bytes`. To begin with, give [`FIRST_HEAD_BYTES`] of it, or all
/// of a shorter file; as long as the answer is [`GgufHead::Longer`], give what it asks for.
///
/// # Errors
/// [`FormatError`], naming file and tensor, when the header is damaged, too long, or of a version or type not known.
pub fn parse(file: &str, head: &[u8], file_bytes: u64) -> Result<GgufHead, FormatError> {
    let mut cursor = Cursor { file, head, position: 0, file_bytes };
    match header(&mut cursor) {
        Ok(gguf) => Ok(GgufHead::Whole(gguf)),
        Err(Stop::Damage(error)) => Err(error),
        Err(Stop::Short { expected_bytes }) => {
            let found_bytes = as_u64(head.len());
            let file = file.to_owned();
            if expected_bytes > file_bytes || found_bytes >= file_bytes {
                return Err(FormatError::Truncated { file, expected_bytes, found_bytes: file_bytes });
            }
            if expected_bytes > MAX_HEAD_BYTES {
                let limit_bytes = MAX_HEAD_BYTES;
                return Err(FormatError::HeaderTooLong { file, limit_bytes, found_bytes: expected_bytes });
            }
            let more = found_bytes.saturating_mul(HEAD_GROWTH).max(expected_bytes).max(FIRST_HEAD_BYTES);
            Ok(GgufHead::Longer { read_bytes: more.min(MAX_HEAD_BYTES).min(file_bytes) })
        }
    }
}

impl Gguf {
    /// The index with Hugging Face's names and shapes, and a config.json made of the header.
    ///
    /// # Errors
    /// Those of [`Gguf::index`] and [`Gguf::config_json`].
    pub fn into_index(self, file: &str) -> Result<(ModelIndex, String), FormatError> {
        Ok((self.index(file)?, self.config_json(file)?))
    }
}

fn header(cursor: &mut Cursor<'_>) -> Result<Gguf, Stop> {
    if cursor.take(4)? != b"GGUF" {
        return Err(cursor.damage("expected a file that begins with GGUF"));
    }
    let version = cursor.u32()?;
    if !matches!(version, 2 | 3) {
        return Err(cursor.damage(format!("GGUF version {version}: expected 2 or 3, little-endian")));
    }
    let (tensor_count, value_count) = (cursor.count("tensors")?, cursor.count("keys")?);
    let mut values = BTreeMap::new();
    for _ in 0..value_count {
        let key = cursor.name("key")?;
        let value_type = cursor.u32()?;
        let value = cursor.value(&key, value_type, 0)?;
        if values.insert(key.clone(), value).is_some() {
            let (file, object) = (cursor.file.to_owned(), "the header".to_owned());
            return Err(Stop::Damage(FormatError::DuplicateKey { file, key, object }));
        }
    }
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.push(cursor.tensor()?);
    }
    let alignment = match values.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(&Value::Unsigned(size)) if size.is_power_of_two() && size <= MAX_ALIGNMENT => size,
        Some(other) => {
            return Err(cursor.damage(format!("general.alignment: expected a power of 2 up to 2^20, found {other:?}")));
        }
    };
    let layout = Layout { file: cursor.file, file_bytes: cursor.file_bytes, alignment };
    let tensors = layout.place(as_u64(cursor.position), tensors)?;
    Ok(Gguf { values, tensors, file_bytes: cursor.file_bytes })
}

/// Why parsing stopped.
#[derive(Debug)]
enum Stop {
    /// The bytes given end before the header does.
    Short {
        expected_bytes: u64,
    },
    Damage(FormatError),
}

impl From<FormatError> for Stop {
    fn from(error: FormatError) -> Self {
        Self::Damage(error)
    }
}

/// A tensor's entry before its place is checked.
#[derive(Debug)]
struct Entry {
    name: String,
    dims: Vec<u64>,
    ggml_type: GgmlType,
    bytes: u64,
    /// From the start of the data.
    offset: u64,
}

struct Cursor<'a> {
    file: &'a str,
    head: &'a [u8],
    position: usize,
    file_bytes: u64,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: u64) -> Result<&'a [u8], Stop> {
        let expected_bytes = as_u64(self.position).saturating_add(bytes);
        let found = self.head.get(self.position..as_usize(expected_bytes)).ok_or(Stop::Short { expected_bytes })?;
        self.position = as_usize(expected_bytes);
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        Ok(*self.take(as_u64(N))?.first_chunk().expect("take gives as many bytes as asked for"))
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_le_bytes)
    }

    fn damage(&self, what: impl Into<String>) -> Stop {
        Stop::Damage(FormatError::Gguf { file: self.file.to_owned(), what: what.into() })
    }

    fn count(&mut self, what: &str) -> Result<u64, Stop> {
        match self.u64()? {
            count if count > MAX_ENTRIES => Err(self.damage(format!("{count} {what}: expected at most {MAX_ENTRIES}"))),
            count => Ok(count),
        }
    }

    /// The name of a key or tensor.
    fn name(&mut self, what: &str) -> Result<String, Stop> {
        let bytes = self.u64()?;
        if bytes > MAX_NAME_BYTES {
            return Err(self.damage(format!("{what} of {bytes} bytes: expected at most {MAX_NAME_BYTES}")));
        }
        let text = self.take(bytes)?;
        std::str::from_utf8(text).map(str::to_owned).map_err(|error| self.damage(format!("name of a {what}: {error}")))
    }

    /// A value of one of the format's thirteen types.
    fn value(&mut self, key: &str, value_type: u32, nesting: u32) -> Result<Value, Stop> {
        // A negative number stands for none of the figures that are needed; as a huge one it is refused where it is used.
        let signed = |number: i64| Value::Unsigned(u64::try_from(number).unwrap_or(u64::MAX));
        Ok(match value_type {
            0 => Value::Unsigned(self.array().map(u8::from_le_bytes)?.into()),
            1 => signed(self.array().map(i8::from_le_bytes)?.into()),
            2 => Value::Unsigned(self.array().map(u16::from_le_bytes)?.into()),
            3 => signed(self.array().map(i16::from_le_bytes)?.into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => signed(self.array().map(i32::from_le_bytes)?.into()),
            6 => Value::Float(shortest(self.array().map(f32::from_le_bytes)?)),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => {
                let bytes = self.u64()?;
                match std::str::from_utf8(self.take(bytes)?) {
                    Ok(text) if bytes <= MAX_TEXT_BYTES => Value::Text(text.to_owned()),
                    _ => Value::Skipped,
                }
            }
            9 => self.skip_array(key, nesting)?,
            10 => Value::Unsigned(self.u64()?),
            11 => signed(self.array().map(i64::from_le_bytes)?),
            12 => Value::Float(self.array().map(f64::from_le_bytes)?),
            other => return Err(self.damage(format!("key {key}: unknown value type {other}"))),
        })
    }

    fn skip_array(&mut self, key: &str, nesting: u32) -> Result<Value, Stop> {
        if nesting == MAX_NESTING {
            return Err(self.damage(format!("key {key}: more than {MAX_NESTING} arrays within one another")));
        }
        let (element_type, count) = (self.u32()?, self.u64()?);
        let element_bytes = match element_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            // Each element takes at least 8 bytes, so the loop ends with the bytes, whatever the count says.
            8 | 9 => {
                for _ in 0..count {
                    if element_type == 9 {
                        self.skip_array(key, nesting + 1)?;
                    } else {
                        let bytes = self.u64()?;
                        self.take(bytes)?;
                    }
                }
                0
            }
            other => return Err(self.damage(format!("key {key}: unknown element type {other}"))),
        };
        self.take(count.saturating_mul(element_bytes))?;
        Ok(Value::Skipped)
    }

    fn tensor(&mut self) -> Result<Entry, Stop> {
        let name = self.name("tensor")?;
        let dim_count = self.u32()?;
        if !(1..=MAX_DIMS).contains(&dim_count) {
            return Err(self.damage(format!("tensor {name}: {dim_count} dims, expected 1 to {MAX_DIMS}")));
        }
        let mut dims = Vec::new();
        for _ in 0..dim_count {
            dims.push(self.u64()?);
        }
        let (type_id, offset) = (self.u32()?, self.u64()?);
        let Some(ggml_type) = GgmlType::from_id(type_id) else {
            let (file, found) = (self.file.to_owned(), format!("ggml type {type_id}"));
            return Err(Stop::Damage(FormatError::UnknownDType { file, tensor: name, found }));
        };
        // Blocks do not reach over the end of a row.
        let row = dims.first().copied().filter(|row| row.is_multiple_of(ggml_type.block_elements()));
        let rows = dims.iter().skip(1).try_fold(1_u64, |product, &size| product.checked_mul(size));
        let elements = row.zip(rows).and_then(|(row, rows)| row.checked_mul(rows)).filter(|&elements| elements > 0);
        let Some(bytes) = elements.and_then(|elements| ggml_type.bytes_for(elements).ok()) else {
            let (kind, block) = (ggml_type.name(), ggml_type.block_elements());
            let what = format!("tensor {name}: dims {dims:?} are not rows of whole {kind} blocks of {block} elements");
            return Err(self.damage(what));
        };
        Ok(Entry { name, dims, ggml_type, bytes, offset })
    }
}

/// The number that is written with the fewest digits, so that an f32 of 1e-5 is 1e-5 and not 9.999999747378752e-6.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or_else(|_| f64::from(number))
}

/// Where tensors may lie.
#[derive(Clone, Copy, Debug)]
struct Layout<'a> {
    file: &'a str,
    file_bytes: u64,
    alignment: u64,
}

impl Layout<'_> {
    /// Checks `GG-2` and gives the tensors in the order of their bytes.
    fn place(self, header_bytes: u64, mut entries: Vec<Entry>) -> Result<Vec<Tensor>, FormatError> {
        let file = || self.file.to_owned();
        // The header was read from the file, so it ends long before 2^64.
        let data_start = header_bytes.next_multiple_of(self.alignment);
        let data_bytes = self.file_bytes.saturating_sub(data_start);
        entries.sort_by_key(|entry| entry.offset);
        let mut names = BTreeSet::new();
        let (mut next, mut previous) = (0_u64, "the header".to_owned());
        let mut tensors = Vec::new();
        for Entry { name, dims, ggml_type, bytes, offset } in entries {
            let tensor = name.clone();
            if !names.insert(name.clone()) {
                return Err(FormatError::DuplicateKey { file: file(), key: name, object: "the tensors".to_owned() });
            }
            let Some(within) = ByteRange::with_len(offset, bytes).filter(|range| range.end() <= data_bytes) else {
                let end = offset.saturating_add(bytes);
                return Err(FormatError::OutOfRange { file: file(), tensor, start: offset, end, data_bytes });
            };
            let expected_start = next.next_multiple_of(self.alignment);
            if offset < next {
                let range = within;
                return Err(FormatError::Overlap { file: file(), tensor, range, expected_start, previous });
            }
            if offset != expected_start {
                let range = within;
                return Err(FormatError::Hole { file: file(), tensor, range, expected_start, previous });
            }
            let range = ByteRange::with_len(data_start + offset, bytes).expect("it ends within the file");
            next = within.end();
            previous = format!("tensor {name}");
            tensors.push(Tensor { name, dims, ggml_type, range });
        }
        if data_bytes > next.next_multiple_of(self.alignment) {
            let (expected_bytes, found_bytes) = (data_start + next, self.file_bytes);
            return Err(FormatError::TrailingBytes { file: file(), expected_bytes, found_bytes });
        }
        Ok(tensors)
    }
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
