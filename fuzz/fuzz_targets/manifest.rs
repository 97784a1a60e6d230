//! The manifest of a checkpoint. Input: its text without the last member, the digest, which is added here so that a mutation
//! reaches what lies behind it; bytes that have no digest of theirs must be refused.
//!
//! What is accepted covers every byte of every component exactly once, with chunks in their files and apart, is the same
//! after it was written and read again, and can be planned onto other ranks, which then own every byte once.
#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use sha2::{Digest as _, Sha256};
use weightcast::checkpoint::{Checkpoint, plan_resume};
use weightcast::manifest::Manifest;
use weightcast::plan::Part;

fuzz_target!(|input: &[u8]| {
    assert!(Manifest::decode(input).is_err(), "no text has its own SHA-256 at its end by accident");
    let mut bytes = input.to_vec();
    let digest: String = Sha256::digest(input).iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.extend_from_slice(format!("\n \"digest\": \"sha256:{digest}\"\n}}\n").as_bytes());
    let Ok(manifest) = Manifest::decode(&bytes) else { return };
    check_coverage(&manifest);
    let again = manifest.encode();
    let decoded = Manifest::decode(&again).expect("what was encoded");
    assert_eq!(decoded, manifest);
    assert_eq!(decoded.encode(), again);
    let total = manifest.files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
    if total <= shared::MAX_MODEL_BYTES && !manifest.tensors.is_empty() {
        let checkpoint = Checkpoint { directory: "step-000000000".to_owned(), manifest };
        shared::check_plan(&plan_resume(shared::request(), &checkpoint).expect("sizes that were counted"));
    }
});

fn check_coverage(manifest: &Manifest) {
    let mut used: Vec<(u32, u64, u64)> = Vec::new();
    for tensor in &manifest.tensors {
        let components = tensor.encoding.components(&tensor.shape).expect("sizes that were counted");
        let stored = components.iter().filter(|component| component.part != Part::NestedOffset);
        for (component, part) in stored.zip(&tensor.parts) {
            let mut next = 0_u64;
            for chunk in &part.chunks {
                assert_eq!(chunk.at, next, "{}", part.name);
                let file = &manifest.files[usize::try_from(chunk.file).expect("64 bits")];
                assert!(chunk.range.end() <= file.bytes, "{} leaves {}", part.name, file.name);
                assert_eq!(chunk.digest.bytes(), chunk.range.len());
                if !chunk.range.is_empty() {
                    used.push((chunk.file, chunk.range.start(), chunk.range.end()));
                }
                next += chunk.range.len();
            }
            assert_eq!(next, component.bytes, "{}", part.name);
        }
    }
    used.sort_unstable();
    for pair in used.windows(2) {
        assert!(pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1, "chunks overlap: {pair:?}");
    }
}
