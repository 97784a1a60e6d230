//! All that a launch needs, put together from flags and environment.
//!
//! Owns: [`Launch`] and its defaults, each with its reason. Everything is validated before a process is started.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::args::LaunchArgs;
use crate::attempt::Grace;
use crate::command::RankCommand;
use crate::environment::Environment;
use crate::error::LaunchError;
use crate::events::EventSink;
use crate::layout::{Layout, resolve};
use crate::logs::{DEFAULT_PREFIX, LogConfig, StreamChoice, directory_name};
use crate::nanny::NANNY_ARGUMENT;
use crate::rendezvous::Gathering;
use crate::settings::{Setting, is_on, seconds};

/// torchrun's; a rank that has to save more than fits into it needs `--shutdown-timeout`.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
/// Long enough for a Python program to print its traceback, short enough for a launcher that has ended within a second.
const FAILURE_GRACE: Duration = Duration::from_millis(500);

/// How to start this program again as a nanny.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nanny {
    /// The program.
    pub program: OsString,
    /// The arguments that make it a nanny.
    pub args: Vec<OsString>,
}

impl Nanny {
    /// This program itself, which calls [`crate::nanny_main`] when its first argument is [`NANNY_ARGUMENT`]. The link in
    /// /proc still leads to it when the file was replaced or removed meanwhile.
    #[must_use]
    pub fn this_program() -> Self {
        Self { program: "/proc/self/exe".into(), args: vec![NANNY_ARGUMENT.into()] }
    }
}

/// One launch on this node.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Launch {
    /// Which ranks.
    pub layout: Layout,
    /// What they run.
    pub command: RankCommand,
    /// What becomes of their streams.
    pub log: LogConfig,
    /// How long they may take to end.
    pub grace: Grace,
    /// How often all of them are started again after a failure.
    pub max_restarts: u32,
    /// How the nodes meet, if there are several.
    pub gathering: Gathering,
    /// How to start a nanny.
    pub nanny: Nanny,
    /// Who hears of what happens.
    pub on_event: Option<EventSink>,
    /// A directory for small files of this launch, made when needed and removed at the end.
    pub scratch_dir: PathBuf,
    /// A file that gets the report when the launch fails, as JSON of 4 KiB at most.
    pub termination_log: Option<PathBuf>,
}

impl Launch {
    /// Puts a launch together.
    ///
    /// # Errors
    /// Those of [`resolve`] and of [`RankCommand::from_args`], and [`LaunchError::BadValue`].
    pub fn from_args(args: &LaunchArgs, environment: &Environment) -> Result<Self, LaunchError> {
        let command = RankCommand::from_args(args, environment)?;
        Self::with_command(args, environment, command)
    }

    /// Puts a launch of another command together: for a caller whose flags name a job rather than a program.
    ///
    /// # Errors
    /// Those of [`resolve`], and [`LaunchError::BadValue`].
    pub fn with_command(
        args: &LaunchArgs,
        environment: &Environment,
        command: RankCommand,
    ) -> Result<Self, LaunchError> {
        let find = |flag: &str, given: &Option<String>| Setting::find(flag, given.as_deref(), environment);
        let duration = |flag: &str, given: &Option<String>, default: Duration| match find(flag, given) {
            Some(setting) => setting.parse("seconds", seconds),
            None => Ok(default),
        };
        let layout = resolve(args, environment)?;
        let scratch_dir = environment.temporary_directory.join(format!("weightcast-launch-{:016x}", environment.nonce));
        let log = log_config(args, environment, &layout)?;
        let shutdown = duration("--shutdown-timeout", &args.shutdown_timeout, SHUTDOWN_TIMEOUT)?;
        let failure = duration("--failure-grace", &args.failure_grace, FAILURE_GRACE.min(shutdown))?;
        duration("--monitor-interval", &args.monitor_interval, Duration::ZERO)?;
        let max_restarts = match find("--max-restarts", &args.max_restarts) {
            Some(setting) => setting.parse("a number", |text| text.parse().ok())?,
            None => 0,
        };
        Ok(Self {
            layout,
            command,
            log,
            grace: Grace { shutdown, failure },
            max_restarts,
            gathering: gathering(args, environment)?,
            nanny: Nanny::this_program(),
            on_event: None,
            scratch_dir,
            termination_log: args.termination_log.clone().or_else(|| environment.termination_log.clone()),
        })
    }
}

fn gathering(args: &LaunchArgs, environment: &Environment) -> Result<Gathering, LaunchError> {
    let find = |flag: &str, given: &Option<String>| Setting::find(flag, given.as_deref(), environment);
    let mut gathering = Gathering::default();
    if let Some(setting) = find("--rdzv-backend", &args.rdzv_backend) {
        setting.parse("c10d or static", |text| matches!(text, "c10d" | "static").then_some(()))?;
    }
    if let Some(setting) = find("--rdzv-conf", &args.rdzv_conf) {
        let expected = "KEY=SECONDS,... with the keys join_timeout, last_call_timeout, silence_timeout";
        setting.parse(expected, |text| text.split(',').try_for_each(|entry| set(&mut gathering, entry)))?;
    }
    gathering.is_insecure = is_on("--rdzv-insecure", args.rdzv_insecure, environment)?;
    gathering.local_addr = find("--local-addr", &args.local_addr).map(|setting| setting.text);
    let token_file = args.rdzv_token_file.clone();
    gathering.token_file = token_file.or_else(|| environment.get("PET_RDZV_TOKEN_FILE").map(PathBuf::from));
    Ok(gathering)
}

/// Applies one entry of `--rdzv-conf`. torchrun's other keys concern its store, which does not exist here.
fn set(gathering: &mut Gathering, entry: &str) -> Option<()> {
    let (key, value) = entry.split_once('=')?;
    match key.trim() {
        "join_timeout" | "timeout" => gathering.join_timeout = seconds(value.trim())?,
        "last_call_timeout" => gathering.last_call = seconds(value.trim())?,
        "silence_timeout" => gathering.silence = seconds(value.trim())?,
        "read_timeout" | "close_timeout" | "heartbeat_timeout" | "is_host" => {}
        _ => return None,
    }
    Some(())
}

fn log_config(args: &LaunchArgs, environment: &Environment, layout: &Layout) -> Result<LogConfig, LaunchError> {
    let find = |flag: &str, given: &Option<String>| Setting::find(flag, given.as_deref(), environment);
    let streams = |flag: &str, given: &Option<String>| match find(flag, given) {
        Some(setting) => setting.parse("0 to 3, or LOCAL_RANK:0..3 for some ranks", StreamChoice::parse),
        None => Ok(StreamChoice::default()),
    };
    let (redirects, tee) = (streams("--redirects", &args.redirects)?, streams("--tee", &args.tee)?);
    let given_dir = args.log_dir.clone().or_else(|| environment.get("PET_LOG_DIR").map(PathBuf::from));
    // As with torchrun, streams that are to be in files but have no place get one for temporary files, which stays.
    let dir = given_dir.or_else(|| {
        let wants_files = !(redirects.is_empty() && tee.is_empty());
        let name = format!("weightcast-logs-{}-{:016x}", directory_name(&layout.run_id), environment.nonce);
        wants_files.then(|| environment.temporary_directory.join(name))
    });
    let local_ranks_filter = match find("--local-ranks-filter", &args.local_ranks_filter) {
        Some(setting) => Some(setting.parse("local ranks, such as 0,2", |text| {
            text.split(',').map(|rank| rank.trim().parse().ok()).collect::<Option<BTreeSet<u32>>>()
        })?),
        None => None,
    };
    let template = args.log_line_prefix_template.clone();
    let template = template.or_else(|| environment.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE").map(str::to_owned));
    let template = template.or_else(|| find("--log-line-prefix-template", &None).map(|setting| setting.text));
    let prefix_template = template.unwrap_or_else(|| DEFAULT_PREFIX.to_owned());
    Ok(LogConfig { dir, redirects, tee, prefix_template, local_ranks_filter, is_shown: true })
}
