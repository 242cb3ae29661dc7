//! Plugins that an earlier daemon started and that outlived it.
//!
//! A daemon that is killed in the middle of an ADD leaves the plugin running. Its successor must not
//! DEL before that plugin is done, or the plugin allocates what nobody will free (and the
//! specification forbids parallel operations on one container). The plugin is found by its
//! environment, where every CNI process carries the pod's id.

use std::{collections::HashMap, fs, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::time::{Instant, sleep};

use crate::id::PodId;

/// How often a leftover is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Every CNI process of this node that is not a child of ours, by pod.
pub(super) fn scan() -> HashMap<PodId, Vec<OwnedFd>> {
    let mut found: HashMap<PodId, Vec<OwnedFd>> = HashMap::new();
    // Processes of pods could carry such an environment to delay us; they are in other namespaces.
    let Ok(ours) = fs::read_link("/proc/self/ns/mnt") else { return found };
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let proc = entry.path();
        // Opened before the look at the environment: it cannot come to mean another process.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let Ok(environ) = fs::read(proc.join("environ")) else { continue };
        let Some(pod) = pod_of(&environ) else { continue };
        if fs::read_link(proc.join("ns/mnt")).is_ok_and(|theirs| theirs == ours) {
            found.entry(pod).or_default().push(pidfd);
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

/// Waits for these processes to end, and kills those that have not at the deadline.
pub(super) async fn settle(mut processes: Vec<OwnedFd>, deadline: Instant) {
    loop {
        processes.retain(is_alive);
        if processes.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            for process in &processes {
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            // Those stuck in the kernel can do nothing more when they come out of it.
            sleep(LOOK).await;
            return;
        }
        sleep(LOOK).await;
    }
}

fn is_alive(process: &OwnedFd) -> bool {
    // A pidfd is readable once its process has ended (pidfd_open(2)).
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(0))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

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

    #[tokio::test]
    async fn leftovers_are_found_waited_for_and_in_the_end_killed() {
        let pod = PodId::random();
        let mut child = Command::new("sleep")
            .arg("60")
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", pod.as_str())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
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
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        assert!(!scan().contains_key(&pod));
    }
}
