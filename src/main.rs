//! The process: it becomes a nanny when asked to, else runs the command line and exits with its code.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|argument| argument == weightcast_launcher::NANNY_ARGUMENT).is_some() {
        // Before any thread exists: a nanny waits for signals, and dies with its parent.
        return weightcast_launcher::nanny_main(arguments);
    }
    ExitCode::from(weightcast::cli::main(std::env::args_os()))
}
