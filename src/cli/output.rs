//! Writing to stdout and stderr. A reader that went away changes nothing about what was done.

use std::io::Write as _;

use tracing_subscriber::EnvFilter;

use super::args::LogFormat;
use crate::error::{Classify, Kind, chain};

/// A line of data.
pub(super) fn data(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// A value as JSON on stdout.
pub(super) fn json(value: &impl serde::Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => data(&text),
        Err(error) => say(&format!("error: cannot print JSON: {error}")),
    }
}

/// A line for people.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Says an error and gives its exit code.
pub(super) fn fail<E: Classify + 'static>(error: &E) -> u8 {
    say(&format!("error: {}", chain(error)));
    error.kind().exit_code()
}

/// Says why nothing was started, and gives the exit code. Whoever asked has to change something before asking again: a hub
/// or a disk that is out of reach counts as an environment that cannot work, and not as a peer that was lost.
pub(super) fn refuse<E: Classify + 'static>(error: &E) -> u8 {
    match fail(error) {
        code if code == Kind::Unavailable.exit_code() => Kind::Conflict.exit_code(),
        code => code,
    }
}

/// Says an error that has its own exit code.
pub(super) fn fail_with(error: &(dyn std::error::Error + 'static), exit_code: u8) -> u8 {
    say(&format!("error: {}", chain(error)));
    exit_code
}

/// Warnings, and the steps of a training run.
const DEFAULT_FILTER: &str = "warn,weightcast::train::report=info";

/// Log lines go to stderr: those of [`DEFAULT_FILTER`], or what `WEIGHTCAST_LOG` says.
pub(super) fn start_logging(format: LogFormat) {
    let filter = crate::config::variable("WEIGHTCAST_LOG").unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second subscriber in one process, as in tests, is refused and not needed.
    let _ = match format {
        LogFormat::Json => lines.json().try_init(),
        LogFormat::Text => lines.with_ansi(false).try_init(),
    };
}

/// Bytes for people.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let mut value = count as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {name}") }
}

/// Shows how far a download is: a bar on a terminal, a line per file otherwise.
pub(super) fn download(progress: crate::hub::Progress<'_>) {
    use std::io::IsTerminal as _;
    let done = progress.done_bytes >= progress.total_bytes;
    let line = format!("{}  {} of {}", progress.file, bytes(progress.done_bytes), bytes(progress.total_bytes));
    if std::io::stderr().is_terminal() {
        let _ = write!(std::io::stderr().lock(), "\r\x1b[K{line}{}", if done { "\n" } else { "" });
    } else if done {
        say(&line);
    }
}
