//! Pretraining from random weights in real processes, and the model directories that runs leave. Seeds are constants.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Ended, MODEL, Place};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");

/// Debug builds compute slowly, and tests share the processors.
const LONG: Duration = Duration::from_secs(600);

/// A job file `<name>.toml` whose checkpoints are in `<name>`; `train` are lines of `[train]`.
fn write(place: &Place, name: &str, (model, train, rate): (&str, &str, f64)) -> String {
    let path = place.path(&format!("{name}.toml"));
    let text = format!(
        r#"
        model.source = "{model}"
        load.placement = "shard"
        checkpoint.directory = "{name}"
        [train]
        {train}
        batch-size = 8
        micro-batch-size = 4
        seed = 3
        tokenizer = "{MODEL}"
        [train.data]
        train = "{DATA}"
        sequence-length = 32
        evaluation-fraction = 0.02
        [train.lora]
        r = 4
        [train.optimizer]
        learning-rate = {rate}
        warmup-steps = 4
        [train.evaluation]
        every-steps = 60
        [train.checkpoint]
        every-minutes = 0
        "#
    );
    std::fs::write(&path, text).expect("a job file");
    path
}

fn launch(place: &Place, ranks: u32, job: &str) -> Ended {
    place.start(&["launch", "--nproc-per-node", &ranks.to_string(), job]).wait_within(LONG)
}

fn finish(place: &Place, ranks: u32, job: &str) -> Ended {
    let ended = launch(place, ranks, job);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.expect_quiet();
    place.expect_no_process();
    ended
}

/// The losses of a run's evaluations in order, digit for digit.
fn evaluations(place: &Place, name: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(place.path(&format!("{name}/metrics/metrics.jsonl"))).expect("metrics");
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
    let evaluations = records.filter(|record| record["kind"] == "evaluation");
    evaluations.map(|record| record["loss"].as_f64().expect("a loss")).collect()
}

fn names(directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn read(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

/// A new model of a million parameters learns from nothing; what it leaves is a model with the same held-out loss, which
/// adapters are trained on, which are merged into the next model: the life of a model in one directory.
#[test]
fn a_model_is_pretrained_exported_and_fine_tuned() {
    let place = Place::new();
    let fresh = place.path("fresh");
    let made = place.run(&["model", "new", "--params", "1M", "--dtype", "float32", &fresh]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);

    let output = place.path("models/llama-1M-dictionary-pretrain-v1");
    let train = format!("type = \"full\"\nsteps = 60\noutput = \"{output}\"");
    let job = write(&place, "run", (&fresh, &train, 3e-3));
    let ended = finish(&place, 2, &job);
    assert!(ended.stderr.contains("llama-1M-dictionary-pretrain-v1, of step 60"), "{}", ended.stderr);
    let losses = evaluations(&place, "run");
    let [before, after] = losses[..] else { panic!("before and after: {losses:?}") };
    // A model of random weights knows nothing: the loss is that of equal chances among 2048 tokens, ln 2048 = 7.62.
    assert!((before - 2048_f64.ln()).abs() < 0.1, "{before}");
    assert!(after < before - 1.0, "held-out loss {before} before and {after} after");

    let expected = [
        "adapters",
        "config.json",
        "export_meta.json",
        "model.safetensors",
        "model_args.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.txt",
    ];
    assert_eq!(names(&output), expected);
    let config = read(&format!("{output}/config.json"));
    assert_eq!((&config["dtype"], &config["training_config"]["steps"]), (&json!("float32"), &json!(60)));
    assert_eq!(read(&format!("{output}/model_args.json"))["vocab_size"], 2048);
    let log = std::fs::read_to_string(format!("{output}/training_log.txt")).expect("a log");
    assert!(log.contains("step 60"), "{log}");

    // Run again it is done already; nothing is written again.
    let time = |path: &str| Path::new(path).metadata().expect("a file").modified().expect("a time");
    let weights = format!("{output}/model.safetensors");
    let written = time(&weights);
    finish(&place, 1, &job);
    assert_eq!(time(&weights), written);

    // Another run evaluates what was exported before its first step: the same bits on the same number of ranks.
    let again = write(&place, "again", (&output, "type = \"full\"\nsteps = 1", 0.0));
    finish(&place, 2, &again);
    assert_eq!(evaluations(&place, "again")[0].to_bits(), after.to_bits(), "{after}");

    // An adapter on it lies with it, and it becomes another model.
    let train = format!("type = \"lora\"\nsteps = 4\noutput = \"{output}\"");
    finish(&place, 2, &write(&place, "poems", (&output, &train, 1e-3)));
    let adapter = format!("{output}/adapters/poems");
    let files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "export_meta.json"];
    assert_eq!(names(&adapter), files);
    let merged = place.path("models/llama-1M-dictionary-merged-v1");
    place.finish(&["adapter", "merge", "--adapter", &adapter, "--output", &merged, "--json"]);
    let life = place.finish(&["model", "lifecycle", &place.path("models"), "--json"]);
    let stages: Vec<&Value> = life["stages"].as_array().expect("stages").iter().map(|stage| &stage["models"]).collect();
    let name = "llama-1M-dictionary-pretrain-v1";
    let lora = json!([format!("{name}/adapters/poems")]);
    assert_eq!(stages, [&json!([name]), &lora, &json!(["llama-1M-dictionary-merged-v1"]), &json!([])]);
    let listed = place.finish(&["model", "list", &place.path("models"), "--json"]);
    let from = |entry: usize| listed[0]["history"][entry]["from"].as_str().unwrap_or_default().to_owned();
    assert!(from(0).ends_with("/step-000000060") && from(1).contains("/adapters/poems"), "{listed}");
}

/// An adapter with an output of its own makes a model directory without weights.
#[test]
fn an_adapter_has_a_directory_of_its_own() {
    let place = Place::new();
    let output = place.path("models/llama-2.8M-dictionary-qlora-v1");
    let train = format!("type = \"qlora\"\nsteps = 2\noutput = \"{output}\"");
    let job = write(&place, "run", (MODEL, &train, 1e-3));
    finish(&place, 2, &job);
    let expected = ["adapters", "config.json", "export_meta.json", "model_args.json", "training_log.txt"];
    assert_eq!(names(&output), expected);
    let exported = place.path("exported");
    let checkpoint = place.path("run");
    place.finish(&["adapter", "export", "--checkpoint", &checkpoint, "--output", &exported, "--json"]);
    let bytes = |directory: &str| std::fs::read(format!("{directory}/adapter_model.safetensors")).expect("a file");
    assert_eq!(bytes(&format!("{output}/adapters/run")), bytes(&exported));
    let life = place.finish(&["model", "lifecycle", &output, "--json"]);
    let names = ["llama-2.8M-dictionary-qlora-v1", "llama-2.8M-dictionary-qlora-v1/adapters/run"];
    assert_eq!(life["stages"][1]["models"], json!(names));
    finish(&place, 2, &job);
    // Its weights are no model's.
    let refused = place.run(&["model", "export", "--checkpoint", &checkpoint, "--output", &place.path("model")]);
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    assert!(refused.stderr.contains("weightcast adapter export"), "{}", refused.stderr);
}

/// A launcher that is killed when all but the rename is done leaves no model; the run, started again, writes it.
#[test]
fn a_model_directory_is_whole_or_not_there() {
    let place = Place::new();
    let fresh = place.path("fresh");
    let made = place.run(&["model", "new", "--params", "1M", &fresh]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let name = "llama-1M-dictionary-pretrain-v1";
    let job = write(&place, "run", (&fresh, &format!("type = \"full\"\nsteps = 1\noutput = \"models/{name}\""), 1e-3));
    let mut command = place.command(&["launch", "--nproc-per-node", "2", &job]);
    command.env("WEIGHTCAST_FAULTS", format!("kill=launcher:output.written:1:{}", place.path("killed")));
    let ended = place.start_command(command).wait_within(LONG);
    assert_eq!(ended.code, None, "{}", ended.stderr);
    assert!(Path::new(&place.path("killed")).exists(), "{}", ended.stderr);
    let models = place.path("models");
    assert_eq!(names(&models), [format!(".{name}.part")]);
    assert_eq!(place.finish(&["model", "list", "--json", &models]), json!([]));
    finish(&place, 2, &job);
    assert_eq!(names(&models), [name]);
    assert_eq!(place.finish(&["model", "list", "--json", &models])[0]["stage"], "pretrain");
}

/// Names that are not of the form, another size, what is there already: refused before a process starts.
#[test]
fn outputs_that_cannot_be_are_refused_at_once() {
    let place = Place::new();
    let refuse = |output: &str, train: &str, words: &str| {
        let train = format!("{train}\nsteps = 2\noutput = \"{output}\"");
        let ended = launch(&place, 2, &write(&place, "run", (MODEL, &train, 1e-3)));
        assert_eq!(ended.code, Some(78), "{}", ended.stderr);
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
        assert!(!Path::new(&place.path("run")).exists(), "{output}");
    };
    let (full, lora) = ("type = \"full\"", "type = \"lora\"");
    refuse("models/mine", full, "it has too few parts");
    refuse("models/llama-38M-dictionary-full-v1", full, "expected a model of 38M, found");
    std::fs::create_dir_all(place.path("models/llama-2.8M-dictionary-full-v1")).expect("a directory");
    refuse("models/llama-2.8M-dictionary-full-v1", full, "expected nothing there, or what this run wrote");
    refuse("models/llama-2.8M-dictionary-full-v1", lora, "expected nothing there, or what this run wrote");
    std::fs::create_dir_all(place.path("models/gpt-38M-dictionary-pretrain")).expect("a directory");
    std::fs::write(place.path("models/gpt-38M-dictionary-pretrain/config.json"), "{}").expect("a file");
    refuse("models/llama-2.8M-dictionary-full-v2", full, "sizes are mixed");
}

/// The preset for small pretraining runs is planned with all of its memory.
#[test]
fn the_smallest_preset_is_planned() {
    let place = Place::new();
    let directory = place.path("gpt-38M-dictionary-pretrain");
    let made = place.run(&["model", "new", "--preset", "38M", &directory]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert_eq!(read(&format!("{directory}/model_args.json"))["n_embd"], 320);
    let train = "type = \"full\"\nsteps = 2\noutput = \"models/gpt-38M-dictionary-pretrain-v1\"";
    let job = write(&place, "run", (&directory, train, 1e-3));
    let plan = place.finish(&["plan", "--ranks", "2", "--json", &job]);
    assert!(plan.is_object(), "{plan}");
}
