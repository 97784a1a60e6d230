//! What a user may write for a model.

use std::path::{Path, PathBuf};

use super::HubError;

/// The branch that is meant when none is given.
const DEFAULT_REVISION: &str = "main";
/// The hub's own limit on the length of a name.
const MAX_ID_BYTES: usize = 96;
const MAX_REVISION_BYTES: usize = 255;

/// A model as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A directory on this machine.
    Directory(PathBuf),
    /// One weight file on this machine.
    File(PathBuf),
    /// A repository of a hub.
    Hub {
        /// `organization/name`, or the name alone for the hub's oldest models.
        id: String,
        /// A branch, a tag or a commit.
        revision: String,
    },
}

impl Reference {
    /// Reads a reference: a path that exists wins over `organization/name[@revision]`.
    ///
    /// # Errors
    /// [`HubError::NoSuchPath`] for what can only be a path and does not exist, [`HubError::Reference`] for what is
    /// neither.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let path = Path::new(text);
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => return Ok(Self::Directory(path.to_owned())),
            Ok(_) => return Ok(Self::File(path.to_owned())),
            Err(_) if ["/", "./", "../", "~"].iter().any(|start| text.starts_with(start)) => {
                return Err(HubError::NoSuchPath { path: path.to_owned() });
            }
            Err(_) => {}
        }
        let (id, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let segments = id.split('/');
        let id_fits = id.len() <= MAX_ID_BYTES && segments.clone().count() <= 2 && segments.clone().all(is_name);
        let revision_fits = revision.len() <= MAX_REVISION_BYTES && revision.split('/').all(is_name);
        if id_fits && revision_fits {
            Ok(Self::Hub { id: id.to_owned(), revision: revision.to_owned() })
        } else {
            Err(HubError::Reference { found: text.to_owned() })
        }
    }
}

/// The hub's names: letters, digits, `-`, `_` and `.`, with no dot at the start and none next to another, so that no
/// name is a path of its own.
fn is_name(segment: &str) -> bool {
    !segment.is_empty()
        && !segment.starts_with(['.', '-'])
        && !segment.contains("..")
        && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_of_every_form() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("m.gguf");
        std::fs::write(&file, b"GGUF").expect("a file");
        let hub = |id: &str, revision: &str| Reference::Hub { id: id.to_owned(), revision: revision.to_owned() };
        let check = |text: &str, expected: Reference| {
            assert_eq!(Reference::parse(text).expect(text), expected, "{text}");
        };
        check(directory.path().to_str().expect("UTF-8"), Reference::Directory(directory.path().to_owned()));
        check(file.to_str().expect("UTF-8"), Reference::File(file.clone()));
        // The tests run in the package's root, where there is a directory of this name.
        check("src", Reference::Directory("src".into()));
        check("gpt2", hub("gpt2", "main"));
        check("meta-llama/Llama-3.1-8B", hub("meta-llama/Llama-3.1-8B", "main"));
        check("org/name@refs/pr/7", hub("org/name", "refs/pr/7"));
        check("org/name@v1.0", hub("org/name", "v1.0"));

        let refused = |text: &str, expected: &str| {
            let message = Reference::parse(text).expect_err(text).to_string();
            assert!(message.contains(expected), "{text}: {message}");
        };
        for text in ["a/b/c", "a/", "a//b", "a/..", "a/b@", "a/b@../x", "a/b@/etc", "a b/c", "a/-b", "a/b@x..y"] {
            refused(text, "expected a path that exists or organization/name[@revision]");
        }
        refused("./nowhere", "./nowhere does not exist");
        refused("/nowhere/at/all", "/nowhere/at/all does not exist");
    }
}
