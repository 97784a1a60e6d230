//! The requests to a hub, and what their failures mean.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy, Timeout};

use super::cache::is_commit;
use super::local::{MAX_JSON_BYTES, read_json};
use super::{HubConfig, HubError, Timeouts};
use crate::types::as_u64;

/// Redirections that are followed; the hub itself needs one to a renamed repository and one to its store.
const MAX_REDIRECTS: u32 = 5;
/// An etag becomes a file's name; a SHA-256 has 64 digits.
const MAX_ETAG_BYTES: usize = 128;

/// A client of one hub.
#[derive(Debug)]
pub(super) struct Http {
    /// Follows redirections.
    agent: Agent,
    /// Does not, because the hub states a file's size and digest in the redirection to its store.
    direct: Agent,
    endpoint: String,
    authorization: Option<String>,
    timeouts: Timeouts,
}

/// What a revision is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) names: Vec<String>,
}

/// What the hub states of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileFacts {
    pub(super) url: String,
    /// The name of its blob: a SHA-256 for large files.
    pub(super) etag: String,
    pub(super) len_bytes: u64,
}

/// The bytes of a file from `start` to its end.
pub(super) struct Content {
    pub(super) start: u64,
    pub(super) reader: Box<dyn Read>,
}

impl Http {
    pub(super) fn new(config: &HubConfig) -> Result<Self, HubError> {
        // One provider of cryptography, named here, so that it does not depend on what else is linked.
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .root_certs(roots(config)?)
            .build();
        let timeouts = config.timeouts;
        let agent = |redirects: u32| -> Result<Agent, HubError> {
            let builder = Agent::config_builder()
                .tls_config(tls.clone())
                .proxy(proxy(config)?)
                .http_status_as_error(false)
                .max_redirects(redirects)
                .max_redirects_will_error(false)
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .user_agent(concat!("weightcast/", env!("CARGO_PKG_VERSION")))
                .timeout_resolve(Some(timeouts.connect))
                .timeout_connect(Some(timeouts.connect))
                .timeout_recv_response(Some(timeouts.response))
                .timeout_per_read(Some(timeouts.stall));
            Ok(builder.build().new_agent())
        };
        let authorization = config.token.as_ref().map(|token| format!("Bearer {}", token.secret()));
        let endpoint = config.endpoint.clone();
        Ok(Self { agent: agent(MAX_REDIRECTS)?, direct: agent(0)?, endpoint, authorization, timeouts })
    }

    /// The commit that a revision has now, and the names of its files.
    pub(super) fn listing(&self, id: &str, revision: &str) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!("{}/api/models/{id}/revision/{}", self.endpoint, escape(revision, false));
        let response = self.send(&self.agent, Method::Get, &url, None)?;
        self.check(&url, response.status())?;
        let mut text = Vec::new();
        let mut body = response.into_body().into_reader().take(MAX_JSON_BYTES);
        body.read_to_end(&mut text).map_err(|error| self.failure(&url, ureq::Error::from(error)))?;
        let answer = |what: String| HubError::Answer { url: url.clone(), what };
        let info: Info = serde_json::from_slice(&text).map_err(|error| answer(error.to_string()))?;
        if !is_commit(&info.sha) {
            return Err(answer(format!("sha: expected a commit of 40 hexadecimal digits, found {:?}", info.sha)));
        }
        Ok(Listing { commit: info.sha, names: info.siblings.into_iter().map(|sibling| sibling.rfilename).collect() })
    }

    /// Size and etag of a file at a commit, from the headers alone.
    pub(super) fn facts(&self, id: &str, commit: &str, name: &str) -> Result<FileFacts, HubError> {
        let url = format!("{}/{id}/resolve/{commit}/{}", self.endpoint, escape(name, true));
        let mut response = self.send(&self.direct, Method::Head, &url, None)?;
        if response.status().is_redirection() && etag(response.headers()).is_none() {
            // A renamed repository, or a mirror whose store states the facts.
            response = self.send(&self.agent, Method::Head, &url, None)?;
        }
        if !response.status().is_redirection() {
            self.check(&url, response.status())?;
        }
        let headers = response.headers();
        let answer = |what: String| HubError::Answer { url: url.clone(), what };
        if let Some(found) = text(headers, "x-repo-commit").filter(|found| *found != commit) {
            return Err(answer(format!("x-repo-commit: expected {commit}, found {found}")));
        }
        let etag =
            etag(headers).ok_or_else(|| answer("expected an etag that can name a file, found none".to_owned()))?;
        let linked = text(headers, "x-linked-size");
        // The length of a redirection's own body says nothing about the file.
        let stated = linked.or_else(|| text(headers, "content-length").filter(|_| response.status().is_success()));
        let len_bytes = stated.and_then(|size| size.parse().ok()).ok_or_else(|| {
            answer("expected the file's size in x-linked-size or content-length, found none".to_owned())
        })?;
        let etag = etag.to_owned();
        Ok(FileFacts { url, etag, len_bytes })
    }

    /// The bytes of a file from `start`, or from 0 where the server cannot begin later.
    pub(super) fn content(&self, facts: &FileFacts, start: u64) -> Result<Content, HubError> {
        let url = &facts.url;
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let response = self.send(&self.agent, Method::Get, url, range)?;
        let size =
            |found_bytes| Err(HubError::Size { file: url.clone(), expected_bytes: facts.len_bytes, found_bytes });
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(response.headers(), "content-range").unwrap_or_default().to_owned();
                let (found_start, total) = content_range(&range).ok_or_else(|| HubError::Answer {
                    url: url.clone(),
                    what: format!("content-range: expected bytes {start}-…/{}, found {range:?}", facts.len_bytes),
                })?;
                if total != facts.len_bytes {
                    return size(total);
                }
                if found_start != start {
                    let what = format!("content-range: expected to begin at byte {start}, found {range:?}");
                    return Err(HubError::Answer { url: url.clone(), what });
                }
                start
            }
            status => {
                self.check(url, status)?;
                0
            }
        };
        let length = text(response.headers(), "content-length").and_then(|length| length.parse::<u64>().ok());
        if let Some(length) = length.filter(|&length| length != facts.len_bytes - start) {
            return size(start.saturating_add(length));
        }
        Ok(Content { start, reader: Box::new(response.into_body().into_reader()) })
    }

    /// Fills `into`, which is not empty, with the bytes of a file from `start`; nothing else is asked for.
    pub(super) fn part(&self, facts: &FileFacts, start: u64, into: &mut [u8]) -> Result<(), HubError> {
        let url = &facts.url;
        let last = start + as_u64(into.len()) - 1;
        let response = self.send(&self.agent, Method::Get, url, Some(format!("bytes={start}-{last}")))?;
        let answer = |what: String| HubError::Answer { url: url.clone(), what };
        let is_whole = start == 0 && last + 1 == facts.len_bytes;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(response.headers(), "content-range").unwrap_or_default().to_owned();
                if content_range(&range) != Some((start, facts.len_bytes)) {
                    let expected = format!("bytes {start}-{last}/{}", facts.len_bytes);
                    return Err(answer(format!("content-range: expected {expected}, found {range:?}")));
                }
            }
            StatusCode::OK if !is_whole => {
                return Err(answer(format!("expected the bytes {start}-{last} alone, found the whole file")));
            }
            status => self.check(url, status)?,
        }
        let mut body = response.into_body().into_reader();
        body.read_exact(into).map_err(|error| self.failure(url, ureq::Error::from(error)))
    }

    fn send(
        &self,
        agent: &Agent,
        method: Method,
        url: &str,
        range: Option<String>,
    ) -> Result<Response<Body>, HubError> {
        let mut request = match method {
            Method::Get => agent.get(url),
            Method::Head => agent.head(url),
        };
        // Compressed answers have neither the file's length nor its ranges.
        request = request.header("Accept-Encoding", "identity");
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        request.call().map_err(|error| self.failure(url, error))
    }

    fn check(&self, url: &str, status: StatusCode) -> Result<(), HubError> {
        let url = url.to_owned();
        let token = match self.authorization {
            Some(_) => "the token that was given is not accepted",
            None => "no token was given (HF_TOKEN, or the file that HF_TOKEN_PATH names)",
        };
        match status.as_u16() {
            200 => Ok(()),
            401 => Err(HubError::Unauthorized { url, token }),
            403 => Err(HubError::Forbidden { url, token }),
            404 => Err(HubError::NotFound { url }),
            status => Err(HubError::Status { url, status }),
        }
    }

    fn failure(&self, url: &str, error: ureq::Error) -> HubError {
        let url = url.to_owned();
        match error {
            ureq::Error::Timeout(timeout) => {
                let (phase, limit): (_, Duration) = match timeout {
                    Timeout::Resolve => ("looking up its name", self.timeouts.connect),
                    Timeout::Connect => ("connecting", self.timeouts.connect),
                    Timeout::PerRead => ("reading", self.timeouts.stall),
                    _ => ("waiting for an answer", self.timeouts.response),
                };
                HubError::Timeout { url, phase, limit }
            }
            source => HubError::Unreachable { url, source: Box::new(source) },
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Method {
    Get,
    Head,
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// The etag without quotes, if it can name a file (`HU-4`).
fn etag(headers: &HeaderMap) -> Option<&str> {
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"))?;
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let fits = (1..=MAX_ETAG_BYTES).contains(&etag.len()) && !etag.starts_with('.');
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    Some(etag).filter(|etag| fits && etag.bytes().all(is_name))
}

/// First byte and whole length in `bytes 5-9/10`.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.parse().ok()?, total.parse().ok()?))
}

/// Percent-encodes all but the characters that RFC 3986 leaves unreserved, and `/` where it separates directories.
fn escape(text: &str, keep_slashes: bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (keep_slashes && byte == b'/') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

fn proxy(config: &HubConfig) -> Result<Option<Proxy>, HubError> {
    let Some(address) = &config.proxy else { return Ok(None) };
    let bad = |_| HubError::Variable { variable: "HTTPS_PROXY", expected: "a proxy's address", found: address.clone() };
    let given = Proxy::new(address).map_err(bad)?;
    let mut builder = Proxy::builder(given.protocol()).host(given.host()).port(given.port());
    if let Some(name) = given.username() {
        builder = builder.username(name);
    }
    if let Some(password) = given.password() {
        builder = builder.password(password);
    }
    for host in config.no_proxy.as_deref().unwrap_or_default().split(',').map(str::trim) {
        builder = builder.no_proxy(host);
    }
    builder.build().map(Some).map_err(bad)
}

/// The built-in authorities (Mozilla's), or those of the file that the user names.
fn roots(config: &HubConfig) -> Result<RootCerts, HubError> {
    let Some(path) = &config.ca_file else { return Ok(RootCerts::WebPki) };
    let text = read_json(path)?;
    let certificates: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        let found = format!("{} ({} bytes)", path.display(), as_u64(text.len()));
        return Err(HubError::Variable { variable: "SSL_CERT_FILE", expected: "a PEM file of certificates", found });
    }
    Ok(RootCerts::from(certificates))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_that_name_files() {
        let check = |name: &'static str, value: &str, expected: Option<&str>| {
            let headers = HeaderMap::from_iter([(name.parse().expect("a name"), value.parse().expect("a value"))]);
            assert_eq!(etag(&headers), expected, "{value}");
        };
        check("etag", "\"abc123\"", Some("abc123"));
        check("etag", "W/\"abc-1\"", Some("abc-1"));
        check("x-linked-etag", "\"00ff\"", Some("00ff"));
        for bad in ["\"../x\"", "\"a/b\"", "\"\"", "\"..\"", "\"a b\""] {
            check("etag", bad, None);
        }
        check("etag", &"a".repeat(129), None);
    }

    #[test]
    fn ranges_and_addresses() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, 10)));
        for bad in ["", "bytes */10", "bytes 5-9/*", "5-9/10", "bytes 5/10"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
        assert_eq!(escape("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(escape("a b/ü?.bin", true), "a%20b/%C3%BC%3F.bin");
    }
}
