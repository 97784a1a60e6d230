//! What the black-box tests share: a launcher with a mark, and the search for processes that carry it.
//!
//! Every process that descends from a test's launcher inherits the mark in its environment; it is found under /proc by that
//! mark, never by name. Every test ends by [`Marked::assert_nothing_left`].

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything in a test may take before the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A mark in the environment, and what is started with it.
pub(crate) struct Marked {
    entry: String,
    pub(crate) dir: tempfile::TempDir,
}

impl Marked {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // The random name of the directory is the mark: no two tests share it.
        let entry = format!("WEIGHTCAST_TEST_MARK={}", dir.path().display());
        Self { entry, dir }
    }

    /// A launcher with these arguments, in an environment without any scheduler.
    pub(crate) fn launcher(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weightcast-launch"));
        let (name, value) = self.entry.split_once('=').expect("an entry");
        command.args(arguments).env_clear().env(name, value).env("PATH", "/usr/local/bin:/usr/bin:/bin");
        command.env("TMPDIR", self.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A launcher of `sh -c script` on this many ranks, with further flags before.
    pub(crate) fn shell(&self, ranks: u32, flags: &[&str], script: &str) -> Command {
        let ranks = ranks.to_string();
        let mut arguments = vec!["--no-python", "--nproc-per-node", &ranks];
        arguments.extend(flags);
        arguments.extend(["sh", "-c", script]);
        self.launcher(&arguments)
    }

    /// The living processes that carry the mark: ids and command lines.
    pub(crate) fn alive(&self) -> Vec<(i32, String)> {
        let processes = fs::read_dir("/proc").expect("/proc is mounted");
        let ids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let marked = ids.filter(|id| {
            let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == self.entry.as_bytes())
        });
        let name = |id: i32| fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default().replace('\0', " ");
        marked.map(|id| (id, name(id))).collect()
    }

    /// Fails if a process with the mark outlives the patience of this function (5 s); says how long the last one lived.
    pub(crate) fn assert_nothing_left(&self) -> Duration {
        let start = now();
        let gone = wait_until(Duration::from_secs(5), || self.alive().is_empty());
        assert!(gone, "left behind: {:#?}", self.alive());
        start.elapsed()
    }

    /// Runs a launcher to its end.
    pub(crate) fn run(&self, command: Command) -> Finished {
        Running::start(command).finish()
    }
}

/// A launcher that runs.
pub(crate) struct Running {
    child: Child,
    stdout: Receiver<String>,
    stderr: std::thread::JoinHandle<String>,
    /// The standard output so far.
    pub(crate) seen: String,
}

/// A launcher that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the launcher starts");
        let (stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (sender, receiver) = sync_channel(4096);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stderr.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Self { child, stdout: receiver, stderr, seen: String::new() }
    }

    /// Waits until this many lines of standard output contain `text`.
    pub(crate) fn await_lines(&mut self, count: usize, text: &str) {
        let deadline = now() + PATIENCE;
        while self.seen.lines().filter(|line| line.contains(text)).count() < count {
            let left = deadline.saturating_duration_since(now());
            let line = self.stdout.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("not {count} lines with {text:?} in {:?}", self.seen));
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(i32::try_from(self.child.id()).expect("an id"), signal);
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status;
            }
            if now() > deadline {
                self.child.kill().expect("it is our child");
                panic!("the launcher did not end; it wrote {:?}", self.seen);
            }
            pause();
        }
    }

    pub(crate) fn finish(mut self) -> Finished {
        let code = self.wait().code();
        while let Ok(line) = self.stdout.recv_timeout(PATIENCE) {
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
        Finished { code, stdout: self.seen, stderr: self.stderr.join().expect("the reader does not panic") }
    }
}

/// Sends a signal to a process that the test has started.
pub(crate) fn kill(id: i32, signal: Signal) {
    let id = Pid::from_raw(id).expect("an id of a process");
    kill_process(id, signal).expect("the process is there");
}

/// Looks every millisecond whether `condition` holds, until `patience` is over.
pub(crate) fn wait_until(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = now() + patience;
    loop {
        if condition() {
            return true;
        }
        if now() > deadline {
            return false;
        }
        pause();
    }
}

#[expect(clippy::disallowed_methods, reason = "tests measure time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "the pause between two looks of a bounded poll")]
fn pause() {
    std::thread::sleep(Duration::from_millis(1));
}
