//! Quantizing one thread's chunks, beside copying the same source bytes.

use super::{BenchError, Figure, GIGA, float, limits, median_s, timed};
use crate::quant::{BlockSize, FourBit, FourBitCode, Kernels, Source};
use crate::types::{DType, as_u64};

/// Values of one chunk: 256 KiB of bf16, as the loader takes them.
const CHUNK_VALUES: usize = 1 << 17;
/// Chunks of one run.
const CHUNKS: usize = 256;
const RUNS: usize = 7;

/// G values/s of one core for NF4, FP4 and int8 from bf16, against a copy of the source.
///
/// # Errors
/// [`BenchError`].
pub fn quantize() -> Result<Vec<Figure>, BenchError> {
    // Small numbers of both signs: a counter's bits as mantissa and low exponent of bf16.
    let source: Vec<u8> = (0..as_u64(CHUNK_VALUES))
        .flat_map(|index| {
            let mixed = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let sign_and_mantissa = u16::try_from(mixed & 0x807f).unwrap_or(0);
            let exponent = 0x3c00 | u16::try_from((mixed >> 8) & 0x0180).unwrap_or(0);
            (sign_and_mantissa | exponent).to_le_bytes()
        })
        .collect();
    let kernels = Kernels::detect();
    let values = float(as_u64(CHUNK_VALUES * CHUNKS));
    let copied = median_s(RUNS, || Ok::<_, BenchError>(limits::copy(CHUNK_VALUES * 2 * CHUNKS)))?;
    let limit = (values / copied / GIGA, "copying the source bytes, one thread");
    let view = Source::new(DType::BF16, &source).map_err(BenchError::of)?;
    let mut figures = Vec::new();
    for (name, code) in [("nf4", FourBitCode::Nf4), ("fp4", FourBitCode::Fp4)] {
        let format = FourBit { code, block: BlockSize::B64 };
        let (mut packed, mut absmax) = (vec![0; CHUNK_VALUES / 2], vec![0.0; CHUNK_VALUES / 64]);
        let seconds = median_s(RUNS, || {
            let mut result = Ok(0);
            let time = timed(|| {
                for _ in 0..CHUNKS {
                    result = kernels.quantize_4bit(format, view, &mut packed, &mut absmax);
                }
            });
            result.map(|_| time).map_err(BenchError::of)
        })?;
        figures.push(Figure::new(
            format!("quantize {name} ({})", kernels.name()),
            values / seconds / GIGA,
            "G values/s",
            limit,
        ));
    }
    let (mut codes, mut scales) = (vec![0; CHUNK_VALUES], vec![0.0; CHUNK_VALUES / 4096]);
    let seconds = median_s(RUNS, || {
        let mut result = Ok(0);
        let time = timed(|| {
            for _ in 0..CHUNKS {
                result = kernels.quantize_int8_rows(view, 4096, &mut codes, &mut scales);
            }
        });
        result.map(|_| time).map_err(BenchError::of)
    })?;
    figures.push(Figure::new(
        format!("quantize int8 ({})", kernels.name()),
        values / seconds / GIGA,
        "G values/s",
        limit,
    ));
    Ok(figures)
}
