//! Ranks' lines on the wire: what launchers hand on, and what readers follow.
//!
//! Owns: both ends of `ReportLines`, the server's end of `FollowLogs`. Refuses to know: what is kept (the coordinator's
//! `lines`), and when a launcher tries again.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, Streaming};
use weightcast_proto::v1;

use super::auth::Token;
use super::client::{Clients, lasting_request};
use super::{convert, validate};
use crate::clock::Instant;
use crate::coordinator::{Coordinator, Line, LineChoice, LineReader, LineStream, Read, View};
use crate::types::Rank;

/// Lines with their overhead in one message to a reader; well below what a message may be.
const MESSAGE_BYTES: usize = 48 << 10;
/// How often is looked for lines that have come.
const TICK: Duration = Duration::from_millis(100);
/// A reader that was told of the end hangs up; one that does not is hung up on, before the coordinator ends.
const HANGING_UP: Duration = Duration::from_secs(1);

impl From<Line> for v1::LogLine {
    fn from(line: Line) -> Self {
        let stream = match line.stream {
            LineStream::Stdout => v1::LogStream::Stdout,
            LineStream::Stderr => v1::LogStream::Stderr,
        };
        let (rank, number, unix_ns) = (line.rank.0, line.number, line.unix_ns);
        Self { rank, number, stream: stream.into(), unix_ns, text: line.text }
    }
}

fn received(line: v1::LogLine) -> Line {
    let stream = match line.stream() {
        v1::LogStream::Stderr => LineStream::Stderr,
        v1::LogStream::Stdout | v1::LogStream::Unspecified => LineStream::Stdout,
    };
    Line { rank: Rank(line.rank), number: line.number, stream, unix_ns: line.unix_ns, text: line.text }
}

/// What a launcher's stream of lines is answered with.
pub(super) fn receive(
    coordinator: Coordinator,
    requests: Streaming<v1::ReportLinesRequest>,
) -> impl Stream<Item = Result<v1::ReportLinesResponse, Status>> + Send {
    // The coordinator stays until the last lines are here.
    let (source, follower) = (coordinator.lines().source(), coordinator.follow());
    requests.map(move |request| {
        let _ = (&source, &follower);
        let request = request?;
        let header = {
            let views = coordinator.views();
            let view = views.borrow();
            validate::lines(&request, view.ranks.len())?;
            convert::header(&coordinator, &view)
        };
        coordinator.lines().receive(&request.launcher_id, request.lines.into_iter().map(received));
        Ok(v1::ReportLinesResponse { header: Some(header) })
    })
}

/// What a reader is answered with.
#[derive(Debug)]
pub(super) struct LogStream {
    coordinator: Coordinator,
    views: watch::Receiver<View>,
    reader: LineReader,
    is_following: bool,
    ticks: Interval,
    /// Since when the job is over.
    over: Option<Instant>,
    /// Since when the reader knows that there will be no more.
    ended: Option<Instant>,
    _follower: Arc<()>,
}

impl LogStream {
    pub(super) fn new(coordinator: Coordinator, reader: LineReader, choice: &LineChoice) -> Self {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (views, follower) = (coordinator.views(), coordinator.follow());
        let is_following = choice.follow;
        Self { coordinator, views, reader, is_following, ticks, over: None, ended: None, _follower: follower }
    }

    fn answer(&self, lines: Vec<Line>, ended: bool) -> v1::FollowLogsResponse {
        let header = convert::header(&self.coordinator, &self.views.borrow());
        let lines = lines.into_iter().map(v1::LogLine::from).collect();
        v1::FollowLogsResponse { header: Some(header), lines, ended }
    }
}

impl Stream for LogStream {
    type Item = Result<v1::FollowLogsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let now = crate::clock::now();
            if let Some(ended) = self.ended {
                if !self.is_following || now.saturating_duration_since(ended) >= HANGING_UP {
                    return Poll::Ready(None);
                }
                // Who is told of the end and hangs up has seen all of it; an end of ours may be lost with the process.
                ready!(self.ticks.poll_tick(context));
                continue;
            }
            if self.over.is_none() && self.views.borrow().is_over() {
                self.over = Some(now);
            }
            let over = self.over;
            match self.reader.next(over, now, MESSAGE_BYTES) {
                Read::Lines(lines) => return Poll::Ready(Some(Ok(self.answer(lines, false)))),
                Read::Ended => {
                    self.ended = Some(now);
                    return Poll::Ready(Some(Ok(self.answer(Vec::new(), true))));
                }
                Read::Nothing => {
                    ready!(self.ticks.poll_tick(context));
                }
            }
        }
    }
}

/// A launcher's stream of lines to the coordinator.
#[derive(Debug)]
pub struct LineReport {
    requests: mpsc::Sender<v1::ReportLinesRequest>,
    answers: Streaming<v1::ReportLinesResponse>,
}

impl LineReport {
    /// Opens it.
    ///
    /// # Errors
    /// What the coordinator says to that.
    pub async fn open(clients: &mut Clients, token: &Token) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(1);
        let message = lasting_request(token, ReceiverStream::new(receiver));
        let message = message.map_err(|error| Status::unavailable(error.to_string()))?;
        let answers = clients.worker.report_lines(message).await?.into_inner();
        Ok(Self { requests, answers })
    }

    /// Hands lines on, and returns when they are kept.
    ///
    /// # Errors
    /// Why they may not be.
    pub async fn send(&mut self, launcher: &str, lines: &[Line]) -> Result<(), Status> {
        let lines = lines.iter().cloned().map(v1::LogLine::from).collect();
        let request = v1::ReportLinesRequest { launcher_id: launcher.to_owned(), lines };
        // A stream that has ended says why in its answer.
        let _ = self.requests.send(request).await;
        match self.answers.message().await? {
            Some(_) => Ok(()),
            None => Err(ended()),
        }
    }

    /// Returns when the stream has ended, while nothing is sent. Cancel safe: nothing but the end is to come.
    pub async fn broken(&mut self) -> Status {
        self.answers.message().await.map_or_else(|status| status, |_| ended())
    }

    /// Says that there is no more, and waits until the coordinator has heard it.
    pub async fn end(self) {
        let Self { requests, mut answers } = self;
        drop(requests);
        while let Ok(Some(_)) = answers.message().await {}
    }
}

fn ended() -> Status {
    Status::unavailable("the coordinator takes no more lines")
}
