//! The job as one node sees it: alone, or with others.
//!
//! Owns: [`Job`], which answers the only questions that `run` has: which ranks now, must they end, and what next.
//! Refuses to know: processes. A node alone decides by itself, several ask the rendezvous.

use std::net::{Ipv4Addr, TcpListener};

use crate::clock;
use crate::command::Assignment;
use crate::config::Launch;
use crate::end::{EXIT_PREEMPTED, EXIT_UNREACHABLE, is_restartable, signal_name};
use crate::error::LaunchError;
use crate::events::Event;
use crate::rendezvous::{Cause, Join, Member, News, Over, Part, Rules, Seat, ToLauncher, ToMeeting};
use crate::report::Report;
use crate::stop::{Stop, StopRequest};

/// What comes next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Start the ranks in these places.
    Attempt(Assignment),
    /// Nothing more.
    Over(Over),
}

/// The job as one node sees it.
#[derive(Debug)]
pub(crate) enum Job {
    /// One node, or one that need not know of the others.
    Alone,
    /// Several, and this one's part among them.
    Several(Box<Several>),
}

#[derive(Debug)]
pub(crate) struct Several {
    member: Member,
    host: String,
    attempt: u32,
    /// The others know that this attempt ends.
    is_ending: bool,
    /// The rendezvous is lost, and why.
    lost: Option<String>,
}

impl Job {
    /// Begins: several nodes start to look for each other.
    pub(crate) fn begin(launch: &Launch) -> Result<Self, LaunchError> {
        let layout = &launch.layout;
        let Some(endpoint) = layout.endpoint.clone() else { return Ok(Self::Alone) };
        let gathering = &launch.gathering;
        let read = |path: &std::path::PathBuf| {
            let file = |source| LaunchError::File { action: "read", path: path.clone(), source };
            Ok(std::fs::read(path).map_err(file)?.trim_ascii().to_vec())
        };
        let token = gathering.token_file.as_ref().map(read).transpose()?;
        if token.as_ref().is_some_and(Vec::is_empty) {
            return Err(LaunchError::Usage { message: "--rdzv-token-file names an empty file".to_owned() });
        }
        // The address that all know is rank 0's.
        let master = layout.master_addr.clone().filter(|_| layout.node_rank == Some(0));
        let join = Join {
            run_id: layout.run_id.clone(),
            node_rank: layout.node_rank,
            nproc: layout.nproc_per_node,
            host: layout.hostname.clone(),
            address: gathering.local_addr.clone().or(master),
            port: port(launch)?,
        };
        let rules = Rules {
            run_id: layout.run_id.clone(),
            nnodes_min: layout.nnodes_min,
            nnodes: layout.nnodes,
            max_restarts: launch.max_restarts,
            join_timeout: gathering.join_timeout,
            last_call: gathering.last_call,
            silence: gathering.silence,
        };
        let member = Member::start(Part { endpoint, join, rules, token, is_insecure: gathering.is_insecure })?;
        let host = layout.hostname.clone();
        Ok(Self::Several(Box::new(Several { member, host, attempt: 0, is_ending: false, lost: None })))
    }

    /// The places of the first attempt.
    pub(crate) async fn first(&mut self, launch: &Launch, stop: &mut Stop) -> Result<Next, LaunchError> {
        match self {
            Self::Alone => Ok(Next::Attempt(alone(launch, 0)?)),
            Self::Several(several) => several.next(launch, stop, None).await,
        }
    }

    /// Waits until the ranks must end because of another node; returns the exit code that this means. Cancel safe.
    pub(crate) async fn failed_elsewhere(&mut self) -> u8 {
        match self {
            Self::Alone => std::future::pending().await,
            Self::Several(several) => several.failed_elsewhere().await,
        }
    }

    /// Says that a rank of this node has failed.
    pub(crate) async fn ending(&mut self, cause: Option<Cause>) {
        if let (Self::Several(several), Some(cause)) = (self, cause) {
            several.ending(cause).await;
        }
    }

    /// Says that this launcher was asked to end its ranks.
    pub(crate) async fn ask_to_end(&mut self, request: StopRequest) {
        if let Self::Several(several) = self {
            several.ask_to_end(request).await;
        }
    }

    /// Says how the attempt ended here, and asks what comes next.
    pub(crate) async fn finished(
        &mut self,
        launch: &Launch,
        report: &Report,
        stop: &mut Stop,
    ) -> Result<Next, LaunchError> {
        match self {
            Self::Alone => {
                let may_restart = is_restartable(report.exit_code) && stop.current() == StopRequest::None;
                if may_restart && report.restart_count < launch.max_restarts {
                    return Ok(Next::Attempt(alone(launch, report.restart_count + 1)?));
                }
                Ok(Next::Over(Over { exit_code: report.exit_code, cause: None }))
            }
            Self::Several(several) => several.finished(launch, report, stop).await,
        }
    }

    /// Leaves, after the others have heard of the end.
    pub(crate) async fn leave(self) {
        if let Self::Several(several) = self {
            several.member.leave().await;
        }
    }
}

impl Several {
    async fn failed_elsewhere(&mut self) -> u8 {
        loop {
            if self.lost.is_some() {
                // Said once already; the attempt ends.
                std::future::pending::<()>().await;
            }
            match self.member.hear().await {
                Some(News::Message(ToLauncher::End { attempt, cause })) if attempt == self.attempt => {
                    self.is_ending = true;
                    return cause.code;
                }
                Some(News::Message(_) | News::Note(_)) => {}
                Some(News::Lost(text) | News::Refused(text)) => {
                    self.lost = Some(text);
                    return EXIT_UNREACHABLE;
                }
                None => {
                    self.lost = Some("it has ended".to_owned());
                    return EXIT_UNREACHABLE;
                }
            }
        }
    }

    async fn ending(&mut self, cause: Cause) {
        if !std::mem::replace(&mut self.is_ending, true) {
            self.member.say(ToMeeting::Ending { attempt: self.attempt, cause }).await;
        }
    }

    async fn ask_to_end(&mut self, request: StopRequest) {
        let how = match request {
            StopRequest::Signal(number) => format!("by {}", signal_name(number)),
            StopRequest::Kill | StopRequest::None => "at once".to_owned(),
        };
        let words = format!("the launcher on {} was asked to end {how}", self.host);
        // The code of a preemption: the others get the time to save their work.
        self.ending(Cause { is_request: true, ..Cause::new(EXIT_PREEMPTED, words, clock::now()) }).await;
    }

    async fn finished(&mut self, launch: &Launch, report: &Report, stop: &mut Stop) -> Result<Next, LaunchError> {
        if let Some(text) = &self.lost {
            // What failed here first stands; else the loss is the reason.
            let exit_code = report.root_cause.as_ref().map_or(EXIT_UNREACHABLE, |_| report.exit_code);
            let words = format!("the rendezvous at {} is lost: {text}", self.member.endpoint());
            let cause = Some(Cause::new(EXIT_UNREACHABLE, words, clock::now())).filter(|_| report.root_cause.is_none());
            return Ok(Next::Over(Over { exit_code, cause }));
        }
        let cause = report.root_cause.clone().map(|rank| Cause::of_rank(rank, clock::now()));
        let is_stopped = stop.current() != StopRequest::None;
        let (attempt, exit_code) = (self.attempt, report.exit_code);
        self.member.say(ToMeeting::Finished { attempt, exit_code, cause, is_stopped, port: port(launch)? }).await;
        self.next(launch, stop, Some(report)).await
    }

    /// Waits for the next places or for the end of the job. `report` is what the last attempt ended with.
    async fn next(&mut self, launch: &Launch, stop: &mut Stop, report: Option<&Report>) -> Result<Next, LaunchError> {
        // A request that was there before the ranks ended has been told already.
        let mut seen = if report.is_some() { stop.current() } else { StopRequest::None };
        let endpoint = self.member.endpoint().to_owned();
        loop {
            let news = tokio::select! {
                news = self.member.hear() => news,
                request = stop.beyond(seen) => {
                    seen = request;
                    let number = if let StopRequest::Signal(number) = request { u8::try_from(number).unwrap_or(15) } else { 9 };
                    let own = report.map(|report| report.exit_code).filter(|code| *code != 0);
                    if report.is_none() || request == StopRequest::Kill {
                        let exit_code = own.unwrap_or_else(|| 128_u8.saturating_add(number));
                        return Ok(Next::Over(Over { exit_code, cause: None }));
                    }
                    // The ranks here have ended, those of other nodes have not.
                    self.ask_to_end(request).await;
                    continue;
                }
            };
            match news {
                Some(News::Message(ToLauncher::Start(seat))) => {
                    (self.attempt, self.is_ending) = (seat.attempt, false);
                    return Ok(Next::Attempt(assignment(seat)));
                }
                Some(News::Message(ToLauncher::Over(over))) => return Ok(Next::Over(over)),
                Some(News::Message(ToLauncher::Waiting { joined, wanted })) => {
                    note(launch, format!("waiting at {endpoint}: {joined} of {wanted} nodes have come"));
                }
                Some(News::Message(_)) => {}
                Some(News::Note(text)) => note(launch, text),
                Some(News::Refused(reason)) => return Err(LaunchError::Refused { endpoint, reason }),
                Some(News::Lost(text)) => return self.lost_while_waiting(report, text),
                None => return self.lost_while_waiting(report, "it has ended".to_owned()),
            }
        }
    }

    fn lost_while_waiting(&self, report: Option<&Report>, text: String) -> Result<Next, LaunchError> {
        let endpoint = self.member.endpoint().to_owned();
        match report {
            // A rank that failed here is worth more than the loss that may follow from it.
            Some(report) if report.exit_code != 0 => Ok(Next::Over(Over { exit_code: report.exit_code, cause: None })),
            _ => Err(LaunchError::Rendezvous { endpoint, message: text }),
        }
    }
}

fn assignment(seat: Seat) -> Assignment {
    Assignment {
        node_rank: seat.node_rank,
        nnodes: seat.nnodes,
        first_rank: seat.first_rank,
        world_size: seat.world_size,
        master_addr: seat.master_addr,
        master_port: seat.master_port,
        restart_count: seat.attempt,
    }
}

/// The assignment of a node that is alone.
fn alone(launch: &Launch, restart_count: u32) -> Result<Assignment, LaunchError> {
    let layout = &launch.layout;
    Ok(Assignment {
        node_rank: layout.node_rank.unwrap_or(0),
        nnodes: layout.nnodes,
        first_rank: layout.first_rank,
        world_size: layout.world_size,
        master_addr: layout.master_addr.clone().unwrap_or_else(|| Ipv4Addr::LOCALHOST.to_string()),
        master_port: port(launch)?,
        restart_count,
    })
}

/// The port for rank 0: as told, or one that was free a moment ago. Rank 0, a program of any make, must bind it itself, so
/// it cannot be kept: the kernel hands out another one for each request, and reuses this one only after thousands more. Our
/// own workers do not need it.
fn port(launch: &Launch) -> Result<u16, LaunchError> {
    if let Some(port) = launch.layout.master_port {
        return Ok(port);
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|listener| listener.local_addr());
    let address = listener.map_err(|source| LaunchError::System { action: "find a port for rank 0", source })?;
    Ok(address.port())
}

fn note(launch: &Launch, text: String) {
    if let Some(sink) = &launch.on_event {
        sink.send(Event::Note { text });
    }
}
