//! containers-policy.json(5): which images may be used on this node, and who must have signed them.
//!
//! An image is judged before any of its layers is unpacked, also if it is here already. What this
//! file asks for and we cannot do (GPG, keyless signatures) is an error, never left out.
//!
//! Signatures are those of cosign, next to the image in its registry: the tag `sha256-<hex>.sig` is
//! a manifest whose layers are "simple signing" documents, each with a signature in an annotation
//! (sigstore/cosign specs/SIGNATURE_SPEC.md). A signature is for one digest, that of the index or
//! of the manifest; the index names the manifest by its digest, so either will do.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use base64::Engine as _;
use ring::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use serde::Deserialize;

use super::{
    reference::{Object, Reference},
    registry::{self, Remote},
};
use crate::{
    error::{Kind, Kinded},
    id::Digest,
};

/// Largest signed document, in bytes.
const MAX_PAYLOAD: u64 = 1 << 20;

/// Most signatures of an image that are looked at.
const MAX_SIGNATURES: usize = 50;

/// Why an image may not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The policy, or a key that it names, cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no policy.
    #[error("{path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Something in it means nothing, or more than we can do.
    #[error("{path}: {what}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which part and why.
        what: String,
    },
    /// The policy says no.
    #[error("{name} may not be used: {why} (scope {scope:?} of {path})")]
    Refused {
        /// The image.
        name: String,
        /// What is missing.
        why: String,
        /// Which part of the policy.
        scope: String,
        /// The policy.
        path: PathBuf,
    },
    /// The signatures cannot be got.
    #[error("get the signatures of {name}")]
    Signatures {
        /// The image.
        name: String,
        /// Why.
        source: registry::Error,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            // Not `Denied`: other credentials would not help.
            Error::Read { .. }
            | Error::Parse { .. }
            | Error::Value { .. }
            | Error::Refused { .. } => Kind::Precondition,
            Error::Signatures { source, .. } => source.kind(),
        }
    }
}

/// Where an image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A registry.
    Registry,
    /// An archive with an OCI layout.
    OciArchive,
    /// What `docker save` writes.
    DockerArchive,
}

impl Transport {
    /// What containers-policy.json calls it.
    fn name(self) -> &'static str {
        match self {
            Transport::Registry => "docker",
            Transport::OciArchive => "oci-archive",
            Transport::DockerArchive => "docker-archive",
        }
    }
}

/// What is asked of one image.
#[derive(Debug)]
pub struct Judge {
    requirements: Vec<Requirement>,
    scope: String,
    path: PathBuf,
}

#[derive(Debug)]
enum Requirement {
    Accept,
    Reject,
    Signed { keys: Vec<Key>, identity: Identity },
}

#[derive(Debug)]
struct Key {
    algorithm: &'static dyn VerificationAlgorithm,
    bytes: Vec<u8>,
}

/// Which name a signature must be for.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", deny_unknown_fields)]
enum Identity {
    #[serde(rename = "matchExact")]
    Exact {},
    #[serde(rename = "matchRepoDigestOrExact")]
    RepoDigestOrExact {},
    #[serde(rename = "matchRepository")]
    Repository {},
    #[serde(rename = "exactReference", rename_all = "camelCase")]
    ExactReference { docker_reference: String },
    #[serde(rename = "exactRepository", rename_all = "camelCase")]
    ExactRepository { docker_repository: String },
    #[serde(rename = "remapIdentity", rename_all = "camelCase")]
    Remap { prefix: String, signed_prefix: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default: Vec<serde_json::Value>,
    #[serde(default)]
    transports: BTreeMap<String, BTreeMap<String, Vec<serde_json::Value>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Signed {
    #[serde(rename = "type")]
    _type: String,
    key_path: Option<String>,
    key_paths: Option<Vec<String>>,
    key_data: Option<String>,
    key_datas: Option<Vec<String>>,
    signed_identity: Option<Identity>,
}

/// What the policy at `path` asks of an image; without a policy nothing. `name` is what it is called;
/// an image of an archive may have no name. Reads small files.
pub fn judge(
    path: Option<&Path>,
    transport: Transport,
    name: Option<&Reference>,
) -> Result<Judge, Error> {
    let Some(path) = path else {
        return Ok(Judge {
            requirements: vec![Requirement::Accept],
            scope: String::new(),
            path: PathBuf::new(),
        });
    };
    let text =
        std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let file: File = serde_json::from_slice(&text)
        .map_err(|source| Error::Parse { path: path.to_owned(), source })?;
    // All of it is checked, so that a mistake does not wait for the image that it is about.
    let scopes = file.transports.iter().flat_map(|(transport, scopes)| {
        scopes.iter().map(move |(scope, list)| (format!("{transport}:{scope}"), list))
    });
    for (scope, list) in scopes.chain([("default".to_owned(), &file.default)]) {
        parse_all(path, &scope, list)?;
    }
    let (scope, list) = file
        .transports
        .get(transport.name())
        .and_then(|scopes| best(scopes, transport, name))
        .map(|(scope, list)| (format!("{}:{scope}", transport.name()), list))
        .unwrap_or_else(|| ("default".to_owned(), &file.default));
    let requirements = parse_all(path, &scope, list)?;
    Ok(Judge { requirements, scope, path: path.to_owned() })
}

/// The scope that is nearest to an image: its full name, its repository, each namespace, the registry,
/// wildcards of the registry's domains, all.
fn best<'a, T>(
    scopes: &'a BTreeMap<String, T>,
    transport: Transport,
    name: Option<&Reference>,
) -> Option<(&'a str, &'a T)> {
    let mut wanted = Vec::new();
    if let (Transport::Registry, Some(name)) = (transport, name) {
        wanted.push(name.to_string());
        let mut scope = name.name();
        loop {
            wanted.push(scope.clone());
            match scope.rfind('/') {
                Some(at) => scope.truncate(at),
                None => break,
            }
        }
        let mut domain = name.registry();
        while let Some((_, above)) = domain.split_once('.') {
            wanted.push(format!("*.{above}"));
            domain = above;
        }
    }
    wanted.push(String::new());
    wanted.iter().find_map(|scope| scopes.get_key_value(scope)).map(|(k, v)| (k.as_str(), v))
}

fn parse_all(
    path: &Path,
    scope: &str,
    list: &[serde_json::Value],
) -> Result<Vec<Requirement>, Error> {
    if list.is_empty() {
        let what =
            format!("scope {scope:?} has no requirement: write insecureAcceptAnything or reject");
        return Err(Error::Value { path: path.to_owned(), what });
    }
    list.iter().map(|value| parse(path, scope, value)).collect()
}

fn parse(path: &Path, scope: &str, value: &serde_json::Value) -> Result<Requirement, Error> {
    let bad = |what: String| Error::Value {
        path: path.to_owned(),
        what: format!("scope {scope:?}: {what}"),
    };
    let object = value.as_object().ok_or_else(|| bad("a requirement is no object".to_owned()))?;
    let kind = object.get("type").and_then(|kind| kind.as_str()).unwrap_or_default();
    match kind {
        "insecureAcceptAnything" | "reject" if object.len() > 1 => {
            Err(bad(format!("{kind} has no other keys")))
        }
        "insecureAcceptAnything" => Ok(Requirement::Accept),
        "reject" => Ok(Requirement::Reject),
        "sigstoreSigned" => {
            for key in object.keys() {
                if key == "fulcio" || key == "pki" || key.starts_with("rekor") {
                    return Err(bad(format!(
                        "sigstoreSigned with {key} is not supported: only keys are (keyPath, keyData)"
                    )));
                }
            }
            let signed: Signed =
                serde_json::from_value(value.clone()).map_err(|e| bad(e.to_string()))?;
            let given = [
                signed.key_path.is_some(),
                signed.key_paths.is_some(),
                signed.key_data.is_some(),
                signed.key_datas.is_some(),
            ];
            if given.iter().filter(|given| **given).count() != 1 {
                return Err(bad(
                    "sigstoreSigned needs exactly one of keyPath, keyPaths, keyData, keyDatas"
                        .to_owned(),
                ));
            }
            let mut pems = Vec::new();
            for file in signed.key_path.into_iter().chain(signed.key_paths.into_iter().flatten()) {
                let file = PathBuf::from(file);
                let pem = std::fs::read(&file)
                    .map_err(|source| Error::Read { path: file.clone(), source })?;
                pems.push((file.display().to_string(), pem));
            }
            for data in signed.key_data.into_iter().chain(signed.key_datas.into_iter().flatten()) {
                let pem = base64::engine::general_purpose::STANDARD
                    .decode(data.trim())
                    .map_err(|_| bad("keyData is not base64".to_owned()))?;
                pems.push(("keyData".to_owned(), pem));
            }
            let keys = pems
                .iter()
                .map(|(from, pem)| Key::parse(pem).map_err(|what| bad(format!("{from} {what}"))))
                .collect::<Result<Vec<_>, _>>()?;
            if keys.is_empty() {
                return Err(bad("sigstoreSigned has no key".to_owned()));
            }
            let identity = signed.signed_identity.unwrap_or(Identity::RepoDigestOrExact {});
            for text in identity.texts() {
                text.parse::<Reference>().map_err(|e| bad(format!("signedIdentity: {e}")))?;
            }
            Ok(Requirement::Signed { keys, identity })
        }
        "signedBy" => {
            Err(bad("signedBy (GPG) is not supported: sign with cosign and use sigstoreSigned"
                .to_owned()))
        }
        other => Err(bad(format!("{other:?} is no type of requirement"))),
    }
}

impl Key {
    /// A public key in PEM ("PUBLIC KEY", RFC 5280 SubjectPublicKeyInfo).
    fn parse(pem: &[u8]) -> Result<Self, &'static str> {
        const RULE: &str = "is no public key in PEM (\"BEGIN PUBLIC KEY\")";
        let mut found = None;
        for item in rustls_pemfile::read_all(&mut &*pem) {
            match item.map_err(|_| RULE)? {
                rustls_pemfile::Item::SubjectPublicKeyInfo(der) if found.is_none() => {
                    found = Some(der);
                }
                _ => return Err("must have one public key and nothing else"),
            }
        }
        let der = found.ok_or(RULE)?;
        let (algorithm, bytes) = spki(&der).ok_or(RULE)?;
        // Object identifiers, and for elliptic curves that of the curve.
        const EC: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
        const P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
        const P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
        const RSA: &[u8] =
            &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
        const ED25519: &[u8] = &[0x06, 0x03, 0x2b, 0x65, 0x70];
        // cosign hashes with SHA-256 whatever the curve.
        let algorithm: &'static dyn VerificationAlgorithm = match algorithm {
            a if a == [EC, P256].concat() => &signature::ECDSA_P256_SHA256_ASN1,
            a if a == [EC, P384].concat() => &signature::ECDSA_P384_SHA256_ASN1,
            a if a == RSA => &signature::RSA_PKCS1_2048_8192_SHA256,
            a if a == ED25519 => &signature::ED25519,
            _ => {
                return Err(
                    "is of a kind that is not supported: P-256, P-384, RSA and Ed25519 are",
                );
            }
        };
        Ok(Self { algorithm, bytes: bytes.to_owned() })
    }

    fn signed(&self, payload: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.algorithm, &self.bytes).verify(payload, signature).is_ok()
    }
}

/// Algorithm and key of a SubjectPublicKeyInfo: SEQUENCE { SEQUENCE { … }, BIT STRING }.
fn spki(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (content, rest) = element(der, 0x30)?;
    let (algorithm, bits) = element(content, 0x30)?;
    let (bits, after) = element(bits, 0x03)?;
    // No bits of the last byte are unused: a key is whole bytes.
    let (unused, key) = bits.split_first()?;
    (rest.is_empty() && after.is_empty() && *unused == 0).then_some((algorithm, key))
}

/// The content of a DER element of this tag, and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = der.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match *length {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        _ => return None,
    };
    (*first == tag && rest.len() >= length).then(|| rest.split_at(length))
}

impl Identity {
    fn texts(&self) -> Vec<&String> {
        match self {
            Identity::ExactReference { docker_reference } => vec![docker_reference],
            Identity::ExactRepository { docker_repository } => vec![docker_repository],
            _ => Vec::new(),
        }
    }

    /// Whether a signature for `signed` is one for `name`.
    fn matches(&self, name: &Reference, signed: &str) -> bool {
        let Ok(parsed) = signed.parse::<Reference>() else { return false };
        // A name without a tag is a repository, and not its tag "latest".
        let tagged = parsed.to_string() == full(signed);
        let same = |other: &Reference| tagged && parsed == *other;
        let digest_or_exact = |name: &Reference| match name.object() {
            Object::Digest(_) => parsed.name() == name.name(),
            Object::Tag(_) => same(name),
        };
        match self {
            Identity::Exact {} => matches!(name.object(), Object::Tag(_)) && same(name),
            Identity::RepoDigestOrExact {} => digest_or_exact(name),
            Identity::Repository {} => parsed.name() == name.name(),
            Identity::ExactReference { docker_reference } => {
                docker_reference.parse().is_ok_and(|want| same(&want))
            }
            Identity::ExactRepository { docker_repository } => docker_repository
                .parse::<Reference>()
                .is_ok_and(|want| parsed.name() == want.name()),
            Identity::Remap { prefix, signed_prefix } => {
                let text = name.to_string();
                match text.strip_prefix(prefix.as_str()) {
                    Some(rest) if rest.is_empty() || rest.starts_with(['/', ':', '@']) => {
                        format!("{signed_prefix}{rest}")
                            .parse()
                            .is_ok_and(|mapped: Reference| digest_or_exact(&mapped))
                    }
                    _ => digest_or_exact(name),
                }
            }
        }
    }
}

/// The normal form of a name that has a tag or a digest; else something that is none.
fn full(text: &str) -> String {
    let after = text.rsplit('/').next().unwrap_or(text);
    match after.contains([':', '@']) {
        true => text.parse::<Reference>().map(|r| r.to_string()).unwrap_or_default(),
        false => String::new(),
    }
}

impl Judge {
    fn refused(&self, name: &str, why: String) -> Error {
        Error::Refused {
            name: name.to_owned(),
            why,
            scope: self.scope.clone(),
            path: self.path.clone(),
        }
    }

    /// Whether it says no whatever the image is: nothing need be asked for then.
    pub fn reject(&self, name: &str) -> Result<(), Error> {
        match self.requirements.iter().any(|r| matches!(r, Requirement::Reject)) {
            true => Err(self.refused(name, "the policy rejects it".to_owned())),
            false => Ok(()),
        }
    }

    /// An image of an archive, which can have no signature with it.
    pub fn archived(&self, name: &str) -> Result<(), Error> {
        self.reject(name)?;
        match self.requirements.iter().any(|r| matches!(r, Requirement::Signed { .. })) {
            true => Err(self
                .refused(name, "it must be signed, and an archive has no signatures".to_owned())),
            false => Ok(()),
        }
    }

    /// An image of a registry, by the digests that stand for it there.
    pub async fn pulled(
        &self,
        remote: &Remote,
        name: &Reference,
        digests: &[&Digest],
    ) -> Result<(), Error> {
        self.reject(&name.to_string())?;
        if !self.requirements.iter().any(|r| matches!(r, Requirement::Signed { .. })) {
            return Ok(());
        }
        let mut found = Vec::new();
        for digest in digests {
            let signatures = signatures(remote, digest).await;
            let signatures = signatures
                .map_err(|source| Error::Signatures { name: name.to_string(), source })?;
            found.extend(signatures.into_iter().map(|signature| (*digest, signature)));
        }
        for requirement in &self.requirements {
            let Requirement::Signed { keys, identity } = requirement else { continue };
            let mut why = "it has no signature".to_owned();
            let good = found.iter().any(|(digest, signature)| {
                match signature.check(keys, identity, name, digest) {
                    Ok(()) => true,
                    Err(reason) => {
                        why = reason;
                        false
                    }
                }
            });
            if !good {
                return Err(self.refused(&name.to_string(), why));
            }
        }
        Ok(())
    }
}

/// A signed document with one signature.
struct Signature {
    payload: Vec<u8>,
    signature: Vec<u8>,
}

impl Signature {
    fn check(
        &self,
        keys: &[Key],
        identity: &Identity,
        name: &Reference,
        digest: &Digest,
    ) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Payload {
            critical: Critical,
        }
        #[derive(Deserialize)]
        struct Critical {
            #[serde(rename = "type")]
            kind: String,
            image: Image,
            identity: Signer,
        }
        #[derive(Deserialize)]
        struct Image {
            #[serde(rename = "docker-manifest-digest")]
            digest: String,
        }
        #[derive(Deserialize)]
        struct Signer {
            #[serde(rename = "docker-reference")]
            reference: String,
        }
        // Nothing in it is believed before this.
        if !keys.iter().any(|key| key.signed(&self.payload, &self.signature)) {
            return Err("its signatures are of none of the keys".to_owned());
        }
        let payload: Payload = serde_json::from_slice(&self.payload)
            .map_err(|_| "what was signed is no document of cosign".to_owned())?;
        let critical = payload.critical;
        if critical.kind != "cosign container image signature" {
            return Err(format!("what was signed is a {:?}", critical.kind));
        }
        if critical.image.digest != digest.to_string() {
            return Err(format!("the signature is for {}", critical.image.digest));
        }
        if !identity.matches(name, &critical.identity.reference) {
            return Err(format!("the signature is for the name {:?}", critical.identity.reference));
        }
        Ok(())
    }
}

/// What was signed of a digest; nothing, if its registry has no signatures of it.
async fn signatures(remote: &Remote, digest: &Digest) -> Result<Vec<Signature>, registry::Error> {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        layers: Vec<Layer>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Layer {
        media_type: String,
        digest: Digest,
        size: u64,
        #[serde(default)]
        annotations: BTreeMap<String, String>,
    }
    let tag = Object::Tag(format!("sha256-{}.sig", digest.hex()));
    let document = match remote.manifest(&tag).await {
        Ok(document) => document,
        Err(error) if error.is_absence() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    // One that is no such manifest has no signatures.
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&document.bytes) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for layer in manifest.layers.into_iter().take(MAX_SIGNATURES) {
        let signature = layer.annotations.get("dev.cosignproject.cosign/signature");
        let signature =
            signature.and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok());
        let simple = layer.media_type == "application/vnd.dev.cosign.simplesigning.v1+json";
        if let (true, Some(signature)) = (simple && layer.size <= MAX_PAYLOAD, signature) {
            let payload = remote.small_blob(&layer.digest, layer.size).await?.to_vec();
            found.push(Signature { payload, signature });
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
