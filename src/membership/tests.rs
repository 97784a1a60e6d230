//! The state machine as a table: events in, phase and effects out, with a clock that the test moves.

use std::time::Duration;

use super::*;
use crate::manifest::ShardReceipt;

struct Job {
    membership: Membership,
    now: Instant,
}

impl Job {
    fn new(world: u32, after_load: AfterLoad) -> Self {
        let now = crate::clock::now();
        let world = WorldSize::new(world).expect("not zero");
        let settings =
            Settings { world, after_load, join_deadline: Duration::from_secs(60), resumed: false, rejoin: None };
        Self { membership: Membership::new(settings, Generation(7), now), now }
    }

    fn apply(&mut self, event: Event) -> Result<Vec<Effect>, Refusal> {
        self.membership.apply(self.now, event)
    }

    fn join(&mut self, rank: u32) -> Result<Vec<Effect>, Refusal> {
        let world = u32::try_from(self.membership.members().len()).expect("small");
        self.apply(Event::Join(JoinInfo {
            request_id: format!("r{rank}"),
            rank: Rank(rank),
            world,
            host: "a".to_owned(),
            process_id: 100 + rank,
            data_address: format!("127.0.0.1:{rank}"),
            device: "cpu".to_owned(),
            nccl_version: String::new(),
            nccl_unique_id: Vec::new(),
            holds: Generation(0),
        }))
    }

    fn id(&self, rank: usize) -> String {
        self.membership.members()[rank].as_ref().expect("joined").id.clone()
    }

    /// Joins all ranks and opens generation 8.
    fn formed(world: u32, after_load: AfterLoad) -> Self {
        let mut job = Self::new(world, after_load);
        for rank in 0..world {
            let effects = job.join(rank).expect("free");
            assert_eq!(effects.is_empty(), rank + 1 < world);
        }
        // MS-1: not announced before it is durable.
        assert_eq!((job.membership.generation(), job.membership.phase().name()), (Generation(7), "forming"));
        job.apply(Event::GenerationDurable(Generation(8))).expect("no refusal");
        assert_eq!((job.membership.generation(), job.membership.phase()), (Generation(8), &Phase::Loading));
        job
    }

    fn loaded(&mut self, rank: usize) -> Result<Vec<Effect>, Refusal> {
        let member = self.id(rank);
        self.apply(Event::Loaded { member, generation: Generation(8) })
    }

    fn saved(&mut self, rank: u32) -> Result<Vec<Effect>, Refusal> {
        let member = self.id(rank as usize);
        let receipt = ShardReceipt {
            rank: Rank(rank),
            file: None,
            chunks: Vec::new(),
            nested_offsets: Vec::new(),
            training: None,
        };
        let (generation, step, attempt) = (Generation(8), Step(0), Attempt(3));
        self.apply(Event::Saved { member, generation, step, attempt, receipt: Box::new(receipt) })
    }
}

const SAVE_AND_EXIT: AfterLoad = AfterLoad { save: Some(Step(0)), train: false, then: ExitPolicy::Exit };
const HOLD: AfterLoad = AfterLoad { save: None, train: false, then: ExitPolicy::Hold };

#[test]
fn a_job_forms_loads_saves_and_finishes() {
    let mut job = Job::formed(2, SAVE_AND_EXIT);
    assert!(job.loaded(0).expect("current").is_empty());
    assert!(matches!(job.loaded(1).expect("current")[..], [Effect::BeginSave(Step(0))]));
    job.apply(Event::SaveBegun { attempt: Attempt(3), directory: ".tmp/x".to_owned() }).expect("no refusal");
    assert!(job.saved(0).expect("current").is_empty());
    assert!(job.saved(0).expect("a repeated receipt is the same receipt").is_empty());
    let effects = job.saved(1).expect("current");
    assert!(
        matches!(&effects[..], [Effect::Commit { receipts, generation: Generation(8), .. }] if receipts.len() == 2)
    );
    job.apply(Event::Committed { directory: "step-000000000".to_owned() }).expect("no refusal");
    assert_eq!(job.membership.phase(), &Phase::Finished);
    assert_eq!(job.membership.last_checkpoint(), Some("step-000000000"));
}

#[test]
fn joins_are_refused_with_the_reason() {
    let mut job = Job::new(2, HOLD);
    job.join(0).expect("free");
    assert!(job.join(0).expect("the same request repeated").is_empty());
    let mut other = JoinInfo {
        request_id: "other".to_owned(),
        rank: Rank(0),
        world: 2,
        host: "b".to_owned(),
        process_id: 1,
        data_address: String::new(),
        device: String::new(),
        nccl_version: String::new(),
        nccl_unique_id: Vec::new(),
        holds: Generation(0),
    };
    let taken = Refusal::RankTaken { rank: 0, process_id: 100, host: "a".to_owned() };
    assert_eq!(job.apply(Event::Join(other.clone())).expect_err("taken"), taken);
    other.rank = Rank(5);
    assert_eq!(job.apply(Event::Join(other.clone())).expect_err("none"), Refusal::NoSuchRank { rank: 5, world: 2 });
    (other.rank, other.world) = (Rank(1), 3);
    let refusal = job.apply(Event::Join(other)).expect_err("another world");
    assert_eq!(refusal, Refusal::OtherWorld { rank: 1, expected: 2, found: 3 });
}

/// MS-2: another generation and an unknown member change nothing.
#[test]
fn ms_2_stale_messages_are_fenced() {
    let mut job = Job::formed(1, HOLD);
    let member = job.id(0);
    let stale = job.apply(Event::Loaded { member, generation: Generation(7) });
    assert!(matches!(stale, Err(Refusal::Stale { .. })));
    assert!(matches!(
        job.apply(Event::Renew { member: "9-9".to_owned(), progress: Box::default() }),
        Err(Refusal::Stale { .. })
    ));
    assert_eq!(job.membership.phase(), &Phase::Loading);
}

#[test]
fn a_silent_rank_is_named_within_three_and_a_half_seconds() {
    let mut job = Job::formed(2, HOLD);
    let alive = job.id(0);
    let start = job.now;
    while !job.membership.is_over() {
        job.now += TICK;
        if job.now.duration_since(start).as_millis().is_multiple_of(500) {
            job.apply(Event::Renew { member: alive.clone(), progress: Box::default() }).expect("current");
        }
        job.apply(Event::Tick).expect("no refusal");
        assert!(job.now.duration_since(start) <= Duration::from_millis(3500));
    }
    let Phase::Aborted(cause) = job.membership.phase() else { unreachable!("the loop ended by an abort") };
    assert_eq!((cause.rank, cause.exit_code), (Some(Rank(1)), 69));
}

/// A coordinator that was itself held up for ten seconds accuses nobody: renewals may be waiting in its queue.
#[test]
fn a_late_tick_is_no_evidence() {
    let mut job = Job::formed(2, HOLD);
    job.apply(Event::Tick).expect("no refusal");
    job.now += Duration::from_secs(10);
    job.apply(Event::Tick).expect("no refusal");
    assert!(!job.membership.is_over());
}

/// MS-3: the first cause stands, and a witness is not the culprit.
#[test]
fn ms_3_the_first_cause_stands() {
    let mut job = Job::formed(2, HOLD);
    let witness = job.id(0);
    let failed = Event::Failed {
        member: witness,
        generation: Generation(8),
        message: "connection reset".to_owned(),
        exit_code: 69,
        blame: Blame::Peer(Rank(1)),
    };
    job.apply(failed).expect("current");
    job.apply(Event::ProcessEnded {
        rank: Rank(0),
        process_id: 0,
        returns: false,
        message: "exited".to_owned(),
        exit_code: 1,
    })
    .expect("no refusal");
    let Phase::Aborted(cause) = job.membership.phase() else { unreachable!("it failed") };
    assert_eq!(cause.rank, Some(Rank(1)));
    assert!(job.join(0).is_err());
}

#[test]
fn a_holding_job_saves_and_drains_on_request() {
    let mut job = Job::formed(1, HOLD);
    assert!(matches!(
        job.apply(Event::SaveRequested { step: Step(0), request: 1 }),
        Err(Refusal::NotNow { phase: "loading", .. })
    ));
    job.loaded(0).expect("current");
    assert_eq!(job.membership.phase(), &Phase::Holding);
    assert!(matches!(
        job.apply(Event::SaveRequested { step: Step(0), request: 1 }).expect("now")[..],
        [Effect::BeginSave(Step(0))]
    ));
    job.apply(Event::DrainRequested { save: None, preempts: false }).expect("accepted while saving");
    job.apply(Event::SaveBegun { attempt: Attempt(3), directory: String::new() }).expect("no refusal");
    job.saved(0).expect("current");
    job.apply(Event::Committed { directory: "d".to_owned() }).expect("no refusal");
    assert_eq!(job.membership.phase(), &Phase::Finished);
}

#[test]
fn ranks_that_never_join_are_named() {
    let mut job = Job::new(3, HOLD);
    job.join(1).expect("free");
    for _ in 0..700 {
        job.now += TICK;
        let member = job.id(1);
        job.apply(Event::Renew { member, progress: Box::default() }).expect("current");
        job.apply(Event::Tick).expect("no refusal");
    }
    let Phase::Aborted(cause) = job.membership.phase() else { unreachable!("70 s have passed") };
    assert!(cause.message.starts_with("ranks 0, 2 have not joined"), "{}", cause.message);
}

/// A drain in the middle of a load waits for it, saves, and ends; a second one changes nothing.
#[test]
fn a_drain_while_loading_saves_before_it_ends() {
    let mut job = Job::formed(1, HOLD);
    job.apply(Event::DrainRequested { save: Some(Step(0)), preempts: false }).expect("accepted");
    job.apply(Event::DrainRequested { save: Some(Step(0)), preempts: false }).expect("accepted");
    assert!(matches!(job.loaded(0).expect("current")[..], [Effect::BeginSave(Step(0))]));
    job.apply(Event::SaveBegun { attempt: Attempt(3), directory: String::new() }).expect("no refusal");
    job.saved(0).expect("current");
    job.apply(Event::Committed { directory: "d".to_owned() }).expect("no refusal");
    assert_eq!(job.membership.phase(), &Phase::Finished);
}

/// A coordinator that is started again knows the generation and its members; each says again what it has done.
#[test]
fn a_resumed_job_goes_on_with_its_members() {
    let mut first = Job::new(2, SAVE_AND_EXIT);
    first.join(0).expect("free");
    let effects = first.join(1).expect("free");
    let [Effect::PersistGeneration(formed)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(formed.generation, Generation(8));
    for (last_checkpoint, saves) in [(None, true), (Some((Step(0), "step-000000000".to_owned())), false)] {
        let mut second = Job::new(2, SAVE_AND_EXIT);
        second.membership = second.membership.resume(formed.clone(), last_checkpoint);
        assert_eq!((second.membership.generation(), second.membership.phase()), (Generation(8), &Phase::Loading));
        assert!(second.loaded(0).expect("still a member").is_empty());
        let effects = second.loaded(1).expect("still a member");
        assert_eq!(matches!(effects[..], [Effect::BeginSave(Step(0))]), saves);
        assert_eq!(second.membership.phase() == &Phase::Finished, !saves);
    }
}

#[test]
fn members_of_a_resumed_job_that_do_not_come_back_are_silent() {
    let mut first = Job::new(1, HOLD);
    let effects = first.join(0).expect("free");
    let [Effect::PersistGeneration(formed)] = &effects[..] else { panic!("{effects:?}") };
    let mut second = Job::new(1, HOLD);
    second.membership = second.membership.resume(formed.clone(), None);
    // Ticks as they come, so that the coordinator was not held up itself.
    for _ in 0..31 {
        second.now += TICK;
        second.apply(Event::Tick).expect("no refusal");
    }
    assert!(matches!(second.membership.phase(), Phase::Aborted(cause) if cause.rank == Some(Rank(0))));
}

const TRAIN: AfterLoad = AfterLoad { save: None, train: true, then: ExitPolicy::Exit };

impl Job {
    fn snapshot(&mut self, step: u64) -> Vec<Effect> {
        self.snapshot_for(step, 0)
    }

    fn snapshot_for(&mut self, step: u64, answers: u64) -> Vec<Effect> {
        let member = self.id(0);
        let event = Event::SnapshotTaken { member, generation: Generation(8), step: Step(step), answers };
        self.apply(event).expect("current")
    }

    fn trained(&mut self, rank: usize) {
        let member = self.id(rank);
        self.apply(Event::Trained { member, generation: Generation(8) }).expect("current");
    }

    fn commit(&mut self, step: u64) -> Vec<Effect> {
        self.apply(Event::SaveBegun { attempt: Attempt(3), directory: String::new() }).expect("no refusal");
        for rank in 0..self.membership.members().len() {
            let member = self.id(rank);
            let rank = Rank(u32::try_from(rank).expect("small"));
            let chunks = Vec::new();
            let receipt = ShardReceipt { rank, file: None, chunks, nested_offsets: Vec::new(), training: None };
            let (generation, step, attempt) = (Generation(8), Step(step), Attempt(3));
            let saved = Event::Saved { member, generation, step, attempt, receipt: Box::new(receipt) };
            self.apply(saved).expect("current");
        }
        assert!(matches!(self.membership.phase(), Phase::Committing { .. }), "{:?}", self.membership.phase());
        self.apply(Event::Committed { directory: format!("step-{step}") }).expect("no refusal")
    }
}

/// A checkpoint that is asked for while another is written follows it; one that is committed already is not begun again;
/// the job ends when all ranks have trained and nothing is being written.
#[test]
fn a_training_job_saves_in_turn_and_ends_when_all_have_trained() {
    let mut job = Job::formed(2, TRAIN);
    job.loaded(0).expect("current");
    assert!(!job.membership.is_training());
    job.loaded(1).expect("current");
    assert!(job.membership.is_training());
    assert!(matches!(job.snapshot(10)[..], [Effect::BeginSave(Step(10))]));
    assert!(job.snapshot(10).is_empty());
    assert!(job.snapshot(20).is_empty());
    assert!(matches!(job.commit(10)[..], [Effect::BeginSave(Step(20))]));
    assert_eq!(job.membership.committed_step(), Some(Step(10)));
    job.trained(0);
    job.trained(1);
    assert!(job.membership.is_training(), "the last checkpoint is still being written");
    assert!(job.commit(20).is_empty());
    assert_eq!(job.membership.phase(), &Phase::Finished);
}

/// A request while a checkpoint is written is for the step after; the snapshot that was on its way does not answer it.
#[test]
fn a_save_of_a_training_job_is_of_a_step_after_the_request() {
    let mut job = Job::formed(1, TRAIN);
    let ask = |request| Event::SaveRequested { step: Step(0), request };
    assert!(matches!(job.apply(ask(5)), Err(Refusal::NotNow { phase: "loading", .. })));
    job.loaded(0).expect("current");
    job.snapshot(10);
    assert!(job.apply(ask(6)).expect("accepted while a checkpoint is written").is_empty());
    assert!(job.apply(ask(4)).expect("accepted").is_empty(), "an older number changes nothing");
    assert_eq!(job.membership.save_request(), 6);
    job.snapshot(10);
    assert!(job.membership.save_answered().is_none_or(|(request, _)| request < 6));
    job.commit(10);
    assert!(matches!(job.snapshot_for(11, 6)[..], [Effect::BeginSave(Step(11))]));
    assert_eq!(job.membership.save_answered(), Some((6, Step(11))));
}

/// A drain of a training job waits for the run to stop by itself.
#[test]
fn a_drain_while_training_ends_with_the_training() {
    let mut job = Job::formed(1, TRAIN);
    job.loaded(0).expect("current");
    job.apply(Event::DrainRequested { save: Some(Step(0)), preempts: false }).expect("accepted");
    assert!(job.membership.is_training() && job.membership.is_draining());
    assert!(matches!(job.snapshot(7)[..], [Effect::BeginSave(Step(7))]));
    assert!(job.snapshot(7).is_empty());
    job.trained(0);
    assert!(job.commit(7).is_empty());
    assert_eq!(job.membership.phase(), &Phase::Finished);
    let mut again = Job::formed(1, TRAIN);
    again.loaded(0).expect("current");
    assert!(matches!(again.snapshot(7)[..], [Effect::BeginSave(Step(7))]));
    again.commit(7);
    assert!(again.snapshot(7).is_empty(), "it is committed");
}

const RESIDENT: AfterLoad = AfterLoad { save: None, train: true, then: ExitPolicy::Hold };

/// A queue's next job is a generation of its own with the same members; what is said of the one before is refused (MS-2).
#[test]
fn the_next_job_fences_the_one_before() {
    let mut job = Job::formed(2, RESIDENT);
    let next = || Event::NextJob { after_load: RESIDENT, resumed: false };
    assert!(matches!(job.apply(next()), Err(Refusal::NotNow { phase: "loading", .. })));
    for rank in 0..2 {
        job.loaded(rank).expect("a member");
    }
    assert!(matches!(job.apply(next()), Err(Refusal::NotNow { phase: "training", .. })));
    let trained = |job: &Job, rank: usize, generation| Event::Trained {
        member: job.id(rank),
        generation: Generation(generation),
    };
    for rank in 0..2 {
        let event = trained(&job, rank, 8);
        job.apply(event).expect("a member");
    }
    assert_eq!(job.membership.phase(), &Phase::Holding);
    let effects = job.apply(next()).expect("it holds");
    let [Effect::PersistGeneration(formed)] = effects.as_slice() else { panic!("{effects:?}") };
    assert_eq!((formed.generation, formed.members.len()), (Generation(9), 2));
    // MS-1: the number counts when it is durable.
    assert_eq!(job.membership.generation(), Generation(8));
    job.apply(Event::GenerationDurable(Generation(9))).expect("no refusal");
    assert_eq!((job.membership.generation(), job.membership.phase()), (Generation(9), &Phase::Loading));
    assert!(matches!(job.loaded(0), Err(Refusal::Stale { .. })));
    let late = trained(&job, 0, 8);
    assert!(matches!(job.apply(late), Err(Refusal::Stale { .. })));
    assert_eq!(job.membership.phase(), &Phase::Loading);
}

/// A stop ends the job that trains, and not the ranks; the next job knows nothing of it.
#[test]
fn a_stop_leaves_the_ranks() {
    let mut job = Job::formed(1, RESIDENT);
    assert!(matches!(job.apply(Event::StopRequested), Err(Refusal::NotNow { .. })));
    job.loaded(0).expect("a member");
    job.apply(Event::StopRequested).expect("it trains");
    assert!(job.membership.is_stopping() && !job.membership.is_draining());
    let trained = Event::Trained { member: job.id(0), generation: Generation(8) };
    job.apply(trained).expect("a member");
    assert_eq!(job.membership.phase(), &Phase::Holding);
    assert!(!job.membership.is_training());
    job.apply(Event::NextJob { after_load: RESIDENT, resumed: false }).expect("it holds");
    assert!(!job.membership.is_stopping());
}
