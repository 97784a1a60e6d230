//! What `weightcast k8s render` prints, carried out: a stand-in for JobSet's controller, the Job controller and the kubelet runs the
//! pods as processes on loopback and follows the policies that stand in the manifest.
//!
//! Every pod has an address of its own below 127.20, in the place of its name; volumes are directories, in the place of their
//! mount paths. Probes are not asked: a coordinator is ready when it says that it listens.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use support::{Job, Place, signal};
use weightcast::k8s::parse;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Debug builds compute slowly, and tests share the processors.
const LONG: Duration = Duration::from_secs(120);
/// A loop of a controller.
const TICK: Duration = Duration::from_millis(5);

/// A pod that runs or ran.
struct Pod {
    job: Job,
    /// Whether it was evicted: its condition is `DisruptionTarget` then.
    evicted: bool,
    asked_to_end: Option<Instant>,
}

/// How a set ended.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Succeeded,
    Failed(&'static str),
}

/// A cluster with one set.
struct Cluster {
    place: Place,
    /// The third byte of addresses: tests run beside each other.
    network: u8,
    set: Value,
    objects: Vec<Value>,
    coordinator: Option<Pod>,
    /// Whether the coordinator is done.
    is_completed: bool,
    /// How the coordinator's containers have ended.
    coordinator_codes: Vec<Option<i32>>,
    workers: BTreeMap<u32, Pod>,
    succeeded: BTreeSet<u32>,
    /// Exit codes of workers, in order, with their indices.
    codes: Vec<(u32, Option<i32>)>,
    /// Longest time from SIGTERM to the end.
    longest_end: Duration,
    restarts: i64,
    /// What pods that have ended said.
    said: String,
}

fn job_spec<'a>(set: &'a Value, name: &str) -> &'a Value {
    let jobs = set["spec"]["replicatedJobs"].as_array().expect("jobs");
    &jobs.iter().find(|job| job["name"] == name).expect(name)["template"]["spec"]
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("text: {value}"))
}

impl Cluster {
    /// Renders the job with this text on two nodes of two ranks, and applies it.
    fn apply(network: u8, job: &str, flags: &[&str]) -> Self {
        let place = Place::new();
        let (file, here) = (place.path("job.toml"), format!("/data={ROOT}/tests/data"));
        std::fs::write(&file, job).expect("it is written");
        let render = ["k8s", "render", &file, "--name", "wc", "--here", &here, "--nodes", "2", "--ranks-per-node", "2"];
        let ended = place.run(&[&render[..], &["--mount", "data=/data:ro"], flags].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let objects = parse(&ended.stdout, "stdout").expect("it is YAML");
        let set = objects.iter().find(|object| object["kind"] == "JobSet").expect("a set").clone();
        for directory in ["claims/wc-state", "claims/wc-checkpoints", "secrets/wc-token"] {
            std::fs::create_dir_all(place.path(directory)).expect("a directory");
        }
        std::fs::write(place.path("secrets/wc-token/token"), "a-token-of-the-test\n").expect("it is written");
        Self {
            place,
            network,
            set,
            objects,
            coordinator: None,
            is_completed: false,
            coordinator_codes: Vec::new(),
            workers: BTreeMap::new(),
            succeeded: BTreeSet::new(),
            codes: Vec::new(),
            longest_end: Duration::ZERO,
            restarts: 0,
            said: String::new(),
        }
    }

    fn address(&self, role: &str, index: u32) -> String {
        let last = if role == "coordinator" { 1 } else { 10 + index };
        format!("127.20.{}.{last}", self.network)
    }

    /// The directory of a volume for one pod.
    fn volume(&self, pod: &str, volume: &Value) -> String {
        if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
            return if claim == "data" {
                format!("{ROOT}/tests/data")
            } else {
                self.place.path(&format!("claims/{claim}"))
            };
        }
        if let Some(secret) = volume["secret"]["secretName"].as_str() {
            return self.place.path(&format!("secrets/{secret}"));
        }
        let directory = self.place.path(&format!("pods/{pod}/{}", text(&volume["name"])));
        std::fs::create_dir_all(&directory).expect("a directory");
        directory
    }

    /// Starts the container of a pod.
    fn start(&self, role: &str, index: u32) -> Pod {
        let pod = format!("wc-{role}-0-{index}");
        let spec = &job_spec(&self.set, role)["template"]["spec"];
        let container = &spec["containers"][0];
        let volumes = spec["volumes"].as_array().expect("volumes");
        let directory =
            |name: &Value| self.volume(&pod, volumes.iter().find(|volume| &volume["name"] == name).expect("a volume"));
        let mut mounts: Vec<(String, String)> = container["volumeMounts"]
            .as_array()
            .expect("mounts")
            .iter()
            .map(|mount| (text(&mount["mountPath"]).to_owned(), directory(&mount["name"])))
            .collect();
        // The longest path wins.
        mounts.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        let localized = |word: &str| {
            let (flag, value) = word.split_once('=').map_or(("", word), |(flag, value)| (flag, value));
            let found = mounts
                .iter()
                .find_map(|(path, directory)| Some(format!("{directory}{}", value.strip_prefix(path.as_str())?)));
            let value = self.resolved(&found.unwrap_or_else(|| value.to_owned()), role, index);
            if flag.is_empty() { value } else { format!("{flag}={value}") }
        };
        self.write_config_maps(volumes, &pod, &mounts);

        let mut variables = BTreeMap::from([("JOB_COMPLETION_INDEX".to_owned(), index.to_string())]);
        for variable in container["env"].as_array().expect("variables") {
            let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                Some("metadata.annotations['jobset.sigs.k8s.io/coordinator']") => "wc-coordinator-0-0.wc".to_owned(),
                Some("metadata.labels['jobset.sigs.k8s.io/jobset-name']") => "wc".to_owned(),
                Some("status.podIP") => self.address(role, index),
                Some(other) => panic!("the kubelet does not know {other}"),
                None => localized(text(&variable["value"])),
            };
            variables.insert(text(&variable["name"]).to_owned(), value);
        }
        let expanded = |arg: &Value| {
            let all = variables.iter();
            all.fold(text(arg).to_owned(), |arg, (name, value)| arg.replace(&format!("$({name})"), value))
        };
        let args = container["args"].as_array().expect("arguments").iter().map(expanded);
        let args: Vec<String> = args.map(|arg| localized(&arg)).collect();
        let mut command = self.place.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
        command.envs(variables);
        Pod { job: self.place.start_command(command), evicted: false, asked_to_end: None }
    }

    /// Names and addresses of pods, as this host has them.
    fn resolved(&self, value: &str, role: &str, index: u32) -> String {
        let mut value = value.replace("0.0.0.0", &self.address(role, index));
        for (role, index) in [("coordinator", 0), ("workers", 0), ("workers", 1)] {
            value = value.replace(&format!("wc-{role}-0-{index}.wc"), &self.address(role, index));
        }
        value
    }

    fn write_config_maps(&self, volumes: &[Value], pod: &str, mounts: &[(String, String)]) {
        for volume in volumes {
            let Some(name) = volume["configMap"]["name"].as_str() else { continue };
            let map =
                self.objects.iter().find(|object| object["kind"] == "ConfigMap" && object["metadata"]["name"] == name);
            for (file, content) in map.expect(name)["data"].as_object().expect("files") {
                // Paths of a job file stand in quotes.
                let words = text(content).split('"').map(|word| {
                    let found = mounts
                        .iter()
                        .find_map(|(path, directory)| Some((directory, word.strip_prefix(path.as_str())?)));
                    found.map_or_else(|| word.to_owned(), |(directory, rest)| format!("{directory}{rest}"))
                });
                let localized = words.collect::<Vec<_>>().join("\"");
                std::fs::write(format!("{}/{file}", self.volume(pod, volume)), localized).expect("it is written");
            }
        }
    }

    /// The set's controllers look once. `None` while it runs.
    fn step(&mut self) -> Option<Outcome> {
        std::thread::park_timeout(TICK);
        if self.coordinator.is_none() && !self.is_completed {
            self.coordinator = Some(self.start("coordinator", 0));
        }
        self.look_at_coordinator();
        let count =
            u32::try_from(job_spec(&self.set, "workers")["completions"].as_u64().expect("a number")).expect("small");
        let is_ready = self.coordinator.as_ref().is_some_and(|pod| pod.job.said().contains("listens on"));
        // dependsOn: the coordinator, ready. Afterwards its restarts are its own matter.
        if is_ready && self.workers.is_empty() && self.succeeded.is_empty() {
            self.workers = (0..count).map(|index| (index, self.start("workers", index))).collect();
        }
        let over: Vec<u32> =
            self.workers.iter_mut().filter_map(|(index, pod)| pod.job.is_over().then_some(*index)).collect();
        for index in over {
            let pod = self.workers.remove(&index).expect("just seen");
            let evicted = pod.evicted;
            let code = self.end(pod);
            self.codes.push((index, code));
            match self.verdict(code, evicted) {
                Verdict::Succeeded => drop(self.succeeded.insert(index)),
                Verdict::Replaced => drop(self.workers.insert(index, self.start("workers", index))),
                Verdict::JobFailed(reason) => return self.job_failed(reason),
            }
        }
        if self.succeeded.len() == usize::try_from(count).expect("small") {
            self.end_all();
            return Some(Outcome::Succeeded);
        }
        None
    }

    /// restartPolicy OnFailure: another container in the same pod, unless it is done.
    fn look_at_coordinator(&mut self) {
        if !self.coordinator.as_mut().is_some_and(|pod| pod.job.is_over()) {
            return;
        }
        let pod = self.coordinator.take().expect("just seen");
        let code = self.end(pod);
        self.coordinator_codes.push(code);
        assert!(self.coordinator_codes.len() < 60, "a crash loop: {:?}: {}", self.coordinator_codes, self.said);
        let policy = &job_spec(&self.set, "coordinator")["template"]["spec"]["restartPolicy"];
        assert_eq!(policy, "OnFailure");
        self.is_completed = code == Some(0);
    }

    /// podFailurePolicy, in its order, and then backoffLimit.
    fn verdict(&self, code: Option<i32>, evicted: bool) -> Verdict {
        if code == Some(0) {
            return Verdict::Succeeded;
        }
        let job = job_spec(&self.set, "workers");
        for rule in job["podFailurePolicy"]["rules"].as_array().expect("rules") {
            let on_condition = rule["onPodConditions"].as_array().is_some_and(|conditions| {
                evicted && conditions.iter().any(|condition| condition["type"] == "DisruptionTarget")
            });
            let codes = rule["onExitCodes"]["values"].as_array();
            let on_code = codes.is_some_and(|values| code.is_some_and(|code| values.contains(&code.into())));
            match text(&rule["action"]) {
                "Ignore" if on_condition => return Verdict::Replaced,
                "FailJob" if on_code => return Verdict::JobFailed("PodFailurePolicy"),
                _ => {}
            }
        }
        assert_eq!(job["backoffLimit"], 0);
        Verdict::JobFailed("BackoffLimitExceeded")
    }

    /// failurePolicy: the end, or all once more after all of before are gone (`BlockingRecreate`).
    fn job_failed(&mut self, reason: &'static str) -> Option<Outcome> {
        self.end_all();
        let policy = &self.set["spec"]["failurePolicy"];
        for rule in policy["rules"].as_array().expect("rules") {
            let reasons = rule["onJobFailureReasons"].as_array().expect("reasons");
            if reasons.contains(&reason.into()) && rule["action"] == "FailJobSet" {
                return Some(Outcome::Failed(reason));
            }
        }
        self.restarts += 1;
        if self.restarts > policy["maxRestarts"].as_i64().expect("a number") {
            return Some(Outcome::Failed("ReachedMaxRestarts"));
        }
        self.succeeded.clear();
        self.is_completed = false;
        None
    }

    /// Every pod gets SIGTERM, and SIGKILL when its grace is over.
    fn end_all(&mut self) {
        let mut all: Vec<(&'static str, Pod)> =
            std::mem::take(&mut self.workers).into_values().map(|pod| ("workers", pod)).collect();
        all.extend(self.coordinator.take().map(|pod| ("coordinator", pod)));
        for (_, pod) in &mut all {
            if !pod.job.is_over() {
                signal(pod.job.process(), Signal::TERM);
                pod.asked_to_end = Some(Instant::now());
            }
        }
        for (role, mut pod) in all {
            let grace = job_spec(&self.set, role)["template"]["spec"]["terminationGracePeriodSeconds"]
                .as_u64()
                .expect("a grace");
            let asked = pod.asked_to_end.unwrap_or_else(Instant::now);
            while !pod.job.is_over() {
                assert!(asked.elapsed() < Duration::from_secs(grace), "{role} would be killed: {}", pod.job.said());
                std::thread::park_timeout(TICK);
            }
            let code = self.end(pod);
            if role == "coordinator" {
                self.coordinator_codes.push(code);
            }
        }
    }

    fn end(&mut self, pod: Pod) -> Option<i32> {
        if let Some(asked) = pod.asked_to_end {
            self.longest_end = self.longest_end.max(asked.elapsed());
        }
        let ended = pod.job.wait_within(LONG);
        self.said.push_str(&ended.stderr);
        ended.code
    }

    /// A node is drained: its pod gets the condition `DisruptionTarget`, and SIGTERM.
    fn evict(&mut self, index: u32) {
        let pod = self.workers.get_mut(&index).expect("it runs");
        (pod.evicted, pod.asked_to_end) = (true, Some(Instant::now()));
        signal(pod.job.process(), Signal::TERM);
    }

    /// All pods are taken away at once, as when Kueue suspends the set, and come back at the next look.
    fn suspend(&mut self) {
        let indices: Vec<u32> = self.workers.keys().copied().collect();
        for pod in self.workers.values_mut().chain(self.coordinator.as_mut()) {
            (pod.evicted, pod.asked_to_end) = (true, Some(Instant::now()));
            signal(pod.job.process(), Signal::TERM);
        }
        for index in indices {
            let pod = self.workers.remove(&index).expect("it runs");
            let code = self.end(pod);
            self.codes.push((index, code));
        }
        if let Some(pod) = self.coordinator.take() {
            let code = self.end(pod);
            self.coordinator_codes.push(code);
        }
    }

    /// The names of the coordinator's journal.
    fn journal(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.place.path("claims/wc-state/coordinator")).expect("the journal");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Runs the set to its end; `act` is called between two looks.
    fn run(&mut self, mut act: impl FnMut(&mut Self)) -> Outcome {
        let started = Instant::now();
        loop {
            if let Some(outcome) = self.step() {
                self.place.expect_no_process();
                return outcome;
            }
            assert!(started.elapsed() < LONG, "it hangs; {:?} {:?}: {}", self.codes, self.coordinator_codes, self.said);
            act(self);
        }
    }

    /// The committed checkpoints, oldest first.
    fn checkpoints(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.place.path("claims/wc-checkpoints")).expect("the claim");
        let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("step-")).collect();
        names.sort();
        names
    }
}

enum Verdict {
    Succeeded,
    Replaced,
    JobFailed(&'static str),
}

const LOAD: &str = "[model]\nsource = \"/data/tiny-llama\"\n[load]\nplacement = \"shard\"\n[quantization]\nformat = \"nf4\"\n\
                    [checkpoint]\ndirectory = \"/checkpoints\"\nsave = true\n";

fn training(steps: u32) -> String {
    format!(
        "[model]\nsource = \"/data/tiny-llama\"\n[load]\nplacement = \"shard\"\n[checkpoint]\ndirectory = \"/checkpoints\"\n\
         [train]\ntype = \"qlora\"\nsteps = {steps}\nbatch-size = 4\n[train.lora]\nr = 4\n\
         [train.data]\ntrain = \"/data/devils-dictionary.jsonl\"\nsequence-length = 32\n\
         [train.checkpoint]\nevery-steps = 2\nkeep-last = 100\n"
    )
}

/// Two pods, four ranks, one checkpoint, no restart.
#[test]
fn a_rendered_job_runs_to_its_end() {
    let mut cluster = Cluster::apply(1, LOAD, &[]);
    let outcome = cluster.run(|_| {});
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 0), "{}", cluster.said);
    assert_eq!(cluster.codes.iter().map(|(_, code)| *code).collect::<Vec<_>>(), [Some(0); 2], "{}", cluster.said);
    assert_eq!(cluster.checkpoints(), ["step-000000000"]);
    let verified = cluster.place.run(&["checkpoint", "verify", "--deep", &cluster.place.path("claims/wc-checkpoints")]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

/// A worker's program asks not to be started again, and a node without the devices that the job names: both end the set.
#[test]
fn codes_that_no_restart_helps_end_the_set() {
    let mut cluster = Cluster::apply(2, LOAD, &[]);
    let args = serde_json::json!(["launch", "--nnodes=1", "--nproc-per-node=2", "--no-python", "sh", "-c", "exit 93"]);
    cluster.set["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]["args"] = args;
    let outcome = cluster.run(|_| {});
    assert_eq!((outcome, cluster.restarts), (Outcome::Failed("PodFailurePolicy"), 0), "{}", cluster.said);
    assert_eq!(cluster.codes.first().expect("one ended").1, Some(93));

    let mut cluster = Cluster::apply(3, LOAD, &[]);
    let args =
        &mut cluster.set["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]["args"];
    for arg in args.as_array_mut().expect("arguments") {
        if arg == "--device=cpu" {
            *arg = "--device=cuda".into();
        }
    }
    let outcome = cluster.run(|_| {});
    assert_eq!(
        (outcome, cluster.restarts),
        (Outcome::Failed("PodFailurePolicy"), 0),
        "{:?} {}",
        cluster.codes,
        cluster.said
    );
    assert_eq!(cluster.codes.first().expect("one ended").1, Some(78));
}

/// A rank is killed while it trains: all start again, and go on from the last checkpoint.
#[test]
fn a_killed_rank_restarts_the_set_from_the_last_checkpoint() {
    let mut cluster = Cluster::apply(4, &training(12), &[]);
    let mut killed_after = Vec::new();
    let outcome = cluster.run(|cluster| {
        if killed_after.is_empty() && cluster.checkpoints().len() >= 2 {
            killed_after = cluster.checkpoints();
            let rank = cluster.place.rank_process(3).expect("rank 3");
            signal(rank, Signal::KILL);
        }
    });
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 1), "{:?} {}", cluster.codes, cluster.said);
    assert!(cluster.codes.iter().any(|(_, code)| *code == Some(137)), "{:?}", cluster.codes);
    expect_resumed(&cluster, &killed_after);
    assert_eq!(cluster.checkpoints().last().map(String::as_str), Some("step-000000012"));
}

/// A node is drained while the job trains: its pod writes a checkpoint with the others and ends with 75, another one comes in its
/// place, and the ranks of the other pod wait for it in their processes.
#[test]
fn an_evicted_worker_rejoins_alone() {
    let mut cluster = Cluster::apply(5, &training(12), &[]);
    let (mut drained_after, mut stayed) = (Vec::new(), Vec::new());
    let outcome = cluster.run(|cluster| {
        if drained_after.is_empty() && !cluster.checkpoints().is_empty() {
            drained_after = cluster.checkpoints();
            stayed = [0, 1].map(|rank| cluster.place.rank_process(rank).expect("a rank of the other pod")).to_vec();
            cluster.evict(1);
        }
        if cluster.codes.len() == 1 {
            for process in &stayed {
                let is_there = Path::new(&format!("/proc/{process}")).exists();
                assert!(is_there, "{process} ended: {}", cluster.said);
            }
        }
    });
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 0), "{:?} {}", cluster.codes, cluster.said);
    let [(index, code), rest @ ..] = cluster.codes.as_slice() else { panic!("nobody ended") };
    assert_eq!((*index, *code), (1, Some(75)), "{}", cluster.said);
    assert_eq!(rest.iter().map(|(_, code)| *code).collect::<Vec<_>>(), [Some(0); 2], "{}", cluster.said);
    assert!(cluster.longest_end < Duration::from_secs(21), "{:?}: the launcher's patience", cluster.longest_end);
    assert_eq!(cluster.coordinator_codes, [Some(0)]);
    expect_resumed(&cluster, &drained_after);
    assert_eq!(cluster.checkpoints().last().map(String::as_str), Some("step-000000012"));
}

/// The set is suspended, as Kueue does to make room: every pod gets SIGTERM, ends with 75 after a checkpoint, and is started again
/// later. Nobody counts it as a failure.
#[test]
fn a_suspended_set_goes_on_when_it_is_resumed() {
    let mut cluster = Cluster::apply(6, &training(12), &[]);
    let mut suspended_after = Vec::new();
    let outcome = cluster.run(|cluster| {
        if suspended_after.is_empty() && !cluster.checkpoints().is_empty() {
            suspended_after = cluster.checkpoints();
            cluster.suspend();
            assert!(cluster.codes.iter().all(|(_, code)| *code == Some(75)), "{:?} {}", cluster.codes, cluster.said);
            assert_eq!(cluster.codes.len(), 2);
            assert_eq!(cluster.coordinator_codes, [Some(75)], "{}", cluster.said);
            assert!(cluster.checkpoints().len() > suspended_after.len() || cluster.checkpoints() == suspended_after);
        }
    });
    assert_eq!((outcome, cluster.restarts), (Outcome::Succeeded, 0), "{:?} {}", cluster.codes, cluster.said);
    expect_resumed(&cluster, &suspended_after);
    assert_eq!(cluster.checkpoints().last().map(String::as_str), Some("step-000000012"));
}

/// The coordinator's container is killed 50 times while the job trains: it goes on from its journal each time, no rank is started
/// again, no generation is given out twice, and every step is there.
#[test]
fn a_coordinator_that_is_killed_fifty_times_loses_nothing() {
    let mut cluster = Cluster::apply(7, &training(120), &[]);
    let (mut kills, mut ready_since, mut ranks) = (0_u64, None::<Instant>, Vec::new());
    let outcome = cluster.run(|cluster| {
        if cluster.checkpoints().is_empty() || kills == 50 {
            return;
        }
        if ranks.is_empty() {
            ranks = [0, 1, 2, 3].map(|rank| cluster.place.rank_process(rank).expect("a rank")).to_vec();
        }
        let Some(pod) = cluster.coordinator.as_mut() else { return };
        if !pod.job.said().contains("listens on") {
            ready_since = None;
            return;
        }
        // At moments of all kinds: from at once to 70 ms after it serves.
        let since = *ready_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= Duration::from_millis(kills * 37 % 71) {
            signal(pod.job.process(), Signal::KILL);
            (kills, ready_since) = (kills + 1, None);
        }
    });
    assert_eq!((outcome, cluster.restarts, kills), (Outcome::Succeeded, 0, 50), "{:?} {}", cluster.codes, cluster.said);
    assert_eq!(cluster.codes.iter().map(|(_, code)| *code).collect::<Vec<_>>(), [Some(0); 2], "{}", cluster.said);
    assert_eq!(ranks.len(), 4);
    let generations: Vec<String> =
        cluster.journal().into_iter().filter(|name| name.starts_with("generation-")).collect();
    assert_eq!(generations, ["generation-000000001"]);
    let steps: Vec<String> = (1..=60).map(|step| format!("step-{:09}", step * 2)).collect();
    assert_eq!(cluster.checkpoints(), steps);
    let losses =
        std::fs::read_to_string(cluster.place.path("claims/wc-checkpoints/metrics/metrics.jsonl")).expect("metrics");
    let trained: Vec<u64> = losses
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
        .filter(|line| line.get("loss").is_some())
        .map(|line| line["step"].as_u64().expect("a step"))
        .collect();
    assert_eq!(trained, (1..=120).collect::<Vec<_>>(), "every step once");
}

/// The last job of the coordinator's journal went on from one of these checkpoints or a later one.
fn expect_resumed(cluster: &Cluster, least: &[String]) {
    let journal = cluster.place.path("claims/wc-state/coordinator");
    let entries = std::fs::read_dir(&journal).expect("the journal").map(|entry| entry.expect("an entry").path());
    let mut jobs: Vec<_> = entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("job-")))
        .collect();
    jobs.sort();
    assert!(jobs.len() >= 2, "{jobs:?}");
    let last: Value =
        serde_json::from_slice(&std::fs::read(jobs.last().expect("one")).expect("it is read")).expect("JSON");
    let step = last.pointer("/plan/train/resumed/step").and_then(Value::as_u64);
    let step = step.unwrap_or_else(|| panic!("it began anew: {}", last["plan"]["train"]["resumed"]));
    let least: u64 = least.last().expect("one").trim_start_matches("step-").parse().expect("a step");
    assert!(step >= least, "{step} after {least}");
}
