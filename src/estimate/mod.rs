//! Know before you load: how much memory a model takes on each rank, whether it fits, and how to place it.
//!
//! Owns: published models by name ([`ModelProfile`]), the memory of each rank by terms ([`estimate`]), and the placement of
//! layers on unequal devices ([`DeviceMap`]). docs/ESTIMATES.md states every assumption, and compares with measurements.
//! Refuses to know: files, devices, processes. Memory sizes are arguments.
//!
//! Invariants:
//! - `ES-1`: weights and their statistics are those of a [`LoadPlan`](crate::plan::LoadPlan) made by the same code as for
//!   files, so what is predicted is what is allocated.
//! - `ES-2`: a rank's terms are those of one moment, its worst, and add up to its peak.
//! - `ES-3`: more sequences or longer ones never take less memory.

mod profile;
mod sizes;

pub use profile::{ModelProfile, ProfileError, ProfileFields};
