//! A GGUF file's header, version 3, as bytes: the counterpart of the parser.
//!
//! Owns: the layout of keys and tensors. Refuses to know: which keys a model has, and how the data is written.
//!
//! `GW-1`: every place is known from names, dims and types alone, before a byte of data is there; what [`layout`] gives,
//! [`super::parse`] accepts.

use std::collections::BTreeSet;

use super::{DEFAULT_ALIGNMENT, MAX_DIMS, MAX_ENTRIES};
use crate::format::{FormatError, GgmlType};
use crate::types::{ByteRange, as_u64, as_usize};

/// ggml keeps a name in so many bytes, the last of which is zero.
const MAX_TENSOR_NAME_BYTES: usize = 63;

const VERSION: u32 = 3;

/// A value of the header.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the types'")]
pub enum HeaderValue {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    Texts(Vec<String>),
    /// A value as another file has it: the number of its type, and its bytes.
    Raw(u32, Vec<u8>),
}

/// A tensor that the file is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name in llama.cpp.
    pub name: String,
    /// Innermost first, as ggml has them: 1 to 4.
    pub dims: Vec<u64>,
    /// The type of its blocks; rows are whole blocks.
    pub ggml_type: GgmlType,
}

/// A file whose data is not written yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFileLayout {
    /// The first bytes, up to the data.
    pub header: Vec<u8>,
    /// Where each tensor's bytes lie, from the file's start, in the order given.
    pub places: Vec<ByteRange>,
    /// The file's length; what lies between tensors is zero.
    pub file_bytes: u64,
}

/// Lays out a file of these keys and tensors, which lie one after the other in the order given.
///
/// # Errors
/// [`FormatError::Gguf`] for more than 4 dims, rows that are no whole blocks, names that are too long, and sizes that do not
/// fit; [`FormatError::DuplicateKey`] for a name that is there twice.
pub fn layout(
    file: &str,
    values: &[(String, HeaderValue)],
    tensors: &[NewTensor],
) -> Result<NewFileLayout, FormatError> {
    let mut header = b"GGUF".to_vec();
    header.extend(VERSION.to_le_bytes());
    for (what, count) in [("tensors", tensors.len()), ("keys", values.len())] {
        if as_u64(count) > MAX_ENTRIES {
            let what = format!("{count} {what}: expected at most {MAX_ENTRIES}");
            return Err(FormatError::Gguf { file: file.to_owned(), what });
        }
        header.extend(as_u64(count).to_le_bytes());
    }
    once(file, "the header", values.iter().map(|(key, _)| key))?;
    once(file, "the tensors", tensors.iter().map(|tensor| &tensor.name))?;
    for (key, value) in values {
        text(&mut header, key);
        value.encode(&mut header);
    }
    let (mut within, mut end) = (Vec::with_capacity(tensors.len()), 0_u64);
    for tensor in tensors {
        let bytes = tensor.bytes(file)?;
        let start = end.next_multiple_of(DEFAULT_ALIGNMENT);
        let range = ByteRange::with_len(start, bytes).filter(|range| range.end() <= u64::MAX / 4);
        let range = range.ok_or_else(|| tensor.error(file, "its bytes lie beyond the largest file".to_owned()))?;
        tensor.encode(&mut header, start);
        within.push(range);
        end = range.end();
    }
    header.resize(as_usize(as_u64(header.len()).next_multiple_of(DEFAULT_ALIGNMENT)), 0);
    let start = as_u64(header.len());
    let place = |range: &ByteRange| ByteRange::with_len(start + range.start(), range.len()).unwrap_or_default();
    let places = within.iter().map(place).collect();
    Ok(NewFileLayout { header, places, file_bytes: start + end.next_multiple_of(DEFAULT_ALIGNMENT) })
}

fn once<'a>(file: &str, object: &str, names: impl Iterator<Item = &'a String>) -> Result<(), FormatError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            let (file, object) = (file.to_owned(), object.to_owned());
            return Err(FormatError::DuplicateKey { file, key: name.clone(), object });
        }
    }
    Ok(())
}

impl NewTensor {
    /// Bytes of all its rows.
    ///
    /// # Errors
    /// [`FormatError::Gguf`] where they are none that a file can have.
    pub fn bytes(&self, file: &str) -> Result<u64, FormatError> {
        if self.name.len() > MAX_TENSOR_NAME_BYTES {
            let found = self.name.len();
            return Err(
                self.error(file, format!("its name: expected at most {MAX_TENSOR_NAME_BYTES} bytes, found {found}"))
            );
        }
        let found = self.dims.len();
        if !(1..=as_usize(u64::from(MAX_DIMS))).contains(&found) {
            return Err(self.error(file, format!("expected 1 to {MAX_DIMS} dims, found {found}")));
        }
        let (kind, block) = (self.ggml_type.name(), self.ggml_type.block_elements());
        let row = self.dims.first().copied().filter(|row| row.is_multiple_of(block));
        let elements = row.and_then(|_| self.dims.iter().try_fold(1_u64, |product, &size| product.checked_mul(size)));
        let bytes = elements.filter(|&elements| elements > 0).and_then(|all| self.ggml_type.bytes_for(all).ok());
        bytes.ok_or_else(|| {
            self.error(file, format!("expected rows of whole {kind} blocks of {block}, found dims {:?}", self.dims))
        })
    }

    fn error(&self, file: &str, what: String) -> FormatError {
        FormatError::Gguf { file: file.to_owned(), what: format!("tensor {}: {what}", self.name) }
    }

    fn encode(&self, into: &mut Vec<u8>, offset: u64) {
        text(into, &self.name);
        into.extend(u32::try_from(self.dims.len()).unwrap_or(MAX_DIMS).to_le_bytes());
        self.dims.iter().for_each(|size| into.extend(size.to_le_bytes()));
        into.extend(self.ggml_type.id().to_le_bytes());
        into.extend(offset.to_le_bytes());
    }
}

impl HeaderValue {
    /// The number of its type, and its bytes.
    fn encode(&self, into: &mut Vec<u8>) {
        match self {
            Self::F32s(numbers) => array(into, 6, numbers.len()),
            Self::I32s(numbers) => array(into, 5, numbers.len()),
            Self::Texts(texts) => array(into, 8, texts.len()),
            Self::U32(_) => into.extend(4_u32.to_le_bytes()),
            Self::F32(_) => into.extend(6_u32.to_le_bytes()),
            Self::Bool(_) => into.extend(7_u32.to_le_bytes()),
            Self::Text(_) => into.extend(8_u32.to_le_bytes()),
            Self::Raw(value_type, _) => into.extend(value_type.to_le_bytes()),
        }
        match self {
            Self::F32s(numbers) => numbers.iter().for_each(|number| into.extend(number.to_le_bytes())),
            Self::I32s(numbers) => numbers.iter().for_each(|number| into.extend(number.to_le_bytes())),
            Self::Texts(texts) => texts.iter().for_each(|each| text(into, each)),
            Self::U32(number) => into.extend(number.to_le_bytes()),
            Self::F32(number) => into.extend(number.to_le_bytes()),
            Self::Bool(truth) => into.push(u8::from(*truth)),
            Self::Text(value) => text(into, value),
            Self::Raw(_, bytes) => into.extend(bytes),
        }
    }
}

/// The type of an array, then that of its elements, and how many.
fn array(into: &mut Vec<u8>, element: u32, count: usize) {
    into.extend(9_u32.to_le_bytes());
    into.extend(element.to_le_bytes());
    into.extend(as_u64(count).to_le_bytes());
}

fn text(into: &mut Vec<u8>, text: &str) {
    into.extend(as_u64(text.len()).to_le_bytes());
    into.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::gguf::{GgufHead, Value, parse};

    fn value() -> impl Strategy<Value = HeaderValue> {
        prop_oneof![
            any::<u32>().prop_map(HeaderValue::U32),
            any::<i16>().prop_map(|number| HeaderValue::F32(f32::from(number) / 8.0)),
            any::<bool>().prop_map(HeaderValue::Bool),
            "[a-z ü]{0,12}".prop_map(HeaderValue::Text),
            prop::collection::vec(any::<i32>(), 0..5).prop_map(HeaderValue::I32s),
            prop::collection::vec((0_u8..9).prop_map(f32::from), 0..5).prop_map(HeaderValue::F32s),
            prop::collection::vec("[a-zé]{0,5}", 0..5).prop_map(HeaderValue::Texts),
            // Two u16 numbers as an array.
            Just(HeaderValue::Raw(9, b"\x02\0\0\0\x02\0\0\0\0\0\0\0abcd".to_vec())),
        ]
    }

    /// What the parser keeps of a value.
    fn parsed(value: &HeaderValue) -> Value {
        match value {
            HeaderValue::U32(number) => Value::Unsigned((*number).into()),
            HeaderValue::F32(number) => Value::Float((*number).into()),
            HeaderValue::Bool(truth) => Value::Bool(*truth),
            HeaderValue::Text(text) => Value::Text(text.clone()),
            _ => Value::Skipped,
        }
    }

    fn tensor() -> impl Strategy<Value = (Vec<u64>, GgmlType)> {
        let types = prop::sample::select(GgmlType::ALL.to_vec());
        (types, 1_u64..4, prop::collection::vec(1_u64..5, 0..4)).prop_map(|(ggml_type, blocks, outer)| {
            let mut dims = vec![blocks * ggml_type.block_elements()];
            dims.extend(outer);
            (dims, ggml_type)
        })
    }

    proptest! {
        /// GW-1: what is laid out is parsed to the same keys, names, dims, types and places.
        #[test]
        fn the_parser_reads_what_is_laid_out(
            values in prop::collection::btree_map("[a-z.]{1,9}", value(), 0..6),
            tensors in prop::collection::btree_map("[a-z.]{1,63}", tensor(), 0..6),
        ) {
            let values: Vec<_> = values.into_iter().collect();
            let tensors: Vec<_> = tensors
                .into_iter()
                .map(|(name, (dims, ggml_type))| NewTensor { name, dims, ggml_type })
                .collect();
            let made = layout("m.gguf", &values, &tensors).expect("allowed");
            let head = parse("m.gguf", &made.header, made.file_bytes).expect("a whole header");
            let GgufHead::Whole(gguf) = head else { panic!("{head:?}") };
            for (key, value) in &values {
                prop_assert_eq!(gguf.values.get(key), Some(&parsed(value)));
            }
            prop_assert_eq!(gguf.values.len(), values.len());
            prop_assert_eq!(gguf.tensors.len(), tensors.len());
            for ((found, expected), place) in gguf.tensors.iter().zip(&tensors).zip(&made.places) {
                prop_assert_eq!(&found.name, &expected.name);
                prop_assert_eq!(&found.dims, &expected.dims);
                prop_assert_eq!(found.ggml_type, expected.ggml_type);
                prop_assert_eq!(&found.range, place);
            }
        }
    }

    #[test]
    fn what_no_file_can_have_is_refused() {
        let tensor =
            |name: &str, dims: &[u64], ggml_type| NewTensor { name: name.to_owned(), dims: dims.to_vec(), ggml_type };
        let refused = |tensors: &[NewTensor]| layout("m.gguf", &[], tensors).expect_err("refused").to_string();
        let f32 = GgmlType::F32;
        assert_eq!(refused(&[tensor("a", &[1, 1, 1, 1, 1], f32)]), "m.gguf: tensor a: expected 1 to 4 dims, found 5");
        assert!(refused(&[tensor("a", &[100], GgmlType::Q8_0)]).contains("rows of whole Q8_0 blocks of 32"));
        assert!(refused(&[tensor("a", &[u64::MAX, 3], f32)]).contains("tensor a"));
        assert!(refused(&[tensor(&"a".repeat(64), &[1], f32)]).contains("at most 63 bytes, found 64"));
        let twice = refused(&[tensor("a", &[1], f32), tensor("a", &[1], f32)]);
        assert!(twice.contains('a'), "{twice}");
    }
}
