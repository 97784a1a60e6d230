//! `JobService`: what people ask.

use std::path::PathBuf;

use tonic::{Code, Request, Response, Status};
use weightcast_proto::v1;
use weightcast_proto::v1::job_service_server::JobService;

use super::auth::Role;
use super::client::MEMBER;
use super::convert;
use super::lines::LogStream;
use super::server::expect_deadline;
use super::status::{refused, status};
use super::validate;
use crate::coordinator::{Coordinator, JobText, LineChoice};
use crate::membership::{Event, Phase, Refusal};
use crate::tasks::blocking;
use crate::types::Rank;

#[derive(Debug)]
pub(super) struct JobServer {
    pub(super) coordinator: Coordinator,
}

impl JobServer {
    /// Refuses the workers' token to all but members, who end on a signal of their scheduler; the control token commands.
    fn expect_commander<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if request.extensions().get::<Role>() != Some(&Role::Worker) {
            return Ok(());
        }
        let member = request.metadata().get(MEMBER).and_then(|member| member.to_str().ok());
        let views = self.coordinator.views();
        let is_member =
            member.is_some_and(|member| views.borrow().ranks.iter().any(|rank| rank.member.as_deref() == Some(member)));
        if is_member {
            return Ok(());
        }
        let message = "the workers' token ends the job for a member only: expected the control token";
        Err(refused(Code::PermissionDenied, "role", message))
    }
}

#[tonic::async_trait]
impl JobService for JobServer {
    async fn get_status(
        &self,
        request: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        expect_deadline(&request)?;
        let views = self.coordinator.views();
        let answer = convert::job_status(&self.coordinator, &views.borrow());
        Ok(Response::new(answer))
    }

    async fn save_checkpoint(
        &self,
        request: Request<v1::SaveCheckpointRequest>,
    ) -> Result<Response<v1::SaveCheckpointResponse>, Status> {
        expect_deadline(&request)?;
        let Some(step) = self.coordinator.next_step() else {
            let message = "the job has no checkpoint directory";
            return Err(refused(Code::FailedPrecondition, "no-checkpoints", message));
        };
        // Rises from one coordinator of a job to the next, also when the clock is set back.
        let now = u64::try_from(crate::clock::unix_ns()).unwrap_or(0);
        let (asked, trains) = {
            let views = self.coordinator.views();
            let view = views.borrow();
            (now.max(view.save_request + 1), view.is_training)
        };
        let event = Event::SaveRequested { step, request: asked };
        self.coordinator.apply(event).await.map_err(|refusal| status(&refusal))?;
        let mut views = self.coordinator.views();
        loop {
            let view = views.borrow_and_update().clone();
            if let Some(cause) = view.cause() {
                return Err(status(&Refusal::Over { message: cause.message.clone() }));
            }
            let is_committed = match view.save_answered.filter(|(request, _)| *request >= asked) {
                Some((_, step)) => view.committed_step.is_some_and(|committed| committed >= step),
                // The end of a run is saved; ranks that hold have nothing to save a second time.
                None if trains => view.phase == Phase::Finished,
                None => matches!(view.phase, Phase::Holding | Phase::Finished),
            };
            if is_committed {
                return Ok(Response::new(v1::SaveCheckpointResponse {
                    header: Some(convert::header(&self.coordinator, &view)),
                    step: view.committed_step.unwrap_or(step).0,
                    directory: view.last_checkpoint.clone().unwrap_or_default(),
                }));
            }
            // The caller's deadline ends the wait.
            let ending = |_| refused(Code::Unavailable, "ending", "the coordinator is ending");
            views.changed().await.map_err(ending)?;
        }
    }

    async fn unload_model(
        &self,
        request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        expect_deadline(&request)?;
        let model = request.into_inner().model;
        validate::id("model", &model)?;
        let views = self.coordinator.views();
        let others: Vec<String> = views.borrow().models.iter().skip(1).map(|model| model.name.clone()).collect();
        if !others.contains(&model) {
            let expected =
                if others.is_empty() { "none, because the job has no other".to_owned() } else { others.join(", ") };
            let message = format!("models that can be unloaded: expected {expected}; found {model:?}");
            return Err(refused(Code::NotFound, "no-such-model", &message));
        }
        self.coordinator.apply(Event::UnloadRequested(model)).await.map_err(|refusal| status(&refusal))?;
        let header = convert::header(&self.coordinator, &views.borrow());
        Ok(Response::new(v1::UnloadModelResponse { header: Some(header) }))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        expect_deadline(&request)?;
        self.expect_commander(&request)?;
        // A job without a place for checkpoints ends as well, with nothing to save.
        let save = self.coordinator.next_step().filter(|_| request.get_ref().save);
        // A member asks because its own host is being taken away.
        let event = match request.metadata().get(MEMBER).and_then(|member| member.to_str().ok()) {
            Some(member) => Event::LeaveRequested { member: member.to_owned(), save },
            None => Event::DrainRequested { save, preempts: false },
        };
        self.coordinator.apply(event).await.map_err(|refusal| status(&refusal))?;
        let views = self.coordinator.views();
        let header = convert::header(&self.coordinator, &views.borrow());
        Ok(Response::new(v1::DrainResponse { header: Some(header) }))
    }

    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Result<Response<v1::SubmitJobResponse>, Status> {
        expect_deadline(&request)?;
        let v1::SubmitJobRequest { job_file: text, directory, .. } = request.into_inner();
        let directory = PathBuf::from(directory);
        if !directory.is_absolute() {
            let found = directory.display();
            return Err(Status::invalid_argument(format!("directory: expected an absolute path, found {found:?}")));
        }
        let number = self.coordinator.submit(JobText { text, directory }).await.map_err(|error| status(&error))?;
        let views = self.coordinator.views();
        let header = convert::header(&self.coordinator, &views.borrow());
        Ok(Response::new(v1::SubmitJobResponse { header: Some(header), number }))
    }

    async fn list_jobs(&self, request: Request<v1::ListJobsRequest>) -> Result<Response<v1::ListJobsResponse>, Status> {
        expect_deadline(&request)?;
        let views = self.coordinator.views();
        let view = views.borrow();
        let header = convert::header(&self.coordinator, &view);
        let jobs = view.jobs.iter().map(convert::job).collect();
        Ok(Response::new(v1::ListJobsResponse { header: Some(header), jobs }))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        expect_deadline(&request)?;
        self.coordinator.cancel(request.get_ref().number).await.map_err(|refusal| status(&refusal))?;
        let views = self.coordinator.views();
        let header = convert::header(&self.coordinator, &views.borrow());
        Ok(Response::new(v1::CancelJobResponse { header: Some(header) }))
    }

    async fn report_process_ended(
        &self,
        request: Request<v1::ReportProcessEndedRequest>,
    ) -> Result<Response<v1::ReportProcessEndedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        let exit_code = u8::try_from(report.exit_code).unwrap_or(1);
        let world = u32::try_from(self.coordinator.views().borrow().ranks.len()).unwrap_or(u32::MAX);
        if report.rank >= world {
            return Err(status(&Refusal::NoSuchRank { rank: report.rank, world }));
        }
        let message = validate::report(&report.message);
        let (process_id, returns) = (report.process_id, report.will_restart);
        let event = Event::ProcessEnded { rank: Rank(report.rank), process_id, returns, message, exit_code };
        self.coordinator.apply(event).await.map_err(|refusal| status(&refusal))?;
        let views = self.coordinator.views();
        let header = convert::header(&self.coordinator, &views.borrow());
        Ok(Response::new(v1::ReportProcessEndedResponse { header: Some(header) }))
    }

    type FollowLogsStream = LogStream;

    async fn follow_logs(
        &self,
        request: Request<v1::FollowLogsRequest>,
    ) -> Result<Response<Self::FollowLogsStream>, Status> {
        let v1::FollowLogsRequest { ranks, tail_lines: tail, follow } = request.into_inner();
        validate::ranks(&ranks, self.coordinator.views().borrow().ranks.len())?;
        let choice = LineChoice { ranks: ranks.into_iter().map(Rank).collect(), tail, follow };
        let (lines, asked) = (self.coordinator.lines().clone(), choice.clone());
        // The end of very many ranks' lines takes a while to be found.
        let reader = blocking(move || lines.read(&asked)).await.map_err(|error| status(&error))?;
        Ok(Response::new(LogStream::new(self.coordinator.clone(), reader, &choice)))
    }
}
