//! Pre-registered plugins: programs of a directory that are started with the daemon, each with one end
//! of a socket pair.
//!
//! Such a program ends with the daemon, however that ends: it is started by a thread that lives as long
//! as the program, and the kernel kills it when that thread is gone.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            fs::PermissionsExt as _,
            net::UnixStream,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::sync::watch;
use tracing::{info, warn};

use super::plugin::{Error, parse_name};

/// A plugin's program, found in the directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) index: String,
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) config: String,
}

/// The programs of `dir`, by name, each with its configuration. No directory: none. A file whose name
/// is not a plugin's is named in the log and passed over.
pub(super) fn find(dir: &Path, conf_dir: &Path) -> Vec<Found> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            warn!(dir = %dir.display(), %error, "read the directory of NRI plugins");
            return Vec::new();
        }
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let program = fs::metadata(&path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
        let Some(file) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !program {
            continue;
        }
        match parse_name(file) {
            Ok((index, name)) => {
                let config = configuration(conf_dir, index, name);
                let (index, name) = (index.to_owned(), name.to_owned());
                found.push(Found { index, name, path, config });
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "not the file of an NRI plugin: NN-NAME");
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// A plugin's own configuration: NN-NAME.conf, else NAME.conf, else nothing.
pub(super) fn configuration(dir: &Path, index: &str, name: &str) -> String {
    for file in [format!("{index}-{name}.conf"), format!("{name}.conf")] {
        let path = dir.join(file);
        match fs::read_to_string(&path) {
            Ok(text) => return text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                warn!(path = %path.display(), %error, "read an NRI plugin's configuration")
            }
        }
    }
    String::new()
}

/// A plugin's process. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    pidfd: OwnedFd,
    ended: watch::Receiver<bool>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already: nothing to kill.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Process {
    /// Starts a program; our end of its socket.
    pub(super) async fn start(found: &Found) -> Result<(Self, tokio::net::UnixStream), Error> {
        let path = found.path.clone();
        let error = |source| Error::Start { path: path.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(error)?;
        ours.set_nonblocking(true).map_err(error)?;
        let ours = tokio::net::UnixStream::from_std(ours).map_err(error)?;
        let full = format!("{}-{}", found.index, found.name);
        let mut command = Command::new(&found.path);
        command
            .env_clear()
            .env("NRI_PLUGIN_NAME", &found.name)
            .env("NRI_PLUGIN_IDX", &found.index)
            .env("NRI_PLUGIN_SOCKET", theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .process_group(0);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        let fd = theirs.as_raw_fd();
        let daemon = rustix::process::getpid();
        #[expect(unsafe_code, reason = "the one way to do something between fork and exec")]
        // SAFETY: the closure makes system calls alone, which are allowed there; `fd` is open in the
        // child, whose copy of it this is.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(daemon) {
                    return Err(io::Error::other("the daemon is gone"));
                }
                let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
                Ok(())
            });
        }
        let (tell, started) = tokio::sync::oneshot::channel();
        let (end, ended) = watch::channel(false);
        std::thread::Builder::new()
            .name("nri-plugin".into())
            .spawn(move || {
                let spawned = command.spawn();
                // The child has its own.
                drop(theirs);
                let mut child = match spawned {
                    Ok(child) => child,
                    Err(error) => {
                        let _ = tell.send(Err(error));
                        return;
                    }
                };
                let pid = Pid::from_child(&child);
                // Before anybody waits for it: the pid is still its own.
                let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
                let opened = pidfd.is_ok();
                let _ = tell.send(pidfd.map(|fd| (child.id(), fd)).map_err(io::Error::from));
                if !opened {
                    let _ = child.kill();
                }
                match child.wait() {
                    Ok(status) => info!(
                        plugin = full,
                        code = status.code(),
                        signal = status.signal(),
                        "NRI plugin's process has ended"
                    ),
                    Err(error) => warn!(plugin = full, %error, "wait for an NRI plugin"),
                }
                end.send_replace(true);
            })
            .map_err(error)?;
        let started =
            started.await.unwrap_or_else(|_| Err(io::Error::other("its thread broke off")));
        let (pid, pidfd) = started.map_err(error)?;
        Ok((Self { pid, pidfd, ended }, ours))
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets it end by itself for a while, then kills it.
    pub(super) async fn end(&self, within: Duration) {
        let mut ended = self.ended.clone();
        if tokio::time::timeout(within, ended.wait_for(|ended| *ended)).await.is_ok() {
            return;
        }
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = tokio::time::timeout(within, ended.wait_for(|ended| *ended)).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    fn program(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn programs_are_found_by_name_with_their_configurations() {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, conf) = (tmp.path().join("plugins"), tmp.path().join("conf"));
        assert_eq!(find(&dir, &conf), []);
        fs::create_dir(&dir).unwrap();
        fs::create_dir(&conf).unwrap();
        program(&dir, "20-b", "");
        program(&dir, "10-a", "");
        program(&dir, "README", "");
        fs::write(dir.join("30-c"), "not a program").unwrap();
        fs::write(conf.join("a.conf"), "general").unwrap();
        fs::write(conf.join("10-a.conf"), "particular").unwrap();
        fs::write(conf.join("b.conf"), "of b").unwrap();
        let found = find(&dir, &conf);
        let seen: Vec<_> = found.iter().map(|f| (&*f.index, &*f.name, &*f.config)).collect();
        assert_eq!(seen, [("10", "a", "particular"), ("20", "b", "of b")]);
    }

    #[tokio::test]
    async fn a_program_gets_its_socket_and_is_ended() {
        let tmp = tempfile::tempdir().unwrap();
        program(
            tmp.path(),
            "10-a",
            "#!/bin/bash\neval \"echo $NRI_PLUGIN_IDX $NRI_PLUGIN_NAME >&$NRI_PLUGIN_SOCKET\"\n\
             exec sleep 1000\n",
        );
        let found = find(tmp.path(), tmp.path()).pop().unwrap();
        let (process, mut socket) = Process::start(&found).await.unwrap();
        let mut text = [0; 5];
        socket.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"10 a\n");
        process.end(Duration::from_millis(50)).await;
        assert!(*process.ended.borrow());
        // Nobody else has its end of the socket.
        assert_eq!(socket.read(&mut text).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_run_says_so() {
        let tmp = tempfile::tempdir().unwrap();
        program(tmp.path(), "10-a", "#!/no/such/interpreter\n");
        let found = find(tmp.path(), tmp.path()).pop().unwrap();
        let error = Process::start(&found).await.unwrap_err();
        assert!(error.to_string().contains("10-a"), "{error}");
    }
}
