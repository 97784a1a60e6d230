//! A hub on a loopback socket: one repository, its redirections to a store on "another host", and its failures.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use sha2::{Digest, Sha256};

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub has and does wrong.
#[derive(Clone, Debug, Default)]
pub(super) struct Behaviour {
    pub(super) files: BTreeMap<&'static str, Vec<u8>>,
    /// Every request is answered with this status.
    pub(super) status: Option<u16>,
    /// Connections are accepted and nothing is said.
    pub(super) silent: bool,
    /// Answers from the store end after so many bytes, for so many requests.
    pub(super) cut: Option<(usize, usize)>,
    /// The store answers every range with the whole file.
    pub(super) ignores_ranges: bool,
    /// The hub states that large files are so many bytes longer than they are.
    pub(super) overstates: usize,
    /// The store damages a byte of every answer.
    pub(super) damages: bool,
    /// The token without which nothing is to be had.
    pub(super) token: Option<&'static str>,
    /// The listing's commit, if not [`COMMIT`].
    pub(super) sha: Option<&'static str>,
}

#[derive(Debug)]
pub(super) struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<String>>,
    stopped: AtomicBool,
    port: u16,
}

#[derive(Debug)]
struct Request {
    method: String,
    path: String,
    /// First byte, and last if it is named.
    range: Option<(usize, Option<usize>)>,
    authorization: Option<String>,
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Server {
    pub(super) fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(behaviour),
            requests: Mutex::default(),
            stopped: AtomicBool::new(false),
            port: address.port(),
        });
        let accepting = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            let mut connections = Vec::new();
            for stream in listener.incoming() {
                if accepting.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (stream, shared) = (stream.expect("a connection"), Arc::clone(&accepting));
                // A client that goes away is no failure of the server.
                connections.push(thread::spawn(move || shared.serve(stream)));
            }
            for connection in connections {
                connection.join().expect("no panic in the server");
            }
        });
        Self { address, shared, thread: Some(thread) }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.behaviour.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The requests so far, as `GET /path` with ` from N` for a range and ` authorized` for a token; and none any more.
    pub(super) fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut request = Request { method, path, range: None, authorization: None };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                request.range = Some((first.parse().ok()?, last.parse().ok()));
            }
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(request)
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let request = read_request(&stream)?;
        let behaviour = self.behaviour.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let range = request.range.map_or_else(String::new, |(from, last)| match last {
            Some(last) => format!(" from {from} to {last}"),
            None => format!(" from {from}"),
        });
        let authorized = if request.authorization.is_some() { " authorized" } else { "" };
        let line = format!("{} {}{range}{authorized}", request.method, request.path);
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        if behaviour.silent {
            // Until the client gives up.
            drop(stream.read(&mut [0]));
            return None;
        }
        let token = behaviour.token.map(|token| format!("Bearer {token}"));
        let in_store = request.path.starts_with("/store/");
        if let Some(status) = behaviour.status {
            return reply(&mut stream, status, &[], b"no");
        }
        if token.is_some() && token != request.authorization && !in_store {
            return reply(&mut stream, 401, &[], b"no");
        }
        if request.path == "/api/models/org/name/revision/main" {
            let names = behaviour.files.keys().map(|name| format!(r#"{{"rfilename":"{name}"}}"#));
            let names = names.collect::<Vec<_>>().join(",");
            let sha = behaviour.sha.unwrap_or(COMMIT);
            let json = format!(r#"{{"id":"org/name","sha":"{sha}","siblings":[{names}]}}"#);
            return reply(&mut stream, 200, &[], json.as_bytes());
        }
        if let Some(name) = request.path.strip_prefix("/store/") {
            return self.store(&mut stream, &behaviour, behaviour.files.get(name)?, request.range);
        }
        let name = request.path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/"));
        let Some((name, bytes)) = name.and_then(|name| behaviour.files.get_key_value(name)) else {
            return reply(&mut stream, 404, &[], b"no");
        };
        let commit = ("X-Repo-Commit", COMMIT.to_owned());
        if name.ends_with(".json") {
            // A small file: its etag is its git blob's, of 40 digits.
            let etag = ("ETag", format!("\"{}\"", &sha256(bytes)[..40]));
            let body: &[u8] = if request.method == "HEAD" { &[] } else { bytes };
            // Whole, whatever the range: as a server answers that knows none.
            return reply_of(&mut stream, 200, &[commit, etag], (bytes.len(), body));
        }
        let size = ("X-Linked-Size", (bytes.len() + behaviour.overstates).to_string());
        let etag = ("X-Linked-ETag", format!("\"{}\"", sha256(bytes)));
        // The same socket under another host's name.
        let location = ("Location", format!("http://localhost:{}/store/{name}", self.port));
        reply(&mut stream, 302, &[commit, size, etag, location], b"")
    }

    fn store(
        &self,
        stream: &mut TcpStream,
        behaviour: &Behaviour,
        bytes: &[u8],
        range: Option<(usize, Option<usize>)>,
    ) -> Option<()> {
        let mut bytes = bytes.to_vec();
        if behaviour.damages {
            bytes[0] ^= 1;
        }
        let range = range.filter(|_| !behaviour.ignores_ranges);
        let total = bytes.len();
        let (from, last) = range.map_or((0, total - 1), |(from, last)| (from, last.unwrap_or(total - 1)));
        let body = bytes.get(from..=last).unwrap_or_default();
        let cut = {
            let mut behaviour = self.behaviour.lock().unwrap_or_else(PoisonError::into_inner);
            let cut = behaviour.cut.filter(|&(_, times)| times > 0);
            behaviour.cut = cut.map(|(at, times)| (at, times - 1));
            cut.map_or(body.len(), |(at, _)| at.min(body.len()))
        };
        let content_range = ("Content-Range", format!("bytes {from}-{last}/{total}"));
        if range.is_some() {
            return reply_of(stream, 206, &[content_range], (body.len(), &body[..cut]));
        }
        reply_of(stream, 200, &[], (body.len(), &body[..cut]))
    }
}

fn reply(stream: &mut TcpStream, status: u16, headers: &[(&str, String)], body: &[u8]) -> Option<()> {
    reply_of(stream, status, headers, (body.len(), body))
}

/// Answers with a length and as much of the body as there is.
fn reply_of(
    stream: &mut TcpStream,
    status: u16,
    headers: &[(&str, String)],
    (length, body): (usize, &[u8]),
) -> Option<()> {
    let mut head = format!("HTTP/1.1 {status} Any\r\nConnection: close\r\nContent-Length: {length}\r\n");
    headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()
}
