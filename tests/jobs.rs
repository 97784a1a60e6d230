//! Whole jobs in real processes: any format, strategy and number of ranks gives the same tensors; the commands on
//! checkpoints and running jobs say what is; programs of others are launched as torchrun does.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::{MODEL, Place, commit_step, signal, until, wait_until_holding};

/// Tensors of tiny-llama: 6 layers of 9, the embedding and the last norm (its head is tied).
const TENSORS: usize = 56;
/// Digest blocks of a shard file (docs/FORMAT.md, 5).
const BLOCK_BYTES: u64 = 4096;

type Digests = BTreeMap<String, String>;

fn digests(result: &Value) -> Digests {
    serde_json::from_value(result["digests"].clone()).expect("digests")
}

fn loads(result: &Value) -> &[Value] {
    result["loads"].as_array().expect("loads")
}

fn sum(result: &Value, figure: &str) -> u64 {
    loads(result).iter().filter_map(|load| load[figure].as_u64()).sum()
}

/// The bytes of a safetensors file's tensors: name, and range in the file.
fn tensors_of(file: &[u8]) -> Vec<(String, std::ops::Range<usize>)> {
    let length = u64::from_le_bytes(*file.first_chunk().expect("a length"));
    let data = 8 + usize::try_from(length).expect("small");
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&file[8..data]).expect("a header");
    let offset = |entry: &Value, at: usize| {
        let offset = entry["data_offsets"][at].as_u64().expect("an offset");
        data + usize::try_from(offset).expect("small")
    };
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    tensors.map(|(name, entry)| (name.clone(), offset(entry, 0)..offset(entry, 1))).collect()
}

fn weight_files(directory: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(directory).expect("a model directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let weights = paths.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    weights.map(|path| std::fs::read(path).expect("a weight file")).collect()
}

/// The bytes of all tensors by the files' own headers.
fn weights_bytes(directory: &str) -> u64 {
    let files = weight_files(directory);
    let ranges = files.iter().flat_map(|file| tensors_of(file));
    ranges.map(|(_, range)| u64::try_from(range.len()).expect("small")).sum()
}

/// CRC-64/NVME bit by bit, from its parameters: reflected polynomial 0x9a6c9329ac4bc9b5, all ones before and after.
fn crc64_nvme(bytes: &[u8]) -> u64 {
    let step = |crc: u64| if crc & 1 == 1 { (crc >> 1) ^ 0x9a6c_9329_ac4b_c9b5 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u64::from(byte), |crc, _| step(crc)))
}

/// One checkpoint root in a place.
struct Root<'a> {
    place: &'a Place,
    path: String,
}

impl<'a> Root<'a> {
    fn new(place: &'a Place, name: &str) -> Self {
        Self { place, path: place.path(name) }
    }

    fn launch(&self, ranks: u32, flags: &[&str]) -> Value {
        let ranks = ranks.to_string();
        let mut all = vec!["launch", "--nproc-per-node", &ranks, "--checkpoint-dir", &self.path];
        all.extend(["--digests", "--json"]);
        all.extend(flags);
        self.place.finish(&all)
    }

    fn resume(&self, ranks: u32) -> Value {
        self.launch(ranks, &["--resume", "must"])
    }
}

/// Loads, saves and resumes in every placement and strategy, each on other numbers of ranks; all digests must be the same.
/// They come back.
fn expect_one_model(format: &[&str]) -> Digests {
    let place = Place::new();
    let mut expected = None;
    // Number of ranks, and of ranks that resume, in the other placement.
    let worlds = [(1, 3), (2, 1), (3, 4), (4, 2), (2, 8), (3, 2)];
    let placements = ["shard", "replicate"];
    let ways = ["low-memory", "striped", "full"].map(|strategy| placements.map(|placement| (strategy, placement)));
    for (&(strategy, placement), (ranks, ranks_now)) in ways.as_flattened().iter().zip(worlds) {
        let what = format!("{format:?}, {strategy}, {placement} on {ranks}");
        let root = Root::new(&place, &format!("root-{strategy}-{placement}"));
        let flags = [&["--model", MODEL, "--save", "--strategy", strategy, "--placement", placement], format].concat();
        let saved = root.launch(ranks, &flags);
        assert_eq!(saved["checkpoint"], "step-000000000", "{what}");
        let found = digests(&saved);
        assert_eq!(found.len(), TENSORS);
        let expected = expected.get_or_insert_with(|| found.clone());
        assert!(*expected == found, "{what}: other digests");
        if strategy != "full" {
            assert_eq!(sum(&saved, "storage_bytes"), weights_bytes(MODEL), "{what}: each byte is read once");
        }
        let kept: Vec<u64> = loads(&saved).iter().filter_map(|load| load["weights_bytes"].as_u64()).collect();
        if placement == "replicate" {
            assert!(kept.iter().all(|kept| Some(kept) == kept_whole(&saved).as_ref()), "{what}: {kept:?}");
        }
        let other = placements[usize::from(placement == "shard")];
        let again = root.launch(ranks_now, &["--resume", "must", "--placement", other]);
        assert!(*expected == digests(&again), "{what}, resumed on {ranks_now}: other digests");
    }
    place.expect_no_process();
    expected.expect("at least one way")
}

/// The bytes of all tensors as they are kept, from the lengths in their digests.
fn kept_whole(result: &Value) -> Option<u64> {
    digests(result).values().map(|digest| digest.rsplit(':').next()?.parse::<u64>().ok()).sum()
}

#[test]
fn every_format_is_one_model_in_every_placement_and_strategy() {
    let formats: [&[&str]; 4] = [
        &["--quantize", "nf4"],
        &["--quantize", "nf4", "--double"],
        &["--quantize", "fp4", "--dtype", "float32"],
        &["--quantize", "int8", "--dtype", "float16"],
    ];
    let found = formats.map(expect_one_model);
    for (one, other) in (0..4).flat_map(|one| (0..one).map(move |other| (one, other))) {
        assert!(found[one] != found[other], "{:?} and {:?} give the same bytes", formats[one], formats[other]);
    }
}

/// Without quantization the digests are those of the model's own bytes.
#[test]
fn an_unquantized_load_has_the_bytes_of_the_files() {
    assert_eq!(crc64_nvme(b"123456789"), 0xae8b_1486_0a79_9888, "the check value of CRC-64/NVME");
    let found = expect_one_model(&[]);
    let files = weight_files(MODEL);
    let mut compared = 0;
    for file in &files {
        for (name, range) in tensors_of(file) {
            let bytes = &file[range];
            let expected = format!("crc64nvme:{:016x}:{}", crc64_nvme(bytes), bytes.len());
            assert_eq!(found.get(&name), Some(&expected), "{name}");
            compared += 1;
        }
    }
    assert_eq!(compared, TENSORS);
}

/// A resume reads what its ranks keep, rounded to digest blocks, and each rank the tables of digests.
#[test]
fn a_resume_reads_little_more_than_it_keeps() {
    let place = Place::new();
    let model = place.path("model");
    assert_eq!(place.run(&["model", "new", "--params", "24M", &model]).code, Some(0));
    let root = Root::new(&place, "root");
    root.launch(2, &["--model", &model, "--save", "--quantize", "nf4"]);
    let manifest = place.finish(&["checkpoint", "inspect", "--json", &root.path]);
    let tables: u64 = manifest["files"]
        .as_array()
        .expect("files")
        .iter()
        .filter_map(|file| file["digest_table"]["bytes"].as_u64())
        .sum();
    let tensors = manifest["tensors"].as_array().expect("tensors");
    let parts: Vec<&Value> = tensors.iter().flat_map(|tensor| tensor["parts"].as_array().expect("parts")).collect();
    let chunks: usize = parts.iter().map(|part| part["chunks"].as_array().map_or(0, Vec::len)).sum();
    let [parts, chunks] = [parts.len(), chunks].map(|count| u64::try_from(count).expect("small"));
    for ranks in [1_u32, 2, 3, 8] {
        let resumed = root.resume(ranks);
        let (read, kept) = (sum(&resumed, "storage_bytes"), sum(&resumed, "weights_bytes"));
        // A part is cut where a chunk ends and where a rank begins, and every 2 MiB; each piece may touch a block more at
        // either end.
        let pieces = chunks + parts * u64::from(ranks) + kept / (2 << 20);
        let limit = kept + tables * u64::from(ranks) + 2 * BLOCK_BYTES * pieces;
        println!("{ranks} ranks keep {kept} bytes and read {read} (limit {limit})");
        assert!(read >= kept && read <= limit, "{ranks} ranks keep {kept} bytes, read {read}, limit {limit}");
    }
    place.expect_no_process();
}

#[test]
fn checkpoint_commands_say_what_is_there() {
    let place = Place::new();
    let root = place.path("root");
    let nothing = place.run(&["checkpoint", "list", &root]);
    assert_eq!((nothing.code, nothing.stdout.as_str()), (Some(0), ""));
    assert!(nothing.stderr.contains("no checkpoint in"), "{}", nothing.stderr);

    for (step, world) in [(1, 2), (2, 1), (12, 3), (40, 2)] {
        commit_step(&root, MODEL, step, world);
    }
    let listed = place.run(&["checkpoint", "list", &root]);
    let lines: Vec<&str> = listed.stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{}", listed.stdout);
    assert!(lines[2].starts_with("step-000000012") && lines[2].contains("3 ranks  56 tensors"), "{}", lines[2]);
    let listed = place.finish(&["checkpoint", "list", "--json", &root]);
    let steps: Vec<_> = listed.as_array().expect("a list").iter().map(|entry| entry["step"].clone()).collect();
    assert_eq!(steps, [1, 2, 12, 40].map(Value::from));
    // Shards are the weights and headers; a header is less than a tenth of tiny-llama.
    let bytes = listed[1]["bytes"].as_u64().expect("bytes");
    assert!(bytes > weights_bytes(MODEL) && bytes < weights_bytes(MODEL) * 11 / 10, "{bytes}");

    let manifest = place.finish(&["checkpoint", "inspect", "--step", "12", "--json", &root]);
    assert_eq!((&manifest["step"], &manifest["world"]), (&Value::from(12), &Value::from(3)));
    assert_eq!(manifest["tensors"].as_array().map(Vec::len), Some(TENSORS));
    let text = place.run(&["checkpoint", "inspect", &root]).stdout;
    assert!(text.contains("step-000000040 (attempt") && text.contains("written by  2 ranks"), "{text}");
    assert!(text.contains("model.layers.5.mlp.down_proj.weight  [192, 512]"), "{text}");

    let shallow = place.run(&["checkpoint", "verify", &root]);
    assert!(shallow.stdout.contains("step-000000040 holds: 56 tensors in 2 files"), "{}", shallow.stdout);
    let deep = place.run(&["checkpoint", "verify", "--deep", "--step", "1", &root]);
    assert!(
        deep.stdout.contains("step-000000001 holds") && deep.stdout.contains("read and verified"),
        "{}",
        deep.stdout
    );
    let missing = place.run(&["checkpoint", "verify", "--step", "3", &root]);
    assert_eq!(missing.code, Some(65));
    assert!(missing.stderr.contains("step-000000003"), "{}", missing.stderr);
}

/// Damaged checkpoints neither count nor go, and what is said in the dry run is what is done.
#[test]
fn prune_deletes_all_but_the_newest_that_hold() {
    let place = Place::new();
    let root = place.path("root");
    for step in 1..=4 {
        commit_step(&root, MODEL, step, 1);
    }
    let shard = Path::new(&root).join("step-000000003/shard-00001-model-00001-of-00001.safetensors");
    let file = std::fs::OpenOptions::new().write(true).open(&shard).expect("a shard");
    file.set_len(100_000).expect("it can be cut");
    let names = || {
        let listed = place.finish(&["checkpoint", "list", "--json", &root]);
        let name = |entry: &Value| (entry["step"].as_u64().expect("a step"), entry["usable"] == true);
        listed.as_array().expect("a list").iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(names(), [(1, true), (2, true), (3, false), (4, true)]);

    let dry = place.run(&["checkpoint", "prune", "--keep", "2", "--dry-run", &root]);
    assert_eq!(dry.stdout, "would delete step-000000001\n", "{}", dry.stderr);
    assert!(dry.stderr.contains("step-000000003 is damaged and was left alone"), "{}", dry.stderr);
    assert_eq!(names().len(), 4);

    let pruned = place.run(&["checkpoint", "prune", "--keep", "2", &root]);
    assert_eq!(pruned.stdout, "deleted step-000000001\n");
    assert_eq!(names(), [(2, true), (3, false), (4, true)]);
    let pruned = place.run(&["checkpoint", "prune", "--keep", "1", &root]);
    assert_eq!(pruned.stdout, "deleted step-000000002\n");
    let trash = std::fs::read_dir(Path::new(&root).join(".trash")).expect("the trash stays");
    assert_eq!(trash.count(), 0, "and is empty");
    assert_eq!(place.run(&["checkpoint", "prune", "--keep", "0", &root]).code, Some(64));
    assert_eq!(place.run(&["checkpoint", "verify", "--deep", &root]).code, Some(0));
}

fn start_holding(place: &Place) -> support::Job {
    let root = place.path("root");
    let flags = ["launch", "--nproc-per-node", "3", "--model", MODEL, "--quantize", "nf4", "--hold", "--json"];
    place.start(&[&flags[..], &["--checkpoint-dir", &root]].concat())
}

fn expect_one_good_checkpoint(place: &Place) {
    let root = place.path("root");
    let listed = place.finish(&["checkpoint", "list", "--json", &root]);
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!((&listed[0]["usable"], &listed[0]["world"]), (&Value::from(true), &Value::from(3)));
    let verified = place.run(&["checkpoint", "verify", "--deep", &root]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

#[test]
fn status_shows_all_ranks_and_drain_ends_them_well() {
    let place = Place::new();
    assert_eq!(place.run(&["status"]).code, Some(65), "no job, no status");
    let mut job = start_holding(&place);
    let status = wait_until_holding(&place, &mut job);
    let ranks = status["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 3);
    for (number, rank) in ranks.iter().enumerate() {
        assert_eq!(rank["rank"], number);
        assert!(rank["lease_age_ms"].as_u64().expect("an age") < 3000);
        // It keeps more than a third of 4-bit weights, and the process around them takes no gigabyte.
        let peak = rank["peak_resident_bytes"].as_u64().expect("a peak");
        assert!(peak > 500_000 && peak < 1 << 30, "{peak}");
        let process = rank["process_id"].as_i64().and_then(|process| i32::try_from(process).ok());
        assert_eq!(process, place.rank_process(u32::try_from(number).expect("small")));
    }
    // The launcher, and for each rank itself and its nanny: the check for leftovers below sees processes.
    assert!(place.processes().len() > 3, "{:?}", place.processes());
    let text = place.run(&["status"]);
    assert_eq!(text.stdout.lines().filter(|line| line.contains("holding")).count(), 3, "{}", text.stdout);

    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let result = ended.json();
    assert_eq!((&result["phase"], &result["checkpoint"]), (&"finished".into(), &"step-000000000".into()));
    assert_eq!(result["cause"], Value::Null);
    place.expect_no_process();
    expect_one_good_checkpoint(&place);
    let left = std::fs::read_dir(place.path("run/weightcast")).expect("the runtime directory").count();
    assert_eq!(left, 0, "no run file and no token is left");
}

/// Without a checkpoint directory there is nothing to save, and the end is an orderly one all the same. What happened: a
/// drain asked for a checkpoint in any case, and the job ended with 78.
#[test]
fn a_job_without_a_checkpoint_directory_ends_well_too() {
    let place = Place::new();
    let start = || place.start(&["launch", "--nproc-per-node", "2", "--model", MODEL, "--hold"]);
    let mut job = start();
    wait_until_holding(&place, &mut job);
    assert!(signal(job.process(), Signal::TERM));
    let ended = job.wait();
    assert_eq!(ended.code, Some(75), "SIGTERM: {}", ended.stderr);
    place.expect_no_process();

    let mut job = start();
    wait_until_holding(&place, &mut job);
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "drain: {}", ended.stderr);
    place.expect_no_process();
}

/// SIGTERM in the middle of a load: the load is finished and saved, or the job ends before it had a group; never a hang.
#[test]
fn sigterm_during_the_load_ends_the_job() {
    let place = Place::new();
    for delay in [0, 10, 30, 60] {
        let job = start_holding(&place);
        until("a rank exists", Duration::from_secs(10), || place.rank_process(2).is_some());
        std::thread::park_timeout(Duration::from_millis(delay));
        assert!(signal(job.process(), Signal::TERM));
        let ended = job.wait();
        println!("SIGTERM {delay} ms after rank 2 started: code {:?} after {:?}", ended.code, ended.took);
        assert!(ended.took < Duration::from_secs(10), "{:?}: {}", ended.took, ended.stderr);
        assert_ne!(ended.code, Some(0), "{}", ended.stderr);
        place.expect_no_process();
        let listed = place.finish(&["checkpoint", "list", "--json", &place.path("root")]);
        for entry in listed.as_array().expect("a list") {
            assert_eq!(entry["usable"], true);
            std::fs::remove_dir_all(place.path("root")).expect("removable");
        }
        assert_eq!(ended.code == Some(75), !listed.as_array().expect("a list").is_empty(), "{}", ended.stderr);
    }
}

#[test]
fn any_program_is_launched_as_torchrun_does() {
    let place = Place::new();
    let launch = |program: &[&str]| {
        let flags = ["launch", "--nproc-per-node", "2", "--no-python"];
        place.run(&[&flags[..], program].concat())
    };
    assert_eq!(launch(&["/bin/true"]).code, Some(0));
    let failed = launch(&["/bin/false"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("root cause: rank"), "{}", failed.stderr);
    let said = launch(&["/bin/sh", "-c", "echo $RANK of $WORLD_SIZE"]);
    let mut lines: Vec<&str> = said.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[0] 0 of 2", "[1] 1 of 2"], "{}", said.stderr);
    assert_eq!(launch(&["/bin/sh", "-c", "exit $((RANK * 7))"]).code, Some(7));
    assert_eq!(launch(&["/no/such/program"]).code.map(|code| code == 0), Some(false));
    place.expect_no_process();
}

/// Rules give modules forms of their own: each tensor has the bytes that it has in a job of that form alone, and the mixture is
/// committed and resumed on another number of ranks.
#[test]
fn modules_have_forms_of_their_own() {
    let place = Place::new();
    let alone = |flags: &[&str]| {
        let job = ["launch", "--nproc-per-node", "1", "--model", MODEL, "--digests", "--json"];
        digests(&place.finish(&[&job, flags].concat()))
    };
    let (nf4, int8) = (alone(&["--quantize", "nf4"]), alone(&["--quantize", "int8"]));
    let (q6_k, plain) = (alone(&["--quantize", "q6_k"]), alone(&["--dtype", "float32"]));
    let job = place.path("job.toml");
    let text = format!(
        r#"
        model.source = "{MODEL}"
        checkpoint = {{ directory = "run", save = true }}
        load.digests = true
        [quantization]
        format = "nf4"
        [[quantization.rules]]
        modules = ["model.layers.0.*", "layernorm"]
        dtype = "float32"
        [[quantization.rules]]
        modules = ["model.layers.*.self_attn.o_proj"]
        format = "int8"
        [[quantization.rules]]
        modules = ["model.layers.5.mlp.*_proj", "no_such_module_*"]
        format = "q6_k"
        "#
    );
    std::fs::write(&job, &text).expect("it is ours");
    let refused = place.run(&["launch", "--nproc-per-node", "2", &job]);
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains("\"no_such_module_*\", which names none of its tensors"), "{}", refused.stderr);
    std::fs::write(&job, text.replace(", \"no_such_module_*\"", "")).expect("it is ours");
    let found = digests(&place.finish(&["launch", "--nproc-per-node", "2", "--json", &job]));
    assert_eq!(found.len(), TENSORS);
    let mut counts = [0; 4];
    for (name, digest) in &found {
        let (form, expected) = match name.as_str() {
            name if name.contains("layers.0.") || name.contains("layernorm") => (0, &plain),
            name if name.contains("o_proj") => (1, &int8),
            name if name.contains("layers.5.mlp") => (2, &q6_k),
            _ => (3, &nf4),
        };
        counts[form] += 1;
        assert_eq!(digest, &expected[name], "{name}");
    }
    // Layer 0 has 9 tensors, and five layers 2 norms each; five o_proj; three matrices of the last MLP.
    assert_eq!(counts, [19, 5, 3, TENSORS - 27]);
    let resumed = digests(&place.finish(&["launch", "--nproc-per-node", "3", "--resume", "must", "--json", &job]));
    assert_eq!(resumed, found);
}
