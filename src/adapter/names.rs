//! Names of an adapter's tensors in `adapter_model.safetensors`, and in our checkpoints.
//!
//! The name of the adapter itself (`default`) is in PEFT's memory but not in its files, and neither is the `.weight` of the
//! magnitude vector: the file's name for it ends with `lora_magnitude_vector`.

use crate::types::Fqn;

/// What PEFT's wrapper adds before a module's name.
const PREFIX: &str = "base_model.model.";

/// A tensor of an adapter on one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdapterPart {
    /// `lora_A`, `[r, in]`.
    A,
    /// `lora_B`, `[out, r]`.
    B,
    /// DoRA's magnitude, `[out]`.
    Magnitude,
}

impl AdapterPart {
    const ALL: [Self; 3] = [Self::A, Self::B, Self::Magnitude];

    const fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
            Self::Magnitude => ".lora_magnitude_vector",
        }
    }
}

/// The name of a part of the adapter on `module`.
#[must_use]
pub fn adapter_name(module: &str, part: AdapterPart) -> Fqn {
    format!("{PREFIX}{module}{}", part.suffix()).into()
}

/// `base_model.model.<module>.lora_A.weight`.
#[must_use]
pub fn lora_a_name(module: &str) -> Fqn {
    adapter_name(module, AdapterPart::A)
}

/// `base_model.model.<module>.lora_B.weight`.
#[must_use]
pub fn lora_b_name(module: &str) -> Fqn {
    adapter_name(module, AdapterPart::B)
}

/// `base_model.model.<module>.lora_magnitude_vector`.
#[must_use]
pub fn magnitude_name(module: &str) -> Fqn {
    adapter_name(module, AdapterPart::Magnitude)
}

/// Module and part of a tensor's name; nothing for a name that is no adapter's.
#[must_use]
pub fn parse_name(name: &str) -> Option<(&str, AdapterPart)> {
    let name = name.strip_prefix(PREFIX)?;
    let part = AdapterPart::ALL.into_iter().find_map(|part| Some((name.strip_suffix(part.suffix())?, part)))?;
    if part.0.is_empty() { None } else { Some(part) }
}
