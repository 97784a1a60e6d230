//! Tests of the whole module: the vectors of the real tools, the rules by hand, and every kernel against the scalar one.

mod equality;
mod fp8;
mod golden;
mod gptq_awq;
mod hqq;
mod mlx;
mod rules;

use std::collections::BTreeMap;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::Kernels;
use crate::types::as_usize;

/// A file of the test data.
#[expect(clippy::disallowed_methods, reason = "a test reads its data")]
fn data(path: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every kernel that this processor can run.
fn all_kernels() -> Vec<Kernels> {
    [Some(Kernels::scalar()), Kernels::avx2(), Kernels::avx512()].into_iter().flatten().collect()
}

/// The tensors of safetensors files: bytes by name. Good enough for files that we made ourselves.
fn safetensors(paths: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let mut tensors = BTreeMap::new();
    for path in paths {
        let file = data(path);
        let (length, rest) = file.split_first_chunk::<8>().expect("a header length");
        let (header, body) = rest.split_at(as_usize(u64::from_le_bytes(*length)));
        let header: BTreeMap<String, Value> = serde_json::from_slice(header).expect("a JSON header");
        for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let offset = |index: usize| as_usize(entry["data_offsets"][index].as_u64().expect("an offset"));
            tensors.insert(name, body[offset(0)..offset(1)].to_vec());
        }
    }
    tensors
}

/// The input rule of the golden vectors (formats.md section 10): `count` values in bf16, widened.
fn rule(count: u32) -> Vec<f32> {
    golden::input(count).as_chunks::<2>().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect()
}

/// The distance of two f32 in units in the last place; 0 for two NaN, huge for a NaN and a number.
fn ulps(a: f32, b: f32) -> u32 {
    let ordered = |value: f32| {
        let bits = i64::from(value.to_bits() & 0x7fff_ffff);
        if value.is_sign_negative() { -bits } else { bits }
    };
    match (a.is_nan(), b.is_nan()) {
        (true, true) => 0,
        (false, false) => u32::try_from((ordered(a) - ordered(b)).unsigned_abs()).unwrap_or(u32::MAX),
        _ => u32::MAX,
    }
}

/// A small deterministic generator (SplitMix64); tests print its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        as_usize(self.next() % crate::types::as_u64(bound))
    }

    fn bits32(&mut self) -> u32 {
        u32::try_from(self.next() >> 32).expect("32 bits")
    }
}
