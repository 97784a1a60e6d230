//! Records as text for people.
//!
//! Owns: the line of a step, of an evaluation, the sparkline. Refuses to know: where they are written.

use super::{EvaluationRecord, StepRecord};

/// The eight block characters, low to high.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A step as one line, aligned with the lines of the other steps:
/// `step   12/1000  epoch  0.04  loss  2.3456  lr 1.00e-4   grad   0.873   12.3k tokens/s    1.9 GiB  left 1:02:03`.
#[must_use]
pub fn line(record: &StepRecord, total_steps: u64) -> String {
    let width = total_steps.to_string().len();
    format!(
        "step {:>width$}/{total_steps}  epoch {:>5.2}  loss {:>7.4}  lr {:<8}  grad {:>7.3}  {:>6} tokens/s  {:>9}  left {}",
        record.step,
        record.epoch,
        record.loss,
        format!("{:.2e}", record.learning_rate),
        record.gradient_norm,
        short(record.tokens_per_second),
        bytes(record.peak_resident_bytes),
        duration(record.remaining_seconds),
    )
}

/// An evaluation as one line.
#[must_use]
pub fn evaluation_line(record: &EvaluationRecord, total_steps: u64) -> String {
    let width = total_steps.to_string().len();
    let best = if record.best { "  best" } else { "" };
    let EvaluationRecord { step, loss, perplexity, tokens, .. } = record;
    format!(
        "step {step:>width$}/{total_steps}  evaluation  loss {loss:>7.4}  perplexity {perplexity:.3}  {tokens} tokens{best}"
    )
}

/// The values as at most `width` block characters, the lowest of them low and the highest high; more values than that
/// are averaged in groups. A value that is not finite does not count; a group without any other is a space.
///
/// ```
/// assert_eq!(weightcast::metrics::sparkline(&[3.0, 2.0, f32::NAN, 1.0], 10), "█▅ ▁");
/// ```
#[must_use]
pub fn sparkline(values: &[f32], width: usize) -> String {
    let groups = width.min(values.len());
    let means: Vec<Option<f64>> = (0..groups)
        .map(|group| {
            let (start, end) = (group * values.len() / groups, (group + 1) * values.len() / groups);
            mean(values.get(start..end).unwrap_or_default())
        })
        .collect();
    let finite = || means.iter().copied().flatten();
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    means.iter().map(|mean| mean.map_or(' ', |mean| block(mean, low, high))).collect()
}

/// The mean of the finite values, if there is one.
fn mean(values: &[f32]) -> Option<f64> {
    let finite = || values.iter().filter(|value| value.is_finite());
    let count = u32::try_from(finite().count()).ok().filter(|&count| count > 0)?;
    Some(finite().copied().map(f64::from).sum::<f64>() / f64::from(count))
}

fn block(value: f64, low: f64, high: f64) -> char {
    // Equal values have no span: they are all the lowest.
    let height = if high > low { (value - low) / (high - low) } else { 0.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number from 0 to 7, rounded")]
    let index = (height * 7.0).round() as usize;
    BLOCKS.get(index).copied().unwrap_or(' ')
}

/// A number in at most six characters: `875`, `12.3k`, `4.56M`.
fn short(value: f64) -> String {
    match value {
        value if value < 1e3 => format!("{value:.0}"),
        value if value < 1e6 => format!("{:.1}k", value / 1e3),
        value => format!("{:.2}M", value / 1e6),
    }
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn bytes(value: u64) -> String {
    let mib = value as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// Hours, minutes and seconds.
fn duration(seconds: f64) -> String {
    if !(0.0..1e9).contains(&seconds) {
        return "?".to_owned();
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    let seconds = seconds.round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            epoch: 0.036,
            loss: 2.345_64,
            learning_rate: 1e-4,
            gradient_norm: 0.873,
            tokens: 4096,
            tokens_per_second: 12_345.0,
            seconds: 0.33,
            peak_resident_bytes: 2_040_109_466,
            remaining_seconds: 3723.4,
        }
    }

    #[test]
    fn a_line_a_step() {
        let expected = "step   12/1000  epoch  0.04  loss  2.3456  lr 1.00e-4   grad   0.873   12.3k tokens/s    1.9 GiB  left 1:02:03";
        assert_eq!(line(&record(12), 1000), expected);
        let other = StepRecord {
            loss: f64::NAN,
            tokens_per_second: 7.0,
            peak_resident_bytes: 90 << 20,
            remaining_seconds: f64::INFINITY,
            ..record(1000)
        };
        let expected =
            "step 1000/1000  epoch  0.04  loss     NaN  lr 1.00e-4   grad   0.873       7 tokens/s     90 MiB  left ?";
        assert_eq!(line(&other, 1000), expected);
    }

    #[test]
    fn a_line_an_evaluation() {
        let record = EvaluationRecord { step: 5, loss: 1.5, perplexity: 4.4817, tokens: 640, best: true };
        let expected = "step  5/20  evaluation  loss  1.5000  perplexity 4.482  640 tokens  best";
        assert_eq!(evaluation_line(&record, 20), expected);
    }

    #[test]
    fn sparklines() {
        let all: Vec<f32> = (0..8_u8).map(f32::from).collect();
        assert_eq!(sparkline(&all, 80), "▁▂▃▄▅▆▇█");
        assert_eq!(sparkline(&all, 4), "▁▃▆█", "means 0.5, 2.5, 4.5, 6.5: 0, 2.33, 4.67, 7 of 7");
        assert_eq!(sparkline(&[2.0, 2.0], 5), "▁▁");
        assert_eq!(sparkline(&[f32::NAN, f32::INFINITY, 1.0, f32::MAX, f32::MIN], 5), "  ▅█▁");
        assert_eq!(sparkline(&[f32::NAN], 5), " ");
        assert_eq!(sparkline(&[], 5), "");
        assert_eq!(sparkline(&[1.0], 0), "");
    }

    proptest::proptest! {
        /// Any values, any width: never a panic, and as many characters as there is room for.
        #[test]
        fn sparkline_takes_anything(values in proptest::collection::vec(proptest::num::f32::ANY, 0..40), width in 0_usize..50) {
            proptest::prop_assert_eq!(sparkline(&values, width).chars().count(), values.len().min(width));
        }
    }
}
