//! Who may see what (`WB-1`).

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, StatusCode, header};

use crate::rpc::Token;
use crate::tasks::blocking;

/// Cookies whose name begins so hold a token; the rest of the name is the port, because browsers give a host's cookies to all
/// of its ports.
const COOKIE: &str = "weightcast-token";

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It names another host.
    Host,
    /// It has no token.
    NoToken,
    /// It has a wrong one.
    WrongToken,
    /// The token cannot be read here.
    Unreadable,
}

impl Refused {
    pub(super) const fn status(self) -> StatusCode {
        match self {
            Self::Host => StatusCode::MISDIRECTED_REQUEST,
            Self::NoToken => StatusCode::UNAUTHORIZED,
            Self::WrongToken => StatusCode::FORBIDDEN,
            Self::Unreadable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub(super) const fn message(self) -> &'static str {
        match self {
            Self::Host => "this port answers to the addresses of its own host only\n",
            Self::NoToken => "no job token: expected Authorization: Bearer, or the page's cookie\n",
            Self::WrongToken => "wrong job token\n",
            Self::Unreadable => "the job's token cannot be read by the coordinator\n",
        }
    }
}

/// The rule of one port.
#[derive(Debug)]
pub(super) enum Access {
    /// Only this host reaches it.
    Loopback,
    /// Others do.
    Token(Token),
}

impl Access {
    pub(super) fn new(address: SocketAddr, token: Token) -> Self {
        if address.ip().is_loopback() { Self::Loopback } else { Self::Token(token) }
    }

    /// Whether a request may see what is open.
    pub(super) fn admit_open(&self, headers: &HeaderMap) -> Result<(), Refused> {
        match self {
            Self::Loopback if !names_this_host(headers) => Err(Refused::Host),
            _ => Ok(()),
        }
    }

    /// Whether a request may see the job.
    pub(super) async fn admit(&self, headers: &HeaderMap) -> Result<(), Refused> {
        self.admit_open(headers)?;
        let Self::Token(token) = self else { return Ok(()) };
        let found = given(headers);
        if found.is_empty() {
            return Err(Refused::NoToken);
        }
        let token = token.clone();
        // The file may have to be read.
        let checked = blocking(move || {
            let mut accepted = false;
            for header in found {
                accepted |= token.accepts(header.as_bytes())?;
            }
            Ok::<_, crate::rpc::TokenError>(accepted)
        });
        match checked.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refused::WrongToken),
            Err(error) => {
                tracing::error!(%error, "the job's token cannot be read");
                Err(Refused::Unreadable)
            }
        }
    }
}

/// Tokens may come at most in this many cookies: of that many jobs on one host.
const MAX_COOKIES: usize = 8;

/// The tokens that a request has, as authorization headers.
fn given(headers: &HeaderMap) -> Vec<String> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let tokens = cookies
        .flat_map(|cookies| cookies.split(';'))
        .filter_map(|cookie| cookie.trim().split_once('='))
        .filter(|(name, _)| name.starts_with(COOKIE))
        .filter_map(|(_, value)| Some(format!("Bearer {}", decoded(value)?)));
    bearer.into_iter().chain(tokens.take(MAX_COOKIES)).collect()
}

/// Percent-encoded text; nothing when it is not of that form.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        bytes.push(match byte {
            b'%' => u8::try_from(digit(rest.next())? * 16 + digit(rest.next())?).ok()?,
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Whether the request's host is an address or localhost, and no name that somebody else could have pointed here.
fn names_this_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else { return false };
    if host.parse::<SocketAddr>().is_ok() {
        return true;
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    name == "localhost" || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, header::HeaderValue::from_static(value))])
    }

    #[test]
    fn wb_1_a_name_that_others_may_own_is_not_this_host() {
        for good in ["127.0.0.1:80", "127.0.0.1", "[::1]:80", "[::1]", "localhost", "localhost:29402"] {
            assert!(names_this_host(&headers(header::HOST, good)), "{good}");
        }
        for bad in ["evil.example", "evil.example:29402", "127.0.0.1.evil.example:80", "localhost.evil.example", ""] {
            assert!(!names_this_host(&headers(header::HOST, bad)), "{bad}");
        }
        assert!(!names_this_host(&HeaderMap::new()));
    }

    #[test]
    fn tokens_come_in_a_header_or_in_a_cookie() {
        assert_eq!(given(&headers(header::AUTHORIZATION, "Bearer a")), ["Bearer a"]);
        let cookies = "theme=dark; weightcast-token-29402=a%3Bb%25; weightcast-token-1=c; other=d";
        assert_eq!(given(&headers(header::COOKIE, cookies)), ["Bearer a;b%", "Bearer c"]);
        assert!(given(&headers(header::COOKIE, "weightcast-token=%4; weightcast-token=%zz")).is_empty());
    }
}
