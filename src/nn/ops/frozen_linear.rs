//! A product with a frozen matrix, whose backward computes the gradient of the input alone.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

use crate::nn::FrozenWeight;
use crate::nn::layers::Order;

/// `y = x Wᵀ` over `x` of `[rows, in]`; the backward takes the weight from its slot again (`NN-1`).
pub(in crate::nn) struct FrozenLinear {
    pub(in crate::nn) weight: FrozenWeight,
    pub(in crate::nn) order: Order,
}

impl FrozenLinear {
    /// The weight as `[in, out]`, a view.
    fn right(&self) -> Result<Tensor> {
        let weight = self.weight.tensor()?;
        if self.order == Order::OutIn { weight.t() } else { Ok(weight) }
    }

    fn product<S: BackendStorage>(left: (&S, &Layout), right: (&S, &Layout)) -> Result<(S, Shape)> {
        let (rows, inner) = left.1.shape().dims2()?;
        let (_, outputs) = right.1.shape().dims2()?;
        let product = left.0.matmul(right.0, (1, rows, outputs, inner), left.1, right.1)?;
        Ok((product, Shape::from((rows, outputs))))
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let right = self.right()?;
        let (right_storage, right_layout) = right.storage_and_layout();
        match &*right_storage {
            Storage::Cpu(right) => Self::product((storage, layout), (right, right_layout)),
            _ => candle_core::bail!("{}: not on the CPU, as the input is", self.weight.fqn()),
        }
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let right = self.right()?;
        let (right_storage, right_layout) = right.storage_and_layout();
        match &*right_storage {
            Storage::Cuda(right) => Self::product((storage, layout), (right, right_layout)),
            _ => candle_core::bail!("{}: not on the device, as the input is", self.weight.fqn()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        gradient.matmul(&self.right()?.t()?).map(Some)
    }
}
