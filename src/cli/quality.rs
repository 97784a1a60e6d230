//! `weightcast model quality`.

use std::path::PathBuf;

use clap::Args;

use super::output::{bytes, data, fail, json as print_json};
use crate::app::{QualityFormat, QualityRequest, QualityRow, QualityText, measure_quality};

/// `weightcast model quality`
#[derive(Debug, Args)]
#[command(after_help = "\
The model is loaded in each format in turn, as a job loads it, and computed in f32. Errors are those of the weights against the
first format; perplexity is that of the first sequences of the text.")]
pub struct QualityFlags {
    /// Model directory, GGUF file or hub id
    model: String,
    /// The formats, the first of which the others are held against
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "stored,int8,nf4,nf4-double,hqq4,hqq3,q4_k_m,q8_0"
    )]
    formats: Vec<QualityFormat>,
    /// A text to measure perplexity on: JSONL with \"text\", or plain
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
    /// The directory of tokenizer.json; without it the model's
    #[arg(long, value_name = "DIR", requires = "text")]
    tokenizer: Option<PathBuf>,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    sequence_length: u32,
    /// Sequences at most
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    sequences: u64,
    /// Print JSON on stdout, with the errors of each layer
    #[arg(long)]
    json: bool,
}

pub(super) fn run(flags: &QualityFlags) -> u8 {
    let text = flags.text.clone().map(|path| QualityText {
        path,
        tokenizer: flags.tokenizer.clone(),
        sequence_length: flags.sequence_length,
        sequences: flags.sequences,
    });
    let request = QualityRequest { model: flags.model.clone(), formats: flags.formats.clone(), text };
    if !flags.json {
        data("format       size        bits/weight  perplexity  rel. error  worst tensor");
    }
    let mut line = |row: &QualityRow| {
        if !flags.json {
            data(&text_line(row));
        }
    };
    match measure_quality(&request, &super::output::download, &mut line) {
        Err(error) => fail(&error),
        Ok(rows) => {
            if flags.json {
                print_json(&rows);
            }
            0
        }
    }
}

fn text_line(row: &QualityRow) -> String {
    let number =
        |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"));
    let worst = row.worst.first().map_or_else(|| "-".to_owned(), |(name, error)| format!("{name} ({error:.4})"));
    format!(
        "{:<12} {:<11} {:<12} {:<11} {:<11.5} {worst}",
        row.format,
        bytes(row.bytes),
        number(row.bits_per_weight, 3),
        number(row.perplexity, 3),
        row.relative_error,
    )
}
