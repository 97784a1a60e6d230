//! Several models on the same ranks, in real processes: each is loaded in its own form, counted, and let go by itself.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use support::{MODEL, PATIENCE, Place, until, wait_until_holding};

/// tiny-llama has 2,755,008 weights in bf16.
const MODEL_BYTES: u64 = 5_510_016;

fn job(place: &Place, name: &str, models: &str) -> String {
    let path = place.path(name);
    let text = format!(
        "job.hold = true\nmodel.source = \"{MODEL}\"\nload.backend = \"tcp\"\nquantization.format = \"nf4\"\n{models}"
    );
    std::fs::write(&path, text).expect("it is ours");
    path
}

/// Bytes that a process has in memory now.
fn resident_bytes(process: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/statm")).expect("it lives");
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number of pages");
    pages * u64::try_from(rustix::param::page_size()).expect("small")
}

/// By hand: every weight of the reference is 4 bytes, so what two ranks hold of it is twice its bytes in bf16, but that norms and
/// other small tensors are on both.
#[test]
fn a_reference_model_lies_beside_the_base_and_can_go() {
    let place = Place::new();
    let models = format!(
        "[models.reference]\nsource = \"{MODEL}\"\ndtype = \"float32\"\n[models.small]\nsource = \"{MODEL}\"\n\
         quantization = {{ format = \"int8\" }}\n"
    );
    let path = job(&place, "job.toml", &models);
    let alone = place.finish(&["plan", "--ranks", "2", "--json", &job(&place, "alone.toml", "")]);
    let planned = place.finish(&["plan", "--ranks", "2", "--json", &path]);
    let mut running = place.start(&["launch", "--nproc-per-node", "2", &path]);
    let status = wait_until_holding(&place, &mut running);
    let models = status["models"].as_array().expect("models");
    let kept: Vec<u64> = models.iter().map(|model| model["kept_bytes"].as_u64().expect("a count")).collect();
    let names: Vec<&str> = models.iter().map(|model| model["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["base", "reference", "small"]);
    let twice = 2 * MODEL_BYTES;
    assert!(kept[1] >= twice && kept[1] < twice + twice / 100, "{kept:?}");
    assert!(kept[0] < kept[2] && kept[2] < MODEL_BYTES, "{kept:?}");
    let weights = |plan: &serde_json::Value| -> u64 {
        let ranks = plan["ranks"].as_array().expect("ranks").iter();
        ranks.map(|rank| rank["weights_bytes"].as_u64().expect("a count")).sum()
    };
    assert_eq!((weights(&alone), weights(&planned)), (kept[0], kept.iter().sum()));

    let refused = place.run(&["unload", "base"]);
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    assert!(refused.stderr.contains("expected reference, small; found \"base\""), "{}", refused.stderr);
    let rank = place.rank_process(1).expect("rank 1");
    let before = resident_bytes(rank);
    let unloaded = place.run(&["unload", "reference"]);
    assert_eq!(unloaded.code, Some(0), "{}", unloaded.stderr);
    until("the memory is free", PATIENCE, || resident_bytes(rank) + kept[1] / 2 * 9 / 10 < before);
    let again = place.run(&["unload", "reference"]);
    assert_eq!(again.code, Some(0), "what was let go is let go: {}", again.stderr);
    let status = wait_until_holding(&place, &mut running);
    let gone: Vec<bool> = (0..3).map(|model| status["models"][model]["unloaded"].as_bool().expect("a flag")).collect();
    assert_eq!(gone, [false, true, false]);
    let drained = place.run(&["drain"]);
    assert_eq!(drained.code, Some(0), "{}", drained.stderr);
    let ended = running.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}

#[test]
fn a_model_that_cannot_be_loaded_is_named() {
    let place = Place::new();
    let missing = job(&place, "missing.toml", "[models.reference]\nsource = \"/nowhere/at/all\"\n");
    let refused = place.run(&["launch", "--nproc-per-node", "1", &missing]);
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("/nowhere/at/all"), "{}", refused.stderr);
    let named = job(&place, "named.toml", &format!("[models.base]\nsource = \"{MODEL}\"\n"));
    let refused = place.run(&["launch", "--nproc-per-node", "1", &named]);
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains("models: expected a name of letters"), "{}", refused.stderr);
}
