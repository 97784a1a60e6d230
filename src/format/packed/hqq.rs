//! HQQ as `HQQLinear.state_dict` writes it with `encoded_state_dict` (hqq 0.2.8): `W_q`, `scale`, `zero`, and what describes
//! them in tensors of one number or text each.

use super::{Gather, wrong};
use crate::format::{FormatError, TensorEntry};
use crate::quant::Encoding;
use crate::quant::affine::{CodeBits, GroupAxis};
use crate::types::{DType, Shape};

/// What is described elsewhere, or does not concern who reads the weights.
const NOT_NEEDED: [&str; 9] = [
    ".packing",
    ".unpack_view_dtype",
    ".compute_dtype",
    ".offload_meta",
    ".encoded_state_dict",
    ".stores_quant_config",
    ".channel_wise",
    ".optimize",
    ".round_zero",
];
/// What must be 0: codes that are stored as floats, and statistics that are quantized themselves.
const MUST_BE_OFF: [&str; 3] = ["view_as_float", "quant_scale", "quant_zero"];

pub(super) fn gather<E: From<FormatError>>(gather: &mut Gather<'_, E>) -> Result<(), E> {
    for module in gather.modules(".W_q") {
        let parts = ["W_q", "scale", "zero"].into_iter();
        let parts = parts
            .map(|part| Ok((part, gather.take(format!("{module}.{part}"))?)))
            .collect::<Result<Vec<_>, FormatError>>()?;
        for key in MUST_BE_OFF {
            match numbers(gather, &module, key)?.as_deref() {
                None | Some([0]) => {}
                found => return Err(wrong(&module, key, "0", format!("{found:?}")).into()),
            }
        }
        let one = |found: Option<Vec<i64>>, key: &'static str| match found.as_deref() {
            Some([number]) => Ok(*number),
            _ => Err(wrong(&module, key, "a number", format!("{found:?}"))),
        };
        let bits = one(numbers(gather, &module, "nbits")?, "nbits")?;
        let code_bits = u8::try_from(bits).ok().and_then(|bits| CodeBits::new(bits).ok());
        let bits = code_bits.ok_or_else(|| wrong(&module, "nbits", "1 to 6 or 8", bits.to_string()))?;
        let group = one(numbers(gather, &module, "group_size")?, "group_size")?;
        let group = u32::try_from(group).ok().filter(|group| *group > 0);
        let group = group.ok_or_else(|| wrong(&module, "group_size", "a positive number", format!("{group:?}")))?;
        let axis = match one(numbers(gather, &module, "axis")?, "axis")? {
            0 => GroupAxis::Columns,
            1 => GroupAxis::Runs,
            found => return Err(wrong(&module, "axis", "0 or 1", found.to_string()).into()),
        };
        let shape = numbers(gather, &module, "shape")?.unwrap_or_default();
        let sizes: Option<Vec<u64>> = shape.iter().map(|&size| u64::try_from(size).ok()).collect();
        let sizes = sizes.filter(|sizes| sizes.len() == 2);
        let sizes = sizes.ok_or_else(|| wrong(&module, "shape", "two sizes", format!("{shape:?}")))?;
        gather.drop_all(&module, &NOT_NEEDED);
        let dtype = parts[1].1.dtype;
        if !dtype.is_weight_float() {
            return Err(wrong(&module, "scale", "F16, BF16 or F32", dtype.to_string()).into());
        }
        let encoding = Encoding::Hqq { bits, group, axis, dtype };
        gather.put(format!("{module}.weight"), (Shape::from(sizes), dtype), encoding, parts, None)?;
    }
    Ok(())
}

/// The whole numbers of a small tensor, which is taken out of the index; nothing where it is not there.
fn numbers<E: From<FormatError>>(
    gather: &mut Gather<'_, E>,
    module: &str,
    key: &'static str,
) -> Result<Option<Vec<i64>>, E> {
    let name = format!("{module}.{key}");
    let Some(entry) = gather.index.tensors.remove(name.as_str()) else { return Ok(None) };
    let bytes = gather.small(&name, &entry)?;
    Ok(Some(decode(&entry, &bytes).ok_or_else(|| wrong(name, key, "whole numbers", entry.dtype.to_string()))?))
}

fn decode(entry: &TensorEntry, bytes: &[u8]) -> Option<Vec<i64>> {
    let whole = |value: f32| {
        let rounded = value.round();
        #[expect(clippy::cast_possible_truncation, reason = "checked to be a small whole number")]
        (rounded == value && value.abs() < 1e6).then_some(rounded as i64)
    };
    match entry.dtype {
        DType::U8 | DType::Bool => Some(bytes.iter().map(|&byte| i64::from(byte)).collect()),
        DType::I32 => Some(bytes.as_chunks().0.iter().map(|word| i64::from(i32::from_le_bytes(*word))).collect()),
        DType::I64 => Some(bytes.as_chunks().0.iter().map(|word| i64::from_le_bytes(*word)).collect()),
        DType::F32 => bytes.as_chunks().0.iter().map(|word| whole(f32::from_le_bytes(*word))).collect(),
        _ => None,
    }
}
