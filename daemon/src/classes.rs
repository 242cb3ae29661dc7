//! Classes of block I/O and of RDT (cache and memory bandwidth), which pods choose by annotation.
//! The names of the annotations are those that the other runtimes read.
//!
//! Block I/O classes are in a file of the node's administrator: devices, weights and limits by the
//! name of a class. RDT classes are control groups of the kernel's resctrl file system
//! (Documentation/filesystems/resctrl.rst), which the administrator makes.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex},
};

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDeviceBuilder, LinuxWeightDeviceBuilder};
use serde::Deserialize;

use crate::{
    error::{Kind, Kinded},
    node::{CgroupMode, Node},
    pod::config::Map,
};

/// Why a container cannot have its class.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node, its kernel or its configuration lacks something.
    #[error("{annotation} = {class:?}: {lacks}")]
    Lacking {
        /// Who asks for it.
        annotation: String,
        /// The class.
        class: String,
        /// What is missing, and what to do.
        lacks: String,
    },
    /// The file of classes.
    #[error("block I/O classes {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why it is not understood.
        source: io::Error,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        Kind::Precondition
    }
}

/// What there are classes of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Block I/O.
    BlockIo,
    /// Caches and memory bandwidth.
    Rdt,
}

/// A class that a container is to be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    class: String,
    annotation: String,
}

impl Choice {
    /// One that an NRI plugin has made.
    pub fn of_plugin(class: &str, plugin: &str) -> Self {
        Self { class: class.to_owned(), annotation: format!("NRI plugin {plugin}") }
    }

    fn lacking(&self, lacks: impl Into<String>) -> Error {
        Error::Lacking {
            annotation: self.annotation.clone(),
            class: self.class.clone(),
            lacks: lacks.into(),
        }
    }
}

/// The class of a container: by its own annotation, else by the pod's for that container, else by
/// the pod's for all.
pub fn choice(what: Resource, container: &str, own: &Map, pod: &Map) -> Option<Choice> {
    let word = match what {
        Resource::BlockIo => "blockio",
        Resource::Rdt => "rdt",
    };
    let prefix = format!("{word}.resources.beta.kubernetes.io/");
    let places = [
        (own, format!("io.kubernetes.cri.{word}-class")),
        (pod, format!("{prefix}container.{container}")),
        (pod, format!("{prefix}pod")),
    ];
    places.into_iter().find_map(|(map, annotation)| {
        let class = map.get(&annotation)?.clone();
        Some(Choice { class, annotation })
    })
}

/// `linux.intelRdt.closID` for a class: its control group must be there.
pub fn rdt(choice: &Choice, resctrl: &Path) -> Result<String, Error> {
    let class = &choice.class;
    // The mount point itself is an empty directory while nothing is mounted there.
    if !resctrl.join("schemata").exists() {
        return Err(choice.lacking(format!(
            "RDT needs a processor that has it and resctrl mounted at {}",
            resctrl.display()
        )));
    }
    let plain = Path::new(class).components().all(|part| matches!(part, Component::Normal(_)))
        && !class.contains('/')
        && !class.is_empty();
    if !plain || !resctrl.join(class).join("schemata").exists() {
        return Err(choice.lacking(format!(
            "{} has no control group of that name: make one, or name another",
            resctrl.display()
        )));
    }
    Ok(class.clone())
}

/// The classes of the configured file.
#[derive(Debug)]
pub struct BlockIo {
    path: Option<PathBuf>,
    kept: Mutex<Option<(Stamp, Arc<File>)>>,
}

/// Inode, size, and time of change.
type Stamp = (u64, u64, i64, i64);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "Classes", default)]
    classes: BTreeMap<String, Vec<Entry>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase", default)]
struct Entry {
    devices: Vec<String>,
    weight: Option<Number>,
    throttle_read_bps: Option<Number>,
    throttle_write_bps: Option<Number>,
    #[serde(rename = "ThrottleReadIOPS")]
    throttle_read_iops: Option<Number>,
    #[serde(rename = "ThrottleWriteIOPS")]
    throttle_write_iops: Option<Number>,
}

/// 500, "60M", "1Gi".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Number(u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(number) => Ok(Self(number)),
            Raw::Text(text) => number(&text).map(Self).ok_or_else(|| {
                serde::de::Error::custom(format!("{text:?} is not a number like 500, 60M or 1Gi"))
            }),
        }
    }
}

/// As quantities are written in Kubernetes, whole and positive.
fn number(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let factor: u64 = match unit {
        "" => 1,
        "k" | "K" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

impl BlockIo {
    /// Those of `path`; `None`: there are none.
    pub fn new(path: Option<PathBuf>) -> Self {
        Self { path, kept: Mutex::default() }
    }

    /// `linux.resources.blockIO` of a class. Blocks for file reads.
    pub fn class(&self, choice: &Choice, node: &Node) -> Result<LinuxBlockIo, Error> {
        let Some(path) = &self.path else {
            return Err(
                choice.lacking("this node has no block I/O classes: set runtime.blockio_config")
            );
        };
        let file = self.file(path)?;
        let Some(entries) = file.classes.get(&choice.class) else {
            let known: Vec<_> = file.classes.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(
                choice.lacking(format!("{} has no such class; it has {known}", path.display()))
            );
        };
        let (controller, root) = match node.cgroup.mode {
            CgroupMode::V2 => ("io", Path::new("/sys/fs/cgroup")),
            CgroupMode::V1 | CgroupMode::Hybrid => ("blkio", Path::new("/sys/fs/cgroup/blkio")),
        };
        if !node.cgroup.has(controller) {
            return Err(choice.lacking(format!("this node has no {controller} cgroup controller")));
        }
        let weights = || has_weights(root);
        build(entries, &block_devices, &weights).map_err(|lacks| choice.lacking(lacks))
    }

    fn file(&self, path: &Path) -> Result<Arc<File>, Error> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        let meta = fs::metadata(path).map_err(failed)?;
        let stamp = (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((known, file)) = &*kept
            && *known == stamp
        {
            return Ok(file.clone());
        }
        let text = fs::read(path).map_err(failed)?;
        let file: File = serde_yaml_ng::from_slice(&text)
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        let file = Arc::new(file);
        *kept = Some((stamp, file.clone()));
        Ok(file)
    }
}

/// Whether this kernel can weigh I/O: only with some I/O schedulers, and files of it are in child
/// cgroups only. On a node without any child nobody can tell: then the runtime does.
fn has_weights(root: &Path) -> bool {
    let files = ["io.weight", "io.bfq.weight", "blkio.weight", "blkio.bfq.weight"];
    let has = |dir: &Path| files.iter().any(|file| dir.join(file).exists());
    let children = fs::read_dir(root).map(|entries| {
        entries.flatten().map(|e| e.path()).filter(|path| path.is_dir()).collect::<Vec<_>>()
    });
    match children {
        Ok(children) if !children.is_empty() => has(root) || children.iter().any(|dir| has(dir)),
        _ => true,
    }
}

type Numbers = (i64, i64);

fn build(
    entries: &[Entry],
    devices: &dyn Fn(&str) -> Result<Vec<Numbers>, String>,
    weights: &dyn Fn() -> bool,
) -> Result<LinuxBlockIo, String> {
    let mut weight = None;
    let mut by_device = BTreeMap::<Numbers, u16>::new();
    let mut limits: [BTreeMap<Numbers, u64>; 4] = Default::default();
    for entry in entries {
        let found =
            entry.devices.iter().map(|pattern| devices(pattern)).collect::<Result<Vec<_>, _>>()?;
        let found: Vec<Numbers> = found.into_iter().flatten().collect();
        if let Some(Number(value)) = entry.weight {
            let value = u16::try_from(value).ok().filter(|w| (10..=1000).contains(w));
            let value = value.ok_or("a Weight must be from 10 to 1000")?;
            if !weights() {
                return Err(
                    "a Weight needs the BFQ I/O scheduler, or io.weight of cgroup v2".to_owned()
                );
            }
            match entry.devices.is_empty() {
                true => weight = Some(value),
                false => by_device.extend(found.iter().map(|device| (*device, value))),
            }
        }
        let given = [
            entry.throttle_read_bps,
            entry.throttle_write_bps,
            entry.throttle_read_iops,
            entry.throttle_write_iops,
        ];
        for (limit, value) in limits.iter_mut().zip(given) {
            let Some(Number(value)) = value else { continue };
            if entry.devices.is_empty() {
                return Err("a limit needs Devices".to_owned());
            }
            limit.extend(found.iter().map(|device| (*device, value)));
        }
    }
    let mut out = LinuxBlockIo::default();
    out.set_weight(weight);
    let weigh = |((major, minor), weight): (Numbers, u16)| {
        let device = LinuxWeightDeviceBuilder::default().major(major).minor(minor).weight(weight);
        device.build().expect("every field has a default")
    };
    if !by_device.is_empty() {
        out.set_weight_device(Some(by_device.into_iter().map(weigh).collect()));
    }
    let [read_bps, write_bps, read_iops, write_iops] = limits.map(|limit| {
        let throttle = |((major, minor), rate): (Numbers, u64)| {
            let device = LinuxThrottleDeviceBuilder::default().major(major).minor(minor).rate(rate);
            device.build().expect("every field has a default")
        };
        (!limit.is_empty()).then(|| limit.into_iter().map(throttle).collect::<Vec<_>>())
    });
    out.set_throttle_read_bps_device(read_bps)
        .set_throttle_write_bps_device(write_bps)
        .set_throttle_read_iops_device(read_iops)
        .set_throttle_write_iops_device(write_iops);
    Ok(out)
}

/// Numbers of the whole disks that a path or a pattern names. A pattern may name none: one file of
/// classes serves nodes with different disks.
fn block_devices(pattern: &str) -> Result<Vec<Numbers>, String> {
    if !pattern.starts_with('/') {
        return Err(format!("device {pattern:?} is not an absolute path"));
    }
    let is_pattern = pattern.contains(['*', '?', '[']);
    let mut found = Vec::new();
    for path in expand(Path::new(pattern)) {
        let meta = match fs::metadata(&path) {
            Ok(meta) if meta.file_type().is_block_device() => meta,
            _ if is_pattern => continue,
            Ok(_) => return Err(format!("{} is not a block device", path.display())),
            Err(error) => return Err(format!("device {}: {error}", path.display())),
        };
        let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        if Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists() {
            if is_pattern {
                continue;
            }
            return Err(format!(
                "{} is a partition: limits are those of whole disks",
                path.display()
            ));
        }
        found.push((major.into(), minor.into()));
    }
    Ok(found)
}

/// Paths that match, component by component; a path without wildcards is itself.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::new()];
    for part in pattern.components() {
        let text = part.as_os_str().to_string_lossy();
        if !text.contains(['*', '?', '[']) {
            paths.iter_mut().for_each(|path| path.push(part));
            continue;
        }
        let mut next = Vec::new();
        for path in &paths {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            next.extend(names.filter(|name| matches(&text, name)).map(|name| path.join(name)));
        }
        next.sort();
        paths = next;
    }
    paths
}

/// glob(7) within one component: `*`, `?`, `[a-z]`, `[!a-z]`.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    // Positions to go back to when what follows the last star does not fit: linear, not exponential.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
                continue;
            }
            Some('?') => {
                (p, n) = (p + 1, n + 1);
                continue;
            }
            Some('[') => {
                if let Some((hit, after)) = class(&pattern[p..], name[n])
                    && hit
                {
                    (p, n) = (p + after, n + 1);
                    continue;
                }
            }
            Some(c) if *c == name[n] => {
                (p, n) = (p + 1, n + 1);
                continue;
            }
            _ => {}
        }
        match star {
            Some((at, from)) => {
                (p, n) = (at + 1, from + 1);
                star = Some((at, from + 1));
            }
            None => return false,
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Whether `c` is in the bracket expression that `pattern` begins with, and how long that is.
fn class(pattern: &[char], c: char) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(1), Some('!' | '^'));
    let first = if negated { 2 } else { 1 };
    // A "]" in the first place is one of the characters.
    let end = (first + 1..pattern.len()).find(|at| pattern[*at] == ']')?;
    let set = &pattern[first..end];
    let mut hit = false;
    let mut at = 0;
    while at < set.len() {
        if set.get(at + 1) == Some(&'-') && at + 2 < set.len() {
            hit |= (set[at]..=set[at + 2]).contains(&c);
            at += 3;
        } else {
            hit |= set[at] == c;
            at += 1;
        }
    }
    Some((hit != negated, end + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map<const N: usize>(pairs: [(&str, &str); N]) -> Map {
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    fn chosen(class: &str) -> Choice {
        Choice { class: class.into(), annotation: "a".into() }
    }

    #[test]
    fn the_nearest_annotation_chooses() {
        let mut own = Map::new();
        let mut pod = map([("blockio.resources.beta.kubernetes.io/pod", "p")]);
        let class = |own: &Map, pod: &Map| {
            choice(Resource::BlockIo, "c", own, pod).map(|choice| choice.class)
        };
        assert_eq!(class(&own, &Map::new()), None);
        assert_eq!(class(&own, &pod).as_deref(), Some("p"));
        pod.insert("blockio.resources.beta.kubernetes.io/container.d".into(), "d".into());
        assert_eq!(class(&own, &pod).as_deref(), Some("p"));
        pod.insert("blockio.resources.beta.kubernetes.io/container.c".into(), "c".into());
        assert_eq!(class(&own, &pod).as_deref(), Some("c"));
        own.insert("io.kubernetes.cri.blockio-class".into(), "own".into());
        assert_eq!(class(&own, &pod).as_deref(), Some("own"));
        assert_eq!(choice(Resource::Rdt, "c", &own, &pod), None);
        let rdt = map([("rdt.resources.beta.kubernetes.io/pod", "r")]);
        assert_eq!(choice(Resource::Rdt, "c", &own, &rdt).unwrap().class, "r");
    }

    #[test]
    fn an_rdt_class_is_a_control_group() {
        let tmp = tempfile::tempdir().unwrap();
        let error = rdt(&chosen("gold"), tmp.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        assert!(error.to_string().contains("resctrl mounted"), "{error}");
        fs::write(tmp.path().join("schemata"), "").unwrap();
        let error = rdt(&chosen("gold"), tmp.path()).unwrap_err().to_string();
        assert!(error.contains("gold") && error.contains("no control group"), "{error}");
        fs::create_dir(tmp.path().join("gold")).unwrap();
        fs::write(tmp.path().join("gold/schemata"), "").unwrap();
        assert_eq!(rdt(&chosen("gold"), tmp.path()).unwrap(), "gold");
        for bad in ["..", "gold/../gold", "/gold", "", "."] {
            assert!(rdt(&chosen(bad), tmp.path()).is_err(), "{bad}");
        }
    }

    fn entries(yaml: &str) -> Vec<Entry> {
        serde_yaml_ng::from_str(yaml).unwrap()
    }

    #[test]
    fn entries_of_a_class_are_taken_together() {
        let yaml = r#"
- Weight: 50
- Devices: [/dev/a, /dev/b]
  ThrottleReadBps: 60M
  ThrottleWriteIOPS: 1k
- Devices: [/dev/b]
  ThrottleReadBps: 1Ki
  Weight: "100"
"#;
        let devices = |path: &str| Ok(vec![(8, if path == "/dev/a" { 0 } else { 16 })]);
        let out = build(&entries(yaml), &devices, &|| true).unwrap();
        let json = serde_json::to_value(&out).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "weight": 50,
                "weightDevice": [{"major": 8, "minor": 16, "weight": 100}],
                "throttleReadBpsDevice": [
                    {"major": 8, "minor": 0, "rate": 60_000_000},
                    {"major": 8, "minor": 16, "rate": 1024},
                ],
                "throttleWriteIOPSDevice": [
                    {"major": 8, "minor": 0, "rate": 1000},
                    {"major": 8, "minor": 16, "rate": 1000},
                ],
            })
        );
    }

    #[test]
    fn what_cannot_be_is_said() {
        let none = |_: &str| Ok(Vec::new());
        let refused =
            |yaml: &str, weights: bool| build(&entries(yaml), &none, &|| weights).unwrap_err();
        assert!(refused("- Weight: 5", true).contains("10 to 1000"));
        assert!(refused("- Weight: 50", false).contains("BFQ"));
        assert!(refused("- ThrottleReadBps: 1", true).contains("needs Devices"));
        assert!(serde_yaml_ng::from_str::<Vec<Entry>>("- Wait: 5").is_err());
        assert!(serde_yaml_ng::from_str::<Vec<Entry>>("- ThrottleReadBps: 1X").is_err());
        assert!(block_devices("sda").unwrap_err().contains("absolute"));
        assert!(block_devices("/dev/null").unwrap_err().contains("not a block device"));
        assert!(block_devices("/dev/no-such").unwrap_err().contains("/dev/no-such"));
        assert_eq!(block_devices("/dev/no-such*").unwrap(), []);
    }

    #[test]
    fn a_class_that_is_not_there_names_those_that_are() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("blockio.yaml");
        let mut node = crate::spec::tests::node();
        let none = BlockIo::new(None).class(&chosen("slow"), &node).unwrap_err().to_string();
        assert!(none.contains("runtime.blockio_config"), "{none}");
        let classes = BlockIo::new(Some(path.clone()));
        assert!(
            classes.class(&chosen("slow"), &node).unwrap_err().to_string().contains("blockio.yaml")
        );
        fs::write(&path, "Classes:\n  fast: []\n").unwrap();
        let error = classes.class(&chosen("slow"), &node).unwrap_err().to_string();
        assert!(error.contains("it has fast"), "{error}");
        fs::write(
            &path,
            "Classes:\n  slow:\n  - Devices: [\"/dev/no*\"]\n    ThrottleReadBps: 1\n",
        )
        .unwrap();
        assert_eq!(classes.class(&chosen("slow"), &node).unwrap(), LinuxBlockIo::default());
        node.cgroup.controllers.remove("io");
        let error = classes.class(&chosen("slow"), &node).unwrap_err().to_string();
        assert!(error.contains("no io cgroup controller"), "{error}");
    }

    #[test]
    fn patterns_are_globs() {
        for (pattern, name, hit) in [
            ("sd*", "sda", true),
            ("sd*", "sd", true),
            ("sd?", "sd", false),
            ("sd[a-c]", "sdb", true),
            ("sd[a-c]", "sdd", false),
            ("sd[!a-c]", "sdd", true),
            ("nvme*n1", "nvme0n1", true),
            ("nvme*n1", "nvme0n1p1", false),
            ("*a*b", "xaxxb", true),
            ("[", "[", false),
            ("[]]", "]", true),
        ] {
            assert_eq!(matches(pattern, name), hit, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn a_name_matches_itself_and_stars(name in "[a-z0-9]{0,12}", at in 0usize..12) {
            prop_assert!(matches(&name, &name));
            let at = at.min(name.len());
            let starred = format!("{}*{}", &name[..at], &name[at..]);
            prop_assert!(matches(&starred, &name));
        }

        #[test]
        fn no_pattern_panics(pattern: String, name: String) {
            matches(&pattern, &name);
            number(&pattern);
        }
    }
}
