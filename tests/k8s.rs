//! Manifests: what `weightcast k8s render` prints for several jobs, and that it says nothing that the program does not know.
//! Expected numbers are worked out by hand, or taken from `weightcast plan`.
#![expect(clippy::disallowed_methods, reason = "a test reads and writes its files")]

mod k8s_support;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use k8s_support::{ROOT, containers, everything, example, named, objects, of_kind, pods, rendered, texts};
use serde_json::Value;
use support::{Ended, MODEL, Place};
use weightcast::cli::Arguments;
use weightcast::error::Kind;
use weightcast::k8s::{GRPC_PORT, HEALTH_PORT, HTTP_PORT};
use weightcast_launcher::{EXIT_CONFIGURATION, EXIT_DO_NOT_RESTART, EXIT_PREEMPTED, EXIT_USAGE};

/// Renders a job file with this text, whose model is at /m.
fn render_text(place: &Place, text: &str, more: &[&str]) -> Ended {
    let (job, here) = (place.path("some-job.toml"), format!("/m={ROOT}/tests/data"));
    std::fs::write(&job, text).expect("it is written");
    place.run(&[&["k8s", "render", &job, "--here", &here], more].concat())
}

/// K8-2, flags: each command line of each container is one that the program takes.
#[test]
fn containers_run_commands_that_exist() {
    let place = Place::new();
    let objects = everything(&place);
    let mut seen = BTreeSet::new();
    for container in containers(&objects) {
        assert_eq!(texts(&container["command"]), ["weightcast"]);
        let args = texts(&container["args"]);
        seen.extend(args.first().copied());
        // A pod that has certificates is not told that it may go without.
        let has_tls = args.iter().any(|arg| arg.starts_with("--tls-cert="));
        assert_eq!(!has_tls && args[0] == "coordinator", args.contains(&"--insecure"), "{args:?}");
        let parsed = Arguments::try_parse_from(std::iter::once(&"weightcast").chain(&args));
        if let Err(error) = parsed {
            panic!("{args:?}: {error}");
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["coordinator", "launch"]);
}

/// All Rust source of the program and its launcher.
fn sources() -> String {
    fn walk(directory: &Path, text: &mut String) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                // What renders a name does not read it.
                if !path.ends_with("src/k8s") {
                    walk(&path, text);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&std::fs::read_to_string(&path).expect("a source file"));
            }
        }
    }
    let mut text = String::new();
    walk(&PathBuf::from(ROOT).join("src"), &mut text);
    walk(&PathBuf::from(ROOT).join("launcher/src"), &mut text);
    text
}

/// K8-2, variables, ports, probes and exit codes.
#[test]
fn what_pods_are_told_is_read() {
    let place = Place::new();
    let (objects, sources) = (everything(&place), sources());
    // Read by the standard library.
    let elsewhere = ["TMPDIR"];
    let mut variables = BTreeSet::new();
    for container in containers(&objects) {
        for variable in container["env"].as_array().expect("a list") {
            let name = variable["name"].as_str().expect("a name");
            assert!(elsewhere.contains(&name) || sources.contains(&format!("\"{name}\"")), "nobody reads {name}");
            variables.insert(name.to_owned());
        }
        for arg in texts(&container["args"]) {
            if let Some(name) = arg.split_once("$(").and_then(|(_, rest)| rest.split(')').next()) {
                let set = container["env"].as_array().expect("a list").iter().any(|entry| entry["name"] == name);
                assert!(set, "{arg}");
            }
        }
        let port = |name: &str| {
            let ports = container["ports"].as_array().map_or(&[][..], Vec::as_slice);
            ports.iter().find(|port| port["name"] == name).map(|port| port["containerPort"].clone())
        };
        let listens = |flag: &str| {
            let prefix = format!("--{flag}=0.0.0.0:");
            texts(&container["args"])
                .iter()
                .find_map(|arg| arg.strip_prefix(&prefix).map(|port| Value::from(port.parse::<u16>().expect("a port"))))
        };
        assert_eq!(port("grpc"), listens("listen"));
        assert_eq!((port("health"), port("http")), (listens("health-listen"), listens("http-listen")));
        // Ranks have leases; their launchers are not probed.
        if texts(&container["args"]).first() != Some(&"coordinator") {
            assert!(port("health").is_none() && container["livenessProbe"].is_null(), "{container}");
            continue;
        }
        assert_eq!((port("health"), port("http")), (Some(HEALTH_PORT.into()), Some(HTTP_PORT.into())));
        for probe in ["startup", "readiness", "liveness"] {
            let grpc = &container[format!("{probe}Probe")]["grpc"];
            assert_eq!((&grpc["port"], &grpc["service"]), (&HEALTH_PORT.into(), &probe.into()));
            assert!(sources.contains(&format!("\"{probe}\"")), "{probe}");
        }
    }
    assert!(variables.contains("WEIGHTCAST_COORDINATOR"), "{variables:?}");
    let ports = [GRPC_PORT, HEALTH_PORT, HTTP_PORT];
    assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 3, "two servers of a pod have one port");

    let fatal = [EXIT_USAGE, EXIT_CONFIGURATION, EXIT_DO_NOT_RESTART].map(Value::from);
    assert_eq!(Value::from(Kind::Conflict.exit_code()), fatal[1]);
    let mut policies = 0;
    for object in &objects {
        let text = object.to_string();
        for (at, _) in text.match_indices("\"podFailurePolicy\":") {
            let mut parsed = serde_json::Deserializer::from_str(&text[at + 19..]).into_iter::<Value>();
            let policy = parsed.next().expect("a value").expect("JSON");
            assert_eq!(policy["rules"][0]["action"], "Ignore");
            assert_eq!(policy["rules"][0]["onPodConditions"][0]["type"], "DisruptionTarget");
            assert_eq!(
                (&policy["rules"][1]["action"], &policy["rules"][1]["onExitCodes"]["values"]),
                (&"FailJob".into(), &fatal.to_vec().into())
            );
            assert!(!fatal.contains(&EXIT_PREEMPTED.into()), "a job that was preempted goes on");
            policies += 1;
        }
    }
    assert_eq!(policies, 4);
}

/// Pod Security's "restricted" (kubernetes.io/docs/concepts/security/pod-security-standards), and what pods write to.
#[test]
fn pods_are_restricted_and_have_what_they_mount() {
    let place = Place::new();
    for objects in [everything(&place), rendered(&place, &[])] {
        for pod in objects.iter().flat_map(pods) {
            let security = &pod["securityContext"];
            assert_eq!((&security["runAsNonRoot"], &security["runAsUser"]), (&true.into(), &65532.into()));
            assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
            assert_eq!((&pod["automountServiceAccountToken"], &pod["hostNetwork"]), (&false.into(), &Value::Null));
            let volumes = pod["volumes"].as_array().expect("a list");
            for container in pod["containers"].as_array().expect("a list") {
                let own = &container["securityContext"];
                assert_eq!(own["capabilities"]["drop"], serde_json::json!(["ALL"]));
                assert_eq!(
                    (&own["allowPrivilegeEscalation"], &own["readOnlyRootFilesystem"]),
                    (&false.into(), &true.into())
                );
                assert_eq!(container["terminationMessagePath"], "/dev/termination-log");
                let mounts = container["volumeMounts"].as_array().expect("a list");
                let mut mounted: Vec<&Value> = mounts.iter().map(|mount| &mount["name"]).collect();
                let mut there: Vec<&Value> = volumes.iter().map(|volume| &volume["name"]).collect();
                mounted.sort_by_key(ToString::to_string);
                there.sort_by_key(ToString::to_string);
                assert_eq!(mounted, there);
                let writable =
                    |path: &str| mounts.iter().any(|mount| mount["mountPath"] == path && mount["readOnly"] != true);
                for variable in container["env"].as_array().expect("a list") {
                    if ["TMPDIR", "XDG_RUNTIME_DIR"].contains(&variable["name"].as_str().expect("a name")) {
                        assert!(writable(variable["value"].as_str().expect("a value")), "{variable}");
                    }
                }
                let is_worker = container["args"][0] == "launch";
                assert_eq!(writable("/dev/shm"), is_worker);
                assert_eq!(writable("/state"), !is_worker);
                assert!(writable("/checkpoints") && !writable("/data"));
            }
        }
        // What pods refer to is there, or is somebody else's to make: the token, the data.
        let exists = |kind: &str, name: &Value| {
            objects.iter().any(|object| object["kind"] == kind && &object["metadata"]["name"] == name)
        };
        for volume in objects.iter().flat_map(pods).flat_map(|pod| pod["volumes"].as_array().expect("a list")) {
            if let Some(map) = volume.get("configMap") {
                assert!(exists("ConfigMap", &map["name"]), "{volume}");
            }
            if let Some(secret) = volume.get("secret") {
                let made = objects.iter().any(|object| object["spec"]["secretName"] == secret["secretName"]);
                assert!(made || secret["secretName"] == "weightcast-token", "{volume}");
                assert_eq!(secret["defaultMode"], 0o440);
            }
            if let Some(claim) = volume.get("persistentVolumeClaim") {
                let name = &claim["claimName"];
                assert!(exists("PersistentVolumeClaim", name) || name == "weightcast-data", "{volume}");
            }
        }
        for pod in objects.iter().flat_map(pods) {
            assert!(exists("ServiceAccount", &pod["serviceAccountName"]), "{}", pod["serviceAccountName"]);
        }
        assert!(of_kind(&objects, "Secret").is_empty(), "K8-1");
    }
}

/// The shape that a cluster with JobSet 0.12 accepted, and what it means for restarts.
#[test]
fn a_job_set_of_two_nodes() {
    let place = Place::new();
    let objects = rendered(&place, &["--queue", "team-a"]);
    let set = named(&objects, "JobSet", "weightcast");
    assert_eq!(
        (&set["apiVersion"], &set["metadata"]["namespace"]),
        (&"jobset.x-k8s.io/v1alpha2".into(), &"weightcast".into())
    );
    assert_eq!(set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "team-a");
    let spec = &set["spec"];
    assert_eq!(spec["network"], serde_json::json!({"enableDNSHostnames": true, "publishNotReadyAddresses": true}));
    assert_eq!(spec["coordinator"], serde_json::json!({"replicatedJob": "coordinator", "jobIndex": 0, "podIndex": 0}));
    assert_eq!(spec["successPolicy"], serde_json::json!({"operator": "All", "targetReplicatedJobs": ["workers"]}));
    assert_eq!(spec["failurePolicy"]["restartStrategy"], "BlockingRecreate");
    let rule = &spec["failurePolicy"]["rules"][0];
    assert_eq!((&rule["action"], &rule["onJobFailureReasons"][0]), (&"FailJobSet".into(), &"PodFailurePolicy".into()));
    let [coordinator, workers] = [0, 1].map(|place| &spec["replicatedJobs"][place]);
    assert_eq!((&coordinator["name"], &workers["name"]), (&"coordinator".into(), &"workers".into()));
    assert_eq!(workers["dependsOn"], serde_json::json!([{"name": "coordinator", "status": "Ready"}]));
    let [coordinator, workers] = [coordinator, workers].map(|job| &job["template"]["spec"]);
    let numbers = |job: &Value| ["completions", "parallelism", "backoffLimit"].map(|key| job[key].as_i64().expect(key));
    assert_eq!((numbers(coordinator), numbers(workers)), ([1, 1, 2_147_483_647], [2, 2, 0]));
    assert_eq!(workers["completionMode"], "Indexed");
    for job in [coordinator, workers] {
        assert_eq!(job["podReplacementPolicy"], "Failed");
    }
    let [coordinator, workers] = [coordinator, workers].map(|job| &job["template"]["spec"]);
    assert_eq!((&coordinator["restartPolicy"], &workers["restartPolicy"]), (&"OnFailure".into(), &"Never".into()));
    assert!(texts(&coordinator["containers"][0]["args"]).contains(&"--ranks=16"));
    let worker = &workers["containers"][0];
    let args = texts(&worker["args"]);
    for expected in
        ["--nnodes=2", "--nproc-per-node=8", "--coordinator=$(WEIGHTCAST_COORDINATOR):29400", "--device=cuda"]
    {
        assert!(args.contains(&expected), "{expected}: {args:?}");
    }
    assert_eq!(worker["resources"]["limits"]["nvidia.com/gpu"], "8");
    let shm = workers["volumes"].as_array().expect("a list").iter().find(|volume| volume["name"] == "shm");
    assert_eq!(shm.expect("shared memory")["emptyDir"]["medium"], "Memory");
    let budget = named(&objects, "PodDisruptionBudget", "weightcast-coordinator");
    assert_eq!((&budget["spec"]["minAvailable"], &budget["spec"]["maxUnavailable"]), (&1.into(), &Value::Null));
    let role = &named(&objects, "Role", "weightcast-coordinator")["rules"];
    let allowed: BTreeSet<&str> =
        role.as_array().expect("rules").iter().flat_map(|rule| texts(&rule["resources"])).collect();
    assert_eq!(allowed.into_iter().collect::<Vec<_>>(), ["events", "leases"]);
}

const QUANTITIES: [(&str, u64); 2] = [("Gi", 1 << 30), ("Mi", 1 << 20)];

fn quantity(value: &Value) -> u64 {
    let text = value.as_str().expect("a quantity");
    let scaled =
        QUANTITIES.iter().find_map(|(unit, scale)| Some(text.strip_suffix(unit)?.parse::<u64>().ok()? * scale));
    scaled.unwrap_or_else(|| text.parse().expect("bytes"))
}

/// A pod asks for what `weightcast plan` says its ranks take, the launcher's 64 MiB, a tenth more, and shared memory. Ranks that
/// start from a checkpoint read with chunks of 2 MiB, a source and a result for each of 2 threads and 8 results in the queue: 24
/// MiB and the digests; that is less than any rank's 16 MiB window of chunks here takes, or more by 8 MiB at most.
#[test]
fn memory_is_the_plans() {
    let place = Place::new();
    let text = "[model]\nsource = \"/m/tiny-llama\"\n[load]\nreader-threads = 2\n";
    let flags = ["--nodes", "2", "--ranks-per-node", "3", "--mount", "m=/m:ro"];
    let objects = objects(&render_text(&place, text, &flags));
    let plan =
        place.finish(&["plan", "--ranks", "6", "--model", MODEL, "--reader-threads", "2", "--device", "cpu", "--json"]);
    let peaks: Vec<u64> = plan["ranks"]
        .as_array()
        .expect("ranks")
        .iter()
        .map(|rank| rank["peak_host_bytes"].as_u64().expect("bytes"))
        .collect();
    // The first node has the rank that reads.
    let fullest: u64 = peaks[..3].iter().sum();
    assert!(fullest > peaks[3..].iter().sum());
    let expected = ((fullest + (64 << 20)) as f64 * 1.1 / f64::from(1 << 20)) + 64.0;
    let containers = containers(&objects);
    let worker = containers.iter().find(|container| container["args"][0] == "launch").expect("a worker");
    for side in ["requests", "limits"] {
        let mebibytes = quantity(&worker["resources"][side]["memory"]) as f64 / f64::from(1 << 20);
        assert!((expected..expected + 1.0).contains(&mebibytes), "{mebibytes} for {expected}");
    }
    // No checkpoints: 30 s, of which the launcher gives its ranks 20.
    let pods: Vec<&Value> = objects.iter().flat_map(pods).collect();
    assert!(pods.iter().all(|pod| pod["terminationGracePeriodSeconds"] == 30));
    assert!(texts(&worker["args"]).contains(&"--shutdown-timeout=20"));
    assert!(texts(&worker["args"]).contains(&"--device=cpu") && texts(&worker["args"]).contains(&"--nproc-per-node=3"));
}

/// tiny-llama has 2,755,008 parameters; trained in full, a checkpoint has them and two moments in f32, 33,060,096 bytes: at 1
/// MiB/s that takes 32 s, and at 200 MiB/s one.
#[test]
fn grace_is_the_time_of_a_checkpoint() {
    let place = Place::new();
    let text = "[model]\nsource = \"/m/tiny-llama\"\n[checkpoint]\ndirectory = \"/runs/7\"\n[train]\ntype = \"full\"\nsteps = 3\n\
                [train.data]\ntrain = \"/m/devils-dictionary.jsonl\"\nsequence-length = 64\n";
    let grace = |flags: &[&str]| {
        let flags = [&["--mount", "m=/m:ro", "--checkpoint-claim", "runs"], flags].concat();
        let objects = objects(&render_text(&place, text, &flags));
        let pods: Vec<&Value> = objects.iter().flat_map(pods).collect();
        let claims: Vec<&Value> = pods
            .iter()
            .flat_map(|pod| pod["volumes"].as_array().expect("a list"))
            .filter(|volume| volume["persistentVolumeClaim"]["claimName"] == "runs")
            .collect();
        assert_eq!(claims.len(), 2, "coordinator and workers");
        pods.iter().map(|pod| pod["terminationGracePeriodSeconds"].as_u64().expect("seconds")).collect::<Vec<_>>()
    };
    assert_eq!(grace(&[]), [31; 2]);
    assert_eq!(grace(&["--checkpoint-rate-mib", "1"]), [62; 2]);
    assert_eq!(grace(&["--checkpoint-seconds", "600"]), [630; 2]);
}

/// KR-1: what pods could not find or write.
#[test]
fn jobs_that_pods_could_not_run_are_refused() {
    let place = Place::new();
    let model = "[model]\nsource = \"/m/tiny-llama\"\n";
    let cases = [
        (
            "[model]\nsource = \"./tiny-llama\"\n".to_owned(),
            vec![],
            "model.source: ./tiny-llama: expected an absolute path",
        ),
        (model.to_owned(), vec![], "model.source: /m/tiny-llama: expected a path below a --mount"),
        (
            "[model]\nsource = \"org/name\"\n".to_owned(),
            vec!["--mount", "m=/m"],
            "expected --hub-home PATH below a --mount",
        ),
        (
            format!("{model}[load]\ncache = \"/m/cache\"\n"),
            vec!["--mount", "m=/m:ro"],
            "load.cache: /m/cache: expected a path below a --mount that is not :ro",
        ),
        (
            format!("{model}[load]\ndevice = \"cuda\"\n"),
            vec!["--mount", "m=/m"],
            "load.device: expected what --gpus-per-node says",
        ),
        (model.to_owned(), vec!["--mount", "m=/m", "--mount", "x=/tmp/x"], "mount: /tmp/x: expected an absolute path"),
        (
            model.to_owned(),
            vec!["--mount", "m=/m", "--checkpoint-claim", "c"],
            "expected a job with a local checkpoint.directory",
        ),
        (
            model.to_owned(),
            vec!["--mount", "m=/m", "--nodes", "4096", "--ranks-per-node", "2"],
            "expected 1 to 4096 ranks",
        ),
        (format!("{model}[job]\nname = \"My job\"\n"), vec!["--mount", "m=/m"], "say another with --name"),
        (format!("{model}[model2]\n"), vec!["--mount", "m=/m"], "model2"),
    ];
    for (text, flags, expected) in cases {
        let ended = render_text(&place, &text, &flags);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(78), ""), "{expected}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{expected}: {}", ended.stderr);
    }
    for flags in [&["--name", "7up"][..], &["--mount", "claim"], &["--diff"], &["--gpus-per-node", "-1"]] {
        let ended = render_text(&place, model, flags);
        assert_eq!(ended.code, Some(64), "{flags:?}: {}", ended.stderr);
    }
}

/// `--diff` names keys, and its exit code says whether there are any.
#[test]
fn differences_are_named_by_keys() {
    let place = Place::new();
    let file = place.path("all.yaml");
    assert_eq!(example(&place, &["-o", &file]).code, Some(0));
    assert_eq!(example(&place, &["--diff", "--against", &file]).code, Some(0));
    let ended = example(&place, &["--nodes", "3", "--monitoring", "--diff", "--against", &file]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    for expected in [
        "~ JobSet weightcast/weightcast spec.replicatedJobs[workers].template.spec.completions: 2 -> 3",
        "\"--ranks=16\" -> \"--ranks=24\"",
        "+ PodMonitor weightcast/weightcast: present",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    let fewer = example(&place, &["--nodes", "1", "--diff", "--against", &file]);
    assert!(fewer.stdout.contains("- JobSet weightcast/weightcast"), "{}", fewer.stdout);
    assert_eq!(example(&place, &["--diff", "--against", &place.path("nowhere")]).code, Some(65));
}
