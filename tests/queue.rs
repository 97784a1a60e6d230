//! Jobs for ranks that stay, in real processes: a base that is there is not read again, jobs that cannot be are refused without
//! harm, and a coordinator that dies between two jobs loses neither.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::{Ended, Job, MODEL, PATIENCE, Place, signal, until, wait_until_holding};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
/// Debug builds compute slowly, and tests share the processors.
const LONG: Duration = Duration::from_secs(300);

/// A copy of the model, whose files a test may touch.
fn model(place: &Place) -> String {
    let copy = place.path("model");
    std::fs::create_dir(&copy).expect("a new directory");
    for entry in std::fs::read_dir(MODEL).expect("the model") {
        let from = entry.expect("an entry").path();
        let to = std::path::Path::new(&copy).join(from.file_name().expect("a name"));
        std::fs::copy(&from, to).expect("room for it");
    }
    copy
}

fn base(place: &Place, model: &str, format: &str, more: &str) -> String {
    let path = place.path("base.toml");
    let text = format!("job.hold = true\n{}{more}", of_model(model, format));
    std::fs::write(&path, text).expect("it is ours");
    path
}

fn of_model(model: &str, format: &str) -> String {
    format!(
        "model.source = \"{model}\"\nload.backend = \"tcp\"\nquantization = {{ format = \"{format}\", double = true }}\n"
    )
}

/// A job that trains an adapter; its checkpoints are in `name` of the place.
fn training(place: &Place, name: &str, model: &str, (format, steps): (&str, u64)) -> String {
    let path = place.path(&format!("{name}.toml"));
    let text = format!(
        "job.name = \"{name}\"\n{}checkpoint.directory = \"{name}\"\n[train]\nsteps = {steps}\nbatch-size = 4\n\
         micro-batch-size = 2\nseed = 7\n[train.data]\ntrain = \"{DATA}\"\nsequence-length = 16\n[train.lora]\nr = 2\n\
         [train.checkpoint]\nevery-steps = 0\nevery-minutes = 0\n",
        of_model(model, format)
    );
    std::fs::write(&path, text).expect("it is ours");
    path
}

/// The losses of a run as its metrics have them, digit for digit.
fn losses(place: &Place, name: &str) -> Vec<String> {
    let path = place.path(&format!("{name}/metrics/metrics.jsonl"));
    let text = std::fs::read_to_string(path).expect("the run's metrics");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.filter(|line| line["kind"] == "step").map(|line| line["loss"].to_string()).collect()
}

fn submit(place: &Place, job: &str) -> Value {
    let ended = place.start(&["submit", "--wait", "--json", job]).wait_within(LONG);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.json()
}

fn states(place: &Place) -> Vec<String> {
    let jobs = place.finish(&["jobs", "--json"]);
    let jobs = jobs["jobs"].as_array().expect("jobs").clone();
    jobs.iter().map(|job| job["state"].as_str().expect("a state").to_owned()).collect()
}

fn drain(place: &Place, daemon: Job) -> Ended {
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = daemon.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
    ended
}

/// A job over the base that the ranks hold reads nothing, and trains as if it had been started by itself; one whose base has
/// changed since, or is another, reads it.
#[test]
fn a_base_that_is_there_is_not_read_again() {
    let place = Place::new();
    let model = model(&place);
    let alone = training(&place, "alone", &model, ("nf4", 5));
    let ended = place.start(&["launch", "--nproc-per-node", "2", &alone]).wait_within(LONG);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);

    let base = base(&place, &model, "nf4", "");
    let mut daemon = place.start(&["launch", "--nproc-per-node", "2", &base]);
    wait_until_holding(&place, &mut daemon);
    let ranks = [0, 1].map(|rank| place.rank_process(rank).expect("a rank"));
    let first = submit(&place, &training(&place, "first", &model, ("nf4", 5)));
    assert_eq!((&first["state"], &first["storage_bytes"]), (&Value::from("done"), &Value::from(0)), "{first}");
    assert_eq!(first["last_checkpoint"], "step-000000005");
    assert_eq!(losses(&place, "first"), losses(&place, "alone"));

    // Of the same run there is nothing left to do; longer, it goes on.
    let longer = submit(&place, &training(&place, "first", &model, ("nf4", 7)));
    assert_eq!(longer["last_checkpoint"], "step-000000007", "{longer}");
    assert_eq!(losses(&place, "first").len(), 7);
    let second = submit(&place, &training(&place, "second", &model, ("nf4", 5)));
    assert_eq!((&second["number"], &second["storage_bytes"]), (&Value::from(3), &Value::from(0)), "{second}");
    assert_eq!(losses(&place, "second"), losses(&place, "alone"));

    let shard = std::path::Path::new(&model).join("model-00002-of-00003.safetensors");
    let file = std::fs::File::options().append(true).open(shard).expect("ours");
    file.set_modified(std::time::SystemTime::now()).expect("ours");
    let changed = submit(&place, &training(&place, "changed", &model, ("nf4", 5)));
    // By its files, tiny-llama has 5,510,016 bytes of weights.
    assert_eq!(changed["storage_bytes"], 5_510_016, "{changed}");
    assert_eq!(losses(&place, "changed"), losses(&place, "alone"));
    let other = submit(&place, &training(&place, "other", &model, ("fp4", 5)));
    assert_eq!(other["storage_bytes"], 5_510_016, "{other}");
    assert_ne!(losses(&place, "other"), losses(&place, "alone"));

    assert_eq!(states(&place), ["done"; 6]);
    assert_eq!([0, 1].map(|rank| place.rank_process(rank).expect("a rank")), ranks, "no rank was started again");
    drain(&place, daemon);
}

#[test]
fn jobs_are_refused_and_cancelled_without_harm() {
    let place = Place::new();
    let base = base(&place, MODEL, "nf4", "");
    let mut daemon = place.start(&["launch", "--nproc-per-node", "2", &base]);
    wait_until_holding(&place, &mut daemon);
    let refuse = |name: &str, text: &str, code: i32, expected: &str| {
        let path = place.path(name);
        std::fs::write(&path, text).expect("it is ours");
        let ended = place.run(&["submit", &path]);
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{}", ended.stderr);
    };
    refuse("garbage.toml", "job = 3", 78, "invalid type");
    refuse("missing.toml", "model.source = \"/nowhere/at/all\"", 65, "/nowhere/at/all");
    refuse(
        "cuda.toml",
        &format!("model.source = \"{MODEL}\"\nload.device = \"cuda\""),
        78,
        "load.device: expected cpu",
    );
    assert_eq!(place.run(&["submit", &place.path("no-file.toml")]).code, Some(78));

    let endless = place.run(&["submit", &training(&place, "endless", MODEL, ("nf4", 1_000_000))]);
    assert_eq!((endless.code, endless.stdout.trim()), (Some(0), "1"), "{}", endless.stderr);
    let waiting = place.run(&["submit", &training(&place, "waiting", MODEL, ("nf4", 3))]);
    assert_eq!((waiting.code, waiting.stdout.trim()), (Some(0), "2"), "{}", waiting.stderr);
    let shared = place.run(&["submit", &training(&place, "waiting", MODEL, ("nf4", 4))]);
    assert_eq!(shared.code, Some(78), "{}", shared.stderr);
    assert!(shared.stderr.contains("waiting is that of job 2, which is not done"), "{}", shared.stderr);
    until("it trains", PATIENCE, || states(&place) == ["done", "running", "queued"]);
    assert_eq!(place.run(&["cancel", "2"]).code, Some(0));
    assert_eq!(states(&place), ["done", "running", "cancelled"]);
    let again = place.run(&["cancel", "2"]);
    assert_eq!(again.code, Some(65), "{}", again.stderr);
    assert!(again.stderr.contains("job 2 is neither queued nor running"), "{}", again.stderr);
    until("it makes steps", LONG, || {
        place.finish(&["status", "--json"])["training"]["step"].as_u64().is_some_and(|step| step > 0)
    });
    assert_eq!(place.run(&["cancel", "1"]).code, Some(0));
    until("it has ended", LONG, || states(&place) == ["done", "cancelled", "cancelled"]);
    wait_until_holding(&place, &mut daemon);
    assert!(
        std::path::Path::new(&place.path("endless")).join("LATEST").exists() || {
            std::fs::read_dir(place.path("endless"))
                .expect("checkpoints")
                .any(|entry| entry.expect("an entry").file_name().to_string_lossy().starts_with("step-"))
        }
    );
    let after = submit(&place, &training(&place, "after", MODEL, ("nf4", 2)));
    assert_eq!((&after["state"], &after["storage_bytes"]), (&Value::from("done"), &Value::from(0)), "{after}");
    drain(&place, daemon);
}

#[test]
fn ranks_that_end_with_their_job_take_no_other() {
    let place = Place::new();
    let job = training(&place, "job", MODEL, ("nf4", 1_000_000));
    let running = place.start(&["launch", "--nproc-per-node", "1", &job]);
    until("it trains", LONG, || {
        let asked = place.run(&["status", "--json"]);
        asked.code == Some(0) && asked.json()["phase"] == "training"
    });
    let refused = place.run(&["submit", &training(&place, "other", MODEL, ("nf4", 1))]);
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains("start it with hold = true"), "{}", refused.stderr);
    assert_eq!(place.run(&["drain"]).code, Some(0));
    assert_eq!(running.wait_within(LONG).code, Some(0));
    place.expect_no_process();
}

/// The coordinator is killed when the next job is durable and the ranks have not begun it, and again while it trains.
#[test]
fn a_coordinator_that_dies_between_two_jobs_goes_on_with_the_next() {
    let place = Place::new();
    let base = base(&place, MODEL, "nf4", "");
    let (state, said) = (place.path("state"), place.path("killed"));
    let start = |faults: Option<String>| {
        let mut command = place.command(&["coordinator", "--ranks", "2", "--state-dir", &state, &base]);
        command.envs(faults.map(|faults| ("WEIGHTCAST_FAULTS", faults)));
        place.start_command(command)
    };
    let mut first = start(Some(format!("kill=coordinator:coordinator.next-job:1:{said}")));
    let mut address = None;
    until("the coordinator listens", PATIENCE, || {
        let text = first.said();
        address = text.lines().find_map(|line| Some(line.split_once("listens on ")?.1.trim().to_owned()));
        assert!(!first.is_over(), "{text}");
        address.is_some()
    });
    let (address, token) = (address.expect("just found"), place.path("state/token"));
    let ranks = place.start(&["launch", "--nproc-per-node", "2", "--coordinator", &address, "--token-file", &token]);
    wait_until_holding(&place, &mut first);
    let processes = [0, 1].map(|rank| place.rank_process(rank).expect("a rank"));
    // Its answer may be lost with the coordinator; the job is not.
    let _ = place.run(&["submit", &training(&place, "next", MODEL, ("nf4", 40))]);
    until("it was killed", PATIENCE, || first.is_over());
    let second = start(None);
    until("it trains", LONG, || {
        let asked = place.run(&["status", "--json"]);
        asked.code == Some(0) && asked.json()["training"]["step"].as_u64().is_some_and(|step| step > 0)
    });
    signal(second.process(), Signal::KILL);
    assert_eq!(second.wait_within(LONG).code, None);
    let mut third = start(None);
    until("it is done", LONG, || {
        let asked = place.run(&["jobs", "--json"]);
        assert!(!third.is_over(), "{}", third.said());
        asked.code == Some(0) && asked.json()["jobs"][0]["state"] == "done"
    });
    assert_eq!(losses(&place, "next").len(), 40);
    assert_eq!([0, 1].map(|rank| place.rank_process(rank).expect("a rank")), processes, "no rank was started again");
    assert_eq!(place.run(&["drain"]).code, Some(0));
    assert_eq!(third.wait_within(LONG).code, Some(0));
    assert_eq!(ranks.wait_within(LONG).code, Some(0));
    place.expect_no_process();
}
