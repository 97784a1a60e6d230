//! Traces for OpenTelemetry, when somebody collects them: one trace per load and one per checkpoint, over all ranks.
//!
//! Owns: the exporter and its thread, and spans that are nothing when no exporter was started. Refuses to know: what is traced.
//!
//! - `TE-1`: the ids of a trace follow from the words that name the work, so a coordinator that is started again goes on with
//!   the same trace, and nothing need be remembered.
//! - `TE-2`: a collector that does not answer costs the end of a process at most [`FLUSH_DEADLINE`], and nothing before.

use std::cell::Cell;
use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
    Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider, Span};
use sha2::{Digest as _, Sha256};

/// How long the end of a process waits for spans to be delivered.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

thread_local! {
    /// The ids that the next root span of this thread gets.
    static CHOSEN: Cell<Option<TraceIds>> = const { Cell::new(None) };
}

/// The exporter cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// Its settings.
    #[error("OpenTelemetry exporter: {0}")]
    Exporter(#[from] ExporterBuildError),
    /// Its thread.
    #[error("OpenTelemetry exporter: starting its thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Delivers spans until it is dropped, which delivers what is left.
#[derive(Debug)]
pub struct Exporter {
    provider: SdkTracerProvider,
    /// Connections to the collector have a thread of their own, so that they go on while others wait.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Exporter {
    /// Starts the exporter of this process, by the standard variables `OTEL_*`. `service` is its name unless they give one.
    ///
    /// # Errors
    /// [`TelemetryError`].
    pub fn start(service: Option<&'static str>) -> Result<Self, TelemetryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let within = runtime.enter();
        let exporter = SpanExporter::builder().with_tonic().build()?;
        let mut resource =
            Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        if let Some(service) = service {
            resource = resource.with_service_name(service);
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_id_generator(Ids::default())
            .with_resource(resource.build())
            .build();
        drop(within);
        // A process starts one exporter.
        let _ = TRACER.set(provider.tracer("weightcast"));
        Ok(Self { provider, runtime: Some(runtime) })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_DEADLINE) {
            tracing::debug!(%error, "spans were not delivered");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Whether spans go anywhere.
#[must_use]
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// The ids of a piece of work's trace and of its first span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceIds {
    trace: [u8; 16],
    span: [u8; 8],
}

impl TraceIds {
    /// Of the work that these words name (`TE-1`).
    #[must_use]
    pub fn of(words: &[&str]) -> Self {
        let mut digest = Sha256::new();
        for word in words {
            digest.update(crate::types::as_u64(word.len()).to_le_bytes());
            digest.update(word.as_bytes());
        }
        let (mut trace, mut span) = ([0; 16], [0; 8]);
        for (to, from) in trace.iter_mut().chain(&mut span).zip(digest.finalize()) {
            *to = from;
        }
        Self { trace, span }
    }

    /// As the header of W3C Trace Context says it, sampled.
    #[must_use]
    pub fn traceparent(&self) -> String {
        let mut text = "00-".to_owned();
        for byte in self.trace {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text.push('-');
        for byte in self.span {
            let _ = write!(text, "{byte:02x}");
        }
        text.push_str("-01");
        text
    }
}

/// A span; nothing when no exporter was started. It ends when it is dropped.
#[derive(Debug, Default)]
pub struct TraceSpan(Option<Span>);

impl TraceSpan {
    /// The first span of a trace, with ids that others can know.
    #[must_use]
    pub fn root(ids: TraceIds, name: &'static str) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        CHOSEN.set(Some(ids));
        let builder = tracer.span_builder(name).with_kind(SpanKind::Internal);
        let span = tracer.build_with_context(builder, &Context::new());
        CHOSEN.set(None);
        Self(Some(span))
    }

    /// A span below the one that `traceparent` names; nothing when it names none.
    #[must_use]
    pub fn child(traceparent: &str, name: &'static str) -> Self {
        let (Some(tracer), Some(parent)) = (TRACER.get(), parsed(traceparent)) else { return Self(None) };
        let context = Context::new().with_remote_span_context(parent);
        Self(Some(tracer.build_with_context(tracer.span_builder(name).with_kind(SpanKind::Internal), &context)))
    }

    /// Says something of the work. A count beyond 2^63 is not said.
    pub fn count(&mut self, key: &'static str, count: u64) {
        if let Ok(count) = i64::try_from(count) {
            self.set(key, count);
        }
    }

    /// Says something of the work.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// The work failed.
    pub fn fail(&mut self, message: &str) {
        if let Some(span) = &mut self.0 {
            span.set_status(Status::error(message.to_owned()));
        }
    }
}

/// `00-<trace>-<span>-<flags>`.
fn parsed(traceparent: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::default());
    (version == "00" && context.is_valid()).then_some(context)
}

/// Random ids, but for first spans whose ids were chosen.
#[derive(Debug, Default)]
struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        CHOSEN.get().map_or_else(|| self.0.new_trace_id(), |ids| TraceId::from_bytes(ids.trace))
    }

    fn new_span_id(&self) -> SpanId {
        CHOSEN.get().map_or_else(|| self.0.new_span_id(), |ids| SpanId::from_bytes(ids.span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of W3C Trace Context, section 3.2.
    #[test]
    fn a_traceparent_is_read() {
        let context = parsed("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").expect("valid");
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id().to_string(), "00f067aa0ba902b7");
        assert!(context.is_sampled() && context.is_remote());
        for bad in ["", "00", "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "00-0-0-01"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }

    /// TE-1, and words do not run into each other.
    #[test]
    fn te_1_ids_follow_from_the_words() {
        let ids = TraceIds::of(&["load", "job", "1"]);
        assert_eq!(ids, TraceIds::of(&["load", "job", "1"]));
        assert_ne!(ids, TraceIds::of(&["load", "job1", ""]));
        let parent = parsed(&ids.traceparent()).expect("valid");
        assert_eq!((parent.trace_id().to_bytes(), parent.span_id().to_bytes()), (ids.trace, ids.span));
    }
}
