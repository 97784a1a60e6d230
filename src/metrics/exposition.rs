//! From values to the text that Prometheus scrapes.
//!
//! Owns: the samples of one scrape, and their encoding by `prometheus-client` in the order of the table. Refuses to know: where
//! values come from.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::table::{METRICS, MetricId, MetricKind};

/// The content type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A count; exact.
    Count(u64),
    /// A measure.
    Measure(f64),
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<f64> for Value {
    fn from(measure: f64) -> Self {
        Self::Measure(measure)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Count(u64::from(flag))
    }
}

/// The samples of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Samples(BTreeMap<MetricId, Vec<(Vec<String>, Value)>>);

impl Samples {
    /// Sets the value for these values of the metric's labels.
    ///
    /// # Panics
    /// When there are more or fewer than the table says.
    pub fn set(&mut self, id: MetricId, labels: &[&str], value: impl Into<Value>) {
        let expected = id.metric().labels.len();
        assert!(labels.len() == expected, "{id:?}: expected {expected} labels, found {labels:?}");
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        self.0.entry(id).or_default().push((labels, value.into()));
    }

    /// The text of all samples, in the order of the table; a metric without samples is left out.
    #[must_use]
    pub fn encode(self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}

impl Collector for Samples {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (id, metric) in METRICS {
            let Some(samples) = self.0.get(id) else { continue };
            let unit = match metric.unit {
                "" => None,
                "bytes" => Some(Unit::Bytes),
                "seconds" => Some(Unit::Seconds),
                other => Some(Unit::Other(other.to_owned())),
            };
            let kind = match metric.kind {
                MetricKind::Counter => MetricType::Counter,
                MetricKind::Gauge => MetricType::Gauge,
            };
            let mut family = encoder.encode_descriptor(metric.base, metric.help, unit.as_ref(), kind)?;
            for (labels, value) in samples {
                if metric.labels.is_empty() {
                    encode_value(&mut family, metric.kind, *value)?;
                    continue;
                }
                let pairs: Vec<(&str, &str)> =
                    metric.labels.iter().zip(labels).map(|(name, value)| (*name, value.as_str())).collect();
                encode_value(&mut family.encode_family(&pairs)?, metric.kind, *value)?;
            }
        }
        Ok(())
    }
}

fn encode_value(encoder: &mut MetricEncoder<'_>, kind: MetricKind, value: Value) -> Result<(), fmt::Error> {
    match (kind, value) {
        (MetricKind::Counter, Value::Count(count)) => encoder.encode_counter::<NoLabelSet, _, u64>(&count, None),
        (MetricKind::Counter, Value::Measure(measure)) => encoder.encode_counter::<NoLabelSet, _, u64>(&measure, None),
        (MetricKind::Gauge, Value::Count(count)) => encoder.encode_gauge(&count),
        (MetricKind::Gauge, Value::Measure(measure)) => encoder.encode_gauge(&measure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The form of the OpenMetrics specification, written by hand.
    #[test]
    fn the_text_is_open_metrics() {
        let mut samples = Samples::default();
        samples.set(MetricId::RankStall, &["1"], 0.5);
        samples.set(MetricId::JobRanks, &[], 4_u64);
        samples.set(MetricId::RankStorageRead, &["0"], 9_007_199_254_740_993_u64);
        let expected = "# HELP weightcast_job_ranks Ranks of the job\n\
                        # TYPE weightcast_job_ranks gauge\n\
                        weightcast_job_ranks 4\n\
                        # HELP weightcast_rank_storage_read_bytes Bytes that left storage for the rank's loads\n\
                        # TYPE weightcast_rank_storage_read_bytes counter\n\
                        # UNIT weightcast_rank_storage_read_bytes bytes\n\
                        weightcast_rank_storage_read_bytes_total{rank=\"0\"} 9007199254740993\n\
                        # HELP weightcast_rank_checkpoint_stall_seconds Time that training stood still on the rank for checkpoints\n\
                        # TYPE weightcast_rank_checkpoint_stall_seconds counter\n\
                        # UNIT weightcast_rank_checkpoint_stall_seconds seconds\n\
                        weightcast_rank_checkpoint_stall_seconds_total{rank=\"1\"} 0.5\n\
                        # EOF\n";
        assert_eq!(samples.encode(), expected);
    }
}
