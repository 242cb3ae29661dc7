//! Indexes, manifests and image configs: what we read of them (image-spec v1.1, and Docker's
//! "Image Manifest Version 2, Schema 2"). Pure.

use std::fmt;

use serde::Deserialize;

use crate::{
    id::Digest,
    pod::config::{ImageDefaults, Map},
};

/// Most layers of an image: what one overlayfs mount can have.
pub const MAX_LAYERS: usize = super::overlay::MAX_LOWERS;

/// Largest image config, in bytes.
pub const MAX_CONFIG: u64 = 8 << 20;

/// Why a document is not one of an image that we can run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No JSON of the right shape.
    #[error("the {what} is not valid")]
    Json {
        /// Which document.
        what: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Breaks a rule of the format, or a limit of ours.
    #[error("the {what} is not valid: {rule}")]
    Invalid {
        /// Which document.
        what: &'static str,
        /// Which rule.
        rule: String,
    },
    /// Something else than an image, or a kind of image that nobody should need.
    #[error("{0}")]
    Unsupported(String),
    /// Nothing for this platform.
    #[error("the image is not for {wanted}: it has {has}")]
    Platform {
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        has: String,
    },
}

/// os/architecture/variant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// "linux".
    pub os: String,
    /// As Go has it: "amd64", "arm64".
    pub architecture: String,
    /// "v7", "v8"; empty: none.
    pub variant: String,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

impl Platform {
    /// This node's.
    pub fn node() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "aarch64" => ("arm64", "v8"),
            "arm" => ("arm", "v7"),
            "powerpc64" => ("ppc64le", ""),
            other => (other, ""),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    /// "os/architecture" or "os/architecture/variant".
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        let (os, architecture) = (parts.next()?, parts.next()?);
        let variant = parts.next().unwrap_or_default();
        let word =
            |s: &str| s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if parts.next().is_some()
            || os.is_empty()
            || architecture.is_empty()
            || !text.split('/').all(word)
        {
            return None;
        }
        let architecture = match architecture {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Some(Self { os: os.into(), architecture: architecture.into(), variant: variant.into() })
    }

    /// Variants of the architecture that run where `self` does, best first.
    fn variants(&self) -> Vec<&str> {
        let all: &[&str] = match self.architecture.as_str() {
            "arm64" => &["v8", ""],
            "arm" => &["v8", "v7", "v6", "v5", ""],
            // A plain amd64 is v1; the levels above are not every machine's.
            "amd64" => &["v4", "v3", "v2", "v1", ""],
            _ => &[""],
        };
        let own = match (self.architecture.as_str(), self.variant.as_str()) {
            ("amd64", "") => "v1",
            ("arm64", "") => "v8",
            ("arm", "") => "v7",
            (_, own) => own,
        };
        match all.iter().position(|v| *v == own) {
            Some(at) => all[at..].to_vec(),
            None => vec![own, ""],
        }
    }

    /// How well an image of `other` runs here: 0 is best, `None` is not at all.
    fn rank(&self, other: &Platform) -> Option<usize> {
        if self.os != other.os || self.architecture != other.architecture {
            return None;
        }
        self.variants().iter().position(|v| *v == other.variant)
    }
}

/// What points to content.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Of the content.
    pub digest: Digest,
    /// Of the content, in bytes.
    pub size: u64,
    /// In an index: whom it is for.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Annotations.
    #[serde(default)]
    pub annotations: Option<Map>,
}

/// A document that a name stands for.
#[derive(Debug)]
pub enum Document {
    /// Several images.
    Index(Vec<Descriptor>),
    /// One image.
    Manifest(Box<Manifest>),
}

/// An image manifest that passed all checks.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The config.
    pub config: Descriptor,
    /// From the bottom.
    pub layers: Vec<Descriptor>,
    /// Annotations.
    pub annotations: Map,
    /// What it says to be, if it is no container image: its layers are files then.
    pub artifact: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
    annotations: Option<Map>,
    #[serde(default)]
    artifact_type: String,
}

impl Document {
    /// Parses what the server calls `media_type` (may be empty or too general).
    pub fn parse(bytes: &[u8], media_type: &str) -> Result<Self, Error> {
        if media_type.starts_with("application/vnd.docker.distribution.manifest.v1") {
            return Err(schema_1());
        }
        let raw: Raw = serde_json::from_slice(bytes)
            .map_err(|source| Error::Json { what: "manifest", source })?;
        if raw.schema_version == 1 || raw.fs_layers.is_some() {
            return Err(schema_1());
        }
        let invalid = |rule: &str| Error::Invalid { what: "manifest", rule: rule.to_owned() };
        if raw.schema_version != 2 {
            return Err(invalid("schemaVersion must be 2"));
        }
        // A document that is both could be one thing to one reader and another to the next
        // (CVE-2021-41190).
        if raw.manifests.is_some() && (raw.config.is_some() || raw.layers.is_some()) {
            return Err(invalid("it has both manifests and layers"));
        }
        if let Some(manifests) = raw.manifests {
            if is_manifest(media_type) || is_manifest(&raw.media_type) {
                return Err(invalid("it is an index by content and a manifest by media type"));
            }
            return Ok(Document::Index(manifests));
        }
        if is_index(media_type) || is_index(&raw.media_type) {
            return Err(invalid("it is a manifest by content and an index by media type"));
        }
        let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
            return Err(invalid("it has neither manifests nor config and layers"));
        };
        let artifact = artifact(&config.media_type, raw.artifact_type);
        if config.size > MAX_CONFIG {
            return Err(invalid("its config is larger than 8 MiB"));
        }
        if layers.len() > MAX_LAYERS {
            return Err(invalid("it has more than 500 layers"));
        }
        for layer in &layers {
            check_layer_type(&layer.media_type, artifact.is_some())?;
            if layer.size > i64::MAX as u64 {
                return Err(invalid("the size of a layer"));
            }
        }
        let annotations = raw.annotations.unwrap_or_default();
        Ok(Document::Manifest(Box::new(Manifest { config, layers, annotations, artifact })))
    }
}

fn schema_1() -> Error {
    Error::Unsupported(
        "the image has a Docker schema 1 manifest, a format that was given up in 2017: push it \
         again with a current tool"
            .to_owned(),
    )
}

fn is_index(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn is_manifest(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json"
    )
}

/// What a manifest with such a config is, if it is no container image (image-spec manifest.md
/// "Guidelines for Artifact Usage").
fn artifact(config_type: &str, artifact_type: String) -> Option<String> {
    match config_type {
        "application/vnd.oci.image.config.v1+json"
        | "application/vnd.docker.container.image.v1+json" => None,
        _ if !artifact_type.is_empty() => Some(artifact_type),
        other => Some(other.to_owned()),
    }
}

/// The name of the file that a layer of an artifact is: its title, as ORAS and others give it, else its
/// digest.
pub fn file_name(layer: &Descriptor) -> Result<String, Error> {
    let title = layer.annotations.as_ref().and_then(|a| a.get("org.opencontainers.image.title"));
    let Some(title) = title else { return Ok(layer.digest.to_string().replace(':', "-")) };
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.starts_with(".wh.");
    if !title.split('/').all(plain) || title.len() > 1024 || title.contains('\0') {
        return Err(Error::Invalid {
            what: "manifest",
            rule: format!("the title {title:?} of a layer is no relative path of a file"),
        });
    }
    Ok(title.clone())
}

/// The names of all files of an artifact.
pub fn file_names(layers: &[Descriptor]) -> Result<Vec<String>, Error> {
    let names = layers.iter().map(file_name).collect::<Result<Vec<_>, _>>()?;
    let mut sorted: Vec<&str> = names.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        let rest = pair[1].strip_prefix(pair[0]);
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
            return Err(Error::Invalid {
                what: "manifest",
                rule: format!("two of its layers are to be the file {:?}", pair[0]),
            });
        }
    }
    Ok(names)
}

/// Whether registries need not have such a layer (image-spec layer.md "Non-Distributable Layers").
pub fn is_foreign(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.oci.image.layer.nondistributable.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.foreign.")
}

fn check_layer_type(media_type: &str, is_file: bool) -> Result<(), Error> {
    if media_type.ends_with("+encrypted") {
        return Err(Error::Unsupported(
            "the image has encrypted layers: there is no key for them".to_owned(),
        ));
    }
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Ok(()),
        _ if is_file => Ok(()),
        other => Err(Error::Unsupported(format!(
            "the image has a layer of media type {other:?}, which is not a tar archive we know"
        ))),
    }
}

/// The entries of an index that may be for `platform`, best first. Those without a platform come
/// last: only their config can tell.
pub fn candidates<'a>(
    index: &'a [Descriptor],
    platform: &Platform,
) -> Result<Vec<&'a Descriptor>, Error> {
    let mut found: Vec<(usize, &Descriptor)> = index
        .iter()
        .filter_map(|entry| match &entry.platform {
            None => Some((usize::MAX, entry)),
            Some(p) if p.os.is_empty() && p.architecture.is_empty() => Some((usize::MAX, entry)),
            Some(p) => Some((platform.rank(p)?, entry)),
        })
        .collect();
    // Stable: of equals the first in the index wins, as image-spec says.
    found.sort_by_key(|(rank, _)| *rank);
    if found.is_empty() {
        let mut has: Vec<String> = index
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            // Attestations.
            .filter(|p| p.os != "unknown")
            .map(Platform::to_string)
            .take(20)
            .collect();
        has.dedup();
        let has = if has.is_empty() { "nothing".to_owned() } else { has.join(", ") };
        return Err(Error::Platform { wanted: platform.clone(), has });
    }
    Ok(found.into_iter().map(|(_, entry)| entry).collect())
}

/// An image config that passed all checks.
#[derive(Clone, Debug)]
pub struct Config {
    /// What containers inherit.
    pub defaults: ImageDefaults,
    /// Digests of the uncompressed layers, from the bottom.
    pub diff_ids: Vec<Digest>,
    /// Whom it is for.
    pub platform: Platform,
    /// When it was made, as the config writes it.
    pub created: String,
    /// What an artifact says to be; `None` for a container image.
    pub artifact: Option<String>,
}

impl Config {
    /// What is kept as the config of an artifact, which has none that we know.
    pub fn of_artifact(kind: &str, platform: &Platform) -> Vec<u8> {
        serde_json::json!({
            "os": platform.os,
            "architecture": platform.architecture,
            "rootfs": {"type": "layers", "diff_ids": []},
            "holdfast.artifactType": kind,
        })
        .to_string()
        .into_bytes()
    }

    /// Parses a config document.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(default)]
            created: Option<String>,
            #[serde(flatten)]
            platform: Platform,
            #[serde(default)]
            config: Option<RawDefaults>,
            rootfs: RootFs,
            #[serde(default, rename = "holdfast.artifactType")]
            artifact: Option<String>,
        }
        #[derive(Deserialize)]
        struct RootFs {
            #[serde(default, rename = "type")]
            kind: String,
            #[serde(default)]
            diff_ids: Option<Vec<Digest>>,
        }
        // Docker writes null where it has nothing.
        #[derive(Deserialize, Default)]
        #[serde(default, rename_all = "PascalCase")]
        struct RawDefaults {
            user: Option<String>,
            env: Option<Vec<String>>,
            entrypoint: Option<Vec<String>>,
            cmd: Option<Vec<String>>,
            working_dir: Option<String>,
            stop_signal: Option<String>,
            volumes: Option<std::collections::BTreeMap<String, serde::de::IgnoredAny>>,
            labels: Option<std::collections::BTreeMap<String, Option<String>>>,
        }
        let raw: Raw = serde_json::from_slice(bytes)
            .map_err(|source| Error::Json { what: "image config", source })?;
        if !matches!(raw.rootfs.kind.as_str(), "" | "layers") {
            return Err(Error::Invalid {
                what: "image config",
                rule: format!("rootfs is of type {:?}, not \"layers\"", raw.rootfs.kind),
            });
        }
        let d = raw.config.unwrap_or_default();
        Ok(Self {
            defaults: ImageDefaults {
                user: d.user.unwrap_or_default(),
                env: d.env.unwrap_or_default(),
                entrypoint: d.entrypoint.unwrap_or_default(),
                cmd: d.cmd.unwrap_or_default(),
                working_dir: d.working_dir.unwrap_or_default(),
                stop_signal: d.stop_signal.unwrap_or_default(),
                volumes: d.volumes.unwrap_or_default().into_keys().collect(),
                labels: d
                    .labels
                    .unwrap_or_default()
                    .into_iter()
                    .map(|(key, value)| (key, value.unwrap_or_default()))
                    .collect(),
            },
            diff_ids: raw.rootfs.diff_ids.unwrap_or_default(),
            platform: raw.platform,
            created: raw.created.unwrap_or_default(),
            artifact: raw.artifact,
        })
    }

    /// Whether it may run on `platform`. One that does not say is taken at its word.
    pub fn check_platform(&self, platform: &Platform) -> Result<(), Error> {
        let own = &self.platform;
        if own.architecture.is_empty() && own.os.is_empty() {
            return Ok(());
        }
        if own.os == platform.os && own.architecture == platform.architecture {
            return Ok(());
        }
        Err(Error::Platform { wanted: platform.clone(), has: own.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> String {
        format!("sha256:{}", hex::encode([n; 32]))
    }

    fn manifest(extra: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":2}},"layers":[]{extra}}}"#,
            digest(1)
        )
    }

    #[test]
    fn an_artifacts_layers_are_files_with_names_of_their_own() {
        let oci = "application/vnd.oci.image.manifest.v1+json";
        let text = manifest("").replace("vnd.oci.image.config.v1+json", "vnd.oci.empty.v1+json");
        let parse = |text: &str| match Document::parse(text.as_bytes(), oci) {
            Ok(Document::Manifest(manifest)) => manifest,
            other => panic!("{other:?}"),
        };
        assert_eq!(parse(&text).artifact.unwrap(), "application/vnd.oci.empty.v1+json");
        let typed = text.replace("\"layers\"", "\"artifactType\":\"a/b\",\"layers\"");
        assert_eq!(parse(&typed).artifact.unwrap(), "a/b");
        assert_eq!(parse(&manifest("")).artifact, None);

        let layer = |title: Option<&str>| Descriptor {
            media_type: "text/plain".into(),
            digest: digest(7).parse().unwrap(),
            size: 1,
            platform: None,
            annotations: title
                .map(|t| Map::from([("org.opencontainers.image.title".into(), t.into())])),
        };
        let names = |titles: &[Option<&str>]| {
            file_names(&titles.iter().map(|t| layer(*t)).collect::<Vec<_>>())
        };
        let own = digest(7).replace(':', "-");
        assert_eq!(names(&[Some("a b"), Some("dir/x"), None]).unwrap(), ["a b", "dir/x", &own]);
        for bad in ["", "/etc/x", "../x", "a//b", "a/./b", "a/..", ".wh.x", "d/.wh..wh..opq", "a\0"]
        {
            let text = names(&[Some(bad)]).unwrap_err().to_string();
            assert!(text.contains("relative path"), "{bad:?}: {text}");
        }
        for twice in [["a", "a"], ["a", "a/b"], ["x/y", "x"]] {
            let text = names(&twice.map(Some)).unwrap_err().to_string();
            assert!(text.contains("two of its layers"), "{text}");
        }
    }

    #[test]
    fn documents_are_told_apart_and_the_wrong_ones_refused() {
        let oci = "application/vnd.oci.image.manifest.v1+json";
        let index = "application/vnd.oci.image.index.v1+json";
        assert!(matches!(Document::parse(manifest("").as_bytes(), oci), Ok(Document::Manifest(_))));
        assert!(matches!(Document::parse(manifest("").as_bytes(), ""), Ok(Document::Manifest(_))));
        for (text, media_type, part) in [
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), "", "schema 1"),
            ("{}".to_owned(), "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
            (manifest(r#","manifests":[]"#), oci, "both"),
            (manifest(""), index, "index by media type"),
            (r#"{"schemaVersion":2,"manifests":[]}"#.to_owned(), oci, "manifest by media type"),
            (r#"{"schemaVersion":2}"#.to_owned(), oci, "neither"),
            ("[]".to_owned(), oci, "not valid"),
            ("<html>".to_owned(), "text/html", "not valid"),
            (manifest("").replace("\"size\":2", "\"size\":9000000"), oci, "8 MiB"),
            (
                manifest("").replace(
                    "\"layers\":[]",
                    &format!(
                        r#""layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip+encrypted","digest":"{}","size":1}}]"#,
                        digest(2)
                    ),
                ),
                oci,
                "encrypted",
            ),
            (
                manifest("").replace(
                    "\"layers\":[]",
                    &format!(
                        r#""layers":[{{"mediaType":"application/x-helm","digest":"{}","size":1}}]"#,
                        digest(2)
                    ),
                ),
                oci,
                "x-helm",
            ),
        ] {
            let error = Document::parse(text.as_bytes(), media_type).expect_err(&text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_best_platform_of_an_index_is_chosen() {
        let entry = |platform: Option<&str>, n: u8| Descriptor {
            media_type: String::new(),
            digest: digest(n).parse().unwrap(),
            size: 1,
            platform: platform.map(|p| {
                let mut parts = p.split('/').map(str::to_owned);
                Platform {
                    os: parts.next().unwrap(),
                    architecture: parts.next().unwrap(),
                    variant: parts.next().unwrap_or_default(),
                }
            }),
            annotations: None,
        };
        let index = [
            entry(Some("unknown/unknown"), 1),
            entry(None, 2),
            entry(Some("linux/arm64"), 3),
            entry(Some("linux/arm64/v8"), 4),
            entry(Some("linux/amd64/v3"), 5),
            entry(Some("linux/amd64"), 6),
            entry(Some("linux/amd64"), 7),
            entry(Some("windows/amd64"), 8),
            entry(Some("linux/arm/v6"), 9),
            entry(Some("linux/arm/v7"), 10),
        ];
        for (platform, want) in [
            ("linux/amd64", &[6, 7, 2][..]),
            ("linux/amd64/v3", &[5, 6, 7, 2]),
            ("linux/arm64", &[4, 3, 2]),
            ("linux/arm", &[10, 9, 2]),
            ("linux/arm/v6", &[9, 2]),
            ("linux/s390x", &[2]),
        ] {
            let found = candidates(&index, &Platform::parse(platform).unwrap()).unwrap();
            let want: Vec<String> = want.iter().map(|n| digest(*n)).collect();
            let found: Vec<String> = found.iter().map(|d| d.digest.to_string()).collect();
            assert_eq!(found, want, "{platform}");
        }
        let error = candidates(&index[2..4], &Platform::parse("linux/amd64").unwrap()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the image is not for linux/amd64: it has linux/arm64, linux/arm64/v8"
        );
        for bad in ["", "linux", "linux/", "a/b/c/d", "Linux/amd64", "linux/../x"] {
            assert_eq!(Platform::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn configs_with_nulls_and_without_a_config_are_read() {
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","config":
            {{"Env":null,"Cmd":["sh"],"Entrypoint":null,"User":"1000","Volumes":{{"/data":{{}}}},
            "Labels":{{"a":"b"}},"StopSignal":"SIGQUIT","WorkingDir":"/w"}},
            "rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            digest(3)
        );
        let config = Config::parse(text.as_bytes()).unwrap();
        assert_eq!(config.defaults.cmd, ["sh"]);
        assert_eq!(config.defaults.user, "1000");
        assert_eq!(config.defaults.volumes, ["/data"]);
        assert_eq!(config.defaults.stop_signal, "SIGQUIT");
        assert_eq!(config.diff_ids.len(), 1);
        assert!(config.check_platform(&Platform::parse("linux/amd64/v2").unwrap()).is_ok());
        assert!(config.check_platform(&Platform::parse("linux/arm64").unwrap()).is_err());
        let bare = Config::parse(br#"{"rootfs":{"type":"layers","diff_ids":null}}"#).unwrap();
        assert_eq!(bare.defaults, ImageDefaults::default());
        assert!(Config::parse(b"{}").is_err());
        assert!(Config::parse(br#"{"rootfs":{"type":"squash"}}"#).is_err());
    }
}
