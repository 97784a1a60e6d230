//! Estimates made without files against the plans that real files get.
#![expect(clippy::disallowed_methods, reason = "a test reads its vectors")]

use std::path::Path;

use clap::ValueEnum as _;
use weightcast::adapter::{AdapterConfig, TargetModules};
use weightcast::config::{QuantizationConfig, QuantizationFormat};
use weightcast::device::Device;
use weightcast::estimate::{
    Attention, EstimateError, Method, Optimizer, Purpose, TrainEngine, Training, Workload, estimate, trained_tensors,
};
use weightcast::format::safetensors::{header_len, parse_header};
use weightcast::format::{FileEntry, ModelIndex, merge};
use weightcast::model::{
    Architecture, GENERATED, GenerateRequest, NewModel, Preset, Skeleton, generate, generate_preset,
};
use weightcast::plan::{
    Chunking, DTypeRule, DeviceRule, LoadPlan, LoadRequest, Placement, QuantizationRule, Quantized, plan, state_plan,
};
use weightcast::state::StateDict;
use weightcast::train::Recipe;
use weightcast::types::{DType, DeviceWish, WorldSize, as_u64, as_usize};

/// A model with the index that its files' headers give.
struct Model {
    skeleton: Skeleton,
    index: ModelIndex,
    dtype: DType,
}

impl Model {
    fn generated(model: &NewModel, dtype: DType) -> Self {
        let header = |(number, file): (usize, &weightcast::model::NewFile)| {
            let mut start = [0; 8];
            model.fill(number, 0, &mut start);
            let len = header_len(&file.name, &start, file.len_bytes).expect("its own header");
            let mut bytes = vec![0; as_usize(len)];
            model.fill(number, 8, &mut bytes);
            let header = parse_header(&file.name, &bytes, file.len_bytes).expect("its own header");
            (FileEntry { name: file.name.clone(), len_bytes: file.len_bytes }, header)
        };
        let index = merge(model.files.iter().enumerate().map(header).collect(), None).expect("its own files");
        let skeleton = Skeleton::from_config(model.config_json.as_bytes()).expect("its own configuration");
        Self { skeleton, index, dtype }
    }

    /// The model that transformers saved (tests/data/model/README.md).
    fn t5() -> Self {
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/model/t5");
        let bytes = std::fs::read(place.join("model.safetensors")).expect("the vector");
        let len_bytes = as_u64(bytes.len());
        let len = header_len("t5", &bytes, len_bytes).expect("a real header");
        let header = parse_header("t5", &bytes[8..8 + as_usize(len)], len_bytes).expect("a real header");
        let index = merge(vec![(FileEntry { name: "t5".into(), len_bytes }, header)], None).expect("one file");
        let config = std::fs::read(place.join("config.json")).expect("the vector");
        Self { skeleton: Skeleton::from_config(&config).expect("its configuration"), index, dtype: DType::F32 }
    }

    /// As a job plans it from the files.
    fn plan(&self, workload: &Workload) -> LoadPlan {
        let request = LoadRequest {
            model: "files".to_owned(),
            root: String::new(),
            config_json: None,
            world: workload.world,
            strategy: workload.strategy,
            placement: workload.placement,
            dtype: workload.dtype,
            quantization: workload.quantization.clone(),
            quantized: Quantized::Refuse,
            chunking: workload.chunking,
            digests: false,
            device: DeviceRule { device: DeviceWish::Cpu, ..DeviceRule::default() },
            split: workload.split.clone(),
        };
        let binding = self.skeleton.bind(&self.index).expect("its own tensors");
        plan(request, &self.index, &self.skeleton, &binding).expect("it can be loaded")
    }
}

fn models() -> Vec<Model> {
    let generated = |architecture: Architecture| {
        let request = GenerateRequest {
            architecture,
            parameters: 1_000_000,
            dtype: DType::BF16,
            seed: 1,
            max_file_bytes: 1_000_000,
        };
        Model::generated(&generate(&request).expect("a small model"), DType::BF16)
    };
    let mut models: Vec<Model> = GENERATED.into_iter().map(generated).collect();
    models.push(Model::generated(&generate_preset(Preset::M38, DType::F32, 1).expect("GPT-2"), DType::F32));
    models.push(Model::t5());
    models
}

/// Every format with each of its switches.
fn rules() -> Vec<QuantizationRule> {
    let mut rules = Vec::new();
    for &format in QuantizationFormat::value_variants() {
        for double in [false, true] {
            for block in [None, Some(32), Some(128)] {
                for bits in [None, Some(1), Some(2), Some(3), Some(5), Some(6), Some(8)] {
                    for axis in [None, Some(0)] {
                        let config =
                            QuantizationConfig { format, double, block, bits, axis, ..QuantizationConfig::default() };
                        rules.extend(config.rule());
                    }
                }
            }
        }
    }
    rules
}

fn worlds() -> impl Iterator<Item = WorldSize> {
    [1, 2, 3, 4, 8].into_iter().filter_map(|ranks| WorldSize::new(ranks).ok())
}

/// `ES-1`: for every architecture, format, placement and number of ranks, what is predicted without files is what the plan
/// of the files keeps.
#[test]
fn es_1_predicted_bytes_are_kept_bytes() {
    let (models, rules) = (models(), rules());
    let mut compared = 0;
    for model in &models {
        let experts = model.skeleton.architecture.has_experts();
        let layers = model.skeleton.layers();
        for (number, rule) in rules.iter().enumerate() {
            for placement in [Placement::Replicate, Placement::Shard, Placement::Layers, Placement::Experts] {
                for world in worlds() {
                    if placement == Placement::Experts && !experts {
                        continue;
                    }
                    let dtype = if number % 2 == 0 { DTypeRule::Keep } else { DTypeRule::Convert(DType::F16) };
                    let split = vec![3, 1];
                    let workload = Workload {
                        placement,
                        quantization: rule.clone(),
                        dtype,
                        split,
                        ..Workload::load(world, model.dtype)
                    };
                    let predicted = estimate(&model.skeleton, &workload);
                    if placement == Placement::Layers && world.get() > layers {
                        assert!(matches!(predicted, Err(EstimateError::Value { field: "ranks", .. })));
                        continue;
                    }
                    let (predicted, actual) = (predicted.expect("it can be"), model.plan(&workload));
                    for rank in world.ranks() {
                        let (found, memory) = (predicted.ranks[rank.index()], actual.memory(rank));
                        let bytes = found.weights_bytes + found.statistics_bytes;
                        let what =
                            format!("{} {rule:?} {placement:?} {world} {rank}", model.skeleton.architecture.name());
                        assert_eq!(bytes, actual.kept_bytes(rank), "{what}");
                        assert_eq!(found.padding_bytes, memory.padding_bytes, "{what}");
                        assert_eq!(found.window_bytes, memory.window_bytes, "{what}");
                        assert_eq!(found.peak_bytes, memory.peak_host_bytes, "{what}");
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 10_000, "{compared}");
}

/// `ES-1` to the end: the memory that a rank really takes for its state.
#[test]
fn es_1_predicted_bytes_are_allocated_bytes() {
    for model in models().iter().filter(|model| model.skeleton.parameters() < 2_000_000) {
        for rule in rules().iter().step_by(5) {
            let world = WorldSize::new(3).expect("not zero");
            let workload = Workload { quantization: rule.clone(), ..Workload::load(world, model.dtype) };
            let predicted = estimate(&model.skeleton, &workload).expect("it can be");
            let actual = model.plan(&workload);
            for rank in world.ranks() {
                let state = StateDict::allocate(&actual, rank, Device::Host).expect("a small model");
                let found = predicted.ranks[rank.index()];
                let bytes = found.weights_bytes + found.statistics_bytes + found.padding_bytes;
                assert_eq!(bytes, as_u64(state.arena_bytes()), "{rule:?} {rank}");
            }
        }
    }
}

fn training(method: Method) -> Training {
    Training {
        method,
        engine: TrainEngine::Weightcast,
        optimizer: Optimizer::F32,
        activation_checkpointing: true,
        attention: Attention::Flash,
    }
}

/// Adapters, or all weights, and both moments of AdamW: against the state that a run keeps, and the trainer's own list of
/// what it trains.
#[test]
fn es_1_trained_state_is_the_runs_state() {
    let mut compared = 0;
    for model in models() {
        let adapter = || Box::new(AdapterConfig::new(8, 16.0, TargetModules::AllLinear));
        for (kind, method) in [("full", Method::Full), ("lora", Method::Lora(adapter()))] {
            for world in worlds() {
                let purpose = Purpose::Train(training(method.clone()));
                // A window so small that training, and not loading, is the worst moment.
                let chunking = Chunking { chunk_bytes: 1 << 12, reader_threads: 1, queue_chunks: 1 };
                let workload =
                    Workload { purpose, chunking, sequence_tokens: 64, ..Workload::load(world, model.dtype) };
                let predicted = estimate(&model.skeleton, &workload);
                if !model.skeleton.config.as_ref().is_some_and(weightcast::train::is_trainable) {
                    assert!(matches!(predicted, Err(EstimateError::Unsupported { .. })));
                    continue;
                }
                let recipe = format!("type = \"{kind}\"\ndata = {{ train = \"t.txt\", sequence-length = 64 }}");
                let recipe: Recipe = toml::from_str(&recipe).expect("a recipe");
                let trained = weightcast::train::trained_tensors(&recipe, &model.skeleton, None)
                    .expect("it trains something")
                    .tensors;
                assert_eq!(trained_tensors(&model.skeleton, &method).expect("it trains something"), trained);
                let state = state_plan(&model.plan(&workload), &trained);
                let elements: u64 = trained.iter().map(|(_, shape)| shape.elements().expect("small")).sum();
                let predicted = predicted.expect("it can be");
                assert_eq!(predicted.trained_parameters, elements);
                let total: u64 = predicted.ranks.iter().map(|rank| rank.optimizer_bytes).sum();
                assert_eq!(total, 12 * elements, "parameters and two moments in f32, once over all ranks");
                for rank in world.ranks() {
                    let found = predicted.ranks[rank.index()];
                    assert_eq!(found.optimizer_bytes, state.kept_bytes(rank));
                    assert_eq!(found.parameter_bytes, 4 * elements);
                    compared += 1;
                }
            }
        }
    }
    assert!(compared >= 2 * 18 * 5, "{compared}");
}

/// What a training job plans for a model's files is what is estimated of it, to the byte.
#[test]
fn es_1_training_takes_what_a_job_plans() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");
    let config_json = std::fs::read(Path::new(model).join("config.json")).expect("the vector");
    let skeleton = Skeleton::from_config(&config_json).expect("its configuration");
    let place = tempfile::tempdir().expect("a directory");
    let nf4 = QuantizationConfig { format: QuantizationFormat::Nf4, double: true, ..QuantizationConfig::default() };
    for (kind, quantization) in [("full", None), ("lora", None), ("qlora", Some(&nf4))] {
        for world in worlds() {
            let text = format!(
                "model.source = \"{model}\"\ncheckpoint.directory = \"{}\"\n[train]\ntype = \"{kind}\"\n\
                 batch-size = 16\nmicro-batch-size = 2\ndata = {{ train = \"t.txt\", sequence-length = 512 }}\n",
                place.path().join("ckpt").display()
            );
            let job: weightcast::config::JobConfig = toml::from_str(&text).expect("a job");
            let prepared = weightcast::app::prepare_with(&job, world, None, &|_| {}).expect("a plan");
            let method = match kind {
                "full" => Method::Full,
                _ => Method::Lora(Box::new(AdapterConfig::new(8, 16.0, TargetModules::AllLinear))),
            };
            let workload = Workload {
                quantization: quantization.map_or(QuantizationRule::None, |config| config.rule().expect("a rule")),
                chunking: job.chunking().expect("sizes"),
                batch_sequences: 2,
                sequence_tokens: 512,
                purpose: Purpose::Train(training(method)),
                ..Workload::load(world, DType::BF16)
            };
            let predicted = estimate(&skeleton, &workload).expect("it can be");
            for rank in world.ranks() {
                let (found, planned) = (predicted.ranks[rank.index()], prepared.plan.memory(rank));
                assert_eq!(found.peak_bytes, planned.peak_host_bytes, "{kind} {world} {rank}");
            }
        }
    }
}

/// `ES-2`: whatever is asked, the terms add up.
#[test]
fn es_2_terms_add_up() {
    let model = Model::generated(&generate_preset(Preset::M38, DType::BF16, 1).expect("GPT-2"), DType::BF16);
    let inference = Purpose::Inference { cache_dtype: DType::BF16, attention: Attention::Exact };
    for purpose in [Purpose::Load, inference, Purpose::Train(training(Method::Full))] {
        for world in worlds() {
            let workload =
                Workload { purpose: purpose.clone(), sequence_tokens: 64, ..Workload::load(world, model.dtype) };
            for rank in estimate(&model.skeleton, &workload).expect("it can be").ranks {
                assert_eq!(rank.terms().iter().map(|(_, bytes)| bytes).sum::<u64>(), rank.peak_bytes);
                assert!(rank.peak_bytes > rank.weights_bytes);
            }
        }
    }
}

/// `weightcast plan` with these arguments: exit code, stdout, stderr.
fn cli(arguments: &[&str]) -> (Option<i32>, String, String) {
    weightcast(&[&["plan"], arguments].concat())
}

/// With a directory of its own for what tells of running jobs, and without a hub.
fn weightcast(arguments: &[&str]) -> (Option<i32>, String, String) {
    let runtime = tempfile::tempdir().expect("a directory");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_weightcast"));
    command.args(arguments).env("XDG_RUNTIME_DIR", runtime.path()).env("HF_HUB_OFFLINE", "1");
    let output = command.output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn cli_json(arguments: &[&str]) -> serde_json::Value {
    let (code, stdout, stderr) = cli(&[arguments, &["--json"]].concat());
    assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
    serde_json::from_str(&stdout).expect("JSON")
}

const SIZES: [&str; 14] = [
    "--arch",
    "llama",
    "--hidden",
    "4096",
    "--layers",
    "32",
    "--heads",
    "32",
    "--kv-heads",
    "32",
    "--intermediate",
    "11008",
    "--vocab",
    "32000",
];

/// The published count, and by hand: 2 bytes each, cut over two ranks but for 65 norms of 4096, which both keep.
#[test]
fn a_profile_is_planned_by_name_and_by_sizes() {
    for arguments in [&["llama-2-7b"][..], &SIZES[..]] {
        let found = cli_json(&[arguments, &["--ranks", "2"]].concat());
        assert_eq!(found["parameters"], 6_738_415_616_u64);
        let weights: u64 = (0..2).filter_map(|rank| found["ranks"][rank]["estimate"]["weights_bytes"].as_u64()).sum();
        assert_eq!(weights, 2 * 6_738_415_616 + 2 * 65 * 4096);
    }
}

#[test]
fn devices_are_filled_or_found_too_small() {
    let found = cli_json(&["llama-2-7b", "--gpus", "24,12", "--inference"]);
    assert_eq!((found["fits"].as_bool(), found["placement"].as_str()), (Some(true), Some("layers")));
    assert_eq!(found["device_map"]["owners"].as_array().map(Vec::len), Some(35));
    assert!(found["largest_batch_sequences"].as_u64() >= Some(1));
    let (code, stdout, stderr) = cli(&["llama-2-70b", "--gpus", "24", "--inference"]);
    assert_eq!(code, Some(78), "{stderr}");
    assert!(stderr.contains("does not fit: ") && stderr.contains(" GiB over; "), "{stderr}");
    assert!(stdout.lines().any(|line| line.contains("weights") && line.contains("137953296384")), "{stdout}");
    let (code, _, stderr) = cli(&["llama-2-7b", "--gpus", "24,24", "--train", "qlora", "--sequence", "2048"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("rank 1: fits in 24.0 GiB") && stderr.contains("largest    batch "), "{stderr}");
    let (code, _, stderr) = cli(&["llama-2-7b", "--gpus", "12,12", "--train", "full"]);
    assert_eq!(code, Some(78), "{stderr}");
    assert!(stderr.contains("the smallest change that would make it fit: train an adapter over NF4"), "{stderr}");
}

/// The bars and the picture show both ranks, what they may use, and where each of 35 units lies.
#[test]
fn an_estimate_is_drawn() {
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("memory.svg").display().to_string();
    let arguments = ["llama-2-7b", "--gpus", "24,12", "--inference", "--bars", "--svg", &path];
    let (code, _, stderr) = cli(&arguments);
    assert_eq!(code, Some(0), "{stderr}");
    for rank in ["rank 0   www", "rank 1   www"] {
        assert!(stderr.contains(rank), "{stderr}");
    }
    let svg = std::fs::read_to_string(&path).expect("a picture");
    assert_eq!(svg.matches("what it may use").count(), 2, "{svg}");
    assert_eq!(svg.matches("<title>unit ").count(), 35, "{svg}");
    let (code, _, stderr) = cli(&arguments);
    assert_ne!(code, Some(0), "a file that is there stays: {stderr}");
}

#[test]
fn a_model_directory_and_a_file_of_profiles_are_estimated() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");
    // By its own index: 2,755,008 parameters in bf16.
    let found = cli_json(&["--model", model, "--inference"]);
    assert_eq!(found["ranks"][0]["estimate"]["weights_bytes"], 5_510_016);
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("mine.toml");
    let text = "[tiny]\nmodel_type = \"llama\"\nhidden_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 4\n\
                intermediate_size = 128\nvocab_size = 256\n";
    let file = path.display().to_string();
    std::fs::write(&path, text).expect("a file");
    assert_eq!(cli_json(&["--profile", &file])["parameters"], 115_008);
    std::fs::write(&path, format!("{text}hiden_size = 3\n")).expect("a file");
    let (code, _, stderr) = cli(&["--profile", &file]);
    assert_eq!(code, Some(65));
    assert!(stderr.contains("mine.toml: line 8: unknown field `hiden_size`"), "{stderr}");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let check = |arguments: &[&str], expected_code: i32, expected: &str| {
        let (code, _, stderr) = cli(arguments);
        assert_eq!(code, Some(expected_code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    };
    check(&["llama-9", "--inference"], 65, "no profile \"llama-9\": known are bert-base");
    check(&["--arch", "falcon", "--hidden", "64"], 65, "unknown architecture \"falcon\"");
    check(&["--arch", "llama", "--hidden", "64"], 65, "no num_attention_heads");
    check(&["llama-2-7b", "--gpus", "0"], 64, "expected GiB above 0");
    check(&["llama-2-7b", "--gpus", "24,-1"], 64, "expected GiB above 0");
    check(
        &["llama-2-7b", "--gpus", "24,24", "--ranks", "3"],
        78,
        "ranks: expected as many as there are devices, found 3",
    );
    check(&["llama-2-7b", "--inference", "--batch", "0"], 65, "batch: expected at least 1, found 0");
    check(&["llama-2-7b", "--inference", "--batch", "99999999999"], 65, "batch times sequence of at most");
    check(&["gpt2", "--inference", "--sequence", "4096"], 65, "sequence: expected at most 1024");
    let many = ["80"; 13].join(",");
    check(&["gpt2", "--inference", "--gpus", &many], 65, "ranks: expected at most 12, the number of layers");
    check(&["gpt2", "--ranks", "2", "--placement", "experts", "--inference"], 78, "has no experts");
    check(&["bert-base", "--train", "lora"], 78, "training bert with weightcast's trainer");
    check(&["llama-2-7b", "--train", "full", "--quantize", "nf4"], 78, "quantized weights are not trained");
    check(&["--inference"], 78, "model: expected a profile's name");
    check(&["llama-2-7b", "--gpus", "24,auto"], 78, "gpus: expected GiB of each device, or auto or none alone");
    check(&["llama-2-7b", "--max-memory", "1=24GiB"], 78, "max-memory: expected each device once, from 0 on, found 1");
    check(
        &["llama-2-7b", "--max-memory", "cpu=24GiB", "--train", "qlora", "--offload"],
        78,
        "offload: expected devices",
    );
    check(&["llama-2-7b", "--train", "qlora", "--recommend", "-o", "/nowhere"], 78, "data: expected --data FILE");
}
