//! Weights as they come from a file: little-endian bytes of F16, BF16 or F32, at any alignment.
//!
//! Owns: the view and its scalar decoding. Refuses to know: what is done with the values.

use half::{bf16, f16};

use super::QuantError;
use crate::types::{DType, as_usize};

/// The element types that are quantized and converted; a `DType` whose check has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightFloat {
    F16,
    Bf16,
    F32,
}

impl WeightFloat {
    pub(super) fn new(dtype: DType) -> Result<Self, QuantError> {
        match dtype {
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::Bf16),
            DType::F32 => Ok(Self::F32),
            found => Err(QuantError::DType { found }),
        }
    }

    pub(super) const fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::F32 => DType::F32,
        }
    }

    pub(super) const fn size_bytes(self) -> usize {
        as_usize(self.dtype().size_bytes())
    }
}

/// A run of weights: a whole number of little-endian F16, BF16 or F32 elements at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    float: WeightFloat,
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    /// `bytes` as elements of `dtype`.
    ///
    /// # Errors
    /// [`QuantError::DType`] for another type, [`QuantError::RaggedBytes`] when an element is cut.
    pub fn new(dtype: DType, bytes: &'a [u8]) -> Result<Self, QuantError> {
        let float = WeightFloat::new(dtype)?;
        if !bytes.len().is_multiple_of(float.size_bytes()) {
            return Err(QuantError::RaggedBytes { dtype, found: bytes.len() });
        }
        Ok(Self { float, bytes })
    }

    /// The type of an element.
    #[must_use]
    pub const fn dtype(self) -> DType {
        self.float.dtype()
    }

    /// The number of elements.
    #[must_use]
    pub const fn len(self) -> usize {
        self.bytes.len() / self.float.size_bytes()
    }

    /// Whether there is no element.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.bytes.is_empty()
    }

    /// The first `elements` and the rest; everything and nothing when there are fewer.
    #[must_use]
    pub fn split_at(self, elements: usize) -> (Self, Self) {
        let (head, tail) = self.bytes.split_at(elements.min(self.len()) * self.float.size_bytes());
        (Self { bytes: head, ..self }, Self { bytes: tail, ..self })
    }

    pub(super) const fn float(self) -> WeightFloat {
        self.float
    }

    pub(super) const fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// Consecutive runs of at most `elements`.
    pub(super) fn chunks(self, elements: usize) -> impl Iterator<Item = Self> {
        self.bytes.chunks(elements * self.float.size_bytes()).map(move |bytes| Self { bytes, ..self })
    }

    /// Widens every element to f32, exactly. `out` has the length of `self`.
    pub(super) fn decode(self, out: &mut [f32]) {
        match self.float {
            WeightFloat::F16 => {
                let elements = self.bytes.as_chunks::<2>().0;
                out.iter_mut().zip(elements).for_each(|(out, bytes)| *out = f16::from_le_bytes(*bytes).to_f32());
            }
            WeightFloat::Bf16 => {
                let elements = self.bytes.as_chunks::<2>().0;
                out.iter_mut().zip(elements).for_each(|(out, bytes)| {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                });
            }
            WeightFloat::F32 => {
                let elements = self.bytes.as_chunks::<4>().0;
                out.iter_mut().zip(elements).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
            }
        }
    }
}

/// Rounds every value to nearest even as `float`, little-endian. `out` has the bytes of `values.len()` elements.
pub(super) fn encode(values: &[f32], float: WeightFloat, out: &mut [u8]) {
    match float {
        WeightFloat::F16 => {
            let elements = out.as_chunks_mut::<2>().0;
            elements.iter_mut().zip(values).for_each(|(out, value)| *out = f16::from_f32(*value).to_le_bytes());
        }
        WeightFloat::Bf16 => {
            let elements = out.as_chunks_mut::<2>().0;
            elements.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(*value).to_le_bytes());
        }
        WeightFloat::F32 => {
            let elements = out.as_chunks_mut::<4>().0;
            elements.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
        }
    }
}
