//! `WorkerService`: what ranks say.

use std::pin::Pin;

use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};
use weightcast_proto::v1::worker_service_server::WorkerService;
use weightcast_proto::{PROTOCOL_VERSION, v1};

use super::convert;
use super::server::expect_deadline;
use super::status::status;
use crate::coordinator::Coordinator;
use crate::membership::{Event, JoinInfo, LEASE, Phase, RENEW_INTERVAL, Refusal};
use crate::types::{Attempt, Generation, Rank, Step};

/// Parts of the plan are at most this long, well below gRPC's message limit of 4 MiB.
const PLAN_PART_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct WorkerServer {
    pub(super) coordinator: Coordinator,
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl WorkerServer {
    fn header(&self) -> Option<v1::ResponseHeader> {
        Some(convert::header(&self.coordinator, &self.coordinator.views().borrow()))
    }

    async fn apply(&self, event: Event) -> Result<(), Status> {
        self.coordinator.apply(event).await.map_err(|refusal| status(&refusal))
    }
}

#[tonic::async_trait]
impl WorkerService for WorkerServer {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        expect_deadline(&request)?;
        let join = request.into_inner();
        if join.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "rank {} speaks protocol version {}, this coordinator {PROTOCOL_VERSION}",
                join.rank, join.protocol_version
            )));
        }
        let request_id = join.request_id.clone();
        self.apply(Event::Join(JoinInfo {
            request_id: join.request_id,
            rank: Rank(join.rank),
            world: join.world_size,
            host: join.host,
            process_id: join.process_id,
            data_address: join.data_address,
            device: join.device,
            nccl_version: join.nccl_version,
            nccl_unique_id: join.nccl_unique_id,
        }))
        .await?;
        let member = {
            let views = self.coordinator.views();
            let view = views.borrow();
            view.ranks.iter().find(|rank| rank.request_id == request_id).and_then(|rank| rank.member.clone())
        };
        let member_id = member.ok_or_else(|| Status::internal("the member vanished while it joined"))?;
        let milliseconds = |duration: std::time::Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        Ok(Response::new(v1::JoinResponse {
            header: self.header(),
            member_id,
            lease_ms: milliseconds(LEASE),
            renew_interval_ms: milliseconds(RENEW_INTERVAL),
        }))
    }

    type WatchStream = ResponseStream<v1::WatchResponse>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let member = request.into_inner().member_id;
        let coordinator = self.coordinator.clone();
        let follower = coordinator.follow();
        {
            let views = coordinator.views();
            let view = views.borrow();
            // The end is told to everybody: after a restart the members may be forgotten.
            let known = view.ranks.iter().any(|rank| rank.member.as_ref() == Some(&member));
            if !known && !matches!(view.phase, Phase::Finished | Phase::Aborted(_)) {
                return Err(status(&Refusal::Stale { member, generation: view.generation.0 }));
            }
        }
        let mut last = None;
        let changes = WatchStream::new(self.coordinator.views()).filter_map(move |view| {
            let _ = &follower;
            // Renewals change the view too, but nothing that a rank acts on.
            let message = convert::watch(&coordinator, &view);
            let news = last.as_ref() != Some(&message);
            last = Some(message.clone());
            news.then_some(Ok(message))
        });
        Ok(Response::new(Box::pin(changes)))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        expect_deadline(&request)?;
        let renew = request.into_inner();
        let progress = Box::new(convert::progress(renew.progress));
        self.apply(Event::Renew { member: renew.member_id, progress }).await?;
        Ok(Response::new(v1::RenewResponse { header: self.header() }))
    }

    type GetPlanStream = ResponseStream<v1::GetPlanResponse>;

    async fn get_plan(&self, _request: Request<v1::GetPlanRequest>) -> Result<Response<Self::GetPlanStream>, Status> {
        let header = self.header();
        let parts: Vec<_> = self
            .coordinator
            .plan_bytes()
            .chunks(PLAN_PART_BYTES)
            .map(|part| Ok(v1::GetPlanResponse { header: header.clone(), part: part.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn report_loaded(
        &self,
        request: Request<v1::ReportLoadedRequest>,
    ) -> Result<Response<v1::ReportLoadedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        tracing::debug!(member = report.member_id, figures = report.report_json, "rank loaded");
        self.coordinator.record_load(&report.report_json);
        self.apply(Event::Loaded { member: report.member_id, generation: Generation(report.generation) }).await?;
        Ok(Response::new(v1::ReportLoadedResponse { header: self.header() }))
    }

    async fn report_saved(
        &self,
        request: Request<v1::ReportSavedRequest>,
    ) -> Result<Response<v1::ReportSavedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        let receipt = serde_json::from_str(&report.receipt_json)
            .map_err(|error| Status::invalid_argument(format!("receipt cannot be read: {error}")))?;
        self.apply(Event::Saved {
            member: report.member_id,
            generation: Generation(report.generation),
            step: Step(report.step),
            attempt: Attempt(report.attempt),
            receipt: Box::new(receipt),
        })
        .await?;
        Ok(Response::new(v1::ReportSavedResponse { header: self.header() }))
    }

    async fn request_save(
        &self,
        request: Request<v1::RequestSaveRequest>,
    ) -> Result<Response<v1::RequestSaveResponse>, Status> {
        expect_deadline(&request)?;
        let asked = request.into_inner();
        let (generation, step) = (Generation(asked.generation), Step(asked.step));
        let (member, answers) = (asked.member_id, asked.answers);
        self.apply(Event::SnapshotTaken { member, generation, step, answers }).await?;
        Ok(Response::new(v1::RequestSaveResponse { header: self.header() }))
    }

    async fn report_trained(
        &self,
        request: Request<v1::ReportTrainedRequest>,
    ) -> Result<Response<v1::ReportTrainedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        self.apply(Event::Trained { member: report.member_id, generation: Generation(report.generation) }).await?;
        Ok(Response::new(v1::ReportTrainedResponse { header: self.header() }))
    }

    async fn report_failed(
        &self,
        request: Request<v1::ReportFailedRequest>,
    ) -> Result<Response<v1::ReportFailedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        self.apply(Event::Failed {
            member: report.member_id,
            generation: Generation(report.generation),
            message: report.message,
            exit_code: u8::try_from(report.exit_code).unwrap_or(1),
            lost_peer: report.lost_peer.map(Rank),
        })
        .await?;
        Ok(Response::new(v1::ReportFailedResponse { header: self.header() }))
    }
}
