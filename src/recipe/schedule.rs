//! The learning rate as a function of the optimizer step.
//!
//! Owns: [`LearningRate`] and its three schedules. Refuses to know: optimizers, epochs, data.
//!
//! `SC-1`: the rate of a step depends on its number alone, so a resumed run continues the same curve.

use serde::{Deserialize, Serialize};

/// How the rate goes on after the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// It stays at its peak.
    Constant,
    /// It falls in a straight line.
    Linear,
    /// It falls along half a cosine.
    #[default]
    Cosine,
}

/// A learning rate over the steps of a run. Equal to `get_{constant,linear,cosine}_schedule_with_warmup` and
/// `get_cosine_with_min_lr_schedule_with_warmup` of transformers for the steps of the run.
///
/// ```
/// use weightcast::recipe::schedule::{LearningRate, ScheduleKind};
///
/// let rate = LearningRate {
///     peak: 1e-3,
///     schedule: ScheduleKind::Linear,
///     warmup_steps: 2,
///     total_steps: 4,
///     min_ratio: 0.0,
/// };
/// let rates: Vec<f64> = (0..5).map(|step| rate.at(step)).collect();
/// assert_eq!(rates, [0.0, 0.5e-3, 1e-3, 0.5e-3, 0.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LearningRate {
    /// The highest rate, reached when the warmup ends.
    pub peak: f64,
    /// What follows the warmup.
    pub schedule: ScheduleKind,
    /// Steps in which the rate rises in a straight line from zero.
    pub warmup_steps: u64,
    /// Steps of the run, the warmup included.
    pub total_steps: u64,
    /// The part of the peak at which a falling schedule ends; a constant one ignores it.
    pub min_ratio: f64,
}

impl LearningRate {
    /// The rate of optimizer step number `step`, counted from 0. With a warmup, step 0 has rate 0, as in transformers.
    /// From `total_steps` on it is the last rate (transformers' cosine would rise again there).
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        self.peak * self.factor(step)
    }

    /// The rate relative to the peak.
    fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return ratio(step, self.warmup_steps);
        }
        let falling_steps = self.total_steps.saturating_sub(self.warmup_steps);
        let progress = ratio(step - self.warmup_steps, falling_steps.max(1)).min(1.0);
        let height = match self.schedule {
            ScheduleKind::Constant => return 1.0,
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        (height * (1.0 - self.min_ratio) + self.min_ratio).max(0.0)
    }
}

/// A quotient of step numbers, which are far below 2^53 and so exact in f64.
#[expect(clippy::cast_precision_loss, reason = "step numbers are far below 2^53")]
fn ratio(numerator: u64, denominator: u64) -> f64 {
    numerator as f64 / denominator as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        schedule: ScheduleKind,
        warmup: u64,
        total: u64,
        min_ratio: f64,
        rates: Vec<f64>,
    }

    /// Every rate of 20 runs equals transformers' (tests/data/data/README.md says how they were made).
    #[test]
    fn equals_transformers() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/data/data/schedule.json")).expect("the vectors");
        assert_eq!(cases.len(), 20);
        for case in cases {
            let rate = LearningRate {
                peak: 2e-4,
                schedule: case.schedule,
                warmup_steps: case.warmup,
                total_steps: case.total,
                min_ratio: case.min_ratio,
            };
            assert!(!case.rates.is_empty());
            for (step, expected) in (0..).zip(&case.rates) {
                let found = rate.at(step);
                assert!((found - expected).abs() <= 1e-15, "{rate:?} step {step}: {found}, expected {expected}");
            }
        }
    }

    /// By hand: half way down to a tenth of the peak is 0.55 of it, and the rate stays at the end of the run.
    #[test]
    fn falls_to_the_minimum_and_stays() {
        for schedule in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let rate = LearningRate { peak: 1.0, schedule, warmup_steps: 0, total_steps: 10, min_ratio: 0.1 };
            assert!((rate.at(5) - 0.55).abs() < 1e-15);
            for step in [10, 11, 15, 20, u64::MAX] {
                assert!((rate.at(step) - 0.1).abs() < 1e-15, "{schedule:?} step {step}");
            }
        }
    }

    #[test]
    fn reads_the_names_of_a_job_file() {
        let text = "peak = 1e-4\nschedule = \"cosine\"\nwarmup-steps = 3\ntotal-steps = 9\nmin-ratio = 0.0\n";
        let rate: LearningRate = toml::from_str(text).expect("a learning rate");
        assert_eq!((rate.schedule, rate.warmup_steps, rate.total_steps), (ScheduleKind::Cosine, 3, 9));
        assert!(toml::from_str::<LearningRate>(&text.replace("peak", "peek")).is_err());
    }
}
