//! What a rank reports, kept so that it can be said again to a coordinator that was restarted.
//!
//! Owns: the messages and their sending. Refuses to know: when they are due.

use weightcast_proto::v1;

use super::WorkerError;
use super::calls::refused;
use super::data::Outcome;
use super::session::Session;
use crate::rpc::request;

/// What this rank has reported in its generation.
#[derive(Debug, Default)]
pub(super) struct Reported {
    loaded: Option<v1::ReportLoadedRequest>,
    saved: Option<v1::ReportSavedRequest>,
    snapshot: Option<v1::RequestSaveRequest>,
    trained: Option<v1::ReportTrainedRequest>,
}

impl Session {
    /// Says again all that was reported.
    pub(super) async fn report_again(&mut self) -> Result<(), WorkerError> {
        self.report_loaded().await?;
        self.request_save().await?;
        self.report_saved().await?;
        self.report_trained().await
    }

    pub(super) async fn report(&mut self, outcome: Outcome) -> Result<(), WorkerError> {
        let member_id = self.member.borrow().clone();
        let (request_id, generation) = (format!("{member_id}-{:x}", crate::clock::unix_ns()), self.generation);
        if !self.training {
            let _ = self.stage.send("holding");
        }
        match outcome {
            Outcome::Loaded(report) => {
                crate::faults::point("worker.loaded");
                let report_json = serde_json::to_string(&report).unwrap_or_default();
                self.reported.loaded = Some(v1::ReportLoadedRequest { request_id, member_id, generation, report_json });
                self.report_loaded().await?;
                crate::faults::point("worker.loaded-reported");
            }
            Outcome::Saved { command, receipt } => {
                crate::faults::point("worker.saved");
                let receipt_json = serde_json::to_string(&receipt).unwrap_or_default();
                let (step, attempt) = (command.step.0, command.attempt.0);
                let message = v1::ReportSavedRequest { request_id, member_id, generation, step, attempt, receipt_json };
                self.reported.saved = Some(message);
                self.report_saved().await?;
                crate::faults::point("worker.saved-reported");
            }
            // All ranks take the snapshot of a step; one says so.
            Outcome::SnapshotTaken { .. } if self.config.rank.0 != 0 => {}
            Outcome::SnapshotTaken { step, answers } => {
                self.reported.snapshot =
                    Some(v1::RequestSaveRequest { request_id, member_id, generation, step: step.0, answers });
                self.request_save().await?;
            }
            Outcome::Trained => {
                let _ = self.stage.send("holding");
                let step = self.reported.saved.as_ref().map_or(0, |saved| saved.step);
                self.reported.trained = Some(v1::ReportTrainedRequest { request_id, member_id, generation, step });
                self.report_trained().await?;
            }
            Outcome::Failed(_) | Outcome::Regrouped(_) => {}
        }
        Ok(())
    }

    pub(super) async fn report_loaded(&mut self) -> Result<(), WorkerError> {
        let Some(message) = self.reported.loaded.clone() else { return Ok(()) };
        let answer = self.clients.worker.report_loaded(request(&self.config.token, message)?).await;
        answer.map(drop).map_err(refused(&self.config, "report its load"))
    }

    pub(super) async fn request_save(&mut self) -> Result<(), WorkerError> {
        let Some(message) = self.reported.snapshot.clone() else { return Ok(()) };
        let answer = self.clients.worker.request_save(request(&self.config.token, message)?).await;
        answer.map(drop).map_err(refused(&self.config, "ask for a checkpoint"))
    }

    pub(super) async fn report_trained(&mut self) -> Result<(), WorkerError> {
        let Some(message) = self.reported.trained.clone() else { return Ok(()) };
        let answer = self.clients.worker.report_trained(request(&self.config.token, message)?).await;
        answer.map(drop).map_err(refused(&self.config, "report the end of its training"))
    }

    pub(super) async fn report_saved(&mut self) -> Result<(), WorkerError> {
        let Some(message) = self.reported.saved.clone() else { return Ok(()) };
        let answer = self.clients.worker.report_saved(request(&self.config.token, message)?).await;
        answer.map(drop).map_err(refused(&self.config, "report its shard"))
    }
}
