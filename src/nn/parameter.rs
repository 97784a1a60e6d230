//! Weights of a model: frozen ones in slots that come and go, trainable ones, and adapters.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Tensor, Var};

use super::NnError;
use crate::types::{Fqn, Shape};

/// A weight without a gradient, whose tensor is there only while somebody needs it (`NN-1`). Clones share the slot.
#[derive(Clone)]
pub struct FrozenWeight(Arc<Slot>);

struct Slot {
    fqn: Fqn,
    shape: Shape,
    tensor: Mutex<Option<Tensor>>,
}

impl FrozenWeight {
    /// An empty slot for the tensor `fqn` of `shape`.
    #[must_use]
    pub fn new(fqn: Fqn, shape: Shape) -> Self {
        Self(Arc::new(Slot { fqn, shape, tensor: Mutex::new(None) }))
    }

    /// Puts the tensor in: f32, of the slot's shape, contiguous, on the model's device.
    pub fn fill(&self, tensor: Tensor) {
        *self.0.tensor.lock().unwrap_or_else(PoisonError::into_inner) = Some(tensor.detach());
    }

    /// Empties the slot; the memory is free once no running operation holds the tensor.
    pub fn clear(&self) {
        *self.0.tensor.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The tensor that is in now.
    ///
    /// # Errors
    /// [`NnError::EmptyWeight`], or [`NnError::ParameterShape`] when a tensor of another shape was put in.
    pub fn tensor(&self) -> Result<Tensor, NnError> {
        let slot = self.0.tensor.lock().unwrap_or_else(PoisonError::into_inner);
        let tensor = slot.as_ref().ok_or_else(|| NnError::EmptyWeight { fqn: self.0.fqn.clone() })?;
        check_shape(&self.0.fqn, &self.0.shape, tensor)?;
        Ok(tensor.clone())
    }

    /// The tensor's name.
    #[must_use]
    pub fn fqn(&self) -> &Fqn {
        &self.0.fqn
    }

    /// The tensor's shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }
}

impl fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrozenWeight({} {})", self.0.fqn, self.0.shape)
    }
}

/// One tensor of a model.
#[derive(Clone, Debug)]
pub enum Parameter {
    /// Without a gradient.
    Frozen(FrozenWeight),
    /// With a gradient; f32.
    Trainable(Var),
}

impl Parameter {
    /// The values: of a trainable one the variable itself, so that a graph over it leads to its gradient.
    ///
    /// # Errors
    /// Those of [`FrozenWeight::tensor`].
    pub fn tensor(&self) -> Result<Tensor, NnError> {
        match self {
            Self::Frozen(weight) => weight.tensor(),
            Self::Trainable(variable) => Ok(variable.as_tensor().clone()),
        }
    }

    /// Whether it has no gradient.
    #[must_use]
    pub const fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen(_))
    }

    /// The variable, where it is trained.
    pub(super) fn variable(&self) -> Option<Var> {
        match self {
            Self::Frozen(_) => None,
            Self::Trainable(variable) => Some(variable.clone()),
        }
    }

    /// That its shape is the one that the model needs.
    pub(super) fn check(&self, fqn: &Fqn, expected: &Shape) -> Result<(), NnError> {
        match self {
            Self::Frozen(weight) if weight.shape() == expected => Ok(()),
            Self::Frozen(weight) => Err(NnError::ParameterShape {
                fqn: fqn.clone(),
                expected: expected.clone(),
                found: weight.shape().clone(),
            }),
            Self::Trainable(variable) => check_shape(fqn, expected, variable.as_tensor()),
        }
    }
}

/// A low-rank adapter of one linear layer: `y += scale * B(A(dropout(x)))`; with a magnitude it is `DoRA`, as PEFT computes it.
#[derive(Clone, Debug)]
pub struct Lora {
    /// f32 `[rank, in]`.
    pub a: Var,
    /// f32 `[out, rank]`.
    pub b: Var,
    /// What the product is multiplied with: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f64,
    /// The probability in `[0, 1)` that an input of the adapter is zeroed; the others grow to make up for it.
    pub dropout: f32,
    /// `DoRA`'s magnitude, f32 `[out]`.
    pub magnitude: Option<Var>,
    /// Identifies the module for dropout; see [`module_key`].
    pub key: u64,
}

/// All weights of a model.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    /// The tensors by the skeleton's names.
    pub tensors: BTreeMap<Fqn, Parameter>,
    /// The adapters by module, such as `model.layers.0.self_attn.q_proj`.
    pub adapters: BTreeMap<String, Lora>,
    /// Tied weights: a name, and the tensor that it stands for.
    pub aliases: Vec<(Fqn, Fqn)>,
}

/// A key for [`Lora::key`] that depends on the module's name alone (FNV-1a, 64 bits).
#[must_use]
pub fn module_key(module: &str) -> u64 {
    module.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

pub(super) fn check_shape(fqn: &Fqn, expected: &Shape, tensor: &Tensor) -> Result<(), NnError> {
    let found = Shape(tensor.dims().iter().map(|&size| crate::types::as_u64(size)).collect());
    if found == *expected {
        Ok(())
    } else {
        Err(NnError::ParameterShape { fqn: fqn.clone(), expected: expected.clone(), found })
    }
}
