//! How long training stands still for a checkpoint, measured for `weightcast bench`.
//!
//! Owns: a run's snapshot and writer without the run. Refuses to know: how figures are shown.

use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use crate::checkpoint::{CheckpointError, begin};
use crate::device::Device;
use crate::load::Cancel;
use crate::plan::{LoadPlan, state_plan};
use crate::state::StateDict;
use crate::store::{LocalStore, Store as _};
use crate::types::{Fqn, Rank, Shape, Step};

use super::TrainError;
use super::control::{Control, Grant, News};
use super::snapshot::Writer;
use super::state::{Layout, Shards};

/// Columns of the trained tensors.
const COLUMNS: u64 = 1024;
/// The number of trained tensors.
const TENSORS: u64 = 64;

/// The times of one snapshot and of one copy of as many bytes, `runs` of each in turn. Snapshots of a state of `bytes`
/// bytes are written below `directory` meanwhile, as in a run; the wait for the one before is not part of the time.
pub(crate) fn stalls(
    base: &LoadPlan,
    directory: &Path,
    (bytes, runs): (u64, u64),
) -> Result<Vec<(Duration, Duration)>, TrainError> {
    let rows = (bytes / 3 / 4 / COLUMNS / TENSORS).max(1);
    let parameters: Vec<(Fqn, Shape)> =
        (0..TENSORS).map(|index| (Fqn::from(format!("w{index}")), Shape::from([rows, COLUMNS]))).collect();
    let plan = state_plan(base, &parameters);
    let layout = Layout::new(&plan, Rank::ZERO);
    let shards = Shards::fresh(vec![1.0; layout.elements()]);
    let mut memory = StateDict::allocate(&plan, Rank::ZERO, Device::Host)?;
    shards.copy_to(&layout, &mut memory)?;
    let control = Control::new(Cancel::default());
    let (told, news) = sync_channel(4);
    let tell = Box::new(move |heard: Result<News, CheckpointError>| {
        // The other end is there as long as the writer is.
        let _ = told.send(heard.map(|news| matches!(news, News::Saved { .. })));
    });
    let mut writer = Writer::start(plan, memory, control.clone(), tell).map_err(|error| TrainError::Plan {
        what: "the writer",
        expected: "a thread".to_owned(),
        found: error.to_string(),
    })?;
    let store = LocalStore::new(directory);
    let from: Vec<u8> = vec![1; 3 * 4 * layout.elements()];
    let mut into = vec![2; from.len()];
    let mut times = Vec::new();
    for run in 0..runs {
        writer.finish()?;
        let start = crate::clock::now();
        into.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut into);
        let copied = start.elapsed();
        let step = Step(run);
        let start = crate::clock::now();
        writer.take((step, 0), (&layout, &shards), None)?;
        times.push((start.elapsed(), copied));
        let failed = |error: CheckpointError| TrainError::Plan {
            what: "the bench's directory",
            expected: "room for a checkpoint".to_owned(),
            found: error.to_string(),
        };
        let (attempt, attempt_directory) = begin(&store, step).map_err(failed)?;
        let root = directory.to_owned();
        control.saves(
            Some(Grant { step, attempt, root, directory: attempt_directory.clone(), traceparent: String::new() }),
            None,
        );
        while !news.recv().map_err(|_| TrainError::WriterEnded)?.map_err(failed)? {}
        control.saves(None, Some(step));
        writer.finish()?;
        store.remove(&attempt_directory).map_err(|error| failed(error.into()))?;
    }
    Ok(times)
}
