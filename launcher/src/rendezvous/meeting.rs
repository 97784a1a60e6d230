//! How the launchers of a job come together, end together and start again, as a state machine.
//!
//! Owns: who gets which place, what a loss means, when the job is over. `apply(now, event)` is synchronous and reads no
//! clock. Refuses to know: sockets (see `server`).
//!
//! - MT-1: within an attempt the places do not change; the loss of a node ends the attempt on all others.
//! - MT-2: the root cause is what happened first: when it was told, less its age. No two nodes' clocks are compared.
//! - MT-3: a node is silent when nothing was heard of it for `silence` *while this machine listened*: a pause of our own
//!   (a stopped or starved process) is added to everybody's time.
//! - MT-4: a job is over once, and stays over: whoever comes later hears the same.

use std::collections::BTreeMap;
use std::time::Duration;

use super::messages::{Cause, Join, Over, Seat, ToLauncher, ToMeeting};
use crate::clock::Now;
use crate::end::{EXIT_PREEMPTED, EXIT_UNREACHABLE, is_restartable};

/// A pause between two ticks that can only mean that this process did not run.
const OWN_PAUSE: Duration = Duration::from_millis(600);

/// Names a connection; never used twice.
pub(crate) type ConnectionId = u64;

/// The rules of one job.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) run_id: String,
    pub(crate) nnodes_min: u32,
    pub(crate) nnodes: u32,
    pub(crate) max_restarts: u32,
    /// How long all nodes may take to come.
    pub(crate) join_timeout: Duration,
    /// How long to wait for more nodes when enough have come.
    pub(crate) last_call: Duration,
    /// How long a node may be silent.
    pub(crate) silence: Duration,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Message { from: ConnectionId, message: ToMeeting },
    Closed { from: ConnectionId },
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Send {
        to: ConnectionId,
        message: ToLauncher,
    },
    /// Send what is under way, then close.
    Close {
        to: ConnectionId,
    },
    /// Close at once: nobody is there to read.
    Cut {
        to: ConnectionId,
    },
}

#[derive(Debug)]
struct Member {
    join: Join,
    heard: Duration,
    seat: Option<Seat>,
    /// Exit code, and whether it was asked to end.
    finished: Option<(u8, bool)>,
}

#[derive(Debug)]
enum Phase {
    Gathering { since: Duration, last_join: Duration },
    Running { is_ending: bool },
    Over(Over),
}

/// The state of one job.
#[derive(Debug)]
pub(crate) struct Meeting {
    rules: Rules,
    phase: Phase,
    members: BTreeMap<ConnectionId, Member>,
    attempt: u32,
    /// The cause, and when it happened by the clock of this machine.
    cause: Option<(Duration, Cause)>,
    last_tick: Duration,
}

impl Meeting {
    pub(crate) fn new(rules: Rules, now: Now) -> Self {
        let phase = Phase::Gathering { since: now.monotonic, last_join: now.monotonic };
        Self { rules, phase, members: BTreeMap::new(), attempt: 0, cause: None, last_tick: now.monotonic }
    }

    /// Whether the job has ended and everybody has heard of it and left.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over(_)) && self.members.is_empty()
    }

    /// Takes one event and says what to do.
    pub(crate) fn apply(&mut self, now: Now, event: Event) -> Vec<Effect> {
        match event {
            Event::Message { from, message: ToMeeting::Join(join) } => self.on_join(now, from, join),
            Event::Message { from, message } => {
                let attempt = self.attempt;
                let Some(member) = self.members.get_mut(&from) else { return vec![Effect::Close { to: from }] };
                member.heard = now.monotonic;
                match message {
                    ToMeeting::Ending { attempt: of, cause } if of == attempt => self.end_all(now, cause, Some(from)),
                    ToMeeting::Finished { attempt: of, exit_code, cause, is_stopped, port } if of == attempt => {
                        member.finished = Some((exit_code, is_stopped));
                        member.join.port = port;
                        let mut effects = cause.map_or_else(Vec::new, |cause| self.end_all(now, cause, Some(from)));
                        effects.extend(self.conclude(now));
                        effects
                    }
                    // A beat, or a word about an attempt that is over.
                    _ => Vec::new(),
                }
            }
            Event::Closed { from } => self.on_loss(now, from, "closed its connection"),
            Event::Tick => self.on_tick(now),
        }
    }

    fn on_join(&mut self, now: Now, from: ConnectionId, join: Join) -> Vec<Effect> {
        if let Phase::Over(over) = &self.phase {
            let message = ToLauncher::Over(over.clone());
            return vec![Effect::Send { to: from, message }, Effect::Close { to: from }];
        }
        if let Some((reason, may_retry)) = self.objection(&join) {
            let message = ToLauncher::Refused { reason, may_retry };
            return vec![Effect::Send { to: from, message }, Effect::Close { to: from }];
        }
        self.members.insert(from, Member { join, heard: now.monotonic, seat: None, finished: None });
        if let Phase::Gathering { last_join, .. } = &mut self.phase {
            *last_join = now.monotonic;
        }
        self.start_if_complete(now)
    }

    fn objection(&self, join: &Join) -> Option<(String, bool)> {
        if join.run_id != self.rules.run_id {
            return Some((format!("expected job {:?}, found {:?}", self.rules.run_id, join.run_id), false));
        }
        if join.nproc == 0 || join.node_rank.is_some_and(|rank| rank >= self.rules.nnodes) {
            return Some((format!("node {:?} of {} ranks has no place in the job", join.node_rank, join.nproc), false));
        }
        // The one who has the place may be dead and not yet known to be: the newcomer should ask again.
        if join.node_rank.is_some() && self.members.values().any(|member| member.join.node_rank == join.node_rank) {
            return Some((format!("node rank {} is taken", join.node_rank.unwrap_or(0)), true));
        }
        let is_full = self.count() >= self.rules.nnodes;
        is_full.then(|| (format!("all {} nodes are there", self.rules.nnodes), true))
    }

    fn count(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    fn start_if_complete(&mut self, now: Now) -> Vec<Effect> {
        let Phase::Gathering { last_join, .. } = self.phase else { return Vec::new() };
        let is_enough =
            self.count() >= self.rules.nnodes_min && now.monotonic.saturating_sub(last_join) >= self.rules.last_call;
        if self.count() < self.rules.nnodes && !is_enough {
            let message = ToLauncher::Waiting { joined: self.count(), wanted: self.rules.nnodes };
            return self.to_all(&message);
        }
        self.phase = Phase::Running { is_ending: false };
        let (nnodes, attempt) = (self.count(), self.attempt);
        let world_size = self.members.values().fold(0_u32, |sum, member| sum.saturating_add(member.join.nproc));
        let order = self.seating();
        let master = order.first().and_then(|id| self.members.get(id)).map(|member| &member.join);
        let (master_addr, master_port) =
            master.map_or_else(Default::default, |join| (join.address.clone().unwrap_or_default(), join.port));
        let (mut first_rank, mut effects) = (0_u32, Vec::new());
        for (node_rank, id) in (0..).zip(order) {
            let Some(member) = self.members.get_mut(&id) else { continue };
            let master_addr = master_addr.clone();
            let seat = Seat { attempt, node_rank, nnodes, first_rank, world_size, master_addr, master_port };
            first_rank = first_rank.saturating_add(member.join.nproc);
            (member.seat, member.finished) = (Some(seat.clone()), None);
            effects.push(Effect::Send { to: id, message: ToLauncher::Start(seat) });
        }
        effects
    }

    /// The members in the order of their places: a node that knows its rank gets it when all have come; the others fill the
    /// gaps in the order in which they came.
    fn seating(&self) -> Vec<ConnectionId> {
        let mut known: Vec<(u32, ConnectionId)> =
            self.members.iter().filter_map(|(id, member)| Some((member.join.node_rank?, *id))).collect();
        known.sort_unstable();
        let mut known = known.into_iter().peekable();
        let mut unknown = self.members.iter().filter(|(_, member)| member.join.node_rank.is_none()).map(|(id, _)| *id);
        (0..self.count())
            .filter_map(|place| match known.next_if(|(rank, _)| *rank <= place) {
                Some((_, id)) => Some(id),
                None => unknown.next().or_else(|| known.next().map(|(_, id)| id)),
            })
            .collect()
    }

    /// Ends the attempt on all nodes but one, and keeps the earliest cause.
    fn end_all(&mut self, now: Now, cause: Cause, except: Option<ConnectionId>) -> Vec<Effect> {
        let Phase::Running { is_ending } = &mut self.phase else { return Vec::new() };
        let was_ending = std::mem::replace(is_ending, true);
        let happened = now.monotonic.saturating_sub(cause.age);
        let place = |cause: &Cause| cause.rank.as_ref().map(|rank| rank.rank);
        match &mut self.cause {
            // The same failure is told twice, the second time with the last lines of its output.
            Some((_, known)) if (known.at_ns, place(known)) == (cause.at_ns, place(&cause)) => *known = cause.clone(),
            Some((first, _)) if *first <= happened => {}
            other => *other = Some((happened, cause.clone())),
        }
        if was_ending {
            return Vec::new();
        }
        let message = ToLauncher::End { attempt: self.attempt, cause };
        let others = self.members.iter().filter(|(id, member)| Some(**id) != except && member.seat.is_some());
        others.map(|(id, _)| Effect::Send { to: *id, message: message.clone() }).collect()
    }

    fn on_loss(&mut self, now: Now, id: ConnectionId, how: &str) -> Vec<Effect> {
        let Some(member) = self.members.remove(&id) else { return Vec::new() };
        let mut effects = vec![Effect::Cut { to: id }];
        if let (Some(seat), None) = (&member.seat, member.finished) {
            let words = format!("node {} ({}) {how}", seat.node_rank, member.join.host);
            effects.extend(self.end_all(now, Cause::new(EXIT_UNREACHABLE, words, now), None));
        }
        effects.extend(self.conclude(now));
        effects
    }

    fn on_tick(&mut self, now: Now) -> Vec<Effect> {
        let pause = now.monotonic.saturating_sub(std::mem::replace(&mut self.last_tick, now.monotonic));
        if pause > OWN_PAUSE {
            self.members.values_mut().for_each(|member| member.heard += pause);
        }
        let is_silent = |member: &Member| now.monotonic.saturating_sub(member.heard) > self.rules.silence;
        let silent: Vec<ConnectionId> =
            self.members.iter().filter(|(_, member)| is_silent(member)).map(|(id, _)| *id).collect();
        let how = format!("has been silent for {:.1} s", self.rules.silence.as_secs_f64());
        let mut effects: Vec<Effect> = silent.into_iter().flat_map(|id| self.on_loss(now, id, &how)).collect();
        if let Phase::Gathering { since, .. } = self.phase {
            if now.monotonic.saturating_sub(since) > self.rules.join_timeout {
                let words = format!("only {} of {} nodes came in time", self.count(), self.rules.nnodes);
                let cause = Cause::new(EXIT_UNREACHABLE, words, now);
                effects.extend(self.close_job(Over { exit_code: EXIT_UNREACHABLE, cause: Some(cause) }));
            } else if self.count() >= self.rules.nnodes_min && self.count() > 0 {
                effects.extend(self.start_if_complete(now));
            }
        }
        effects
    }

    /// Ends the attempt when nobody has a rank left: again, or over.
    fn conclude(&mut self, now: Now) -> Vec<Effect> {
        let mut seated = self.members.values().filter(|member| member.seat.is_some());
        if !matches!(self.phase, Phase::Running { .. }) || !seated.all(|member| member.finished.is_some()) {
            return Vec::new();
        }
        let finished = || self.members.values().filter_map(|member| member.finished);
        let is_stopped = finished().any(|(_, is_stopped)| is_stopped);
        // When the ranks were asked to end, 75 (preempted) holds only if all of them saved their work.
        let worst = finished().map(|(code, _)| code).max_by_key(|code| (!matches!(*code, 0 | EXIT_PREEMPTED), *code));
        let failure = self.cause.as_ref().map(|(_, cause)| cause).filter(|cause| !cause.is_request);
        let exit_code = failure.map_or_else(|| worst.unwrap_or(0), |cause| cause.code);
        if is_stopped
            || !is_restartable(exit_code)
            || self.attempt >= self.rules.max_restarts
            || self.members.is_empty()
        {
            let over = Over { exit_code, cause: self.cause.take().map(|(_, cause)| cause) };
            return self.close_job(over);
        }
        (self.attempt, self.cause) = (self.attempt + 1, None);
        self.members.values_mut().for_each(|member| (member.seat, member.finished) = (None, None));
        self.phase = Phase::Gathering { since: now.monotonic, last_join: now.monotonic };
        self.start_if_complete(now)
    }

    fn close_job(&mut self, over: Over) -> Vec<Effect> {
        let mut effects = self.to_all(&ToLauncher::Over(over.clone()));
        effects.extend(self.members.keys().map(|id| Effect::Close { to: *id }));
        self.members.clear();
        self.phase = Phase::Over(over);
        effects
    }

    fn to_all(&self, message: &ToLauncher) -> Vec<Effect> {
        self.members.keys().map(|id| Effect::Send { to: *id, message: message.clone() }).collect()
    }
}

#[cfg(test)]
mod tests;
