//! Runs the ranks of this node, again after a failure where that is allowed, and says what became of them.
//!
//! Owns: the loop around `attempt`: it waits for one thing at a time, applies it, and performs the effects.
//! Refuses to know: how the nodes of a job agree (see `rendezvous`).
//!
//! Dropping the future of [`run`] ends all ranks: their nannies see that the launcher is gone.

use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::attempt::{Attempt, Effect, Input};
use crate::clock;
use crate::command::{Assignment, rank_variables};
use crate::config::Launch;
use crate::end::{End, signal_name};
use crate::error::LaunchError;
use crate::events::Event;
use crate::job::{Job, Next};
use crate::logs::{LogThread, Pump, Shown, Stream, Tail};
use crate::places::Places;
use crate::rank::{self, RankProcess, Streams};
use crate::rendezvous::Cause;
use crate::report::{RankReport, Report, TERMINATION_LOG_LIMIT, words};
use crate::stop::{Stop, StopRequest};
use crate::strays;

/// How long the streams of ranks that have ended may take to be carried: they can hold no more than a pipe's content.
const STREAMS_DEADLINE: Duration = Duration::from_secs(10);
/// The variable that marks the processes of this launch.
const ERROR_FILE_VARIABLE: &str = "TORCHELASTIC_ERROR_FILE";

/// Runs a launch to its end.
///
/// # Errors
/// [`LaunchError`] when the launch itself cannot go on. A rank that fails is not an error: it stands in the report.
pub async fn run(launch: Launch, mut stop: Stop) -> Result<Report, LaunchError> {
    let logs =
        LogThread::start().map_err(|source| LaunchError::System { action: "start the thread of the logs", source })?;
    // A parent that ignores SIGCHLD bequeaths that, and the kernel would reap our children unseen. A handler undoes it, here
    // and, because exec resets handlers, in the nannies.
    let _children =
        signal(SignalKind::child()).map_err(|source| LaunchError::System { action: "handle signals", source })?;
    strays::adopt();
    let mut job = Job::begin(&launch)?;
    let mut next = job.first(&launch, &mut stop).await?;
    let mut last = None;
    loop {
        match next {
            Next::Attempt(assignment) => {
                let places = Places::make(&launch, &assignment)?;
                let node = Node { launch: &launch, assignment: &assignment, places: &places };
                let mut report = node.run(&logs, &mut job, &mut stop).await;
                next = job.finished(&launch, &report, &mut stop).await?;
                if matches!(next, Next::Attempt(_)) {
                    report.summary = format!("failed with exit code {}, starting again", report.exit_code);
                    note(&launch, report.to_string());
                    publish(&launch, &places, &report);
                }
                last = Some((report, places));
            }
            Next::Over(over) => {
                job.leave().await;
                let (mut report, places) =
                    last.map_or_else(|| (nothing(&launch), None), |(report, p)| (report, Some(p)));
                report.settle(over.exit_code, over.cause);
                report.summary = summary(&report, &launch, stop.current());
                if let Some(places) = places {
                    publish(&launch, &places, &report);
                }
                return Ok(report);
            }
        }
    }
}

/// The report of a launch that ended before it began.
fn nothing(launch: &Launch) -> Report {
    Report {
        exit_code: 0,
        run_id: launch.layout.run_id.clone(),
        host: launch.layout.hostname.clone(),
        node_rank: launch.layout.node_rank.unwrap_or(0),
        restart_count: 0,
        summary: String::new(),
        cause: None,
        root_cause: None,
        other_ranks: Vec::new(),
    }
}

fn to_json(report: &Report) -> String {
    serde_json::to_string_pretty(report).unwrap_or_default()
}

fn summary(report: &Report, launch: &Launch, stop: StopRequest) -> String {
    let attempts = match (launch.max_restarts, report.restart_count) {
        (0, _) => String::new(),
        (most, count) => format!(" in attempt {} of at most {}", u64::from(count) + 1, u64::from(most) + 1),
    };
    match (report.exit_code, stop) {
        (0, StopRequest::None) => format!("succeeded{attempts}"),
        (code, StopRequest::None) => {
            let why = report.cause.as_ref().map_or_else(String::new, |words| format!(": {words}"));
            format!("failed with exit code {code}{attempts}{why}")
        }
        (code, StopRequest::Signal(number)) => format!("ended by {} with exit code {code}", signal_name(number)),
        (code, StopRequest::Kill) => format!("killed on request, with exit code {code}"),
    }
}

/// Writes the report where it is expected. What cannot be written is said, and does not change the exit code.
fn publish(launch: &Launch, places: &Places, report: &Report) {
    let last_words = launch.termination_log.as_ref().filter(|_| report.exit_code != 0);
    let last_words = last_words.map_or(Ok(()), |path| {
        let written = std::fs::write(path, report.to_json_within(TERMINATION_LOG_LIMIT));
        written.map_err(|source| LaunchError::File { action: "write", path: path.clone(), source })
    });
    for error in [last_words, places.write_report(&to_json(report))].into_iter().filter_map(Result::err) {
        note(launch, crate::chain(&error));
    }
}

fn note(launch: &Launch, text: String) {
    if let Some(sink) = &launch.on_event {
        sink.send(Event::Note { text });
    }
}

/// The ranks of this node in one attempt.
struct Node<'a> {
    launch: &'a Launch,
    assignment: &'a Assignment,
    places: &'a Places,
}

/// What is kept of a rank's streams.
struct Watched {
    process: Option<RankProcess>,
    stderr_tail: Arc<Mutex<Tail>>,
    streams: Vec<oneshot::Receiver<std::convert::Infallible>>,
}

impl Node<'_> {
    async fn run(&self, logs: &LogThread, job: &mut Job, stop: &mut Stop) -> Report {
        self.send(Event::AttemptStarted { restart_count: self.assignment.restart_count });
        let count = self.launch.layout.nproc_per_node;
        let (sender, mut inputs) = mpsc::channel(64);
        let mut attempt = Attempt::new(usize::try_from(count).unwrap_or(usize::MAX), self.launch.grace);
        let (mut followers, mut watched) = (JoinSet::new(), Vec::new());
        for (position, index) in (0..count).enumerate() {
            let (rank, followed) = self.start(position, index, logs).await;
            watched.push(rank);
            match followed {
                Ok(followed) => drop(followers.spawn(rank::follow(followed, sender.clone()))),
                Err(error) => {
                    let end = End::NotStarted { errno: None, message: crate::chain(&error) };
                    let ended = Input::Ended { index: position, end, at: clock::now() };
                    for input in [ended, Input::Gone { index: position }] {
                        perform(attempt.apply(clock::now(), input), &watched);
                    }
                }
            }
        }
        drop(sender);
        while !attempt.is_over() {
            let input = next_input(&attempt, &mut inputs, job, stop).await;
            self.announce(&input);
            let is_stop = matches!(input, Input::Stop(_));
            perform(attempt.apply(clock::now(), input), &watched);
            if is_stop {
                job.ask_to_end(stop.current()).await;
            } else if let Some(index) = attempt.root_cause() {
                // Without the last lines, which are still on their way; the other nodes must not wait for them.
                let cause =
                    self.rank_report(&attempt, index, Vec::new()).map(|rank| Cause::of_rank(rank, clock::now()));
                job.ending(cause).await;
            }
        }
        self.clear_up(&attempt).await;
        // Closes the sockets; the nanny of an abandoned rank goes on killing.
        followers.abort_all();
        self.report(&attempt, watched).await
    }

    /// Starts the rank with this index; the second value is the follower's, or why there is none.
    async fn start(
        &self,
        position: usize,
        index: u32,
        logs: &LogThread,
    ) -> (Watched, Result<rank::Followed, LaunchError>) {
        let mut watched = Watched { process: None, stderr_tail: Arc::default(), streams: Vec::new() };
        let streams = match self.open_streams(index, &mut watched, logs).await {
            Ok(streams) => streams,
            Err(error) => return (watched, Err(error)),
        };
        let variables = rank_variables(&self.launch.layout, self.assignment, index, self.launch.max_restarts);
        let mut variables: Vec<(&str, OsString)> =
            variables.into_iter().map(|(name, value)| (name, value.into())).collect();
        let error_file = self.places.error_file(self.launch.layout.first_local_rank + index);
        variables.extend(error_file.map(|path| (ERROR_FILE_VARIABLE, path.into_os_string())));
        match rank::start(position, &self.launch.nanny, &self.launch.command, variables, streams) {
            Ok((process, followed)) => {
                watched.process = Some(process);
                (watched, Ok(followed))
            }
            Err(error) => (watched, Err(error)),
        }
    }

    async fn open_streams(&self, index: u32, watched: &mut Watched, logs: &LogThread) -> Result<Streams, LaunchError> {
        let local_rank = self.launch.layout.first_local_rank + index;
        let rank = self.assignment.first_rank + index;
        let mut writers = Vec::new();
        for (stream, name) in [(Stream::Stdout, "stdout.log"), (Stream::Stderr, "stderr.log")] {
            let pipe = std::io::pipe();
            let (reader, writer) = pipe.map_err(|source| LaunchError::System { action: "make a pipe", source })?;
            let file = self.places.log_file(local_rank, name).map(|path| Places::open(&path)).transpose()?;
            let prefix = || self.launch.log.prefix(rank, local_rank, &self.launch.layout.role);
            let shown = self.launch.log.shows(local_rank, stream).then(|| Shown { prefix: prefix() });
            let tail = if stream == Stream::Stderr { Arc::clone(&watched.stderr_tail) } else { Arc::default() };
            let (done, ended) = oneshot::channel();
            watched.streams.push(ended);
            let events = self.launch.on_event.clone();
            logs.add(Pump { reader, stream, rank, file, shown, events, tail, done }).await;
            writers.push(writer);
        }
        let (stderr, stdout) = (writers.pop(), writers.pop());
        stdout
            .zip(stderr)
            .map(|(stdout, stderr)| Streams { stdout, stderr })
            .ok_or_else(|| LaunchError::Usage { message: "a rank has two streams".to_owned() })
    }

    /// Ends what nannies that were killed have left.
    async fn clear_up(&self, attempt: &Attempt) {
        let lost = attempt.ranks().iter().filter(|rank| matches!(rank.end, Some((End::NannyLost, _))));
        let pids: Vec<i32> = lost.filter_map(|rank| rank.pid).collect();
        if !pids.is_empty() {
            let marker = format!("{ERROR_FILE_VARIABLE}={}/", self.launch.scratch_dir.display());
            strays::sweep(marker.as_bytes(), pids).await;
        }
    }

    fn send(&self, event: Event) {
        if let Some(sink) = &self.launch.on_event {
            sink.send(event);
        }
    }

    fn announce(&self, input: &Input) {
        let rank = |index: &usize| self.assignment.first_rank.saturating_add(u32::try_from(*index).unwrap_or(0));
        match input {
            Input::Started { index, pid, .. } => self.send(Event::RankStarted { rank: rank(index), pid: *pid }),
            Input::Ended { index, end, at } => {
                self.send(Event::RankExited { rank: rank(index), end: end.clone(), at_ns: at.wall_ns });
            }
            _ => {}
        }
    }

    async fn report(&self, attempt: &Attempt, watched: Vec<Watched>) -> Report {
        let mut ranks = Vec::new();
        for (position, watched) in watched.into_iter().enumerate() {
            let streams = async {
                for stream in watched.streams {
                    // Nothing is ever sent: the end of the channel is the message.
                    let _ = stream.await;
                }
            };
            let _ = timeout(STREAMS_DEADLINE, streams).await;
            let tail = watched.stderr_tail.lock().unwrap_or_else(PoisonError::into_inner).lines();
            ranks.extend(self.rank_report(attempt, position, tail));
        }
        let root_cause = attempt.root_cause().and_then(|index| (index < ranks.len()).then(|| ranks.remove(index)));
        ranks.sort_by_key(|rank| rank.ended);
        Report {
            exit_code: attempt.exit_code(),
            run_id: self.launch.layout.run_id.clone(),
            host: self.launch.layout.hostname.clone(),
            node_rank: self.assignment.node_rank,
            restart_count: self.assignment.restart_count,
            summary: String::new(),
            cause: None,
            root_cause,
            other_ranks: ranks,
        }
    }

    fn rank_report(&self, attempt: &Attempt, position: usize, stderr_tail: Vec<String>) -> Option<RankReport> {
        let state = attempt.ranks().get(position)?;
        let (end, ended) = state.end.clone()?;
        let index = u32::try_from(position).ok()?;
        let local_rank = self.launch.layout.first_local_rank + index;
        let mut report = RankReport {
            rank: self.assignment.first_rank + index,
            local_rank,
            host: self.launch.layout.hostname.clone(),
            pid: state.pid,
            verdict: attempt.verdict(position)?,
            end,
            words: String::new(),
            started_ns: state.started.map(|started| started.wall_ns),
            ended_ns: ended.wall_ns,
            ended: ended.monotonic,
            stderr_tail,
            error_file: self.places.read_error(local_rank),
            stdout_log: self.places.log_file(local_rank, "stdout.log"),
            stderr_log: self.places.log_file(local_rank, "stderr.log"),
        };
        report.words = words(&report);
        Some(report)
    }
}

fn perform(effects: Vec<Effect>, watched: &[Watched]) {
    for Effect::Signal { index, number } in effects {
        if let Some(process) = watched.get(index).and_then(|watched| watched.process.as_ref()) {
            process.signal(number);
        }
    }
}

/// Waits for the next thing that happens. Cancel safe: all branches are.
async fn next_input(attempt: &Attempt, inputs: &mut mpsc::Receiver<Input>, job: &mut Job, stop: &mut Stop) -> Input {
    let now = clock::now().monotonic;
    let due = async {
        match attempt.deadline() {
            Some(deadline) => tokio::time::sleep(deadline.saturating_sub(now)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        Some(input) = inputs.recv() => input,
        request = stop.beyond(attempt.stop()) => Input::Stop(request),
        code = job.failed_elsewhere() => Input::PeerFailed { code },
        () = due => Input::Tick,
    }
}
