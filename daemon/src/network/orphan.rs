//! Plugins that an earlier daemon started and that outlived it.
//!
//! A daemon that is killed in the middle of an ADD leaves the plugin running. Its successor must not
//! DEL before that plugin is done, or the plugin allocates what nobody will free (and the
//! specification forbids parallel operations on one container). The plugin is known by the pod's id
//! in its environment and by its stdin, which only we make; a daemon that a plugin started for
//! itself has the first but not the second, and is let alone.

use std::{collections::HashMap, fs, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal},
};
use tokio::time::{Instant, sleep};

use super::plugin::STDIN_NAME;
use crate::id::PodId;

/// How often a leftover is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How long a killed leftover may take to die. One that is stuck in the kernel can do nothing more
/// when it comes out of it.
const DIE: Duration = Duration::from_secs(2);

/// A plugin without a daemon; the leader of its process group.
#[derive(Debug)]
pub(super) struct Orphan {
    pid: Pid,
    pidfd: OwnedFd,
}

/// Every plugin of this node that somebody started as we do, by pod.
pub(super) fn scan() -> HashMap<PodId, Vec<Orphan>> {
    let mut found: HashMap<PodId, Vec<Orphan>> = HashMap::new();
    // Processes of pods could make themselves look like this to delay us; they are in other
    // namespaces.
    let Ok(ours) = fs::read_link("/proc/self/ns/pid") else { return found };
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let proc = entry.path();
        let stdin = fs::read_link(proc.join("fd/0"));
        if !stdin.is_ok_and(|path| path.to_string_lossy().contains(STDIN_NAME)) {
            continue;
        }
        // Opened before the look at the environment: it cannot come to mean another process.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let Ok(environ) = fs::read(proc.join("environ")) else { continue };
        let Some(pod) = pod_of(&environ) else { continue };
        if fs::read_link(proc.join("ns/pid")).is_ok_and(|theirs| theirs == ours) {
            found.entry(pod).or_default().push(Orphan { pid, pidfd });
        }
    }
    found
}

fn pod_of(environ: &[u8]) -> Option<PodId> {
    let value =
        |name: &str| environ.split(|b| *b == 0).find_map(|pair| pair.strip_prefix(name.as_bytes()));
    value("CNI_COMMAND=")?;
    std::str::from_utf8(value("CNI_CONTAINERID=")?).ok()?.parse().ok()
}

/// Waits for these plugins to end, and kills those that have not at the deadline with their groups.
pub(super) async fn settle(mut orphans: Vec<Orphan>, deadline: Instant) {
    while Instant::now() < deadline {
        orphans.retain(Orphan::is_alive);
        if orphans.is_empty() {
            return;
        }
        sleep(LOOK).await;
    }
    for orphan in &orphans {
        // Alive, so the number is still its own. A helper of it that is found here too (a shell's
        // children share its stdin) leads no group.
        if orphan.is_alive() {
            let _ = kill_process_group(orphan.pid, Signal::KILL);
            let _ = pidfd_send_signal(&orphan.pidfd, Signal::KILL);
        }
    }
    let given_up = Instant::now() + DIE;
    while orphans.iter().any(Orphan::is_alive) && Instant::now() < given_up {
        sleep(LOOK).await;
    }
}

impl Orphan {
    fn is_alive(&self) -> bool {
        // A pidfd is readable once its process has ended (pidfd_open(2)).
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::{CommandExt, ExitStatusExt},
        process::{Child, Command, Stdio},
    };

    use super::*;
    use crate::network::plugin::on_stdin;

    #[test]
    fn the_pod_is_read_from_the_environment() {
        let id = PodId::random();
        let environ = |text: String| text.replace(' ', "\0").into_bytes();
        let good = environ(format!("PATH=/bin CNI_COMMAND=ADD CNI_CONTAINERID={id} X=1 "));
        assert_eq!(pod_of(&good), Some(id.clone()));
        assert_eq!(pod_of(&environ(format!("CNI_CONTAINERID={id} "))), None);
        assert_eq!(pod_of(&environ("CNI_COMMAND=ADD CNI_CONTAINERID=x ".into())), None);
        assert_eq!(pod_of(b"\xff\0\0="), None);
    }

    fn sleeper(pod: &PodId, stdin: Stdio) -> Child {
        Command::new("sleep")
            .arg("60")
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", pod.as_str())
            .stdin(stdin)
            .process_group(0)
            .spawn()
            .unwrap()
    }

    #[tokio::test]
    async fn leftovers_are_found_waited_for_and_in_the_end_killed() {
        let pod = PodId::random();
        let mut daemon = sleeper(&pod, Stdio::null());
        let mut plugin = sleeper(&pod, on_stdin(b"{}").unwrap().into());
        // A process is there a moment before its environment is (execve(2)).
        let found = loop {
            if let Some(found) = scan().remove(&pod) {
                break found;
            }
        };
        assert_eq!(found.len(), 1);
        let started = Instant::now();
        settle(found, started + Duration::from_millis(100)).await;
        assert!(started.elapsed() >= Duration::from_millis(100));
        assert_eq!(plugin.wait().unwrap().signal(), Some(9));
        assert!(daemon.try_wait().unwrap().is_none(), "a daemon of a plugin is let alone");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }
}
