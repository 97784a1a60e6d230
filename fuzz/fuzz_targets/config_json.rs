//! A model's `config.json`, and the empty module that is made of it.
//!
//! What is accepted gives tensors of different names and countable size, as many layers as the text says, aliases of tensors
//! that exist, and frequencies that are numbers; files that have exactly its tensors bind to it, others do not.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use weightcast::format::{Encoding, ModelIndex, TensorEntry};
use weightcast::model::{BufferKind, BufferValues, Skeleton};
use weightcast::types::{ByteRange, DType};

/// Larger skeletons are only made; checking each would be slow and find nothing new.
const MAX_TENSORS: usize = 400;

fuzz_target!(|input: &[u8]| {
    let skeleton = match Skeleton::from_config(input) {
        Ok(skeleton) => skeleton,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let config = skeleton.config.as_ref().expect("it was made of one");
    assert_eq!(skeleton.layers(), config.num_hidden_layers);
    if skeleton.tensors.len() > MAX_TENSORS {
        return;
    }
    let names: BTreeSet<&str> = skeleton.tensors.iter().map(|tensor| tensor.fqn.as_str()).collect();
    assert_eq!(names.len(), skeleton.tensors.len(), "each name once");
    for tensor in &skeleton.tensors {
        tensor.shape.bytes(DType::F32).expect("limits on dims keep every tensor countable");
    }
    for alias in &skeleton.aliases {
        assert!(names.contains(alias.target.as_str()) && !names.contains(alias.alias.as_str()));
        assert_eq!(skeleton.resolve(&alias.alias), &alias.target);
    }
    for buffer in &skeleton.buffers {
        if let (BufferKind::RotaryInvFreq { rope }, BufferValues::F32(values)) = (&buffer.kind, buffer_values(buffer)) {
            assert_eq!(values.len() as u64, rope.dim / 2);
            assert!(rope.attention_factor().is_finite(), "{rope:?}");
            assert!(values.iter().all(|value| value.is_finite() && *value >= 0.0), "{rope:?}");
        }
    }
    check_binding(&skeleton);
});

/// Positions are many and only count upwards.
fn buffer_values(buffer: &weightcast::model::Buffer) -> BufferValues {
    match &buffer.kind {
        BufferKind::RotaryInvFreq { .. } => buffer.compute(),
        _ => BufferValues::I64(Vec::new()),
    }
}

fn check_binding(skeleton: &Skeleton) {
    let entry = |shape: &weightcast::types::Shape| TensorEntry {
        dtype: DType::BF16,
        shape: shape.clone(),
        file: 0,
        range: ByteRange::default(),
        encoding: Encoding::Plain,
    };
    let mut index = ModelIndex::default();
    for tensor in &skeleton.tensors {
        index.tensors.insert(tensor.fqn.clone(), entry(&tensor.shape));
    }
    let binding = skeleton.bind(&index).expect("files with exactly its tensors");
    assert_eq!(binding.len(), skeleton.tensors.len());
    assert!(binding.ignored.is_empty() && binding.absent.is_empty());
    for tensor in &skeleton.tensors {
        assert_eq!(binding.source(&tensor.fqn), Some(&tensor.fqn));
    }
    let Some(needed) = skeleton.tensors.iter().find(|tensor| !tensor.optional) else { return };
    let whole = index.tensors.remove(&needed.fqn).expect("it was put there");
    assert_eq!(skeleton.bind(&index).expect_err("one is missing").missing.count, 1);
    let mut other = needed.shape.clone();
    other.0.push(1);
    index.tensors.insert(needed.fqn.clone(), TensorEntry { shape: other, ..whole });
    assert_eq!(skeleton.bind(&index).expect_err("one has another shape").mismatched_count, 1);
}
