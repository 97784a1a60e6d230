//! The flags that say how a model is quantized while it is loaded.

use clap::Args;

use crate::config::{QuantizationConfig, QuantizationFormat};

/// Flags over `[quantization]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct QuantizeFlags {
    /// Quantize linear layers while loading
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Option<QuantizationFormat>,
    /// Quantize the statistics too (nf4, fp4)
    #[arg(long)]
    double: bool,
    /// Bits of a code (mlx: 2, 3, 4, 5, 6 or 8; hqq: 1 too)
    #[arg(long, value_name = "N")]
    bits: Option<u8>,
    /// Weights that share a scale (nf4, fp4, mlx, hqq); 64 by default
    #[arg(long, value_name = "N")]
    block: Option<u32>,
    /// How groups lie (hqq): 1 along rows, 0 across
    #[arg(long, value_name = "AXIS")]
    axis: Option<u8>,
}

impl QuantizeFlags {
    /// Puts the flags over a job file's entries.
    pub fn apply(&self, config: &mut QuantizationConfig) {
        config.format = self.quantize.unwrap_or(config.format);
        config.double |= self.double;
        config.bits = self.bits.or(config.bits);
        config.block = self.block.or(config.block);
        config.axis = self.axis.or(config.axis);
    }

    /// The flags alone.
    #[must_use]
    pub fn config(&self) -> QuantizationConfig {
        let mut config = QuantizationConfig::default();
        self.apply(&mut config);
        config
    }
}
