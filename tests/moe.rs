//! Mixtures of experts in real processes: loaded, quantized, cut over ranks, committed and resumed on other numbers of ranks;
//! files with experts apart and fused are one model; training is refused.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;

use serde_json::Value;
use support::Place;
use support::refusal::{CONFIG, DATA, expect_refused};

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model");
const TEXTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");

type Digests = BTreeMap<String, String>;

fn digests(result: &Value) -> Digests {
    serde_json::from_value(result["digests"].clone()).expect("digests")
}

fn launch(place: &Place, (ranks, root): (usize, &str), flags: &[&str]) -> Value {
    let ranks = ranks.to_string();
    let mut all = vec!["launch", "--nproc-per-node", &ranks, "--checkpoint-dir", root, "--digests", "--json"];
    all.extend(flags);
    place.finish(&all)
}

fn new_model(place: &Place, architecture: &str, parameters: &str) -> String {
    let model = place.path(architecture);
    let made = place.run(&["model", "new", "--arch", architecture, "--params", parameters, &model]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    model
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().expect("a number")).expect("small")
}

/// Every part of every tensor of the only checkpoint, its chunks put together as the manifest says, and in how many files
/// it is.
fn whole_parts(root: &str) -> BTreeMap<String, (Vec<u8>, usize)> {
    let step = format!("{root}/step-000000000");
    let manifest = std::fs::read(format!("{step}/manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let file =
        |file: &Value| std::fs::read(format!("{step}/{}", file["name"].as_str().expect("a name"))).expect("a shard");
    let files: Vec<Vec<u8>> = manifest["files"].as_array().expect("files").iter().map(file).collect();
    let mut parts = BTreeMap::new();
    for tensor in manifest["tensors"].as_array().expect("tensors") {
        for part in tensor["parts"].as_array().expect("parts") {
            let chunks = part["chunks"].as_array().expect("chunks");
            let mut bytes = Vec::new();
            for chunk in chunks {
                assert_eq!(number(&chunk["at"]), bytes.len(), "{part}");
                bytes.extend(&files[number(&chunk["file"])][number(&chunk["range"][0])..number(&chunk["range"][1])]);
            }
            let name = format!("{} {} {}", tensor["fqn"], part["part"], tensor["encoding"]["kind"]);
            parts.insert(name, (bytes, chunks.len()));
        }
    }
    parts
}

/// Loads on 1 to 4 ranks, resumes each on another number of ranks and in another placement: the same digests, and shards
/// that together are the bytes of one rank.
fn expect_one_model(architecture: &str, format: &[&str]) {
    let place = Place::new();
    let model = new_model(&place, architecture, "4M");
    let mut expected: Option<(Digests, BTreeMap<String, Vec<u8>>)> = None;
    for (ranks, placement, ranks_now, placement_now) in [
        (1, "shard", 3, "shard"),
        (2, "shard", 4, "experts"),
        (3, "shard", 1, "shard"),
        (4, "shard", 2, "layers"),
        (3, "experts", 2, "shard"),
        (4, "experts", 3, "experts"),
    ] {
        let what = format!("{architecture} {format:?} {placement} on {ranks}");
        let root = place.path(&format!("{placement}-{ranks}"));
        let flags = [&["--model", &model, "--save", "--placement", placement], format].concat();
        let found = digests(&launch(&place, (ranks, &root), &flags));
        let parts = whole_parts(&root);
        let cut = |name: &str| parts.iter().any(|(part, (_, chunks))| part.contains(name) && *chunks > 1);
        let expert = ".experts.0.";
        assert_eq!(cut(expert), placement == "shard" && ranks > 1, "{what}: an expert's matrix is cut or whole");
        assert_eq!(cut(".self_attn.q_proj."), ranks > 1, "{what}");
        assert!(!cut("gate.weight"), "{what}: a router is kept by all");
        let bytes: BTreeMap<String, Vec<u8>> = parts.into_iter().map(|(name, (bytes, _))| (name, bytes)).collect();
        let (digests_of_one, bytes_of_one) = expected.get_or_insert_with(|| (found.clone(), bytes.clone()));
        assert!(*digests_of_one == found, "{what}: other digests");
        assert!(*bytes_of_one == bytes, "{what}: other bytes");
        let resumed = launch(&place, (ranks_now, &root), &["--resume", "must", "--placement", placement_now]);
        assert!(*digests_of_one == digests(&resumed), "{what}: other digests on {ranks_now}, {placement_now}");
    }
    let (_, parts) = expected.expect("it was loaded");
    for name in parts.keys() {
        let linear = name.contains("experts.") || name.contains("shared_expert.") || name.contains("_proj.");
        let linear = linear && !name.contains(".bias");
        assert_eq!(name.ends_with("\"plain\""), !linear || format.is_empty(), "{name}: quantized or not");
    }
    place.expect_no_process();
}

#[test]
fn mixtral_is_one_model_on_any_number_of_ranks() {
    expect_one_model("mixtral", &["--quantize", "nf4", "--double"]);
}

#[test]
fn qwen3_moe_is_one_model_on_any_number_of_ranks() {
    expect_one_model("qwen3_moe", &["--quantize", "nf4"]);
    expect_one_model("qwen3_moe", &[]);
}

#[test]
fn qwen2_moe_is_one_model_on_any_number_of_ranks() {
    expect_one_model("qwen2_moe", &["--quantize", "int8"]);
}

/// The tensors of a safetensors file.
fn tensors(path: &str) -> BTreeMap<String, Vec<u8>> {
    let file = std::fs::read(path).expect("a weight file");
    let length = u64::from_le_bytes(*file.first_chunk().expect("a length"));
    let data = 8 + usize::try_from(length).expect("small");
    let header: BTreeMap<String, Value> = serde_json::from_slice(&file[8..data]).expect("a header");
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let bytes = |entry: &Value| {
        let [start, end] = [0, 1].map(|at| data + number(&entry["data_offsets"][at]));
        file[start..end].to_vec()
    };
    tensors.map(|(name, entry)| (name, bytes(&entry))).collect()
}

/// What transformers saves with experts apart and fused is loaded as one model, whose bytes are those of the tensors with the
/// same names in the file with experts apart.
#[test]
fn fused_files_give_the_bytes_of_files_with_experts_apart() {
    let place = Place::new();
    for architecture in ["mixtral", "qwen2_moe"] {
        let [apart, fused] = ["apart", "fused"].map(|form| format!("{MODELS}/{architecture}-{form}"));
        let expected = tensors(&format!("{apart}/model.safetensors"));
        for (ranks, placement) in [(1, "shard"), (2, "shard"), (3, "experts")] {
            let root = place.path(&format!("{architecture}-{placement}-{ranks}"));
            launch(&place, (ranks, &root), &["--model", &fused, "--save", "--placement", placement]);
            let found = whole_parts(&root);
            assert_eq!(found.len(), expected.len());
            for (name, bytes) in &expected {
                let part = format!("\"{name}\" \"weight\" \"plain\"");
                assert!(found.get(&part).is_some_and(|(found, _)| found == bytes), "{part} on {ranks}");
            }
        }
        let formats: [&[&str]; 2] = [&["--quantize", "nf4", "--double"], &["--quantize", "mlx"]];
        for format in formats {
            let [one, other] = [&apart, &fused].map(|model| {
                // Nothing is saved.
                let root = place.path("none");
                digests(&launch(&place, (2, &root), &[&["--model", model], format].concat()))
            });
            assert!(one == other, "{architecture} {format:?}");
        }
        let [one, other] = [&apart, &fused].map(|model| place.finish(&["model", "inspect", "--json", model]));
        assert_eq!(one, other);
        assert_eq!(one["architecture"], architecture);
    }
    place.expect_no_process();
}

/// The same model from a GGUF file, whose experts are fused too: the bytes of its safetensors file.
#[test]
fn gguf_gives_the_bytes_of_the_safetensors_file() {
    let place = Place::new();
    let expected = tensors(&format!("{MODELS}/qwen2_moe-apart/model.safetensors"));
    let (root, model) = (place.path("root"), format!("{MODELS}/qwen2_moe.gguf"));
    launch(&place, (2, &root), &["--model", &model, "--save", "--dtype", "bfloat16"]);
    let found = whole_parts(&root);
    assert_eq!(found.len(), expected.len());
    for (name, bytes) in &expected {
        let part = format!("\"{name}\" \"weight\" \"plain\"");
        assert!(found.get(&part).is_some_and(|(found, _)| found == bytes), "{part}");
    }
    place.expect_no_process();
}

#[test]
fn what_cannot_be_is_refused_before_a_process_starts() {
    let place = Place::new();
    let model = new_model(&place, "mixtral", "1M");
    let job = place.path("job.toml");
    let text = format!(
        "model.source = \"{model}\"\ncheckpoint.directory = \"run\"\n[train]\ntype = \"qlora\"\nsteps = 1\nbatch-size = 1\n\
         seed = 0\n[train.data]\ntrain = \"{TEXTS}\"\nsequence-length = 16\n"
    );
    std::fs::write(&job, text).expect("a job file");
    let words = [
        model.as_str(),
        "cannot be trained: config.json: architectures: expected a causal language model of llama",
        "found mixtral, a mixture of experts",
    ];
    expect_refused("training", &place.run(&["launch", "--nproc-per-node", "1", &job]), DATA, &words);
    let dense = ["launch", "--nproc-per-node", "2", "--model", support::MODEL, "--placement", "experts"];
    let words = ["load.placement: expected shard, replicate or layers", "has no experts"];
    expect_refused("a dense model", &place.run(&dense), CONFIG, &words);
    place.expect_no_process();
}
