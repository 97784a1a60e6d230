//! TLS errors in words: whose certificate it is, and what is wrong with it.

use rustls::{AlertDescription, CertificateError, Error};

/// What an error means to the one who has to mend it.
#[must_use]
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(found) => match found {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("the other side's certificate has expired ({found})")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("the other side's certificate is not valid yet ({found})")
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the other side's certificate is not signed by the expected authority (--tls-ca)".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
                "the other side's certificate is for another name ({found}); --tls-server-name says which to expect"
            ),
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                format!("the other side's certificate is not for this use: client auth and server auth ({found})")
            }
            other => format!("the other side's certificate cannot be believed: {other}"),
        },
        Error::NoCertificatesPresented => "the other side has shown no certificate".to_owned(),
        Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateExpired => "the other side refused our certificate: it has expired".to_owned(),
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "the other side refused our certificate: it is not signed by the authority that it expects".to_owned()
            }
            AlertDescription::CertificateRequired => {
                "the other side refused us: it expects a certificate, and we have shown none".to_owned()
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => format!("the other side refused our certificate: {alert:?}"),
            other => format!("the other side ended the handshake: {other:?}"),
        },
        Error::InvalidMessage(_) => format!("the other side does not speak TLS ({error})"),
        other => other.to_string(),
    }
}

/// As [`explain`], for the error of a stream.
#[must_use]
pub fn explain_io(error: &std::io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(error) => explain(error),
        None if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the other side closed the connection in the middle of the handshake; does it speak TLS?".to_owned()
        }
        None => error.to_string(),
    }
}
