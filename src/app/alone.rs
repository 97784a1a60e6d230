//! A model loaded by this process alone, on the host; one that streams, as far as it stays in memory.

use super::prepare::Prepared;
use crate::load::{LoadError, LoadOptions, load};
use crate::plan::LoadPlan;
use crate::state::StateDict;
use crate::store::{LocalStore, Store, open_root};
use crate::types::Rank;

/// Carries out a plan of one rank.
///
/// # Errors
/// [`LoadError`].
pub(super) fn load_alone(prepared: Prepared) -> Result<(LoadPlan, StateDict), LoadError> {
    // What the cache has of the model is held until it is read.
    let Prepared { plan, cached: _held, .. } = prepared;
    let files = open_root(&plan.root)?.store;
    let cache = plan.cache.as_ref().map(|cache| LocalStore::new(&cache.root));
    let mut options = LoadOptions::on_host(Rank::ZERO, files.as_ref());
    options.cache = cache.as_ref().map(|cache| cache as &dyn Store);
    let (state, _) = load(&plan.resident(), &options, None)?;
    Ok((plan, state))
}
