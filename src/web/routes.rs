//! What stands at which path.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::WatchStream;

use super::access::{Access, Refused};
use super::page::{Page, SIGN_IN, STATUS};
use super::{MAX_VIEWERS, follow, measure};
use crate::coordinator::Coordinator;
use crate::metrics::CONTENT_TYPE;
use crate::types::as_u64;

/// When a browser whose stream broke asks again.
const RECONNECT: Duration = Duration::from_secs(2);
/// When one that found no room should.
const RETRY_AFTER_S: &str = "10";

/// What handlers need.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) coordinator: Coordinator,
    pub(super) access: Access,
    /// Room for those who follow the page.
    pub(super) viewers: Arc<Semaphore>,
    pub(super) snapshots: watch::Receiver<Arc<str>>,
}

/// All paths.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(status_page))
        .route("/events", get(events))
        .route("/api/status", get(status))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

async fn status_page(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match shared.access.admit(&headers).await {
        Ok(()) => page(StatusCode::OK, &STATUS),
        // A browser asks for the token and sends it from then on; the token is never part of an address.
        Err(refused @ (Refused::NoToken | Refused::WrongToken)) => page(refused.status(), &SIGN_IN),
        Err(refused) => refuse(refused),
    }
}

async fn events(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if let Err(refused) = shared.access.admit(&headers).await {
        return refuse(refused);
    }
    let Ok(room) = shared.viewers.clone().try_acquire_owned() else {
        let text = format!("{MAX_VIEWERS} browsers follow this page already\n");
        let mut response = plain(StatusCode::SERVICE_UNAVAILABLE, text);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S));
        return response;
    };
    let messages =
        WatchStream::new(shared.snapshots.clone()).filter(|snapshot| !snapshot.is_empty()).map(move |json| {
            // Held for as long as the stream is.
            let _ = &room;
            Ok::<_, Infallible>(Event::default().retry(RECONNECT).data(&*json))
        });
    guarded(Sse::new(messages).keep_alive(KeepAlive::default()).into_response())
}

async fn status(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if let Err(refused) = shared.access.admit(&headers).await {
        return refuse(refused);
    }
    let current = shared.snapshots.borrow().clone();
    // Before the first one was published.
    let json = if current.is_empty() { follow::first(&shared.coordinator) } else { current };
    answer(StatusCode::OK, "application/json", json.to_string())
}

async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if let Err(refused) = shared.access.admit_open(&headers) {
        return refuse(refused);
    }
    let viewers = as_u64(MAX_VIEWERS - shared.viewers.available_permits().min(MAX_VIEWERS));
    let samples = measure::measure(&shared.coordinator, viewers, crate::clock::now());
    answer(StatusCode::OK, CONTENT_TYPE, samples.encode())
}

fn refuse(refused: Refused) -> Response {
    let mut response = plain(refused.status(), refused.message().to_owned());
    if refused == Refused::NoToken {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

fn page(status: StatusCode, page: &Page) -> Response {
    let mut response = answer(status, "text/html; charset=utf-8", page.html.to_owned());
    if let Ok(policy) = HeaderValue::from_str(&page.policy) {
        response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}

fn plain(status: StatusCode, text: String) -> Response {
    answer(status, "text/plain; charset=utf-8", text)
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response {
    guarded((status, [(header::CONTENT_TYPE, content_type)], body).into_response())
}

/// Headers of every answer. Pages replace the policy by their own.
fn guarded(mut response: Response) -> Response {
    let fixed = [
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in fixed {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
