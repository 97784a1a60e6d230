//! What the launchers of a job say to the rendezvous, and it to them.
//!
//! Owns: the messages (JSON) and [`PROTOCOL`]. Refuses to know: how they travel (`wire`) and what follows (`meeting`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Now;
use crate::report::RankReport;

/// The name and the version of the protocol; part of the key, so that another version is refused like a wrong token.
pub(crate) const PROTOCOL: &str = "weightcast-rendezvous-2";

/// Bytes of a line of a rank's output that travel.
const LINE_BYTES: usize = 1024;
/// Bytes of a rank's error file that travel.
const ERROR_BYTES: usize = 8 * 1024;

/// Why ranks are to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cause {
    /// When, in nanoseconds since 1970, by the clock of the node where it happened: for people, and to know it again.
    pub(crate) at_ns: u64,
    /// How long it was past when it was told. Clocks of nodes need not agree, but they all run equally fast.
    pub(crate) age: Duration,
    /// The exit code that follows from it.
    pub(crate) code: u8,
    /// In words, for a reader who knows nothing else.
    pub(crate) words: String,
    /// Nothing failed: somebody asked the job to end. The exit code is then that of the ranks.
    pub(crate) is_request: bool,
    /// The rank that failed, unless a whole node was lost.
    pub(crate) rank: Option<Box<RankReport>>,
}

impl Cause {
    /// What happens now.
    pub(crate) fn new(code: u8, words: String, now: Now) -> Self {
        Self { at_ns: now.wall_ns, age: Duration::ZERO, code, words, is_request: false, rank: None }
    }

    /// The failure of a rank, short enough to travel.
    pub(crate) fn of_rank(mut rank: RankReport, now: Now) -> Self {
        let cut = |text: &mut String, limit: usize| text.truncate(text.floor_char_boundary(limit));
        rank.stderr_tail.iter_mut().for_each(|line| cut(line, LINE_BYTES));
        rank.error_file.iter_mut().for_each(|text| cut(text, ERROR_BYTES));
        let (at_ns, code, words) = (rank.ended_ns, rank.end.exit_code(), rank.words.clone());
        let age = now.monotonic.saturating_sub(rank.ended);
        Self { at_ns, age, code, words, is_request: false, rank: Some(Box::new(rank)) }
    }
}

/// How the job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Over {
    /// The exit code of every launcher.
    pub(crate) exit_code: u8,
    /// Why, unless all succeeded.
    pub(crate) cause: Option<Cause>,
}

/// What a launcher says of itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Join {
    pub(crate) run_id: String,
    /// Its place, if it knows it.
    pub(crate) node_rank: Option<u32>,
    /// Ranks that it starts.
    pub(crate) nproc: u32,
    /// The name of its host, for people.
    pub(crate) host: String,
    /// The address at which others reach it; what the rendezvous sees, if it does not know.
    pub(crate) address: Option<String>,
    /// A port for rank 0, should it be here.
    pub(crate) port: u16,
}

/// A place in an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seat {
    pub(crate) attempt: u32,
    pub(crate) node_rank: u32,
    pub(crate) nnodes: u32,
    pub(crate) first_rank: u32,
    pub(crate) world_size: u32,
    pub(crate) master_addr: String,
    pub(crate) master_port: u16,
}

/// From a launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ToMeeting {
    /// The first message.
    Join(Join),
    /// Still here.
    Beat,
    /// The ranks of this node are being ended for this reason, and so should all others be.
    Ending { attempt: u32, cause: Cause },
    /// All ranks of this node have ended.
    Finished {
        attempt: u32,
        exit_code: u8,
        cause: Option<Cause>,
        /// Whether this launcher was asked to end: then nothing is started again.
        is_stopped: bool,
        /// A port for rank 0 in the next attempt.
        port: u16,
    },
}

/// From the rendezvous.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ToLauncher {
    /// Still here.
    Beat,
    /// Not all nodes have come.
    Waiting { joined: u32, wanted: u32 },
    /// Start the ranks.
    Start(Seat),
    /// End the ranks: something failed elsewhere.
    End { attempt: u32, cause: Cause },
    /// The job has ended.
    Over(Over),
    /// This launcher cannot join; `may_retry` when that can change.
    Refused { reason: String, may_retry: bool },
}
