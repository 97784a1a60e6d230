//! Counts the answers of the contract's servers by method and status code.
//!
//! Owns: which names may be counted, so that a caller cannot make labels. A stream counts when it opens.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::Code;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

use crate::metrics::Calls;

/// The methods of the contract.
const METHODS: [&str; 19] = [
    "WorkerService/Join",
    "WorkerService/Watch",
    "WorkerService/Renew",
    "WorkerService/GetPlan",
    "WorkerService/ReportLoaded",
    "WorkerService/ReportSaved",
    "WorkerService/RequestSave",
    "WorkerService/ReportTrained",
    "WorkerService/ReportFailed",
    "WorkerService/ReportLines",
    "JobService/GetStatus",
    "JobService/SaveCheckpoint",
    "JobService/UnloadModel",
    "JobService/Drain",
    "JobService/SubmitJob",
    "JobService/ListJobs",
    "JobService/CancelJob",
    "JobService/ReportProcessEnded",
    "JobService/FollowLogs",
];

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct CountCalls(pub(super) Calls);

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, calls: self.0.clone() }
    }
}

/// A service whose answers are counted.
#[derive(Clone, Debug)]
pub(super) struct Counted<S> {
    inner: S,
    calls: Calls,
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (method, calls) = (method(request.uri().path()), self.calls.clone());
        let answering = self.inner.call(request);
        Box::pin(async move {
            let answer = answering.await?;
            calls.count(method, code(answer.headers()));
            Ok(answer)
        })
    }
}

fn method(path: &str) -> &'static str {
    let name = path.strip_prefix("/weightcast.v1.").unwrap_or_default();
    METHODS.into_iter().find(|known| *known == name).unwrap_or("other")
}

/// A refusal stands in the headers; what has none there is answered.
fn code(headers: &HeaderMap) -> &'static str {
    let code = headers.get("grpc-status").map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()));
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    /// Every method of the contract is counted under its own name.
    #[test]
    fn all_methods_are_known() {
        let descriptors = prost_types::FileDescriptorSet::decode(weightcast_proto::DESCRIPTORS).expect("descriptors");
        let mut found = Vec::new();
        for service in descriptors.file.iter().flat_map(|file| &file.service) {
            found.extend(service.method.iter().map(|method| format!("{}/{}", service.name(), method.name())));
        }
        found.sort();
        let mut expected = METHODS.map(str::to_owned);
        expected.sort();
        assert_eq!(found, expected);
        assert_eq!(method("/weightcast.v1.JobService/Drain"), "JobService/Drain");
        assert_eq!(method("/weightcast.v1.JobService/Nothing"), "other");
    }
}
