//! Errors on the wire: a kind becomes a status code with `google.rpc.ErrorInfo`, and `RetryInfo` where a retry may help.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{Classify, Kind};
use crate::membership::STALE;

/// The domain of error reasons.
const DOMAIN: &str = "weightcast.v1";

/// When to try again.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// The status of a caller who is refused for `reason`.
pub(super) fn refused(code: Code, reason: &str, message: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, HashMap::new());
    if code == Code::Unavailable {
        details.set_retry_info(Some(RETRY_DELAY));
    }
    Status::with_error_details(code, message, details)
}

/// The status of an error.
#[must_use]
pub fn status<E: Classify>(error: &E) -> Status {
    let kind = error.kind();
    let mut details = ErrorDetails::new();
    details.set_error_info(error.reason(), DOMAIN, HashMap::new());
    if kind.is_retryable() {
        details.set_retry_info(Some(RETRY_DELAY));
    }
    Status::with_error_details(code(kind), error.to_string(), details)
}

/// Whether the caller is told that it is not, or no longer, a member.
#[must_use]
pub fn is_stale(status: &Status) -> bool {
    status.code() == Code::Aborted && status.get_error_details().error_info().is_some_and(|info| info.reason == STALE)
}

const fn code(kind: Kind) -> Code {
    match kind {
        Kind::Invalid => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::Conflict => Code::AlreadyExists,
        Kind::Unavailable => Code::Unavailable,
        Kind::Deadline => Code::DeadlineExceeded,
        Kind::Fenced => Code::Aborted,
        Kind::Corrupt => Code::DataLoss,
        Kind::Exhausted => Code::ResourceExhausted,
        Kind::Internal => Code::Internal,
    }
}

/// The kind of a status that came back.
#[must_use]
pub fn kind_of(status: &Status) -> Kind {
    match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::Unimplemented => Kind::Invalid,
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists | Code::Unauthenticated | Code::PermissionDenied => Kind::Conflict,
        Code::DeadlineExceeded | Code::Cancelled => Kind::Deadline,
        Code::Aborted => Kind::Fenced,
        Code::DataLoss => Kind::Corrupt,
        Code::ResourceExhausted => Kind::Exhausted,
        Code::Internal => Kind::Internal,
        Code::Ok | Code::Unknown | Code::Unavailable => Kind::Unavailable,
    }
}
