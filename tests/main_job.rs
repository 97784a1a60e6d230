//! The main job, black box: real processes on loopback load tiny-llama, commit, die, and resume on other ranks.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and touches files to damage them")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");
/// Bytes of tiny-llama's tensors: 2,755,008 parameters (its model card) of 2 bytes.
const MODEL_BYTES: u64 = 5_510_016;
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory for one test, whose processes are found by its path in their environment.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn checkpoints(&self) -> PathBuf {
        self.0.path().join("checkpoints")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weightcast"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.0.path().join("run")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program starts")
    }

    fn job(&self, ranks: u32, flags: &[&str]) -> Vec<String> {
        let checkpoints = self.checkpoints().display().to_string();
        let ranks = ranks.to_string();
        let mut all =
            vec!["launch", "--nproc-per-node", &ranks, "--checkpoint-dir", &checkpoints, "--digests", "--json"];
        all.extend(flags);
        all.into_iter().map(str::to_owned).collect()
    }

    /// Runs a job to its end; it must succeed.
    fn finish(&self, ranks: u32, flags: &[&str]) -> Value {
        let arguments = self.job(ranks, flags);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = self.run(&arguments);
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON on stdout")
    }

    fn start(&self, ranks: u32, flags: &[&str]) -> Child {
        let arguments = self.job(ranks, flags);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts")
    }

    /// Processes of this test that live, by the path in their environment.
    fn processes(&self) -> Vec<u32> {
        let mark = self.0.path().display().to_string();
        let numbers = std::fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        numbers
            .filter(|pid| {
                let environment = std::fs::read_to_string(format!("/proc/{pid}/environ"));
                environment.is_ok_and(|environment| environment.contains(&mark))
            })
            .collect()
    }

    fn expect_no_process(&self) {
        until("all processes are gone", || self.processes().is_empty());
    }

    fn status(&self) -> Option<Value> {
        let output = self.run(&["status", "--json"]);
        serde_json::from_slice(&output.stdout).ok()
    }

    fn wait_for_phase(&self, phase: &str) -> Value {
        let mut seen = None;
        until(phase, || {
            seen = self.status();
            seen.as_ref().is_some_and(|status| status["phase"] == phase)
        });
        seen.expect("a status")
    }
}

/// Polls what other processes make true.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn digests(result: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(result["digests"].clone()).expect("digests")
}

fn storage_bytes(result: &Value) -> u64 {
    result["loads"].as_array().expect("loads").iter().filter_map(|load| load["storage_bytes"].as_u64()).sum()
}

/// The digest of every logical tensor is the same on any number of ranks, and each byte of the model is read once.
#[test]
fn loads_commits_and_resumes_on_any_number_of_ranks() {
    for flags in [&["--quantize", "nf4", "--double"][..], &["--quantize", "int8"], &[]] {
        let mut expected = None;
        for (ranks, strategy) in [(1, "low-memory"), (4, "low-memory"), (3, "striped")] {
            let place = Place::new();
            let mut all = vec!["--model", MODEL, "--save", "--strategy", strategy];
            all.extend(flags);
            let loaded = place.finish(ranks, &all);
            assert_eq!(storage_bytes(&loaded), MODEL_BYTES, "{all:?} on {ranks}");
            assert_eq!(loaded["checkpoint"], "step-000000000");
            let found = digests(&loaded);
            assert_eq!(found.len(), 56);
            assert!(*expected.get_or_insert_with(|| found.clone()) == found, "{all:?} on {ranks}");
            for resumed in [1, 2, 3, 8] {
                let again = place.finish(resumed, &["--resume", "must"]);
                assert!(digests(&again) == found, "{all:?} from {ranks} to {resumed}");
            }
            place.expect_no_process();
        }
    }
}

#[test]
fn a_holding_job_shows_its_ranks_and_drains_with_a_checkpoint() {
    let place = Place::new();
    let mut job = place.start(2, &["--model", MODEL, "--hold"]);
    let status = place.wait_for_phase("holding");
    let ranks = status["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 2);
    assert!(place.run(&["drain"]).status.success());
    assert_eq!(job.wait().expect("it ends").code(), Some(0));
    let verified = place.run(&["checkpoint", "verify", "--deep", &place.checkpoints().display().to_string()]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    place.expect_no_process();
}

#[test]
fn sigterm_saves_and_ends_with_75() {
    let place = Place::new();
    let mut job = place.start(2, &["--model", MODEL, "--hold"]);
    place.wait_for_phase("holding");
    signal("TERM", job.id());
    assert_eq!(job.wait().expect("it ends").code(), Some(75));
    let listed = place.run(&["checkpoint", "list", "--json", &place.checkpoints().display().to_string()]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!(listed[0]["usable"], true);
    place.expect_no_process();
}

/// A rank that is killed ends the job within two seconds with its code, and is named; the checkpoint survives.
#[test]
fn a_killed_rank_is_named_and_the_checkpoint_survives() {
    let place = Place::new();
    let job = place.start(3, &["--model", MODEL, "--hold", "--save"]);
    let status = place.wait_for_phase("holding");
    let victim = status["ranks"][1]["process_id"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process");
    let start = Instant::now();
    signal("KILL", victim);
    let output = job.wait_with_output().expect("it ends");
    let took = start.elapsed();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(137), "{message}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(message.contains("rank 1 was ended by signal 9"), "{message}");
    place.expect_no_process();
    place.finish(2, &["--resume", "must"]);
}

/// A rank that is stopped keeps its connections, and is found by its lease.
#[test]
fn a_silent_rank_ends_the_job() {
    let place = Place::new();
    let job = place.start(2, &["--model", MODEL, "--hold"]);
    let status = place.wait_for_phase("holding");
    let victim = status["ranks"][1]["process_id"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process");
    signal("STOP", victim);
    let output = job.wait_with_output().expect("it ends");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(message.contains("rank 1 (process") && message.contains("has been silent"), "{message}");
    place.expect_no_process();
}

/// SIGKILL of the launcher at 12 moments of load and commit: no orphan, and what is listed verifies.
#[test]
fn a_killed_launcher_leaves_no_process_and_nothing_half_written() {
    for trial in 0..12_u64 {
        let place = Place::new();
        let mut job = place.start(3, &["--model", MODEL, "--quantize", "nf4", "--save"]);
        std::thread::park_timeout(Duration::from_millis(10 + trial * 15));
        job.kill().expect("a child");
        job.wait().expect("it ends");
        place.expect_no_process();
        let directory = place.checkpoints().display().to_string();
        let listed = place.run(&["checkpoint", "list", "--json", &directory]);
        let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
        for entry in listed.as_array().expect("a list") {
            assert_eq!(entry["usable"], true, "trial {trial}");
            let verified = place.run(&["checkpoint", "verify", "--deep", &directory]);
            assert!(verified.status.success(), "trial {trial}: {}", String::from_utf8_lossy(&verified.stderr));
        }
    }
}

fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").args([format!("-{name}"), process.to_string()]).status().expect("kill exists");
    assert!(sent.success());
}

/// Damage in a checkpoint is found before a byte is used, and an older checkpoint is not silently mixed in.
#[test]
fn damage_is_named() {
    let place = Place::new();
    place.finish(2, &["--model", MODEL, "--save"]);
    let step = place.checkpoints().join("step-000000000");
    let shard = step.join("shard-00002-model-00001-of-00001.safetensors");
    let check = |expected: &str| {
        let arguments = place.job(2, &["--resume", "must"]);
        let output = place.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{message}");
        assert!(message.contains(expected), "expected {expected}: {message}");
        place.expect_no_process();
    };
    let good = std::fs::read(&shard).expect("a shard");
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    std::fs::write(&shard, &flipped).expect("writable");
    // What happened: rank 0, which only heard of it, was named as the root cause when it ended first.
    check("is damaged");
    std::fs::write(&shard, &good[..good.len() - 1]).expect("writable");
    check("expected");
    std::fs::remove_file(&shard).expect("removable");
    check("shard-00002");
    swap(&step, &good);
    check("digests is damaged");
}

/// Puts rank 0's shard, cut or filled to the right length, in the place of rank 1's, with its own digest table.
fn swap(step: &Path, good: &[u8]) {
    let name = |rank: u32| step.join(format!("shard-{rank:05}-model-00001-of-00001.safetensors"));
    let mut other = std::fs::read(name(1)).expect("a shard");
    other.resize(good.len(), 0);
    std::fs::write(name(2), &other).expect("writable");
    let table = |rank: u32| step.join(format!("shard-{rank:05}-model-00001-of-00001.safetensors.crc32c"));
    let length = std::fs::metadata(table(2)).expect("a table").len();
    let mut stolen = std::fs::read(table(1)).expect("a table");
    stolen.resize(usize::try_from(length).expect("small"), 0);
    std::fs::write(table(2), stolen).expect("writable");
}

#[test]
fn jobs_that_cannot_work_are_refused_before_a_process_starts() {
    let check = |flags: &[&str], code: i32, expected: &str| {
        let place = Place::new();
        let start = Instant::now();
        let mut arguments = vec!["launch", "--nproc-per-node", "2"];
        arguments.extend(flags);
        let output = place.run(&arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {message}");
        assert!(message.contains(expected), "{flags:?}: {message}");
        assert!(start.elapsed() < Duration::from_secs(3), "{flags:?}");
        place.expect_no_process();
    };
    check(&["--model", "/no/such/model"], 65, "/no/such/model");
    check(&["--model", MODEL, "--save"], 78, "checkpoint.directory");
    check(&["--model", MODEL, "--dtype", "int4"], 78, "load.dtype: expected auto, float32");
    check(&["--model", MODEL, "--memory-per-rank-mib", "1"], 78, "rank 0 does not fit");
    check(&["--resume", "must", "--checkpoint-dir", "/tmp/weightcast-no-such-directory"], 65, "no checkpoint in");
}
