//! GPTQ (`gptq`, `gptq_v2`, with act-order or without) and AWQ (`gemm`): `qweight`, `qzeros`, `scales`, `g_idx`.

use super::{Gather, matrix, wrong};
use crate::format::FormatError;
use crate::quant::Encoding;
use crate::quant::affine::CodeBits;
use crate::quant::pack::GptqVersion;
use crate::types::{DType, Shape};

pub(super) fn gptq<E: From<FormatError>>(
    gather: &mut Gather<'_, E>,
    (bits, group, version): (CodeBits, Option<u32>, GptqVersion),
) -> Result<(), E> {
    for module in gather.modules(".qweight") {
        let mut parts = components(gather, &module)?;
        let (words, outputs) = matrix(&module, &parts[0].1)?;
        let inputs = words.saturating_mul(32) / u64::from(bits.get());
        if gather.index.tensors.contains_key(format!("{module}.g_idx").as_str()) {
            parts.push(("g_idx", gather.take(format!("{module}.g_idx"))?));
        }
        let group = match group {
            Some(group) => group,
            None => u32::try_from(inputs).map_err(|_| too_wide(&module, inputs))?,
        };
        let dtype = scales_dtype(&module, &parts)?;
        let encoding = Encoding::Gptq { bits, group, version, indexed: parts.len() > 3, dtype };
        gather.put(format!("{module}.weight"), (Shape::from([outputs, inputs]), dtype), encoding, parts, None)?;
    }
    Ok(())
}

pub(super) fn awq<E: From<FormatError>>(gather: &mut Gather<'_, E>, group: u32) -> Result<(), E> {
    for module in gather.modules(".qweight") {
        let parts = components(gather, &module)?;
        let (inputs, words) = matrix(&module, &parts[0].1)?;
        let dtype = scales_dtype(&module, &parts)?;
        let shape = Shape::from([words.saturating_mul(8), inputs]);
        let encoding = Encoding::Awq { group, dtype };
        gather.put(format!("{module}.weight"), (shape, dtype), encoding, parts, None)?;
    }
    Ok(())
}

type Parts = Vec<(&'static str, crate::format::TensorEntry)>;

/// In the order of the encoding's components.
fn components<E: From<FormatError>>(gather: &mut Gather<'_, E>, module: &str) -> Result<Parts, FormatError> {
    ["qweight", "qzeros", "scales"]
        .into_iter()
        .map(|part| Ok((part, gather.take(format!("{module}.{part}"))?)))
        .collect()
}

fn scales_dtype(module: &str, parts: &Parts) -> Result<DType, FormatError> {
    let found = parts[2].1.dtype;
    let fits = found.is_weight_float();
    fits.then_some(found).ok_or_else(|| wrong(module, "scales", "F16, BF16 or F32", found.to_string()))
}

fn too_wide(module: &str, inputs: u64) -> FormatError {
    wrong(module, "inputs", "a number in 32 bits", inputs.to_string())
}
