//! The coordinator: the shell around [`Membership`]. One task owns the state; RPC handlers send it events and wait.
//!
//! Owns: the owner task, the journal of generations, the commit. Refuses to know: proto types (they are `rpc`'s).
//!
//! `CO-1`: state has one owner; everybody else sees a [`View`], a full snapshot.

mod history;
mod journal;
mod owner;
mod traces;
mod view;

pub(crate) use owner::random_secret;
pub(crate) use traces::{of_load, of_save};

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

pub use history::{CommitView, Happening, HappeningKind, History, KEPT_COMMITS, KEPT_HAPPENINGS};
pub use journal::{EndRecord, GenerationRecord, Interrupted, JobRecord, Journal, JournalError};
pub use view::{ModelView, RankView, View};

use crate::checkpoint::CheckpointError;
use crate::load::LoadReport;
use crate::membership::{Event, Refusal};
use crate::metrics::Calls;
use crate::plan::{LoadPlan, RankMemory};
use crate::tasks::Tasks;
use crate::types::{JobId, Rank, Step};

/// Events that may wait for the owner; a rank renews twice a second, so this is room for thousands of ranks.
const QUEUE: usize = 4096;

/// How long a caller waits for the owner.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// What a coordinator is started with.
#[derive(Debug)]
pub struct CoordinatorConfig {
    /// The job.
    pub record: JobRecord,
    /// How long ranks may take to join.
    pub join_deadline: Duration,
    /// Where generations are made durable.
    pub journal: Journal,
    /// Whether the end is made durable too, because the coordinator may be started again.
    pub is_restartable: bool,
    /// What a coordinator before this one has left of the job.
    pub left: Option<(Option<GenerationRecord>, Option<EndRecord>)>,
}

/// A running coordinator, as seen by those who talk to it.
#[derive(Clone, Debug)]
pub struct Coordinator {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    events: mpsc::Sender<Request>,
    views: watch::Receiver<View>,
    plan_bytes: Vec<u8>,
    job: JobId,
    incarnation: String,
    next_step: Option<Step>,
    loads: Mutex<Vec<LoadReport>>,
    history: Arc<Mutex<History>>,
    calls: Calls,
    planned: Vec<RankMemory>,
    /// Held by everybody who follows the job.
    audience: Arc<()>,
}

#[derive(Debug)]
struct Request {
    event: Event,
    answer: Option<oneshot::Sender<Result<(), Refusal>>>,
}

/// Why a coordinator does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoordinatorError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The checkpoint root cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl crate::error::Classify for CoordinatorError {
    fn kind(&self) -> crate::error::Kind {
        match self {
            Self::Journal(source) => source.kind(),
            Self::Checkpoint(source) => source.kind(),
        }
    }
}

impl Coordinator {
    /// Starts the owner task within `tasks`.
    ///
    /// # Errors
    /// [`CoordinatorError`] when the journal cannot be opened.
    pub fn start(config: CoordinatorConfig, tasks: &mut Tasks) -> Result<Self, CoordinatorError> {
        let plan_bytes = config.record.plan.encode();
        let (events, queue) = mpsc::channel(QUEUE);
        let incarnation = format!("{:x}-{}", crate::clock::unix_ns(), std::process::id());
        let next_step = config.record.checkpoint_root.as_ref().map(|_| config.record.step);
        let planned = config.record.plan.world.ranks().map(|rank| config.record.plan.memory(rank)).collect();
        let (owner, views) = owner::Owner::new(config, LoadPlan::sha256(&plan_bytes), events.clone())?;
        let history = owner.history();
        tasks.spawn("coordinator", owner.run(queue));
        let job = views.borrow().job.clone();
        Ok(Self {
            shared: Arc::new(Shared {
                events,
                views,
                plan_bytes,
                job,
                incarnation,
                next_step,
                loads: Mutex::default(),
                history,
                calls: Calls::default(),
                planned,
                audience: Arc::default(),
            }),
        })
    }

    /// Applies an event and waits for the answer.
    ///
    /// # Errors
    /// [`Refusal`]; a coordinator that is ending refuses with [`Refusal::Over`].
    pub async fn apply(&self, event: Event) -> Result<(), Refusal> {
        let (answer, answered) = oneshot::channel();
        let gone = || Refusal::Over { message: "the coordinator is ending".to_owned() };
        self.shared.events.send(Request { event, answer: Some(answer) }).await.map_err(|_| gone())?;
        match tokio::time::timeout(ANSWER_DEADLINE, answered).await {
            Ok(Ok(result)) => result,
            _ => Err(gone()),
        }
    }

    /// Tells of a rank's process that ended with failure, from a thread that may not wait. A full queue loses nothing:
    /// the lease tells the same, later.
    pub fn process_ended(&self, rank: Rank, message: String, exit_code: u8) {
        let event = Event::ProcessEnded { rank, message, exit_code };
        if self.shared.events.try_send(Request { event, answer: None }).is_err() {
            tracing::warn!(%rank, "the coordinator's queue is full; the rank's lease will tell");
        }
    }

    /// Whether the owner answers within `deadline`.
    pub async fn answers(&self, deadline: Duration) -> bool {
        // A tick more changes nothing that the next one would not.
        matches!(tokio::time::timeout(deadline, self.apply(Event::Tick)).await, Ok(Ok(())))
    }

    /// Snapshots as they change; the current one is there at once.
    #[must_use]
    pub fn views(&self) -> watch::Receiver<View> {
        self.shared.views.clone()
    }

    /// What has happened so far.
    #[must_use]
    pub fn history(&self) -> History {
        self.shared.history.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The calls that its server has answered.
    #[must_use]
    pub fn calls(&self) -> &Calls {
        &self.shared.calls
    }

    /// The memory that the plan says each rank needs.
    #[must_use]
    pub fn planned(&self) -> &[RankMemory] {
        &self.shared.planned
    }

    /// The plan's bytes.
    #[must_use]
    pub fn plan_bytes(&self) -> &[u8] {
        &self.shared.plan_bytes
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobId {
        &self.shared.job
    }

    /// This process of the coordinator.
    #[must_use]
    pub fn incarnation(&self) -> &str {
        &self.shared.incarnation
    }

    /// To be held by whoever follows the job, for as long as it does.
    #[must_use]
    pub fn follow(&self) -> Arc<()> {
        self.shared.audience.clone()
    }

    /// Whether anybody follows the job.
    #[must_use]
    pub fn is_followed(&self) -> bool {
        Arc::strong_count(&self.shared.audience) > 1
    }

    /// Keeps the figures of a rank's load for the summary; what cannot be read is passed over. A rank says them again to a
    /// coordinator that was restarted.
    pub fn record_load(&self, report_json: &str) {
        if let Ok(report) = serde_json::from_str::<LoadReport>(report_json) {
            let mut loads = self.shared.loads.lock().unwrap_or_else(PoisonError::into_inner);
            loads.retain(|known| known.rank != report.rank);
            loads.push(report);
        }
    }

    /// The figures of all ranks that have loaded, by rank.
    #[must_use]
    pub fn loads(&self) -> Vec<LoadReport> {
        let mut loads = self.shared.loads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        loads.sort_by_key(|report| report.rank);
        loads
    }

    /// The step that a checkpoint saved now would have; none when the job has no place for one.
    #[must_use]
    pub fn next_step(&self) -> Option<Step> {
        self.shared.next_step
    }
}
