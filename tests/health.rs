//! Health and reflection of a real coordinator, asked by real clients: each service means what it says.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::time::Duration;

use support::{Job, MODEL, PATIENCE, Place, until};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

/// A call that takes longer than this has no answer.
const CALL: Duration = Duration::from_secs(5);
const SERVES: Result<ServingStatus, Code> = Ok(ServingStatus::Serving);
const SERVES_NOT: Result<ServingStatus, Code> = Ok(ServingStatus::NotServing);

/// A client in a test that is not asynchronous.
struct Asking {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

impl Asking {
    fn at(address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address").timeout(CALL);
        let channel = runtime.block_on(endpoint.connect()).expect("somebody listens");
        Self { runtime, channel }
    }

    fn check(&self, service: &str) -> Result<ServingStatus, Code> {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = self.runtime.block_on(HealthClient::new(self.channel.clone()).check(request));
        answer.map(|answer| answer.into_inner().status()).map_err(|status| status.code())
    }

    /// startup, readiness, liveness.
    fn three(&self) -> [Result<ServingStatus, Code>; 3] {
        ["startup", "readiness", "liveness"].map(|service| self.check(service))
    }

    /// The services that reflection lists.
    fn services(&self, token: Option<&str>) -> Result<Vec<String>, Code> {
        let ask = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut request = Request::new(tokio_stream::once(ask));
        if let Some(token) = token {
            let header = format!("Bearer {token}").parse().expect("a header");
            request.metadata_mut().insert("authorization", header);
        }
        let mut client = ServerReflectionClient::new(self.channel.clone());
        let answer: Result<ServerReflectionResponse, tonic::Status> = self.runtime.block_on(async {
            client.server_reflection_info(request).await?.into_inner().next().await.expect("an answer")
        });
        match answer.map_err(|status| status.code())?.message_response {
            Some(MessageResponse::ListServicesResponse(list)) => {
                Ok(list.service.into_iter().map(|service| service.name).collect())
            }
            other => panic!("expected a list of services, found {other:?}"),
        }
    }
}

/// What stands behind `words` in what the process says, once it has said it.
fn said(job: &mut Job, words: &str) -> String {
    let mut found = None;
    until(words, PATIENCE, || {
        let said = job.said();
        found = said.lines().find_map(|line| Some(line.split_once(words)?.1.trim().to_owned()));
        assert!(found.is_some() || !job.is_over(), "{said}");
        found.is_some()
    });
    found.expect("just found")
}

fn start(place: &Place, model: &str, faults: &str) -> Job {
    let state = place.path("state");
    let flags = ["coordinator", "--ranks", "1", "--state-dir", &state, "--health-listen", "127.0.0.1:0", "--hold"];
    let mut command = place.command(&[&flags[..], &["--model", model]].concat());
    command.env("WEIGHTCAST_FAULTS", faults);
    place.start_command(command)
}

/// A coordinator whose model comes from a server that never answers is starting: it lives and is not ready. A kubelet that
/// asks for a service that does not exist is told so.
#[test]
fn a_coordinator_that_plans_has_not_started() {
    let place = Place::new();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let model = format!("http://{}/model", silent.local_addr().expect("an address"));
    let mut coordinator = start(&place, &model, "");
    let asking = Asking::at(&said(&mut coordinator, "health checks at "));
    assert_eq!(asking.three(), [SERVES_NOT, SERVES_NOT, SERVES]);
    assert_eq!(asking.check(""), SERVES);
    assert_eq!(asking.check("weightcast.v1.WorkerService"), Err(Code::NotFound));
    assert!(!coordinator.is_over() && !coordinator.said().contains("listens on"), "{}", coordinator.said());
}

/// HE-1: the owner stands still while everything else goes on: the coordinator is no longer live, and is again when the owner
/// is. Before and after it is ready without a single rank.
#[test]
fn he_1_a_coordinator_whose_owner_is_stuck_is_not_live() {
    let place = Place::new();
    let stuck = place.path("stuck");
    let mut coordinator = start(&place, MODEL, &format!("hold=coordinator:coordinator.tick:1:{stuck}"));
    let asking = Asking::at(&said(&mut coordinator, "health checks at "));
    until("it is ready", PATIENCE, || asking.three() == [SERVES; 3]);
    std::fs::write(&stuck, "").expect("a file");
    until("it is not live", PATIENCE, || asking.three() == [SERVES, SERVES_NOT, SERVES_NOT]);
    assert_eq!(asking.check(""), SERVES_NOT);
    std::fs::remove_file(&stuck).expect("the file");
    until("it is live again", PATIENCE, || asking.three() == [SERVES; 3] && asking.check("") == SERVES);
}

/// A job that was told to end is not ready while its rank, which stands still, has not heard of it; it is alive all the while.
#[test]
fn a_job_that_ends_is_not_ready() {
    let place = Place::new();
    let (late, faults) = (place.path("late"), format!("hold=rank0:worker.finished:1:{}", place.path("late")));
    std::fs::write(&late, "").expect("a file");
    let launch = ["launch", "--nproc-per-node", "1", "--model", MODEL, "--hold", "--health-listen", "127.0.0.1:0"];
    let mut command = place.command(&launch);
    command.env("WEIGHTCAST_FAULTS", faults);
    let mut job = place.start_command(command);
    let asking = Asking::at(&said(&mut job, "health checks at "));
    support::wait_until_holding(&place, &mut job);
    assert_eq!(asking.three(), [SERVES; 3]);
    assert_eq!(place.run(&["drain"]).code, Some(0));
    until("it is not ready", PATIENCE, || asking.three() == [SERVES, SERVES_NOT, SERVES]);
    std::fs::remove_file(&late).expect("the file");
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}

/// Each port tells of its own services; the main port only to those who have the token.
#[test]
fn reflection_lists_what_a_port_serves() {
    let place = Place::new();
    let mut coordinator = start(&place, MODEL, "");
    let health = Asking::at(&said(&mut coordinator, "health checks at "));
    let main = Asking::at(&said(&mut coordinator, "listens on "));
    let token = std::fs::read_to_string(place.path("state/token")).expect("a token");
    let listed = |asking: &Asking, token: Option<&str>| {
        let mut services = asking.services(token)?;
        services.sort();
        Ok::<_, Code>(services)
    };
    assert_eq!(listed(&health, None).expect("open"), ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"]);
    let expected = ["grpc.reflection.v1.ServerReflection", "weightcast.v1.JobService", "weightcast.v1.WorkerService"];
    assert_eq!(listed(&main, Some(token.trim())).expect("with the token"), expected);
    assert_eq!(listed(&main, None), Err(Code::Unauthenticated));
    assert_eq!(listed(&main, Some("wrong")), Err(Code::PermissionDenied));
}

/// Ports that nobody would serve are refused, wherever they were named.
#[test]
fn health_without_a_coordinator_is_refused() {
    let place = Place::new();
    let mut program = place.command(&["launch", "true"]);
    program.env("WEIGHTCAST_HEALTH_LISTEN", "127.0.0.1:0");
    let ended = place.start_command(program).wait();
    assert_eq!(ended.code, Some(64), "{}", ended.stderr);
    assert!(ended.stderr.contains("--health-listen, --http-listen: expected a job"), "{}", ended.stderr);
}
