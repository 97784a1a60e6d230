//! Temporary.
#![expect(missing_docs, reason = "temporary")]
use std::io::Write as _;
#[derive(Clone, Debug, serde::Serialize)]
pub struct StepRecord { pub step: u64, pub epoch: f64, pub loss: f32, pub learning_rate: f64, pub gradient_norm: f64, pub tokens: u64, pub tokens_per_second: f64, pub seconds: f64, pub peak_resident_bytes: u64, pub remaining_seconds: f64 }
#[derive(Clone, Debug, serde::Serialize)]
pub struct EvaluationRecord { pub step: u64, pub loss: f32, pub perplexity: f64, pub tokens: u64, pub best: bool }
#[derive(Debug)]
pub struct MetricsWriter(std::fs::File);
impl MetricsWriter {
    pub fn open(d: &std::path::Path, from: u64) -> Result<Self, std::io::Error> {
        std::fs::create_dir_all(d)?;
        let p = d.join("metrics.jsonl");
        let old = std::fs::read_to_string(&p).unwrap_or_default();
        let keep: String = old.lines().filter(|l| serde_json::from_str::<serde_json::Value>(l).is_ok_and(|v| v["step"].as_u64().is_some_and(|s| s <= from))).map(|l| format!("{l}\n")).collect();
        std::fs::write(&p, keep)?;
        Ok(Self(std::fs::OpenOptions::new().append(true).open(p)?))
    }
    pub fn step(&mut self, r: &StepRecord) -> Result<(), std::io::Error> { let mut v = serde_json::to_value(r).unwrap_or_default(); v["type"] = "step".into(); writeln!(self.0, "{v}") }
    pub fn evaluation(&mut self, r: &EvaluationRecord) -> Result<(), std::io::Error> { let mut v = serde_json::to_value(r).unwrap_or_default(); v["type"] = "evaluation".into(); writeln!(self.0, "{v}") }
}
pub fn line(r: &StepRecord, total: u64) -> String { format!("step {}/{total} loss {:.4} lr {:.2e} norm {:.3} {:.0} tokens/s {:.3} s {} MiB", r.step, r.loss, r.learning_rate, r.gradient_norm, r.tokens_per_second, r.seconds, r.peak_resident_bytes >> 20) }
pub fn sparkline(_: &[f32], _: usize) -> String { String::new() }
