//! Which files of a directory or repository are the model's weights.

use std::path::{Component, Path};

use super::HubError;

/// The sharded index.
pub(super) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The one file of an unsharded model.
const SINGLE_NAME: &str = "model.safetensors";

/// The weights among a list of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Selection {
    /// These safetensors files.
    Safetensors(Vec<String>),
    /// Those that [`INDEX_NAME`] names.
    Sharded,
    /// This file.
    Gguf(String),
}

/// Chooses among the names in a directory or repository, `place`, in words. Names in subdirectories are passed over:
/// they are other formats' copies.
pub(super) fn select(place: &str, names: &[String]) -> Result<Selection, HubError> {
    let mut top: Vec<&String> = names.iter().filter(|name| !name.contains('/')).collect();
    top.sort_unstable();
    let ending =
        |end: &str| top.iter().filter(|name| name.ends_with(end)).map(|&name| name.clone()).collect::<Vec<_>>();
    if top.iter().any(|name| *name == SINGLE_NAME) {
        return Ok(Selection::Safetensors(vec![SINGLE_NAME.to_owned()]));
    }
    if top.iter().any(|name| *name == INDEX_NAME) {
        return Ok(Selection::Sharded);
    }
    let (mut gguf, safetensors) = (ending(".gguf"), ending(".safetensors"));
    match (gguf.len(), safetensors.is_empty()) {
        (1, _) => Ok(Selection::Gguf(gguf.remove(0))),
        (_, false) => Ok(Selection::Safetensors(safetensors)),
        (0, true) => Err(HubError::NoWeights { place: place.to_owned() }),
        (_, true) => Err(HubError::Ambiguous { place: place.to_owned(), found: gguf.join(", ") }),
    }
}

/// `name` itself, if it leads to a file within the directory that it stands in (`HU-4`).
pub(super) fn confined<'a>(place: &str, name: &'a str) -> Result<&'a str, HubError> {
    let within = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    // A backslash separates names on other systems, and a colon follows a drive's letter.
    if within && !name.is_empty() && !name.contains(['\\', '\0', ':']) {
        Ok(name)
    } else {
        Err(HubError::Outside { place: place.to_owned(), found: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_chosen_in_order() {
        let check = |names: &[&str], expected: Result<Selection, &str>| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            match (select("org/name", &names), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{names:?}"),
                (Err(found), Err(expected)) => assert!(found.to_string().contains(expected), "{found}"),
                (found, expected) => panic!("{names:?}: expected {expected:?}, found {found:?}"),
            }
        };
        let safetensors =
            |names: &[&str]| Ok(Selection::Safetensors(names.iter().map(|&name| name.to_owned()).collect()));
        check(&["a.gguf", "model.safetensors", INDEX_NAME], safetensors(&["model.safetensors"]));
        check(&["a.gguf", "model-00001-of-00002.safetensors", INDEX_NAME], Ok(Selection::Sharded));
        check(&["z.safetensors", "a.gguf"], Ok(Selection::Gguf("a.gguf".to_owned())));
        check(
            &["z.safetensors", "b.safetensors", "a.gguf", "b.gguf"],
            safetensors(&["b.safetensors", "z.safetensors"]),
        );
        check(&["b.gguf", "a.gguf"], Err("several *.gguf files, of which one must be chosen: a.gguf, b.gguf"));
        check(&["README.md", "onnx/model.safetensors", "pytorch_model.bin"], Err("org/name has no weights"));
    }

    #[test]
    fn hu_4_names_stay_inside() {
        for name in ["a.safetensors", "sub/a.safetensors", "..a", "a..b"] {
            assert_eq!(confined("index", name).expect(name), name);
        }
        for name in ["", "..", "../a", "sub/../../a", "/etc/passwd", "a\\..\\b", "C:a", "./a", "sub/..", "a\0b"] {
            confined("index", name).expect_err(name);
        }
    }
}
