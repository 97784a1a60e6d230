//! `weightcast plan --recommend`: the recommendation, and a job file that follows it.

use std::fmt::Write as _;
use std::path::Path;

use clap::ValueEnum as _;

use super::output::{bytes, data, json, say};
use crate::config::QuantizationConfig;
use crate::estimate::Recommendation;
use crate::plan::{Placement, QuantizationRule};

/// Says it, on stdout as data.
pub(super) fn print(found: &Recommendation, as_json: bool) {
    if as_json {
        json(found);
        return;
    }
    for reason in &found.reasons {
        data(reason);
    }
    say(&format!("peak       {} on the fullest rank, batch {}", bytes(found.peak_bytes), found.batch_sequences));
    for other in &found.other_tools {
        data(&format!("{}: {}", other.tool, other.settings));
    }
}

/// A job file of the model `source`; `asked` is what the flags say about quantization.
pub(super) fn job_file(found: &Recommendation, source: &str, asked: &QuantizationConfig) -> String {
    let mut text = String::new();
    for reason in &found.reasons {
        let _ = writeln!(text, "# {reason}");
    }
    let placement = match found.placement {
        Placement::Replicate => "replicate",
        Placement::Shard => "shard",
        Placement::Experts => "experts",
        Placement::Layers => "layers",
    };
    // A basic string of TOML escapes as JSON does.
    let source = serde_json::Value::from(source);
    let _ = write!(text, "\n[model]\nsource = {source}\n\n[load]\nplacement = \"{placement}\"\n");
    if !found.split.is_empty() {
        let parts: Vec<String> = found.split.iter().map(u32::to_string).collect();
        let _ = writeln!(text, "split = [{}]", parts.join(", "));
    }
    let _ = write!(text, "\n[quantization]\n{}", quantization(&found.quantization, asked));
    text
}

fn quantization(rule: &QuantizationRule, asked: &QuantizationConfig) -> String {
    match rule {
        QuantizationRule::None => "format = \"none\"\n".to_owned(),
        QuantizationRule::Int8 { .. } => "format = \"int8\"\n".to_owned(),
        QuantizationRule::FourBit { code, block, nested, .. } => {
            format!("format = \"{}\"\ndouble = {nested}\nblock = {}\n", code.name(), block.get())
        }
        _ => {
            let format = asked.format.to_possible_value();
            let mut text = format!("format = \"{}\"\n", format.as_ref().map_or("none", |value| value.get_name()));
            let entries = [
                ("block", asked.block.map(u64::from)),
                ("bits", asked.bits.map(u64::from)),
                ("axis", asked.axis.map(u64::from)),
            ];
            for (key, value) in entries {
                if let Some(value) = value {
                    let _ = writeln!(text, "{key} = {value}");
                }
            }
            text
        }
    }
}

/// Writes the job file; an existing one stays.
pub(super) fn write(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(text.as_bytes())
}
