//! Matrices on the CPU, and products of views of them that copy nothing.

use candle_core::{CpuStorage, Device, Layout, Result, Storage, StorageRef, Tensor};
use rayon::prelude::*;

use super::product::{add_product, product};
use super::vector::TASK;

/// An f32 matrix, row-major.
#[derive(Debug)]
pub(in crate::nn) struct Matrix {
    values: Vec<f32>,
    columns: usize,
}

impl Clone for Matrix {
    /// On all cores.
    fn clone(&self) -> Self {
        Self { values: copy(&self.values), columns: self.columns }
    }
}

/// The values, copied on all cores.
pub(in crate::nn) fn copy(values: &[f32]) -> Vec<f32> {
    values.par_iter().with_min_len(TASK).copied().collect()
}

impl Matrix {
    /// `values` as rows of `columns`.
    pub(in crate::nn) fn new(values: Vec<f32>, columns: usize) -> Self {
        assert!(columns > 0 && values.len().is_multiple_of(columns), "{} values, rows of {columns}", values.len());
        Self { values, columns }
    }

    pub(in crate::nn) fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(vec![0.0; rows * columns], columns)
    }

    pub(in crate::nn) fn columns(&self) -> usize {
        self.columns
    }

    pub(in crate::nn) fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    pub(in crate::nn) fn data(&self) -> &[f32] {
        &self.values
    }

    pub(in crate::nn) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    pub(in crate::nn) fn view(&self) -> View<'_> {
        View { values: &self.values, sizes: [self.rows(), self.columns], strides: [self.columns, 1] }
    }

    /// Adds `scale * left · right`.
    pub(in crate::nn) fn add_product(&mut self, left: View<'_>, right: View<'_>, scale: f32) {
        assert!(self.columns == right.columns(), "{} columns against {}", self.columns, right.columns());
        add_product(&mut self.values, left, right, scale);
    }

    /// The transpose, copied.
    pub(in crate::nn) fn transposed(&self) -> Self {
        let (rows, columns) = (self.rows(), self.columns);
        let values = (0..columns).flat_map(|column| (0..rows).map(move |row| self.data()[row * columns + column]));
        Self::new(values.collect(), rows)
    }

    pub(in crate::nn) fn into_vec(self) -> Vec<f32> {
        self.values
    }

    /// A tensor without a graph, `[rows, columns]`.
    pub(in crate::nn) fn into_tensor(self) -> Result<Tensor> {
        let shape = (self.rows(), self.columns);
        Tensor::from_vec(self.into_vec(), shape, &Device::Cpu)
    }
}

/// A part of a matrix, perhaps transposed.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct View<'a> {
    /// From the first element on.
    values: &'a [f32],
    sizes: [usize; 2],
    strides: [usize; 2],
}

impl<'a> View<'a> {
    pub(in crate::nn) fn rows(&self) -> usize {
        self.sizes[0]
    }

    pub(in crate::nn) fn columns(&self) -> usize {
        self.sizes[1]
    }

    /// The values from the first element to the last, and the strides of rows and columns in elements.
    pub(super) fn checked(self) -> (&'a [f32], [usize; 2]) {
        let last: usize =
            self.sizes.iter().zip(self.strides).map(|(size, stride)| size.saturating_sub(1) * stride).sum();
        (&self.values[..=last], self.strides)
    }

    /// The transpose.
    pub(in crate::nn) fn t(self) -> Self {
        let ([rows, columns], [down, right]) = (self.sizes, self.strides);
        Self { sizes: [columns, rows], strides: [right, down], ..self }
    }

    /// `count` columns from `start` on.
    pub(in crate::nn) fn narrow_columns(self, start: usize, count: usize) -> Self {
        assert!(start + count <= self.sizes[1], "columns within the view");
        Self { values: &self.values[start * self.strides[1]..], sizes: [self.sizes[0], count], ..self }
    }

    /// `count` rows from `start` on.
    pub(in crate::nn) fn narrow_rows(self, start: usize, count: usize) -> Self {
        self.t().narrow_columns(start, count).t()
    }

    /// `self · right`.
    pub(in crate::nn) fn times(self, right: View<'_>) -> Matrix {
        self.times_scaled(right, 1.0)
    }

    /// `scale * self · right`.
    pub(in crate::nn) fn times_scaled(self, right: View<'_>, scale: f32) -> Matrix {
        Matrix::new(product(self, right, scale), right.columns())
    }
}

/// A tensor on the CPU that is being read.
pub(in crate::nn) struct Held<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Held<'a> {
    /// # Errors
    /// A tensor on a device, or not of f32.
    pub(in crate::nn) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Self { storage, layout }),
            _ => candle_core::bail!("expected f32 on the CPU, found {:?} on {:?}", tensor.dtype(), tensor.device()),
        }
    }

    fn values(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => values,
            _ => unreachable!("checked when it was taken"),
        }
    }

    /// The values, row-major.
    ///
    /// # Errors
    /// A tensor that is not contiguous.
    pub(in crate::nn) fn data(&self) -> Result<&[f32]> {
        let Some((start, end)) = self.layout.contiguous_offsets() else {
            candle_core::bail!("expected a contiguous tensor, found strides {:?}", self.layout.stride());
        };
        Ok(&self.values()[start..end])
    }

    /// As a matrix.
    ///
    /// # Errors
    /// Not two dims.
    pub(in crate::nn) fn view(&self) -> Result<View<'_>> {
        let (rows, columns) = self.layout.shape().dims2()?;
        let strides = [self.layout.stride()[0], self.layout.stride()[1]];
        Ok(View { values: &self.values()[self.layout.start_offset()..], sizes: [rows, columns], strides })
    }
}
