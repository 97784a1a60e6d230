//! From codes to f32 weights.
//!
//! Owns: which group an element belongs to, and the two formulas. Refuses to know: packings, where scales come from.
//! The loops have no branch per element, so that the compiler vectorizes them.

use serde::{Deserialize, Serialize};

use crate::quant::QuantError;
use crate::quant::error::expect_len;

/// How the groups of a tensor lie in its row-major elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupAxis {
    /// Group `i` is the run of elements `i * size .. (i + 1) * size`: HQQ's `axis=1`, and MLX.
    Runs,
    /// The tensor is a matrix of `size` rows and as many columns as groups, and group `j` is column `j`: HQQ's `axis=0`.
    Columns,
}

/// What is stored per group besides the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Offset<'a> {
    /// `w = (q - zero) * scale`: HQQ, GPTQ, AWQ.
    Zero(&'a [f32]),
    /// `w = q * scale + bias`: MLX.
    Bias(&'a [f32]),
}

/// The groups of a tensor, or of a part of whole groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AffineGroups<'a> {
    axis: GroupAxis,
    size: usize,
    scale: &'a [f32],
    offset: Offset<'a>,
}

impl<'a> AffineGroups<'a> {
    /// Groups of `size` elements, one scale and one offset each.
    ///
    /// # Errors
    /// [`QuantError::GroupSize`] when `size` is 0 or the elements do not fit a `usize`, [`QuantError::Length`] when there
    /// are more or fewer offsets than scales.
    pub fn new(axis: GroupAxis, size: usize, scale: &'a [f32], offset: Offset<'a>) -> Result<Self, QuantError> {
        let (Offset::Zero(values) | Offset::Bias(values)) = offset;
        expect_len("offsets of groups", values.len(), scale.len())?;
        if size == 0 || scale.len().checked_mul(size).is_none() {
            return Err(QuantError::GroupSize { found: size, values: scale.len() });
        }
        Ok(Self { axis, size, scale, offset })
    }

    /// The number of elements of all groups.
    #[must_use]
    pub const fn elements(&self) -> usize {
        self.scale.len() * self.size
    }

    /// Writes the weights of elements `first ..`; one code for each element of `out`. Two roundings per weight, as in torch
    /// and MLX on f32. The elements of a rank may begin and end anywhere, inside a group too.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `codes` and `out` differ in length, [`QuantError::Range`] when elements lie outside.
    pub fn dequantize(&self, first: usize, codes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
        expect_len("codes", codes.len(), out.len())?;
        let end = first.checked_add(out.len()).filter(|end| *end <= self.elements());
        if end.is_none() {
            return Err(QuantError::Range { what: "elements", start: first, count: out.len(), bound: self.elements() });
        }
        match self.axis {
            GroupAxis::Runs => self.runs(first, codes, out),
            GroupAxis::Columns => self.columns(first, codes, out),
        }
        Ok(())
    }

    fn runs(&self, first: usize, mut codes: &[u8], mut out: &mut [f32]) {
        let mut element = first;
        while !out.is_empty() {
            let group = element / self.size;
            let count = out.len().min(self.size - element % self.size);
            let (run, rest) = out.split_at_mut(count);
            let (run_codes, rest_codes) = codes.split_at(count);
            let scale = self.scale[group];
            match self.offset {
                Offset::Zero(zero) => {
                    let zero = zero[group];
                    run.iter_mut().zip(run_codes).for_each(|(out, code)| *out = (f32::from(*code) - zero) * scale);
                }
                Offset::Bias(bias) => {
                    let bias = bias[group];
                    run.iter_mut().zip(run_codes).for_each(|(out, code)| *out = f32::from(*code) * scale + bias);
                }
            }
            (out, codes, element) = (rest, rest_codes, element + count);
        }
    }

    fn columns(&self, first: usize, mut codes: &[u8], mut out: &mut [f32]) {
        let columns = self.scale.len();
        let mut element = first;
        while !out.is_empty() {
            let column = element % columns;
            let count = out.len().min(columns - column);
            let (run, rest) = out.split_at_mut(count);
            let (run_codes, rest_codes) = codes.split_at(count);
            let scales = &self.scale[column..column + count];
            let elements = run.iter_mut().zip(run_codes).zip(scales);
            match self.offset {
                Offset::Zero(zero) => elements
                    .zip(&zero[column..column + count])
                    .for_each(|(((out, code), scale), zero)| *out = (f32::from(*code) - zero) * scale),
                Offset::Bias(bias) => elements
                    .zip(&bias[column..column + count])
                    .for_each(|(((out, code), scale), bias)| *out = f32::from(*code) * scale + bias),
            }
            (out, codes, element) = (rest, rest_codes, element + count);
        }
    }
}
