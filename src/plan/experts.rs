//! Placement by experts: of every layer's experts each rank keeps the same consecutive ones, whole (`PL-4`).
//!
//! Owns: which rank owns which expert. Refuses to know: what an expert computes; it goes by names.

use super::TensorPlan;
use crate::types::{Fqn, Rank, WorldSize};

/// Gives every matrix of an expert its owner; other tensors have none and are cut at rows. Returns whether there are experts.
pub(super) fn assign_owners(tensors: &mut [TensorPlan], world: WorldSize) -> bool {
    let Some(last) = tensors.iter().filter_map(|tensor| expert(&tensor.fqn)).max() else { return false };
    for tensor in tensors.iter_mut().filter(|tensor| tensor.sharded) {
        tensor.owner = expert(&tensor.fqn).map(|number| owner(number, u64::from(last) + 1, world));
    }
    true
}

/// The number of the expert that a tensor is of, as in `layers.3.mlp.experts.17.up_proj.weight`.
fn expert(fqn: &Fqn) -> Option<u32> {
    let (_, rest) = fqn.as_str().split_once(".experts.")?;
    rest.split('.').next()?.parse().ok()
}

/// Rank r owns the experts from `count * r / world` to `count * (r + 1) / world`, as rows are cut.
fn owner(expert: u32, count: u64, world: WorldSize) -> Rank {
    let rank = ((u64::from(expert) + 1) * u64::from(world.get()) - 1) / count;
    // The expert is one of `count`, so the quotient is below the number of ranks.
    Rank(u32::try_from(rank).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::super::{Encoding, Input};
    use super::*;
    use crate::types::DType;

    fn owners(names: &[&str], world: u32) -> Option<Vec<Option<u32>>> {
        let tensor = |name: &&str| TensorPlan {
            fqn: (*name).into(),
            shape: [64, 64].into(),
            encoding: Encoding::Plain { dtype: DType::F32 },
            sharded: true,
            owner: None,
            reader: Rank::ZERO,
            input: Input::Stored { parts: Vec::new(), nested_offset: None },
        };
        let mut tensors: Vec<TensorPlan> = names.iter().map(tensor).collect();
        let found = assign_owners(&mut tensors, WorldSize::new(world).expect("not zero"));
        found.then(|| tensors.iter().map(|tensor| tensor.owner.map(|owner| owner.0)).collect())
    }

    /// By hand: 8 experts over 3 ranks are cut at 8/3 = 2 and 16/3 = 5; over 16 ranks every second rank has one.
    #[test]
    fn pl_4_experts_go_whole_to_ranks() {
        let names: Vec<String> =
            (0..8).map(|number| format!("model.layers.5.mlp.experts.{number}.up_proj.weight")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let of = |world| owners(&names, world).expect("experts").into_iter().flatten().collect::<Vec<u32>>();
        assert_eq!(of(1), [0; 8]);
        assert_eq!(of(2), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(of(3), [0, 0, 1, 1, 1, 2, 2, 2]);
        assert_eq!(of(16), [1, 3, 5, 7, 9, 11, 13, 15]);
    }

    #[test]
    fn what_is_of_no_expert_is_cut_at_rows() {
        let names =
            ["model.layers.9.mlp.shared_expert.up_proj.weight", "layers.0.block_sparse_moe.experts.1.w1.weight"];
        assert_eq!(owners(&names, 2), Some(vec![None, Some(1)]));
        assert_eq!(owners(&names[..1], 2), None);
    }
}
