//! Where the cache and the hub are. The variables are those of Python's `huggingface_hub`; who reads the environment hands
//! in a function that looks one up.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::HubError;

/// The hub that is used when `HF_ENDPOINT` names none.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A connection that takes longer, TLS included, does not come about; `huggingface_hub` gives it 10 s too.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer that has not begun by then does not come. No request fails later than this or [`CONNECT_TIMEOUT`].
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// A download that gets no byte for so long is broken off and resumed.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the cache and the hub are, and how to talk to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubConfig {
    /// The directory of `models--…` directories.
    pub cache: PathBuf,
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// The token that is sent to the hub, and to no other host.
    pub token: Option<Token>,
    /// Whether no server is asked for anything.
    pub offline: bool,
    /// A proxy for all requests.
    pub proxy: Option<String>,
    /// Hosts without the proxy, with commas between them.
    pub no_proxy: Option<String>,
    /// A PEM file of certificate authorities that replace the built-in ones.
    pub ca_file: Option<PathBuf>,
    /// How long to wait.
    pub timeouts: Timeouts,
}

/// How long to wait for a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, name and TLS included.
    pub connect: Duration,
    /// For an answer to begin.
    pub response: Duration,
    /// For the next byte of an answer.
    pub stall: Duration,
}

impl Timeouts {
    /// The named constants above.
    pub const STANDARD: Self = Self { connect: CONNECT_TIMEOUT, response: RESPONSE_TIMEOUT, stall: STALL_TIMEOUT };
}

/// A secret; it is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token itself.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Token {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl HubConfig {
    /// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME`; `HF_HUB_OFFLINE`; `HF_TOKEN`, `HF_TOKEN_PATH`;
    /// `HF_ENDPOINT`; `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`; `REQUESTS_CA_BUNDLE`, `SSL_CERT_FILE`. An empty variable
    /// counts as one that is not set. The token's file is read, if there is one.
    ///
    /// # Errors
    /// [`HubError::NoCache`] when no variable gives a directory, [`HubError::Variable`] for a bad address.
    pub fn from_vars(look_up: &dyn Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let get = |name: &str| look_up(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| get(name));
        let user = get("HOME").map(PathBuf::from);
        let path = |name: &str| {
            get(name).map(|value| match (value.strip_prefix("~/"), &user) {
                (Some(rest), Some(user)) => user.join(rest),
                _ => PathBuf::from(value),
            })
        };
        let xdg = path("XDG_CACHE_HOME").or_else(|| user.as_ref().map(|user| user.join(".cache")));
        let home = path("HF_HOME").or_else(|| xdg.map(|cache| cache.join("huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| home.as_ref().map(|home| home.join("hub")));
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            let expected = "an address that begins with https:// or http://";
            return Err(HubError::Variable { variable: "HF_ENDPOINT", expected, found: endpoint });
        }
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        let stored = || std::fs::read_to_string(token_file?).ok().map(|text| text.trim().to_owned());
        let token = get("HF_TOKEN").or_else(stored).filter(|token| !token.is_empty());
        Ok(Self {
            cache: cache.ok_or(HubError::NoCache)?,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(Token),
            offline: get("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            proxy: first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
            no_proxy: first(&["NO_PROXY", "no_proxy"]),
            ca_file: path("REQUESTS_CA_BUNDLE").or_else(|| path("SSL_CERT_FILE")),
            timeouts: Timeouts::STANDARD,
        })
    }
}

/// The values that `huggingface_hub` takes for true.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&str, &str)]) -> Result<HubConfig, HubError> {
        HubConfig::from_vars(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    /// The order of precedence in `huggingface_hub`'s documentation of environment variables.
    #[test]
    fn the_cache_is_where_the_variables_say() {
        let check = |variables: &[(&str, &str)], expected: &str| {
            assert_eq!(config(variables).expect("a cache").cache, PathBuf::from(expected));
        };
        check(&[("HOME", "/home/u")], "/home/u/.cache/huggingface/hub");
        check(&[("HOME", "/home/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub");
        check(&[("HOME", "/home/u"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")], "/h/hub");
        check(&[("HOME", "/home/u"), ("HF_HOME", "~/h"), ("HF_HUB_CACHE", "")], "/home/u/h/hub");
        check(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c");
        assert!(matches!(config(&[]), Err(HubError::NoCache)));
    }

    #[test]
    fn offline_endpoint_and_token() {
        let home = tempfile::tempdir().expect("a directory");
        let home_text = home.path().to_str().expect("UTF-8");
        let plain = config(&[("HF_HOME", home_text)]).expect("a config");
        assert_eq!((plain.offline, plain.token, plain.endpoint.as_str()), (false, None, "https://huggingface.co"));
        std::fs::write(home.path().join("token"), "hf_stored\n").expect("a file");
        std::fs::write(home.path().join("other"), "hf_other").expect("a file");
        let token = |variables: &[(&str, &str)]| {
            let all = [&[("HF_HOME", home_text)], variables].concat();
            config(&all).expect("a config").token.map(|token| token.secret().to_owned())
        };
        let other = home.path().join("other");
        assert_eq!(token(&[]).as_deref(), Some("hf_stored"));
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().expect("UTF-8"))]).as_deref(), Some("hf_other"));
        assert_eq!(token(&[("HF_TOKEN", "hf_given")]).as_deref(), Some("hf_given"));
        for (value, expected) in [("1", true), ("true", true), ("Yes", true), ("0", false), ("", false), ("no", false)]
        {
            let variables = [("HF_HOME", home_text), ("HF_HUB_OFFLINE", value), ("HF_ENDPOINT", "http://mirror:80/")];
            let config = config(&variables).expect("a config");
            assert_eq!((config.offline, config.endpoint.as_str()), (expected, "http://mirror:80"), "{value}");
        }
        let message = config(&[("HF_HOME", "/h"), ("HF_ENDPOINT", "mirror")]).expect_err("no address").to_string();
        assert!(message.contains("HF_ENDPOINT") && message.contains("\"mirror\""), "{message}");
        let printed = format!("{:?}", config(&[("HF_HOME", "/h"), ("HF_TOKEN", "hf_secret")]).expect("a config"));
        assert!(!printed.contains("hf_secret"), "{printed}");
    }
}
