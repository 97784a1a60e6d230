//! `weightcast-launch`: launches any program, without the rest of Weightcast.
//!
//! Owns: the process: arguments, signals, the exit code. Nothing is decided here.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use weightcast_launcher::{
    EXIT_USAGE, Environment, Event, EventSink, Launch, LaunchArgs, LaunchError, NANNY_ARGUMENT, Report, chain,
    nanny_main, run, stop_channel,
};

/// Starts the ranks of one node, of any program, and leaves no process behind
#[derive(Debug, Parser)]
#[command(name = "weightcast-launch", version)]
struct Arguments {
    #[command(flatten)]
    launch: LaunchArgs,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|argument| argument == NANNY_ARGUMENT).is_some() {
        return nanny_main(arguments);
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, with exit code 0. A closed terminal changes nothing.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    match launch(&arguments.launch) {
        Ok(report) => {
            if report.exit_code != 0 {
                say(&report.to_string());
            }
            ExitCode::from(report.exit_code)
        }
        Err(error) => {
            say(&format!("error: {}\n", chain(&error)));
            ExitCode::from(error.exit_code())
        }
    }
}

fn launch(arguments: &LaunchArgs) -> Result<Report, LaunchError> {
    let environment = Environment::of_this_process();
    let mut launch = Launch::from_args(arguments, &environment)?;
    launch.on_event = Some(EventSink::new(|event| {
        if let Event::Note { text } = event {
            say(&format!("[launcher] {text}\n"));
        }
    }));
    let system = |source| LaunchError::System { action: "start the runtime", source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(system)?;
    runtime.block_on(async {
        let (stopper, stop) = stop_channel();
        tokio::select! {
            report = run(launch, stop) => report,
            Err(source) = stopper.follow_signals() => Err(LaunchError::System { action: "handle signals", source }),
        }
    })
}

/// Writes for people; nobody may be there to read it.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
