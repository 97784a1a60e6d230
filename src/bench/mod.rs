//! `weightcast bench`: repeatable figures on generated data, each beside its physical limit, measured in the same run.
//!
//! Owns: what is measured and how. Refuses to know: how figures are printed.
//! A figure without its limit says little on a shared machine; the ratio of the two is what is compared.

mod checkpoint;
mod collective;
mod coordinator;
mod device;
mod limits;
mod load;
mod nccl;
mod quantize;
mod stall;

use std::time::Duration;

use serde::Serialize;

pub use checkpoint::checkpoint;
pub use collective::collective;
pub use coordinator::coordinator;
pub use device::{load_to_device, quantize_on_device};
pub use load::{LoadBench, load};
pub use nccl::nccl;
pub use quantize::quantize;
pub use stall::stall;

/// One measured figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// The figure: the median of the runs.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// The physical limit in the same unit.
    pub limit: f64,
    /// What the limit is.
    pub limit_is: &'static str,
    /// `value / limit` for rates, `value / limit` for times: 1 is the limit.
    pub ratio: f64,
}

impl Figure {
    fn new(name: impl Into<String>, value: f64, unit: &'static str, (limit, limit_is): (f64, &'static str)) -> Self {
        Self { name: name.into(), value, unit, limit, limit_is, ratio: value / limit }
    }
}

/// A benchmark could not be run.
#[derive(Debug, thiserror::Error)]
#[error("bench: {0}")]
pub struct BenchError(String);

impl BenchError {
    fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

impl crate::error::Classify for BenchError {
    fn kind(&self) -> crate::error::Kind {
        crate::error::Kind::Internal
    }
}

/// The median of the wall times of `runs` runs, in seconds.
fn median_s<E>(runs: usize, mut run: impl FnMut() -> Result<Duration, E>) -> Result<f64, E> {
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs {
        times.push(run()?.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(f64::NAN))
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = crate::clock::now();
    work();
    start.elapsed()
}

/// A count as a float, for rates.
#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
const fn float(count: u64) -> f64 {
    count as f64
}

const GIGA: f64 = 1e9;
