//! What others see of the coordinator's state: a full snapshot.

use std::path::PathBuf;
use std::sync::Arc;

use super::JobRecord;
use super::queue::JobView;
use crate::clock::Instant;
use crate::membership::{Cause, Member, Membership, Phase, Progress, Save};
use crate::plan::{LoadPlan, OWN_MODEL};
use crate::types::{Generation, JobId, Rank, Step, pack_addresses};

/// A snapshot of the job.
#[derive(Clone, Debug)]
pub struct View {
    /// The job.
    pub job: JobId,
    /// The model in words.
    pub model: String,
    /// The current generation.
    pub generation: Generation,
    /// The phase.
    pub phase: Phase,
    /// Addresses of the data plane by rank, once all have joined ([`pack_addresses`]).
    pub peers: Arc<[u8]>,
    /// The generation's secret.
    pub secret: [u8; 32],
    /// Rank 0's NCCL unique id, when all ranks have joined and all offered the same release.
    pub nccl_unique_id: Vec<u8>,
    /// SHA-256 of the plan.
    pub plan_sha256: [u8; 32],
    /// The ranks.
    pub ranks: Vec<RankView>,
    /// The newest checkpoint of this job.
    pub last_checkpoint: Option<String>,
    /// Where checkpoints go.
    pub checkpoint_root: Option<PathBuf>,
    /// Whether the ranks train, possibly while a checkpoint is written.
    pub is_training: bool,
    /// Whether the job is to end in an orderly way.
    pub is_draining: bool,
    /// The newest step that this job has committed.
    pub committed_step: Option<Step>,
    /// The newest request for a checkpoint of a training job; 0 for none.
    pub save_request: u64,
    /// The newest request that a snapshot has answered, and its step.
    pub save_answered: Option<(u64, Step)>,
    /// The models of the job, its own first.
    pub models: Vec<ModelView>,
    /// What tells the files of its base from others; empty when nothing does.
    pub base_id: String,
    /// Whether ranks that hold that base keep it.
    pub keeps_base: bool,
    /// Whether ranks that train are to end at their next step.
    pub is_stopping: bool,
    /// Whether the job ends because its hosts are being taken away.
    pub is_preempted: bool,
    /// How often the job has lost ranks and waited for them, since this process of the coordinator started.
    pub regroups: u64,
    /// The jobs of these ranks by number, as far as they are remembered.
    pub jobs: Vec<JobView>,
}

/// What ranks act on: the part of a snapshot that changes seldom, while renewals change the rest a thousand times a second.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each is the snapshot's field of that name")]
pub struct Orders {
    pub job: JobId,
    pub generation: Generation,
    pub phase: Phase,
    /// Of use while ranks load, and empty otherwise: a message to each rank about each rank.
    pub peers: Arc<[u8]>,
    pub secret: [u8; 32],
    pub nccl_unique_id: Vec<u8>,
    pub plan_sha256: [u8; 32],
    pub checkpoint_root: Option<PathBuf>,
    pub is_training: bool,
    pub is_stopping: bool,
    pub committed_step: Option<Step>,
    pub save_request: u64,
    pub unloaded: Vec<String>,
    pub base_id: String,
    pub keeps_base: bool,
    pub is_preempted: bool,
    pub regroups: u64,
}

/// Whose entry an event has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changed {
    /// No rank's.
    None,
    /// This rank's.
    Rank(Rank),
    /// Any.
    All,
}

/// A model of the job.
#[derive(Clone, Debug)]
pub struct ModelView {
    /// Its name in the job.
    pub name: String,
    /// Where it came from, in words.
    pub source: String,
    /// Bytes of weights and statistics that all ranks together keep, or kept.
    pub kept_bytes: u64,
    /// Whether it was let go.
    pub unloaded: bool,
}

/// A snapshot of one rank.
#[derive(Clone, Debug)]
pub struct RankView {
    /// The rank.
    pub rank: Rank,
    /// The id of its member; absent when it has not joined.
    pub member: Option<String>,
    /// The request id of its join.
    pub request_id: String,
    /// Its host.
    pub host: String,
    /// Its process.
    pub process_id: u32,
    /// Its device.
    pub device: String,
    /// How far it is.
    pub progress: Progress,
    /// When its lease was last renewed.
    pub renewed: Option<Instant>,
}

impl View {
    /// Before anything has happened to the job `record`.
    pub(super) fn new(record: &JobRecord, secret: [u8; 32], plan_sha256: [u8; 32]) -> Self {
        let mut view = Self {
            job: record.job.clone(),
            model: String::new(),
            models: Vec::new(),
            generation: Generation::default(),
            phase: Phase::Forming,
            peers: Arc::default(),
            secret,
            nccl_unique_id: Vec::new(),
            plan_sha256,
            ranks: Vec::new(),
            last_checkpoint: None,
            checkpoint_root: None,
            is_training: false,
            is_draining: false,
            is_stopping: false,
            committed_step: None,
            save_request: 0,
            save_answered: None,
            base_id: String::new(),
            keeps_base: false,
            is_preempted: false,
            regroups: 0,
            jobs: Vec::new(),
        };
        view.begin(record, plan_sha256);
        view
    }

    /// The ranks' next job.
    pub(super) fn begin(&mut self, record: &JobRecord, plan_sha256: [u8; 32]) {
        self.job = record.job.clone();
        self.model.clone_from(&record.plan.model);
        self.models = ModelView::of(&record.plan);
        self.plan_sha256 = plan_sha256;
        self.checkpoint_root.clone_from(&record.checkpoint_root);
        self.base_id.clone_from(&record.base_id);
    }
}

impl ModelView {
    /// The models of `plan`.
    pub(super) fn of(plan: &LoadPlan) -> Vec<Self> {
        let view = |name: &str, plan: &LoadPlan| Self {
            name: name.to_owned(),
            source: plan.model.clone(),
            kept_bytes: plan.world.ranks().map(|rank| plan.kept_bytes(rank)).sum(),
            unloaded: false,
        };
        let others = plan.others.iter().map(|other| view(&other.name, &other.plan));
        std::iter::once(view(OWN_MODEL, plan)).chain(others).collect()
    }
}

impl View {
    /// Why the job was cancelled, if it was.
    #[must_use]
    pub const fn cause(&self) -> Option<&Cause> {
        match &self.phase {
            Phase::Aborted(cause) => Some(cause),
            _ => None,
        }
    }

    /// Whether the job has ended, well or not.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Finished | Phase::Aborted(_))
    }

    pub(super) fn update(&mut self, membership: &Membership, changed: Changed) {
        if self.generation != membership.generation() || changed == Changed::All {
            let all = membership.members().iter().all(Option::is_some);
            let addresses = membership.members().iter().flatten().map(|member| member.info.data_address.as_str());
            self.peers = if all { pack_addresses(addresses).into() } else { Arc::default() };
            self.nccl_unique_id = nccl_unique_id(membership.members());
        }
        self.generation = membership.generation();
        self.phase = phase(membership);
        self.last_checkpoint = membership.last_checkpoint().map(str::to_owned);
        self.is_training = membership.is_training();
        self.is_draining = membership.is_draining();
        self.is_preempted = membership.is_preempted();
        self.keeps_base = membership.keeps_base();
        self.regroups = membership.regroups();
        self.is_stopping = membership.is_stopping();
        self.committed_step = membership.committed_step();
        self.save_request = membership.save_request();
        self.save_answered = membership.save_answered();
        for model in &mut self.models {
            model.unloaded = membership.unloaded().contains(&model.name);
        }
        let view = |(member, rank): (&Option<Member>, u32)| RankView::of(Rank(rank), member.as_ref());
        match changed {
            Changed::None => {}
            Changed::All => self.ranks = membership.members().iter().zip(0_u32..).map(view).collect(),
            Changed::Rank(rank) => {
                let member = membership.members().get(rank.index()).and_then(Option::as_ref);
                if let Some(place) = self.ranks.get_mut(rank.index()) {
                    *place = RankView::of(rank, member);
                }
            }
        }
    }

    /// What of it ranks act on.
    #[must_use]
    pub fn orders(&self) -> Orders {
        Orders {
            job: self.job.clone(),
            generation: self.generation,
            phase: self.phase.clone(),
            peers: if self.phase == Phase::Loading { self.peers.clone() } else { Arc::default() },
            secret: self.secret,
            nccl_unique_id: self.nccl_unique_id.clone(),
            plan_sha256: self.plan_sha256,
            checkpoint_root: self.checkpoint_root.clone(),
            is_training: self.is_training,
            is_stopping: self.is_stopping,
            committed_step: self.committed_step,
            save_request: self.save_request,
            unloaded: self.models.iter().filter(|model| model.unloaded).map(|model| model.name.clone()).collect(),
            base_id: self.base_id.clone(),
            keeps_base: self.keeps_base,
            is_preempted: self.is_preempted,
            regroups: self.regroups,
        }
    }
}

impl Orders {
    /// What ranks are to write, while they write.
    #[must_use]
    pub const fn save(&self) -> Option<&Save> {
        match &self.phase {
            Phase::Saving { save, .. } => Some(save),
            _ => None,
        }
    }

    /// Why the job was cancelled, if it was.
    #[must_use]
    pub const fn cause(&self) -> Option<&Cause> {
        match &self.phase {
            Phase::Aborted(cause) => Some(cause),
            _ => None,
        }
    }
}

impl RankView {
    fn of(rank: Rank, member: Option<&Member>) -> Self {
        match member {
            Some(member) => Self {
                rank,
                member: Some(member.id.clone()),
                request_id: member.info.request_id.clone(),
                host: member.info.host.clone(),
                process_id: member.info.process_id,
                device: member.info.device.clone(),
                progress: member.progress.clone(),
                renewed: Some(member.renewed),
            },
            None => Self {
                rank,
                member: None,
                request_id: String::new(),
                host: String::new(),
                process_id: 0,
                device: String::new(),
                progress: Progress { stage: "absent".to_owned(), ..Progress::default() },
                renewed: None,
            },
        }
    }
}

/// Without the receipts, which are the coordinator's own business, and many.
fn phase(membership: &Membership) -> Phase {
    match membership.phase() {
        Phase::Saving { save, .. } => Phase::Saving { save: save.clone(), receipts: Vec::new() },
        phase => phase.clone(),
    }
}

/// The id that all ranks use, if all can: different releases of NCCL do not promise to understand each other.
fn nccl_unique_id(members: &[Option<Member>]) -> Vec<u8> {
    let Some(Some(first)) = members.first() else { return Vec::new() };
    let same = |member: &Option<Member>| {
        member.as_ref().is_some_and(|member| member.info.nccl_version == first.info.nccl_version)
    };
    if first.info.nccl_version.is_empty() || !members.iter().all(same) {
        return Vec::new();
    }
    first.info.nccl_unique_id.clone()
}
