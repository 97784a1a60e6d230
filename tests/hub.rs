//! Models of a hub on a loopback socket, by the program: planned from their headers alone, and pulled.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[path = "../src/hub/tests/server.rs"]
#[expect(dead_code, reason = "each test file uses its part")]
mod server;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use serde_json::Value;
use server::{Behaviour, COMMIT, Server};
use support::{Ended, Place};

/// A hub that has a generated model of 30 million weights, which is in the place too.
fn hub(place: &Place) -> Server {
    let model = place.path("model");
    let made = place.run(&["model", "new", "--params", "30M", &model]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let read = |name: &str| std::fs::read(format!("{model}/{name}")).expect("a file of the model");
    let files = ["config.json", "model.safetensors"].map(|name| (name, read(name)));
    Server::start(Behaviour { files: files.into(), ..Behaviour::default() })
}

fn run(place: &Place, endpoint: &str, arguments: &[&str]) -> Ended {
    let mut command = place.command(arguments);
    command.env("HF_ENDPOINT", endpoint).env("HF_HUB_CACHE", place.path("hub")).env_remove("HF_HUB_OFFLINE");
    place.start_command(command).wait()
}

fn json(place: &Place, server: &Server, arguments: &[&str]) -> Value {
    let ended = run(place, &server.endpoint(), arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.json()
}

/// Bytes of weights that were asked for, by the ranges of the requests.
fn weights_asked_for(requests: &[String]) -> u64 {
    let of_weights = requests.iter().filter(|request| request.contains("/store/") && request.starts_with("GET"));
    let range = |request: &String| {
        let (_, range) = request.split_once(" from ").expect("a range, and not the whole file");
        let (first, last) = range.split_once(" to ").expect("a range with an end");
        last.parse::<u64>().expect("a number") + 1 - first.parse::<u64>().expect("a number")
    };
    of_weights.map(range).sum()
}

/// A plan fetches less than a thousandth of the model, downloads nothing, and is that of the same model on this machine.
#[test]
fn a_plan_reads_headers_only() {
    let place = Place::new();
    let server = hub(&place);
    let flags = ["plan", "--ranks", "3", "--quantize", "nf4", "--json", "--model"];
    let planned = json(&place, &server, &[&flags[..], &["org/name"]].concat());
    let local = place.finish(&[&flags[..], &[&place.path("model")]].concat());
    assert_eq!(planned["ranks"], local["ranks"]);
    assert_eq!(planned["tensors"], local["tensors"]);
    let hub = &planned["hub"][0];
    let (fetched, total) =
        (hub["fetched_bytes"].as_u64().expect("a count"), hub["total_bytes"].as_u64().expect("a count"));
    assert_eq!((&hub["commit"], &hub["cached_bytes"]), (&Value::from(COMMIT), &Value::from(0)));
    let asked = weights_asked_for(&server.take_requests());
    assert!(asked > 0 && asked <= fetched && fetched < total / 1000, "{asked} and {fetched} of {total}");
    let kept = std::fs::read_dir(place.path("hub")).map_or(0, Iterator::count);
    assert_eq!(kept, 0, "nothing is downloaded");
}

/// What a pull says before, and what is true afterwards.
#[test]
fn a_pull_says_what_it_takes_and_takes_it() {
    let place = Place::new();
    let server = hub(&place);
    let sizes = ["config.json", "model.safetensors"]
        .map(|name| std::fs::metadata(place.path(&format!("model/{name}"))).expect("a file").len());
    let total: u64 = sizes.iter().sum();
    let said = json(&place, &server, &["model", "pull", "org/name", "--dry-run", "--json"]);
    let said = &said[0];
    assert_eq!((&said["total_bytes"], &said["cached_bytes"]), (&Value::from(total), &Value::from(0)));
    let formats = said["run_time_bytes"].as_array().expect("formats");
    let taken: Vec<u64> = formats.iter().map(|format| format[1].as_u64().expect("a count")).collect();
    assert!(taken[0] > taken[1] && taken[1] > taken[2], "{formats:?}");
    let pulled = json(&place, &server, &["model", "pull", "org/name", "--json"]);
    let directory = pulled["directories"][0].as_str().expect("a directory");
    for name in ["config.json", "model.safetensors"] {
        let there = std::fs::read(format!("{directory}/{name}")).expect("it was pulled");
        assert!(there == std::fs::read(place.path(&format!("model/{name}"))).expect("a file"), "{name}");
    }
    server.take_requests();
    let again = json(&place, &server, &["model", "pull", "org/name", "--json"]);
    assert_eq!(again["pulled"][0]["missing_bytes"], 0);
    assert_eq!(weights_asked_for(&server.take_requests()), 0, "what is in the cache is read there");
}

/// The cache is listed and pruned: what broke off goes, what a snapshot names stays, and a model goes when it is named.
#[test]
fn the_cache_is_listed_and_pruned() {
    let place = Place::new();
    let server = hub(&place);
    json(&place, &server, &["model", "pull", "org/name", "--json"]);
    let blobs = place.path("hub/models--org--name/blobs");
    std::fs::write(format!("{blobs}/00ff.incomplete"), [0; 1000]).expect("it is ours");
    std::fs::write(format!("{blobs}/0123"), [0; 500]).expect("it is ours");
    let sizes = ["config.json", "model.safetensors"]
        .map(|name| std::fs::metadata(place.path(&format!("model/{name}"))).expect("a file").len());
    let listed = json(&place, &server, &["model", "cache", "list", "--json"]);
    let model = &listed[0];
    assert_eq!((&model["id"], &model["snapshots"][0]), (&Value::from("org/name"), &Value::from(COMMIT)));
    let counts = ["bytes", "unnamed_bytes", "unfinished_bytes"].map(|key| model[key].as_u64().expect("a count"));
    assert_eq!(counts, [sizes.iter().sum::<u64>(), 500, 1000]);
    let freed = json(&place, &server, &["model", "cache", "prune", "--json"]);
    assert_eq!((&freed["files"], &freed["bytes"]), (&Value::from(2), &Value::from(1500)));
    let listed = json(&place, &server, &["model", "cache", "list", "--json"]);
    assert_eq!(listed[0]["bytes"].as_u64(), Some(sizes.iter().sum()));
    json(&place, &server, &["model", "cache", "prune", "org/name", "--json"]);
    assert_eq!(json(&place, &server, &["model", "cache", "list", "--json"]), Value::Array(Vec::new()));
}

/// What cannot be had is named, with its address.
#[test]
fn what_cannot_be_had_is_named() {
    let place = Place::new();
    let server = hub(&place);
    for arguments in [&["plan", "--model", "org/other"][..], &["model", "pull", "org/other"]] {
        let refused = run(&place, &server.endpoint(), arguments);
        assert_eq!(refused.code, Some(65), "{}", refused.stderr);
        assert!(refused.stderr.contains("org/other"), "{}", refused.stderr);
    }
    let endpoint = server.endpoint();
    drop(server);
    for arguments in [&["plan", "--model", "org/name"][..], &["model", "pull", "org/name"]] {
        let refused = run(&place, &endpoint, arguments);
        assert_eq!(refused.code, Some(78), "{}", refused.stderr);
        assert!(refused.stderr.contains(&endpoint), "{}", refused.stderr);
    }
    let local = run(&place, &endpoint, &["model", "pull", &place.path("model")]);
    assert_eq!(local.code, Some(65), "{}", local.stderr);
    assert!(local.stderr.contains("expected a hub id"), "{}", local.stderr);
}
