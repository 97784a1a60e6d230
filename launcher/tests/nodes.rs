//! Several launchers as one job, over loopback: they start together and end together, whatever happens to one of them.

mod common;

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Marked, Running, kill, now, wait_until};
use rustix::process::Signal;

/// The nodes of one job, on an endpoint of their own.
struct Job {
    marked: Marked,
    endpoint: String,
}

impl Job {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback works");
        let endpoint = listener.local_addr().expect("it is bound").to_string();
        Self { marked: Marked::new(), endpoint }
    }

    fn command(&self, nodes: &str, flags: &[&str], script: &str) -> Command {
        let mut all = vec!["--nnodes", nodes, "--rdzv-endpoint", &self.endpoint, "--rdzv-id=job"];
        all.extend(flags);
        self.marked.shell(2, &all, script)
    }

    /// Starts two nodes of two ranks each; the first one serves the rendezvous.
    fn start_two(&self, flags: &[&str], script: &str) -> (Running, Running) {
        let with = |rank: &'static str| [&["--node-rank", rank], flags].concat();
        let first = Running::start(self.command("2", &with("0"), script));
        (first, Running::start(self.command("2", &with("1"), script)))
    }
}

const READY_AND_WAIT: &str = "echo ready $RANK; exec sleep 1000";

#[test]
fn nodes_without_ranks_agree_on_the_world() {
    let job = Job::new();
    let script =
        "echo $RANK/$WORLD_SIZE $GROUP_RANK/$GROUP_WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT";
    let nodes: Vec<Running> = (0..3).map(|_| Running::start(job.command("3", &[], script))).collect();
    let finished: Vec<_> = nodes.into_iter().map(Running::finish).collect();
    assert!(finished.iter().all(|node| node.code == Some(0)), "{finished:?}");
    let mut lines: Vec<String> = finished.iter().flat_map(|node| node.stdout.lines().map(str::to_owned)).collect();
    lines.sort();
    let master = lines[0].split_whitespace().last().expect("an address").to_owned();
    assert!(master.starts_with("127.0.0.1:"), "{master}");
    let expected = |rank: u32| format!("[{rank}] {rank}/6 {}/3 {}/2 {master}", rank / 2, rank % 2);
    assert_eq!(lines, (0..6).map(expected).collect::<Vec<_>>());
    job.marked.assert_nothing_left();
}

#[test]
fn a_rank_that_dies_on_one_node_ends_the_other_within_two_seconds() {
    let job = Job::new();
    let script = "if [ $RANK = 3 ]; then echo the reason >&2; fi; echo pid $$ of $RANK; exec sleep 1000";
    let (mut first, mut second) = job.start_two(&[], script);
    first.await_lines(2, "pid");
    second.await_lines(2, "pid");
    let line = second.seen.lines().find(|line| line.ends_with("of 3")).expect("rank 3 is on the second node");
    let pid = line.split_whitespace().nth(2).and_then(|word| word.parse().ok()).expect("a pid");
    let start = now();
    kill(pid, Signal::KILL);
    let (first, second) = (first.finish(), second.finish());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!((first.code, second.code), (Some(137), Some(137)));
    for node in [first, second] {
        let cause = node.stderr.find("root cause: rank 3 (local rank 1").expect(&node.stderr);
        assert!(node.stderr[cause..].contains("    the reason"), "{}", node.stderr);
    }
    job.marked.assert_nothing_left();
}

#[test]
fn a_killed_launcher_ends_the_other_node_within_two_seconds() {
    for victim in ["the one that joined", "the one that serves"] {
        let job = Job::new();
        let (mut first, mut second) = job.start_two(&[], READY_AND_WAIT);
        first.await_lines(2, "ready");
        second.await_lines(2, "ready");
        let (dead, mut other) = if victim == "the one that joined" { (second, first) } else { (first, second) };
        let start = now();
        dead.signal(Signal::KILL);
        assert_eq!(other.wait().code(), Some(69), "{victim}");
        assert!(start.elapsed() < Duration::from_secs(2), "{victim}: {:?}", start.elapsed());
        drop(dead.finish());
        job.marked.assert_nothing_left();
    }
}

#[test]
fn a_silent_launcher_ends_the_other_node_within_three_and_a_half_seconds() {
    let job = Job::new();
    let (mut first, mut second) = job.start_two(&[], READY_AND_WAIT);
    first.await_lines(2, "ready");
    second.await_lines(2, "ready");
    let start = now();
    second.signal(Signal::STOP);
    let first = first.finish();
    assert!(start.elapsed() < Duration::from_millis(3500), "{:?}", start.elapsed());
    assert_eq!(first.code, Some(69));
    assert!(first.stderr.contains("has been silent for 3.0 s"), "{}", first.stderr);
    // When it wakes, it finds that the job has gone on without it.
    second.signal(Signal::CONT);
    assert_eq!(second.wait().code(), Some(69));
    job.marked.assert_nothing_left();
}

#[test]
fn a_silent_rendezvous_ends_the_other_nodes() {
    let job = Job::new();
    let (mut first, mut second) = job.start_two(&[], READY_AND_WAIT);
    first.await_lines(2, "ready");
    second.await_lines(2, "ready");
    let start = now();
    first.signal(Signal::STOP);
    assert_eq!(second.wait().code(), Some(69));
    assert!(start.elapsed() < Duration::from_millis(3500), "{:?}", start.elapsed());
    first.signal(Signal::CONT);
    first.wait();
    job.marked.assert_nothing_left();
}

#[test]
fn a_busy_machine_is_no_silence() {
    let job = Job::new();
    // Eight processes for each processor would be busy for ever; the launcher's end takes them along.
    let script = "if [ $LOCAL_RANK = 1 ]; then
            for n in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done
            sleep 4; kill $(jobs -p); exit 0
        fi; sleep 4";
    let (first, second) = job.start_two(&[], script);
    let (first, second) = (first.finish(), second.finish());
    assert_eq!((first.code, second.code), (Some(0), Some(0)), "{first:?} {second:?}");
    job.marked.assert_nothing_left();
}

#[test]
fn all_nodes_start_again_after_a_failure_on_one() {
    let job = Job::new();
    let place = tempfile::tempdir().expect("a temporary directory");
    // Rank 0 fails when rank 2 of the other node has said that it started, and not before.
    let script = format!(
        "echo start $RANK $TORCHELASTIC_RESTART_COUNT; : > {0}/$RANK
        if [ $TORCHELASTIC_RESTART_COUNT = 1 ]; then exit 0; fi
        if [ $RANK = 0 ]; then until [ -e {0}/2 ]; do sleep 0.01; done; exit 5; fi; exec sleep 1000",
        place.path().display()
    );
    let (first, second) = job.start_two(&["--max-restarts=1"], &script);
    let (first, second) = (first.finish(), second.finish());
    assert_eq!((first.code, second.code), (Some(0), Some(0)), "{first:?} {second:?}");
    assert!(second.stdout.contains("start 2 0") && second.stdout.contains("start 2 1"), "{}", second.stdout);
    job.marked.assert_nothing_left();
}

#[test]
fn a_node_that_was_lost_may_come_back() {
    let job = Job::new();
    let script = "echo ready $TORCHELASTIC_RESTART_COUNT
        if [ $TORCHELASTIC_RESTART_COUNT = 1 ]; then exit 0; fi; exec sleep 1000";
    let (mut first, mut second) = job.start_two(&["--max-restarts=1"], script);
    first.await_lines(2, "ready 0");
    second.await_lines(2, "ready 0");
    second.signal(Signal::KILL);
    let again = Running::start(job.command("2", &["--node-rank=1", "--max-restarts=1"], script));
    assert_eq!((first.finish().code, again.finish().code), (Some(0), Some(0)));
    second.wait();
    job.marked.assert_nothing_left();
}

#[test]
fn sigterm_on_one_node_lets_all_nodes_save_their_work() {
    let job = Job::new();
    let script = "trap 'echo drained; exit 75' TERM; echo ready; while :; do sleep 0.01; done";
    let (mut first, mut second) = job.start_two(&["--max-restarts=3"], script);
    first.await_lines(2, "ready");
    second.await_lines(2, "ready");
    second.signal(Signal::TERM);
    let (first, second) = (first.finish(), second.finish());
    assert_eq!((first.code, second.code), (Some(75), Some(75)), "{first:?} {second:?}");
    assert_eq!((first.stdout.matches("drained").count(), second.stdout.matches("drained").count()), (2, 2));
    job.marked.assert_nothing_left();
}

#[test]
fn the_token_decides_who_may_join() {
    let job = Job::new();
    let write = |name: &str, text: &str| {
        let path = job.marked.dir.path().join(name);
        std::fs::write(&path, text).expect("it is writable");
        path.display().to_string()
    };
    let (right, same, wrong) = (write("right", "secret"), write("same", "secret\n"), write("wrong", "other"));
    let with = |rank, token| job.command("2", &["--node-rank", rank, "--rdzv-token-file", token], "true");
    let first = Running::start(with("0", &right));
    let stranger = Running::start(with("1", &wrong)).finish();
    assert_eq!(stranger.code, Some(78));
    assert!(stranger.stderr.contains("another token"), "{}", stranger.stderr);
    let second = Running::start(with("1", &same)).finish();
    assert_eq!((first.finish().code, second.code), (Some(0), Some(0)));
    job.marked.assert_nothing_left();
}

#[test]
fn without_a_token_only_loopback_is_used() {
    let marked = Marked::new();
    // An address of RFC 5737 that nobody has.
    let flags = ["--nnodes=2", "--node-rank=1", "--rdzv-endpoint=192.0.2.1:29400"];
    let finished = marked.run(marked.shell(1, &flags, "true"));
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert!(finished.stderr.contains("--rdzv-token-file"), "{}", finished.stderr);
    marked.assert_nothing_left();
}

#[test]
fn a_launcher_that_waits_says_for_what_and_can_be_ended() {
    let job = Job::new();
    let mut command = job.command("2", &["--node-rank=1"], "true");
    command.stdout(Stdio::piped());
    let running = Running::start(command);
    // Until it has its handlers, SIGTERM ends it in another way.
    let handles = |id: &i32| {
        std::fs::read_to_string(format!("/proc/{id}/status")).is_ok_and(|text| {
            let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:")).map(str::trim);
            caught.and_then(|mask| u64::from_str_radix(mask, 16).ok()).is_some_and(|mask| mask & (1 << 14) != 0)
        })
    };
    assert!(wait_until(common::PATIENCE, || job.marked.alive().iter().any(|(id, _)| handles(id))));
    running.signal(Signal::TERM);
    let finished = running.finish();
    assert_eq!(finished.code, Some(143), "{finished:?}");
    job.marked.assert_nothing_left();
}

#[test]
fn nodes_that_never_come_are_named_in_the_error() {
    let job = Job::new();
    let flags = ["--node-rank=0", "--rdzv-conf", "join_timeout=0.3"];
    let finished = Running::start(job.command("2", &flags, "true")).finish();
    assert_eq!(finished.code, Some(69), "{finished:?}");
    assert!(finished.stderr.contains("only 1 of 2 nodes came in time"), "{}", finished.stderr);
    let flags = ["--node-rank=1", "--rdzv-conf", "join_timeout=0.3"];
    let finished = Running::start(job.command("2", &flags, "true")).finish();
    assert_eq!(finished.code, Some(69), "{finished:?}");
    assert!(
        finished.stderr.contains(&format!("waiting for the rendezvous at {}", job.endpoint)),
        "{}",
        finished.stderr
    );
    job.marked.assert_nothing_left();
}
