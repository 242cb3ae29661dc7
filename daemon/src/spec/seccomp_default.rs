//! The profile that `RuntimeDefault` means, as a table.
//!
//! Everything that programs need is allowed; what can change the kernel, the host or other
//! containers is not, unless a capability that the container was given says that it may. Left out on
//! purpose: kernel keyrings (not namespaced), io_uring (its operations pass the filter by),
//! userfaultfd (helps exploits), kexec, swap, NFS and quota calls, obsolete calls.
//!
//! Names that the machine's libseccomp does not know are skipped by the runtimes, so that one table
//! serves all architectures and ages.

use oci_spec::runtime::{Arch, LinuxSeccompAction, LinuxSeccompOperator};

use super::seccomp::{ArchMap, Argument, Condition, Profile, Rule};

/// ENOSYS: what makes libc fall back to an older call.
const ENOSYS: u32 = 38;

const FILES: &str = "access chdir chmod chown chown32 close close_range copy_file_range creat dup \
    dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod \
    fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr \
    file_setattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 \
    fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat \
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr \
    link linkat listmount listxattr listxattrat llistxattr lremovexattr _llseek lseek lsetxattr \
    lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2 pipe \
    pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv \
    removexattr removexattrat rename renameat renameat2 rmdir sendfile sendfile64 setxattr \
    setxattrat splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync \
    sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat \
    utimensat_time64 utimes vmsplice write writev";

const WAITING: &str = "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 \
    epoll_wait epoll_wait_old eventfd eventfd2 io_cancel io_destroy io_getevents io_pgetevents \
    io_pgetevents_time64 io_setup io_submit _newselect poll ppoll ppoll_time64 pselect6 \
    pselect6_time64 select";

const MEMORY: &str = "brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret \
    mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap \
    pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages";

const PROCESSES: &str = "capget capset execve execveat exit exit_group fork getcpu getegid \
    getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getpgid getpgrp getpid getppid \
    getpriority getresgid getresgid32 getresuid getresuid32 getrlimit get_robust_list getrusage \
    getsid get_thread_area gettid getuid getuid32 ioprio_get ioprio_set landlock_add_rule \
    landlock_create_ruleset landlock_restrict_self pidfd_open pidfd_send_signal prctl prlimit64 \
    restart_syscall rseq sched_getaffinity sched_getattr sched_getparam sched_get_priority_max \
    sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 \
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp setfsgid \
    setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setpriority \
    setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit \
    set_robust_list setsid set_thread_area set_tid_address setuid setuid32 sysinfo times ugetrlimit \
    uname vfork wait4 waitid waitpid";

const SIGNALS: &str = "kill pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo \
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaction \
    sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend tgkill tkill \
    uprobe uretprobe";

const TIME: &str = "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 \
    clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday \
    nanosleep setitimer time timer_create timer_delete timer_getoverrun timer_gettime \
    timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 \
    timerfd_settime timerfd_settime64";

const NETWORK: &str = "accept accept4 bind connect getpeername getsockname getsockopt listen recv \
    recvfrom recvmmsg recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown \
    socketcall socketpair";

const IPC: &str = "futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake getrandom ipc \
    lsm_get_self_attr lsm_list_modules lsm_set_self_attr mq_getsetattr mq_notify mq_open \
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget \
    msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget";

/// Calls of one architecture only, in Go's names for them.
const BY_ARCH: [(&[&str], &str); 6] = [
    (&["ppc64le"], "sync_file_range2 swapcontext"),
    (
        &["arm", "arm64"],
        "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    ),
    (&["amd64", "x32"], "arch_prctl"),
    (&["amd64", "x32", "x86"], "modify_ldt"),
    (&["s390", "s390x"], "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
    (&["riscv64"], "riscv_flush_icache riscv_hwprobe"),
];

/// Calls that a capability opens. Each is what the capability is about: having it, the kernel
/// would let the process do it.
const BY_CAPABILITY: [(&str, &str); 14] = [
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount \
         mount_setattr move_mount open_tree open_tree_attr perf_event_open quotactl quotactl_fd \
         setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module finit_module init_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("SYS_RAWIO", "ioperm iopl"),
    ("SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// personality(2): Linux, uname26, no address randomisation on 32 bit, both, and "tell me".
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x20000, 0x20008, 0xffff_ffff];

/// AF_VSOCK reaches past network namespaces, to the hypervisor.
const AF_VSOCK: u64 = 40;

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: no new namespaces.
const NAMESPACES: u64 = 0x7e02_0000;

/// The profile.
pub(super) fn profile() -> Profile {
    let mut syscalls =
        vec![allow(&[FILES, WAITING, MEMORY, PROCESSES, SIGNALS, TIME, NETWORK, IPC])];
    // Before 4.8 ptrace could evade the filter.
    syscalls.push(Rule {
        includes: Condition { min_kernel: Some("4.8".into()), ..Condition::default() },
        ..allow(&["process_vm_readv process_vm_writev ptrace"])
    });
    syscalls.push(Rule {
        args: vec![argument(0, AF_VSOCK, 0, LinuxSeccompOperator::ScmpCmpNe)],
        ..allow(&["socket"])
    });
    syscalls.extend(PERSONALITIES.map(|value| Rule {
        args: vec![argument(0, value, 0, LinuxSeccompOperator::ScmpCmpEq)],
        ..allow(&["personality"])
    }));
    syscalls.extend(BY_ARCH.map(|(arches, names)| Rule {
        includes: Condition {
            arches: arches.iter().map(|arch| (*arch).to_owned()).collect(),
            ..Condition::default()
        },
        ..allow(&[names])
    }));
    syscalls.extend(
        BY_CAPABILITY
            .map(|(cap, names)| Rule { includes: with_capability(cap), ..allow(&[names]) }),
    );
    // Without SYS_ADMIN clone may make no namespaces. s390 has the flags in the second argument.
    for (index, s390) in [(0, false), (1, true)] {
        let arches = vec!["s390".to_owned(), "s390x".to_owned()];
        let mut rule = Rule {
            args: vec![argument(index, NAMESPACES, 0, LinuxSeccompOperator::ScmpCmpMaskedEq)],
            excludes: with_capability("SYS_ADMIN"),
            ..allow(&["clone"])
        };
        if s390 {
            rule.includes.arches = arches;
        } else {
            rule.excludes.arches = arches;
        }
        syscalls.push(rule);
    }
    // The flags of clone3 are behind a pointer, where no filter sees them.
    syscalls.push(Rule {
        action: LinuxSeccompAction::ScmpActErrno,
        errno_ret: Some(ENOSYS),
        excludes: with_capability("SYS_ADMIN"),
        ..allow(&["clone3"])
    });
    Profile {
        default_action: LinuxSeccompAction::ScmpActErrno,
        // EPERM, as the spec has it when nothing is said.
        default_errno_ret: None,
        architectures: Vec::new(),
        arch_map: [
            (Arch::ScmpArchX86_64, vec![Arch::ScmpArchX86, Arch::ScmpArchX32]),
            (Arch::ScmpArchAarch64, vec![Arch::ScmpArchArm]),
            (Arch::ScmpArchS390x, vec![Arch::ScmpArchS390]),
            (Arch::ScmpArchPpc64le, vec![]),
            (Arch::ScmpArchRiscv64, vec![]),
        ]
        .into_iter()
        .map(|(architecture, sub_architectures)| ArchMap { architecture, sub_architectures })
        .collect(),
        flags: None,
        listener_path: None,
        listener_metadata: None,
        syscalls,
    }
}

fn allow(lists: &[&str]) -> Rule {
    Rule {
        names: lists.iter().flat_map(|list| list.split_whitespace()).map(str::to_owned).collect(),
        name: None,
        action: LinuxSeccompAction::ScmpActAllow,
        errno_ret: None,
        args: Vec::new(),
        includes: Condition::default(),
        excludes: Condition::default(),
    }
}

fn with_capability(cap: &str) -> Condition {
    Condition { caps: vec![format!("CAP_{cap}")], ..Condition::default() }
}

fn argument(index: usize, value: u64, value_two: u64, op: LinuxSeccompOperator) -> Argument {
    Argument { index, value, value_two, op }
}
