//! A cluster with one set: a stand-in for JobSet's controller, the Job controller and the kubelet. Owns: pods as processes, and the
//! policies of the manifest. Refuses to know: what a test does to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use weightcast::k8s::parse;

use crate::support::{Job, Place, signal};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Debug builds compute slowly, and tests share the processors.
const LONG: Duration = Duration::from_secs(120);
/// A loop of a controller.
const TICK: Duration = Duration::from_millis(5);

/// A pod that runs or ran.
pub(crate) struct Pod {
    pub(crate) job: Job,
    /// Whether it was evicted: its condition is `DisruptionTarget` then.
    pub(crate) evicted: bool,
    pub(crate) asked_to_end: Option<Instant>,
}

/// How a set ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Succeeded,
    Failed(&'static str),
}

/// A cluster with one set.
pub(crate) struct Cluster {
    pub(crate) place: Place,
    /// The third byte of addresses: tests run beside each other.
    pub(crate) network: u8,
    pub(crate) set: Value,
    pub(crate) objects: Vec<Value>,
    pub(crate) coordinator: Option<Pod>,
    /// Whether the coordinator is done.
    pub(crate) is_completed: bool,
    /// How the coordinator's containers have ended.
    pub(crate) coordinator_codes: Vec<Option<i32>>,
    pub(crate) workers: BTreeMap<u32, Pod>,
    pub(crate) succeeded: BTreeSet<u32>,
    /// Exit codes of workers, in order, with their indices.
    pub(crate) codes: Vec<(u32, Option<i32>)>,
    /// Longest time from SIGTERM to the end.
    pub(crate) longest_end: Duration,
    pub(crate) restarts: i64,
    /// What pods that have ended said.
    pub(crate) said: String,
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
    pub(crate) fn apply(network: u8, job: &str, flags: &[&str]) -> Self {
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
    pub(crate) fn evict(&mut self, index: u32) {
        let pod = self.workers.get_mut(&index).expect("it runs");
        (pod.evicted, pod.asked_to_end) = (true, Some(Instant::now()));
        signal(pod.job.process(), Signal::TERM);
    }

    /// All pods are taken away at once, as when Kueue suspends the set, and come back at the next look.
    pub(crate) fn suspend(&mut self) {
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
    pub(crate) fn journal(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.place.path("claims/wc-state/coordinator")).expect("the journal");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Runs the set to its end; `act` is called between two looks.
    pub(crate) fn run(&mut self, mut act: impl FnMut(&mut Self)) -> Outcome {
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
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.place.path("claims/wc-checkpoints")).expect("the claim");
        let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("step-")).collect();
        names.sort();
        names
    }
}

pub(crate) enum Verdict {
    Succeeded,
    Replaced,
    JobFailed(&'static str),
}
