//! Conversions among F16, BF16 and F32: exact to a wider type, else to nearest, ties to even; a NaN stays a NaN.
//!
//! Owns: the checks. Refuses to know: how the kernels do it.
//! Between equal types the bytes are copied, payloads of NaN included; otherwise a NaN keeps its sign and becomes quiet
//! (BF16 to F32 keeps the payload as it is). A finite value that is too large becomes an infinity of its sign.

use super::error::expect_len;
use super::source::WeightFloat;
use super::{Kernels, QuantError, Source};
use crate::types::DType;

impl Kernels {
    /// Writes `source` as elements of `to` (F16, BF16 or F32), little-endian; `out` is exactly as long.
    ///
    /// # Errors
    /// [`QuantError::DType`] for another `to`, [`QuantError::Length`] when `out` has not the bytes of as many elements.
    pub fn convert(self, source: Source<'_>, to: DType, out: &mut [u8]) -> Result<(), QuantError> {
        let to = WeightFloat::new(to)?;
        expect_len("out", out.len(), source.len() * to.size_bytes())?;
        if to == source.float() {
            out.copy_from_slice(source.bytes());
        } else {
            self.convert_elements(source, to, out);
        }
        Ok(())
    }
}
