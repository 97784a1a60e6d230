//! The part of a plan that a training run adds: the recipe, and the plan of the state that is trained.
//!
//! Owns: which tensors the state has, and that every one is cut over the ranks at rows, however small: a rank updates and
//! saves what it owns. Refuses to know: what the recipe says; the loader passes it on.

use serde::{Deserialize, Serialize};

use super::{Encoding, Input, LoadPlan, Placement, Strategy, TensorPlan, TrainMemory};
use crate::manifest::TrainingState;
use crate::types::{DType, DeviceWish, Fqn, Rank, Shape};

/// What ranks need to train together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainPlan {
    /// The `[train]` section with every default filled in.
    pub recipe: serde_json::Value,
    /// `adapter_config.json` of PEFT; absent when all weights are trained.
    pub adapter: Option<serde_json::Value>,
    /// The state: parameters, then AdamW's moments of each, all f32. Its inputs are empty unless the run is resumed.
    pub state: LoadPlan,
    /// What training takes on each rank.
    pub memory: Vec<TrainMemory>,
    /// The parameters of an adapter to start from, as its file has them; without moments.
    pub initial: Option<Box<LoadPlan>>,
    /// Where the run stood.
    pub resumed: Option<Resumed>,
}

/// A run that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The step of the checkpoint.
    pub step: crate::types::Step,
    /// Its state without tensors.
    pub training: Box<TrainingState>,
}

/// AdamW's first moment of parameter `fqn`, as the state names it.
#[must_use]
pub fn exp_avg(fqn: &Fqn) -> Fqn {
    Fqn::from(format!("optimizer.exp_avg.{}", fqn.as_str()))
}

/// AdamW's second moment of parameter `fqn`.
#[must_use]
pub fn exp_avg_sq(fqn: &Fqn) -> Fqn {
    Fqn::from(format!("optimizer.exp_avg_sq.{}", fqn.as_str()))
}

/// The plan of a fresh state with `parameters` on the ranks of `base`: all parameters, then all first moments, then all
/// second ones.
#[must_use]
pub fn state_plan(base: &LoadPlan, parameters: &[(Fqn, Shape)]) -> LoadPlan {
    let tensor = |fqn: Fqn, shape: &Shape| TensorPlan {
        fqn,
        shape: shape.clone(),
        encoding: Encoding::Plain { dtype: DType::F32 },
        sharded: true,
        owner: None,
        reader: Rank::ZERO,
        input: Input::Stored { parts: vec![Vec::new()], nested_offset: None },
    };
    let kinds: [fn(&Fqn) -> Fqn; 3] = [Fqn::clone, exp_avg, exp_avg_sq];
    let tensors =
        kinds.iter().flat_map(|name| parameters.iter().map(|(fqn, shape)| tensor(name(fqn), shape))).collect();
    let mut device = base.device;
    device.device = DeviceWish::Cpu;
    LoadPlan {
        strategy: Strategy::Full,
        placement: Placement::Shard,
        digests: false,
        device,
        files: Vec::new(),
        versions: Vec::new(),
        cache: None,
        digest_tables: Vec::new(),
        tensors,
        aliases: Vec::new(),
        train: None,
        others: Vec::new(),
        ..base.clone()
    }
}
