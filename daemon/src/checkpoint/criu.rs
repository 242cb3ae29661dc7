//! Whether containers can be checkpointed and restored here: the OCI runtime must be built for it,
//! criu must be installed, and criu must know this kernel.
//!
//! Asked before anything is frozen, so that a node that cannot do it disturbs nobody.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::process::Command;

use crate::{
    config::find_program,
    error::{Kind, Kinded},
    node::CgroupMode,
    spec::RuntimeFeatures,
};

/// How long criu may take to say whether it works.
const ASK: Duration = Duration::from_secs(20);

/// Why nothing can be checkpointed or restored here.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is its documentation")]
pub enum Error {
    #[error(
        "OCI runtime {runtime} is built without checkpoint and restore (so its features say): use a \
         runtime handler with one that is built with criu"
    )]
    NotBuilt { runtime: PathBuf },
    #[error(
        "{runtime} restores containers into the root cgroup on a node with cgroup v1, and ends what else is \
         there, all of the node's processes: use a runtime handler with runc, or a node with cgroup v2"
    )]
    RootCgroup { runtime: PathBuf },
    #[error(
        "criu is not installed on this node: install it where the PATH of holdfastd finds it (Debian: \
         package criu), 3.16 or newer"
    )]
    NotInstalled,
    #[error("{criu} cannot be run")]
    Run { criu: PathBuf, source: std::io::Error },
    #[error("{criu} check did not end within {ASK:?}")]
    Hangs { criu: PathBuf },
    #[error(
        "criu does not work on this node with Linux {kernel}: {message}: install a criu that knows \
         this kernel, or use a kernel that it knows (`criu check` must end well)"
    )]
    Refuses { kernel: String, message: String },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Hangs { .. } => Kind::Deadline,
            Error::NotBuilt { .. }
            | Error::RootCgroup { .. }
            | Error::NotInstalled
            | Error::Run { .. }
            | Error::Refuses { .. } => Kind::Precondition,
        }
    }
}

/// Whether an OCI runtime can checkpoint and restore here.
///
/// # Errors
/// What is missing.
pub async fn check(
    runtime: &Path,
    features: &RuntimeFeatures,
    cgroup: CgroupMode,
) -> Result<(), Error> {
    // Seen with crun 1.28: criu is told "/" for the container's cgroup in every hierarchy.
    let is_crun = runtime.file_name().is_some_and(|name| name.to_string_lossy().contains("crun"));
    if is_crun && cgroup != CgroupMode::V2 {
        return Err(Error::RootCgroup { runtime: runtime.to_owned() });
    }
    if features.checkpoint == Some(false) {
        return Err(Error::NotBuilt { runtime: runtime.to_owned() });
    }
    let criu = find_program(Path::new("criu")).ok_or(Error::NotInstalled)?;
    let output = Command::new(&criu).arg("check").kill_on_drop(true).output();
    let output = match tokio::time::timeout(ASK, output).await {
        Ok(Ok(output)) => output,
        Ok(Err(source)) => return Err(Error::Run { criu, source }),
        Err(_) => return Err(Error::Hangs { criu }),
    };
    if output.status.success() {
        return Ok(());
    }
    let release = nix::sys::utsname::uname();
    let kernel = release.as_ref().map(|name| name.release().to_string_lossy().into_owned());
    let message = reason(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Refuses { kernel: kernel.unwrap_or_default(), message })
}

/// What criu says was wrong: its first error is the cause, those after it only follow.
fn reason(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = |line: &&str| line.starts_with("Error (");
    let found = lines.clone().find(error).or_else(|| lines.next_back());
    found.unwrap_or("criu check failed without a word").to_owned()
}

/// What is added to a message of the OCI runtime: what criu says in that log; empty: nothing.
pub fn said_in(log: &Path) -> String {
    errors_of(log).map(|errors| format!(" (criu: {errors})")).unwrap_or_default()
}

/// The errors of a criu log (`dump.log`, `restore.log`), the last few, on one line.
fn errors_of(log: &Path) -> Option<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    const TAIL: u64 = 64 << 10;
    let mut file = std::fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let errors: Vec<&str> =
        text.lines().filter_map(|line| line.find("Error (").map(|at| line[at..].trim())).collect();
    let last = &errors[errors.len().saturating_sub(3)..];
    (!last.is_empty()).then(|| last.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_the_cause() {
        let text = "Warn  (criu/x.c:1): old\n\
                    Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds\n\
                    Error (criu/kerndat.c:1615): kerndat_vdso_fill_symtable failed\n";
        let wanted = "Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds";
        assert_eq!(reason(text), wanted);
        assert_eq!(reason("no such option\n"), "no such option");
        assert_eq!(reason(""), "criu check failed without a word");
    }

    #[test]
    fn a_log_is_told_by_its_last_errors() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        assert_eq!(errors_of(&log), None);
        std::fs::write(&log, "(00.1) fine\n(00.2) still fine\n").unwrap();
        assert_eq!(errors_of(&log), None);
        let lines: String =
            (0..5).map(|n| format!("(00.{n}) Error (criu/a.c:{n}): e{n}\n")).collect();
        std::fs::write(&log, lines).unwrap();
        let said = errors_of(&log).unwrap();
        assert!(said.starts_with("Error (criu/a.c:2): e2; ") && said.ends_with("e4"), "{said}");
    }

    #[tokio::test]
    async fn a_runtime_that_cannot_is_named() {
        let features = RuntimeFeatures { checkpoint: Some(false), ..RuntimeFeatures::default() };
        let youki = Path::new("/usr/bin/youki");
        let error = check(youki, &features, CgroupMode::V2).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        assert!(error.to_string().contains("/usr/bin/youki"), "{error}");
        // What would harm the node is never begun.
        let crun = Path::new("/usr/bin/crun");
        let error = check(crun, &RuntimeFeatures::default(), CgroupMode::Hybrid).await.unwrap_err();
        assert!(matches!(error, Error::RootCgroup { .. }), "{error}");
        assert_eq!(error.kind(), Kind::Precondition);
    }
}
