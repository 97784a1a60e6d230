//! What a killed nanny leaves behind.
//!
//! Owns: the second line of defence. The rank itself dies with its nanny (parent-death signal); what descends from it becomes
//! a child of this process, which is a subreaper, and is recognised by the variable that only ranks of this launch have.
//! Refuses to know: other children of this process: they lack the variable.

use std::collections::BTreeSet;
use std::fs;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open, set_child_subreaper, waitpid,
};

use crate::nanny::children_of_this_process;

/// How long to wait for the end of one process that was killed, in seconds.
const DEADLINE_S: i64 = 2;
/// Each round removes one generation; no tree is deeper.
const ROUNDS: usize = 64;

/// Makes this process the parent of whatever a killed nanny leaves.
pub(crate) fn adopt() {
    // Refused only by kernels older than 3.4.
    let _ = set_child_subreaper(Some(getpid()));
}

/// Kills and collects all children whose environment has an entry that starts with `marker`, and collects `ranks`, which
/// die by themselves.
pub(crate) async fn sweep(marker: &[u8], ranks: impl IntoIterator<Item = i32>) {
    for rank in ranks.into_iter().filter_map(Pid::from_raw) {
        collect(rank).await;
    }
    let mut tried = BTreeSet::new();
    for _ in 0..ROUNDS {
        let children = children_of_this_process().into_iter();
        let strays: Vec<Pid> =
            children.filter(|child| tried.insert(child.as_raw_nonzero()) && has(*child, marker)).collect();
        if strays.is_empty() {
            return;
        }
        for stray in &strays {
            let _ = kill_process(*stray, Signal::KILL);
        }
        for stray in strays {
            collect(stray).await;
        }
    }
}

fn has(process: Pid, marker: &[u8]) -> bool {
    let environment = fs::read(format!("/proc/{}/environ", process.as_raw_nonzero())).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(marker))
}

/// Waits for the end of a child and reaps it. A process that is not (or no longer) ours is left alone.
async fn collect(process: Pid) {
    if let Ok(handle) = pidfd_open(process, PidfdFlags::empty()) {
        let wait = move || {
            let deadline = Timespec { tv_sec: DEADLINE_S, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&deadline));
        };
        let _ = tokio::task::spawn_blocking(wait).await;
    }
    let _ = waitpid(Some(process), WaitOptions::NOHANG);
}
