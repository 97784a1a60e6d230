//! Losing ranks and taking them back (`MS-4`): the job goes back to forming, all that live join again, and it goes on from what was
//! committed when the lost ones are there too.
//!
//! Owns: what a loss means, who may take the place of a rank, what becomes of ranks that are asked to leave.
//! Refuses to know: how a job is made anew from a checkpoint (the shell's [`Effect::RemakeJob`]).

use super::{AfterLoad, Cause, Effect, JoinInfo, Membership, Phase, Refusal, Settings};
use crate::clock::Instant;
use crate::error::Kind;
use crate::types::Step;

/// What a rank ends with that was asked to end.
const EXIT_PREEMPTED: u8 = 75;

/// How the job lost ranks and waits for them.
#[derive(Clone, Debug, Default)]
pub(super) struct Regrouping {
    /// How often it did.
    pub(super) count: u64,
    /// Why, the last time.
    pub(super) cause: Option<Cause>,
    /// A loss that waits for the shell to carry out what it is at.
    pending: Option<Cause>,
    /// The shell makes the job anew.
    pub(super) is_remaking: bool,
    /// The request for a checkpoint that ranks wait for before they leave.
    leave_after: Option<u64>,
}

impl Membership {
    /// A rank is lost. Without a time to come back the job ends; so does one that is ending anyway.
    pub(super) fn lose(&mut self, now: Instant, cause: Cause) -> Vec<Effect> {
        if self.settings.rejoin.is_none() || self.draining {
            return self.abort(cause);
        }
        match self.phase {
            // Its place is free already, or nobody waits for it.
            Phase::Forming | Phase::Finished | Phase::Aborted(_) => Vec::new(),
            // What the shell does now belongs to this generation and is seen to its end first.
            Phase::Opening | Phase::Beginning { .. } | Phase::Committing { .. } => {
                self.regrouping.pending.get_or_insert(cause);
                Vec::new()
            }
            Phase::Loading | Phase::Training | Phase::Holding | Phase::Saving { .. } => self.regroup(now, cause),
        }
    }

    /// Carries out a loss that had to wait, and lets ranks go that leave and have nothing to save.
    pub(super) fn settle(&mut self, now: Instant) -> Vec<Effect> {
        let may_leave = self.phase == Phase::Holding && self.settings.rejoin.is_some() && !self.draining;
        if may_leave && self.regrouping.pending.is_none() {
            self.regrouping.pending = self.leaver();
        }
        match self.regrouping.pending.take() {
            Some(cause) => self.lose(now, cause),
            None => Vec::new(),
        }
    }

    fn regroup(&mut self, now: Instant, cause: Cause) -> Vec<Effect> {
        let Some(rejoin) = self.settings.rejoin else { return self.abort(cause) };
        self.settings.join_deadline = rejoin;
        (self.phase, self.started) = (Phase::Forming, now);
        self.members.fill(None);
        (self.stopping, self.next_snapshot, self.save_answered) = (false, None, None);
        self.unloaded.clear();
        let count = self.regrouping.count + 1;
        self.regrouping = Regrouping { count, cause: Some(cause), is_remaking: true, ..Regrouping::default() };
        vec![Effect::RemakeJob { committed: self.last_checkpoint.is_some() }]
    }

    pub(super) fn job_remade(&mut self, after_load: AfterLoad, resumed: bool) -> Vec<Effect> {
        self.settings = Settings { after_load, resumed, ..self.settings };
        self.regrouping.is_remaking = false;
        self.open_if_complete()
    }

    /// Frees the place that `info` asks for, if its holder is gone: it is the same process, which has begun anew, or its lease
    /// has ended. Then the others join again too.
    pub(super) fn supersede(&mut self, now: Instant, info: &JoinInfo) -> Result<Vec<Effect>, Refusal> {
        let Some(holder) = self.member(info.rank) else { return Ok(Vec::new()) };
        let (rank, process_id, host) = (info.rank.0, holder.info.process_id, holder.info.host.clone());
        if self.settings.rejoin.is_none() {
            return Err(Refusal::RankTaken { rank, process_id, host });
        }
        let is_same = process_id == info.process_id && host == info.host;
        if !is_same && !self.is_silent(holder, now) {
            return Err(Refusal::RankHeld { rank, process_id, host });
        }
        let message = format!("rank {rank} (process {process_id} on {host}) has begun anew");
        let cause = Cause { rank: Some(info.rank), message, exit_code: Kind::Unavailable.exit_code() };
        let effects = self.lose(now, cause);
        if self.phase != Phase::Forming {
            return Err(Refusal::NotNow { phase: self.phase.name(), request: "take a rank back" });
        }
        self.vacate(info.rank.index());
        Ok(effects)
    }

    fn vacate(&mut self, index: usize) {
        if let Some(place) = self.members.get_mut(index) {
            *place = None;
        }
    }

    /// While ranks join, one that falls silent only loses its place.
    pub(super) fn vacate_silent(&mut self, now: Instant) {
        for index in 0..self.members.len() {
            let member = self.members.get(index).and_then(Option::as_ref);
            if member.is_some_and(|member| self.is_silent(member, now)) {
                self.vacate(index);
            }
        }
    }

    /// A launcher saw a rank end with failure. One that was asked to end, or that is started again, comes back; any other has
    /// failed by itself.
    pub(super) fn process_ended(&mut self, now: Instant, process_id: u32, returns: bool, cause: Cause) -> Vec<Effect> {
        let member = cause.rank.and_then(|rank| self.member(rank));
        let is_leaving = member.is_some_and(|member| member.leaving) || cause.exit_code == EXIT_PREEMPTED;
        if self.settings.rejoin.is_none() || !(returns || is_leaving) {
            return self.abort(cause);
        }
        // Of a process whose place another one has by now there is nothing to tell.
        match member {
            Some(member) if process_id == 0 || member.info.process_id == process_id => self.lose(now, cause),
            _ => Vec::new(),
        }
    }

    /// A rank is asked to end. The others wait for it or another one in its place, after a checkpoint if they train; when all are
    /// asked, the job ends.
    pub(super) fn leave_requested(
        &mut self,
        now: Instant,
        member: &str,
        save: Option<Step>,
    ) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        if self.settings.rejoin.is_none() {
            return self.drain_requested(save, true);
        }
        let leaver = self.current(member)?;
        leaver.leaving = true;
        let index = leaver.info.rank.index();
        if self.phase == Phase::Forming {
            self.vacate(index);
            return Ok(Vec::new());
        }
        if self.members.iter().flatten().all(|member| member.leaving) {
            return self.drain_requested(save, true);
        }
        if self.draining {
            return Ok(Vec::new());
        }
        if self.is_training() && save.is_some() {
            self.save_request += 1;
            self.regrouping.leave_after = Some(self.save_request);
            return Ok(Vec::new());
        }
        if matches!(self.phase, Phase::Saving { .. }) {
            self.regrouping.leave_after = Some(self.save_request);
            return Ok(Vec::new());
        }
        let cause = self.leaver();
        Ok(cause.map_or_else(Vec::new, |cause| self.lose(now, cause)))
    }

    /// After a commit: whether it is the one that ranks waited for before they leave.
    pub(super) fn let_leavers_go(&mut self) {
        let Some(request) = self.regrouping.leave_after.filter(|_| !self.draining) else { return };
        // What was only loaded does not change: any checkpoint has it.
        if !self.settings.after_load.train {
            self.regrouping.leave_after = None;
            self.regrouping.pending = self.leaver();
            return;
        }
        let answered = self.save_answered.filter(|(answered, _)| *answered >= request);
        if answered.is_some_and(|(_, step)| self.committed_step().is_some_and(|committed| committed >= step)) {
            self.regrouping.leave_after = None;
            self.regrouping.pending = self.leaver();
        }
    }

    /// A loss in the name of the first rank that was asked to leave.
    fn leaver(&self) -> Option<Cause> {
        let leaver = self.members.iter().flatten().find(|member| member.leaving)?;
        let (rank, process_id, host) = (leaver.info.rank, leaver.info.process_id, &leaver.info.host);
        let message = format!("rank {rank} (process {process_id} on {host}) was asked to end");
        Some(Cause { rank: Some(rank), message, exit_code: Kind::Unavailable.exit_code() })
    }
}
