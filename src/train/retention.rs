//! Which checkpoints of a run stay.
//!
//! Owns: the rule, a pure function of the steps that there are. Refuses to know: whether they hold; only those that do are
//! to be given.

use crate::types::Step;

use super::config::CheckpointRecipe;

/// The rule of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The newest that stay; 0 for all.
    pub last: u64,
    /// Multiples of this stay; 0 for none.
    pub every: u64,
    /// The best evaluation's, if it is kept.
    pub best: Option<Step>,
}

impl Policy {
    /// The rule of a recipe whose best evaluation was after `best`.
    #[must_use]
    pub fn new(recipe: &CheckpointRecipe, best: Option<Step>) -> Self {
        Self { last: recipe.keep_last, every: recipe.keep_every, best: best.filter(|_| recipe.keep_best) }
    }
}

/// Whether `step` stays, among `newest_first`.
#[must_use]
pub fn keeps(policy: Policy, newest_first: &[Step], step: Step) -> bool {
    let age = newest_first.iter().position(|&known| known == step);
    let is_new = policy.last == 0 || age.is_some_and(|age| crate::types::as_u64(age) < policy.last);
    is_new || (policy.every > 0 && step.0.is_multiple_of(policy.every)) || policy.best == Some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: of 10 to 60 in tens, the last two are 60 and 50, multiples of 30 are 30 and 60, the best is 10.
    #[test]
    fn last_every_and_best_stay() {
        let steps: Vec<Step> = [60, 50, 40, 30, 20, 10].map(Step).to_vec();
        let policy = Policy { last: 2, every: 30, best: Some(Step(10)) };
        let kept: Vec<u64> = steps.iter().filter(|&&step| keeps(policy, &steps, step)).map(|step| step.0).collect();
        assert_eq!(kept, [60, 50, 30, 10]);
        let all = Policy { last: 0, every: 0, best: None };
        assert!(steps.iter().all(|&step| keeps(all, &steps, step)));
    }
}
