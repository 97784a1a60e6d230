//! Jobs for ranks that stay: made of the text of a job file, and finished when their work is done.

use std::net::SocketAddr;
use std::sync::Arc;

use super::launch::job_record;
use super::prepare::{Prepared, prepare_with};
use super::train_output::{OutputPlace, RunOutput};
use crate::config::{CheckpointConfig, ConfigError, JobConfig, JobSection, ResumePolicy, available_memory_bytes};
use crate::coordinator::{JobMaker, JobRecord, JobText, Rejected};
use crate::error::Kind;
use crate::membership::ExitPolicy;
use crate::plan::LoadPlan;
use crate::types::DeviceWish;

/// Where the ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RanksAre {
    /// On this host, whose memory counts.
    Here,
    /// Wherever they were started.
    Anywhere,
}

/// What makes and finishes jobs for the ranks of a job that holds, whose coordinator listens at `listens`; nothing for one that
/// ends.
pub(super) fn job_maker(then: ExitPolicy, listens: SocketAddr, ranks: RanksAre) -> Option<JobMaker> {
    let make = move |text: &JobText, held: &LoadPlan| make(text, held, (listens, ranks), Resumes::AsItSays);
    (then == ExitPolicy::Hold).then(|| JobMaker { make: Arc::new(make), finish: Arc::new(finish) })
}

/// Whether a job that is made goes on from its checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resumes {
    /// As its file says.
    AsItSays,
    /// In any case, because it has written them itself.
    Always,
}

impl Resumes {
    /// `config` with that.
    pub(super) fn apply(self, config: JobConfig) -> JobConfig {
        let resume = match self {
            Self::AsItSays => config.checkpoint.resume,
            Self::Always => ResumePolicy::Auto,
        };
        JobConfig { checkpoint: CheckpointConfig { resume, ..config.checkpoint.clone() }, ..config }
    }
}

/// The job of a file that was submitted, for ranks that have `held`.
pub(super) fn make(
    text: &JobText,
    held: &LoadPlan,
    (listens, ranks): (SocketAddr, RanksAre),
    resumes: Resumes,
) -> Result<JobRecord, Rejected> {
    let file = |message: String| ConfigError::File { path: "that was submitted".to_owned(), message };
    let config =
        JobConfig::parse(&text.text, &text.directory).map_err(|message| Rejected::from_error(&file(message)))?;
    let config = resumes.apply(config);
    config.check_streaming().map_err(|error| Rejected::from_error(&error))?;
    let prepared = prepare(&config, held, ranks)?;
    // Whatever it says: the ranks stay when it is done.
    let config = JobConfig { job: JobSection { hold: true, ..config.job.clone() }, ..config };
    Ok(job_record(&config, prepared, listens))
}

/// The ranks stay where they are: on their devices or not, and with what moves data between them.
fn prepare(config: &JobConfig, held: &LoadPlan, ranks: RanksAre) -> Result<Prepared, Rejected> {
    let (wanted, device) = (config.load.device, held.device);
    if wanted != DeviceWish::Auto && device.device != DeviceWish::Auto && wanted != device.device {
        let message = format!(
            "load.device: expected {} or auto, because that is where these ranks are, found {}",
            device.device.name(),
            wanted.name()
        );
        return Err(Rejected { message, kind: Kind::Conflict });
    }
    // What the ranks hold now makes room, or is what the job wants. Of devices it is not known what that is.
    let here = ranks == RanksAre::Here && device.device == DeviceWish::Cpu;
    let held_bytes: u64 = held.world.ranks().map(|rank| held.memory(rank).host_weights_bytes()).sum();
    let host_bytes = available_memory_bytes().filter(|_| here).map(|bytes| bytes.saturating_add(held_bytes));
    let mut config = config.clone();
    config.load.device = device.device;
    let prepared = prepare_with(&config, held.world, host_bytes, &|_| {});
    let mut prepared = prepared.map_err(|error| Rejected::from_error(&error))?;
    prepared.plan.device = device;
    for other in &mut prepared.plan.others {
        other.plan.device = device;
    }
    Ok(prepared)
}

/// Writes the output of a run that is done.
fn finish(record: &JobRecord) -> Option<String> {
    match OutputPlace::of(record)?.write() {
        Ok(RunOutput::Written { directory, step }) => Some(format!("wrote {}, of step {step}", directory.display())),
        Ok(RunOutput::Unchanged { directory }) => Some(format!("{} is there already", directory.display())),
        Ok(RunOutput::Older { directory, step }) => {
            Some(format!("{} is of an earlier step than {step} and was left as it is", directory.display()))
        }
        Err(error) => {
            let reason = crate::error::chain(&error);
            tracing::error!(job = %record.job, reason, "the output of a job could not be written");
            Some(format!("its output could not be written: {reason}"))
        }
    }
}
