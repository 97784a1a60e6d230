//! The JSON text that bitsandbytes keeps beside packed weights (`weight.quant_state.bitsandbytes__nf4`).
//!
//! Owns: its fields, their order, and Python's separators and float digits, so that the text is the one Python writes.
//! Refuses to know: keys of a file, the packed bytes.

use std::fmt::Write as _;

use serde_json::Value;

use super::{BlockSize, FourBit, FourBitCode, NESTED_BLOCK};
use crate::error::{Classify, Kind};
use crate::types::{DType, Shape, as_u64};

/// What has to be known to read packed 4-bit weights again.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// The code and the block size.
    pub format: FourBit,
    /// The type that the weights had, and dequantize to.
    pub dtype: DType,
    /// The shape that the weights had.
    pub shape: Shape,
    /// Present when the statistics are quantized too.
    pub nested: Option<NestedState>,
}

/// How the statistics were quantized: groups of 256, f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedState {
    /// The mean that was subtracted.
    pub offset: f32,
}

/// A text that is no quantization state that this build reads.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantStateError {
    /// No JSON.
    #[error("quantization state: not a JSON text")]
    Json {
        /// What the parser met.
        #[source]
        source: serde_json::Error,
    },
    /// A field is absent or has a value that is not supported.
    #[error("quantization state: field {field}: expected {expected}, found {found}")]
    Field {
        /// The name of the field.
        field: &'static str,
        /// What it may hold.
        expected: &'static str,
        /// What it holds, as JSON.
        found: String,
    },
}

impl Classify for QuantStateError {
    fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

impl QuantState {
    /// The JSON text, byte for byte as Python's `json.dumps` writes it. The offset is expected to be finite.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut text = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": ["#,
            self.format.code.name(),
            self.format.block.get(),
            self.dtype.torch_name(),
        );
        for (position, size) in self.shape.0.iter().enumerate() {
            let separator = if position > 0 { ", " } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(text, "{separator}{size}");
        }
        text.push(']');
        if let Some(nested) = self.nested {
            let offset = python_float(f64::from(nested.offset));
            let _ = write!(
                text,
                r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}"#
            );
        }
        text.push('}');
        text
    }

    /// Reads the JSON text; fields that are not known are passed over.
    ///
    /// # Errors
    /// [`QuantStateError`] when it is no JSON, or a field is absent or not supported.
    pub fn parse(json: &[u8]) -> Result<Self, QuantStateError> {
        let value: Value = serde_json::from_slice(json).map_err(|source| QuantStateError::Json { source })?;
        let code = field(&value, "quant_type", "\"nf4\" or \"fp4\"", |v| FourBitCode::from_name(v.as_str()?))?;
        let block = field(&value, "blocksize", "a power of two from 32 to 4096", |v| {
            BlockSize::new(u32::try_from(v.as_u64()?).ok()?).ok()
        })?;
        let dtype = field(&value, "dtype", "a torch dtype of floats", |v| {
            v.as_str()?.parse().ok().filter(|dtype: &DType| dtype.is_weight_float())
        })?;
        let shape = field(&value, "shape", "a list of sizes", |v| {
            v.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>().map(Shape)
        })?;
        let nested = if value.get("nested_offset").is_some() { Some(NestedState::read(&value)?) } else { None };
        Ok(Self { format: FourBit { code, block }, dtype, shape, nested })
    }
}

impl NestedState {
    fn read(value: &Value) -> Result<Self, QuantStateError> {
        field(value, "nested_blocksize", "256", |v| (v.as_u64()? == as_u64(NESTED_BLOCK)).then_some(()))?;
        field(value, "nested_dtype", "\"float32\"", |v| (v.as_str()? == "float32").then_some(()))?;
        let offset = field(value, "nested_offset", "a finite f32", |v| {
            #[expect(clippy::cast_possible_truncation, reason = "an f32 that was widened to be printed")]
            let offset = v.as_f64()? as f32;
            offset.is_finite().then_some(offset)
        })?;
        Ok(Self { offset })
    }
}

fn field<T>(
    value: &Value,
    field: &'static str,
    expected: &'static str,
    read: impl FnOnce(&Value) -> Option<T>,
) -> Result<T, QuantStateError> {
    let found = value.get(field).unwrap_or(&Value::Null);
    read(found).ok_or_else(|| QuantStateError::Field { field, expected, found: found.to_string() })
}

/// The text of Python's `repr(float)`: the shortest digits that read back the same, of those the nearest and at a tie the
/// even ones; an exponent of at least two digits below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        let infinity = if value > 0.0 { "Infinity" } else { "-Infinity" };
        return if value.is_nan() { "NaN" } else { infinity }.to_owned();
    }
    let (digits, exponent) = python_digits(value.abs());
    let sign = if value.is_sign_negative() { "-" } else { "" };
    if !(-4..16).contains(&exponent) {
        let (first, rest) = digits.split_at(1);
        let point = if rest.is_empty() { "" } else { "." };
        let exponent_sign = if exponent < 0 { '-' } else { '+' };
        return format!("{sign}{first}{point}{rest}e{exponent_sign}{:02}", exponent.unsigned_abs());
    }
    match usize::try_from(exponent) {
        Err(_) => format!("{sign}0.{:0>width$}", digits, width = digits.len() + exponent.unsigned_abs() as usize - 1),
        Ok(exponent) if digits.len() <= exponent + 1 => format!("{sign}{digits:0<width$}.0", width = exponent + 1),
        Ok(exponent) => format!("{sign}{}.{}", &digits[..=exponent], &digits[exponent + 1..]),
    }
}

/// The digits of a value that is not negative, and the power of ten of the first of them.
fn python_digits(value: f64) -> (String, i32) {
    let shortest = format!("{value:e}");
    let count = shortest.bytes().take_while(|byte| *byte != b'e').filter(u8::is_ascii_digit).count();
    // Of as many digits Rust's shortest form may be the odd one of a tie; rounding to a number of digits goes to even.
    let rounded = format!("{value:.*e}", count - 1);
    let text = if rounded.parse() == Ok(value) { rounded } else { shortest };
    let (digits, exponent) = text.split_once('e').expect("the format always writes an exponent");
    (digits.replace('.', ""), exponent.parse().expect("the format writes a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected texts: `repr` of CPython 3.12.
    #[test]
    fn floats_as_python_prints_them() {
        let cases: [(f64, &str); 16] = [
            // Halfway between ...062 and ...063.
            (f64::from_bits(0x3fbb_8640_0000_0000), "0.10751724243164062"),
            (-2.5, "-2.5"),
            (1.25e-5, "1.25e-05"),
            (5e-324, "5e-324"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.014_005_530_625_581_741, "0.014005530625581741"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (f64::from(1.5e-7_f32), "1.500000053056283e-07"),
            (123_456_789.0, "123456789.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
            (f64::from(f32::from_bits(1)), "1.401298464324817e-45"),
        ];
        for (value, expected) in cases {
            assert_eq!(python_float(value), expected);
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let good = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64], "later": 1}"#;
        assert!(QuantState::parse(good.as_bytes()).is_ok());
        for (from, to, field) in [
            ("nf4", "int4", "quant_type"),
            ("64, \"dtype", "48, \"dtype", "blocksize"),
            ("bfloat16", "float64", "dtype"),
            ("[2, 64]", "[2, -64]", "shape"),
            ("\"later\": 1", "\"nested_offset\": 1.0", "nested_blocksize"),
        ] {
            let text = good.replace(from, to);
            let error = QuantState::parse(text.as_bytes()).expect_err("an unsupported field");
            assert!(error.to_string().contains(field), "{error}");
            assert_eq!(error.kind(), Kind::Corrupt);
        }
        assert!(QuantState::parse(b"{").is_err());
        assert!(QuantState::parse(b"[1]").is_err());
    }
}
