//! The job as the page shows it: one JSON object, whole each time.
//!
//! Owns: its form. Refuses to know: how it is sent. It holds no secret: neither the token nor the data plane's.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::clock::Instant;
use crate::coordinator::{CommitView, Coordinator, Happening, View};
use crate::load::LoadReport;
use crate::membership::{Cause, RankFigures, TrainingProgress};
use crate::plan::RankMemory;
use crate::types::Step;

use super::follow::{Checked, Losses};

/// See the module.
#[derive(Debug, Serialize)]
pub(super) struct Snapshot<'a> {
    job: &'a str,
    model: &'a str,
    version: &'static str,
    incarnation: &'a str,
    started_unix_ms: u64,
    now_unix_ms: u64,
    generation: u64,
    phase: &'static str,
    draining: bool,
    cause: Option<&'a Cause>,
    ranks: Vec<RankRow<'a>>,
    models: Vec<ModelRow<'a>>,
    training: Option<TrainingRow>,
    losses: &'a [(u64, f32)],
    evaluations: &'a [(u64, f32)],
    checkpoint_root: Option<String>,
    checkpoints: Vec<CheckpointRow<'a>>,
    checkpoints_committed: u64,
    events: VecDeque<Happening>,
}

#[derive(Debug, Serialize)]
struct RankRow<'a> {
    rank: u32,
    joined: bool,
    host: &'a str,
    process_id: u32,
    device: &'a str,
    stage: &'a str,
    done_bytes: u64,
    total_bytes: u64,
    peak_resident_bytes: u64,
    planned_peak_bytes: u64,
    weights_bytes: u64,
    lease_age_ms: Option<u64>,
    joins: u64,
    figures: RankFigures,
    load: Option<LoadRow>,
}

#[derive(Debug, Serialize)]
struct LoadRow {
    wall_s: f64,
    backend: String,
    non_finite_values: u64,
}

#[derive(Debug, Serialize)]
struct ModelRow<'a> {
    name: &'a str,
    source: &'a str,
    kept_bytes: u64,
    unloaded: bool,
}

#[derive(Debug, Serialize)]
struct TrainingRow {
    step: u64,
    total_steps: u64,
    loss: f32,
    learning_rate: f64,
    gradient_norm: f64,
    tokens_per_second: f64,
    step_s: f64,
    remaining_s: f64,
    evaluation_loss: Option<f32>,
    best_step: Option<u64>,
}

impl From<&TrainingProgress> for TrainingRow {
    fn from(progress: &TrainingProgress) -> Self {
        Self {
            step: progress.step,
            total_steps: progress.total_steps,
            loss: progress.loss,
            learning_rate: progress.learning_rate,
            gradient_norm: progress.gradient_norm,
            tokens_per_second: progress.tokens_per_second,
            step_s: progress.step_s,
            remaining_s: progress.remaining_seconds,
            evaluation_loss: progress.evaluation_loss,
            best_step: progress.best_step,
        }
    }
}

#[derive(Debug, Serialize)]
struct CheckpointRow<'a> {
    #[serde(flatten)]
    commit: CommitView,
    /// `checking`, `verified`, `damaged`, `deleted`.
    state: &'static str,
    bytes: Option<u64>,
    detail: Option<&'a str>,
}

/// The snapshot as JSON.
pub(super) fn encode(
    (coordinator, view): (&Coordinator, &View),
    losses: &Losses,
    checked: &BTreeMap<Step, Checked>,
    now: Instant,
) -> String {
    let history = coordinator.history();
    let loads = coordinator.loads();
    let rows = view.ranks.iter().zip(coordinator.planned()).zip(&history.joins);
    let ranks = rows.map(|((rank, planned), joins)| row(rank, (&planned, *joins), &loads, now)).collect();
    let checkpoints = history.commits.iter().rev().map(|commit| checkpoint(commit.clone(), checked)).collect();
    let training = view.ranks.iter().find_map(|rank| rank.progress.training.as_ref());
    let snapshot = Snapshot {
        job: view.job.as_str(),
        model: &view.model,
        version: env!("CARGO_PKG_VERSION"),
        incarnation: coordinator.incarnation(),
        started_unix_ms: history.started_unix_ms,
        now_unix_ms: u64::try_from(crate::clock::unix_ns() / 1_000_000).unwrap_or(u64::MAX),
        generation: view.generation.0,
        phase: view.phase.name(),
        draining: view.is_draining,
        cause: view.cause(),
        ranks,
        models: view
            .models
            .iter()
            .map(|model| ModelRow {
                name: &model.name,
                source: &model.source,
                kept_bytes: model.kept_bytes,
                unloaded: model.unloaded,
            })
            .collect(),
        training: training.map(TrainingRow::from),
        losses: losses.steps(),
        evaluations: losses.evaluations(),
        checkpoint_root: view.checkpoint_root.as_ref().map(|root| root.display().to_string()),
        checkpoints,
        checkpoints_committed: history.committed,
        events: history.happenings,
    };
    serde_json::to_string(&snapshot).unwrap_or_default()
}

fn row<'a>(
    view: &'a crate::coordinator::RankView,
    (planned, joins): (&RankMemory, u64),
    loads: &[LoadReport],
    now: Instant,
) -> RankRow<'a> {
    let age = |renewed| u64::try_from(now.saturating_duration_since(renewed).as_millis()).unwrap_or(u64::MAX);
    let load = loads.iter().find(|load| load.rank == view.rank);
    RankRow {
        rank: view.rank.0,
        joined: view.member.is_some(),
        host: &view.host,
        process_id: view.process_id,
        device: &view.device,
        stage: &view.progress.stage,
        done_bytes: view.progress.done_bytes,
        total_bytes: view.progress.total_bytes,
        peak_resident_bytes: view.progress.peak_resident_bytes,
        planned_peak_bytes: planned.peak_host_bytes,
        weights_bytes: planned.weights_bytes,
        lease_age_ms: view.renewed.map(age),
        joins,
        figures: view.progress.figures,
        load: load.map(|load| LoadRow {
            wall_s: load.wall_s,
            backend: load.backend.clone(),
            non_finite_values: load.non_finite_values,
        }),
    }
}

fn checkpoint(commit: CommitView, checked: &BTreeMap<Step, Checked>) -> CheckpointRow<'_> {
    let (state, bytes, detail) = match checked.get(&commit.step) {
        None => ("checking", None, None),
        Some(Checked::Verified { bytes }) => ("verified", Some(*bytes), None),
        Some(Checked::Damaged { reason }) => ("damaged", None, Some(reason.as_str())),
        Some(Checked::Deleted) => ("deleted", None, None),
    };
    CheckpointRow { commit, state, bytes, detail }
}
