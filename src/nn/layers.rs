//! What a model consists of: linear layers, norms, blocks, each with its weights found by name.

use std::collections::BTreeSet;

use super::parameter::check_shape;
use super::{Lora, NnError, Parameter, Parameters};
use crate::model::{Architecture, AttentionBias, ModelConfig};
use crate::types::{Fqn, Shape, as_usize};

/// `y = x Wᵀ + bias`, with or without an adapter.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) weight: Parameter,
    /// Whether the weight is `[out, in]`, as it is everywhere but in GPT-2's `Conv1D`.
    pub(super) order: Order,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) bias: Option<Parameter>,
    pub(super) adapter: Option<Lora>,
}

/// The order of the dims of a linear layer's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    OutIn,
    InOut,
}

/// RMS norm, or layer norm where there is a bias.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) weight: Parameter,
    pub(super) bias: Option<Parameter>,
    pub(super) eps: f64,
}

/// Query, key and value projections.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each block, and never moved")]
pub(super) enum Projections {
    Separate {
        query: Linear,
        key: Linear,
        value: Linear,
    },
    /// One matrix whose outputs are query, key, value.
    Joint(Linear),
}

#[derive(Debug)]
pub(super) struct Attention {
    pub(super) projections: Projections,
    /// Norms of each head's query and key, before the rotary embedding.
    pub(super) head_norms: Option<(Norm, Norm)>,
    pub(super) output: Linear,
    pub(super) shape: AttentionShape,
}

/// The sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionShape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Positions that a token sees, itself included.
    pub(super) window: Option<usize>,
}

impl AttentionShape {
    pub(super) const fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(super) const fn key_value_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

#[derive(Debug)]
pub(super) enum Mlp {
    /// `down(silu(gate(x)) * up(x))`.
    Gated { gate: Linear, up: Linear, down: Linear },
    /// `down(gelu(up(x)))`.
    Plain { up: Linear, down: Linear, gelu: Gelu },
}

/// Which of the two functions of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gelu {
    /// GPT-2's approximation by tanh (`gelu_new`).
    Tanh,
    /// With the error function (`gelu`).
    Exact,
}

/// One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) attention_norm: Norm,
    pub(super) attention: Attention,
    pub(super) mlp_norm: Norm,
    pub(super) mlp: Mlp,
}

/// Finds parameters by name and remembers which ones a part of the model uses.
pub(super) struct Finder<'a> {
    parameters: &'a Parameters,
    used: Vec<Fqn>,
    adapted: BTreeSet<String>,
}

impl<'a> Finder<'a> {
    pub(super) fn new(parameters: &'a Parameters) -> Self {
        Self { parameters, used: Vec::new(), adapted: BTreeSet::new() }
    }

    /// The names used since the last call.
    pub(super) fn take_used(&mut self) -> Vec<Fqn> {
        std::mem::take(&mut self.used)
    }

    /// That every adapter found its module.
    pub(super) fn finish(self) -> Result<(), NnError> {
        match self.parameters.adapters.keys().find(|module| !self.adapted.contains(*module)) {
            Some(module) => Err(NnError::UnknownModule { module: module.clone() }),
            None => Ok(()),
        }
    }

    pub(super) fn parameter(&mut self, name: String, shape: impl Into<Shape>) -> Result<Parameter, NnError> {
        let name = Fqn::from(name);
        let alias = self.parameters.aliases.iter().find(|(alias, _)| *alias == name);
        let fqn = alias.map_or(name, |(_, target)| target.clone());
        let parameter =
            self.parameters.tensors.get(&fqn).ok_or_else(|| NnError::MissingParameter { fqn: fqn.clone() })?;
        parameter.check(&fqn, &shape.into())?;
        self.used.push(fqn);
        Ok(parameter.clone())
    }

    pub(super) fn norm(&mut self, module: &str, size: u64, bias: bool, eps: f64) -> Result<Norm, NnError> {
        let weight = self.parameter(format!("{module}.weight"), [size])?;
        let bias = if bias { Some(self.parameter(format!("{module}.bias"), [size])?) } else { None };
        Ok(Norm { weight, bias, eps })
    }

    fn linear(&mut self, module: &str, [outputs, inputs]: [u64; 2], kind: Kind) -> Result<Linear, NnError> {
        let shape = if kind.order == Order::OutIn { [outputs, inputs] } else { [inputs, outputs] };
        let weight = self.parameter(format!("{module}.weight"), shape)?;
        let bias = if kind.bias { Some(self.parameter(format!("{module}.bias"), [outputs])?) } else { None };
        let adapter = self.parameters.adapters.get(module).cloned();
        if let Some(adapter) = &adapter {
            let rank = crate::types::as_u64(adapter.a.dims().first().copied().unwrap_or(0));
            let check = |part: &str, shape: Shape, tensor: &candle_core::Var| {
                check_shape(&Fqn::from(format!("{module}.{part}")), &shape, tensor.as_tensor())
            };
            check("lora_A", [rank, inputs].into(), &adapter.a)?;
            check("lora_B", [outputs, rank].into(), &adapter.b)?;
            if let Some(magnitude) = &adapter.magnitude {
                check("lora_magnitude_vector", [outputs].into(), magnitude)?;
            }
            if !(0.0..1.0).contains(&adapter.dropout) {
                return Err(NnError::Unsupported {
                    field: "lora_dropout",
                    expected: "a probability below 1",
                    found: adapter.dropout.to_string(),
                });
            }
            self.adapted.insert(module.to_owned());
        }
        Ok(Linear { weight, order: kind.order, inputs: as_usize(inputs), outputs: as_usize(outputs), bias, adapter })
    }

    /// Layer `number`, its parameters in the order in which it computes.
    pub(super) fn block(&mut self, config: &ModelConfig, number: u32) -> Result<Block, NnError> {
        match config.architecture {
            Architecture::Gpt2 => self.gpt2_block(config, number),
            _ => self.llama_block(config, number),
        }
    }

    fn llama_block(&mut self, config: &ModelConfig, number: u32) -> Result<Block, NnError> {
        let prefix = format!("model.layers.{number}");
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        let (query, key_value) = (config.query_size(), config.key_value_size());
        let qkv = Kind { order: Order::OutIn, bias: config.attention_bias != AttentionBias::None };
        let output = Kind { order: Order::OutIn, bias: config.attention_bias == AttentionBias::All };
        let mlp = Kind { order: Order::OutIn, bias: config.mlp_bias };
        let attention_norm = self.norm(&format!("{prefix}.input_layernorm"), hidden, false, eps)?;
        let projections = Projections::Separate {
            query: self.linear(&format!("{prefix}.self_attn.q_proj"), [query, hidden], qkv)?,
            key: self.linear(&format!("{prefix}.self_attn.k_proj"), [key_value, hidden], qkv)?,
            value: self.linear(&format!("{prefix}.self_attn.v_proj"), [key_value, hidden], qkv)?,
        };
        let head_norms = if config.architecture == Architecture::Qwen3 {
            let mut norm = |name: &str| self.norm(&format!("{prefix}.self_attn.{name}"), config.head_dim, false, eps);
            Some((norm("q_norm")?, norm("k_norm")?))
        } else {
            None
        };
        let output = self.linear(&format!("{prefix}.self_attn.o_proj"), [hidden, query], output)?;
        Ok(Block {
            attention_norm,
            attention: Attention { projections, head_norms, output, shape: attention_shape(config, number) },
            mlp_norm: self.norm(&format!("{prefix}.post_attention_layernorm"), hidden, false, eps)?,
            mlp: Mlp::Gated {
                gate: self.linear(&format!("{prefix}.mlp.gate_proj"), [inner, hidden], mlp)?,
                up: self.linear(&format!("{prefix}.mlp.up_proj"), [inner, hidden], mlp)?,
                down: self.linear(&format!("{prefix}.mlp.down_proj"), [hidden, inner], mlp)?,
            },
        })
    }

    fn gpt2_block(&mut self, config: &ModelConfig, number: u32) -> Result<Block, NnError> {
        let prefix = format!("transformer.h.{number}");
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        let kind = Kind { order: Order::InOut, bias: true };
        Ok(Block {
            attention_norm: self.norm(&format!("{prefix}.ln_1"), hidden, true, eps)?,
            attention: Attention {
                projections: Projections::Joint(self.linear(
                    &format!("{prefix}.attn.c_attn"),
                    [3 * hidden, hidden],
                    kind,
                )?),
                head_norms: None,
                output: self.linear(&format!("{prefix}.attn.c_proj"), [hidden, hidden], kind)?,
                shape: attention_shape(config, number),
            },
            mlp_norm: self.norm(&format!("{prefix}.ln_2"), hidden, true, eps)?,
            mlp: Mlp::Plain {
                up: self.linear(&format!("{prefix}.mlp.c_fc"), [inner, hidden], kind)?,
                down: self.linear(&format!("{prefix}.mlp.c_proj"), [hidden, inner], kind)?,
                gelu: if config.hidden_act == "gelu" { Gelu::Exact } else { Gelu::Tanh },
            },
        })
    }
}

#[derive(Clone, Copy)]
struct Kind {
    order: Order,
    bias: bool,
}

fn attention_shape(config: &ModelConfig, number: u32) -> AttentionShape {
    AttentionShape {
        heads: as_usize(config.num_attention_heads),
        kv_heads: as_usize(config.num_key_value_heads),
        head_dim: as_usize(config.head_dim),
        window: config.window_of(number).map(as_usize),
    }
}
