//! The plan of a model that has no files yet (`ES-1`), and the state that training adds.

use super::error::EstimateError;
use super::workload::{MemoryKind, Method, Workload};
use crate::adapter::{Target, linears, lora_a_name, lora_b_name, magnitude_name};
use crate::format::{Encoding, FileEntry, ModelIndex, TensorEntry};
use crate::model::Skeleton;
use crate::plan::{DeviceRule, LoadPlan, LoadRequest, Part, PlanError, Quantized, plan};
use crate::types::{ByteRange, DeviceWish, Fqn, Rank, Shape};

/// The load plan of `skeleton` as if one file had all its tensors, optional ones too, as the workload's source type.
///
/// It is made by [`plan`] itself; only addresses within files are without meaning. Tensors come in the skeleton's order.
///
/// # Errors
/// [`EstimateError::Plan`], [`EstimateError::DType`].
pub fn plan_without_files(skeleton: &Skeleton, workload: &Workload) -> Result<LoadPlan, EstimateError> {
    let dtype = workload.source_dtype;
    if !dtype.is_weight_float() {
        return Err(EstimateError::DType { found: dtype });
    }
    let mut index =
        ModelIndex { files: vec![FileEntry { name: "weights".to_owned(), len_bytes: 0 }], ..ModelIndex::default() };
    for tensor in &skeleton.tensors {
        let bytes = tensor.shape.bytes(dtype).map_err(|source| PlanError::Shape { fqn: tensor.fqn.clone(), source })?;
        let range = ByteRange::new(0, bytes).unwrap_or_default();
        let entry = TensorEntry { dtype, shape: tensor.shape.clone(), file: 0, range, encoding: Encoding::Plain };
        index.tensors.insert(tensor.fqn.clone(), entry);
    }
    let binding = skeleton.bind(&index).expect("an index of the skeleton's own tensors binds to it");
    let request = LoadRequest {
        model: skeleton.architecture.name().to_owned(),
        root: String::new(),
        config_json: None,
        world: workload.world,
        strategy: workload.strategy,
        placement: workload.placement,
        dtype: workload.dtype,
        quantization: workload.quantization.clone(),
        quantized: Quantized::Refuse,
        chunking: workload.chunking,
        digests: false,
        device: DeviceRule {
            device: if workload.memory == MemoryKind::Device { DeviceWish::Cuda } else { DeviceWish::Cpu },
            ..DeviceRule::default()
        },
        split: workload.split.clone(),
    };
    Ok(plan(request, &index, skeleton, &binding)?)
}

/// The tensors that `method` trains of a model, in its order.
///
/// # Errors
/// [`EstimateError::Adapter`] when the adapter is on no module.
pub fn trained_tensors(skeleton: &Skeleton, method: &Method) -> Result<Vec<(Fqn, Shape)>, EstimateError> {
    let Method::Lora(config) = method else {
        return Ok(skeleton.tensors.iter().map(|tensor| (tensor.fqn.clone(), tensor.shape.clone())).collect());
    };
    let mut tensors = Vec::new();
    for Target { module, out_features, in_features, r, .. } in config.targets(&linears(skeleton))? {
        tensors.push((lora_a_name(&module), Shape::from([r, in_features])));
        tensors.push((lora_b_name(&module), Shape::from([out_features, r])));
        if config.use_dora {
            tensors.push((magnitude_name(&module), Shape::from([out_features])));
        }
    }
    Ok(tensors)
}

/// Weights and statistics that `rank` keeps, in bytes without padding; of what streams, nothing.
pub(super) fn kept(plan: &LoadPlan, rank: Rank) -> (u64, u64) {
    let (mut weights, mut statistics) = (0, 0);
    let resident = plan.tensors.iter().filter(|tensor| !plan.streams(tensor));
    for holding in resident.flat_map(|tensor| tensor.holdings(rank, plan.world)) {
        match holding.component.part {
            Part::Weight => weights += holding.kept.len(),
            _ => statistics += holding.kept.len(),
        }
    }
    (weights, statistics)
}

/// Weights and statistics of a tensor, whole.
pub(super) fn whole(tensor: &crate::plan::TensorPlan) -> (u64, u64) {
    let (weights, statistics): (Vec<_>, Vec<_>) =
        tensor.components().into_iter().partition(|component| component.part == Part::Weight);
    let sum = |parts: Vec<crate::plan::Component>| parts.iter().map(|part| part.bytes).sum();
    (sum(weights), sum(statistics))
}
