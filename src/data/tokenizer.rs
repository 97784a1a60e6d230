//! Text to token ids, with the tokenizer that belongs to a model.
//!
//! Owns: [`Tokenizer`]: `tokenizer.json`, and which ids begin and end a document.
//! Refuses to know: records, files of data. A model without `tokenizer.json` is refused: nothing is guessed.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::DataError;
use crate::store::{LocalStore, Store, StoreError, read_small};

/// The largest tokenizer.json that is read; those of 256k tokens have 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// The largest of the small JSON files beside it; tokenizer_config.json lists added tokens.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Where the ids of special tokens are looked for, in this order.
pub(super) const SPECIAL_TOKEN_FILES: &str = "tokenizer_config.json, generation_config.json and config.json";

/// A model's tokenizer. Texts are encoded without special tokens; the caller puts those it wants around them.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Option<u32>,
    bos: Option<u32>,
    adds_bos: bool,
    vocabulary_len: u32,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { eos, bos, adds_bos, vocabulary_len, .. } = self;
        write!(f, "Tokenizer {{ {vocabulary_len} tokens, eos: {eos:?}, bos: {bos:?}, adds_bos: {adds_bos} }}")
    }
}

impl Tokenizer {
    /// Reads the tokenizer of the model in `directory`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] when there is no `tokenizer.json`, it cannot be parsed, or a special token's name is not
    /// in its vocabulary; [`DataError::Store`] when a file cannot be read.
    pub fn open(directory: &Path) -> Result<Self, DataError> {
        Self::load(&LocalStore::new(directory))
    }

    /// Reads the tokenizer of the model in `store`.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn load(store: &dyn Store) -> Result<Self, DataError> {
        let path = store.describe("tokenizer.json");
        let failed = |problem: String| DataError::Tokenizer { path: path.clone(), problem };
        let Some(bytes) = optional(store, "tokenizer.json", MAX_TOKENIZER_BYTES)? else {
            return Err(failed(missing(store)));
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| failed(format!("expected a tokenizer of the tokenizers library: {error}")))?;
        // Saved files keep the truncation and padding of their last use, which would cut documents silently.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| failed(error.to_string()))?;
        let largest = inner.get_vocab(true).into_values().max();
        let config = json(store, "tokenizer_config.json")?;
        let generation = json(store, "generation_config.json")?;
        let model = json(store, "config.json")?;
        let special = |token: &str, id: &str| -> Result<Option<u32>, DataError> {
            if let Some(content) = config.as_ref().and_then(|config| content(config.get(token)?)) {
                return inner.token_to_id(content).map(Some).ok_or_else(|| DataError::Tokenizer {
                    path: store.describe("tokenizer_config.json"),
                    problem: format!("expected a token of the vocabulary in {token:?}, found {content:?}"),
                });
            }
            Ok([&generation, &model].into_iter().find_map(|file| first_id(file.as_ref()?.get(id)?)))
        };
        let (eos, bos) = (special("eos_token", "eos_token_id")?, special("bos_token", "bos_token_id")?);
        let adds_bos = match config.as_ref().and_then(|config| config.get("add_bos_token")).and_then(Value::as_bool) {
            Some(stated) => stated,
            None => starts_with(&inner, bos).map_err(failed)?,
        };
        // Special tokens are put by the caller; and a post-processor may trim spaces off the offsets that mark the prompt.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        let vocabulary_len = largest.map_or(0, |largest| largest.saturating_add(1));
        Ok(Self { inner, eos, bos, adds_bos, vocabulary_len })
    }

    /// The id that ends a document, where the model's files name one.
    #[must_use]
    pub const fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The id that begins a document, where the model's files name one.
    #[must_use]
    pub const fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the tokenizer by itself begins a text with [`Tokenizer::bos`].
    #[must_use]
    pub const fn adds_bos(&self) -> bool {
        self.adds_bos && self.bos.is_some()
    }

    /// One more than the largest id: what the model's embedding must have at least.
    #[must_use]
    pub const fn vocabulary_len(&self) -> u32 {
        self.vocabulary_len
    }

    /// The ids of a text, without special tokens around it.
    ///
    /// # Errors
    /// The tokenizer's words, as when a character is not in a vocabulary that has no unknown token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `prompt` followed by `completion`, tokenized as one text, and how many of them belong to the prompt.
    /// A token that has a byte of both, such as a word with the space before it, belongs to the completion.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, prompt: &str, completion: &str) -> Result<(Vec<u32>, usize), String> {
        let text = format!("{prompt}{completion}");
        let encoding = self.inner.encode(text, false).map_err(|error| error.to_string())?;
        let prompt_tokens = encoding.get_offsets().iter().take_while(|(_, end)| *end <= prompt.len()).count();
        Ok((encoding.get_ids().to_vec(), prompt_tokens))
    }

    /// The text of ids, without special tokens.
    ///
    /// # Errors
    /// The tokenizer's words.
    pub fn decode(&self, ids: &[u32]) -> Result<String, String> {
        self.inner.decode(ids, true).map_err(|error| error.to_string())
    }
}

/// What to say when there is no tokenizer.json.
fn missing(store: &dyn Store) -> String {
    let others = ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"];
    let found = others.into_iter().find(|name| store.open(name).is_ok());
    let found = found.map_or_else(|| "no tokenizer".to_owned(), |name| format!("only {name}"));
    format!("expected a tokenizer.json beside the model, found {found}; transformers' save_pretrained writes one")
}

/// Whether the tokenizer's own special tokens start with `bos`.
fn starts_with(inner: &tokenizers::Tokenizer, bos: Option<u32>) -> Result<bool, String> {
    let encoding = inner.encode_fast("a", true).map_err(|error| error.to_string())?;
    Ok(bos.is_some() && encoding.get_ids().first().copied() == bos)
}

/// A token's text: a string, or an object with the text in `content`.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// An id, or the first of several.
fn first_id(id: &Value) -> Option<u32> {
    let id = id.as_array().map_or(Some(id), |ids| ids.first())?;
    u32::try_from(id.as_u64()?).ok()
}

fn json(store: &dyn Store, name: &str) -> Result<Option<Value>, DataError> {
    let Some(bytes) = optional(store, name, MAX_CONFIG_BYTES)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| DataError::Tokenizer {
        path: store.describe(name),
        problem: format!("expected JSON, found {error}"),
    })
}

/// A file's bytes; none when it does not exist.
fn optional(store: &dyn Store, name: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, DataError> {
    match read_small(store, name, limit_bytes) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}
