//! The task that owns the membership (`CO-1`): it takes events one by one, applies them, publishes the view, and carries
//! out effects off the async threads.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};

use super::traces::{Traces, of_save};
use super::{CoordinatorConfig, EndRecord, GenerationRecord, History, JobRecord, Journal, ModelView, Request, View};
use crate::checkpoint::{self, CheckpointError, Delete};
use crate::error::{Classify, Kind, chain};
use crate::manifest::{SealRequest, ShardReceipt};
use crate::membership::{Effect, Event, Membership, Phase, Save, Settings, TICK};
use crate::plan::LoadPlan;
use crate::store::{Store, StoreError, open_root};
use crate::tasks::Tasks;
use crate::telemetry::TraceSpan;
use crate::train::{Policy, Recipe, keeps};
use crate::types::{Generation, JobId, Step};

pub(super) struct Owner {
    membership: Membership,
    effects: Arc<EffectContext>,
    events: mpsc::Sender<Request>,
    views: watch::Sender<View>,
    history: Arc<Mutex<History>>,
    traces: Traces,
    is_restartable: bool,
    running: Tasks,
}

/// What effects need.
struct EffectContext {
    job: JobId,
    plan: LoadPlan,
    journal: Journal,
    secret: [u8; 32],
    checkpoint_root: Option<PathBuf>,
}

impl Owner {
    pub(super) fn new(
        config: CoordinatorConfig,
        plan_sha256: [u8; 32],
        events: mpsc::Sender<Request>,
    ) -> Result<(Self, watch::Receiver<View>), CheckpointError> {
        let CoordinatorConfig { record, join_deadline, journal, is_restartable, left } = config;
        let settings = Settings {
            world: record.plan.world,
            after_load: record.after_load,
            join_deadline,
            resumed: record.resumed,
        };
        let (generation, end) = left.unwrap_or_default();
        let mut membership = Membership::new(settings, journal.last(), crate::clock::now());
        let secret = generation.as_ref().map_or_else(random_secret, |generation| generation.secret);
        if let Some(GenerationRecord { formed, .. }) = generation {
            let committed = committed_by(&record, formed.generation)?;
            membership = membership.resume(formed, committed);
        }
        if let Some(end) = end {
            membership = membership.ended(end.cause);
        }
        let mut view = View {
            job: record.job,
            model: record.plan.model.clone(),
            models: ModelView::of(&record.plan),
            generation: membership.generation(),
            phase: Phase::Forming,
            peers: Vec::new(),
            secret,
            nccl_unique_id: Vec::new(),
            plan_sha256,
            ranks: Vec::new(),
            last_checkpoint: None,
            checkpoint_root: record.checkpoint_root.clone(),
            is_training: false,
            is_draining: false,
            committed_step: None,
            save_request: 0,
            save_answered: None,
        };
        view.update(&membership);
        let view_job = view.job.clone();
        let (views, seen) = watch::channel(view);
        let effects = EffectContext {
            job: view_job,
            plan: record.plan,
            journal,
            secret,
            checkpoint_root: record.checkpoint_root,
        };
        let history = Arc::new(Mutex::new(History::new(&membership)));
        let owner = Self {
            membership,
            history,
            traces: Traces::default(),
            effects: Arc::new(effects),
            events,
            views,
            is_restartable,
            running: Tasks::new(),
        };
        Ok((owner, seen))
    }

    pub(super) fn history(&self) -> Arc<Mutex<History>> {
        self.history.clone()
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Both branches are cancel safe: an interval and a receiver lose nothing when the other wins.
            let request = tokio::select! {
                biased;
                request = queue.recv() => match request {
                    Some(request) => request,
                    None => return,
                },
                _ = ticks.tick() => Request { event: Event::Tick, answer: None },
            };
            self.handle(request);
        }
    }

    fn handle(&mut self, Request { event, answer }: Request) {
        let quiet = matches!(event, Event::Tick);
        crate::faults::point(event.name());
        let before = self.membership.phase().name();
        let result = self.membership.apply(crate::clock::now(), event);
        let after = self.membership.phase().name();
        if before != after {
            self.changed_phase(before, after);
        }
        if !quiet || before != after {
            let membership = &self.membership;
            self.history.lock().unwrap_or_else(PoisonError::into_inner).look(membership, crate::clock::now());
            self.traces.look(&self.effects.job, membership);
            self.views.send_modify(|view| view.update(membership));
            crate::faults::point("coordinator.announced");
        }
        let result = result.map(|effects| effects.into_iter().for_each(|effect| self.start(effect)));
        if let Some(answer) = answer {
            // A caller that went away needs no answer.
            let _ = answer.send(result);
        }
    }

    fn changed_phase(&self, before: &str, after: &str) {
        let generation = self.membership.generation();
        let cause = match self.membership.phase() {
            Phase::Aborted(cause) => {
                let rank = cause.rank.map(|rank| rank.0);
                tracing::error!(%generation, ?rank, cause = cause.message, "job aborted");
                Some(cause.clone())
            }
            _ => {
                tracing::info!(%generation, from = before, to = after, "job changed phase");
                None
            }
        };
        if self.is_restartable && self.membership.is_over() {
            // On this thread, because nothing may be announced before: a coordinator that is started again must not take
            // ranks that have gone for ranks that are silent.
            if let Err(error) = self.effects.journal.end(&EndRecord { cause }) {
                tracing::error!(error = chain(&error), "the end of the job could not be made durable");
            }
        }
    }

    fn start(&mut self, effect: Effect) {
        let (context, events) = (self.effects.clone(), self.events.clone());
        self.running.spawn("effect", async move {
            let carried_out = tokio::task::spawn_blocking(move || context.carry_out(effect)).await;
            // A job must not wait for an effect that panicked.
            let event = carried_out.unwrap_or_else(|error| Event::ShellFailed {
                message: format!("the coordinator failed: {error}"),
                exit_code: Kind::Internal.exit_code(),
            });
            // The owner is gone only when the job is.
            let _ = events.send(Request { event, answer: None }).await;
        });
    }
}

impl EffectContext {
    fn carry_out(&self, effect: Effect) -> Event {
        match effect {
            Effect::PersistGeneration(formed) => {
                let generation = formed.generation;
                match self.journal.persist(&GenerationRecord { formed, secret: self.secret }) {
                    Ok(()) => Event::GenerationDurable(generation),
                    Err(error) => shell_failed(&error),
                }
            }
            Effect::BeginSave(step) => self.begin(step),
            Effect::Commit { save, receipts, generation } => self.commit(&save, receipts, generation),
        }
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
        let plan = self.plan.train.as_ref().map_or(&self.plan, |train| &train.state);
        let request = SealRequest { plan, step: save.step, attempt: save.attempt, generation };
        let training = receipts.iter().find_map(|receipt| receipt.training.as_ref());
        let best = training.and_then(|training| training.best).map(|best| best.step);
        let traceparent = of_save(&self.job, generation, save).traceparent();
        let mut span = TraceSpan::child(&traceparent, "commit checkpoint");
        match checkpoint::commit(store.as_ref(), &request, receipts) {
            Ok(directory) => {
                tracing::info!(step = %save.step, attempt = %save.attempt, directory, "checkpoint committed");
                if let Some(train) = &self.plan.train {
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
        let Some(root) = &self.checkpoint_root else {
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

fn shell_failed<E: Classify + 'static>(error: &E) -> Event {
    Event::ShellFailed { message: chain(error), exit_code: error.kind().exit_code() }
}

/// The newest checkpoint that this generation has committed, if it has.
fn committed_by(record: &JobRecord, generation: Generation) -> Result<Option<(Step, String)>, CheckpointError> {
    let Some(root) = &record.checkpoint_root else { return Ok(None) };
    let listed = checkpoint::list(open_root(root)?.store.as_ref())?.into_iter().rev();
    let mut own = listed
        .filter(|listed| listed.step >= record.step)
        .filter_map(|listed| listed.checkpoint.ok())
        .filter(|found| found.manifest.generation == generation);
    Ok(own.next().map(|found| (found.manifest.step, found.directory)))
}

/// 32 bytes from the operating system.
pub(crate) fn random_secret() -> [u8; 32] {
    let mut secret = [0; 32];
    let mut filled = 0;
    while let Some(rest) = secret.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("the operating system gives no random bytes: {errno}"),
        }
    }
    secret
}
