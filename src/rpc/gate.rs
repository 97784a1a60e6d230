//! The gate before every service: who calls, whether they may, how much they may say; and what was refused, in the log.
//!
//! Owns: the check of tokens and roles by method, limits of messages by method. Refuses to know: what a call does.
//!
//! `GT-1`: nothing of a message is read before the token of its call was accepted.

use std::convert::Infallible;

use tonic::body::Body;
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::server::NamedService;
use tonic::{Code, Status};

use super::accept::address_of;
use super::auth::{Access, Role};
use super::limits::{LOG_INTERVAL, Peer};
use super::status::refused;
use crate::clock::Seldom;

/// One for each status code, so that a flood of one kind does not hide another.
static REFUSED: [Seldom; 17] = [const { Seldom::every(LOG_INTERVAL) }; 17];

/// Which role a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// A rank's, or its launcher's.
    Worker,
    /// That of people and schedulers who command the job.
    Operator,
    /// Either.
    Either,
}

/// What each method needs. One that is not named commands the job, until somebody decides otherwise here.
fn needs(path: &str) -> Needs {
    let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    match (service, method) {
        ("weightcast.v1.WorkerService", _) => Needs::Worker,
        // A rank that is told to end by its scheduler asks for an orderly end; the handler checks that it is a member.
        ("weightcast.v1.JobService", "GetStatus" | "ReportProcessEnded" | "Drain") => Needs::Either,
        _ => Needs::Operator,
    }
}

/// A service behind the gate.
#[derive(Clone, Debug)]
pub(super) struct Gate<S> {
    inner: S,
    access: Access,
}

impl<S> Gate<S> {
    pub(super) const fn new(inner: S, access: Access) -> Self {
        Self { inner, access }
    }

    fn check(&self, request: &http::Request<Body>) -> Result<Role, Status> {
        let Some(found) = request.headers().get("authorization") else {
            let message = "no job token: expected authorization metadata";
            return Err(refused(Code::Unauthenticated, "token-missing", message));
        };
        let role = self.access.role(found.as_bytes()).map_err(|error| {
            tracing::error!(%error, "the job's token cannot be read");
            let message = "the job's token cannot be read by the coordinator";
            refused(Code::Unavailable, "token-unreadable", message)
        })?;
        let Some(role) = role else {
            return Err(refused(Code::PermissionDenied, "token-wrong", "wrong job token"));
        };
        match (needs(request.uri().path()), role) {
            (Needs::Operator, Role::Worker) => {
                let message = "the workers' token does not command the job: expected the control token";
                Err(refused(Code::PermissionDenied, "role", message))
            }
            (Needs::Worker, Role::Operator) => {
                let message = "the control token is not a rank's: expected the workers' token";
                Err(refused(Code::PermissionDenied, "role", message))
            }
            _ => Ok(role),
        }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Peer>().cloned();
        let path = request.uri().path().to_owned();
        match self.check(&request) {
            Ok(role) => {
                if let Some(peer) = &peer {
                    peer.accept();
                }
                request.extensions_mut().insert(role);
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let answer = answer.await?;
                    if let Some(status) = Status::from_header_map(answer.headers()) {
                        log(peer.as_ref(), &path, &status);
                    }
                    Ok(answer)
                })
            }
            Err(status) => {
                log(peer.as_ref(), &path, &status);
                Box::pin(std::future::ready(Ok(status.into_http())))
            }
        }
    }
}

/// Says what was refused. What ranks of an ending job or a restarted coordinator hear in the ordinary course is no news.
fn log(peer: Option<&Peer>, method: &str, status: &Status) {
    let ordinary =
        [Code::Ok, Code::Unavailable, Code::Aborted, Code::Cancelled, Code::DeadlineExceeded].contains(&status.code());
    let (peer, message) = (address_of(peer), status.message());
    if ordinary {
        tracing::debug!(%peer, method, code = ?status.code(), message, "refused a call");
    } else if let Some(held_back) =
        usize::try_from(i32::from(status.code())).ok().and_then(|code| REFUSED.get(code)?.pass())
    {
        tracing::warn!(%peer, method, code = ?status.code(), message, held_back, "refused a call");
    }
}

/// Two instances of a service that differ in how long a message may be: the second is for the methods of large ones.
#[derive(Clone, Debug)]
pub(super) struct BySize<S> {
    small: S,
    large: S,
    methods: &'static [&'static str],
}

impl<S> BySize<S> {
    pub(super) const fn new(small: S, large: S, methods: &'static [&'static str]) -> Self {
        Self { small, large, methods }
    }
}

impl<S: NamedService> NamedService for BySize<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for BySize<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match self.small.poll_ready(context) {
            Poll::Ready(Ok(())) => self.large.poll_ready(context),
            other => other,
        }
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        if self.methods.contains(&method) { self.large.call(request) } else { self.small.call(request) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever adds a method to a service decides here what it needs; until then it needs the most.
    #[test]
    fn methods_that_nobody_has_named_command_the_job() {
        assert_eq!(needs("/weightcast.v1.WorkerService/Join"), Needs::Worker);
        assert_eq!(needs("/weightcast.v1.WorkerService/ReportLines"), Needs::Worker);
        assert_eq!(needs("/weightcast.v1.JobService/GetStatus"), Needs::Either);
        for path in [
            "/weightcast.v1.JobService/SaveCheckpoint",
            "/weightcast.v1.JobService/FollowLogs",
            "/weightcast.v1.JobService/New",
            "/x/y",
            "",
            "/",
        ] {
            assert_eq!(needs(path), Needs::Operator, "{path}");
        }
    }
}
