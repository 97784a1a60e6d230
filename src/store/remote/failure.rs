//! What the failures of requests mean, in words without secrets.

use std::error::Error as _;
use std::future::Future;
use std::io;

use object_store::Error;

use super::super::{Operation, StoreError};
use crate::tasks::request;

/// Servers answer with whole documents; this much of one is enough to know what they mean.
const MAX_REASON_CHARS: usize = 600;

/// Carries out a request and waits for it.
pub(super) fn carry_out<T: Send + 'static>(
    at: (Operation, &str),
    work: impl Future<Output = object_store::Result<T>> + Send + 'static,
) -> Result<T, StoreError> {
    wait(at, work)?.map_err(|error| refused(at.0, at.1.to_owned(), &error))
}

/// As [`carry_out`], with the request's own error inside.
pub(super) fn wait<T: Send + 'static>(
    (operation, place): (Operation, &str),
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, StoreError> {
    let answer = request(work).and_then(crate::tasks::Answer::wait);
    answer.map_err(|source| StoreError::Io { operation, path: place.to_owned(), source })
}

/// The error of a request that is not tried again.
pub(super) fn refused(operation: Operation, path: String, error: &Error) -> StoreError {
    let kind = match error {
        Error::AlreadyExists { .. } => return StoreError::Exists { path },
        Error::NotFound { .. } => io::ErrorKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        Error::NotSupported { .. } | Error::NotImplemented { .. } => io::ErrorKind::Unsupported,
        _ => io::ErrorKind::Other,
    };
    StoreError::Io { operation, path, source: io::Error::new(kind, reason(error)) }
}

/// An error's words on one line, without what the message says already.
pub(super) fn reason(error: &Error) -> String {
    let inner = match error {
        Error::NotFound { source, .. }
        | Error::Generic { source, .. }
        | Error::AlreadyExists { source, .. }
        | Error::Precondition { source, .. }
        | Error::NotSupported { source }
        | Error::PermissionDenied { source, .. }
        | Error::Unauthenticated { source, .. } => source.to_string(),
        _ => error.to_string(),
    };
    let mut words: Vec<&str> = inner.split_whitespace().collect();
    // The deepest cause is often not part of the text above it.
    let mut deepest = error.source();
    while let Some(next) = deepest.and_then(std::error::Error::source) {
        deepest = Some(next);
    }
    let cause = deepest.map(ToString::to_string).filter(|cause| !inner.contains(cause.as_str()));
    if let Some(cause) = &cause {
        words.push("-");
        words.extend(cause.split_whitespace());
    }
    let line = words.join(" ");
    match line.char_indices().nth(MAX_REASON_CHARS) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}
