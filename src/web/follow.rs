//! What is done while a job goes on so that the page can show it: the curve of losses is collected, new checkpoints are
//! verified, and snapshots are published.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::snapshot::encode;
use crate::checkpoint::{self, Depth};
use crate::coordinator::{Coordinator, View};
use crate::error::{Classify as _, Kind, chain};
use crate::membership::TrainingProgress;
use crate::store::open_root;
use crate::tasks::blocking;
use crate::types::{Step, as_u64};

/// How often a snapshot is published; a change of the phase is told at once.
const INTERVAL: Duration = Duration::from_secs(1);
/// Points of a curve; with more, every second one is dropped. A screen has no more.
const MAX_POINTS: usize = 2048;

/// What a look at a checkpoint has shown.
#[derive(Clone, Debug)]
pub(super) enum Checked {
    /// Manifest, lengths and the tables of digests hold.
    Verified {
        /// Bytes of its files.
        bytes: u64,
    },
    /// They do not.
    Damaged {
        /// What does not hold.
        reason: String,
    },
    /// It is not there any more.
    Deleted,
}

/// The curves of a run, as far as this process has seen it.
#[derive(Debug, Default)]
pub(super) struct Losses {
    steps: Vec<(u64, f32)>,
    evaluations: Vec<(u64, f32)>,
}

impl Losses {
    pub(super) fn steps(&self) -> &[(u64, f32)] {
        &self.steps
    }

    pub(super) fn evaluations(&self) -> &[(u64, f32)] {
        &self.evaluations
    }

    /// Adds what is new. A run that goes on from an earlier step begins again there.
    fn add(&mut self, progress: &TrainingProgress) {
        let recent = progress.recent_losses.len();
        let first = (progress.step + 1).saturating_sub(as_u64(recent));
        self.steps.retain(|(step, _)| *step <= progress.step);
        let last = self.steps.last().map_or(0, |(step, _)| *step);
        let new = (first..).zip(&progress.recent_losses).filter(|(step, _)| *step > last);
        self.steps.extend(new.map(|(step, loss)| (step, *loss)));
        if let Some(loss) = progress.evaluation_loss
            && self.evaluations.last().is_none_or(|(_, known)| known.to_bits() != loss.to_bits())
        {
            self.evaluations.push((progress.step, loss));
        }
        thin(&mut self.steps);
        thin(&mut self.evaluations);
    }
}

/// Keeps every second point of too many, and the last.
fn thin(points: &mut Vec<(u64, f32)>) {
    if points.len() > MAX_POINTS {
        let last = points.len() - 1;
        let mut index = 0;
        points.retain(|_| {
            index += 1;
            (index - 1) % 2 == 0 || index - 1 == last
        });
    }
}

/// Publishes snapshots until it is dropped.
pub(super) async fn follow(coordinator: Coordinator, publisher: watch::Sender<Arc<str>>) {
    let mut views = coordinator.views();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut losses, mut checked) = (Losses::default(), BTreeMap::new());
    let mut phase = "";
    loop {
        // Cancel safe: an interval and a watch lose nothing when the other wins.
        let is_due = tokio::select! {
            _ = ticks.tick() => true,
            changed = views.changed() => match changed {
                Ok(()) => false,
                Err(_) => return,
            },
        };
        let view = views.borrow_and_update().clone();
        if let Some(training) = view.ranks.iter().find_map(|rank| rank.progress.training.as_ref()) {
            losses.add(training);
        }
        if !is_due && view.phase.name() == phase {
            continue;
        }
        phase = view.phase.name();
        publish((&coordinator, &view), &losses, &checked, &publisher);
        check(&coordinator, &view, &mut checked).await;
    }
}

fn publish(
    seen: (&Coordinator, &View),
    losses: &Losses,
    checked: &BTreeMap<Step, Checked>,
    publisher: &watch::Sender<Arc<str>>,
) {
    let json = encode(seen, losses, checked, crate::clock::now());
    publisher.send_replace(json.into());
}

/// A snapshot before the first one.
pub(super) fn first(coordinator: &Coordinator) -> Arc<str> {
    let view = coordinator.views().borrow().clone();
    encode((coordinator, &view), &Losses::default(), &BTreeMap::new(), crate::clock::now()).into()
}

/// Verifies one checkpoint that was not looked at yet; looks again at one that may have been deleted meanwhile.
async fn check(coordinator: &Coordinator, view: &View, checked: &mut BTreeMap<Step, Checked>) {
    let Some(root) = view.checkpoint_root.clone() else { return };
    let commits = coordinator.history().commits;
    let new = commits.iter().find(|commit| !checked.contains_key(&commit.step));
    let Some(step) = new.map(|commit| commit.step) else { return };
    let kept: Vec<Step> = commits.iter().map(|commit| commit.step).collect();
    checked.retain(|step, _| kept.contains(step));
    let known: Vec<Step> =
        checked.iter().filter(|(_, known)| matches!(known, Checked::Verified { .. })).map(|(step, _)| *step).collect();
    let (found, deleted) = blocking(move || {
        // A root that cannot be listed now says nothing.
        let names = open_root(&root).and_then(|root| root.store.list("")).ok();
        let is_gone = |step: &Step| names.as_ref().is_some_and(|names| !names.contains(&checkpoint::step_name(*step)));
        (look_at(&root, step), known.into_iter().filter(is_gone).collect::<Vec<_>>())
    })
    .await;
    checked.insert(step, found);
    for step in deleted {
        checked.insert(step, Checked::Deleted);
    }
}

fn look_at(root: &std::path::Path, step: Step) -> Checked {
    let looked = open_root(root).map_err(checkpoint::CheckpointError::from).and_then(|root| {
        let found = checkpoint::open(root.store.as_ref(), step)?;
        checkpoint::verify(root.store.as_ref(), &found, Depth::Shallow)?;
        Ok(found.manifest.files.iter().map(|file| file.bytes).sum())
    });
    match looked {
        Ok(bytes) => Checked::Verified { bytes },
        Err(error) if error.kind() == Kind::NotFound => Checked::Deleted,
        Err(error) => Checked::Damaged { reason: chain(&error) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(step: u64, recent_losses: &[f32]) -> TrainingProgress {
        TrainingProgress { step, recent_losses: recent_losses.to_vec(), ..TrainingProgress::default() }
    }

    /// Rank 0 tells its latest losses twice a second: they overlap, and a run may go on from an earlier step.
    #[test]
    fn each_step_stands_once_in_the_curve() {
        let mut losses = Losses::default();
        losses.add(&progress(2, &[3.0, 2.0]));
        losses.add(&progress(4, &[2.0, 1.5, 1.0]));
        assert_eq!(losses.steps(), [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)]);
        losses.add(&progress(3, &[2.0, 1.4]));
        assert_eq!(losses.steps(), [(1, 3.0), (2, 2.0), (3, 1.5)]);
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_end() {
        let mut losses = Losses::default();
        for step in 1..=10_000 {
            losses.add(&progress(step, &[1.0]));
        }
        assert!(losses.steps().len() <= MAX_POINTS + 1, "{}", losses.steps().len());
        assert_eq!((losses.steps().first(), losses.steps().last()), (Some(&(1, 1.0)), Some(&(10_000, 1.0))));
    }
}
