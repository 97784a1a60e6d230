//! Leases: how a silent rank is noticed, and how a busy coordinator is not mistaken for silent ranks.

use std::time::Duration;

use super::{Cause, Member, Membership};
use crate::clock::Instant;
use crate::error::Kind;

/// A rank that has not renewed for this long is lost. With a tick of 100 ms the loss is seen within 3.2 s.
pub const LEASE: Duration = Duration::from_millis(3000);

/// How often a rank renews: five chances before its lease ends.
pub const RENEW_INTERVAL: Duration = Duration::from_millis(500);

/// How often leases are looked at.
pub const TICK: Duration = Duration::from_millis(100);

/// A tick that comes this late says that the coordinator itself was held up; renewals may be waiting unread, so all leases
/// are extended by the delay.
const LATE_TICK: Duration = Duration::from_millis(300);

impl Membership {
    /// Extends leases after a late tick.
    pub(super) fn forgive_late_tick(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.last_tick);
        self.last_tick = now;
        if since > LATE_TICK {
            for member in self.members.iter_mut().flatten() {
                member.renewed = (member.renewed + since).min(now);
            }
        }
    }

    pub(super) fn are_all_silent(&self, now: Instant) -> bool {
        self.members.iter().flatten().all(|member| is_silent(member, now))
    }

    /// The rank whose lease has ended, if one has. Where ranks may come back, one is lost only if another is heard: when nobody is,
    /// it is this process that is cut off, and the ranks go on without it; but not for ever.
    pub(super) fn expired(&self, now: Instant) -> Option<Cause> {
        let silent = self.members.iter().flatten().find(|member| is_silent(member, now))?;
        if let Some(rejoin) = self.settings.rejoin
            && self.are_all_silent(now)
            && now.saturating_duration_since(silent.renewed) < rejoin
        {
            return None;
        }
        let seconds = now.saturating_duration_since(silent.renewed).as_secs_f64();
        Some(Cause {
            rank: Some(silent.info.rank),
            message: format!(
                "rank {} (process {} on {}) has been silent for {seconds:.1} s, its lease is {:.1} s",
                silent.info.rank,
                silent.info.process_id,
                silent.info.host,
                LEASE.as_secs_f64()
            ),
            exit_code: Kind::Deadline.exit_code(),
        })
    }

    /// The ranks that have not joined in time, if the time is over.
    pub(super) fn never_joined(&self, now: Instant) -> Option<Cause> {
        let waited = now.saturating_duration_since(self.started);
        if waited <= self.settings.join_deadline {
            return None;
        }
        let absent: Vec<String> = self
            .settings
            .world
            .ranks()
            .filter(|rank| self.member(*rank).is_none())
            .map(|rank| rank.to_string())
            .collect();
        let mut message = format!("ranks {} have not joined within {:.0} s", absent.join(", "), waited.as_secs_f64());
        if let Some(cause) = self.regroups_because() {
            message = format!("{message} after the ranks were lost: {}", cause.message);
        }
        Some(Cause { rank: None, message, exit_code: Kind::Deadline.exit_code() })
    }
}

pub(super) fn is_silent(member: &Member, now: Instant) -> bool {
    now.saturating_duration_since(member.renewed) > LEASE
}
