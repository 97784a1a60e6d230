//! How remote places are reached: what the edge of the program read from the environment, set once for the process.
//!
//! Owns: the variables that count, and how long is waited. Refuses to know: the environment itself; `config` hands the
//! variables in.

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

/// Beginnings of the names of variables that clouds define.
const CLOUD_PREFIXES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];
/// Variables beside them: Google's and Azure's own names, proxies, certificate authorities.
const OTHER_VARIABLES: [&str; 9] = [
    "SERVICE_ACCOUNT",
    "IDENTITY_ENDPOINT",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
];

/// Variables and patience. The values may be secrets, so they are not printed.
#[derive(Clone, Default)]
pub struct RemoteSettings {
    variables: Vec<(String, String)>,
    patience: Patience,
}

/// How long to wait for a server, and how often to ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For a connection, name and TLS included.
    pub connect: Duration,
    /// For the next byte of an answer; after it the request counts as failed and is tried again. A part of an upload must
    /// be through within it too.
    pub stall: Duration,
    /// How often a request is tried again.
    pub retries: u32,
    /// The wait before the first of them; it grows by chance up to twice the one before, and to [`MAX_BACKOFF`].
    pub backoff: Duration,
}

/// The longest wait between two tries.
pub const MAX_BACKOFF: Duration = Duration::from_secs(5);

impl Default for Patience {
    /// A connection as for the hub; 12 tries with waits that grow from 0.1 s to 5 s outlast half a minute of errors, such as
    /// object stores give while they move a bucket to more servers.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            retries: 12,
            backoff: Duration::from_millis(100),
        }
    }
}

impl RemoteSettings {
    /// The settings of these variables; others than those of the clouds, proxies and authorities are dropped.
    #[must_use]
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let counts = |name: &str| {
            CLOUD_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || OTHER_VARIABLES.contains(&name)
        };
        let variables = variables.into_iter().filter(|(name, value)| counts(name) && !value.is_empty()).collect();
        Self { variables, patience: Patience::default() }
    }

    /// The same with another patience.
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// How long to wait.
    #[must_use]
    pub const fn patience(&self) -> Patience {
        self.patience
    }

    /// The variables whose names begin so.
    #[cfg(feature = "remote")]
    pub(super) fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let all = self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        all.filter(move |(name, _)| name.starts_with(prefix))
    }

    /// The first of these variables that is set.
    #[cfg(feature = "remote")]
    pub(super) fn first(&self, names: &[&str]) -> Option<&str> {
        let value = |name: &&str| self.variables.iter().find(|(known, _)| known == name);
        names.iter().find_map(value).map(|(_, value)| value.as_str())
    }

    /// A file of certificate authorities that replace the built-in ones.
    #[cfg(feature = "remote")]
    pub(super) fn ca_file(&self) -> Option<std::path::PathBuf> {
        self.first(&["AWS_CA_BUNDLE", "SSL_CERT_FILE"]).map(std::path::PathBuf::from)
    }
}

impl fmt::Debug for RemoteSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.variables.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("RemoteSettings").field("variables", &names).field("patience", &self.patience).finish()
    }
}

static SETTINGS: OnceLock<RemoteSettings> = OnceLock::new();

/// Sets the settings of this process; the first call counts.
pub fn set_remote_settings(settings: RemoteSettings) {
    // A second call is another entry into the same program, with the same environment.
    let _ = SETTINGS.set(settings);
}

/// The settings of this process; without variables where none were set.
#[must_use]
pub fn remote_settings() -> RemoteSettings {
    SETTINGS.get().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_not_printed_and_other_variables_are_dropped() {
        let variables = [("AWS_SECRET_ACCESS_KEY", "hunter2"), ("PATH", "/bin"), ("AWS_REGION", "")];
        let settings =
            RemoteSettings::from_variables(variables.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let printed = format!("{settings:?}");
        assert!(printed.contains("AWS_SECRET_ACCESS_KEY"), "{printed}");
        assert!(["hunter2", "PATH", "REGION"].iter().all(|word| !printed.contains(word)), "{printed}");
    }
}
