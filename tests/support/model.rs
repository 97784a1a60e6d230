//! A copy of the project's small model, to be damaged. Refuses to know: what comes of the damage.

use std::path::PathBuf;

use serde_json::Value;

use super::{MODEL, Place};

/// The first weight file.
pub(crate) const FIRST: &str = "model-00001-of-00003.safetensors";
/// The index of the weight files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A tensor of the first file that lies between two others.
pub(crate) const TENSOR: &str = "model.layers.0.mlp.up_proj.weight";

/// The copy.
pub(crate) struct Model {
    pub(crate) directory: PathBuf,
}

impl Model {
    /// A new copy in the place of the last one.
    pub(crate) fn new(place: &Place) -> Self {
        let directory = PathBuf::from(place.path("model"));
        // The last case's damage may be anything, so nothing of it stays.
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).expect("a new directory");
        for entry in std::fs::read_dir(MODEL).expect("the model") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), directory.join(entry.file_name())).expect("a copy");
        }
        Self { directory }
    }

    /// Its path, as text for a command line.
    pub(crate) fn path(&self) -> String {
        self.directory.display().to_string()
    }

    /// Changes the bytes of a file.
    pub(crate) fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.directory.join(name);
        let mut bytes = std::fs::read(&path).expect("a file of the model");
        let before = bytes.clone();
        change(&mut bytes);
        assert!(before != bytes, "the damage changes something");
        std::fs::write(&path, bytes).expect("writable");
    }

    /// Changes a JSON file.
    pub(crate) fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        self.edit(name, |bytes| {
            let mut value = serde_json::from_slice(bytes).expect("JSON");
            change(&mut value);
            *bytes = serde_json::to_vec(&value).expect("JSON");
        });
    }

    /// Replaces the header's text, and its length, of the first weight file.
    pub(crate) fn edit_header_text(&self, change: impl FnOnce(String) -> String) {
        self.edit(FIRST, |bytes| {
            let length = u64::from_le_bytes(*bytes.first_chunk().expect("a length"));
            let data = bytes.split_off(8 + usize::try_from(length).expect("small"));
            let header = change(String::from_utf8(bytes.split_off(8)).expect("text"));
            bytes.clear();
            bytes.extend(u64::try_from(header.len()).expect("small").to_le_bytes());
            bytes.extend(header.as_bytes());
            bytes.extend(data);
        });
    }

    /// Changes the header of the first weight file.
    pub(crate) fn edit_header(&self, change: impl FnOnce(&mut Value)) {
        self.edit_header_text(|text| {
            let mut header = serde_json::from_str(&text).expect("a header");
            change(&mut header);
            header.to_string()
        });
    }
}
