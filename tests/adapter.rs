//! Adapters from outside: a training checkpoint exported, an adapter merged, and what is refused.
#![expect(clippy::disallowed_methods, reason = "a black-box test reads and damages files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use support::{MODEL, Place};
use weightcast::checkpoint::{WriteRequest, begin, commit, write_shard};
use weightcast::device::Device;
use weightcast::manifest::{BestEvaluation, Manifest, SealRequest, TrainingState};
use weightcast::plan::{
    Chunking, DeviceRule, Encoding, Input, LoadPlan, PLAN_VERSION, Placement, Strategy, TensorPlan, f32Bits,
};
use weightcast::state::StateDict;
use weightcast::store::LocalStore;
use weightcast::types::{DType, Generation, Rank, Shape, Step, WorldSize};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden");

/// A tensor of a safetensors file: type, shape, bytes.
type Stored = (String, Vec<u64>, Vec<u8>);

fn tensors(path: impl AsRef<Path>) -> BTreeMap<String, Stored> {
    let bytes = std::fs::read(path).expect("a file");
    let len = usize::try_from(u64::from_le_bytes(*bytes.first_chunk().expect("a length"))).expect("it fits");
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).expect("JSON");
    let tensor = |(name, entry): (&String, &Value)| {
        let at = |end: usize| {
            8 + len + usize::try_from(entry["data_offsets"][end].as_u64().expect("an offset")).expect("it fits")
        };
        let shape =
            entry["shape"].as_array().expect("a shape").iter().map(|size| size.as_u64().expect("a size")).collect();
        (name.clone(), (entry["dtype"].as_str().expect("a type").to_owned(), shape, bytes[at(0)..at(1)].to_vec()))
    };
    header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__").map(tensor).collect()
}

/// All tensors of a model's files.
fn model_tensors(directory: &str) -> BTreeMap<String, Stored> {
    let paths = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).flat_map(tensors).collect()
}

fn f32s((dtype, _, bytes): &Stored) -> Vec<f32> {
    match dtype.as_str() {
        "F32" => bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect(),
        "BF16" => {
            bytes.as_chunks().0.iter().map(|half| f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16)).collect()
        }
        other => panic!("{other}"),
    }
}

fn golden_adapter() -> BTreeMap<String, Stored> {
    tensors(format!("{GOLDEN}/tiny-llama-peft-r4/adapter_model.safetensors"))
}

/// Commits a checkpoint of two ranks, each with its rows of the adapter and of its moments.
fn save(root: &str, step: u64, adapter: &BTreeMap<String, Stored>, training: Option<TrainingState>) {
    let world = WorldSize::new(2).expect("two");
    let moments = adapter.iter().map(|(name, tensor)| (format!("optimizer.exp_avg.{name}"), tensor.clone()));
    let all: Vec<(String, Stored)> = adapter.clone().into_iter().chain(moments).collect();
    let planned = |(name, (_, shape, _)): &(String, Stored)| TensorPlan {
        owner: None,
        fqn: name.as_str().into(),
        shape: Shape(shape.clone()),
        encoding: Encoding::Plain { dtype: DType::F32 },
        sharded: true,
        reader: Rank::ZERO,
        input: Input::Stored { parts: Vec::new(), nested_offset: None },
    };
    let plan = LoadPlan {
        train: None,
        others: Vec::new(),
        version: PLAN_VERSION,
        model: "tiny-llama".to_owned(),
        config_json: None,
        world,
        strategy: Strategy::Full,
        placement: Placement::Shard,
        chunking: Chunking { chunk_bytes: 1 << 20, reader_threads: 1, queue_chunks: 1 },
        digests: false,
        device: DeviceRule::default(),
        root: String::new(),
        files: Vec::new(),
        versions: Vec::new(),
        digest_tables: Vec::new(),
        cache: None,
        tensors: all.iter().map(planned).collect(),
        aliases: Vec::new(),
    };
    let store = LocalStore::new(root);
    std::fs::create_dir_all(root).expect("a directory");
    let step = Step(step);
    let (attempt, directory) = begin(&store, step).expect("a new step");
    let mut receipts = Vec::new();
    for rank in world.ranks() {
        let mut state = StateDict::allocate(&plan, rank, Device::Host).expect("memory");
        for (index, (_, (_, _, bytes))) in all.iter().enumerate() {
            let owned = state.parts(index)[0].holding.owned;
            let range =
                usize::try_from(owned.start()).expect("it fits")..usize::try_from(owned.end()).expect("it fits");
            state.write((index, 0), 0, &bytes[range]).expect("it fits");
        }
        let request = WriteRequest { plan: &plan, state: &state, store: &store, directory: &directory, step };
        receipts.push(write_shard(&request, &|_| {}).expect("it is written"));
    }
    let request = SealRequest { plan: &plan, step, attempt, generation: Generation(1) };
    let committed = commit(&store, &request, receipts).expect("it is whole");
    let path = Path::new(root).join(committed).join("manifest.json");
    let mut manifest = Manifest::decode(&std::fs::read(&path).expect("a manifest")).expect("a manifest");
    manifest.trainer.training = training.map(Box::new);
    std::fs::write(&path, manifest.encode()).expect("a manifest");
}

fn training(best: Option<u64>, base: &str) -> TrainingState {
    let config = std::fs::read(format!("{GOLDEN}/tiny-llama-peft-r4/adapter_config.json")).expect("PEFT's");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["base_model_name_or_path"] = Value::Null;
    TrainingState {
        data_digest: String::new(),
        recipe: json!({"base-quantization": "nf4"}),
        adapter: Some(config),
        base_model: base.to_owned(),
        base_digest: String::new(),
        samples: 8,
        tokens: 64,
        best: best.map(|step| BestEvaluation { step: Step(step), loss: f32Bits(0) }),
        evaluations_since_best: 0,
        last_evaluation: None,
    }
}

/// PEFT's adapter, cut over two ranks and saved as a checkpoint, comes out as PEFT's files; the base is the run's.
#[test]
fn a_checkpoint_is_exported_as_pefts_files() {
    let place = Place::new();
    let [root, best, newest, half] = ["root", "best", "newest", "half"].map(|name| place.path(name));
    let adapter = golden_adapter();
    let mut later = adapter.clone();
    later.values_mut().for_each(|(_, _, bytes)| bytes.fill(0));
    save(&root, 3, &adapter, Some(training(None, "tiny-llama")));
    save(&root, 7, &later, Some(training(Some(3), "tiny-llama")));

    let flags = ["adapter", "export", "--checkpoint", &root, "--json"];
    let answer = place.finish(&[&flags[..], &["--step", "best", "--output", &best]].concat());
    // 18 modules of rank 4: 6·(4·192 + 4·192), 6·(4·192 + 4·64) and 6·(4·512 + 4·192).
    assert_eq!((&answer["step"], &answer["modules"], &answer["parameters"]), (&json!(3), &json!(18), &json!(32256)));
    assert_eq!(tensors(format!("{best}/adapter_model.safetensors")), adapter);
    let text = |path: String| std::fs::read_to_string(path).expect("a file");
    assert_eq!(
        text(format!("{best}/adapter_config.json")),
        text(format!("{GOLDEN}/tiny-llama-peft-r4/adapter_config.json"))
    );
    assert!(text(format!("{best}/README.md")).starts_with("---\nbase_model: \"tiny-llama\"\nlibrary_name: peft\n"));

    place.finish(&[&flags[..], &["--output", &newest]].concat());
    assert_eq!(tensors(format!("{newest}/adapter_model.safetensors")), later);

    place.finish(&[&flags[..], &["--step", "3", "--output", &half, "--dtype", "bfloat16"]].concat());
    for (name, tensor) in tensors(format!("{half}/adapter_model.safetensors")) {
        assert_eq!(tensor.0, "BF16");
        // Eight bits of precision: half a unit in the last place is at most 2^-8 of the value.
        for (value, exact) in f32s(&tensor).iter().zip(f32s(&adapter[&name])) {
            assert!((value - exact).abs() <= exact.abs() / 256.0, "{name}: {value} {exact}");
        }
    }
}

#[test]
fn checkpoints_without_an_adapter_and_damaged_ones_are_refused() {
    let place = Place::new();
    let [loaded, trained, output] = ["loaded", "trained", "output"].map(|name| place.path(name));
    save(&loaded, 1, &golden_adapter(), None);
    save(&trained, 1, &golden_adapter(), Some(training(None, "tiny-llama")));
    let refuse = |root: &str, more: &[&str], words: &[&str]| {
        let ended = place.run(&[&["adapter", "export", "--checkpoint", root, "--output", &output], more].concat());
        assert_eq!(ended.code, Some(65), "{}", ended.stderr);
        words.iter().for_each(|word| assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr));
        assert!(!Path::new(&output).join("adapter_config.json").exists());
    };
    refuse(&loaded, &[], &["step-000000001", "has no adapter"]);
    refuse(&trained, &["--step", "best"], &["no evaluation"]);
    refuse(&trained, &["--step", "2"], &["step-000000002"]);
    refuse(&place.path("nowhere"), &[], &["no checkpoint"]);
    let shard = format!("{trained}/step-000000001/shard-00002-model-00001-of-00001.safetensors");
    let mut bytes = std::fs::read(&shard).expect("a shard");
    bytes.iter_mut().skip(40_000).step_by(4096).for_each(|byte| *byte ^= 1);
    std::fs::write(&shard, bytes).expect("a shard");
    refuse(&trained, &[], &["shard-00002", "is damaged in tensor base_model.model."]);
}

/// Every merged value is the base's plus 2·(B·A), by hand in f64; every other tensor is the base's, byte for byte. The
/// figure is what bitsandbytes 0.50's NF4 gives for the 18 matrices: 0.09194.
#[test]
fn an_adapter_is_merged_into_the_base_of_its_run() {
    let place = Place::new();
    let [root, output] = ["root", "merged"].map(|name| place.path(name));
    save(&root, 1, &golden_adapter(), Some(training(None, MODEL)));
    let flags = ["adapter", "merge", "--checkpoint", &root, "--output", &output, "--dtype", "float32"];
    let ended = place.run(&[&flags[..], &["--shard-size", "2MB", "--json"]].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("warning: the adapter was trained beside nf4 weights"), "{}", ended.stderr);
    let answer = ended.json();
    let figure = answer["quantization"]["relative_error"].as_f64().expect("a figure");
    assert!((figure - 0.091_940_5).abs() < 2e-5, "{figure}");
    let (base, merged, adapter) = (model_tensors(MODEL), model_tensors(&output), golden_adapter());
    assert_eq!(base.keys().collect::<Vec<_>>(), merged.keys().collect::<Vec<_>>());
    let mut changed = 0;
    for (name, tensor) in &merged {
        let (values, before) = (f32s(tensor), f32s(&base[name]));
        let module = name.strip_suffix(".weight").expect("a weight");
        let part = |part: &str| adapter.get(&format!("base_model.model.{module}.lora_{part}.weight")).map(f32s);
        let (Some(a), Some(b)) = (part("A"), part("B")) else {
            assert_eq!(values, before, "{name}");
            continue;
        };
        changed += 1;
        let columns = usize::try_from(tensor.1[1]).expect("it fits");
        for (at, value) in values.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let product: f64 = (0..4).map(|k| f64::from(b[row * 4 + k]) * f64::from(a[k * columns + column])).sum();
            let expected = f64::from(before[at]) + 2.0 * product;
            assert!((f64::from(*value) - expected).abs() < 1e-7 * expected.abs().max(1.0), "{name} {at}");
        }
    }
    assert_eq!(changed, 18);
    let config: Value =
        serde_json::from_slice(&std::fs::read(format!("{output}/config.json")).expect("a file")).expect("JSON");
    assert_eq!(config["dtype"], "float32");
    for name in ["tokenizer.json", "generation_config.json"] {
        assert_eq!(
            std::fs::read(format!("{output}/{name}")).expect("a file"),
            std::fs::read(format!("{MODEL}/{name}")).expect("a file")
        );
    }
    // The merged model is one that we load.
    place.finish(&["model", "inspect", &output, "--json"]);
}

#[test]
fn what_cannot_be_merged_is_refused_with_the_reason() {
    let place = Place::new();
    let [output, other] = ["output", "other"].map(|name| place.path(name));
    let adapter = format!("{GOLDEN}/tiny-llama-peft-r4");
    let merge = |code: i32, more: &[&str], words: &[&str]| {
        let ended = place.run(&[&["adapter", "merge", "--adapter", &adapter, "--output", &output], more].concat());
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        words.iter().for_each(|word| assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr));
        assert!(!Path::new(&output).join("config.json").exists());
    };
    let quantized = format!("{GOLDEN}/tiny-llama-bnb-nf4-double");
    merge(65, &["--base", &quantized], &["weights are quantized (bitsandbytes)", "lose what was trained"]);
    // Statistics as a processor with bf16 dot products leaves them.
    let reordered = format!("{GOLDEN}/tiny-llama-bnb-nf4");
    merge(65, &["--base", &reordered], &["down_proj.weight: absmax: expected F32 [1536], found BF16 [8, 192]"]);
    merge(64, &["--base", MODEL, "--dtype", "nf4"], &["lose what was trained"]);
    let made = place.run(&["model", "new", "--params", "1M", &other]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    merge(65, &["--base", &other], &["of another shape", "lora_A.weight: expected [4, ", "], found [4, "]);
    let bert = place.path("bert");
    let made = place.run(&["model", "new", "--arch", "bert", "--params", "1M", &bert]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    merge(65, &["--base", &bert], &["target_modules q_proj, down_proj, v_proj match no linear layer", "query"]);
}
