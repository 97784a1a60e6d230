//! The one place that spawns: async tasks with a name and a common cancellation, joined with a deadline, and named
//! threads for work that blocks.
//!
//! Owns: [`Tasks`], [`spawn_thread`], [`request`] and the signals that would end the process in the middle of its work. Refuses to know: what the work is.
//! `TK-1`: no task outlives its [`Tasks`]: dropping it aborts what is left.

mod io;

use std::future::Future;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::task::JoinSet;

pub use io::{Answer, REQUEST_DEADLINE, request};

/// A set of tasks that end together.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<&'static str>,
}

impl Tasks {
    /// No tasks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task.
    pub fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.set.spawn(async move {
            work.await;
            name
        });
    }

    /// Forgets those that have ended, where tasks come and go without an end.
    pub fn reap(&mut self) {
        while self.set.try_join_next().is_some() {}
    }

    /// Waits for all tasks to end by themselves, at most `deadline`; what is left is aborted.
    pub async fn finish(mut self, deadline: Duration) {
        let joined = async { while self.set.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(deadline, joined).await;
    }

    /// Asks all tasks to end by aborting them at their next await, and waits for that, at most `deadline`.
    pub async fn shut_down(mut self, deadline: Duration) {
        self.set.abort_all();
        let joined = async { while self.set.join_next().await.is_some() {} };
        if tokio::time::timeout(deadline, joined).await.is_err() {
            tracing::warn!(?deadline, "tasks did not end in time");
        }
    }
}

/// Makes a write beyond the limit on the size of files (`ulimit -f`, `LimitFSIZE=`) an error that names the file, rather
/// than SIGXFSZ, which ends the process without a word. Holds until the process ends.
///
/// # Errors
/// When the system refuses the handler.
pub fn survive_file_size_limit() -> std::io::Result<()> {
    let signal = tokio::signal::unix::SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    // A handler that was installed once stays; what it would tell is of no interest.
    tokio::signal::unix::signal(signal).map(drop)
}

/// Lets this process and those that it starts open as many files as the system allows: a coordinator has a connection of each rank,
/// and many systems begin with 1,024.
pub fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%errno, "the limit of open files stays");
    }
}

/// Starts a thread for work that blocks.
///
/// # Errors
/// When the system cannot start one.
pub fn spawn_thread<R: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> R + Send + 'static,
) -> std::io::Result<JoinHandle<R>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

/// Runs work that blocks for more than half a millisecond off the async threads.
///
/// # Panics
/// When the work panics.
pub async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
