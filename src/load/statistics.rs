//! Finishing a tensor's statistics over the whole tensor (`LD-3`).

use super::LoadError;
use crate::plan::{Encoding, Part, TensorPlan};
use crate::quant::{DynamicMap, Kernels, absmax_offset};
use crate::types::as_usize;

/// The bytes of all components but the weight, in the components' order.
pub(super) fn finish(
    tensor: &TensorPlan,
    statistics: &[f32],
    kernels: Kernels,
) -> Result<Vec<(usize, Vec<u8>)>, LoadError> {
    let components = tensor.components();
    let index_of = |part| components.iter().position(|component| component.part == part);
    match tensor.encoding {
        Encoding::Plain { .. } => Ok(Vec::new()),
        Encoding::FourBit { nested: true, .. } => {
            let groups = components.iter().find(|component| component.part == Part::NestedAbsmax);
            let groups = groups.map_or(0, |component| as_usize(component.bytes / 4));
            let offset = absmax_offset(statistics);
            let mut codes = vec![0; statistics.len()];
            let mut nested = vec![0.0; groups];
            kernels
                .nested_quantize(statistics, offset, &DynamicMap::standard(), &mut codes, &mut nested)
                .map_err(|source| LoadError::Encode { fqn: tensor.fqn.clone(), source })?;
            let parts = [
                (Part::Absmax, codes),
                (Part::NestedAbsmax, bytes(&nested)),
                (Part::NestedOffset, offset.to_le_bytes().to_vec()),
            ];
            Ok(parts.into_iter().filter_map(|(part, bytes)| Some((index_of(part)?, bytes))).collect())
        }
        Encoding::FourBit { .. } => Ok(vec![(1, bytes(statistics))]),
        Encoding::Int8 => Ok(vec![(1, bytes(statistics))]),
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
