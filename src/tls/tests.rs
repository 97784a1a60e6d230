//! What is refused of the files, rotation, and certificates for tests of other modules.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::*;

/// Writes a new authority's certificate and a certificate that it signed, valid for `localhost` and 127.0.0.1.
pub(crate) fn write_certificates(directory: &Path) -> TlsFiles {
    let mut authority = rcgen::CertificateParams::new(Vec::new()).expect("no names");
    let name = format!("authority of {}", directory.display());
    authority.distinguished_name.push(rcgen::DnType::CommonName, name);
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().expect("a key");
    let ca = authority.self_signed(&authority_key).expect("signed");
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let key = rcgen::KeyPair::generate().expect("a key");
    let cert = rcgen::CertificateParams::new(names).expect("names").signed_by(&key, &issuer).expect("signed");
    let path = |name: &str| directory.join(name);
    write(&path("tls.crt"), &cert.pem(), 0o644);
    write(&path("tls.key"), &key.serialize_pem(), 0o440);
    write(&path("ca.crt"), &ca.pem(), 0o644);
    TlsFiles { cert: path("tls.crt"), key: path("tls.key"), ca: path("ca.crt"), server_name: None }
}

#[expect(clippy::disallowed_methods, reason = "files of a test")]
fn write(path: &Path, text: &str, mode: u32) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("our own");
}

fn refusal(change: impl FnOnce(&TlsFiles)) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let files = write_certificates(directory.path());
    change(&files);
    Tls::open(files).expect_err("changed").to_string()
}

#[test]
fn what_is_wrong_with_the_files_is_said() {
    let found = refusal(|files| write(&files.cert, "nothing", 0o644));
    assert!(found.contains("tls.crt: expected a certificate in PEM, found none"), "{found}");
    let found = refusal(|files| write(&files.key, "nothing", 0o400));
    assert!(found.contains("tls.key: expected a private key in PEM"), "{found}");
    let found = refusal(|files| write(&files.ca, "", 0o644));
    assert!(found.contains("ca.crt: expected a certificate in PEM, found none"), "{found}");
    let other = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    let found = refusal(|files| write(&files.key, &other, 0o400));
    assert!(found.contains("tls.crt: keys may not be consistent"), "{found}");
    let found = refusal(|files| std::fs::remove_file(&files.ca).expect("there"));
    assert!(found.contains("ca.crt"), "{found}");
}

/// Kubernetes mounts a secret's files for a group, with mode 440; others must not read the key.
#[test]
fn a_key_that_others_can_read_is_refused_with_its_mode() {
    for (mode, is_fine) in [(0o400, true), (0o440, true), (0o600, true), (0o640, true), (0o644, false), (0o660, false)]
    {
        let directory = tempfile::tempdir().expect("a directory");
        let files = write_certificates(directory.path());
        std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(mode)).expect("our own");
        match Tls::open(files) {
            Ok(_) => assert!(is_fine, "{mode:o}"),
            Err(error) => {
                let expected = format!("found {mode:o}");
                assert!(!is_fine && error.to_string().contains(&expected), "{mode:o}: {error}");
            }
        }
    }
}

#[test]
fn rotated_files_are_read_and_broken_ones_change_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let tls = Tls::open(write_certificates(directory.path())).expect("good files");
    let first = tls.configs();
    tls.refresh().expect("unchanged");
    assert!(Arc::ptr_eq(&first, &tls.configs()), "nothing has changed");
    write_certificates(directory.path());
    tls.refresh().expect("good files");
    let second = tls.configs();
    assert!(!Arc::ptr_eq(&first, &second));
    write(&tls.files().cert, "half a certif", 0o644);
    assert!(tls.refresh().is_err());
    assert!(Arc::ptr_eq(&second, &tls.configs()));
}
