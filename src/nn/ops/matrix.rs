//! Matrices on the CPU, and products of views of them that copy nothing.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, StorageRef, Tensor};

/// An f32 matrix, row-major.
#[derive(Clone, Debug)]
pub(in crate::nn) struct Matrix {
    storage: CpuStorage,
    columns: usize,
}

impl Matrix {
    /// `values` as rows of `columns`.
    pub(in crate::nn) fn new(values: Vec<f32>, columns: usize) -> Self {
        assert!(columns > 0 && values.len().is_multiple_of(columns), "{} values, rows of {columns}", values.len());
        Self { storage: CpuStorage::F32(values), columns }
    }

    pub(in crate::nn) fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(vec![0.0; rows * columns], columns)
    }

    pub(in crate::nn) fn columns(&self) -> usize {
        self.columns
    }

    pub(in crate::nn) fn rows(&self) -> usize {
        self.data().len() / self.columns
    }

    pub(in crate::nn) fn data(&self) -> &[f32] {
        match &self.storage {
            CpuStorage::F32(values) => values,
            _ => unreachable!("a matrix is made of f32 only"),
        }
    }

    pub(in crate::nn) fn data_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            CpuStorage::F32(values) => values,
            _ => unreachable!("a matrix is made of f32 only"),
        }
    }

    pub(in crate::nn) fn view(&self) -> View<'_> {
        View { storage: &self.storage, offset: 0, sizes: [self.rows(), self.columns], strides: [self.columns, 1] }
    }

    /// The transpose, copied.
    pub(in crate::nn) fn transposed(&self) -> Self {
        let (rows, columns) = (self.rows(), self.columns);
        let values = (0..columns).flat_map(|column| (0..rows).map(move |row| self.data()[row * columns + column]));
        Self::new(values.collect(), rows)
    }

    pub(in crate::nn) fn into_vec(self) -> Vec<f32> {
        match self.storage {
            CpuStorage::F32(values) => values,
            _ => unreachable!("a matrix is made of f32 only"),
        }
    }

    /// A tensor without a graph, `[rows, columns]`.
    pub(in crate::nn) fn into_tensor(self) -> Result<Tensor> {
        let shape = (self.rows(), self.columns);
        Tensor::from_vec(self.into_vec(), shape, &Device::Cpu)
    }
}

/// A part of a matrix, perhaps transposed.
#[derive(Clone, Copy)]
pub(in crate::nn) struct View<'a> {
    storage: &'a CpuStorage,
    offset: usize,
    sizes: [usize; 2],
    strides: [usize; 2],
}

impl View<'_> {
    /// The transpose.
    pub(in crate::nn) fn t(self) -> Self {
        let ([rows, columns], [down, right]) = (self.sizes, self.strides);
        Self { sizes: [columns, rows], strides: [right, down], ..self }
    }

    /// `count` columns from `start` on.
    pub(in crate::nn) fn narrow_columns(self, start: usize, count: usize) -> Self {
        assert!(start + count <= self.sizes[1], "columns within the view");
        Self { offset: self.offset + start * self.strides[1], sizes: [self.sizes[0], count], ..self }
    }

    /// `count` rows from `start` on.
    pub(in crate::nn) fn narrow_rows(self, start: usize, count: usize) -> Self {
        self.t().narrow_columns(start, count).t()
    }

    fn layout(&self) -> Layout {
        Layout::new(Shape::from((self.sizes[0], self.sizes[1])), self.strides.to_vec(), self.offset)
    }

    /// `self · right`.
    pub(in crate::nn) fn times(self, right: View<'_>) -> Result<Matrix> {
        let ([rows, inner], [_, columns]) = (self.sizes, right.sizes);
        assert!(inner == right.sizes[0], "{inner} columns against {} rows", right.sizes[0]);
        let product = self.storage.matmul(right.storage, (1, rows, columns, inner), &self.layout(), &right.layout())?;
        Ok(Matrix { storage: product, columns })
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

    fn storage(&self) -> &CpuStorage {
        match &*self.storage {
            Storage::Cpu(storage) => storage,
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
        match self.storage() {
            CpuStorage::F32(values) => Ok(&values[start..end]),
            _ => unreachable!("checked when it was taken"),
        }
    }

    /// As a matrix.
    ///
    /// # Errors
    /// Not two dims.
    pub(in crate::nn) fn view(&self) -> Result<View<'_>> {
        let (rows, columns) = self.layout.shape().dims2()?;
        let strides = [self.layout.stride()[0], self.layout.stride()[1]];
        Ok(View { storage: self.storage(), offset: self.layout.start_offset(), sizes: [rows, columns], strides })
    }
}
