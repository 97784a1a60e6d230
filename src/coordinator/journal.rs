//! The journal: what a coordinator must know again after a restart. All files are created exclusively and synced before
//! anything that follows from them is announced, so a number cannot be used twice, whatever crashes when (A-10, MS-1).
//!
//! For the job whose first generation is N:
//! - `job-N.json`: the job and where its coordinator listens ([`JobRecord`]); published whole.
//! - `generation-N`: the generation, its secret and its members ([`GenerationRecord`]). A number whose record was cut off
//!   by a crash was never announced; it is not used again.
//! - `end-N.json`: how it ended ([`EndRecord`]), before anybody is told.
//! - `closed-N`: everybody was told. The next coordinator starts another job.
//!
//! `queued-K.json` is a job that waits for resident ranks. When its turn comes it becomes `job-N.json`, which says its number K;
//! queued jobs of that number and of lower ones are done with. A job that is made anew, because ranks were lost, is another `job-N.json`
//! too, with a higher `attempt`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::JobText;
use crate::error::{Classify, Kind};
use crate::membership::{AfterLoad, Cause, Formed};
use crate::plan::LoadPlan;
use crate::store::{LocalStore, Store, StoreError, read_small, write_small};
use crate::types::{Generation, JobId, Step};

/// A plan of a large model is about a megabyte.
const MAX_RECORD_BYTES: u64 = 256 << 20;

/// The journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Storage's error.
    #[error("coordinator journal: {0}")]
    Store(#[from] StoreError),
    /// A record does not hold what it should.
    #[error("coordinator journal: {path}: {reason}; remove the state directory to start another job")]
    Record {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

impl Classify for JournalError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Record { .. } => Kind::Corrupt,
        }
    }
}

/// A job as its coordinator must know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// The job.
    pub job: JobId,
    /// The plan that the ranks carry out.
    pub plan: LoadPlan,
    /// The step that a checkpoint of this job has.
    pub step: Step,
    /// What follows the load.
    pub after_load: AfterLoad,
    /// Whether the plan loads a checkpoint of this root.
    pub resumed: bool,
    /// Where checkpoints go; none means that the job cannot save.
    pub checkpoint_root: Option<PathBuf>,
    /// Where its coordinator listens, which is where its ranks look for it.
    pub listens: SocketAddr,
    /// Its place among the jobs of its ranks; 0 for the one that they were started with.
    #[serde(default)]
    pub number: u64,
    /// What tells the files of its base from others (`cache::files_id`); empty when nothing does.
    #[serde(default)]
    pub base_id: String,
    /// How often it was made anew because ranks were lost.
    #[serde(default)]
    pub attempt: u32,
    /// The job file of a job that was queued.
    #[serde(default)]
    pub text: Option<JobText>,
}

/// A generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationRecord {
    /// Who belongs to it.
    pub formed: Formed,
    /// What authenticates its data plane.
    pub secret: [u8; 32],
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// Why it was cancelled; nothing when it is finished.
    pub cause: Option<Cause>,
}

/// A job that a coordinator has left.
#[derive(Clone, Debug)]
pub struct Interrupted {
    /// The job.
    pub record: JobRecord,
    /// Its generation, if one was formed.
    pub generation: Option<GenerationRecord>,
    /// How it ended, if it did.
    pub end: Option<EndRecord>,
}

/// The state of one job after the other.
#[derive(Clone, Debug)]
pub struct Journal {
    store: LocalStore,
    last: Generation,
    /// The number of the current job: the first generation that it may have. Of one journal all clones see the same.
    job: Arc<AtomicU64>,
}

impl Journal {
    /// Opens the journal in `directory`, which is made when it does not exist.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let store = LocalStore::new(directory);
        store.create_dir("")?;
        let names = store.list("")?;
        let last = Generation(numbers(&names, "generation-", "").max().unwrap_or(0));
        let unclosed =
            numbers(&names, "job-", ".json").max().filter(|job| !names.contains(&format!("closed-{job:09}")));
        let job = Arc::new(AtomicU64::new(unclosed.unwrap_or_else(|| last.next().0)));
        Ok(Self { store, last, job })
    }

    /// Whether `generation` is of the job before the one at hand, whose own was not made durable yet.
    pub(super) fn is_before(&self, generation: Generation) -> bool {
        generation.0 < self.job()
    }

    fn job(&self) -> u64 {
        self.job.load(Ordering::Acquire)
    }

    /// The jobs that wait, in their order, when the job at hand is `current`.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn queued(&self, current: u64) -> Result<Vec<JobRecord>, JournalError> {
        let names = self.store.list("")?;
        let mut numbers: Vec<u64> = numbers(&names, "queued-", ".json").filter(|&number| number > current).collect();
        numbers.sort_unstable();
        numbers.into_iter().map(|number| self.read(&queued(number))).collect()
    }

    /// Makes a job durable that waits.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn enqueue(&self, record: &JobRecord) -> Result<(), JournalError> {
        self.publish(&queued(record.number), record)
    }

    /// Forgets a job that waits.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn dequeue(&self, number: u64) -> Result<(), JournalError> {
        self.store.remove(&queued(number))?;
        Ok(self.store.sync_dir("")?)
    }

    /// The job at hand is over, and `record` is the next one, whose first generation will be `first`.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn succeed(&self, record: &JobRecord, first: Generation) -> Result<(), JournalError> {
        // A coordinator that ends between these two goes on with the new job, which is the newest without a `closed`.
        self.publish(&format!("job-{:09}.json", first.0), record)?;
        self.close()?;
        self.job.store(first.0, Ordering::Release);
        self.dequeue(record.number)
    }

    /// The highest generation that was ever given out.
    #[must_use]
    pub const fn last(&self) -> Generation {
        self.last
    }

    /// The job that the last coordinator left without having closed it.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn interrupted(&self) -> Result<Option<Interrupted>, JournalError> {
        let names = self.store.list("")?;
        let (job, end) = (format!("job-{:09}.json", self.job()), format!("end-{:09}.json", self.job()));
        if !names.contains(&job) {
            return Ok(None);
        }
        let record: JobRecord = self.read(&job)?;
        // A job of the queue begins with the ranks of the one before it; one that was made anew waits for ranks.
        let begins_with_ranks = record.number > 0 && record.attempt == 0;
        let generation = if begins_with_ranks || self.last.0 >= self.job() { self.read_generation()? } else { None };
        let end = if names.contains(&end) { Some(self.read(&end)?) } else { None };
        Ok(Some(Interrupted { record, generation, end }))
    }

    /// Makes a new job durable.
    ///
    /// # Errors
    /// [`JournalError`], of kind `Conflict` when another coordinator works in this directory.
    pub fn begin(&self, record: &JobRecord) -> Result<(), JournalError> {
        self.publish(&format!("job-{:09}.json", self.job()), record)
    }

    /// Makes a generation durable.
    ///
    /// # Errors
    /// [`JournalError`], of kind `Conflict` when another coordinator has given it out.
    pub fn persist(&self, record: &GenerationRecord) -> Result<(), JournalError> {
        let json = serde_json::to_vec(record).unwrap_or_default();
        write_small(&self.store, &format!("generation-{:09}", record.formed.generation.0), &json)?;
        Ok(self.store.sync_dir("")?)
    }

    /// Makes the end of the job durable.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn end(&self, record: &EndRecord) -> Result<(), JournalError> {
        self.publish(&format!("end-{:09}.json", self.job()), record)
    }

    /// Says that everybody knows of the end.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn close(&self) -> Result<(), JournalError> {
        write_small(&self.store, &format!("closed-{:09}", self.job()), b"")?;
        Ok(self.store.sync_dir("")?)
    }

    fn publish(&self, name: &str, record: &impl Serialize) -> Result<(), JournalError> {
        let draft = format!(".{name}.{:x}", crate::clock::unix_ns());
        write_small(&self.store, &draft, &serde_json::to_vec(record).unwrap_or_default())?;
        Ok(self.store.publish(&draft, name)?)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<T, JournalError> {
        let bytes = read_small(&self.store, name, MAX_RECORD_BYTES)?;
        let failed = |error: serde_json::Error| JournalError::Record {
            path: self.store.describe(name),
            reason: error.to_string(),
        };
        serde_json::from_slice(&bytes).map_err(failed)
    }

    /// The record of the last generation; one that was cut off was never announced.
    fn read_generation(&self) -> Result<Option<GenerationRecord>, JournalError> {
        match self.read(&format!("generation-{:09}", self.last.0)) {
            Ok(record) => Ok(Some(record)),
            Err(JournalError::Record { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn queued(number: u64) -> String {
    format!("queued-{number:09}.json")
}

fn numbers<'a>(names: &'a [String], prefix: &'a str, suffix: &'a str) -> impl Iterator<Item = u64> + 'a {
    names.iter().filter_map(move |name| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64) -> GenerationRecord {
        GenerationRecord {
            formed: Formed { generation: Generation(generation), members: Vec::new(), keeps_base: false },
            secret: [7; 32],
        }
    }

    /// a number is given out once, also by two coordinators at the same directory.
    #[test]
    fn a_10_generations_are_never_reused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (first, second) = (Journal::open(directory.path()), Journal::open(directory.path()));
        let (first, second) = (first.expect("new"), second.expect("new"));
        first.persist(&record(1)).expect("free");
        let refused = second.persist(&record(1)).expect_err("given out already");
        assert_eq!(refused.kind(), Kind::Conflict);
        assert_eq!(Journal::open(directory.path()).expect("again").last(), Generation(1));
    }

    /// A crash in the middle of writing: the number is used, what it would have said is not believed.
    #[test]
    fn a_generation_that_was_cut_off_is_passed_over() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        write_small(&LocalStore::new(directory.path()), "generation-000000003", b"{\"formed\"").expect("written");
        let journal = Journal::open(directory.path()).expect("opens");
        assert_eq!((journal.last(), journal.read_generation().expect("readable")), (Generation(3), None));
    }
}
