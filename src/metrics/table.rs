//! The metrics that a coordinator shows to Prometheus: one table, from which the exposition and docs/METRICS.md are made.
//!
//! `MX-1`: a name is made of the table's base name, its unit and, for a counter, `_total`; nothing else makes names.
//! `MX-2`: the values of a label are bounded: ranks of the job, words of the program, methods of the contract. No names of tensors,
//! files or hosts.

use std::fmt::Write as _;

/// Whether a metric only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows while a process lives.
    Counter,
    /// It goes up and down.
    Gauge,
}

impl MetricKind {
    /// In a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name without unit and `_total`.
    pub base: &'static str,
    /// Its kind.
    pub kind: MetricKind,
    /// The base unit that ends the name; empty for a plain number.
    pub unit: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

impl Metric {
    /// The name of the family: with the unit.
    #[must_use]
    pub fn family(&self) -> String {
        if self.unit.is_empty() { self.base.to_owned() } else { format!("{}_{}", self.base, self.unit) }
    }

    /// The name of its samples.
    #[must_use]
    pub fn name(&self) -> String {
        match self.kind {
            MetricKind::Counter => format!("{}_total", self.family()),
            MetricKind::Gauge => self.family(),
        }
    }
}

macro_rules! metrics {
    ($($id:ident: $kind:ident $base:literal $unit:literal [$($label:literal),*] $help:literal;)*) => {
        /// A metric of the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "the table says what each is")]
        pub enum MetricId {
            $($id,)*
        }

        /// The table, in the order of [`MetricId`].
        pub const METRICS: &[(MetricId, Metric)] = &[$((
            MetricId::$id,
            Metric { base: $base, kind: MetricKind::$kind, unit: $unit, labels: &[$($label),*], help: $help },
        ),)*];
    };
}

metrics! {
    BuildInfo: Gauge "weightcast_build_info" "" ["version"] "Always 1; the label is the version of the program";
    StartTime: Gauge "weightcast_coordinator_start_time" "seconds" [] "When this process of the coordinator started, since 1970; it changes with every restart";
    Viewers: Gauge "weightcast_page_viewers" "" [] "Browsers that follow the status page";
    RpcRequests: Counter "weightcast_rpc_requests" "" ["method", "code"] "Calls answered, by method of the contract and gRPC status code; a stream counts when it opens";
    JobRanks: Gauge "weightcast_job_ranks" "" [] "Ranks of the job";
    JobRanksJoined: Gauge "weightcast_job_ranks_joined" "" [] "Ranks that have joined";
    JobGeneration: Gauge "weightcast_job_generation" "" [] "The current generation; 0 before the first one is formed";
    JobPhase: Gauge "weightcast_job_phase" "" ["phase"] "1 for the phase that the job is in, 0 for the others";
    JobDraining: Gauge "weightcast_job_draining" "" [] "1 when the job was asked to end";
    JobRegroups: Counter "weightcast_job_regroups" "" [] "Times that the job has lost ranks and waited for them";
    RankJoins: Counter "weightcast_rank_joins" "" ["rank"] "Times that the rank has joined this process of the coordinator";
    RankStage: Gauge "weightcast_rank_stage" "" ["rank", "stage"] "1 for the stage that the rank is in, 0 for the others";
    RankLeaseAge: Gauge "weightcast_rank_lease_age" "seconds" ["rank"] "Since the rank was last heard of; its lease is 3 seconds";
    RankWork: Gauge "weightcast_rank_work" "bytes" ["rank"] "Bytes of the load or save at hand";
    RankWorkDone: Gauge "weightcast_rank_work_done" "bytes" ["rank"] "Bytes of it that are done";
    RankPeakResident: Gauge "weightcast_rank_peak_resident" "bytes" ["rank"] "The most host memory that the rank's process has used";
    RankPlannedPeak: Gauge "weightcast_rank_planned_peak" "bytes" ["rank"] "The most host memory that the plan says it needs";
    RankWeights: Gauge "weightcast_rank_weights" "bytes" ["rank"] "Weights and statistics that the rank keeps, once it has loaded";
    RankLoadTime: Gauge "weightcast_rank_load" "seconds" ["rank"] "Wall time of the rank's load, once it is done";
    RankStorageRead: Counter "weightcast_rank_storage_read" "bytes" ["rank"] "Bytes that left storage for the rank's loads";
    RankWireSent: Counter "weightcast_rank_wire_sent" "bytes" ["rank"] "Payload bytes that the rank sent to others";
    RankWireReceived: Counter "weightcast_rank_wire_received" "bytes" ["rank"] "Payload bytes that it received";
    RankQuantized: Counter "weightcast_rank_quantized_values" "" ["rank"] "Values that the rank has quantized";
    RankLoadStage: Counter "weightcast_rank_load_stage" "seconds" ["rank", "stage"] "Time in each stage of loads, summed over the threads that work in it";
    RankQueueUsed: Gauge "weightcast_rank_queue_used" "chunks" ["rank"] "Chunks that wait between the reader's threads and the one that sends";
    RankQueueCapacity: Gauge "weightcast_rank_queue_capacity" "chunks" ["rank"] "Room for them; 0 for a rank that does not read";
    RankCheckpointWritten: Counter "weightcast_rank_checkpoint_written" "bytes" ["rank"] "Bytes that the rank wrote to checkpoints";
    RankCheckpointWrite: Counter "weightcast_rank_checkpoint_write" "seconds" ["rank"] "Time that it took to write them, beside training or not";
    RankStall: Counter "weightcast_rank_checkpoint_stall" "seconds" ["rank"] "Time that training stood still on the rank for checkpoints";
    CheckpointCommits: Counter "weightcast_checkpoint_commits" "" [] "Checkpoints that this process of the coordinator has committed";
    CheckpointTime: Counter "weightcast_checkpoint_commit" "seconds" [] "Time from the beginning of a checkpoint to its commit, summed";
    CheckpointStep: Gauge "weightcast_checkpoint_committed_step" "" [] "The newest step that the job has committed";
    TrainingStep: Gauge "weightcast_training_step" "" [] "Optimizer steps done";
    TrainingSteps: Gauge "weightcast_training_planned_steps" "" [] "Optimizer steps in all";
    TrainingLoss: Gauge "weightcast_training_loss" "" [] "Mean loss per token of the last step, in nats";
    TrainingEvaluationLoss: Gauge "weightcast_training_evaluation_loss" "" [] "Mean loss per token of the last evaluation, in nats";
    TrainingLearningRate: Gauge "weightcast_training_learning_rate" "" [] "The learning rate of the last step";
    TrainingGradientNorm: Gauge "weightcast_training_gradient_norm" "" [] "Norm of all gradients of the last step, before clipping";
    TrainingStepTime: Gauge "weightcast_training_step_duration" "seconds" [] "Duration of the last step";
    TrainingTokens: Counter "weightcast_training_tokens" "" [] "Tokens that went through the model since the processes started";
    TrainingTokenRate: Gauge "weightcast_training_tokens_per_second" "" [] "Tokens a second of the last step, over all ranks";
    TrainingRemaining: Gauge "weightcast_training_remaining" "seconds" [] "Time that the remaining steps will take";
}

impl MetricId {
    /// Its row.
    #[must_use]
    pub fn metric(self) -> Metric {
        let row = METRICS.iter().find(|(id, _)| *id == self);
        row.expect("the table has a row for every id, because one macro makes both").1
    }
}

/// What a row's labels may say, for the reference.
const LABELS: &[(&str, &str)] = &[
    ("version", "the version of the program"),
    ("rank", "`0` to the number of ranks less one"),
    ("phase", "`forming`, `loading`, `training`, `holding`, `saving`, `finished`, `aborted`"),
    (
        "stage",
        "of a rank `absent`, `joining`, `loading`, `holding`, `training`, `saving`; of a load `allocate`, `read`, `encode`, \
         `exchange`, `place`",
    ),
    ("method", "as `WorkerService/Join`; `other` for what the contract does not have"),
    ("code", "as `OK`, `UNAVAILABLE`"),
];

/// docs/METRICS.md.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "# Metrics\n\n\
         `--http-listen ADDRESS` of `weightcast launch` and `weightcast coordinator` (or `WEIGHTCAST_HTTP_LISTEN`) serves\n\
         `/metrics` in the OpenMetrics text format, which Prometheus scrapes, to everybody who reaches the port. Ranks tell the\n\
         coordinator their figures twice a second; nobody else need be scraped. `k8s/monitoring/dashboard.json` is a Grafana\n\
         dashboard of them.\n\n\
         This page is made from the table in `src/metrics/table.rs`; a test holds the two together. Counters of a rank start at 0\n\
         with its process, as Prometheus expects.\n\n\
         | name | kind | labels | what it says |\n|---|---|---|---|\n",
    );
    for (_, metric) in METRICS {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, kind) = (metric.name(), metric.kind.name());
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| `{name}` | {kind} | {} | {} |", labels.join(", "), metric.help);
    }
    text.push_str("\n## Labels\n\n");
    for (label, values) in LABELS {
        let _ = writeln!(text, "- `{label}`: {values}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The rules of `promtool check metrics` and of Prometheus' page on naming, for the table.
    #[test]
    fn mx_1_names_follow_prometheus() {
        let mut names = BTreeSet::new();
        for (_, metric) in METRICS {
            let name = metric.name();
            assert!(names.insert(name.clone()), "{name} stands twice");
            assert!(name.starts_with("weightcast_"), "{name}: one prefix for the program");
            let words_are_good =
                name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
            assert!(words_are_good && !name.contains("__"), "{name}: lower case, words apart by one _");
            assert!(["", "bytes", "seconds", "chunks"].contains(&metric.unit), "{name}: not a base unit");
            for word in metric.base.split('_') {
                let bad = [
                    "total", "count", "sum", "bucket", "gauge", "counter", "bytes", "seconds", "ms", "millis", "mb",
                    "kb",
                ];
                let fine = metric.base == "weightcast_training_tokens_per_second" && word == "seconds";
                assert!(fine || !bad.contains(&word), "{name}: {word} says a unit, a kind or a suffix");
            }
            assert_eq!(name.ends_with("_total"), metric.kind == MetricKind::Counter, "{name}: counters end in _total");
            assert!(
                metric.help.len() > 10 && !metric.help.ends_with('.') && !metric.help.contains('\n'),
                "{name}: help"
            );
            assert!(
                metric.help.starts_with(|first: char| first.is_uppercase() || first.is_ascii_digit()),
                "{name}: help"
            );
            for label in metric.labels {
                assert!(
                    LABELS.iter().any(|(known, _)| known == label),
                    "MX-2: {name}: the values of {label} have no bound"
                );
                assert!(!["le", "quantile", "job", "instance"].contains(label), "{name}: {label} is Prometheus' own");
            }
        }
        assert!(LABELS.iter().all(|(label, _)| METRICS.iter().any(|(_, metric)| metric.labels.contains(label))));
    }
}
