//! Loads through the cache, in real processes: what was made once is read, and has the bytes that it had.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{MODEL, PATIENCE, Place};

/// What a load of `model` through the cache says.
struct Loaded {
    digests: Value,
    /// Values that were quantized.
    quantized: u64,
    storage_bytes: u64,
}

fn arguments<'a>(model: &'a str, cache: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["launch", "--model", model, "--cache", cache, "--digests", "--json"];
    all.extend(flags);
    all
}

fn read(report: &Value) -> Loaded {
    let sum = |key: &str| {
        let loads = report["loads"].as_array().expect("loads").iter();
        loads.map(|load| load[key].as_u64().expect("a count")).sum()
    };
    let digests = report["digests"].clone();
    assert!(digests.as_object().is_some_and(|digests| digests.len() > 40), "{report}");
    Loaded { digests, quantized: sum("quantized_values"), storage_bytes: sum("storage_bytes") }
}

fn load(place: &Place, flags: &[&str]) -> Loaded {
    let cache = place.path("cache");
    let ended = place.run(&arguments(MODEL, &cache, flags));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.expect_quiet();
    read(&ended.json())
}

/// The files of weights in the cache.
fn files(place: &Place) -> Vec<PathBuf> {
    let entries = |path: &Path| {
        let entries = std::fs::read_dir(path).expect("a directory").map(|entry| entry.expect("an entry").path());
        entries.collect::<Vec<_>>()
    };
    let all = entries(Path::new(&place.path("cache"))).into_iter().flat_map(|entry| entries(&entry));
    let mut files: Vec<PathBuf> = all.collect();
    let hidden = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    assert_eq!(files.iter().find(|path| hidden(path)), None, "nothing unfinished stays");
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

/// The second load quantizes nothing, on any number of ranks and by any strategy, and reads what was made instead of the
/// model. Every form that a job can choose has an entry of its own.
#[test]
fn what_was_made_once_is_read() {
    let place = Place::new();
    let formats: [&[&str]; 5] = [
        &["--quantize", "nf4", "--double"],
        &["--quantize", "int8"],
        &["--quantize", "mlx", "--bits", "4", "--block", "32"],
        &["--quantize", "hqq", "--bits", "3"],
        &["--quantize", "q8_0"],
    ];
    for (number, format) in formats.into_iter().enumerate() {
        let with = |flags: &[&'static str]| load(&place, &[format, flags].concat());
        let first = with(&["--nproc-per-node", "2"]);
        assert!(first.quantized > 0, "{format:?}");
        for flags in [
            &["--nproc-per-node", "2"][..],
            &["--nproc-per-node", "3", "--strategy", "striped"],
            &["--nproc-per-node", "2", "--strategy", "full"],
            &["--nproc-per-node", "1", "--placement", "replicate"],
        ] {
            let again = with(flags);
            assert_eq!(again.quantized, 0, "{format:?} {flags:?}");
            assert_eq!(again.digests, first.digests, "{format:?} {flags:?}");
        }
        let again = with(&["--nproc-per-node", "2"]);
        assert!(again.storage_bytes < first.storage_bytes, "{}, {}", again.storage_bytes, first.storage_bytes);
        let listed = place.finish(&["cache", "list", "--json", &place.path("cache")]);
        assert_eq!(listed.as_array().map(Vec::len), Some(number + 1), "{listed}");
    }
    // Nothing is made that has fewer bytes than the model's own.
    load(&place, &["--dtype", "float32", "--nproc-per-node", "1"]);
    let listed = place.finish(&["cache", "list", "--json", &place.path("cache")]);
    assert_eq!(listed.as_array().map(Vec::len), Some(formats.len()), "{listed}");
    let verified = place.finish(&["cache", "verify", "--json", &place.path("cache")]);
    let bytes = verified.as_array().expect("entries").iter().map(|entry| entry["bytes"].as_u64().expect("a count"));
    let paths = files(&place);
    let there = paths.iter().map(|path| std::fs::metadata(path).expect("a file").len());
    assert_eq!(bytes.sum::<u64>(), there.sum::<u64>(), "every byte was read");
    let pruned = place.run(&["cache", "prune", "--max-gib", "0", &place.path("cache")]);
    assert_eq!((pruned.code, files(&place).len()), (Some(0), 0), "{}", pruned.stderr);
    place.expect_no_process();
}

/// A load that is killed in the middle leaves what it has made, and the next one makes the rest.
#[test]
fn an_interrupted_load_goes_on_where_it_was() {
    let place = Place::new();
    let flags = ["--quantize", "nf4", "--nproc-per-node", "2"];
    let cache = place.path("cache");
    let all = load(&Place::new(), &flags);
    let mut command = place.command(&arguments(MODEL, &cache, &flags));
    command.env("WEIGHTCAST_FAULTS", format!("kill=rank0:cache.file:3:{}", place.path("stamp")));
    let killed = place.start_command(command).wait();
    assert_ne!(killed.code, Some(0), "{}", killed.stderr);
    place.expect_no_process();
    let rest = load(&place, &flags);
    assert!(rest.quantized > 0 && rest.quantized < all.quantized, "{} of {}", rest.quantized, all.quantized);
    assert_eq!(rest.digests, all.digests);
    let again = load(&place, &flags);
    assert_eq!((again.quantized, &again.digests), (0, &all.digests));
    files(&place);
}

/// Three jobs at once fill one entry, and all have the right bytes.
#[test]
fn many_jobs_fill_the_cache_at_once() {
    let place = Place::new();
    let flags = ["--quantize", "mlx", "--nproc-per-node", "2"];
    let cache = place.path("cache");
    let jobs: Vec<_> = (0..3).map(|_| place.start(&arguments(MODEL, &cache, &flags))).collect();
    let loads: Vec<Loaded> = jobs
        .into_iter()
        .map(|job| {
            let ended = job.wait_within(3 * PATIENCE);
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            ended.expect_quiet();
            read(&ended.json())
        })
        .collect();
    let again = load(&place, &flags);
    assert_eq!(again.quantized, 0);
    for load in &loads {
        assert_eq!(load.digests, again.digests);
    }
    files(&place);
    place.expect_no_process();
}

/// A byte that flipped is never used: the load says so and removes the file, and the next one makes it anew. A file that
/// lost its end, or its digests, is made anew at once.
#[test]
fn damage_is_found_and_made_good() {
    let place = Place::new();
    let flags = ["--quantize", "nf4", "--nproc-per-node", "2"];
    let cache = place.path("cache");
    let first = load(&place, &flags);
    let there = files(&place);
    assert!(there.len() > 3, "{there:?}");
    let mut bytes = std::fs::read(&there[1]).expect("a file");
    let middle = bytes.len() - 5000;
    bytes[middle] ^= 4;
    std::fs::write(&there[1], &bytes).expect("it is ours");
    let refused = place.run(&arguments(MODEL, &cache, &flags));
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    let name = there[1].file_name().expect("a name").to_string_lossy().into_owned();
    for words in [name.as_str(), "expected CRC32C", "it was removed from the cache; start the job again"] {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    let table = PathBuf::from(format!("{}.crc32c", there[3].display()));
    let cut = |path: &Path, bytes: u64| {
        let file = std::fs::File::options().write(true).open(path).expect("a file");
        file.set_len(bytes).expect("it is ours");
    };
    cut(&there[2], 9000);
    cut(&table, 8);
    let ended = place.run(&arguments(MODEL, &cache, &flags));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("a damaged file of the cache is removed"), "{}", ended.stderr);
    let mended = read(&ended.json());
    assert!(mended.quantized > 0 && mended.quantized < first.quantized);
    assert_eq!(mended.digests, first.digests);
    assert_eq!(load(&place, &flags).quantized, 0);
}

/// A model that was changed is another model, even when no header says so.
#[test]
fn a_changed_model_is_not_taken_for_the_old_one() {
    let place = Place::new();
    let model = place.path("model");
    std::fs::create_dir(&model).expect("a directory");
    for entry in std::fs::read_dir(MODEL).expect("the model") {
        let from = entry.expect("an entry").path();
        std::fs::copy(&from, Path::new(&model).join(from.file_name().expect("a name"))).expect("room");
    }
    let cache = place.path("cache");
    let run = || {
        let ended = place.run(&arguments(&model, &cache, &["--quantize", "nf4", "--nproc-per-node", "1"]));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        read(&ended.json())
    };
    let first = run();
    assert_eq!(run().quantized, 0);
    let weights = std::fs::read_dir(&model).expect("the model").map(|entry| entry.expect("an entry").path());
    let weights = weights.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).max();
    let weights = weights.expect("a file of weights");
    let mut bytes = std::fs::read(&weights).expect("a file");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, &bytes).expect("it is ours");
    let changed = run();
    assert_eq!(changed.quantized, first.quantized);
    assert_ne!(changed.digests, first.digests);
}

/// What cannot be a cache is refused before a process is started.
#[test]
fn a_place_that_is_no_cache_is_refused() {
    let place = Place::new();
    let file = place.path("file");
    std::fs::write(&file, "a file").expect("it is ours");
    let refused = place.run(&arguments(MODEL, &file, &["--quantize", "nf4", "--nproc-per-node", "1"]));
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains(&file), "{}", refused.stderr);
    let refused = place.run(&["cache", "list"]);
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains("WEIGHTCAST_CACHE"), "{}", refused.stderr);
}
