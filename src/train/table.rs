//! The trained tensors of a run: names and shapes, as a function of recipe and skeleton.
//!
//! Owns: which tensors the state has, in which order. Coordinator and ranks call the same function.

use crate::adapter::{
    AdapterConfig, AdapterError, Target, TargetModules, linears, lora_a_name, lora_b_name, magnitude_name,
};
use crate::model::{ModelConfig, Skeleton};
use crate::types::{Fqn, Shape};

use super::config::{LoraRecipe, Method, Recipe, Targets};

/// What a run trains.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The trained tensors in the order of the model.
    pub tensors: Vec<(Fqn, Shape)>,
    /// The adapters that they make, unless all weights are trained.
    pub adapter: Option<(AdapterConfig, Vec<Target>)>,
}

/// The tensors that `recipe` trains of a model. `adapter` is the configuration of a PEFT adapter to start from, which
/// stands for the recipe's.
///
/// # Errors
/// [`AdapterError`] when the adapter has no module in the model.
pub fn trained_tensors(
    recipe: &Recipe,
    skeleton: &Skeleton,
    adapter: Option<AdapterConfig>,
) -> Result<Trained, AdapterError> {
    if recipe.method == Method::Full {
        let expanded = skeleton.config.as_ref().map_or(&[][..], |config| &config.expanded_layers);
        let tensors = skeleton.tensors.iter().filter(|tensor| recipe.layers.contains(&tensor.fqn, expanded));
        let tensors = tensors.map(|tensor| (tensor.fqn.clone(), tensor.shape.clone())).collect();
        return Ok(Trained { tensors, adapter: None });
    }
    let config = adapter.unwrap_or_else(|| recipe.lora.adapter_config());
    let targets = config.targets(&linears(skeleton))?;
    let mut tensors = Vec::new();
    for Target { module, out_features, in_features, r, .. } in &targets {
        tensors.push((lora_a_name(module), Shape::from([*r, *in_features])));
        tensors.push((lora_b_name(module), Shape::from([*out_features, *r])));
        if config.use_dora {
            tensors.push((magnitude_name(module), Shape::from([*out_features])));
        }
    }
    Ok(Trained { tensors, adapter: Some((config, targets)) })
}

/// Whether there is a forward with gradients for such a model.
#[must_use]
pub const fn is_trainable(config: &ModelConfig) -> bool {
    config.is_trainable()
}

impl LoraRecipe {
    fn adapter_config(&self) -> AdapterConfig {
        let modules = match &self.target_modules {
            Targets::One(name) if name == "all-linear" => TargetModules::AllLinear,
            Targets::One(pattern) => TargetModules::Pattern(pattern.clone()),
            Targets::Many(names) => TargetModules::Names(names.clone()),
        };
        let mut config = AdapterConfig::new(u64::from(self.r), self.alpha, modules);
        config.lora_dropout = f64::from(self.dropout);
        config.use_rslora = self.rslora;
        config.use_dora = self.dora;
        config
    }
}
