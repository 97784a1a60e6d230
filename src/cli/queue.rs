//! `weightcast submit`, `weightcast jobs` and `weightcast cancel`: jobs for ranks that stay.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use weightcast_proto::v1;

use super::args::JobFlags;
use super::job::{JobError, block_on, connect};
use super::output::{bytes, data, fail, json as print_json, say};
use crate::error::Kind;
use crate::rpc::{Clients, Token, patient_request, request};
use crate::store::absolute;

/// The headers of a large model in an object store take a while to be read.
const SUBMIT_DEADLINE: Duration = Duration::from_secs(300);
/// Between two looks at the queue.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);

/// `weightcast submit`
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct SubmitFlags {
    /// The job file
    pub job_file: PathBuf,
    /// Wait until the job is done, and end with 0 only if it is
    #[arg(long)]
    pub wait: bool,
    /// Which ranks.
    #[command(flatten)]
    pub job: JobFlags,
}

/// `weightcast cancel`
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct CancelFlags {
    /// The job's number, as `weightcast jobs` shows it
    pub number: u64,
    /// Which ranks.
    #[command(flatten)]
    pub job: JobFlags,
}

fn request_id() -> String {
    format!("cli-{}-{:x}", std::process::id(), crate::clock::unix_ns())
}

pub(super) fn submit(flags: &SubmitFlags) -> u8 {
    let path = absolute(&flags.job_file);
    let text = std::fs::read_to_string(&path);
    let text = match text {
        Ok(text) => text,
        Err(error) => {
            let path = path.display().to_string();
            return fail(&crate::config::ConfigError::File { path, message: error.to_string() });
        }
    };
    let directory = path.parent().unwrap_or_else(|| Path::new("/")).display().to_string();
    let ended = block_on(async {
        let (mut clients, token) = connect(&flags.job).await?;
        let message = v1::SubmitJobRequest { request_id: request_id(), job_file: text, directory };
        let message = patient_request(&token, message, SUBMIT_DEADLINE)?;
        let number = clients.job.submit_job(message).await?.into_inner().number;
        if !flags.wait {
            return Ok((number, None));
        }
        Ok((number, Some(wait(&mut clients, &token, number).await?)))
    });
    match ended {
        Ok((number, None)) if flags.job.json => print_json(&json!({"number": number})),
        Ok((number, None)) => data(&number.to_string()),
        Ok((_, Some(summary))) => {
            if flags.job.json {
                print_json(&as_json(&summary));
            } else {
                data(&line(&summary));
            }
            if summary.state() != v1::JobState::Done {
                return Kind::Fenced.exit_code();
            }
        }
        Err(error) => return fail(&error),
    }
    0
}

/// Until the job is over.
async fn wait(clients: &mut Clients, token: &Token, number: u64) -> Result<v1::JobSummary, JobError> {
    loop {
        let jobs = clients.job.list_jobs(request(token, v1::ListJobsRequest {})?).await?.into_inner().jobs;
        let found = jobs.into_iter().find(|job| job.number == number);
        if let Some(job) = found.filter(|job| {
            // What was only loaded is held from then on.
            !matches!(job.state(), v1::JobState::Queued | v1::JobState::Running)
        }) {
            return Ok(job);
        }
        tokio::time::sleep(WAIT_INTERVAL).await;
    }
}

pub(super) fn jobs(flags: &JobFlags) -> u8 {
    let answer = block_on(async {
        let (mut clients, token) = connect(flags).await?;
        Ok(clients.job.list_jobs(request(&token, v1::ListJobsRequest {})?).await?.into_inner())
    });
    match answer {
        Ok(answer) if flags.json => print_json(&json!({"jobs": answer.jobs.iter().map(as_json).collect::<Vec<_>>()})),
        Ok(answer) => answer.jobs.iter().for_each(|job| data(&line(job))),
        Err(error) => return fail(&error),
    }
    0
}

pub(super) fn cancel(flags: &CancelFlags) -> u8 {
    let answer = block_on(async {
        let (mut clients, token) = connect(&flags.job).await?;
        let message = v1::CancelJobRequest { request_id: request_id(), number: flags.number };
        Ok(clients.job.cancel_job(request(&token, message)?).await?.into_inner())
    });
    match answer {
        Ok(_) => {
            say(&format!(
                "job {} is cancelled; one that trains ends at its next step, with a checkpoint",
                flags.number
            ));
            0
        }
        Err(error) => fail(&error),
    }
}

fn state(job: &v1::JobSummary) -> String {
    job.state().as_str_name().trim_start_matches("JOB_STATE_").to_ascii_lowercase()
}

fn line(job: &v1::JobSummary) -> String {
    let loaded = job.load_seconds.map(|seconds| format!("loaded in {seconds:.2} s, {} read", bytes(job.storage_bytes)));
    let notes = [loaded.as_deref().unwrap_or_default(), &job.last_checkpoint, &job.message];
    let notes: Vec<&str> = notes.into_iter().filter(|text| !text.is_empty()).collect();
    format!("{:>5}  {:<10}  {}  {}", job.number, state(job), job.name, notes.join(", ")).trim_end().to_owned()
}

fn as_json(job: &v1::JobSummary) -> serde_json::Value {
    json!({
        "number": job.number, "name": job.name, "state": state(job),
        "last_checkpoint": job.last_checkpoint, "message": job.message,
        "load_seconds": job.load_seconds, "storage_bytes": job.storage_bytes,
    })
}
