//! `weightcast logs` in real processes: what ranks write comes to readers over the coordinator, embedded or apart.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::{Ended, Job, MODEL, PATIENCE, Place, signal, until, wait_until_holding};
use tonic::Code;
use weightcast::coordinator::{Line, LineStream};
use weightcast::rpc::{Clients, LineReport, Token};
use weightcast::types::Rank;

/// Said by rank 0 of every load.
const MARK: &str = "data plane";

/// A launch whose ranks say what they do.
fn start(place: &Place, arguments: &[&str]) -> Job {
    let mut command = place.command(arguments);
    // The library of the calls says something in every rank, and often.
    command.env("WEIGHTCAST_LOG", "weightcast=debug,h2=debug");
    place.start_command(command)
}

fn embedded(place: &Place) -> Job {
    let files = ["--log-dir", &place.path("files"), "--rdzv-id", "job"];
    start(place, &[&["launch", "--nproc-per-node", "2", "--model", MODEL, "--hold"], &files[..]].concat())
}

/// The objects that `--json` prints.
fn objects(ended: &Ended) -> Vec<Value> {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
    ended.stdout.lines().map(parse).collect()
}

fn ranks(objects: &[Value]) -> BTreeSet<u64> {
    objects.iter().filter_map(|line| line["rank"].as_u64()).collect()
}

/// The texts of lines by rank.
fn texts(objects: &[Value]) -> BTreeMap<u64, Vec<&str>> {
    let mut texts: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for line in objects.iter().filter(|line| line["text"].is_string()) {
        let (rank, text) = (line["rank"].as_u64().expect("a rank"), line["text"].as_str().expect("text"));
        texts.entry(rank).or_default().push(text);
    }
    texts
}

/// What the ranks have written on stderr, by their launchers' files. Each node has a folder of its ranks, by local rank.
fn written(place: &Place, folders: &[&str]) -> BTreeMap<u64, Vec<String>> {
    let mut written = BTreeMap::new();
    for (folder, first) in folders.iter().zip([0, 2]) {
        for rank in 0..2 {
            let path = place.path(&format!("files/{folder}/attempt_0/{rank}/stderr.log"));
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            written.insert(first + rank, text.lines().map(str::to_owned).collect());
        }
    }
    written
}

/// A follower has, of every rank, all lines that it wrote, in their order, up to the last one.
fn expect_all(follower: &Ended, written: &BTreeMap<u64, Vec<String>>) {
    let objects = objects(follower);
    assert!(!follower.stdout.contains("missing_lines"), "few lines: none is dropped");
    let followed = texts(&objects);
    assert_eq!(followed.len(), written.len(), "every rank has said something");
    for (rank, expected) in written {
        assert_eq!(&followed[rank], expected, "rank {rank}");
    }
    assert!(written.values().flatten().any(|text| text.contains(MARK)));
    let times: Vec<u64> = objects.iter().filter_map(|line| line["unix_ns"].as_u64()).collect();
    let hour_ns = 3_600_000_000_000;
    let now_ns = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos();
    assert!(times.iter().all(|time| now_ns.abs_diff(u128::from(*time)) < hour_ns));
    assert!(times.is_sorted(), "on one host nothing comes late");
}

#[test]
fn the_lines_of_an_embedded_coordinators_ranks() {
    let place = Place::new();
    let mut job = embedded(&place);
    wait_until_holding(&place, &mut job);
    let follower = place.start(&["logs", "--follow", "--json"]);

    let plain = place.run(&["logs"]);
    assert_eq!(plain.code, Some(0), "{}", plain.stderr);
    let prefixed = |line: &str| line.starts_with("[0] ") || line.starts_with("[1] ");
    assert!(plain.stdout.lines().all(prefixed), "{}", plain.stdout);
    assert!(plain.stdout.lines().any(|line| line.starts_with("[0] ") && line.contains(MARK)), "{}", plain.stdout);

    assert_eq!(ranks(&objects(&place.run(&["logs", "--json"]))), BTreeSet::from([0, 1]));
    assert_eq!(ranks(&objects(&place.run(&["logs", "--json", "--rank", "1"]))), BTreeSet::from([1]));
    let tail = objects(&place.run(&["logs", "--json", "--tail", "3"]));
    assert!(tail.len() == 3 && tail.iter().all(|line| line["stream"] == "stderr"), "{tail:?}");
    assert_eq!(place.run(&["logs", "--tail", "0"]).stdout, "");

    let no_such_rank = place.run(&["logs", "--rank", "2"]);
    assert_eq!(no_such_rank.code, Some(78), "{}", no_such_rank.stderr);
    assert!(no_such_rank.stderr.contains("rank 2"), "{}", no_such_rank.stderr);

    assert_eq!(place.run(&["drain"]).code, Some(0));
    let (job, follower) = (job.wait(), follower.wait());
    assert_eq!(job.code, Some(0), "{}", job.stderr);
    expect_all(&follower, &written(&place, &["job"]));
    place.expect_no_process();
}

/// A follower whose pipe nobody reads from any more does not stay.
#[test]
fn a_follower_ends_when_its_reader_does() {
    let place = Place::new();
    let mut job = embedded(&place);
    wait_until_holding(&place, &mut job);
    let mut command = place.command(&["logs", "--follow"]);
    let mut follower = command.stdout(std::process::Stdio::piped()).spawn().expect("the program starts");
    drop(follower.stdout.take());
    until("the follower ends", PATIENCE, || follower.try_wait().expect("a child of ours").is_some());
    assert_eq!(place.run(&["drain"]).code, Some(0));
    assert_eq!(job.wait().code, Some(0));
}

/// A coordinator of its own, with two tokens and two launchers of two ranks.
struct Apart {
    coordinator: Job,
    address: String,
    nodes: [Job; 2],
}

fn coordinator(place: &Place) -> Job {
    let (state, token, control) = (place.path("state"), place.path("workers-token"), place.path("control-token"));
    let tokens = ["--token-file", &token, "--control-token-file", &control];
    // A rank that is lost ends the job.
    let job =
        ["coordinator", "--ranks", "4", "--state-dir", &state, "--rejoin-timeout", "0", "--model", MODEL, "--hold"];
    place.start(&[&job[..], &tokens].concat())
}

fn apart(place: &Place) -> Apart {
    std::fs::write(place.path("workers-token"), "a-token-of-ranks").expect("a file");
    std::fs::write(place.path("control-token"), "a-token-of-people").expect("a file");
    let mut coordinator = coordinator(place);
    let mut found = None;
    until("the coordinator listens", PATIENCE, || {
        assert!(!coordinator.is_over(), "{}", coordinator.said());
        let said = coordinator.said();
        found = said.lines().find_map(|line| Some(line.split_once("listens on ")?.1.trim().to_owned()));
        found.is_some()
    });
    let address = found.expect("just found");
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
    let (endpoint, token) = (format!("127.0.0.1:{port}"), place.path("workers-token"));
    let nodes = ["0", "1"].map(|node| {
        let layout = ["launch", "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "2"];
        let meeting = ["--rdzv-endpoint", &endpoint, "--coordinator", &address, "--token-file", &token];
        let files = ["--log-dir", &place.path("files"), "--rdzv-id", "job"];
        start(place, &[&layout[..], &meeting, &files].concat())
    });
    Apart { coordinator, address, nodes }
}

#[test]
fn the_lines_of_two_launchers_come_to_one_coordinator() {
    let place = Place::new();
    let Apart { mut coordinator, address, nodes } = apart(&place);
    wait_until_holding(&place, &mut coordinator);
    let follower = place.start(&["logs", "-f", "--json"]);
    until("lines of all ranks are there", PATIENCE, || {
        ranks(&objects(&place.run(&["logs", "--json"]))) == BTreeSet::from([0, 1, 2, 3])
    });
    assert_eq!(ranks(&objects(&place.run(&["logs", "--json", "--rank", "3", "--rank", "1"]))), BTreeSet::from([1, 3]));

    std::fs::write(place.path("wrong-token"), "a-guess").expect("a file");
    for (token, reason) in [("wrong-token", "wrong job token"), ("workers-token", "expected the control token")] {
        let refused = place.run(&["logs", "--coordinator", &address, "--token-file", &place.path(token)]);
        assert_eq!(refused.code, Some(78), "{}", refused.stderr);
        assert!(refused.stderr.contains(reason), "{}", refused.stderr);
        assert_eq!(refused.stdout, "");
    }

    assert_eq!(place.run(&["drain"]).code, Some(0));
    let follower = follower.wait();
    let nodes = nodes.map(Job::wait);
    for node in &nodes {
        assert_eq!(node.code, Some(0), "{}", node.stderr);
    }
    expect_all(&follower, &written(&place, &["job/node_0", "job/node_1"]));
    let coordinator = coordinator.wait();
    assert_eq!(coordinator.code, Some(0), "{}", coordinator.stderr);
    place.expect_no_process();
}

fn flood(rank: u32, numbers: std::ops::RangeInclusive<u64>) -> Vec<Line> {
    let line = |number| Line {
        rank: Rank(rank),
        number,
        stream: LineStream::Stdout,
        unix_ns: number,
        text: format!("\u{1b}[31m{number} {}", "x".repeat(1000)),
    };
    numbers.map(line).collect()
}

/// Somebody with the workers' token says as much as it can: bounded memory, ranks whose leases hold, and a reader that is
/// told what it cannot have. What no launcher would say is refused.
#[test]
fn a_flood_of_lines_is_bounded_and_told() {
    const LINES: u64 = 20_000;
    let place = Place::new();
    let Apart { mut coordinator, address, nodes } = apart(&place);
    wait_until_holding(&place, &mut coordinator);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut clients = Clients::connect(&address, None).await.expect("listening");
        let token = Token::at(place.path("workers-token"));
        let mut report = LineReport::open(&mut clients, &token).await.expect("the workers' token");
        for first in (1..=LINES).step_by(50) {
            report.send("flood", &flood(2, first..=first + 49)).await.expect("taken");
        }
        report.end().await;
        let long = Line { text: "x".repeat((8 << 10) + 1), ..flood(2, 1..=1).remove(0) };
        let large: Vec<Line> =
            (0..9).map(|_| Line { text: "x".repeat(8 << 10), ..flood(2, 1..=1).remove(0) }).collect();
        let no_such_rank = flood(4, 1..=1);
        let bad = [
            (vec![long], Code::InvalidArgument),
            (large, Code::OutOfRange),
            (no_such_rank, Code::ResourceExhausted),
            (flood(2, 0..=0), Code::InvalidArgument),
        ];
        for (lines, code) in bad {
            let mut report = LineReport::open(&mut clients, &token).await.expect("the workers' token");
            let status = report.send("flood", &lines).await.expect_err("no launcher says that");
            assert_eq!(status.code(), code, "{status}");
        }
        let control = Token::at(place.path("control-token"));
        let refused = LineReport::open(&mut clients, &control).await.expect_err("not a rank's");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    });
    let status = wait_until_holding(&place, &mut coordinator);
    let leases = status["ranks"].as_array().expect("ranks").iter().map(|rank| rank["lease_age_ms"].as_u64());
    assert!(leases.flatten().all(|age_ms| age_ms < 3000), "{status}");

    // The newest 256 KiB of lines of a KiB, with something for each.
    let read = objects(&place.run(&["logs", "--json", "--rank", "2"]));
    let missing: u64 = read.iter().filter_map(|line| line["missing_lines"].as_u64()).sum();
    let there: Vec<&Value> = read.iter().filter(|line| line["stream"] == "stdout").collect();
    assert!((200..=256).contains(&there.len()), "{}", there.len());
    assert!(missing + 256 >= LINES, "{missing}");
    assert_eq!(there.last().expect("the newest")["unix_ns"], LINES);
    let plain = place.run(&["logs", "--rank", "2"]).stdout;
    assert!(plain.contains("lines are missing here)") && plain.contains(&format!("[2] \\x1b[31m{LINES} ")));
    assert!(!plain.contains('\u{1b}'));

    assert_eq!(place.run(&["drain"]).code, Some(0));
    for node in nodes {
        assert_eq!(node.wait().code, Some(0));
    }
    assert_eq!(coordinator.wait().code, Some(0));
    place.expect_no_process();
}

/// A launcher that is killed leaves nothing that the coordinator, or a follower, would wait for.
#[test]
fn a_follower_ends_with_a_job_whose_launcher_was_killed() {
    let place = Place::new();
    let Apart { mut coordinator, nodes: [here, there], .. } = apart(&place);
    wait_until_holding(&place, &mut coordinator);
    let follower = place.start(&["logs", "--follow", "--json"]);
    until("the follower reads", PATIENCE, || !follower.printed().is_empty());
    assert!(signal(there.process(), Signal::KILL));
    assert_eq!(there.wait().code, None);
    let start = std::time::Instant::now();
    let follower = follower.wait();
    assert_eq!(follower.code, Some(0), "{}", follower.stderr);
    coordinator.wait();
    here.wait();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    place.expect_no_process();
}

/// A coordinator that is started again has lost what came before and says so; what follows is there.
#[test]
fn lines_go_on_over_a_restart_of_the_coordinator() {
    let place = Place::new();
    let Apart { coordinator: mut first, nodes, .. } = apart(&place);
    wait_until_holding(&place, &mut first);
    until("lines of all ranks are there", PATIENCE, || ranks(&objects(&place.run(&["logs", "--json"]))).len() == 4);
    assert!(signal(first.process(), Signal::KILL));
    assert_eq!(first.wait().code, None);
    let second = coordinator(&place);
    until("lines of all ranks are there again, after those that are lost", PATIENCE, || {
        let read = place.run(&["logs", "--json"]);
        read.code == Some(0) && {
            let objects = objects(&read);
            let lost = objects.iter().filter(|line| line["missing_lines"].as_u64().is_some_and(|lost| lost > 0));
            lost.count() == 4 && texts(&objects).len() == 4
        }
    });
    assert_eq!(place.run(&["drain"]).code, Some(0));
    for node in nodes {
        assert_eq!(node.wait().code, Some(0));
    }
    assert_eq!(second.wait().code, Some(0));
    place.expect_no_process();
}
