//! What rustls is told: versions, certificates, and whom to believe.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use super::{Pems, TlsConfigs, TlsError, TlsFiles};

/// HTTP/2, as gRPC needs it.
const CALL_PROTOCOL: &[u8] = b"h2";
/// The data plane, so that a connection of one plane never passes for one of the other.
const DATA_PROTOCOL: &[u8] = b"weightcast-data/1";

/// Makes the configurations of control plane and data plane.
pub(super) fn build(files: &TlsFiles, pems: &Pems) -> Result<TlsConfigs, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let unusable = |path: &std::path::Path, error: &dyn std::fmt::Display| TlsError::Unusable {
        path: path.display().to_string(),
        reason: error.to_string(),
    };
    let of_cert = |error: rustls::Error| unusable(&files.cert, &error);
    let of_ca = |error: &dyn std::fmt::Display| unusable(&files.ca, error);
    let certificates = certificates(&files.cert, &pems.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&pems.key).map_err(|error| TlsError::Pem {
        path: files.key.display().to_string(),
        expected: "a private key",
        found: error.to_string(),
    })?;
    let mut roots = RootCertStore::empty();
    for authority in self::certificates(&files.ca, &pems.ca)? {
        roots.add(authority).map_err(|error| of_ca(&error))?;
    }
    let roots = Arc::new(roots);
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let clients = clients.build().map_err(|error| of_ca(&error))?;

    let server = |protocol: &[u8]| {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13])?;
        let builder = builder.with_client_cert_verifier(clients.clone());
        let mut config = builder.with_single_cert(certificates.clone(), key.clone_key())?;
        config.alpn_protocols = vec![protocol.to_vec()];
        // Every connection shows its certificate anew, and nothing travels against the data that is not ours.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    };
    let call_client = client_builder(&provider).map_err(of_cert)?.with_root_certificates(Arc::clone(&roots));
    let mut call_client = call_client.with_client_auth_cert(certificates.clone(), key.clone_key()).map_err(of_cert)?;
    call_client.alpn_protocols = vec![CALL_PROTOCOL.to_vec()];
    let verifier = Arc::new(AnyNameOfOurs { roots, provider: Arc::clone(&provider) });
    let data_client =
        client_builder(&provider).map_err(of_cert)?.dangerous().with_custom_certificate_verifier(verifier);
    let mut data_client = data_client.with_client_auth_cert(certificates.clone(), key.clone_key()).map_err(of_cert)?;
    data_client.alpn_protocols = vec![DATA_PROTOCOL.to_vec()];
    Ok(TlsConfigs {
        call_server: server(CALL_PROTOCOL).map_err(of_cert)?,
        call_client: Arc::new(call_client),
        data_server: server(DATA_PROTOCOL).map_err(of_cert)?,
        data_client: Arc::new(data_client),
    })
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>;

fn client_builder(provider: &Arc<CryptoProvider>) -> Result<ClientBuilder, rustls::Error> {
    ClientConfig::builder_with_provider(Arc::clone(provider)).with_protocol_versions(&[&TLS13])
}

fn certificates(path: &std::path::Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |found: String| TlsError::Pem { path: path.display().to_string(), expected: "a certificate", found };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| bad(error.to_string()))?;
    if found.is_empty() { Err(bad("none".to_owned())) } else { Ok(found) }
}

/// Believes any certificate for servers that our authorities signed, whatever its name (`TL-3`).
#[derive(Debug)]
struct AnyNameOfOurs {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyNameOfOurs {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
