//! The page and the sign-in page: one HTML file each, whose style and script stand in it, and the policy that lets a browser run
//! exactly these.

use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

/// A page and its Content-Security-Policy.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) html: &'static str,
    pub(super) policy: String,
}

/// The status page.
pub(super) static STATUS: LazyLock<Page> = LazyLock::new(|| Page::new(include_str!("page.html")));
/// Where a browser without the token lands.
pub(super) static SIGN_IN: LazyLock<Page> = LazyLock::new(|| Page::new(include_str!("sign_in.html")));

impl Page {
    fn new(html: &'static str) -> Self {
        let hashes = |tag: &str| -> Vec<String> {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let parts = html.split(&open).skip(1).filter_map(|rest| Some(rest.split_once(&close)?.0));
            parts.map(|part| format!("'sha256-{}'", base64(&Sha256::digest(part.as_bytes())))).collect()
        };
        let policy = format!(
            "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'",
            hashes("script").join(" "),
            hashes("style").join(" ")
        );
        Self { html, policy }
    }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        for place in 0..4_usize {
            let index = (bits >> (18 - 6 * place)) & 63;
            let letter = ALPHABET.get(index as usize).copied().unwrap_or(b'=');
            text.push(if place <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of RFC 4648, section 10.
    #[test]
    fn base64_is_the_standard_one() {
        let of = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(of, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
    }

    /// What the policy would forbid, or what would ask others, is not in the pages.
    #[test]
    fn pages_have_all_that_they_need() {
        for page in [&*STATUS, &*SIGN_IN] {
            assert_eq!(page.policy.matches("'sha256-").count(), 2, "one style and one script");
            for bad in [
                "http://",
                "https://",
                " src=",
                " style=",
                " onclick=",
                "rel=\"stylesheet",
                "@import",
                "eval(",
                "innerHTML",
            ] {
                // The name space of SVG is a name, not an address.
                let html = page.html.replace("http://www.w3.org/2000/svg", "");
                assert!(!html.contains(bad), "{bad} stands in a page");
            }
        }
    }
}
