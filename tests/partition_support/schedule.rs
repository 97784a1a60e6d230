//! A schedule: when a network breaks, what of it, and for how long. A function of its seed. Refuses to know: processes.

use weightcast_test_net::Random;

/// Steps that a job trains.
pub(crate) const STEPS: u64 = 12;
/// Steps between two checkpoints.
pub(crate) const EVERY: u64 = 2;

/// What the job is doing when its network breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Moment {
    /// All ranks but the last have joined.
    Forming,
    /// The last rank has not taken its first piece.
    Loading,
    /// Rank 0 has computed step 5, step 4 is committed.
    Training,
    /// The last rank has not written its part of step 4.
    Saving,
    /// All have written a step; the coordinator is about to commit it.
    Committing,
    /// All is trained; the last rank has not written its part of the last step.
    Finishing,
    /// The last step is committed; the ranks have not heard of it.
    Ending,
}

impl Moment {
    pub(crate) const ALL: [Self; 7] =
        [Self::Forming, Self::Loading, Self::Training, Self::Saving, Self::Committing, Self::Finishing, Self::Ending];

    /// Who stands still there, and at which visit of which point (`faults`).
    const fn hold(self) -> (Holder, &'static str, u64) {
        match self {
            Self::Forming => (Holder::LastRank, "worker.join", 1),
            Self::Loading => (Holder::LastRank, "load.receive", 1),
            Self::Training => (Holder::FirstRank, "train.stepped", 5),
            Self::Saving => (Holder::LastRank, "train.write", 2),
            // Whichever step it is by then: the coordinator publishes records of its own too.
            Self::Committing => (Holder::Coordinator, "store.publish", 4),
            Self::Finishing => (Holder::LastRank, "train.write", STEPS / EVERY),
            Self::Ending => (Holder::Coordinator, "coordinator.committed", STEPS / EVERY),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Holder {
    FirstRank,
    LastRank,
    Coordinator,
}

/// What breaks. Node 0 has rank 0, the last node the last rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Break {
    /// The first node is cut off from all.
    FirstNode,
    /// The last node is.
    LastNode,
    /// The coordinator's host is.
    Coordinator,
    /// The link between the first and the last node.
    Link,
    /// What the last node sends to the coordinator does not arrive.
    ToCoordinator,
    /// What the coordinator sends to the last node does not arrive.
    FromCoordinator,
    /// What the first node sends to the last one does not arrive.
    LinkOneWay,
    /// Packets are 50 to 250 ms late, and 5 % are lost.
    Weather,
}

impl Break {
    const ALL: [Self; 8] = [
        Self::FirstNode,
        Self::LastNode,
        Self::Coordinator,
        Self::Link,
        Self::ToCoordinator,
        Self::FromCoordinator,
        Self::LinkOneWay,
        Self::Weather,
    ];

    /// Whether the reports of some rank cannot reach the coordinator, so that nothing can be committed.
    pub(crate) const fn silences_a_rank(self) -> bool {
        matches!(self, Self::FirstNode | Self::LastNode | Self::Coordinator | Self::ToCoordinator)
    }
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) seed: u64,
    pub(crate) world: u32,
    pub(crate) moment: Moment,
    pub(crate) broken: Break,
    pub(crate) seconds: u64,
}

impl Schedule {
    /// The schedule of a seed, with a partition of one of these durations in seconds, of which those that stand there more than
    /// once are likelier.
    pub(crate) fn of(seed: u64, durations: &[u64]) -> Self {
        let mut random = Random::new(seed);
        let below = |random: &mut Random, limit: usize| {
            usize::try_from(random.below(u64::try_from(limit).expect("small"))).expect("small")
        };
        // Seeds in a row have each moment equally often.
        let turn = usize::try_from(seed % u64::try_from(Moment::ALL.len()).expect("small")).expect("small");
        Self {
            seed,
            world: if random.below(4) == 0 { 3 } else { 2 },
            moment: Moment::ALL[turn],
            broken: Break::ALL[below(&mut random, Break::ALL.len())],
            seconds: durations[below(&mut random, durations.len())],
        }
    }

    /// The directive that has somebody stand still at the moment for as long as `file` exists.
    pub(crate) fn hold(&self, file: &str) -> String {
        let (holder, point, nth) = self.moment.hold();
        let role = match holder {
            Holder::FirstRank => "rank0".to_owned(),
            Holder::LastRank => format!("rank{}", self.world - 1),
            Holder::Coordinator => "coordinator".to_owned(),
        };
        format!("hold={role}:{point}:{nth}:{file}")
    }

    /// The step that may be committed while the network is broken, `sealed` being one that all ranks had reported before: that
    /// one, or one that only ranks on the coordinator's side had still to report.
    pub(crate) fn may_commit(&self, sealed: Option<u64>) -> Option<u64> {
        match (self.moment, self.broken) {
            (Moment::Saving, Break::FirstNode) => Some(2 * EVERY),
            (Moment::Finishing, Break::FirstNode) => Some(STEPS),
            _ => sealed,
        }
    }
}
