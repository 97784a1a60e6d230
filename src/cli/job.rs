//! `weightcast status` and `weightcast drain`.

use serde_json::json;
use weightcast_proto::v1;

use super::args::JobFlags;
use super::devices::describe;
use super::output::{bytes, data, fail, fail_with, json, say};
use crate::app::{RunFile, RunFileError};
use crate::error::Kind;
use crate::rpc::{Clients, ConnectError, Token, TokenError, describe_status, kind_of, request};

#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("the coordinator refused: {message}")]
    Refused { message: String, kind: Kind },
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

impl crate::error::Classify for JobError {
    fn kind(&self) -> Kind {
        match self {
            Self::RunFile(source) => source.kind(),
            Self::Connect(source) => source.kind(),
            Self::Token(source) => source.kind(),
            Self::Refused { kind, .. } => *kind,
            Self::Runtime(_) => Kind::Internal,
        }
    }
}

impl From<tonic::Status> for JobError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused { message: describe_status(&status), kind: kind_of(&status) }
    }
}

async fn connect(flags: &JobFlags) -> Result<(Clients, Token), JobError> {
    let (address, token) = match (&flags.coordinator, &flags.token_file) {
        (Some(address), Some(token)) => (address.clone(), Token::at(token)),
        _ => {
            let run = RunFile::find(flags.job.as_deref())?;
            (run.coordinator, Token::at(run.token_file))
        }
    };
    Ok((Clients::connect(&address).await?, token))
}

fn block_on<T>(work: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(JobError::Runtime)?;
    runtime.block_on(work)
}

pub(super) fn status(flags: &JobFlags) -> u8 {
    let answer = block_on(async {
        let (mut clients, token) = connect(flags).await?;
        let message = request(&token, v1::GetStatusRequest {})?;
        Ok(clients.job.get_status(message).await?.into_inner())
    });
    match answer {
        Ok(answer) => {
            print(&answer, flags.json);
            0
        }
        Err(error) => {
            if !flags.json {
                say(&format!("devices    {}", describe()));
            }
            fail(&error)
        }
    }
}

pub(super) fn drain(flags: &JobFlags) -> u8 {
    let answer = block_on(async {
        let (mut clients, token) = connect(flags).await?;
        let request_id = format!("cli-{}", std::process::id());
        let message = request(&token, v1::DrainRequest { request_id, save: true })?;
        Ok(clients.job.drain(message).await?.into_inner())
    });
    match answer {
        Ok(_) => 0,
        Err(error) => fail_with(&error, crate::error::Classify::kind(&error).exit_code()),
    }
}

fn print(answer: &v1::GetStatusResponse, as_json: bool) {
    let header = answer.header.clone().unwrap_or_default();
    let phase = answer.phase().as_str_name().trim_start_matches("PHASE_").to_ascii_lowercase();
    let devices = describe();
    if as_json {
        let rank = |rank: &v1::RankStatus| {
            json!({
                "rank": rank.rank, "host": rank.host, "process_id": rank.process_id, "device": rank.device,
                "stage": rank.stage, "done_bytes": rank.done_bytes, "total_bytes": rank.total_bytes,
                "peak_resident_bytes": rank.peak_resident_bytes, "lease_age_ms": rank.lease_age_ms,
            })
        };
        json(&json!({
            "job": header.job_id, "generation": header.generation, "phase": phase, "model": answer.model,
            "last_checkpoint": answer.last_checkpoint, "gpu": devices,
            "ranks": answer.ranks.iter().map(rank).collect::<Vec<_>>(),
        }));
        return;
    }
    say(&format!("job        {} (generation {}), {phase}", header.job_id, header.generation));
    say(&format!("devices    {devices}"));
    if !answer.last_checkpoint.is_empty() {
        say(&format!("checkpoint {}", answer.last_checkpoint));
    }
    data(&format!(
        "{:>5}  {:<10}  {:>21}  {:>12}  {:>8}  {:<8}  host",
        "rank", "stage", "progress", "peak memory", "lease", "device"
    ));
    for rank in &answer.ranks {
        data(&format!(
            "{:>5}  {:<10}  {:>21}  {:>12}  {:>5} ms  {:<8}  {} (process {})",
            rank.rank,
            rank.stage,
            format!("{} / {}", bytes(rank.done_bytes), bytes(rank.total_bytes)),
            bytes(rank.peak_resident_bytes),
            rank.lease_age_ms,
            rank.device,
            rank.host,
            rank.process_id
        ));
    }
}
