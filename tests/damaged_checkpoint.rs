//! Checkpoints that are not what was committed: a resume ends at once, names the file, and uses no byte that is not its own.
#![expect(clippy::disallowed_methods, reason = "a black-box test damages files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::model::{FIRST, Model};
use support::refusal::{DATA, expect_refused};
use support::{MODEL, Place, Random, commit_step};
use weightcast::app::prepare_with;
use weightcast::checkpoint::{Checkpoint, Depth, open, verify};
use weightcast::config::{JobConfig, ResumePolicy};
use weightcast::error::chain;
use weightcast::load::{LoadOptions, load, logical_digests};
use weightcast::store::LocalStore;
use weightcast::types::{Fqn, Step, TensorDigest, WorldSize};

const SHARDS: [&str; 2] =
    ["shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"];

/// A committed checkpoint of two ranks, in NF4 with double quantization, to be damaged.
fn quantized_checkpoint(place: &Place) -> (String, PathBuf) {
    let root = place.path("root");
    let flags = ["launch", "--nproc-per-node", "2", "--model", MODEL, "--save", "--checkpoint-dir", &root];
    let ended = place.run(&[&flags[..], &["--quantize", "nf4", "--double"]].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let step = Path::new(&root).join("step-000000000");
    (root, step)
}

/// A resume and a deep verification both refuse, and name the file.
fn expect_damage(place: &Place, root: &str, what: &str, names: &[&str]) {
    let verified = place.run(&["checkpoint", "verify", "--deep", root]);
    expect_refused(&format!("verify, {what}"), &verified, DATA, names);
    let resumed = place.run(&["launch", "--nproc-per-node", "3", "--resume", "must", "--checkpoint-dir", root]);
    expect_refused(&format!("resume, {what}"), &resumed, DATA, names);
    place.expect_no_process();
}

/// Files that are absent, cut, or in the wrong place, of this checkpoint or another one.
#[test]
fn shards_that_are_not_the_checkpoints_own_are_named() {
    let place = Place::new();
    let [root, other] = [place.path("root"), place.path("other")];
    commit_step(&root, MODEL, 7, 2);
    // Another step, whose only other weight is the last one of the first file, which belongs to rank 1.
    let model = Model::new(&place);
    model.edit(FIRST, |bytes| *bytes.last_mut().expect("weights") ^= 1);
    commit_step(&other, &model.directory.display().to_string(), 8, 2);
    let step = Path::new(&root).join("step-000000007");
    let stale = Path::new(&other).join("step-000000008");
    let kept = PathBuf::from(place.path("kept"));
    std::fs::create_dir(&kept).expect("a new directory");
    let copy_all = |from: &Path, to: &Path| {
        for entry in std::fs::read_dir(from).expect("a step") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
        }
    };
    copy_all(&step, &kept);
    let check = |what: &str, damage: &dyn Fn(), names: &[&str]| {
        damage();
        expect_damage(&place, &root, what, names);
        copy_all(&kept, &step);
    };
    let remove = |name: &str| std::fs::remove_file(step.join(name)).expect("removable");
    let cut = |name: &str, bytes: u64| {
        let file = std::fs::OpenOptions::new().write(true).open(step.join(name)).expect("a file");
        let length = file.metadata().expect("its length").len();
        file.set_len(if bytes == 0 { 0 } else { length - bytes }).expect("it can be cut");
    };
    let copy = |from: PathBuf, name: &str| {
        std::fs::copy(from, step.join(name)).expect("a copy");
    };
    let table = |shard: &str| format!("{shard}.crc32c");
    let [first, second] = SHARDS;

    check("shard missing", &|| remove(second), &[second]);
    check("table missing", &|| remove(&table(first)), &[first]);
    check("manifest missing", &|| remove("manifest.json"), &["manifest.json"]);
    check("shard a byte short", &|| cut(second, 1), &[second, "expected"]);
    check("shard empty", &|| cut(first, 0), &[first]);
    check("table short", &|| cut(&table(second), 4), &[second]);
    check("manifest short", &|| cut("manifest.json", 1), &["manifest.json"]);
    let swap = |names: &[(String, String)]| {
        for (one, two) in names {
            copy(kept.join(one), two);
            copy(kept.join(two), one);
        }
    };
    let both = (first.to_owned(), second.to_owned());
    check("shards swapped", &|| swap(std::slice::from_ref(&both)), &["shard-0000"]);
    check("tables swapped", &|| swap(&[(table(first), table(second))]), &["shard-0000"]);
    check("shards and tables swapped", &|| swap(&[both.clone(), (table(first), table(second))]), &["shard-0000"]);
    check("shard for another's", &|| copy(kept.join(first), second), &[second]);
    check("stale shard", &|| copy(stale.join(second), second), &[second]);
    let stale_pair = || [second.to_owned(), table(second)].iter().for_each(|name| copy(stale.join(name), name));
    check("stale shard and table", &stale_pair, &[second]);
    check("stale manifest", &|| copy(stale.join("manifest.json"), "manifest.json"), &["shard-0000"]);
    assert_eq!(place.run(&["checkpoint", "verify", "--deep", &root]).code, Some(0), "all was put back");
}

/// Flips one bit, for as long as `during` runs.
fn flipped<T>(path: &Path, bit: u64, during: impl FnOnce() -> T) -> T {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).expect("a byte");
    file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8).expect("writable");
    let result = during();
    file.write_all_at(&byte, bit / 8).expect("writable");
    result
}

type Digests = BTreeMap<Fqn, TensorDigest>;

/// Resumes on two ranks in this process, through the library, as the program does: the digest of every tensor that the ranks
/// hold then, or why they do not.
fn resume(root: &str) -> Result<Digests, String> {
    let mut config = JobConfig::default();
    config.checkpoint.directory = Some(root.into());
    config.checkpoint.resume = ResumePolicy::Must;
    config.load.digests = true;
    let world = WorldSize::new(2).expect("not zero");
    let plan = prepare_with(&config, world, None, &|_| {}).map_err(|error| chain(&error))?.plan;
    let store = LocalStore::new(&plan.root);
    let mut reports = Vec::new();
    for rank in world.ranks() {
        let options = LoadOptions::on_host(rank, &store);
        let (_, report) = load(&plan, &options, None).map_err(|error| chain(&error))?;
        reports.push(report);
    }
    Ok(logical_digests(&plan, &reports).expect("all ranks loaded, with digests"))
}

/// What is known of a committed checkpoint before it is damaged.
struct Committed {
    root: String,
    store: LocalStore,
    checkpoint: Checkpoint,
    digests: Digests,
}

impl Committed {
    fn new(root: String) -> Self {
        let store = LocalStore::new(&root);
        let checkpoint = open(&store, Step(0)).expect("a good checkpoint");
        let digests = resume(&root).expect("a good checkpoint");
        let saved = checkpoint.manifest.tensors.iter().map(|tensor| (tensor.fqn.clone(), tensor.digest));
        assert_eq!(digests, saved.collect(), "what is loaded is what was saved");
        Self { root, store, checkpoint, digests }
    }

    /// Whether a resume has a use for this byte of the file: it is part of a tensor's chunk. Not part of one are the header
    /// and its padding, and the constants beside quantized weights, which are there for other tools.
    fn is_used(&self, name: &str, byte: u64) -> bool {
        let Some(file) = self.checkpoint.manifest.files.iter().position(|file| file.name == name) else { return true };
        let parts = self.checkpoint.manifest.tensors.iter().flat_map(|tensor| &tensor.parts);
        let mut chunks = parts.flat_map(|part| &part.chunks).filter(|chunk| usize::try_from(chunk.file) == Ok(file));
        chunks.any(|chunk| chunk.range.start() <= byte && byte < chunk.range.end())
    }

    /// What a deep verification says, as `checkpoint verify --deep` does.
    fn fault(&self) -> Option<String> {
        let verified = open(&self.store, Step(0)).and_then(|opened| verify(&self.store, &opened, Depth::Deep));
        verified.err().map(|error| chain(&error))
    }
}

/// What became of the flips in one file.
#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    flips: u32,
    /// The resume was refused, and named the file.
    refused: u32,
    /// The resume had no use for the byte and gave the saved tensors; the deep verification named the file.
    unused: u32,
}

/// A thousand single bits, half of them anywhere in the bytes, half in any file: tables are small and would never be hit.
#[test]
fn a_thousand_flipped_bits_are_all_found() {
    const SEED: u64 = 20_260_101;
    const FLIPS: u32 = 1000;
    let place = Place::new();
    let (root, step) = quantized_checkpoint(&place);
    let committed = Committed::new(root);
    let entries = std::fs::read_dir(&step).expect("a step");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    assert_eq!(files.len(), 5, "two shards, two tables, a manifest: {files:?}");
    let bits: Vec<u64> = files.iter().map(|path| path.metadata().expect("a length").len() * 8).collect();
    let total: u64 = bits.iter().sum();
    let mut random = Random(SEED);
    let mut outcomes = [Outcome::default(); 5];
    for flip in 0..FLIPS {
        let mut bit = random.below(total);
        let mut index = 0;
        while bit >= bits[index] {
            bit -= bits[index];
            index += 1;
        }
        if flip % 2 == 1 {
            index = usize::try_from(random.below(5)).expect("small");
            bit = random.below(bits[index]);
        }
        let name = files[index].file_name().expect("a name").to_string_lossy().into_owned();
        let what = format!("seed {SEED}, bit {bit} of {name}");
        let (resumed, fault) = flipped(&files[index], bit, || (resume(&committed.root), committed.fault()));
        let fault = fault.unwrap_or_else(|| panic!("{what}: the deep verification is silent"));
        assert!(fault.contains(&name), "{what}: {fault}");
        outcomes[index].flips += 1;
        match resumed {
            Err(message) => {
                assert!(message.contains(&name), "{what}: {message}");
                outcomes[index].refused += 1;
            }
            Ok(digests) => {
                assert!(!committed.is_used(&name, bit / 8), "{what}: loaded silently");
                assert!(digests == committed.digests, "{what}: other tensors");
                outcomes[index].unused += 1;
            }
        }
    }
    for (path, outcome) in files.iter().zip(outcomes) {
        println!("seed {SEED}, {}: {outcome:?}", path.file_name().expect("a name").display());
        assert!(outcome.flips >= 50 && outcome.flips == outcome.refused + outcome.unused);
    }
    assert_eq!(outcomes[0].unused, 0, "{}: a resume reads all of the manifest", files[0].display());
    assert_eq!(committed.fault(), None, "all was put back");
}

/// The manifest's own digest, and what follows it, are covered by nothing else; the hint at the newest step decides nothing.
#[test]
fn the_ends_of_the_manifest_and_the_hint_are_not_trusted() {
    let place = Place::new();
    let (root, step) = quantized_checkpoint(&place);
    let committed = Committed::new(root);
    let manifest = step.join("manifest.json");
    let end = manifest.metadata().expect("a length").len() * 8;
    for bit in end - 100 * 8..end {
        let fault = flipped(&manifest, bit, || committed.fault());
        assert!(fault.is_some_and(|fault| fault.contains("manifest.json")), "manifest.json bit {bit} of {end}");
    }
    let latest = Path::new(&committed.root).join("LATEST");
    for bit in 0..latest.metadata().expect("a length").len() * 8 {
        assert!(flipped(&latest, bit, || open(&committed.store, Step(0))).is_ok(), "LATEST bit {bit}");
    }
    assert_eq!(flipped(&latest, 40, || resume(&committed.root)), Ok(committed.digests));
}

/// A resume uses no byte of a damaged block: it ends, and names file and block.
#[test]
fn a_resume_names_the_block_of_a_flipped_bit() {
    const SEED: u64 = 4;
    const BLOCK_BYTES: u64 = 4096;
    let place = Place::new();
    let (root, step) = quantized_checkpoint(&place);
    let manifest = place.finish(&["checkpoint", "inspect", "--json", &root]);
    let tensors = manifest["tensors"].as_array().expect("tensors");
    let parts = tensors.iter().flat_map(|tensor| tensor["parts"].as_array().expect("parts"));
    let chunks: Vec<&Value> = parts.flat_map(|part| part["chunks"].as_array().expect("chunks")).collect();
    let mut random = Random(SEED);
    for _ in 0..6 {
        let chunk = chunks[usize::try_from(random.below(u64::try_from(chunks.len()).expect("small"))).expect("small")];
        let [start, end] = [0, 1].map(|at| chunk["range"][at].as_u64().expect("an offset"));
        let file = usize::try_from(chunk["file"].as_u64().expect("an index")).expect("small");
        let name = manifest["files"][file]["name"].as_str().expect("a name");
        let byte = start + random.below(end - start);
        let block = format!("block {} (bytes", byte / BLOCK_BYTES);
        let what = format!("seed {SEED}, byte {byte} of {name}");
        flipped(&step.join(name), byte * 8 + random.below(8), || {
            expect_damage(&place, &root, &what, &[name, &block, "is damaged"]);
        });
    }
    let table = format!("{}.crc32c", SHARDS[1]);
    flipped(&step.join(&table), 77, || expect_damage(&place, &root, "a table", &[&table, "table of block digests"]));
    flipped(&step.join("manifest.json"), 999, || {
        expect_damage(&place, &root, "a manifest", &["manifest.json", "damaged"])
    });
}
