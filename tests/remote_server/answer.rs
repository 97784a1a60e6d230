//! Answers: whole, of a range, and broken in the two ways in which answers break.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use hyper::{Response, StatusCode};

/// What every object says of itself.
const LAST_MODIFIED: &str = "Mon, 01 Jan 2024 00:00:00 GMT";

/// The content of an answer.
pub(super) struct Content {
    bytes: Option<Bytes>,
    then: Then,
}

/// What follows the bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    End,
    Break,
    Stall,
}

impl Body for Content {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match (self.bytes.take(), self.then) {
            (Some(bytes), _) if !bytes.is_empty() => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            (_, Then::End) => Poll::Ready(None),
            (_, Then::Break) => Poll::Ready(Some(Err(io::Error::other("the plan of faults")))),
            // Nobody wakes this: the client's patience ends it.
            (_, Then::Stall) => Poll::Pending,
        }
    }
}

/// A short answer.
pub(super) fn text(status: StatusCode, body: &str) -> Response<Content> {
    let bytes = Some(Bytes::copy_from_slice(body.as_bytes()));
    let answer = Response::builder().status(status).header("content-length", body.len());
    answer.body(Content { bytes, then: Then::End }).expect("an answer")
}

/// An object, or the range of it that was asked for. `fault` says whether it stalls or breaks off.
pub(super) fn object(
    bytes: &Bytes,
    etag: &str,
    range: Option<&str>,
    (is_head, fault): (bool, Option<bool>),
) -> Response<Content> {
    let total = bytes.len();
    let asked = range.and_then(|range| {
        let (start, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse::<usize>().ok()?, last.parse::<usize>().map_or(total, |last| (last + 1).min(total))))
    });
    let answer = Response::builder().header("etag", etag).header("last-modified", LAST_MODIFIED);
    let (answer, content) = match asked {
        Some((start, end)) if start < end => {
            let part = format!("bytes {start}-{}/{total}", end - 1);
            (answer.status(StatusCode::PARTIAL_CONTENT).header("content-range", part), bytes.slice(start..end))
        }
        Some(_) => return text(StatusCode::RANGE_NOT_SATISFIABLE, ""),
        None => (answer.status(StatusCode::OK), bytes.clone()),
    };
    let answer = answer.header("content-length", content.len());
    let body = match (is_head, fault) {
        (true, _) => Content { bytes: None, then: Then::End },
        (false, None) => Content { bytes: Some(content), then: Then::End },
        (false, Some(stalls)) => {
            let then = if stalls { Then::Stall } else { Then::Break };
            Content { bytes: Some(content.slice(..content.len() / 2)), then }
        }
    };
    answer.body(body).expect("an answer")
}

/// Undoes percent encoding.
pub(super) fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes().iter();
    while let Some(&byte) = rest.next() {
        let code: Vec<u8> = if byte == b'%' { rest.by_ref().take(2).copied().collect() } else { Vec::new() };
        let code = std::str::from_utf8(&code).ok().and_then(|code| u8::from_str_radix(code, 16).ok());
        bytes.push(code.unwrap_or(byte));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
