//! TLS for registries.

use std::sync::{Arc, OnceLock};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::hosts::Tls;

/// Why TLS settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM file.
    #[error("the file with the {0} is not valid PEM")]
    Pem(&'static str),
    /// The library refuses them.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// The configuration for a server.
pub fn config(tls: &Tls) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let builder = if tls.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        let mut roots = native_roots().clone();
        for pem in &tls.ca {
            for certificate in rustls_pemfile::certs(&mut pem.as_slice()) {
                roots.add(certificate.map_err(|_| Error::Pem("certificate authorities"))?)?;
            }
        }
        // Plain HTTP still works without any; a handshake says what is missing.
        builder.with_root_certificates(roots)
    };
    match tls.client.first() {
        None => Ok(builder.with_no_client_auth()),
        Some((certificates, key)) => {
            let certificates = rustls_pemfile::certs(&mut certificates.as_slice())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| Error::Pem("client certificate"))?;
            let key = rustls_pemfile::private_key(&mut key.as_slice())
                .ok()
                .flatten()
                .ok_or(Error::Pem("client key"))?;
            Ok(builder.with_client_auth_cert(certificates, key)?)
        }
    }
}

/// The node's authorities, read once.
fn native_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "some of the node's certificate authorities are not read");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        roots
    })
}

/// `skip_verify = true`: the operator's choice, for one server.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
