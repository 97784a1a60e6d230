//! Forward and backward of a micro-batch over a base that comes and goes block by block.
//!
//! Owns: which block's weights are there when, activation checkpointing, and the sum of gradients over micro-batches.
//! Refuses to know: ranks, optimizer, data.
//!
//! Each block's graph starts at a variable that holds the block's input; its backward is started with the gradient that
//! came from the block after it. With activation checkpointing the block's input alone is kept, from which the backward
//! computes what it needs again; without it the forward's graph is kept.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::nn::{Decoder, DropoutKey, Pass, Tokens, seed};
use crate::types::Fqn;

use super::TrainError;
use super::base::Base;
use super::exchange::Exchange;
use super::state::Layout;

/// The sum of negative log likelihoods in nats, and the number of tokens that count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct LossSum {
    pub(super) nats: f32,
    pub(super) tokens: u64,
}

/// The model with room for gradients.
pub(super) struct Engine<'a> {
    decoder: Decoder,
    pub(super) base: Base<'a>,
    /// The trained variables in the layout's order.
    variables: Vec<Var>,
    /// Whether the embedding is trained, so that the backward goes all the way.
    trains_embedding: bool,
    checkpointing: bool,
    /// The gradients' sum, as the layout's whole buffer.
    pub(super) gradients: Vec<f32>,
}

/// A block between its forward and its backward.
enum Kept {
    /// With activation checkpointing.
    Input(Tensor),
    /// Input and output, and between them the block's graph.
    Graph(Var, Tensor),
}

impl<'a> Engine<'a> {
    pub(super) fn new(
        decoder: Decoder,
        base: Base<'a>,
        (variables, layout): (Vec<Var>, &Layout),
        checkpointing: bool,
    ) -> Self {
        let is_trained = |fqn: &Fqn| layout.tensors().iter().any(|(known, ..)| known == fqn);
        let trains_embedding = decoder.embed_tensors().iter().any(is_trained);
        let gradients = vec![0.0; layout.elements()];
        Self { decoder, base, variables, trains_embedding, checkpointing, gradients }
    }

    /// Forward and backward; gradients are added to `gradients`.
    pub(super) fn learn(
        &mut self,
        tokens: &Tokens,
        dropout: Option<DropoutKey>,
        layout: &Layout,
        exchange: &mut Exchange<'_>,
    ) -> Result<LossSum, TrainError> {
        let pass = self.decoder.pass(tokens, dropout)?;
        let embedded = self.embed(tokens, exchange)?;
        let mut input = embedded.detach();
        let mut kept = Vec::with_capacity(self.decoder.blocks());
        for block in 0..self.decoder.blocks() {
            let (output, part) = self.block_forward(block, input, &pass, exchange)?;
            input = output;
            kept.push(part);
        }
        self.fill_head(exchange)?;
        let input = Var::from_tensor(&input)?;
        let (loss, counted) = self.decoder.loss(input.as_tensor(), tokens)?;
        let nats: f32 = loss.to_scalar()?;
        let store = loss.backward()?;
        drop(loss);
        self.base.clear(self.decoder.head_tensors());
        self.collect(|variable| store.get(variable.as_tensor()), layout)?;
        let mut gradient = take(store, &input)?;
        drop(input);
        for block in (0..self.decoder.blocks()).rev() {
            let Some(part) = kept.pop() else { break };
            gradient = self.block_backward((block, part), gradient, (&pass, layout), exchange)?;
        }
        if self.trains_embedding {
            let store = seed(&embedded, &gradient)?.backward()?;
            self.collect(|variable| store.get(variable.as_tensor()), layout)?;
        }
        Ok(LossSum { nats, tokens: counted })
    }

    /// Forward only.
    pub(super) fn evaluate(&mut self, tokens: &Tokens, exchange: &mut Exchange<'_>) -> Result<LossSum, TrainError> {
        let values = self.activations(tokens, exchange)?;
        self.fill_head(exchange)?;
        let (loss, tokens) = self.decoder.loss(&values, tokens)?;
        self.base.clear(self.decoder.head_tensors());
        Ok(LossSum { nats: loss.to_scalar()?, tokens })
    }

    /// Forward only: the logits, f32 `[batch * seq, vocab]` row-major.
    pub(super) fn logits(&mut self, tokens: &Tokens, exchange: &mut Exchange<'_>) -> Result<Vec<f32>, TrainError> {
        let values = self.activations(tokens, exchange)?;
        self.fill_head(exchange)?;
        let logits = self.decoder.logits(&values)?;
        self.base.clear(self.decoder.head_tensors());
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    /// The last block's output, without a graph.
    fn activations(&mut self, tokens: &Tokens, exchange: &mut Exchange<'_>) -> Result<Tensor, TrainError> {
        let pass = self.decoder.pass(tokens, None)?;
        let mut values = self.embed(tokens, exchange)?.detach();
        for block in 0..self.decoder.blocks() {
            self.base.fill(self.decoder.block_tensors(block), exchange)?;
            values = self.decoder.infer_block(block, &values, &pass)?;
            self.base.clear(self.decoder.block_tensors(block));
        }
        Ok(values)
    }

    /// Makes the collective calls of [`Self::learn`] (or of [`Self::evaluate`]) and computes nothing (`TR-1`).
    pub(super) fn take_part(&mut self, learns: bool, exchange: &mut Exchange<'_>) -> Result<(), TrainError> {
        let blocks = 0..self.decoder.blocks();
        self.base.take_part(self.decoder.embed_tensors(), exchange)?;
        for block in blocks.clone() {
            self.base.take_part(self.decoder.block_tensors(block), exchange)?;
        }
        self.base.take_part(self.decoder.head_tensors(), exchange)?;
        for block in blocks.rev().filter(|_| learns) {
            self.base.take_part(self.decoder.block_tensors(block), exchange)?;
        }
        Ok(())
    }

    fn embed(&mut self, tokens: &Tokens, exchange: &mut Exchange<'_>) -> Result<Tensor, TrainError> {
        self.base.fill(self.decoder.embed_tensors(), exchange)?;
        let embedded = self.decoder.embed(tokens)?;
        self.base.clear(self.decoder.embed_tensors());
        Ok(embedded)
    }

    fn fill_head(&mut self, exchange: &mut Exchange<'_>) -> Result<(), TrainError> {
        self.base.fill(self.decoder.head_tensors(), exchange)
    }

    /// A block's output, and what its backward will start from.
    fn block_forward(
        &mut self,
        block: usize,
        input: Tensor,
        pass: &Pass,
        exchange: &mut Exchange<'_>,
    ) -> Result<(Tensor, Kept), TrainError> {
        self.base.fill(self.decoder.block_tensors(block), exchange)?;
        let result = if self.checkpointing {
            (self.decoder.infer_block(block, &input, pass)?, Kept::Input(input))
        } else {
            let input = Var::from_tensor(&input)?;
            let output = self.decoder.block(block, input.as_tensor(), pass)?;
            (output.detach(), Kept::Graph(input, output))
        };
        self.base.clear(self.decoder.block_tensors(block));
        Ok(result)
    }

    /// The gradient of a block's input from that of its output.
    fn block_backward(
        &mut self,
        (block, kept): (usize, Kept),
        gradient: Tensor,
        (pass, layout): (&Pass, &Layout),
        exchange: &mut Exchange<'_>,
    ) -> Result<Tensor, TrainError> {
        self.base.fill(self.decoder.block_tensors(block), exchange)?;
        let result = match kept {
            Kept::Input(input) => {
                let (result, found) = self.decoder.block_backward(block, (&input, &gradient), pass)?;
                self.collect(|variable| found.get(variable), layout)?;
                result
            }
            Kept::Graph(input, output) => {
                let store = seed(&output, &gradient)?.backward()?;
                self.collect(|variable| store.get(variable.as_tensor()), layout)?;
                take(store, &input)?
            }
        };
        self.base.clear(self.decoder.block_tensors(block));
        Ok(result)
    }

    /// Adds the gradients of the trained variables.
    fn collect<'g>(&mut self, found: impl Fn(&Var) -> Option<&'g Tensor>, layout: &Layout) -> Result<(), TrainError> {
        for (variable, (_, range, _)) in self.variables.iter().zip(layout.tensors()) {
            let Some(gradient) = found(variable) else { continue };
            let values = gradient.flatten_all()?.to_vec1::<f32>()?;
            let sums = self.gradients.get_mut(range.clone()).unwrap_or_default();
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        Ok(())
    }
}

/// The gradient of `variable`; zero when nothing depends on it.
fn take(mut store: GradStore, variable: &Var) -> Result<Tensor, TrainError> {
    match store.remove(variable.as_tensor()) {
        Some(gradient) => Ok(gradient.detach()),
        None => Ok(variable.as_tensor().zeros_like()?.detach()),
    }
}
