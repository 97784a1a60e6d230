//! `weightcast status`, `weightcast save`, `weightcast unload` and `weightcast drain`.

use std::io::IsTerminal as _;
use std::time::Duration;

use serde_json::json;
use weightcast_proto::v1;

use super::args::{JobFlags, StatusFlags};
use super::devices::describe;
use super::output::{bytes, data, fail, fail_with, json, say};
use crate::app::{RunFile, RunFileError};
use crate::error::Kind;
use crate::metrics::sparkline;
use crate::rpc::{Clients, ConnectError, Token, TokenError, describe_status, kind_of, patient_request, request};
use crate::tls::{Tls, TlsError};

/// Ranks renew twice a second.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// A step of a large model and the writing of its state take minutes.
const SAVE_DEADLINE: Duration = Duration::from_secs(3600);
const SPARKLINE_WIDTH: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(super) enum JobError {
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Tls(#[from] TlsError),
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
            Self::Tls(source) => source.kind(),
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

pub(super) async fn connect(flags: &JobFlags) -> Result<(Clients, Token), JobError> {
    let (address, token, tls) = match (&flags.coordinator, &flags.token_file) {
        (Some(address), Some(token)) => (address.clone(), Token::at(token), flags.tls.clone().files()),
        _ => {
            let run = RunFile::find(flags.job.as_deref())?;
            (run.coordinator, Token::at(run.token_file), run.tls)
        }
    };
    let tls = tls.map(Tls::open).transpose()?;
    Ok((Clients::connect(&address, tls.as_ref()).await?, token))
}

pub(super) fn block_on<T>(work: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(JobError::Runtime)?;
    runtime.block_on(work)
}

pub(super) fn status(flags: &StatusFlags) -> u8 {
    let StatusFlags { job: flags, watch } = flags;
    let mut seen = false;
    let ended = block_on(async {
        let (mut clients, token) = connect(flags).await?;
        loop {
            let message = request(&token, v1::GetStatusRequest {})?;
            let answer = match clients.job.get_status(message).await {
                // A job that was watched and has gone is over.
                Err(_) if seen => return Ok(()),
                answer => answer?.into_inner(),
            };
            if seen && !flags.json && std::io::stdout().is_terminal() {
                data("\x1b[2J\x1b[H");
            }
            print(&answer, flags.json);
            seen = true;
            if !watch || matches!(answer.phase(), v1::Phase::Finished | v1::Phase::Aborted) {
                return Ok(());
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    });
    match ended {
        Ok(()) => 0,
        Err(error) => {
            if !flags.json {
                say(&format!("devices    {}", describe()));
            }
            fail(&error)
        }
    }
}

pub(super) fn save(flags: &JobFlags) -> u8 {
    let answer = block_on(async {
        let (mut clients, token) = connect(flags).await?;
        let request_id = format!("cli-{}", std::process::id());
        let message = patient_request(&token, v1::SaveCheckpointRequest { request_id }, SAVE_DEADLINE)?;
        Ok(clients.job.save_checkpoint(message).await?.into_inner())
    });
    match answer {
        Ok(saved) if flags.json => {
            json(&json!({"step": saved.step, "checkpoint": saved.directory}));
            0
        }
        Ok(saved) if saved.directory.is_empty() => {
            say("nothing has changed since the checkpoint that the job was loaded from");
            0
        }
        Ok(saved) => {
            data(&saved.directory);
            0
        }
        Err(error) => fail(&error),
    }
}

pub(super) fn unload(name: &str, flags: &JobFlags) -> u8 {
    let answer = block_on(async {
        let (mut clients, token) = connect(flags).await?;
        let request_id = format!("cli-{}", std::process::id());
        let message = request(&token, v1::UnloadModelRequest { request_id, model: name.to_owned() })?;
        Ok(clients.job.unload_model(message).await?.into_inner())
    });
    match answer {
        Ok(_) => 0,
        Err(error) => fail(&error),
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

fn print_training(training: &v1::TrainingProgress) {
    data(&format!(
        "training   step {} of {}, loss {:.4}, learning rate {:.3e}, {:.0} tokens/s, {:.0} s left",
        training.step,
        training.total_steps,
        training.loss,
        training.learning_rate,
        training.tokens_per_second,
        training.remaining_seconds
    ));
    if let Some(loss) = training.evaluation_loss {
        let best = training.best_step.map_or_else(String::new, |step| format!(", best after step {step}"));
        data(&format!("evaluation loss {loss:.4}{best}"));
    }
    if training.recent_losses.len() > 1 {
        data(&format!("loss       {}", sparkline(&training.recent_losses, SPARKLINE_WIDTH)));
    }
}

fn print(answer: &v1::GetStatusResponse, as_json: bool) {
    let header = answer.header.clone().unwrap_or_default();
    let phase = answer.phase().as_str_name().trim_start_matches("PHASE_").to_ascii_lowercase();
    let devices = describe();
    if as_json {
        let training = answer.training.as_ref().map(|training| {
            json!({
                "step": training.step, "total_steps": training.total_steps, "loss": training.loss,
                "learning_rate": training.learning_rate, "tokens_per_second": training.tokens_per_second,
                "remaining_seconds": training.remaining_seconds, "recent_losses": training.recent_losses,
                "evaluation_loss": training.evaluation_loss, "best_step": training.best_step,
            })
        });
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
            "training": training,
            "models": answer.models.iter().map(|model| json!({
                "name": model.name, "source": model.source, "kept_bytes": model.kept_bytes, "unloaded": model.unloaded,
            })).collect::<Vec<_>>(),
            "ranks": answer.ranks.iter().map(rank).collect::<Vec<_>>(),
        }));
        return;
    }
    say(&format!("job        {} (generation {}), {phase}", header.job_id, header.generation));
    say(&format!("devices    {devices}"));
    if !answer.last_checkpoint.is_empty() {
        say(&format!("checkpoint {}", answer.last_checkpoint));
    }
    // One model goes without saying.
    for model in answer.models.iter().filter(|_| answer.models.len() > 1) {
        let state = if model.unloaded { ", unloaded" } else { "" };
        data(&format!("model      {}: {}, {}{state}", model.name, model.source, bytes(model.kept_bytes)));
    }
    if let Some(training) = &answer.training {
        print_training(training);
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
