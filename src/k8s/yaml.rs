//! Manifests as text.
//!
//! Owns: how objects are written and read. Text that other readers of YAML would take for something else (`yes`, `0o7`) is
//! quoted. Refuses to know: kinds.

use super::Object;

/// No line is folded: arguments stay on one line, and are compared as such.
const NEVER_FOLDED: usize = 1 << 20;

/// Text that is no manifest.
#[derive(Debug, thiserror::Error)]
#[error("{place}: expected YAML documents, each an object: {message}")]
pub struct YamlError {
    /// Where it was read.
    pub place: String,
    /// What is wrong.
    pub message: String,
}

/// Writes objects as documents.
#[must_use]
pub fn write<T: serde::Serialize>(objects: &[T]) -> String {
    let options = serde_saphyr::ser_options! { folded_wrap_chars: NEVER_FOLDED };
    serde_saphyr::to_string_multiple_with_options(objects, options).expect("objects of JSON can be written as YAML")
}

/// Reads documents; empty ones are left out. `place` is where they come from.
///
/// # Errors
/// [`YamlError`].
pub fn parse(text: &str, place: &str) -> Result<Vec<Object>, YamlError> {
    let failed = |message: String| YamlError { place: place.to_owned(), message };
    let documents: Vec<Object> = serde_saphyr::from_multiple(text).map_err(|error| failed(error.to_string()))?;
    let documents: Vec<Object> = documents.into_iter().filter(|document| !document.is_null()).collect();
    match documents.iter().find(|document| !document.is_object()) {
        Some(other) => Err(failed(format!("found {other}"))),
        None => Ok(documents),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What YAML 1.1 takes for a boolean or a number stays text, and lines stay lines.
    #[test]
    fn text_stays_text() {
        let long = format!("--{}", "word ".repeat(40));
        let object = json!({
            "words": ["yes", "on", "0o17", "1e3", "null", "~", "12:30", "0x1f", "", " x", "a: b", "- c", long],
            "file": "[job]\nname = \"x\"   # why\n\n[model]\n", "number": 7, "truth": true, "nothing": {}, "none": [],
        });
        let text = write(std::slice::from_ref(&object));
        assert!(text.contains("file: |\n"), "{text}");
        assert!(["'yes'", "\"yes\""].iter().any(|word| text.contains(word)), "{text}");
        assert_eq!(parse(&text, "here").expect(&text), [object]);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert_eq!(parse("---\n---\na: 1\n", "here").expect("an object").len(), 1);
        for text in ["a: [", "- 1\n", "7\n"] {
            assert!(parse(text, "f.yaml").expect_err(text).to_string().starts_with("f.yaml: "), "{text}");
        }
    }
}
