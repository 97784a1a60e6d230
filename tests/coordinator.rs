//! A coordinator that is a process of its own: ranks on two nodes, its death and return, and a rank's death elsewhere.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::{Job, MODEL, PATIENCE, Place, signal, until};

const QUICKLY: Duration = Duration::from_secs(2);

fn coordinator(place: &Place) -> Job {
    coordinator_with(place, &["--save"])
}

fn coordinator_with(place: &Place, more: &[&str]) -> Job {
    let (state, checkpoints) = (place.path("state"), place.path("checkpoints"));
    let flags = ["--model", MODEL, "--quantize", "nf4", "--hold", "--checkpoint-dir", &checkpoints];
    place.start(&[&["coordinator", "--ranks", "4", "--state-dir", &state, "--json"], &flags[..], more].concat())
}

/// The address that it says it listens on.
fn address(coordinator: &mut Job) -> String {
    let mut found = None;
    until("the coordinator listens", PATIENCE, || {
        assert!(!coordinator.is_over(), "{}", coordinator.said());
        let said = coordinator.said();
        found = said.lines().find_map(|line| Some(line.split_once("listens on ")?.1.trim().to_owned()));
        found.is_some()
    });
    found.expect("just found")
}

/// Two nodes of two ranks.
fn nodes(place: &Place, address: &str) -> [Job; 2] {
    nodes_with(place, address, &[])
}

fn nodes_with(place: &Place, address: &str, flags: &[&str]) -> [Job; 2] {
    let token = place.path("state/token");
    ["0", "1"].map(|node| {
        let layout = ["launch", "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "2"];
        place.start(&[&layout[..], &["--coordinator", address, "--token-file", &token], flags].concat())
    })
}

fn holding(place: &Place) -> Value {
    let mut status = Value::Null;
    until("all ranks hold", PATIENCE, || {
        let asked = place.run(&["status", "--json"]);
        status = if asked.code == Some(0) { asked.json() } else { Value::Null };
        let ranks = status["ranks"].as_array();
        status["phase"] == "holding" && ranks.is_some_and(|ranks| ranks.iter().all(|rank| rank["stage"] == "holding"))
    });
    status
}

fn processes(status: &Value) -> Vec<i64> {
    let ranks = status["ranks"].as_array().expect("ranks");
    ranks.iter().map(|rank| rank["process_id"].as_i64().expect("a process")).collect()
}

/// SIGKILL of the coordinator: it comes back on its port with the same generation, and no rank is started again.
#[test]
fn a_coordinator_that_was_killed_goes_on_with_the_same_ranks() {
    let place = Place::new();
    let mut first = coordinator(&place);
    let address_of_first = address(&mut first);
    let nodes = nodes(&place, &address_of_first);
    let before = holding(&place);
    assert_eq!(before["last_checkpoint"], "step-000000000");
    signal(first.process(), Signal::KILL);
    assert_eq!(first.wait().code, None);

    let mut second = coordinator(&place);
    assert_eq!(address(&mut second), address_of_first);
    let mut after = Value::Null;
    until("the ranks are back", QUICKLY, || {
        after = holding(&place);
        after["last_checkpoint"] == before["last_checkpoint"]
    });
    assert_eq!((processes(&after), &after["generation"]), (processes(&before), &before["generation"]));
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = second.wait();
    assert_eq!((ended.code, &ended.json()["phase"]), (Some(0), &Value::from("finished")), "{}", ended.stderr);
    for node in nodes {
        let ended = node.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    place.expect_no_process();
}

/// A rank dies on node 1: node 0 has ended within two seconds, and both name the rank.
#[test]
fn a_rank_that_dies_on_one_node_ends_the_other() {
    let place = Place::new();
    let mut coordinator = coordinator(&place);
    let address = address(&mut coordinator);
    let [here, there] = nodes(&place, &address);
    let status = holding(&place);
    let process = i32::try_from(processes(&status)[3]).expect("a process id");
    let start = std::time::Instant::now();
    signal(process, Signal::KILL);
    let (here, there) = (here.wait(), there.wait());
    assert!(start.elapsed() < QUICKLY, "{:?}", start.elapsed());
    for ended in [&here, &there] {
        assert_eq!(ended.code, Some(137), "{}", ended.stderr);
    }
    assert!(there.stderr.contains("rank 3"), "{}", there.stderr);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(137), "{}", ended.stderr);
    assert!(ended.stderr.contains("rank 3 was ended by signal 9"), "{}", ended.stderr);
    place.expect_no_process();
}

/// A launcher that may start its ranks again says so, and the ranks of the other node wait in their processes.
#[test]
fn a_rank_that_its_launcher_starts_again_rejoins() {
    let place = Place::new();
    let mut coordinator = coordinator(&place);
    let address = address(&mut coordinator);
    let nodes = nodes_with(&place, &address, &["--max-restarts", "1"]);
    let before = processes(&holding(&place));
    signal(i32::try_from(before[3]).expect("a process id"), Signal::KILL);
    let mut after = Vec::new();
    until("four ranks hold again", PATIENCE, || {
        let asked = place.run(&["status", "--json"]);
        let status = if asked.code == Some(0) { asked.json() } else { Value::Null };
        let is_back = status["phase"] == "holding" && status["generation"] == 2;
        after = if is_back { processes(&status) } else { Vec::new() };
        is_back
    });
    assert_eq!(after[..2], before[..2], "the other node's ranks are the same processes");
    assert!(after[2] != before[2] && after[3] != before[3], "{after:?} {before:?}");
    assert_eq!(place.run(&["drain"]).code, Some(0));
    for node in nodes {
        let ended = node.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}

/// Calls are not encrypted, so other hosts are not let in unless asked for.
#[test]
fn other_hosts_are_let_in_only_when_asked_for() {
    let place = Place::new();
    let state = place.path("state");
    let ended =
        place.run(&["coordinator", "--ranks", "1", "--state-dir", &state, "--listen", "0.0.0.0:0", "--model", MODEL]);
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
    assert!(ended.stderr.contains("--listen 0.0.0.0:0: expected an address of this host alone"), "{}", ended.stderr);
}

/// A scheduler's SIGTERM reaches the coordinator alone: what is not saved is saved, under the step that was asked for.
#[test]
fn a_coordinator_that_is_told_to_end_saves_before() {
    let place = Place::new();
    let mut coordinator = coordinator_with(&place, &["--step", "7"]);
    let address = address(&mut coordinator);
    let nodes = nodes(&place, &address);
    assert_eq!(holding(&place)["last_checkpoint"], "", "nothing is saved yet");
    signal(coordinator.process(), Signal::TERM);
    let ended = coordinator.wait();
    assert_eq!((ended.code, &ended.json()["checkpoint"]), (Some(75), &"step-000000007".into()), "{}", ended.stderr);
    for node in nodes {
        let ended = node.wait();
        // With 0 a scheduler would take the job for done.
        assert_eq!(ended.code, Some(75), "{}", ended.stderr);
    }
    let verified = place.run(&["checkpoint", "verify", "--deep", &place.path("checkpoints")]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    place.expect_no_process();
}

#[test]
fn the_secrets_of_a_job_are_not_put_where_others_read() {
    let place = Place::new();
    let state = place.path("state");
    std::fs::create_dir(&state).expect("a new directory");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).expect("our own");
    let ended = place.run(&["coordinator", "--ranks", "1", "--state-dir", &state, "--model", MODEL]);
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
    assert!(ended.stderr.contains("state: expected mode 700"), "{}", ended.stderr);
    assert!(ended.stderr.contains("found 755"), "{}", ended.stderr);
}

/// What the coordinator decides cannot be said to a launcher that joins, which would do nothing with it.
#[test]
fn flags_that_nobody_would_follow_are_refused() {
    let place = Place::new();
    let join = ["launch", "--coordinator", "127.0.0.1:1", "--token-file", "token"];
    for flags in [&["--quantize", "nf4"][..], &["--hold"], &["--json"], &["--model", MODEL]] {
        let ended = place.run(&[&join[..], flags].concat());
        assert_eq!(ended.code, Some(64), "{flags:?}: {}", ended.stderr);
    }
    let ended = place.run(&["launch", "--model", MODEL, "--max-restarts", "1"]);
    assert_eq!(ended.code, Some(64), "{}", ended.stderr);
    assert!(ended.stderr.contains("--max-restarts: expected 0 with a job of this launcher alone"), "{}", ended.stderr);
}
