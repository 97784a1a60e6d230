//! FP8 E4M3: `weight` with `weight_scale_inv` (DeepSeek's blocks) or `weight_scale` (one value, or one for each row).

use super::{Gather, matrix, wrong};
use crate::format::FormatError;
use crate::quant::{Encoding, Fp8Scales};
use crate::types::DType;

pub(super) fn gather<E: From<FormatError>>(gather: &mut Gather<'_, E>, block: Option<[u32; 2]>) -> Result<(), E> {
    for (suffix, part) in [(".weight_scale_inv", "weight_scale_inv"), (".weight_scale", "weight_scale")] {
        for module in gather.modules(suffix) {
            let weight = format!("{module}.weight");
            let parts =
                vec![("weight", gather.take(weight.clone())?), (part, gather.take(format!("{module}{suffix}"))?)];
            // Scales of activations, which are not quantized here.
            gather.drop_all(&module, &[".input_scale", ".activation_scale"]);
            let (codes, scale) = (&parts[0].1, &parts[1].1);
            let (rows, _) = matrix(&module, codes)?;
            let scales = match (scale.shape.elements().unwrap_or(0), block) {
                (1, _) => Fp8Scales::Tensor,
                (count, _) if count == rows => Fp8Scales::Row,
                (_, Some([rows, columns])) => Fp8Scales::Block { rows, columns },
                (_, None) => {
                    let expected = "one scale, one for each row, or weight_block_size in config.json";
                    return Err(wrong(&module, part, expected, scale.shape.to_string()).into());
                }
            };
            if !scale.dtype.is_weight_float() {
                return Err(wrong(&module, part, "F16, BF16 or F32", scale.dtype.to_string()).into());
            }
            let scale_dtype = scale.dtype;
            // f16 would not hold all of E4M3 times a scale.
            let dtype = if gather.weight_dtype == DType::F16 { DType::BF16 } else { gather.weight_dtype };
            let encoding = Encoding::Fp8 { scales, scale_dtype, dtype };
            let shape = codes.shape.clone();
            gather.put(weight, (shape, dtype), encoding, parts, None)?;
        }
    }
    Ok(())
}
