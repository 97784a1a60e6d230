//! Rotary position embedding: the parameters as data, and the inverse frequencies that they give.
//!
//! Source of the formulas: transformers, `modeling_rope_utils.py`; YaRN: arXiv 2309.00071.

use serde::Deserialize;

use super::ModelError;
use crate::types::as_usize;

/// Parameters of rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    /// The base of the frequencies.
    pub theta: f64,
    /// Dims that are rotated; even.
    pub dim: u64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for longer contexts than the model was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// NTK: the base grows once a sequence passes the trained length; up to it, as [`RopeScaling::Default`].
    Dynamic {
        /// The factor.
        factor: f64,
    },
    /// YaRN: low frequencies are interpolated, high ones kept.
    Yarn(Yarn),
    /// Llama 3.1: as YaRN, with a smooth step between two wavelengths.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Below this many turns over the trained length a frequency is interpolated.
        low_freq_factor: f64,
        /// Above this many turns it is kept.
        high_freq_factor: f64,
        /// The trained length in positions.
        original_max_position_embeddings: u64,
    },
}

/// Parameters of [`RopeScaling::Yarn`].
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// The factor.
    pub factor: f64,
    /// The trained length in positions.
    pub original_max_position_embeddings: u64,
    /// Turns above which a frequency is kept.
    pub beta_fast: f64,
    /// Turns below which it is interpolated.
    pub beta_slow: f64,
    /// What cosine and sine are multiplied with.
    pub attention_factor: f64,
    /// Whether the bounds of the ramp are rounded to whole dims.
    pub truncate: bool,
}

/// `rope_scaling` (before transformers 5) or `rope_parameters`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawRope {
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_type: Option<String>,
    #[serde(rename = "type")]
    legacy_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    pub(super) partial_rotary_factor: Option<f64>,
}

impl RawRope {
    /// `max_positions` stands in for an absent original length.
    pub(super) fn scaling(&self, max_positions: u64) -> Result<RopeScaling, ModelError> {
        let rope_type = self.rope_type.as_deref().or(self.legacy_type.as_deref()).unwrap_or("default");
        let need = |field: &'static str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            _ => Err(ModelError::Rope { rope_type: rope_type.to_owned(), field }),
        };
        let factor = || need("factor", self.factor);
        let original = || match self.original_max_position_embeddings {
            None => Ok(max_positions),
            length => whole(need("original_max_position_embeddings", length)?).ok_or_else(|| ModelError::Rope {
                rope_type: rope_type.to_owned(),
                field: "original_max_position_embeddings",
            }),
        };
        Ok(match rope_type {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "dynamic" => RopeScaling::Dynamic { factor: factor()? },
            "yarn" => RopeScaling::Yarn(self.yarn(factor()?, original()?)),
            "llama3" => RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: need("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", self.high_freq_factor)?,
                original_max_position_embeddings: original()?,
            },
            other => return Err(ModelError::UnknownRope { found: other.to_owned() }),
        })
    }

    fn yarn(&self, factor: f64, original_max_position_embeddings: u64) -> Yarn {
        let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let attention_factor = match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(given), ..) => given,
            (None, Some(one), Some(all)) if one != 0.0 && all != 0.0 => mscale(one) / mscale(all),
            _ => mscale(1.0),
        };
        Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: self.beta_fast.unwrap_or(32.0),
            beta_slow: self.beta_slow.unwrap_or(1.0),
            attention_factor,
            truncate: self.truncate.unwrap_or(true),
        }
    }
}

/// A positive whole number that JSON gave as a float.
fn whole(value: f64) -> Option<u64> {
    // Beyond 2^53 a float is no longer every whole number, and no context is that long.
    let fits = value.fract() == 0.0 && (1.0..9.0e15).contains(&value);
    if fits { format!("{value:.0}").parse().ok() } else { None }
}

impl RopeParameters {
    /// The inverse frequencies, f32 `[dim/2]`, as transformers computes its buffer `inv_freq`.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f32> {
        let half = self.dim / 2;
        let base: Vec<f32> = (0..half).map(|index| self.unscaled(index)).collect();
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => base,
            RopeScaling::Linear { factor } => base.into_iter().map(|freq| freq / narrow(*factor)).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = to_f64(*original_max_position_embeddings);
                let stretch = |freq: f32| {
                    let freq = f64::from(freq);
                    let turns = original * freq / std::f64::consts::TAU;
                    // 0 interpolates fully, 1 keeps the frequency.
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    narrow((1.0 - keep) * freq / factor + keep * freq)
                };
                base.into_iter().map(stretch).collect()
            }
            RopeScaling::Yarn(yarn) => {
                let (low, high) = self.yarn_bounds(yarn);
                let stretch = |(index, freq): (u32, f32)| {
                    let freq = f64::from(freq);
                    let interpolate = ((f64::from(index) - low) / (high - low)).clamp(0.0, 1.0);
                    narrow(freq / yarn.factor * interpolate + freq * (1.0 - interpolate))
                };
                (0_u32..).zip(base).map(stretch).collect()
            }
        }
    }

    /// What cosine and sine are multiplied with; 1 for all kinds but YaRN.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        }
    }

    /// In f32, as torch does, with a correctly rounded power.
    fn unscaled(&self, index: u64) -> f32 {
        let exponent = narrow(to_f64(index * 2)) / narrow(to_f64(self.dim));
        1.0 / narrow(self.theta.powf(f64::from(exponent)))
    }

    /// The dims between which YaRN's ramp rises.
    fn yarn_bounds(&self, yarn: &Yarn) -> (f64, f64) {
        let (dim, length) = (to_f64(self.dim), to_f64(yarn.original_max_position_embeddings));
        let at = |turns: f64| dim * (length / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (at(yarn.beta_fast), at(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // The published code widens an empty ramp by this much rather than divide by zero.
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}

/// The number of rotated dims: a part of the head, or all of it.
pub(super) fn rotated_dims(head_dim: u64, partial: Option<f64>) -> u64 {
    let part = partial.filter(|part| (0.0..1.0).contains(part)).map(|part| (to_f64(head_dim) * part).floor());
    part.and_then(whole).unwrap_or(head_dim)
}

#[expect(clippy::cast_precision_loss, reason = "sizes of a model are far below 2^53")]
fn to_f64(value: u64) -> f64 {
    as_usize(value) as f64
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() <= expected.abs() * 1e-6, "{found} {expected}");
        }
    }

    fn rope(theta: f64, dim: u64, json: &str) -> RopeParameters {
        let raw: RawRope = serde_json::from_str(json).expect("JSON");
        RopeParameters { theta, dim, scaling: raw.scaling(4096).expect("known") }
    }

    /// By hand: 10000^(-0/8), 10000^(-2/8), 10000^(-4/8), 10000^(-6/8).
    #[test]
    fn plain_and_linear_by_hand() {
        close(&rope(10000.0, 8, "{}").inv_freq(), &[1.0, 0.1, 0.01, 0.001]);
        close(&rope(10000.0, 8, r#"{"type":"linear","factor":4.0}"#).inv_freq(), &[0.25, 0.025, 0.0025, 0.00025]);
    }

    /// Llama 3.1's parameters, by hand for a base of 10^8 and 8 dims: frequencies 1, 1e-2, 1e-4, 1e-6 make 8192/2pi =
    /// 1303.8, 13.04, 0.1304 and 0.0013 turns; above 4 turns kept, below 1 divided by 8.
    #[test]
    fn llama3_by_hand() {
        let json = r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192}"#;
        close(&rope(1e8, 8, json).inv_freq(), &[1.0, 1e-2, 1.25e-5, 1.25e-7]);
        // In between: 2 turns are a third of the way from 1 to 4, so (2/3)/8 + 1/3 = 5/12 of the frequency.
        let original = 2.0 * std::f64::consts::TAU * 100.0;
        let json = format!(
            r#"{{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":{}}}"#,
            original.round()
        );
        let found = rope(1e4, 4, &json).inv_freq();
        assert!((f64::from(found[1]) - 0.01 * 5.0 / 12.0).abs() < 1e-5, "{found:?}");
    }

    /// YaRN's ends by hand: the highest frequency stays, the lowest is divided by the factor.
    #[test]
    fn yarn_by_hand() {
        let rope = rope(10000.0, 128, r#"{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":4096}"#);
        let (plain, found) =
            (RopeParameters { scaling: RopeScaling::Default, ..rope.clone() }.inv_freq(), rope.inv_freq());
        assert_eq!(plain[0], found[0]);
        assert_eq!(plain[63] / 4.0, found[63]);
        assert!((rope.attention_factor() - (0.1 * 4.0_f64.ln() + 1.0)).abs() < 1e-12);
    }

    #[test]
    fn bad_parameters_are_named() {
        let error = |json: &str| {
            let raw: RawRope = serde_json::from_str(json).expect("JSON");
            raw.scaling(4096).expect_err("bad").to_string()
        };
        assert!(error(r#"{"rope_type":"warp"}"#).contains("unknown rope_type \"warp\""));
        assert!(error(r#"{"rope_type":"linear"}"#).contains("factor is missing"));
        assert!(error(r#"{"rope_type":"llama3","factor":8,"low_freq_factor":-1}"#).contains("low_freq_factor"));
    }
}
