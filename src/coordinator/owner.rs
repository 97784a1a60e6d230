//! The task that owns the membership (`CO-1`): it takes events one by one, applies them, publishes the view, and has effects carried
//! out. Refuses to know: how (`effects`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, watch};

use super::effects::{EffectContext, shell_failed};
use super::queue::Queue;
use super::traces::Traces;
use super::view::Changed;
use super::{
    CoordinatorConfig, CoordinatorError, CurrentJob, EndRecord, GenerationRecord, History, JobMaker, JobRecord,
    JobState, Loads, Orders, Rejected, Request, Seen, View,
};
use crate::checkpoint::{self, CheckpointError};
use crate::clock::Instant;
use crate::error::{Kind, chain};
use crate::membership::{Effect, Event, Membership, Phase, Refusal, Settings, TICK};
use crate::plan::LoadPlan;
use crate::store::open_root;
use crate::tasks::Tasks;
use crate::types::{Generation, Rank, Step};

pub(super) struct Owner {
    membership: Membership,
    /// The job that the ranks have, which others see too.
    current: Arc<Mutex<Arc<CurrentJob>>>,
    effects: Arc<EffectContext>,
    queue: Queue,
    /// Whether the work of the job at hand was seen to be done.
    is_done: bool,
    /// Whether the job at hand was taken back.
    is_cancelled: bool,
    jobs: Option<JobMaker>,
    events: mpsc::Sender<Request>,
    views: watch::Sender<View>,
    orders: watch::Sender<Arc<Orders>>,
    /// The figures of the ranks' loads, which others see too.
    loads: Loads,
    /// When the ranks turned to the job at hand.
    began: Instant,
    history: Arc<Mutex<History>>,
    traces: Traces,
    is_restartable: bool,
    /// Whether the job at hand is the next one of ranks that hold, and was not begun.
    begins: bool,
    running: Tasks,
}

impl Owner {
    pub(super) fn new(
        config: CoordinatorConfig,
        (current, loads): (Arc<Mutex<Arc<CurrentJob>>>, Loads),
        events: mpsc::Sender<Request>,
    ) -> Result<(Self, Seen), CoordinatorError> {
        let CoordinatorConfig { record, join_deadline, journal, is_restartable, left, jobs, rejoin } = config;
        let timeout = rejoin.as_ref().map(|rejoin| rejoin.timeout);
        let settings = Settings {
            world: record.plan.world,
            after_load: record.after_load,
            // A job that was made anew waits for ranks that may have to be started elsewhere.
            join_deadline: timeout.filter(|_| record.attempt > 0).unwrap_or(join_deadline),
            resumed: record.resumed,
            rejoin: timeout,
        };
        let (generation, end) = left.unwrap_or_default();
        let mut membership = Membership::new(settings, journal.last(), crate::clock::now());
        let secret = generation.as_ref().map_or_else(random_secret, |generation| generation.secret);
        let mut begins = false;
        if let Some(GenerationRecord { formed, .. }) = generation {
            begins = journal.is_before(formed.generation);
            if begins {
                membership = membership.resume_holding(formed);
            } else {
                membership = membership.resume(formed.clone(), committed_by(&record, formed.generation)?);
            }
        }
        if let Some(end) = end {
            membership = membership.ended(end.cause);
        }
        let waiting = if jobs.is_some() { journal.queued(record.number)? } else { Vec::new() };
        let queue = Queue::new(&record, waiting);
        let job = lock(&current).clone();
        let mut view = View::new(&record, secret, LoadPlan::sha256(&job.plan_bytes));
        view.jobs = queue.views().to_vec();
        view.update(&membership, Changed::All);
        let history = Arc::new(Mutex::new(History::new(&membership)));
        let orders = watch::Sender::new(Arc::new(view.orders()));
        let views = watch::Sender::new(view);
        let seen = (views.subscribe(), orders.subscribe());
        let owner = Self {
            membership,
            current,
            effects: Arc::new(EffectContext { job, journal, secret, remake: rejoin.map(|rejoin| rejoin.remake) }),
            queue,
            is_done: false,
            is_cancelled: false,
            jobs,
            events,
            views,
            orders,
            history,
            traces: Traces::default(),
            loads,
            began: crate::clock::now(),
            is_restartable,
            begins,
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
        if self.begins {
            self.begin();
        }
        loop {
            // Both branches are cancel safe: an interval and a receiver lose nothing when the other wins.
            let request = tokio::select! {
                biased;
                request = queue.recv() => match request {
                    Some(request) => request,
                    None => return,
                },
                _ = ticks.tick() => Event::Tick.into(),
            };
            match request {
                Request::Event { event, answer } => {
                    let result = self.handle(event);
                    if let Some(answer) = answer {
                        // A caller that went away needs no answer.
                        let _ = answer.send(result);
                    }
                }
                Request::Submit { record, answer } => {
                    let _ = answer.send(self.submit(*record));
                }
                Request::Cancel { number, answer } => {
                    let _ = answer.send(self.cancel(number));
                }
                Request::Remade(made) => self.remade(made),
                Request::Told { number, message } => {
                    self.queue.update(number, |job| (job.state, job.message) = (JobState::Done, message));
                    self.publish(Changed::None);
                }
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), Refusal> {
        let quiet = matches!(event, Event::Tick);
        let mut changed = match &event {
            Event::Join(info) => Changed::Rank(info.rank),
            Event::Renew { member, .. } => rank_of(member).map_or(Changed::None, Changed::Rank),
            Event::NextJob { .. } => Changed::All,
            _ => Changed::None,
        };
        crate::faults::point(event.name());
        let (before, regroups) = (self.membership.phase().name(), self.membership.regroups());
        let result = self.membership.apply(crate::clock::now(), event);
        if self.membership.regroups() != regroups {
            changed = Changed::All;
        }
        let after = self.membership.phase().name();
        if before != after {
            self.changed_phase(before, after);
            if before == Phase::Loading.name() {
                self.has_loaded();
            }
        }
        if !quiet || before != after {
            self.publish(changed);
            crate::faults::point("coordinator.announced");
        }
        let result = result.map(|effects| effects.into_iter().for_each(|effect| self.start(effect)));
        if before != after && self.membership.phase() == &Phase::Holding {
            self.job_is_done();
            self.start_next();
        }
        result
    }

    fn publish(&mut self, changed: Changed) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).look(&self.membership, crate::clock::now());
        self.traces.look(&self.effects.job.record.job, &self.membership);
        let (membership, jobs) = (&self.membership, self.queue.views());
        self.views.send_modify(|view| {
            view.update(membership, changed);
            if view.jobs != jobs {
                view.jobs = jobs.to_vec();
            }
        });
        let is_renewal = matches!(changed, Changed::Rank(_)) && self.orders.borrow().phase == *self.membership.phase();
        if !is_renewal {
            let orders = self.views.borrow().orders();
            self.orders.send_if_modified(|known| {
                let differs = **known != orders;
                if differs {
                    *known = Arc::new(orders);
                }
                differs
            });
        }
    }

    fn submit(&mut self, record: JobRecord) -> Result<(), Refusal> {
        if self.membership.is_over() || self.membership.is_draining() {
            return Err(Refusal::Over { message: "it is ending".to_owned() });
        }
        if self.queue.is_full() {
            return Err(Refusal::NotNow { phase: "busy: 64 jobs wait", request: "queue another job" });
        }
        let current = Some(&self.effects.job.record).filter(|current| {
            !self.is_done && record.checkpoint_root.is_some() && current.checkpoint_root == record.checkpoint_root
        });
        if let (Some(other), Some(root)) =
            (current.or_else(|| self.queue.with_checkpoints_of(&record)), &record.checkpoint_root)
        {
            return Err(Refusal::SameCheckpoints { directory: root.display().to_string(), number: other.number });
        }
        tracing::info!(number = record.number, job = %record.job, "job queued");
        self.queue.push(record);
        self.publish(Changed::None);
        self.start_next();
        Ok(())
    }

    fn cancel(&mut self, number: u64) -> Result<(), Refusal> {
        if self.queue.cancel(number) {
            if let Err(error) = self.effects.journal.dequeue(number) {
                tracing::error!(error = chain(&error), number, "a cancelled job is still in the journal");
            }
            self.publish(Changed::None);
            return Ok(());
        }
        if number != self.effects.job.record.number {
            return Err(Refusal::NoSuchJob { number });
        }
        self.handle(Event::StopRequested)?;
        self.is_cancelled = true;
        Ok(())
    }

    fn has_loaded(&mut self) {
        let seconds = self.began.elapsed().as_secs_f64();
        let loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = loads.iter().map(|load| load.storage_bytes).sum();
        drop(loads);
        self.queue.update(self.effects.job.record.number, |job| {
            (job.load_seconds, job.storage_bytes) = (Some(seconds), bytes);
        });
    }

    /// The work of the job at hand is done, and its ranks hold.
    fn job_is_done(&mut self) {
        if self.is_done {
            return;
        }
        self.is_done = true;
        let state = if self.is_cancelled { JobState::Cancelled } else { JobState::Done };
        let last_checkpoint = self.membership.last_checkpoint().map(str::to_owned);
        // What was only loaded is there to be held; a run is done when its output is written, too.
        let trains = self.effects.job.record.plan.train.is_some();
        let has_output = trains && state == JobState::Done && self.jobs.is_some();
        let state = if trains && !has_output { state } else { JobState::Running };
        self.queue.update(self.effects.job.record.number, |job| {
            (job.state, job.last_checkpoint) = (state, last_checkpoint);
        });
        self.publish(Changed::None);
        if let Some(jobs) = self.jobs.clone().filter(|_| has_output) {
            let (job, events) = (self.effects.job.clone(), self.events.clone());
            self.running.spawn("output", async move {
                let number = job.record.number;
                let message = crate::tasks::blocking(move || (jobs.finish)(&job.record)).await;
                let _ = events.send(Request::Told { number, message: message.unwrap_or_default() }).await;
            });
        }
    }

    /// Begins the next job of the queue when the ranks hold.
    fn start_next(&mut self) {
        if self.membership.phase() != &Phase::Holding || self.membership.is_draining() {
            return;
        }
        let Some(record) = self.queue.next() else { return };
        let before = &self.effects.job.record;
        if before.plan.train.is_none() {
            self.queue.update(before.number, |job| job.state = JobState::Done);
        }
        // On this thread, because a coordinator that is started again must know which job its ranks have.
        if let Err(error) = self.effects.journal.succeed(&record, self.membership.generation().next()) {
            let event = shell_failed(&error);
            // An abort is never refused.
            let _ = self.handle(event);
            return;
        }
        tracing::info!(number = record.number, job = %record.job, "next job");
        (self.is_done, self.is_cancelled) = (false, false);
        self.turn_to(record, self.effects.secret);
        self.begin();
    }

    /// The ranks are to have this job from now on.
    fn turn_to(&mut self, record: JobRecord, secret: [u8; 32]) {
        let job = CurrentJob::new(record);
        let sha256 = LoadPlan::sha256(&job.plan_bytes);
        *lock(&self.current) = job.clone();
        let (journal, remake) = (self.effects.journal.clone(), self.effects.remake.clone());
        self.effects = Arc::new(EffectContext { job: job.clone(), journal, secret, remake });
        self.began = crate::clock::now();
        self.loads.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.views.send_modify(|view| {
            view.begin(&job.record, sha256);
            view.secret = secret;
        });
    }

    /// The job was made anew after ranks were lost. It has a secret of its own, so that a rank of the generation before cannot
    /// talk to this one's.
    fn remade(&mut self, made: Result<Box<JobRecord>, Rejected>) {
        let event = match made {
            Ok(record) => match self.effects.journal.succeed(&record, self.membership.generation().next()) {
                Ok(()) => {
                    let JobRecord { after_load, resumed, step, attempt, .. } = *record;
                    tracing::info!(attempt, %step, resumed, "the job waits for its ranks");
                    self.turn_to(*record, random_secret());
                    Event::JobRemade { after_load, resumed }
                }
                Err(error) => shell_failed(&error),
            },
            Err(error) => shell_failed(&error),
        };
        if let Err(refusal) = self.handle(event) {
            tracing::error!(error = chain(&refusal), "the job could not be taken up again");
        }
    }

    /// Has the ranks that hold begin the job at hand.
    fn begin(&mut self) {
        let JobRecord { after_load, resumed, .. } = self.effects.job.record;
        if let Err(refusal) = self.handle(Event::NextJob { after_load, resumed }) {
            tracing::error!(error = chain(&refusal), "the next job could not begin");
        }
    }

    fn changed_phase(&mut self, before: &str, after: &str) {
        let generation = self.membership.generation();
        let cause = match self.membership.phase() {
            Phase::Aborted(cause) => {
                let message = cause.message.clone();
                self.queue.update(self.effects.job.record.number, |job| {
                    (job.state, job.message) = (JobState::Failed, message);
                });
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
            let request = carried_out.unwrap_or_else(|error| {
                let message = format!("the coordinator failed: {error}");
                Event::ShellFailed { message, exit_code: Kind::Internal.exit_code() }.into()
            });
            // The owner is gone only when the job is.
            let _ = events.send(request).await;
        });
    }
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

/// The rank of a member, by its id (`Membership::join`).
fn rank_of(member: &str) -> Option<Rank> {
    member.split_once('-')?.0.parse().ok().map(Rank)
}

fn lock(current: &Mutex<Arc<CurrentJob>>) -> MutexGuard<'_, Arc<CurrentJob>> {
    current.lock().unwrap_or_else(PoisonError::into_inner)
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
