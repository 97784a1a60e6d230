//! Confinement: a name that came from a file or a peer stays below the root it belongs to.

use std::path::{Component, Path, PathBuf};

use super::StoreError;

/// `root` joined with `name`.
///
/// # Errors
/// [`StoreError::Outside`] when `name` is absolute or has `..` in it.
pub fn confined(root: &Path, name: &str) -> Result<PathBuf, StoreError> {
    if is_inside(name) {
        Ok(root.join(name))
    } else {
        Err(StoreError::Outside { root: root.display().to_string(), name: name.to_owned() })
    }
}

/// Whether a name stays below whatever it is joined with.
pub(super) fn is_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    parts.all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) && !name.contains('\0')
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
