//! Programs that fail on request: scripts before the real runtime and the real CNI plugin.
//!
//! What a script shall do stands in files of its directory, so that a test can change it at any time:
//!
//! | file | effect |
//! |---|---|
//! | `hang-<verb>` | wait until the file `release` appears, then do as asked |
//! | `fail-<verb>` | print the file's content as an error (CNI: to standard output) and exit with 1 |
//! | `die-<verb>` | do as asked, then exit with 1 as if killed before it could tell |
//!
//! | `chaos` | each call fails, does its work and fails, is slow, or goes well, as a die falls |
//!
//! A `<verb>` is "create", "start", "exec", … for the runtime and "ADD", "DEL", "CHECK" for CNI. A file
//! `hang-create.2` takes effect on the second such call only. Every call is a line in `calls`.
//!
//! criu does not run on every kernel. So the script before runc makes checkpoints itself: it writes what
//! it saw (the container's state, what criu would have been told) as images, and restores by running
//! the bundle's own command. [`FakeCriu`] is a `criu` that says whether it works.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Common to both. Set before: `$dir` and `$verb`, and how to `run` the real program and to `fail`.
const GATE: &str = r#"
count=$(grep -c "^$verb " "$dir/calls" 2>/dev/null)
count=$((count + 1))
echo "$verb $*" >> "$dir/calls"
for mark in "$verb" "$verb.$count"; do
  if [ -e "$dir/fail-$mark" ]; then fail "$dir/fail-$mark"; exit 1; fi
  if [ -e "$dir/hang-$mark" ]; then
    echo "$verb $count" >> "$dir/hanging"
    while [ ! -e "$dir/release" ]; do sleep 0.05; done
  fi
  if [ -e "$dir/die-$mark" ]; then run "$@"; exit 1; fi
done
if [ -e "$dir/chaos" ]; then
  dice=$(od -An -N1 -tu1 /dev/urandom | tr -d ' ')
  if [ "$dice" -lt 16 ]; then fail "$dir/chaos"; exit 1; fi
  if [ "$dice" -lt 32 ]; then run "$@"; exit 1; fi
  if [ "$dice" -lt 48 ]; then sleep 0.$dice; fi
  if [ "$dice" -lt 52 ]; then kill -9 $$; fi
fi
"#;

/// The files of a script.
#[derive(Clone, Debug)]
struct Gate {
    dir: PathBuf,
}

impl Gate {
    fn install(dir: PathBuf, script: &str, before: &str, after: &str) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        let path = dir.join(script);
        let text = format!("#!/bin/sh\ndir={}\n{before}{GATE}{after}\n", dir.display());
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { dir })
    }

    fn mark(&self, what: &str, verb: &str, content: &str) -> Result<()> {
        fs::write(self.dir.join(format!("{what}-{verb}")), content).context("write to a gate")
    }

    fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if ["hang-", "fail-", "die-", "chaos"].iter().any(|mark| name.starts_with(mark)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn lines(&self, file: &str) -> Vec<String> {
        fs::read_to_string(self.dir.join(file))
            .unwrap_or_default()
            .lines()
            .map(String::from)
            .collect()
    }
}

macro_rules! gate {
    ($name:ident) => {
        impl $name {
            /// Calls of `verb` ("create", or "create.2" for the second alone) hang until released.
            ///
            /// # Errors
            /// The mark cannot be written.
            pub fn hang(&self, verb: &str) -> Result<()> {
                self.gate.mark("hang", verb, "")
            }
            /// Calls of `verb` fail with this as their error.
            ///
            /// # Errors
            /// The mark cannot be written.
            pub fn fail(&self, verb: &str, message: &str) -> Result<()> {
                self.gate.mark("fail", verb, message)
            }
            /// Calls of `verb` do their work and then fail without a word.
            ///
            /// # Errors
            /// The mark cannot be written.
            pub fn die_after(&self, verb: &str) -> Result<()> {
                self.gate.mark("die", verb, "")
            }
            /// From now on calls fail, die after their work, are slow, or go well, at random; those
            /// that fail do so with this as their error.
            ///
            /// # Errors
            /// The mark cannot be written.
            pub fn chaos(&self, message: &str) -> Result<()> {
                fs::write(self.gate.dir.join("chaos"), message).context("write to a gate")
            }
            /// Lets everything that hangs go on, and takes all marks away.
            ///
            /// # Errors
            /// A mark cannot be removed.
            pub fn release(&self) -> Result<()> {
                self.gate.clear()?;
                fs::write(self.gate.dir.join("release"), "").context("write to a gate")
            }
            /// Calls of `verb` so far.
            pub fn calls(&self, verb: &str) -> usize {
                let start = format!("{verb} ");
                self.gate.lines("calls").iter().filter(|line| line.starts_with(&start)).count()
            }
            /// Calls of `verb` that began to hang.
            pub fn hung(&self, verb: &str) -> usize {
                let start = format!("{verb} ");
                self.gate.lines("hanging").iter().filter(|line| line.starts_with(&start)).count()
            }
        }
    };
}

/// A script before runc.
#[derive(Clone, Debug)]
pub struct GatedRuntime {
    gate: Gate,
}

impl GatedRuntime {
    /// Checkpoints fail from now on, in the middle, with this as criu's error.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn no_dump(&self, why: &str) -> Result<()> {
        fs::write(self.gate.dir.join("no-dump"), why).context("write to a gate")
    }

    /// What the last restore had been told for criu, and the state its container was captured in.
    pub fn restored(&self) -> (String, String) {
        let read = |name| fs::read_to_string(self.gate.dir.join(name)).unwrap_or_default();
        (read("restored.conf"), read("restored.status"))
    }

    pub(crate) fn install(ground: &Path) -> Result<Self> {
        let before = r#"
verb=
log=
previous=
for word in "$@"; do
  if [ "$previous" = --log ]; then log=$word; fi
  previous=$word
  case $word in --log=*) log=${word#--log=} ;; esac
  case $word in
    create|start|exec|delete|kill|state|update|pause|resume|ps|features|checkpoint|restore|run) verb=$word; break ;;
  esac
done
run() { runc "$@"; }
# As runc does: in its log, if it was given one, and on standard error.
fail() {
  [ -z "$log" ] || printf '{"level":"error","msg":"%s"}\n' "$(cat "$1")" >> "$log"
  cat "$1" >&2
}
"#;
        let gate = Gate::install(ground.join("gated-runc"), "runc", before, CHECKPOINTS)?;
        Ok(Self { gate })
    }

    /// The flags of the last checkpoint or restore, one a line.
    pub fn flags(&self) -> Vec<String> {
        self.gate.lines("flags")
    }

    /// The script.
    pub fn path(&self) -> PathBuf {
        self.gate.dir.join("runc")
    }
}

gate!(GatedRuntime);

/// What the script before runc does in criu's place.
const CHECKPOINTS: &str = r#"
case $verb in checkpoint|restore) ;; *) exec runc "$@" ;; esac
root= image= work= bundle= pid_file= id=
: > "$dir/flags"
while [ $# -gt 0 ]; do
  case $1 in
    --root) root=$2; shift ;;
    --log|--log-format) shift ;;
    --image-path) image=$2; shift ;;
    --work-path) work=$2; shift ;;
    --bundle) bundle=$2; shift ;;
    --pid-file) pid_file=$2; shift ;;
    -*) echo "$1" >> "$dir/flags" ;;
    checkpoint|restore) ;;
    *) id=$1 ;;
  esac
  shift
done
refuse() {
  [ -z "$log" ] || printf '{"level":"error","msg":"%s"}\n' "$1" >> "$log"
  echo "(00.1) Error (criu/fake.c:1): $1" >> "$work/$2.log"
  exit 1
}
# Where nobody says, criu works beside its images.
[ -n "$work" ] || work=$image
if [ "$verb" = checkpoint ]; then
  [ -d "$image" ] && [ -d "$work" ] || { echo "no directories" >&2; exit 1; }
  state=$(runc --root "$root" state "$id") || exit 1
  if [ -e "$dir/no-dump" ]; then refuse "$(cat "$dir/no-dump")" dump; fi
  echo "$state" | sed -n 's/.*"status": "\(.*\)".*/\1/p' > "$image/status"
  bundle=$(echo "$state" | sed -n 's/.*"bundle": "\(.*\)".*/\1/p')
  cp "$bundle/criu.conf" "$image/criu.conf" || exit 1
  head -c 3000000 /dev/zero > "$image/pages-1.img"
  echo "dumped" > "$work/dump.log"
  echo "stats" > "$work/stats-dump"
  exit 0
fi
[ -e "$image/pages-1.img" ] || refuse "no pages" restore
cp "$bundle/criu.conf" "$dir/restored.conf" || exit 1
cp "$image/status" "$dir/restored.status"
exec runc --root "$root" run --detach --bundle "$bundle" --pid-file "$pid_file" "$id"
"#;

/// A `criu` that is found before the real one.
#[derive(Clone, Debug)]
pub struct FakeCriu {
    dir: PathBuf,
}

impl FakeCriu {
    pub(crate) fn install(ground: &Path) -> Result<Self> {
        let dir = ground.join("criu");
        fs::create_dir_all(&dir)?;
        let path = dir.join("criu");
        let text = format!(
            "#!/bin/sh\n[ \"$*\" = check ] || exit 2\n\
             [ ! -e {0}/broken ] || {{ cat {0}/broken >&2; exit 1; }}\necho Looks good.\n",
            dir.display()
        );
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { dir })
    }

    /// A PATH that has it first.
    pub(crate) fn path(&self) -> String {
        format!("{}:{}", self.dir.display(), std::env::var("PATH").unwrap_or_default())
    }

    /// From now on it says that it does not work, and why.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn break_down(&self, why: &str) -> Result<()> {
        fs::write(self.dir.join("broken"), why).context("write to the fake criu")
    }
}

/// A script before the bridge plugin.
#[derive(Clone, Debug)]
pub struct GatedCni {
    gate: Gate,
}

impl GatedCni {
    pub(crate) fn install(ground: &Path) -> Result<Self> {
        // Named as the plugin, in a directory that is searched first. Errors of CNI plugins are JSON
        // on standard output; a `fail-` mark has that text.
        let before = r#"
verb=$CNI_COMMAND
real=/usr/lib/cni/bridge
[ -x $real ] || real=/opt/cni/bin/bridge
run() { $real; }
fail() { cat "$1"; }
"#;
        let gate = Gate::install(ground.join("cni"), "bridge", before, "exec $real")?;
        Ok(Self { gate })
    }
}

gate!(GatedCni);

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_script_fails_on_the_call_it_was_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let gate = GatedRuntime::install(dir.path()).unwrap();
        gate.fail("features.2", "no more").unwrap();
        let call =
            || Command::new(gate.path()).args(["--root", "/x", "features"]).output().unwrap();
        call();
        let second = call();
        assert_eq!(second.status.code(), Some(1));
        assert_eq!(String::from_utf8_lossy(&second.stderr), "no more");
        assert_ne!(String::from_utf8_lossy(&call().stderr), "no more");
        assert_eq!(gate.calls("features"), 3);
    }
}
