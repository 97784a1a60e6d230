//! bitsandbytes: 4-bit codes with a quant state, and LLM.int8 rows (formats of bitsandbytes 0.50 in safetensors).

use super::{Gather, wrong};
use crate::format::FormatError;
use crate::quant::{DynamicMap, Encoding, FourBitCode, QuantState};
use crate::types::{DType, f32Bits};

/// How far a stored table may be from ours: torch builds differ in the last bits of `linspace`.
const TABLE_TOLERANCE: f32 = 1e-6;

pub(super) fn gather<E: From<FormatError>>(gather: &mut Gather<'_, E>) -> Result<(), E> {
    for code in [FourBitCode::Nf4, FourBitCode::Fp4] {
        let suffix = format!(".quant_state.bitsandbytes__{}", code.name());
        for weight in gather.modules(&suffix) {
            four_bit(gather, weight, &suffix, code)?;
        }
    }
    for module in gather.modules(".SCB") {
        let weight = format!("{module}.weight");
        let parts = vec![("codes", gather.take(weight.clone())?), ("SCB", gather.take(format!("{module}.SCB"))?)];
        gather.drop_all(&module, &[".weight_format"]);
        let (shape, dtype) = (parts[0].1.shape.clone(), gather.weight_dtype);
        gather.put(weight, (shape, dtype), Encoding::Int8, parts, None)?;
    }
    Ok(())
}

/// The tensor `weight`, whose quant state has the name with `suffix`.
fn four_bit<E: From<FormatError>>(
    gather: &mut Gather<'_, E>,
    weight: String,
    suffix: &str,
    code: FourBitCode,
) -> Result<(), E> {
    let name = format!("{weight}{suffix}");
    let entry = gather.take(name.clone())?;
    let json = gather.small(&name, &entry)?;
    let state = QuantState::parse(&json)
        .map_err(|error| wrong(&name, "a quant state", "bitsandbytes' JSON", error.to_string()))?;
    if state.format.code != code {
        return Err(wrong(&name, "quant_type", code.name(), state.format.code.name().to_owned()).into());
    }
    let nested = state.nested.is_some();
    table(gather, format!("{weight}.quant_map"), code.values())?;
    let mut parts = vec![("codes", gather.take(weight.clone())?), ("absmax", gather.take(format!("{weight}.absmax"))?)];
    if nested {
        table(gather, format!("{weight}.nested_quant_map"), DynamicMap::standard().values())?;
        parts.push(("nested_absmax", gather.take(format!("{weight}.nested_absmax"))?));
    }
    let (block, dtype) = (state.format.block, state.dtype);
    let encoding = Encoding::FourBit { code, block, nested, dtype };
    let offset = state.nested.map(|nested| f32Bits(nested.offset.to_bits()));
    Ok(gather.put(weight, (state.shape, dtype), encoding, parts, offset)?)
}

/// Takes a table of values out of the index, which must be the one that this build decodes with.
fn table<E: From<FormatError>>(gather: &mut Gather<'_, E>, name: String, expected: &[f32]) -> Result<(), E> {
    let entry = gather.take(name.clone())?;
    let bytes = gather.small(&name, &entry)?;
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let same = entry.dtype == DType::F32
        && values.len() == expected.len()
        && values.iter().zip(expected).all(|(value, expected)| (value - expected).abs() <= TABLE_TOLERANCE);
    if same {
        return Ok(());
    }
    let expected = format!("the {} values of the standard table in F32", expected.len());
    Err(wrong(name, "a table", expected, format!("{} values of {} that differ", values.len(), entry.dtype)).into())
}
