//! The models against transformers and PEFT, the operations against compositions and finite differences.

mod compositions;
mod differences;
mod models;
mod speed;
mod support;
