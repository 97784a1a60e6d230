//! A decoder in parts: embedding, blocks, head.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::head::{self, Head};
use super::layers::{Block, Finder};
use super::{DropoutKey, Gradients, NnError, Parameter, Parameters, Pass, Tokens, block, composed};
use crate::model::{Architecture, ModelConfig, ModelHead, RopeParameters, RopeScaling};
use crate::types::{Fqn, as_usize};

/// A language model whose parts are called one by one; weights come and go between the calls.
#[derive(Debug)]
pub struct Decoder {
    vocab: usize,
    max_positions: u32,
    rope: Option<(RopeParameters, Vec<f32>)>,
    tokens: Parameter,
    /// GPT-2's learned positions.
    positions: Option<Parameter>,
    blocks: Vec<Arc<Block>>,
    head: Arc<Head>,
    embed_tensors: Vec<Fqn>,
    block_tensors: Vec<Vec<Fqn>>,
    head_tensors: Vec<Fqn>,
    device: Device,
}

impl Decoder {
    /// The model of `config` over `parameters`, whose frozen slots may be empty still.
    ///
    /// # Errors
    /// [`NnError`]: a tensor is missing or of another shape, an adapter has no module, or the configuration asks for
    /// something that is not computed here.
    pub fn new(config: &ModelConfig, parameters: &Parameters, device: Device) -> Result<Self, NnError> {
        check(config)?;
        let gpt2 = config.architecture == Architecture::Gpt2;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let mut finder = Finder::new(parameters);
        let embedding = if gpt2 { "transformer.wte.weight" } else { "model.embed_tokens.weight" };
        let tokens = finder.parameter(embedding.to_owned(), [vocab, hidden])?;
        let positions = if gpt2 {
            let shape = [config.max_position_embeddings, hidden];
            Some(finder.parameter("transformer.wpe.weight".to_owned(), shape)?)
        } else {
            None
        };
        let embed_tensors = finder.take_used();
        let (mut blocks, mut block_tensors) = (Vec::new(), Vec::new());
        for number in 0..config.num_hidden_layers {
            blocks.push(Arc::new(finder.block(config, number)?));
            block_tensors.push(finder.take_used());
        }
        let last = if gpt2 { "transformer.ln_f" } else { "model.norm" };
        let norm = finder.norm(last, hidden, gpt2, config.norm_eps)?;
        let head = if config.tie_word_embeddings { embedding } else { "lm_head.weight" };
        let weight = finder.parameter(head.to_owned(), [vocab, hidden])?;
        let head = Arc::new(Head { norm, weight, vocab: as_usize(vocab) });
        let head_tensors = finder.take_used();
        finder.finish()?;
        Ok(Self {
            vocab: as_usize(vocab),
            max_positions: u32::try_from(config.max_position_embeddings).unwrap_or(u32::MAX),
            rope: config.rope.clone().map(|rope| (rope.clone(), rope.inv_freq())),
            tokens,
            positions,
            blocks,
            head,
            embed_tensors,
            block_tensors,
            head_tensors,
            device,
        })
    }

    /// The number of blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The tensors that [`Decoder::embed`] reads.
    #[must_use]
    pub fn embed_tensors(&self) -> &[Fqn] {
        &self.embed_tensors
    }

    /// The tensors that [`Decoder::block`] reads, in the order in which it does; none for a block that is not there.
    #[must_use]
    pub fn block_tensors(&self, index: usize) -> &[Fqn] {
        self.block_tensors.get(index).map_or(&[], Vec::as_slice)
    }

    /// The tensors that [`Decoder::logits`] and [`Decoder::loss`] read; the embedding among them where it is tied.
    #[must_use]
    pub fn head_tensors(&self) -> &[Fqn] {
        &self.head_tensors
    }

    /// What the blocks need of `tokens`. Dropout is off without a key.
    ///
    /// # Errors
    /// [`NnError::Tokens`] for tokens that do not fit the model.
    pub fn pass(&self, tokens: &Tokens, dropout: Option<DropoutKey>) -> Result<Pass, NnError> {
        self.check_tokens(tokens)?;
        let rotary = match &self.rope {
            Some((rope, inv_freq)) => Some(self.rotary(tokens, rope, inv_freq)?),
            None => None,
        };
        Ok(Pass::new(tokens, rotary, dropout))
    }

    /// Cosine and sine of every token's angles; the angle is an f32 product, as transformers computes it.
    fn rotary(&self, tokens: &Tokens, rope: &RopeParameters, inv_freq: &[f32]) -> Result<(Tensor, Tensor), NnError> {
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
        let factor = rope.attention_factor() as f32;
        let shape = (tokens.batch * tokens.seq, inv_freq.len());
        let table = |function: fn(f32) -> f32| {
            #[expect(clippy::cast_precision_loss, reason = "transformers' positions are f32 too")]
            let angles =
                tokens.positions().flat_map(|position| inv_freq.iter().map(move |freq| position as f32 * freq));
            Tensor::from_vec(angles.map(|angle| function(angle) * factor).collect(), shape, &self.device)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }

    fn check_tokens(&self, tokens: &Tokens) -> Result<(), NnError> {
        tokens.check(self.vocab)?;
        let dynamic = matches!(&self.rope, Some((rope, _)) if matches!(rope.scaling, RopeScaling::Dynamic { .. }));
        if self.positions.is_some() || dynamic {
            // Learned positions end there, and dynamic scaling would depend on the longest document of a batch.
            let too_far = tokens.positions().enumerate().find(|(_, position)| *position >= self.max_positions);
            if let Some((index, position)) = too_far {
                return Err(NnError::Tokens {
                    field: "positions",
                    index,
                    expected: format!("below {}", self.max_positions),
                    found: u64::from(position),
                });
            }
        }
        Ok(())
    }

    /// The activations that enter block 0, f32 `[batch * seq, hidden]`.
    ///
    /// # Errors
    /// [`NnError`]: bad tokens, an empty slot.
    pub fn embed(&self, tokens: &Tokens) -> Result<Tensor, NnError> {
        self.check_tokens(tokens)?;
        let embedded = composed::lookup(&self.tokens, &tokens.ids, &self.device)?;
        let Some(positions) = &self.positions else { return Ok(embedded) };
        let places: Vec<u32> = tokens.positions().collect();
        Ok((embedded + composed::lookup(positions, &places, &self.device)?)?)
    }

    /// Block `index` over activations f32 `[batch * seq, hidden]`, contiguous; the result has the same shape.
    ///
    /// # Errors
    /// [`NnError`]: no such block, an empty slot, another shape than the pass has.
    pub fn block(&self, index: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, NnError> {
        Ok(block::forward(self.numbered(index)?, x, pass)?)
    }

    /// As [`Decoder::block`], without a graph.
    ///
    /// # Errors
    /// Those of [`Decoder::block`].
    pub fn infer_block(&self, index: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, NnError> {
        Ok(block::infer(self.numbered(index)?, x, pass)?)
    }

    /// From a block's input and the gradient of its output, both f32 `[batch * seq, hidden]` and contiguous: the gradient of
    /// the input, and those of the block's variables. Computes the block's forward again, as far as they need it.
    ///
    /// # Errors
    /// Those of [`Decoder::block`].
    pub fn block_backward(
        &self,
        index: usize,
        (x, gradient): (&Tensor, &Tensor),
        pass: &Pass,
    ) -> Result<(Tensor, Gradients), NnError> {
        Ok(block::backward(self.numbered(index)?, x, gradient, pass)?)
    }

    fn numbered(&self, index: usize) -> Result<&Arc<Block>, NnError> {
        let missing = || NnError::NoSuchBlock { found: index, last: self.blocks.len().saturating_sub(1) };
        self.blocks.get(index).ok_or_else(missing)
    }

    /// Logits, f32 `[batch * seq, vocab]`, of the last block's activations.
    ///
    /// # Errors
    /// [`NnError`]: an empty slot.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor, NnError> {
        Ok(head::logits(&self.head, x)?)
    }

    /// The sum of the negative log likelihoods, in nats, of the targets that count, as a scalar f32, and how many count.
    ///
    /// # Errors
    /// [`NnError`]: bad tokens, an empty slot.
    pub fn loss(&self, x: &Tensor, tokens: &Tokens) -> Result<(Tensor, u64), NnError> {
        tokens.check(self.vocab)?;
        Ok((head::loss(&self.head, x, tokens)?, tokens.counted()))
    }
}

/// That the configuration is one of a decoder that is computed here.
fn check(config: &ModelConfig) -> Result<(), NnError> {
    let decoders =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3, Architecture::Gpt2];
    let unsupported =
        |field, expected, found: &str| Err(NnError::Unsupported { field, expected, found: found.to_owned() });
    if !decoders.contains(&config.architecture) {
        let expected = "llama, mistral, qwen2, qwen3 or gpt2";
        return unsupported("architecture", expected, config.architecture.name());
    }
    if config.head != ModelHead::CausalLm {
        return unsupported("head", "a language model's (…ForCausalLM)", "a base model without one");
    }
    let (expected, known): (_, &[&str]) = match config.architecture {
        Architecture::Gpt2 => ("gelu_new or gelu", &["gelu_new", "gelu_pytorch_tanh", "gelu"]),
        _ => ("silu", &["silu", "swish"]),
    };
    if !known.contains(&config.hidden_act.as_str()) {
        return unsupported("hidden_act", expected, &config.hidden_act);
    }
    Ok(())
}
