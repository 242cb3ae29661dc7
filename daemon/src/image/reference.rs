//! Image references as users write them, and their one normal form.
//!
//! The grammar is that of the distribution project (distribution/reference); the short forms are
//! those every user knows from Docker: no registry means `docker.io`, no path there means
//! `library/`, neither tag nor digest means `latest`. A digest wins over a tag.

use std::{fmt, str::FromStr};

use crate::id::Digest;

/// Longest name (registry and repository) that the grammar allows, in bytes.
const MAX_NAME: usize = 255;

/// The registry of references that name none.
const DEFAULT_REGISTRY: &str = "docker.io";

/// A valid, normalised reference.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    object: Object,
}

/// What of a repository is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// A name that may move.
    Tag(String),
    /// One content for ever.
    Digest(Digest),
}

/// Why a text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {text:?} is not valid: {rule}")]
pub struct Invalid {
    text: String,
    rule: &'static str,
}

impl Reference {
    /// The registry, with its port if one was given: "docker.io", "localhost:5000".
    pub fn registry(&self) -> &str {
        &self.registry
    }
    /// The path in the registry: "library/busybox".
    pub fn repository(&self) -> &str {
        &self.repository
    }
    /// Tag or digest.
    pub fn object(&self) -> &Object {
        &self.object
    }
    /// Registry and repository.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
    /// Whether a text names no registry, so that it is a matter of the node which one is meant.
    pub fn is_short(text: &str) -> bool {
        match text.split_once('@').map_or(text, |(name, _)| name).split_once('/') {
            Some((first, _)) => !is_registry(first),
            None => true,
        }
    }
    /// The same name by digest: `name@sha256:…`.
    pub fn at(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { registry, repository, object } = self;
        match object {
            Object::Tag(tag) => write!(f, "{registry}/{repository}:{tag}"),
            Object::Digest(digest) => write!(f, "{registry}/{repository}@{digest}"),
        }
    }
}

impl fmt::Display for Object {
    /// As the distribution API's URLs have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Tag(tag) => f.write_str(tag),
            Object::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

impl FromStr for Reference {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        parse(text).map_err(|rule| Invalid { text: text.chars().take(300).collect(), rule })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.contains("://") {
        return Err("it must not have a scheme: write registry/repository:tag");
    }
    if text.bytes().any(|b| !b.is_ascii_graphic()) {
        return Err("it must be printable ASCII without spaces");
    }
    let (rest, digest) = match text.split_once('@') {
        None => (text, None),
        Some((rest, digest)) => {
            let digest = digest
                .parse::<Digest>()
                .map_err(|_| "what follows @ must be sha256: and 64 lower-case hex digits")?;
            (rest, Some(digest))
        }
    };
    if rest.len() == 64 && rest.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("64 hex digits are an image id, not a name");
    }
    let (registry, path) = match rest.split_once('/') {
        Some((first, path)) if is_registry(first) => (first, path),
        _ => (DEFAULT_REGISTRY, rest),
    };
    // A colon after the registry can only begin the tag.
    let (path, tag) = match path.split_once(':') {
        None => (path, None),
        Some((path, tag)) => (path, Some(tag)),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    check_registry(registry)?;
    check_repository(path)?;

    let registry = match registry {
        "index.docker.io" => DEFAULT_REGISTRY,
        other => other,
    };
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("registry and repository together must have at most 255 characters");
    }
    let object = match (digest, tag) {
        (Some(digest), _) => Object::Digest(digest),
        (None, Some(tag)) => Object::Tag(tag.to_owned()),
        (None, None) => Object::Tag("latest".to_owned()),
    };
    Ok(Reference { registry: registry.to_owned(), repository, object })
}

/// Whether the part before the first slash is a registry and no part of the repository.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':', '['])
        || first == "localhost"
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    const RULE: &str = "the registry must be a host name or an address, and a port if need be";
    let (host, port) = if let Some(rest) = registry.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or(RULE)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| RULE)?;
        match rest {
            "" => (None, None),
            _ => (None, Some(rest.strip_prefix(':').ok_or(RULE)?)),
        }
    } else {
        match registry.split_once(':') {
            None => (Some(registry), None),
            Some((host, port)) => (Some(host), Some(port)),
        }
    };
    if let Some(host) = host {
        let label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        if !host.split('.').all(label) {
            return Err(RULE);
        }
    }
    match port {
        None => Ok(()),
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok() => {
            Ok(())
        }
        Some(_) => Err("the registry's port must be a number up to 65535"),
    }
}

fn check_repository(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("it has no repository");
    }
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository must be in lower case");
    }
    for component in path.split('/') {
        if !is_component(component.as_bytes()) {
            return Err("each part of the repository must be of lower-case letters and digits, \
                        joined by single dots, one or two underscores, or dashes");
        }
    }
    Ok(())
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &[u8]) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(first), Some(last)) = (text.first(), text.last()) else { return false };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    text.split(alphanumeric).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
    })
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = (1..=128).contains(&tag.len())
        && tag.bytes().next().is_some_and(first)
        && tag.bytes().all(|b| first(b) || b == b'.' || b == b'-');
    if ok {
        Ok(())
    } else {
        Err("the tag must be 1 to 128 letters, digits, dots, dashes and underscores, \
             and begin with a letter, digit or underscore")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normal(text: &str) -> String {
        text.parse::<Reference>().unwrap_or_else(|e| panic!("{e}")).to_string()
    }

    #[test]
    fn short_forms_are_completed() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, want) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("a/b", "docker.io/a/b:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a:1", "localhost:5000/a:1"),
            ("Registry/a", "Registry/a:latest"),
            (
                "registry.k8s.io/e2e-test-images/busybox:1.29-2",
                "registry.k8s.io/e2e-test-images/busybox:1.29-2",
            ),
            ("[::1]:5000/a/b", "[::1]:5000/a/b:latest"),
            ("[::1]/a", "[::1]/a:latest"),
            ("a__b/c--d.e_f", "docker.io/a__b/c--d.e_f:latest"),
            ("foo:5000", "docker.io/library/foo:5000"),
        ] {
            assert_eq!(normal(text), want, "{text}");
        }
        assert_eq!(
            normal(&format!("busybox:1@{digest}")),
            format!("docker.io/library/busybox@{digest}")
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        let hex = "a".repeat(64);
        let long = format!("example.com/{}", "a".repeat(250));
        let tag = format!("a:{}", "b".repeat(129));
        for (text, part) in [
            ("", "empty"),
            ("https://example.com/a", "scheme"),
            ("a b", "spaces"),
            ("A", "lower case"),
            ("example.com/A", "lower case"),
            ("a:", "tag"),
            ("a:.b", "tag"),
            (&tag, "tag"),
            ("a@sha256:12", "64 lower-case"),
            ("a@sha512:12", "64 lower-case"),
            ("a@@", "64 lower-case"),
            (&hex, "image id"),
            ("example.com/", "no repository"),
            ("a//b", "each part"),
            ("a/../b", "each part"),
            ("../b", "registry must"),
            ("a..b", "each part"),
            ("a___b", "each part"),
            ("-a", "each part"),
            ("example.com:99999/a", "port"),
            ("example.com:/a", "port"),
            ("[::1/a", "registry must"),
            ("[zz]:1/a", "registry must"),
            (&long, "255"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_has_a_stable_normal_form(text in "\\PC{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let normal = reference.to_string();
                prop_assert_eq!(normal.parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn what_the_grammar_allows_is_accepted(
            registry in "([a-z0-9]{1,5}\\.[a-z]{2,3}|localhost)(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}){0,3}",
            tag in "[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}",
        ) {
            let text = format!("{registry}/{path}:{tag}");
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(reference.registry(), &registry);
            if registry != "docker.io" {
                prop_assert_eq!(reference.to_string(), text);
            }
        }
    }
}
