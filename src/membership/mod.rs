//! The coordinator's state machine: who is in the job, what the job is doing, and what must happen next.
//!
//! Owns: members and their leases, generations, the phases of a job, the cause of an end.
//! Refuses to know: time (it is an argument), files, RPC, tensors. [`Membership::apply`] is a plain function of its state,
//! the time and one event; the shell carries out the effects it returns.
//!
//! Invariants:
//! - `MS-1`: a generation number is given out only after the shell has made it durable.
//! - `MS-2`: a message of another generation, or of a member that is not current, changes nothing (fencing).
//! - `MS-3`: an aborted or finished job never goes back to work.
//! - `MS-4`: a job whose ranks may come back goes on from what was committed, in a new generation, when they have; no rank of the
//!   generation before takes part without having joined again.

mod apply;
mod event;
mod figures;
mod leases;
mod regroup;
#[cfg(test)]
mod regroup_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use event::{Blame, Effect, Event, ExitPolicy, JoinInfo, Progress, Refusal, STALE, TrainingProgress};
pub use figures::RankFigures;
pub use leases::{LEASE, RENEW_INTERVAL, TICK};

use crate::clock::Instant;
use crate::manifest::ShardReceipt;
use crate::types::{Attempt, Generation, Rank, Step, WorldSize};

/// What is to be done when all ranks have loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AfterLoad {
    /// Write a checkpoint of this step.
    pub save: Option<Step>,
    /// Then train.
    #[serde(default)]
    pub train: bool,
    /// Then stay or end.
    pub then: ExitPolicy,
}

/// Fixed figures of a job.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The number of ranks.
    pub world: WorldSize,
    /// What follows the load.
    pub after_load: AfterLoad,
    /// How long ranks may take to join.
    pub join_deadline: Duration,
    /// Whether the job was resumed from a checkpoint, which then already has what it holds.
    pub resumed: bool,
    /// How long the job waits for ranks that it lost; without it, it ends when it loses one.
    pub rejoin: Option<Duration>,
}

/// The job as a whole.
#[derive(Clone, Debug)]
pub struct Membership {
    settings: Settings,
    started: Instant,
    last_tick: Instant,
    generation: Generation,
    phase: Phase,
    members: Vec<Option<Member>>,
    next_member: u64,
    draining: bool,
    /// The job at hand is to end at its next step; the ranks stay.
    stopping: bool,
    save_before_end: Option<Step>,
    /// A step of training that is to be written when the checkpoint at hand is committed.
    next_snapshot: Option<Step>,
    last_checkpoint: Option<(Step, String)>,
    /// The newest request for a checkpoint of a training job; 0 for none.
    save_request: u64,
    /// The newest request that a snapshot has answered, and its step.
    save_answered: Option<(u64, Step)>,
    /// Models that ranks are to let go.
    unloaded: BTreeSet<String>,
    /// Whether the job ends because its hosts are being taken away.
    preempted: bool,
    /// How the job lost ranks and waits for them.
    regrouping: regroup::Regrouping,
    /// Whether the ranks of this generation keep what they had loaded in an earlier one.
    keeps_base: bool,
}

/// What the job is doing.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Ranks join.
    Forming,
    /// All have joined; the shell makes the generation durable.
    Opening,
    /// Ranks load.
    Loading,
    /// Ranks train.
    Training,
    /// Ranks hold their shards.
    Holding,
    /// The shell begins an attempt.
    Beginning {
        /// The step to save.
        step: Step,
    },
    /// Ranks write.
    Saving {
        /// What they write.
        save: Save,
        /// What they have reported.
        receipts: Vec<ShardReceipt>,
    },
    /// The shell seals and publishes.
    Committing {
        /// What was written.
        save: Save,
    },
    /// Ranks end with success.
    Finished,
    /// The generation is cancelled.
    Aborted(Cause),
}

/// One try at a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Save {
    /// The step.
    pub step: Step,
    /// The try.
    pub attempt: Attempt,
    /// The directory that ranks write into.
    pub directory: String,
}

/// Why a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The rank at fault, if one is.
    pub rank: Option<Rank>,
    /// What happened.
    pub message: String,
    /// The exit code of the job.
    pub exit_code: u8,
}

/// A rank that has joined.
#[derive(Clone, Debug)]
pub struct Member {
    /// Names it in later calls.
    pub id: String,
    /// What it said when it joined.
    pub info: JoinInfo,
    /// When its lease was last renewed.
    pub renewed: Instant,
    /// How far it is.
    pub progress: Progress,
    loaded: bool,
    trained: bool,
    /// It was asked to end.
    leaving: bool,
}

/// A generation and who belongs to it: what a restarted coordinator must know to go on with the same ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Formed {
    /// The generation.
    pub generation: Generation,
    /// By rank, the member's id and what it said when it joined.
    pub members: Vec<(String, JoinInfo)>,
    /// Whether they keep what they had loaded in an earlier generation, as far as this one loads the same.
    #[serde(default)]
    pub keeps_base: bool,
}

impl Membership {
    /// A job that waits for its ranks. `last_generation` is the highest number that was ever made durable.
    #[must_use]
    pub fn new(settings: Settings, last_generation: Generation, now: Instant) -> Self {
        Self {
            settings,
            started: now,
            last_tick: now,
            generation: last_generation,
            phase: Phase::Forming,
            members: vec![None; settings.world.count()],
            next_member: 1,
            draining: false,
            stopping: false,
            save_before_end: None,
            next_snapshot: None,
            last_checkpoint: None,
            save_request: 0,
            save_answered: None,
            unloaded: BTreeSet::new(),
            preempted: false,
            regrouping: regroup::Regrouping::default(),
            keeps_base: false,
        }
    }

    /// Goes on where another coordinator was ended: the ranks of `formed` are taken to be loading, and say again what they
    /// have done. Their leases start now. `last_checkpoint` is what this generation has committed already.
    #[must_use]
    pub fn resume(mut self, formed: Formed, last_checkpoint: Option<(Step, String)>) -> Self {
        self.generation = formed.generation;
        self.phase = Phase::Loading;
        self.last_checkpoint = last_checkpoint;
        self.keeps_base = formed.keeps_base;
        let (renewed, count) = (self.started, formed.members.len());
        for (place, (id, info)) in self.members.iter_mut().zip(formed.members) {
            *place = Some(Member::new(id, info, Progress::default(), renewed));
        }
        // Ids end with a number that a generation uses once.
        self.next_member = crate::types::as_u64(count) + 1;
        self
    }

    /// Goes on where another coordinator was ended before the next job of its ranks had begun: they hold.
    #[must_use]
    pub fn resume_holding(self, formed: Formed) -> Self {
        Self { phase: Phase::Holding, ..self.resume(formed, None) }
    }

    /// A job whose end another coordinator has decided: it is only told to those who have not heard of it.
    #[must_use]
    pub fn ended(mut self, cause: Option<Cause>) -> Self {
        self.phase = cause.map_or(Phase::Finished, Phase::Aborted);
        self
    }

    /// The current generation, or the last one before it is formed.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// What the job is doing.
    #[must_use]
    pub const fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The members by rank.
    #[must_use]
    pub fn members(&self) -> &[Option<Member>] {
        &self.members
    }

    /// The directory of the newest checkpoint that this job has committed.
    #[must_use]
    pub fn last_checkpoint(&self) -> Option<&str> {
        self.last_checkpoint.as_ref().map(|(_, directory)| directory.as_str())
    }

    /// The newest step that this job has committed.
    #[must_use]
    pub fn committed_step(&self) -> Option<Step> {
        self.last_checkpoint.as_ref().map(|&(step, _)| step)
    }

    /// Whether the ranks train, possibly while a checkpoint is written.
    #[must_use]
    pub fn is_training(&self) -> bool {
        let all_loaded = self.members.iter().all(|member| member.as_ref().is_some_and(|member| member.loaded));
        let holds = matches!(self.phase, Phase::Holding | Phase::Opening);
        self.settings.after_load.train && all_loaded && !holds && !self.is_over()
    }

    /// The newest request for a checkpoint of a training job; 0 for none.
    #[must_use]
    pub const fn save_request(&self) -> u64 {
        self.save_request
    }

    /// The newest request for a checkpoint that a snapshot has answered, and the snapshot's step.
    #[must_use]
    pub const fn save_answered(&self) -> Option<(u64, Step)> {
        self.save_answered
    }

    /// Models beside the job's own that ranks are to let go.
    #[must_use]
    pub const fn unloaded(&self) -> &BTreeSet<String> {
        &self.unloaded
    }

    /// Whether the job is to end in an orderly way.
    #[must_use]
    pub const fn is_draining(&self) -> bool {
        self.draining
    }

    /// Whether the job ends because its hosts are being taken away.
    #[must_use]
    pub const fn is_preempted(&self) -> bool {
        self.preempted
    }

    /// Whether the ranks of this generation keep what they had loaded in an earlier one, as far as the plans agree.
    #[must_use]
    pub const fn keeps_base(&self) -> bool {
        self.keeps_base
    }

    /// How often the job has lost ranks and waited for them.
    #[must_use]
    pub const fn regroups(&self) -> u64 {
        self.regrouping.count
    }

    /// Why the job waits for ranks, while it does.
    #[must_use]
    pub fn regroups_because(&self) -> Option<&Cause> {
        self.regrouping.cause.as_ref().filter(|_| matches!(self.phase, Phase::Forming))
    }

    /// Whether ranks that train are to end at their next step.
    #[must_use]
    pub const fn is_stopping(&self) -> bool {
        self.stopping || self.draining
    }

    /// Whether the job has ended, well or not.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Finished | Phase::Aborted(_))
    }
}

impl Member {
    fn new(id: String, info: JoinInfo, progress: Progress, renewed: Instant) -> Self {
        Self { id, info, renewed, progress, loaded: false, trained: false, leaving: false }
    }
}
