//! The hub against a loopback server that plays it, with its failures.

use std::cell::RefCell;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use super::*;
use crate::clock;
use crate::error::{Classify, Kind};

mod server;
use server::{Behaviour, COMMIT, Server, sha256};

const INDEX: &[u8] =
    br#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;

fn weights(count: usize, seed: usize) -> Vec<u8> {
    (0..count).map(|at| u8::try_from((at * 31 + at / 251 + seed) % 256).expect("below 256")).collect()
}

/// A sharded repository of 3,000,000 bytes of weights, a config and a tokenizer.
fn sharded() -> Behaviour {
    let files = [
        ("README.md", b"never asked for".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("model-00001-of-00002.safetensors", weights(2_000_000, 1)),
        ("model-00002-of-00002.safetensors", weights(1_000_000, 2)),
        ("model.safetensors.index.json", INDEX.to_vec()),
        ("onnx/model.onnx", b"never asked for".to_vec()),
        ("tokenizer.json", b"{\"t\":1}".to_vec()),
    ];
    Behaviour { files: files.into(), ..Behaviour::default() }
}

/// A repository of one file of 3,000,000 bytes.
fn single() -> Behaviour {
    let files = [("model.safetensors", weights(3_000_000, 3))];
    Behaviour { files: files.into(), ..Behaviour::default() }
}

fn config(server: &Server, cache: &Path) -> HubConfig {
    // Three seconds are ample on a loopback socket, and little for a test that waits for them.
    let timeouts =
        Timeouts { connect: Duration::from_secs(3), response: Duration::from_secs(3), stall: Duration::from_secs(3) };
    HubConfig {
        cache: cache.to_owned(),
        endpoint: server.endpoint(),
        token: None,
        offline: false,
        proxy: None,
        no_proxy: None,
        ca_file: None,
        timeouts,
    }
}

fn reference() -> Reference {
    Reference::Hub { id: "org/name".to_owned(), revision: "main".to_owned() }
}

fn get(config: &HubConfig) -> Result<ModelFiles, HubError> {
    resolve(&reference(), config, &|_| {})
}

fn repository(cache: &Path) -> PathBuf {
    cache.join("models--org--name")
}

#[test]
fn a_sharded_model_is_downloaded_into_the_layout_of_the_cache() {
    let (server, cache) = (Server::start(sharded()), tempfile::tempdir().expect("a directory"));
    let seen = RefCell::new(Vec::new());
    let progress = |now: Progress<'_>| seen.borrow_mut().push((now.file.to_owned(), now.done_bytes, now.total_bytes));
    let found = resolve(&reference(), &config(&server, cache.path()), &progress).expect("a model");
    assert_eq!((found.kind, found.commit.as_deref()), (ModelKind::Safetensors, Some(COMMIT)));
    assert_eq!(found.config_json.as_deref(), Some(b"{}".as_slice()));
    assert_eq!(found.index_json, Some(("model.safetensors.index.json".to_owned(), INDEX.to_vec())));
    let files: Vec<_> = found.files.iter().map(|file| (file.name.as_str(), file.len_bytes)).collect();
    let expected = [("model-00001-of-00002.safetensors", 2_000_000), ("model-00002-of-00002.safetensors", 1_000_000)];
    assert_eq!(files, expected);
    assert_eq!(fs::read(&found.files[1].path).expect("a file"), weights(1_000_000, 2));
    // Blobs by etag, relative links to them, and the branch's commit.
    let root = repository(cache.path());
    assert_eq!(found.root, root.join("snapshots").join(COMMIT));
    let link = fs::read_link(found.root.join(expected[0].0)).expect("a link");
    assert_eq!(link, Path::new("../../blobs").join(sha256(&weights(2_000_000, 1))));
    assert_eq!(fs::read_to_string(root.join("refs/main")).expect("a ref"), COMMIT);
    assert!(found.root.join("tokenizer.json").exists() && !found.root.join("README.md").exists());
    // config, tokenizer and weights: 2 + 7 + 3,000,000 bytes, and it never goes back.
    let seen = seen.into_inner();
    let of_model: Vec<_> = seen.iter().filter(|(file, ..)| file != "model.safetensors.index.json").collect();
    assert!(of_model.iter().all(|&&(_, done, total)| done <= total && total == 3_000_009), "{of_model:?}");
    assert!(of_model.is_sorted_by_key(|&&(_, done, _)| done));
    assert_eq!(of_model.last().map(|&&(_, done, _)| done), Some(3_000_009));
    // A second time, sizes are asked for and nothing is downloaded.
    server.take_requests();
    assert_eq!(get(&config(&server, cache.path())).expect("a model"), found);
    let requests = server.take_requests();
    assert!(requests.iter().filter(|line| line.starts_with("GET")).all(|line| line.contains("/api/")), "{requests:?}");
}

#[test]
fn hu_3_offline_asks_nothing_and_names_what_is_missing() {
    let (server, cache) = (Server::start(sharded()), tempfile::tempdir().expect("a directory"));
    let offline = HubConfig { offline: true, ..config(&server, cache.path()) };
    let check_missing = |what: &str| {
        let error = get(&offline).expect_err("it is not there");
        let message = error.to_string();
        for part in ["org/name@main", &cache.path().display().to_string(), "HF_HUB_OFFLINE", what] {
            assert!(message.contains(part), "expected {part:?} in {message:?}");
        }
        assert_eq!(error.kind(), Kind::NotFound);
    };
    check_missing("revision main");
    assert_eq!(server.take_requests(), [""; 0]);
    let found = get(&config(&server, cache.path())).expect("a model");
    server.take_requests();
    assert_eq!(get(&offline).expect("the cached model"), found);
    let pinned = Reference::Hub { id: "org/name".to_owned(), revision: COMMIT.to_owned() };
    assert_eq!(resolve(&pinned, &offline, &|_| {}).expect("the cached model"), found);
    // The blob behind a link is gone, then the link, then the snapshot.
    fs::remove_file(&found.files[0].path).expect("a blob");
    check_missing("model-00001-of-00002.safetensors");
    fs::remove_file(found.root.join("model-00001-of-00002.safetensors")).expect("a link");
    check_missing("model-00001-of-00002.safetensors");
    fs::remove_dir_all(&found.root).expect("a snapshot");
    check_missing(COMMIT);
    assert_eq!(server.take_requests(), [""; 0]);
}

/// HU-1: a connection that breaks is resumed where it broke, within one call and by the next one.
#[test]
fn hu_1_a_broken_download_is_resumed_by_range() {
    let (server, cache) = (Server::start(single()), tempfile::tempdir().expect("a directory"));
    server.set(|behaviour| behaviour.cut = Some((1_200_000, 2)));
    let found = get(&config(&server, cache.path())).expect("a model");
    assert_eq!(fs::read(&found.files[0].path).expect("a file"), weights(3_000_000, 3));
    let of_store = |server: &Server| -> Vec<String> {
        server.take_requests().into_iter().filter(|line| line.contains("/store/") && line.starts_with("GET")).collect()
    };
    let store = "GET /store/model.safetensors";
    assert_eq!(of_store(&server), [store.to_owned(), format!("{store} from 1200000"), format!("{store} from 2400000")]);

    // The process ended after 2,999,999 bytes.
    let root = repository(cache.path());
    let incomplete = root.join(format!("blobs/{}.incomplete", sha256(&weights(3_000_000, 3))));
    let again = || {
        fs::remove_dir_all(root.join("snapshots")).expect("snapshots");
        fs::remove_file(&found.files[0].path).expect("a blob");
    };
    again();
    fs::write(&incomplete, &weights(3_000_000, 3)[..2_999_999]).expect("a file");
    assert_eq!(get(&config(&server, cache.path())).expect("a model"), found);
    assert_eq!(of_store(&server), [format!("{store} from 2999999")]);
    assert_eq!(fs::read(&found.files[0].path).expect("a file"), weights(3_000_000, 3));

    // A server without ranges sends the whole file, which must not be appended to what is here.
    again();
    fs::write(&incomplete, &weights(3_000_000, 3)[..1000]).expect("a file");
    server.set(|behaviour| behaviour.ignores_ranges = true);
    assert_eq!(get(&config(&server, cache.path())).expect("a model"), found);
    assert_eq!(fs::read(&found.files[0].path).expect("a file"), weights(3_000_000, 3));

    // What is here is longer than the file, so it is of another one.
    again();
    fs::write(&incomplete, weights(3_000_001, 9)).expect("a file");
    assert_eq!(get(&config(&server, cache.path())).expect("a model"), found);
    assert!(!incomplete.exists());

    // No byte more, three times: an error that may be retried, and what is here is kept.
    again();
    server.set(|behaviour| *behaviour = Behaviour { cut: Some((0, 100)), ..single() });
    fs::write(&incomplete, &weights(3_000_000, 3)[..1000]).expect("a file");
    let error = get(&config(&server, cache.path())).expect_err("it does not go on");
    assert!(error.kind().is_retryable(), "{error}");
    assert!(error.to_string().contains("broke off at byte 1000 of 3000000, 3 times"), "{error}");
    assert_eq!(fs::metadata(&incomplete).expect("a file").len(), 1000);
}

/// HU-1: what differs from the server's word is not given a name, and a damaged file of the cache is replaced.
#[test]
fn hu_1_sizes_and_digests_are_checked() {
    let (server, cache) = (Server::start(single()), tempfile::tempdir().expect("a directory"));
    let config = config(&server, cache.path());
    let blobs = || -> Vec<String> {
        let entries = fs::read_dir(repository(cache.path()).join("blobs")).expect("blobs");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    };
    let check = |expected: &str| {
        let error = get(&config).expect_err(expected);
        assert!(error.to_string().contains(expected), "expected {expected:?} in {error}");
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(blobs().iter().all(|name| name.ends_with(".incomplete")), "{:?}", blobs());
    };
    server.set(|behaviour| behaviour.overstates = 5);
    check("expected 3000005 bytes, found 3000000");
    server.set(|behaviour| *behaviour = Behaviour { damages: true, ..single() });
    check("expected SHA-256");
    server.set(|behaviour| *behaviour = Behaviour { sha: Some("main"), ..single() });
    check("expected a commit of 40 hexadecimal digits, found \"main\"");

    server.set(|behaviour| *behaviour = single());
    let found = get(&config).expect("a model");
    // Somebody cut the blob; online that is seen and mended.
    fs::write(&found.files[0].path, b"short").expect("a file");
    assert_eq!(get(&config).expect("a model"), found);
    assert_eq!(fs::read(&found.files[0].path).expect("a file"), weights(3_000_000, 3));
}

/// HU-2: many at once ask for the same model; each file is downloaded once and is whole for all.
#[test]
fn hu_2_many_at_once_download_once() {
    let (server, cache) = (Server::start(sharded()), tempfile::tempdir().expect("a directory"));
    let (config, start) = (config(&server, cache.path()), Barrier::new(6));
    thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    let found = get(&config).expect("a model");
                    let bytes: Vec<_> = found.files.iter().map(|file| fs::read(&file.path).expect("a file")).collect();
                    assert_eq!(bytes, [weights(2_000_000, 1), weights(1_000_000, 2)]);
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    });
    let requests = server.take_requests();
    for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let line = format!("GET /store/{name}");
        assert_eq!(requests.iter().filter(|request| **request == line).count(), 1, "{requests:?}");
    }
}

/// HU-2: a lock whose holder makes no progress is given up on by name, and not waited for without end.
#[test]
fn hu_2_a_stuck_lock_is_named() {
    let cache = tempfile::tempdir().expect("a directory");
    let repository = cache::Repository::new(cache.path(), "org/name");
    let held = repository.lock("e", Duration::ZERO, &mut || 0).expect("a free lock");
    let mut asked = 0;
    // It grows for five tries, then stops.
    let error = repository.lock("e", Duration::from_millis(150), &mut || {
        asked += 1;
        asked.min(5)
    });
    let error = error.expect_err("it is held");
    assert!(error.to_string().contains(".locks/models--org--name/e.lock is locked"), "{error}");
    assert_eq!(error.kind(), Kind::Deadline);
    assert!(asked > 5, "{asked}");
    drop(held);
    repository.lock("e", Duration::ZERO, &mut || 0).expect("a free lock");
}

#[test]
fn failures_have_their_kinds_and_come_in_time() {
    let (server, cache) = (Server::start(single()), tempfile::tempdir().expect("a directory"));
    let mut config = config(&server, cache.path());
    let check = |config: &HubConfig, kind: Kind, expected: &[&str]| {
        let began = clock::now();
        let error = get(config).expect_err("a failure");
        let message = crate::error::chain(&error);
        assert_eq!(error.kind(), kind, "{message}");
        expected.iter().for_each(|part| assert!(message.contains(part), "expected {part:?} in {message:?}"));
        assert!(!message.contains("hf_secret"), "{message}");
        assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    };
    let address = "/api/models/org/name/revision/main";
    for (status, kind, expected) in [
        (401, Kind::Invalid, "does not exist or needs a token, and no token was given (HF_TOKEN"),
        (403, Kind::Invalid, "access is restricted"),
        (404, Kind::NotFound, "there is no such repository, revision or file"),
        (429, Kind::Unavailable, "status 429"),
        (503, Kind::Unavailable, "status 503"),
        (418, Kind::Invalid, "status 418"),
    ] {
        server.set(|behaviour| behaviour.status = Some(status));
        check(&config, kind, &[address, expected]);
    }
    config.token = Some("hf_secret".into());
    server.set(|behaviour| behaviour.status = Some(403));
    check(&config, Kind::Invalid, &["the token that was given is not accepted"]);
    server.set(|behaviour| *behaviour = Behaviour { silent: true, ..single() });
    config.timeouts.response = Duration::from_millis(300);
    check(&config, Kind::Deadline, &[address, "no answer within 0.3 s while waiting for an answer"]);
    // A port on which nobody listens.
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    config.endpoint = format!("http://{}", closed.expect("an address"));
    check(&config, Kind::Unavailable, &[&config.endpoint, "cannot be reached"]);
}

#[test]
fn a_connection_that_never_comes_about_ends_in_time() {
    let (server, cache) = (Server::start(single()), tempfile::tempdir().expect("a directory"));
    let mut config = config(&server, cache.path());
    // A listener with a backlog of none, which one connection fills: the next hangs, as behind a firewall that drops.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    rustix::net::listen(&listener, 0).expect("a shorter backlog");
    let address = listener.local_addr().expect("an address");
    let _first = TcpStream::connect(address).expect("the one that fits");
    config.endpoint = format!("http://{address}");
    config.timeouts.connect = Duration::from_millis(300);
    let began = clock::now();
    let error = get(&config).expect_err("nobody accepts");
    assert_eq!(error.kind(), Kind::Deadline, "{error}");
    assert!(error.to_string().contains("no answer within 0.3 s while connecting"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

/// The token goes to the hub, and not to the store on another host to which the hub redirects.
#[test]
fn the_token_stays_with_the_hub() {
    let (server, cache) = (Server::start(single()), tempfile::tempdir().expect("a directory"));
    server.set(|behaviour| behaviour.token = Some("hf_secret"));
    let mut config = config(&server, cache.path());
    config.token = Some("hf_secret".into());
    get(&config).expect("a model");
    let requests = server.take_requests();
    for line in &requests {
        assert_eq!(line.ends_with(" authorized"), !line.contains("/store/"), "{requests:?}");
    }
    assert!(requests.iter().any(|line| line.starts_with("GET /store/")), "{requests:?}");
    config.token = Some("hf_other".into());
    let error = get(&config).expect_err("another token");
    assert!(error.to_string().contains("the token that was given is not accepted"), "{error}");
}

/// HU-4: an index of a repository cannot name a file outside of it, nor one that it does not have.
#[test]
fn hu_4_a_hostile_index_is_refused() {
    let cache = tempfile::tempdir().expect("a directory");
    let server = Server::start(Behaviour::default());
    let check = |file: &str, expected: &str| {
        let index = format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#).into_bytes();
        server.set(|behaviour| behaviour.files = [("model.safetensors.index.json", index)].into());
        let error = get(&config(&server, cache.path())).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
    };
    check("../../x.safetensors", "leads outside its directory");
    check("/etc/passwd", "leads outside its directory");
    check("model-1.safetensors", "names model-1.safetensors, which org/name@main does not have");
}

#[test]
fn directories_and_files() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let of_directory = || resolve(&Reference::Directory(directory.path().to_owned()), &offline(), &|_| {});
    let message = || of_directory().expect_err("no model").to_string();
    assert!(message().contains("has no weights"));
    fs::write(path("b.gguf"), b"GGUF").expect("a file");
    fs::write(path("config.json"), b"{}").expect("a file");
    let found = of_directory().expect("a model");
    assert_eq!((found.kind, found.files.len(), found.files[0].len_bytes), (ModelKind::Gguf, 1, 4));
    assert_eq!((found.config_json.as_deref(), found.commit), (Some(b"{}".as_slice()), None));
    fs::write(path("a.gguf"), b"GGUF").expect("a file");
    assert!(message().contains("several *.gguf files, of which one must be chosen: a.gguf, b.gguf"));
    let found = resolve(&Reference::File(path("a.gguf")), &offline(), &|_| {}).expect("a file");
    assert_eq!((found.root.as_path(), found.files[0].name.as_str()), (directory.path(), "a.gguf"));
    let error = resolve(&Reference::File(path("config.json")), &offline(), &|_| {}).expect_err("no weights");
    assert!(error.to_string().contains("expected a .safetensors or .gguf file"), "{error}");

    fs::write(path("model.safetensors.index.json"), INDEX).expect("a file");
    fs::write(path("model-00001-of-00002.safetensors"), b"12345").expect("a file");
    assert!(message().contains("names model-00002-of-00002.safetensors, which"), "{}", message());
    // A link to a link to a file of 7 bytes: its size is the file's.
    fs::write(path("blob"), b"1234567").expect("a file");
    std::os::unix::fs::symlink("blob", path("link")).expect("a link");
    std::os::unix::fs::symlink("link", path("model-00002-of-00002.safetensors")).expect("a link");
    let sizes: Vec<u64> = of_directory().expect("a model").files.iter().map(|file| file.len_bytes).collect();
    assert_eq!(sizes, [5, 7]);
    let outside = br#"{"weight_map":{"a":"../secret.safetensors"}}"#;
    fs::write(path("model.safetensors.index.json"), outside).expect("a file");
    assert!(message().contains("\"../secret.safetensors\", which leads outside its directory"), "{}", message());
    fs::write(path("model.safetensors.index.json"), b"{").expect("a file");
    assert!(message().contains("model.safetensors.index.json"), "{}", message());
    fs::write(path("model.safetensors"), b"123").expect("a file");
    assert_eq!(of_directory().expect("a model").files[0].name, "model.safetensors");
}

fn offline() -> HubConfig {
    let look_up = |name: &str| match name {
        "HF_HUB_OFFLINE" => Some("1".to_owned()),
        "HF_HOME" => Some("/nowhere".to_owned()),
        _ => None,
    };
    HubConfig::from_vars(&look_up).expect("a config")
}
