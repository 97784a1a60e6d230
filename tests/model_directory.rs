//! Model directories from outside: nanoGPT's checkpoints in, names, stages, and that sizes are not mixed.
#![expect(clippy::disallowed_methods, reason = "a black-box test writes and damages files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::Place;
use weightcast::app::{CkptError, ModelName, convert_ckpt};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model_directory");
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/tiny-llama-peft-r4");

/// The tensors of a safetensors file: shape and f32 values.
fn tensors(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).expect("a file");
    let len = usize::try_from(u64::from_le_bytes(*bytes.first_chunk().expect("a length"))).expect("it fits");
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).expect("JSON");
    let number = |value: &Value| usize::try_from(value.as_u64().expect("a number")).expect("it fits");
    let entries = header.as_object().expect("an object").iter().filter(|(_, entry)| entry["dtype"] == "F32");
    let tensor = |(name, entry): (&String, &Value)| {
        let [start, end] = [0, 1].map(|at| 8 + len + number(&entry["data_offsets"][at]));
        let values = bytes[start..end].as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
        (name.clone(), entry["shape"].as_array().expect("a shape").iter().map(number).collect(), values)
    };
    entries.map(tensor).collect()
}

fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

/// Every tensor of torch's file is there under its name, linear ones transposed, and nothing else.
#[test]
fn a_checkpoint_of_nanogpt_becomes_a_model_directory() {
    let place = Place::new();
    let output = place.path("gpt-4K-tinystories-pretrain");
    let answer = place.finish(&["model", "convert", &format!("{DATA}/ckpt.pt"), "--output", &output, "--json"]);
    // 16·(32 + 8) for the tables, 12·16² + 13·16 for the layer, 2·16 for the last norm.
    assert_eq!(answer["parameters"], 640 + 3280 + 32);
    let output = PathBuf::from(output);
    let found = tensors(&output.join("model.safetensors"));
    let mut expected = tensors(&Path::new(DATA).join("ckpt.safetensors"));
    expected.retain(|(name, ..)| name != "logits" && name != "lm_head.weight");
    assert_eq!(found.len(), expected.len());
    for (name, shape, values) in &found {
        let (_, wanted_shape, wanted) = expected.iter().find(|tensor| tensor.0 == *name).expect("torch's name");
        let linear = [".c_attn.weight", ".c_proj.weight", ".c_fc.weight"].iter().any(|end| name.ends_with(end));
        if !linear {
            assert_eq!((shape, values), (wanted_shape, wanted), "{name}");
            continue;
        }
        let (rows, columns) = (shape[0], shape[1]);
        assert_eq!(wanted_shape, &[columns, rows], "{name}");
        for (at, value) in values.iter().enumerate() {
            assert_eq!(*value, wanted[at % columns * rows + at / columns], "{name} {at}");
        }
    }
    assert_eq!(read(output.join("model_args.json"))["block_size"], 8);
    let config = read(output.join("config.json"));
    assert_eq!((&config["n_positions"], &config["training_config"]["dataset"]), (&json!(8), &json!("tinystories")));
    let history = json!([{"stage": "pretrain", "from": format!("{DATA}/ckpt.pt")}]);
    assert_eq!(read(output.join("export_meta.json"))["history"], history);
    assert!(output.join("adapters").is_dir());
    let log = std::fs::read_to_string(output.join("training_log.txt")).expect("a log");
    assert!(log.contains("iter_num 2000"), "{log}");
}

/// Names of a compiled model lose their prefix; biases that are not there are zeros.
#[test]
fn a_compiled_model_without_biases_is_read() {
    let place = Place::new();
    let output = place.path("gpt-4K-tinystories-pretrain-v2");
    place.finish(&["model", "convert", &format!("{DATA}/compiled.pt"), "--output", &output, "--json"]);
    let found = tensors(&Path::new(&output).join("model.safetensors"));
    assert_eq!(found.len(), 16);
    for (name, _, values) in found {
        assert!(name.starts_with("transformer."), "{name}");
        assert_eq!(values.iter().all(|value| *value == 0.0), name.ends_with(".bias"), "{name}");
    }
}

/// What Python would run when it reads the file is named and not run, and nothing is written.
#[test]
fn a_pickle_that_calls_is_refused_and_not_run() {
    let place = Place::new();
    let output = place.path("gpt-4K-tinystories-pretrain");
    let mut command = place.command(&["model", "convert", &format!("{DATA}/evil.pt"), "--output", &output]);
    let directory = tempfile::tempdir().expect("a directory");
    let ended = command.current_dir(directory.path()).output().expect("it runs");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(65), "{said}");
    assert!(said.contains("calls posix.system, which is not run"), "{said}");
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0, "the command was run");
    assert!(!Path::new(&output).exists());
}

/// A file that is cut or changed anywhere is refused or read, and never ends the process.
#[test]
fn damaged_checkpoints_do_not_panic() {
    let directory = tempfile::tempdir().expect("a directory");
    let whole = std::fs::read(format!("{DATA}/ckpt.pt")).expect("a file");
    let ckpt = directory.path().join("ckpt.pt");
    let mut number = 0;
    let mut convert = |bytes: &[u8]| {
        std::fs::write(&ckpt, bytes).expect("a file");
        number += 1;
        let output = directory.path().join(format!("gpt-4K-tinystories-pretrain-v{number}"));
        convert_ckpt(&ckpt, &output, "gelu").map(|_| ())
    };
    for len in (0..whole.len()).step_by(997) {
        convert(&whole[..len]).expect_err("it is cut");
    }
    // The pickle stands first, the directory last.
    let (last, mut refused) = (whole.len(), 0);
    for at in (0..4000).step_by(29).chain((last - 3000..last).step_by(31)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        refused += u32::from(convert(&bytes).is_err());
    }
    assert!(refused > 50, "{refused}");
    // A pickle that nests a million tuples: a reader that frees recursively runs out of stack.
    let start = whole.windows(2).position(|two| two == [0x80, 2]).expect("the pickle");
    let end = start + whole[start..].windows(2).position(|two| two == b".P").unwrap_or(2000);
    let mut bytes = whole.clone();
    bytes[start + 2..end].fill(0x85);
    bytes[start + 2] = b'N';
    assert!(matches!(convert(&bytes), Err(CkptError::Form { .. } | CkptError::Pickle { .. })));
}

#[test]
fn names_are_read_and_written() {
    for (text, dataset, version) in [
        ("gpt-38M-tinystories-pretrain", "tinystories", None),
        ("gpt-1.5B-open-web-text-lora-v2", "open-web-text", Some("v2")),
        ("llama-124M-x-merged-v1.2", "x", Some("v1.2")),
        ("gpt-38M-vectors-pretrain", "vectors", None),
    ] {
        let name = ModelName::parse(text).expect(text);
        assert_eq!(
            (name.to_string().as_str(), name.dataset.as_str(), name.version.as_deref()),
            (text, dataset, version)
        );
    }
    let bad =
        ["", "gpt", "gpt-38M-pretrain", "gpt-tiny-x-pretrain", "gpt-38-x-pretrain", "gpt-38M--pretrain", "../-38M-x-y"];
    for text in bad.into_iter().chain(["gpt-38M-x/y-pretrain", ".gpt-38M-x-pretrain", "gpt-38M-x-v2"]) {
        ModelName::parse(text).expect_err(text);
    }
}

/// One life from pretraining to deployment, and what is refused on the way.
#[test]
fn a_life_is_shown_and_sizes_are_not_mixed() {
    let place = Place::new();
    let root = place.path("models");
    let at = |name: &str| format!("{root}/{name}");
    std::fs::create_dir(&root).expect("a directory");
    let (ckpt, first) = (format!("{DATA}/ckpt.pt"), at("gpt-4K-tinystories-pretrain"));
    place.finish(&["model", "convert", &ckpt, "--output", &first, "--json"]);
    let stages = |lifecycle: &Value| -> Vec<Value> {
        lifecycle["stages"].as_array().expect("stages").iter().map(|stage| stage["models"].clone()).collect()
    };
    let life = place.finish(&["model", "lifecycle", &root, "--json"]);
    assert_eq!(life["size"], "4K");
    assert_eq!(stages(&life), [json!(["gpt-4K-tinystories-pretrain"]), json!([]), json!([]), json!([])]);

    let deployed = place.finish(&["model", "lifecycle", &first, "--deployed", "shelf 3", "--json"]);
    assert_eq!(stages(&deployed)[3], json!(["gpt-4K-tinystories-pretrain"]));
    let listed = place.finish(&["model", "list", &root, "--json"]);
    assert_eq!(listed[0]["history"][1], json!({"stage": "deployed", "from": "shelf 3"}));
    let again = place.run(&["model", "lifecycle", &first, "--deployed", "shelf 3"]);
    assert_eq!(again.code, Some(65), "{}", again.stderr);

    // A name of another size than the model, an adapter of another model, a directory of another size.
    let refuse = |arguments: &[&str], words: &[&str]| {
        let ended = place.run(arguments);
        assert_eq!(ended.code, Some(65), "{}", ended.stderr);
        words.iter().for_each(|word| assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr));
    };
    let wrong = at("gpt-38M-tinystories-pretrain");
    refuse(&["model", "convert", &ckpt, "--output", &wrong], &["expected a model of 38M, found 3952 parameters"]);
    refuse(&["model", "new", "--preset", "124M", &wrong], &["expected a model of 38M, found 124M"]);
    let poems = format!("{first}/adapters/poems");
    std::fs::create_dir(&poems).expect("a directory");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(format!("{ADAPTER}/{name}"), format!("{poems}/{name}")).expect("a copy");
    }
    refuse(&["model", "lifecycle", &root], &["poems", "q_proj", "c_attn"]);
    std::fs::remove_dir_all(&poems).expect("a directory");
    std::fs::create_dir(&wrong).expect("a directory");
    std::fs::write(format!("{wrong}/config.json"), "{}").expect("a file");
    refuse(&["model", "lifecycle", &root], &["sizes are mixed", "gpt-38M-tinystories-pretrain is of 38M", "of 4K"]);
}
