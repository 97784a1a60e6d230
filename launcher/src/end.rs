//! How a rank's process ended, and the exit code that this means.
//!
//! Owns: [`End`], the names of signals, the rules "own code, or 128+n for a signal" and "which codes are never restarted".
//! Refuses to know: whose fault it was (see `attempt`).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Usage: the command line is wrong.
pub const EXIT_USAGE: u8 = 64;
/// The rendezvous, or a node of the job, cannot be reached.
pub const EXIT_UNREACHABLE: u8 = 69;
/// Preempted, after a committed checkpoint.
pub const EXIT_PREEMPTED: u8 = 75;
/// A configuration or an environment that cannot work.
pub const EXIT_CONFIGURATION: u8 = 78;
/// The program asks not to be restarted.
pub const EXIT_DO_NOT_RESTART: u8 = 93;

/// How the process of a rank ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum End {
    /// It exited with this code.
    Exited(u8),
    /// This signal ended it.
    Signaled(i32),
    /// Its program could not be started.
    NotStarted {
        /// The system's error number, when there is one.
        errno: Option<i32>,
        /// The error in words.
        message: String,
    },
    /// Its nanny ended without a word; the rank was ended with it.
    NannyLost,
    /// It was still there long after SIGKILL (for instance, stuck in the kernel), and was left to its nanny.
    Abandoned,
}

impl End {
    /// The exit code that stands for this end: the process's own, 128+n for signal n, 127 or 126 for a program that is
    /// not found or cannot be executed (as shells do), 137 for a rank that was lost or left behind.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        const ENOENT: i32 = 2;
        match self {
            Self::Exited(code) => *code,
            Self::Signaled(number) => 128_u8.saturating_add(u8::try_from(*number).unwrap_or(127)),
            Self::NotStarted { errno: Some(ENOENT), .. } => 127,
            Self::NotStarted { .. } => 126,
            Self::NannyLost | Self::Abandoned => 137,
        }
    }

    /// Whether this is exit code 0.
    #[must_use]
    pub fn is_success(&self) -> bool {
        *self == Self::Exited(0)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => match meaning(*code) {
                Some(words) => write!(f, "exited with code {code} ({words})"),
                None => write!(f, "exited with code {code}"),
            },
            Self::Signaled(number) => {
                write!(f, "was ended by signal {number} ({})", signal_name(*number))?;
                signal_hint(*number).map_or(Ok(()), |hint| write!(f, ", {hint}"))
            }
            Self::NotStarted { message, .. } => write!(f, "could not be started: {message}"),
            Self::NannyLost => f.write_str("was lost: its nanny process was killed"),
            Self::Abandoned => f.write_str("did not end after SIGKILL and was left behind"),
        }
    }
}

/// Whether a job that ended with `code` may be started again: not after a wrong command line or configuration, not when the
/// program says so, and not when it was preempted, because the node is being taken away.
#[must_use]
pub fn is_restartable(code: u8) -> bool {
    !matches!(code, 0 | EXIT_USAGE | EXIT_PREEMPTED | EXIT_CONFIGURATION | EXIT_DO_NOT_RESTART)
}

fn meaning(code: u8) -> Option<&'static str> {
    match code {
        EXIT_USAGE => Some("wrong usage"),
        EXIT_UNREACHABLE => Some("coordinator unreachable"),
        EXIT_PREEMPTED => Some("preempted after a committed checkpoint"),
        EXIT_CONFIGURATION => Some("bad configuration"),
        EXIT_DO_NOT_RESTART => Some("asks not to be restarted"),
        126 => Some("not executable"),
        127 => Some("not found"),
        _ => None,
    }
}

fn signal_hint(number: i32) -> Option<&'static str> {
    match number {
        9 => Some("often the out-of-memory killer: see the kernel's log"),
        4 => Some("an instruction that this processor does not have, or an abort of a runtime"),
        6 => Some("the program aborted itself"),
        7 => Some("often a full /dev/shm"),
        11 => Some("a memory access fault"),
        _ => None,
    }
}

/// The name of a signal on Linux, such as `SIGKILL`.
#[must_use]
pub fn signal_name(number: i32) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    let name = usize::try_from(number).ok().and_then(|n| n.checked_sub(1)).and_then(|n| NAMES.get(n));
    name.map_or_else(|| format!("signal {number}"), |name| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_shells() {
        let missing = End::NotStarted { errno: Some(2), message: String::new() };
        let forbidden = End::NotStarted { errno: Some(13), message: String::new() };
        let codes =
            [End::Exited(3), End::Signaled(9), End::Signaled(15), missing, forbidden].map(|end| end.exit_code());
        assert_eq!(codes, [3, 137, 143, 127, 126]);
    }

    #[test]
    fn signals_are_named_as_in_signal_7() {
        // Numbers of signal(7) for x86 and ARM.
        for (number, name) in [(1, "SIGHUP"), (9, "SIGKILL"), (11, "SIGSEGV"), (15, "SIGTERM"), (31, "SIGSYS")] {
            assert_eq!(signal_name(number), name);
        }
        assert_eq!(signal_name(64), "signal 64");
    }

    #[test]
    fn some_codes_are_never_restarted() {
        assert!([64, 75, 78, 93, 0].iter().all(|code| !is_restartable(*code)));
        assert!([1, 137, 143, 127].iter().all(|code| is_restartable(*code)));
    }
}
