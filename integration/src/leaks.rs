//! What there is of a node on the machine, to be compared before and after.

use std::{
    collections::BTreeSet,
    fmt, fs,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
};

use crate::ground::{Ground, names_in, nat_rules};

/// Everything that a node has on the machine besides its daemon, one text for each thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Looks. `spared` are processes that do not count: the daemon and the tests' own servers.
    pub fn take(ground: &Ground, spared: &[i32]) -> Self {
        let mut found = BTreeSet::new();
        found.extend(ground.mounts().iter().map(|path| format!("mount {}", path.display())));
        found.extend(ground.cgroups().iter().map(|path| format!("cgroup {}", path.display())));
        found.extend(ground.links().iter().map(|name| format!("link {name}")));
        for pid in ground.processes() {
            if !spared.contains(&pid) {
                found.insert(format!("process {pid}: {}", command_line(pid)));
            }
        }
        for address in addresses(&ground.path().join("ipam")) {
            found.insert(format!("address {address}"));
        }
        for iptables in ["iptables", "ip6tables"] {
            for rule in nat_rules(iptables, &ground.network()) {
                found.insert(format!("{iptables} {rule}"));
            }
        }
        // Sockets, bundles, pins, FIFOs; and below root snapshots, but not what a database keeps.
        for (dir, depth) in [("state", 4), ("root", 3)] {
            let top = ground.path().join(dir);
            let mut paths = Vec::new();
            list(&top, depth, &mut paths);
            for path in paths {
                let kind = kind(&path);
                // Folders that are made when they are first needed stay, and hold nothing.
                let is_folder = kind == "directory" && !is_an_objects(&path);
                if !is_folder && !is_database(&path) {
                    found.insert(format!("{kind} {}", path.display()));
                }
            }
        }
        Self(found)
    }

    /// What is here and not there.
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).cloned().collect())
    }

    /// Only things of one kind: "mount", "cgroup", "process", "link", "address", "socket", "file" …
    pub fn only(&self, kinds: &[&str]) -> Self {
        let keep = |text: &&String| kinds.iter().any(|kind| text.starts_with(&format!("{kind} ")));
        Self(self.0.iter().filter(keep).cloned().collect())
    }

    /// Everything but the things of a kind.
    pub fn except(&self, kind: &str) -> Self {
        let start = format!("{kind} ");
        Self(self.0.iter().filter(|text| !text.starts_with(&start)).cloned().collect())
    }

    /// What is here and there.
    pub fn both(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).cloned().collect())
    }

    /// What is here or there.
    pub fn with(&self, other: &Self) -> Self {
        Self(self.0.union(&other.0).cloned().collect())
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many things.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for text in &self.0 {
            writeln!(f, "  {text}")?;
        }
        Ok(())
    }
}

/// Addresses that host-local has given away.
pub fn addresses(ipam: &Path) -> Vec<String> {
    names_in(ipam)
        .iter()
        .flat_map(|network| names_in(&ipam.join(network)))
        .filter(|name| name.parse::<std::net::IpAddr>().is_ok())
        .collect()
}

fn command_line(pid: i32) -> String {
    fs::read(format!("/proc/{pid}/cmdline"))
        .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_owned())
        .unwrap_or_default()
}

fn list(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    for name in names_in(dir) {
        let path = dir.join(name);
        let is_dir = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
        found.push(path.clone());
        // A layer's own content is the image's business.
        if is_dir && depth > 1 {
            list(&path, depth - 1, found);
        }
    }
}

fn is_database(path: &Path) -> bool {
    path.file_name().is_some_and(|name| {
        let name = name.to_string_lossy();
        name.contains(".db") || name.contains(".sqlite")
    })
}

/// Whether a name is that of one object: a number, or made from an id or a digest.
fn is_an_objects(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split(|letter: char| !letter.is_ascii_hexdigit()).any(|part| part.len() >= 12)
        || name.bytes().all(|byte| byte.is_ascii_digit())
}

fn kind(path: &Path) -> &'static str {
    match path.symlink_metadata().map(|metadata| metadata.file_type()) {
        Ok(kind) if kind.is_socket() => "socket",
        Ok(kind) if kind.is_fifo() => "fifo",
        Ok(kind) if kind.is_dir() => "directory",
        _ => "file",
    }
}
