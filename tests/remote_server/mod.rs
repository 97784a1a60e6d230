//! An object server on loopback, for tests: as much of S3's protocol as the project uses (path style; ranges and If-Match;
//! If-None-Match; uploads in parts; ListObjectsV2 in small pages), the same objects below `/web/` as a plain web server
//! gives them, and a plan of faults. Refuses to know: what the objects are.

mod answer;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use self::answer::{Content, decode, object, text};

/// The only key that is accepted.
pub(crate) const ACCESS_KEY: &str = "test-key";
/// Entries of a listing's page: few, so that listings have several.
const PAGE: usize = 3;

/// Which requests fail: each counts on its own, and 0 stands for none. Listings and deletions do not.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Every n-th request is answered with 503, every second of these with 500.
    pub(crate) refuse: u64,
    /// Every n-th answer with content breaks off in its middle.
    pub(crate) truncate: u64,
    /// Every n-th answer with content stops in its middle, and the connection stays.
    pub(crate) stall: u64,
    /// Every n-th creation is carried out and answered with 500.
    pub(crate) lose_answer: u64,
}

/// What the server has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) refused: u64,
    pub(crate) truncated: u64,
    pub(crate) stalled: u64,
    pub(crate) lost: u64,
    /// Bytes of content that were asked for, by answers that were not refused.
    pub(crate) content_bytes: u64,
    /// The most requests that were being answered at a time.
    pub(crate) peak: u64,
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    etag: String,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    counts: Counts,
    contents: u64,
    creations: u64,
    now: u64,
    last_tag: u64,
}

struct Shared {
    state: Mutex<State>,
    faults: Faults,
    weak: AtomicBool,
    delay_ms: AtomicU64,
}

/// A running server; it ends when dropped.
pub(crate) struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    pub(crate) fn start(faults: Faults) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (state, weak, delay_ms) = (Mutex::default(), AtomicBool::new(false), AtomicU64::new(0));
        let shared = Arc::new(Shared { state, faults, weak, delay_ms });
        let bind = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let listener = runtime.block_on(bind).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let serving = shared.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = serving.clone();
                let service = service_fn(move |request| {
                    let shared = shared.clone();
                    async move { Ok::<_, Infallible>(shared.serve(request).await) }
                });
                tokio::task::spawn(async move {
                    // A client that goes away is its own affair.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, shared, _runtime: runtime }
    }

    /// Entity tags are weak from now on, as of servers that compress.
    pub(crate) fn give_weak_tags(&self) {
        self.shared.weak.store(true, Ordering::Relaxed);
    }

    /// Answers take this long to begin.
    pub(crate) fn delay_ms(&self, delay_ms: u64) {
        self.shared.delay_ms.store(delay_ms, Ordering::Relaxed);
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The variables that make a client find this server.
    pub(crate) fn variables(&self) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test-secret".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }

    /// Puts an object, `bucket/key`.
    pub(crate) fn put(&self, name: &str, bytes: impl Into<Bytes>) {
        self.shared.lock().put(name, bytes.into());
    }

    /// Puts the files of a directory below `bucket/prefix`.
    pub(crate) fn put_directory(&self, prefix: &str, directory: &str) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8").to_owned();
            self.put(&format!("{prefix}/{name}"), std::fs::read(path).expect("a file"));
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<Bytes> {
        self.shared.lock().objects.get(name).map(|object| object.bytes.clone())
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.shared.lock().objects.keys().cloned().collect()
    }

    /// Uploads that were begun and neither completed nor aborted.
    pub(crate) fn open_uploads(&self) -> usize {
        self.shared.lock().uploads.len()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.shared.lock().counts
    }
}

impl State {
    fn put(&mut self, name: &str, bytes: Bytes) -> String {
        self.last_tag += 1;
        let etag = format!("\"tag-{}\"", self.last_tag);
        self.objects.insert(name.to_owned(), Object { bytes, etag: etag.clone() });
        etag
    }
}

/// Whether the fault that is due every n-th time is due.
fn is_due(every: u64, count: u64) -> bool {
    every > 0 && count.is_multiple_of(every)
}

/// What a request asks for.
struct Asked {
    name: String,
    query: BTreeMap<String, String>,
    if_match: Option<String>,
    if_none_match: bool,
    range: Option<String>,
    body: Bytes,
    is_web: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(&self, request: Request<Incoming>) -> Response<Content> {
        {
            let mut state = self.lock();
            state.counts.requests += 1;
            state.now += 1;
            state.counts.peak = state.counts.peak.max(state.now);
        }
        let delay = self.delay_ms.load(Ordering::Relaxed);
        if delay > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(delay)).await;
        }
        let answer = self.answer(request).await;
        self.lock().now -= 1;
        answer
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Content> {
        let (parts, body) = request.into_parts();
        let Ok(body) = body.collect().await else { return text(StatusCode::BAD_REQUEST, "the body broke off") };
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let path = decode(parts.uri.path().trim_start_matches('/'));
        let is_web = path.starts_with("web/");
        let is_known = header("authorization").is_some_and(|text| text.contains(&format!("Credential={ACCESS_KEY}/")));
        if !is_web && !is_known {
            return text(StatusCode::FORBIDDEN, "<Error><Code>InvalidAccessKeyId</Code></Error>");
        }
        let pairs = parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        let query = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let asked = Asked {
            name: path.trim_start_matches("web/").to_owned(),
            query: query.map(|(name, value)| (decode(name), decode(value))).collect(),
            if_match: header("if-match"),
            if_none_match: header("if-none-match").is_some(),
            range: header("range"),
            body: body.to_bytes(),
            is_web,
        };
        match parts.method.as_str() {
            "GET" if asked.query.contains_key("list-type") => self.list(&asked),
            "GET" | "HEAD" => self.get(&asked, parts.method == "HEAD"),
            "PUT" | "POST" if asked.is_web => text(StatusCode::METHOD_NOT_ALLOWED, ""),
            "PUT" | "POST" => self.write(&asked, parts.method == "POST"),
            "DELETE" => {
                let mut state = self.lock();
                match asked.query.get("uploadId") {
                    Some(upload) => drop(state.uploads.remove(upload)),
                    None => drop(state.objects.remove(&asked.name)),
                }
                text(StatusCode::NO_CONTENT, "")
            }
            _ => text(StatusCode::METHOD_NOT_ALLOWED, ""),
        }
    }

    /// The refusal that is due, if one is.
    fn refusal(&self) -> Option<Response<Content>> {
        let mut state = self.lock();
        let due = is_due(self.faults.refuse, state.counts.requests);
        state.counts.refused += u64::from(due);
        let is_even = state.counts.refused.is_multiple_of(2);
        let status = if is_even { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::SERVICE_UNAVAILABLE };
        due.then(|| text(status, "<Error><Code>SlowDown</Code></Error>"))
    }

    fn get(&self, asked: &Asked, is_head: bool) -> Response<Content> {
        if let Some(refusal) = self.refusal() {
            return refusal;
        }
        let mut state = self.lock();
        let Some(found) = state.objects.get(&asked.name).cloned() else {
            return text(StatusCode::NOT_FOUND, "<Error><Code>NoSuchKey</Code></Error>");
        };
        let weak = if self.weak.load(Ordering::Relaxed) { "W/" } else { "" };
        let etag = format!("{weak}{}", found.etag);
        // A weak tag never matches (RFC 9110, 13.1.1).
        if asked.if_match.as_ref().is_some_and(|wanted| *wanted != etag || !weak.is_empty()) {
            return text(StatusCode::PRECONDITION_FAILED, "<Error><Code>PreconditionFailed</Code></Error>");
        }
        let (fault, len) = if is_head {
            (None, 0)
        } else {
            state.contents += 1;
            let (stalls, breaks) =
                (is_due(self.faults.stall, state.contents), is_due(self.faults.truncate, state.contents));
            state.counts.stalled += u64::from(stalls);
            state.counts.truncated += u64::from(breaks && !stalls);
            ((stalls || breaks).then_some(stalls), found.bytes.len())
        };
        let answer = object(&found.bytes, &etag, asked.range.as_deref(), (is_head, fault));
        let content = answer.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
        state.counts.content_bytes += if len > 0 { content.unwrap_or(0) } else { 0 };
        answer
    }

    fn write(&self, asked: &Asked, is_post: bool) -> Response<Content> {
        if let Some(refusal) = self.refusal() {
            return refusal;
        }
        let mut state = self.lock();
        let upload = asked.query.get("uploadId");
        match (is_post, upload) {
            (true, None) => {
                let id = format!("upload-{}", state.counts.requests);
                state.uploads.insert(id.clone(), BTreeMap::new());
                let body =
                    format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>");
                text(StatusCode::OK, &body)
            }
            (true, Some(upload)) => {
                let Some(parts) = state.uploads.remove(upload) else {
                    return text(StatusCode::NOT_FOUND, "<Error><Code>NoSuchUpload</Code></Error>");
                };
                let whole: Vec<u8> = parts.into_values().flatten().collect();
                let etag = state.put(&asked.name, whole.into());
                let key = &asked.name;
                let body = format!(
                    "<CompleteMultipartUploadResult><Location>x</Location><Bucket>b</Bucket><Key>{key}</Key>\
                     <ETag>{etag}</ETag></CompleteMultipartUploadResult>"
                );
                state.lose_or(&self.faults, text(StatusCode::OK, &body))
            }
            (false, Some(upload)) => {
                let number = asked.query.get("partNumber").and_then(|number| number.parse().ok());
                let Some((parts, number)) = state.uploads.get_mut(upload).zip(number) else {
                    return text(StatusCode::NOT_FOUND, "<Error><Code>NoSuchUpload</Code></Error>");
                };
                parts.insert(number, asked.body.clone());
                with_tag(&format!("\"part-{number}\""))
            }
            (false, None) if asked.if_none_match && state.objects.contains_key(&asked.name) => {
                text(StatusCode::PRECONDITION_FAILED, "<Error><Code>PreconditionFailed</Code></Error>")
            }
            (false, None) => {
                let etag = state.put(&asked.name, asked.body.clone());
                state.lose_or(&self.faults, with_tag(&etag))
            }
        }
    }

    fn list(&self, asked: &Asked) -> Response<Content> {
        let state = self.lock();
        let bucket = format!("{}/", asked.name.trim_end_matches('/'));
        let value = |name: &str| asked.query.get(name).cloned().unwrap_or_default();
        let (prefix, after) = (value("prefix"), value("continuation-token"));
        let has_delimiter = asked.query.contains_key("delimiter");
        // Keys, or beginnings of keys up to the next slash, each once and in order.
        let mut entries: BTreeMap<String, Option<Object>> = BTreeMap::new();
        for (name, object) in &state.objects {
            let Some(key) = name.strip_prefix(&bucket).filter(|key| key.starts_with(&prefix)) else { continue };
            let rest = key.get(prefix.len()..).unwrap_or_default();
            match rest.split_once('/').filter(|_| has_delimiter) {
                Some((directory, _)) => drop(entries.insert(format!("{prefix}{directory}/"), None)),
                None => drop(entries.insert(key.to_owned(), Some(object.clone()))),
            }
        }
        let rest: Vec<_> = entries.into_iter().filter(|(entry, _)| *entry > after).collect();
        let is_truncated = rest.len() > PAGE;
        let mut body = format!("<ListBucketResult><IsTruncated>{is_truncated}</IsTruncated>");
        for (entry, object) in rest.iter().take(PAGE) {
            body.push_str(&match object {
                None => format!("<CommonPrefixes><Prefix>{entry}</Prefix></CommonPrefixes>"),
                Some(object) => format!(
                    "<Contents><Key>{entry}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag>\
                     <Size>{}</Size></Contents>",
                    object.etag,
                    object.bytes.len()
                ),
            });
        }
        if let Some((last, _)) = rest.get(PAGE - 1).filter(|_| is_truncated) {
            body.push_str(&format!("<NextContinuationToken>{last}</NextContinuationToken>"));
        }
        body.push_str("</ListBucketResult>");
        text(StatusCode::OK, &body)
    }
}

impl State {
    /// The answer to a creation, or in its place the one that says that it failed.
    fn lose_or(&mut self, faults: &Faults, answer: Response<Content>) -> Response<Content> {
        self.creations += 1;
        if !is_due(faults.lose_answer, self.creations) {
            return answer;
        }
        self.counts.lost += 1;
        text(StatusCode::INTERNAL_SERVER_ERROR, "<Error><Code>InternalError</Code></Error>")
    }
}

fn with_tag(etag: &str) -> Response<Content> {
    let mut answer = text(StatusCode::OK, "");
    answer.headers_mut().insert("etag", etag.parse().expect("a tag is ASCII"));
    answer
}
