//! What can be wrong with training data, in words that name the file and the line.

use std::fmt;

use crate::error::{Classify, Kind};
use crate::store::StoreError;

/// Training data cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A key of the data's configuration cannot work.
    #[error("data.{key}: expected {expected}, found {found}")]
    Config {
        /// The key.
        key: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A file cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A path names no file.
    #[error("{path}: expected the path of a file")]
    NotAFile {
        /// The path.
        path: String,
    },
    /// The form of a file is not known from its name.
    #[error("{path}: expected .jsonl or .txt, found {found}; say format = \"jsonl\" or \"text\"")]
    UnknownFormat {
        /// The file.
        path: String,
        /// Its extension.
        found: String,
    },
    /// A file has no byte.
    #[error("{path}: expected text, found an empty file")]
    Empty {
        /// The file.
        path: String,
    },
    /// A text file is not UTF-8.
    #[error("{path}: expected UTF-8, found another byte at {offset_bytes}")]
    NotUtf8 {
        /// The file.
        path: String,
        /// The first byte that is not UTF-8.
        offset_bytes: u64,
    },
    /// A line cannot be used.
    #[error(transparent)]
    BadLine(#[from] BadLine),
    /// There is nothing to train on, or to evaluate on.
    #[error("{part} data: expected at least one token to learn, found none in {records} records ({skipped} bad lines)")]
    Nothing {
        /// `training` or `evaluation`.
        part: &'static str,
        /// The records that were read.
        records: u64,
        /// The lines that were skipped.
        skipped: u64,
    },
    /// The tokenizer's files cannot be used.
    #[error("{path}: {problem}")]
    Tokenizer {
        /// The file.
        path: String,
        /// What is wrong: expected and found.
        problem: String,
    },
    /// A token that is needed is not known.
    #[error("{key} needs the {token} token, and none of {files} names it")]
    NoSpecialToken {
        /// The key that asks for it.
        key: &'static str,
        /// `end-of-sequence` or `begin-of-sequence`.
        token: &'static str,
        /// Where it was looked for.
        files: &'static str,
    },
    /// The tokenizer refuses a text.
    #[error("{place}: the tokenizer failed: {message}")]
    Encode {
        /// The file and line.
        place: String,
        /// The tokenizer's words.
        message: String,
    },
}

impl Classify for DataError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Config { .. } => Kind::Conflict,
            _ => Kind::Invalid,
        }
    }
}

/// A line that cannot be used, and where it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}, line {line} (byte {offset_bytes}): {problem}")]
pub struct BadLine {
    /// The file.
    pub path: String,
    /// The line, counted from 1.
    pub line: u64,
    /// Where the line starts in the file.
    pub offset_bytes: u64,
    /// What is wrong with it.
    pub problem: LineProblem,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LineProblem {
    /// It is longer than a line may be.
    TooLong {
        /// The limit.
        limit_bytes: u64,
    },
    /// It is not UTF-8.
    NotUtf8 {
        /// The first byte of the line that is not, counted from 0.
        at: u64,
    },
    /// It is not JSON.
    NotJson {
        /// What the parser found.
        message: String,
    },
    /// It is JSON, but not an object.
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// None of the fields that are read is there.
    NoField {
        /// The fields that were expected.
        expected: String,
        /// The fields that are there.
        found: String,
    },
    /// A field is not text.
    NotAString {
        /// The field.
        field: String,
        /// What it is.
        found: &'static str,
    },
    /// It has a text and a prompt with completion.
    Ambiguous {
        /// The fields.
        fields: String,
    },
    /// There is nothing to learn after the prompt.
    EmptyCompletion {
        /// The field.
        field: String,
    },
    /// It is a chat.
    Messages {
        /// What is read instead.
        expected: String,
    },
}

impl fmt::Display for LineProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { limit_bytes } => write!(f, "expected at most {limit_bytes} bytes, found a longer line"),
            Self::NotUtf8 { at } => write!(f, "expected UTF-8, found another byte at {at} of the line"),
            Self::NotJson { message } => write!(f, "expected a JSON object, found {message}"),
            Self::NotAnObject { found } => write!(f, "expected a JSON object, found {found}"),
            Self::NoField { expected, found } => write!(f, "expected {expected}, found {found}"),
            Self::NotAString { field, found } => write!(f, "expected a string in {field:?}, found {found}"),
            Self::Ambiguous { fields } => write!(f, "expected a text or a prompt with completion, found {fields}"),
            Self::EmptyCompletion { field } => write!(f, "expected text in {field:?}, found an empty string"),
            Self::Messages { expected } => {
                write!(f, "expected {expected}, found a chat in \"messages\", which is not supported")
            }
        }
    }
}
