//! The one classification of errors from which retry policy, gRPC code and exit code derive.
//!
//! Owns: [`Kind`] and [`Classify`]. Each operation has its own error enum elsewhere; none is defined here.
//! Refuses to know: what any operation does.

/// What an error asks of the one who gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request or the input is wrong; repeating it gives the same error.
    Invalid,
    /// The thing asked for does not exist.
    NotFound,
    /// It exists already, or somebody else has it.
    Conflict,
    /// A peer or a service cannot be reached now; a retry may succeed.
    Unavailable,
    /// The time ran out.
    Deadline,
    /// The caller belongs to a generation that has ended.
    Fenced,
    /// Bytes do not have the digest, the size or the form that they must have.
    Corrupt,
    /// Memory, disk or another limit does not suffice.
    Exhausted,
    /// A defect of ours.
    Internal,
}

impl Kind {
    /// The exit code of a process that ends with such an error: 65 for input that cannot be used, 78 for a
    /// configuration or environment that cannot work, 69 when a peer is out of reach, 70 for a defect (sysexits.h).
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Invalid | Self::NotFound | Self::Corrupt => 65,
            Self::Unavailable | Self::Deadline | Self::Fenced => 69,
            Self::Conflict | Self::Exhausted => 78,
            Self::Internal => 70,
        }
    }

    /// Whether the same request may succeed later without any change.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Unavailable | Self::Deadline)
    }

    /// The kind in a word, for logs and `--json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Unavailable => "unavailable",
            Self::Deadline => "deadline",
            Self::Fenced => "fenced",
            Self::Corrupt => "corrupt",
            Self::Exhausted => "exhausted",
            Self::Internal => "internal",
        }
    }
}

/// An error that knows its [`Kind`].
pub trait Classify: std::error::Error {
    /// What this error asks of the one who gets it.
    fn kind(&self) -> Kind;

    /// The reason in a word, for programs: the kind's name, unless something finer is known.
    fn reason(&self) -> &'static str {
        self.kind().name()
    }
}

/// The message of an error and of all its sources, joined by `: `.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        // An error that already quotes its source in its own message is not repeated.
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}
