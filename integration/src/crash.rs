//! Crash points (`holdfast_shim::crash`): where they are, and how a test makes a process die at one.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

/// The names of all crash points, by the sources: what is added there is tested.
///
/// # Errors
/// The sources are not here, or a name is there twice: it would be tested at one of its places only.
pub fn all_points() -> Result<BTreeSet<String>> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut names = BTreeSet::new();
    let mut open = vec![workspace.join("daemon/src"), workspace.join("shim/src")];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                for name in points_in(&fs::read_to_string(&path)?) {
                    ensure!(names.insert(name.clone()), "two crash points are named {name}");
                }
            }
        }
    }
    Ok(names)
}

/// The names in a source file.
fn points_in(source: &str) -> Vec<String> {
    let calls = source.split("crash::point(").skip(1);
    calls
        .filter_map(|call| call.trim_start().strip_prefix('"')?.split_once('"'))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// The directory through which the crash points of a node's processes are ruled.
#[derive(Clone, Debug)]
pub struct CrashPoints {
    dir: PathBuf,
}

impl CrashPoints {
    /// Of a node that was built with them.
    pub fn of(node: &crate::Node) -> Self {
        Self { dir: node.path().join("crash") }
    }

    pub(crate) fn install(dir: &Path) -> Result<Self> {
        for name in ["armed", "fired"] {
            fs::create_dir_all(dir.join(name))?;
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// The environment variable that processes find it by.
    pub(crate) fn variable(&self) -> (String, String) {
        ("HOLDFAST_CRASH_DIR".into(), self.dir.display().to_string())
    }

    /// The process that comes by this point for the `passage`th time from now on dies there.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn arm(&self, name: &str, passage: usize) -> Result<()> {
        let _ = fs::remove_file(self.dir.join("fired").join(name));
        // In one step: a process may be looking.
        let new = self.dir.join("new");
        fs::write(&new, passage.to_string())?;
        Ok(fs::rename(new, self.dir.join("armed").join(name))?)
    }

    /// Disarms every point and forgets what was passed.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn reset(&self) -> Result<()> {
        for name in self.armed() {
            let _ = fs::remove_file(self.dir.join("armed").join(name));
        }
        Ok(fs::write(self.dir.join("trace"), "")?)
    }

    /// Points that no process has died at yet.
    pub fn armed(&self) -> Vec<String> {
        crate::ground::names_in(&self.dir.join("armed"))
    }

    /// The points that were passed since the last reset, in order.
    pub fn trace(&self) -> Vec<String> {
        let trace = fs::read_to_string(self.dir.join("trace")).unwrap_or_default();
        trace.lines().map(String::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_a_source_however_it_is_formatted() {
        let source =
            "crash::point(\"a.b.c\"); crash::point(\n    \"d\",\n);\npub fn point(name: &str)";
        assert_eq!(points_in(source), ["a.b.c", "d"]);
    }

    #[test]
    fn there_are_points_in_both_programs() {
        let all = all_points().unwrap();
        for program in ["daemon.", "shim."] {
            assert!(all.iter().any(|name| name.starts_with(program)), "{all:?}");
        }
        assert!(all.iter().all(|name| name.split('.').count() == 3), "{all:?}");
    }
}
