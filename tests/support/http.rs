//! Just enough HTTP/1.1 to ask a page as a stranger would.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

/// An answer that takes longer is none.
const LIMIT: Duration = Duration::from_secs(20);

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map_or("", |(_, value)| value)
    }
}

/// Sends a request with these header lines beside `Host`, unless they have one.
fn ask(address: &str, (method, path): (&str, &str), lines: &[&str]) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).expect("somebody listens");
    stream.set_read_timeout(Some(LIMIT)).expect("a limit");
    let host =
        if lines.iter().any(|line| line.starts_with("Host:")) { String::new() } else { format!("Host: {address}\r\n") };
    let more: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let request = format!("{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).expect("it is heard");
    BufReader::new(stream)
}

fn head(reader: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a head");
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let status = lines.first().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status line");
    let pair = |line: &String| line.split_once(": ").map(|(name, value)| (name.to_owned(), value.to_owned()));
    (status, lines.iter().skip(1).filter_map(pair).collect())
}

/// One request and its whole answer.
pub(crate) fn request(address: &str, method: &str, path: &str, lines: &[&str]) -> Answer {
    let mut reader = ask(address, (method, path), lines);
    let (status, headers) = head(&mut reader);
    let mut body = String::new();
    reader.read_to_string(&mut body).expect("a body");
    Answer { status, headers, body }
}

/// As [`request`], with GET.
pub(crate) fn get(address: &str, path: &str, lines: &[&str]) -> Answer {
    request(address, "GET", path, lines)
}

/// A stream of server-sent events.
pub(crate) struct Stream {
    pub(crate) status: u16,
    reader: BufReader<TcpStream>,
}

impl Stream {
    pub(crate) fn open(address: &str, lines: &[&str]) -> Self {
        let mut reader = ask(address, ("GET", "/events"), lines);
        let (status, _) = head(&mut reader);
        Self { status, reader }
    }

    /// The data of the next event; one event is one line here.
    pub(crate) fn next(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).expect("an event in time") > 0, "the stream ended");
            if let Some(data) = line.strip_prefix("data: ") {
                return data.trim_end().to_owned();
            }
        }
    }
}
