//! Asking a running launch to end.
//!
//! Owns: the two sides of the request, and the translation of this process's signals into it.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How urgently a launch is to end. A later request can only be more urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopRequest {
    /// Nobody asked.
    None,
    /// Hand this signal on to the ranks and give them the shutdown timeout.
    Signal(i32),
    /// Kill them now.
    Kill,
}

/// The side that asks.
#[derive(Clone, Debug)]
pub struct Stopper(watch::Sender<StopRequest>);

/// The side that is asked; pass it to [`crate::run`].
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<StopRequest>);

/// Makes the two sides.
#[must_use]
pub fn stop_channel() -> (Stopper, Stop) {
    let (sender, receiver) = watch::channel(StopRequest::None);
    (Stopper(sender), Stop(receiver))
}

impl Stopper {
    /// Asks the launch to end. The first signal stays; asking again after one means [`StopRequest::Kill`] only when said so.
    pub fn stop(&self, request: StopRequest) {
        self.0.send_if_modified(|current| {
            let is_first = *current == StopRequest::None && request != StopRequest::None;
            let is_kill = request == StopRequest::Kill && *current != StopRequest::Kill;
            if is_first || is_kill {
                *current = request;
            }
            is_first || is_kill
        });
    }

    /// Turns signals to this process into requests, for ever: SIGTERM, SIGHUP and SIGQUIT once; the second SIGINT kills.
    /// Cancel safe: a signal that arrives while nobody polls is seen at the next poll.
    ///
    /// # Errors
    /// The system's error when the handlers cannot be installed.
    pub async fn follow_signals(&self) -> std::io::Result<std::convert::Infallible> {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut terminations = signal(SignalKind::terminate())?;
        let mut hangups = signal(SignalKind::hangup())?;
        let mut quits = signal(SignalKind::quit())?;
        let mut was_interrupted = false;
        loop {
            let kind = tokio::select! {
                _ = interrupts.recv() => SignalKind::interrupt(),
                _ = terminations.recv() => SignalKind::terminate(),
                _ = hangups.recv() => SignalKind::hangup(),
                _ = quits.recv() => SignalKind::quit(),
            };
            let is_repeated = kind == SignalKind::interrupt() && std::mem::replace(&mut was_interrupted, true);
            self.stop(if is_repeated { StopRequest::Kill } else { StopRequest::Signal(kind.as_raw_value()) });
        }
    }
}

impl Stop {
    /// Waits for a request more urgent than `seen`. Pends for ever when the asking side is gone. Cancel safe.
    pub(crate) async fn beyond(&mut self, seen: StopRequest) -> StopRequest {
        match self
            .0
            .wait_for(|request| *request > seen && (seen == StopRequest::None || *request == StopRequest::Kill))
            .await
        {
            Ok(request) => *request,
            Err(_) => std::future::pending().await,
        }
    }

    /// The request at this moment.
    pub(crate) fn current(&self) -> StopRequest {
        *self.0.borrow()
    }
}
