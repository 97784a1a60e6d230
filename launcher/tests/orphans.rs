//! No process outlives its launcher, its rank or its nanny, whatever it did to escape.

mod common;

use std::fs;
use std::time::Duration;

use common::{Marked, Running, kill, now, wait_until};
use rustix::process::Signal;

/// A rank with children in new sessions, daemons by double fork, and a deaf ear for polite signals: five descendants.
const ESCAPING: &str = "trap '' TERM INT HUP
    setsid sh -c 'trap \"\" TERM; sleep 1000 & exec sleep 1000' &
    ( setsid sh -c 'sleep 1000 & exec sleep 1000' & )
    sleep 1000 &
    echo ready; wait";

/// Kills the launcher in `trials` runs: in every second one when all ranks are ready, in the others at some moment of their
/// start, and returns the longest time that anything lived on.
fn kill_the_launcher(trials: u32) -> Duration {
    let mut longest = Duration::ZERO;
    for trial in 0..trials {
        let marked = Marked::new();
        let mut running = Running::start(marked.shell(2, &[], ESCAPING));
        if trial % 2 == 0 {
            running.await_lines(2, "ready");
            // The launcher, and per rank a nanny, the rank, and five descendants.
            assert!(wait_until(common::PATIENCE, || marked.alive().len() == 15), "{:#?}", marked.alive());
        } else {
            // 0 to 19 ms: from before the first nanny to after the last daemon.
            let start = now();
            wait_until(Duration::from_millis(u64::from(trial / 2 % 20)), || false);
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        running.signal(Signal::KILL);
        running.wait();
        longest = longest.max(marked.assert_nothing_left());
    }
    longest
}

#[test]
fn nothing_outlives_a_launcher_that_was_killed() {
    let longest = kill_the_launcher(20);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
}

#[test]
#[ignore = "half a minute: the 200 trials of the contract, run by hand and before a release"]
fn nothing_outlives_a_launcher_that_was_killed_in_200_trials() {
    let longest = kill_the_launcher(200);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
}

#[test]
fn nothing_outlives_a_rank_that_was_killed_and_the_launcher_ends_within_a_second() {
    let marked = Marked::new();
    let script = format!("echo $$ > $TMPDIR/$RANK.pid; {ESCAPING}");
    let mut running = Running::start(marked.shell(2, &[], &script));
    running.await_lines(2, "ready");
    let start = now();
    kill(read_pid(&marked, "1.pid"), Signal::KILL);
    assert_eq!(running.wait().code(), Some(137));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    marked.assert_nothing_left();
}

#[test]
fn nothing_outlives_a_rank_that_succeeds() {
    let marked = Marked::new();
    let finished = marked.run(marked.shell(2, &[], &ESCAPING.replace("wait", "exit 0")));
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_eq!(marked.alive(), [], "the launcher waits for the last of them");
}

#[test]
fn a_killed_nanny_is_a_failed_rank_and_leaves_nothing() {
    let marked = Marked::new();
    let script = format!("echo $PPID > $TMPDIR/$RANK.pid; {ESCAPING}");
    let mut running = Running::start(marked.shell(2, &[], &script));
    running.await_lines(2, "ready");
    kill(read_pid(&marked, "0.pid"), Signal::KILL);
    let finished = running.finish();
    assert_eq!(finished.code, Some(137));
    assert!(finished.stderr.contains("its nanny process was killed"), "{}", finished.stderr);
    assert_eq!(marked.alive(), [], "the launcher sweeps before it ends");
}

#[test]
fn a_rank_stays_in_a_session_of_its_own() {
    let marked = Marked::new();
    let finished =
        marked.run(marked.shell(1, &[], "echo session $(cut -d' ' -f6 /proc/$$/stat) pid $$; readlink /proc/$$/fd/0"));
    let words: Vec<&str> = finished.stdout.split_whitespace().collect();
    assert!(
        matches!(words.as_slice(), [_, "session", session, "pid", pid, _, "/dev/null"] if session == pid),
        "{words:?}"
    );
    marked.assert_nothing_left();
}

fn read_pid(marked: &Marked, name: &str) -> i32 {
    let text = fs::read_to_string(marked.dir.path().join(name)).expect("the rank wrote it");
    text.trim().parse().expect("a number")
}
