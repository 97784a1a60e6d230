//! From elements as they are in a file to the bytes that a rank keeps.

use std::sync::atomic::Ordering;

use super::report::{Meters, timed};
use super::source::Files;
use super::{LoadError, WholeTensor};
use crate::format::{Encoding as SourceEncoding, PackedTensor};
use crate::plan::{Encoding, Input, SourceSpan, TensorPlan};
use crate::quant::affine::{GroupAxis, HqqRule, MlxRule, quantize_hqq};
use crate::quant::pack::{HqqPacking, pack_bit_stream};
use crate::quant::{FourBit, Kernels, QuantError, Source};
use crate::types::{ByteRange, DType, as_u64, as_usize};

/// What the threads of a reader share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoder<'a> {
    pub(super) files: &'a Files<'a>,
    pub(super) meters: &'a Meters,
    pub(super) kernels: Kernels,
}

/// The encoded form of a span.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    /// Bytes of the weight component.
    pub(super) weight: Vec<u8>,
    /// The f32 statistics of its blocks, groups or rows.
    pub(super) statistics: Vec<f32>,
}

impl Encoder<'_> {
    /// Reads and encodes a span into `out`, whose buffers are reused; `scratch` holds the source.
    pub(super) fn encode(
        &self,
        tensor: &TensorPlan,
        span: SourceSpan,
        scratch: &mut Vec<u8>,
        out: &mut Encoded,
    ) -> Result<(), LoadError> {
        let dtype = self.read_elements(tensor, span, scratch, &mut out.weight)?;
        let (len, weight_len) = (span.elements.len(), as_usize(span.weight.len()));
        if tensor.input.is_as_it_is(tensor.encoding) {
            // As it was: the bytes read are the result.
            std::mem::swap(scratch, &mut out.weight);
            out.statistics.clear();
            return Ok(());
        }
        out.weight.resize(weight_len, 0);
        let result = timed(&self.meters.encode_ns, || self.transform(tensor, dtype, scratch, out));
        let non_finite = result.map_err(|source| LoadError::Encode { fqn: tensor.fqn.clone(), source })?;
        if !matches!(tensor.encoding, Encoding::Plain { .. }) {
            self.meters.quantized_values.fetch_add(len, Ordering::Relaxed);
        }
        if non_finite > 0 {
            self.meters.non_finite_values.fetch_add(non_finite, Ordering::Relaxed);
            tracing::warn!(tensor = %tensor.fqn, non_finite, "values are NaN or infinite");
        }
        Ok(())
    }

    /// Returns how many values were not finite.
    fn transform(
        &self,
        tensor: &TensorPlan,
        dtype: DType,
        source: &[u8],
        out: &mut Encoded,
    ) -> Result<u64, QuantError> {
        let values = source.len() / as_usize(dtype.size_bytes());
        let source = Source::new(dtype, source)?;
        match tensor.encoding {
            Encoding::Plain { dtype: to } => {
                out.statistics.clear();
                self.kernels.convert(source, to, &mut out.weight).map(|()| 0)
            }
            Encoding::FourBit { code, block, .. } => {
                out.statistics.resize(values.div_ceil(block.values()), 0.0);
                let format = FourBit { code, block };
                self.kernels.quantize_4bit(format, source, &mut out.weight, &mut out.statistics)
            }
            Encoding::Int8 => {
                let columns = as_usize(tensor.row_elements());
                out.statistics.resize(values / columns.max(1), 0.0);
                self.kernels.quantize_int8_rows(source, columns, &mut out.weight, &mut out.statistics)
            }
            Encoding::Mlx { rule, .. } => self.quantize_mlx(rule, (source, values), out),
            Encoding::Hqq { bits, group, axis, .. } => {
                self.quantize_hqq((HqqRule::new(bits, as_usize(u64::from(group))), axis), (source, values), out)
            }
            Encoding::Ggml { ggml_type } => {
                out.statistics.clear();
                let values = self.widen(source, values)?;
                crate::format::quantize(ggml_type, &values, &mut out.weight)
                    .map_err(|error| QuantError::Blocks { what: error.to_string() })?;
                Ok(not_finite(&values))
            }
            Encoding::Gptq { .. } | Encoding::Awq { .. } | Encoding::Fp8 { .. } => {
                Err(QuantError::ReadOnly { format: tensor.encoding.name() })
            }
        }
    }

    fn widen(&self, source: Source<'_>, count: usize) -> Result<Vec<f32>, QuantError> {
        let mut values = vec![0.0_f32; count];
        self.kernels.convert(source, DType::F32, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// A whole tensor. Statistics are scale and zero of each group in turn.
    fn quantize_hqq(
        &self,
        (rule, axis): (HqqRule, GroupAxis),
        (source, count): (Source<'_>, usize),
        out: &mut Encoded,
    ) -> Result<u64, QuantError> {
        let values = self.widen(source, count)?;
        let solver = quantize_hqq(self.kernels, rule, axis, &values)?;
        let mut codes = vec![0; count];
        solver.codes(&mut codes)?;
        let (groups, group) = (count / rule.group.max(1), rule.group);
        let (rows, columns) = if axis == GroupAxis::Runs { (groups, group) } else { (group, groups) };
        HqqPacking::new(rule.bits, rows, columns)?.pack(&codes, &mut out.weight)?;
        out.statistics.clear();
        out.statistics.extend(solver.scale().into_iter().zip(solver.zero()).flat_map(|(scale, &zero)| [scale, zero]));
        Ok(not_finite(&values))
    }

    /// Statistics are scale and bias of each group in turn.
    fn quantize_mlx(
        &self,
        rule: MlxRule,
        (source, count): (Source<'_>, usize),
        out: &mut Encoded,
    ) -> Result<u64, QuantError> {
        let values = self.widen(source, count)?;
        let mut codes = vec![0; count];
        let (mut scales, mut biases) = (vec![0.0; count / rule.group()], vec![0.0; count / rule.group()]);
        rule.quantize(&values, &mut codes, &mut scales, &mut biases)?;
        pack_bit_stream(rule.bits(), &codes, &mut out.weight)?;
        out.statistics.clear();
        out.statistics.extend(scales.into_iter().zip(biases).flat_map(<[f32; 2]>::from));
        Ok(not_finite(&values))
    }

    /// Fills `scratch` with the span's elements and says their type; `blocks` is scratch for encoded files.
    fn read_elements(
        &self,
        tensor: &TensorPlan,
        span: SourceSpan,
        scratch: &mut Vec<u8>,
        blocks: &mut Vec<u8>,
    ) -> Result<DType, LoadError> {
        let inconsistent = |what| LoadError::Plan { fqn: tensor.fqn.clone(), what };
        let Input::Elements { file, range, dtype, encoding } = &tensor.input else {
            return Err(inconsistent("a stored tensor is to be encoded"));
        };
        let size = dtype.size_bytes();
        match encoding {
            SourceEncoding::Plain => {
                if tensor.elements().checked_mul(size) != Some(range.len()) {
                    return Err(inconsistent("its bytes are not those of its shape"));
                }
                scratch.resize(as_usize(span.elements.len() * size), 0);
                let offset = range.start() + span.elements.start() * size;
                self.files.read(&tensor.fqn, (*file, offset), scratch, self.meters)?;
            }
            SourceEncoding::Ggml(encoding) => {
                self.read_ggml(tensor, encoding, span, (scratch, blocks))?;
            }
            SourceEncoding::Packed(packed) => self.read_packed(tensor, packed, scratch)?,
        }
        Ok(*dtype)
    }

    /// All values of a tensor in f32, from the components that another tool has written.
    fn read_packed(&self, tensor: &TensorPlan, packed: &PackedTensor, scratch: &mut Vec<u8>) -> Result<(), LoadError> {
        let read = |&(file, range): &(u32, ByteRange)| {
            let mut bytes = vec![0; as_usize(range.len())];
            self.files.read(&tensor.fqn, (file, range.start()), &mut bytes, self.meters)?;
            Ok(bytes)
        };
        let parts = packed.parts.iter().map(read).collect::<Result<Vec<_>, LoadError>>()?;
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let (encoding, nested_offset) = (packed.encoding, packed.nested_offset);
        let whole = WholeTensor { encoding, shape: &tensor.shape, parts: &parts, nested_offset };
        let values = timed(&self.meters.encode_ns, || whole.dequantize(self.kernels))
            .map_err(|source| LoadError::Encode { fqn: tensor.fqn.clone(), source })?;
        scratch.clear();
        scratch.extend_from_slice(bytemuck::cast_slice(&values));
        Ok(())
    }

    /// The rows of a span in the order of the Hugging Face model: as they are, or decoded from GGUF blocks into f32.
    fn read_ggml(
        &self,
        tensor: &TensorPlan,
        encoding: &crate::format::GgmlTensor,
        span: SourceSpan,
        (scratch, blocks): (&mut Vec<u8>, &mut Vec<u8>),
    ) -> Result<(), LoadError> {
        let Input::Elements { file, range, .. } = &tensor.input else { return Ok(()) };
        let decode_error = |source| LoadError::Decode { fqn: tensor.fqn.clone(), source };
        let row = tensor.row_elements().max(1);
        let (first, last) = (span.elements.start() / row, span.elements.end() / row);
        let row_bytes = encoding.ggml_type.bytes_for(row).map_err(decode_error)?;
        if (Encoding::Ggml { ggml_type: encoding.ggml_type }) == tensor.encoding {
            scratch.resize(as_usize((last - first) * row_bytes), 0);
            for (index, place) in (first..last).zip(scratch.chunks_exact_mut(as_usize(row_bytes).max(1))) {
                let offset = range.start() + encoding.source_row(index) * row_bytes;
                self.files.read(&tensor.fqn, (*file, offset), place, self.meters)?;
            }
            return Ok(());
        }
        let mut values = vec![0.0_f32; as_usize(row)];
        scratch.clear();
        blocks.resize(as_usize(row_bytes), 0);
        for index in first..last {
            let source_row = encoding.source_row(index);
            self.files.read(&tensor.fqn, (*file, range.start() + source_row * row_bytes), blocks, self.meters)?;
            timed(&self.meters.encode_ns, || crate::format::dequantize(encoding.ggml_type, blocks, &mut values))
                .map_err(decode_error)?;
            scratch.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        debug_assert_eq!(as_u64(scratch.len()), span.elements.len() * 4, "whole rows of f32");
        Ok(())
    }
}

fn not_finite(values: &[f32]) -> u64 {
    as_u64(values.iter().filter(|value| !value.is_finite()).count())
}
