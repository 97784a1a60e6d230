//! Traces of real jobs as a collector gets them: one trace per load and per checkpoint, over all ranks.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use support::{MODEL, Place};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A collector that keeps what it gets: each span with its service's name.
#[derive(Clone, Debug, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().expect("nobody panics");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = attributes.iter().find(|attribute| attribute.key == "service.name");
            let name = match name.and_then(|name| name.value.clone()?.value) {
                Some(Value::StringValue(name)) => name,
                _ => String::new(),
            };
            kept.extend(
                resource.scope_spans.into_iter().flat_map(|scope| scope.spans).map(|span| (name.clone(), span)),
            );
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

struct Collecting {
    collector: Collector,
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Collecting {
    fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let (collector, address) = (Collector::default(), listener.local_addr().expect("an address"));
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { collector, address, _runtime: runtime }
    }

    /// The spans of this name, in the order of their beginnings.
    fn named(&self, name: &str) -> Vec<Span> {
        let mut found: Vec<Span> =
            self.all().into_iter().map(|(_, span)| span).filter(|span| span.name == name).collect();
        found.sort_by_key(|span| span.start_time_unix_nano);
        found
    }

    fn all(&self) -> Vec<(String, Span)> {
        self.collector.0.lock().expect("nobody panics").clone()
    }

    /// Launches two ranks whose processes send their spans here, and waits for their end.
    fn launch(&self, place: &Place, flags: &[&str]) {
        let mut command = place.command(&[&["launch", "--nproc-per-node", "2"], flags].concat());
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", self.address));
        let ended = place.start_command(command).wait_within(4 * support::PATIENCE);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.expect_quiet();
        place.expect_no_process();
    }
}

fn number(span: &Span, key: &str) -> Option<i64> {
    let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::IntValue(number) => Some(*number),
        _ => None,
    }
}

/// `children` are of `root`'s trace, right below it, within its time, and one of each rank.
fn expect_one_of_each_rank(root: &Span, children: &[Span]) {
    assert_eq!(children.len(), 2, "{children:?}");
    for child in children {
        assert_eq!((&child.trace_id, &child.parent_span_id), (&root.trace_id, &root.span_id), "{child:?}");
        assert!(child.start_time_unix_nano >= root.start_time_unix_nano, "{child:?} begins before {root:?}");
        assert!(child.end_time_unix_nano <= root.end_time_unix_nano, "{child:?} ends after {root:?}");
    }
    let ranks: BTreeSet<_> = children.iter().map(|child| number(child, "weightcast.rank")).collect();
    assert_eq!(ranks, BTreeSet::from([Some(0), Some(1)]));
}

#[test]
fn a_load_and_a_checkpoint_are_one_trace_each() {
    let (place, collecting) = (Place::new(), Collecting::start());
    let checkpoints = place.path("checkpoints");
    collecting.launch(
        &place,
        &["--model", MODEL, "--quantize", "nf4", "--save", "--step", "7", "--checkpoint-dir", &checkpoints],
    );
    let [load] = &collecting.named("load model")[..] else { panic!("{:?}", collecting.all()) };
    let [save] = &collecting.named("save checkpoint")[..] else { panic!("{:?}", collecting.all()) };
    assert!(load.parent_span_id.is_empty() && save.parent_span_id.is_empty());
    assert_ne!(load.trace_id, save.trace_id);
    assert_eq!((number(load, "weightcast.generation"), number(save, "weightcast.step")), (Some(1), Some(7)));
    expect_one_of_each_rank(load, &collecting.named("load shard"));
    expect_one_of_each_rank(save, &collecting.named("write shard"));
    let [commit] = &collecting.named("commit checkpoint")[..] else { panic!("{:?}", collecting.all()) };
    assert_eq!((&commit.trace_id, &commit.parent_span_id), (&save.trace_id, &save.span_id));
    assert!(collecting.all().iter().all(|(service, _)| service == "weightcast"));
}

/// Each checkpoint of a training run is a trace of its own.
#[test]
fn each_checkpoint_of_a_run_is_a_trace() {
    const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
    let (place, collecting) = (Place::new(), Collecting::start());
    let job = place.path("job.toml");
    let text = format!(
        "model.source = \"{MODEL}\"\ncheckpoint.directory = \"run\"\n[train]\nsteps = 4\nbatch-size = 4\nmicro-batch-size = 2\n\
         [train.data]\ntrain = \"{DATA}\"\nsequence-length = 32\n[train.lora]\nr = 4\n[train.checkpoint]\nevery-steps = 2\n\
         every-minutes = 0\n"
    );
    std::fs::write(&job, text).expect("a job file");
    collecting.launch(&place, &[&job]);
    let saves = collecting.named("save checkpoint");
    assert_eq!(saves.iter().map(|save| number(save, "weightcast.step")).collect::<Vec<_>>(), [Some(2), Some(4)]);
    let written = collecting.named("write shard");
    for save in &saves {
        let own: Vec<Span> = written.iter().filter(|span| span.trace_id == save.trace_id).cloned().collect();
        expect_one_of_each_rank(save, &own);
    }
    assert_eq!((written.len(), collecting.named("load shard").len()), (4, 2));
}
