//! What a collective can fail with.
//!
//! Owns: [`CommError`] and the words in its messages.
//! Refuses to know: how any backend moves bytes.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::nccl::NcclVersion;
use crate::device::{Device, DeviceError};
use crate::error::{Classify, Kind};
use crate::types::{Generation, Rank, WorldSize};

/// The call that an error, or a message between ranks, belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names of the trait's methods")]
pub enum Operation {
    Connect,
    Broadcast,
    Scatter,
    AllGather,
    ReduceScatter,
    AllReduce,
    Barrier,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Broadcast => "broadcast",
            Self::Scatter => "scatter",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllReduce => "all_reduce",
            Self::Barrier => "barrier",
        })
    }
}

/// What identifies one message between two ranks; both sides derive it from the plan (`CM-1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId {
    /// The call that it belongs to.
    pub operation: Operation,
    /// The rank whose bytes these are; for a barrier, its round.
    pub root: Rank,
    /// The number of messages before it from this sender to this receiver.
    pub sequence: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, root, sequence, bytes } = self;
        write!(f, "message {sequence}: {bytes} bytes of {operation} from root {root}")
    }
}

/// Why two ranks did not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each field is what the message says")]
pub enum Refusal {
    /// The peer does not know the secret of this generation.
    Secret,
    /// The peer speaks another version of the protocol.
    Version { ours: u32, theirs: u32 },
    /// The peer belongs to another generation.
    Generation { ours: Generation, theirs: Generation },
    /// The peer at that address has another rank than the table of addresses says.
    WrongPeer { expected: Rank, found: Rank },
    /// The peer counts another number of ranks.
    World { ours: WorldSize, theirs: u32 },
    /// The peer has a connection from our rank already: two processes claim it.
    Duplicate { rank: Rank },
    /// The peer does not speak this protocol.
    Protocol,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Secret => f.write_str("the secrets of the generation differ"),
            Self::Version { ours, theirs } => write!(f, "protocol version: ours {ours}, the peer's {theirs}"),
            Self::Generation { ours, theirs } => write!(f, "generation: ours {ours}, the peer's {theirs}"),
            Self::WrongPeer { expected, found } => write!(f, "rank of the peer: expected {expected}, found {found}"),
            Self::World { ours, theirs } => write!(f, "world size: ours {ours}, the peer's {theirs}"),
            Self::Duplicate { rank } => write!(f, "rank {rank} is connected already"),
            Self::Protocol => f.write_str("the peer does not speak this protocol"),
        }
    }
}

/// A collective, or setting up a communicator, failed. `Clone`, because a closed communicator repeats its error.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each field is what the message says")]
pub enum CommError {
    /// This rank's [`super::AbortHandle`] was used, or a peer's was, or a peer failed and said why.
    #[error("{operation}: aborted by rank {rank}: {reason}")]
    Aborted { operation: Operation, rank: Rank, reason: String },
    /// A peer's process or host is gone, or it ended its communicator.
    #[error("{operation}: rank {rank} is gone{}", told_by(.reported_by))]
    PeerLost { operation: Operation, rank: Rank, reported_by: Option<Rank>, source: Option<Arc<io::Error>> },
    /// Nothing moved for as long as this rank was told to wait.
    #[error("{operation}: no progress for {:.1} s, waiting for {}", .waited.as_secs_f64(), ranks(.waiting_for))]
    Deadline { operation: Operation, waiting_for: Vec<Rank>, waited: Duration },
    /// A peer follows another plan.
    #[error("rank {rank} follows another plan: expected {expected}, found {found}")]
    Mismatch { rank: Rank, expected: MessageId, found: MessageId },
    /// Bytes changed on the way.
    #[error("{operation}: damaged bytes from rank {rank}: {what}: expected {expected:#010x}, found {found:#010x}")]
    Corrupt { operation: Operation, rank: Rank, what: &'static str, expected: u64, found: u64 },
    /// The backend does not move memory of that device.
    #[error("{operation}: expected memory on {expected}, found memory on {found}")]
    WrongDevice { operation: Operation, expected: Device, found: Device },
    /// The arguments contradict each other.
    #[error("{operation}: {detail}")]
    BadArgument { operation: Operation, detail: String },
    /// A peer and this rank do not belong together.
    #[error("connection to rank {rank} refused: {refusal}")]
    Refused { rank: Rank, refusal: Refusal },
    /// No NCCL library was found, or what was found is none.
    #[error("no NCCL library: {tried}")]
    LibraryMissing { tried: String },
    /// The NCCL library lacks what this build needs.
    #[error("{name}: NCCL {found} is older than {oldest}")]
    LibraryTooOld { name: String, found: NcclVersion, oldest: NcclVersion },
    /// NCCL failed; `detail` is its own last word.
    #[error("{operation}: {call}: {name} ({code}){}", detail_of(.detail))]
    Nccl { operation: Operation, call: &'static str, code: i32, name: String, detail: String },
    /// The device failed.
    #[error("{operation}: {source}")]
    Device { operation: Operation, source: DeviceError },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io { what: String, source: Arc<io::Error> },
}

fn told_by(reporter: &Option<Rank>) -> String {
    reporter.map_or_else(String::new, |rank| format!(", says rank {rank}"))
}

fn detail_of(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(": {detail}") }
}

fn ranks(ranks: &[Rank]) -> String {
    let names: Vec<String> = ranks.iter().map(Rank::to_string).collect();
    match names.len() {
        0 => "nobody in particular".to_owned(),
        1 => format!("rank {}", names.concat()),
        _ => format!("ranks {}", names.join(", ")),
    }
}

impl CommError {
    /// Whether the communicator cannot be used any more (`CM-3`); false for arguments refused before a byte moved.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::BadArgument { .. } | Self::WrongDevice { .. })
    }

    pub(super) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source: Arc::new(source) }
    }
}

impl Classify for CommError {
    fn kind(&self) -> Kind {
        match self {
            // An address to listen on that is not this host's, or is taken: no peer is to blame.
            Self::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse) =>
            {
                Kind::Conflict
            }
            Self::Aborted { .. } | Self::PeerLost { .. } | Self::Io { .. } => Kind::Unavailable,
            Self::Deadline { .. } => Kind::Deadline,
            Self::Corrupt { .. } => Kind::Corrupt,
            // The plan's hash was agreed before the first message, so a mismatch is a defect of ours.
            Self::Mismatch { .. } | Self::WrongDevice { .. } => Kind::Internal,
            Self::BadArgument { .. } => Kind::Invalid,
            Self::LibraryMissing { .. } => Kind::NotFound,
            Self::LibraryTooOld { .. } => Kind::Invalid,
            // ncclResult_t: 1 a CUDA call failed, 2 the system, 6 a peer or the network, 8 a timeout; the rest are misuse.
            Self::Nccl { code: 1 | 2 | 6, .. } => Kind::Unavailable,
            Self::Nccl { code: 8, .. } => Kind::Deadline,
            Self::Nccl { .. } => Kind::Internal,
            Self::Device { source, .. } => source.kind(),
            Self::Refused { refusal, .. } => match refusal {
                Refusal::Generation { .. } | Refusal::Secret => Kind::Fenced,
                Refusal::Duplicate { .. } => Kind::Conflict,
                _ => Kind::Invalid,
            },
        }
    }
}

/// What a rank that closes its communicator tells its peers (`CM-3`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Goodbye {
    /// It has made all its calls.
    Finished,
    /// It lost a peer.
    Lost {
        /// That peer.
        culprit: Rank,
    },
    /// It was aborted, or failed for another reason.
    Aborted {
        /// Where the abort began.
        culprit: Rank,
        /// The reason in words.
        reason: String,
    },
}

impl Goodbye {
    /// What to tell the peers after `error` on rank `own`.
    pub(super) fn after(error: &CommError, own: Rank) -> Self {
        match error {
            CommError::PeerLost { rank, .. } => Self::Lost { culprit: *rank },
            CommError::Aborted { rank, reason, .. } => Self::Aborted { culprit: *rank, reason: reason.clone() },
            other => Self::Aborted { culprit: own, reason: other.to_string() },
        }
    }

    /// The error for a rank that hears this from `peer` while it needs it.
    pub(super) fn into_error(self, operation: Operation, peer: Rank) -> CommError {
        match self {
            Self::Finished => CommError::PeerLost { operation, rank: peer, reported_by: None, source: None },
            Self::Lost { culprit } => {
                CommError::PeerLost { operation, rank: culprit, reported_by: Some(peer), source: None }
            }
            Self::Aborted { culprit, reason } => CommError::Aborted { operation, rank: culprit, reason },
        }
    }
}
