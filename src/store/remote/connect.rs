//! The client of one bucket, container or web server.
//!
//! Owns: the choice of the client, its credentials, its TLS. Refuses to know: files and names.
//!
//! `RC-1`: one provider of cryptography and one set of authorities serve all requests, the hub's and these.

use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::multipart::MultipartStore;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

use super::super::settings::MAX_BACKOFF;
use super::super::{Patience, RemoteAddress, RemoteSettings, Scheme};
use crate::types::as_usize;

/// After this time no request is tried again, whatever its number of tries.
const RETRY_DEADLINE: std::time::Duration = std::time::Duration::from_secs(180);

/// What serves a place.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) objects: Arc<dyn ObjectStore>,
    /// A web server takes no uploads.
    pub(super) uploads: Option<Arc<dyn Uploads>>,
    pub(super) patience: Patience,
}

/// Uploads in parts, in any order.
pub(super) trait Uploads: MultipartStore + std::fmt::Debug {}
impl<T: MultipartStore + std::fmt::Debug> Uploads for T {}

impl Client {
    pub(super) fn new(address: &RemoteAddress, settings: &RemoteSettings) -> object_store::Result<Self> {
        let patience = settings.patience();
        let retry = RetryConfig {
            backoff: BackoffConfig { init_backoff: patience.backoff, max_backoff: MAX_BACKOFF, base: 2.0 },
            max_retries: as_usize(u64::from(patience.retries)),
            retry_timeout: RETRY_DEADLINE,
        };
        let connector = Connector::new(settings)?;
        let options = ClientOptions::new().with_connect_timeout(patience.connect);
        let place = address.authority.as_str();
        let both = |objects: Arc<dyn ObjectStore>, uploads: Arc<dyn Uploads>| Self {
            objects,
            uploads: Some(uploads),
            patience,
        };
        match address.scheme {
            Scheme::S3 => {
                let known =
                    |(name, value): (&str, &str)| Some((name.to_ascii_lowercase().parse().ok()?, value.to_owned()));
                let variables = settings.with_prefix("AWS_").filter_map(known);
                // One request for each object is what every compatible server understands.
                let endpoint = settings.first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]);
                // Who names an endpoint without TLS means it.
                let is_plain = endpoint.is_some_and(|url| url.starts_with("http://"));
                let builder = AmazonS3Builder::new()
                    .with_client_options(options.with_allow_http(is_plain))
                    .with_config(AmazonS3ConfigKey::DisableBulkDelete, "true");
                let builder = variables.fold(builder, |builder, (key, value)| builder.with_config(key, value));
                let builder = builder.with_bucket_name(place).with_retry(retry).with_http_connector(connector);
                let client = Arc::new(builder.build()?);
                Ok(both(client.clone(), client))
            }
            Scheme::Gs => {
                let known =
                    |(name, value): (&str, &str)| Some((name.to_ascii_lowercase().parse().ok()?, value.to_owned()));
                let variables = settings.with_prefix("GOOGLE_").filter_map(known);
                let builder = variables
                    .fold(GoogleCloudStorageBuilder::new().with_client_options(options), |builder, (key, value)| {
                        builder.with_config(key, value)
                    });
                let builder = match settings.first(&["SERVICE_ACCOUNT"]) {
                    Some(path) => builder.with_service_account_path(path),
                    None => builder,
                };
                let builder = builder.with_bucket_name(place).with_retry(retry).with_http_connector(connector);
                let client = Arc::new(builder.build()?);
                Ok(both(client.clone(), client))
            }
            Scheme::Az => {
                let known =
                    |(name, value): (&str, &str)| Some((name.to_ascii_lowercase().parse().ok()?, value.to_owned()));
                let variables = settings.with_prefix("AZURE_").filter_map(known);
                let builder = variables
                    .fold(MicrosoftAzureBuilder::new().with_client_options(options), |builder, (key, value)| {
                        builder.with_config(key, value)
                    });
                let builder = match settings.first(&["IDENTITY_ENDPOINT"]) {
                    Some(endpoint) => builder.with_msi_endpoint(endpoint),
                    None => builder,
                };
                let builder = builder.with_container_name(place).with_retry(retry).with_http_connector(connector);
                let client = Arc::new(builder.build()?);
                Ok(both(client.clone(), client))
            }
            Scheme::Http | Scheme::Https => {
                let options = options.with_allow_http(address.scheme == Scheme::Http);
                let builder = HttpBuilder::new().with_url(format!("{}://{place}", address.scheme.name()));
                let builder = builder.with_client_options(options).with_retry(retry).with_http_connector(connector);
                Ok(Self { objects: Arc::new(builder.build()?), uploads: None, patience })
            }
        }
    }
}

/// Makes the HTTP clients: with the project's cryptography, with limits on waiting and none on the length of an answer.
#[derive(Debug)]
struct Connector {
    tls: ClientConfig,
    patience: Patience,
    proxy: Option<reqwest::Proxy>,
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> object_store::Error {
    object_store::Error::Generic { store: "client", source: error.into() }
}

impl Connector {
    fn new(settings: &RemoteSettings) -> object_store::Result<Self> {
        let mut roots = RootCertStore::empty();
        match settings.ca_file() {
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Some(path) => {
                let named = |error: &dyn std::fmt::Display| failed(format!("certificates {}: {error}", path.display()));
                for certificate in CertificateDer::pem_file_iter(&path).map_err(|error| named(&error))? {
                    let certificate = certificate.map_err(|error| named(&error))?;
                    roots.add(certificate).map_err(|error| named(&error))?;
                }
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(failed)?;
        let tls = tls.with_root_certificates(roots).with_no_client_auth();
        let proxy = match settings.first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]) {
            None => None,
            Some(url) => {
                let none = settings.first(&["NO_PROXY", "no_proxy"]).and_then(reqwest::NoProxy::from_string);
                // The address may have a password in it, so the error is not repeated.
                let proxy = reqwest::Proxy::all(url).map_err(|_| failed("the variable of the proxy has no address"))?;
                Some(proxy.no_proxy(none))
            }
        };
        Ok(Self { tls, patience: settings.patience(), proxy })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let told = |key| options.get_config_value(&key);
        let allow_http = told(ClientConfigKey::AllowHttp).is_some_and(|value| value == "true");
        // The addresses of a cloud's machines that give credentials answer at once or not at all.
        let connect = told(ClientConfigKey::ConnectTimeout).and_then(|value| value.strip_suffix('s')?.parse().ok());
        let connect = connect.map_or(self.patience.connect, std::time::Duration::from_secs_f64);
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("weightcast/", env!("CARGO_PKG_VERSION")))
            .tls_backend_preconfigured(self.tls.clone())
            .connect_timeout(connect)
            .read_timeout(self.patience.stall)
            .https_only(!allow_http)
            .http1_only()
            .no_proxy();
        if let Some(proxy) = &self.proxy {
            builder = builder.proxy(proxy.clone());
        }
        Ok(HttpClient::new(builder.build().map_err(failed)?))
    }
}
