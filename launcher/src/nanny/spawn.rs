//! Starts the program of a rank, in a session of its own, tied to its nanny's life.
//!
//! Owns: the only unsafe code of this crate: the hook between fork and exec.
//! Invariant NY-1: the caller is single-threaded, and stays so: the parent-death signal of the rank belongs to the thread
//! that forked it, and the hook runs in a copy of that one thread.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::SigSet;
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal, setsid};

/// Starts `program` with the streams and the environment of this process, but with no input.
///
/// # Errors
/// The system's error when the program is not found, cannot be executed or cannot be forked.
#[expect(unsafe_code, reason = "a hook between fork and exec has no safe form; see SAFETY")]
pub(crate) fn spawn(program: &OsString, arguments: &[OsString]) -> std::io::Result<Child> {
    let nanny = getpid();
    let prepare = move || {
        // The nanny blocks signals in order to read them from a descriptor; the mask would survive exec.
        SigSet::empty().thread_set_mask()?;
        // A session of its own: a Ctrl-C at the terminal reaches the launcher only, and the group can be signalled.
        setsid()?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The nanny may have died before the line above took effect.
        if getppid() == Some(nanny) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    // SAFETY: between fork and exec only async-signal-safe functions may run. The hook makes four system calls (sigprocmask,
    // setsid, prctl, getppid), takes no lock and allocates nothing; the process that
    // forks has one thread (NY-1), so no lock can be held by another.
    // JUSTIFICATION: posix_spawn has no attribute for the parent-death signal.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}
