//! What other tools want beside the components of a tensor: tables, texts and numbers that say how to read them.
//!
//! Owns: their names and bytes, as bitsandbytes 0.50 and hqq 0.2.8 write them. Refuses to know: files.

use crate::plan::Encoding;
use crate::quant::affine::{CodeBits, GroupAxis, HqqRule};
use crate::quant::{DynamicMap, FourBit, NestedState, QuantState};
use crate::types::{DType, Fqn, Shape, as_u64, as_usize, f32Bits};

/// The most characters of an offset in a quant state.
const OFFSET_CHARACTERS: usize = 25;

/// A small tensor beside a quantized one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extra {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Shape,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Extra {
    /// A quant state's text with spaces at its end, so that its length does not depend on the offset in it. JSON's readers
    /// pass over them.
    #[must_use]
    pub fn padded(mut self) -> Self {
        const KEY: &[u8] = b"\"nested_offset\": ";
        if let Some(start) = self.bytes.windows(KEY.len()).position(|bytes| bytes == KEY) {
            self.bytes.resize(start + KEY.len() + OFFSET_CHARACTERS + 1, b' ');
            self.shape = Shape::from([as_u64(self.bytes.len())]);
        }
        self
    }
}

/// The tensors beside `fqn`; none for most formats.
#[must_use]
pub fn extras(fqn: &Fqn, encoding: &Encoding, shape: &Shape, nested_offset: Option<f32Bits>) -> Vec<Extra> {
    let name = fqn.as_str();
    let module = name.strip_suffix(".weight").unwrap_or(name);
    match *encoding {
        Encoding::Int8 => vec![byte(format!("{module}.weight_format"), 0)],
        Encoding::FourBit { code, block, nested, dtype } => {
            let floats = |end: &str, values: &[f32]| Extra {
                name: format!("{name}.{end}"),
                dtype: DType::F32,
                shape: Shape::from([as_u64(values.len())]),
                bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            };
            let mut extras = vec![floats("quant_map", code.values())];
            if nested {
                extras.push(floats("nested_quant_map", DynamicMap::standard().values()));
            }
            let offset = nested_offset.map_or(0.0, |bits| f32::from_bits(bits.0));
            let state = QuantState {
                format: FourBit { code, block },
                dtype,
                shape: shape.clone(),
                nested: nested.then_some(NestedState { offset }),
            };
            let name = format!("{name}.quant_state.bitsandbytes__{}", code.name());
            extras.push(text(name, &state.to_json()));
            extras
        }
        Encoding::Hqq { bits, group, axis, dtype } => hqq(module, (bits, group, axis), dtype, shape),
        Encoding::Plain { .. }
        | Encoding::Mlx { .. }
        | Encoding::Ggml { .. }
        | Encoding::Gptq { .. }
        | Encoding::Awq { .. }
        | Encoding::Fp8 { .. } => Vec::new(),
    }
}

/// `HQQLinear.state_dict` with `encoded_state_dict`.
fn hqq(module: &str, (bits, group, axis): (CodeBits, u32, GroupAxis), dtype: DType, shape: &Shape) -> Vec<Extra> {
    let packing = match bits.get() {
        3 => "3bit_32".to_owned(),
        bits @ (1 | 2 | 4) => format!("{bits}bit_u8"),
        _ => "8bit_u8".to_owned(),
    };
    let view = if bits == CodeBits::B3 { "torch.int32" } else { "torch.uint8" };
    let round_zero = HqqRule::new(bits, as_usize(u64::from(group))).round_zero;
    let of = |key: &str| format!("{module}.{key}");
    let number = |key: &str, value: i32| Extra {
        name: of(key),
        dtype: DType::I32,
        shape: Shape::default(),
        bytes: value.to_le_bytes().to_vec(),
    };
    let sizes = Extra {
        name: of("shape"),
        dtype: DType::I64,
        shape: Shape::from([as_u64(shape.0.len())]),
        bytes: shape.0.iter().flat_map(|size| size.to_le_bytes()).collect(),
    };
    let mut extras = vec![
        sizes,
        number("nbits", i32::from(bits.get())),
        number("group_size", i32::try_from(group).unwrap_or(i32::MAX)),
        number("axis", i32::from(axis == GroupAxis::Runs)),
        text(of("packing"), &packing),
        text(of("unpack_view_dtype"), view),
        text(of("compute_dtype"), &format!("torch.{}", dtype.torch_name())),
    ];
    let switches = [
        ("view_as_float", false),
        ("quant_scale", false),
        ("quant_zero", false),
        ("offload_meta", false),
        ("encoded_state_dict", true),
        ("stores_quant_config", true),
        ("channel_wise", true),
        ("optimize", true),
        ("round_zero", round_zero),
    ];
    extras.extend(switches.map(|(key, on)| byte(of(key), u8::from(on))));
    extras
}

fn byte(name: String, value: u8) -> Extra {
    Extra { name, dtype: DType::U8, shape: Shape::default(), bytes: vec![value] }
}

fn text(name: String, value: &str) -> Extra {
    Extra { name, dtype: DType::U8, shape: Shape::from([as_u64(value.len())]), bytes: value.as_bytes().to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{BlockSize, FourBitCode};

    /// Whatever the offset, the padded text has one length, and is the same JSON.
    #[test]
    fn a_padded_state_has_one_length() {
        let nested =
            |nested| Encoding::FourBit { code: FourBitCode::Nf4, block: BlockSize::B64, nested, dtype: DType::BF16 };
        let state = |encoding: &Encoding, offset: f32| {
            let bits = Some(f32Bits(offset.to_bits()));
            let extras = extras(&Fqn::from("a.weight"), encoding, &Shape::from([8, 64]), bits);
            extras.last().expect("a quant state").clone()
        };
        for offset in [0.0, -1.234_567_9e-30, 0.1, f32::MAX, -f32::MIN_POSITIVE] {
            let (plain, padded) = (state(&nested(true), offset), state(&nested(true), offset).padded());
            assert_eq!(padded.bytes.len(), state(&nested(true), 1.0).padded().bytes.len(), "{offset}");
            let parsed = QuantState::parse(&padded.bytes).expect("JSON with spaces");
            assert_eq!(parsed, QuantState::parse(&plain.bytes).expect("JSON"), "{offset}");
            assert_eq!(parsed.nested.map(|nested| nested.offset), Some(offset));
        }
        let plain = state(&nested(false), 0.0);
        assert_eq!(plain.clone().padded(), plain, "no offset, no padding");
    }
}
