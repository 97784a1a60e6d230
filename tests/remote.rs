//! Models and checkpoints in an object store and on a web server, on loopback: what is read is what is there, whatever the
//! server does, and of two committers one wins.
#![cfg(feature = "remote")]
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock, threads and files")]

mod remote_server;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use remote_server::{Faults, Server};
use serde_json::Value;
use support::{Ended, MODEL, Place, Random};
use weightcast::app::prepare_with;
use weightcast::checkpoint::{
    self, CheckpointError, Delete, Depth, WriteRequest, begin, commit, list, newest, prune, verify, write_shard,
};
use weightcast::config::JobConfig;
use weightcast::error::{Classify as _, Kind};
use weightcast::load::{LoadError, LoadOptions, load, logical_digests};
use weightcast::manifest::{SealRequest, ShardReceipt};
use weightcast::plan::{LoadPlan, Strategy};
use weightcast::store::{
    LocalStore, Patience, RemoteAddress, RemoteSettings, RemoteStore, Store, StoreError, read_small, write_small,
};
use weightcast::types::{Attempt, Generation, Rank, Step, WorldSize};

/// Short waits: the server is near.
const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(5),
    stall: Duration::from_millis(250),
    retries: 12,
    backoff: Duration::from_millis(1),
};

fn settings(server: &Server) -> RemoteSettings {
    let variables = server.variables().map(|(name, value)| (name.to_owned(), value));
    RemoteSettings::from_variables(variables).with_patience(PATIENCE)
}

fn store_at(server: &Server, address: &str) -> RemoteStore {
    let address = RemoteAddress::parse(address).expect("an address");
    RemoteStore::new(address, &settings(server)).expect("a client")
}

/// The store at `bucket/run`.
fn store(server: &Server) -> RemoteStore {
    store_at(server, "s3://bucket/run")
}

fn bytes_of(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let words = std::iter::repeat_with(move || random.next().to_le_bytes());
    words.flatten().take(len).collect()
}

/// A plan that each rank carries out alone, and the store of its files on this machine.
fn plan_of(ranks: u32) -> (LoadPlan, LocalStore) {
    let mut config = JobConfig::default();
    config.model.source = Some(MODEL.to_owned());
    config.load.strategy = Some(Strategy::Full);
    config.load.digests = true;
    let world = WorldSize::new(ranks).expect("a world of at least 1");
    let plan = prepare_with(&config, world, None, &|_| {}).expect("a good model").plan;
    let files = LocalStore::new(&plan.root);
    (plan, files)
}

/// Loads all ranks of a plan from `files`, one after the other.
fn digests_of(plan: &LoadPlan, files: &dyn Store) -> BTreeMap<String, String> {
    let load_rank = |rank| load(plan, &LoadOptions::on_host(rank, files), None).expect("a good model").1;
    let reports: Vec<_> = plan.world.ranks().map(load_rank).collect();
    let digests = logical_digests(plan, &reports).expect("all ranks have loaded");
    digests.into_iter().map(|(fqn, digest)| (fqn.to_string(), digest.to_string())).collect()
}

/// Refusals, answers that break off and answers that stop: the bytes are those of a local load.
#[test]
fn a_load_from_a_bad_server_gives_the_bytes_of_a_local_one() {
    let server = Server::start(Faults { refuse: 7, truncate: 5, stall: 16, lose_answer: 0 });
    server.put_directory("bucket/models/tiny", MODEL);
    let remote = store_at(&server, "s3://bucket/models/tiny");
    let (mut plan, files) = plan_of(2);
    plan.chunking.chunk_bytes = 1 << 16;
    plan.chunking.reader_threads = 4;
    // Answers that take no time leave nothing to be under way at once.
    server.delay_ms(2);
    let expected = digests_of(&plan, &files);
    assert_eq!(digests_of(&plan, &remote), expected);
    let counts = server.counts();
    assert!(counts.refused > 5 && counts.truncated > 5 && counts.stalled > 2, "{counts:?}");
    // Each byte once, but for what was asked for again.
    let read = remote.read_counter().bytes();
    assert_eq!(read, files.read_counter().bytes());
    assert!(counts.content_bytes > read && counts.content_bytes < 2 * read, "{counts:?}, {read} read");
    // Four threads of a reader have as many requests under way.
    assert!(counts.peak > 1, "{counts:?}");
}

/// RS-1: an object that another took the place of is an error, also where the length is the same; a later opening sees it.
#[test]
fn an_object_that_changes_is_an_error_and_never_mixed_bytes() {
    for weak in [false, true] {
        let server = Server::start(Faults::default());
        if weak {
            server.give_weak_tags();
        }
        server.put("bucket/run/a", vec![1; 1000]);
        for address in ["s3://bucket/run".to_owned(), format!("{}/web/bucket/run", server.endpoint())] {
            let remote = store_at(&server, &address);
            let file = remote.open("a").expect("it is there");
            let mut first = [0; 100];
            file.read_exact_at(0, &mut first).expect("it is there");
            server.put("bucket/run/a", vec![2; 1000]);
            let mut second = [7; 100];
            let error = file.read_exact_at(100, &mut second).expect_err("another object");
            assert!(matches!(error, StoreError::Changed { .. }), "{error:?}");
            assert_eq!((error.kind(), second), (Kind::Corrupt, [7; 100]));
            let message = error.to_string();
            assert!(message.contains(&format!("{address}/a has changed")) && message.contains("tag-"), "{message}");
            remote.open("a").expect("it is there").read_exact_at(0, &mut second).expect("the new one");
            assert_eq!((first, second), ([1; 100], [2; 100]));
            // A store for a model keeps the first version of each of its files.
            let pinned = remote.pinned();
            let version = pinned.open("a").expect("it is there").version();
            server.put("bucket/run/a", vec![1; 1000]);
            let reopened = pinned.open("a").expect("known");
            assert_eq!(reopened.version(), version);
            reopened.read_exact_at(0, &mut second).expect_err("another object");
        }
    }
}

/// Between plan and load a file became another of the same length.
#[test]
fn a_rank_reads_the_version_of_the_plan_or_nothing() {
    let server = Server::start(Faults::default());
    server.put_directory("bucket/tiny", MODEL);
    let remote = store_at(&server, "s3://bucket/tiny");
    let (mut plan, _) = plan_of(1);
    let version = |name: &String| remote.open(name).expect("it is there").version().expect("stores know versions");
    plan.versions = plan.files.iter().map(|file| version(&file.name)).collect();
    digests_of(&plan, &remote);
    let last = plan.files.last().expect("files").name.clone();
    let mut bytes = server.get(&format!("bucket/tiny/{last}")).expect("it is there").to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    server.put(&format!("bucket/tiny/{last}"), bytes);
    let error = load(&plan, &LoadOptions::on_host(Rank::ZERO, &remote), None).expect_err("another version");
    assert!(matches!(&error, LoadError::Version { path, .. } if path.ends_with(&last)), "{error:?}");
}

/// Who is refused for ever is told what was asked of whom and how often; nothing is asked of a server that denies.
#[test]
fn errors_say_what_and_where_and_no_secret() {
    let server = Server::start(Faults { refuse: 0, truncate: 1, stall: 0, lose_answer: 0 });
    server.put("bucket/run/a", vec![1; 1000]);
    let impatient = settings(&server).with_patience(Patience { retries: 2, ..PATIENCE });
    let address = RemoteAddress::parse("s3://bucket/run").expect("an address");
    let remote = RemoteStore::new(address.clone(), &impatient).expect("a client");
    let mut into = [7; 100];
    let error = remote.open("a").expect("it is there").read_exact_at(100, &mut into).expect_err("it always breaks off");
    assert_eq!((error.kind(), into), (Kind::Unavailable, [7; 100]));
    let message = error.to_string();
    assert!(message.contains("cannot read s3://bucket/run/a: bytes 100..200: "), "{message}");

    let missing = remote.open("b").expect_err("nothing is there");
    assert_eq!(missing.kind(), Kind::NotFound);
    assert!(missing.to_string().starts_with("cannot open s3://bucket/run/b: "), "{missing}");
    assert!(matches!(remote.open("../b"), Err(StoreError::Outside { .. })));
    let beyond = remote.open("a").expect("it is there").read_exact_at(950, &mut into).expect_err("it ends before");
    assert!(matches!(beyond, StoreError::Truncated { expected_bytes: 1050, found_bytes: 1000, .. }), "{beyond}");

    let variables = [("AWS_ENDPOINT_URL", server.endpoint()), ("AWS_ACCESS_KEY_ID", "other".to_owned())];
    let variables = variables.into_iter().chain([("AWS_SECRET_ACCESS_KEY", "hunter2".to_owned())]);
    let denied = RemoteSettings::from_variables(variables.map(|(name, value)| (name.to_owned(), value)));
    let before = server.counts().requests;
    let denied = RemoteStore::new(address, &denied.with_patience(PATIENCE)).expect("a client");
    let error = denied.open("a").expect_err("another's key");
    assert_eq!((error.kind(), server.counts().requests - before), (Kind::Conflict, 1), "{error}");
    assert!(!error.to_string().contains("hunter2") && error.to_string().contains("s3://bucket/run/a"), "{error}");
}

/// RS-3, in one request and in parts: whole or not there, never a second time, and a lost answer is not a failure.
#[test]
fn objects_are_created_whole_and_once() {
    let server = Server::start(Faults { refuse: 5, truncate: 0, stall: 0, lose_answer: 2 });
    let remote = store(&server);
    for len in [0, 1, 5_000_000, 8 << 20, (8 << 20) + 1, 21_000_000] {
        let (name, bytes) = (format!("o-{len}"), bytes_of(len, 3));
        let mut file = remote.create(&name, len as u64).expect("a new name");
        // As a shard is written: the header, which stands first, goes last.
        let (header, rest) = bytes.split_at(len.min(100_000));
        let mut at = header.len() as u64;
        for piece in rest.chunks(1_000_003) {
            file.write_all_at(at, piece).expect("room");
            at += piece.len() as u64;
        }
        file.write_all_at(0, header).expect("room");
        assert_eq!(server.get(&format!("bucket/run/{name}")), None, "not before it is whole");
        file.finish().expect("whole");
        assert!(server.get(&format!("bucket/run/{name}")).is_some_and(|found| found == bytes), "{len} bytes");
        let again = remote.create(&name, len as u64).and_then(|mut file| {
            file.write_all_at(0, &bytes_of(len, 4))?;
            file.finish()
        });
        // Nothing and nothing are the same.
        assert!(len == 0 || matches!(again, Err(StoreError::Exists { .. })), "{len}: {again:?}");
        assert!(server.get(&format!("bucket/run/{name}")).is_some_and(|found| found == bytes), "{len} bytes");
    }
    let mut holed = remote.create("hole", 20_000_000).expect("a new name");
    holed.write_all_at(0, &bytes_of(10_000_000, 5)).expect("room");
    assert!(matches!(holed.finish(), Err(StoreError::Truncated { found_bytes: 10_000_000, .. })));
    assert_eq!((server.get("bucket/run/hole"), server.open_uploads()), (None, 0));
    assert!(server.counts().lost > 2 && server.counts().refused > 5, "{:?}", server.counts());
    let web = store_at(&server, &format!("{}/web/bucket/run", server.endpoint()));
    assert!(web.create("x", 1).is_err_and(|error| error.to_string().contains("not written to")));
}

#[test]
fn names_are_listed_over_pages_and_removed_with_all_below() {
    let server = Server::start(Faults::default());
    let remote = store(&server);
    let names = ["a", "b/1", "b/2", "b/c/3", "d", "e", "f/1", "g"];
    for name in names {
        write_small(&remote, name, name.as_bytes()).expect("a new name");
    }
    server.put("bucket/running", vec![0]);
    let listed = |directory| remote.list(directory).expect("a listing");
    assert_eq!(listed(""), ["a", "b", "d", "e", "f", "g"]);
    assert_eq!(listed("b"), ["1", "2", "c"]);
    assert_eq!(listed("nowhere"), [""; 0]);
    assert_eq!(read_small(&remote, "b/c/3", 10).expect("it is there"), b"b/c/3");
    remote.remove("b").expect("removed");
    remote.remove("a").expect("removed");
    remote.remove("nowhere").expect("nothing to do");
    assert_eq!(listed(""), ["d", "e", "f", "g"]);
    assert!(server.names().contains(&"bucket/running".to_owned()));
}

/// A try at saving that is written but not committed.
struct Try {
    plan: LoadPlan,
    step: Step,
    attempt: Attempt,
    receipts: Vec<ShardReceipt>,
}

impl Try {
    fn write(store: &dyn Store, step: u64, ranks: u32) -> Self {
        let (plan, files) = plan_of(ranks);
        let step = Step(step);
        let (attempt, directory) = begin(store, step).expect("a new step");
        let write = |rank| {
            let (state, _) = load(&plan, &LoadOptions::on_host(rank, &files), None).expect("a good model");
            let request = WriteRequest { plan: &plan, state: &state, store, directory: &directory, step };
            write_shard(&request, &|_| {}).expect("it is written")
        };
        let receipts = plan.world.ranks().map(write).collect();
        Self { plan, step, attempt, receipts }
    }

    fn commit(self, store: &dyn Store) -> Result<String, CheckpointError> {
        let Self { plan, step, attempt, receipts } = self;
        commit(store, &SealRequest { plan: &plan, step, attempt, generation: Generation(1) }, receipts)
    }
}

/// CL-1, CL-2: two that save the same step at the same time, with answers lost and requests refused.
#[test]
fn of_two_committers_exactly_one_wins() {
    for round in 0..4 {
        let server = Server::start(Faults { refuse: 6 + round, truncate: 0, stall: 0, lose_answer: 3 });
        let remote: Arc<dyn Store> = Arc::new(store(&server));
        let tries = [Try::write(remote.as_ref(), 7, 1), Try::write(remote.as_ref(), 7, 2)];
        assert_ne!(tries[0].attempt, tries[1].attempt, "CL-1");
        assert!(list(remote.as_ref()).expect("a listing").is_empty(), "A-6: nothing is visible before the commit");
        // Slow answers: both have looked whether the step is committed before either commits it.
        server.delay_ms(20);
        let together = std::sync::Barrier::new(2);
        let results = std::thread::scope(|scope| {
            let threads = tries.map(|one| {
                let (remote, together) = (remote.clone(), &together);
                scope.spawn(move || {
                    together.wait();
                    (one.attempt, one.commit(remote.as_ref()))
                })
            });
            threads.map(|thread| thread.join().expect("no panic"))
        });
        let winners: Vec<_> =
            results.iter().filter(|(_, result)| result.is_ok()).map(|(attempt, _)| *attempt).collect();
        assert_eq!(winners.len(), 1, "{results:?}");
        for (_, result) in &results {
            if let Err(error) = result {
                assert_eq!(error.to_string(), "step 7 is committed already in s3://bucket/run");
                assert_eq!(error.kind(), Kind::Conflict);
            }
        }
        let (found, skipped) = newest(remote.as_ref()).expect("a checkpoint");
        assert_eq!((found.manifest.attempt, skipped.len()), (winners[0], 0));
        verify(remote.as_ref(), &found, Depth::Deep).expect("every byte holds");
        assert!(matches!(begin(remote.as_ref(), Step(7)), Err(CheckpointError::Committed { .. })));
    }
}

#[test]
fn checkpoints_are_listed_verified_and_pruned_and_damage_is_seen() {
    let server = Server::start(Faults::default());
    let remote = store(&server);
    for step in [1, 2, 3] {
        Try::write(&remote, step, 1).commit(&remote).expect("committed");
    }
    // A try that is given up shows in no listing, and goes with the next commit.
    let _ = Try::write(&remote, 4, 1);
    let steps = |store: &dyn Store| -> Vec<(u64, bool)> {
        let listed = list(store).expect("a listing").into_iter();
        listed.map(|listed| (listed.step.0, listed.checkpoint.is_ok())).collect()
    };
    assert_eq!(steps(&remote), [(1, true), (2, true), (3, true)]);
    Try::write(&remote, 5, 1).commit(&remote).expect("committed");
    assert!(!server.names().iter().any(|name| name.contains("step-000000004")), "{:?}", server.names());
    assert_eq!(read_small(&remote, checkpoint::LATEST, 100).expect("the hint"), b"step-000000005");

    let shard = |server: &Server, step: &str| {
        let names = server.names().into_iter();
        names.filter(|name| name.contains(step)).find(|name| name.ends_with(".safetensors")).expect("a shard")
    };
    let damaged = shard(&server, "step-000000005");
    let mut bytes = server.get(&damaged).expect("a shard").to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    server.put(&damaged, bytes);
    let (found, _) = newest(&remote).expect("its lengths hold");
    let error = verify(&remote, &found, Depth::Deep).expect_err("a damaged block").to_string();
    assert!(
        error.contains("s3://bucket/run/step-000000005/attempt-1/shard-00001") && error.contains("CRC32C"),
        "{error}"
    );
    server.put(&damaged, vec![0; 10]);
    let (found, skipped) = newest(&remote).expect("an older one");
    assert_eq!((found.manifest.step, skipped.len()), (Step(3), 1));
    let pruned = prune(&remote, 1, Delete::Now).expect("pruned");
    assert_eq!(pruned.deleted, ["step-000000002", "step-000000001"]);
    assert_eq!(steps(&remote), [(3, true), (5, false)]);
    assert!(!server.names().iter().any(|name| name.contains("step-000000001")));
}

/// The program, told by variables where the server is.
fn run(place: &Place, server: &Server, arguments: &[&str]) -> Ended {
    let mut command = place.command(arguments);
    command.envs(server.variables());
    place.start_command(command).wait()
}

fn finish(place: &Place, server: &Server, arguments: &[&str]) -> Value {
    let ended = run(place, server, arguments);
    assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
    ended.expect_quiet();
    ended.json()
}

/// The main job, black box: from a bucket or a web server, quantized, onto ranks; committed to a bucket; resumed from there on
/// another number of ranks.
#[test]
fn a_job_loads_saves_and_resumes_remotely() {
    let place = Place::new();
    let server = Server::start(Faults { refuse: 9, truncate: 8, stall: 0, lose_answer: 0 });
    server.put_directory("bucket/models/tiny", MODEL);
    let job = |ranks: &str, model: &str, more: &[&str]| {
        let flags = ["launch", "--nproc-per-node", ranks, "--model", model, "--quantize", "nf4", "--digests", "--json"];
        finish(&place, &server, &[&flags, more].concat())
    };
    let local = job("2", MODEL, &[]);
    let remote = job("2", "s3://bucket/models/tiny", &["--checkpoint-dir", "s3://bucket/run", "--save", "--step", "3"]);
    assert_eq!(remote["digests"], local["digests"]);
    assert_eq!(remote["checkpoint"], "step-000000003");
    let web = job("1", &format!("{}/web/bucket/models/tiny/", server.endpoint()), &[]);
    assert_eq!(web["digests"], local["digests"]);
    let resume = [
        "launch",
        "--nproc-per-node",
        "3",
        "--resume",
        "must",
        "--checkpoint-dir",
        "s3://bucket/run",
        "--digests",
        "--json",
    ];
    let resumed = finish(&place, &server, &resume);
    assert_eq!(resumed["digests"], local["digests"]);
    let counts = server.counts();
    assert!(counts.refused > 3 && counts.truncated > 3, "{counts:?}");
    // With a cache the second load asks for headers and configuration alone.
    let cache = place.path("cache");
    let cached = |ranks| {
        let before = server.counts().content_bytes;
        let report = job(ranks, "s3://bucket/models/tiny", &["--cache", &cache]);
        assert_eq!(report["digests"], local["digests"]);
        server.counts().content_bytes - before
    };
    let weights: u64 = std::fs::read_dir(MODEL)
        .expect("the model")
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "safetensors"))
        .map(|entry| entry.metadata().expect("a file").len())
        .sum();
    let (first, second) = (cached("2"), cached("3"));
    assert!(first >= weights && second < weights / 20, "{first} and {second} of {weights}");

    let listed = finish(&place, &server, &["checkpoint", "list", "s3://bucket/run", "--json"]);
    assert_eq!((&listed[0]["step"], &listed[0]["usable"]), (&Value::from(3), &Value::from(true)));
    let verified = run(&place, &server, &["checkpoint", "verify", "--deep", "s3://bucket/run"]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    let again = run(
        &place,
        &server,
        &[
            "launch",
            "--nproc-per-node",
            "1",
            "--model",
            MODEL,
            "--resume",
            "never",
            "--checkpoint-dir",
            "s3://bucket/run",
            "--save",
            "--step",
            "3",
        ],
    );
    assert_ne!(again.code, Some(0));
    assert!(again.stderr.contains("step 3 is committed already in s3://bucket/run"), "{}", again.stderr);
    place.expect_no_process();
}

#[test]
fn what_is_not_there_or_not_of_the_form_is_refused_by_name() {
    let place = Place::new();
    let server = Server::start(Faults::default());
    let refused = |model: &str, expected: &[&str]| {
        let ended = run(&place, &server, &["plan", "--ranks", "1", "--model", model]);
        assert_ne!(ended.code, Some(0), "{model}");
        for words in expected {
            assert!(ended.stderr.contains(words), "{model}: {}", ended.stderr);
        }
        assert!(!ended.stderr.contains("hunter2") && !ended.stderr.contains("test-secret"), "{}", ended.stderr);
    };
    refused("s3://bucket/nothing", &["s3://bucket/nothing has no weights", "model.safetensors"]);
    refused("s3://bucket/m.gguf", &["s3://bucket/m.gguf: a GGUF file", "copy it here first"]);
    refused("https://u:hunter2@host/x", &["host/", "credentials come from the environment"]);
    refused("https://host/x?sig=hunter2", &["https://host/x", "credentials come from the environment"]);
    let nowhere = format!("{}/web/bucket/nothing", server.endpoint());
    refused(&nowhere, &[&nowhere, "has no weights"]);
}
