//! Models in other tools' formats, in real processes: what is written computes what a job that quantizes computes.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;

use serde_json::Value;
use support::{MODEL, Place};

const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/tiny-llama-reference.safetensors");
const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");

/// The bytes of the file of logits that a model gives.
fn logits(place: &Place, name: &str, model: &str, flags: &[&str]) -> Vec<u8> {
    let output = place.path(&format!("{name}.safetensors"));
    let mut arguments = vec!["model", "forward", "--model", model, "--input", REFERENCE, "--output", &output];
    arguments.extend(flags);
    let ended = place.run(&arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    std::fs::read(&output).expect("a file")
}

fn convert(place: &Place, model: &str, output: &str, flags: &[&str]) -> Value {
    let output = place.path(output);
    let mut arguments = vec!["model", "convert", model, "--output", &output, "--json"];
    arguments.extend(flags);
    let ended = place.run(&arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).expect("JSON")
}

/// Name to bytes of all files of a directory.
fn files(directory: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).expect("a file")))
        .collect()
}

/// Written in a format and read again as it is, a model gives the very logits that it gives when it is quantized while it is
/// loaded; and plain again, what it stood for.
#[test]
fn a_converted_model_computes_what_the_quantized_one_does() {
    let place = Place::new();
    let formats: [(&str, &[&str], &[&str]); 5] = [
        ("bnb-nf4", &["--double"], &["--quantize", "nf4", "--double"]),
        ("bnb-nf4", &[], &["--quantize", "nf4"]),
        ("bnb-int8", &[], &["--quantize", "int8"]),
        ("hqq", &["--bits", "3"], &["--quantize", "hqq", "--bits", "3"]),
        ("mlx", &["--block", "32"], &["--quantize", "mlx", "--bits", "4", "--block", "32"]),
    ];
    for (number, (format, options, quantize)) in formats.into_iter().enumerate() {
        let (name, plain) = (format!("out-{number}"), format!("plain-{number}"));
        let mut flags = vec!["--to", format, "--max-shard-bytes", "1000000"];
        flags.extend(options);
        let converted = convert(&place, MODEL, &name, &flags);
        assert!(converted["files"].as_u64().expect("a number") > 1, "{converted}");
        let expected = logits(&place, &format!("expected-{number}"), MODEL, quantize);
        let found = logits(&place, &format!("found-{number}"), &place.path(&name), &[]);
        assert!(found == expected, "{format} {options:?}: not the logits of the model that a job quantizes");
        convert(&place, &place.path(&name), &plain, &["--to", "hf", "--dtype", "float32"]);
        let found = logits(&place, &format!("again-{number}"), &place.path(&plain), &[]);
        assert!(found == expected, "{format} {options:?}: plain again it is another model");
    }
    let quantized = place.path("out-0");
    let refused = place.run(&["launch", "--model", &quantized, "--quantize", "int8", "--nproc-per-node", "1"]);
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("is quantized already: expected no quantization in the job, or nf4-double"),
        "{}",
        refused.stderr
    );
    let again = place.run(&["model", "convert", MODEL, "--to", "hqq", "--output", &quantized]);
    assert_eq!(again.code, Some(78), "{}", again.stderr);
}

/// The same tensors with the same digests on one rank and on three, from components that another program packed.
#[test]
fn a_converted_model_is_sharded_as_it_is() {
    let place = Place::new();
    for format in ["bnb-nf4", "hqq", "mlx"] {
        convert(&place, MODEL, format, &["--to", format]);
        let digests = |ranks: &str| {
            let model = place.path(format);
            let ended = place.run(&["launch", "--model", &model, "--nproc-per-node", ranks, "--digests", "--json"]);
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
            let loads = report["loads"].as_array().expect("loads").iter();
            let quantized: u64 = loads.map(|load| load["quantized_values"].as_u64().expect("a count")).sum();
            assert_eq!(quantized, 0, "nothing is quantized anew");
            report["digests"].clone()
        };
        let alone = digests("1");
        assert!(alone.as_object().is_some_and(|digests| digests.len() > 40), "{alone}");
        assert_eq!(digests("3"), alone, "{format}");
    }
    place.expect_no_process();
}

/// Killed at every kind of step and started again, a conversion ends with the bytes of one that was left alone.
#[test]
fn an_interrupted_conversion_goes_on() {
    let place = Place::new();
    let flags = ["--to", "bnb-nf4", "--double", "--max-shard-bytes", "1000000"];
    let whole = convert(&place, MODEL, "whole", &flags);
    let count = whole["files"].as_u64().expect("a number");
    let expected = files(&place.path("whole"));
    let faults =
        [("convert.piece", 2), ("convert.piece", 30), ("convert.file", 1), ("convert.file", 2), ("convert.written", 1)];
    for (number, (point, nth)) in faults.into_iter().enumerate() {
        let (name, fault) = (format!("killed-{number}"), format!("kill=convert:{point}:{nth}:{}", place.path("stamp")));
        let output = place.path(&name);
        let mut arguments = vec!["model", "convert", MODEL, "--output", &output];
        arguments.extend(flags);
        let mut command = place.command(&arguments);
        command.env("WEIGHTCAST_FAULTS", &fault);
        let killed = place.start_command(command).wait();
        assert_eq!(killed.code, None, "{fault}: {}", killed.stderr);
        assert!(!std::path::Path::new(&output).exists(), "{fault}: half a model is not seen");
        let again = convert(&place, MODEL, &name, &flags);
        let kept = again["kept_files"].as_u64().expect("a number");
        assert!(point != "convert.written" || kept == count, "{fault}: {again}");
        assert!(files(&output) == expected, "{fault}: other bytes");
    }
}

fn gguf(place: &Place, model: &str, output: &str, file_type: &str) -> String {
    let written = convert(place, model, output, &["--to", "gguf", "--type", file_type]);
    let path = place.path(output);
    assert_eq!(written["output"], path.as_str());
    path
}

/// As f32 every tensor comes back bit by bit, under its name and with its rows in order; and what is made of the file is what
/// is made of the model itself, tokenizer and all.
#[test]
fn a_gguf_file_is_the_model_again() {
    let place = Place::new();
    let plain = gguf(&place, MODEL, "tiny-llama.gguf", "f32");
    let hf = ["--to", "hf", "--dtype", "float32"];
    for (model, output) in [(MODEL, "direct"), (plain.as_str(), "again")] {
        convert(&place, model, output, &hf);
    }
    let weights = |name: &str| files(&place.path(name)).remove("model.safetensors").expect("weights");
    assert!(weights("direct") == weights("again"), "other tensors");
    for file_type in ["q8_0", "q4_k_m"] {
        let [direct, again] = [("direct", MODEL), ("again", &plain)].map(|(name, model)| {
            let path = gguf(&place, model, &format!("{name}-{file_type}.gguf"), file_type);
            std::fs::read(path).expect("a file")
        });
        assert!(direct == again, "{file_type}: other bytes");
    }
    // A directory gets a file named after model and type.
    let written = convert(&place, MODEL, "directory", &["--to", "gguf", "--type", "bf16"]);
    assert_eq!(written["output"], place.path("directory/tiny-llama-BF16.gguf").as_str());
}

/// The blocks of the layers are those of a job that quantizes, whatever order their rows have in the file.
#[test]
fn a_gguf_file_has_the_blocks_of_a_job() {
    let place = Place::new();
    let digests = |model: &str, flags: &[&str]| {
        let mut arguments = vec!["launch", "--model", model, "--nproc-per-node", "2", "--digests", "--json"];
        arguments.extend(flags);
        let ended = place.run(&arguments);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        let digests = report["digests"].as_object().expect("digests").clone();
        digests.into_iter().filter(|(name, _)| name.contains("_proj")).collect::<BTreeMap<_, _>>()
    };
    for file_type in ["q8_0", "q4_k_m", "q5_k_m"] {
        let file = gguf(&place, MODEL, &format!("{file_type}.gguf"), file_type);
        let found = digests(&file, &[]);
        assert_eq!(found.len(), 42, "seven matrices in six layers");
        assert_eq!(found, digests(MODEL, &["--quantize", file_type]), "{file_type}");
    }
    place.expect_no_process();
}

#[test]
fn an_interrupted_gguf_file_is_made_anew() {
    let place = Place::new();
    let expected = std::fs::read(gguf(&place, MODEL, "whole.gguf", "q4_k_m")).expect("a file");
    let faults = [("convert.piece", 1), ("convert.piece", 20), ("store.finish", 1), ("convert.written", 1)];
    for (number, (point, nth)) in faults.into_iter().enumerate() {
        let (name, fault) =
            (format!("killed-{number}.gguf"), format!("kill=convert:{point}:{nth}:{}", place.path("stamp")));
        let output = place.path(&name);
        let mut command =
            place.command(&["model", "convert", MODEL, "--to", "gguf", "--type", "q4_k_m", "--output", &output]);
        command.env("WEIGHTCAST_FAULTS", &fault);
        let killed = place.start_command(command).wait();
        assert_eq!(killed.code, None, "{fault}: {}", killed.stderr);
        assert!(!std::path::Path::new(&output).exists(), "{fault}: half a file is not seen");
        gguf(&place, MODEL, &name, "q4_k_m");
        assert!(std::fs::read(&output).expect("a file") == expected, "{fault}: other bytes");
        let left = place.path(&format!(".{name}.part"));
        assert!(!std::path::Path::new(&left).exists(), "{fault}: {left} was left");
    }
}

#[test]
fn what_no_gguf_file_holds_is_refused() {
    let place = Place::new();
    let file = gguf(&place, MODEL, "m.gguf", "f16");
    let refused = |model: &str, flags: &[&str]| {
        let output = place.path("refused.gguf");
        let mut arguments = vec!["model", "convert", model, "--output", &output];
        arguments.extend(flags);
        let ended = place.run(&arguments);
        assert!(!std::path::Path::new(&output).exists(), "{flags:?}: a file was written");
        (ended.code, ended.stderr)
    };
    let (code, said) = refused(MODEL, &["--to", "gguf", "--bits", "3"]);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("--bits: expected nothing, because the format is gguf"), "{said}");
    let (code, said) = refused(MODEL, &["--to", "mlx", "--type", "q8_0"]);
    assert_eq!(code, Some(78), "{said}");
    let there = place.run(&["model", "convert", MODEL, "--to", "gguf", "--output", &file]);
    assert_eq!(there.code, Some(78), "{}", there.stderr);
    // A model whose activation llama.cpp does not compute.
    let odd = place.path("odd");
    std::fs::create_dir(&odd).expect("a directory");
    for (name, bytes) in files(MODEL) {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let bytes = if name == "config.json" { text.replace("\"silu\"", "\"gelu\"").into_bytes() } else { bytes };
        std::fs::write(format!("{odd}/{name}"), bytes).expect("written");
    }
    let (code, said) = refused(&odd, &["--to", "gguf"]);
    assert_eq!(code, Some(65), "{said}");
    assert!(said.contains("hidden_act: expected silu, which llama.cpp has; found gelu"), "{said}");
}

#[test]
fn quality_is_a_table() {
    let place = Place::new();
    let ended = place.run(&[
        "model",
        "quality",
        MODEL,
        "--formats",
        "stored,q8_0,nf4",
        "--text",
        TEXT,
        "--sequences",
        "2",
        "--sequence-length",
        "64",
        "--json",
    ]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let rows: Vec<Value> = serde_json::from_str(&ended.stdout).expect("JSON");
    let number = |row: usize, key: &str| rows[row][key].as_f64().expect("a number");
    assert_eq!(number(0, "relative_error"), 0.0);
    // Blocks of 32 with a 16-bit scale, and of 64 codes of 4 bits with a 32-bit one.
    assert_eq!((number(1, "bits_per_weight"), number(2, "bits_per_weight")), (8.5, 4.5));
    // Rounding to 127 steps of the largest in a block of 32, and to 16 in one of 64.
    assert!(number(1, "relative_error") < 0.01 && number(2, "relative_error") > 0.03, "{rows:?}");
    assert!(rows.iter().all(|row| row["perplexity"].as_f64().is_some_and(|value| value > 1.0 && value < 2048.0)));
    assert_eq!(rows[2]["layers"].as_object().map(serde_json::Map::len), Some(6));
}
