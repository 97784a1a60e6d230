//! Losing ranks and taking them back (`MS-4`), as a table of events with a clock that the test moves.

use std::time::Duration;

use super::*;
use crate::types::Rank;

const REJOIN: Duration = Duration::from_secs(60);
const TRAIN: AfterLoad = AfterLoad { save: None, train: true, then: ExitPolicy::Exit };
const HOLD: AfterLoad = AfterLoad { save: None, train: false, then: ExitPolicy::Hold };

struct Job {
    membership: Membership,
    now: Instant,
}

impl Job {
    fn new(world: u32, after_load: AfterLoad) -> Self {
        let now = crate::clock::now();
        let world = WorldSize::new(world).expect("not zero");
        let settings = Settings { world, after_load, join_deadline: REJOIN, resumed: false, rejoin: Some(REJOIN) };
        Self { membership: Membership::new(settings, Generation(7), now), now }
    }

    fn apply(&mut self, event: Event) -> Result<Vec<Effect>, Refusal> {
        self.membership.apply(self.now, event)
    }

    fn join_as(&mut self, rank: u32, request: &str, process_id: u32, holds: u64) -> Result<Vec<Effect>, Refusal> {
        let world = u32::try_from(self.membership.members().len()).expect("small");
        self.apply(Event::Join(JoinInfo {
            request_id: request.to_owned(),
            rank: Rank(rank),
            world,
            host: format!("host-{rank}"),
            process_id,
            data_address: format!("127.0.0.1:{rank}"),
            device: "cpu".to_owned(),
            nccl_version: String::new(),
            nccl_unique_id: Vec::new(),
            holds: Generation(holds),
        }))
    }

    fn id(&self, rank: usize) -> String {
        self.membership.members()[rank].as_ref().expect("joined").id.clone()
    }

    /// All ranks have joined and loaded in generation 8.
    fn working(world: u32, after_load: AfterLoad) -> Self {
        let mut job = Self::new(world, after_load);
        for rank in 0..world {
            job.join_as(rank, &format!("first-{rank}"), 100 + rank, 0).expect("free");
        }
        job.apply(Event::GenerationDurable(Generation(8))).expect("no refusal");
        for rank in 0..world {
            let member = job.id(rank as usize);
            job.apply(Event::Loaded { member, generation: Generation(8) }).expect("current");
        }
        job
    }

    fn renew(&mut self, rank: usize) -> Result<Vec<Effect>, Refusal> {
        let member = self.id(rank);
        self.apply(Event::Renew { member, progress: Box::default() })
    }

    /// Lets time pass in ticks while these ranks renew; the effects of it.
    fn pass(&mut self, time: Duration, renewing: &[usize]) -> Vec<Effect> {
        let (mut effects, end) = (Vec::new(), self.now + time);
        while self.now < end {
            self.now += TICK;
            for &rank in renewing {
                if self.membership.members()[rank].is_some() {
                    effects.extend(self.renew(rank).expect("current"));
                }
            }
            effects.extend(self.apply(Event::Tick).expect("no refusal"));
        }
        effects
    }

    fn leave(&mut self, rank: usize) -> Vec<Effect> {
        let member = self.id(rank);
        self.apply(Event::LeaveRequested { member, save: Some(Step(0)) }).expect("current")
    }

    /// Two ranks write a step, up to its commit.
    fn save(&mut self, step: u64, answers: u64) {
        let (member, generation, step) = (self.id(0), Generation(8), Step(step));
        let taken = Event::SnapshotTaken { member, generation, step, answers };
        assert!(matches!(self.apply(taken).expect("current")[..], [Effect::BeginSave(_)]));
        let directory = ".tmp/x".to_owned();
        self.apply(Event::SaveBegun { attempt: Attempt(1), directory }).expect("no refusal");
        for rank in 0..2 {
            let (chunks, nested_offsets) = (Vec::new(), Vec::new());
            let receipt = ShardReceipt { rank: Rank(rank), file: None, chunks, nested_offsets, training: None };
            let (member, attempt) = (self.id(rank as usize), Attempt(1));
            self.apply(Event::Saved { member, generation, step, attempt, receipt: Box::new(receipt) })
                .expect("current");
        }
    }

    fn phase(&self) -> &'static str {
        self.membership.phase().name()
    }
}

/// A rank falls silent: the others join again at once, it when it is back, and no number is used twice.
#[test]
fn ms_4_a_silent_rank_costs_a_generation_and_no_more() {
    let mut job = Job::working(2, TRAIN);
    let old = [job.id(0), job.id(1)];
    assert_eq!(job.phase(), "training");
    let effects = job.pass(LEASE + TICK, &[0]);
    assert!(matches!(effects[..], [Effect::RemakeJob { committed: false }]), "{effects:?}");
    assert_eq!((job.phase(), job.membership.regroups()), ("forming", 1));
    // Nothing of the generation before counts any more, not from the one that lives either.
    for member in old {
        let refusal = job.apply(Event::Trained { member: member.clone(), generation: Generation(8) });
        assert_eq!(refusal.expect_err("fenced"), Refusal::Stale { member, generation: 8 });
    }
    assert!(job.join_as(0, "again-0", 100, 8).expect("free").is_empty());
    assert!(job.join_as(1, "again-1", 101, 8).expect("free").is_empty(), "the job is not made anew yet");
    let effects = job.apply(Event::JobRemade { after_load: TRAIN, resumed: true }).expect("no refusal");
    let [Effect::PersistGeneration(formed)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(formed.generation, Generation(9));
    // Both are the processes of before, and hold what generation 8 loaded.
    assert!(formed.keeps_base);
    job.apply(Event::GenerationDurable(Generation(9))).expect("no refusal");
    assert_eq!((job.phase(), job.membership.generation()), ("loading", Generation(9)));
}

/// Another process in its place holds nothing, and all decide alike: everybody loads.
#[test]
fn a_rank_that_was_started_anew_makes_all_load() {
    let mut job = Job::working(2, HOLD);
    job.pass(LEASE + TICK, &[0]);
    job.apply(Event::JobRemade { after_load: HOLD, resumed: false }).expect("no refusal");
    job.join_as(0, "again-0", 100, 8).expect("free");
    let effects = job.join_as(1, "new-1", 555, 0).expect("free");
    assert!(matches!(&effects[..], [Effect::PersistGeneration(Formed { keeps_base: false, .. })]), "{effects:?}");
}

/// When nobody is heard, the coordinator is the one that is cut off: the ranks go on, and are there again.
#[test]
fn silence_of_all_is_waited_out() {
    let mut job = Job::working(2, TRAIN);
    assert!(job.pass(LEASE * 3, &[]).is_empty());
    assert_eq!(job.phase(), "training");
    for rank in 0..2 {
        job.renew(rank).expect("the lease is as good as before");
    }
    assert!(job.pass(LEASE * 3, &[0, 1]).is_empty());
    // But not for ever.
    job.pass(REJOIN + TICK, &[]);
    let Phase::Aborted(cause) = job.membership.phase() else { panic!("{:?}", job.membership.phase()) };
    assert_eq!((cause.rank, cause.exit_code), (Some(Rank(0)), 69));
}

/// A lost rank that does not come back ends the job, with what it was lost by.
#[test]
fn a_rank_that_stays_away_ends_the_job() {
    let mut job = Job::working(2, TRAIN);
    job.pass(LEASE + TICK, &[0]);
    job.apply(Event::JobRemade { after_load: TRAIN, resumed: true }).expect("no refusal");
    job.join_as(0, "again-0", 100, 8).expect("free");
    job.pass(REJOIN + TICK, &[0]);
    let Phase::Aborted(cause) = job.membership.phase() else { panic!("{:?}", job.membership.phase()) };
    assert!(cause.message.contains("ranks 1 have not joined within 60 s"), "{}", cause.message);
    assert!(cause.message.contains("rank 1 (process 101 on host-1) has been silent"), "{}", cause.message);
    assert_eq!(cause.exit_code, 69);
}

/// A process in the place of one that is gone: it waits for the lease to end, or is the same process, which begins anew.
#[test]
fn the_place_of_a_rank_is_taken_over_when_its_holder_is_gone() {
    let mut job = Job::working(2, TRAIN);
    let held = Refusal::RankHeld { rank: 1, process_id: 101, host: "host-1".to_owned() };
    assert_eq!(job.join_as(1, "new-1", 555, 0).expect_err("it lives"), held);
    assert_eq!(job.phase(), "training");
    let effects = job.join_as(1, "anew-1", 101, 8).expect("it says itself that it begins anew");
    assert!(matches!(effects[..], [Effect::RemakeJob { .. }]), "{effects:?}");
    assert_eq!((job.phase(), job.membership.members()[1].is_some()), ("forming", true));
    // While ranks join, one that falls silent only loses its place.
    job.join_as(0, "again-0", 100, 8).expect("free");
    assert!(job.pass(LEASE + TICK, &[0]).is_empty());
    assert!(job.membership.members()[1].is_none() && job.membership.members()[0].is_some());
}

/// What the shell is at is seen to its end: a checkpoint whose parts are all there is committed, and the job goes on from it.
#[test]
fn a_loss_waits_for_the_commit_at_hand() {
    let mut job = Job::working(2, TRAIN);
    let member = job.id(0);
    job.apply(Event::SnapshotTaken { member, generation: Generation(8), step: Step(4), answers: 0 }).expect("current");
    let (attempt, directory) = (Attempt(1), ".tmp/x".to_owned());
    assert!(job.pass(LEASE + TICK, &[0]).is_empty(), "the shell begins an attempt");
    let effects = job.apply(Event::SaveBegun { attempt, directory }).expect("no refusal");
    assert!(matches!(effects[..], [Effect::RemakeJob { committed: false }]), "{effects:?}");
    // It is of the generation before, and changes nothing.
    assert!(job.apply(Event::Committed { directory: "step-000000004".to_owned() }).expect("no refusal").is_empty());
    assert_eq!((job.phase(), job.membership.committed_step()), ("forming", None));
}

/// One rank is asked to end: a checkpoint first, then the others wait for it. All are asked: the job ends as preempted.
#[test]
fn ranks_that_leave_have_saved() {
    let mut job = Job::working(2, TRAIN);
    assert!(job.leave(1).is_empty());
    let request = job.membership.save_request();
    assert!(request > 0);
    job.save(4, request);
    assert_eq!(job.phase(), "saving");
    let effects = job.apply(Event::Committed { directory: "step-000000004".to_owned() }).expect("no refusal");
    assert!(matches!(effects[..], [Effect::RemakeJob { committed: true }]), "{effects:?}");
    assert_eq!((job.phase(), job.membership.is_preempted()), ("forming", false));

    // Also when the checkpoint that the first one asked for is committed only then.
    let mut job = Job::working(2, TRAIN);
    job.leave(1);
    let request = job.membership.save_request();
    job.save(4, request);
    job.leave(0);
    let effects = job.apply(Event::Committed { directory: "step-000000004".to_owned() }).expect("no refusal");
    assert!(effects.is_empty(), "{effects:?}");
    assert!(job.membership.is_preempted() && job.membership.is_stopping());
    assert_eq!((job.phase(), job.membership.regroups()), ("training", 0));
}

/// A rank that failed by itself ends the job as ever, also while others are waited for; one that its launcher starts again, or that
/// was asked to end, does not.
#[test]
fn who_fails_by_itself_is_not_waited_for() {
    let ended = |process_id, returns, exit_code| Event::ProcessEnded {
        rank: Rank(1),
        process_id,
        returns,
        message: "exited".to_owned(),
        exit_code,
    };
    let mut job = Job::working(2, TRAIN);
    assert!(job.apply(ended(101, false, 75)).expect("no refusal").len() == 1 && job.phase() == "forming");
    let mut job = Job::working(2, TRAIN);
    assert!(job.apply(ended(101, true, 1)).expect("no refusal").len() == 1 && job.phase() == "forming");
    // The news of a process whose place another one has.
    let mut job = Job::working(2, TRAIN);
    assert!(job.apply(ended(99, true, 1)).expect("no refusal").is_empty() && job.phase() == "training");
    job.apply(ended(101, false, 137)).expect("no refusal");
    assert!(matches!(job.membership.phase(), Phase::Aborted(Cause { exit_code: 137, .. })));
    let mut job = Job::working(2, TRAIN);
    job.pass(LEASE + TICK, &[0]);
    job.apply(ended(101, false, 137)).expect("no refusal");
    assert!(matches!(job.membership.phase(), Phase::Aborted(Cause { exit_code: 137, .. })));
}
