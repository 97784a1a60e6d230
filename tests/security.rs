//! Attacks on a job that trains, in real processes: each is refused with the right code and logged, and the job ends as one
//! that nobody disturbed. What certificates are for is in `tls.rs`.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

mod attack;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::time::Duration;

use serde_json::Value;
use support::{Job, MODEL, PATIENCE, Place, until, wait_until_holding};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use weightcast::rpc::{Clients, Token, request};
use weightcast_proto::v1;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
/// Debug builds compute slowly, and tests share the processors.
const LONG: Duration = Duration::from_secs(300);
/// A stranger has 10 s; this is more than that, on a busy machine.
const STRANGER: Duration = Duration::from_secs(25);
/// Connections in all that are opened and say nothing.
const CROWD: usize = 10_000;
/// At a time, so that neither side runs out of descriptors.
const BATCH: usize = 400;

/// A run of two ranks, long enough for what is done to it.
fn start(place: &Place, directory: &str, faults: &str) -> Job {
    let path = place.path(&format!("{directory}.toml"));
    let text = format!(
        r#"
        model.source = "{MODEL}"
        checkpoint.directory = "{directory}"
        [train]
        steps = 100
        batch-size = 16
        micro-batch-size = 2
        seed = 7
        [train.data]
        train = "{DATA}"
        sequence-length = 32
        [train.lora]
        r = 4
        [train.checkpoint]
        every-steps = 40
        every-minutes = 0
        "#
    );
    std::fs::write(&path, text).expect("a job file");
    let mut command = place.command(&["launch", "--nproc-per-node", "2", &path]);
    command.env("WEIGHTCAST_FAULTS", faults);
    place.start_command(command)
}

/// The losses as written, digit for digit, and the digests of the state in the last checkpoint.
fn outcome(place: &Place, directory: &str) -> (Vec<(u64, f64)>, Value) {
    let root = place.path(directory);
    let text = std::fs::read_to_string(format!("{root}/metrics/metrics.jsonl")).unwrap_or_default();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
    let losses = records.filter(|record| record["kind"] == "step");
    let losses = losses.map(|step| (step["step"].as_u64().expect("a step"), step["loss"].as_f64().expect("a loss")));
    let manifest = std::fs::read(format!("{root}/step-000000100/manifest.json")).expect("the last step is committed");
    let mut manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let digests = manifest["tensors"].as_array_mut().expect("tensors").iter_mut();
    (losses.collect(), digests.map(|tensor| tensor["digest"].take()).collect())
}

/// Address and token of the place's job.
fn run_file(place: &Place) -> (String, Token) {
    let directory = place.path("run/weightcast");
    let mut found = None;
    until("the job has its run file", PATIENCE, || {
        let entries = std::fs::read_dir(&directory).into_iter().flatten();
        let texts = entries.filter_map(|entry| std::fs::read(entry.ok()?.path().join("run.json")).ok());
        found = texts.filter_map(|text| serde_json::from_slice::<Value>(&text).ok()).next();
        found.is_some()
    });
    let run = found.expect("just found");
    let text = |name: &str| run[name].as_str().expect("text");
    (text("coordinator").to_owned(), Token::at(text("token_file")))
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

/// A refusal with this code, and with the reason that machines read.
fn expect_refused<T>(answer: Result<T, Status>, code: Code, what: &str) {
    let status = answer.map(drop).expect_err(what);
    assert_eq!(status.code(), code, "{what}: {status}");
    if !matches!(code, Code::OutOfRange | Code::Internal) {
        assert!(status.get_details_error_info().is_some(), "{what}: {status}");
    }
}

fn join(rank: u32) -> v1::JoinRequest {
    v1::JoinRequest {
        request_id: "somebody else".to_owned(),
        rank,
        world_size: 2,
        host: "elsewhere".to_owned(),
        data_address: "127.0.0.1:9".to_owned(),
        protocol_version: weightcast_proto::PROTOCOL_VERSION,
        ..v1::JoinRequest::default()
    }
}

/// Its field 2 is text where a join has a number.
#[derive(Clone, PartialEq, prost::Message)]
struct NoJoin {
    #[prost(string, tag = "2")]
    rank: String,
}

/// Calls of somebody without the token, and of somebody with it.
async fn calls(place: &Place, address: &str, token: &Token) {
    let mut clients = Clients::connect(address, None).await.expect("listening");
    let anonymous = clients.worker.join(Request::new(join(0))).await;
    expect_refused(anonymous, Code::Unauthenticated, "no token");
    let wrong = place.path("wrong-token");
    std::fs::write(&wrong, "guess").expect("a file");
    let wrong = Token::at(wrong);
    let guess = clients.job.drain(request(&wrong, v1::DrainRequest::default()).expect("a token")).await;
    expect_refused(guess, Code::PermissionDenied, "a wrong token");

    let with = |message| request(token, message).expect("the token");
    expect_refused(clients.worker.join(with(join(0))).await, Code::AlreadyExists, "a rank that is taken");
    expect_refused(clients.worker.join(with(join(7))).await, Code::ResourceExhausted, "a rank that does not exist");
    let control = v1::JoinRequest { host: "a\u{1b}[2J".to_owned(), ..join(0) };
    expect_refused(clients.worker.join(with(control)).await, Code::InvalidArgument, "control characters");
    let large = v1::JoinRequest { host: "h".repeat(1 << 20), ..join(0) };
    expect_refused(clients.worker.join(with(large)).await, Code::OutOfRange, "a message of a megabyte");
    let mut hurried = Request::new(join(0));
    hurried.metadata_mut().insert("authorization", token.header().expect("the token"));
    expect_refused(clients.worker.join(hurried).await, Code::InvalidArgument, "no deadline");

    let member_id = "0-0".to_owned();
    let stale = v1::ReportTrainedRequest { member_id: member_id.clone(), generation: 99, ..Default::default() };
    let stale = request(token, stale).expect("the token");
    expect_refused(clients.worker.report_trained(stale).await, Code::Aborted, "another generation");
    let unknown = v1::WatchRequest { member_id: "17-4".to_owned(), save_request: 0 };
    let unknown = clients.worker.watch(request(token, unknown).expect("the token")).await;
    expect_refused(unknown, Code::Aborted, "an unknown member");
    for name in ["../../../escaped", "/tmp/escaped", "..", "a/b"] {
        let receipt_json = serde_json::json!({
            "rank": 0, "chunks": [], "nested_offsets": [],
            "file": {"name": name, "rank": 0, "bytes": 1, "digest_table": {"bytes": 4, "crc32c": 0}},
        });
        let (member_id, receipt_json) = (member_id.clone(), receipt_json.to_string());
        let report = v1::ReportSavedRequest { member_id, generation: 1, receipt_json, ..Default::default() };
        let answer = clients.worker.report_saved(request(token, report).expect("the token")).await;
        let said = answer.as_ref().err().map(|status| status.message().to_owned()).unwrap_or_default();
        expect_refused(answer, Code::InvalidArgument, name);
        assert!(said.contains("file name: expected a name without a directory"), "{said}");
    }
    let model = "../../etc/passwd".to_owned();
    let unload = request(token, v1::UnloadModelRequest { model, ..Default::default() }).expect("the token");
    expect_refused(clients.job.unload_model(unload).await, Code::NotFound, "a model that is a path");
    let ended = v1::ReportProcessEndedRequest { rank: 1 << 30, exit_code: 1, ..Default::default() };
    let ended = clients.job.report_process_ended(request(token, ended).expect("the token")).await;
    expect_refused(ended, Code::ResourceExhausted, "the end of a rank that does not exist");
    malformed(address, token).await;
}

/// A message that is none, and headers that are too large.
async fn malformed(address: &str, token: &Token) {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let mut raw = tonic::client::Grpc::new(endpoint.connect().await.expect("listening"));
    raw.ready().await.expect("connected");
    let codec = tonic_prost::ProstCodec::<NoJoin, v1::JoinResponse>::default();
    let path = "/weightcast.v1.WorkerService/Join".parse().expect("a path");
    let message = request(token, NoJoin { rank: "zero".to_owned() }).expect("the token");
    expect_refused(raw.unary(message, path, codec).await, Code::Internal, "a message that is none");

    let mut clients = Clients::connect(address, None).await.expect("listening");
    let mut large = request(token, v1::GetStatusRequest {}).expect("the token");
    large.metadata_mut().insert("x-large", "x".repeat(64 << 10).parse().expect("ASCII"));
    assert!(clients.job.get_status(large).await.is_err(), "headers of 64 KiB");
}

/// A person asks for the job's status meanwhile, and hears it.
fn expect_status(place: &Place) {
    let asked = place.run(&["status", "--json"]);
    assert_eq!(asked.code, Some(0), "{}", asked.stderr);
}

#[test]
fn a_training_job_under_attack_ends_as_an_undisturbed_one() {
    let place = Place::new();
    let quiet = start(&place, "quiet", "").wait_within(LONG);
    assert_eq!(quiet.code, Some(0), "{}", quiet.stderr);
    quiet.expect_quiet();
    let undisturbed = outcome(&place, "quiet");
    assert_eq!(undisturbed.0.len(), 100);

    // On a busy machine the job was over before all of the attack had come: it stands still near its end as long as this file is there.
    let hold = place.path("hold");
    std::fs::write(&hold, "").expect("it is written");
    let mut job = start(&place, "attacked", &format!("hold=rank0:train.stepped:95:{hold}"));
    let (address, token) = run_file(&place);
    until("it trains", PATIENCE, || {
        assert!(!job.is_over(), "the job ended early: {}", job.said());
        let status = place.run(&["status", "--json"]);
        status.code == Some(0) && status.json()["phase"] == "training"
    });
    block_on(calls(&place, &address, &token));
    for seed in 0..8 {
        assert!(attack::garbage(&address, seed, STRANGER), "garbage {seed}");
    }
    assert!(attack::http1(&address, STRANGER), "another protocol");
    for seed in 0..8 {
        assert!(attack::frames(&address, seed, STRANGER), "frames {seed}");
    }
    assert!(attack::endless_headers(&address, STRANGER), "headers without an end");
    expect_status(&place);
    crowds(&place, &address);
    assert!(!job.is_over(), "all of this came while it trained");
    std::fs::remove_file(&hold).expect("it is there");
    let ended = job.wait_within(LONG);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for words in [
        "no job token",
        "wrong job token",
        "is taken by process",
        "control characters",
        "without a directory",
        "too large",
        "closed the oldest",
        "ended without an accepted call",
    ] {
        assert!(ended.stderr.contains(words), "{words:?} is not in the log: {}", ended.stderr);
    }
    assert_eq!(outcome(&place, "attacked"), undisturbed);
    assert!(!std::path::Path::new(&place.path("escaped")).exists());
    place.expect_no_process();
}

/// 10,000 connections that say nothing; after each batch somebody who speaks is heard at once.
fn crowds(place: &Place, address: &str) {
    let batch = BATCH.min(attack::raise_file_limit().saturating_sub(200));
    let mut opened = 0;
    while opened < CROWD {
        let crowd = attack::crowd(address, batch);
        assert!(!crowd.is_empty(), "nobody listens any more, after {opened} connections");
        opened += crowd.len();
        if opened % (5 * batch) < batch {
            expect_status(place);
        }
        drop(crowd);
    }
}

/// Whoever says too little has 10 s, however much of HTTP/2 was said.
fn expect_slow_starts_to_end(address: &str) {
    std::thread::scope(|scope| {
        let slow = attack::slow_starts().map(|said| scope.spawn(move || attack::slow(address, &said, STRANGER)));
        for stayed in slow {
            let stayed = stayed.join().expect("no panic");
            assert!(stayed.is_some_and(|stayed| stayed > Duration::from_secs(5)), "a slow start: {stayed:?}");
        }
    });
}

/// The ranks' token does what ranks do; the job is commanded with the control token alone.
#[test]
fn the_ranks_token_does_not_command_the_job() {
    let place = Place::new();
    let (state, ranks, control) = (place.path("state"), place.path("ranks"), place.path("control"));
    for (path, token) in [(&ranks, "token-of-ranks"), (&control, "token-of-people")] {
        std::fs::write(path, token).expect("a file");
    }
    let tokens = ["--token-file", &ranks, "--control-token-file", &control];
    let arguments = ["coordinator", "--ranks", "1", "--state-dir", &state, "--model", MODEL, "--hold"];
    let coordinator = place.start(&[&arguments[..], &tokens].concat());
    let (address, told) = run_file(&place);
    assert_eq!(told.path(), std::path::Path::new(&control), "people on this host find their own token");
    let join_job = ["launch", "--nproc-per-node", "1", "--coordinator", &address, "--token-file", &ranks];
    let mut node = place.start(&join_job);
    wait_until_holding(&place, &mut node);
    block_on(async {
        let (ranks, control) = (Token::at(&ranks), Token::at(&control));
        let mut clients = Clients::connect(&address, None).await.expect("listening");
        let status = request(&ranks, v1::GetStatusRequest {}).expect("a token");
        assert!(clients.job.get_status(status).await.is_ok(), "either may look");
        let save = request(&ranks, v1::SaveCheckpointRequest::default()).expect("a token");
        expect_refused(clients.job.save_checkpoint(save).await, Code::PermissionDenied, "save");
        let unload = request(&ranks, v1::UnloadModelRequest::default()).expect("a token");
        expect_refused(clients.job.unload_model(unload).await, Code::PermissionDenied, "unload");
        let drain = request(&ranks, v1::DrainRequest::default()).expect("a token");
        expect_refused(clients.job.drain(drain).await, Code::PermissionDenied, "drain");
        let mut drain = request(&ranks, v1::DrainRequest::default()).expect("a token");
        drain.metadata_mut().insert("weightcast-member", "5-5".parse().expect("ASCII"));
        expect_refused(clients.job.drain(drain).await, Code::PermissionDenied, "drain for nobody");
        let joins = request(&control, join(0)).expect("a token");
        expect_refused(clients.worker.join(joins).await, Code::PermissionDenied, "people are no ranks");
    });
    expect_slow_starts_to_end(&address);
    assert!(coordinator.said().contains("made no accepted call in time"), "{}", coordinator.said());
    assert_eq!(place.run(&["drain"]).code, Some(0), "the control token commands");
    assert_eq!(node.wait().code, Some(0));
    assert_eq!(coordinator.wait().code, Some(0));
    place.expect_no_process();
}
