//! The models against transformers and PEFT, the operations against compositions and finite differences.

mod models;
mod support;
