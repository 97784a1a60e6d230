//! What a refusal must be: the right code, at once, in words that name what is wrong. Refuses to know: what was asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Ended;

/// Bad input; what the files hold cannot be used (sysexits.h, `EX_DATAERR`).
pub(crate) const DATA: i32 = 65;
/// A configuration or environment that cannot work (sysexits.h, `EX_CONFIG`).
pub(crate) const CONFIG: i32 = 78;
/// A refusal takes a fraction of a second, as the printed worst shows; the rest is for a busy machine and a debug build.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(5);

/// The longest refusal of this process so far, in microseconds.
static WORST_MICROS: AtomicU64 = AtomicU64::new(0);

/// Expects that the program ended with `code`, at once, having said `words`.
#[expect(clippy::print_stdout, reason = "what a test saw, shown on request")]
pub(crate) fn expect_refused(what: &str, ended: &Ended, code: i32, words: &[&str]) {
    let message = ended.stderr.lines().find(|line| line.starts_with("error")).unwrap_or_default();
    let micros = u64::try_from(ended.took.as_micros()).unwrap_or(u64::MAX);
    let worst = WORST_MICROS.fetch_max(micros, Ordering::Relaxed).max(micros);
    println!("{what}: {code} after {:?}, worst so far {worst} us: {message}", ended.took);
    assert_eq!(ended.code, Some(code), "{what}: {}", ended.stderr);
    assert!(ended.took < AT_ONCE, "{what}: {:?}", ended.took);
    for word in words {
        assert!(ended.stderr.contains(word), "{what}: expected {word:?} in: {}", ended.stderr);
    }
    assert!(!ended.stderr.contains("panicked"), "{what}: {}", ended.stderr);
}
