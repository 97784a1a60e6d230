//! Whether traces are collected, by the standard variables of OpenTelemetry.

use super::output::say;
use crate::config::variable;
use crate::error::chain;
use crate::telemetry::Exporter;

/// Starts the exporter when somebody collects; to be held until the process ends. A job goes on without its traces.
pub(super) fn start() -> Option<Exporter> {
    let asked = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"].into_iter().any(is_set);
    let is = |name: &str, word: &str| variable(name).is_some_and(|value| value.eq_ignore_ascii_case(word));
    if !asked || is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    let service = variable("OTEL_SERVICE_NAME").is_none().then_some("weightcast");
    Exporter::start(service).inspect_err(|error| say(&format!("warning: no traces: {}", chain(error)))).ok()
}

fn is_set(name: &str) -> bool {
    variable(name).is_some()
}
