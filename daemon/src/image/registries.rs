//! containers-registries.conf(5), version 2: where images of a name are looked for, which are
//! blocked, and what names without a registry mean.
//!
//! The rule with `hosts.toml` ([`super::hosts`]): this file says *where* an image is (its mirrors
//! and its rewritten name, in order); for each of these places `hosts.toml` says *how* that
//! registry is reached, which may add mirrors of its own there.
//!
//! The file and its drop-ins (`<file>.d/*.conf`) are read again when one of them has changed.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use serde::Deserialize;

use super::reference::{Object, Reference};
use crate::error::{Kind, Kinded};

/// Why a registries.conf cannot be used, or forbids a name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("read {path}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no registries.conf.
    #[error("{path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value in it means nothing.
    #[error("{path}: {what}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which value and why.
        what: String,
    },
    /// The administrator forbids it.
    #[error("{name} must not be pulled: registry prefix {prefix:?} is blocked in {path}")]
    Blocked {
        /// What was asked for.
        name: String,
        /// The entry.
        prefix: String,
        /// Its file.
        path: PathBuf,
    },
    /// It could be of several registries, and nobody can be asked.
    #[error(
        "short name {name:?} is ambiguous: {path} has short-name-mode \"enforcing\" and several \
         unqualified-search-registries ({registries}); name the registry, or add an alias"
    )]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// The file.
        path: PathBuf,
        /// The registries.
        registries: String,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Ambiguous { .. } => Kind::Invalid,
            // Not `Denied`: other credentials would not help.
            Error::Blocked { .. }
            | Error::Read { .. }
            | Error::Parse { .. }
            | Error::Value { .. } => Kind::Precondition,
        }
    }
}

/// Which of the names that have no registry are resolved without asking somebody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    /// One registry or an alias, else an error: nobody is there to be asked.
    Enforcing,
    /// Each search registry in turn, as there is no terminal.
    #[default]
    Permissive,
    /// Each search registry in turn; aliases too.
    Disabled,
}

/// What the files say together.
#[derive(Clone, Debug, Default)]
pub struct Conf {
    registries: Vec<Entry>,
    search: Vec<String>,
    /// The file that has the last word on short names.
    search_from: PathBuf,
    mode: Mode,
    aliases: BTreeMap<String, String>,
    /// Programs to ask for credentials, in order.
    pub credential_helpers: Vec<String>,
}

#[derive(Clone, Debug)]
struct Entry {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirrors: Vec<Mirror>,
    from: PathBuf,
}

#[derive(Clone, Debug)]
struct Mirror {
    location: String,
    insecure: bool,
    tags: bool,
    digests: bool,
}

/// Where an image may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Registry and repository to ask there.
    pub name: Reference,
    /// Plain HTTP and unverified certificates will do.
    pub insecure: bool,
    /// It is no mirror: the last to be asked.
    pub primary: bool,
    /// The file that says so; `None`: nothing does.
    pub from: Option<PathBuf>,
}

impl Conf {
    /// Reads the file, which must be there, and its drop-ins.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let mut conf = Self::default();
        for file in files(path)? {
            let text = std::fs::read_to_string(&file)
                .map_err(|source| Error::Read { path: file.clone(), source })?;
            conf.add(&text, &file)?;
        }
        Ok(conf)
    }

    /// Adds a file over what is there: an entry replaces that of the same prefix, a list the list.
    fn add(&mut self, text: &str, path: &Path) -> Result<(), Error> {
        let file: File = toml::from_str(text)
            .map_err(|source| Error::Parse { path: path.into(), source: Box::new(source) })?;
        let bad = |what: String| Error::Value { path: path.into(), what };
        if file.registries.is_some() {
            return Err(bad(
                "[registries.search] and its like are version 1 of the format: use [[registry]] \
                 and unqualified-search-registries"
                    .to_owned(),
            ));
        }
        if let Some(search) = file.unqualified_search_registries {
            for registry in &search {
                let ok = format!("{registry}/x").parse::<Reference>();
                if !ok.is_ok_and(|r| r.registry() == registry) {
                    return Err(bad(format!(
                        "unqualified-search-registries: {registry:?} is no registry"
                    )));
                }
            }
            self.search = search;
            self.search_from = path.into();
        }
        if let Some(mode) = file.short_name_mode {
            self.mode = match mode.as_str() {
                "" | "permissive" => Mode::Permissive,
                "enforcing" => Mode::Enforcing,
                "disabled" => Mode::Disabled,
                other => {
                    return Err(bad(format!(
                        "short-name-mode {other:?} is not one of enforcing, permissive, disabled"
                    )));
                }
            };
            if self.search_from.as_os_str().is_empty() {
                self.search_from = path.into();
            }
        }
        if let Some(helpers) = file.credential_helpers {
            self.credential_helpers = helpers;
        }
        for (alias, target) in file.aliases {
            if target.is_empty() {
                // How a later file takes one back.
                self.aliases.remove(&alias);
                continue;
            }
            let whole = target.parse::<Reference>();
            if whole.is_err() || Reference::is_short(&target) || target.contains('@') {
                return Err(bad(format!(
                    "alias {alias:?}: {target:?} must be a registry and a repository"
                )));
            }
            self.aliases.insert(alias, target);
        }
        let mut seen = Vec::new();
        for raw in file.registry {
            let entry = raw.check(path)?;
            if seen.contains(&entry.prefix) {
                return Err(bad(format!("prefix {:?} has two entries", entry.prefix)));
            }
            seen.push(entry.prefix.clone());
            self.registries.retain(|other| other.prefix != entry.prefix);
            self.registries.push(entry);
        }
        Ok(())
    }

    /// What a text may stand for, in order of trying: itself, an alias, or one for each search
    /// registry. Without any of these a short name is one of Docker Hub, as everywhere.
    pub fn candidates(&self, text: &str) -> Result<Vec<Reference>, super::Error> {
        if !Reference::is_short(text) {
            return Ok(vec![text.parse()?]);
        }
        let end = text.find([':', '@']).unwrap_or(text.len());
        if let Some(target) = self.aliases.get(&text[..end]) {
            return Ok(vec![format!("{target}{}", &text[end..]).parse()?]);
        }
        if self.search.is_empty() {
            return Ok(vec![text.parse()?]);
        }
        if self.mode == Mode::Enforcing && self.search.len() > 1 {
            return Err(Error::Ambiguous {
                name: text.to_owned(),
                path: self.search_from.clone(),
                registries: self.search.join(", "),
            }
            .into());
        }
        Ok(self
            .search
            .iter()
            .map(|registry| format!("{registry}/{text}").parse())
            .collect::<Result<_, _>>()?)
    }

    /// Where an image may be, in order of trying; at least one.
    pub fn places(&self, reference: &Reference) -> Result<Vec<Place>, Error> {
        let name = reference.name();
        let whole = reference.to_string();
        let best = self
            .registries
            .iter()
            .filter_map(|entry| Some((matches(&entry.prefix, &whole)?, entry)))
            .max_by_key(|(_, entry)| entry.prefix.len());
        let Some((length, entry)) = best else {
            return Ok(vec![Place {
                name: reference.clone(),
                insecure: false,
                primary: true,
                from: None,
            }]);
        };
        if entry.blocked {
            return Err(Error::Blocked {
                name: whole,
                prefix: entry.prefix.clone(),
                path: entry.from.clone(),
            });
        }
        let at = |location: &str, insecure: bool, primary: bool| {
            let text = if location.is_empty() {
                name.clone()
            } else {
                // A prefix may reach into the tag.
                format!("{location}{}", name.get(length..).unwrap_or_default())
            };
            let parsed = text.parse::<Reference>().ok();
            match parsed.filter(|_| !Reference::is_short(&text)) {
                Some(name) => Ok(Place { name, insecure, primary, from: Some(entry.from.clone()) }),
                None => Err(Error::Value {
                    path: entry.from.clone(),
                    what: format!(
                        "location {location:?} makes {name} into {text:?}, no valid name"
                    ),
                }),
            }
        };
        let digest = matches!(reference.object(), Object::Digest(_));
        let mut places = Vec::new();
        for mirror in &entry.mirrors {
            if if digest { mirror.digests } else { mirror.tags } {
                places.push(at(&mirror.location, mirror.insecure, false)?);
            }
        }
        places.push(at(&entry.location, entry.insecure, true)?);
        Ok(places)
    }
}

/// How many bytes of `name` a prefix covers, if it is one of it by whole parts.
fn matches(prefix: &str, name: &str) -> Option<usize> {
    let end = match prefix.strip_prefix('*') {
        None => name.starts_with(prefix).then_some(prefix.len())?,
        // "*.example.com": a registry below that domain.
        Some(rest) => {
            let host = name.find('/').unwrap_or(name.len());
            let at = name.match_indices(rest).map(|(at, _)| at).find(|at| {
                let end = at + rest.len();
                *at > 0
                    && *at < host
                    && matches!(name[end..].chars().next(), None | Some('/' | ':' | '@'))
            })?;
            at + rest.len()
        }
    };
    matches!(name[end..].chars().next(), None | Some('/' | ':' | '@')).then_some(end)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    unqualified_search_registries: Option<Vec<String>>,
    short_name_mode: Option<String>,
    credential_helpers: Option<Vec<String>>,
    #[serde(default)]
    registry: Vec<RawEntry>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    /// Version 1.
    registries: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawEntry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<RawMirror>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawMirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: String,
}

impl RawEntry {
    fn check(self, path: &Path) -> Result<Entry, Error> {
        let bad = |what: String| Error::Value { path: path.into(), what };
        let trimmed = |text: &str| text.trim_end_matches('/').to_owned();
        let location = |text: &str| {
            let text = trimmed(text);
            if text.contains("://") {
                return Err(bad(format!(
                    "location {text:?} must not have a scheme: write insecure = true for plain HTTP"
                )));
            }
            // Alone or followed by the rest of a name, it must be one.
            let probe = format!("{text}/x");
            if Reference::is_short(&probe) || probe.parse::<Reference>().is_err() {
                return Err(bad(format!(
                    "location {text:?} is no registry, with or without a path"
                )));
            }
            Ok(text)
        };
        let prefix = match trimmed(&self.prefix) {
            prefix if prefix.is_empty() => trimmed(&self.location),
            prefix => prefix,
        };
        if prefix.is_empty() {
            return Err(bad("a [[registry]] has neither prefix nor location".to_owned()));
        }
        if prefix.contains("://") {
            return Err(bad(format!("prefix {prefix:?} must not have a scheme")));
        }
        if prefix.contains('*') && (!prefix.starts_with("*.") || prefix[1..].contains('*')) {
            return Err(bad(format!(
                "prefix {prefix:?}: a * can only stand first, as in *.example.com"
            )));
        }
        let own = if self.location.is_empty() {
            // The name as it is; that of a wildcard is the only one that can be.
            if prefix.starts_with("*.") { String::new() } else { prefix.clone() }
        } else {
            location(&self.location)?
        };
        let mut mirrors = Vec::new();
        for mirror in self.mirror {
            let (tags, digests) = match mirror.pull_from_mirror.as_str() {
                _ if self.mirror_by_digest_only && !mirror.pull_from_mirror.is_empty() => {
                    return Err(bad(format!(
                        "{prefix:?} has both mirror-by-digest-only and a mirror with \
                         pull-from-mirror: use one of them"
                    )));
                }
                "" => (!self.mirror_by_digest_only, true),
                "all" => (true, true),
                "digest-only" => (false, true),
                "tag-only" => (true, false),
                other => {
                    return Err(bad(format!(
                        "pull-from-mirror {other:?} is not one of all, digest-only, tag-only"
                    )));
                }
            };
            let (location, insecure) = (location(&mirror.location)?, mirror.insecure);
            mirrors.push(Mirror { location, insecure, tags, digests });
        }
        Ok(Entry {
            prefix,
            location: own,
            insecure: self.insecure,
            blocked: self.blocked,
            mirrors,
            from: path.into(),
        })
    }
}

/// The file, and its drop-ins in order of name.
fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut directory = path.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let read = |source| Error::Read { path: directory.clone(), source };
    let mut files = Vec::new();
    match std::fs::read_dir(&directory) {
        Ok(entries) => {
            for entry in entries {
                let file = entry.map_err(read)?.path();
                let hidden =
                    file.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
                if !hidden && file.extension().is_some_and(|e| e == "conf") {
                    files.push(file);
                }
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(read(source)),
    }
    files.sort();
    files.insert(0, path.into());
    Ok(files)
}

/// The configured file as it is now.
#[derive(Debug)]
pub struct Source {
    path: Option<PathBuf>,
    read: Mutex<Option<(Stamp, Arc<Conf>)>>,
}

/// What changes when a file does.
type Stamp = Vec<(PathBuf, Option<SystemTime>, u64, u64)>;

impl Source {
    /// Reads nothing yet.
    pub fn new(path: Option<PathBuf>) -> Self {
        Self { path, read: Mutex::default() }
    }

    /// What is in effect. Looks at a few small files of the node.
    pub fn current(&self) -> Result<Arc<Conf>, Error> {
        use std::os::unix::fs::MetadataExt;
        let Some(path) = &self.path else { return Ok(Arc::default()) };
        let stamp: Stamp = files(path)?
            .into_iter()
            .map(|file| match std::fs::metadata(&file) {
                Ok(meta) => (file, meta.modified().ok(), meta.ino(), meta.len()),
                Err(_) => (file, None, 0, 0),
            })
            .collect();
        let mut read = self.read.lock().expect("no panic while it is held");
        if let Some((known, conf)) = &*read
            && *known == stamp
        {
            return Ok(conf.clone());
        }
        let conf = Arc::new(Conf::load(path)?);
        *read = Some((stamp, conf.clone()));
        Ok(conf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(texts: &[&str]) -> Result<Conf, Error> {
        let mut conf = Conf::default();
        for (index, text) in texts.iter().enumerate() {
            conf.add(text, Path::new(&format!("/{index}.conf")))?;
        }
        Ok(conf)
    }

    fn places(conf: &Conf, name: &str) -> Vec<String> {
        conf.places(&name.parse().unwrap())
            .unwrap()
            .iter()
            .map(|p| format!("{}{}", p.name.name(), if p.insecure { " insecure" } else { "" }))
            .collect()
    }

    const FULL: &str = r#"
        unqualified-search-registries = ["quay.example", "docker.io"]
        [[registry]]
        location = "docker.io"
        [[registry.mirror]]
        location = "mirror.example:5000/hub"
        insecure = true
        [[registry.mirror]]
        location = "digests.example"
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "tags.example"
        pull-from-mirror = "tag-only"
        [[registry]]
        prefix = "docker.io/library"
        location = "internal.example/base"
        [[registry]]
        prefix = "*.apps.example"
        location = "one.example/apps"
        [[registry]]
        prefix = "*.plain.example"
        insecure = true
        [[registry]]
        prefix = "evil.example/bad"
        blocked = true
        [[registry]]
        prefix = "pinned.example/a:1"
        location = "other.example/b"
        [aliases]
        fedora = "registry.fedora.example/fedora"
        "group/tool" = "quay.example/x/tool"
    "#;

    #[test]
    fn the_longest_prefix_says_where_an_image_is() {
        let conf = conf(&[FULL]).unwrap();
        let digest = format!("sha256:{}", "a".repeat(64));
        for (name, want) in [
            ("busybox", &["internal.example/base/busybox"][..]),
            ("a/b", &["mirror.example:5000/hub/a/b insecure", "tags.example/a/b", "docker.io/a/b"]),
            (
                &format!("a/b@{digest}"),
                &["mirror.example:5000/hub/a/b insecure", "digests.example/a/b", "docker.io/a/b"],
            ),
            ("x.apps.example/a:2", &["one.example/apps/a"]),
            ("x.y.apps.example:5000/a", &["x.y.apps.example:5000/a"]),
            ("apps.example/a", &["apps.example/a"]),
            ("x.apps.example.org/a", &["x.apps.example.org/a"]),
            ("example.org/x.apps.example/a", &["example.org/x.apps.example/a"]),
            ("r.plain.example/a", &["r.plain.example/a insecure"]),
            ("evil.example/badly", &["evil.example/badly"]),
            ("evil.example/good", &["evil.example/good"]),
            ("pinned.example/a:1", &["other.example/b"]),
            ("pinned.example/a:2", &["pinned.example/a"]),
            ("nothing.example/a", &["nothing.example/a"]),
        ] {
            // A wildcard's port stays behind the location: it is then another registry's name.
            if name.contains("x.y.apps") {
                assert!(conf.places(&name.parse().unwrap()).is_err(), "{name}");
                continue;
            }
            assert_eq!(places(&conf, name), want, "{name}");
        }
        for name in ["evil.example/bad", "evil.example/bad:1", "evil.example/bad/x"] {
            let error = conf.places(&name.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains("blocked in /0.conf"), "{error}");
        }
    }

    #[test]
    fn short_names_are_resolved_by_alias_then_in_order() {
        let full = conf(&[FULL]).unwrap();
        let ask = |conf: &Conf, text: &str| -> Vec<String> {
            conf.candidates(text).unwrap().iter().map(Reference::to_string).collect()
        };
        assert_eq!(ask(&full, "fedora:41"), ["registry.fedora.example/fedora:41"]);
        assert_eq!(ask(&full, "group/tool"), ["quay.example/x/tool:latest"]);
        assert_eq!(
            ask(&full, "busybox"),
            ["quay.example/busybox:latest", "docker.io/library/busybox:latest"]
        );
        assert_eq!(ask(&full, "localhost/a"), ["localhost/a:latest"]);
        assert_eq!(ask(&full, "docker.io/a"), ["docker.io/library/a:latest"]);
        assert_eq!(ask(&Conf::default(), "a"), ["docker.io/library/a:latest"]);
        let strict = conf(&[FULL, "short-name-mode = \"enforcing\""]).unwrap();
        let error = crate::error::chain(&strict.candidates("busybox").unwrap_err());
        assert!(error.contains("quay.example, docker.io"), "{error}");
        assert_eq!(ask(&strict, "fedora"), ["registry.fedora.example/fedora:latest"]);
    }

    #[test]
    fn drop_ins_replace_entries_lists_and_aliases() {
        let conf = conf(&[
            FULL,
            r#"
            unqualified-search-registries = ["only.example"]
            credential-helpers = ["secretservice"]
            [[registry]]
            location = "docker.io"
            blocked = true
            [aliases]
            fedora = ""
            "#,
        ])
        .unwrap();
        assert_eq!(conf.candidates("fedora").unwrap()[0].registry(), "only.example");
        assert!(conf.places(&"docker.io/a/b".parse().unwrap()).is_err());
        assert_eq!(places(&conf, "docker.io/library/x"), ["internal.example/base/x"]);
        assert_eq!(conf.credential_helpers, ["secretservice"]);
    }

    #[test]
    fn what_makes_no_sense_is_said_with_its_file() {
        for (text, part) in [
            ("[registries.search]\nregistries = ['a.b']", "version 1"),
            ("[[registry]]", "neither prefix nor location"),
            ("[[registry]]\nlocation = 'https://a.b'", "scheme"),
            ("[[registry]]\nprefix = 'a.*.b'\nlocation = 'a.b'", "stand first"),
            ("[[registry]]\nprefix = 'a.b'\nlocation = 'nohost'", "no registry"),
            ("[[registry]]\nlocation = 'a.b'\n[[registry]]\nprefix = 'a.b'", "two entries"),
            ("[[registry]]\nlocation = 'a.b'\nblock = true", "not valid"),
            (
                "[[registry]]\nlocation = 'a.b'\n[[registry.mirror]]\nlocation = 'c.d'\n\
                 pull-from-mirror = 'some'",
                "digest-only",
            ),
            (
                "[[registry]]\nlocation = 'a.b'\nmirror-by-digest-only = true\n\
                 [[registry.mirror]]\nlocation = 'c.d'\npull-from-mirror = 'all'",
                "use one of them",
            ),
            ("unqualified-search-registries = ['a.b/c']", "no registry"),
            ("short-name-mode = 'x'", "enforcing, permissive"),
            ("[aliases]\na = 'b'", "must be a registry"),
            ("x =", "not valid"),
        ] {
            let error = conf(&[text]).expect_err(text).to_string();
            assert!(error.contains("/0.conf") && error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn changed_files_are_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registries.conf");
        std::fs::write(&path, "unqualified-search-registries = ['a.example']").unwrap();
        let source = Source::new(Some(path.clone()));
        let first = |source: &Source| {
            let conf = source.current().unwrap();
            conf.candidates("x").unwrap()[0].registry().to_owned()
        };
        assert_eq!(first(&source), "a.example");
        let drop_ins = dir.path().join("registries.conf.d");
        std::fs::create_dir(&drop_ins).unwrap();
        std::fs::write(drop_ins.join("9.conf"), "unqualified-search-registries = ['b.example']")
            .unwrap();
        std::fs::write(drop_ins.join("ignored.toml"), "x").unwrap();
        assert_eq!(first(&source), "b.example");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(source.current(), Err(Error::Read { .. })));
    }
}
