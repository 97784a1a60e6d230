//! Writing a checkpoint with digests, beside plain writes of the same bytes by the same number of writers, run in turn.

use std::path::Path;
use std::time::Duration;

use super::{BenchError, Figure, GIGA, float, limits, median_s};
use crate::checkpoint::{WriteRequest, begin, commit, write_shard};
use crate::device::Device;
use crate::manifest::SealRequest;
use crate::plan::{Chunking, DeviceRule, Encoding, Input, LoadPlan, PLAN_VERSION, Placement, Strategy, TensorPlan};
use crate::state::StateDict;
use crate::store::{LocalStore, Store};
use crate::types::{DType, Generation, Rank, Step, WorldSize};

/// Columns of the tensors that are written.
const COLUMNS: u64 = 4096;
/// Tensors that are written.
const TENSORS: u64 = 64;
const RUNS: usize = 3;

/// GB/s of a whole checkpoint (write, digests, sync, seal, publish) of `bytes` on `world` writers in `directory`.
///
/// # Errors
/// [`BenchError`].
pub fn checkpoint(directory: &Path, world: WorldSize, bytes: u64) -> Result<Vec<Figure>, BenchError> {
    let plan = plan(world, bytes);
    let mut states = Vec::new();
    for rank in world.ranks() {
        let mut state = StateDict::allocate(&plan, rank, Device::Host).map_err(BenchError::of)?;
        // Touched, as weights are, and not the zeros that a file system may treat specially.
        for tensor in 0..plan.tensors.len() {
            let pattern = vec![0x5a; state.owned_len(tensor, 0)];
            state.write((tensor, 0), 0, &pattern).map_err(BenchError::of)?;
        }
        states.push(state);
    }
    let store = LocalStore::new(directory);
    store.create_dir("").map_err(BenchError::of)?;
    let mut plain = Vec::new();
    let written = median_s(RUNS, || {
        // In turn, so that a slow minute of the disk meets both.
        plain.push(limits::disk(directory, world.get(), bytes)?.as_secs_f64());
        save(&store, &plan, &states)
    })?;
    plain.sort_by(f64::total_cmp);
    let plain = plain.get(plain.len() / 2).copied().unwrap_or(f64::NAN);
    let gigabytes = float(bytes) / GIGA;
    let limit = (gigabytes / plain, "plain write and fsync, same writers");
    Ok(vec![Figure::new(format!("checkpoint on {world} ranks"), gigabytes / written, "GB/s", limit)])
}

pub(super) fn plan(world: WorldSize, bytes: u64) -> LoadPlan {
    let rows = (bytes / 2 / COLUMNS / TENSORS).max(1);
    let tensor = |index: u64| TensorPlan {
        fqn: format!("w{index}.weight").into(),
        shape: [rows, COLUMNS].into(),
        encoding: Encoding::Plain { dtype: DType::BF16 },
        owner: None,
        sharded: true,
        reader: Rank::ZERO,
        input: Input::Stored { parts: Vec::new(), nested_offset: None },
    };
    LoadPlan {
        version: PLAN_VERSION,
        model: "bench".to_owned(),
        config_json: None,
        world,
        strategy: Strategy::Full,
        placement: Placement::Shard,
        chunking: Chunking { chunk_bytes: 1 << 20, reader_threads: 1, queue_chunks: 1 },
        digests: false,
        device: DeviceRule::default(),
        root: String::new(),
        files: Vec::new(),
        versions: Vec::new(),
        cache: None,
        digest_tables: Vec::new(),
        tensors: (0..TENSORS).map(tensor).collect(),
        aliases: Vec::new(),
        train: None,
        others: Vec::new(),
    }
}

fn save(store: &LocalStore, plan: &LoadPlan, states: &[StateDict]) -> Result<Duration, BenchError> {
    let step = Step(0);
    let start = crate::clock::now();
    let (attempt, directory) = begin(store, step).map_err(BenchError::of)?;
    let receipts: Result<Vec<_>, _> = std::thread::scope(|scope| {
        let writers: Vec<_> = states
            .iter()
            .map(|state| {
                let directory = directory.as_str();
                let request = WriteRequest { plan, state, store, directory, step };
                scope.spawn(move || write_shard(&request, &|_| {}).map_err(BenchError::of))
            })
            .collect();
        let join = |writer: std::thread::ScopedJoinHandle<'_, _>| {
            writer.join().unwrap_or_else(|_| Err(BenchError("a writer panicked".into())))
        };
        writers.into_iter().map(join).collect()
    });
    let request = SealRequest { plan, step, attempt, generation: Generation(1) };
    let committed = commit(store, &request, receipts?).map_err(BenchError::of)?;
    let time = start.elapsed();
    store.remove(&committed).map_err(BenchError::of)?;
    Ok(time)
}
