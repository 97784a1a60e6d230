//! What pods ask for: from the plan's numbers, with stated margins.
//!
//! Owns: the formulas. Refuses to know: plans; it is given what each rank needs.
//! - KS-1: a pod asks for no less than its ranks need at their worst moment, so that the kernel never ends one that keeps to
//!   the plan.

/// Above the ranks' numbers, for what the kernel counts to a container beside them (page tables, sockets, dirty pages).
const MARGIN_PERCENT: u64 = 10;
/// The launcher and its nannies.
const LAUNCHER_BYTES: u64 = 64 << 20;
/// A coordinator holds the job's plan and talks; docs/MEASUREMENTS.md has what it takes with many ranks.
const COORDINATOR_BYTES: u64 = 256 << 20;
/// What a coordinator may take.
const COORDINATOR_LIMIT_BYTES: u64 = 1 << 30;
/// Shared memory for each GPU, which NCCL uses between the ranks of a node.
const SHARED_BYTES_PER_GPU: u64 = 1 << 30;
/// Shared memory of a pod without GPUs, in which nothing of ours is.
const SHARED_BYTES: u64 = 64 << 20;
/// Beside the time that a checkpoint takes, until the pod is killed: the step under way, and the words of farewell.
const GRACE_SECONDS: u64 = 30;

/// What one rank needs, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankNeed {
    /// The most host memory at any time.
    pub host_bytes: u64,
    /// The most device memory at any time.
    pub device_bytes: u64,
}

/// What is known of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sizing {
    /// The ranks, in order; as many on each node.
    pub ranks: Vec<RankNeed>,
    /// Ranks on each node.
    pub ranks_per_node: u32,
    /// GPUs of each node.
    pub gpus_per_node: u32,
    /// Threads of a reader.
    pub reader_threads: u32,
    /// A checkpoint of all ranks.
    pub checkpoint_bytes: u64,
    /// What all ranks together write in a second.
    pub checkpoint_bytes_per_second: u64,
    /// How long a checkpoint takes, where it was measured.
    pub checkpoint_seconds: Option<u64>,
    /// What the coordinator writes when the run is done.
    pub output_bytes: u64,
    /// The largest tensor of it, in f32.
    pub output_tensor_bytes: u64,
}

/// What the pods ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Memory of a worker pod: request and limit.
    pub worker_memory_bytes: u64,
    /// Of it, what /dev/shm may take.
    pub shared_memory_bytes: u64,
    /// The most device memory of a rank.
    pub device_bytes: u64,
    /// The most host memory of the ranks of one pod, as planned.
    pub planned_bytes: u64,
    /// Processors of a worker pod.
    pub worker_cpus: u32,
    /// Memory that the coordinator asks for.
    pub coordinator_memory_bytes: u64,
    /// Memory that it may take.
    pub coordinator_limit_bytes: u64,
    /// A checkpoint of all ranks.
    pub checkpoint_bytes: u64,
    /// From SIGTERM to SIGKILL, of a worker.
    pub worker_grace_seconds: u64,
    /// The same of the coordinator.
    pub coordinator_grace_seconds: u64,
}

impl Sizing {
    /// What the pods ask for.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        let per_node = crate::types::as_usize(u64::from(self.ranks_per_node.max(1)));
        let nodes = self.ranks.chunks(per_node).map(|node| node.iter().map(|rank| rank.host_bytes).sum());
        let planned_bytes: u64 = nodes.max().unwrap_or(0);
        let shared = match self.gpus_per_node {
            0 => SHARED_BYTES,
            gpus => u64::from(gpus) * SHARED_BYTES_PER_GPU,
        };
        let needed = planned_bytes + LAUNCHER_BYTES;
        let with_margin = needed + (needed * MARGIN_PERCENT).div_ceil(100);
        let rate = self.checkpoint_bytes_per_second.max(1);
        let checkpoint = self.checkpoint_seconds.unwrap_or_else(|| self.checkpoint_bytes.div_ceil(rate));
        Sizes {
            worker_memory_bytes: mebibytes(with_margin + shared),
            shared_memory_bytes: shared,
            device_bytes: self.ranks.iter().map(|rank| rank.device_bytes).max().unwrap_or(0),
            planned_bytes,
            // The rank that reads has a thread that sends beside its readers.
            worker_cpus: self.ranks_per_node.max(1) + self.reader_threads,
            coordinator_memory_bytes: COORDINATOR_BYTES,
            // A tensor of the output is read, made and written.
            coordinator_limit_bytes: mebibytes(COORDINATOR_LIMIT_BYTES + 3 * self.output_tensor_bytes),
            checkpoint_bytes: self.checkpoint_bytes,
            worker_grace_seconds: checkpoint + GRACE_SECONDS,
            coordinator_grace_seconds: checkpoint + self.output_bytes.div_ceil(rate) + GRACE_SECONDS,
        }
    }
}

/// Rounded up to whole MiB.
const fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20) << 20
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: 2 ranks of 1 GiB and 2 of 3 GiB on two nodes. The second takes 6 GiB + 64 MiB = 6208 MiB, and 10 % more are
    /// 6828.8; with 64 MiB of shared memory and rounded up 6893.
    #[test]
    fn the_fullest_node_counts() {
        let need = |gibibytes: u64| RankNeed { host_bytes: gibibytes << 30, device_bytes: 0 };
        let sizing = Sizing {
            ranks: vec![need(1), need(1), need(3), need(3)],
            ranks_per_node: 2,
            reader_threads: 4,
            checkpoint_bytes: 1_000_000_001,
            checkpoint_bytes_per_second: 100_000_000,
            output_bytes: 500_000_000,
            ..Sizing::default()
        };
        let sizes = sizing.sizes();
        assert_eq!((sizes.planned_bytes, sizes.worker_memory_bytes), (6 << 30, 6893 << 20));
        assert_eq!((sizes.worker_cpus, sizes.shared_memory_bytes), (6, 64 << 20));
        // 11 s for the checkpoint, 5 for the output.
        assert_eq!((sizes.worker_grace_seconds, sizes.coordinator_grace_seconds), (41, 46));
        let measured = Sizing { checkpoint_seconds: Some(100), ..sizing.clone() }.sizes();
        assert_eq!((measured.worker_grace_seconds, measured.coordinator_grace_seconds), (130, 135));
        let on_devices = Sizing { gpus_per_node: 2, ..sizing }.sizes();
        assert_eq!(on_devices.worker_memory_bytes, (6829 + 2048) << 20);
    }
}
