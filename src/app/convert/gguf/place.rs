//! Where a model's tensors lie in a GGUF file: names, types, and the order of rows.
//!
//! Owns: the way from the plan's tensors to the file's, of which one may hold several (experts). Refuses to know: the header.

use super::GgufRequest;
use super::keys::{family, rope_factors};
use super::types::{Traits, encoding};
use crate::app::convert::ConvertError;
use crate::format::gguf::{NewTensor, ROPE_FACTORS, llama_cpp_name};
use crate::format::{GgmlType, RowOrder, quantize};
use crate::load::LoadError;
use crate::model::{Architecture, ModelConfig};
use crate::plan::{Encoding, Input, LoadPlan, TensorPlan};
use crate::quant::{Kernels, QuantError, Source};
use crate::store::StoreError;
use crate::types::{DType, Fqn, Shape, as_u64, as_usize};

/// A transposed matrix is encoded and written in runs of rows of about so many bytes of f32.
const RUN_BYTES: u64 = 4 << 20;

/// Writes bytes at an offset within a tensor of the file.
type Write<'a> = dyn FnMut(u64, &[u8]) -> Result<(), StoreError> + 'a;

/// The tensors of a file, and what of the model goes into each.
#[derive(Debug)]
pub(super) struct File {
    pub(super) tensors: Vec<NewTensor>,
    /// One for each tensor of the plan.
    pub(super) slots: Vec<Slot>,
    /// The tensor of the factors of the rotary frequencies, and its values.
    pub(super) rope_factors: Option<(usize, Vec<f32>)>,
}

/// The place of one of the plan's tensors.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    /// Of the file's tensors.
    pub(super) tensor: usize,
    /// From the tensor's start; not 0 for an expert.
    offset: u64,
    row_bytes: u64,
    row_order: RowOrder,
    /// For a matrix that llama.cpp has the other way.
    pub(super) transposed: Option<Transposed>,
}

/// A matrix `[inputs, outputs]` in f32 that is to be `[outputs, inputs]` of another type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transposed {
    inputs: u64,
    outputs: u64,
    ggml_type: GgmlType,
}

impl File {
    /// Places the tensors of `plan`, and gives each the encoding that its place wants.
    pub(super) fn new(request: &GgufRequest, config: &ModelConfig, plan: &mut LoadPlan) -> Result<Self, ConvertError> {
        let family = family(&request.model, config)?;
        let tied = !plan.tensors.iter().any(|tensor| tensor.fqn.as_str() == "lm_head.weight");
        let traits = Traits {
            layers: config.num_hidden_layers,
            experts: config.experts.as_ref().map_or(0, |experts| experts.count),
            tied,
            grouped: config.num_key_value_heads < config.num_attention_heads,
        };
        let mut file = Self { tensors: Vec::new(), slots: Vec::new(), rope_factors: None };
        for tensor in &mut plan.tensors {
            check_floats(&request.model, tensor)?;
            let no_name =
                || refusal(&request.model, &tensor.fqn, "a tensor of the family", format!("none of {family}"));
            let named = llama_cpp_name(&tensor.fqn).ok_or_else(no_name)?;
            let gpt2 = config.architecture == Architecture::Gpt2;
            let turned = gpt2 && tensor.shape.dims() == 2 && named.name.starts_with("blk.");
            let shape = file_shape(&named.name, &tensor.shape, turned);
            let ggml_type = request.file_type.of(&named.name, tensor.fqn.layer(), &shape, traits);
            let new = NewTensor { name: named.name, dims: shape.0.iter().rev().copied().collect(), ggml_type };
            let bytes = new.bytes(&request.model)?;
            tensor.encoding = if turned { Encoding::Plain { dtype: DType::F32 } } else { encoding(ggml_type) };
            let rotary = [".attn_q.", ".attn_k."].iter().any(|part| new.name.contains(part));
            let row_order = match family == "llama" && rotary {
                true => RowOrder::InterleavedHalves { head_rows: config.head_dim },
                false => RowOrder::Same,
            };
            let &[inputs, outputs] = tensor.shape.0.first_chunk().unwrap_or(&[1, 1]);
            let slot = Slot {
                tensor: file.tensors.len(),
                offset: 0,
                row_bytes: bytes / shape.rows().max(1),
                row_order,
                transposed: turned.then_some(Transposed { inputs, outputs, ggml_type }),
            };
            file.place(slot, new, named.expert.map(|expert| (expert, traits.experts, bytes)));
        }
        if let Some(factors) = rope_factors(config) {
            let dims = vec![as_u64(factors.len())];
            file.rope_factors = Some((file.tensors.len(), factors));
            file.tensors.push(NewTensor { name: ROPE_FACTORS.to_owned(), dims, ggml_type: GgmlType::F32 });
        }
        Ok(file)
    }

    /// Adds a tensor; for an expert (its number, how many there are, the bytes of one) that of all experts, once.
    fn place(&mut self, slot: Slot, mut tensor: NewTensor, expert: Option<(u64, u64, u64)>) {
        let Some((expert, count, bytes)) = expert else {
            self.tensors.push(tensor);
            return self.slots.push(slot);
        };
        tensor.dims.push(count);
        let of_all = self.tensors.iter().rposition(|other| other.name == tensor.name);
        let of_all = of_all.unwrap_or_else(|| {
            self.tensors.push(tensor);
            self.tensors.len() - 1
        });
        self.slots.push(Slot { tensor: of_all, offset: expert * bytes, ..slot });
    }
}

/// The shape in the file, outermost first.
fn file_shape(name: &str, shape: &Shape, turned: bool) -> Shape {
    let mut shape = shape.clone();
    if turned {
        shape.0.reverse();
    }
    // Hugging Face has the gate of the shared expert as a matrix of one row, llama.cpp as a vector.
    if name.contains(".ffn_gate_inp_shexp.") && shape.rows() == 1 && shape.dims() == 2 {
        shape.0.remove(0);
    }
    shape
}

fn check_floats(model: &str, tensor: &TensorPlan) -> Result<(), ConvertError> {
    match &tensor.input {
        Input::Elements { dtype, .. } if !dtype.is_weight_float() => {
            Err(refusal(model, &tensor.fqn, "f32, f16 or bf16", dtype.name().to_owned()))
        }
        _ => Ok(()),
    }
}

fn refusal(model: &str, fqn: &Fqn, expected: &'static str, found: String) -> ConvertError {
    ConvertError::NoCounterpart { model: model.to_owned(), place: format!("tensor {fqn}"), expected, found }
}

impl Slot {
    /// Writes bytes that lie `at` within the tensor of the plan, row by row where the order of rows is another.
    pub(super) fn write(&self, at: u64, bytes: &[u8], write: &mut Write<'_>) -> Result<(), LoadError> {
        if self.row_order == RowOrder::Same {
            return Ok(write(self.offset + at, bytes)?);
        }
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let (row, within) = (at / self.row_bytes, at % self.row_bytes);
            let here = as_usize(self.row_bytes - within).min(rest.len());
            let (part, after) = rest.split_at(here);
            write(self.offset + self.row_order.source_row(row) * self.row_bytes + within, part)?;
            (at, rest) = (at + as_u64(here), after);
        }
        Ok(())
    }
}

impl Transposed {
    /// Bytes of the matrix before.
    pub(super) const fn source_bytes(&self) -> u64 {
        self.inputs * self.outputs * DType::F32.size_bytes()
    }

    /// Turns the matrix and writes it in the file's type, some rows at a time.
    pub(super) fn write(self, fqn: &Fqn, whole: &[u8], write: &mut Write<'_>) -> Result<(), LoadError> {
        let failed = |source: QuantError| LoadError::Encode { fqn: fqn.clone(), source };
        let (inputs, outputs) = (as_usize(self.inputs), as_usize(self.outputs));
        let run = as_usize((RUN_BYTES / DType::F32.size_bytes() / self.inputs.max(1)).max(1));
        let (mut rows, mut encoded) = (Vec::new(), Vec::new());
        let mut offset = 0;
        for first in (0..outputs).step_by(run) {
            rows.clear();
            for output in first..(first + run).min(outputs) {
                let column = whole.chunks_exact(4).skip(output).step_by(outputs).take(inputs);
                rows.extend(column.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap_or_default())));
            }
            let elements = as_u64(rows.len());
            let bytes = self.ggml_type.bytes_for(elements);
            let bytes = bytes.map_err(|error| failed(QuantError::Blocks { what: error.to_string() }))?;
            encoded.resize(as_usize(bytes), 0);
            self.encode(&rows, &mut encoded).map_err(failed)?;
            write(offset, &encoded)?;
            offset += bytes;
        }
        Ok(())
    }

    fn encode(self, rows: &[f32], into: &mut [u8]) -> Result<(), QuantError> {
        match encoding(self.ggml_type) {
            Encoding::Plain { dtype } => {
                Kernels::detect().convert(Source::new(DType::F32, bytemuck::cast_slice(rows))?, dtype, into)
            }
            _ => quantize(self.ggml_type, rows, into).map_err(|error| QuantError::Blocks { what: error.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two heads of 4 rows of 2 bytes, in pieces that cut rows: the file has rows 0, 2, 1, 3 of each head.
    #[test]
    fn rows_go_to_their_places_whatever_the_pieces() {
        let row_order = RowOrder::InterleavedHalves { head_rows: 4 };
        let slot = Slot { tensor: 0, offset: 100, row_bytes: 2, row_order, transposed: None };
        let bytes: Vec<u8> = (0..16).collect();
        for piece in [1, 3, 5, 16] {
            let mut found = [0xff; 116];
            for (number, part) in bytes.chunks(piece).enumerate() {
                let at = as_u64(number * piece);
                let mut write = |offset: u64, bytes: &[u8]| {
                    found[as_usize(offset)..as_usize(offset) + bytes.len()].copy_from_slice(bytes);
                    Ok(())
                };
                slot.write(at, part, &mut write).expect("written");
            }
            assert_eq!(found[100..], [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15], "pieces of {piece}");
        }
    }

    /// [[1, 2, 3], [4, 5, 6]] by hand.
    #[test]
    fn a_matrix_is_turned() {
        let whole: Vec<u8> = (1_u8..=6).flat_map(|value| f32::from(value).to_le_bytes()).collect();
        let transposed = Transposed { inputs: 2, outputs: 3, ggml_type: GgmlType::F32 };
        assert_eq!(transposed.source_bytes(), 24);
        let mut found = Vec::new();
        let mut write = |offset: u64, bytes: &[u8]| {
            assert_eq!(offset, as_u64(found.len()));
            found.extend_from_slice(bytes);
            Ok(())
        };
        transposed.write(&"w".into(), &whole, &mut write).expect("written");
        let found: Vec<f32> = found.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4"))).collect();
        assert_eq!(found, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
