//! GPTQ's checkpoint layout, v1 and v2, of 2, 3, 4 and 8 bits, with or without act-order.
//!
//! Owns: `qweight`, `qzeros` and `g_idx` as auto-gptq 0.7 and gptqmodel 7 read and write them. Refuses to know: how codes are
//! found.
//!
//! For a layer of `in` inputs and `out` outputs, in little-endian 32-bit words:
//! - `qweight [in * bits / 32, out]`: column `n` is the stream of the codes of output `n` (`pack/bit_stream.rs`), so that a
//!   code of 3 bits may lie in two words, one above the other;
//! - `qzeros [groups, out * bits / 32]`: row `g` is the stream of the zeros of group `g`. Version 1 stores `zero - 1`, which
//!   wraps: the zero is `(stored + 1) mod 2^bits`, as in gptqmodel and exllama (auto-gptq's own reader takes a stored
//!   `2^bits - 1` for `2^bits`; its writer never makes a zero of 0 sound);
//! - `scales [groups, out]`, f16; `g_idx [in]`, i32: the group of each input. Without act-order it is `k / group_size`.
//!
//! `W[k, n] = (q - zero) * scale`. The product of an f16 scale and a difference of at most 9 bits is exact in f32, so what is
//! written here, rounded to f16, has the bits of both libraries.
//!
//! Cuts: along `out` at multiples of `32 / gcd(32, bits)` outputs files can be cut without unpacking `qzeros` (`qweight` and
//! `scales` at any output); along `in` at multiples of as many inputs, and, without act-order, of a group.

use super::region::{Region, TILE};
use super::words::{Words, pack_rows, words_of};
use crate::quant::QuantError;
use crate::quant::affine::CodeBits;
use crate::quant::error::expect_len;
use crate::quant::source::Source;

/// How zeros are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GptqVersion {
    /// `checkpoint_format` "gptq": `zero - 1`.
    V1,
    /// `checkpoint_format` "gptq_v2": `zero`.
    V2,
}

/// What config.json and the shapes say of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptqShape {
    /// 2, 3, 4 or 8.
    pub bits: CodeBits,
    /// How zeros are stored.
    pub version: GptqVersion,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
    /// Inputs per group, config.json's `group_size`; all inputs where that is -1. The last group may be shorter.
    pub group: usize,
}

/// The tensors of a layer as a file holds them: little-endian bytes at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct GptqTensors<'a> {
    /// i32 words.
    pub qweight: &'a [u8],
    /// i32 words.
    pub qzeros: &'a [u8],
    /// F16 in every known file; BF16 and F32 are read too, and then products are rounded.
    pub scales: Source<'a>,
    /// i32; may be absent, and then groups follow one after the other.
    pub g_idx: Option<&'a [u8]>,
}

/// A layer whose sizes and group indices have been checked.
#[derive(Clone, Debug)]
pub struct Gptq<'a> {
    shape: GptqShape,
    qweight: Words<'a>,
    qzeros: Words<'a>,
    scales: Source<'a>,
    order: GroupOrder,
}

/// Which group an input is of; below `shape.groups()` for every input.
#[derive(Clone, Debug)]
enum GroupOrder {
    /// Groups of as many inputs, one after the other.
    Equal(usize),
    /// As `g_idx` says.
    Indexed(Vec<usize>),
}

impl GptqShape {
    fn check(&self) -> Result<(), QuantError> {
        match self.bits.get() {
            _ if self.group == 0 => Err(QuantError::GroupSize { found: 0, values: self.inputs }),
            2 | 3 | 4 | 8 => Ok(()),
            found => Err(QuantError::Bits { format: "gptq", expected: "2, 3, 4 or 8", found }),
        }
    }

    /// Rows of `scales` and `qzeros`.
    #[must_use]
    pub fn groups(&self) -> usize {
        // A group of 0 is refused by `check`.
        self.inputs.div_ceil(self.group.max(1))
    }

    /// Rows of `qweight`.
    #[must_use]
    pub fn weight_word_rows(&self) -> usize {
        words_of(self.bits, self.inputs)
    }

    /// Columns of `qzeros`.
    #[must_use]
    pub fn zero_word_columns(&self) -> usize {
        words_of(self.bits, self.outputs)
    }
}

impl<'a> Gptq<'a> {
    /// Checks sizes and group indices.
    ///
    /// # Errors
    /// [`QuantError::Bits`], [`QuantError::Length`] when a tensor has not the size that follows from the shape,
    /// [`QuantError::GroupIndex`] when `g_idx` names a group that is not there.
    pub fn new(shape: GptqShape, tensors: GptqTensors<'a>) -> Result<Self, QuantError> {
        shape.check()?;
        let qweight = Words::new("qweight", tensors.qweight, shape.weight_word_rows(), shape.outputs)?;
        let qzeros = Words::new("qzeros", tensors.qzeros, shape.groups(), shape.zero_word_columns())?;
        expect_len("scales", tensors.scales.len(), shape.groups().saturating_mul(shape.outputs))?;
        let order = match tensors.g_idx {
            Some(bytes) => GroupOrder::Indexed(groups_from(bytes, &shape)?),
            None => GroupOrder::Equal(shape.group),
        };
        Ok(Self { shape, qweight, qzeros, scales: tensors.scales, order })
    }

    /// Whether inputs are in another order than their groups (`desc_act`), so that a cut along inputs needs groups of
    /// everywhere.
    #[must_use]
    pub fn is_act_order(&self) -> bool {
        matches!(&self.order, GroupOrder::Indexed(groups) if !groups.is_sorted())
    }

    /// The group of an input below `shape.inputs`, else nothing.
    #[must_use]
    pub fn group_of(&self, input: usize) -> Option<usize> {
        match &self.order {
            GroupOrder::Equal(inputs) => (input < self.shape.inputs).then(|| input / inputs),
            GroupOrder::Indexed(groups) => groups.get(input).copied(),
        }
    }

    /// The codes of the region, input-major: `[inputs, outputs]`.
    ///
    /// # Errors
    /// [`QuantError::Range`] when the region lies outside, [`QuantError::Length`] when `out` does not fit it.
    pub fn codes(&self, region: &Region, out: &mut [u8]) -> Result<(), QuantError> {
        self.check(region, out.len())?;
        for (row, codes) in region.inputs.clone().zip(out.chunks_exact_mut(region.outputs.len().max(1))) {
            self.qweight.unpack_down(self.shape.bits, row, region.outputs.start, codes);
        }
        Ok(())
    }

    /// The zeros of outputs `outputs` of every group, `[groups, outputs]`.
    ///
    /// # Errors
    /// As [`Self::codes`].
    pub fn zeros(&self, outputs: std::ops::Range<usize>, out: &mut [u8]) -> Result<(), QuantError> {
        let region = Region { inputs: 0..0, outputs };
        region.check(self.shape.inputs, self.shape.outputs)?;
        let count = region.outputs.len();
        expect_len("zeros", out.len(), self.shape.groups() * count)?;
        for (group, zeros) in out.chunks_exact_mut(count.max(1)).enumerate() {
            self.qzeros.unpack_along(self.shape.bits, group, region.outputs.start, zeros);
            if self.shape.version == GptqVersion::V1 {
                let mask = self.shape.bits.max_code();
                zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_add(1) & mask);
            }
        }
        Ok(())
    }

    /// The weights of the region in f32 as torch's `weight` has them: `[outputs, inputs]`.
    ///
    /// # Errors
    /// As [`Self::codes`].
    pub fn dequantize(&self, region: &Region, out: &mut [f32]) -> Result<(), QuantError> {
        self.check(region, out.len())?;
        let count = region.outputs.len();
        let mut codes = vec![0; self.shape.groups() * count];
        self.zeros(region.outputs.clone(), &mut codes)?;
        let zeros: Vec<f32> = codes.iter().map(|zero| f32::from(*zero)).collect();
        let scales = scales_of(self.scales, self.shape.groups(), self.shape.outputs, region);
        region.turn(out, |input, tile, weights| {
            let mut codes = [0; TILE];
            let codes = &mut codes[..weights.len()];
            self.qweight.unpack_down(self.shape.bits, input, region.outputs.start + tile, codes);
            let start = self.group_of(input).expect("the region was checked") * count + tile;
            let parameters = scales[start..].iter().zip(&zeros[start..]);
            for ((weight, code), (scale, zero)) in weights.iter_mut().zip(codes).zip(parameters) {
                *weight = (f32::from(*code) - zero) * scale;
            }
        });
        Ok(())
    }

    fn check(&self, region: &Region, out: usize) -> Result<(), QuantError> {
        region.check(self.shape.inputs, self.shape.outputs)?;
        expect_len("weights of the region", out, region.len())
    }
}

fn groups_from(bytes: &[u8], shape: &GptqShape) -> Result<Vec<usize>, QuantError> {
    expect_len("bytes of g_idx", bytes.len(), shape.inputs.saturating_mul(4))?;
    let group = |(input, bytes): (usize, &[u8; 4])| {
        let found = i32::from_le_bytes(*bytes);
        let group = usize::try_from(found).ok().filter(|group| *group < shape.groups());
        group.ok_or_else(|| QuantError::GroupIndex { input, groups: shape.groups(), found })
    };
    bytes.as_chunks::<4>().0.iter().enumerate().map(group).collect()
}

/// The scales of the region's outputs, `[groups, outputs]` in f32. `scales` has `groups * all` elements.
pub(super) fn scales_of(scales: Source<'_>, groups: usize, all: usize, region: &Region) -> Vec<f32> {
    let count = region.outputs.len();
    let mut out = vec![0.0; groups * count];
    for (group, values) in out.chunks_exact_mut(count.max(1)).enumerate() {
        let (_, row) = scales.split_at(group * all + region.outputs.start);
        row.split_at(count).0.decode(values);
    }
    out
}

/// Packs codes `[inputs, outputs]` into `qweight`; bits above a code's width are dropped.
///
/// # Errors
/// [`QuantError::Bits`] for a width that GPTQ does not have, [`QuantError::Length`] when a slice does not fit.
pub fn pack_gptq_weight(shape: GptqShape, codes: &[u8], qweight: &mut [u8]) -> Result<(), QuantError> {
    shape.check()?;
    expect_len("codes", codes.len(), shape.inputs.saturating_mul(shape.outputs))?;
    let words = Words::new("qweight", qweight, shape.weight_word_rows(), shape.outputs)?.len();
    qweight.fill(0);
    let words = &mut qweight.as_chunks_mut::<4>().0[..words];
    let (bits, mask) = (shape.bits.count(), shape.bits.max_code());
    for (input, codes) in codes.chunks_exact(shape.outputs.max(1)).enumerate() {
        let (word, shift) = (input * bits / 32, input * bits % 32);
        for (output, code) in codes.iter().enumerate() {
            let code = u64::from(code & mask) << shift;
            or(&mut words[word * shape.outputs + output], code);
            if shift + bits > 32 {
                or(&mut words[(word + 1) * shape.outputs + output], code >> 32);
            }
        }
    }
    Ok(())
}

/// Or-s the low half of `bits` into a word.
fn or(word: &mut [u8; 4], bits: u64) {
    let [a, b, c, d, ..] = bits.to_le_bytes();
    *word = (u32::from_le_bytes(*word) | u32::from_le_bytes([a, b, c, d])).to_le_bytes();
}

/// Packs zeros `[groups, outputs]` into `qzeros`, in the way of the shape's version.
///
/// # Errors
/// As [`pack_gptq_weight`].
pub fn pack_gptq_zeros(shape: GptqShape, zeros: &[u8], qzeros: &mut [u8]) -> Result<(), QuantError> {
    shape.check()?;
    expect_len("zeros", zeros.len(), shape.groups().saturating_mul(shape.outputs))?;
    Words::new("qzeros", qzeros, shape.groups(), shape.zero_word_columns())?;
    let less = u8::from(shape.version == GptqVersion::V1);
    let stored: Vec<u8> = zeros.iter().map(|zero| zero.wrapping_sub(less)).collect();
    pack_rows(shape.bits, shape.outputs, &stored, qzeros);
    Ok(())
}
