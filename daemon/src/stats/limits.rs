//! A cgroup's limits as the kernel has them.

use std::{fs, path::Path};

use holdfast_shim::cgroup::{Cgroup, Version};

/// Limits; what is unlimited is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU shares of version 1; on version 2 what its weight stands for.
    pub cpu_shares: Option<u64>,
    /// Length of an enforcement period in microseconds.
    pub cpu_period: Option<u64>,
    /// Processor time in a period, in microseconds.
    pub cpu_quota: Option<u64>,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// Memory that is kept free for it (version 1: soft limit; version 2: `memory.min`).
    pub memory_reservation: Option<u64>,
    /// Memory and swap together (version 1), or swap alone (version 2).
    pub memory_swap: Option<u64>,
}

impl Limits {
    /// Of a cgroup.
    pub(super) fn of(cgroup: &Cgroup) -> Self {
        match cgroup.version() {
            Version::V1 => Self::version_1(cgroup),
            Version::V2 => cgroup.unified().map(Self::version_2).unwrap_or_default(),
        }
    }

    fn version_1(cgroup: &Cgroup) -> Self {
        let of = |controller, file: &str| number(&cgroup.controller(controller)?.join(file));
        // Unlimited is the largest multiple of the page size.
        let memory = |file: &str| of("memory", file).filter(|bytes| *bytes < 1 << 62);
        Self {
            cpu_shares: of("cpu", "cpu.shares"),
            cpu_period: of("cpu", "cpu.cfs_period_us"),
            // -1 is unlimited, and no unsigned number.
            cpu_quota: of("cpu", "cpu.cfs_quota_us"),
            memory: memory("memory.limit_in_bytes"),
            memory_reservation: memory("memory.soft_limit_in_bytes"),
            memory_swap: memory("memory.memsw.limit_in_bytes"),
        }
    }

    fn version_2(dir: &Path) -> Self {
        let of = |file: &str| number(&dir.join(file));
        let max = fs::read_to_string(dir.join("cpu.max")).unwrap_or_default();
        let (quota, period) = max.trim().split_once(' ').unwrap_or_default();
        Self {
            // KEP-2254: 1 to 10000 stands for 2 to 262144.
            cpu_shares: of("cpu.weight").map(|weight| 2 + (weight.max(1) - 1) * 262_142 / 9_999),
            cpu_period: period.parse().ok(),
            cpu_quota: quota.parse().ok(),
            memory: of("memory.max"),
            memory_reservation: of("memory.min"),
            memory_swap: of("memory.swap.max"),
        }
    }
}

/// A file of one number; `max` and what is negative is none.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_limits_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("cpu.max", "20000 100000\n");
        write("cpu.weight", "1\n");
        write("memory.max", "max\n");
        write("memory.swap.max", "0\n");
        let limits = Limits::version_2(dir.path());
        assert_eq!(limits.cpu_quota, Some(20_000));
        assert_eq!(limits.cpu_period, Some(100_000));
        assert_eq!(limits.cpu_shares, Some(2));
        assert_eq!(limits.memory, None);
        assert_eq!(limits.memory_swap, Some(0));
        write("cpu.max", "max 100000\n");
        write("cpu.weight", "10000\n");
        let limits = Limits::version_2(dir.path());
        assert_eq!(limits.cpu_quota, None);
        assert_eq!(limits.cpu_shares, Some(262_144));
    }

    #[test]
    fn version_1_limits_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cpu.shares", "1024\n"),
            ("cpu.cfs_period_us", "100000\n"),
            ("cpu.cfs_quota_us", "-1\n"),
            ("memory.limit_in_bytes", "67108864\n"),
            ("memory.soft_limit_in_bytes", "9223372036854771712\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let both = ["cpu", "memory"].map(|name| (name.to_owned(), dir.path().to_owned()));
        let limits = Limits::of(&Cgroup::from_paths(None, both));
        let expected = Limits {
            cpu_shares: Some(1024),
            cpu_period: Some(100_000),
            memory: Some(67_108_864),
            ..Limits::default()
        };
        assert_eq!(limits, expected);
    }
}
