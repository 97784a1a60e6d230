//! A function of one tensor and many variables as a single node of the graph, with a backward written by hand.
//!
//! An operation of the tensor library has three arguments at most, and zeroes and adds for each. So every variable enters
//! through a node without values (`Touch`) that fetches its gradient from where the function's backward left it; the
//! library runs it after that, because the function depends on it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor, TensorId, Var};

use super::matrix::Matrix;

/// The gradients of variables that a backward found.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// The gradient of `variable`, of its shape; nothing where it has none.
    #[must_use]
    pub fn get(&self, variable: &Var) -> Option<&Tensor> {
        self.0.get(&variable.id())
    }

    /// Those of `variables` that a graph's backward found.
    pub(in crate::nn) fn from_store(store: &mut GradStore, variables: &[Var]) -> Self {
        let found = variables.iter().filter_map(|variable| Some((variable.id(), store.remove(variable.as_tensor())?)));
        Self(found.collect())
    }

    /// A matrix's gradient.
    pub(in crate::nn) fn put(&mut self, variable: &Var, gradient: Matrix) -> Result<()> {
        self.0.insert(variable.id(), gradient.into_tensor()?.reshape(variable.shape())?);
        Ok(())
    }

    /// A vector's gradient.
    pub(in crate::nn) fn put_vector(&mut self, variable: &Var, gradient: Vec<f32>) -> Result<()> {
        self.0.insert(variable.id(), Tensor::from_vec(gradient, variable.shape(), &Device::Cpu)?);
        Ok(())
    }
}

/// A function on the CPU and its backward.
pub(in crate::nn) trait Function: Send + Sync + 'static {
    /// What the backward needs of the forward.
    type Saved: Send + 'static;

    /// Its name in errors.
    const NAME: &'static str;

    /// The variables that it reads.
    fn variables(&self) -> Vec<Var>;

    /// The result as values and shape. `wanted` says whether a backward may follow.
    fn forward(&self, x: &Tensor, wanted: bool) -> Result<(Vec<f32>, Shape, Self::Saved)>;

    /// The gradient of `x`; those of the variables go to `gradients`.
    fn backward(&self, x: &Tensor, saved: Self::Saved, gradient: &Tensor, gradients: &mut Gradients) -> Result<Tensor>;
}

/// Applies `function`, and records it where its input or a variable asks for a gradient.
pub(in crate::nn) fn apply<F: Function>(function: F, x: &Tensor) -> Result<Tensor> {
    let variables = function.variables();
    let wanted = x.track_op() || !variables.is_empty();
    let detached = x.detach();
    let (values, shape, saved) = function.forward(&detached, wanted)?;
    if !wanted {
        return Tensor::from_vec(values, shape, x.device());
    }
    let found = Arc::new(Mutex::new(Gradients::default()));
    let touches: Vec<Tensor> = variables
        .iter()
        .map(|variable| variable.as_tensor().apply_op1(Touch { variable: variable.id(), found: Arc::clone(&found) }))
        .collect::<Result<_>>()?;
    let node = Node { function, result: Mutex::new(Some((values, shape))), saved: Mutex::new(Some(saved)), found };
    if touches.is_empty() { x.apply_op1(node) } else { x.apply_op2(&Tensor::cat(&touches, 0)?, node) }
}

struct Node<F: Function> {
    function: F,
    result: Mutex<Option<(Vec<f32>, Shape)>>,
    saved: Mutex<Option<F::Saved>>,
    found: Arc<Mutex<Gradients>>,
}

impl<F: Function> Node<F> {
    /// The values that were computed before the node was recorded.
    fn take(&self) -> Result<(CpuStorage, Shape)> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((values, shape)) = result else { candle_core::bail!("{}: computed once already", F::NAME) };
        Ok((CpuStorage::F32(values), shape))
    }

    fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let x = x.detach();
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let saved = match saved {
            Some(saved) => saved,
            None => self.function.forward(&x, true)?.2,
        };
        let mut found = Gradients::default();
        let result = self.function.backward(&x, saved, &gradient.detach(), &mut found)?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(result)
    }
}

impl<F: Function> CustomOp1 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.backward(x, gradient).map(Some)
    }
}

impl<F: Function> CustomOp2 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        x: &Tensor,
        touches: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.backward(x, gradient)?), Some(touches.zeros_like()?)))
    }
}

/// Leads the graph to a variable.
struct Touch {
    variable: TensorId,
    found: Arc<Mutex<Gradients>>,
}

impl CustomOp1 for Touch {
    fn name(&self) -> &'static str {
        "touch"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.found.lock().unwrap_or_else(PoisonError::into_inner).0.remove(&self.variable))
    }
}
