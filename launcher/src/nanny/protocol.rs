//! What the launcher and a nanny say to each other over the socket that is the nanny's standard input.
//!
//! Owns: the two directions. A nanny sends one JSON line per [`Notice`]; the launcher sends single bytes, each the number of
//! a signal. The end of the stream says that the other side is dead, whatever it died of.

use serde::{Deserialize, Serialize};

use crate::clock::Now;
use crate::end::End;

/// The longest line that the launcher accepts from a nanny, in bytes.
pub(crate) const NOTICE_LIMIT: u64 = 16 * 1024;

/// What a nanny reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "notice")]
pub(crate) enum Notice {
    /// The rank's program runs.
    Started {
        /// Its process id.
        pid: i32,
        /// When.
        at: Now,
    },
    /// The rank's program ended, or could not be started.
    Ended {
        /// How.
        end: End,
        /// When.
        at: Now,
    },
}
