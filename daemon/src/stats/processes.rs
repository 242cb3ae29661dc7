//! What the processes of a container have open, and may have: /proc.

use std::{fs, io, path::Path};

use holdfast_shim::cgroup::Cgroup;

/// Counts over all processes of a cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// Processes.
    pub count: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Those of them that are sockets.
    pub sockets: u64,
}

impl Processes {
    /// Those of a cgroup and its children. A process that ends meanwhile counts for what was seen of
    /// it.
    pub(super) fn of(cgroup: &Cgroup) -> io::Result<Self> {
        let mut all = Self::default();
        for pid in cgroup.pids()? {
            all.count += 1;
            let dir = format!("/proc/{pid}/fd");
            let Ok(descriptors) = fs::read_dir(&dir) else { continue };
            for descriptor in descriptors.flatten() {
                all.descriptors += 1;
                let target = fs::read_link(descriptor.path()).unwrap_or_default();
                all.sockets += u64::from(is_socket(&target));
            }
        }
        Ok(all)
    }
}

/// proc_pid_fd(5): "socket:[1234]".
fn is_socket(target: &Path) -> bool {
    target.as_os_str().as_encoded_bytes().starts_with(b"socket:")
}

/// The soft limit of open files of a process. The kernel has none that is unlimited.
pub(super) fn open_files_limit(pid: u32) -> Option<u64> {
    parse_limits(&fs::read_to_string(format!("/proc/{pid}/limits")).ok()?)
}

/// "Max open files            1024                 524288               files"
fn parse_limits(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_found_by_name() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max cpu time              unlimited            unlimited            seconds\n\
                    Max open files            1024                 524288               files\n";
        assert_eq!(parse_limits(text), Some(1024));
        assert_eq!(parse_limits("Max cpu time unlimited\n"), None);
        assert!(open_files_limit(std::process::id()).is_some());
    }

    #[test]
    fn sockets_are_told_from_files() {
        assert!(is_socket(Path::new("socket:[123]")));
        assert!(!is_socket(Path::new("/srv/socket:[123]")));
        assert!(!is_socket(Path::new("pipe:[123]")));
    }
}
