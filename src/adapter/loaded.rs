//! An adapter with its tensors in memory, and the check that they are those that its configuration asks for.
//!
//! Refuses to know: where the tensors come from; a function gives their values.

use std::collections::{BTreeMap, BTreeSet};

use super::names::{AdapterPart, adapter_name};
use super::{AdapterConfig, AdapterError, LowRank, Target, TensorMismatch};
use crate::types::{DType, Fqn, Shape};

/// Tensors that are named at most in each list of a [`TensorMismatch`]'s message; the counts are always exact.
pub const MAX_NAMED_TENSORS: usize = 8;

/// A tensor that an adapter has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterTensor {
    /// Its name in PEFT's files.
    pub fqn: Fqn,
    /// Its shape.
    pub shape: Shape,
    /// Which part it is.
    pub part: AdapterPart,
    /// The index of its module among the targets.
    pub target: usize,
}

/// An adapter on one module, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedModule {
    /// The module, with rank and scale.
    pub target: Target,
    /// `lora_A`, `[r, in]`.
    pub a: Vec<f32>,
    /// `lora_B`, `[out, r]`.
    pub b: Vec<f32>,
    /// DoRA's magnitude, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

/// An adapter in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedAdapter {
    /// Its configuration.
    pub config: AdapterConfig,
    /// Its modules in the model's order.
    pub modules: Vec<LoadedModule>,
}

impl AdapterConfig {
    /// The tensors of the adapter on `targets`: A, B and, for DoRA, the magnitude of each.
    #[must_use]
    pub fn tensors(&self, targets: &[Target]) -> Vec<AdapterTensor> {
        let mut tensors = Vec::with_capacity(3 * targets.len());
        for (index, target) in targets.iter().enumerate() {
            let mut add = |part, shape: Shape| {
                let fqn = adapter_name(&target.module, part);
                tensors.push(AdapterTensor { fqn, shape, part, target: index });
            };
            add(AdapterPart::A, [target.r, target.in_features].into());
            add(AdapterPart::B, [target.out_features, target.r].into());
            if self.use_dora {
                add(AdapterPart::Magnitude, [target.out_features].into());
            }
        }
        tensors
    }

    /// That `found` are the tensors of the adapter on `targets`, all of them and no other, each in its shape and of numbers
    /// that can be weights.
    ///
    /// # Errors
    /// [`AdapterError::Tensors`] with everything that differs.
    pub fn check_tensors(&self, targets: &[Target], found: &BTreeMap<Fqn, (DType, Shape)>) -> Result<(), AdapterError> {
        let mut mismatch = TensorMismatch::default();
        let mut expected = BTreeSet::new();
        for tensor in self.tensors(targets) {
            match found.get(&tensor.fqn) {
                None => mismatch.missing.push(tensor.fqn.clone()),
                Some((_, shape)) if *shape != tensor.shape => {
                    mismatch.shapes.push((tensor.fqn.clone(), tensor.shape.clone(), shape.clone()));
                }
                Some((dtype, _)) if !dtype.is_weight_float() => mismatch.dtypes.push((tensor.fqn.clone(), *dtype)),
                Some(_) => {}
            }
            expected.insert(tensor.fqn);
        }
        mismatch.unexpected = found.keys().filter(|fqn| !expected.contains(*fqn)).cloned().collect();
        if mismatch.is_empty() { Ok(()) } else { Err(AdapterError::Tensors(mismatch)) }
    }
}

impl LoadedAdapter {
    /// Puts an adapter together; `read` gives a tensor's elements in f32, row-major.
    ///
    /// # Errors
    /// The first of `read`.
    pub fn read<E>(
        config: AdapterConfig,
        targets: Vec<Target>,
        mut read: impl FnMut(&AdapterTensor) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let tensors = config.tensors(&targets);
        let empty = |target| LoadedModule { target, a: Vec::new(), b: Vec::new(), magnitude: None };
        let mut modules: Vec<LoadedModule> = targets.into_iter().map(empty).collect();
        for tensor in &tensors {
            let values = read(tensor)?;
            let Some(module) = modules.get_mut(tensor.target) else { continue };
            match tensor.part {
                AdapterPart::A => module.a = values,
                AdapterPart::B => module.b = values,
                AdapterPart::Magnitude => module.magnitude = Some(values),
            }
        }
        Ok(Self { config, modules })
    }

    /// The number of trained parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let magnitude = |module: &LoadedModule| module.magnitude.as_ref().map_or(0, Vec::len);
        self.modules.iter().map(|module| module.a.len() + module.b.len() + magnitude(module)).sum()
    }
}

impl LoadedModule {
    /// What [`super::merge`] takes.
    #[must_use]
    pub fn low_rank(&self) -> LowRank<'_> {
        #[expect(clippy::cast_possible_truncation, reason = "the scale in the arithmetic of the weights")]
        let scale = self.target.scale as f32;
        LowRank { a: &self.a, b: &self.b, magnitude: self.magnitude.as_deref(), r: self.target.r, scale }
    }

    /// The elements of a part; empty for a magnitude that is not there.
    #[must_use]
    pub fn part(&self, part: AdapterPart) -> &[f32] {
        match part {
            AdapterPart::A => &self.a,
            AdapterPart::B => &self.b,
            AdapterPart::Magnitude => self.magnitude.as_deref().unwrap_or_default(),
        }
    }
}
