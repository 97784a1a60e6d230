//! Values of one file for another, as they are.

use super::write::HeaderValue;
use super::{Cursor, Stop};
use crate::format::FormatError;
use crate::types::as_u64;

/// The keys of a header that begin with `prefix`, with their values' bytes. `head` holds the whole header.
///
/// # Errors
/// As [`super::parse`], and [`FormatError::Truncated`] where the header goes on beyond `head`.
pub fn raw_values(
    file: &str,
    head: &[u8],
    file_bytes: u64,
    prefix: &str,
) -> Result<Vec<(String, HeaderValue)>, FormatError> {
    let mut cursor = Cursor { file, head, position: 0, file_bytes };
    values(&mut cursor, prefix).map_err(|stop| match stop {
        Stop::Damage(error) => error,
        Stop::Short { expected_bytes } => {
            let (file, found_bytes) = (file.to_owned(), as_u64(head.len()));
            FormatError::Truncated { file, expected_bytes, found_bytes }
        }
    })
}

fn values(cursor: &mut Cursor<'_>, prefix: &str) -> Result<Vec<(String, HeaderValue)>, Stop> {
    // The beginning and the version, which were checked.
    cursor.take(8)?;
    let (_, count) = (cursor.count("tensors")?, cursor.count("keys")?);
    let mut found = Vec::new();
    for _ in 0..count {
        let key = cursor.name("key")?;
        let value_type = cursor.u32()?;
        let start = cursor.position;
        cursor.value(&key, value_type, 0)?;
        if key.starts_with(prefix) {
            let bytes = cursor.head.get(start..cursor.position).unwrap_or_default().to_vec();
            found.push((key, HeaderValue::Raw(value_type, bytes)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gguf::layout;

    #[test]
    fn copied_values_make_the_same_header() {
        let key = |name: &str, value| (name.to_owned(), value);
        let values = [
            key("a.b", HeaderValue::Texts(vec!["x".to_owned(), "yz".to_owned()])),
            key("a.c", HeaderValue::F32(0.5)),
            key("b.a", HeaderValue::U32(7)),
        ];
        let made = layout("m.gguf", &values, &[]).expect("a header");
        let copied = raw_values("m.gguf", &made.header, made.file_bytes, "a.").expect("a header");
        let again = layout("n.gguf", &copied, &[]).expect("a header");
        assert_eq!(again, layout("n.gguf", &values[..2], &[]).expect("a header"));
        let cut = raw_values("m.gguf", &made.header[..30], made.file_bytes, "a.").expect_err("cut");
        assert!(matches!(cut, FormatError::Truncated { .. }), "{cut}");
    }
}
