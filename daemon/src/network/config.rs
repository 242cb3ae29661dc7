//! Network configurations: what is in the directory, which one is used, and why the others are not.
//!
//! The first file by name that is valid is used (`.conf`, `.conflist` and `.json`, as the kubelet's
//! documentation has it). A valid configuration whose plugins are not installed is *not* passed
//! over: a pod on the wrong network is worse than a node that says why it is not ready.
//!
//! Changes are noticed on use: a directory's worth of `stat` calls costs microseconds, needs no
//! watch, and cannot miss an event. Formats: CNI specification 0.1.0 to 1.1.0, section 1.

use std::{
    fmt, fs,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value, json};

/// Largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A version of the CNI specification that we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    /// Oldest first.
    const ALL: [(Version, &'static str); 7] = [
        (Version::V0_1_0, "0.1.0"),
        (Version::V0_2_0, "0.2.0"),
        (Version::V0_3_0, "0.3.0"),
        (Version::V0_3_1, "0.3.1"),
        (Version::V0_4_0, "0.4.0"),
        (Version::V1_0_0, "1.0.0"),
        (Version::V1_1_0, "1.1.0"),
    ];

    /// The version of that name, if we know it.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(version, _)| *version)
    }

    /// As it is written in JSON.
    pub(super) fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(version, _)| *version == self).expect("ALL holds every one").1
    }

    /// CHECK came with 0.4.0, and so did `prevResult` on DEL.
    pub(super) fn has_check(self) -> bool {
        self >= Version::V0_4_0
    }

    /// STATUS and GC came with 1.1.0.
    pub(super) fn has_status_and_gc(self) -> bool {
        self >= Version::V1_1_0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a file is not a network configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum Flaw {
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is larger than {MAX_FILE} bytes")]
    TooLarge,
    #[error("it is not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it is not a JSON object")]
    NotAnObject,
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`{key}` must be {what}")]
    Type { key: &'static str, what: &'static str },
    #[error(
        "the name {0:?} is not valid: it must start with a letter or digit and go on with letters, \
         digits, `_`, `.` and `-`"
    )]
    Name(String),
    #[error("the plugin type {0:?} is not a file name")]
    PluginType(String),
    #[error("CNI version {0:?} is not known; known are 0.1.0 to 1.1.0")]
    Version(String),
    #[error("it has `plugins`, so its file name must end in .conflist")]
    ListInConf,
    #[error("it lists no plugins")]
    NoPlugins,
}

/// A network: the plugins that make it, in order of ADD.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct List {
    pub(super) name: String,
    /// Versions the configuration may be used with, newest first; never empty.
    pub(super) versions: Vec<Version>,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
}

/// One plugin of a network.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plugin {
    /// Name of the executable; a plain file name.
    pub(super) kind: String,
    /// The configuration as written, `type` and all.
    pub(super) config: Map<String, Value>,
}

impl Plugin {
    fn parse(value: Value) -> Result<Self, Flaw> {
        let Value::Object(config) = value else {
            return Err(Flaw::Type { key: "plugins", what: "a list of objects" });
        };
        let kind = text(&config, "type")?.ok_or(Flaw::Missing("type"))?.to_owned();
        let plain = !kind.is_empty()
            && kind != "."
            && kind != ".."
            && kind.len() < 256
            && !kind.contains(['/', '\0']);
        if !plain {
            return Err(Flaw::PluginType(kind.chars().take(80).collect()));
        }
        Ok(Self { kind, config })
    }

    /// Whether the configuration says `"capabilities": {capability: true}`.
    pub(super) fn wants(&self, capability: &str) -> bool {
        self.config
            .get("capabilities")
            .and_then(|all| all.get(capability))
            .is_some_and(|wanted| *wanted == Value::Bool(true))
    }
}

impl List {
    /// A network configuration list.
    pub(super) fn parse(value: Value) -> Result<Self, Flaw> {
        let Value::Object(mut object) = value else { return Err(Flaw::NotAnObject) };
        let plugins = match object.remove("plugins") {
            None => Vec::new(),
            Some(Value::Array(plugins)) => {
                plugins.into_iter().map(Plugin::parse).collect::<Result<_, _>>()?
            }
            Some(_) => return Err(Flaw::Type { key: "plugins", what: "a list of objects" }),
        };
        Self::common(&object, plugins)
    }

    /// A configuration of a single plugin (before 1.0.0, and still in use): a list of one.
    fn parse_single(value: Value) -> Result<Self, Flaw> {
        let Value::Object(object) = value else { return Err(Flaw::NotAnObject) };
        if object.contains_key("plugins") && !object.contains_key("type") {
            return Err(Flaw::ListInConf);
        }
        let plugin = Plugin::parse(Value::Object(object.clone()))?;
        Self::common(&object, vec![plugin])
    }

    fn common(object: &Map<String, Value>, plugins: Vec<Plugin>) -> Result<Self, Flaw> {
        let name = text(object, "name")?.ok_or(Flaw::Missing("name"))?;
        let valid = name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        if !valid {
            return Err(Flaw::Name(name.chars().take(80).collect()));
        }
        Ok(Self {
            name: name.to_owned(),
            versions: versions(object)?,
            disable_check: flag(object, "disableCheck")?,
            disable_gc: flag(object, "disableGC")?,
            plugins,
        })
    }

    /// The list as a record keeps it: with the one version that was chosen.
    pub(super) fn to_value(&self, version: Version) -> Value {
        json!({
            "cniVersion": version.as_str(),
            "name": self.name,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "plugins": self.plugins.iter().map(|plugin| &plugin.config).collect::<Vec<_>>(),
        })
    }
}

fn text<'a>(object: &'a Map<String, Value>, key: &'static str) -> Result<Option<&'a str>, Flaw> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Flaw::Type { key, what: "a string" }),
    }
}

/// A boolean. 0.4.0 and 1.0.0 spelt `disableCheck` as the strings "true" and "false".
fn flag(object: &Map<String, Value>, key: &'static str) -> Result<bool, Flaw> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(value)) if value == "true" => Ok(true),
        Some(Value::String(value)) if value == "false" => Ok(false),
        Some(_) => Err(Flaw::Type { key, what: "true or false" }),
    }
}

/// `cniVersion` and (1.1.0) `cniVersions`, newest first. Versions newer than ours are passed over
/// as long as one that we know is left.
fn versions(object: &Map<String, Value>) -> Result<Vec<Version>, Flaw> {
    let what = "a list of strings";
    let mut names = Vec::new();
    names.extend(text(object, "cniVersion")?.filter(|name| !name.is_empty()));
    match object.get("cniVersions") {
        None | Some(Value::Null) => {}
        Some(Value::Array(list)) => {
            for name in list {
                let name = name.as_str().ok_or(Flaw::Type { key: "cniVersions", what })?;
                names.push(name);
            }
        }
        Some(_) => return Err(Flaw::Type { key: "cniVersions", what }),
    }
    let Some(first) = names.first() else {
        // The first version of the specification had no such key.
        return Ok(vec![Version::V0_1_0]);
    };
    let mut known: Vec<_> = names.iter().filter_map(|name| Version::parse(name)).collect();
    if known.is_empty() {
        return Err(Flaw::Version(first.chars().take(40).collect()));
    }
    known.sort_unstable_by(|a, b| b.cmp(a));
    known.dedup();
    Ok(known)
}

/// A file that was not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Its path.
    pub(super) file: PathBuf,
    /// Why, in words.
    pub(super) reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.reason)
    }
}

/// The network in use, and the file it is from.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) file: PathBuf,
    pub(super) list: List,
}

/// A directory as it was read.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) chosen: Option<Arc<Chosen>>,
    /// Files before the chosen one, or all of them when none is.
    pub(super) skipped: Vec<Skipped>,
    /// Why the directory itself could not be read.
    pub(super) unreadable: Option<String>,
    stamps: Vec<Stamp>,
}

/// What tells that a file was replaced or edited. The change time catches a writer that sets the
/// modification time back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Reads `dir`, or says that it is as `last` has it.
pub(super) fn refresh(dir: &Path, last: Option<&Arc<Snapshot>>) -> Arc<Snapshot> {
    let (files, stamps) = match candidates(dir) {
        Ok(found) => found,
        Err(error) => {
            return Arc::new(Snapshot {
                unreadable: Some(error.to_string()),
                ..Snapshot::default()
            });
        }
    };
    if let Some(last) = last
        && last.unreadable.is_none()
        && last.stamps == stamps
    {
        return Arc::clone(last);
    }
    let mut snapshot = Snapshot { stamps, ..Snapshot::default() };
    for file in files {
        match load(dir, &file) {
            Ok(list) => {
                snapshot.chosen = Some(Arc::new(Chosen { file, list }));
                break;
            }
            Err(flaw) => snapshot.skipped.push(Skipped { file, reason: flaw.to_string() }),
        }
    }
    Arc::new(snapshot)
}

fn has_extension(path: &Path, any: &[&str]) -> bool {
    path.extension().is_some_and(|found| any.iter().any(|wanted| found == *wanted))
}

/// The files that may be configurations, by name, and the stamps of all that they depend on.
fn candidates(dir: &Path) -> io::Result<(Vec<PathBuf>, Vec<Stamp>)> {
    let mut files = Vec::new();
    let mut stamps = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        // Follows links: configuration directories of Kubernetes volumes are made of them.
        let Ok(meta) = fs::metadata(&path) else {
            if has_extension(&path, &["conf", "conflist", "json"]) {
                files.push(path);
            }
            continue;
        };
        if meta.is_dir() {
            // Further plugins of the network of that name, see `load`.
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                if let Ok(meta) = fs::metadata(entry.path()) {
                    stamps.push(Stamp::new(entry.path(), &meta));
                }
            }
        } else if has_extension(&path, &["conf", "conflist", "json"]) {
            stamps.push(Stamp::new(path.clone(), &meta));
            files.push(path);
        }
    }
    files.sort_unstable();
    stamps.sort_unstable();
    Ok((files, stamps))
}

impl Stamp {
    fn new(path: PathBuf, meta: &fs::Metadata) -> Self {
        Self {
            path,
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

fn load(dir: &Path, file: &Path) -> Result<List, Flaw> {
    let value = read_json(file)?;
    if !has_extension(file, &["conflist"]) {
        return List::parse_single(value);
    }
    let inlined_only = match &value {
        Value::Object(object) => flag(object, "loadOnlyInlinedPlugins")?,
        _ => return Err(Flaw::NotAnObject),
    };
    let mut list = List::parse(value)?;
    if !inlined_only {
        // 1.1.0: the directory named like the network holds further plugins, one per .conf file.
        let mut more: Vec<_> = match fs::read_dir(dir.join(&list.name)) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(_) => Vec::new(),
        };
        more.retain(|path| has_extension(path, &["conf"]));
        more.sort_unstable();
        for path in more {
            list.plugins.push(Plugin::parse(read_json(&path)?)?);
        }
    }
    if list.plugins.is_empty() {
        return Err(Flaw::NoPlugins);
    }
    Ok(list)
}

fn read_json(path: &Path) -> Result<Value, Flaw> {
    // Not blocking: a FIFO that someone left in the directory must not hang the daemon.
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Flaw::NotAFile);
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Flaw::TooLarge);
    }
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        fs::write(dir.join(name), text).unwrap();
    }

    fn bridge(name: &str) -> String {
        format!(r#"{{"cniVersion":"1.0.0","name":"{name}","plugins":[{{"type":"bridge"}}]}}"#)
    }

    #[test]
    fn the_first_valid_file_by_name_is_used_and_the_rest_are_explained() {
        let table: &[(&str, &str, &str)] = &[
            ("01.conf", "", "it is not valid JSON"),
            ("02.conf", "[]", "it is not a JSON object"),
            ("03.conf", "{}", "`type` is missing"),
            ("04.conf", r#"{"type":"bridge"}"#, "`name` is missing"),
            ("05.conf", r#"{"type":"../sh","name":"a"}"#, "is not a file name"),
            ("06.conf", r#"{"type":"a","name":"-a"}"#, "the name \"-a\" is not valid"),
            ("07.conf", r#"{"type":"a","name":"a","cniVersion":"9.0.0"}"#, "9.0.0"),
            ("08.json", r#"{"plugins":[{"type":"a"}],"name":"a"}"#, "must end in .conflist"),
            ("09.conflist", r#"{"name":"a","plugins":[]}"#, "lists no plugins"),
            ("10.conflist", r#"{"name":"a","plugins":[1]}"#, "list of objects"),
            ("11.conflist", r#"{"name":"a","plugins":{"type":"a"}}"#, "list of objects"),
            ("12.conflist", r#"{"name":"a","plugins":[{"type":"a"},{}]}"#, "`type` is missing"),
            ("13.conflist", r#"{"name":"a","disableCheck":7,"plugins":[]}"#, "true or false"),
            ("14.conf", r#"{"type":7,"name":"a"}"#, "`type` must be a string"),
            ("15.conf", r#"{"type":"a","name":"a","cniVersions":"1.0.0"}"#, "list of strings"),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (name, text, _) in table {
            write(dir.path(), name, text);
        }
        write(dir.path(), "20.conflist", &bridge("good"));
        write(dir.path(), "30.conflist", &bridge("later"));
        write(dir.path(), "00.conflist.bak", &bridge("wrong"));
        let snapshot = refresh(dir.path(), None);
        assert_eq!(snapshot.chosen.as_ref().unwrap().list.name, "good");
        assert_eq!(snapshot.skipped.len(), table.len());
        for ((name, _, reason), skipped) in table.iter().zip(&snapshot.skipped) {
            assert_eq!(skipped.file, dir.path().join(name));
            assert!(skipped.reason.contains(reason), "{name}: {}", skipped.reason);
        }
    }

    #[test]
    fn files_that_are_not_files_are_skipped_without_hanging() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("1.conf"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join("2.conf")).unwrap();
        write(dir.path(), "3.conf", &" ".repeat(MAX_FILE as usize + 1));
        let snapshot = refresh(dir.path(), None);
        let reasons: Vec<_> = snapshot.skipped.iter().map(|s| s.reason.as_str()).collect();
        assert_eq!(reasons.len(), 3);
        assert_eq!(reasons[0], "it is not a regular file");
        assert!(reasons[1].starts_with("it cannot be read"), "{reasons:?}");
        assert_eq!(reasons[2], "it is larger than 1048576 bytes");
        assert!(snapshot.chosen.is_none());
    }

    #[test]
    fn a_single_plugin_configuration_is_a_list_of_one() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "1.conf", r#"{"cniVersion":"0.3.1","name":"n","type":"ptp","mtu":9}"#);
        let list = refresh(dir.path(), None).chosen.clone().unwrap().list.clone();
        assert_eq!((list.name.as_str(), list.versions[0]), ("n", Version::V0_3_1));
        assert_eq!(list.plugins[0].config["mtu"], 9);
    }

    #[test]
    fn versions_are_newest_first_and_unknown_ones_are_passed_over() {
        let list =
            |text: &str| List::parse(serde_json::from_str(text).unwrap()).map(|l| l.versions);
        let both = r#"{"name":"a","cniVersion":"0.4.0","cniVersions":["0.4.0","1.1.0","7.0.0"]}"#;
        assert_eq!(list(both).unwrap(), [Version::V1_1_0, Version::V0_4_0]);
        assert_eq!(list(r#"{"name":"a"}"#).unwrap(), [Version::V0_1_0]);
        assert!(list(r#"{"name":"a","cniVersions":["7.0.0"]}"#).is_err());
    }

    #[test]
    fn plugins_in_the_networks_directory_are_appended_unless_told_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("net")).unwrap();
        write(dir.path(), "net/20.conf", r#"{"type":"tuning"}"#);
        write(dir.path(), "net/10.conf", r#"{"type":"portmap"}"#);
        write(dir.path(), "net/readme", "no");
        write(dir.path(), "1.conflist", &bridge("net"));
        let first = refresh(dir.path(), None);
        let kinds = |snapshot: &Snapshot| -> Vec<String> {
            let list = &snapshot.chosen.as_ref().unwrap().list;
            list.plugins.iter().map(|plugin| plugin.kind.clone()).collect()
        };
        assert_eq!(kinds(&first), ["bridge", "portmap", "tuning"]);
        fs::remove_file(dir.path().join("net/10.conf")).unwrap();
        assert_eq!(kinds(&refresh(dir.path(), Some(&first))), ["bridge", "tuning"]);
        let text = r#"{"name":"net","loadOnlyInlinedPlugins":true,"plugins":[{"type":"ptp"}]}"#;
        write(dir.path(), "1.conflist", text);
        assert_eq!(kinds(&refresh(dir.path(), Some(&first))), ["ptp"]);
    }

    #[test]
    fn changes_are_noticed_and_nothing_is_parsed_again_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("later");
        let none = refresh(&missing, None);
        assert!(none.unreadable.is_some());
        fs::create_dir(&missing).unwrap();
        let empty = refresh(&missing, Some(&none));
        assert!(empty.chosen.is_none() && empty.unreadable.is_none());
        write(&missing, "5.conflist", &bridge("five"));
        let five = refresh(&missing, Some(&empty));
        assert_eq!(five.chosen.as_ref().unwrap().list.name, "five");
        assert!(Arc::ptr_eq(&five, &refresh(&missing, Some(&five))));
        write(&missing, "5.conflist", &bridge("5555"));
        let edited = refresh(&missing, Some(&five));
        assert_eq!(edited.chosen.as_ref().unwrap().list.name, "5555");
        write(&missing, "1.conflist", &bridge("one"));
        let one = refresh(&missing, Some(&edited));
        assert_eq!(one.chosen.as_ref().unwrap().list.name, "one");
        fs::remove_dir_all(&missing).unwrap();
        assert!(refresh(&missing, Some(&one)).chosen.is_none());
    }

    #[test]
    fn a_recorded_list_reads_back_as_it_was() {
        let text = r#"{"cniVersion":"0.4.0","cniVersions":["1.0.0"],"name":"a","disableCheck":"true",
            "plugins":[{"type":"x","capabilities":{"ips":true,"mac":false}}]}"#;
        let list = List::parse(serde_json::from_str(text).unwrap()).unwrap();
        assert!(list.disable_check && !list.disable_gc);
        assert!(list.plugins[0].wants("ips"));
        assert!(!list.plugins[0].wants("mac") && !list.plugins[0].wants("dns"));
        let again = List::parse(list.to_value(Version::V1_0_0)).unwrap();
        assert_eq!(again.versions, [Version::V1_0_0]);
        assert_eq!(again.plugins, list.plugins);
    }

    proptest! {
        #[test]
        fn nothing_that_is_in_a_file_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(value) = serde_json::from_slice::<Value>(&bytes) {
                let _ = List::parse(value.clone());
                let _ = List::parse_single(value);
            }
        }
    }
}
