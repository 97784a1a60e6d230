//! The `[data]` part of a training job: which files, in which form, cut how.
//!
//! Owns: [`DataConfig`], its defaults and what of it cannot work. Refuses to know: files' contents, tokenizers.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use super::DataError;

/// The longest sequence that can be asked for: starts of documents are `u32`, and no model attends further.
const MAX_SEQUENCE_LENGTH: u32 = 1 << 24;

/// What a run trains on and is evaluated on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DataConfig {
    /// The files to train on, in this order. Relative paths are resolved by the caller ([`DataConfig::resolve`]).
    #[serde(deserialize_with = "one_or_many")]
    pub train: Vec<PathBuf>,
    /// The files to evaluate on; none by default.
    #[serde(default, deserialize_with = "one_or_many")]
    pub evaluation: Vec<PathBuf>,
    /// The part of the training files that is held out for evaluation and never trained on, between 0 and 1: of JSONL
    /// the records whose hash falls below it (equal records stay together), of a text file its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_fraction: Option<f64>,
    /// What the files are.
    #[serde(default)]
    pub format: DataFormat,
    /// The field of a JSONL record with a text to be learned whole.
    #[serde(default = "text_field")]
    pub text_field: String,
    /// The field with what stands before the completion and is not learned.
    #[serde(default = "prompt_field")]
    pub prompt_field: String,
    /// The field with what is learned after a prompt.
    #[serde(default = "completion_field")]
    pub completion_field: String,
    /// Tokens of a sequence.
    pub sequence_length: u32,
    /// Fill every sequence with as many documents as fit, and split the ones that do not; otherwise one record a sequence,
    /// cut at the end.
    #[serde(default = "yes")]
    pub packing: bool,
    /// What a line that cannot be used does.
    #[serde(default)]
    pub on_bad_line: OnBadLine,
    /// End every document with the end-of-sequence token.
    #[serde(default = "yes")]
    pub append_eos: bool,
    /// Start every document with the begin-of-sequence token.
    #[serde(default)]
    pub add_bos: AddBos,
    /// Another order in every epoch.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Documents packed into one sequence do not see each other.
    #[serde(default = "yes")]
    pub document_attention: bool,
}

/// The form of data files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// By the file's extension: `jsonl`, `ndjson` and `json` are JSONL; `txt`, `text` and `md` are text.
    #[default]
    Auto,
    /// One JSON object a line.
    Jsonl,
    /// One document a file.
    Text,
}

/// What a line that cannot be used does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadLine {
    /// It ends the run before training.
    #[default]
    Fail,
    /// It is left out and counted.
    Skip,
}

/// Whether documents start with the begin-of-sequence token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddBos {
    /// As the tokenizer itself does.
    #[default]
    Auto,
    /// They do.
    Always,
    /// They do not.
    Never,
}

impl DataConfig {
    /// Training on `train` in sequences of `sequence_length` tokens, with the defaults of a job file.
    #[must_use]
    pub fn new(train: Vec<PathBuf>, sequence_length: u32) -> Self {
        Self {
            train,
            evaluation: Vec::new(),
            evaluation_fraction: None,
            format: DataFormat::default(),
            text_field: text_field(),
            prompt_field: prompt_field(),
            completion_field: completion_field(),
            sequence_length,
            packing: true,
            on_bad_line: OnBadLine::default(),
            append_eos: true,
            add_bos: AddBos::default(),
            shuffle: true,
            document_attention: true,
        }
    }

    /// Makes relative paths relative to `base`.
    pub fn resolve(&mut self, base: &Path) {
        for path in self.train.iter_mut().chain(&mut self.evaluation) {
            *path = base.join(&*path);
        }
    }

    /// Whether there will be evaluation data.
    #[must_use]
    pub fn evaluates(&self) -> bool {
        !self.evaluation.is_empty() || self.evaluation_fraction.is_some()
    }

    /// Checks what can be checked before a file is opened.
    ///
    /// # Errors
    /// [`DataError::Config`] with the key that cannot work.
    pub fn validate(&self) -> Result<(), DataError> {
        let wrong = |key, expected, found: String| Err(DataError::Config { key, expected, found });
        if self.train.is_empty() {
            return wrong("train", "at least one file", "none".to_owned());
        }
        if !(2..=MAX_SEQUENCE_LENGTH).contains(&self.sequence_length) {
            return wrong("sequence-length", "2 to 16777216 tokens", self.sequence_length.to_string());
        }
        if let Some(fraction) = self.evaluation_fraction {
            if !(fraction > 0.0 && fraction < 1.0) {
                return wrong("evaluation-fraction", "a number above 0 and below 1", fraction.to_string());
            }
            if !self.evaluation.is_empty() {
                return wrong("evaluation-fraction", "it or evaluation files", "both".to_owned());
            }
        }
        let fields = [&self.text_field, &self.prompt_field, &self.completion_field];
        for (index, field) in fields.iter().enumerate() {
            if fields.iter().skip(index + 1).any(|other| other == field) {
                return wrong("text-field, prompt-field, completion-field", "three names", format!("{field:?} twice"));
            }
        }
        Ok(())
    }
}

const fn yes() -> bool {
    true
}

fn text_field() -> String {
    "text".to_owned()
}

fn prompt_field() -> String {
    "prompt".to_owned()
}

fn completion_field() -> String {
    "completion".to_owned()
}

/// A path, or a list of paths.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a path or a list of paths")]
    enum Paths {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Paths::deserialize(deserializer)? {
        Paths::One(path) => vec![path],
        Paths::Many(paths) => paths,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_path_and_the_defaults() {
        let config: DataConfig = toml::from_str("train = \"a.jsonl\"\nsequence-length = 8").expect("a config");
        assert_eq!(config, DataConfig::new(vec![PathBuf::from("a.jsonl")], 8));
        assert!(config.packing && config.append_eos && config.shuffle && config.document_attention);
        config.validate().expect("valid");
    }

    /// What a checkpoint writes as JSON is read back the same.
    #[test]
    fn every_key_reads_back() {
        let text = "train = [\"a.jsonl\", \"/b.txt\"]\nevaluation-fraction = 0.25\nformat = \"text\"\nsequence-length = 8\n\
            packing = false\non-bad-line = \"skip\"\nappend-eos = false\nadd-bos = \"never\"\nshuffle = false\n\
            document-attention = false\ntext-field = \"t\"\nprompt-field = \"p\"\ncompletion-field = \"c\"\n";
        let mut config: DataConfig = toml::from_str(text).expect("a config");
        let json = serde_json::to_value(&config).expect("JSON");
        assert_eq!(json["on-bad-line"], "skip");
        assert_eq!(serde_json::from_value::<DataConfig>(json).expect("a config"), config);
        config.resolve(Path::new("/job"));
        assert_eq!(config.train, [PathBuf::from("/job/a.jsonl"), PathBuf::from("/b.txt")]);
        assert!(toml::from_str::<DataConfig>(&format!("{text}pack = true")).is_err(), "an unknown key");
    }

    #[test]
    fn what_cannot_work_is_named() {
        let check = |change: fn(&mut DataConfig), expected: &str| {
            let mut config = DataConfig::new(vec![PathBuf::from("a.txt")], 8);
            change(&mut config);
            assert_eq!(config.validate().expect_err("cannot work").to_string(), expected);
        };
        check(|config| config.train.clear(), "data.train: expected at least one file, found none");
        check(|config| config.sequence_length = 1, "data.sequence-length: expected 2 to 16777216 tokens, found 1");
        check(
            |config| config.evaluation_fraction = Some(f64::NAN),
            "data.evaluation-fraction: expected a number above 0 and below 1, found NaN",
        );
        check(
            |config| {
                config.evaluation_fraction = Some(0.5);
                config.evaluation = vec![PathBuf::from("b.txt")];
            },
            "data.evaluation-fraction: expected it or evaluation files, found both",
        );
        check(
            |config| config.text_field = "prompt".to_owned(),
            "data.text-field, prompt-field, completion-field: expected three names, found \"prompt\" twice",
        );
    }
}
