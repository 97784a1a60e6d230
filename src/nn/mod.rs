//! Models as differentiable functions over weights that somebody else provides.
//!
//! Owns: the forward of decoders (Llama, Mistral, Qwen2, Qwen3, GPT-2) in f32, its backward, LoRA and `DoRA` on any linear layer.
//! Refuses to know: where weights come from, how they are stored or cut over ranks, optimizers, steps, files.
//!
//! A model is called in parts, embedding, blocks, head, so that a caller can bring the weights of one part, drop them, and
//! bring them again for its backward. Activations are f32 `[batch * seq, hidden]`.
//!
//! Invariants:
//! - `NN-1`: a backward reads a frozen weight from its slot at that moment; nothing of the forward keeps it alive.
//! - `NN-2`: no gradient of a frozen weight is computed, and no trainable one is left without.
//! - `NN-3`: the same input gives the same bits on every run and for any number of threads.
//! - `NN-4`: dropout depends on seed, step, sample, position, module and feature, not on who computes them.

mod block;
mod composed;
mod decoder;
mod error;
mod head;
mod layers;
mod norm;
mod ops;
mod parameter;
mod seed;
mod tokens;

pub use decoder::Decoder;
pub use error::NnError;
pub use ops::fused::Gradients;
pub use parameter::{FrozenWeight, Lora, Parameter, Parameters, module_key};
pub use seed::seed;
pub use tokens::{DropoutKey, Pass, Tokens};

#[cfg(test)]
mod tests;
