//! `weightcast coordinator`: a coordinator that is a process of its own, and may be started again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::launch::{Audience, JOIN_DEADLINE, absolute_files, job_record, write_output};
use super::model_export::ModelExportError;
use super::observe::{ObservePlaces, Observers};
use super::prepare::{PrepareError, Prepared};
use super::queue::{self, RanksAre, Resumes, job_maker};
use super::running::{RunFile, RunFileError};
use super::train_output::{OutputPlace, RunOutput};
use crate::cache::CacheClaim;
use crate::config::JobConfig;
use crate::coordinator::{
    Coordinator, CoordinatorConfig, CoordinatorError, Interrupted, JobRecord, Journal, JournalError, Rejected, Rejoin,
    View,
};
use crate::error::{Classify, Kind};
use crate::load::LoadReport;
use crate::membership::Event;
use crate::rpc::{Access, Listener, Security, ServeError, Token, TokenError, serve};
use crate::store::absolute;
use crate::tasks::{Tasks, blocking, survive_file_size_limit};
use crate::tls::{Tls, TlsError, TlsFiles};

/// How long those who follow the job may take to hear of its end.
const FAREWELL: Duration = Duration::from_secs(3);
/// How often is looked whether they have.
const FAREWELL_TICK: Duration = Duration::from_millis(20);

/// Where a coordinator works.
#[derive(Clone, Debug)]
pub struct CoordinatorPlace {
    /// Where to listen; after a restart, port 0 stands for the port of before, which the ranks know.
    pub listen: SocketAddr,
    /// Whether other hosts may talk to it without encryption.
    pub is_insecure: bool,
    /// The directory of its journal.
    pub state_directory: PathBuf,
    /// The job's token; made in the state directory when absent.
    pub token_file: Option<PathBuf>,
    /// The token of those who command the job, if it is not the ranks'.
    pub control_token_file: Option<PathBuf>,
    /// The certificates of calls, if they are to be encrypted.
    pub tls: Option<TlsFiles>,
    /// Where it lets itself be looked at.
    pub observe: ObservePlaces,
    /// How long the job waits for ranks that it lost; zero ends it when it loses one.
    pub rejoin: Duration,
}

/// How a job of its own coordinator ended.
#[derive(Debug)]
pub struct Coordinated {
    /// The last snapshot.
    pub view: View,
    /// The figures of the ranks' loads.
    pub loads: Vec<LoadReport>,
    /// Whether a signal asked for the end.
    pub preempted: bool,
    /// What became of the model directory that a run which is done has as its output.
    pub output: Option<Result<RunOutput, ModelExportError>>,
}

/// Why a coordinator cannot work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoordinateError {
    /// The job.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The port.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The file that tells of a running job.
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    /// Something of this host.
    #[error("handling signals: {source}")]
    Signals {
        /// The system's error.
        source: std::io::Error,
    },
    /// Other users could read the job's secrets.
    #[error("state directory {path}: expected mode 700, because it holds the job's secrets, found {found:o}")]
    Readable {
        /// The directory.
        path: String,
        /// Its mode.
        found: u32,
    },
    /// The job has no end, and nobody works on it.
    #[error("job {job}: its coordinator ended by itself; its log says why")]
    Broken {
        /// The job.
        job: String,
    },
    /// Other hosts could read the job's secrets.
    #[error(
        "--listen {address}: expected an address of this host alone, because calls are not encrypted; --tls-cert, \
         --tls-key and --tls-ca encrypt them, --insecure allows any"
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
}

impl Classify for CoordinateError {
    fn kind(&self) -> Kind {
        match self {
            Self::Prepare(source) => source.kind(),
            Self::Journal(source) => source.kind(),
            Self::Coordinator(source) => source.kind(),
            Self::Token(source) => source.kind(),
            Self::Tls(source) => source.kind(),
            Self::Serve(source) => source.kind(),
            Self::RunFile(source) => source.kind(),
            Self::Signals { .. } | Self::Broken { .. } => Kind::Internal,
            Self::NotLoopback { .. } | Self::Readable { .. } => Kind::Conflict,
        }
    }
}

/// Coordinates one job to its end: the one that a coordinator before this one has left in the state directory, or the one
/// that `prepare` makes.
///
/// # Errors
/// [`CoordinateError`] when it cannot start; a job that fails is a [`Coordinated`].
pub async fn coordinate(
    config: JobConfig,
    place: CoordinatorPlace,
    prepare: impl Fn(&JobConfig) -> Result<Prepared, PrepareError> + Send + Sync + 'static,
    audience: Audience,
) -> Result<Coordinated, CoordinateError> {
    if !place.listen.ip().is_loopback() && !place.is_insecure && place.tls.is_none() {
        return Err(CoordinateError::NotLoopback { address: place.listen });
    }
    survive_file_size_limit().map_err(|source| CoordinateError::Signals { source })?;
    let mut tasks = Tasks::new();
    let observers = Observers::bind(place.observe, audience.note, &mut tasks).await?;
    let is_new = rustix::fs::stat(&place.state_directory).is_err();
    let journal = Journal::open(&place.state_directory)?;
    make_private(&place.state_directory, is_new)?;
    let security = security(&place)?;
    // The entry of the cache is the job's until the end; a coordinator that is started again relies on files that are open.
    let maker = Arc::new(Maker { config, prepare: Box::new(prepare), claim: Mutex::default() });
    let (record, listener, left) = match journal.interrupted()? {
        Some(Interrupted { record, generation, end }) => {
            let address = if place.listen.port() == 0 { record.listens } else { place.listen };
            (audience.note)(&format!("going on with job {}, which another coordinator has left", record.job));
            (record, Listener::bind(address).await?, Some((generation, end)))
        }
        None => {
            let listener = Listener::bind(place.listen).await?;
            let address = listener.address();
            let first = maker.clone();
            let record = blocking(move || first.make(address, Resumes::AsItSays)).await?;
            journal.begin(&record)?;
            (record, listener, None)
        }
    };
    (audience.note)(&format!("coordinator of job {} listens on {}", record.job, listener.address()));
    let output = OutputPlace::of(&record);
    let jobs = job_maker(record.after_load.then, listener.address(), RanksAre::Anywhere);
    let rejoin = (!place.rejoin.is_zero()).then(|| rejoin(place.rejoin, maker.clone(), listener.address()));
    let directory = RunFile::directory()?;
    announce(&record, listener.address(), &security, &directory)?;
    // When only the end is left to be told, ranks that lost the coordinator before this one are still on their way here.
    let ended_before = left.as_ref().is_some_and(|(_, end)| end.is_some());
    let farewell = if ended_before { FAREWELL } else { Duration::ZERO };
    let config = CoordinatorConfig {
        record,
        join_deadline: JOIN_DEADLINE,
        journal: journal.clone(),
        is_restartable: true,
        left,
        jobs,
        rejoin,
    };
    let coordinator = Coordinator::start(config, &mut tasks)?;
    let people = security.access.operator.clone().unwrap_or_else(|| security.access.worker.clone());
    serve(coordinator.clone(), security, listener, &mut tasks);
    observers.follow(&coordinator, &people, &mut tasks);
    crate::faults::point("coordinator.serves");
    let mut signals = Signals::new().map_err(|source| CoordinateError::Signals { source })?;
    let (view, preempted) = until_over(&coordinator, audience, farewell, &mut signals).await;
    if !view.is_over() {
        return Err(CoordinateError::Broken { job: view.job.to_string() });
    }
    crate::faults::point("coordinator.over");
    journal.close()?;
    RunFile::remove(&directory);
    drop(maker);
    let loads = coordinator.loads();
    tasks.shut_down(Duration::from_millis(500)).await;
    let preempted = preempted || view.is_preempted;
    let output = if preempted { None } else { write_output(output, &view).await };
    Ok(Coordinated { view, loads, preempted, output })
}

/// Makes the coordinator's own job of its configuration, as often as it is needed.
struct Maker {
    config: JobConfig,
    prepare: Box<dyn Fn(&JobConfig) -> Result<Prepared, PrepareError> + Send + Sync>,
    /// The entry of the cache is the job's until the end.
    claim: Mutex<Vec<CacheClaim>>,
}

impl Maker {
    fn make(&self, address: SocketAddr, resumes: Resumes) -> Result<JobRecord, PrepareError> {
        let config = resumes.apply(self.config.clone());
        let mut prepared = (self.prepare)(&config)?;
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = prepared.claim_cache()?;
        Ok(job_record(&config, prepared, address))
    }
}

/// Has ranks that are lost come back to a job that is made anew from what it has committed.
fn rejoin(timeout: Duration, maker: Arc<Maker>, address: SocketAddr) -> Rejoin {
    let remake = move |record: &JobRecord, goes_on: bool| {
        let resumes = if goes_on { Resumes::Always } else { Resumes::AsItSays };
        match &record.text {
            Some(text) => queue::make(text, &record.plan, (address, RanksAre::Anywhere), resumes),
            None => maker.make(address, resumes).map_err(|error| Rejected::from_error(&error)),
        }
    };
    Rejoin { timeout, remake: Arc::new(remake) }
}

/// Follows the job to its end, and stays until its ranks have heard of it, for at least as long as `least`. A signal asks
/// for the end: what is not saved is saved before. The flag says that one came.
async fn until_over(
    coordinator: &Coordinator,
    mut audience: Audience,
    least: Duration,
    signals: &mut Signals,
) -> (View, bool) {
    let mut views = coordinator.views();
    let mut preempted = false;
    let view = loop {
        let view = views.borrow_and_update().clone();
        (audience.view)(&view);
        // Cancel safe: a watch and a signal lose nothing when the other wins.
        tokio::select! {
            changed = views.changed(), if !view.is_over() => if changed.is_err() { break view; },
            () = signals.next() => {
                preempted = true;
                // Refused only when the job is over.
                let event = Event::DrainRequested { save: coordinator.next_step(), preempts: true };
                let _ = coordinator.apply(event).await;
            }
            () = std::future::ready(()), if view.is_over() => break view,
        }
    };
    let over = crate::clock::now();
    while over.elapsed() < least || (coordinator.is_followed() && over.elapsed() < FAREWELL) {
        tokio::time::sleep(FAREWELL_TICK).await;
    }
    (view, preempted)
}

/// The signals that ask for an end.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn announce(
    record: &JobRecord,
    address: SocketAddr,
    security: &Security,
    directory: &Path,
) -> Result<(), RunFileError> {
    // It is for those who command the job.
    let token = security.access.operator.as_ref().unwrap_or(&security.access.worker);
    let run = RunFile {
        job: record.job.to_string(),
        coordinator: address.to_string(),
        token_file: absolute(token.path()),
        process_id: std::process::id(),
        tls: security.tls.as_ref().map(|tls| absolute_files(tls.files())),
    };
    run.write(directory)
}

/// The journal holds the data plane's secret, and the token may be here. A directory that was there before is not changed.
fn make_private(directory: &Path, is_new: bool) -> Result<(), CoordinateError> {
    use rustix::fs::Mode;
    if is_new && let Err(errno) = rustix::fs::chmod(directory, Mode::RWXU) {
        tracing::warn!(directory = %directory.display(), %errno, "cannot restrict the directory to this user");
    }
    let mode = rustix::fs::stat(directory).map_or(Mode::empty(), |stat| Mode::from_raw_mode(stat.st_mode));
    if mode.intersects(Mode::RWXG | Mode::RWXO) {
        let path = directory.display().to_string();
        return Err(CoordinateError::Readable { path, found: mode.as_raw_mode() });
    }
    Ok(())
}

/// Tokens and certificates, all of them read once, so that what cannot be used is said before anybody is served.
fn security(place: &CoordinatorPlace) -> Result<Security, CoordinateError> {
    let operator = place.control_token_file.as_ref().map(Token::at);
    if let Some(operator) = &operator {
        operator.header()?;
    }
    let tls = place.tls.clone().map(Tls::open).transpose()?;
    Ok(Security { access: Access { worker: token(place)?, operator }, tls })
}

fn token(place: &CoordinatorPlace) -> Result<Token, TokenError> {
    let own = Token::at(place.token_file.clone().unwrap_or_else(|| place.state_directory.join("token")));
    match own.header() {
        Ok(_) => Ok(own),
        Err(error) if place.token_file.is_some() || error.kind() != Kind::NotFound => Err(error),
        Err(_) => Token::create(&place.state_directory),
    }
}
