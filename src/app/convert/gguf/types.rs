//! The types of a GGUF file's tensors, as llama.cpp's converter and `llama-quantize` choose them.
//!
//! Owns: the names of files' types and the rule by tensor, after `llama_tensor_get_type`. Refuses to know: blocks.

use crate::format::GgmlType;
use crate::plan::{Encoding, GgmlMix, fitting};
use crate::types::{DType, Shape};

/// What most of a file's matrices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are the field's own")]
pub enum GgufType {
    F32,
    F16,
    #[value(name = "bf16")]
    Bf16,
    #[value(name = "q8_0")]
    Q8Zero,
    #[value(name = "q4_0")]
    Q4Zero,
    #[value(name = "q4_k")]
    Q4K,
    #[value(name = "q5_k")]
    Q5K,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q4_k_m")]
    Q4KM,
    #[value(name = "q5_k_m")]
    Q5KM,
}

/// What of a model decides its tensors' types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Traits {
    pub(super) layers: u32,
    /// Experts of a layer; 0 for a dense model.
    pub(super) experts: u64,
    /// Whether the head is the embedding.
    pub(super) tied: bool,
    /// Whether some query heads share the heads of keys and values.
    pub(super) grouped: bool,
}

impl GgufType {
    /// The name in flags.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8Zero => "q8_0",
            Self::Q4Zero => "q4_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Q4KM => "q4_k_m",
            Self::Q5KM => "q5_k_m",
        }
    }

    /// `general.file_type`: llama.cpp's `enum llama_ftype`, of the types of one kind of blocks its small mix.
    pub(super) const fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4Zero => 2,
            Self::Q8Zero => 7,
            Self::Q4K => 14,
            Self::Q4KM => 15,
            Self::Q5K => 16,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }

    const fn mix(self) -> GgmlMix {
        match self {
            Self::F32 => GgmlMix::Pure(GgmlType::F32),
            Self::F16 => GgmlMix::Pure(GgmlType::F16),
            Self::Bf16 => GgmlMix::Pure(GgmlType::BF16),
            Self::Q8Zero => GgmlMix::Pure(GgmlType::Q8_0),
            Self::Q4Zero => GgmlMix::Pure(GgmlType::Q4_0),
            Self::Q4K => GgmlMix::Pure(GgmlType::Q4_K),
            Self::Q5K => GgmlMix::Pure(GgmlType::Q5_K),
            Self::Q6K => GgmlMix::Pure(GgmlType::Q6_K),
            Self::Q4KM => GgmlMix::Q4KM,
            Self::Q5KM => GgmlMix::Q5KM,
        }
    }

    /// The type of the tensor that llama.cpp calls `name`; `shape` is that of the file, outermost first.
    pub(super) fn of(self, name: &str, layer: Option<u32>, shape: &Shape, model: Traits) -> GgmlType {
        let module = name.strip_suffix(".weight").unwrap_or_default();
        let exact = module.is_empty() || module == "position_embd" || module.contains(".ffn_gate_inp");
        if exact || shape.dims() < 2 {
            return GgmlType::F32;
        }
        let base = self.mix().base();
        if base.block_elements() == 1 {
            return base;
        }
        let columns = shape.0.last().copied().unwrap_or(0);
        let head = module == "output" || (model.tied && module == "token_embd");
        let wanted = if head { head_type(base, columns) } else { self.of_layer(module, layer, model) };
        fitting(wanted, columns).unwrap_or(GgmlType::F16)
    }

    /// The type of a matrix other than the head, whatever its rows.
    fn of_layer(self, module: &str, layer: Option<u32>, model: Traits) -> GgmlType {
        let mix = self.mix();
        let sensitive = || layer.map_or_else(|| mix.base(), |layer| mix.sensitive_type(layer, model.layers));
        let part = module.rsplit('.').next().unwrap_or(module);
        match part {
            // Mixtral's attention is small beside its experts.
            "attn_v" | "attn_k" if model.experts == 8 => GgmlType::Q8_0,
            "attn_output" if model.experts == 8 && mix.base() == GgmlType::Q4_K => GgmlType::Q5_K,
            // In the models of 70 billion parameters eight heads share these.
            "attn_v" if model.layers == 80 && model.grouped && sensitive() == GgmlType::Q4_K => GgmlType::Q5_K,
            "attn_v" => sensitive(),
            "attn_qkv" => match self {
                Self::Q4KM => GgmlType::Q5_K,
                Self::Q5KM => GgmlType::Q6_K,
                _ => mix.base(),
            },
            _ if part.starts_with("ffn_down") => sensitive(),
            _ => mix.base(),
        }
    }
}

/// The head, on which all logits depend, has at least 6 bits.
const fn head_type(base: GgmlType, columns: u64) -> GgmlType {
    if matches!(base, GgmlType::Q8_0) || !columns.is_multiple_of(base.block_elements()) {
        GgmlType::Q8_0
    } else {
        GgmlType::Q6_K
    }
}

/// What a load makes of a tensor of this type.
pub(super) const fn encoding(ggml_type: GgmlType) -> Encoding {
    match ggml_type {
        GgmlType::F32 => Encoding::Plain { dtype: DType::F32 },
        GgmlType::F16 => Encoding::Plain { dtype: DType::F16 },
        GgmlType::BF16 => Encoding::Plain { dtype: DType::BF16 },
        ggml_type => Encoding::Ggml { ggml_type },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENSE: Traits = Traits { layers: 16, experts: 0, tied: false, grouped: true };

    fn of(file: GgufType, name: &str, columns: u64, model: Traits) -> GgmlType {
        let layer = name.split('.').nth(1).and_then(|part| part.parse().ok());
        file.of(name, layer, &[64, columns].into(), model)
    }

    /// By llama-quant.cpp, `llama_tensor_get_type`. Of 16 layers 4 gets more bits, 5 does not.
    #[test]
    fn a_mix_by_hand() {
        let q4_k_m = |name| of(GgufType::Q4KM, name, 1024, DENSE);
        assert_eq!(q4_k_m("token_embd.weight"), GgmlType::Q4_K);
        assert_eq!(q4_k_m("output.weight"), GgmlType::Q6_K);
        assert_eq!(q4_k_m("blk.4.attn_v.weight"), GgmlType::Q6_K);
        assert_eq!(q4_k_m("blk.5.attn_v.weight"), GgmlType::Q4_K);
        assert_eq!(q4_k_m("blk.4.ffn_down_exps.weight"), GgmlType::Q6_K);
        assert_eq!(q4_k_m("blk.4.attn_qkv.weight"), GgmlType::Q5_K);
        assert_eq!(q4_k_m("blk.4.ffn_gate_inp.weight"), GgmlType::F32);
        assert_eq!(q4_k_m("position_embd.weight"), GgmlType::F32);
        assert_eq!(q4_k_m("blk.4.attn_q.bias"), GgmlType::F32);
        let tied = Traits { tied: true, ..DENSE };
        assert_eq!(of(GgufType::Q4KM, "token_embd.weight", 1024, tied), GgmlType::Q6_K);
        assert_eq!(of(GgufType::Q4Zero, "token_embd.weight", 1024, tied), GgmlType::Q6_K);
        assert_eq!(of(GgufType::Q8Zero, "output.weight", 1024, DENSE), GgmlType::Q8_0);
        let vector: Shape = [1024].into();
        assert_eq!(GgufType::F16.of("output_norm.weight", None, &vector, DENSE), GgmlType::F32);
        assert_eq!(of(GgufType::F16, "blk.0.attn_q.weight", 7, DENSE), GgmlType::F16);
    }

    /// 576 = 18 * 32 and no multiple of 256; 100 is a multiple of neither.
    #[test]
    fn rows_that_are_no_whole_blocks() {
        let q4_k_m = |name, columns| of(GgufType::Q4KM, name, columns, DENSE);
        assert_eq!(q4_k_m("token_embd.weight", 576), GgmlType::Q5_0);
        assert_eq!(q4_k_m("output.weight", 576), GgmlType::Q8_0);
        assert_eq!(q4_k_m("blk.4.ffn_down.weight", 576), GgmlType::Q8_0);
        assert_eq!(of(GgufType::Q5K, "blk.5.attn_q.weight", 576, DENSE), GgmlType::Q5_1);
        assert_eq!(q4_k_m("blk.5.attn_q.weight", 100), GgmlType::F16);
        assert_eq!(of(GgufType::Q8Zero, "output.weight", 100, DENSE), GgmlType::F16);
    }

    #[test]
    fn models_of_their_own_rules() {
        let mixtral = Traits { experts: 8, ..DENSE };
        assert_eq!(of(GgufType::Q4KM, "blk.5.attn_k.weight", 1024, mixtral), GgmlType::Q8_0);
        assert_eq!(of(GgufType::Q4KM, "blk.5.attn_output.weight", 1024, mixtral), GgmlType::Q5_K);
        let large = Traits { layers: 80, ..DENSE };
        // An eighth is 10; (13 - 10) % 3 is not 2.
        assert_eq!(of(GgufType::Q4KM, "blk.13.attn_v.weight", 1024, large), GgmlType::Q5_K);
        assert_eq!(
            of(GgufType::Q4KM, "blk.13.attn_v.weight", 1024, Traits { grouped: false, ..large }),
            GgmlType::Q4_K
        );
    }
}
