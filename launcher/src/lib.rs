//! Starts the ranks of one node, of any program, and leaves no process behind.
//!
//! Owns: torchrun's contract (flags, `PET_*` twins, the environment of a rank, log files, exit codes), the detection of the
//! scheduler, a nanny per rank, the report of the root cause, and the agreement of the launchers of several nodes.
//! Refuses to know: models, checkpoints, the coordinator. It depends on nothing of Weightcast.
//!
//! ```text
//! flags + environment ─resolve▶ Layout ─Launch::from_args▶ Launch ─run▶ Report
//!                                        launcher ─ nanny ─ rank ─ whatever it starts
//!                                                 ─ nanny ─ rank
//! ```
//!
//! A program that launches must become a nanny when it is asked to, before it has a second thread:
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! fn main() -> ExitCode {
//!     let mut arguments = std::env::args_os().skip(1).peekable();
//!     if arguments.next_if(|argument| argument == weightcast_launcher::NANNY_ARGUMENT).is_some() {
//!         return weightcast_launcher::nanny_main(arguments);
//!     }
//!     // … parse `LaunchArgs`, make a runtime, await `run` …
//!     ExitCode::SUCCESS
//! }
//! ```

mod args;
mod attempt;
mod clock;
mod command;
mod config;
mod end;
mod environment;
mod error;
mod events;
mod job;
mod layout;
mod logs;
mod nanny;
mod places;
mod rank;
mod rendezvous;
mod report;
mod run;
mod settings;
mod stop;
mod strays;

pub use args::LaunchArgs;
pub use attempt::{Grace, Verdict};
pub use command::RankCommand;
pub use config::{Launch, Nanny};
pub use end::{
    EXIT_CONFIGURATION, EXIT_DO_NOT_RESTART, EXIT_PREEMPTED, EXIT_UNREACHABLE, EXIT_USAGE, End, is_restartable,
    signal_name,
};
pub use environment::Environment;
pub use error::LaunchError;
pub use events::{Event, EventSink};
pub use layout::{Endpoint, Layout, ScheduledRank, resolve, scheduled_rank};
pub use logs::{LogConfig, Stream, StreamChoice};
pub use nanny::{NANNY_ARGUMENT, nanny_main};
pub use rendezvous::Gathering;
pub use report::{RankReport, Report, TERMINATION_LOG_LIMIT};
pub use run::run;
pub use stop::{Stop, StopRequest, Stopper, stop_channel};

/// The message of an error and of all its sources, joined by `: `.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let (mut text, mut source) = (error.to_string(), error.source());
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
