//! From the trained tensors' values to the model's parameters, and back.
//!
//! Owns: the variables of the trained tensors and which tensors of the model are frozen. Refuses to know: how a model
//! computes, and where a rank's part of the state is.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

use crate::adapter::{AdapterPart, Matrix, Target, initial_a, parse_name, row_norms};
use crate::nn::{FrozenWeight, Lora, Parameter, Parameters, module_key};
use crate::plan::LoadPlan;
use crate::types::Fqn;

use super::base::Base;
use super::exchange::Exchange;
use super::state::Layout;
use super::{TrainError, Trained};

/// The model's parameters, and the variables among them in the layout's order.
pub(super) struct ModelParameters {
    pub(super) parameters: Parameters,
    pub(super) slots: BTreeMap<Fqn, FrozenWeight>,
    pub(super) variables: Vec<Var>,
}

impl ModelParameters {
    /// Variables for the tensors of `layout` (zero at first) and slots for all others of the base.
    pub(super) fn new(
        base: &LoadPlan,
        layout: &Layout,
        trained: &Trained,
        device: &candle_core::Device,
    ) -> Result<Self, TrainError> {
        let mut by_name = BTreeMap::new();
        let mut variables = Vec::new();
        for (fqn, _, dims) in layout.tensors() {
            let variable = Var::zeros(dims.as_slice(), candle_core::DType::F32, device)?;
            by_name.insert(fqn.clone(), variable.clone());
            variables.push(variable);
        }
        let (mut tensors, mut slots) = (BTreeMap::new(), BTreeMap::new());
        for tensor in &base.tensors {
            let parameter = match by_name.get(&tensor.fqn) {
                Some(variable) => Parameter::Trainable(variable.clone()),
                None => {
                    let slot = FrozenWeight::new(tensor.fqn.clone(), tensor.shape.clone());
                    slots.insert(tensor.fqn.clone(), slot.clone());
                    Parameter::Frozen(slot)
                }
            };
            tensors.insert(tensor.fqn.clone(), parameter);
        }
        let adapters = match &trained.adapter {
            None => BTreeMap::new(),
            Some((config, targets)) => adapters(targets, config.lora_dropout, &by_name)?,
        };
        let parameters = Parameters { tensors, adapters, aliases: base.aliases.clone() };
        Ok(Self { parameters, slots, variables })
    }

    /// Puts new values into the variables; `whole` is in the layout's order.
    pub(super) fn set(&self, layout: &Layout, whole: &[f32]) -> Result<(), TrainError> {
        for (variable, (_, range, dims)) in self.variables.iter().zip(layout.tensors()) {
            let values = whole.get(range.clone()).unwrap_or_default();
            variable.set(&Tensor::from_slice(values, dims.as_slice(), variable.device())?)?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a probability")]
fn adapters(
    targets: &[Target],
    dropout: f64,
    variables: &BTreeMap<Fqn, Var>,
) -> Result<BTreeMap<String, Lora>, TrainError> {
    let find = |module: &str, part: AdapterPart| variables.get(&crate::adapter::adapter_name(module, part)).cloned();
    let lora = |target: &Target| {
        let missing = || TrainError::Plan {
            what: "the adapter",
            expected: format!("matrices of {}", target.module),
            found: "none".to_owned(),
        };
        let module = target.module.as_str();
        let lora = Lora {
            a: find(module, AdapterPart::A).ok_or_else(missing)?,
            b: find(module, AdapterPart::B).ok_or_else(missing)?,
            scale: target.scale,
            dropout: dropout as f32,
            magnitude: find(module, AdapterPart::Magnitude),
            key: module_key(module),
        };
        Ok((target.module.clone(), lora))
    };
    targets.iter().map(lora).collect()
}

/// The first values of all trained tensors, in the layout's order; every rank calls this and gets the same. Of weights the
/// base's, of adapters PEFT's first values.
pub(super) fn first_values(
    layout: &Layout,
    trained: &Trained,
    seed: u64,
    (base, exchange): (&mut Base<'_>, &mut Exchange<'_>),
) -> Result<Vec<f32>, TrainError> {
    let mut whole = vec![0.0; layout.elements()];
    for (fqn, range, dims) in layout.tensors() {
        let into = whole.get_mut(range.clone()).unwrap_or_default();
        let values = match (&trained.adapter, parse_name(fqn.as_str())) {
            (Some(_), Some((module, AdapterPart::A))) => {
                let size = |dim: usize| crate::types::as_u64(dims.get(dim).copied().unwrap_or(0));
                initial_a(seed, module, size(0), size(1))
            }
            (Some((_, targets)), Some((module, AdapterPart::Magnitude))) => {
                let Some(target) = targets.iter().find(|target| target.module == module) else { continue };
                let weight = base.tensor(&Fqn::from(format!("{module}.weight")), exchange)?;
                let &Target { out_features, in_features, orientation, .. } = target;
                row_norms(&weight, Matrix { out_features, in_features, orientation })
            }
            (Some(_), _) => continue,
            (None, _) => base.tensor(fqn, exchange)?,
        };
        if values.len() != into.len() {
            return Err(TrainError::Plan {
                what: "the first values of a trained tensor",
                expected: format!("{} of {fqn}", into.len()),
                found: values.len().to_string(),
            });
        }
        into.copy_from_slice(&values);
    }
    Ok(whole)
}
