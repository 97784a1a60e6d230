//! The files beside a model's weights that go with it wherever it goes: tokenizer and defaults of generation.

use crate::error::{Classify as _, Kind};
use crate::store::{LocalStore, Store, StoreError, read_small, write_small};

/// Belongs to the model.
const GENERATION: &str = "generation_config.json";

/// Belong to the tokenizer.
const TOKENIZER: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// A longer file beside the weights is not one of these; the largest tokenizers have 40 MB.
const MAX_BYTES: u64 = 256 << 20;

/// Copies those files that there are of `model`'s and of `tokenizer`'s, which may be one directory.
pub(super) fn copy_companions(model: &dyn Store, tokenizer: &dyn Store, to: &LocalStore) -> Result<(), StoreError> {
    let all = TOKENIZER.into_iter().map(|name| (name, tokenizer)).chain([(GENERATION, model)]);
    for (name, from) in all {
        match read_small(from, name, MAX_BYTES) {
            Ok(bytes) => write_small(to, name, &bytes)?,
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
