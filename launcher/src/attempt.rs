//! One run of all ranks of this launcher, as a state machine.
//!
//! Owns: who is signalled when, and whose fault the end was. `apply(now, input)` is synchronous, reads no clock and returns
//! what to do; `run` performs it.
//! Refuses to know: processes, sockets, logs.
//!
//! - AT-1: the root cause is the earliest failure, by the monotonic clock, among ranks that the launcher had not yet signalled.
//! - AT-2: a rank that ends after it was signalled was ended by the launcher, whatever its code.
//! - AT-3: every ending has a deadline, then SIGKILL, then a second deadline, after which the rank is left to its nanny.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Now;
use crate::end::{EXIT_PREEMPTED, End};
use crate::stop::StopRequest;

const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;
/// How long a process may take to vanish after SIGKILL: freeing hundreds of GB takes the kernel seconds.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

/// What happens to the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    Started {
        index: usize,
        pid: i32,
        at: Now,
    },
    Ended {
        index: usize,
        end: End,
        at: Now,
    },
    /// The nanny is gone, and with it all that descended from the rank.
    Gone {
        index: usize,
    },
    Stop(StopRequest),
    /// A rank of another node failed with this exit code, or the node is lost.
    PeerFailed {
        code: u8,
    },
    /// Time passed.
    Tick,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Send this signal to the rank.
    Signal { index: usize, number: u8 },
}

/// How long ranks may take to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace {
    /// After a signal to the launcher, or when a rank was preempted: they are saving their work.
    pub shutdown: Duration,
    /// After a failure: nothing can be saved by all of them.
    pub failure: Duration,
}

/// What the end of a rank means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verdict {
    /// It exited with code 0.
    Succeeded,
    /// It failed by itself.
    Failed,
    /// The launcher ended it.
    EndedByLauncher,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct RankState {
    pub(crate) pid: Option<i32>,
    pub(crate) started: Option<Now>,
    pub(crate) end: Option<(End, Now)>,
    is_gone: bool,
    signalled: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Ending {
    deadline: Duration,
    is_killing: bool,
}

/// The ranks of this launcher in one attempt.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    ranks: Vec<RankState>,
    grace: Grace,
    ending: Option<Ending>,
    stop: StopRequest,
}

impl Attempt {
    pub(crate) fn new(ranks: usize, grace: Grace) -> Self {
        Self { ranks: vec![RankState::default(); ranks], grace, ending: None, stop: StopRequest::None }
    }

    pub(crate) fn ranks(&self) -> &[RankState] {
        &self.ranks
    }

    /// The most urgent request so far.
    pub(crate) fn stop(&self) -> StopRequest {
        self.stop
    }

    /// Whether nothing of the ranks is left.
    pub(crate) fn is_over(&self) -> bool {
        self.ranks.iter().all(|rank| rank.is_gone)
    }

    /// When the next [`Input::Tick`] is due, on the monotonic clock.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.ending.map(|ending| ending.deadline)
    }

    /// Takes one input and says what to do.
    pub(crate) fn apply(&mut self, now: Now, input: Input) -> Vec<Effect> {
        match input {
            Input::Started { index, pid, at } => {
                if let Some(rank) = self.ranks.get_mut(index) {
                    (rank.pid, rank.started) = (Some(pid), Some(at));
                }
                Vec::new()
            }
            Input::Ended { index, end, at } => self.on_end(now, index, end, at),
            Input::Gone { index } => {
                let lost = self.ranks.get(index).is_some_and(|rank| rank.end.is_none());
                let effects = if lost { self.on_end(now, index, End::NannyLost, now) } else { Vec::new() };
                if let Some(rank) = self.ranks.get_mut(index) {
                    rank.is_gone = true;
                }
                effects
            }
            Input::Stop(request) => self.on_stop(now, request),
            Input::PeerFailed { code } => self.end_all(now, SIGTERM, self.grace_after(code)),
            Input::Tick => self.on_tick(now),
        }
    }

    fn on_end(&mut self, now: Now, index: usize, end: End, at: Now) -> Vec<Effect> {
        let code = end.exit_code();
        if let Some(rank) = self.ranks.get_mut(index) {
            rank.end = Some((end, at));
        }
        if code == 0 { Vec::new() } else { self.end_all(now, SIGTERM, self.grace_after(code)) }
    }

    fn grace_after(&self, code: u8) -> Duration {
        if code == EXIT_PREEMPTED { self.grace.shutdown } else { self.grace.failure }
    }

    fn on_stop(&mut self, now: Now, request: StopRequest) -> Vec<Effect> {
        self.stop = self.stop.max(request);
        match request {
            StopRequest::None => Vec::new(),
            StopRequest::Signal(number) => {
                self.end_all(now, u8::try_from(number).unwrap_or(SIGTERM), self.grace.shutdown)
            }
            StopRequest::Kill => self.kill_all(now),
        }
    }

    fn on_tick(&mut self, now: Now) -> Vec<Effect> {
        match self.ending {
            Some(ending) if now.monotonic < ending.deadline => Vec::new(),
            Some(Ending { is_killing: false, .. }) => self.kill_all(now),
            Some(Ending { is_killing: true, .. }) => {
                for rank in self.ranks.iter_mut().filter(|rank| !rank.is_gone) {
                    rank.end.get_or_insert((End::Abandoned, now));
                    rank.is_gone = true;
                }
                Vec::new()
            }
            None => Vec::new(),
        }
    }

    /// Asks all ranks to end, once: a second reason changes nothing, so that it cannot cut short a grace that was given.
    fn end_all(&mut self, now: Now, number: u8, grace: Duration) -> Vec<Effect> {
        if self.ending.is_some() {
            return Vec::new();
        }
        self.ending = Some(Ending { deadline: now.monotonic.saturating_add(grace), is_killing: false });
        self.signal_all(now, number)
    }

    fn kill_all(&mut self, now: Now) -> Vec<Effect> {
        self.ending = Some(Ending { deadline: now.monotonic.saturating_add(KILL_DEADLINE), is_killing: true });
        self.signal_all(now, SIGKILL)
    }

    fn signal_all(&mut self, now: Now, number: u8) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (index, rank) in self.ranks.iter_mut().enumerate().filter(|(_, rank)| !rank.is_gone) {
            if rank.end.is_none() {
                rank.signalled.get_or_insert(now.monotonic);
            }
            // A rank that has ended is on its nanny's way out; only a kill may still hurry that on.
            if rank.end.is_none() || number == SIGKILL {
                effects.push(Effect::Signal { index, number });
            }
        }
        effects
    }

    /// What the end of rank `index` means; `None` while it has not ended.
    pub(crate) fn verdict(&self, index: usize) -> Option<Verdict> {
        let rank = self.ranks.get(index)?;
        let (end, at) = rank.end.as_ref()?;
        Some(match rank.signalled {
            _ if end.is_success() => Verdict::Succeeded,
            Some(signalled) if at.monotonic >= signalled => Verdict::EndedByLauncher,
            _ => Verdict::Failed,
        })
    }

    /// The rank that failed first (AT-1).
    pub(crate) fn root_cause(&self) -> Option<usize> {
        self.first_ended(|index, _| self.verdict(index) == Some(Verdict::Failed))
    }

    /// The exit code of the attempt: that of the root cause; without one, of the ranks that were asked to end: a real failure
    /// among them before 75 (preempted), which holds only when all saved their work.
    pub(crate) fn exit_code(&self) -> u8 {
        let worst = || self.first_ended(|_, end| !matches!(end.exit_code(), 0 | EXIT_PREEMPTED));
        let preempted = || self.first_ended(|_, end| end.exit_code() == EXIT_PREEMPTED);
        let decisive = self.root_cause().or_else(worst).or_else(preempted);
        let end = decisive.and_then(|index| self.ranks.get(index)).and_then(|rank| rank.end.as_ref());
        end.map_or(0, |(end, _)| end.exit_code())
    }

    fn first_ended(&self, accept: impl Fn(usize, &End) -> bool) -> Option<usize> {
        let ends = self.ranks.iter().enumerate().filter_map(|(index, rank)| Some((index, rank.end.as_ref()?)));
        let accepted = ends.filter(|(index, (end, _))| accept(*index, end));
        accepted.min_by_key(|(_, (_, at))| at.monotonic).map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Grace = Grace { shutdown: Duration::from_secs(30), failure: Duration::from_millis(500) };

    fn at(ms: u64) -> Now {
        Now { monotonic: Duration::from_millis(ms), wall_ns: ms * 1_000_000 }
    }

    fn ended(index: usize, end: End, ms: u64) -> Input {
        Input::Ended { index, end, at: at(ms) }
    }

    fn signal(index: usize, number: u8) -> Effect {
        Effect::Signal { index, number }
    }

    #[test]
    fn a_failure_ends_the_others_then_kills_them() {
        let mut attempt = Attempt::new(3, GRACE);
        assert_eq!(attempt.apply(at(10), ended(1, End::Signaled(9), 9)), [signal(0, 15), signal(2, 15)]);
        assert_eq!(attempt.deadline(), Some(Duration::from_millis(510)));
        assert_eq!(attempt.apply(at(11), Input::Gone { index: 1 }), []);
        assert_eq!(attempt.apply(at(20), ended(0, End::Signaled(15), 19)), []);
        assert_eq!(attempt.apply(at(21), Input::Gone { index: 0 }), []);
        assert_eq!(attempt.apply(at(509), Input::Tick), []);
        assert_eq!(attempt.apply(at(510), Input::Tick), [signal(2, 9)]);
        attempt.apply(at(512), ended(2, End::Signaled(9), 511));
        attempt.apply(at(513), Input::Gone { index: 2 });
        assert!(attempt.is_over());
        assert_eq!((attempt.root_cause(), attempt.exit_code()), (Some(1), 137));
        assert_eq!(attempt.verdict(2), Some(Verdict::EndedByLauncher));
    }

    #[test]
    fn the_first_by_time_stamp_is_the_root_cause_not_the_first_heard_of() {
        let mut attempt = Attempt::new(2, GRACE);
        attempt.apply(at(10), ended(0, End::Exited(1), 9));
        attempt.apply(at(11), ended(1, End::Signaled(11), 8));
        assert_eq!((attempt.root_cause(), attempt.exit_code()), (Some(1), 139));
    }

    /// Between the signal and the ends the time of day is set back by an hour.
    #[test]
    fn a_wall_clock_that_jumps_accuses_nobody() {
        let mut attempt = Attempt::new(3, GRACE);
        attempt.apply(at(4_000_000), ended(1, End::Signaled(9), 4_000_000));
        let set_back = Now { monotonic: Duration::from_millis(4_000_010), wall_ns: 400_010_000_000 };
        attempt.apply(set_back, Input::Ended { index: 0, end: End::Exited(1), at: set_back });
        assert_eq!(attempt.verdict(0), Some(Verdict::EndedByLauncher));
        assert_eq!((attempt.root_cause(), attempt.exit_code()), (Some(1), 137));
    }

    #[test]
    fn a_preempted_rank_gives_the_others_the_time_to_save() {
        let mut attempt = Attempt::new(2, GRACE);
        attempt.apply(at(10), ended(0, End::Exited(75), 10));
        assert_eq!(attempt.deadline(), Some(Duration::from_millis(30_010)));
    }

    #[test]
    fn a_stop_takes_75_only_when_nobody_was_cut_off() {
        let stopped = |second: End| {
            let mut attempt = Attempt::new(2, GRACE);
            let effects = attempt.apply(at(10), Input::Stop(StopRequest::Signal(15)));
            assert_eq!(effects, [signal(0, 15), signal(1, 15)]);
            attempt.apply(at(20), ended(0, End::Exited(75), 20));
            attempt.apply(at(30), ended(1, second, 30));
            assert_eq!(attempt.root_cause(), None);
            attempt.exit_code()
        };
        assert_eq!(stopped(End::Exited(75)), 75);
        assert_eq!(stopped(End::Exited(0)), 75);
        assert_eq!(stopped(End::Signaled(15)), 143);
        assert_eq!(stopped(End::Exited(3)), 3);
    }

    #[test]
    fn the_second_interrupt_kills_and_what_stays_is_abandoned() {
        let mut attempt = Attempt::new(1, GRACE);
        attempt.apply(at(0), Input::Stop(StopRequest::Signal(2)));
        assert_eq!(attempt.apply(at(5), Input::Stop(StopRequest::Kill)), [signal(0, 9)]);
        assert_eq!(attempt.apply(at(30_005), Input::Tick), []);
        assert!(attempt.is_over());
        assert_eq!(attempt.exit_code(), 137);
    }

    #[test]
    fn a_nanny_that_vanishes_is_a_failure_of_its_rank() {
        let mut attempt = Attempt::new(2, GRACE);
        attempt.apply(at(1), Input::Started { index: 0, pid: 7, at: at(1) });
        assert_eq!(attempt.apply(at(10), Input::Gone { index: 0 }), [signal(1, 15)]);
        assert_eq!((attempt.root_cause(), attempt.exit_code()), (Some(0), 137));
    }
}
