//! The nanny: one small single-threaded process per rank that lets nothing outlive the rank or the launcher.
//!
//! Owns: the life of one rank and of all that descends from it. The launcher starts this same program again with
//! [`NANNY_ARGUMENT`], so `main` calls [`nanny_main`] before any runtime or thread exists.
//! Refuses to know: ranks, logs, the environment contract: the rank's environment and streams are its own, handed on.
//!
//! - NY-1: one thread, for ever (see `spawn`).
//! - NY-2: it is a child subreaper, so whatever the rank leaves behind, also in new sessions and after double forks, becomes
//!   its direct child; killing direct children until `wait` finds none left therefore leaves nothing, and hits no stranger.
//! - NY-3: the launcher is dead when the socket at standard input ends: only the launcher holds the other side. The
//!   parent-death signal is only one more alarm: it fires when the *thread* that forked the nanny ends, so it is a signal
//!   that means nothing (SIGURG) and makes the nanny look who its parent is.

mod children;
pub(crate) mod protocol;
mod spawn;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal as Number};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, kill_process_group, set_child_subreaper,
    set_parent_process_death_signal, wait,
};

pub(crate) use children::children_of_this_process;
use protocol::Notice;

use crate::clock;
use crate::end::{End, signal_name};

/// The hidden first argument that makes a program a nanny. What follows is the rank's program and its arguments.
pub const NANNY_ARGUMENT: &str = "__weightcast-nanny";

/// How long to wait between two rounds of killing when no child's end wakes the nanny earlier: first and last, in ms.
const ROUND_MS: (i64, i64) = (1, 32);

/// Runs as the nanny of one rank: `arguments` are the rank's program and its arguments, standard input is the launcher's
/// socket. Returns when the rank and all of its descendants are gone.
///
/// Must be called before this process has a second thread.
#[must_use]
pub fn nanny_main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let Some(program) = arguments.next() else { return ExitCode::from(crate::end::EXIT_USAGE) };
    match Nanny::prepare().and_then(|mut nanny| nanny.run(&program, &arguments.collect::<Vec<_>>())) {
        Ok(()) => ExitCode::SUCCESS,
        // The launcher sees a nanny that ended without a word; there is nobody else to tell.
        Err(_) => ExitCode::from(70),
    }
}

struct Nanny {
    launcher: UnixStream,
    parent: Option<Pid>,
    signals: SignalFd,
    rank: Option<Pid>,
    /// The rank ended, the launcher died or asked for it: kill until nothing is left.
    is_killing: bool,
}

impl Nanny {
    fn prepare() -> std::io::Result<Self> {
        let handled = [
            Number::SIGTERM,
            Number::SIGINT,
            Number::SIGHUP,
            Number::SIGQUIT,
            Number::SIGUSR1,
            Number::SIGUSR2,
            Number::SIGCHLD,
            Number::SIGURG,
        ];
        let mask: SigSet = handled.into_iter().collect();
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        set_child_subreaper(Some(getpid()))?;
        let parent = getppid();
        set_parent_process_death_signal(Some(Signal::URG))?;
        let launcher = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        Ok(Self { launcher, parent, signals, rank: None, is_killing: false })
    }

    fn run(&mut self, program: &OsString, arguments: &[OsString]) -> std::io::Result<()> {
        match spawn::spawn(program, arguments) {
            Ok(child) => {
                let pid = i32::try_from(child.id()).unwrap_or(0);
                self.rank = Pid::from_raw(pid);
                self.tell(&Notice::Started { pid, at: clock::now() });
            }
            Err(error) => {
                let end = End::NotStarted { errno: error.raw_os_error(), message: error.to_string() };
                self.tell(&Notice::Ended { end, at: clock::now() });
                return Ok(());
            }
        }
        let mut round_ms = ROUND_MS.0;
        loop {
            if self.reap() == Left::Nothing {
                return Ok(());
            }
            if self.is_killing {
                for child in children_of_this_process() {
                    // It may have ended already, or belong to another user now: the next round tells.
                    let _ = kill_process(child, Signal::KILL);
                }
                self.await_event(Some(round_ms))?;
                round_ms = (round_ms * 2).min(ROUND_MS.1);
            } else {
                self.await_event(None)?;
            }
        }
    }

    /// Collects every child that has ended; reports the rank's own end at once.
    fn reap(&mut self) -> Left {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if Some(pid) == self.rank => {
                    self.rank = None;
                    self.is_killing = true;
                    self.tell(&Notice::Ended { end: end_of(status), at: clock::now() });
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return Left::Something,
                Err(_) => return Left::Nothing,
            }
        }
    }

    /// Waits for a word or the death of the launcher, for a signal, or until `timeout_ms` have passed.
    fn await_event(&mut self, timeout_ms: Option<i64>) -> std::io::Result<()> {
        let timeout = timeout_ms.map(|ms| Timespec { tv_sec: 0, tv_nsec: ms * 1_000_000 });
        // A launcher that is known to be dead would make every poll return at once.
        let launcher_events = if self.is_killing { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.launcher, launcher_events)];
        let watched = if self.is_killing { 1 } else { 2 };
        match poll(fds.get_mut(..watched).unwrap_or_default(), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let launcher_speaks = watched == 2 && fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let number = i32::try_from(signal.ssi_signo).unwrap_or(0);
            match number {
                _ if number == Signal::CHILD.as_raw() => {}
                _ if number == Signal::URG.as_raw() => self.is_killing |= getppid() != self.parent,
                _ => self.pass_on(number),
            }
        }
        if launcher_speaks {
            self.listen();
        }
        Ok(())
    }

    fn listen(&mut self) {
        let mut bytes = [0_u8; 64];
        match self.launcher.read(&mut bytes) {
            Ok(0) => self.is_killing = true,
            Ok(length) => {
                for number in bytes.iter().take(length) {
                    self.pass_on(i32::from(*number));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => self.is_killing = true,
        }
    }

    /// Hands a signal on to the rank's process group, as torchrun does, so that it also reaches the program behind a shell.
    fn pass_on(&mut self, number: i32) {
        if number == Signal::KILL.as_raw() {
            self.is_killing = true;
        } else if let (Some(rank), Some(signal)) = (self.rank, Signal::from_named_raw(number)) {
            // Before the rank has made its group, the group does not exist yet: then the process itself is meant.
            if kill_process_group(rank, signal).is_err() {
                let _ = kill_process(rank, signal);
            }
        }
    }

    /// Tells the launcher. A failure means that it is dead, which the next poll shows.
    fn tell(&mut self, notice: &Notice) {
        if let Ok(mut line) = serde_json::to_vec(notice) {
            line.push(b'\n');
            let _ = self.launcher.write_all(&line);
        }
    }
}

#[derive(PartialEq, Eq)]
enum Left {
    Something,
    Nothing,
}

fn end_of(status: WaitStatus) -> End {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => End::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, Some(number)) => End::Signaled(number),
        // `wait` without the options for stopped children reports only ends.
        (None, None) => End::NotStarted { errno: None, message: format!("{} is not an end", signal_name(0)) },
    }
}
