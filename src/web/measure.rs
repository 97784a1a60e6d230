//! From the coordinator's view to the samples of a scrape.

use crate::clock::Instant;
use crate::coordinator::{Coordinator, RankView, View};
use crate::load::LoadReport;
use crate::membership::TrainingProgress;
use crate::metrics::{MetricId, Samples};
use crate::types::{as_f64, as_u64};

const PHASES: [&str; 7] = ["forming", "loading", "training", "holding", "saving", "finished", "aborted"];
const STAGES: [&str; 6] = ["absent", "joining", "loading", "holding", "training", "saving"];

/// All samples, now.
pub(super) fn measure(coordinator: &Coordinator, viewers: u64, now: Instant) -> Samples {
    let mut samples = Samples::default();
    let (view, history) = (coordinator.views().borrow().clone(), coordinator.history());
    samples.set(MetricId::BuildInfo, &[env!("CARGO_PKG_VERSION")], 1_u64);
    samples.set(MetricId::StartTime, &[], as_f64(history.started_unix_ms) / 1e3);
    samples.set(MetricId::Viewers, &[], viewers);
    for ((method, code), count) in coordinator.calls().counts() {
        samples.set(MetricId::RpcRequests, &[method, code], count);
    }
    job(&mut samples, &view);
    samples.set(MetricId::JobRegroups, &[], history.regroups);
    for (rank, joins) in history.joins.iter().enumerate() {
        samples.set(MetricId::RankJoins, &[&rank.to_string()], *joins);
    }
    for (rank, planned) in view.ranks.iter().zip(coordinator.planned()) {
        of_rank(&mut samples, rank, planned.peak_host_bytes, now);
    }
    for load in coordinator.loads() {
        of_load(&mut samples, &load);
    }
    samples.set(MetricId::CheckpointCommits, &[], history.committed);
    samples.set(MetricId::CheckpointTime, &[], history.commit_s);
    if let Some(step) = view.committed_step {
        samples.set(MetricId::CheckpointStep, &[], step.0);
    }
    if let Some(training) = view.ranks.iter().find_map(|rank| rank.progress.training.as_ref()) {
        of_training(&mut samples, training);
    }
    samples
}

fn job(samples: &mut Samples, view: &View) {
    let joined = view.ranks.iter().filter(|rank| rank.member.is_some()).count();
    samples.set(MetricId::JobRanks, &[], as_u64(view.ranks.len()));
    samples.set(MetricId::JobRanksJoined, &[], as_u64(joined));
    samples.set(MetricId::JobGeneration, &[], view.generation.0);
    for phase in PHASES {
        samples.set(MetricId::JobPhase, &[phase], view.phase.name() == phase);
    }
    samples.set(MetricId::JobDraining, &[], view.is_draining);
}

fn of_rank(samples: &mut Samples, view: &RankView, planned_bytes: u64, now: Instant) {
    let (rank, progress, figures) = (view.rank.to_string(), &view.progress, &view.progress.figures);
    let rank = rank.as_str();
    for stage in STAGES {
        samples.set(MetricId::RankStage, &[rank, stage], progress.stage == stage);
    }
    samples.set(MetricId::RankPlannedPeak, &[rank], planned_bytes);
    // Nothing is known of a rank that has not joined.
    let Some(renewed) = view.renewed else { return };
    samples.set(MetricId::RankLeaseAge, &[rank], now.saturating_duration_since(renewed).as_secs_f64());
    samples.set(MetricId::RankWork, &[rank], progress.total_bytes);
    samples.set(MetricId::RankWorkDone, &[rank], progress.done_bytes);
    samples.set(MetricId::RankPeakResident, &[rank], progress.peak_resident_bytes);
    samples.set(MetricId::RankStorageRead, &[rank], figures.storage_bytes);
    samples.set(MetricId::RankWireSent, &[rank], figures.sent_bytes);
    samples.set(MetricId::RankWireReceived, &[rank], figures.received_bytes);
    samples.set(MetricId::RankQuantized, &[rank], figures.quantized_values);
    let stages = [
        ("allocate", figures.allocate_s),
        ("read", figures.read_s),
        ("encode", figures.encode_s),
        ("exchange", figures.exchange_s),
        ("place", figures.place_s),
    ];
    for (stage, seconds) in stages {
        samples.set(MetricId::RankLoadStage, &[rank, stage], seconds);
    }
    samples.set(MetricId::RankQueueUsed, &[rank], figures.queue_used_chunks);
    samples.set(MetricId::RankQueueCapacity, &[rank], figures.queue_capacity_chunks);
    samples.set(MetricId::RankCheckpointWritten, &[rank], figures.checkpoint_bytes);
    samples.set(MetricId::RankCheckpointWrite, &[rank], figures.checkpoint_s);
    samples.set(MetricId::RankStall, &[rank], figures.stall_s);
}

fn of_load(samples: &mut Samples, load: &LoadReport) {
    let rank = load.rank.to_string();
    samples.set(MetricId::RankWeights, &[&rank], load.weights_bytes);
    samples.set(MetricId::RankLoadTime, &[&rank], load.wall_s);
}

fn of_training(samples: &mut Samples, training: &TrainingProgress) {
    samples.set(MetricId::TrainingStep, &[], training.step);
    samples.set(MetricId::TrainingSteps, &[], training.total_steps);
    samples.set(MetricId::TrainingLoss, &[], f64::from(training.loss));
    if let Some(loss) = training.evaluation_loss {
        samples.set(MetricId::TrainingEvaluationLoss, &[], f64::from(loss));
    }
    samples.set(MetricId::TrainingLearningRate, &[], training.learning_rate);
    samples.set(MetricId::TrainingGradientNorm, &[], training.gradient_norm);
    samples.set(MetricId::TrainingStepTime, &[], training.step_s);
    samples.set(MetricId::TrainingTokens, &[], training.tokens);
    samples.set(MetricId::TrainingTokenRate, &[], training.tokens_per_second);
    samples.set(MetricId::TrainingRemaining, &[], training.remaining_seconds);
}
