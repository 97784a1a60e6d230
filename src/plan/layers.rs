//! Placement by layers: whole layers go to ranks, in the model's order, in proportion to what each rank can take.
//!
//! Owns: which rank owns which tensor. Refuses to know: how many bytes a rank has; the proportions are an argument.

use super::TensorPlan;
use crate::types::{Rank, WorldSize};

/// Gives every matrix an owner: consecutive layers to consecutive ranks, so that each rank's share of the bytes comes as
/// near to its part of `split` as whole layers allow. Small tensors, which all keep, have none.
pub(super) fn assign_owners(tensors: &mut [TensorPlan], world: WorldSize, split: &[u32]) {
    let weights: Vec<u64> = (0..world.count()).map(|rank| u64::from(split.get(rank).copied().unwrap_or(1))).collect();
    let total_weight = weights.iter().sum::<u64>().max(1);
    let sizes: Vec<u64> = tensors.iter().map(|tensor| if tensor.sharded { bytes(tensor) } else { 0 }).collect();
    let total: u64 = sizes.iter().sum();
    let mut done = 0;
    let mut group: Option<(Option<u32>, Rank)> = None;
    for index in 0..tensors.len() {
        let layer = tensors.get(index).and_then(|tensor| tensor.fqn.layer());
        let rank = match group {
            Some((known, rank)) if known == layer && layer.is_some() => rank,
            _ => {
                // The rank whose part holds the middle of the group.
                let after = tensors.iter().skip(index).take_while(|tensor| tensor.fqn.layer() == layer).count();
                let members = if layer.is_some() { after } else { 1 };
                let size: u64 = sizes.iter().skip(index).take(members).sum();
                owner_at(done + size / 2, total, &weights, total_weight)
            }
        };
        group = Some((layer, rank));
        done += sizes.get(index).copied().unwrap_or(0);
        if let Some(tensor) = tensors.get_mut(index).filter(|tensor| tensor.sharded) {
            tensor.owner = Some(rank);
        }
    }
}

/// The rank that owns the byte at `at` of `total` when bytes are dealt out by `weights`.
fn owner_at(at: u64, total: u64, weights: &[u64], total_weight: u64) -> Rank {
    let mut end = 0_u128;
    for (rank, weight) in (0..).zip(weights) {
        end += u128::from(*weight);
        if u128::from(at) * u128::from(total_weight) < end * u128::from(total) {
            return Rank(rank);
        }
    }
    Rank(u32::try_from(weights.len().saturating_sub(1)).unwrap_or(0))
}

fn bytes(tensor: &TensorPlan) -> u64 {
    tensor.components().iter().map(|component| component.bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::super::{Encoding, Input};
    use super::*;
    use crate::types::DType;

    fn owners(world: u32, split: &[u32]) -> Vec<u32> {
        let names = [
            "model.embed_tokens.weight",
            "model.layers.0.a.weight",
            "model.layers.0.b.weight",
            "model.layers.1.a.weight",
            "model.layers.1.b.weight",
            "lm_head.weight",
        ];
        let tensor = |name: &str| TensorPlan {
            fqn: name.into(),
            shape: [4, 8].into(),
            encoding: Encoding::Plain { dtype: DType::F32 },
            sharded: true,
            owner: None,
            reader: Rank::ZERO,
            input: Input::Stored { parts: Vec::new(), nested_offset: None },
        };
        let mut tensors: Vec<TensorPlan> = names.into_iter().map(tensor).collect();
        assign_owners(&mut tensors, WorldSize::new(world).expect("not zero"), split);
        tensors.iter().map(|tensor| tensor.owner.expect("sharded").0).collect()
    }

    /// By hand: six equal tensors, in the groups 1, 2, 2, 1, whose middles lie at 0.5, 2, 4 and 5.5 of 6.
    #[test]
    fn layers_stay_whole_and_follow_the_split() {
        assert_eq!(owners(1, &[]), [0, 0, 0, 0, 0, 0]);
        assert_eq!(owners(2, &[]), [0, 0, 0, 1, 1, 1]);
        assert_eq!(owners(2, &[3, 1]), [0, 0, 0, 0, 0, 1]);
        assert_eq!(owners(3, &[]), [0, 1, 1, 2, 2, 2]);
    }
}
