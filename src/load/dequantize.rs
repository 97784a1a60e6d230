//! From the whole components of a tensor to its values in f32, on all cores.
//!
//! Owns: which kernel reads which components. Refuses to know: where they lay before.

use rayon::prelude::*;

use crate::format::{self, GgmlType};
use crate::plan::{Encoding, Fp8Scales, f32Bits};
use crate::quant::affine::{AffineGroups, CodeBits, GroupAxis, MlxRule, Offset};
use crate::quant::fp8::{Fp8Blocks, dequantize_e4m3};
use crate::quant::pack::{
    Awq, AwqShape, Gptq, GptqShape, GptqTensors, HqqPacking, Region, bit_stream_bytes, unpack_bit_stream,
};
use crate::quant::{DynamicMap, FourBit, Kernels, NestedStatistics, QuantError, Source};
use crate::types::{DType, Shape, as_usize};

/// Elements that one thread dequantizes at a time; a multiple of every block size.
const CHUNK_ELEMENTS: usize = 1 << 16;
/// Outputs of an input-major weight that one thread dequantizes at a time.
const CHUNK_OUTPUTS: usize = 64;

/// A tensor, whole.
#[derive(Clone, Copy, Debug)]
pub struct WholeTensor<'a> {
    /// How it is encoded.
    pub encoding: Encoding,
    /// Its logical shape.
    pub shape: &'a Shape,
    /// Its components in order; the nested offset's bytes may be missing.
    pub parts: &'a [&'a [u8]],
    /// The mean of nested statistics.
    pub nested_offset: Option<f32Bits>,
}

impl WholeTensor<'_> {
    /// The values, row-major, f32.
    ///
    /// # Errors
    /// [`QuantError`] when components do not fit the shape.
    pub fn dequantize(&self, kernels: Kernels) -> Result<Vec<f32>, QuantError> {
        let elements = self.shape.elements().unwrap_or(0);
        let mut out = vec![0.0_f32; as_usize(elements)];
        let out_slice = out.as_mut_slice();
        match self.encoding {
            Encoding::Plain { dtype } => self.plain(kernels, dtype, out_slice),
            Encoding::FourBit { code, block, nested, .. } => {
                self.four_bit(kernels, (FourBit { code, block }, nested), out_slice)
            }
            Encoding::Mlx { rule, dtype } => self.mlx(kernels, (rule, dtype), out_slice),
            Encoding::Int8 => {
                let columns = as_usize(elements / self.shape.rows().max(1));
                let scales: Vec<f32> = bytemuck::pod_collect_to_vec(self.part(1));
                kernels.dequantize_int8_rows(columns, self.part(0), &scales, out_slice)
            }
            Encoding::Ggml { ggml_type } => self.ggml(ggml_type, out_slice),
            Encoding::Hqq { bits, group, axis, dtype } => {
                self.hqq(kernels, (bits, as_usize(u64::from(group)), axis), dtype, out_slice)
            }
            Encoding::Gptq { bits, group, version, indexed, dtype } => {
                let [outputs, inputs] = self.matrix();
                let shape = GptqShape { bits, version, inputs, outputs, group: as_usize(u64::from(group)) };
                let tensors = GptqTensors {
                    qweight: self.part(0),
                    qzeros: self.part(1),
                    scales: Source::new(dtype, self.part(2))?,
                    g_idx: indexed.then(|| self.part(3)),
                };
                let layer = Gptq::new(shape, tensors)?;
                by_outputs([outputs, inputs], out_slice, |region, out| layer.dequantize(region, out))
            }
            Encoding::Awq { group, dtype } => {
                let [outputs, inputs] = self.matrix();
                let shape = AwqShape { inputs, outputs, group: as_usize(u64::from(group)) };
                let scales = Source::new(dtype, self.part(2))?;
                let layer = Awq::new(shape, self.part(0), self.part(1), scales)?;
                by_outputs([outputs, inputs], out_slice, |region, out| layer.dequantize(region, out))
            }
            Encoding::Fp8 { scales, scale_dtype, .. } => self.fp8(kernels, (scales, scale_dtype), out_slice),
        }?;
        Ok(out)
    }

    fn part(&self, index: usize) -> &[u8] {
        self.parts.get(index).copied().unwrap_or_default()
    }

    /// Outputs and inputs.
    fn matrix(&self) -> [usize; 2] {
        let size = |dim: usize| as_usize(self.shape.0.get(dim).copied().unwrap_or(0));
        [size(0), size(1)]
    }

    fn plain(&self, kernels: Kernels, dtype: DType, out: &mut [f32]) -> Result<(), QuantError> {
        let size = as_usize(dtype.size_bytes());
        in_chunks(out, |start, out| {
            let bytes = self.part(0).get(start * size..(start + out.len()) * size).unwrap_or_default();
            kernels.convert(Source::new(dtype, bytes)?, DType::F32, bytemuck::cast_slice_mut(out))
        })
    }

    fn four_bit(&self, kernels: Kernels, (format, nested): (FourBit, bool), out: &mut [f32]) -> Result<(), QuantError> {
        let absmax = if nested {
            let codes = self.part(1);
            let mut absmax = vec![0_f32; codes.len()];
            let nested_absmax: Vec<f32> = bytemuck::pod_collect_to_vec(self.part(2));
            let offset = self.nested_offset.map_or(0.0, |bits| f32::from_bits(bits.0));
            let map = &DynamicMap::standard();
            let statistics = NestedStatistics { codes, first_block: 0, nested_absmax: &nested_absmax, offset, map };
            statistics.dequantize(&mut absmax)?;
            absmax
        } else {
            bytemuck::pod_collect_to_vec(self.part(1))
        };
        let block = format.block.values();
        in_chunks(out, |start, out| {
            let packed = self.part(0).get(start / 2..start / 2 + out.len().div_ceil(2)).unwrap_or_default();
            let blocks = start / block..start / block + out.len().div_ceil(block);
            kernels.dequantize_4bit(format, packed, absmax.get(blocks).unwrap_or_default(), out)
        })
    }

    fn mlx(&self, kernels: Kernels, (rule, dtype): (MlxRule, DType), out: &mut [f32]) -> Result<(), QuantError> {
        let scales = widened(kernels, dtype, self.part(1))?;
        let biases = widened(kernels, dtype, self.part(2))?;
        let groups = AffineGroups::new(GroupAxis::Runs, rule.group(), &scales, Offset::Bias(&biases))?;
        in_chunks(out, |start, out| {
            let mut codes = vec![0; out.len()];
            let bytes = bit_stream_bytes(rule.bits(), start)?..bit_stream_bytes(rule.bits(), start + out.len())?;
            unpack_bit_stream(rule.bits(), self.part(0).get(bytes).unwrap_or_default(), &mut codes)?;
            groups.dequantize(start, &codes, out)
        })
    }

    fn ggml(&self, ggml_type: GgmlType, out: &mut [f32]) -> Result<(), QuantError> {
        let (elements, bytes) = (as_usize(ggml_type.block_elements()), as_usize(ggml_type.block_bytes()));
        in_chunks(out, |start, out| {
            let blocks = start / elements * bytes..(start + out.len()) / elements * bytes;
            format::dequantize(ggml_type, self.part(0).get(blocks).unwrap_or_default(), out)
                .map_err(|error| QuantError::Blocks { what: error.to_string() })
        })
    }

    fn hqq(
        &self,
        kernels: Kernels,
        (bits, group, axis): (CodeBits, usize, GroupAxis),
        dtype: DType,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let scales = widened(kernels, dtype, self.part(1))?;
        let zeros = widened(kernels, dtype, self.part(2))?;
        let groups = AffineGroups::new(axis, group, &scales, Offset::Zero(&zeros))?;
        let (rows, columns) = if axis == GroupAxis::Runs { (scales.len(), group) } else { (group, scales.len()) };
        let packing = HqqPacking::new(bits, rows, columns)?;
        in_chunks(out, |start, out| {
            let mut codes = vec![0; out.len()];
            packing.unpack(self.part(0), start, &mut codes)?;
            groups.dequantize(start, &codes, out)
        })
    }

    fn fp8(&self, kernels: Kernels, (scales, dtype): (Fp8Scales, DType), out: &mut [f32]) -> Result<(), QuantError> {
        let [rows, columns] = self.matrix();
        let values = widened(kernels, dtype, self.part(1))?;
        let block = match scales {
            Fp8Scales::Tensor => {
                let scale = values.first().copied().unwrap_or(0.0);
                return in_chunks(out, |start, out| {
                    let bytes = self.part(0).get(start..start + out.len()).unwrap_or_default();
                    dequantize_e4m3(bytes, scale, out)
                });
            }
            Fp8Scales::Row => [1, columns],
            Fp8Scales::Block { rows, columns } => [as_usize(u64::from(rows)), as_usize(u64::from(columns))],
        };
        let blocks = Fp8Blocks::new([rows, columns], block, &values)?;
        by_outputs([rows, columns], out, |region, out| {
            let bytes = region.outputs.start * columns..region.outputs.end * columns;
            let bytes = self.part(0).get(bytes).unwrap_or_default();
            blocks.dequantize(region.outputs.clone(), 0..columns, bytes, out)
        })
    }
}

/// Calls `fill` with the first element of each chunk and the chunk.
fn in_chunks(
    out: &mut [f32],
    fill: impl Fn(usize, &mut [f32]) -> Result<(), QuantError> + Sync,
) -> Result<(), QuantError> {
    let chunks = out.par_chunks_mut(CHUNK_ELEMENTS).enumerate();
    chunks.try_for_each(|(index, out)| fill(index * CHUNK_ELEMENTS, out))
}

/// Calls `fill` with some rows of `[outputs, inputs]` and their place.
fn by_outputs(
    [outputs, inputs]: [usize; 2],
    out: &mut [f32],
    fill: impl Fn(&Region, &mut [f32]) -> Result<(), QuantError> + Sync,
) -> Result<(), QuantError> {
    let chunks = out.par_chunks_mut((CHUNK_OUTPUTS * inputs).max(1)).enumerate();
    chunks.try_for_each(|(index, out)| {
        let first = index * CHUNK_OUTPUTS;
        let region = Region { inputs: 0..inputs, outputs: first..(first + CHUNK_OUTPUTS).min(outputs) };
        fill(&region, out)
    })
}

fn widened(kernels: Kernels, dtype: DType, bytes: &[u8]) -> Result<Vec<f32>, QuantError> {
    let mut values = vec![0.0_f32; bytes.len() / as_usize(dtype.size_bytes()).max(1)];
    kernels.convert(Source::new(dtype, bytes)?, DType::F32, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}
