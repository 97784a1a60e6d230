//! `[quantization]` of job.toml.

use serde::Deserialize;

use super::ConfigError;
use crate::format::GgmlType;
use crate::plan::{GgmlMix, ModuleRule, QuantizationRule};
use crate::quant::affine::{CodeBits, GroupAxis, MlxRule};
use crate::quant::{BlockSize, FourBitCode};
use crate::types::{DType, as_usize};

/// `[quantization]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizationConfig {
    /// The format.
    pub format: QuantizationFormat,
    /// Double quantization (4-bit formats).
    pub double: bool,
    /// Elements per block (4-bit formats) or group (`mlx`, `hqq`); 64 by default.
    pub block: Option<u32>,
    /// Bits of a code (`mlx`: 2, 3, 4, 5, 6 or 8; `hqq`: 1, 2, 3, 4, 5, 6 or 8); 4 by default.
    pub bits: Option<u8>,
    /// How groups lie (`hqq`): 1, along rows, by default; or 0.
    pub axis: Option<u8>,
    /// Modules that stay as they are.
    pub skip: Vec<String>,
    /// Other formats for some modules; the first rule that names a module counts.
    pub rules: Vec<ModuleConfig>,
    /// Whether the job says nothing and its training wants some quantization: weights that have one keep it.
    #[serde(skip)]
    pub implied: bool,
}

/// `[[quantization.rules]]`: the format of some modules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModuleConfig {
    /// Patterns of names: `down_proj` is any name in which it occurs, `model.layers.*.mlp.*` a whole name.
    pub modules: Vec<String>,
    /// As of [`QuantizationConfig`].
    pub format: QuantizationFormat,
    /// As of [`QuantizationConfig`].
    pub double: bool,
    /// As of [`QuantizationConfig`].
    pub block: Option<u32>,
    /// As of [`QuantizationConfig`].
    pub bits: Option<u8>,
    /// As of [`QuantizationConfig`].
    pub axis: Option<u8>,
    /// The type of what is not quantized: `float32`, `float16` or `bfloat16`; `load.dtype` by default.
    pub dtype: Option<String>,
}

impl ModuleConfig {
    fn rule(&self) -> Result<ModuleRule, ConfigError> {
        if self.modules.is_empty() || self.modules.iter().any(String::is_empty) {
            let (key, expected) = ("quantization.rules.modules", "names of modules");
            return Err(ConfigError::Value { key, expected, found: format!("{:?}", self.modules) });
        }
        let dtype = |name: &String| {
            let dtype = name.parse::<DType>().ok().filter(|dtype| dtype.is_weight_float());
            dtype.ok_or_else(|| ConfigError::Value {
                key: "quantization.rules.dtype",
                expected: "float32, float16 or bfloat16",
                found: name.clone(),
            })
        };
        let alone = QuantizationConfig {
            format: self.format,
            double: self.double,
            block: self.block,
            bits: self.bits,
            axis: self.axis,
            ..QuantizationConfig::default()
        };
        let dtype = self.dtype.as_ref().map(dtype).transpose()?;
        Ok(ModuleRule { patterns: self.modules.clone(), rule: alone.rule()?, dtype })
    }
}

impl QuantizationConfig {
    /// What is quantized.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for sizes, bits or switches that the format does not have.
    pub fn rule(&self) -> Result<QuantizationRule, ConfigError> {
        let otherwise = self.rule_of_all()?;
        if self.rules.is_empty() {
            return Ok(otherwise);
        }
        let modules = self.rules.iter().map(ModuleConfig::rule).collect::<Result<_, _>>()?;
        Ok(QuantizationRule::Mixed { modules, otherwise: Box::new(otherwise) })
    }

    fn rule_of_all(&self) -> Result<QuantizationRule, ConfigError> {
        use QuantizationFormat as Format;
        self.check_switches()?;
        let skip = self.skip.clone();
        match self.format {
            Format::None => Ok(QuantizationRule::None),
            Format::Nf4 => self.four_bit(FourBitCode::Nf4),
            Format::Fp4 => self.four_bit(FourBitCode::Fp4),
            Format::Int8 => Ok(QuantizationRule::Int8 { skip }),
            Format::Mlx => self.mlx(),
            Format::Hqq => self.hqq(),
            format => Ok(format.ggml_mix().map_or(QuantizationRule::None, |mix| QuantizationRule::Ggml { mix, skip })),
        }
    }

    /// That nothing is asked for which the format does not have.
    fn check_switches(&self) -> Result<(), ConfigError> {
        use QuantizationFormat as Format;
        let refuse = |key, expected, found: String| Err(ConfigError::Value { key, expected, found });
        let affine = matches!(self.format, Format::Mlx | Format::Hqq);
        if let (Some(bits), false) = (self.bits, affine) {
            let expected = "nothing, because the format has its own; it is for mlx and hqq";
            return refuse("quantization.bits", expected, bits.to_string());
        }
        if let (Some(axis), true) = (self.axis, self.format != Format::Hqq) {
            return refuse("quantization.axis", "nothing; it is for hqq", axis.to_string());
        }
        if let (Some(block), Some(_)) = (self.block, self.format.ggml_mix()) {
            let expected = "nothing, because GGUF's blocks have their size";
            return refuse("quantization.block", expected, block.to_string());
        }
        if self.double && !matches!(self.format, Format::Nf4 | Format::Fp4) {
            return refuse("quantization.double", "false; it is for nf4 and fp4", "true".to_owned());
        }
        Ok(())
    }

    fn four_bit(&self, code: FourBitCode) -> Result<QuantizationRule, ConfigError> {
        let size = self.block.unwrap_or(64);
        let block = BlockSize::new(size).map_err(|_| ConfigError::Value {
            key: "quantization.block",
            expected: "a power of two from 32 to 4096",
            found: size.to_string(),
        })?;
        Ok(QuantizationRule::FourBit { code, block, nested: self.double, skip: self.skip.clone() })
    }

    fn hqq(&self) -> Result<QuantizationRule, ConfigError> {
        let value = |key, expected, found: String| ConfigError::Value { key, expected, found };
        let bits = self.bits.unwrap_or(4);
        let bits =
            CodeBits::new(bits).map_err(|_| value("quantization.bits", "1, 2, 3, 4, 5, 6 or 8", bits.to_string()))?;
        let group = self.block.unwrap_or(64);
        if group < 8 || !group.is_multiple_of(8) {
            return Err(value("quantization.block", "a multiple of 8, because the format is hqq", group.to_string()));
        }
        let axis = match self.axis.unwrap_or(1) {
            0 => GroupAxis::Columns,
            1 => GroupAxis::Runs,
            found => return Err(value("quantization.axis", "0 or 1", found.to_string())),
        };
        Ok(QuantizationRule::Hqq { bits, group, axis, skip: self.skip.clone() })
    }

    fn mlx(&self) -> Result<QuantizationRule, ConfigError> {
        let value = |key, expected, found: String| ConfigError::Value { key, expected, found };
        let (bits, group) = (self.bits.unwrap_or(4), self.block.unwrap_or(64));
        let bits = CodeBits::new(bits).ok().filter(|bits| bits.get() > 1);
        let found = || self.bits.unwrap_or(4).to_string();
        let bits = bits.ok_or_else(|| value("quantization.bits", "2, 3, 4, 5, 6 or 8", found()))?;
        let rule = MlxRule::new(bits, as_usize(u64::from(group)))
            .map_err(|_| value("quantization.block", "32, 64 or 128, because the format is mlx", group.to_string()))?;
        Ok(QuantizationRule::Mlx { rule, skip: self.skip.clone() })
    }
}

/// The formats that a load can make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum QuantizationFormat {
    /// No quantization.
    #[default]
    None,
    /// 4-bit NormalFloat.
    Nf4,
    /// 4-bit float.
    Fp4,
    /// LLM.int8 rows.
    Int8,
    /// MLX's affine groups.
    Mlx,
    /// HQQ's groups.
    Hqq,
    /// GGUF's blocks of 32 with 8 bits.
    #[serde(rename = "q8_0")]
    #[value(name = "q8_0")]
    Q8Zero,
    /// GGUF's blocks of 32 with 4 bits.
    #[serde(rename = "q4_0")]
    #[value(name = "q4_0")]
    Q4Zero,
    /// GGUF's blocks of 256 with 4 bits.
    #[serde(rename = "q4_k")]
    #[value(name = "q4_k")]
    Q4K,
    /// GGUF's blocks of 256 with 5 bits.
    #[serde(rename = "q5_k")]
    #[value(name = "q5_k")]
    Q5K,
    /// GGUF's blocks of 256 with 6 bits.
    #[serde(rename = "q6_k")]
    #[value(name = "q6_k")]
    Q6K,
    /// llama.cpp's mix of 4 and 6 bits.
    #[serde(rename = "q4_k_m")]
    #[value(name = "q4_k_m")]
    Q4KM,
    /// llama.cpp's mix of 5 and 6 bits.
    #[serde(rename = "q5_k_m")]
    #[value(name = "q5_k_m")]
    Q5KM,
}

impl QuantizationFormat {
    /// What GGUF's formats make of tensors.
    const fn ggml_mix(self) -> Option<GgmlMix> {
        match self {
            Self::Q8Zero => Some(GgmlMix::Pure(GgmlType::Q8_0)),
            Self::Q4Zero => Some(GgmlMix::Pure(GgmlType::Q4_0)),
            Self::Q4K => Some(GgmlMix::Pure(GgmlType::Q4_K)),
            Self::Q5K => Some(GgmlMix::Pure(GgmlType::Q5_K)),
            Self::Q6K => Some(GgmlMix::Pure(GgmlType::Q6_K)),
            Self::Q4KM => Some(GgmlMix::Q4KM),
            Self::Q5KM => Some(GgmlMix::Q5KM),
            Self::None | Self::Nf4 | Self::Fp4 | Self::Int8 | Self::Mlx | Self::Hqq => None,
        }
    }
}
