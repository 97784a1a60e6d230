//! The task that owns the membership (`CO-1`): it takes events one by one, applies them, publishes the view, and carries
//! out effects off the async threads.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::{CoordinatorConfig, Journal, Request, View};
use crate::checkpoint;
use crate::error::{Classify, chain};
use crate::manifest::{SealRequest, ShardReceipt};
use crate::membership::{Effect, Event, Membership, Phase, Save, Settings, TICK};
use crate::plan::LoadPlan;
use crate::store::LocalStore;
use crate::tasks::{Tasks, blocking};
use crate::types::{Generation, Step};

pub(super) struct Owner {
    membership: Membership,
    effects: Arc<EffectContext>,
    events: mpsc::Sender<Request>,
    views: watch::Sender<View>,
    secret: [u8; 32],
    running: Tasks,
}

/// What effects need.
struct EffectContext {
    plan: LoadPlan,
    journal: Journal,
    checkpoint_root: Option<PathBuf>,
}

impl Owner {
    pub(super) fn new(
        settings: Settings,
        config: CoordinatorConfig,
        journal: Journal,
        plan_sha256: [u8; 32],
        events: mpsc::Sender<Request>,
    ) -> (Self, watch::Receiver<View>) {
        let membership = Membership::new(settings, journal.last(), crate::clock::now());
        let mut view = View {
            job: config.job,
            model: config.plan.model.clone(),
            generation: membership.generation(),
            phase: Phase::Forming,
            peers: Vec::new(),
            secret: [0; 32],
            nccl_unique_id: Vec::new(),
            plan_sha256,
            ranks: Vec::new(),
            last_checkpoint: None,
        };
        view.update(&membership, [0; 32]);
        let (views, seen) = watch::channel(view);
        let effects = EffectContext { plan: config.plan, journal, checkpoint_root: config.checkpoint_root };
        let secret = random_secret();
        let owner = Self { membership, effects: Arc::new(effects), events, views, secret, running: Tasks::new() };
        (owner, seen)
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
        let before = self.membership.phase().name();
        let result = self.membership.apply(crate::clock::now(), event);
        let after = self.membership.phase().name();
        if before != after {
            let generation = self.membership.generation();
            match self.membership.phase() {
                Phase::Aborted(cause) => {
                    tracing::error!(%generation, rank = ?cause.rank.map(|rank| rank.0), cause = cause.message, "job aborted");
                }
                _ => tracing::info!(%generation, from = before, to = after, "job changed phase"),
            }
        }
        if !quiet || before != after {
            let (membership, secret) = (&self.membership, self.secret);
            self.views.send_modify(|view| view.update(membership, secret));
        }
        let result = result.map(|effects| effects.into_iter().for_each(|effect| self.start(effect)));
        if let Some(answer) = answer {
            // A caller that went away needs no answer.
            let _ = answer.send(result);
        }
    }

    fn start(&mut self, effect: Effect) {
        let (context, events) = (self.effects.clone(), self.events.clone());
        self.running.spawn("effect", async move {
            let event = blocking(move || context.carry_out(effect)).await;
            // The owner is gone only when the job is.
            let _ = events.send(Request { event, answer: None }).await;
        });
    }
}

impl EffectContext {
    fn carry_out(&self, effect: Effect) -> Event {
        match effect {
            Effect::PersistGeneration(generation) => match self.journal.persist(generation) {
                Ok(()) => Event::GenerationDurable(generation),
                Err(error) => shell_failed(&error),
            },
            Effect::BeginSave(step) => self.begin(step),
            Effect::Commit { save, receipts, generation } => self.commit(&save, receipts, generation),
        }
    }

    fn begin(&self, step: Step) -> Event {
        let Some(store) = self.store() else {
            let message = "the job has no checkpoint directory".to_owned();
            return Event::ShellFailed { message, exit_code: crate::error::Kind::Conflict.exit_code() };
        };
        match checkpoint::begin(&store, step) {
            Ok((attempt, directory)) => Event::SaveBegun { attempt, directory },
            Err(error) => shell_failed(&error),
        }
    }

    fn commit(&self, save: &Save, receipts: Vec<ShardReceipt>, generation: Generation) -> Event {
        let Some(store) = self.store() else {
            let message = "the job has no checkpoint directory".to_owned();
            return Event::ShellFailed { message, exit_code: crate::error::Kind::Conflict.exit_code() };
        };
        let request = SealRequest { plan: &self.plan, step: save.step, attempt: save.attempt, generation };
        match checkpoint::commit(&store, &request, receipts) {
            Ok(directory) => {
                tracing::info!(step = %save.step, attempt = %save.attempt, directory, "checkpoint committed");
                Event::Committed { directory }
            }
            Err(error) => shell_failed(&error),
        }
    }

    fn store(&self) -> Option<LocalStore> {
        self.checkpoint_root.as_ref().map(LocalStore::new)
    }
}

fn shell_failed<E: Classify + 'static>(error: &E) -> Event {
    Event::ShellFailed { message: chain(error), exit_code: error.kind().exit_code() }
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
