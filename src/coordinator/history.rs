//! What has happened in the job as this process of the coordinator saw it: the latest happenings in words, the commits, and counts.
//!
//! Owns: bounded memory of the past. Refuses to know: who looks at it. The owner shows it every state that it publishes, so
//! nothing is missed.

use std::collections::VecDeque;

use serde::Serialize;

use crate::clock::Instant;
use crate::membership::{Membership, Phase};
use crate::types::Step;

/// Happenings that are kept.
pub const KEPT_HAPPENINGS: usize = 200;
/// Commits that are kept.
pub const KEPT_COMMITS: usize = 50;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Happening {
    /// Counts from 1.
    pub number: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Of which kind.
    pub kind: HappeningKind,
    /// Of which rank.
    pub rank: Option<u32>,
    /// What, in words.
    pub text: String,
}

/// Kinds of happenings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HappeningKind {
    /// A rank joined or went on.
    Join,
    /// The job does something else.
    Phase,
    /// A checkpoint.
    Save,
    /// Somebody asked for something.
    Command,
    /// Something went wrong.
    Failure,
}

/// A checkpoint that was committed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CommitView {
    /// The step.
    pub step: Step,
    /// Its directory below the root.
    pub directory: String,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// From its beginning to the commit, in seconds.
    pub seconds: f64,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct History {
    /// When this process of the coordinator started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// The latest happenings, oldest first.
    pub happenings: VecDeque<Happening>,
    /// The latest commits, oldest first.
    pub commits: VecDeque<CommitView>,
    /// Commits in all.
    pub committed: u64,
    /// Seconds from beginning to commit, of all.
    pub commit_s: f64,
    /// Joins by rank.
    pub joins: Vec<u64>,
    happened: u64,
    begun: Option<Instant>,
    phase: &'static str,
    members: Vec<Option<String>>,
    is_draining: bool,
    save_request: u64,
    step: Option<Step>,
    /// How often ranks were lost and waited for.
    pub regroups: u64,
}

impl History {
    /// Begins with the state that this process found; ranks that it has already have not joined it.
    pub(super) fn new(membership: &Membership) -> Self {
        let mut history = Self {
            started_unix_ms: unix_ms(),
            happenings: VecDeque::new(),
            commits: VecDeque::new(),
            committed: 0,
            commit_s: 0.0,
            joins: vec![0; membership.members().len()],
            happened: 0,
            begun: None,
            phase: membership.phase().name(),
            members: members(membership),
            is_draining: membership.is_draining(),
            save_request: membership.save_request(),
            step: membership.committed_step(),
            regroups: membership.regroups(),
        };
        let known = history.members.iter().flatten().count();
        let text = match known {
            0 => format!("the coordinator started; waiting for {} ranks", history.members.len()),
            known => format!("the coordinator started again and went on with {known} ranks"),
        };
        history.happen(HappeningKind::Phase, None, text);
        history
    }

    /// Remembers what is different from what it saw last.
    pub(super) fn look(&mut self, membership: &Membership, now: Instant) {
        if self.regroups != membership.regroups() {
            self.regroups = membership.regroups();
            let cause = membership.regroups_because();
            let words = cause.map_or("", |cause| cause.message.as_str());
            let rank = cause.and_then(|cause| cause.rank).map(|rank| rank.0);
            self.happen(HappeningKind::Failure, rank, format!("waiting for the ranks to join again: {words}"));
            self.begun = None;
        }
        self.look_at_ranks(membership);
        self.look_at_checkpoints(membership, now);
        if self.is_draining != membership.is_draining() {
            self.is_draining = membership.is_draining();
            self.happen(HappeningKind::Command, None, "the job was asked to end".to_owned());
        }
        if self.save_request != membership.save_request() {
            self.save_request = membership.save_request();
            self.happen(HappeningKind::Command, None, "a checkpoint was asked for".to_owned());
        }
        let phase = membership.phase().name();
        if phase != self.phase {
            self.phase = phase;
            let (kind, rank, text) = match membership.phase() {
                Phase::Aborted(cause) => {
                    let text = format!("aborted: {}", cause.message);
                    (HappeningKind::Failure, cause.rank.map(|rank| rank.0), text)
                }
                Phase::Loading => {
                    let text = format!("all ranks have joined generation {}; loading", membership.generation());
                    (HappeningKind::Phase, None, text)
                }
                _ => (HappeningKind::Phase, None, phase.to_owned()),
            };
            self.happen(kind, rank, text);
        }
    }

    fn look_at_ranks(&mut self, membership: &Membership) {
        for (index, member) in membership.members().iter().enumerate() {
            let Some(member) = member else { continue };
            let Some(known) = self.members.get_mut(index) else { continue };
            if known.as_ref() == Some(&member.id) {
                continue;
            }
            *known = Some(member.id.clone());
            if let Some(joins) = self.joins.get_mut(index) {
                *joins += 1;
            }
            let text = format!("joined from {} (process {})", member.info.host, member.info.process_id);
            self.happen(HappeningKind::Join, Some(member.info.rank.0), text);
        }
    }

    fn look_at_checkpoints(&mut self, membership: &Membership, now: Instant) {
        let committed = membership.committed_step().filter(|step| self.step != Some(*step));
        if let (Some(step), Some(directory)) = (committed, membership.last_checkpoint()) {
            let seconds = self.begun.take().map_or(0.0, |begun| now.saturating_duration_since(begun).as_secs_f64());
            self.step = Some(step);
            self.committed += 1;
            self.commit_s += seconds;
            keep(&mut self.commits, KEPT_COMMITS);
            let directory = directory.to_owned();
            self.happen(HappeningKind::Save, None, format!("committed {directory} in {seconds:.2} s"));
            self.commits.push_back(CommitView { step, directory, unix_ms: unix_ms(), seconds });
        }
        if let (Phase::Beginning { step }, None) = (membership.phase(), self.begun) {
            self.begun = Some(now);
            self.happen(HappeningKind::Save, None, format!("a checkpoint of step {step} begins"));
        }
    }

    fn happen(&mut self, kind: HappeningKind, rank: Option<u32>, text: String) {
        self.happened += 1;
        keep(&mut self.happenings, KEPT_HAPPENINGS);
        self.happenings.push_back(Happening { number: self.happened, unix_ms: unix_ms(), kind, rank, text });
    }
}

/// Makes room for one more of at most `count`.
fn keep<T>(items: &mut VecDeque<T>, count: usize) {
    while items.len() >= count {
        items.pop_front();
    }
}

fn members(membership: &Membership) -> Vec<Option<String>> {
    membership.members().iter().map(|member| member.as_ref().map(|member| member.id.clone())).collect()
}

fn unix_ms() -> u64 {
    u64::try_from(crate::clock::unix_ns() / 1_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::as_u64;

    #[test]
    fn the_past_is_bounded_and_counted() {
        let mut items = VecDeque::new();
        for number in 0..1000_u64 {
            keep(&mut items, KEPT_HAPPENINGS);
            items.push_back(number);
        }
        assert_eq!((as_u64(items.len()), items.front(), items.back()), (200, Some(&800), Some(&999)));
    }
}
