//! What can happen to a job, what it asks of its shell, and why it refuses.

use serde::{Deserialize, Serialize};

use crate::error::{Classify, Kind};
use crate::manifest::ShardReceipt;
use crate::types::{Attempt, Generation, Rank, Step};

/// What follows when the work asked for is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitPolicy {
    /// The job ends with success.
    #[default]
    Exit,
    /// The ranks stay resident and wait for commands.
    Hold,
}

/// What a rank says when it joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinInfo {
    /// Chosen by the rank; the same id is the same join.
    pub request_id: String,
    /// Its rank.
    pub rank: Rank,
    /// The world size that it was started with.
    pub world: u32,
    /// Its host's name.
    pub host: String,
    /// Its process id.
    pub process_id: u32,
    /// Where its data plane listens.
    pub data_address: String,
    /// Its device in words.
    pub device: String,
    /// The release of NCCL that it can use; empty when it cannot.
    pub nccl_version: String,
    /// NCCL's unique id, made by rank 0.
    pub nccl_unique_id: Vec<u8>,
    /// The generation whose load its process still has in memory, whole; 0 when it has none.
    #[serde(default)]
    pub holds: Generation,
}

/// Whom a rank that cannot go on takes to be at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// Itself.
    Own,
    /// A rank that it lost.
    Peer(Rank),
    /// Some other rank, or the way to it.
    Unknown,
}

/// How far a rank is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// The stage in a word.
    pub stage: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Peak resident memory of its process.
    pub peak_resident_bytes: u64,
    /// Rank 0, while it trains.
    pub training: Option<TrainingProgress>,
    /// What its process has done.
    pub figures: super::RankFigures,
}

/// How far a training run is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingProgress {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Mean loss per token of the last step, in nats.
    pub loss: f32,
    /// The learning rate of the last step.
    pub learning_rate: f64,
    /// Tokens per second of all ranks together.
    pub tokens_per_second: f64,
    /// Until the last step, in seconds.
    pub remaining_seconds: f64,
    /// The losses of the latest steps, oldest first.
    pub recent_losses: Vec<f32>,
    /// The last evaluation's mean loss per token.
    pub evaluation_loss: Option<f32>,
    /// The step after which the best evaluation was made.
    pub best_step: Option<u64>,
    /// The duration of the last step, in seconds.
    pub step_s: f64,
    /// The norm of all gradients of the last step, before clipping.
    pub gradient_norm: f64,
    /// Tokens that went through the model since the processes started.
    pub tokens: u64,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A rank wants to take part.
    Join(JoinInfo),
    /// A rank lives.
    Renew {
        /// The member.
        member: String,
        /// How far it is.
        progress: Box<Progress>,
    },
    /// The shell has made the next generation durable.
    GenerationDurable(Generation),
    /// A rank has loaded.
    Loaded {
        /// The member.
        member: String,
        /// Its generation.
        generation: Generation,
    },
    /// The shell has begun an attempt.
    SaveBegun {
        /// The try.
        attempt: Attempt,
        /// Its directory.
        directory: String,
    },
    /// A rank has written its shard.
    Saved {
        /// The member.
        member: String,
        /// Its generation.
        generation: Generation,
        /// The step it wrote.
        step: Step,
        /// The try it wrote for.
        attempt: Attempt,
        /// What it wrote.
        receipt: Box<ShardReceipt>,
    },
    /// The shell has committed the checkpoint.
    Committed {
        /// Its directory.
        directory: String,
    },
    /// The shell could not do what an effect asked.
    ShellFailed {
        /// What went wrong.
        message: String,
        /// The exit code.
        exit_code: u8,
    },
    /// A rank cannot go on.
    Failed {
        /// The member.
        member: String,
        /// Its generation.
        generation: Generation,
        /// What went wrong.
        message: String,
        /// Its exit code.
        exit_code: u8,
        /// Who is at fault.
        blame: Blame,
    },
    /// The launcher saw a rank's process end with failure.
    ProcessEnded {
        /// The rank.
        rank: Rank,
        /// The process; 0 when it is not known.
        process_id: u32,
        /// Whether the launcher starts it again.
        returns: bool,
        /// How, in words.
        message: String,
        /// The exit code.
        exit_code: u8,
    },
    /// The ranks hold the state of a step of training in memory, to be written.
    SnapshotTaken {
        /// The member.
        member: String,
        /// Its generation.
        generation: Generation,
        /// The step.
        step: Step,
        /// The newest request for a checkpoint that had been seen before the snapshot was taken; 0 for none.
        answers: u64,
    },
    /// A rank has come to the end of its training.
    Trained {
        /// The member.
        member: String,
        /// Its generation.
        generation: Generation,
    },
    /// Somebody asks for a checkpoint now.
    SaveRequested {
        /// The step that it is of when the ranks hold what they loaded; those that train know theirs.
        step: Step,
        /// The number of the request, higher than those before it.
        request: u64,
    },
    /// A rank that watches again has seen this request for a checkpoint; a coordinator that was started again may not know of it.
    SaveRequestSeen {
        /// The member.
        member: String,
        /// The number of the request.
        request: u64,
    },
    /// Somebody asks the ranks to let a model go, which the job has beside its own.
    UnloadRequested(String),
    /// The next job of the queue, for ranks that hold.
    NextJob {
        /// What follows its load.
        after_load: super::AfterLoad,
        /// Whether it was resumed from a checkpoint.
        resumed: bool,
    },
    /// Somebody asks the job to end, with a checkpoint if it trains; the ranks stay.
    StopRequested,
    /// Somebody asks for an orderly end.
    DrainRequested {
        /// A checkpoint of this step is written first, unless this job has one.
        save: Option<Step>,
        /// Whether the hosts are being taken away, so that the job is to be started again elsewhere.
        preempts: bool,
    },
    /// A rank was asked to end, because its host is being taken away.
    LeaveRequested {
        /// The member.
        member: String,
        /// As of a drain.
        save: Option<Step>,
    },
    /// The shell has made the job anew, from what was committed, after ranks were lost.
    JobRemade {
        /// What follows its load.
        after_load: super::AfterLoad,
        /// Whether it is resumed from a checkpoint.
        resumed: bool,
    },
    /// Time passes.
    Tick,
}

impl Event {
    /// The event as a step of a job, for logs and tests.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Join(_) => "coordinator.join",
            Self::Renew { .. } => "coordinator.renew",
            Self::GenerationDurable(_) => "coordinator.generation-durable",
            Self::Loaded { .. } => "coordinator.loaded",
            Self::SaveBegun { .. } => "coordinator.save-begun",
            Self::Saved { .. } => "coordinator.saved",
            Self::Committed { .. } => "coordinator.committed",
            Self::ShellFailed { .. } => "coordinator.shell-failed",
            Self::Failed { .. } => "coordinator.failed",
            Self::ProcessEnded { .. } => "coordinator.process-ended",
            Self::SnapshotTaken { .. } => "coordinator.snapshot-taken",
            Self::Trained { .. } => "coordinator.trained",
            Self::SaveRequested { .. } => "coordinator.save-requested",
            Self::SaveRequestSeen { .. } => "coordinator.save-request-seen",
            Self::UnloadRequested(_) => "coordinator.unload-requested",
            Self::NextJob { .. } => "coordinator.next-job",
            Self::StopRequested => "coordinator.stop-requested",
            Self::DrainRequested { .. } => "coordinator.drain-requested",
            Self::LeaveRequested { .. } => "coordinator.leave-requested",
            Self::JobRemade { .. } => "coordinator.job-remade",
            Self::Tick => "coordinator.tick",
        }
    }
}

/// What the shell must do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Make this generation durable, then report [`Event::GenerationDurable`].
    PersistGeneration(super::Formed),
    /// Make the job anew from what was committed, then report [`Event::JobRemade`].
    RemakeJob {
        /// Whether the job has committed a checkpoint, which it then goes on from in any case.
        committed: bool,
    },
    /// Begin an attempt at this step, then report [`Event::SaveBegun`].
    BeginSave(Step),
    /// Seal and publish, then report [`Event::Committed`].
    Commit {
        /// What was written.
        save: super::Save,
        /// By whom.
        receipts: Vec<ShardReceipt>,
        /// In which generation.
        generation: Generation,
    },
}

/// Why a request is refused; nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The rank does not exist in this world.
    #[error("rank {rank} does not exist in a world of {world}")]
    NoSuchRank {
        /// The rank.
        rank: u32,
        /// The world size.
        world: u32,
    },
    /// The rank was started with another world size.
    #[error("rank {rank} was started for a world of {found}, this job has {expected}")]
    OtherWorld {
        /// The rank.
        rank: u32,
        /// The job's world size.
        expected: u32,
        /// The rank's.
        found: u32,
    },
    /// Somebody has this rank already.
    #[error("rank {rank} is taken by process {process_id} on {host}")]
    RankTaken {
        /// The rank.
        rank: u32,
        /// Its holder's process id.
        process_id: u32,
        /// Its holder's host.
        host: String,
    },
    /// Somebody had this rank a moment ago, and may be gone.
    #[error("rank {rank} is held by process {process_id} on {host}, whose lease has not ended")]
    RankHeld {
        /// The rank.
        rank: u32,
        /// Its holder's process id.
        process_id: u32,
        /// Its holder's host.
        host: String,
    },
    /// The member is not, or no longer, part of the job.
    #[error("member {member} is not part of generation {generation}")]
    Stale {
        /// The member.
        member: String,
        /// The current generation.
        generation: u64,
    },
    /// The job has ended.
    #[error("the job has ended: {message}")]
    Over {
        /// How.
        message: String,
    },
    /// There is no such job, or it has ended.
    #[error("job {number} is neither queued nor running")]
    NoSuchJob {
        /// Its number.
        number: u64,
    },
    /// Another job of the same ranks writes its checkpoints there.
    #[error(
        "checkpoint.directory {directory} is that of job {number}, which is not done: expected another, or the job again when that \
         one is done"
    )]
    SameCheckpoints {
        /// The directory.
        directory: String,
        /// The other job.
        number: u64,
    },
    /// The job cannot do this now.
    #[error("the job is {phase} and cannot {request} now")]
    NotNow {
        /// What it is doing.
        phase: &'static str,
        /// What was asked.
        request: &'static str,
    },
}

/// The reason of [`Refusal::Stale`].
pub const STALE: &str = "stale";

impl Classify for Refusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::Stale { .. } => STALE,
            _ => self.kind().name(),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::NoSuchRank { .. } | Self::OtherWorld { .. } => Kind::Exhausted,
            Self::RankTaken { .. } | Self::SameCheckpoints { .. } => Kind::Conflict,
            Self::Stale { .. } | Self::Over { .. } => Kind::Fenced,
            Self::NoSuchJob { .. } => Kind::NotFound,
            Self::NotNow { .. } | Self::RankHeld { .. } => Kind::Unavailable,
        }
    }
}
