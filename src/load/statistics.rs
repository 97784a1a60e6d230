//! Finishing a tensor's statistics over the whole tensor (`LD-3`).

use super::LoadError;
use crate::plan::{Encoding, Part, TensorPlan};
use crate::quant::{DynamicMap, Kernels, Source, absmax_offset};
use crate::types::{DType, as_usize};

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
        Encoding::Ggml { .. } | Encoding::Gptq { .. } | Encoding::Awq { .. } | Encoding::Fp8 { .. } => Ok(Vec::new()),
        Encoding::Mlx { dtype, .. } | Encoding::Hqq { dtype, .. } => {
            let of = |place: usize| -> Result<Vec<u8>, LoadError> {
                let values: Vec<u8> = bytes_of(statistics.iter().skip(place).step_by(2));
                let mut out = vec![0; statistics.len() / 2 * as_usize(dtype.size_bytes())];
                Source::new(DType::F32, &values)
                    .and_then(|values| kernels.convert(values, dtype, &mut out))
                    .map_err(|source| LoadError::Encode { fqn: tensor.fqn.clone(), source })?;
                Ok(out)
            };
            Ok(vec![(1, of(0)?), (2, of(1)?)])
        }
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    bytes_of(values.iter())
}

fn bytes_of<'a>(values: impl Iterator<Item = &'a f32>) -> Vec<u8> {
    values.flat_map(|value| value.to_le_bytes()).collect()
}
