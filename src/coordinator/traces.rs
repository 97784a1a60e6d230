//! The first spans of the job's traces: one for each load and each checkpoint, over all ranks.

use crate::membership::{Membership, Phase, Save};
use crate::telemetry::{self, TraceIds, TraceSpan};
use crate::types::{Generation, JobId};

/// The ids of a generation's load.
pub(crate) fn of_load(job: &JobId, generation: Generation) -> TraceIds {
    TraceIds::of(&["load", job.as_str(), &generation.0.to_string()])
}

/// The ids of a try at a checkpoint.
pub(crate) fn of_save(job: &JobId, generation: Generation, save: &Save) -> TraceIds {
    let (step, attempt) = (save.step.0.to_string(), save.attempt.0.to_string());
    TraceIds::of(&["checkpoint", job.as_str(), &generation.0.to_string(), &step, &attempt])
}

/// Spans that are open. The owner shows it every state that it publishes.
#[derive(Debug, Default)]
pub(super) struct Traces {
    load: Option<TraceSpan>,
    save: Option<TraceSpan>,
}

impl Traces {
    pub(super) fn look(&mut self, job: &JobId, membership: &Membership) {
        if !telemetry::is_on() {
            return;
        }
        let (phase, generation) = (membership.phase(), membership.generation());
        if let Phase::Aborted(cause) = phase {
            for span in [&mut self.load, &mut self.save].into_iter().flatten() {
                span.fail(&cause.message);
            }
        }
        match phase {
            Phase::Loading if self.load.is_none() => {
                let mut span = TraceSpan::root(of_load(job, generation), "load model");
                describe(&mut span, job, generation);
                span.count("weightcast.ranks", crate::types::as_u64(membership.members().len()));
                self.load = Some(span);
            }
            Phase::Loading => {}
            _ => self.load = None,
        }
        match phase {
            Phase::Saving { save, .. } if self.save.is_none() => {
                let mut span = TraceSpan::root(of_save(job, generation, save), "save checkpoint");
                describe(&mut span, job, generation);
                span.count("weightcast.step", save.step.0);
                span.count("weightcast.attempt", save.attempt.0);
                self.save = Some(span);
            }
            Phase::Saving { .. } | Phase::Committing { .. } => {}
            _ => self.save = None,
        }
    }
}

fn describe(span: &mut TraceSpan, job: &JobId, generation: Generation) {
    span.set("weightcast.job", job.as_str().to_owned());
    span.count("weightcast.generation", generation.0);
}
