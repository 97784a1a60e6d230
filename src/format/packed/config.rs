//! What config.json says of the quantization of a model's weights.

use std::collections::BTreeMap;

use serde_json::Value;

use super::wrong;
use crate::format::FormatError;
use crate::quant::affine::CodeBits;
use crate::quant::pack::GptqVersion;
use crate::types::DType;

/// How the weights were quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// bitsandbytes, 4-bit and int8.
    BitsAndBytes,
    /// `group` is absent where a group is all inputs (`group_size` -1).
    Gptq { bits: CodeBits, group: Option<u32>, version: GptqVersion },
    /// 4 bits, version `gemm`.
    Awq { group: u32 },
    /// HQQ.
    Hqq,
    /// E4M3, with the block of scales where it has blocks.
    Fp8 { block: Option<[u32; 2]> },
    /// MLX's affine mode, with the modules that have other bits and groups.
    Mlx { bits: CodeBits, group: u32, modules: BTreeMap<String, (CodeBits, u32)> },
}

/// The parts of config.json that concern components.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QuantizationConfig {
    pub(super) method: Option<Method>,
    /// `torch_dtype` or `dtype`; f16 where there is none, as transformers takes it for quantized weights.
    pub(super) weight_dtype: DType,
}

impl QuantizationConfig {
    /// A text that is no JSON is left to the parser of architectures, which names the file.
    pub(super) fn parse(config_json: Option<&[u8]>) -> Result<Self, FormatError> {
        let value: Value = config_json.and_then(|json| serde_json::from_slice(json).ok()).unwrap_or_default();
        let dtype = value.get("dtype").or_else(|| value.get("torch_dtype")).and_then(Value::as_str);
        let dtype = dtype.and_then(|name| name.parse().ok()).filter(|dtype: &DType| dtype.is_weight_float());
        let mlx = value.get("quantization").filter(|section| section.is_object());
        let method = match (value.get("quantization_config").filter(|section| section.is_object()), mlx) {
            (Some(section), _) if section.get("quant_method").is_some() => Some(Method::of(section)?),
            (_, Some(section)) | (Some(section), _) => Some(Method::mlx(section)?),
            (None, None) => None,
        };
        Ok(Self { method, weight_dtype: dtype.unwrap_or(DType::F16) })
    }
}

impl Method {
    fn of(section: &Value) -> Result<Self, FormatError> {
        let name = section.get("quant_method").and_then(Value::as_str).unwrap_or_default();
        match name {
            "bitsandbytes" => Ok(Self::BitsAndBytes),
            "hqq" => Ok(Self::Hqq),
            "gptq" => {
                let format = section.get("checkpoint_format").and_then(Value::as_str).unwrap_or("gptq");
                let version = match format {
                    "gptq" => GptqVersion::V1,
                    "gptq_v2" => GptqVersion::V2,
                    found => return Err(fault("checkpoint_format", "gptq or gptq_v2", found)),
                };
                let group = section.get("group_size").and_then(Value::as_i64).unwrap_or(-1);
                let group = if group == -1 { None } else { Some(size(section, "group_size")?) };
                Ok(Self::Gptq { bits: bits(section)?, group, version })
            }
            "awq" => {
                let version = section.get("version").and_then(Value::as_str).unwrap_or("gemm");
                if !version.eq_ignore_ascii_case("gemm") {
                    return Err(fault("version", "gemm", version));
                }
                if bits(section)? != CodeBits::B4 {
                    return Err(fault("bits", "4", &bits(section)?.get().to_string()));
                }
                Ok(Self::Awq { group: size(section, "group_size")? })
            }
            "fp8" | "fbgemm_fp8" | "compressed-tensors" => {
                let block = section.get("weight_block_size").and_then(Value::as_array).map(|sizes| {
                    let mut sizes = sizes.iter().filter_map(|size| u32::try_from(size.as_u64()?).ok());
                    let block = (sizes.next(), sizes.next(), sizes.next());
                    let expected = "two sizes";
                    let (Some(rows), Some(columns), None) = block else {
                        return Err(fault("weight_block_size", expected, &format!("{block:?}")));
                    };
                    Ok([rows, columns])
                });
                Ok(Self::Fp8 { block: block.transpose()? })
            }
            found => Err(fault("quant_method", "bitsandbytes, gptq, awq, hqq, fp8 or compressed-tensors", found)),
        }
    }

    fn mlx(section: &Value) -> Result<Self, FormatError> {
        let mode = section.get("mode").and_then(Value::as_str).unwrap_or("affine");
        if mode != "affine" {
            return Err(fault("mode", "affine", mode));
        }
        let of = |section: &Value| Ok::<_, FormatError>((bits(section)?, size(section, "group_size")?));
        let modules = section.as_object().into_iter().flatten().filter(|(_, value)| value.is_object());
        let modules = modules.map(|(module, section)| Ok((module.clone(), of(section)?))).collect::<Result<_, _>>()?;
        let (bits, group) = of(section)?;
        Ok(Self::Mlx { bits, group, modules })
    }
}

fn fault(key: &'static str, expected: &str, found: &str) -> FormatError {
    wrong("config.json", key, expected, found.to_owned())
}

fn bits(section: &Value) -> Result<CodeBits, FormatError> {
    let found = section.get("bits").unwrap_or(&Value::Null);
    let bits = found.as_u64().and_then(|bits| u8::try_from(bits).ok()).and_then(|bits| CodeBits::new(bits).ok());
    bits.ok_or_else(|| fault("bits", "1 to 6 or 8", &found.to_string()))
}

fn size(section: &Value, key: &'static str) -> Result<u32, FormatError> {
    let found = section.get(key).unwrap_or(&Value::Null);
    let size = found.as_u64().and_then(|size| u32::try_from(size).ok()).filter(|size| *size > 0);
    size.ok_or_else(|| fault(key, "a positive number", &found.to_string()))
}
