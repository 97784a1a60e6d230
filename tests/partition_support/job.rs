//! A job on hosts of its own: the coordinator on one, a launcher with one rank on each of the others. Owns: starting it, breaking
//! its network, looking at it. Refuses to know: what must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use weightcast_test_net::{Host, Net, Weather};

use super::schedule::{Break, EVERY, STEPS};
use crate::support::{Ended, Job, MODEL, PATIENCE, Place, until};

/// Where the coordinator serves its figures, on its own host.
const FIGURES: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
/// How long ranks and coordinator wait for each other, in seconds: longer than any partition.
const REJOIN_SECONDS: &str = "120";

/// The figures of the coordinator, by name with labels.
pub(crate) type Figures = BTreeMap<String, f64>;

/// Whether this program's coordinator waits for ranks that it has lost.
pub(crate) fn rejoins() -> bool {
    static REJOINS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *REJOINS.get_or_init(|| Place::new().run(&["coordinator", "--help"]).stdout.contains("--rejoin-timeout"))
}

/// Hosts, and the processes of a job.
pub(crate) struct Cluster {
    pub(crate) place: Place,
    pub(crate) net: Net,
    coordinator_host: Host,
    nodes: Vec<Host>,
    coordinator: Option<Job>,
    launchers: Vec<Job>,
}

/// How all processes of a job have ended.
pub(crate) struct Outcome {
    pub(crate) coordinator: Ended,
    pub(crate) launchers: Vec<Ended>,
}

impl Outcome {
    /// The coordinator's exit code, then the launchers'.
    pub(crate) fn codes(&self) -> Vec<Option<i32>> {
        std::iter::once(&self.coordinator).chain(&self.launchers).map(|ended| ended.code).collect()
    }

    pub(crate) fn is_success(&self) -> bool {
        self.codes().iter().all(|code| *code == Some(0))
    }

    /// All that was said, for a person who looks at a failure.
    pub(crate) fn said(&self) -> String {
        let launchers = self.launchers.iter().enumerate().map(|(node, ended)| (format!("node {node}"), ended));
        let all = std::iter::once(("coordinator".to_owned(), &self.coordinator)).chain(launchers);
        all.map(|(who, ended)| format!("--- {who}, {:?}:\n{}", ended.code, ended.stderr)).collect()
    }
}

impl Cluster {
    pub(crate) fn new(seed: u64, world: u32) -> Self {
        let net = Net::new(seed).unwrap_or_else(|error| panic!("{error}"));
        let host = |name: &str| net.host(name).unwrap_or_else(|error| panic!("{error}"));
        let nodes = (0..world).map(|node| host(&format!("node{node}"))).collect();
        let coordinator_host = host("coordinator");
        let cluster =
            Self { place: Place::new(), net, coordinator_host, nodes, coordinator: None, launchers: Vec::new() };
        let root = cluster.root();
        let text = format!(
            r#"
            model.source = "{MODEL}"
            load.placement = "shard"
            checkpoint.directory = "{root}"
            [train]
            type = "qlora"
            steps = {STEPS}
            batch-size = 6
            seed = 11
            [train.data]
            train = "{}/tests/data/devils-dictionary.jsonl"
            sequence-length = 32
            [train.lora]
            r = 4
            dropout = 0.1
            [train.checkpoint]
            every-steps = {EVERY}
            every-minutes = 0
            keep-last = 100
            "#,
            env!("CARGO_MANIFEST_DIR")
        );
        std::fs::write(cluster.place.path("job.toml"), text).expect("it is written");
        cluster
    }

    /// The root of the job's checkpoints.
    pub(crate) fn root(&self) -> String {
        self.place.path("root")
    }

    /// Starts the job, or starts it again; some process stands still where `faults` says.
    pub(crate) fn start(&mut self, faults: &str) {
        let listen = format!("{}:29400", self.coordinator_host.address());
        let (state, job, figures) = (self.place.path("state"), self.place.path("job.toml"), FIGURES.to_string());
        let world = self.nodes.len().to_string();
        let mut arguments = vec!["coordinator", "--ranks", &world, "--listen", &listen, "--insecure"];
        arguments.extend(["--state-dir", &state, "--http-listen", &figures]);
        if rejoins() {
            arguments.extend(["--rejoin-timeout", REJOIN_SECONDS]);
        }
        arguments.push(&job);
        let mut coordinator = self.start_on(&self.coordinator_host, &arguments, faults);
        until("the coordinator listens", PATIENCE, || {
            let said = coordinator.said();
            assert!(!coordinator.is_over(), "{said}");
            said.contains("listens on")
        });
        self.coordinator = Some(coordinator);
        let token = self.place.path("state/token");
        let launch = |(node, host): (usize, &Host)| {
            let node = node.to_string();
            let arguments = ["launch", "--nnodes", &world, "--node-rank", &node, "--nproc-per-node", "1"];
            let job = ["--coordinator", "coordinator:29400", "--token-file", &token];
            self.start_on(host, &[&arguments[..], &job].concat(), faults)
        };
        self.launchers = self.nodes.iter().enumerate().map(launch).collect();
    }

    fn start_on(&self, host: &Host, arguments: &[&str], faults: &str) -> Job {
        let mut command = self.place.command(arguments);
        command.env("WEIGHTCAST_FAULTS", faults);
        self.place.start_command(host.adopt(command))
    }

    /// Breaks the network.
    pub(crate) fn break_network(&self, broken: Break) {
        let (first, coordinator) = (&self.nodes[0], &self.coordinator_host);
        let last = self.nodes.last().expect("two at least");
        match broken {
            Break::FirstNode => self.net.isolate(first),
            Break::LastNode => self.net.isolate(last),
            Break::Coordinator => self.net.isolate(coordinator),
            Break::Link => self.net.cut(first, last),
            Break::ToCoordinator => self.net.cut_one_way(last, coordinator),
            Break::FromCoordinator => self.net.cut_one_way(coordinator, last),
            Break::LinkOneWay => self.net.cut_one_way(first, last),
            Break::Weather => self.net.set_weather(Weather {
                delay: Duration::from_millis(150),
                jitter: Duration::from_millis(100),
                lost_per_mille: 50,
            }),
        }
    }

    /// Whether all processes have ended.
    pub(crate) fn is_over(&mut self) -> bool {
        self.coordinator.iter_mut().chain(&mut self.launchers).all(Job::is_over)
    }

    /// What all have said so far.
    pub(crate) fn said(&self) -> String {
        let all = self.coordinator.iter().chain(&self.launchers);
        all.map(|job| format!("--- process {}:\n{}", job.process(), job.said())).collect()
    }

    /// How all ended, after [`Self::is_over`].
    pub(crate) fn outcome(&mut self) -> Outcome {
        // They have ended.
        let limit = Duration::MAX;
        let coordinator = self.coordinator.take().expect("it was started").wait_within(limit);
        Outcome { coordinator, launchers: self.launchers.drain(..).map(|job| job.wait_within(limit)).collect() }
    }

    /// The coordinator's figures; nothing when it does not answer.
    pub(crate) fn figures(&self) -> Option<Figures> {
        let limit = Duration::from_secs(1);
        let mut stream = self.coordinator_host.connect(FIGURES, limit).ok()?;
        stream.set_read_timeout(Some(limit)).ok()?;
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {FIGURES}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let figures: Figures = text
            .lines()
            .filter(|line| line.starts_with("weightcast_"))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect();
        (!figures.is_empty()).then_some(figures)
    }

    /// Steps that are committed.
    pub(crate) fn steps(&self) -> BTreeSet<u64> {
        let entries = std::fs::read_dir(self.root()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect()
    }

    /// The step that is about to be committed: its manifest is written, and its directory is not in its place.
    pub(crate) fn sealed(&self) -> Option<u64> {
        let drafts = std::fs::read_dir(format!("{}/.tmp", self.root())).into_iter().flatten().flatten();
        let sealed = drafts.filter(|draft| draft.path().join("manifest.json").exists());
        let names = sealed.map(|draft| draft.file_name().to_string_lossy().into_owned());
        names.filter_map(|name| name.strip_prefix("step-")?.split('.').next()?.parse().ok()).max()
    }
}

/// A figure without labels, or with these.
pub(crate) fn figure(figures: &Figures, name: &str) -> Option<f64> {
    figures.get(name).copied()
}

/// What the job is doing, in a word.
pub(crate) fn phase(figures: &Figures) -> &str {
    let is_it = |(name, value): (&String, &f64)| name.starts_with("weightcast_job_phase{") && *value > 0.5;
    let found = figures.iter().find(|(name, value)| is_it((name, value)));
    found.and_then(|(name, _)| name.split('"').nth(1)).unwrap_or("unknown")
}

/// How long ago the rank that was heard of longest ago was; nothing when one is missing.
pub(crate) fn oldest_lease(figures: &Figures, world: u32) -> Option<Duration> {
    let ages = (0..world).map(|rank| figure(figures, &format!("weightcast_rank_lease_age_seconds{{rank=\"{rank}\"}}")));
    let ages: Option<Vec<f64>> = ages.collect();
    Some(Duration::from_secs_f64(ages?.into_iter().fold(0.0, f64::max)))
}
