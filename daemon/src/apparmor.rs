//! The default AppArmor profile, and loading it when the daemon starts.
//!
//! The kernel takes compiled policy only, and `apparmor_parser` alone compiles it. The profile is
//! replaced at each start, so that an upgrade's changes reach containers that run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{io::AsyncWriteExt, process::Command};
use tracing::{info, warn};

use crate::{config::find_program, node::Node, spec::APPARMOR_DEFAULT};

/// How long the parser may take. It is some 100 ms on a slow node.
const DEADLINE: Duration = Duration::from_secs(30);

/// What became of the default profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The kernel has no AppArmor, or it is off.
    Off,
    /// Loaded.
    Loaded,
    /// Not loaded, and why. A container that asks for it is refused.
    Failed(String),
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            State::Off => f.write_str("off: the kernel has no AppArmor"),
            State::Loaded => write!(f, "{APPARMOR_DEFAULT} is loaded"),
            State::Failed(why) => write!(f, "{APPARMOR_DEFAULT} is not loaded: {why}"),
        }
    }
}

/// Loads the default profile if the node has AppArmor.
pub async fn load_default(node: &Node) -> State {
    if !node.apparmor {
        return State::Off;
    }
    let state = load(Path::new("apparmor_parser"), &profile(Path::new("/etc/apparmor.d"))).await;
    match &state {
        State::Failed(why) => warn!(profile = APPARMOR_DEFAULT, why, "not loaded"),
        State::Loaded | State::Off => info!(profile = APPARMOR_DEFAULT, "loaded"),
    }
    state
}

async fn load(parser: &Path, profile: &str) -> State {
    let Some(program) = find_program(parser) else {
        return State::Failed(format!(
            "{} is not found: install it (the package is called apparmor)",
            parser.display()
        ));
    };
    match tokio::time::timeout(DEADLINE, feed(&program, profile)).await {
        Ok(Ok(())) => State::Loaded,
        Ok(Err(why)) => State::Failed(why),
        Err(_) => State::Failed(format!("{} did not end within {DEADLINE:?}", program.display())),
    }
}

/// Runs the parser with the profile on its stdin.
async fn feed(program: &PathBuf, profile: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", program.display());
    // -K: no cache file; -r: replace the one that is loaded.
    let mut child = Command::new(program)
        .args(["--skip-cache", "--replace", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let mut stdin = child.stdin.take().expect("it was made with a pipe");
    // A parser that ends early says why on stderr; that is the better message.
    let _ = stdin.write_all(profile.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>();
    Err(format!("{}: {}: {}", program.display(), output.status, words.join("; ")))
}

/// The profile's text. What other profiles of the node include is included where it is there.
fn profile(etc: &Path) -> String {
    let has = |file: &str| fs::metadata(etc.join(file)).is_ok();
    let tunables = match has("tunables/global") {
        true => "#include <tunables/global>",
        false => "@{PROC}=/proc/",
    };
    let base = if has("abstractions/base") { "  #include <abstractions/base>\n" } else { "" };
    format!(
        r#"{tunables}

profile {APPARMOR_DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
{base}
  # What a container may do is bounded by its capabilities, namespaces and mounts; this profile takes
  # away what those leave open.
  network,
  capability,
  file,
  umount,

  # Stopping a container: the signals come from the runtime, whichever profile it runs under.
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (receive) peer=holdfastd,
  signal (receive) peer=containerd-shim-holdfast-v2,
  signal (send, receive) peer={APPARMOR_DEFAULT},
  ptrace (trace, read, tracedby, readby) peer={APPARMOR_DEFAULT},

  deny mount,

  # Of /proc, a process may write its own entries and the sysctls of its own namespaces.
  deny @{{PROC}}/* w,
  deny @{{PROC}}/{{[^1-9],[^1-9][^0-9],[^1-9s][^0-9y][^0-9s],[^1-9][^0-9][^0-9][^0-9]*}}/** w,
  deny @{{PROC}}/sys/[^knf]** w,
  deny @{{PROC}}/sys/fs/[^m]** w,
  deny @{{PROC}}/sys/kernel/{{?,??,[^sm][^he]**}} w,
  deny @{{PROC}}/sysrq-trigger rwklx,
  deny @{{PROC}}/mem rwklx,
  deny @{{PROC}}/kmem rwklx,
  deny @{{PROC}}/kcore rwklx,

  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("apparmor_parser");
        // Renamed into place: a file that is open for writing cannot be executed.
        let draft = dir.join("draft");
        fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&draft, &path).unwrap();
        path
    }

    #[test]
    fn the_profile_includes_what_is_there() {
        let tmp = tempfile::tempdir().unwrap();
        let bare = profile(tmp.path());
        assert!(bare.starts_with("@{PROC}=/proc/\n") && !bare.contains("#include"), "{bare}");
        for file in ["tunables/global", "abstractions/base"] {
            let path = tmp.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let full = profile(tmp.path());
        assert!(full.starts_with("#include <tunables/global>\n"), "{full}");
        assert!(full.contains("  #include <abstractions/base>\n"));
        for text in [bare, full] {
            assert!(text.contains(
                "\nprofile holdfast-default flags=(attach_disconnected,mediate_deleted) {\n"
            ));
            assert!(text.contains("signal (send, receive) peer=holdfast-default,"));
            assert_eq!(text.matches('{').count(), text.matches('}').count());
            let rules = text.lines().map(str::trim).filter(|line| !line.is_empty());
            for rule in
                rules.filter(|l| !l.starts_with(['#', '@', '}']) && !l.starts_with("profile"))
            {
                assert!(rule.ends_with(','), "{rule}");
            }
        }
    }

    #[tokio::test]
    async fn the_parser_is_fed_the_profile() {
        let tmp = tempfile::tempdir().unwrap();
        let out = tmp.path().join("out");
        let text = format!("echo \"$@\" >{0}; cat >>{0}", out.display());
        let parser = script(tmp.path(), &text);
        assert_eq!(load(&parser, "the profile\n").await, State::Loaded);
        let fed = fs::read_to_string(out).unwrap();
        assert_eq!(fed, "--skip-cache --replace --quiet\nthe profile\n");
    }

    #[tokio::test]
    async fn what_the_parser_says_is_told() {
        let tmp = tempfile::tempdir().unwrap();
        let parser = script(tmp.path(), "echo 'syntax error, line 3' >&2; exit 1");
        // Larger than a pipe: it ends without reading all of it.
        let State::Failed(why) = load(&parser, &"x".repeat(1 << 20)).await else {
            panic!("loaded")
        };
        assert!(why.contains("syntax error, line 3") && why.contains("exit status: 1"), "{why}");
        let State::Failed(why) = load(Path::new("/no/such/parser"), "").await else {
            panic!("loaded")
        };
        assert!(why.contains("/no/such/parser is not found"), "{why}");
    }
}
