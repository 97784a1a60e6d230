//! What black-box tests share: a place of their own, processes that are found by a mark in their environment, waiting with
//! a limit, and a small seeded generator. Refuses to know: what any test checks.

pub(crate) mod certificates;
pub(crate) mod http;
pub(crate) mod model;
pub(crate) mod refusal;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use weightcast::app::prepare_with;
use weightcast::checkpoint::{WriteRequest, begin, commit, write_shard};
use weightcast::config::JobConfig;
use weightcast::load::{LoadOptions, load};
use weightcast::manifest::SealRequest;
use weightcast::plan::Strategy;
use weightcast::store::LocalStore;
use weightcast::types::{Generation, Step, WorldSize};

/// The project's small model.
pub(crate) const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");
/// Far longer than anything here takes: who waits this long hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at what another process does.
const POLL: Duration = Duration::from_millis(2);
/// The variable that marks the processes of a test.
const MARK: &str = "WEIGHTCAST_TEST_MARK";

/// A directory for one test and all of its processes.
pub(crate) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A path in this place, as text for a command line.
    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn mark(&self) -> String {
        format!("{MARK}={}", self.directory.path().display())
    }

    /// The program with these arguments, marked.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weightcast"));
        command.args(arguments).stdin(Stdio::null());
        command.env(MARK, self.directory.path()).env("XDG_RUNTIME_DIR", self.directory.path().join("run"));
        command
    }

    /// Starts the program; its streams go to files, so that nobody waits for a reader.
    pub(crate) fn start(&self, arguments: &[&str]) -> Job {
        self.start_command(self.command(arguments))
    }

    pub(crate) fn start_command(&self, mut command: Command) -> Job {
        let streams = tempfile::tempdir_in(self.directory.path()).expect("a directory for the streams");
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| streams.path().join(name));
        let file = |path: &Path| std::fs::File::create_new(path).expect("a new file");
        let started = Instant::now();
        let child = command.stdout(file(&stdout)).stderr(file(&stderr)).spawn().expect("the program starts");
        Job { child, stdout, stderr, started, _streams: streams }
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.start(arguments).wait()
    }

    /// Runs the program to its end; it must succeed, and its stdout be JSON.
    pub(crate) fn finish(&self, arguments: &[&str]) -> Value {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        ended.expect_quiet();
        ended.json()
    }

    /// Processes with this place's mark that live.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mark = self.mark();
        all_processes().filter(|&process| has_variable(process, &mark)).collect()
    }

    /// The process of a rank, once it is the worker and no longer the one that becomes it.
    pub(crate) fn rank_process(&self, rank: u32) -> Option<i32> {
        let rank = format!("RANK={rank}");
        self.processes().into_iter().find(|&process| {
            let command = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            // A nanny has the words of its rank's command too, after its own.
            command.split(|&byte| byte == 0).nth(1) == Some(b"worker") && has_variable(process, &rank)
        })
    }

    /// No process of this place is left, or will be in a moment. Looks twice: while a process becomes another program its
    /// environment cannot be read.
    pub(crate) fn expect_no_process(&self) {
        for _ in 0..2 {
            until("no process is left", Duration::from_secs(2), || self.processes().is_empty());
        }
    }
}

impl Drop for Place {
    /// A test that failed leaves no process either.
    fn drop(&mut self) {
        for process in self.processes() {
            signal(process, Signal::KILL);
        }
    }
}

fn all_processes() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").expect("/proc");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn has_variable(process: i32, variable: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|entry| entry == variable.as_bytes())
}

/// Sends a signal; whether the process still existed.
pub(crate) fn signal(process: i32, signal: Signal) -> bool {
    let process = Pid::from_raw(process).expect("a process id");
    kill_process(process, signal).is_ok()
}

/// A started program.
pub(crate) struct Job {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    started: Instant,
    _streams: tempfile::TempDir,
}

impl Job {
    pub(crate) fn process(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are small")
    }

    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_some()
    }

    /// What it has said on stderr so far.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// What it has printed on stdout so far.
    pub(crate) fn printed(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stdout).unwrap_or_default()).into_owned()
    }

    /// Waits for its end; it must not hang.
    pub(crate) fn wait(self) -> Ended {
        self.wait_within(PATIENCE)
    }

    /// As [`Self::wait`], for work that takes longer.
    pub(crate) fn wait_within(mut self, limit: Duration) -> Ended {
        let mut status = None;
        while status.is_none() {
            assert!(self.started.elapsed() < limit, "it hangs, having said: {}", self.said());
            std::thread::park_timeout(POLL);
            status = self.child.try_wait().expect("a child of ours");
        }
        let stdout = String::from_utf8_lossy(&std::fs::read(&self.stdout).unwrap_or_default()).into_owned();
        let code = status.and_then(|status| status.code());
        Ended { code, stdout, stderr: self.said(), took: self.started.elapsed() }
    }
}

/// How a program ended.
pub(crate) struct Ended {
    /// The exit code; none after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// From its start to its end.
    pub(crate) took: Duration,
}

impl Ended {
    /// Nothing that a person should look at was said: an ordinary run has no warning.
    pub(crate) fn expect_quiet(&self) {
        let loud = |line: &&str| {
            let line = line
                .trim_start_matches(|sign: char| sign == '[' || sign == ']' || sign == ' ' || sign.is_ascii_digit());
            [" WARN ", " ERROR "].iter().any(|level| line.contains(level))
                || ["warning", "error"].iter().any(|word| line.starts_with(word))
        };
        assert_eq!(self.stderr.lines().find(loud), None, "{}", self.stderr);
    }

    pub(crate) fn json(&self) -> Value {
        let parsed = serde_json::from_str(&self.stdout);
        parsed.unwrap_or_else(|error| panic!("stdout is no JSON: {error}: {:?}; {}", self.stdout, self.stderr))
    }
}

/// Polls what other processes make true.
pub(crate) fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::park_timeout(POLL);
    }
}

/// Waits until all ranks of this place's only job hold, and gives its status.
pub(crate) fn wait_until_holding(place: &Place, job: &mut Job) -> Value {
    let mut status = Value::Null;
    until("all ranks hold", PATIENCE, || {
        assert!(!job.is_over(), "the job ended early: {}", job.said());
        let asked = place.run(&["status", "--json"]);
        status = if asked.code == Some(0) { asked.json() } else { Value::Null };
        let ranks = status["ranks"].as_array();
        status["phase"] == "holding" && ranks.is_some_and(|ranks| ranks.iter().all(|rank| rank["stage"] == "holding"))
    });
    status
}

/// Commits a checkpoint of `model` at `step` below `root`, written by `world` ranks in this process, through the library:
/// the command line commits one step only.
pub(crate) fn commit_step(root: &str, model: &str, step: u64, world: u32) {
    let mut config = JobConfig::default();
    config.model.source = Some(model.to_owned());
    // Each rank reads for itself, so one process can be all ranks in turn.
    config.load.strategy = Some(Strategy::Full);
    let world = WorldSize::new(world).expect("a world of at least 1");
    let plan = prepare_with(&config, world, None, &|_| {}).expect("a good model").plan;
    let (checkpoints, files) = (LocalStore::new(root), LocalStore::new(&plan.root));
    let step = Step(step);
    let (attempt, directory) = begin(&checkpoints, step).expect("a new step");
    let write = |rank| {
        let options = LoadOptions::on_host(rank, &files);
        let (state, _) = load(&plan, &options, None).expect("a good model");
        let request = WriteRequest { plan: &plan, state: &state, store: &checkpoints, directory: &directory, step };
        write_shard(&request, &|_| {}).expect("room for a shard")
    };
    let receipts = world.ranks().map(write).collect();
    let request = SealRequest { plan: &plan, step, attempt, generation: Generation(1) };
    commit(&checkpoints, &request, receipts).expect("whole receipts");
}

/// `SplitMix64`, whose whole state is its seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
