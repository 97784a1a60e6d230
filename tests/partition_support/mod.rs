//! What `tests/partition.rs` is made of: schedules that follow from their seeds, and a job on hosts of its own.

pub(crate) mod job;
pub(crate) mod schedule;
