//! The transitions.

use super::{
    AfterLoad, Blame, Cause, Effect, Event, ExitPolicy, Formed, JoinInfo, Member, Membership, Phase, Progress, Refusal,
    Save, Settings,
};
use crate::clock::Instant;
use crate::manifest::ShardReceipt;
use crate::types::{Attempt, Generation, Rank, Step};

impl Membership {
    /// Applies one event. What the shell must do comes back; a refusal has changed nothing.
    ///
    /// # Errors
    /// [`Refusal`], to be told to whoever caused the event.
    pub fn apply(&mut self, now: Instant, event: Event) -> Result<Vec<Effect>, Refusal> {
        let mut effects = self.transit(now, event)?;
        effects.extend(self.settle(now));
        Ok(effects)
    }

    fn transit(&mut self, now: Instant, event: Event) -> Result<Vec<Effect>, Refusal> {
        match event {
            Event::Join(info) => self.join(now, info),
            Event::Renew { member, progress } => self.renew(now, &member, *progress),
            Event::GenerationDurable(generation) => Ok(self.open(generation)),
            Event::Loaded { member, generation } => self.loaded(&member, generation),
            Event::SaveBegun { attempt, directory } => Ok(self.save_begun(attempt, directory)),
            Event::Saved { member, generation, step, attempt, receipt } => {
                self.saved((&member, generation), (step, attempt), *receipt)
            }
            Event::Committed { directory } => Ok(self.committed(directory)),
            Event::ShellFailed { message, exit_code } => Ok(self.abort(Cause { rank: None, message, exit_code })),
            Event::Failed { member, generation, message, exit_code, blame } => {
                self.failed(now, (&member, generation), message, (exit_code, blame))
            }
            Event::ProcessEnded { rank, .. } if rank.0 >= self.settings.world.get() => {
                Err(Refusal::NoSuchRank { rank: rank.0, world: self.settings.world.get() })
            }
            Event::ProcessEnded { rank, process_id, returns, message, exit_code } => {
                let cause = Cause { rank: Some(rank), message: format!("rank {rank} {message}"), exit_code };
                Ok(self.process_ended(now, process_id, returns, cause))
            }
            Event::SnapshotTaken { member, generation, step, answers } => {
                self.snapshot_taken(&member, generation, (step, answers))
            }
            Event::Trained { member, generation } => self.trained(&member, generation),
            Event::SaveRequested { step, request } => self.save_requested(step, request),
            Event::SaveRequestSeen { member, request } => {
                self.current(&member)?;
                self.save_request = self.save_request.max(request);
                Ok(Vec::new())
            }
            Event::UnloadRequested(model) => self.unload_requested(model),
            Event::NextJob { after_load, resumed } => self.next_job(after_load, resumed),
            Event::StopRequested => self.stop_requested(),
            Event::DrainRequested { save, preempts } => self.drain_requested(save, preempts),
            Event::LeaveRequested { member, save } => self.leave_requested(now, &member, save),
            Event::JobRemade { after_load, resumed } => Ok(self.job_remade(after_load, resumed)),
            Event::Tick => Ok(self.tick(now)),
        }
    }

    pub(super) fn member(&self, rank: Rank) -> Option<&Member> {
        self.members.get(rank.index()).and_then(Option::as_ref)
    }

    fn join(&mut self, now: Instant, info: JoinInfo) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        let world = self.settings.world.get();
        if info.rank.0 >= world {
            return Err(Refusal::NoSuchRank { rank: info.rank.0, world });
        }
        if info.world != world {
            return Err(Refusal::OtherWorld { rank: info.rank.0, expected: world, found: info.world });
        }
        if let Some(holder) = self.member(info.rank) {
            if holder.info.request_id == info.request_id {
                return Ok(Vec::new());
            }
            let mut effects = self.supersede(now, &info)?;
            effects.extend(self.seat(now, info));
            return Ok(effects);
        }
        Ok(self.seat(now, info))
    }

    fn seat(&mut self, now: Instant, info: JoinInfo) -> Vec<Effect> {
        let id = format!("{}-{}", info.rank, self.next_member);
        self.next_member += 1;
        let progress = Progress { stage: "joining".to_owned(), ..Progress::default() };
        let index = info.rank.index();
        if let Some(place) = self.members.get_mut(index) {
            *place = Some(Member::new(id, info, progress, now));
        }
        self.open_if_complete()
    }

    /// All have joined, and there is a job for them.
    pub(super) fn open_if_complete(&mut self) -> Vec<Effect> {
        let is_complete = self.members.iter().all(Option::is_some) && !self.regrouping.is_remaking;
        if self.phase != Phase::Forming || !is_complete {
            return Vec::new();
        }
        self.phase = Phase::Opening;
        vec![self.persist_generation()]
    }

    fn open(&mut self, generation: Generation) -> Vec<Effect> {
        if self.phase == Phase::Opening {
            self.generation = generation;
            self.phase = Phase::Loading;
        }
        Vec::new()
    }

    fn renew(&mut self, now: Instant, member: &str, progress: Progress) -> Result<Vec<Effect>, Refusal> {
        let found = self.current(member)?;
        found.renewed = now;
        found.progress = progress;
        Ok(Vec::new())
    }

    fn loaded(&mut self, member: &str, generation: Generation) -> Result<Vec<Effect>, Refusal> {
        let place = self.of_generation(member, generation)?;
        (place.loaded, place.info.holds) = (true, generation);
        let all = self.members.iter().flatten().all(|member| member.loaded);
        if self.phase != Phase::Loading || !all {
            return Ok(Vec::new());
        }
        if self.settings.after_load.train {
            self.phase = Phase::Training;
            return Ok(self.go_on_training());
        }
        // A coordinator that was ended may have committed it before.
        match self.settings.after_load.save.filter(|_| self.last_checkpoint.is_none()) {
            Some(step) => {
                self.phase = Phase::Beginning { step };
                Ok(vec![Effect::BeginSave(step)])
            }
            None => Ok(self.work_done()),
        }
    }

    fn save_begun(&mut self, attempt: Attempt, directory: String) -> Vec<Effect> {
        if let Phase::Beginning { step } = self.phase {
            let save = Save { step, attempt, directory };
            self.phase = Phase::Saving { save, receipts: Vec::new() };
        }
        Vec::new()
    }

    fn saved(
        &mut self,
        (member, generation): (&str, Generation),
        (step, attempt): (Step, Attempt),
        receipt: ShardReceipt,
    ) -> Result<Vec<Effect>, Refusal> {
        let rank = self.of_generation(member, generation)?.info.rank;
        let world = self.settings.world.count();
        let Phase::Saving { save, receipts } = &mut self.phase else { return Ok(Vec::new()) };
        let repeated = receipts.iter().any(|known| known.rank == rank);
        if (save.step, save.attempt) != (step, attempt) || receipt.rank != rank || repeated {
            return Ok(Vec::new());
        }
        receipts.push(receipt);
        if receipts.len() < world {
            return Ok(Vec::new());
        }
        let (save, receipts) = (save.clone(), std::mem::take(receipts));
        self.phase = Phase::Committing { save: save.clone() };
        Ok(vec![Effect::Commit { save, receipts, generation }])
    }

    fn committed(&mut self, directory: String) -> Vec<Effect> {
        let Phase::Committing { save } = &self.phase else { return Vec::new() };
        self.last_checkpoint = Some((save.step, directory));
        self.let_leavers_go();
        if self.settings.after_load.train {
            self.phase = Phase::Training;
            return self.go_on_training();
        }
        self.work_done()
    }

    fn snapshot_taken(
        &mut self,
        member: &str,
        generation: Generation,
        (step, answers): (Step, u64),
    ) -> Result<Vec<Effect>, Refusal> {
        self.of_generation(member, generation)?;
        if self.save_answered.is_none_or(|(known, _)| known < answers) {
            self.save_answered = Some((answers, step));
        }
        // Said again after a restart of the coordinator, it may be on its way or be done already.
        let at_hand = match &self.phase {
            Phase::Beginning { step } => Some(*step),
            Phase::Saving { save, .. } | Phase::Committing { save } => Some(save.step),
            _ => None,
        };
        if at_hand != Some(step) && self.committed_step().is_none_or(|committed| committed < step) {
            self.next_snapshot = Some(step);
        }
        Ok(self.go_on_training())
    }

    fn trained(&mut self, member: &str, generation: Generation) -> Result<Vec<Effect>, Refusal> {
        self.of_generation(member, generation)?.trained = true;
        Ok(self.go_on_training())
    }

    /// What follows while ranks train and no checkpoint is being written: the next one, or the end.
    fn go_on_training(&mut self) -> Vec<Effect> {
        if self.phase != Phase::Training {
            return Vec::new();
        }
        if let Some(step) = self.next_snapshot.take() {
            self.phase = Phase::Beginning { step };
            return vec![Effect::BeginSave(step)];
        }
        if self.members.iter().flatten().all(|member| member.trained) {
            return self.work_done();
        }
        Vec::new()
    }

    /// The work asked for is done: save once more if a drain asks for it, then end, or hold and wait.
    fn work_done(&mut self) -> Vec<Effect> {
        let saved = self.settings.resumed || self.settings.after_load.train || self.last_checkpoint.is_some();
        if let Some(step) = self.save_before_end.take().filter(|_| !saved) {
            self.phase = Phase::Beginning { step };
            return vec![Effect::BeginSave(step)];
        }
        let ends = self.draining || self.settings.after_load.then == ExitPolicy::Exit;
        self.phase = if ends { Phase::Finished } else { Phase::Holding };
        Vec::new()
    }

    fn failed(
        &mut self,
        now: Instant,
        (member, generation): (&str, Generation),
        message: String,
        (exit_code, blame): (u8, Blame),
    ) -> Result<Vec<Effect>, Refusal> {
        let witness = self.of_generation(member, generation)?.info.rank;
        let words = format!("rank {witness}: {message}");
        Ok(match blame {
            Blame::Own => self.abort(Cause { rank: Some(witness), message: words, exit_code }),
            // A rank that lost a peer is a witness; the peer is the cause.
            Blame::Peer(peer) => {
                let message = format!("rank {peer} was lost (seen by rank {witness}: {message})");
                self.lose(now, Cause { rank: Some(peer), message, exit_code })
            }
            Blame::Unknown if self.settings.rejoin.is_some() => {
                self.lose(now, Cause { rank: None, message: words, exit_code })
            }
            Blame::Unknown => self.abort(Cause { rank: Some(witness), message: words, exit_code }),
        })
    }

    /// MS-3: the first cause stands.
    pub(super) fn abort(&mut self, cause: Cause) -> Vec<Effect> {
        if !self.is_over() {
            self.phase = Phase::Aborted(cause);
        }
        Vec::new()
    }

    fn save_requested(&mut self, step: Step, request: u64) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        if self.is_training() {
            // Ranks see the number and take a snapshot after the step that they are at; it comes as any other.
            self.save_request = self.save_request.max(request);
            return Ok(Vec::new());
        }
        if self.phase != Phase::Holding {
            return Err(Refusal::NotNow { phase: self.phase.name(), request: "save" });
        }
        // What the ranks hold has not changed since.
        if self.settings.resumed || self.last_checkpoint.is_some() {
            return Ok(Vec::new());
        }
        self.phase = Phase::Beginning { step };
        Ok(vec![Effect::BeginSave(step)])
    }

    fn unload_requested(&mut self, model: String) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        if self.phase != Phase::Holding {
            return Err(Refusal::NotNow { phase: self.phase.name(), request: "unload a model" });
        }
        self.unloaded.insert(model);
        Ok(Vec::new())
    }

    /// The ranks that hold begin the next job of the queue, in a generation of its own, so that nothing that is said of the job
    /// before can be taken for this one (MS-2).
    fn next_job(&mut self, after_load: AfterLoad, resumed: bool) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        if self.phase != Phase::Holding {
            return Err(Refusal::NotNow { phase: self.phase.name(), request: "begin another job" });
        }
        self.settings = Settings { after_load, resumed, ..self.settings };
        self.phase = Phase::Opening;
        (self.stopping, self.save_before_end, self.next_snapshot, self.last_checkpoint) = (false, None, None, None);
        (self.save_request, self.save_answered) = (0, None);
        self.unloaded.clear();
        for member in self.members.iter_mut().flatten() {
            (member.loaded, member.trained) = (false, false);
            member.progress.training = None;
        }
        Ok(vec![self.persist_generation()])
    }

    /// MS-1: announced by `open` after the shell has made it durable.
    fn persist_generation(&mut self) -> Effect {
        let members: Vec<_> =
            self.members.iter().flatten().map(|member| (member.id.clone(), member.info.clone())).collect();
        // Decided once for the generation: ranks that look later must not see anything else.
        let held = members.first().map_or(Generation::default(), |(_, info)| info.holds);
        self.keeps_base = held != Generation::default() && members.iter().all(|(_, info)| info.holds == held);
        Effect::PersistGeneration(Formed { generation: self.generation.next(), members, keeps_base: self.keeps_base })
    }

    fn stop_requested(&mut self) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        if !self.is_training() {
            return Err(Refusal::NotNow { phase: self.phase.name(), request: "stop training" });
        }
        self.stopping = true;
        Ok(Vec::new())
    }

    pub(super) fn drain_requested(&mut self, save: Option<Step>, preempts: bool) -> Result<Vec<Effect>, Refusal> {
        self.refuse_if_over()?;
        self.draining = true;
        self.preempted |= preempts;
        self.save_before_end = save;
        match self.phase {
            Phase::Holding => Ok(self.work_done()),
            // Without ranks there is nothing to end in an orderly way.
            Phase::Forming => {
                self.phase = Phase::Finished;
                Ok(Vec::new())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn tick(&mut self, now: Instant) -> Vec<Effect> {
        self.forgive_late_tick(now);
        if self.phase == Phase::Forming {
            if self.settings.rejoin.is_some() {
                self.vacate_silent(now);
            }
            if let Some(cause) = self.never_joined(now) {
                return self.abort(cause);
            }
        }
        match self.expired(now) {
            // Of all at once only after the time to come back.
            Some(cause) if self.settings.rejoin.is_some() && self.are_all_silent(now) => self.abort(cause),
            Some(cause) => self.lose(now, cause),
            None => Vec::new(),
        }
    }

    pub(super) fn refuse_if_over(&self) -> Result<(), Refusal> {
        match &self.phase {
            Phase::Aborted(cause) => Err(Refusal::Over { message: cause.message.clone() }),
            Phase::Finished => Err(Refusal::Over { message: "it is finished".to_owned() }),
            _ => Ok(()),
        }
    }

    pub(super) fn current(&mut self, member: &str) -> Result<&mut Member, Refusal> {
        let generation = self.generation.0;
        // Ids begin with the rank (`join`).
        let rank = member.split_once('-').and_then(|(rank, _)| rank.parse::<usize>().ok());
        rank.and_then(|rank| self.members.get_mut(rank)?.as_mut())
            .filter(|known| known.id == member)
            .ok_or_else(|| Refusal::Stale { member: member.to_owned(), generation })
    }

    /// MS-2.
    fn of_generation(&mut self, member: &str, generation: Generation) -> Result<&mut Member, Refusal> {
        if generation == self.generation {
            self.current(member)
        } else {
            Err(Refusal::Stale { member: member.to_owned(), generation: self.generation.0 })
        }
    }
}

impl Phase {
    /// The phase in a word.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Forming | Self::Opening => "forming",
            Self::Loading => "loading",
            Self::Training => "training",
            Self::Holding => "holding",
            Self::Beginning { .. } | Self::Saving { .. } | Self::Committing { .. } => "saving",
            Self::Finished => "finished",
            Self::Aborted(_) => "aborted",
        }
    }
}
