//! The recipe of a training run: what is trained, on which data, for how long. Pure data and pure functions of it.

pub mod order;
pub mod schedule;
