//! Certificates for tests: authorities, and what they sign.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};

/// Somebody who signs.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

/// The years in which a certificate is valid.
pub(crate) const VALID: (i32, i32) = (2020, 4000);
/// Of one that is valid no more.
pub(crate) const EXPIRED: (i32, i32) = (2020, 2021);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        // Two authorities of one name are told apart by their keys alone, which is another error.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        params.distinguished_name.push(DnType::CommonName, format!("authority {number}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Writes `tls.crt`, `tls.key` and `ca.crt` as cert-manager mounts them, for a certificate of this authority that is
    /// valid in `years`; gives the flags.
    pub(crate) fn write(&self, directory: &str, years: (i32, i32)) -> Vec<String> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("names");
        (params.not_before, params.not_after) = (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        std::fs::create_dir_all(directory).expect("a directory");
        let files = [("tls.crt", certificate.pem()), ("tls.key", key.serialize_pem()), ("ca.crt", self.pem.clone())];
        for (name, text) in files {
            // By renaming, so that nobody reads half of a file.
            let (draft, path) = (Path::new(directory).join("draft"), Path::new(directory).join(name));
            std::fs::write(&draft, text).expect("written");
            let mode = if name == "tls.key" { 0o440 } else { 0o644 };
            std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(mode)).expect("our own");
            std::fs::rename(&draft, &path).expect("the same directory");
        }
        flags(directory)
    }
}

/// The flags for the files in `directory`.
pub(crate) fn flags(directory: &str) -> Vec<String> {
    let flag = |flag: &str, name: &str| [flag.to_owned(), format!("{directory}/{name}")];
    [flag("--tls-cert", "tls.crt"), flag("--tls-key", "tls.key"), flag("--tls-ca", "ca.crt")].concat()
}
