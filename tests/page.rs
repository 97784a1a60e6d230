//! The status page of real jobs: what it shows, who may see it, and that it is bounded. `tests/interop/page.mjs` opens it in a
//! browser.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use serde_json::Value;
use support::http::{Stream, get, request};
use support::{Job, MODEL, PATIENCE, Place, until};

/// Where the page is.
fn page(job: &mut Job) -> String {
    let mut found = None;
    until("the page is served", PATIENCE, || {
        let said = job.said();
        let after =
            |line: &str| Some(line.split_once("status page at http://")?.1.trim().trim_end_matches('/').to_owned());
        found = said.lines().find_map(after);
        assert!(found.is_some() || !job.is_over(), "{said}");
        found.is_some()
    });
    found.expect("just found")
}

fn holding(place: &Place) -> (Job, String) {
    let checkpoints = place.path("checkpoints");
    let flags = ["launch", "--nproc-per-node", "2", "--model", MODEL, "--quantize", "nf4", "--hold", "--save"];
    let more = ["--checkpoint-dir", &checkpoints, "--http-listen", "127.0.0.1:0"];
    let mut job = place.start(&[&flags[..], &more].concat());
    let address = page(&mut job);
    support::wait_until_holding(place, &mut job);
    (job, address)
}

fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"))
}

/// Each message is the whole job, newer than the one before; the end is told too.
#[test]
fn the_page_follows_a_job() {
    let place = Place::new();
    let (job, address) = holding(&place);
    let mut stream = Stream::open(&address, &[]);
    assert_eq!(stream.status, 200);
    let first = parsed(&stream.next());
    let mut status = first.clone();
    // The checkpoint is verified within a message or two.
    while status["checkpoints"][0]["state"] != "verified" {
        status = parsed(&stream.next());
    }
    assert!(status["now_unix_ms"].as_u64() >= first["now_unix_ms"].as_u64());
    assert_eq!((&status["phase"], &status["generation"]), (&Value::from("holding"), &Value::from(1)));
    let told = place.finish(&["status", "--json"]);
    for (rank, told) in status["ranks"].as_array().expect("ranks").iter().zip(told["ranks"].as_array().expect("ranks"))
    {
        for name in ["rank", "host", "process_id", "device", "stage"] {
            assert_eq!(rank[name], told[name], "{name}");
        }
        assert!(rank["planned_peak_bytes"].as_u64() > Some(1 << 20) && rank["load"]["wall_s"].as_f64() > Some(0.0));
    }
    let checkpoint = &status["checkpoints"][0];
    let manifest = std::fs::read_dir(place.path("checkpoints/step-000000000")).expect("a checkpoint");
    let sizes = manifest
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.path().extension().is_some_and(|x| x == "safetensors"));
    assert_eq!(checkpoint["bytes"].as_u64(), Some(sizes.map(|entry| entry.metadata().expect("a file").len()).sum()));
    let kinds =
        |kind: &str| status["events"].as_array().expect("events").iter().filter(|event| event["kind"] == kind).count();
    assert_eq!((kinds("join"), kinds("save"), kinds("failure")), (2, 2, 0), "{status}");
    assert!(kinds("phase") >= 3);
    let asked = parsed(&get(&address, "/api/status", &[]).body);
    assert_eq!((&asked["job"], &asked["checkpoints"]), (&status["job"], &status["checkpoints"]));

    assert_eq!(place.run(&["drain"]).code, Some(0));
    while status["phase"] != "finished" {
        status = parsed(&stream.next());
    }
    assert_eq!(job.wait().code, Some(0));
    place.expect_no_process();
}

/// A rank that dies is told with its cause.
#[test]
fn a_failure_is_told() {
    let place = Place::new();
    let (job, address) = holding(&place);
    let mut stream = Stream::open(&address, &[]);
    let process = parsed(&stream.next())["ranks"][1]["process_id"].as_i64().and_then(|id| i32::try_from(id).ok());
    support::signal(process.expect("a process"), rustix::process::Signal::KILL);
    let mut status = Value::Null;
    while status["phase"] != "aborted" {
        status = parsed(&stream.next());
    }
    assert_eq!((&status["cause"]["rank"], &status["cause"]["exit_code"]), (&Value::from(1), &Value::from(137)));
    let last = status["events"].as_array().and_then(|events| events.last().cloned()).expect("an event");
    assert_eq!((&last["kind"], &last["rank"]), (&Value::from("failure"), &Value::from(1)), "{last}");
    assert_eq!(job.wait().code, Some(137));
}

/// WB-1, on loopback: open to this host, and to no name that a web site could give it. Nothing can be changed.
#[test]
fn wb_1_a_loopback_page_is_for_this_host() {
    let place = Place::new();
    let (job, address) = holding(&place);
    for path in ["/", "/events", "/api/status", "/metrics"] {
        let foreign = get(&address, path, &["Host: status.evil.example"]);
        assert_eq!(foreign.status, 421, "{path}");
        let changed = request(&address, "POST", path, &["Content-Length: 0"]);
        assert_eq!(changed.status, 405, "{path}");
    }
    assert_eq!(get(&address, "/secret", &[]).status, 404);
    let page = get(&address, "/", &[]);
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
    assert_eq!((page.header("x-content-type-options"), page.header("cache-control")), ("nosniff", "no-store"));
    // No secret is on the page.
    let runs = std::fs::read_dir(place.path("run/weightcast")).expect("the runtime directory");
    let token =
        runs.filter_map(|entry| std::fs::read_to_string(entry.expect("an entry").path().join("token")).ok()).next();
    let status = get(&address, "/api/status", &[]).body;
    assert!(!status.contains(token.expect("a token").trim()) && !status.contains("secret"));
    drop(job);
}

/// WB-1, where others reach the port: the page and its data need the token, by header or cookie; scrapes do not.
#[test]
fn wb_1_other_hosts_need_the_token() {
    let place = Place::new();
    let state = place.path("state");
    let flags = ["coordinator", "--ranks", "1", "--state-dir", &state, "--model", MODEL, "--http-listen", "0.0.0.0:0"];
    let mut coordinator = place.start(&flags);
    let address = page(&mut coordinator).replace("0.0.0.0", "127.0.0.1");
    until("it listens", PATIENCE, || coordinator.said().contains("listens on"));
    let token = std::fs::read_to_string(place.path("state/token")).expect("a token").trim().to_owned();
    let (bearer, cookie) =
        (format!("Authorization: Bearer {token}"), format!("Cookie: a=b; weightcast-token-1={token}"));
    assert_eq!(get(&address, "/metrics", &[]).status, 200);
    for path in ["/", "/api/status"] {
        assert_eq!(get(&address, path, &[]).status, 401, "{path}");
        assert_eq!(get(&address, path, &["Authorization: Bearer wrong"]).status, 403, "{path}");
        assert_eq!(get(&address, path, &["Cookie: weightcast-token-1=wrong"]).status, 403, "{path}");
        assert_eq!(get(&address, path, &[&bearer]).status, 200, "{path}");
        assert_eq!(get(&address, path, &[&cookie]).status, 200, "{path}");
    }
    let asked = get(&address, "/", &[]);
    assert!(asked.body.contains("<h1>This job asks for its token</h1>"), "{}", asked.body);
    assert!(asked.header("content-security-policy").contains("script-src 'sha256-"));
    assert_eq!(Stream::open(&address, &[]).status, 401);
    let mut stream = Stream::open(&address, &[&cookie]);
    assert_eq!((stream.status, &parsed(&stream.next())["phase"]), (200, &Value::from("forming")));
}

/// WB-2: there is room for 32 who follow; who leaves makes room. Who sends nothing is not waited for.
#[test]
fn wb_2_followers_are_bounded() {
    let place = Place::new();
    let (job, address) = holding(&place);
    let mut streams: Vec<Stream> = (0..32).map(|_| Stream::open(&address, &[])).collect();
    for stream in &mut streams {
        assert_eq!(stream.status, 200);
        stream.next();
    }
    let refused = get(&address, "/events", &[]);
    assert_eq!((refused.status, refused.header("retry-after")), (503, "10"), "{}", refused.body);
    let viewers = get(&address, "/metrics", &[]).body;
    assert!(viewers.contains("\nweightcast_page_viewers 32\n"), "{viewers}");
    let silent = std::net::TcpStream::connect(&address).expect("room for a connection");
    drop(streams);
    until("there is room again", PATIENCE, || Stream::open(&address, &[]).status == 200);
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    drop(silent);
}
