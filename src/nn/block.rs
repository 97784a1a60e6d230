//! One block, by the operations of the device that its input is on.

use candle_core::{Result, Tensor};

use super::layers::Block;
use super::{Pass, composed};

pub(super) fn forward(block: &Block, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    composed::block(block, x, pass)
}
