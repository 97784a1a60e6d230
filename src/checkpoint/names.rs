//! Names below a checkpoint root (docs/FORMAT.md, 2).

use crate::types::{Attempt, Rank, Step};

/// The hint at the newest step.
pub const LATEST: &str = "LATEST";
pub(super) const TMP: &str = ".tmp";
pub(super) const TRASH: &str = ".trash";
pub(super) const MANIFEST: &str = "manifest.json";
/// The object whose creation makes an attempt's number one committer's own.
pub(super) const CLAIM: &str = "claim";
const CLAIMED_PREFIX: &str = "attempt-";
/// Added to a shard's name for its digest table.
pub(super) const TABLE_SUFFIX: &str = ".crc32c";

/// The directory of a committed step.
#[must_use]
pub fn step_name(step: Step) -> String {
    format!("step-{:09}", step.0)
}

/// The step that a directory name stands for, if it is one.
#[must_use]
pub fn parse_step_name(name: &str) -> Option<Step> {
    let digits = name.strip_prefix("step-")?;
    if digits.len() < 9 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().map(Step)
}

pub(super) fn attempt_directory(step: Step, attempt: Attempt) -> String {
    format!("{TMP}/{}.{attempt}", step_name(step))
}

/// The step and attempt of a name below `.tmp`.
pub(super) fn parse_attempt_name(name: &str) -> Option<(Step, Attempt)> {
    let (step, attempt) = name.split_once('.')?;
    Some((parse_step_name(step)?, Attempt(attempt.parse().ok()?)))
}

/// The directory of a try in a store that does not rename: it stays where it is, and the manifest beside it names it.
pub(super) fn claimed_directory(step: Step, attempt: Attempt) -> String {
    format!("{}/{}", step_name(step), claimed_name(attempt))
}

pub(super) fn claimed_name(attempt: Attempt) -> String {
    format!("{CLAIMED_PREFIX}{attempt}")
}

/// The attempt of a name below a step's directory.
pub(super) fn parse_claimed_name(name: &str) -> Option<Attempt> {
    name.strip_prefix(CLAIMED_PREFIX)?.parse().ok().map(Attempt)
}

pub(super) fn shard_name(rank: Rank) -> String {
    format!("shard-{:05}-model-00001-of-00001.safetensors", rank.0 + 1)
}

/// The file of the block digests of `shard`.
pub(crate) fn table_name(shard: &str) -> String {
    format!("{shard}{TABLE_SUFFIX}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_names_round_trip_and_others_are_refused() {
        for step in [0, 12, 999_999_999, 1_000_000_000_000] {
            assert_eq!(parse_step_name(&step_name(Step(step))), Some(Step(step)));
        }
        for name in ["step-12", "step-", "step-00000000x", "LATEST", "step-000000001.2", ".tmp"] {
            assert_eq!(parse_step_name(name), None, "{name}");
        }
        assert_eq!(parse_attempt_name("step-000000001.2"), Some((Step(1), Attempt(2))));
        assert_eq!(claimed_directory(Step(1), Attempt(2)), "step-000000001/attempt-2");
        assert_eq!(parse_claimed_name("attempt-2"), Some(Attempt(2)));
        assert_eq!(parse_claimed_name(MANIFEST), None);
    }
}
