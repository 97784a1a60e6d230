//! SIGKILL at every step of load, commit and training, of a rank, of the launcher, and of a coordinator that is started
//! again.
//!
//! A first run writes down the steps (`faults`, debug builds only); then each is a trial of its own. Afterwards no process
//! is left, what is listed as a checkpoint verifies to the last byte, the newest resumes with the digests of an undisturbed
//! load, and the cause is named.
#![cfg(debug_assertions)]
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use support::{Ended, Job, MODEL, PATIENCE, Place, until};
use weightcast::app::prepare_with;
use weightcast::checkpoint::{Depth, list, verify};
use weightcast::config::{JobConfig, ResumePolicy};
use weightcast::load::{LoadOptions, load, logical_digests};
use weightcast::store::LocalStore;
use weightcast::types::{Fqn, Rank, Step, TensorDigest, WorldSize};

/// Of a point that is visited often, so many visits are walked, evenly spread.
const VISITS: u64 = 16;
/// The same of a run that trains, whose trials are longer.
const TRAINING_VISITS: u64 = 2;
/// From the death of a rank to the end of its launcher.
const ENDED_WITHIN: Duration = Duration::from_secs(2);
/// Points that follow the clock and not the job.
const CLOCKED: [&str; 2] = ["coordinator.tick", "coordinator.renew"];

type Digests = BTreeMap<Fqn, TensorDigest>;

/// Who is killed, where, and at which visit.
#[derive(Clone, Debug)]
struct Fault {
    role: String,
    point: String,
    nth: u64,
}

/// The job of all trials, into a root that has step 0 already.
fn job_flags(root: &str) -> Vec<String> {
    let flags = ["--model", MODEL, "--quantize", "nf4", "--double", "--save", "--step", "1", "--resume", "never"];
    flags.into_iter().chain(["--checkpoint-dir", root]).map(str::to_owned).collect()
}

fn start(place: &Place, arguments: &[String], faults: &str) -> Job {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = place.command(&arguments);
    command.env("WEIGHTCAST_FAULTS", faults);
    place.start_command(command)
}

fn launch(place: &Place, faults: &str) -> Job {
    let mut arguments: Vec<String> = ["launch", "--nproc-per-node", "2"].map(str::to_owned).to_vec();
    arguments.extend(job_flags(&place.path("root")));
    start(place, &arguments, faults)
}

fn coordinator(place: &Place, faults: &str) -> Job {
    let mut arguments: Vec<String> = ["coordinator", "--ranks", "2", "--state-dir"].map(str::to_owned).to_vec();
    arguments.push(place.path("state"));
    arguments.extend(job_flags(&place.path("root")));
    start(place, &arguments, faults)
}

/// A place whose checkpoint root has step 0, committed by an undisturbed job.
fn place_with_step_0(template: &Path) -> Place {
    let place = Place::new();
    let copied = std::process::Command::new("cp").arg("-r").arg(template).arg(place.path("root")).status();
    assert!(copied.expect("cp exists").success());
    place
}

/// The steps that a run with this trace took, without those of the clock, thinned where a point is visited often.
fn steps(trace: &str, visits_of_point: u64, wanted: impl Fn(&str, &str) -> bool) -> Vec<Fault> {
    let mut visits: BTreeMap<(String, String), u64> = BTreeMap::new();
    for line in std::fs::read_to_string(trace).expect("a trace").lines() {
        let (role, point) = line.split_once(' ').expect("a role and a point");
        if wanted(role, point) && !CLOCKED.contains(&point) {
            *visits.entry((role.to_owned(), point.to_owned())).or_default() += 1;
        }
    }
    let mut faults = Vec::new();
    for ((role, point), count) in visits {
        let walked = count.min(visits_of_point);
        for index in 0..walked {
            let nth = if walked == 1 { 1 } else { 1 + index * (count - 1) / (walked - 1) };
            faults.push(Fault { role: role.clone(), point: point.clone(), nth });
        }
    }
    faults
}

/// What the newest checkpoint of the root gives to a single rank of this process.
fn resumed(root: &str) -> (Step, Digests) {
    let mut config = JobConfig::default();
    config.checkpoint.directory = Some(root.into());
    config.checkpoint.resume = ResumePolicy::Must;
    config.load.digests = true;
    let prepared = prepare_with(&config, WorldSize::ONE, None, &|_| {}).expect("a usable checkpoint");
    assert!(prepared.skipped.is_empty(), "{:?}", prepared.skipped);
    let files = LocalStore::new(&prepared.plan.root);
    let options = LoadOptions::on_host(Rank::ZERO, &files);
    let (_, report) = load(&prepared.plan, &options, None).expect("its bytes are whole");
    (prepared.step, logical_digests(&prepared.plan, &[report]).expect("asked for"))
}

/// All that must hold whatever was killed.
fn check_root(place: &Place, expected: &Digests, fault: &Fault) -> Step {
    let root = place.path("root");
    let store = LocalStore::new(&root);
    for listed in list(&store).expect("a root") {
        let checkpoint = listed.checkpoint.unwrap_or_else(|error| panic!("{fault:?}: {}: {error}", listed.directory));
        verify(&store, &checkpoint, Depth::Deep).unwrap_or_else(|error| panic!("{fault:?}: {error}"));
    }
    let (step, digests) = resumed(&root);
    assert!(digests == *expected, "{fault:?}: other digests");
    step
}

/// How long ago the fault struck, if it did.
fn since(stamp: &str) -> Option<Duration> {
    let struck: u64 = std::fs::read_to_string(stamp).ok()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    Some(now.saturating_sub(Duration::from_nanos(struck)))
}

/// What the trials of one walk showed.
#[derive(Debug, Default)]
struct Figures {
    trials: usize,
    not_reached: usize,
    committed: usize,
    slowest: Duration,
}

/// One walk at a time: each has all processors busy, and ranks that get none lose their leases.
static WALKING: Mutex<()> = Mutex::new(());

/// Walks the faults with as many trials at once as there are processors.
fn walk(faults: &[Fault], trial: impl Fn(&Fault) -> (Option<Duration>, Step) + Sync) -> Figures {
    let _alone = WALKING.lock().unwrap_or_else(PoisonError::into_inner);
    let (next, figures) = (AtomicUsize::new(0), Mutex::new(Figures::default()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (struck, step) = trial(fault);
                    let mut figures = figures.lock().unwrap_or_else(PoisonError::into_inner);
                    figures.trials += 1;
                    figures.not_reached += usize::from(struck.is_none());
                    figures.committed += usize::from(step > Step(0));
                    figures.slowest = figures.slowest.max(struck.unwrap_or_default());
                }
            });
        }
    });
    figures.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// An undisturbed run's trace, and the root with step 0 that all trials start from.
struct Template {
    place: Place,
    expected: Digests,
}

impl Template {
    fn new() -> Self {
        let place = Place::new();
        let flags = ["--model", MODEL, "--quantize", "nf4", "--double", "--save", "--checkpoint-dir"];
        let root = place.path("template");
        let ended = place.run(&[&["launch", "--nproc-per-node", "2"], &flags[..], &[&root]].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let expected = resumed(&root).1;
        Self { place, expected }
    }

    fn new_place(&self) -> Place {
        place_with_step_0(Path::new(&self.place.path("template")))
    }
}

fn directive(fault: &Fault, stamp: &str) -> String {
    format!("kill={}:{}:{}:{stamp}", fault.role, fault.point, fault.nth)
}

fn expect_named(ended: &Ended, fault: &Fault) {
    let Some(rank) = fault.role.strip_prefix("rank") else { return };
    assert_eq!(ended.code, Some(137), "{fault:?}: {}", ended.stderr);
    let cause = ended.stderr.lines().find(|line| line.starts_with("root cause: "));
    let is_named = |line: &str| line.contains(&format!("rank {rank} (")) && line.contains("was ended by signal 9");
    assert!(cause.is_some_and(is_named), "{fault:?}: {}", ended.stderr);
}

/// The launcher with its coordinator, and the ranks.
#[test]
fn killing_a_rank_or_the_launcher_at_any_step_loses_nothing() {
    let template = Template::new();
    let traced = template.new_place();
    let trace = traced.path("trace");
    let ended = launch(&traced, &format!("trace={trace}")).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let faults = steps(&trace, VISITS, |_, _| true);
    let figures = walk(&faults, |fault| {
        let place = template.new_place();
        let stamp = place.path("stamp");
        let ended = launch(&place, &directive(fault, &stamp)).wait();
        let struck = since(&stamp);
        place.expect_no_process();
        if let Some(took) = struck {
            assert!(took < ENDED_WITHIN, "{fault:?}: {took:?}");
            expect_named(&ended, fault);
        } else {
            assert_eq!(ended.code, Some(0), "{fault:?}: {}", ended.stderr);
        }
        (struck, check_root(&place, &template.expected, fault))
    });
    eprintln!("killed ranks and launchers: {figures:?}");
    assert!(figures.not_reached * 10 <= figures.trials, "{figures:?}");
    assert!(figures.committed > 0 && figures.committed < figures.trials, "{figures:?}");
}

/// A coordinator of its own is killed and started again: the job finishes as if nothing had happened.
#[test]
fn killing_the_coordinator_at_any_step_changes_nothing() {
    let template = Template::new();
    let traced = template.new_place();
    let trace = traced.path("trace");
    let mut undisturbed = coordinator(&traced, &format!("trace={trace}"));
    let address = address(&mut undisturbed).expect("nothing ends it");
    assert_eq!(ranks(&traced, &address).wait().code, Some(0));
    assert_eq!(undisturbed.wait().code, Some(0));
    let faults = steps(&trace, VISITS, |role, _| role == "coordinator");
    let figures = walk(&faults, |fault| coordinator_trial(&template, fault));
    eprintln!("killed coordinators: {figures:?}");
    assert!(figures.not_reached * 10 <= figures.trials, "{figures:?}");
    assert_eq!(figures.committed, figures.trials, "{figures:?}");
}

fn coordinator_trial(template: &Template, fault: &Fault) -> (Option<Duration>, Step) {
    let place = template.new_place();
    let stamp = place.path("stamp");
    let mut first = coordinator(&place, &directive(fault, &stamp));
    let mut second = None;
    let address = address(&mut first).unwrap_or_else(|| {
        let mut other = coordinator(&place, "");
        let address = address(&mut other).unwrap_or_else(|| panic!("{fault:?}: {}", other.said()));
        second = Some(other);
        address
    });
    let mut node = ranks(&place, &address);
    // Killed, and not when all was done and written down.
    let is_closed = || {
        let names = std::fs::read_dir(place.path("state")).expect("a state directory");
        names.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("closed-"))
    };
    until("ranks and coordinator end", PATIENCE, || {
        let is_over = first.is_over();
        if is_over && second.is_none() && since(&stamp).is_some() && !is_closed() {
            second = Some(coordinator(&place, ""));
        }
        is_over && node.is_over()
    });
    let (struck, first, ended) = (since(&stamp), first.wait(), node.wait());
    assert_eq!(ended.code, Some(0), "{fault:?}: {}", ended.stderr);
    assert_eq!(first.code.is_none(), struck.is_some(), "{fault:?}: {}", first.stderr);
    if let Some(second) = second {
        let ended = second.wait();
        assert_eq!(ended.code, Some(0), "{fault:?}: {}", ended.stderr);
    }
    place.expect_no_process();
    (struck, check_root(&place, &template.expected, fault))
}

fn ranks(place: &Place, address: &str) -> Job {
    let token = place.path("state/token");
    place.start(&["launch", "--nproc-per-node", "2", "--coordinator", address, "--token-file", &token])
}

/// The address that a coordinator says it listens on; nothing when it ended before.
fn address(coordinator: &mut Job) -> Option<String> {
    let mut found = None;
    until("the coordinator listens or ends", PATIENCE, || {
        let over = coordinator.is_over();
        let said = coordinator.said();
        found = said.lines().find_map(|line| Some(line.split_once("listens on ")?.1.trim().to_owned()));
        found.is_some() || over
    });
    found
}

/// The job file of a run that trains three steps on a few lines, saves each and evaluates the second.
fn training_job(place: &Place, directory: &str) -> String {
    let path = place.path(&format!("{directory}.toml"));
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
    let data = std::fs::read_to_string(data).expect("the project's data");
    let lines: Vec<&str> = data.lines().take(20).collect();
    std::fs::write(place.path("lines.jsonl"), lines.join("\n")).expect("a data file");
    let text = format!(
        r#"
        model.source = "{MODEL}"
        quantization = {{ format = "nf4" }}
        checkpoint.directory = "{directory}"
        [train]
        steps = 3
        batch-size = 4
        seed = 11
        [train.data]
        train = "lines.jsonl"
        sequence-length = 64
        evaluation-fraction = 0.1
        [train.lora]
        r = 2
        dropout = 0.1
        [train.evaluation]
        every-steps = 2
        [train.checkpoint]
        every-steps = 1
        every-minutes = 0
        keep-last = 0
        "#
    );
    std::fs::write(&path, text).expect("a job file");
    path
}

fn train(place: &Place, job: &str, faults: &str) -> Ended {
    start(place, &["launch", "--nproc-per-node", "2", job].map(str::to_owned), faults).wait_within(PATIENCE * 2)
}

/// The newest checkpoint's step and the digests in its manifest, after every checkpoint has verified.
fn trained(root: &str, fault: &str) -> (Step, Digests) {
    let store = LocalStore::new(root);
    let mut newest = (Step(0), Digests::new());
    for listed in list(&store).unwrap_or_default() {
        let checkpoint = listed.checkpoint.unwrap_or_else(|error| panic!("{fault}: {}: {error}", listed.directory));
        verify(&store, &checkpoint, Depth::Deep).unwrap_or_else(|error| panic!("{fault}: {error}"));
        let manifest = &checkpoint.manifest;
        if manifest.step > newest.0 {
            let digests = manifest.tensors.iter().map(|tensor| (tensor.fqn.clone(), tensor.digest)).collect();
            newest = (manifest.step, digests);
        }
    }
    newest
}

/// What is lost of a run is at most what came after its last commit, and the run that goes on ends with the same bits.
#[test]
fn killing_a_rank_or_the_launcher_at_any_step_of_training_changes_no_bit() {
    let traced = Place::new();
    let trace = traced.path("trace");
    let ended = train(&traced, &training_job(&traced, "root"), &format!("trace={trace}"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let (last, expected) = trained(&traced.path("root"), "undisturbed");
    assert_eq!(last, Step(3));
    // Joining and loading are walked above.
    let is_new =
        |point: &str| !["load.", "worker.join", "worker.connected"].iter().any(|known| point.starts_with(known));
    let faults = steps(&trace, TRAINING_VISITS, |_, point| is_new(point));
    assert!(faults.iter().any(|fault| fault.point == "train.evaluating"), "{faults:?}");
    let figures = walk(&faults, |fault| {
        let (place, what) = (Place::new(), format!("{fault:?}"));
        let (job, stamp) = (training_job(&place, "root"), place.path("stamp"));
        let ended = train(&place, &job, &directive(fault, &stamp));
        let struck = since(&stamp);
        place.expect_no_process();
        if let Some(took) = struck {
            assert!(took < ENDED_WITHIN, "{what}: {took:?}");
            expect_named(&ended, fault);
        } else {
            assert_eq!(ended.code, Some(0), "{what}: {}", ended.stderr);
        }
        let (left, _) = trained(&place.path("root"), &what);
        let again = train(&place, &job, "");
        assert_eq!(again.code, Some(0), "{what}: {}", again.stderr);
        let (step, digests) = trained(&place.path("root"), &what);
        assert!(step == last && digests == expected, "{what}: resumed after step {left}, other bits at step {step}");
        (struck, left)
    });
    eprintln!("killed while training: {figures:?}");
    assert!(figures.not_reached * 10 <= figures.trials, "{figures:?}");
    assert!(figures.committed > 0 && figures.committed < figures.trials, "{figures:?}");
}
