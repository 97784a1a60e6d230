//! Partitions of the network while a job forms, loads, trains, saves and ends: hosts are network namespaces (`tests/net`), whose
//! packets the test drops and delays.
//!
//! A schedule follows from its seed. What must hold of each: nothing hangs and nothing is left behind; a job that goes on ends
//! with the bits of an undisturbed one, and one that does not ends with a documented code and goes on when it is started again;
//! nobody commits while the reports of a rank cannot arrive; generations are given out once, and never go backwards.
//!
//! A few short schedules run by default. `WEIGHTCAST_PARTITIONS=100` runs the seeds from 0 to 99, of all durations, and
//! prints a table; `WEIGHTCAST_PARTITION_SEED=N` runs the schedule of that seed alone.
#![cfg(debug_assertions)]
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

mod partition_support;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use partition_support::job::{Cluster, Outcome, figure, oldest_lease, phase, rejoins};
use partition_support::schedule::{EVERY, Moment, STEPS, Schedule};
use support::until;
use weightcast::checkpoint::{Depth, list, verify};
use weightcast::coordinator::GenerationRecord;
use weightcast::store::LocalStore;
use weightcast::types::{Fqn, TensorDigest};
use weightcast_test_net::is_wanted;

/// Durations of a partition in seconds; most are short, because a schedule takes as long.
const DURATIONS: [u64; 20] = [1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 10, 10, 10, 10, 60, 60, 60];
/// Those of the schedules that always run.
const SHORT_DURATIONS: [u64; 2] = [1, 3];
/// How many always run.
const SHORT_SCHEDULES: u64 = 8;
/// Schedules at the same time: most of the time they wait.
const AT_ONCE: usize = 4;
/// From healing until the job is formed.
const REFORMED_WITHIN: Duration = Duration::from_secs(5);
/// From the start to the moment of a schedule, and from healing to the end, of a debug build on busy processors, with the
/// longest wait of ranks and coordinator for each other (`REJOIN_SECONDS`).
const LONG: Duration = Duration::from_secs(180);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// Codes of docs/OPERATIONS.md that a partition may end processes with: a peer out of reach, or ended with all saved.
const CODES: [i32; 2] = [69, 75];
/// A rank that its launcher ended by force. Launchers that lose each other do so, and then tell the coordinator of a signal.
const KILLED: i32 = 137;

type Digests = BTreeMap<Fqn, TensorDigest>;

/// What a schedule showed.
#[derive(Debug)]
struct Seen {
    schedule: Schedule,
    has_finished: bool,
    /// From healing until all ranks renewed and the job was formed; nothing when it was over before.
    reformed: Option<Duration>,
    /// From healing until it worked.
    worked: Option<Duration>,
    generations: usize,
}

/// Waits until the job is at the schedule's moment.
fn reach(cluster: &mut Cluster, schedule: &Schedule) {
    let limit = Instant::now() + LONG;
    loop {
        let steps = cluster.steps();
        let last = steps.last().copied().unwrap_or(0);
        let figures = cluster.figures().unwrap_or_default();
        let joined = figure(&figures, "weightcast_job_ranks_joined");
        let committed = figure(&figures, "weightcast_checkpoint_committed_step");
        let has = |step: u64| last == step && committed == Some(f64::from(u32::try_from(step).expect("small")));
        let is_there = match schedule.moment {
            Moment::Forming => joined == Some(f64::from(schedule.world - 1)),
            Moment::Loading => phase(&figures) == "loading",
            Moment::Training => phase(&figures) == "training" && has(2 * EVERY),
            Moment::Saving => phase(&figures) == "saving" && has(EVERY),
            Moment::Committing => cluster.sealed().is_some(),
            Moment::Finishing => phase(&figures) == "saving" && has(STEPS - EVERY),
            Moment::Ending => last == STEPS,
        };
        if is_there {
            return;
        }
        assert!(!cluster.is_over(), "it ended before: {}", cluster.outcome().said());
        assert!(Instant::now() < limit, "it never was at that moment: {}", cluster.said());
        std::thread::park_timeout(LOOK);
    }
}

/// Keeps the network broken for as long as the schedule says. Nobody commits meanwhile.
fn hold_out(cluster: &Cluster, schedule: &Schedule, (before, allowed): (&BTreeSet<u64>, Option<u64>)) {
    let healed = Instant::now() + Duration::from_secs(schedule.seconds);
    loop {
        let left = healed.saturating_duration_since(Instant::now());
        let new: Vec<u64> = cluster.steps().difference(before).copied().collect();
        let is_allowed = new.iter().all(|step| allowed == Some(*step));
        assert!(
            is_allowed || !schedule.broken.silences_a_rank(),
            "steps {new:?} were committed without all ranks: {}",
            cluster.said()
        );
        if left.is_zero() {
            return;
        }
        std::thread::park_timeout(left.min(LOOK));
    }
}

/// Follows the job from healing to its end: when it was formed again, and when it worked again.
fn follow(cluster: &mut Cluster, world: u32) -> (Option<Duration>, Option<Duration>) {
    let healed = Instant::now();
    let (mut reformed, mut worked) = (None, None);
    while !cluster.is_over() {
        assert!(healed.elapsed() < LONG, "it hangs: {}", cluster.said());
        if worked.is_none()
            && let Some(figures) = cluster.figures()
        {
            let renewed = oldest_lease(&figures, world).is_some_and(|age| age < healed.elapsed());
            let phase = phase(&figures);
            if renewed && !["forming", "aborted", "unknown"].contains(&phase) {
                reformed.get_or_insert_with(|| healed.elapsed());
                worked = ["training", "saving", "finished"].contains(&phase).then(|| healed.elapsed());
            }
        }
        std::thread::park_timeout(LOOK);
    }
    (reformed, worked)
}

/// The digests of the last step, after every checkpoint has verified and no generation has gone backwards.
fn last_digests(cluster: &Cluster) -> Option<(u64, Digests)> {
    let store = LocalStore::new(cluster.root());
    let mut checkpoints: Vec<_> = list(&store).unwrap_or_default();
    checkpoints.sort_by_key(|listed| listed.directory.clone());
    let mut last_generation = None;
    let mut newest = None;
    for listed in checkpoints {
        let checkpoint = listed.checkpoint.unwrap_or_else(|error| panic!("{}: {error}", listed.directory));
        verify(&store, &checkpoint, Depth::Deep).unwrap_or_else(|error| panic!("{}: {error}", listed.directory));
        let manifest = &checkpoint.manifest;
        assert!(last_generation <= Some(manifest.generation), "{}: {last_generation:?} before", listed.directory);
        last_generation = Some(manifest.generation);
        let digests = manifest.tensors.iter().map(|tensor| (tensor.fqn.clone(), tensor.digest)).collect();
        newest = Some((manifest.step.0, digests));
    }
    newest
}

/// How many generations the journal has; each is whole and has its own number.
fn generations(cluster: &Cluster, world: u32) -> usize {
    let entries = std::fs::read_dir(cluster.place.path("state")).expect("a state directory").flatten();
    let mut count = 0;
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(number) = name.strip_prefix("generation-") else { continue };
        let bytes = std::fs::read(entry.path()).expect("a record");
        let record: GenerationRecord = serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(Ok(record.formed.generation.0), number.parse(), "{name}");
        let ranks: Vec<u32> = record.formed.members.iter().map(|(_, info)| info.rank.0).collect();
        assert_eq!(ranks, (0..world).collect::<Vec<_>>(), "{name}");
        count += 1;
    }
    count
}

/// The last step's digests of an undisturbed job on as many ranks.
fn undisturbed(world: u32) -> &'static Digests {
    static DIGESTS: [OnceLock<Digests>; 2] = [const { OnceLock::new() }; 2];
    DIGESTS[usize::try_from(world - 2).expect("two or three")].get_or_init(|| {
        let mut cluster = Cluster::new(0, world);
        let outcome = finish(&mut cluster);
        assert!(outcome.is_success(), "{}", outcome.said());
        let (step, digests) = last_digests(&cluster).expect("checkpoints");
        assert_eq!(step, STEPS);
        digests
    })
}

/// Starts the job and waits for its end.
fn finish(cluster: &mut Cluster) -> Outcome {
    cluster.start("");
    until("the job ends", LONG, || cluster.is_over());
    cluster.place.expect_no_process();
    cluster.outcome()
}

fn expect_undisturbed_bits(cluster: &Cluster, world: u32) {
    let (step, digests) = last_digests(cluster).expect("checkpoints");
    assert_eq!(step, STEPS);
    assert!(digests == *undisturbed(world), "other bits than an undisturbed job's");
}

#[expect(clippy::print_stderr, reason = "what a test saw, shown on request")]
fn run(schedule: Schedule) -> Seen {
    let mut cluster = Cluster::new(schedule.seed, schedule.world);
    let file = cluster.place.path("hold");
    std::fs::write(&file, "").expect("it is written");
    cluster.start(&schedule.hold(&file));
    reach(&mut cluster, &schedule);
    let (before, allowed) = (cluster.steps(), schedule.may_commit(cluster.sealed()));
    cluster.break_network(schedule.broken);
    std::fs::remove_file(&file).expect("it is there");
    hold_out(&cluster, &schedule, (&before, allowed));
    cluster.net.heal();
    let (reformed, worked) = follow(&mut cluster, schedule.world);
    let outcome = cluster.outcome();
    cluster.place.expect_no_process();
    let generations_before = generations(&cluster, schedule.world);
    let has_finished = outcome.is_success();
    if has_finished {
        assert!(reformed.is_none_or(|took| took < REFORMED_WITHIN), "{reformed:?}: {}", outcome.said());
        expect_undisturbed_bits(&cluster, schedule.world);
    } else {
        let may_be = |code| code == 0 || CODES.contains(&code) || (code == KILLED && !rejoins());
        let is_documented = |code: &Option<i32>| code.is_some_and(may_be);
        assert!(outcome.codes().iter().all(is_documented), "{}", outcome.said());
        // Ranks of a job that has ended may not have heard of it.
        let may_end = !rejoins() || schedule.moment == Moment::Ending;
        assert!(may_end, "the job did not go on: {}", outcome.said());
        let _ = last_digests(&cluster);
        let again = finish(&mut cluster);
        assert!(again.is_success(), "started again: {}", again.said());
        expect_undisturbed_bits(&cluster, schedule.world);
    }
    eprintln!("{schedule:?}: {:?}, formed after {reformed:?}, worked after {worked:?}", outcome.codes());
    Seen { schedule, has_finished, reformed, worked, generations: generations_before }
}

/// Runs schedules beside each other; what each that failed said.
fn run_all(schedules: &[Schedule]) -> (Vec<Seen>, Vec<String>) {
    let (next, seen) = (AtomicU64::new(0), Mutex::new((Vec::new(), Vec::new())));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(schedules.len()) {
            scope.spawn(|| {
                let take = || usize::try_from(next.fetch_add(1, Ordering::Relaxed)).expect("few");
                while let Some(schedule) = schedules.get(take()) {
                    let result = catch_unwind(AssertUnwindSafe(|| run(*schedule)));
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(one) => seen.0.push(one),
                        Err(reason) => {
                            let text = reason.downcast_ref::<String>().cloned();
                            let text = text.or_else(|| reason.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                            seen.1.push(format!("{schedule:?}: {}", text.unwrap_or_default()));
                        }
                    }
                }
            });
        }
    });
    seen.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Median and worst of durations, in words.
fn spread(mut all: Vec<Duration>) -> String {
    all.sort();
    let seconds = |duration: Option<&Duration>| duration.map_or(f64::NAN, Duration::as_secs_f64);
    format!("{:6.2} {:6.2}", seconds(all.get(all.len() / 2)), seconds(all.last()))
}

#[expect(clippy::print_stderr, reason = "what a test saw, shown on request")]
fn print_table(seen: &[Seen]) {
    eprintln!("seconds  moment      count  finished  code  generations  formed: median, worst  worked: median, worst");
    let keys: BTreeSet<(u64, Moment)> = seen.iter().map(|one| (one.schedule.seconds, one.schedule.moment)).collect();
    for (seconds, moment) in keys {
        let is_here = |one: &&Seen| (one.schedule.seconds, one.schedule.moment) == (seconds, moment);
        let here: Vec<&Seen> = seen.iter().filter(is_here).collect();
        let finished = here.iter().filter(|one| one.has_finished).count();
        let generations: usize = here.iter().map(|one| one.generations).sum();
        let reformed = spread(here.iter().filter_map(|one| one.reformed).collect());
        let worked = spread(here.iter().filter_map(|one| one.worked).collect());
        let (count, moment) = (here.len(), format!("{moment:?}"));
        let ended = count - finished;
        eprintln!(
            "{seconds:7}  {moment:10}  {count:5}  {finished:8}  {ended:4}  {generations:11}  {reformed:21}  {worked}"
        );
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

#[test]
fn a_partition_at_any_moment_costs_no_bit_and_nothing_hangs() {
    if !is_wanted() {
        return;
    }
    let schedules: Vec<Schedule> = match (variable("WEIGHTCAST_PARTITION_SEED"), variable("WEIGHTCAST_PARTITIONS")) {
        (Some(seed), _) => vec![Schedule::of(seed, &DURATIONS)],
        (None, Some(count)) => (0..count).map(|seed| Schedule::of(seed, &DURATIONS)).collect(),
        (None, None) => (0..SHORT_SCHEDULES).map(|seed| Schedule::of(seed, &SHORT_DURATIONS)).collect(),
    };
    let started = Instant::now();
    let (seen, failures) = run_all(&schedules);
    print_table(&seen);
    eprintln!("{} schedules in {:.0} s", schedules.len(), started.elapsed().as_secs_f64());
    assert!(failures.is_empty(), "{} of {} failed:\n{}", failures.len(), schedules.len(), failures.join("\n\n"));
}
