use super::*;
use crate::node::{CapabilityMasks, Cgroup, CgroupMode};

/// A node that has everything: cgroup v2, all capabilities, no AppArmor and no SELinux.
pub(super) fn node() -> Node {
    let controllers = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];
    Node {
        hostname: "node-1".into(),
        arch: "x86_64",
        kernel: (6, 1),
        cgroup: Cgroup {
            mode: CgroupMode::V2,
            controllers: controllers.map(str::to_owned).into(),
            hugepage_sizes: [2 << 20, 1 << 30].into(),
            swap: true,
        },
        capabilities: CapabilityMasks {
            known: (1 << 41) - 1,
            grantable: (1 << 41) - 1,
            effective: (1 << 41) - 1,
        },
        oom_score_adj: -999,
        seccomp: true,
        apparmor: false,
        selinux: None,
        nofile: (1024, 524_288),
    }
}
