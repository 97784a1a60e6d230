//! The jobs that resident ranks work through, one after the other.
//!
//! Owns: their order and what became of each. Refuses to know: how a job is made from a file, and what ranks do.

use std::collections::VecDeque;

use super::JobRecord;
use crate::types::JobId;

/// Jobs that may wait.
pub const MAX_QUEUED: usize = 64;
/// Jobs that have ended and are still listed.
const REMEMBERED: usize = 64;

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// It waits.
    Queued,
    /// The ranks work on it, or hold what it loaded.
    Running,
    /// Its work is done.
    Done,
    /// It was taken back.
    Cancelled,
    /// It ended the ranks.
    Failed,
}

/// A job in a list.
#[derive(Clone, Debug, PartialEq)]
pub struct JobView {
    /// Its number.
    pub number: u64,
    /// Its name.
    pub name: JobId,
    /// What became of it.
    pub state: JobState,
    /// The newest checkpoint that it committed.
    pub last_checkpoint: Option<String>,
    /// What it left or why it failed, in words.
    pub message: String,
    /// From the time that the ranks turned to it until all of them had loaded; nothing before that.
    pub load_seconds: Option<f64>,
    /// What they read from storage for that, all of them together.
    pub storage_bytes: u64,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<JobRecord>,
    listed: Vec<JobView>,
}

impl Queue {
    /// With the job at hand, and those that wait.
    pub(super) fn new(current: &JobRecord, waiting: Vec<JobRecord>) -> Self {
        let mut queue = Self::default();
        queue.list(current, JobState::Running);
        for record in waiting {
            queue.push(record);
        }
        queue
    }

    fn list(&mut self, record: &JobRecord, state: JobState) {
        let (number, name) = (record.number, record.job.clone());
        self.listed.push(JobView {
            number,
            name,
            state,
            last_checkpoint: None,
            message: String::new(),
            load_seconds: None,
            storage_bytes: 0,
        });
    }

    pub(super) fn push(&mut self, record: JobRecord) {
        self.list(&record, JobState::Queued);
        self.waiting.push_back(record);
    }

    /// The job that waits and has its checkpoints where `record` would have them: what that one resumes from was looked up when it
    /// was queued, and two runs cannot share a directory.
    pub(super) fn with_checkpoints_of(&self, record: &JobRecord) -> Option<&JobRecord> {
        let root = record.checkpoint_root.as_ref()?;
        self.waiting.iter().find(|waiting| waiting.checkpoint_root.as_ref() == Some(root))
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_QUEUED
    }

    /// The next job, which then runs.
    pub(super) fn next(&mut self) -> Option<JobRecord> {
        let record = self.waiting.pop_front()?;
        self.update(record.number, |job| job.state = JobState::Running);
        Some(record)
    }

    /// Takes a job that waits out of the queue; whether there was one.
    pub(super) fn cancel(&mut self, number: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|record| record.number != number);
        let found = self.waiting.len() < before;
        if found {
            self.update(number, |job| job.state = JobState::Cancelled);
        }
        found
    }

    pub(super) fn update(&mut self, number: u64, change: impl FnOnce(&mut JobView)) {
        if let Some(job) = self.listed.iter_mut().find(|job| job.number == number) {
            change(job);
        }
        let ended = |job: &JobView| !matches!(job.state, JobState::Queued | JobState::Running);
        while self.listed.iter().filter(|job| ended(job)).count() > REMEMBERED {
            let Some(oldest) = self.listed.iter().position(ended) else { break };
            self.listed.remove(oldest);
        }
    }

    pub(super) fn views(&self) -> &[JobView] {
        &self.listed
    }
}
