//! GPT-2 models of fixed sizes, for training from the start.

use std::fmt;
use std::str::FromStr;

use serde_json::json;

use super::generate::pretty;
use crate::types::DType;

/// GPT-2's byte-pair vocabulary.
const VOCABULARY: u64 = 50_257;
const POSITIONS: u64 = 1024;

/// A size with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// 5 layers, 5 heads, 320 wide: 38.7 M parameters, the output head being a matrix of its own. With a tied head it would
    /// have 22.6 M.
    M38,
    /// 12 layers, 12 heads, 768 wide: 124.4 M parameters, the output head tied. The smallest published GPT-2.
    M124,
    /// 24 layers, 16 heads, 1024 wide: 354.8 M parameters, the output head tied. The second published GPT-2.
    M350,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 3] = [Self::M38, Self::M124, Self::M350];

    /// The name, `38M`, `124M` or `350M`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::M38 => "38M",
            Self::M124 => "124M",
            Self::M350 => "350M",
        }
    }

    /// The text of config.json, in the form of transformers 5.
    pub(super) fn config_json(self, dtype: DType) -> String {
        let (layers, heads, hidden) = match self {
            Self::M38 => (5, 5, 320),
            Self::M124 => (12, 12, 768),
            Self::M350 => (24, 16, 1024),
        };
        pretty(&json!({
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": VOCABULARY - 1,
            "dtype": dtype.torch_name(),
            "embd_pdrop": 0.1,
            "eos_token_id": VOCABULARY - 1,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-5,
            "model_type": "gpt2",
            "n_ctx": POSITIONS,
            "n_embd": hidden,
            "n_head": heads,
            "n_inner": null,
            "n_layer": layers,
            "n_positions": POSITIONS,
            "resid_pdrop": 0.1,
            "tie_word_embeddings": self != Self::M38,
            "use_cache": true,
            "vocab_size": VOCABULARY,
        }))
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|preset| preset.name().eq_ignore_ascii_case(text));
        found.ok_or_else(|| "expected 38M, 124M or 350M".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Skeleton, generate_preset};

    /// By hand: V·h + P·h for the tables, 12h² + 13h for each layer (4h² + 4h for attention, 8h² + 5h for the MLP, 4h for
    /// two norms), 2h for the last norm, and V·h once more for a head of its own. 124,439,808 and 354,823,168 are also what
    /// the published models have.
    #[test]
    fn parameters_by_hand() {
        let expected = [
            (Preset::M38, 16_082_240 + 327_680 + 5 * 1_232_960 + 640 + 16_082_240, 38_657_600),
            (Preset::M124, 38_597_376 + 786_432 + 12 * 7_087_872 + 1_536, 124_439_808),
            (Preset::M350, 51_463_168 + 1_048_576 + 24 * 12_596_224 + 2_048, 354_823_168),
        ];
        for (preset, sum, total) in expected {
            let skeleton = Skeleton::from_config(preset.config_json(DType::F32).as_bytes()).expect("GPT-2");
            assert_eq!((skeleton.parameters(), sum), (total, total), "{preset}");
        }
    }

    /// Normal of 0.02, projections onto the residual stream smaller by 1 / sqrt(2 · 5); over 320·320 and 1280·320 values
    /// the deviation is within 2 %.
    #[test]
    fn residual_projections_start_smaller() {
        let model = generate_preset(Preset::M38, DType::F32, 4).expect("f32");
        let len = usize::try_from(model.files[0].len_bytes).expect("a length");
        let mut bytes = vec![0; len];
        model.fill(0, 0, &mut bytes);
        let header_len =
            usize::try_from(u64::from_le_bytes(*bytes.first_chunk().expect("a header"))).expect("a length");
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).expect("JSON");
        for (name, expected) in [("c_attn", 0.02), ("c_fc", 0.02), ("c_proj", 0.02 / 10.0_f64.sqrt())] {
            for (key, entry) in header.as_object().expect("an object") {
                if !key.ends_with(&format!("{name}.weight")) {
                    continue;
                }
                let at = |end: usize| {
                    usize::try_from(entry["data_offsets"][end].as_u64().expect("an offset")).expect("it fits")
                };
                let data = &bytes[8 + header_len + at(0)..8 + header_len + at(1)];
                let values: Vec<f64> =
                    data.as_chunks().0.iter().map(|value| f64::from(f32::from_le_bytes(*value))).collect();
                let count = f64::from(u32::try_from(values.len()).expect("it fits"));
                let deviation = (values.iter().map(|value| value * value).sum::<f64>() / count).sqrt();
                assert!((deviation / expected - 1.0).abs() < 0.02, "{key}: {deviation}");
            }
        }
    }
}
