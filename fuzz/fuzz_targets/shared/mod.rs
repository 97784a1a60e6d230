//! What a plan must hold, wherever it came from: every byte of every component has one owner among the ranks, who keeps it.

use weightcast::plan::{DeviceRule, Chunking, DTypeRule, LoadPlan, LoadRequest, Part, Placement, QuantizationRule, Strategy};
use weightcast::quant::{BlockSize, FourBitCode};
use weightcast::types::WorldSize;

/// Models below this many bytes are planned; no larger one was ever stored.
pub const MAX_MODEL_BYTES: u64 = 1 << 50;

/// A request that quantizes what it can.
pub fn request() -> LoadRequest {
    let block = BlockSize::new(64).expect("a size that exists");
    LoadRequest {
        model: "fuzzed".to_owned(),
        root: "/nowhere".to_owned(),
        config_json: None,
        world: WorldSize::new(3).expect("not zero"),
        strategy: Strategy::Striped,
        placement: Placement::Shard,
        dtype: DTypeRule::Keep,
        quantization: QuantizationRule::FourBit { code: FourBitCode::Nf4, block, nested: true, skip: Vec::new() },
        chunking: Chunking { chunk_bytes: 1 << 18, reader_threads: 2, queue_chunks: 4 },
        digests: false,
        device: DeviceRule::default(),
        split: Vec::new(),
    }
}

/// Checks a plan of a model of at most [`MAX_MODEL_BYTES`].
pub fn check_plan(plan: &LoadPlan) {
    for tensor in &plan.tensors {
        for (index, component) in tensor.components().into_iter().enumerate() {
            let mut next = 0;
            for rank in plan.world.ranks() {
                let holding = &tensor.holdings(rank, plan.world)[index];
                assert!(holding.kept.end() <= component.bytes, "{}", tensor.fqn);
                if !holding.owned.is_empty() {
                    assert_eq!(holding.owned.start(), next, "{}", tensor.fqn);
                    assert!(holding.kept.start() <= holding.owned.start(), "{}", tensor.fqn);
                    assert!(holding.owned.end() <= holding.kept.end(), "{}", tensor.fqn);
                    next = holding.owned.end();
                }
            }
            assert!(next == component.bytes || component.part == Part::NestedOffset, "{}", tensor.fqn);
        }
    }
    for rank in plan.world.ranks() {
        let memory = plan.memory(rank);
        assert!(memory.peak_host_bytes >= memory.weights_bytes);
    }
    let pieces: u64 = plan.tensors.iter().map(|tensor| tensor.elements() / plan.chunking.chunk_bytes).sum();
    if pieces < 1000 {
        for tensor in &plan.tensors {
            let moved: u64 = tensor.pieces(plan.chunking.chunk_bytes).iter().map(|piece| piece.range.len()).sum();
            let whole: u64 = tensor.components().iter().map(|component| component.bytes).sum();
            assert_eq!(moved, whole, "{}: each byte moves once", tensor.fqn);
        }
    }
}
