//! Which GGUF block type a tensor gets in a mix, as llama.cpp's `llama_tensor_get_type` chooses it for linear layers.
//!
//! Owns: the rule of `Q4_K_M` and `Q5_K_M` and the types that stand in where rows are no whole blocks. Refuses to know: blocks.

use serde::{Deserialize, Serialize};

use crate::format::GgmlType;
use crate::types::Fqn;

/// One type for all linear layers, or a mix of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GgmlMix {
    /// One type.
    Pure(GgmlType),
    /// `Q4_K`, and `Q6_K` where [`Self::ggml_type`] says it.
    Q4KM,
    /// `Q5_K`, and `Q6_K` likewise.
    Q5KM,
}

impl GgmlMix {
    /// The type of a linear layer's weight whose rows have `columns` elements, in a model of `layers` layers; nothing where
    /// no type of blocks fits the rows.
    ///
    /// A mix gives more bits to the value projection and the last matrix of the MLP in the first and the last eighth of the
    /// layers and in every third between. Rows that are no whole blocks of 256 get the type of blocks of 32 that is next in
    /// size.
    #[must_use]
    pub fn ggml_type(self, fqn: &Fqn, columns: u64, layers: u32) -> Option<GgmlType> {
        let name = fqn.as_str();
        // The last matrix of the MLP is w2 in Mixtral's experts.
        let sensitive = ["v_proj", "down_proj", ".w2."].into_iter().any(|part| name.contains(part));
        let wanted = match fqn.layer() {
            Some(layer) if sensitive => self.sensitive_type(layer, layers),
            _ => self.base(),
        };
        fitting(wanted, columns)
    }

    /// The type of most matrices.
    #[must_use]
    pub const fn base(self) -> GgmlType {
        match self {
            Self::Pure(ggml_type) => ggml_type,
            Self::Q4KM => GgmlType::Q4_K,
            Self::Q5KM => GgmlType::Q5_K,
        }
    }

    /// The type of a matrix of `layer` that a mix may give more bits.
    #[must_use]
    pub const fn sensitive_type(self, layer: u32, layers: u32) -> GgmlType {
        match self {
            Self::Q4KM | Self::Q5KM if more_bits(layer, layers) => GgmlType::Q6_K,
            _ => self.base(),
        }
    }
}

/// `wanted`, or the type that stands in for it where rows of `columns` are no whole blocks; nothing where neither fits.
#[must_use]
pub fn fitting(wanted: GgmlType, columns: u64) -> Option<GgmlType> {
    let fits = |ggml_type: &GgmlType| columns > 0 && columns.is_multiple_of(ggml_type.block_elements());
    Some(wanted).filter(fits).or_else(|| Some(stand_in(wanted)).filter(fits))
}

const fn more_bits(layer: u32, layers: u32) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

const fn stand_in(ggml_type: GgmlType) -> GgmlType {
    match ggml_type {
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K | GgmlType::Q8_K => GgmlType::Q8_0,
        GgmlType::Q2_K | GgmlType::Q3_K => GgmlType::Q4_0,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand for 16 layers: an eighth is 2, so layers 0 and 1, 14 and 15, and 4, 7, 10, 13 between.
    #[test]
    fn a_mix_by_hand() {
        let more: Vec<u32> = (0..16).filter(|&layer| more_bits(layer, 16)).collect();
        assert_eq!(more, [0, 1, 4, 7, 10, 13, 14, 15]);
        let of = |name: &str, columns| GgmlMix::Q4KM.ggml_type(&Fqn::from(name), columns, 16);
        assert_eq!(of("model.layers.4.mlp.down_proj.weight", 1024), Some(GgmlType::Q6_K));
        assert_eq!(of("model.layers.5.mlp.down_proj.weight", 1024), Some(GgmlType::Q4_K));
        assert_eq!(of("model.layers.4.self_attn.q_proj.weight", 1024), Some(GgmlType::Q4_K));
        // 576 = 18 * 32, and no multiple of 256.
        assert_eq!(of("model.layers.4.mlp.down_proj.weight", 576), Some(GgmlType::Q8_0));
        assert_eq!(of("model.layers.5.mlp.down_proj.weight", 576), Some(GgmlType::Q5_0));
        assert_eq!(of("model.layers.5.mlp.down_proj.weight", 100), None);
    }
}
