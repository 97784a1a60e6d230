//! `WorkerService`: what ranks say.

use std::pin::Pin;

use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, Streaming};
use weightcast_proto::v1::worker_service_server::WorkerService;
use weightcast_proto::{PROTOCOL_VERSION, v1};

use super::server::expect_deadline;
use super::status::{refused, status};
use super::validate;
use super::{convert, lines};
use crate::coordinator::Coordinator;
use crate::membership::{Blame, Event, JoinInfo, LEASE, Phase, RENEW_INTERVAL, Refusal};
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

    /// The rank of a member.
    fn rank_of(&self, member: &str) -> Option<Rank> {
        let views = self.coordinator.views();
        let view = views.borrow();
        view.ranks.iter().find(|rank| rank.member.as_deref() == Some(member)).map(|rank| rank.rank)
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
            let message = format!(
                "rank {} speaks protocol version {}, this coordinator {PROTOCOL_VERSION}",
                join.rank, join.protocol_version
            );
            return Err(refused(Code::FailedPrecondition, "protocol-version", &message));
        }
        validate::join(&join)?;
        let (request_id, rank) = (join.request_id.clone(), Rank(join.rank));
        self.apply(Event::Join(JoinInfo {
            request_id: join.request_id,
            rank,
            world: join.world_size,
            host: join.host,
            process_id: join.process_id,
            data_address: join.data_address,
            device: join.device,
            nccl_version: join.nccl_version,
            nccl_unique_id: join.nccl_unique_id,
            holds: Generation(join.holds_generation),
        }))
        .await?;
        let member = {
            let views = self.coordinator.views();
            let view = views.borrow();
            let own = view.ranks.get(rank.index()).filter(|rank| rank.request_id == request_id);
            own.and_then(|rank| rank.member.clone())
        };
        let member_id =
            member.ok_or_else(|| refused(Code::Internal, "internal", "the member vanished while it joined"))?;
        let milliseconds = |duration: std::time::Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        Ok(Response::new(v1::JoinResponse {
            header: self.header(),
            member_id,
            lease_ms: milliseconds(LEASE),
            renew_interval_ms: milliseconds(RENEW_INTERVAL),
            rejoin_ms: self.coordinator.rejoin_timeout().map_or(0, milliseconds),
        }))
    }

    type WatchStream = ResponseStream<v1::WatchResponse>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let v1::WatchRequest { member_id: member, save_request } = request.into_inner();
        validate::id("member_id", &member)?;
        let coordinator = self.coordinator.clone();
        if save_request > 0 {
            // Of a member that is none, the watch itself says so.
            let _ = self.apply(Event::SaveRequestSeen { member: member.clone(), request: save_request }).await;
        }
        let follower = coordinator.follow();
        {
            let views = coordinator.views();
            let view = views.borrow();
            // The end is told to everybody: after a restart the members may be forgotten.
            let known = view.ranks.iter().any(|rank| rank.member.as_ref() == Some(&member));
            if !known && !matches!(view.phase, Phase::Finished | Phase::Aborted(_)) {
                return Err(status(&Refusal::Stale { member: member.clone(), generation: view.generation.0 }));
            }
        }
        let orders = self.coordinator.orders();
        let regroups = orders.borrow().regroups;
        let changes = WatchStream::new(orders).map(move |orders| {
            let _ = &follower;
            // What the next generation is told, its secret above all, is for those who join it.
            if orders.regroups != regroups && !matches!(orders.phase, Phase::Finished | Phase::Aborted(_)) {
                return Err(status(&Refusal::Stale { member: member.clone(), generation: orders.generation.0 }));
            }
            Ok(convert::watch(&coordinator, &orders))
        });
        Ok(Response::new(Box::pin(changes)))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        expect_deadline(&request)?;
        let renew = request.into_inner();
        validate::id("member_id", &renew.member_id)?;
        validate::progress(renew.progress.as_ref())?;
        let progress = Box::new(convert::progress(renew.progress));
        self.apply(Event::Renew { member: renew.member_id, progress }).await?;
        Ok(Response::new(v1::RenewResponse { header: self.header() }))
    }

    type GetPlanStream = ResponseStream<v1::GetPlanResponse>;

    async fn get_plan(&self, _request: Request<v1::GetPlanRequest>) -> Result<Response<Self::GetPlanStream>, Status> {
        let header = self.header();
        // Each part is copied when it is sent, so that callers who do not read cost nothing.
        let parts = self.coordinator.plan_parts(PLAN_PART_BYTES);
        let parts = parts.map(move |part| Ok(v1::GetPlanResponse { header: header.clone(), part }));
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn report_loaded(
        &self,
        request: Request<v1::ReportLoadedRequest>,
    ) -> Result<Response<v1::ReportLoadedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        tracing::debug!(member = report.member_id, figures = report.report_json, "rank loaded");
        validate::id("member_id", &report.member_id)?;
        let (member, generation) = (report.member_id, Generation(report.generation));
        // A rank speaks for itself alone. Before the event, which may be what the end of the job waits for.
        if let Some(rank) = self.rank_of(&member) {
            self.coordinator.record_load(rank, &report.report_json);
        }
        self.apply(Event::Loaded { member, generation }).await?;
        Ok(Response::new(v1::ReportLoadedResponse { header: self.header() }))
    }

    async fn report_saved(
        &self,
        request: Request<v1::ReportSavedRequest>,
    ) -> Result<Response<v1::ReportSavedResponse>, Status> {
        expect_deadline(&request)?;
        let report = request.into_inner();
        validate::id("member_id", &report.member_id)?;
        let receipt = validate::receipt(&report.receipt_json)?;
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
            message: validate::report(&report.message),
            exit_code: u8::try_from(report.exit_code).unwrap_or(1),
            blame: match report.lost_peer {
                Some(peer) => Blame::Peer(Rank(peer)),
                None if report.lost_contact => Blame::Unknown,
                None => Blame::Own,
            },
        })
        .await?;
        Ok(Response::new(v1::ReportFailedResponse { header: self.header() }))
    }

    type ReportLinesStream = ResponseStream<v1::ReportLinesResponse>;

    async fn report_lines(
        &self,
        request: Request<Streaming<v1::ReportLinesRequest>>,
    ) -> Result<Response<Self::ReportLinesStream>, Status> {
        Ok(Response::new(Box::pin(lines::receive(self.coordinator.clone(), request.into_inner()))))
    }
}
