//! Loading tiny-llama in one process, with threads as ranks, against the files that transformers and bitsandbytes wrote.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use super::{Cancel, LoadOptions, load, scan};
use crate::comm::{Communicator, mem};
use crate::device::{Device, DeviceError};
use crate::format::parse_index_json;
use crate::model::Skeleton;
use crate::plan::{
    Chunking, DTypeRule, DeviceRule, GgmlMix, LoadPlan, LoadRequest, Part, Placement, QuantizationRule, Quantized,
    Strategy, plan,
};
use crate::quant::affine::{CodeBits, GroupAxis, MlxRule};
use crate::quant::{BlockSize, FourBitCode, Kernels};
use crate::state::StateDict;
use crate::store::{LocalStore, Store, read_small};
use crate::types::{DType, TensorDigest, WorldSize, as_usize};

mod packed;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden");

struct Case {
    world: u32,
    strategy: Strategy,
    placement: Placement,
    quantization: QuantizationRule,
    chunk_bytes: u64,
}

fn nf4(nested: bool) -> QuantizationRule {
    QuantizationRule::FourBit { code: FourBitCode::Nf4, block: BlockSize::B64, nested, skip: Vec::new() }
}

fn mlx(bits: CodeBits) -> QuantizationRule {
    QuantizationRule::Mlx { rule: MlxRule::new(bits, 32).expect("known"), skip: Vec::new() }
}

fn make_plan(case: &Case) -> LoadPlan {
    let store = LocalStore::new(MODEL);
    let read = |name| read_small(&store, name, 1 << 20).expect("the model is part of the project");
    let index_json = parse_index_json("index", &read("model.safetensors.index.json")).expect("an index");
    let index = scan(&store, &index_json.files(), Some(&index_json)).expect("good headers");
    let config = read("config.json");
    let skeleton = Skeleton::from_config(&config).expect("a config");
    let binding = skeleton.bind(&index).expect("the keys fit");
    let request = LoadRequest {
        model: "tiny-llama".to_owned(),
        root: MODEL.to_owned(),
        config_json: String::from_utf8(config).ok(),
        world: WorldSize::new(case.world).expect("not zero"),
        strategy: case.strategy,
        placement: case.placement,
        dtype: DTypeRule::Convert(DType::F32),
        quantization: case.quantization.clone(),
        quantized: Quantized::Refuse,
        chunking: Chunking { chunk_bytes: case.chunk_bytes, reader_threads: 3, queue_chunks: 4 },
        digests: false,
        device: DeviceRule::default(),
        split: Vec::new(),
    };
    plan(request, &index, &skeleton, &binding).expect("a plan")
}

fn run(case: &Case) -> (LoadPlan, Vec<StateDict>, u64) {
    let plan = make_plan(case);
    let (states, read) = carry_out(&plan, MODEL);
    (plan, states, read)
}

/// Every rank's state, and the bytes that were read from storage.
fn carry_out(plan: &LoadPlan, root: &str) -> (Vec<StateDict>, u64) {
    let store = LocalStore::new(root);
    let group = mem::group(plan.world, Duration::from_secs(20));
    let states = thread::scope(|scope| {
        let ranks: Vec<_> = group
            .into_iter()
            .map(|mut comm| {
                let store = &store;
                scope.spawn(move || {
                    let options = LoadOptions {
                        rank: comm.group().rank,
                        store,
                        cache: None,
                        device: Device::Host,
                        comm_device: Device::Host,
                        kernels: Kernels::detect(),
                        cancel: Cancel::default(),
                        done_bytes: Arc::new(AtomicU64::new(0)),
                        meters: Arc::default(),
                    };
                    let abort = comm.abort_handle();
                    load(plan, &options, Some(&mut comm)).inspect_err(|error| abort.abort(&error.to_string()))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic").expect("it loads").0).collect()
    });
    (states, store.read_counter().bytes())
}

/// The owned bytes of a component, rank after rank.
fn concatenated(states: &[StateDict], place: (usize, usize)) -> Vec<u8> {
    let mut found = Vec::new();
    for state in states {
        let read = state.read_owned(place, 1 << 20, |chunk| {
            found.extend_from_slice(chunk);
            Ok::<_, DeviceError>(())
        });
        read.expect("host memory");
    }
    found
}

/// The digest of every logical tensor, put together from the ranks' owned parts.
fn digests(plan: &LoadPlan, states: &[StateDict]) -> BTreeMap<String, TensorDigest> {
    let per_rank: Vec<_> = states.iter().map(|state| state.owned_digests().expect("host memory")).collect();
    let logical = |(index, tensor): (usize, &crate::plan::TensorPlan)| {
        let components = 0..tensor.components().len();
        let parts = components.flat_map(|component| per_rank.iter().map(move |rank| rank[index][component]));
        (tensor.fqn.to_string(), parts.fold(TensorDigest::empty(), TensorDigest::append))
    };
    plan.tensors.iter().enumerate().map(logical).collect()
}

/// LD-3: strategy, placement, number of ranks and size of chunks make no difference to any byte; and every byte leaves
/// storage once when it is sent.
#[test]
fn ld_3_every_way_of_loading_gives_the_same_bytes() {
    let int8 = QuantizationRule::Int8 { skip: Vec::new() };
    let hqq = |bits, axis| QuantizationRule::Hqq { bits, group: 64, axis, skip: Vec::new() };
    let formats = [
        QuantizationRule::None,
        nf4(false),
        nf4(true),
        int8,
        mlx(CodeBits::B4),
        mlx(CodeBits::B3),
        hqq(CodeBits::B4, GroupAxis::Runs),
        hqq(CodeBits::B3, GroupAxis::Columns),
        QuantizationRule::Ggml { mix: GgmlMix::Q4KM, skip: Vec::new() },
    ];
    for quantization in formats {
        let case = |world, strategy, placement, chunk_bytes| Case {
            world,
            strategy,
            placement,
            quantization: quantization.clone(),
            chunk_bytes,
        };
        let (plan, states, _) = run(&case(1, Strategy::LowMemory, Placement::Replicate, 1 << 20));
        let expected = digests(&plan, &states);
        // HQQ solves for every rank that loads alone, which takes its time.
        let worlds: &[u32] = if matches!(quantization, QuantizationRule::Hqq { .. }) { &[1, 3] } else { &[1, 2, 3, 5] };
        for &world in worlds {
            for strategy in [Strategy::LowMemory, Strategy::Full, Strategy::Striped] {
                for placement in [Placement::Replicate, Placement::Shard] {
                    let (plan, states, read) = run(&case(world, strategy, placement, 40_000));
                    let about = format!("{quantization:?} {world} {strategy:?} {placement:?}");
                    if strategy != Strategy::Full {
                        assert_eq!(read, plan.input_bytes(), "{about}");
                    }
                    assert!(digests(&plan, &states) == expected, "{about}");
                }
            }
        }
    }
}

/// The f32 statistics of the golden file. bitsandbytes 0.50.2 saves a model that has run on a processor with bf16 dot
/// products with its statistics as bf16 in the order `[in/64, out]`; these values are exact in bf16, so nothing is lost.
fn transposed(bytes: &[u8], shape: &crate::types::Shape) -> Vec<u8> {
    let (groups, rows) = (as_usize(shape.0[0]), as_usize(shape.0[1]));
    let value = |row: usize, group: usize| {
        let at = (group * rows + row) * 2;
        half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32().to_le_bytes()
    };
    (0..rows).flat_map(|row| (0..groups).flat_map(move |group| value(row, group))).collect()
}

/// Against what transformers with bitsandbytes wrote for the same model: packed codes, statistics and plain tensors.
#[test]
fn nf4_equals_what_bitsandbytes_wrote() {
    for (nested, name) in [(false, "tiny-llama-bnb-nf4"), (true, "tiny-llama-bnb-nf4-double")] {
        let case = Case {
            world: 4,
            strategy: Strategy::LowMemory,
            placement: Placement::Shard,
            quantization: nf4(nested),
            chunk_bytes: 40_000,
        };
        let (plan, states, _) = run(&case);
        let store = LocalStore::new(format!("{GOLDEN}/{name}"));
        let golden = scan(&store, &["model.safetensors".to_owned()], None).expect("a golden file");
        let file = store.open("model.safetensors").expect("a golden file");
        let mut compared = 0;
        for (index, tensor) in plan.tensors.iter().enumerate() {
            for (component, whole) in tensor.components().iter().enumerate() {
                // Nested codes differ from the CPU library's look-up table by design; `quant` compares them by its rule.
                if whole.part == Part::NestedOffset || (nested && whole.part != Part::Weight) {
                    continue;
                }
                let name = crate::manifest::part_name(&tensor.fqn, &tensor.encoding, whole.part);
                let entry = &golden.tensors[name.as_str()];
                let mut expected = vec![0; as_usize(entry.range.len())];
                file.read_exact_at(entry.range.start(), &mut expected).expect("in the file");
                let expected = if whole.part == Part::Absmax { transposed(&expected, &entry.shape) } else { expected };
                assert!(concatenated(&states, (index, component)) == expected, "{name}");
                compared += 1;
            }
        }
        // 6 layers of 7 matrices with 1 or 2 compared components, 2 norms each, embedding and last norm.
        assert_eq!(compared, 6 * (7 * if nested { 1 } else { 2 } + 2) + 2);
    }
}
