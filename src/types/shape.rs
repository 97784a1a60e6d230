//! Shapes of tensors, row-major.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::DType;

/// The sizes of a tensor's dims, outermost first; empty for a scalar.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shape(pub Vec<u64>);

/// The number of elements or bytes of a shape does not fit 64 bits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shape {shape} has more elements or bytes than 64 bits can count")]
pub struct ShapeOverflow {
    /// The offending shape.
    pub shape: Shape,
}

impl Shape {
    /// The number of elements; 1 for a scalar.
    ///
    /// # Errors
    /// [`ShapeOverflow`] when the product does not fit.
    pub fn elements(&self) -> Result<u64, ShapeOverflow> {
        self.0
            .iter()
            .try_fold(1_u64, |product, &size| product.checked_mul(size))
            .ok_or_else(|| ShapeOverflow { shape: self.clone() })
    }

    /// The number of bytes when stored as `dtype` without padding.
    ///
    /// # Errors
    /// [`ShapeOverflow`] when the product does not fit.
    pub fn bytes(&self, dtype: DType) -> Result<u64, ShapeOverflow> {
        self.elements()?.checked_mul(dtype.size_bytes()).ok_or_else(|| ShapeOverflow { shape: self.clone() })
    }

    /// The size of dim 0; 1 for a scalar, which has a single row.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.0.first().copied().unwrap_or(1)
    }

    /// The number of dims.
    #[must_use]
    pub fn dims(&self) -> usize {
        self.0.len()
    }
}

impl From<Vec<u64>> for Shape {
    fn from(sizes: Vec<u64>) -> Self {
        Self(sizes)
    }
}

impl<const N: usize> From<[u64; N]> for Shape {
    fn from(sizes: [u64; N]) -> Self {
        Self(sizes.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[")?;
        for (position, size) in self.0.iter().enumerate() {
            if position > 0 {
                write!(f, ", ")?;
            }
            write!(f, "{size}")?;
        }
        write!(f, "]")
    }
}
