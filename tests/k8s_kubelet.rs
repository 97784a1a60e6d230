//! What `weightcast k8s render` prints, carried out: a stand-in for JobSet's controller, the Job controller and the kubelet runs the
//! pods as processes on loopback and follows the policies that stand in the manifest.
//!
//! Every pod has an address of its own below 127.20, in the place of its name; volumes are directories, in the place of their
//! mount paths. Probes are not asked: a coordinator is ready when it says that it listens.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

mod kubelet_support;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use kubelet_support::{Cluster, Outcome};
use rustix::process::Signal;
use serde_json::Value;
use support::signal;

const LOAD: &str = "[model]\nsource = \"/data/tiny-llama\"\n[load]\nplacement = \"shard\"\n[quantization]\nformat = \"nf4\"\n\
                    [checkpoint]\ndirectory = \"/checkpoints\"\nsave = true\n";

fn training(steps: u32) -> String {
    format!(
        "[model]\nsource = \"/data/tiny-llama\"\n[load]\nplacement = \"shard\"\n[checkpoint]\ndirectory = \"/checkpoints\"\n\
         [train]\ntype = \"qlora\"\nsteps = {steps}\nbatch-size = 4\n[train.lora]\nr = 4\n\
         [train.data]\ntrain = \"/data/devils-dictionary.jsonl\"\nsequence-length = 32\n\
         [train.checkpoint]\nevery-steps = 2\nkeep-last = 100\n"
    )
}

/// Two pods, four ranks, one checkpoint, no restart.
#[test]
fn a_rendered_job_runs_to_its_end() {
    let mut cluster = Cluster::apply(1, LOAD, &[]);
    let outcome = cluster.run(|_| {});
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 0), "{}", cluster.said);
    assert_eq!(cluster.codes.iter().map(|(_, code)| *code).collect::<Vec<_>>(), [Some(0); 2], "{}", cluster.said);
    assert_eq!(cluster.checkpoints(), ["step-000000000"]);
    let verified = cluster.place.run(&["checkpoint", "verify", "--deep", &cluster.place.path("claims/wc-checkpoints")]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

/// A worker's program asks not to be started again, and a node without the devices that the job names: both end the set.
#[test]
fn codes_that_no_restart_helps_end_the_set() {
    let mut cluster = Cluster::apply(2, LOAD, &[]);
    let args = serde_json::json!(["launch", "--nnodes=1", "--nproc-per-node=2", "--no-python", "sh", "-c", "exit 93"]);
    cluster.set["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]["args"] = args;
    let outcome = cluster.run(|_| {});
    assert_eq!((outcome, cluster.restarts), (Outcome::Failed("PodFailurePolicy"), 0), "{}", cluster.said);
    assert_eq!(cluster.codes.first().expect("one ended").1, Some(93));

    let mut cluster = Cluster::apply(3, LOAD, &[]);
    let args =
        &mut cluster.set["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]["args"];
    for arg in args.as_array_mut().expect("arguments") {
        if arg == "--device=cpu" {
            *arg = "--device=cuda".into();
        }
    }
    let outcome = cluster.run(|_| {});
    assert_eq!(
        (outcome, cluster.restarts),
        (Outcome::Failed("PodFailurePolicy"), 0),
        "{:?} {}",
        cluster.codes,
        cluster.said
    );
    assert_eq!(cluster.codes.first().expect("one ended").1, Some(78));
}

/// A rank is killed while it trains: all start again, and go on from the last checkpoint.
#[test]
fn a_killed_rank_restarts_the_set_from_the_last_checkpoint() {
    let mut cluster = Cluster::apply(4, &training(12), &[]);
    let mut killed_after = Vec::new();
    let outcome = cluster.run(|cluster| {
        if killed_after.is_empty() && cluster.checkpoints().len() >= 2 {
            killed_after = cluster.checkpoints();
            let rank = cluster.place.rank_process(3).expect("rank 3");
            signal(rank, Signal::KILL);
        }
    });
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 1), "{:?} {}", cluster.codes, cluster.said);
    assert!(cluster.codes.iter().any(|(_, code)| *code == Some(137)), "{:?}", cluster.codes);
    expect_resumed(&cluster, &killed_after);
    assert_eq!(cluster.checkpoints().last().map(String::as_str), Some("step-000000012"));
}

/// A node is drained while the job trains: its pod writes a checkpoint with the others and ends with 75, another one comes in its
/// place, and the ranks of the other pod wait for it in their processes.
#[test]
fn an_evicted_worker_rejoins_alone() {
    let mut cluster = Cluster::apply(5, &training(12), &[]);
    let (mut drained_after, mut stayed, mut looked) = (Vec::new(), Vec::new(), false);
    let outcome = cluster.run(|cluster| {
        if drained_after.is_empty() && !cluster.checkpoints().is_empty() {
            drained_after = cluster.checkpoints();
            stayed = [0, 1].map(|rank| cluster.place.rank_process(rank).expect("a rank of the other pod")).to_vec();
            cluster.evict(1);
        }
        // Before the pod in its place can have done anything.
        if cluster.codes.len() == 1 && !std::mem::replace(&mut looked, true) {
            for process in &stayed {
                let is_there = Path::new(&format!("/proc/{process}")).exists();
                assert!(is_there, "{process} ended: {}", cluster.said);
            }
        }
    });
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 0), "{:?} {}", cluster.codes, cluster.said);
    let [(index, code), rest @ ..] = cluster.codes.as_slice() else { panic!("nobody ended") };
    assert_eq!((*index, *code), (1, Some(75)), "{}", cluster.said);
    assert_eq!(rest.iter().map(|(_, code)| *code).collect::<Vec<_>>(), [Some(0); 2], "{}", cluster.said);
    assert!(cluster.longest_end < Duration::from_secs(21), "{:?}: the launcher's patience", cluster.longest_end);
    assert_eq!(cluster.coordinator_codes, [Some(0)]);
    expect_resumed(&cluster, &drained_after);
    assert_eq!(cluster.checkpoints().last().map(String::as_str), Some("step-000000012"));
}

/// The set is suspended, as Kueue does to make room: every pod gets SIGTERM, ends with 75 after a checkpoint, and is started again
/// later. Nobody counts it as a failure.
#[test]
fn a_suspended_set_goes_on_when_it_is_resumed() {
    let mut cluster = Cluster::apply(6, &training(12), &[]);
    let mut suspended_after = Vec::new();
    let outcome = cluster.run(|cluster| {
        if suspended_after.is_empty() && !cluster.checkpoints().is_empty() {
            suspended_after = cluster.checkpoints();
            cluster.suspend();
            assert!(cluster.codes.iter().all(|(_, code)| *code == Some(75)), "{:?} {}", cluster.codes, cluster.said);
            assert_eq!(cluster.codes.len(), 2);
            assert_eq!(cluster.coordinator_codes, [Some(75)], "{}", cluster.said);
            assert!(cluster.checkpoints().len() > suspended_after.len() || cluster.checkpoints() == suspended_after);
        }
    });
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 0), "{:?} {}", cluster.codes, cluster.said);
    expect_resumed(&cluster, &suspended_after);
    assert_eq!(cluster.checkpoints().last().map(String::as_str), Some("step-000000012"));
}

/// The coordinator's container is killed 50 times while the job trains: it goes on from its journal each time, no rank is started
/// again, no generation is given out twice, and every step is there.
#[test]
fn a_coordinator_that_is_killed_fifty_times_loses_nothing() {
    let mut cluster = Cluster::apply(7, &training(120), &[]);
    let (mut kills, mut ready_since, mut ranks) = (0_u64, None::<Instant>, Vec::new());
    let outcome = cluster.run(|cluster| {
        if cluster.checkpoints().is_empty() || kills == 50 {
            return;
        }
        if ranks.is_empty() {
            ranks = [0, 1, 2, 3].map(|rank| cluster.place.rank_process(rank).expect("a rank")).to_vec();
        }
        let Some(pod) = cluster.coordinator.as_mut() else { return };
        if !pod.job.said().contains("listens on") {
            ready_since = None;
            return;
        }
        // At moments of all kinds: from at once to 70 ms after it serves.
        let since = *ready_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= Duration::from_millis(kills * 37 % 71) {
            signal(pod.job.process(), Signal::KILL);
            (kills, ready_since) = (kills + 1, None);
        }
    });
    assert_eq!((outcome, cluster.restarts, kills), (Outcome::Succeeded, 0, 50), "{:?} {}", cluster.codes, cluster.said);
    assert_eq!(cluster.codes.iter().map(|(_, code)| *code).collect::<Vec<_>>(), [Some(0); 2], "{}", cluster.said);
    assert_eq!(ranks.len(), 4);
    let generations: Vec<String> =
        cluster.journal().into_iter().filter(|name| name.starts_with("generation-")).collect();
    assert_eq!(generations, ["generation-000000001"]);
    let steps: Vec<String> = (1..=60).map(|step| format!("step-{:09}", step * 2)).collect();
    assert_eq!(cluster.checkpoints(), steps);
    let losses =
        std::fs::read_to_string(cluster.place.path("claims/wc-checkpoints/metrics/metrics.jsonl")).expect("metrics");
    let trained: Vec<u64> = losses
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
        .filter(|line| line.get("loss").is_some())
        .map(|line| line["step"].as_u64().expect("a step"))
        .collect();
    assert_eq!(trained, (1..=120).collect::<Vec<_>>(), "every step once");
}

/// The last job of the coordinator's journal went on from one of these checkpoints or a later one.
fn expect_resumed(cluster: &Cluster, least: &[String]) {
    let journal = cluster.place.path("claims/wc-state/coordinator");
    let entries = std::fs::read_dir(&journal).expect("the journal").map(|entry| entry.expect("an entry").path());
    let mut jobs: Vec<_> = entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("job-")))
        .collect();
    jobs.sort();
    assert!(jobs.len() >= 2, "{jobs:?}");
    let last: Value =
        serde_json::from_slice(&std::fs::read(jobs.last().expect("one")).expect("it is read")).expect("JSON");
    let step = last.pointer("/plan/train/resumed/step").and_then(Value::as_u64);
    let step = step.unwrap_or_else(|| panic!("it began anew: {}", last["plan"]["train"]["resumed"]));
    let least: u64 = least.last().expect("one").trim_start_matches("step-").parse().expect("a step");
    assert!(step >= least, "{step} after {least}");
}
