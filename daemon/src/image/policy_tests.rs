use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair},
};
use serde_json::json;

use super::*;
use crate::{
    error::chain,
    image::{
        Images,
        testing::{FakeRegistry, INDEX, MANIFEST, TestImage, digest},
        tests::{Node, base, layer},
    },
};

/// Who signs.
struct Signer {
    pair: EcdsaKeyPair,
    pem: String,
}

fn pem(prefix: &[u8], key: &[u8]) -> String {
    let der = [prefix, key].concat();
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
}

impl Signer {
    fn new() -> Self {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).unwrap();
        // SubjectPublicKeyInfo of any P-256 key begins so (RFC 5480).
        let prefix = hex::decode("3059301306072a8648ce3d020106082a8648ce3d030107034200").unwrap();
        let pem = pem(&prefix, pair.public_key().as_ref());
        Self { pair, pem }
    }

    /// As cosign signs `digest` for `name`.
    fn sign(&self, registry: &FakeRegistry, repository: &str, digest: &Digest, name: &str) {
        let payload = json!({"critical": {
            "identity": {"docker-reference": name},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        }, "optional": null});
        self.put(registry, repository, digest, &payload.to_string().into_bytes());
    }

    fn put(&self, registry: &FakeRegistry, repository: &str, of: &Digest, payload: &[u8]) {
        let signature = self.pair.sign(&SystemRandom::new(), payload).unwrap();
        let signature = base64::engine::general_purpose::STANDARD.encode(signature.as_ref());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(b"{}"), "size": 2},
            "layers": [{
                "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
                "digest": digest(payload), "size": payload.len(),
                "annotations": {"dev.cosignproject.cosign/signature": signature},
            }],
        });
        registry.put_blob(repository, payload);
        let tag = format!("sha256-{}.sig", of.hex());
        registry.put_manifest(repository, &tag, MANIFEST, manifest.to_string().as_bytes());
    }
}

async fn node_with(policy: serde_json::Value) -> Node {
    let node = Node::with(|config| {
        config.policy = Some(config.hosts_dir.with_file_name("policy.json"));
    })
    .await;
    node.write("policy.json", &policy.to_string());
    node
}

fn signed_by(pem: &str, identity: &str) -> serde_json::Value {
    let data = base64::engine::general_purpose::STANDARD.encode(pem);
    json!([{"type": "sigstoreSigned", "keyData": data, "signedIdentity": {"type": identity}}])
}

#[tokio::test]
async fn only_signed_images_are_used_and_nothing_is_unpacked_before() {
    let (signer, other) = (Signer::new(), Signer::new());
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base(), layer("one")]);
    let manifest = digest(&image.manifest);
    registry.put("a/b", "1", &image);
    let name = registry.reference("a/b:1");
    let repository = registry.reference("a/b");
    let node = node_with(json!({
        "default": [{"type": "reject"}],
        "transports": {"docker": {&repository: signed_by(&signer.pem, "matchRepository")}},
    }))
    .await;
    let blob = digest(&image.layers[0]).hex();
    let refused = async |part: &str| {
        let kind = node.refuses(&name, part).await;
        assert_eq!(kind, Kind::Precondition);
        assert!(!registry.log().iter().any(|line| line.contains(&blob)), "a layer was asked for");
    };
    refused("it has no signature").await;
    other.sign(&registry, "a/b", &manifest, &repository);
    refused("none of the keys").await;
    signer.sign(&registry, "a/b", &manifest, "elsewhere.example/a/b");
    refused("for the name \"elsewhere.example/a/b\"").await;
    let payload = json!({"critical": {
        "identity": {"docker-reference": repository},
        "image": {"docker-manifest-digest": digest(b"another")},
        "type": "cosign container image signature",
    }});
    signer.put(&registry, "a/b", &manifest, &payload.to_string().into_bytes());
    refused("the signature is for sha256:").await;
    signer.put(&registry, "a/b", &manifest, b"{\"critical\": 1}");
    refused("no document of cosign").await;
    let payload = payload.to_string().replace("cosign container", "some other");
    signer.put(&registry, "a/b", &manifest, payload.as_bytes());
    refused("what was signed is a").await;

    signer.sign(&registry, "a/b", &manifest, &repository);
    assert_eq!(node.pull(&name).await.unwrap().id, image.id());
    // One that is here is judged by the policy of now.
    node.pull(&name).await.unwrap();
    node.write(
        "policy.json",
        &json!({"default": signed_by(&other.pem, "matchRepository")}).to_string(),
    );
    let error = chain(&node.pull(&name).await.unwrap_err());
    assert!(error.contains("none of the keys") && error.contains("\"default\""), "{error}");
    // Other images: nothing is asked for.
    node.write("policy.json", &json!({"default": [{"type": "reject"}]}).to_string());
    registry.forget_log();
    assert_eq!(node.refuses(&registry.reference("c:1"), "rejects it").await, Kind::Precondition);
    assert!(registry.log().is_empty(), "{:?}", registry.log());
}

#[tokio::test]
async fn a_signature_of_the_index_is_one_of_its_images() {
    let signer = Signer::new();
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base()]);
    registry.put("a", "unused", &image);
    let platform = crate::image::manifest::Platform::node();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{
        "mediaType": MANIFEST, "digest": digest(&image.manifest), "size": image.manifest.len(),
        "platform": {"os": platform.os, "architecture": platform.architecture},
    }]})
    .to_string();
    registry.put_manifest("a", "1", INDEX, index.as_bytes());
    let node = node_with(json!({"default": signed_by(&signer.pem, "matchRepository")})).await;
    let name = registry.reference("a:1");
    node.refuses(&name, "no signature").await;
    signer.sign(&registry, "a", &digest(index.as_bytes()), &registry.reference("a"));
    node.pull(&name).await.unwrap();
}

#[tokio::test]
async fn archives_have_no_signatures() {
    let image = TestImage::new(&[base()]);
    let node = node_with(json!({
        "default": [{"type": "insecureAcceptAnything"}],
        "transports": {"oci-archive": {"": signed_by(&Signer::new().pem, "matchRepository")}},
    }))
    .await;
    let import = async |images: &Images| {
        let archive = image.oci_archive("r.example/a:1");
        images.import(std::io::Cursor::new(archive), None).await.map(|images| images.len())
    };
    let error = chain(&import(&node.images).await.unwrap_err());
    assert!(error.contains("an archive has no signatures"), "{error}");
    node.write("policy.json", r#"{"default": [{"type": "insecureAcceptAnything"}]}"#);
    assert_eq!(import(&node.images).await.unwrap(), 1);
}

#[test]
fn the_nearest_scope_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.json");
    let accept = json!([{"type": "insecureAcceptAnything"}]);
    let text = json!({"default": [{"type": "reject"}], "transports": {"docker": {
        "r.example/a/b:1": accept, "r.example/a/b": accept, "r.example/a": accept,
        "r.example": accept, "*.sub.example": accept, "*.example": accept,
    }, "oci-archive": {"": accept}}});
    std::fs::write(&path, text.to_string()).unwrap();
    let scope = |name: &str| {
        let name = name.parse().unwrap();
        judge(Some(&path), Transport::Registry, Some(&name)).unwrap().scope
    };
    for (name, want) in [
        ("r.example/a/b:1", "docker:r.example/a/b:1"),
        ("r.example/a/b:2", "docker:r.example/a/b"),
        ("r.example/a/bc", "docker:r.example/a"),
        ("r.example/c", "docker:r.example"),
        ("x.sub.example/c", "docker:*.sub.example"),
        ("x.y.sub.example/c", "docker:*.sub.example"),
        ("sub.example/c", "docker:*.example"),
        ("other.org/c", "default"),
    ] {
        assert_eq!(scope(name), want, "{name}");
    }
    assert_eq!(judge(Some(&path), Transport::OciArchive, None).unwrap().scope, "oci-archive:");
    assert_eq!(judge(Some(&path), Transport::DockerArchive, None).unwrap().scope, "default");
    assert!(judge(None, Transport::Registry, None).unwrap().reject("x").is_ok());
}

#[test]
fn what_cannot_be_checked_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.json");
    let key = base64::engine::general_purpose::STANDARD.encode(Signer::new().pem);
    let junk = base64::engine::general_purpose::STANDARD.encode("junk");
    for (default, part) in [
        (json!([]), "no requirement"),
        (json!([{"type": "signedBy", "keyType": "GPGKeys"}]), "sigstoreSigned"),
        (json!([{"type": "sigstoreSigned"}]), "exactly one of"),
        (json!([{"type": "sigstoreSigned", "keyData": key, "keyPath": "/x"}]), "exactly one of"),
        (json!([{"type": "sigstoreSigned", "keyData": key, "rekorPublicKeyPath": "/x"}]), "rekor"),
        (json!([{"type": "sigstoreSigned", "fulcio": {}}]), "fulcio"),
        (json!([{"type": "sigstoreSigned", "keyData": "%"}]), "base64"),
        (json!([{"type": "sigstoreSigned", "keyData": junk}]), "PEM"),
        (json!([{"type": "sigstoreSigned", "keyPath": "/nowhere/key.pub"}]), "/nowhere/key.pub"),
        (json!([{"type": "sigstoreSigned", "keyData": key, "more": 1}]), "more"),
        (
            json!([{"type": "sigstoreSigned", "keyData": key, "signedIdentity": {"type": "any"}}]),
            "any",
        ),
        (json!([{"type": "accept"}]), "\"accept\""),
        (json!([{"type": "reject", "more": 1}]), "no other keys"),
    ] {
        std::fs::write(&path, json!({"default": default}).to_string()).unwrap();
        let error = judge(Some(&path), Transport::Registry, None).expect_err(part);
        let text = chain(&error);
        assert!(text.contains(part), "{part}: {text}");
        assert_eq!(error.kind(), Kind::Precondition);
    }
    std::fs::write(&path, "{").unwrap();
    assert!(judge(Some(&path), Transport::Registry, None).is_err());
    assert!(judge(Some(&dir.path().join("missing")), Transport::Registry, None).is_err());
    // A mistake in a scope of another image.
    let text = json!({"default": [{"type": "reject"}], "transports": {"docker": {"x": []}}});
    std::fs::write(&path, text.to_string()).unwrap();
    assert!(judge(Some(&path), Transport::OciArchive, None).is_err());
}

#[test]
fn names_are_matched_as_the_policy_says() {
    let digest = format!("sha256:{}", "a".repeat(64));
    let by_digest = format!("r.example/a@{digest}");
    let identity = |text: serde_json::Value| serde_json::from_value::<Identity>(text).unwrap();
    for (rule, name, signed, want) in [
        (json!({"type": "matchExact"}), "r.example/a:1", "r.example/a:1", true),
        (json!({"type": "matchExact"}), "r.example/a:1", "r.example/a", false),
        (json!({"type": "matchExact"}), "r.example/a:latest", "r.example/a", false),
        (json!({"type": "matchExact"}), &by_digest, &by_digest, false),
        (json!({"type": "matchRepoDigestOrExact"}), "r.example/a:1", "r.example/a:1", true),
        (json!({"type": "matchRepoDigestOrExact"}), "r.example/a:1", "r.example/a:2", false),
        (json!({"type": "matchRepoDigestOrExact"}), &by_digest, "r.example/a:2", true),
        (json!({"type": "matchRepository"}), "r.example/a:1", "r.example/a", true),
        (json!({"type": "matchRepository"}), "r.example/a:1", "r.example/ab", false),
        (json!({"type": "matchRepository"}), "busybox", "docker.io/library/busybox", true),
        (json!({"type": "matchRepository"}), "r.example/a:1", "not a name", false),
        (
            json!({"type": "exactReference", "dockerReference": "r.example/b:1"}),
            "r.example/a:1",
            "r.example/b:1",
            true,
        ),
        (
            json!({"type": "exactRepository", "dockerRepository": "r.example/b"}),
            "r.example/a:1",
            "r.example/b",
            true,
        ),
        (
            json!({"type": "remapIdentity", "prefix": "mirror.example/x", "signedPrefix": "r.example"}),
            "mirror.example/x/a:1",
            "r.example/a:1",
            true,
        ),
        (
            json!({"type": "remapIdentity", "prefix": "mirror.example", "signedPrefix": "r.example"}),
            "other.example/a:1",
            "other.example/a:1",
            true,
        ),
    ] {
        let name = name.parse().unwrap();
        assert_eq!(identity(rule.clone()).matches(&name, signed), want, "{rule} {name} {signed}");
    }
}

#[test]
fn keys_of_each_kind_are_read() {
    // Ed25519 signs and verifies; the others are only told apart, by what openssl writes.
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
    let prefix = hex::decode("302a300506032b6570032100").unwrap();
    let key = Key::parse(pem(&prefix, pair.public_key().as_ref()).as_bytes()).unwrap();
    assert!(key.signed(b"text", pair.sign(b"text").as_ref()));
    assert!(!key.signed(b"texts", pair.sign(b"text").as_ref()));
    for arguments in [
        &["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"][..],
        &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
        &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| {
            let done = std::process::Command::new("openssl")
                .args(arguments)
                .current_dir(dir.path())
                .output()
                .unwrap();
            assert!(done.status.success(), "{arguments:?}");
        };
        run(&[arguments, &["-out", "key"]].concat());
        run(&["pkey", "-in", "key", "-pubout", "-out", "pub"]);
        std::fs::write(dir.path().join("text"), "some text").unwrap();
        run(&["dgst", "-sha256", "-sign", "key", "-out", "sig", "text"]);
        let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        let key = Key::parse(&read("pub")).unwrap();
        assert!(key.signed(b"some text", &read("sig")), "{arguments:?}");
        assert!(!key.signed(b"some texts", &read("sig")));
        assert!(Key::parse(&read("key")).is_err(), "a private key is no public one");
    }
}
