//! Between the coordinator's snapshots and the contract's messages.

use weightcast_proto::v1;

use crate::coordinator::{Coordinator, JobState, JobView, ModelView, Orders, View, of_load, of_save};
use crate::membership::{Cause, Phase, Progress, RankFigures, TrainingProgress};
use crate::telemetry;
use crate::types::as_u64;

pub(super) fn header(coordinator: &Coordinator, view: &View) -> v1::ResponseHeader {
    v1::ResponseHeader {
        job_id: view.job.to_string(),
        incarnation: coordinator.incarnation().to_owned(),
        generation: view.generation.0,
    }
}

pub(super) fn phase(phase: &Phase, is_training: bool) -> v1::Phase {
    match phase {
        Phase::Forming | Phase::Opening => v1::Phase::Forming,
        Phase::Loading => v1::Phase::Loading,
        // Ranks that train go on while a checkpoint is written.
        _ if is_training => v1::Phase::Training,
        Phase::Training => v1::Phase::Training,
        // Ranks have nothing to do while the coordinator begins or seals a checkpoint.
        Phase::Holding | Phase::Beginning { .. } | Phase::Committing { .. } => v1::Phase::Holding,
        Phase::Saving { .. } => v1::Phase::Saving,
        Phase::Finished => v1::Phase::Finished,
        Phase::Aborted(_) => v1::Phase::Aborted,
    }
}

pub(super) fn cause(cause: &Cause) -> v1::Cause {
    v1::Cause {
        rank: cause.rank.map(|rank| rank.0),
        message: cause.message.clone(),
        exit_code: u32::from(cause.exit_code),
    }
}

pub(super) fn watch(coordinator: &Coordinator, orders: &Orders) -> v1::WatchResponse {
    v1::WatchResponse {
        header: Some(v1::ResponseHeader {
            job_id: orders.job.to_string(),
            incarnation: coordinator.incarnation().to_owned(),
            generation: orders.generation.0,
        }),
        phase: phase(&orders.phase, orders.is_training).into(),
        peers: orders.peers.to_vec(),
        secret: orders.secret.to_vec(),
        plan_sha256: orders.plan_sha256.to_vec(),
        save: orders.save().map(|save| v1::Save {
            step: save.step.0,
            attempt: save.attempt.0,
            directory: save.directory.clone(),
        }),
        cause: orders.cause().map(cause),
        checkpoint_root: orders.checkpoint_root.as_ref().map(|root| root.display().to_string()).unwrap_or_default(),
        nccl_unique_id: orders.nccl_unique_id.clone(),
        stop: orders.is_stopping,
        committed_step: orders.committed_step.map(|step| step.0),
        save_request: orders.save_request,
        unloaded: orders.unloaded.clone(),
        base_id: orders.base_id.clone(),
        keep_base: orders.keeps_base,
        preempted: orders.is_preempted,
        traceparent: traceparent(orders),
    }
}

pub(super) fn job(job: &JobView) -> v1::JobSummary {
    let state = match job.state {
        JobState::Queued => v1::JobState::Queued,
        JobState::Running => v1::JobState::Running,
        JobState::Done => v1::JobState::Done,
        JobState::Cancelled => v1::JobState::Cancelled,
        JobState::Failed => v1::JobState::Failed,
    };
    v1::JobSummary {
        number: job.number,
        name: job.name.to_string(),
        state: state.into(),
        last_checkpoint: job.last_checkpoint.clone().unwrap_or_default(),
        message: job.message.clone(),
        load_seconds: job.load_seconds,
        storage_bytes: job.storage_bytes,
    }
}

/// The trace of what ranks are doing.
fn traceparent(orders: &Orders) -> String {
    let ids = match (orders.save(), &orders.phase) {
        _ if !telemetry::is_on() => None,
        (Some(save), _) => Some(of_save(&orders.job, orders.generation, save)),
        (None, Phase::Loading) => Some(of_load(&orders.job, orders.generation)),
        _ => None,
    };
    ids.map(|ids| ids.traceparent()).unwrap_or_default()
}

pub(super) fn progress(message: Option<v1::Progress>) -> Progress {
    message.map_or_else(Progress::default, |message| Progress {
        stage: message.stage,
        done_bytes: message.done_bytes,
        total_bytes: message.total_bytes,
        peak_resident_bytes: message.peak_resident_bytes,
        training: message.training.map(|training| TrainingProgress {
            step: training.step,
            total_steps: training.total_steps,
            loss: training.loss,
            learning_rate: training.learning_rate,
            tokens_per_second: training.tokens_per_second,
            remaining_seconds: training.remaining_seconds,
            recent_losses: training.recent_losses,
            evaluation_loss: training.evaluation_loss,
            best_step: training.best_step,
            step_s: training.step_seconds,
            gradient_norm: training.gradient_norm,
            tokens: training.tokens,
        }),
        figures: message.figures.map_or_else(RankFigures::default, |figures| RankFigures {
            storage_bytes: figures.storage_bytes,
            sent_bytes: figures.sent_bytes,
            received_bytes: figures.received_bytes,
            quantized_values: figures.quantized_values,
            allocate_s: figures.allocate_seconds,
            read_s: figures.read_seconds,
            encode_s: figures.encode_seconds,
            exchange_s: figures.exchange_seconds,
            place_s: figures.place_seconds,
            queue_used_chunks: figures.queue_used_chunks,
            queue_capacity_chunks: figures.queue_capacity_chunks,
            checkpoint_bytes: figures.checkpoint_bytes,
            checkpoint_s: figures.checkpoint_seconds,
            stall_s: figures.stall_seconds,
        }),
    })
}

/// What a rank sends.
pub(crate) fn figures(figures: &RankFigures) -> v1::RankFigures {
    v1::RankFigures {
        storage_bytes: figures.storage_bytes,
        sent_bytes: figures.sent_bytes,
        received_bytes: figures.received_bytes,
        quantized_values: figures.quantized_values,
        allocate_seconds: figures.allocate_s,
        read_seconds: figures.read_s,
        encode_seconds: figures.encode_s,
        exchange_seconds: figures.exchange_s,
        place_seconds: figures.place_s,
        queue_used_chunks: figures.queue_used_chunks,
        queue_capacity_chunks: figures.queue_capacity_chunks,
        checkpoint_bytes: figures.checkpoint_bytes,
        checkpoint_seconds: figures.checkpoint_s,
        stall_seconds: figures.stall_s,
    }
}

/// Also what a rank sends.
pub(crate) fn training(progress: &TrainingProgress) -> v1::TrainingProgress {
    v1::TrainingProgress {
        step: progress.step,
        total_steps: progress.total_steps,
        loss: progress.loss,
        learning_rate: progress.learning_rate,
        tokens_per_second: progress.tokens_per_second,
        remaining_seconds: progress.remaining_seconds,
        recent_losses: progress.recent_losses.clone(),
        evaluation_loss: progress.evaluation_loss,
        best_step: progress.best_step,
        step_seconds: progress.step_s,
        gradient_norm: progress.gradient_norm,
        tokens: progress.tokens,
    }
}

fn model(model: &ModelView) -> v1::ModelStatus {
    v1::ModelStatus {
        name: model.name.clone(),
        source: model.source.clone(),
        kept_bytes: model.kept_bytes,
        unloaded: model.unloaded,
    }
}

pub(super) fn job_status(coordinator: &Coordinator, view: &View) -> v1::GetStatusResponse {
    let now = crate::clock::now();
    let rank = |rank: &crate::coordinator::RankView| v1::RankStatus {
        rank: rank.rank.0,
        host: rank.host.clone(),
        process_id: rank.process_id,
        device: rank.device.clone(),
        stage: rank.progress.stage.clone(),
        done_bytes: rank.progress.done_bytes,
        total_bytes: rank.progress.total_bytes,
        peak_resident_bytes: rank.progress.peak_resident_bytes,
        lease_age_ms: rank
            .renewed
            .map_or(0, |renewed| u64::try_from(now.saturating_duration_since(renewed).as_millis()).unwrap_or(u64::MAX)),
    };
    v1::GetStatusResponse {
        header: Some(header(coordinator, view)),
        // People are told what the coordinator does, too.
        phase: match view.phase {
            Phase::Beginning { .. } | Phase::Committing { .. } if !view.is_training => v1::Phase::Saving.into(),
            _ => phase(&view.phase, view.is_training).into(),
        },
        world_size: u32::try_from(as_u64(view.ranks.len())).unwrap_or(u32::MAX),
        ranks: view.ranks.iter().map(rank).collect(),
        last_checkpoint: view.last_checkpoint.clone().unwrap_or_default(),
        cause: view.cause().map(cause),
        model: view.model.clone(),
        training: view.ranks.iter().find_map(|rank| rank.progress.training.as_ref()).map(training),
        models: view.models.iter().map(model).collect(),
    }
}
