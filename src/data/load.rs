//! From files to sequences: reads records, tokenizes them on all processors, and adds them in their order.
//!
//! Owns: the flow and which record is held out. Refuses to know: how sequences are cut, what a batch is.

use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::lines::{Line, Lines, MAX_LINE_BYTES, open};
use super::record::Record;
use super::tokenizer::SPECIAL_TOKEN_FILES;
use super::{
    AddBos, BadLine, DataConfig, DataError, DataFormat, Dataset, LineProblem, OnBadLine, Split, SplitCounts, Tokenizer,
};
use crate::store::StoreError;
use crate::types::as_usize;

/// Bytes of text that are tokenized at a time: many records for every processor, and little memory.
const GROUP_BYTES: usize = 8 << 20;
/// The longest text file: it is tokenized as one document, in tens of bytes of memory for each of its own.
const MAX_TEXT_BYTES: u64 = 256 << 20;
/// Skipped lines that are remembered by name.
const NAMED_BAD_LINES: usize = 20;

/// Reads all files of `config` into `dataset`.
pub(super) fn fill(dataset: &mut Dataset, config: &DataConfig, tokenizer: &Tokenizer) -> Result<(), DataError> {
    let ends = Ends::new(config, tokenizer)?;
    for (files, split) in [(&config.train, Split::Train), (&config.evaluation, Split::Evaluation)] {
        let fraction = config.evaluation_fraction.filter(|_| split == Split::Train);
        let mut loader = Loader { dataset, config, tokenizer, ends, split, fraction };
        for path in files {
            loader.file(path)?;
        }
    }
    Ok(())
}

/// The tokens around a document.
#[derive(Clone, Copy, Debug)]
struct Ends {
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Ends {
    fn new(config: &DataConfig, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let needed = |id: Option<u32>, key, token| {
            id.map(Some).ok_or(DataError::NoSpecialToken { key, token, files: SPECIAL_TOKEN_FILES })
        };
        let bos = match config.add_bos {
            AddBos::Auto => tokenizer.bos().filter(|_| tokenizer.adds_bos()),
            AddBos::Always => needed(tokenizer.bos(), "data.add-bos", "begin-of-sequence")?,
            AddBos::Never => None,
        };
        let eos = if config.append_eos { needed(tokenizer.eos(), "data.append-eos", "end-of-sequence")? } else { None };
        Ok(Self { bos, eos })
    }
}

/// A record and the line that it stood in.
type Placed = (u64, Record);

/// A tokenized record.
struct Encoded {
    /// Without the ends.
    ids: Vec<u32>,
    /// Tokens of the prompt.
    prompt_tokens: usize,
    held_out: bool,
}

struct Loader<'a> {
    dataset: &'a mut Dataset,
    config: &'a DataConfig,
    tokenizer: &'a Tokenizer,
    ends: Ends,
    split: Split,
    fraction: Option<f64>,
}

impl Loader<'_> {
    fn counts(&mut self) -> &mut SplitCounts {
        match self.split {
            Split::Train => &mut self.dataset.train.counts,
            Split::Evaluation => &mut self.dataset.evaluation.counts,
        }
    }

    fn file(&mut self, path: &Path) -> Result<(), DataError> {
        match format_of(self.config.format, path)? {
            FileForm::Jsonl => self.jsonl(path),
            FileForm::Text => self.text(path),
        }
    }

    fn jsonl(&mut self, path: &Path) -> Result<(), DataError> {
        let mut lines = Lines::new(open(path)?, MAX_LINE_BYTES);
        let (mut group, mut group_bytes) = (Vec::<Placed>::new(), 0);
        while let Some(line) = lines.next()? {
            let (number, offset_bytes) = (line.number, line.offset_bytes);
            match self.parse(line) {
                Ok(None) => {}
                Ok(Some(record)) => {
                    group_bytes += record.len_bytes();
                    group.push((number, record));
                }
                Err(problem) => {
                    let path = path.display().to_string();
                    self.bad_line(BadLine { path, line: number, offset_bytes, problem })?;
                }
            }
            if group_bytes >= GROUP_BYTES {
                self.group(path, &group)?;
                (group_bytes, _) = (0, group.clear());
            }
        }
        self.group(path, &group)
    }

    fn parse(&self, line: Line) -> Result<Option<Record>, LineProblem> {
        let bytes = line.bytes.ok_or(LineProblem::TooLong { limit_bytes: MAX_LINE_BYTES })?;
        Record::parse(self.config, &bytes)
    }

    fn bad_line(&mut self, bad: BadLine) -> Result<(), DataError> {
        if self.config.on_bad_line == OnBadLine::Fail {
            return Err(bad.into());
        }
        self.counts().bad_lines += 1;
        if self.dataset.bad_lines.len() < NAMED_BAD_LINES {
            self.dataset.bad_lines.push(bad);
        }
        Ok(())
    }

    /// Tokenizes records on all processors and adds them in their order.
    fn group(&mut self, path: &Path, records: &[Placed]) -> Result<(), DataError> {
        let (tokenizer, fraction) = (self.tokenizer, self.fraction);
        let encoded: Vec<Result<Encoded, String>> =
            records.par_iter().map(|(_, record)| encode(tokenizer, record, fraction)).collect();
        for ((line, record), encoded) in records.iter().zip(encoded) {
            let encoded = encoded
                .map_err(|message| DataError::Encode { place: format!("{}, line {line}", path.display()), message })?;
            self.add(record, &encoded);
        }
        Ok(())
    }

    fn add(&mut self, record: &Record, encoded: &Encoded) {
        let Encoded { ids, prompt_tokens, held_out } = encoded;
        let sequences = match self.split {
            Split::Train if !held_out => &mut self.dataset.train,
            _ => &mut self.dataset.evaluation,
        };
        sequences.counts.records += 1;
        if ids.is_empty() {
            sequences.counts.empty_records += 1;
            return;
        }
        let masked = match record {
            Record::Pair { .. } => prompt_tokens + usize::from(self.ends.bos.is_some()),
            Record::Text(_) => 0,
        };
        let mut tokens: Vec<u32> = self.ends.bos.into_iter().collect();
        tokens.extend_from_slice(ids);
        tokens.extend(self.ends.eos);
        sequences.push(&tokens, masked);
    }

    /// A text file is one document. Where a part is held out, it is the end.
    fn text(&mut self, path: &Path) -> Result<(), DataError> {
        let text = read_text(path)?;
        let encoded = self.tokenizer.encode(&text);
        let ids = encoded.map_err(|message| DataError::Encode { place: path.display().to_string(), message })?;
        self.counts().records += 1;
        if ids.is_empty() {
            self.counts().empty_records += 1;
            return Ok(());
        }
        let (bos, eos) = (self.ends.bos, self.ends.eos);
        let joined = |parts: [&[u32]; 3]| parts.concat();
        let (first, last) = (bos.as_slice(), eos.as_slice());
        match (self.split, self.fraction) {
            (Split::Evaluation, _) => self.dataset.evaluation.push_text(&joined([first, &ids, last])),
            (Split::Train, None) => self.dataset.train.push_text(&joined([first, &ids, last])),
            (Split::Train, Some(fraction)) => {
                let (kept, held_out) = ids.split_at(ids.len() - part_of(ids.len(), fraction));
                self.dataset.train.push_text(&joined([first, kept, &[]]));
                if !held_out.is_empty() {
                    self.dataset.evaluation.counts.records += 1;
                    self.dataset.evaluation.push_text(&joined([&[], held_out, last]));
                }
            }
        }
        Ok(())
    }
}

fn encode(tokenizer: &Tokenizer, record: &Record, fraction: Option<f64>) -> Result<Encoded, String> {
    let (ids, prompt_tokens) = match record {
        Record::Text(text) => (tokenizer.encode(text)?, 0),
        Record::Pair { prompt, completion } => tokenizer.encode_pair(prompt, completion)?,
    };
    Ok(Encoded { ids, prompt_tokens, held_out: fraction.is_some_and(|fraction| is_held_out(record, fraction)) })
}

/// Whether a record is held out: by its text alone, so that copies of it are on the same side (`DA-2`).
fn is_held_out(record: &Record, fraction: f64) -> bool {
    let mut hash = Sha256::new();
    match record {
        Record::Text(text) => hash.update(text),
        Record::Pair { prompt, completion } => {
            hash.update(prompt);
            hash.update([0]);
            hash.update(completion);
        }
    }
    let digest = hash.finalize();
    let high = digest.iter().take(4).fold(0_u32, |high, &byte| (high << 8) | u32::from(byte));
    f64::from(high) < fraction * (f64::from(u32::MAX) + 1.0)
}

/// `fraction` of `len`, rounded down, and never all of it.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a part of a number of tokens, which is far below 2^53"
)]
fn part_of(len: usize, fraction: f64) -> usize {
    ((len as f64 * fraction) as usize).min(len.saturating_sub(1))
}

enum FileForm {
    Jsonl,
    Text,
}

fn format_of(format: DataFormat, path: &Path) -> Result<FileForm, DataError> {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    match (format, extension.as_deref()) {
        (DataFormat::Jsonl, _) | (DataFormat::Auto, Some("jsonl" | "ndjson" | "json")) => Ok(FileForm::Jsonl),
        (DataFormat::Text, _) | (DataFormat::Auto, Some("txt" | "text" | "md")) => Ok(FileForm::Text),
        (DataFormat::Auto, other) => Err(DataError::UnknownFormat {
            path: path.display().to_string(),
            found: other.map_or_else(|| "no extension".to_owned(), |extension| format!(".{extension}")),
        }),
    }
}

/// A file's text without a byte-order mark and with line feeds alone at the ends of lines.
fn read_text(path: &Path) -> Result<String, DataError> {
    let shown = || path.display().to_string();
    let file = open(path)?;
    let found_bytes = file.len_bytes();
    if found_bytes > MAX_TEXT_BYTES {
        return Err(StoreError::TooLarge { path: shown(), limit_bytes: MAX_TEXT_BYTES, found_bytes }.into());
    }
    let mut bytes = vec![0; as_usize(found_bytes)];
    file.read_exact_at(0, &mut bytes)?;
    let text = std::str::from_utf8(&bytes).map_err(|error| DataError::NotUtf8 {
        path: shown(),
        offset_bytes: crate::types::as_u64(error.valid_up_to()),
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    Ok(text.replace("\r\n", "\n"))
}
