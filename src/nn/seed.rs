//! The start of a backward in the middle of a model.

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Hands on a gradient that came from elsewhere.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let shape = Shape::from(());
        Ok((storage.device().zeros_impl(&shape, candle_core::DType::F32)?, shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// A scalar whose backward gives `output` the gradient `gradient`, of the same shape: as
/// `(output * gradient).sum_all()`, without the products.
///
/// # Errors
/// The tensor library's, when the shapes differ.
pub fn seed(output: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if output.dims() != gradient.dims() {
        candle_core::bail!("the gradient has shape {:?}, the output {:?}", gradient.dims(), output.dims());
    }
    output.apply_op1(Seed(gradient.detach()))
}
