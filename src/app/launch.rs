//! `weightcast launch job.toml`: coordinator, ranks, and the end of both.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use weightcast_launcher::{
    Environment, Event as LaunchEvent, EventSink, Launch, LaunchArgs, LaunchError, RankCommand, Report, run,
    stop_channel,
};

use super::lines::line_stream;
use super::model_export::ModelExportError;
use super::observe::{ObservePlaces, Observers};
use super::prepare::Prepared;
use super::queue::{RanksAre, job_maker};
use super::running::{RunFile, RunFileError};
use super::train_output::{OutputPlace, RunOutput};
use crate::cache::files_id;
use crate::config::{JobConfig, variable};
use crate::coordinator::{Coordinator, CoordinatorConfig, CoordinatorError, JobRecord, Journal, JournalError, View};
use crate::error::{Classify, Kind};
use crate::load::{LoadReport, logical_digests};
use crate::membership::{AfterLoad, Phase};
use crate::plan::DeviceRule;
use crate::rpc::{Access, Listener, Security, ServeError, Token, TokenError, serve};
use crate::store::absolute;
use crate::tasks::{Tasks, blocking, survive_file_size_limit};
use crate::tls::{Tls, TlsError, TlsFiles};
use crate::types::{BackendWish, Fqn, JobId, Rank, Sharing, TensorDigest, WorldSize};

/// Ranks of one host join within seconds; a scheduler may take minutes to place the last one.
pub(super) const JOIN_DEADLINE: Duration = Duration::from_secs(600);
/// How long those who follow the ranks' lines may take to read the last ones.
const LAST_LINES: Duration = Duration::from_secs(1);

/// A job to launch on this host.
#[derive(Debug)]
pub struct LaunchJob {
    /// The job.
    pub config: JobConfig,
    /// Its plan.
    pub prepared: Prepared,
    /// The launcher's flags.
    pub args: LaunchArgs,
    /// The certificates of calls and of the data plane, if they are to be encrypted.
    pub tls: Option<TlsFiles>,
    /// Where its coordinator lets itself be looked at.
    pub observe: ObservePlaces,
}

/// How a launched job ended.
#[derive(Debug)]
pub struct Launched {
    /// What the launcher saw.
    pub report: Report,
    /// The coordinator's last snapshot.
    pub view: View,
    /// The figures of the ranks' loads.
    pub loads: Vec<LoadReport>,
    /// The digest of every logical tensor, when the job asked for them and all ranks loaded.
    pub digests: Option<BTreeMap<Fqn, TensorDigest>>,
    /// What became of the model directory that a run which is done has as its output.
    pub output: Option<Result<RunOutput, ModelExportError>>,
}

/// Why a job could not be launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchJobError {
    /// The launcher's flags or environment.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// Its journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The port.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The launch's directory.
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    /// Something of this host.
    #[error("handling signals: {source}")]
    Signals {
        /// The system's error.
        source: std::io::Error,
    },
}

impl LaunchJobError {
    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Launch(source) => source.exit_code(),
            Self::Coordinator(source) => source.kind().exit_code(),
            Self::Journal(source) => source.kind().exit_code(),
            Self::Token(source) => source.kind().exit_code(),
            Self::Tls(source) => source.kind().exit_code(),
            Self::Serve(source) => source.kind().exit_code(),
            Self::RunFile(source) => source.kind().exit_code(),
            Self::Signals { .. } => Kind::Internal.exit_code(),
        }
    }
}

/// Who is told of what happens while a job runs.
pub struct Audience {
    /// Gets what the launcher has to say to people.
    pub note: fn(&str),
    /// Gets every snapshot of the job.
    pub view: Box<dyn FnMut(&View) + Send>,
}

impl std::fmt::Debug for Audience {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Audience")
    }
}

/// Runs the job to its end.
///
/// # Errors
/// [`LaunchJobError`] when it cannot be started; a job that fails later is a [`Launched`] with its report.
pub async fn launch(job: LaunchJob, audience: Audience) -> Result<Launched, LaunchJobError> {
    survive_file_size_limit().map_err(|source| LaunchJobError::Signals { source })?;
    let directory = RunFile::directory()?;
    let result = launch_in(job, &directory, audience).await;
    RunFile::remove(&directory);
    result
}

async fn launch_in(job: LaunchJob, directory: &Path, audience: Audience) -> Result<Launched, LaunchJobError> {
    let LaunchJob { config, prepared, args, tls: tls_files, observe } = job;
    let environment = Environment::of_this_process();
    let mut tasks = Tasks::new();
    let observers = Observers::bind(observe, audience.note, &mut tasks).await?;
    let token = Token::create(directory)?;
    let tls = tls_files.clone().map(Tls::open).transpose()?;
    let journal = Journal::open(&directory.join("coordinator"))?;
    let listener = Listener::bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)).await?;
    let address = listener.address();
    let record = job_record(&config, prepared, address);
    let jobs = job_maker(record.after_load.then, address, RanksAre::Here);
    let (name, plan, output) = (record.job.to_string(), record.plan.clone(), OutputPlace::of(&record));
    let coordinator = Coordinator::start(
        CoordinatorConfig {
            record,
            join_deadline: JOIN_DEADLINE,
            journal,
            is_restartable: false,
            left: None,
            jobs,
            // All of its ranks are this launcher's, which starts all of them again or none.
            rejoin: None,
        },
        &mut tasks,
    )?;
    let security = Security { access: Access { worker: token.clone(), operator: None }, tls };
    serve(coordinator.clone(), security, listener, &mut tasks);
    observers.follow(&coordinator, &token, &mut tasks);
    crate::faults::point("launcher.serves");
    let (mut views, mut show) = (coordinator.views(), audience.view);
    tasks.spawn("audience", async move {
        while views.changed().await.is_ok() {
            show(&views.borrow_and_update());
        }
    });
    let run_file = RunFile {
        job: name,
        coordinator: address.to_string(),
        token_file: token.path().to_owned(),
        process_id: std::process::id(),
        tls: tls_files.as_ref().map(absolute_files),
    };
    run_file.write(directory)?;

    let mut command = worker_command(&run_file.coordinator, &run_file.token_file, None, Some(plan.device));
    command.environment.extend(tls_environment(tls_files.as_ref()));
    if plan.train.is_some() || config.job.hold {
        command.environment.extend(training_environment(plan.world));
    }
    let mut launch = Launch::with_command(&args, &environment, command)?;
    launch.on_event = Some(event_sink(coordinator.clone(), audience.note));
    let (stopper, stop) = stop_channel();
    let report = tokio::select! {
        report = run(launch, stop) => report?,
        Err(source) = stopper.follow_signals() => return Err(LaunchJobError::Signals { source }),
    };
    coordinator.lines().close();
    coordinator.lines().farewell(LAST_LINES).await;
    let view = coordinator.views().borrow().clone();
    let loads = coordinator.loads();
    tasks.shut_down(Duration::from_millis(500)).await;
    let digests = plan.digests.then(|| logical_digests(&plan, &loads)).flatten();
    let output = if report.exit_code == 0 { write_output(output, &view).await } else { None };
    Ok(Launched { report, view, loads, digests, output })
}

/// Writes the output of a run that came to its own end. One that was asked to stop goes on later.
pub(super) async fn write_output(
    output: Option<OutputPlace>,
    view: &View,
) -> Option<Result<RunOutput, ModelExportError>> {
    let output = output.filter(|_| view.phase == Phase::Finished && !view.is_draining)?;
    Some(blocking(move || output.write()).await)
}

/// The job of a configuration and its plan, whose coordinator listens at `listens`.
pub(super) fn job_record(config: &JobConfig, prepared: Prepared, listens: SocketAddr) -> JobRecord {
    let name = config.job.name.clone().unwrap_or_else(|| prepared.plan.model.clone());
    // What cannot be told apart is loaded again.
    let base_id = files_id(&prepared.plan).unwrap_or_default();
    JobRecord {
        number: 0,
        attempt: 0,
        text: None,
        base_id,
        job: JobId::from(name),
        after_load: AfterLoad {
            save: (config.checkpoint.save && prepared.resumed_from.is_none()).then_some(prepared.step),
            train: prepared.plan.train.is_some(),
            then: config.exit_policy(),
        },
        step: prepared.step,
        resumed: prepared.resumed_from.is_some(),
        checkpoint_root: config.checkpoint.directory.as_deref().map(absolute),
        plan: prepared.plan,
        listens,
    }
}

/// What every rank runs: this program, as a worker. Without `device` it is what this process's environment says.
pub(super) fn worker_command(
    coordinator: &str,
    token_file: &Path,
    checkpoint_root: Option<&Path>,
    device: Option<DeviceRule>,
) -> RankCommand {
    let mut environment: Vec<(OsString, OsString)> = vec![
        ("WEIGHTCAST_COORDINATOR".into(), coordinator.into()),
        ("WEIGHTCAST_TOKEN_FILE".into(), token_file.into()),
    ];
    if let Some(rule) = device {
        environment.push(("WEIGHTCAST_DEVICE".into(), rule.device.name().into()));
        environment
            .push(("WEIGHTCAST_SHARE_DEVICES".into(), u8::from(rule.sharing == Sharing::Allowed).to_string().into()));
    }
    if let Some(root) = checkpoint_root {
        environment.push(("WEIGHTCAST_CHECKPOINT_DIRECTORY".into(), root.into()));
    }
    let shares = device.is_some_and(|rule| rule.sharing == Sharing::Allowed && rule.backend == BackendWish::Nccl);
    let told = ["NCCL_HOSTID", "NCCL_MULTI_RANK_GPU_ENABLE"].into_iter().any(|name| variable(name).is_some());
    if shares
        && !told
        && let Ok(program) = std::env::current_exe()
    {
        // NCCL refuses two ranks with the same host and bus id; with a host id each they talk through sockets.
        let script = "NCCL_HOSTID=\"$(uname -n)-$RANK\" exec \"$0\" worker";
        return RankCommand {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into(), program.into()],
            environment,
        };
    }
    RankCommand { program: "/proc/self/exe".into(), args: vec!["worker".into()], environment }
}

/// The files of `tls` by paths that hold in any directory.
pub(super) fn absolute_files(tls: &TlsFiles) -> TlsFiles {
    let TlsFiles { cert, key, ca, server_name } = tls;
    TlsFiles { cert: absolute(cert), key: absolute(key), ca: absolute(ca), server_name: server_name.clone() }
}

/// How ranks learn of the certificates.
pub(super) fn tls_environment(tls: Option<&TlsFiles>) -> Vec<(OsString, OsString)> {
    let Some(tls) = tls else { return Vec::new() };
    let TlsFiles { cert, key, ca, server_name } = absolute_files(tls);
    let mut environment: Vec<(OsString, OsString)> = vec![
        ("WEIGHTCAST_TLS_CERT".into(), cert.into()),
        ("WEIGHTCAST_TLS_KEY".into(), key.into()),
        ("WEIGHTCAST_TLS_CA".into(), ca.into()),
    ];
    environment.extend(server_name.map(|name| ("WEIGHTCAST_TLS_SERVER_NAME".into(), name.into())));
    environment
}

/// Every step frees and takes the same large buffers. By default glibc gives them back to the kernel each time, and first
/// touches of fresh pages run at a fifth of the memory's speed. Ranks of a host share its processors.
fn training_environment(world: WorldSize) -> impl Iterator<Item = (OsString, OsString)> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = (processors / world.count()).max(1).to_string();
    let settings = [
        ("MALLOC_MMAP_THRESHOLD_", "4294967296".to_owned()),
        ("MALLOC_TRIM_THRESHOLD_", "68719476736".to_owned()),
        ("MALLOC_ARENA_MAX", "1".to_owned()),
        ("RAYON_NUM_THREADS", threads),
    ];
    let untold = settings.into_iter().filter(|(name, _)| variable(name).is_none());
    untold.map(|(name, value)| (name.into(), value.into()))
}

/// Tells the coordinator of ranks that ended with failure, within milliseconds, and of what ranks write.
fn event_sink(coordinator: Coordinator, notes: fn(&str)) -> EventSink {
    // For as long as there may be more lines, which is until they are closed.
    let source = coordinator.lines().source();
    EventSink::new(move |event| match event {
        LaunchEvent::RankExited { rank, end, .. } => {
            crate::faults::point("launcher.rank-exited");
            if !end.is_success() {
                coordinator.process_ended(Rank(rank), end.to_string(), end.exit_code());
            }
        }
        LaunchEvent::RankStarted { .. } => crate::faults::point("launcher.rank-started"),
        LaunchEvent::Note { text } => notes(&text),
        LaunchEvent::Line { rank, stream, text } => {
            let _ = &source;
            coordinator.lines().write(Rank(rank), line_stream(stream), text);
        }
        _ => {}
    })
}
