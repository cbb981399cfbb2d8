//! Authorities of the administrator's own, besides the system's.
//!
//! A certificate that signs itself and is named as its own authority is what many registries of
//! one machine have. Go's TLS takes it, rustls does not (it refuses any authority as a server), so
//! such a certificate is compared byte by byte here.

use std::error::Error;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, SignatureScheme};

use super::hosts::Tls;

/// A client configuration that trusts the system's authorities and those of `tls`; the error is
/// for a message.
pub(super) fn client_config(tls: &Tls) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let mut named = Vec::new();
    for pem in &tls.authorities {
        for certificate in CertificateDer::pem_slice_iter(pem) {
            named.push(certificate.map_err(|e| format!("read ca: {e}"))?);
        }
    }
    let usual = rustls_platform_verifier::Verifier::new_with_extra_roots(
        named.clone(),
        Arc::clone(&provider),
    )
    .map_err(|e| format!("use ca: {e}"))?;
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier {
            usual,
            named,
            provider,
        }));
    let Some(pem) = &tls.client else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| format!("read client certificate: {e}"))?;
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|e| format!("read client key: {e}"))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|e| format!("use client certificate: {e}"))
}

/// Why the server's certificate was not believed, and what mends that, if this or what caused it is that it was not.
pub(super) fn distrust(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(rustls::Error::InvalidCertificate(why)) = error.downcast_ref() {
            return Some(in_words(why));
        }
        // An error that an I/O error holds, which may be another one, is not its source.
        let held = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        next = match held {
            Some(held) => Some(held),
            None => error.source(),
        };
    }
    None
}

fn is_of_time(error: &rustls::Error) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(
        error,
        rustls::Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }
        )
    )
}

fn in_words(why: &CertificateError) -> String {
    const DAY: u64 = 24 * 60 * 60;
    match why {
        CertificateError::ExpiredContext { time, not_after } => {
            let days = time.as_secs().saturating_sub(not_after.as_secs()) / DAY;
            let s = if days == 1 { "" } else { "s" };
            format!(
                "it expired {days} day{s} ago; have it renewed, or set this machine's clock right"
            )
        }
        // One that ends before it begins.
        CertificateError::Expired => {
            "it was never valid: it ends before it begins; have it made anew".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; set this machine's clock right, or have it made anew".into()
        }
        CertificateError::Other(OtherError(other)) if is_authority(&**other) => {
            "it is an authority's own, as those that sign themselves are; name it as `ca` in hosts.toml"
                .into()
        }
        CertificateError::UnknownIssuer => {
            "nobody whom this machine knows signed it; name its authority as `ca` in hosts.toml"
                .into()
        }
        why => why.to_string(),
    }
}

/// Whether what is wrong with a certificate is that it is an authority's, not a server's.
fn is_authority(error: &(dyn Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
}

#[derive(Debug)]
struct Verifier {
    usual: rustls_platform_verifier::Verifier,
    /// What the administrator named.
    named: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let usual = &self.usual;
        let result =
            usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        // The time is looked at before anything else, and counts for what was named too.
        if let Err(error) = &result
            && !is_of_time(error)
            && self.named.iter().any(|named| named == end_entity)
        {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            return Ok(ServerCertVerified::assertion());
        }
        result
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
