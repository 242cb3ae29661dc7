//! Generated specs, run by real runc and real crun: what the kernel says inside the container is
//! what the configuration asked for.
//!
//! Needs root, `runc`, `crun`, `unshare` and `nsenter` (util-linux), and a static `/bin/busybox`.
//! Makes cgroups named `holdfast-spec-test-PID` and removes them.

#[path = "../../cmd/tests/shim/hybrid.rs"]
mod hybrid;

use std::{
    fs::{self, File},
    io::{IoSliceMut, Read},
    mem::MaybeUninit,
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use holdfast_daemon::{
    config::CgroupDriver,
    id::{ContainerId, PodId},
    node::{self, CgroupMode, HostFacts, Node},
    pod::config::{
        ContainerConfig, Device, IdMapping, ImageDefaults, Mount, PodConfig, PodRef, Profile,
        Propagation, Resources, Security, UserNamespace,
    },
    spec::{self, Input, NamespacePaths, PidNamespace, PodFiles, RuntimeFeatures},
};
use oci_spec::runtime::Spec;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// One run of a runtime takes tens of milliseconds; this is for a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(60);

// ---- the tests -------------------------------------------------------------------------------

#[test]
fn a_plain_container_is_confined() {
    for runtime in runtimes() {
        let container = shell(PROBE);
        let out = Case::new(&runtime, container).run();
        let node = Node::discover().unwrap();

        assert_eq!(out.get("uid"), "0", "{out}");
        assert_eq!(out.get("groups"), "0 10", "{out}");
        assert_eq!(out.get("CapBnd"), "00000000a80425fb", "{out}");
        assert_eq!(out.get("CapEff"), "00000000a80425fb", "{out}");
        assert_eq!(out.get("CapPrm"), "00000000a80425fb", "{out}");
        assert_eq!(out.get("CapInh"), "0000000000000000", "{out}");
        assert_eq!(out.get("CapAmb"), "0000000000000000", "{out}");
        assert_eq!(out.get("NoNewPrivs"), "0", "{out}");
        assert_eq!(out.get("Seccomp"), "0", "{out}");
        assert_eq!(out.get("oom"), "0".max(&node.oom_score_adj.to_string()), "{out}");
        assert_eq!(out.get("root"), "writable", "{out}");
        assert_eq!(out.get("sysctl"), "refused", "{out}");
        assert_eq!(out.get("kcore"), "0", "masked: {out}");
        assert_eq!(out.get("firmware"), "0", "masked: {out}");
        assert_eq!(out.get("pid"), "1", "{out}");
        assert_eq!(out.get("cwd"), "/", "{out}");
        assert_eq!(
            out.get("env"),
            "HOME=/root HOSTNAME=pod-a IMAGE=yes PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "{out}"
        );
        for (target, kind, access) in [
            ("/", "", "rw"),
            ("/proc", "proc", "rw"),
            ("/dev", "tmpfs", "rw"),
            ("/dev/pts", "devpts", "rw"),
            ("/dev/mqueue", "mqueue", "rw"),
            ("/sys", "sysfs", "ro"),
            ("/dev/shm", "tmpfs", "rw"),
            ("/proc/sys", "proc", "ro"),
            ("/etc/hosts", "", "rw"),
        ] {
            let mount = out.mount(target);
            assert!(kind.is_empty() || mount.kind == kind, "{target}: {mount:?}");
            assert!(mount.has(access), "{target} is not {access}: {mount:?}");
        }
        assert!(out.mount("/proc").has("nosuid") && out.mount("/proc").has("noexec"));
        let cgroup = out.mounts.iter().filter(|m| m.target.starts_with("/sys/fs/cgroup"));
        let cgroup: Vec<_> = cgroup.filter(|m| m.kind.starts_with("cgroup")).collect();
        assert!(!cgroup.is_empty() && cgroup.iter().all(|m| m.has("ro")), "{cgroup:?}");
        for device in ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "stdin"] {
            assert!(out.get("dev").split(' ').any(|name| name == device), "{device}: {out}");
        }
        assert!(!out.get("dev").contains("loop0"), "{out}");
        assert_eq!(out.get("hosts"), "127.0.0.1 pod-a", "{out}");
        assert_eq!(out.get("hostname"), "pod-a", "{out}");
        assert_eq!(out.get("links"), "lo", "the pod's network: {out}");
    }
}

#[test]
fn the_default_seccomp_profile_filters_and_lets_programs_work() {
    for runtime in runtimes() {
        let script = format!(
            "{PROBE}\n\
             busybox unshare -m true 2>/dev/null && echo unshare=allowed || echo unshare=refused\n\
             mount -t tmpfs none /tmp 2>/dev/null && echo mounting=allowed || echo mounting=refused\n\
             mkdir -p /tmp/d && mv /tmp/d /tmp/e && (sleep 0.01 & wait) && echo programs=work\n\
             chmod 700 /tmp/e && chown 7:7 /tmp/e && ln -s x /tmp/e/l && echo a | grep -q a && date >/dev/null && echo more=works"
        );
        let mut container = shell(&script);
        container.security.seccomp = Some(Profile::RuntimeDefault);
        let out = Case::new(&runtime, container.clone()).run();
        assert_eq!(out.get("Seccomp"), "2", "{out}");
        assert_eq!(out.get("unshare"), "refused", "{out}");
        assert_eq!(out.get("programs"), "work", "{out}");
        assert_eq!(out.get("more"), "works", "{out}");

        container.security.add_capabilities = vec!["SYS_ADMIN".into()];
        let out = Case::new(&runtime, container).run();
        assert_eq!(out.get("Seccomp"), "2", "{out}");
        assert_eq!(out.get("unshare"), "allowed", "the capability opens the calls: {out}");
        assert_eq!(out.get("mounting"), "allowed", "{out}");
    }
}

#[test]
fn a_localhost_profile_is_applied() {
    for runtime in runtimes() {
        let mut container = shell(
            "grep Seccomp: /proc/self/status; chmod 700 /tmp 2>/dev/null && echo chmod=allowed || echo chmod=refused",
        );
        container.security.seccomp = Some(Profile::Localhost("no-chmod.json".into()));
        let mut case = Case::new(&runtime, container);
        case.seccomp = Some(
            br#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ERRNO",
                "names": ["chmod", "fchmod", "fchmodat", "fchmodat2", "no_such_call"]}]}"#
                .to_vec(),
        );
        let out = case.run();
        assert_eq!(out.get("Seccomp"), "2", "{out}");
        assert_eq!(out.get("chmod"), "refused", "{out}");
    }
}

#[test]
fn users_groups_and_privileges() {
    for runtime in runtimes() {
        let mut container = shell(PROBE);
        container.security = Security {
            run_as_user: Some(1000),
            run_as_group: Some(2000),
            supplemental_groups: vec![4000, 3000],
            no_new_privs: true,
            readonly_rootfs: true,
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["NET_BIND_SERVICE".into()],
            ..Security::default()
        };
        container.working_dir = "/tmp".into();
        container.env = vec![("IMAGE".into(), "no".into())];
        let out = Case::new(&runtime, container).run();
        assert_eq!(out.get("uid"), "1000", "{out}");
        assert_eq!(out.get("gid"), "2000", "{out}");
        assert_eq!(out.get("groups"), "2000 29 3000 4000", "{out}");
        assert_eq!(out.get("NoNewPrivs"), "1", "{out}");
        for set in ["CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(out.get(set), "0000000000000400", "{set}: {out}");
        }
        assert_eq!(out.get("root"), "refused", "{out}");
        assert!(out.mount("/").has("ro"), "{out}");
        assert!(out.mount("/etc/hosts").has("ro"), "{out}");
        assert_eq!(out.get("cwd"), "/tmp", "{out}");
        assert!(out.get("env").contains("IMAGE=no") && out.get("env").contains("HOME=/home/alice"));
    }
}

#[test]
fn a_user_other_than_root_has_no_capabilities_in_effect() {
    for runtime in runtimes() {
        let mut container = shell(PROBE);
        container.security.run_as_username = "alice".into();
        container.security.add_capabilities = vec!["SYS_TIME".into()];
        let out = Case::new(&runtime, container).run();
        assert_eq!(out.get("uid"), "1000", "{out}");
        assert_eq!(out.get("groups"), "2000 29", "{out}");
        assert_eq!(out.get("CapEff"), "0000000000000000", "{out}");
        assert_eq!(out.get("CapBnd"), "00000000aa0425fb", "{out}");
    }
}

#[test]
fn privileged_is_everything_the_daemon_may_give() {
    for runtime in runtimes() {
        let node = Node::discover().unwrap();
        let mut container = shell(PROBE);
        container.security.privileged = true;
        container.security.seccomp = Some(Profile::RuntimeDefault);
        let out = Case::new(&runtime, container).run();
        let all = format!("{:016x}", node.capabilities.grantable & node.capabilities.known);
        assert_eq!(out.get("CapEff"), all, "{out}");
        assert_eq!(out.get("CapBnd"), all, "{out}");
        assert_eq!(out.get("Seccomp"), "0", "{out}");
        assert_eq!(out.get("sysctl"), "allowed", "{out}");
        assert!(out.mount("/sys").has("rw"), "{out}");
        assert!(out.mounts.iter().all(|m| m.target != "/proc/kcore"), "{out}");
        let devices = node::gather(&ContainerConfig {
            security: Security { privileged: true, ..Security::default() },
            ..ContainerConfig::default()
        })
        .unwrap()
        .host_devices;
        assert!(!devices.is_empty());
        for device in
            devices.iter().filter(|device| device.path.parent() == Some(Path::new("/dev")))
        {
            let name = device.path.file_name().unwrap().to_str().unwrap();
            assert!(out.get("dev").split(' ').any(|d| d == name), "{name}: {out}");
        }
    }
}

#[test]
fn all_capabilities_means_those_that_can_be_given() {
    for runtime in runtimes() {
        let node = Node::discover().unwrap();
        let mut container = shell(PROBE);
        container.security.add_capabilities = vec!["ALL".into()];
        container.security.drop_capabilities = vec!["SYS_TIME".into()];
        let out = Case::new(&runtime, container).run();
        let all = node.capabilities.grantable & node.capabilities.known & !(1 << 25);
        assert_eq!(out.get("CapEff"), format!("{all:016x}"), "{out}");
    }
}

#[test]
fn limits_are_in_the_cgroup() {
    for runtime in runtimes() {
        let node = Node::discover().unwrap();
        let mut container = shell(
            "cd /sys/fs/cgroup\n\
             v() { echo $1=$(cat $2 2>/dev/null || cat $3 2>/dev/null); }\n\
             v memory memory/memory.limit_in_bytes memory.max\n\
             v swap memory/memory.memsw.limit_in_bytes memory.swap.max\n\
             v shares cpu/cpu.shares cpu.weight\n\
             v quota cpu/cpu.cfs_quota_us cpu.max\n\
             v period cpu/cpu.cfs_period_us cpu.max\n\
             v pids pids/pids.max pids.max\n\
             v cpus cpuset/cpuset.cpus cpuset.cpus\n\
             echo oom=$(cat /proc/self/oom_score_adj)",
        );
        container.resources = Resources {
            memory_limit: 64 << 20,
            cpu_shares: 512,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            cpuset_cpus: "0".into(),
            oom_score_adj: 321,
            hugepages: vec![("2MB".into(), 0), ("1Gi".into(), 0)],
            ..Resources::default()
        };
        let out = Case::new(&runtime, container).run();
        let v2 = node.cgroup.mode == CgroupMode::V2;
        assert_eq!(out.get("memory"), "67108864", "{out}");
        if node.cgroup.swap {
            assert_eq!(out.get("swap"), if v2 { "0" } else { "67108864" }, "{out}");
        }
        if v2 {
            assert_eq!(out.get("quota"), "50000 100000", "{out}");
        } else {
            assert_eq!(out.get("shares"), "512", "{out}");
            assert_eq!(out.get("quota"), "50000", "{out}");
            assert_eq!(out.get("period"), "100000", "{out}");
        }
        assert_eq!(out.get("pids"), "77", "{out}");
        assert_eq!(out.get("cpus"), "0", "{out}");
        assert_eq!(out.get("oom"), "321", "{out}");
    }
}

#[test]
fn an_oom_score_below_the_daemons_own_is_clamped_not_failed() {
    for runtime in runtimes() {
        let node = Node::discover().unwrap();
        let mut container = shell("echo oom=$(cat /proc/self/oom_score_adj)");
        container.resources.oom_score_adj = -998;
        let out = Case::new(&runtime, container).run();
        let may_lower = node.capabilities.effective & (1 << 24) != 0;
        let expected = if may_lower { -998 } else { node.oom_score_adj.max(-998) };
        assert_eq!(out.get("oom"), expected.to_string(), "{out}");
    }
}

#[test]
fn mounts_are_in_order_and_as_asked() {
    for runtime in runtimes() {
        let host = tempfile::tempdir().unwrap();
        for name in ["deep", "deep/below", "top", "ro", "sub", "target"] {
            fs::create_dir(host.path().join(name)).unwrap();
        }
        fs::write(host.path().join("deep/file"), "deep").unwrap();
        fs::write(host.path().join("own-hosts"), "mine\n").unwrap();
        symlink("target", host.path().join("link")).unwrap();
        fs::write(host.path().join("target/here"), "x").unwrap();
        let mount = |name: &str, target: &str| Mount {
            container_path: target.into(),
            host_path: host.path().join(name).to_str().unwrap().into(),
            ..Mount::default()
        };
        let mut container = shell(&format!(
            "{PROBE}\n\
             echo deep=$(cat /data/deep/file)\n\
             touch /data/deep/new 2>/dev/null && echo deepw=yes || echo deepw=no\n\
             touch /ro/x 2>/dev/null && echo row=yes || echo row=no\n\
             echo link=$(ls /link); echo made=$(ls -d /made)\n\
             test -c /dev/mine && echo device=$(stat -c %t:%T:%a /dev/mine)\n\
             head -c 1 /dev/mine >/dev/null && echo read=ok"
        ));
        container.mounts = vec![
            // Out of order: the deeper one first.
            mount("deep", "/data/deep"),
            mount("top", "/data"),
            Mount { readonly: true, ..mount("ro", "/ro/../ro") },
            mount("own-hosts", "/etc/hosts"),
            mount("link", "/link"),
            mount("new/dir", "/made"),
            Mount { options: vec!["noexec".into(), "nodev".into()], ..mount("sub", "/opts") },
        ];
        container.devices = vec![Device {
            container_path: "/dev/mine".into(),
            host_path: "/dev/zero".into(),
            permissions: "r".into(),
        }];
        let out = Case::new(&runtime, container).run();
        assert_eq!(out.get("deep"), "deep", "{out}");
        assert_eq!(out.get("deepw"), "yes", "{out}");
        assert_eq!(out.get("row"), "no", "{out}");
        assert_eq!(out.get("hosts"), "mine", "the CRI's mount wins over the pod's file: {out}");
        assert_eq!(out.get("link"), "here", "{out}");
        assert_eq!(out.get("made"), "/made", "{out}");
        assert!(host.path().join("new/dir").is_dir(), "a missing source is made");
        assert!(out.mount("/opts").has("noexec") && out.mount("/opts").has("nodev"), "{out}");
        assert_eq!(out.get("device"), "1:5:666", "{out}");
        assert_eq!(out.get("read"), "ok", "{out}");
    }
}

#[test]
fn recursive_read_only_and_propagation() {
    for runtime in runtimes() {
        let host = SharedMount::new();
        fs::create_dir_all(host.path().join("tree/sub")).unwrap();
        let sub = host.path().join("tree/sub");
        nix::mount::mount(
            Some("none"),
            &sub,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let mut container = shell(PROBE);
        container.mounts = vec![
            Mount {
                container_path: "/rro".into(),
                host_path: host.path().join("tree").to_str().unwrap().into(),
                readonly: true,
                recursive_read_only: true,
                ..Mount::default()
            },
            Mount {
                container_path: "/slave".into(),
                host_path: host.path().to_str().unwrap().into(),
                propagation: Propagation::HostToContainer,
                ..Mount::default()
            },
            Mount {
                container_path: "/both".into(),
                host_path: host.path().to_str().unwrap().into(),
                propagation: Propagation::Bidirectional,
                ..Mount::default()
            },
        ];
        let mut case = Case::new(&runtime, container);
        if case.features.mount_options.contains("rro") {
            let out = case.run();
            assert!(out.mount("/rro").has("ro") && out.mount("/rro/sub").has("ro"), "{out}");
        } else {
            let error = case.generate().unwrap_err().to_string();
            assert!(error.starts_with("mounts[0].recursive_read_only: it needs"), "{error}");
        }
        case.container.mounts.remove(0);
        let out = case.run();
        let slave = out.mount("/slave");
        assert!(slave.optional.iter().any(|o| o.starts_with("master:")), "{slave:?}");
        let both = out.mount("/both");
        assert!(both.optional.iter().any(|o| o.starts_with("shared:")), "{both:?}");

        case.container.mounts.remove(1);
        let out = case.run();
        let slave = out.mount("/slave");
        assert!(slave.optional.iter().any(|o| o.starts_with("master:")), "{slave:?}");
        assert!(!slave.optional.iter().any(|o| o.starts_with("shared:")), "{slave:?}");
    }
}

#[test]
fn a_terminal_is_a_terminal() {
    for runtime in runtimes() {
        let mut container =
            shell("echo tty=$(tty); test -t 1 && echo out=terminal; echo term=$TERM");
        container.tty = true;
        let out = Case::new(&runtime, container).run_on_terminal();
        assert!(out.get("tty").starts_with("/dev/"), "{out}");
        assert_eq!(out.get("out"), "terminal", "{out}");
        assert_eq!(out.get("term"), "xterm", "{out}");
    }
}

#[test]
fn the_nodes_namespaces_are_the_nodes() {
    for runtime in runtimes() {
        let script = "for n in net ipc uts pid mnt; do echo $n=$(readlink /proc/self/ns/$n); done";
        let mut case = Case::new(&runtime, shell(script));
        case.namespaces = NamespacePaths { pid: PidNamespace::Host, ..NamespacePaths::default() };
        case.files.shm = None;
        let out = case.run();
        for name in ["net", "ipc", "uts", "pid"] {
            let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
            assert_eq!(Path::new(out.get(name)), ours, "{name}: {out}");
        }
        let mnt = fs::read_link("/proc/self/ns/mnt").unwrap();
        assert_ne!(Path::new(out.get("mnt")), mnt, "{out}");
    }
}

#[test]
fn a_pod_with_a_user_namespace() {
    for runtime in runtimes() {
        let mut container = shell(&format!("{PROBE}\necho map=$(cat /proc/self/uid_map)"));
        container.security.seccomp = Some(Profile::RuntimeDefault);
        let mut case = Case::new(&runtime, container);
        case.user_namespace();
        let out = case.run();
        assert_eq!(out.get("map").split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536"]);
        assert_eq!(out.get("uid"), "0", "{out}");
        assert_eq!(out.get("groups"), "0 10", "{out}");
        assert_eq!(out.get("CapEff"), "00000000a80425fb", "{out}");
        assert_eq!(out.get("Seccomp"), "2", "{out}");
        assert_eq!(out.get("root"), "writable", "{out}");
        assert_eq!(out.get("links"), "lo", "{out}");
        assert!(out.mount("/sys").has("ro"), "{out}");

        case.container.security.add_capabilities = vec!["SYS_RESOURCE".into()];
        let out = case.run();
        assert_eq!(out.get("CapEff"), "00000000a90425fb", "the namespace has them all: {out}");
    }
}

#[test]
fn an_exec_has_the_containers_rights_and_no_more() {
    for runtime in runtimes() {
        let mut container = shell("sleep 1000");
        container.security.seccomp = Some(Profile::RuntimeDefault);
        container.security.run_as_user = Some(1000);
        container.resources.oom_score_adj = 456;
        container.resources.memory_limit = 64 << 20;
        let case = Case::new(&runtime, container);
        let running = case.start();
        let words: Vec<String> =
            ["/bin/busybox", "sh", "-c", PROBE].iter().map(|w| (*w).to_owned()).collect();
        let process = spec::process_for_exec(&running.spec, &words, false);
        let out = running.exec(&serde_json::to_string(&process).unwrap());
        assert_eq!(out.get("uid"), "1000", "{out}");
        assert_eq!(out.get("groups"), "2000 29", "{out}");
        assert_eq!(out.get("CapBnd"), "00000000a80425fb", "{out}");
        assert_eq!(out.get("CapEff"), "0000000000000000", "{out}");
        assert_eq!(out.get("Seccomp"), "2", "{out}");
        assert!(out.get("env").contains("IMAGE=yes"), "{out}");
        // crun 1.8 has no eye for the oom_score_adj of an exec and leaves its caller's: whoever calls
        // it must take the container's value before.
        let caller = Node::discover().unwrap().oom_score_adj.to_string();
        let expected = if runtime.name == "runc" { "456" } else { caller.as_str() };
        assert_eq!(out.get("oom"), expected, "{out}");
    }
}

// ---- what runs in the container --------------------------------------------------------------

/// Prints `key=value` lines, and the mount table.
const PROBE: &str = r#"
echo uid=$(id -u); echo gid=$(id -g); echo groups=$(id -G)
grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status
echo oom=$(cat /proc/self/oom_score_adj)
touch /probe 2>/dev/null && echo root=writable || echo root=refused
delay=$(cat /proc/sys/kernel/printk_delay)
(echo $delay > /proc/sys/kernel/printk_delay) 2>/dev/null && echo sysctl=allowed || echo sysctl=refused
echo kcore=$(head -c 1 /proc/kcore 2>/dev/null | wc -c)
echo firmware=$(ls /sys/firmware 2>/dev/null | wc -l)
echo pid=$$
echo cwd=$PWD
echo dev=$(ls /dev)
echo hosts=$(head -n 1 /etc/hosts)
echo hostname=$(hostname)
echo links=$(ls /sys/class/net)
echo env=$(env | grep -v -E '^(SHLVL|PWD|OLDPWD)=' | sort)
sed 's/^/mount: /' /proc/self/mountinfo
"#;

fn shell(script: &str) -> ContainerConfig {
    ContainerConfig {
        name: "c".into(),
        command: vec!["/bin/busybox".into(), "sh".into(), "-c".into(), script.into()],
        ..ContainerConfig::default()
    }
}

/// What the container printed.
struct Output {
    text: String,
    mounts: Vec<MountLine>,
}

#[derive(Debug)]
struct MountLine {
    target: String,
    options: Vec<String>,
    optional: Vec<String>,
    kind: String,
}

impl MountLine {
    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|known| known == option)
    }
}

impl Output {
    fn parse(text: String) -> Output {
        let text = text.replace('\r', "");
        let mounts = text
            .lines()
            .filter_map(|line| line.strip_prefix("mount: "))
            .map(|line| {
                let (before, after) = line.split_once(" - ").expect("a line of mountinfo");
                let mut fields = before.split(' ').skip(4);
                MountLine {
                    target: fields.next().unwrap().to_owned(),
                    options: fields.next().unwrap().split(',').map(str::to_owned).collect(),
                    optional: fields.map(str::to_owned).collect(),
                    kind: after.split(' ').next().unwrap().to_owned(),
                }
            })
            .collect();
        Output { text, mounts }
    }

    /// The value of `key=value` or `key:\tvalue`.
    fn get(&self, key: &str) -> &str {
        self.text
            .lines()
            .find_map(|line| {
                let rest = line.strip_prefix(key)?;
                rest.strip_prefix('=').or_else(|| rest.strip_prefix(':'))
            })
            .unwrap_or_else(|| panic!("no {key} in:\n{}", self.text))
            .trim()
    }

    /// The mount that is seen at a path.
    fn mount(&self, target: &str) -> &MountLine {
        self.mounts
            .iter()
            .rfind(|mount| mount.target == target)
            .unwrap_or_else(|| panic!("nothing is mounted on {target}:\n{}", self.text))
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

// ---- runtimes and bundles --------------------------------------------------------------------

struct Runtime {
    name: &'static str,
    features: RuntimeFeatures,
    /// Held while crun runs.
    _hugetlb: Option<Hugetlb>,
}

/// Both runtimes: a test runs with each.
fn runtimes() -> Vec<Runtime> {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test runs containers and must be root: run it with sudo"
    );
    assert!(Path::new("/bin/busybox").exists(), "this test needs busybox-static: apt install it");
    ["runc", "crun"]
        .map(|name| {
            let features = Command::new(name)
                .arg("features")
                .stderr(Stdio::null())
                .output()
                .unwrap_or_else(|error| panic!("this test needs {name}: {error}"));
            let features = match features.status.success() {
                true => RuntimeFeatures::parse(&features.stdout).unwrap(),
                false => RuntimeFeatures::default(),
            };
            Runtime { name, features, _hugetlb: (name == "crun").then(Hugetlb::mount).flatten() }
        })
        .into()
}

/// The v1 hugetlb hierarchy, on hosts where v2 has the controller beside v1 hierarchies: crun
/// refuses to run there. One mount and one lock serve all tests of the machine, and the last takes
/// it away.
struct Hugetlb(#[expect(dead_code, reason = "held")] hybrid::Hybrid);

impl Hugetlb {
    fn mount() -> Option<Self> {
        let hybrid = Node::discover().unwrap().cgroup.mode == CgroupMode::Hybrid;
        hybrid.then(|| Hugetlb(hybrid::Hybrid::join(true)))
    }
}

impl Drop for Hugetlb {
    fn drop(&mut self) {
        // Before the mount may go with the lock.
        remove_cgroups(Path::new(hybrid::MOUNT));
    }
}

fn parent_cgroup() -> String {
    format!("holdfast-spec-test-{}", std::process::id())
}

fn remove_cgroups(hierarchy: &Path) {
    // Empty ones only; the last container's case finds all of them empty.
    let _ = fs::remove_dir(hierarchy.join(parent_cgroup()));
}

/// A shared mount of our own: the machine's need not be.
struct SharedMount(tempfile::TempDir);

impl SharedMount {
    fn new() -> Self {
        use nix::mount::{MsFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        let none = None::<&str>;
        mount(Some("none"), dir.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, dir.path(), none, MsFlags::MS_SHARED, none).unwrap();
        SharedMount(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

/// A pod's namespaces, held by a process.
struct PodNamespaces {
    holder: Child,
}

impl PodNamespaces {
    fn new() -> Self {
        Self::with(&[])
    }

    /// With a user namespace that owns the others: 65,536 ids from 100,000.
    fn mapped() -> Self {
        let held = Self::with(&["--user"]);
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{}/{map}", held.holder.id()), "0 100000 65536").unwrap();
        }
        held
    }

    fn with(further: &[&str]) -> Self {
        let mut holder = Command::new("unshare")
            .args(further)
            .args(["--net", "--ipc", "--uts", "/bin/busybox", "sh", "-c"])
            .arg("echo ready && exec /bin/busybox sleep 600")
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test needs unshare of util-linux");
        let mut ready = [0; 6];
        holder.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let held = PodNamespaces { holder };
        // From outside: a process in an unmapped user namespace may not.
        let named = Command::new("nsenter")
            .args(["--uts", "--target", &held.holder.id().to_string(), "hostname", "pod-a"])
            .status();
        assert!(named.unwrap().success());
        held
    }

    fn paths(&self) -> NamespacePaths {
        let path =
            |name: &str| Some(PathBuf::from(format!("/proc/{}/ns/{name}", self.holder.id())));
        NamespacePaths {
            net: path("net"),
            ipc: path("ipc"),
            uts: path("uts"),
            user: None,
            pid: PidNamespace::New,
        }
    }
}

impl Drop for PodNamespaces {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A container to be run.
struct Case<'a> {
    runtime: &'a Runtime,
    features: RuntimeFeatures,
    dir: tempfile::TempDir,
    pod_id: PodId,
    pod: PodConfig,
    id: ContainerId,
    container: ContainerConfig,
    namespaces: NamespacePaths,
    files: PodFiles,
    seccomp: Option<Vec<u8>>,
    held: PodNamespaces,
}

impl<'a> Case<'a> {
    fn new(runtime: &'a Runtime, container: ContainerConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("bundle/rootfs");
        for name in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        let applets = Command::new("/bin/busybox").arg("--list").output().unwrap().stdout;
        for applet in String::from_utf8(applets).unwrap().lines().filter(|name| *name != "busybox")
        {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        fs::write(rootfs.join("etc/passwd"), PASSWD).unwrap();
        fs::write(rootfs.join("etc/group"), GROUP).unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            Some(path)
        };
        let shm = dir.path().join("shm");
        fs::create_dir(&shm).unwrap();
        nix::mount::mount(
            Some("shm"),
            &shm,
            Some("tmpfs"),
            nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV,
            Some("mode=1777,size=1m"),
        )
        .unwrap();
        let held = PodNamespaces::new();
        let files = PodFiles {
            hostname: file("hostname", "pod-a\n"),
            hosts: file("hosts", "127.0.0.1 pod-a\n"),
            resolv_conf: file("resolv.conf", "nameserver 127.0.0.1\n"),
            shm: Some(shm),
        };
        let mut pod = PodConfig {
            name: "pod".into(),
            namespace: "default".into(),
            uid: "u".into(),
            hostname: "pod-a".into(),
            cgroup_parent: format!("/{}", parent_cgroup()),
            ..PodConfig::default()
        };
        pod.security.privileged = container.security.privileged;
        Case {
            runtime,
            features: runtime.features.clone(),
            pod_id: PodId::random(),
            pod,
            id: ContainerId::random(),
            container,
            namespaces: held.paths(),
            files,
            seccomp: None,
            held,
            dir,
        }
    }

    /// Gives the pod a user namespace, and the root file system to its root.
    fn user_namespace(&mut self) {
        self.held = PodNamespaces::mapped();
        self.namespaces = self.held.paths();
        self.namespaces.user = Some(format!("/proc/{}/ns/user", self.held.holder.id()).into());
        let range = IdMapping { host_id: 100_000, container_id: 0, length: 65_536 };
        self.pod.namespaces.user = Some(UserNamespace { uids: vec![range], gids: vec![range] });
        let chown = Command::new("chown")
            .args(["--recursive", "--no-dereference", "100000:100000"])
            .arg(self.dir.path().join("bundle/rootfs"))
            .status();
        assert!(chown.unwrap().success());
        // The runtime's child looks the root up with the ids of the namespace.
        fs::set_permissions(self.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    }

    fn generate(&self) -> Result<Spec, Box<dyn std::error::Error>> {
        let image = ImageDefaults { env: vec!["IMAGE=yes".into()], ..ImageDefaults::default() };
        let pod = PodRef { id: &self.pod_id, config: &self.pod };
        spec::check(&pod, &self.container, CgroupDriver::Cgroupfs)?;
        let host: HostFacts = node::gather(&self.container)?;
        let user = spec::user::resolve(
            PASSWD.as_bytes(),
            GROUP.as_bytes(),
            &self.container.security,
            &image.user,
        )?;
        Ok(spec::generate(&Input {
            pod,
            container_id: &self.id,
            container: &self.container,
            image: &image,
            image_name: "localhost/busybox:latest",
            user: &user,
            namespaces: &self.namespaces,
            files: &self.files,
            node: &Node::discover()?,
            host: &host,
            cgroup_driver: CgroupDriver::Cgroupfs,
            features: &self.features,
            image_volumes: &[],
            pids_limit: 77,
            seccomp_localhost: self.seccomp.as_deref(),
        })?)
    }

    fn write(&self) -> Spec {
        let spec = self.generate().unwrap();
        let json = serde_json::to_vec_pretty(&spec).unwrap();
        fs::write(self.dir.path().join("bundle/config.json"), json).unwrap();
        spec
    }

    fn command(&self, words: &[&str]) -> Vec<String> {
        let state = self.dir.path().join("state");
        let mut line = vec![self.runtime.name.to_owned(), "--root".into()];
        line.push(state.to_str().unwrap().to_owned());
        line.extend(words.iter().map(|word| (*word).to_owned()));
        line
    }

    fn call(&self, words: &[&str]) -> (ExitStatus, String) {
        let line = self.command(words);
        let out = File::create(self.dir.path().join("out")).unwrap();
        let child = Command::new(&line[0])
            .args(&line[1..])
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", line[0]));
        let status = wait(child, &line);
        let text = fs::read(self.dir.path().join("out")).unwrap();
        (status, String::from_utf8_lossy(&text).into_owned())
    }

    /// Runs it to its end.
    fn run(&self) -> Output {
        self.write();
        let bundle = self.dir.path().join("bundle");
        let words = ["run", "--bundle", bundle.to_str().unwrap(), self.id.as_str()];
        let (status, text) = self.call(&words);
        assert!(status.success(), "{} run: {status}\n{text}", self.runtime.name);
        Output::parse(text)
    }

    /// Runs it to its end on a terminal, which the runtime sends over a socket.
    fn run_on_terminal(&self) -> Output {
        let socket = self.dir.path().join("console.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let reader = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut text = Vec::new();
            let mut terminal = receive_file(&stream);
            // The end of a terminal whose other side is closed is an error (EIO).
            let _ = terminal.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let running = self.start_with(&["--console-socket", socket.to_str().unwrap()]);
        let text = reader.join().unwrap();
        drop(running);
        Output::parse(text)
    }

    fn start(&self) -> Running<'_> {
        self.start_with(&[])
    }

    fn start_with(&self, further: &[&str]) -> Running<'_> {
        let spec = self.write();
        let bundle = self.dir.path().join("bundle");
        let mut words = vec!["run", "--detach", "--bundle", bundle.to_str().unwrap()];
        words.extend(further);
        words.push(self.id.as_str());
        let (status, text) = self.call(&words);
        assert!(status.success(), "{} run --detach: {status}\n{text}", self.runtime.name);
        Running { case: self, spec }
    }
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.dir.path().join("shm"), nix::mount::MntFlags::MNT_DETACH);
        for entry in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            remove_cgroups(&entry.path());
        }
        remove_cgroups(Path::new("/sys/fs/cgroup"));
    }
}

/// A container that is running.
struct Running<'a> {
    case: &'a Case<'a>,
    spec: Spec,
}

impl Running<'_> {
    fn exec(&self, process: &str) -> Output {
        let file = self.case.dir.path().join("process.json");
        fs::write(&file, process).unwrap();
        let words = ["exec", "--process", file.to_str().unwrap(), self.case.id.as_str()];
        let (status, text) = self.case.call(&words);
        assert!(status.success(), "{} exec: {status}\n{text}", self.case.runtime.name);
        Output::parse(text)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let (status, text) = self.case.call(&["delete", "--force", self.case.id.as_str()]);
        if !std::thread::panicking() {
            assert!(status.success(), "delete: {status}\n{text}");
        }
    }
}

/// The file that the runtime sends: the terminal's master side.
fn receive_file(stream: &UnixStream) -> File {
    let mut name = [0; 128];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        })
        .expect("the runtime sends a file")
        .into()
}

/// Waits with a deadline; what is late is killed.
fn wait(mut child: Child, line: &[String]) -> ExitStatus {
    let until = Instant::now() + DEADLINE;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => {
                assert_eq!(status.signal(), None, "{line:?}");
                return status;
            }
            None if Instant::now() > until => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{line:?} is still running after {DEADLINE:?}");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:2000::/home/alice:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwheel:x:10:root\naudio:x:29:alice\nalice:x:2000:\n";
