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
    DTypeRule, DeviceRule, LoadPlan, LoadRequest, Placement, QuantizationRule, Quantized, plan, state_plan,
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
                let workload = Workload { purpose, sequence_tokens: 64, ..Workload::load(world, model.dtype) };
                let predicted = estimate(&model.skeleton, &workload);
                if !model.skeleton.config.as_ref().is_some_and(weightcast::train::is_trainable) {
                    assert!(matches!(predicted, Err(EstimateError::Unsupported { .. })));
                    continue;
                }
                let recipe: Recipe =
                    toml::from_str(&format!("type = \"{kind}\"\ndata = {{ train = \"t.txt\" }}")).expect("a recipe");
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
