//! Loading all models of a job on one rank: its own, then those beside it, each on all ranks at the same time.
//!
//! Owns: their order, which is the plan's, and the sum of their figures. Refuses to know: where the communicator comes from.

use std::collections::BTreeMap;
use std::path::Path;

use crate::comm::Communicator;
use crate::device::Device;
use crate::load::{LoadError, LoadOptions, LoadReport, load};
use crate::plan::LoadPlan;
use crate::state::StateDict;
use crate::store::{LocalStore, Store, open_root};
use crate::types::Rank;

use super::data::Watched;

/// What a rank holds after its loads.
pub(super) struct Loaded {
    /// Of the job's own model, as far as it stays in memory.
    pub(super) state: StateDict,
    /// By name, of those beside it.
    pub(super) others: BTreeMap<String, StateDict>,
    /// The figures of all loads together.
    pub(super) report: LoadReport,
}

/// Where a rank's weights go.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    pub(super) rank: Rank,
    pub(super) device: Device,
    /// The memory that the communicator moves.
    pub(super) comm_device: Device,
    /// Where the own model's files are on this host, if not where the plan says.
    pub(super) root: Option<&'a Path>,
    pub(super) watched: &'a Watched,
}

/// Carries out the plan and those of its other models.
pub(super) fn load_models(
    plan: &LoadPlan,
    places: Places<'_>,
    mut comm: Option<&mut dyn Communicator>,
) -> Result<Loaded, LoadError> {
    let (state, mut report) = load_one(&plan.resident(), places, lend(&mut comm))?;
    let mut others = BTreeMap::new();
    for other in &plan.others {
        let (state, more) = load_one(&other.plan, Places { root: None, ..places }, lend(&mut comm))?;
        report.storage_bytes += more.storage_bytes;
        report.weights_bytes += more.weights_bytes;
        report.quantized_values += more.quantized_values;
        report.non_finite_values += more.non_finite_values;
        report.wall_s += more.wall_s;
        others.insert(other.name.clone(), state);
    }
    Ok(Loaded { state, others, report })
}

fn lend<'c>(comm: &'c mut Option<&mut dyn Communicator>) -> Option<&'c mut dyn Communicator> {
    match comm {
        Some(comm) => Some(&mut **comm),
        None => None,
    }
}

fn load_one(
    plan: &LoadPlan,
    places: Places<'_>,
    comm: Option<&mut dyn Communicator>,
) -> Result<(StateDict, LoadReport), LoadError> {
    let files = open_root(places.root.unwrap_or_else(|| Path::new(&plan.root)))?;
    let cache = plan.cache.as_ref().map(|cache| LocalStore::new(&cache.root));
    places.watched.expect(plan.kept_bytes(places.rank));
    let reads = [Some(files.read.clone()), cache.as_ref().map(LocalStore::read_counter)];
    let options = LoadOptions {
        meters: places.watched.figures.load(reads.into_iter().flatten()),
        device: places.device,
        comm_device: places.comm_device,
        cache: cache.as_ref().map(|cache| cache as &dyn Store),
        cancel: places.watched.cancel.clone(),
        done_bytes: places.watched.done_bytes.clone(),
        ..LoadOptions::on_host(places.rank, files.store.as_ref())
    };
    let (state, mut report) = load(plan, &options, comm)?;
    report.storage_bytes = files.read.bytes() + cache.map_or(0, |cache| cache.read_counter().bytes());
    Ok((state, report))
}
