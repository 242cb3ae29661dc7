//! Where the binaries under test are.
//!
//! Cargo tells a test only about binaries of its own package, and the shim is built apart (static,
//! another target), so a recipe is needed. It stands in one place, the Makefile's `test-bins`, and its
//! result is a directory of links. `HOLDFAST_BIN_DIR` names such a directory; without it the recipe is
//! run once per process, which costs a second when everything is built.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result, anyhow, ensure};

/// The three programs, and the one that makes images.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// `holdfastd`
    pub daemon: PathBuf,
    /// `containerd-shim-holdfast-v2`
    pub shim: PathBuf,
    /// `holdfast`
    pub cli: PathBuf,
}

/// The binaries under test.
///
/// # Errors
/// A binary is not in `HOLDFAST_BIN_DIR`, or the build failed; the error holds its output.
pub fn binaries() -> Result<Binaries> {
    static FOUND: OnceLock<Result<Binaries, String>> = OnceLock::new();
    FOUND
        .get_or_init(|| find().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))
}

/// Those of the release before this one, which `make previous` builds; `None`: it could not, and has
/// said why, for a clone need not have that commit. `make test` repeats that at its end.
///
/// # Errors
/// `make previous` was not run.
pub fn previous() -> Result<Option<Binaries>> {
    let beside = binaries()?.daemon.with_file_name("previous");
    if let Ok(reason) = fs::read_to_string(beside.join("missing")) {
        eprintln!("version skew is NOT tested: {}", reason.trim());
        return Ok(None);
    }
    in_dir(&beside).map(Some).context("the release before this one: run 'make previous'")
}

fn find() -> Result<Binaries> {
    match env::var_os("HOLDFAST_BIN_DIR") {
        Some(dir) => in_dir(Path::new(&dir)),
        None => in_dir(&build()?),
    }
}

fn in_dir(dir: &Path) -> Result<Binaries> {
    let binary = |name: &str| {
        let path = dir.join(name);
        ensure!(
            path.is_file(),
            "{} is missing: run 'make test-bins', or point HOLDFAST_BIN_DIR at a directory that has it",
            path.display()
        );
        Ok(path)
    };
    Ok(Binaries {
        daemon: binary("holdfastd")?,
        shim: binary("containerd-shim-holdfast-v2")?,
        cli: binary("holdfast")?,
    })
}

fn build() -> Result<PathBuf> {
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new("make")
        .args(["--no-print-directory", "test-bins"])
        .current_dir(&workspace)
        .output()
        .context("run make")?;
    ensure!(
        output.status.success(),
        "make test-bins: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let target = env::var_os("CARGO_TARGET_DIR").map_or(workspace.join("target"), PathBuf::from);
    Ok(target.join("test-bin").canonicalize()?)
}
