//! The command line: flags in, exit code out. stdout is data, stderr is for people.
//!
//! Owns: the commands and how results look. Refuses to know: how anything is done.

mod adapter;
mod args;
mod bench;
mod cache;
mod checkpoint;
mod convert;
mod coordinator;
mod demo;
mod devices;
mod estimate;
mod forward;
mod job;
mod k8s;
mod launch;
mod logs;
mod machine;
mod model;
mod model_cache;
mod output;
mod plan;
mod progress;
mod pull;
mod quality;
mod quantize;
mod queue;
mod recommend;
mod traces;
mod worker;

pub use args::Arguments;

use args::Command;
use clap::Parser as _;

/// Usage errors (sysexits.h, `EX_USAGE`).
const EXIT_USAGE: u8 = 64;
/// Ended because a signal asked for it, with everything saved (sysexits.h, `EX_TEMPFAIL`).
const EXIT_PREEMPTED: u8 = 75;

/// Lets a test end this process at a step that it names; nothing in a release build.
fn arm_faults(role: &str) {
    crate::faults::arm(crate::config::variable("WEIGHTCAST_FAULTS").as_deref(), role);
}

/// Runs the command line of this process and gives its exit code.
#[must_use]
pub fn main(arguments: impl Iterator<Item = std::ffi::OsString>) -> u8 {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, with exit code 0. A closed terminal changes nothing.
            let _ = error.print();
            return if error.use_stderr() { EXIT_USAGE } else { 0 };
        }
    };
    output::start_logging(arguments.log_format);
    crate::store::set_remote_settings(crate::config::remote_settings());
    match arguments.command {
        Command::Launch(flags) => {
            let _exporter = traces::start();
            launch::run(*flags)
        }
        Command::Coordinator(flags) => {
            let _exporter = traces::start();
            coordinator::run(*flags)
        }
        Command::Worker(flags) => {
            let _exporter = traces::start();
            worker::run(flags)
        }
        Command::Plan(flags) => plan::run(&flags),
        Command::Adapter { command } => adapter::run(&command),
        Command::Model { command } => model::run(&command),
        Command::Checkpoint { command } => checkpoint::run(&command),
        Command::Cache { command } => cache::run(&command),
        Command::K8s { command } => k8s::run(&command),
        Command::Status(flags) => job::status(&flags),
        Command::Logs(flags) => logs::run(&flags),
        Command::Save(flags) => job::save(&flags),
        Command::Unload { name, job } => job::unload(&name, &job),
        Command::Submit(flags) => queue::submit(&flags),
        Command::Jobs(flags) => queue::jobs(&flags),
        Command::Cancel(flags) => queue::cancel(&flags),
        Command::Drain(flags) => job::drain(&flags),
        Command::Demo(flags) => demo::run(&flags),
        Command::Bench { command, json } => bench::run(&command, json),
    }
}
