//! What somebody does who can reach the coordinator's port and means harm: raw bytes, silence, and connections in any number.
//! Refuses to know: what a test expects of the job meanwhile.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// HTTP/2's connection preface (RFC 9113, 3.4), and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

fn connect(address: &str) -> TcpStream {
    TcpStream::connect(address).expect("the coordinator listens")
}

/// Reads until the other side closes; the time that took, or nothing when it is still open after `limit`.
fn closed_within(mut stream: TcpStream, limit: Duration) -> Option<Duration> {
    let start = Instant::now();
    let mut buffer = [0; 4096];
    while start.elapsed() < limit {
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a time");
        match stream.read(&mut buffer) {
            Ok(0) => return Some(start.elapsed()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return Some(start.elapsed()),
        }
    }
    None
}

/// Bytes that are no HTTP/2; whether the connection was closed.
pub(crate) fn garbage(address: &str, seed: u64, limit: Duration) -> bool {
    let mut random = super::support::Random(seed);
    let mut stream = connect(address);
    let bytes: Vec<u8> = std::iter::repeat_with(|| random.next().to_le_bytes()).take(512).flatten().collect();
    // It may be closed before all of it was taken.
    let _ = stream.write_all(&bytes);
    closed_within(stream, limit).is_some()
}

/// A request of another protocol.
pub(crate) fn http1(address: &str, limit: Duration) -> bool {
    let mut stream = connect(address);
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: coordinator\r\n\r\n");
    closed_within(stream, limit).is_some()
}

/// A good preface and then frames of random types, lengths and streams.
pub(crate) fn frames(address: &str, seed: u64, limit: Duration) -> bool {
    let mut random = super::support::Random(seed);
    let mut stream = connect(address);
    let mut bytes = [PREFACE, SETTINGS].concat();
    for _ in 0..64 {
        let length = usize::try_from(random.below(64)).expect("small");
        bytes.extend([0, 0, u8::try_from(length).expect("small")]);
        bytes.extend(&random.next().to_le_bytes()[..6]);
        bytes.extend(std::iter::repeat_n(0x41, length));
    }
    let _ = stream.write_all(&bytes);
    closed_within(stream, limit).is_some()
}

/// Headers without an end: one HEADERS frame and 4,096 continuations of 16 KiB, 64 MiB together.
pub(crate) fn endless_headers(address: &str, limit: Duration) -> bool {
    let mut stream = connect(address);
    stream.set_write_timeout(Some(limit)).expect("a time");
    // A literal field without indexing, of a name and a value of 100 bytes (RFC 7541, 6.2.2).
    let mut field = vec![0, 100];
    field.extend([b'a'; 100]);
    field.push(100);
    field.extend([b'b'; 100]);
    let block: Vec<u8> = field.iter().copied().cycle().take(field.len() * 80).collect();
    let frame = |kind: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    };
    let mut sent = stream.write_all(&[PREFACE, SETTINGS, &frame(1, &block)].concat());
    for _ in 0..4096 {
        if sent.is_err() {
            return true;
        }
        sent = stream.write_all(&frame(9, &block));
    }
    closed_within(stream, limit).is_some()
}

/// Says a little and then nothing; how long it was let stay.
pub(crate) fn slow(address: &str, said: &[u8], limit: Duration) -> Option<Duration> {
    let mut stream = connect(address);
    stream.write_all(said).expect("a few bytes");
    closed_within(stream, limit)
}

/// Three ways to say too little: part of the preface, all of it, and a connection that is set up and makes no call.
pub(crate) fn slow_starts() -> [Vec<u8>; 3] {
    [PREFACE[..3].to_vec(), PREFACE.to_vec(), [PREFACE, SETTINGS].concat()]
}

/// Opens `count` connections that say nothing, and keeps them.
pub(crate) fn crowd(address: &str, count: usize) -> Vec<TcpStream> {
    (0..count).filter_map(|_| TcpStream::connect(address).ok()).collect()
}

/// As many files as the system lets this process have.
pub(crate) fn raise_file_limit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}
