//! What becomes of the lines of the ranks.
//!
//! Owns: [`LogConfig`], the choice of streams (`--redirects`, `--tee`), prefixes, and the places of the files.
//! Refuses to know: why a rank ended.
//!
//! - LG-1: bounded memory per stream. LG-2: nobody who does not read can hold a rank up. LG-3: with a log directory, every
//!   byte of every rank is in a file, whatever is shown.

mod console;
mod lines;
mod pump;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use console::Console;
pub(crate) use lines::Tail;
pub(crate) use pump::{LogThread, Pump, Shown};

/// What stands before each line by default.
pub(crate) const DEFAULT_PREFIX: &str = "[${rank}] ";

/// One of the two outputs of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A choice of streams, for all ranks or by local rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamChoice {
    everyone: u8,
    by_local_rank: BTreeMap<u32, u8>,
}

impl StreamChoice {
    /// Reads `3`, or `0:1,2:3`, where 0 is none, 1 stdout, 2 stderr, 3 both.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bits = |text: &str| text.parse::<u8>().ok().filter(|bits| *bits <= 3);
        if !text.contains(':') {
            return Some(Self { everyone: bits(text)?, by_local_rank: BTreeMap::new() });
        }
        let entry = |entry: &str| {
            let (rank, value) = entry.split_once(':')?;
            Some((rank.trim().parse().ok()?, bits(value.trim())?))
        };
        Some(Self { everyone: 0, by_local_rank: text.split(',').map(entry).collect::<Option<_>>()? })
    }

    /// Whether the choice holds this stream of this local rank.
    #[must_use]
    pub fn has(&self, local_rank: u32, stream: Stream) -> bool {
        let bits = self.by_local_rank.get(&local_rank).unwrap_or(&self.everyone);
        let bit = match stream {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        };
        bits & bit != 0
    }

    /// Whether it holds nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.everyone == 0 && self.by_local_rank.values().all(|bits| *bits == 0)
    }
}

/// What becomes of the streams of the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Where the files go; without it there are none. With it, both streams of all ranks are written.
    pub dir: Option<PathBuf>,
    /// Streams that are not shown.
    pub redirects: StreamChoice,
    /// Streams that are shown although they are redirected.
    pub tee: StreamChoice,
    /// What stands before each line; `${rank}`, `${local_rank}` and `${role_name}` are replaced.
    pub prefix_template: String,
    /// The local ranks whose lines are shown; `None` for all.
    pub local_ranks_filter: Option<BTreeSet<u32>>,
    /// Whether lines are written to this process's own streams at all; events carry them in any case.
    pub is_shown: bool,
}

impl LogConfig {
    /// Lines are shown with the default prefix, and nothing is written to files.
    #[must_use]
    pub fn shown() -> Self {
        Self {
            dir: None,
            redirects: StreamChoice::default(),
            tee: StreamChoice::default(),
            prefix_template: DEFAULT_PREFIX.to_owned(),
            local_ranks_filter: None,
            is_shown: true,
        }
    }

    /// Whether this stream of this local rank is shown.
    pub(crate) fn shows(&self, local_rank: u32, stream: Stream) -> bool {
        let passes = self.local_ranks_filter.as_ref().is_none_or(|ranks| ranks.contains(&local_rank));
        self.is_shown && passes && (self.tee.has(local_rank, stream) || !self.redirects.has(local_rank, stream))
    }

    /// What stands before the lines of a rank.
    pub(crate) fn prefix(&self, rank: u32, local_rank: u32, role: &str) -> String {
        self.prefix_template
            .replace("${rank}", &rank.to_string())
            .replace("${local_rank}", &local_rank.to_string())
            .replace("${role_name}", role)
    }
}

/// The name of a directory for a job id that may hold anything.
pub(crate) fn directory_name(run_id: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = run_id.chars().take(128).map(|c| if is_plain(c) { c } else { '_' }).collect();
    if name.trim_matches('.').is_empty() { "none".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_chosen_as_with_torchrun() {
        let both = StreamChoice::parse("3").expect("it is a choice");
        assert!(both.has(0, Stream::Stdout) && both.has(7, Stream::Stderr));
        let some = StreamChoice::parse("0:1,2:3").expect("it is a choice");
        assert!(some.has(0, Stream::Stdout) && !some.has(0, Stream::Stderr));
        assert!(!some.has(1, Stream::Stdout) && some.has(2, Stream::Stderr));
        assert!(["4", "x", "0:4", "0:1,", ""].iter().all(|text| StreamChoice::parse(text).is_none()));
    }

    #[test]
    fn a_redirected_stream_is_silent_unless_it_is_teed() {
        let mut config = LogConfig::shown();
        assert!(config.shows(0, Stream::Stdout));
        config.redirects = StreamChoice::parse("3").expect("it is a choice");
        config.tee = StreamChoice::parse("1:2").expect("it is a choice");
        assert!(!config.shows(1, Stream::Stdout) && config.shows(1, Stream::Stderr));
        config.local_ranks_filter = Some(BTreeSet::from([0]));
        assert!(!config.shows(1, Stream::Stderr));
    }

    #[test]
    fn a_job_id_cannot_leave_the_log_directory() {
        assert_eq!(directory_name("a/../../b"), "a_.._.._b");
        assert_eq!(directory_name(".."), "none");
        assert_eq!(directory_name("job-1.x"), "job-1.x");
    }
}
