//! Files that store the experts of a layer together, seen as files that store each expert's matrices apart.
//!
//! transformers 5 keeps `experts.gate_up_proj` `[experts, 2 * inner, hidden]`, each expert's gate above its up projection, and
//! `experts.down_proj` `[experts, hidden, inner]`; GGUF has gate and up apart. In all of them one expert's matrix is one
//! range of bytes, so the index is changed and no byte is moved (`MO-4`). Refuses to know: files.

use super::experts::{MAX_EXPERTS, matrices};
use super::{Architecture, Skeleton};
use crate::format::{Encoding, GgmlTensor, ModelIndex, RowOrder, TensorEntry};
use crate::types::{ByteRange, Fqn, Shape, as_u64};

/// Matrices that fused tensors are taken apart into: three for each of as many experts as a configuration may state.
const MAX_MATRICES: u64 = 3 * MAX_EXPERTS;

/// What a fused tensor's name ends with, but for `.weight`, and which of gate, up and down it holds.
const FUSED: [(&str, &[usize]); 4] = [
    (".experts.gate_up_proj", &[0, 1]),
    (".experts.gate_proj", &[0]),
    (".experts.up_proj", &[1]),
    (".experts.down_proj", &[2]),
];

impl Skeleton {
    /// The index with every fused tensor of experts replaced by the matrices of each expert, under the names of files that
    /// store them apart. A tensor that cannot be taken apart, or of which the files have a part already, stays; binding then
    /// names it.
    #[must_use]
    pub fn with_experts_apart(&self, mut index: ModelIndex) -> ModelIndex {
        if !self.architecture.has_experts() {
            return index;
        }
        let fused: Vec<Fqn> = index.tensors.keys().filter(|fqn| kind(fqn).is_some()).cloned().collect();
        let mut room = MAX_MATRICES;
        for fqn in fused {
            let parts = index.tensors.get(&fqn).and_then(|entry| take_apart(self.architecture, (&fqn, entry), room));
            let Some(parts) = parts.filter(|parts| parts.iter().all(|(name, _)| !index.tensors.contains_key(name)))
            else {
                continue;
            };
            room = room.saturating_sub(as_u64(parts.len()));
            index.tensors.remove(&fqn);
            index.tensors.extend(parts);
        }
        index
    }
}

fn kind(fqn: &Fqn) -> Option<(&str, &'static [usize])> {
    let name = fqn.as_str();
    let name = name.strip_suffix(".weight").unwrap_or(name);
    FUSED.iter().find_map(|(end, parts)| Some((name.strip_suffix(end)?, *parts)))
}

/// The matrices in the order of the bytes. Nothing where the shape is not that of matrices, one or two for each expert, or
/// where they are more than `room`.
fn take_apart(
    architecture: Architecture,
    (fqn, entry): (&Fqn, &TensorEntry),
    room: u64,
) -> Option<Vec<(Fqn, TensorEntry)>> {
    let (stem, parts) = kind(fqn)?;
    let &[experts, rows, columns] = entry.shape.0.as_slice() else { return None };
    let per_expert = as_u64(parts.len());
    let count = experts.checked_mul(per_expert).filter(|count| (1..=room).contains(count))?;
    let ordinary =
        matches!(entry.encoding, Encoding::Plain | Encoding::Ggml(GgmlTensor { row_order: RowOrder::Same, .. }));
    if !ordinary || !rows.is_multiple_of(per_expert) || !entry.range.len().is_multiple_of(count) {
        return None;
    }
    let (bytes, shape) = (entry.range.len() / count, Shape::from([rows / per_expert, columns]));
    let names = matrices(architecture);
    let each = (0..experts).flat_map(|expert| parts.iter().map(move |&part| (expert, part)));
    (0..)
        .zip(each)
        .map(|(number, (expert, part))| {
            let name = Fqn::from(format!("{stem}.experts.{expert}.{}.weight", names.get(part)?));
            let range = ByteRange::with_len(entry.range.start() + number * bytes, bytes)?;
            Some((name, TensorEntry { shape: shape.clone(), range, ..entry.clone() }))
        })
        .collect()
}
