//! `weightcast plan --recommend`: the recommendation, and a job file that follows it.

use std::fmt::Write as _;
use std::path::Path;

use clap::ValueEnum as _;
use toml::{Table, Value};

use super::output::{bytes, data, json, say};
use crate::config::QuantizationConfig;
use crate::estimate::Recommendation;
use crate::plan::{Placement, QuantizationRule};
use crate::store::absolute;

/// What a job needs beside the recommendation.
pub(super) struct JobOf<'a> {
    /// The model, as a job names it.
    pub(super) source: &'a str,
    /// What the flags say about quantization.
    pub(super) quantization: &'a QuantizationConfig,
    /// What is trained, if it is.
    pub(super) train: Option<TrainOf<'a>>,
}

/// What a training run needs.
pub(super) struct TrainOf<'a> {
    /// Whether all weights are trained.
    pub(super) full: bool,
    /// The rank of the adapter.
    pub(super) lora_rank: u64,
    /// The data.
    pub(super) data: &'a Path,
    /// Where checkpoints go, relative to the job file.
    pub(super) checkpoints: String,
}

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

/// A job file.
pub(super) fn job_file(found: &Recommendation, job: &JobOf<'_>) -> Result<String, toml::ser::Error> {
    let mut text = String::new();
    for reason in &found.reasons {
        let _ = writeln!(text, "# {reason}");
    }
    text.push('\n');
    let mut file = Table::new();
    let mut section = |name: &str, entries: Table| file.insert(name.to_owned(), Value::Table(entries));
    // A job that only loads is there to be held.
    let mut own = entries([("ranks-per-node", integer(u64::from(found.ranks)))]);
    if job.train.is_none() {
        own.insert("hold".to_owned(), Value::Boolean(true));
    }
    section("job", own);
    section("model", entries([("source", string(job.source))]));
    let placement = match found.placement {
        Placement::Replicate => "replicate",
        Placement::Shard => "shard",
        Placement::Experts => "experts",
        Placement::Layers => "layers",
    };
    let mut load = entries([
        ("strategy", string(found.strategy.name())),
        ("placement", string(placement)),
        ("reader-threads", integer(u64::from(found.reader_threads))),
        ("device", string(if found.on_devices { "cuda" } else { "cpu" })),
    ]);
    if !found.split.is_empty() {
        let parts = found.split.iter().map(|&part| Value::Integer(i64::from(part))).collect();
        load.insert("split".to_owned(), Value::Array(parts));
    }
    section("load", load);
    section("quantization", quantization(&found.quantization, job.quantization));
    if let Some(train) = &job.train {
        section("checkpoint", entries([("directory", string(&train.checkpoints))]));
        section("train", training(found, train));
    }
    text += &toml::to_string(&file)?;
    Ok(text)
}

fn training(found: &Recommendation, train: &TrainOf<'_>) -> Table {
    let method = match (train.full, found.quantization == QuantizationRule::None) {
        (true, _) => "full",
        (false, true) => "lora",
        (false, false) => "qlora",
    };
    let mut recipe = entries([
        ("type", string(method)),
        ("batch-size", integer(found.step_sequences.unwrap_or(found.batch_sequences))),
        ("micro-batch-size", integer(found.batch_sequences)),
    ]);
    let data = entries([
        ("train", Value::Array(vec![string(&absolute(train.data).display().to_string())])),
        ("sequence-length", integer(found.sequence_tokens)),
    ]);
    recipe.insert("data".to_owned(), Value::Table(data));
    if !train.full {
        recipe.insert("lora".to_owned(), Value::Table(entries([("r", integer(train.lora_rank))])));
    }
    recipe
}

fn quantization(rule: &QuantizationRule, asked: &QuantizationConfig) -> Table {
    match rule {
        QuantizationRule::None => entries([("format", string("none"))]),
        QuantizationRule::Int8 { .. } => entries([("format", string("int8"))]),
        QuantizationRule::FourBit { code, block, nested, .. } => entries([
            ("format", string(code.name())),
            ("double", Value::Boolean(*nested)),
            ("block", integer(u64::from(block.get()))),
        ]),
        _ => {
            let format = asked.format.to_possible_value();
            let mut table = entries([("format", string(format.as_ref().map_or("none", |value| value.get_name())))]);
            let sizes = [
                ("block", asked.block.map(u64::from)),
                ("bits", asked.bits.map(u64::from)),
                ("axis", asked.axis.map(u64::from)),
            ];
            table.extend(sizes.into_iter().filter_map(|(key, value)| Some((key.to_owned(), integer(value?)))));
            table
        }
    }
}

fn entries<const N: usize>(entries: [(&str, Value); N]) -> Table {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn string(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn integer(number: u64) -> Value {
    Value::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}

/// Writes the job file; an existing one stays.
pub(super) fn write(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(text.as_bytes())
}
