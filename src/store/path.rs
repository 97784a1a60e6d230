//! Confinement: a name that came from a file or a peer stays below the root it belongs to.

use std::path::{Component, Path, PathBuf};

use super::StoreError;

/// `root` joined with `name`.
///
/// # Errors
/// [`StoreError::Outside`] when `name` is absolute or has `..` in it.
pub fn confined(root: &Path, name: &str) -> Result<PathBuf, StoreError> {
    let relative = Path::new(name);
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if inside && !name.contains('\0') {
        Ok(root.join(relative))
    } else {
        Err(StoreError::Outside { root: root.display().to_string(), name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside() {
        let root = Path::new("/data");
        assert_eq!(confined(root, "a/b.bin").ok(), Some(PathBuf::from("/data/a/b.bin")));
        for name in ["/etc/passwd", "../x", "a/../../x", "a\0b"] {
            assert!(matches!(confined(root, name), Err(StoreError::Outside { .. })), "{name}");
        }
    }
}
