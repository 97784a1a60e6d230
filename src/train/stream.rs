//! Weights that are read when they are needed: this rank's part of some tensors, in memory until it is dropped.
//!
//! Owns: the stores that are read from. Refuses to know: which tensors are needed when, and where their parts go together.

use std::sync::Arc;

use crate::load::{LoadError, LoadOptions, load};
use crate::plan::{LoadPlan, Strategy};
use crate::state::StateDict;
use crate::store::{LocalStore, Store, open_root};
use crate::types::Rank;

use super::TrainError;

/// Where a plan's weights are.
#[derive(Debug)]
pub(super) struct Stream {
    files: Arc<dyn Store>,
    cache: Option<LocalStore>,
    rank: Rank,
}

impl Stream {
    /// The stream of `plan`; nothing when all weights stay in memory.
    pub(super) fn of(plan: &LoadPlan, rank: Rank) -> Result<Option<Self>, TrainError> {
        if plan.strategy != Strategy::Streaming {
            return Ok(None);
        }
        let files = open_root(&plan.root).map_err(LoadError::from)?.store;
        let cache = plan.cache.as_ref().map(|cache| LocalStore::new(&cache.root));
        Ok(Some(Self { files, cache, rank }))
    }

    /// This rank's part of the tensors `indices` of `plan`, in this order, in host memory.
    pub(super) fn fetch(&self, plan: &LoadPlan, indices: &[usize]) -> Result<StateDict, TrainError> {
        let mut options = LoadOptions::on_host(self.rank, self.files.as_ref());
        options.cache = self.cache.as_ref().map(|cache| cache as &dyn Store);
        let (state, _) = load(&plan.part(indices), &options, None)?;
        Ok(state)
    }
}
