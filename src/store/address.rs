//! Addresses of places that are reached through a network.
//!
//! Owns: their forms. Refuses to know: how anything is reached.
//!
//! `AD-1`: an address has no secret in it, because addresses go into plans, manifests, logs and messages.

use std::fmt;
use std::path::Path;

use super::StoreError;

/// What serves a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Amazon S3 and what is compatible with it.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage; the account comes from the environment.
    Az,
    /// A web server: files are read and never written, and not listed.
    Http,
    /// The same with TLS.
    Https,
}

impl Scheme {
    const ALL: [Self; 5] = [Self::S3, Self::Gs, Self::Az, Self::Http, Self::Https];

    /// Its name in an address.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Whether it is a web server.
    #[must_use]
    pub const fn is_web(self) -> bool {
        matches!(self, Self::Http | Self::Https)
    }
}

/// A place below which names are, such as `s3://bucket/prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAddress {
    /// What serves it.
    pub scheme: Scheme,
    /// The bucket, the container, or `host:port`.
    pub authority: String,
    /// What precedes every name, without slashes at its ends; it may be empty.
    pub prefix: String,
}

const FORM: &str = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or http(s)://host/path, without user, \
                    password, query and fragment (credentials come from the environment)";

/// Whether a path or a model reference is the address of a remote place.
#[must_use]
pub fn is_remote(path: impl AsRef<Path>) -> bool {
    path.as_ref().to_str().is_some_and(|text| scheme_of(text).is_some())
}

/// `path` from the root of the file system; a remote address is whole as it is.
#[must_use]
pub fn absolute(path: &Path) -> std::path::PathBuf {
    if is_remote(path) { path.to_owned() } else { std::path::absolute(path).unwrap_or_else(|_| path.to_owned()) }
}

fn scheme_of(text: &str) -> Option<(Scheme, &str)> {
    let (name, rest) = text.split_once("://")?;
    Scheme::ALL.into_iter().find(|scheme| scheme.name() == name).map(|scheme| (scheme, rest))
}

impl RemoteAddress {
    /// Reads an address.
    ///
    /// # Errors
    /// [`StoreError::Address`]; secrets that do not belong into an address are not repeated.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let bad = |found: String| StoreError::Address { found, expected: FORM };
        let (scheme, rest) = scheme_of(text).ok_or_else(|| bad(text.to_owned()))?;
        let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if let Some((_, host)) = authority.rsplit_once('@') {
            return Err(bad(format!("{}://(not shown)@{host}/…", scheme.name())));
        }
        if let Some((path, _)) = rest.split_once(['?', '#']) {
            return Err(bad(format!("{}://{path} with a query or fragment (not shown)", scheme.name())));
        }
        let prefix = prefix.trim_end_matches('/');
        let is_odd = |part: &str| part.is_empty() || part == "." || part == "..";
        if authority.is_empty() || (!prefix.is_empty() && prefix.split('/').any(is_odd)) {
            return Err(bad(text.to_owned()));
        }
        Ok(Self { scheme, authority: authority.to_owned(), prefix: prefix.to_owned() })
    }

    /// The place and the name of a file within it, where the address is that of a file.
    #[must_use]
    pub fn split_file(&self) -> (Self, String) {
        let (prefix, name) = self.prefix.rsplit_once('/').unwrap_or(("", &self.prefix));
        (Self { prefix: prefix.to_owned(), ..self.clone() }, name.to_owned())
    }

    /// The address of a name within this place.
    #[must_use]
    pub fn join(&self, name: &str) -> String {
        let place = self.to_string();
        if name.is_empty() { place } else { format!("{place}/{name}") }
    }
}

impl fmt::Display for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.name(), self.authority)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let check = |text: &str, (scheme, authority, prefix): (Scheme, &str, &str), again: &str| {
            let parsed = RemoteAddress::parse(text).expect(text);
            let expected = RemoteAddress { scheme, authority: authority.to_owned(), prefix: prefix.to_owned() };
            assert_eq!(parsed, expected);
            assert_eq!(parsed.to_string(), again);
        };
        check("s3://bucket", (Scheme::S3, "bucket", ""), "s3://bucket");
        check("gs://b/models/llama/", (Scheme::Gs, "b", "models/llama"), "gs://b/models/llama");
        check("http://127.0.0.1:80/m/", (Scheme::Http, "127.0.0.1:80", "m"), "http://127.0.0.1:80/m");
        let file = RemoteAddress::parse("https://host/a/b.safetensors").expect("an address").split_file();
        assert_eq!((file.0.to_string().as_str(), file.1.as_str()), ("https://host/a", "b.safetensors"));
        assert!(
            is_remote("az://c/x") && !is_remote("org/name") && !is_remote("/data/s3://x") && !is_remote("ftp://h/x")
        );
        assert_eq!(absolute(Path::new("s3://bucket/run")), Path::new("s3://bucket/run"));
    }

    /// AD-1: what is not of the form is refused, and secrets are not repeated.
    #[test]
    fn secrets_and_odd_paths_are_refused() {
        for text in ["s3://", "s3:///x", "gs://b//x", "http://h/../x", "http://h/./x"] {
            let message = RemoteAddress::parse(text).expect_err(text).to_string();
            assert!(message.contains("s3://bucket/prefix"), "{message}");
        }
        for text in ["https://user:hunter2@host/x", "https://host/x?sig=hunter2", "https://host/x#hunter2"] {
            let message = RemoteAddress::parse(text).expect_err(text).to_string();
            assert!(message.contains("host") && !message.contains("hunter2"), "{message}");
        }
    }
}
