//! The lines of this node's ranks, on their way to a coordinator that is another process.
//!
//! Owns: the queue between the thread of the logs, which never waits here, and the connection; trying again. Refuses to
//! know: messages.
//!
//! `LH-1`: a coordinator that is slow or away costs ranks nothing and this process bounded memory: the oldest lines are
//! dropped. Readers see by the numbers of those that come how many they were.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use weightcast_launcher::Stream;

use crate::coordinator::{LINE_OVERHEAD_BYTES, Line, LineStream, MAX_LINE_BYTES, cut, random_secret, unix_ns};
use crate::error::Kind;
use crate::rpc::{Clients, LineReport, Token, kind_of};
use crate::tls::Tls;
use crate::types::Rank;

/// Lines that wait, with their overhead: some seconds of a talkative node.
const QUEUE_BYTES: usize = 1 << 20;
/// Lines in one message, with their overhead. With [`GATHERING`] a node hands on some 320 KiB a second; what many nodes of a
/// large job say at once must not load their coordinator.
const MESSAGE_BYTES: usize = 32 << 10;
/// How long a line waits for others to go with it.
const GATHERING: Duration = Duration::from_millis(100);
/// Until a coordinator that is away is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// Lines that wait to be handed on.
#[derive(Debug, Default)]
pub(super) struct LineQueue {
    state: Mutex<State>,
    /// There is more, or there will be no more.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Line>,
    bytes: usize,
    /// Of each rank the number of its newest line.
    numbers: BTreeMap<u32, u64>,
    is_closed: bool,
}

fn bytes(line: &Line) -> usize {
    line.text.len() + LINE_OVERHEAD_BYTES
}

impl LineQueue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line that a rank has just written, and drops the oldest when there are too many.
    pub(super) fn push(&self, rank: u32, stream: Stream, text: String) {
        let (unix_ns, text) = (unix_ns(), cut(text, MAX_LINE_BYTES));
        let mut state = self.state();
        let number = state.numbers.entry(rank).or_default();
        *number += 1;
        let line = Line { rank: Rank(rank), number: *number, stream: line_stream(stream), unix_ns, text };
        state.bytes += bytes(&line);
        state.lines.push_back(line);
        while state.bytes > QUEUE_BYTES
            && let Some(oldest) = state.lines.pop_front()
        {
            state.bytes -= bytes(&oldest);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// There will be no more.
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_one();
    }

    /// The oldest lines, of at most `most_bytes`, or one.
    fn take(&self, most_bytes: usize) -> Vec<Line> {
        let mut state = self.state();
        let (mut taken, mut taken_bytes) = (Vec::new(), 0);
        while let Some(line) = state.lines.front() {
            taken_bytes += bytes(line);
            if taken_bytes > most_bytes && !taken.is_empty() {
                break;
            }
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= bytes(&line);
                taken.push(line);
            }
        }
        taken
    }

    /// Waits until there are lines or it is closed. Cancel safe, for one caller at a time.
    async fn ready(&self) {
        self.wait(|state| state.is_closed || !state.lines.is_empty()).await;
    }

    /// Waits until it is closed. Cancel safe, for one caller at a time.
    async fn closed(&self) {
        self.wait(|state| state.is_closed).await;
    }

    async fn wait(&self, condition: impl Fn(&State) -> bool) {
        while !condition(&self.state()) {
            self.changed.notified().await;
        }
    }
}

/// The launcher's word for a stream in the coordinator's.
pub(super) const fn line_stream(stream: Stream) -> LineStream {
    match stream {
        Stream::Stdout => LineStream::Stdout,
        Stream::Stderr => LineStream::Stderr,
    }
}

/// Hands lines on to the coordinator at `address` until the queue is closed and empty.
pub(super) async fn hand_on(queue: Arc<LineQueue>, address: String, (token, tls): (Token, Option<Tls>)) {
    let launcher: String = random_secret().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    // Kept until the coordinator says that it has them; what it had already it knows by the numbers.
    let mut unanswered = Vec::new();
    loop {
        let reason = match Clients::connect(&address, tls.as_ref()).await {
            Err(error) => error.to_string(),
            Ok(clients) => match over_one_connection(&queue, &mut unanswered, &launcher, (clients, &token)).await {
                Ok(()) => return,
                Err(status) if matches!(kind_of(&status), Kind::Invalid | Kind::Conflict) => {
                    tracing::debug!(reason = status.message(), "the coordinator does not take the ranks' lines");
                    return;
                }
                Err(status) => status.message().to_owned(),
            },
        };
        tracing::debug!(reason, "the ranks' lines wait for the coordinator");
        tokio::select! {
            () = tokio::time::sleep(RETRY_DELAY) => {}
            // Nobody waits for a coordinator that is away.
            () = queue.closed() => return,
        }
    }
}

async fn over_one_connection(
    queue: &LineQueue,
    unanswered: &mut Vec<Line>,
    launcher: &str,
    (mut clients, token): (Clients, &Token),
) -> Result<(), tonic::Status> {
    let mut report = LineReport::open(&mut clients, token).await?;
    loop {
        if unanswered.is_empty() {
            tokio::select! {
                () = queue.ready() => {}
                status = report.broken() => return Err(status),
            }
            tokio::select! {
                () = tokio::time::sleep(GATHERING) => {}
                () = queue.closed() => {}
            }
            *unanswered = queue.take(MESSAGE_BYTES);
            if unanswered.is_empty() {
                report.end().await;
                return Ok(());
            }
        }
        report.send(launcher, unanswered).await?;
        unanswered.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `LH-1`: without anybody who takes lines, the newest megabyte waits, and numbers go on.
    #[test]
    fn lh_1_the_oldest_lines_make_room() {
        let queue = LineQueue::default();
        // A line and its overhead are a KiB, so a thousand and 24 of them fit.
        let text = "x".repeat(1024 - LINE_OVERHEAD_BYTES);
        for _ in 0..3000 {
            queue.push(5, Stream::Stdout, text.clone());
        }
        queue.push(6, Stream::Stderr, "é".repeat(MAX_LINE_BYTES));
        let mut taken = Vec::new();
        loop {
            match queue.take(MESSAGE_BYTES) {
                lines if lines.is_empty() => break,
                lines => {
                    assert!(lines.iter().map(bytes).sum::<usize>() <= MESSAGE_BYTES);
                    taken.extend(lines);
                }
            }
        }
        let last = taken.pop().expect("the newest");
        assert_eq!((last.rank, last.number, last.text.len()), (Rank(6), 1, MAX_LINE_BYTES));
        let numbers: Vec<u64> = taken.iter().map(|line| line.number).collect();
        // The long line took the room of nine more: 8 KiB and its overhead.
        assert_eq!(numbers, (3000 - 1024 + 9 + 1..=3000).collect::<Vec<_>>());
        assert_eq!(queue.state().bytes, 0);
    }

    #[tokio::test]
    async fn whoever_takes_is_woken_by_a_line_and_by_the_end() {
        let queue = Arc::new(LineQueue::default());
        let other = Arc::clone(&queue);
        let ready = async { queue.ready().await };
        let pushed = async { other.push(0, Stream::Stdout, "a".to_owned()) };
        tokio::join!(ready, pushed);
        assert_eq!(queue.take(1).len(), 1, "one line, however long");
        tokio::join!(queue.closed(), async { other.close() });
        queue.ready().await;
        assert!(queue.take(1).is_empty());
    }
}
