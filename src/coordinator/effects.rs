//! Effects: what the membership asks of its shell, carried out off the async threads.
//!
//! Owns: making generations durable, attempts at checkpoints and their commits, making a job anew. Refuses to know: when.

use std::sync::Arc;

use super::traces::of_save;
use super::{CurrentJob, GenerationRecord, JobRecord, Journal, Rejected, RemakeJob, Request};
use crate::checkpoint::{self, Delete};
use crate::error::{Classify, Kind, chain};
use crate::manifest::{SealRequest, ShardReceipt};
use crate::membership::{Effect, Event, Save};
use crate::store::{Store, StoreError, open_root};
use crate::telemetry::TraceSpan;
use crate::train::{Policy, Recipe, keeps};
use crate::types::{Generation, Step};

/// What effects need.
pub(super) struct EffectContext {
    pub(super) job: Arc<CurrentJob>,
    pub(super) journal: Journal,
    pub(super) secret: [u8; 32],
    pub(super) remake: Option<RemakeJob>,
}

impl EffectContext {
    pub(super) fn carry_out(&self, effect: Effect) -> Request {
        let event = match effect {
            Effect::PersistGeneration(formed) => {
                let generation = formed.generation;
                match self.journal.persist(&GenerationRecord { formed, secret: self.secret }) {
                    Ok(()) => Event::GenerationDurable(generation),
                    Err(error) => shell_failed(&error),
                }
            }
            Effect::BeginSave(step) => self.begin(step),
            Effect::Commit { save, receipts, generation } => self.commit(&save, receipts, generation),
            Effect::RemakeJob { committed } => return Request::Remade(self.make_anew(committed)),
        };
        event.into()
    }

    fn make_anew(&self, committed: bool) -> Result<Box<JobRecord>, Rejected> {
        let record = &self.job.record;
        let conflict = || Rejected { message: "the job cannot be made anew".to_owned(), kind: Kind::Internal };
        let remake = self.remake.as_ref().ok_or_else(conflict)?;
        let made = remake(record, committed || (record.attempt > 0 && record.resumed))?;
        let (number, attempt, text) = (record.number, record.attempt + 1, record.text.clone());
        Ok(Box::new(JobRecord { number, attempt, text, job: record.job.clone(), ..made }))
    }

    fn begin(&self, step: Step) -> Event {
        let store = match self.store() {
            Ok(store) => store,
            Err(event) => return event,
        };
        match checkpoint::begin(store.as_ref(), step) {
            Ok((attempt, directory)) => Event::SaveBegun { attempt, directory },
            Err(error) => shell_failed(&error),
        }
    }

    fn commit(&self, save: &Save, receipts: Vec<ShardReceipt>, generation: Generation) -> Event {
        let store = match self.store() {
            Ok(store) => store,
            Err(event) => return event,
        };
        // A training run saves its state; the base is named by its digest.
        let own = &self.job.record.plan;
        let plan = own.train.as_ref().map_or(own, |train| &train.state);
        let request = SealRequest { plan, step: save.step, attempt: save.attempt, generation };
        let training = receipts.iter().find_map(|receipt| receipt.training.as_ref());
        let best = training.and_then(|training| training.best).map(|best| best.step);
        let traceparent = of_save(&self.job.record.job, generation, save).traceparent();
        let mut span = TraceSpan::child(&traceparent, "commit checkpoint");
        match checkpoint::commit(store.as_ref(), &request, receipts) {
            Ok(directory) => {
                tracing::info!(step = %save.step, attempt = %save.attempt, directory, "checkpoint committed");
                if let Some(train) = &own.train {
                    retain(store.as_ref(), &train.recipe, best);
                }
                Event::Committed { directory }
            }
            Err(error) => {
                span.fail(&chain(&error));
                shell_failed(&error)
            }
        }
    }

    /// Where checkpoints go, or why there is no such place.
    fn store(&self) -> Result<Arc<dyn Store>, Event> {
        let Some(root) = &self.job.record.checkpoint_root else {
            let message = "the job has no checkpoint directory".to_owned();
            return Err(Event::ShellFailed { message, exit_code: Kind::Conflict.exit_code() });
        };
        open_root(root).map(|root| root.store).map_err(|error: StoreError| shell_failed(&error))
    }
}

/// Deletes the checkpoints that the run's recipe lets go. A failure is no reason to end the run.
fn retain(store: &dyn Store, recipe: &serde_json::Value, best: Option<Step>) {
    let Ok(recipe) = serde_json::from_value::<Recipe>(recipe.clone()) else { return };
    let policy = Policy::new(&recipe.checkpoint, best);
    let retained = checkpoint::retain(store, Delete::Now, |steps, step| keeps(policy, steps, step));
    match retained {
        Ok(pruned) if pruned.deleted.is_empty() => {}
        Ok(pruned) => tracing::info!(deleted = pruned.deleted.join(", "), "old checkpoints"),
        Err(error) => tracing::warn!(error = chain(&error), "old checkpoints could not be deleted"),
    }
}

pub(super) fn shell_failed<E: Classify + 'static>(error: &E) -> Event {
    Event::ShellFailed { message: chain(error), exit_code: error.kind().exit_code() }
}
