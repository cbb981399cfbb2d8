//! Certificates of a registry and of its clients.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Who signed a registry's certificate.
#[derive(Debug, Clone, Copy)]
pub enum Signed {
    Authority,
    /// It expired a day ago.
    AuthorityLongAgo,
    /// As many registries of one machine do, as an authority.
    Itself,
    /// It expired a day ago.
    ItselfLongAgo,
}

/// Makes in `directory` a registry's certificate `cert.pem` with `key.pem`, the `ca.pem` that vouches for it,
/// a client's certificate `client.cert` with `client.key` (and `client.pem`, both in one), and `htpasswd` with user:secret.
pub fn make_certificates(directory: &Path, signed: Signed) {
    let write = |name: &str, text: &str| fs::write(directory.join(name), text).unwrap();
    let authority_key = KeyPair::generate().unwrap();
    let authority = as_authority(params("authority"));
    let vouching = authority.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(authority, authority_key);

    let key = KeyPair::generate().unwrap();
    let mut registry = params("registry");
    if matches!(signed, Signed::AuthorityLongAgo | Signed::ItselfLongAgo) {
        let now = SystemTime::now();
        registry.not_before = (now - 3 * DAY).into();
        registry.not_after = (now - DAY).into();
    }
    let (certificate, vouching): (Certificate, Certificate) = match signed {
        Signed::Authority | Signed::AuthorityLongAgo => {
            (registry.signed_by(&key, &issuer).unwrap(), vouching)
        }
        Signed::Itself | Signed::ItselfLongAgo => {
            let it = as_authority(registry).self_signed(&key).unwrap();
            (it.clone(), it)
        }
    };
    write("cert.pem", &certificate.pem());
    write("key.pem", &key.serialize_pem());
    write("ca.pem", &vouching.pem());

    let key = KeyPair::generate().unwrap();
    let client = params("node").signed_by(&key, &issuer).unwrap();
    let (client, key) = (client.pem(), key.serialize_pem());
    write("client.cert", &client);
    write("client.key", &key);
    write("client.pem", &(client + &key));
    let line = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
    write("htpasswd", line);
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn as_authority(mut params: CertificateParams) -> CertificateParams {
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}
