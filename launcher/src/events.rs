//! What happens during a launch, as it happens.
//!
//! Owns: [`Event`] and the callback that receives it.

use std::fmt;
use std::sync::Arc;

use crate::end::End;
use crate::logs::Stream;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// All ranks of this launcher are about to be started, for the first time or again.
    AttemptStarted {
        /// How often they were started before.
        restart_count: u32,
    },
    /// A rank's program runs.
    RankStarted {
        /// Which.
        rank: u32,
        /// Its process id.
        pid: i32,
    },
    /// A rank's program ended.
    RankExited {
        /// Which.
        rank: u32,
        /// How.
        end: End,
        /// When, in nanoseconds since 1970.
        at_ns: u64,
    },
    /// A rank wrote a line. Comes from the thread of the logs.
    Line {
        /// Which.
        rank: u32,
        /// On which stream.
        stream: Stream,
        /// The line without its end; what is not UTF-8 is replaced.
        text: String,
    },
    /// Something that a person may want to know, such as what is being waited for.
    Note {
        /// In words.
        text: String,
    },
}

/// A callback for events. It is called from the launch's task and from the thread of the logs, and must not block.
#[derive(Clone)]
pub struct EventSink(Arc<dyn Fn(Event) + Send + Sync>);

impl EventSink {
    /// Wraps a callback.
    pub fn new(callback: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(callback))
    }

    /// Passes an event on.
    pub(crate) fn send(&self, event: Event) {
        (self.0)(event);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSink")
    }
}
