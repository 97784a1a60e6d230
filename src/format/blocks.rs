//! GGUF blocks to f32 and back, through candle's implementations of them.

use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{FormatError, GgmlType};
use crate::types::as_u64;

/// Decodes whole blocks into f32, row-major as they stand in the file.
///
/// # Errors
/// [`FormatError::Blocks`] when `bytes` are not the blocks of `out`.
pub fn dequantize(ggml_type: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), FormatError> {
    let error = |what: String| FormatError::Blocks { ggml_type: ggml_type.name(), what };
    if ggml_type.bytes_for(as_u64(out.len()))? != as_u64(bytes.len()) {
        return Err(error(format!("{} bytes for {} elements", bytes.len(), out.len())));
    }
    let device = Device::Cpu;
    let values = qtensor_from_ggml(candle(ggml_type), bytes, vec![out.len()], &device)
        .and_then(|blocks| blocks.dequantize(&device))
        .and_then(|tensor| tensor.to_vec1::<f32>())
        .map_err(|failure| error(failure.to_string()))?;
    if values.len() != out.len() {
        return Err(error(format!("the decoder gave {} elements, expected {}", values.len(), out.len())));
    }
    out.copy_from_slice(&values);
    Ok(())
}

/// Encodes rows of whole blocks.
///
/// # Errors
/// [`FormatError::Blocks`] when `out` has not the size of the values' blocks.
pub fn quantize(ggml_type: GgmlType, values: &[f32], out: &mut [u8]) -> Result<(), FormatError> {
    let error = |what: String| FormatError::Blocks { ggml_type: ggml_type.name(), what };
    if ggml_type.bytes_for(as_u64(values.len()))? != as_u64(out.len()) {
        return Err(error(format!("{} bytes for {} elements", out.len(), values.len())));
    }
    let blocks = Tensor::from_slice(values, values.len(), &Device::Cpu)
        .and_then(|values| QTensor::quantize(&values, candle(ggml_type)))
        .map_err(|failure| error(failure.to_string()))?;
    let bytes = blocks.data().map_err(|failure| error(failure.to_string()))?;
    if bytes.len() != out.len() {
        return Err(error(format!("the encoder gave {} bytes, expected {}", bytes.len(), out.len())));
    }
    out.copy_from_slice(&bytes);
    Ok(())
}

const fn candle(ggml_type: GgmlType) -> GgmlDType {
    match ggml_type {
        GgmlType::F32 => GgmlDType::F32,
        GgmlType::F16 => GgmlDType::F16,
        GgmlType::BF16 => GgmlDType::BF16,
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        GgmlType::Q8_K => GgmlDType::Q8K,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One Q4_1 block by hand: d = 0.5, m = -1 (f16), codes 0..15 in low nibbles, 15..0 in high ones.
    #[test]
    fn a_q4_1_block_by_hand() {
        let mut block = vec![0x00, 0x38, 0x00, 0xbc];
        block.extend((0..16_u8).map(|code| code | (15 - code) << 4));
        let mut out = [0.0; 32];
        dequantize(GgmlType::Q4_1, &block, &mut out).expect("one whole block");
        for code in 0..16_u8 {
            assert_eq!(out[usize::from(code)], 0.5 * f32::from(code) - 1.0);
            assert_eq!(out[16 + usize::from(code)], 0.5 * f32::from(15 - code) - 1.0);
        }
        assert!(dequantize(GgmlType::Q4_1, &block[1..], &mut out).is_err());
    }
}
