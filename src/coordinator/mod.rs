//! The coordinator: the shell around [`Membership`]. One task owns the state; RPC handlers send it events and wait.
//!
//! Owns: the owner task, the journal of generations, the commit. Refuses to know: proto types (they are `rpc`'s).
//!
//! `CO-1`: state has one owner; everybody else sees a [`View`], a full snapshot.

mod effects;
mod history;
mod journal;
mod lines;
mod owner;
mod queue;
mod traces;
mod view;

pub(crate) use owner::random_secret;
pub(crate) use traces::{of_load, of_save};

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

pub use history::{CommitView, Happening, HappeningKind, History, KEPT_COMMITS, KEPT_HAPPENINGS};
pub use journal::{EndRecord, GenerationRecord, Interrupted, JobRecord, Journal, JournalError};
pub use lines::{
    LINE_OVERHEAD_BYTES, Line, LineChoice, LineReader, LineSource, LineStream, Lines, MAX_LINE_BYTES, Read,
    TooManyReaders, cut, unix_ns,
};
pub use queue::{JobState, JobView, MAX_QUEUED};
pub use view::{ModelView, Orders, RankView, View};

use crate::checkpoint::CheckpointError;
use crate::error::Kind;
use crate::load::LoadReport;
use crate::membership::{Event, Refusal};
use crate::metrics::Calls;
use crate::plan::{LoadPlan, RankMemory};
use crate::tasks::Tasks;
use crate::types::{Rank, Step};

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
    /// What can be done with more jobs than this one, for ranks that stay.
    pub jobs: Option<JobMaker>,
    /// How ranks that are lost may come back; without it the job ends when one is lost.
    pub rejoin: Option<Rejoin>,
}

/// How ranks that are lost may come back.
#[derive(Clone)]
pub struct Rejoin {
    /// How long the job waits for them.
    pub timeout: Duration,
    /// Makes the job anew; the flag says that it goes on from its checkpoints whatever its file says. The call takes as long as it
    /// takes.
    pub remake: RemakeJob,
}

/// As [`Rejoin::remake`].
pub type RemakeJob = Arc<dyn Fn(&JobRecord, bool) -> Result<JobRecord, Rejected> + Send + Sync>;

impl std::fmt::Debug for Rejoin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rejoin({:?})", self.timeout)
    }
}

/// How jobs are made of their files, and what is left to do when one is done. The calls take as long as they take.
#[derive(Clone)]
pub struct JobMaker {
    /// Makes the job of the text of a job file, whose relative paths start from the directory, for ranks that hold so many
    /// bytes on this host.
    pub make: MakeJob,
    /// Writes what a job that is done has as its output, and says what that is.
    pub finish: FinishJob,
}

/// As [`JobMaker::make`].
pub type MakeJob = Arc<dyn Fn(&JobText, &LoadPlan) -> Result<JobRecord, Rejected> + Send + Sync>;
/// As [`JobMaker::finish`].
pub type FinishJob = Arc<dyn Fn(&JobRecord) -> Option<String> + Send + Sync>;

impl std::fmt::Debug for JobMaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JobMaker")
    }
}

/// A job file that was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobText {
    /// Its text.
    pub text: String,
    /// Where its relative paths start.
    pub directory: PathBuf,
}

/// A job that cannot be queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Rejected {
    /// Why not.
    pub message: String,
    /// The kind of the error.
    pub kind: Kind,
}

impl crate::error::Classify for Rejected {
    fn kind(&self) -> Kind {
        self.kind
    }
}

impl Rejected {
    /// What an error says.
    #[must_use]
    pub fn from_error<E: crate::error::Classify + 'static>(error: &E) -> Self {
        Self { message: crate::error::chain(error), kind: error.kind() }
    }
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
    orders: watch::Receiver<Arc<Orders>>,
    current: Arc<Mutex<Arc<CurrentJob>>>,
    incarnation: String,
    journal: Journal,
    jobs: Option<JobMaker>,
    /// The number of the job that was queued last.
    numbers: tokio::sync::Mutex<u64>,
    loads: Loads,
    history: Arc<Mutex<History>>,
    lines: Lines,
    calls: Calls,
    /// How long ranks that are lost may take to come back.
    rejoin: Option<Duration>,
    /// Held by everybody who follows the job.
    audience: Arc<()>,
}

/// The job that the ranks have.
#[derive(Debug)]
struct CurrentJob {
    record: JobRecord,
    plan_bytes: Vec<u8>,
    /// The memory that the plan says each rank needs.
    planned: Vec<RankMemory>,
}

impl CurrentJob {
    fn new(record: JobRecord) -> Arc<Self> {
        let plan_bytes = record.plan.encode();
        let planned = record.plan.world.ranks().map(|rank| record.plan.memory(rank)).collect();
        Arc::new(Self { record, plan_bytes, planned })
    }
}

/// What others see.
type Seen = (watch::Receiver<View>, watch::Receiver<Arc<Orders>>);
/// The figures of the ranks' loads.
type Loads = Arc<Mutex<Vec<LoadReport>>>;

type Answer<T> = oneshot::Sender<T>;

#[derive(Debug)]
enum Request {
    Event {
        event: Event,
        answer: Option<Answer<Result<(), Refusal>>>,
    },
    Submit {
        record: Box<JobRecord>,
        answer: Answer<Result<(), Refusal>>,
    },
    Cancel {
        number: u64,
        answer: Answer<Result<(), Refusal>>,
    },
    /// The job was made anew, or could not be.
    Remade(Result<Box<JobRecord>, Rejected>),
    /// A job's output is written, or could not be: what there is to say of it.
    Told {
        number: u64,
        message: String,
    },
}

impl From<Event> for Request {
    fn from(event: Event) -> Self {
        Self::Event { event, answer: None }
    }
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
        let (events, queue) = mpsc::channel(QUEUE);
        let incarnation = format!("{:x}-{}", crate::clock::unix_ns(), std::process::id());
        let (journal, jobs) = (config.journal.clone(), config.jobs.clone());
        let rejoin = config.rejoin.as_ref().map(|rejoin| rejoin.timeout);
        let current = Arc::new(Mutex::new(CurrentJob::new(config.record.clone())));
        let (loads, lines) = (Loads::default(), Lines::new(config.record.plan.world));
        let (owner, (views, orders)) = owner::Owner::new(config, (current.clone(), loads.clone()), events.clone())?;
        let last = views.borrow().jobs.iter().map(|job| job.number).max().unwrap_or(0);
        let history = owner.history();
        tasks.spawn("coordinator", owner.run(queue));
        Ok(Self {
            shared: Arc::new(Shared {
                events,
                views,
                orders,
                current,
                incarnation,
                journal,
                jobs,
                numbers: tokio::sync::Mutex::new(last),
                loads,
                history,
                lines,
                calls: Calls::default(),
                rejoin,
                audience: Arc::default(),
            }),
        })
    }

    /// Applies an event and waits for the answer.
    ///
    /// # Errors
    /// [`Refusal`]; a coordinator that is ending refuses with [`Refusal::Over`].
    pub async fn apply(&self, event: Event) -> Result<(), Refusal> {
        self.ask(|answer| Request::Event { event, answer: Some(answer) }).await
    }

    async fn ask(&self, request: impl FnOnce(Answer<Result<(), Refusal>>) -> Request) -> Result<(), Refusal> {
        let (answer, answered) = oneshot::channel();
        let gone = || Refusal::Over { message: "the coordinator is ending".to_owned() };
        self.shared.events.send(request(answer)).await.map_err(|_| gone())?;
        match tokio::time::timeout(ANSWER_DEADLINE, answered).await {
            Ok(Ok(result)) => result,
            _ => Err(gone()),
        }
    }

    fn current(&self) -> Arc<CurrentJob> {
        self.shared.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Queues a job for the ranks, and gives its number. It is durable then.
    ///
    /// # Errors
    /// [`Rejected`] with the reason.
    pub async fn submit(&self, text: JobText) -> Result<u64, Rejected> {
        let conflict = |message: &str| Rejected { message: message.to_owned(), kind: Kind::Conflict };
        let maker = self.shared.jobs.clone();
        let maker = maker.ok_or_else(|| {
            conflict("the ranks end when their job is done: start it with hold = true in [job] to give them more")
        })?;
        let current = self.current();
        let (make, sent) = (maker.make.clone(), text.clone());
        let made = crate::tasks::blocking(move || make(&sent, &current.record.plan)).await;
        let mut record = JobRecord { text: Some(text), ..made? };
        let world = self.current().record.plan.world;
        if record.plan.world != world {
            return Err(conflict("the job is for another number of ranks"));
        }
        // One at a time, so that numbers are in the order of the queue.
        let mut last = self.shared.numbers.lock().await;
        record.number = *last + 1;
        let (journal, saved) = (self.shared.journal.clone(), record.clone());
        let enqueued = crate::tasks::blocking(move || journal.enqueue(&saved)).await;
        enqueued.map_err(|error| Rejected::from_error(&error))?;
        *last = record.number;
        let number = record.number;
        let asked = self.ask(|answer| Request::Submit { record: Box::new(record), answer }).await;
        if let Err(refusal) = asked {
            let journal = self.shared.journal.clone();
            let _ = crate::tasks::blocking(move || journal.dequeue(number)).await;
            return Err(Rejected::from_error(&refusal));
        }
        Ok(number)
    }

    /// Takes a job out of the queue, or has the ranks end the one that they train.
    ///
    /// # Errors
    /// [`Refusal`].
    pub async fn cancel(&self, number: u64) -> Result<(), Refusal> {
        self.ask(|answer| Request::Cancel { number, answer }).await
    }

    /// Tells of a rank's process that ended with failure, from a thread that may not wait. A full queue loses nothing:
    /// the lease tells the same, later.
    pub fn process_ended(&self, rank: Rank, message: String, exit_code: u8) {
        let event = Event::ProcessEnded { rank, process_id: 0, returns: false, message, exit_code };
        if self.shared.events.try_send(event.into()).is_err() {
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

    /// The lines that its ranks have written.
    #[must_use]
    pub fn lines(&self) -> &Lines {
        &self.shared.lines
    }

    /// The calls that its server has answered.
    #[must_use]
    pub fn calls(&self) -> &Calls {
        &self.shared.calls
    }

    /// The memory that the plan says each rank needs.
    #[must_use]
    pub fn planned(&self) -> Vec<RankMemory> {
        self.current().planned.clone()
    }

    /// What ranks act on, as it changes; the current one is there at once.
    #[must_use]
    pub fn orders(&self) -> watch::Receiver<Arc<Orders>> {
        self.shared.orders.clone()
    }

    /// The bytes of the plan in parts of at most `bytes`.
    pub fn plan_parts(&self, bytes: usize) -> impl Iterator<Item = Vec<u8>> + Send + use<> {
        let current = self.current();
        let count = current.plan_bytes.len().div_ceil(bytes);
        (0..count).filter_map(move |index| Some(current.plan_bytes.chunks(bytes).nth(index)?.to_vec()))
    }

    /// How long ranks that are lost may take to come back; none where the job ends when one is lost.
    #[must_use]
    pub fn rejoin_timeout(&self) -> Option<Duration> {
        self.shared.rejoin
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

    /// Keeps the figures of a rank's load for the summary; what cannot be read, or is another rank's, is passed over. A rank says them again to a
    /// coordinator that was restarted.
    pub fn record_load(&self, rank: Rank, report_json: &str) {
        if let Ok(report) = serde_json::from_str::<LoadReport>(report_json)
            && report.rank == rank
        {
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
        let current = self.current();
        current.record.checkpoint_root.as_ref().map(|_| current.record.step)
    }
}
