//! Files and directories of manifests.
//!
//! Owns: reading and writing them; a directory has one object in a file, and a kustomization. Refuses to know: what they say.

use std::path::{Path, PathBuf};

use crate::error::{Classify, Kind};
use crate::k8s::{Object, YamlError, file_name, kustomization, parse, write};

/// Files that are no objects of a cluster.
const NOT_OBJECTS: [&str; 2] = ["Kustomization", "Component"];

/// Manifests cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The system's error.
    #[error("{action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is no YAML.
    #[error(transparent)]
    Yaml(#[from] YamlError),
}

impl Classify for ManifestError {
    fn kind(&self) -> Kind {
        match self {
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Kind::NotFound,
            Self::File { .. } => Kind::Conflict,
            Self::Yaml(_) => Kind::Invalid,
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ManifestError {
    let path = path.display().to_string();
    move |source| ManifestError::File { action, path, source }
}

/// The objects of a file, or of all YAML files of a directory.
///
/// # Errors
/// [`ManifestError`].
pub fn read_manifests(path: &Path) -> Result<Vec<Object>, ManifestError> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = entries.map_err(failed("reading", path))?;
        let is_yaml = |path: &PathBuf| path.extension().is_some_and(|name| name == "yaml" || name == "yml");
        files = entries.into_iter().map(|entry| entry.path()).filter(is_yaml).collect();
        files.sort();
    }
    let mut objects = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(failed("reading", &file))?;
        objects.extend(parse(&text, &file.display().to_string())?);
    }
    objects.retain(|object| !object["kind"].as_str().is_some_and(|kind| NOT_OBJECTS.contains(&kind)));
    Ok(objects)
}

/// Writes objects to a file, or into a directory where `path` is one or ends with `/`. `head` stands before them.
///
/// # Errors
/// [`ManifestError`].
pub fn write_manifests(path: &Path, head: &str, objects: &[Object]) -> Result<(), ManifestError> {
    if !path.is_dir() && !path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return put(path, &format!("{head}{}", write(objects)));
    }
    std::fs::create_dir_all(path).map_err(failed("creating", path))?;
    for object in objects {
        put(&path.join(file_name(object)), &write(std::slice::from_ref(object)))?;
    }
    put(&path.join("kustomization.yaml"), &format!("{head}{}", write(&[kustomization(objects)])))
}

#[expect(clippy::disallowed_methods, reason = "manifests are for people, not data")]
fn put(path: &Path, text: &str) -> Result<(), ManifestError> {
    std::fs::write(path, text).map_err(failed("writing", path))
}
