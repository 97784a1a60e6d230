//! LLaMA Pro in real processes: an expanded model computes what the smaller one did, and its new blocks are trained alone.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use safetensors_file::tensors;
use serde_json::Value;
use support::{MODEL, Place};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/tiny-llama-reference.safetensors");

/// Debug builds compute slowly, and tests share the processors.
const LONG: Duration = Duration::from_secs(300);

mod safetensors_file {
    use super::{BTreeMap, Value};

    /// Name to bytes of all tensors in the safetensors files of a directory, or in one file.
    pub(super) fn tensors(path: &str) -> BTreeMap<String, Vec<u8>> {
        let path = std::path::Path::new(path);
        let files: Vec<std::path::PathBuf> = match path.is_dir() {
            true => {
                std::fs::read_dir(path).expect("a directory").map(|entry| entry.expect("an entry").path()).collect()
            }
            false => vec![path.to_owned()],
        };
        let weights = files.iter().filter(|file| file.extension().is_some_and(|end| end == "safetensors"));
        weights.flat_map(|file| of_file(&std::fs::read(file).expect("a file"))).collect()
    }

    fn of_file(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let (header, data) = bytes[8..].split_at(usize::try_from(length).expect("a header"));
        let header: BTreeMap<String, Value> = serde_json::from_slice(header).expect("JSON");
        let offset = |tensor: &Value, end: usize| {
            usize::try_from(tensor["data_offsets"][end].as_u64().expect("an offset")).expect("an offset")
        };
        let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
        tensors.map(|(name, tensor)| (name, data[offset(&tensor, 0)..offset(&tensor, 1)].to_vec())).collect()
    }
}

fn logits(place: &Place, model: &str, name: &str) -> Vec<u8> {
    let output = place.path(name);
    let ended = place.run(&["model", "forward", "--model", model, "--input", REFERENCE, "--output", &output]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    tensors(&output).remove("logits").expect("logits")
}

#[test]
fn an_expanded_model_gives_the_same_logits_and_trains_its_new_blocks_alone() {
    let place = Place::new();
    let (larger, trained) = (place.path("larger"), place.path("trained"));
    let made = place.run(&["model", "expand", MODEL, "--blocks", "3", "--output", &larger]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert!(made.stdout.contains("new blocks 2, 5, 8"), "{}", made.stdout);
    let expected = logits(&place, MODEL, "logits.safetensors");
    assert!(logits(&place, &larger, "larger.safetensors") == expected, "not the very logits of the smaller model");
    let again = place.run(&["model", "expand", MODEL, "--blocks", "3", "--output", &larger]);
    assert_eq!(again.code, Some(78), "{}", again.stderr);
    let uneven = place.run(&["model", "expand", MODEL, "--blocks", "4", "--output", &place.path("other")]);
    assert_eq!(uneven.code, Some(65), "{}", uneven.stderr);
    assert!(uneven.stderr.contains("divides the model's 6 blocks (1, 2, 3, 6), found 4"), "{}", uneven.stderr);

    let job = place.path("job.toml");
    let text = format!(
        r#"
        model.source = "{larger}"
        checkpoint.directory = "run"
        [train]
        type = "full"
        layers = "expanded"
        steps = 8
        batch-size = 8
        seed = 5
        [train.data]
        train = "{DATA}"
        sequence-length = 32
        evaluation-fraction = 0.01
        [train.optimizer]
        learning-rate = 2e-3
        [train.evaluation]
        every-steps = 8
        [train.checkpoint]
        every-minutes = 0
        "#
    );
    std::fs::write(&job, text).expect("a job file");
    let ended = place.start(&["launch", "--nproc-per-node", "2", &job]).wait_within(LONG);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
    let metrics = std::fs::read_to_string(place.path("run/metrics/metrics.jsonl")).expect("metrics");
    let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let losses: Vec<f64> = records
        .iter()
        .filter(|record| record["kind"] == "evaluation")
        .map(|record| record["loss"].as_f64().expect("a loss"))
        .collect();
    let [before, after] = losses[..] else { panic!("before and after: {losses:?}") };
    assert!(after < before - 0.05, "held-out loss {before} before and {after} after");

    let exported = place.run(&[
        "model",
        "export",
        "--checkpoint",
        &place.path("run"),
        "--output",
        &trained,
        "--dtype",
        "bfloat16",
    ]);
    assert_eq!(exported.code, Some(0), "{}", exported.stderr);
    let (untrained, trained) = (tensors(&larger), tensors(&trained));
    assert_eq!(untrained.keys().collect::<Vec<_>>(), trained.keys().collect::<Vec<_>>());
    for (name, bytes) in &untrained {
        let is_new = [2, 5, 8].iter().any(|layer| name.contains(&format!(".layers.{layer}.")));
        // A norm's weights move by less than bf16 shows.
        let moved = trained[name] != *bytes;
        assert!(is_new || !moved, "{name} was not to be trained");
        assert!(!is_new || moved || name.ends_with("norm.weight"), "{name} was to be trained");
    }
}

#[test]
fn layers_that_are_not_there_are_named() {
    let place = Place::new();
    for (train, expected) in [
        (
            "type = \"full\"\nlayers = \"expanded\"",
            "train.layers: expected a model that `weightcast model expand` made, found no expanded_layers in its config.json",
        ),
        ("type = \"full\"\nlayers = [5, 6]", "train.layers: expected blocks from 0 to 5, found 6"),
        ("layers = [5]", "train.layers: expected only with type = \"full\""),
    ] {
        let job = place.path("job.toml");
        let text = format!(
            "model.source = \"{MODEL}\"\ncheckpoint.directory = \"run\"\n[train]\nsteps = 1\n{train}\n[train.data]\ntrain = \"{DATA}\"\nsequence-length = 32\n"
        );
        std::fs::write(&job, text).expect("a job file");
        let ended = place.start(&["launch", "--nproc-per-node", "1", &job]).wait_within(LONG);
        assert!(ended.code.is_some_and(|code| code == 65 || code == 78), "{:?}: {}", ended.code, ended.stderr);
        assert!(ended.stderr.contains(expected), "{}", ended.stderr);
        place.expect_no_process();
    }
}
