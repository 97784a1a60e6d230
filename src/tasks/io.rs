//! Requests to servers, carried out on threads of their own, so that code that blocks can wait for them from any thread.
//!
//! Owns: the two threads, started with the first request, and the waiting. Refuses to know: what is requested.
//!
//! `IO-1`: no answer is waited for longer than [`REQUEST_DEADLINE`].

use std::future::Future;
use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// Decryption is the work of these threads; the rest is waiting.
const IO_THREADS: usize = 2;
/// Requests have their own, shorter limits; this one ends a request that always gets a little further.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(900);

/// A request under way.
#[derive(Debug)]
pub struct Answer<T>(Receiver<Option<T>>);

impl<T> Answer<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// `TimedOut` after [`REQUEST_DEADLINE`].
    pub fn wait(self) -> io::Result<T> {
        match self.0.recv() {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => {
                let seconds = REQUEST_DEADLINE.as_secs();
                Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {seconds} s")))
            }
            Err(_) => Err(io::Error::other("the request ended without an answer: it panicked")),
        }
    }
}

/// Starts a request.
///
/// # Errors
/// When the system cannot start the threads.
pub fn request<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> io::Result<Answer<T>> {
    let (tell, answer) = sync_channel(1);
    runtime()?.spawn(async move {
        let result = tokio::time::timeout(REQUEST_DEADLINE, work).await.ok();
        // Who no longer waits needs no answer; there is room for one, so this does not block.
        let _ = tell.send(result);
    });
    Ok(Answer(answer))
}

/// The threads live as long as the process: they hold connections that are worth keeping, and no state.
fn runtime() -> io::Result<&'static Runtime> {
    static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let start = || Builder::new_multi_thread().worker_threads(IO_THREADS).thread_name("io").enable_all().build();
    match RUNTIME.get_or_init(start) {
        Ok(runtime) => Ok(runtime),
        Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The coordinator starts on an async thread and looks into its store there.
    #[test]
    fn answers_come_on_any_thread() {
        let outer = Builder::new_current_thread().build().expect("a runtime");
        let answer = outer.block_on(async { request(async { 7 }).expect("threads").wait() });
        assert_eq!(answer.expect("an answer"), 7);
        let panicked = request(async { panic!("for the test") }).expect("threads").wait();
        let error: io::Error = panicked.map(|(): ()| ()).expect_err("no answer");
        assert!(error.to_string().contains("panicked"), "{error}");
    }
}
