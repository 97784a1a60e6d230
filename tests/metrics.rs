//! What Prometheus scrapes from real jobs: the values are those of the job's own report, the text follows the rules, and what is
//! written about the metrics names those that exist.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use support::http::get;
use support::{Job, MODEL, PATIENCE, Place, until};
use weightcast::metrics::{METRICS, reference};

/// Series and values of a scrape; a series is its name and labels, as written.
type Scrape = BTreeMap<String, f64>;

/// Scrapes, and holds the text against the rules of OpenMetrics and of `promtool check metrics`.
fn scrape(address: &str) -> Scrape {
    let answer = get(address, "/metrics", &[]);
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.header("content-type").starts_with("application/openmetrics-text; version=1.0.0"));
    let mut lines: Vec<&str> = answer.body.lines().collect();
    assert_eq!(lines.pop(), Some("# EOF"));
    let names: BTreeSet<String> = METRICS.iter().map(|(_, metric)| metric.name()).collect();
    let (mut found, mut described, mut last) = (Scrape::new(), BTreeSet::new(), String::new());
    for line in lines {
        if let Some(comment) = line.strip_prefix("# ") {
            if let Some(name) = comment.strip_prefix("TYPE ").and_then(|rest| rest.split(' ').next()) {
                assert!(described.insert(name.to_owned()), "{name} is described twice");
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a sample");
        let name = series.split('{').next().expect("a name");
        assert!(names.contains(name), "{name} is not in the table");
        assert!(described.contains(name.strip_suffix("_total").unwrap_or(name)), "{name} has no TYPE");
        // The samples of a family stand together.
        assert!(
            name == last || !found.keys().any(|known| known.split('{').next() == Some(name)),
            "{name} is scattered"
        );
        name.clone_into(&mut last);
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        assert!(found.insert(series.to_owned(), value).is_none(), "{series} stands twice");
    }
    found
}

/// Where the job's page is.
fn page(job: &mut Job) -> String {
    let mut found = None;
    until("the page is served", PATIENCE, || {
        let said = job.said();
        let after =
            |line: &str| Some(line.split_once("status page at http://")?.1.trim().trim_end_matches('/').to_owned());
        found = said.lines().find_map(after);
        assert!(found.is_some() || !job.is_over(), "{said}");
        found.is_some()
    });
    found.expect("just found")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The same number, but for the last digit, which the parser of the report does not promise.
fn expect_same(found: f64, reported: &Value) {
    let expected = number(reported);
    assert!((found - expected).abs() <= 1e-12 * expected.abs(), "{found} is scraped, {expected} reported");
}

/// Four ranks load and save: what is scraped is what the job reports at its end, and what lies on the disk.
#[test]
fn values_are_those_of_the_report() {
    let place = Place::new();
    let checkpoints = place.path("checkpoints");
    let flags = ["launch", "--nproc-per-node", "4", "--model", MODEL, "--quantize", "nf4", "--hold", "--json"];
    let more = ["--save", "--checkpoint-dir", &checkpoints, "--http-listen", "127.0.0.1:0"];
    let mut job = place.start(&[&flags[..], &more].concat());
    let address = page(&mut job);
    support::wait_until_holding(&place, &mut job);
    // Ranks tell their figures twice a second.
    let written = |scrape: &Scrape| {
        (0..4)
            .map(|rank| scrape[&format!("weightcast_rank_checkpoint_written_bytes_total{{rank=\"{rank}\"}}")])
            .sum::<f64>()
    };
    let shards: Vec<_> = std::fs::read_dir(format!("{checkpoints}/step-000000000")).expect("a checkpoint").collect();
    let on_disk: u64 = shards
        .into_iter()
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| path.metadata().expect("a file").len())
        .sum();
    let mut found = Scrape::new();
    until("all ranks have told", PATIENCE, || {
        found = scrape(&address);
        (written(&found) - number(&on_disk.into())).abs() < 0.5
    });
    assert!(found["weightcast_rpc_requests_total{method=\"WorkerService/Renew\",code=\"OK\"}"] > 0.0);
    assert_eq!(found["weightcast_rpc_requests_total{method=\"WorkerService/Join\",code=\"OK\"}"], 4.0);
    for (name, expected) in [
        ("weightcast_job_ranks", 4.0),
        ("weightcast_job_ranks_joined", 4.0),
        ("weightcast_job_generation", 1.0),
        ("weightcast_job_phase{phase=\"holding\"}", 1.0),
        ("weightcast_job_phase{phase=\"loading\"}", 0.0),
        ("weightcast_checkpoint_commits_total", 1.0),
        ("weightcast_checkpoint_committed_step", 0.0),
    ] {
        assert_eq!(found[name], expected, "{name}");
    }
    assert!(found["weightcast_checkpoint_commit_seconds_total"] > 0.0);
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.expect_quiet();
    let report = ended.json();
    for load in report["loads"].as_array().expect("loads") {
        let rank = &load["rank"];
        let of = |name: &str| found[&format!("weightcast_rank_{name}{{rank=\"{rank}\"}}")];
        expect_same(of("storage_read_bytes_total"), &load["storage_bytes"]);
        expect_same(of("wire_sent_bytes_total"), &load["sent_bytes"]);
        expect_same(of("wire_received_bytes_total"), &load["received_bytes"]);
        expect_same(of("quantized_values_total"), &load["quantized_values"]);
        expect_same(of("weights_bytes"), &load["weights_bytes"]);
        expect_same(of("load_seconds"), &load["wall_s"]);
        assert!(of("peak_resident_bytes") >= number(&load["peak_resident_bytes"]));
        assert!(of("lease_age_seconds") < 3.0 && of("joins_total") == 1.0);
        for stage in ["allocate", "read", "encode", "exchange", "place"] {
            let series = format!("weightcast_rank_load_stage_seconds_total{{rank=\"{rank}\",stage=\"{stage}\"}}");
            expect_same(found[&series], &load["stages"][format!("{stage}_s")]);
        }
    }
    // One rank reads, all receive or keep: the figures are not all 0.
    assert!(found["weightcast_rank_storage_read_bytes_total{rank=\"0\"}"] > 1e6);
    assert!(found["weightcast_rank_wire_received_bytes_total{rank=\"3\"}"] > 1e5);
    assert!(found["weightcast_rank_queue_capacity_chunks{rank=\"0\"}"] >= 1.0);
}

/// A job that trains: its figures are those of its metrics file, and every metric of the table is there.
#[test]
fn a_job_that_trains_shows_every_metric() {
    const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
    let place = Place::new();
    let job = place.path("job.toml");
    let text = format!(
        "model.source = \"{MODEL}\"\nload.placement = \"shard\"\ncheckpoint.directory = \"run\"\n[train]\nsteps = 100000\n\
         batch-size = 8\nmicro-batch-size = 2\nseed = 7\n[train.data]\ntrain = \"{DATA}\"\nsequence-length = 32\n\
         evaluation-fraction = 0.01\n[train.lora]\nr = 4\n[train.evaluation]\nevery-steps = 3\n[train.checkpoint]\n\
         every-steps = 2\nevery-minutes = 0\nkeep-last = 2\n"
    );
    std::fs::write(&job, text).expect("a job file");
    let mut started = place.start(&["launch", "--nproc-per-node", "2", "--http-listen", "127.0.0.1:0", &job]);
    let address = page(&mut started);
    let (mut found, mut seen) = (Scrape::new(), BTreeSet::new());
    let names: BTreeSet<String> = METRICS.iter().map(|(_, metric)| metric.name()).collect();
    until("every metric was seen", 4 * PATIENCE, || {
        assert!(!started.is_over(), "{}", started.said());
        found = scrape(&address);
        seen.extend(found.keys().map(|series| series.split('{').next().expect("a name").to_owned()));
        let stalled = |rank: u32| {
            let series = format!("weightcast_rank_checkpoint_stall_seconds_total{{rank=\"{rank}\"}}");
            found.get(&series).is_some_and(|seconds| *seconds > 0.0)
        };
        seen == names && found["weightcast_checkpoint_commits_total"] >= 2.0 && stalled(0) && stalled(1)
    });
    let step = found["weightcast_training_step"];
    let lines = std::fs::read_to_string(place.path("run/metrics/metrics.jsonl")).expect("metrics");
    let records = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
    let record = records.filter(|record| record["kind"] == "step").find(|record| number(&record["step"]) == step);
    let record = record.expect("the step of the scrape was written before it was told");
    expect_same(found["weightcast_training_loss"], &record["loss"]);
    expect_same(found["weightcast_training_learning_rate"], &record["learning_rate"]);
    expect_same(found["weightcast_training_gradient_norm"], &record["gradient_norm"]);
    expect_same(found["weightcast_training_step_duration_seconds"], &record["seconds"]);
    expect_same(found["weightcast_training_tokens_per_second"], &record["tokens_per_second"]);
    assert_eq!(found["weightcast_training_tokens_total"], step * 8.0 * 32.0);
    support::signal(started.process(), rustix::process::Signal::TERM);
    assert_eq!(started.wait().code, Some(75));
    place.expect_no_process();
}

/// docs/METRICS.md is what the table says. WEIGHTCAST_UPDATE_DOCS=1 writes it.
#[test]
fn the_reference_is_made_from_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md");
    if std::env::var_os("WEIGHTCAST_UPDATE_DOCS").is_some() {
        std::fs::write(path, reference()).expect("written");
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == reference(),
        "docs/METRICS.md is stale: WEIGHTCAST_UPDATE_DOCS=1 cargo nextest run --test metrics"
    );
}

/// Rules of alerts name metrics that exist, and the operator's manual says what to do about each.
#[test]
fn alerts_name_what_exists_and_are_explained() {
    let read = |path: &str| std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).expect("a file");
    let (rules, manual) = (read("k8s/monitoring/alerts.yaml"), read("docs/OPERATIONS.md"));
    let names: BTreeSet<String> = METRICS.iter().map(|(_, metric)| metric.name()).collect();
    let mut alerts = 0;
    for line in rules.lines() {
        if let Some(name) = line.trim().strip_prefix("- alert: ") {
            assert!(manual.contains(&format!("| {name} |")), "nobody says what to do about {name}");
            alerts += 1;
        } else if let Some(query) = line.trim().strip_prefix("expr: ") {
            let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            let used: Vec<&str> = words.filter(|word| word.starts_with("weightcast_")).collect();
            assert!(!used.is_empty(), "{query}");
            assert_eq!(used.iter().find(|word| !names.contains(**word)), None, "{query}");
        }
    }
    assert_eq!(manual.lines().filter(|line| line.starts_with("| Weightcast")).count(), alerts);
    assert!(alerts > 5, "{alerts}");
}

/// Every query of the dashboard names metrics that exist, and every metric stands in one.
#[test]
fn the_dashboard_names_what_exists() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/k8s/monitoring/dashboard.json"));
    let dashboard: Value = serde_json::from_str(&text.expect("a dashboard")).expect("JSON");
    let mut queries: Vec<String> = Vec::new();
    for panel in dashboard["panels"].as_array().expect("panels") {
        assert!(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "{panel}");
        let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
        assert!(panel["type"] == "row" || !targets.is_empty(), "{} asks nothing", panel["title"]);
        queries.extend(targets.iter().map(|target| target["expr"].as_str().expect("a query").to_owned()));
    }
    for variable in dashboard["templating"]["list"].as_array().expect("variables") {
        queries.extend(variable["query"]["query"].as_str().map(str::to_owned));
    }
    let names: BTreeSet<String> = METRICS.iter().map(|(_, metric)| metric.name()).collect();
    let mut used = BTreeSet::new();
    for query in &queries {
        let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        used.extend(words.filter(|word| word.starts_with("weightcast")).map(str::to_owned));
        let pairs = [('(', ')'), ('{', '}'), ('[', ']')];
        let balanced = |(open, close)| query.matches(open).count() == query.matches(close).count();
        assert!(pairs.into_iter().all(balanced), "{query}");
    }
    assert_eq!(used.difference(&names).collect::<Vec<_>>(), Vec::<&String>::new(), "queries name what does not exist");
    assert_eq!(names.difference(&used).collect::<Vec<_>>(), Vec::<&String>::new(), "metrics that nobody looks at");
}
