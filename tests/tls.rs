//! Mutual TLS in real processes: who is let in, who is not and hears why, and certificates that are rotated.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use serde_json::Value;
use support::certificates::{Authority, EXPIRED, VALID, flags};
use support::{Job, MODEL, PATIENCE, Place, until, wait_until_holding};

fn with(arguments: &[&str], more: &[String]) -> Vec<String> {
    arguments.iter().map(|argument| (*argument).to_owned()).chain(more.iter().cloned()).collect()
}

fn texts(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// A job that holds, with its address and its token's path.
struct Held {
    job: Job,
    address: String,
    token: String,
}

fn hold(place: &Place, tls: &[String]) -> Held {
    let mut arguments = with(&["launch", "--model", MODEL, "--hold", "--nproc-per-node", "2"], tls);
    arguments.extend(["--strategy", "striped"].map(str::to_owned));
    let mut job = place.start(&texts(&arguments));
    wait_until_holding(place, &mut job);
    let run = std::fs::read_dir(place.path("run/weightcast")).expect("a run").next().expect("one").expect("an entry");
    let run: Value =
        serde_json::from_slice(&std::fs::read(run.path().join("run.json")).expect("a file")).expect("JSON");
    let text = |name: &str| run[name].as_str().expect("text").to_owned();
    Held { job, address: text("coordinator"), token: text("token_file") }
}

/// Ranks, launcher and people find each other; whoever has no good certificate hears what is wrong with it, and the log says
/// the same from the other side.
#[test]
fn who_has_no_good_certificate_is_refused_and_told_why() {
    let place = Place::new();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let good = ours.write(&place.path("good"), VALID);
    let held = hold(&place, &good);
    let status = |tls: &[String]| {
        let mut arguments = with(&["status", "--json", "--coordinator", &held.address], tls);
        arguments.extend(["--token-file".to_owned(), held.token.clone()]);
        place.run(&texts(&arguments))
    };
    assert_eq!(status(&good).json()["phase"], "holding");

    let expired = ours.write(&place.path("expired"), EXPIRED);
    let ended = status(&expired);
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
    assert!(ended.stderr.contains("refused our certificate: it has expired"), "{}", ended.stderr);

    // Another authority's certificate, though we believe the coordinator's.
    theirs.write(&place.path("foreign"), VALID);
    std::fs::copy(place.path("good/ca.crt"), place.path("foreign/ca.crt")).expect("copied");
    let ended = status(&flags(&place.path("foreign")));
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
    assert!(ended.stderr.contains("refused our certificate: "), "{}", ended.stderr);

    // We do not believe the coordinator.
    ours.write(&place.path("doubt"), VALID);
    std::fs::copy(place.path("foreign/tls.crt"), place.path("doubt/ca.crt")).expect("copied");
    let ended = status(&flags(&place.path("doubt")));
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
    assert!(ended.stderr.contains("not signed by the expected authority"), "{}", ended.stderr);

    let ended = status(&with(&["--tls-server-name", "elsewhere"], &good));
    assert!(ended.stderr.contains("the other side's certificate is for another name"), "{}", ended.stderr);
    let ended = status(&[]);
    // Whether the connection ends before or after the call was sent is a race.
    assert!([Some(69), Some(70)].contains(&ended.code), "{}", ended.stderr);

    let error = without_certificate(&place, &held.address);
    assert!(error.to_string().contains("CertificateRequired"), "{error}");

    until("the log says why", PATIENCE, || {
        let said = held.job.said();
        said.contains("the other side's certificate has expired")
            && said.contains("the other side's certificate is not signed by the expected authority")
    });
    assert_eq!(place.run(&["drain"]).code, Some(0), "the run file says how to speak TLS");
    let ended = held.job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}

/// The first bytes that somebody without a certificate hears.
fn without_certificate(place: &Place, address: &str) -> std::io::Error {
    use rustls::pki_types::pem::PemObject as _;
    use std::io::{Read as _, Write as _};
    let mut roots = rustls::RootCertStore::empty();
    let ca = std::fs::read(place.path("good/ca.crt")).expect("a file");
    roots.add(rustls::pki_types::CertificateDer::from_pem_slice(&ca).expect("PEM")).expect("an authority");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = "localhost".try_into().expect("a name");
    let session = rustls::ClientConnection::new(std::sync::Arc::new(config), name).expect("a session");
    let socket = std::net::TcpStream::connect(address).expect("listening");
    let mut stream = rustls::StreamOwned::new(session, socket);
    // The client is done before the server has looked at its certificate.
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    stream.read_exact(&mut [0; 1]).expect_err("no certificate was shown")
}

/// A new authority takes over while a job runs: connections stay, new ones use the new files.
#[test]
fn certificates_are_rotated_while_a_job_runs() {
    let place = Place::new();
    let files = place.path("files");
    let tls = Authority::new().write(&files, VALID);
    let held = hold(&place, &tls);
    let next = Authority::new();
    next.write(&files, VALID);
    until("the new certificates are used", PATIENCE, || place.run(&["status", "--json"]).code == Some(0));
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = held.job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}

/// With certificates a coordinator may listen for other hosts; a launcher brings its ranks to it.
#[test]
fn a_coordinator_with_certificates_listens_for_other_hosts() {
    let place = Place::new();
    let tls = Authority::new().write(&place.path("files"), VALID);
    let (state, token) = (place.path("state"), place.path("state/token"));
    let arguments = ["coordinator", "--ranks", "2", "--state-dir", &state, "--listen", "0.0.0.0:0", "--model", MODEL];
    let mut coordinator = place.start(&texts(&with(&arguments, &tls)));
    let mut port = String::new();
    until("the coordinator listens", PATIENCE, || {
        assert!(!coordinator.is_over(), "{}", coordinator.said());
        let said = coordinator.said();
        let found =
            said.lines().find_map(|line| line.split_once("listens on 0.0.0.0:").map(|found| found.1.to_owned()));
        port = found.unwrap_or_default();
        !port.is_empty()
    });
    let address = format!("localhost:{}", port.trim());
    let join = ["launch", "--nproc-per-node", "2", "--coordinator", &address, "--token-file", &token];
    let ended = place.run(&texts(&with(&join, &tls)));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}

#[test]
fn files_that_cannot_be_used_are_refused_before_anything_starts() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let directory = place.path("files");
    let tls = Authority::new().write(&directory, VALID);
    let launch = ["launch", "--model", MODEL, "--nproc-per-node", "1"];
    let key = format!("{directory}/tls.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("our own");
    let ended = place.run(&texts(&with(&launch, &tls)));
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
    assert!(ended.stderr.contains("tls.key: expected a mode"), "{}", ended.stderr);
    assert!(ended.stderr.contains("found 644"), "{}", ended.stderr);
    let ended = place.run(&texts(&with(&launch, &tls[..4])));
    assert_eq!(ended.code, Some(64), "{}", ended.stderr);
    assert!(ended.stderr.contains("--tls-ca"), "{}", ended.stderr);
}
