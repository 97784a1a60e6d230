//! What became of a launch, for people and for programs.
//!
//! Owns: [`Report`], its text (root cause first) and its JSON, also cut to a size.
//! Refuses to know: how anything was found out.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::attempt::Verdict;
use crate::end::End;
use crate::rendezvous::Cause;

/// The size that Kubernetes keeps of a container's last words, in bytes.
pub const TERMINATION_LOG_LIMIT: usize = 4096;

/// What became of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RankReport {
    /// Its rank in the world.
    pub rank: u32,
    /// Its index on its node.
    pub local_rank: u32,
    /// The name of its host.
    pub host: String,
    /// Its process id, when it was started.
    pub pid: Option<i32>,
    /// What its end means.
    pub verdict: Verdict,
    /// How it ended.
    pub end: End,
    /// The same, in words.
    pub words: String,
    /// When it was started, in nanoseconds since 1970.
    pub started_ns: Option<u64>,
    /// When it ended, in nanoseconds since 1970.
    pub ended_ns: u64,
    /// The same by the monotonic clock of its host, which means nothing elsewhere.
    #[serde(skip)]
    pub(crate) ended: Duration,
    /// The last lines of its standard error, oldest first.
    pub stderr_tail: Vec<String>,
    /// What it wrote to `TORCHELASTIC_ERROR_FILE`.
    pub error_file: Option<String>,
    /// The file of its standard output.
    pub stdout_log: Option<PathBuf>,
    /// The file of its standard error.
    pub stderr_log: Option<PathBuf>,
}

/// What became of a launch, seen from one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// The exit code that the launcher should end with.
    pub exit_code: u8,
    /// The job.
    pub run_id: String,
    /// This node.
    pub host: String,
    /// Which node of the job it is.
    pub node_rank: u32,
    /// How often the ranks had been started before the last time.
    pub restart_count: u32,
    /// One line: what happened.
    pub summary: String,
    /// Why ranks were ended, when it was not a rank that failed: a node that was lost, or a request.
    pub cause: Option<String>,
    /// The rank that failed first; also when it is one of another node.
    pub root_cause: Option<RankReport>,
    /// The other ranks of this node, in the order of their ends.
    pub other_ranks: Vec<RankReport>,
}

impl Report {
    /// Takes over what the job as a whole ended with.
    pub(crate) fn settle(&mut self, exit_code: u8, cause: Option<Cause>) {
        self.exit_code = exit_code;
        let Some(cause) = cause else { return };
        let is_own = self.root_cause.as_ref().zip(cause.rank.as_ref()).is_some_and(|(own, job)| own.rank == job.rank);
        if is_own {
            return;
        }
        // What failed here came later than what failed elsewhere.
        self.other_ranks.extend(self.root_cause.take());
        self.other_ranks.sort_by_key(|rank| rank.ended_ns);
        if cause.rank.is_none() {
            self.cause = Some(cause.words);
        }
        self.root_cause = cause.rank.map(|rank| *rank);
    }

    /// JSON of at most `limit` bytes: what matters least is left out first (the other ranks, then the oldest lines).
    #[must_use]
    pub fn to_json_within(&self, limit: usize) -> String {
        let mut cut = self.clone();
        loop {
            let json = serde_json::to_string(&cut).unwrap_or_default();
            if json.len() <= limit {
                return json;
            }
            if cut.other_ranks.pop().is_some() {
                continue;
            }
            match &mut cut.root_cause {
                Some(cause) if cause.error_file.is_some() => cause.error_file = None,
                Some(cause) if !cause.stderr_tail.is_empty() => drop(cause.stderr_tail.remove(0)),
                Some(_) => cut.root_cause = None,
                // Only endless names are left, or a limit below any report.
                None => return String::new(),
            }
        }
    }

    /// The text of [`fmt::Display`], at most `limit` bytes, cut at the end.
    #[must_use]
    pub fn to_text_within(&self, limit: usize) -> String {
        let mut text = self.to_string();
        text.truncate(text.floor_char_boundary(limit));
        text
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "job {}: {}", self.run_id, self.summary)?;
        if let Some(cause) = &self.root_cause {
            writeln!(f, "root cause: {}", cause.words)?;
            if let Some(error) = &cause.error_file {
                writeln!(f, "  it reported: {error}")?;
            }
            if !cause.stderr_tail.is_empty() {
                writeln!(f, "  its last lines on stderr:")?;
                cause.stderr_tail.iter().try_for_each(|line| writeln!(f, "    {line}"))?;
            }
            for path in [&cause.stdout_log, &cause.stderr_log].into_iter().flatten() {
                writeln!(f, "  log: {}", path.display())?;
            }
        }
        for (title, verdict) in [
            ("also failed:", Verdict::Failed),
            ("ended by the launcher:", Verdict::EndedByLauncher),
            ("succeeded:", Verdict::Succeeded),
        ] {
            let mut ranks = self.other_ranks.iter().filter(|rank| rank.verdict == verdict).peekable();
            if ranks.peek().is_some() {
                writeln!(f, "{title}")?;
                ranks.try_for_each(|rank| writeln!(f, "  {}", rank.words))?;
            }
        }
        Ok(())
    }
}

/// The words for a rank's end.
pub(crate) fn words(rank: &RankReport) -> String {
    let pid = rank.pid.map_or_else(String::new, |pid| format!(", pid {pid}"));
    let by = if rank.verdict == Verdict::EndedByLauncher { " when asked to end" } else { "" };
    let ns = rank.started_ns.and_then(|started_ns| rank.ended_ns.checked_sub(started_ns));
    let after =
        ns.map_or_else(String::new, |ns| format!(", after {}.{:03} s", ns / 1_000_000_000, ns / 1_000_000 % 1000));
    format!("rank {} (local rank {} on {}{pid}) {}{by}{after}", rank.rank, rank.local_rank, rank.host, rank.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(rank: u32, verdict: Verdict, end: End) -> RankReport {
        let mut report = RankReport {
            rank,
            local_rank: rank,
            host: "h".to_owned(),
            pid: Some(40),
            verdict,
            end,
            words: String::new(),
            started_ns: Some(1_000_000_000),
            ended_ns: 3_250_000_000,
            ended: Duration::from_millis(3_250),
            stderr_tail: (0..20).map(|n| format!("line {n} {}", "x".repeat(300))).collect(),
            error_file: None,
            stdout_log: None,
            stderr_log: Some(PathBuf::from("/l/stderr.log")),
        };
        report.words = words(&report);
        report
    }

    fn report() -> Report {
        Report {
            exit_code: 137,
            run_id: "j".to_owned(),
            host: "h".to_owned(),
            node_rank: 0,
            restart_count: 0,
            summary: "failed with exit code 137".to_owned(),
            cause: None,
            root_cause: Some(rank(1, Verdict::Failed, End::Signaled(9))),
            other_ranks: vec![rank(0, Verdict::EndedByLauncher, End::Signaled(15))],
        }
    }

    #[test]
    fn the_root_cause_comes_first_and_victims_are_no_failures() {
        let text = report().to_string();
        let cause =
            text.find("root cause: rank 1 (local rank 1 on h, pid 40) was ended by signal 9 (SIGKILL)").expect(&text);
        let line = text.find("    line 19").expect(&text);
        let victim = text.find("ended by the launcher:\n  rank 0").expect(&text);
        assert!(cause < line && line < victim && text.contains("after 2.250 s"), "{text}");
        assert!(!text.contains("also failed"), "{text}");
    }

    #[test]
    fn cut_json_is_valid_and_keeps_the_end_of_the_tail() {
        let json = report().to_json_within(TERMINATION_LOG_LIMIT);
        assert!(json.len() <= TERMINATION_LOG_LIMIT, "{}", json.len());
        let cut: Report = serde_json::from_str(&json).expect("it is whole");
        let tail = cut.root_cause.expect("it is kept").stderr_tail;
        assert!(tail.last().is_some_and(|line| line.starts_with("line 19")) && tail.len() < 20, "{tail:?}");
    }
}
