//! What a person sees while a job runs: a bar per stage on a terminal, a line per change of stage otherwise.

use std::io::{IsTerminal as _, Write as _};

use super::output::{bytes, say};
use crate::clock::{Instant, now};
use crate::coordinator::View;
use crate::membership::Phase;

/// Characters of the bar.
const WIDTH: usize = 24;

/// Shows the job's snapshots.
#[derive(Debug)]
pub(super) struct ProgressLine {
    stage: &'static str,
    since: Instant,
    terminal: bool,
}

impl ProgressLine {
    pub(super) fn new() -> Self {
        Self { stage: "", since: now(), terminal: std::io::stderr().is_terminal() }
    }

    /// Shows a snapshot.
    pub(super) fn show(&mut self, view: &View) {
        let stage = view.phase.name();
        if stage != self.stage {
            if self.terminal && !self.stage.is_empty() {
                say("");
            }
            (self.stage, self.since) = (stage, now());
            if !self.terminal {
                say(&format!("[{}] {stage}", view.job));
            }
        }
        if self.terminal && matches!(view.phase, Phase::Loading | Phase::Saving { .. }) {
            self.draw(view);
        }
    }

    fn draw(&self, view: &View) {
        let sum = |figure: fn(&crate::membership::Progress) -> u64| {
            view.ranks.iter().map(|rank| figure(&rank.progress)).sum()
        };
        let (done, total): (u64, u64) = (sum(|progress| progress.done_bytes), sum(|progress| progress.total_bytes));
        if total == 0 {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        let (done_f, total_f) = (done as f64, total as f64);
        let rate = done_f / self.since.elapsed().as_secs_f64().max(1e-3);
        let left = if rate > 0.0 { (total_f - done_f) / rate } else { f64::INFINITY };
        let filled = (0..WIDTH)
            .filter(|&cell| crate::types::as_u64(cell + 1) * total <= done * crate::types::as_u64(WIDTH))
            .count();
        let bar = format!("{}{}", "#".repeat(filled), "-".repeat(WIDTH - filled));
        let _ = write!(
            std::io::stderr().lock(),
            "\r\x1b[K{:<8} [{bar}] {} of {}  {:.2} GB/s  {left:.0} s left",
            self.stage,
            bytes(done),
            bytes(total),
            rate / 1e9
        );
    }
}
