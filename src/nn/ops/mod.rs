//! Operations that the tensor library lacks, or computes gradients of that nobody needs: functions of slices and matrices
//! on the CPU, each with its backward, and the nodes that put them into a graph.

pub(super) mod activation;
pub(super) mod adapter;
pub(super) mod attention;
pub(super) mod cross_entropy;
mod dropout;
mod frozen_linear;
pub(super) mod fused;
pub(super) mod linear;
pub(super) mod matrix;
pub(super) mod norm;
mod product;
pub(super) mod rotary;
pub(super) mod vector;

pub(super) use dropout::dropout_mask;
pub(super) use frozen_linear::FrozenLinear;
