use holdfast_protos::nri::{
    CdiDevice, HugepageLimit, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxNetDevice, LinuxPids,
    LinuxSyscall, OptionalBool, OptionalInt, OptionalInt64, OptionalRepeatedString, OptionalString,
    OptionalUInt64,
};

use super::*;

fn draft() -> Draft {
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["sh"], "env": ["PATH=/bin", "A=1"], "cwd": "/",
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 10}],
        },
        "annotations": {"keep": "1", "drop": "1"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data/", "type": "bind", "source": "/srv"},
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}],
            "devices": [{"path": "/dev/a", "type": "c", "major": 1, "minor": 2}],
            "resources": {"memory": {"limit": 10, "swap": 10}},
            "intelRdt": {"closID": "old"},
        },
    });
    let abilities = Abilities { oci_version: Some((1, 3)), swap: true, unified: true };
    Draft::new("c", spec, abilities)
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment { linux: Some(linux), ..ContainerAdjustment::default() }
}

fn resources(resources: LinuxResources) -> ContainerAdjustment {
    linux(LinuxContainerAdjustment { resources: Some(resources), ..Default::default() })
}

fn mount(destination: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        r#type: "bind".into(),
        source: "/src".into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn var(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.into(), value: value.into() }
}

fn is_invalid(adjust: &ContainerAdjustment, words: &str) {
    let error = draft().adjust(adjust, "10-a").unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    assert!(error.to_string().contains(words), "{error}");
    assert!(error.to_string().contains("10-a"), "{error}");
}

#[test]
fn nothing_asked_for_changes_nothing() {
    let mut draft = draft();
    let before = draft.spec.clone();
    draft.adjust(&ContainerAdjustment::default(), "10-a").unwrap();
    assert!(!draft.changed);
    assert_eq!(draft.spec, before);
}

#[test]
fn everything_finds_its_place_in_the_spec() {
    let mut draft = draft();
    let hook = Hook {
        path: "/hook".into(),
        args: vec!["hook".into()],
        env: vec!["K=V".into()],
        timeout: Some(OptionalInt { value: 3 }),
    };
    let int = |value| Some(OptionalInt64 { value });
    let uint = |value| Some(OptionalUInt64 { value });
    let adjust = ContainerAdjustment {
        annotations: [("-drop", ""), ("new", "2")].map(|(k, v)| (k.into(), v.into())).into(),
        mounts: vec![
            mount("/data/sub", &["rbind", "rslave"]),
            mount("/data", &["bind", "ro"]),
            mount("-/proc", &[]),
        ],
        env: vec![var("-PATH", ""), var("A", "2"), var("B", "x=y")],
        hooks: Some(Hooks { create_runtime: vec![hook], ..Hooks::default() }),
        linux: Some(LinuxContainerAdjustment {
            devices: vec![
                LinuxDevice { path: "-/dev/a".into(), ..LinuxDevice::default() },
                LinuxDevice {
                    path: "/dev/b".into(),
                    r#type: "b".into(),
                    major: 8,
                    minor: 1,
                    ..LinuxDevice::default()
                },
            ],
            resources: Some(LinuxResources {
                memory: Some(LinuxMemory {
                    limit: int(20),
                    reservation: int(5),
                    ..LinuxMemory::default()
                }),
                cpu: Some(LinuxCpu {
                    shares: uint(512),
                    quota: int(5000),
                    period: uint(10_000),
                    cpus: "0".into(),
                    ..LinuxCpu::default()
                }),
                hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 4 }],
                unified: [("memory.high".to_owned(), "15".to_owned())].into(),
                devices: vec![LinuxDeviceCgroup {
                    allow: true,
                    r#type: "c".into(),
                    major: int(1),
                    access: "r".into(),
                    ..LinuxDeviceCgroup::default()
                }],
                pids: Some(LinuxPids { limit: 9 }),
                blockio_class: Some(OptionalString { value: "slow".into() }),
                rdt_class: Some(OptionalString { value: "gold".into() }),
            }),
            cgroups_path: "/other/c".into(),
            oom_score_adj: Some(OptionalInt { value: 7 }),
            io_priority: Some(LinuxIoPriority {
                class: IoPrioClass::IoprioClassBe as i32,
                priority: 3,
            }),
            seccomp_policy: Some(LinuxSeccomp {
                default_action: "SCMP_ACT_ALLOW".into(),
                syscalls: vec![LinuxSyscall {
                    names: vec!["reboot".into()],
                    action: "SCMP_ACT_ERRNO".into(),
                    ..LinuxSyscall::default()
                }],
                ..LinuxSeccomp::default()
            }),
            namespaces: vec![
                LinuxNamespace { r#type: "-pid".into(), path: String::new() },
                LinuxNamespace { r#type: "cgroup".into(), path: String::new() },
            ],
            sysctl: [("net.x".to_owned(), "1".to_owned())].into(),
            net_devices: [("eth9".to_owned(), LinuxNetDevice { name: "in".into() })].into(),
            scheduler: Some(LinuxScheduler {
                policy: LinuxSchedulerPolicy::SchedBatch as i32,
                nice: 5,
                flags: vec![LinuxSchedulerFlag::SchedFlagResetOnFork as i32],
                ..LinuxScheduler::default()
            }),
            rdt: Some(LinuxRdt {
                remove: true,
                schemata: Some(OptionalRepeatedString { value: vec!["L3:0=f".into()] }),
                enable_monitoring: Some(OptionalBool { value: true }),
                ..LinuxRdt::default()
            }),
            memory_policy: Some(LinuxMemoryPolicy {
                mode: MpolMode::MpolBind as i32,
                nodes: "0".into(),
                flags: vec![MpolFlag::MpolFStaticNodes as i32],
            }),
        }),
        rlimits: vec![PosixRlimit { r#type: "nofile".into(), hard: 64, soft: 32 }],
        cdi_devices: vec![CdiDevice { name: "a.b/c=d".into() }],
        args: vec!["sleep".into(), "1".into()],
    };
    draft.adjust(&adjust, "10-a").unwrap();
    let expected = json!({
        "ociVersion": "1.3.0",
        "process": {
            "args": ["sleep", "1"], "env": ["A=2", "B=x=y"], "cwd": "/",
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 64, "soft": 32}],
            "oomScoreAdj": 7,
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3},
            "scheduler": {"policy": "SCHED_BATCH", "nice": 5,
                          "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        },
        "annotations": {"keep": "1", "new": "2"},
        "mounts": [
            {"destination": "/data", "type": "bind", "source": "/src",
             "options": ["bind", "ro"]},
            {"destination": "/data/sub", "type": "bind", "source": "/src",
             "options": ["rbind", "rslave"]},
        ],
        "hooks": {"createRuntime": [
            {"path": "/hook", "args": ["hook"], "env": ["K=V"], "timeout": 3}]},
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "cgroup"}],
            "devices": [{"path": "/dev/b", "type": "b", "major": 8, "minor": 1}],
            "resources": {
                "memory": {"limit": 20, "swap": 20, "reservation": 5},
                "cpu": {"shares": 512, "quota": 5000, "period": 10000, "cpus": "0"},
                "pids": {"limit": 9},
                "unified": {"memory.high": "15"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
                "devices": [
                    {"allow": true, "type": "b", "access": "rwm", "major": 8, "minor": 1},
                    {"allow": true, "type": "c", "access": "r", "major": 1},
                ],
            },
            "rootfsPropagation": "rslave",
            "cgroupsPath": "/other/c",
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW",
                        "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}]},
            "sysctl": {"net.x": "1"},
            "netDevices": {"eth9": {"name": "in"}},
            "intelRdt": {"schemata": ["L3:0=f"], "enableMonitoring": true},
            "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0",
                             "flags": ["MPOL_F_STATIC_NODES"]},
        },
    });
    let mut spec = draft.spec.clone();
    // Indexing leaves a null where nothing was; the caller takes them out.
    spec["linux"].as_object_mut().unwrap().retain(|_, value| !value.is_null());
    assert_eq!(spec, expected);
    let by = |name: &str| Some((name.to_owned(), "10-a".to_owned()));
    assert_eq!(draft.wanted.blockio_class, by("slow"));
    assert_eq!(draft.wanted.rdt_class, by("gold"));
    assert_eq!(draft.wanted.cdi_devices, [("a.b/c=d".to_owned(), "10-a".to_owned())]);
    // As another plugin would see it.
    let seen = super::super::message::container(&spec);
    let seen_linux = seen.linux.unwrap();
    assert_eq!(seen.args, ["sleep", "1"]);
    assert_eq!(seen_linux.scheduler.unwrap().flags, [0]);
    assert_eq!(seen_linux.resources.unwrap().cpu.unwrap().shares, uint(512));
    assert_eq!(seen_linux.rdt.unwrap().schemata.unwrap().value, ["L3:0=f"]);
}

#[test]
fn a_later_plugin_sets_the_same_only_after_it_has_removed_it() {
    let mut draft = draft();
    let env = |vars: &[KeyValue]| ContainerAdjustment {
        env: vars.to_vec(),
        ..ContainerAdjustment::default()
    };
    draft.adjust(&env(&[var("B", "1")]), "10-a").unwrap();
    let error = draft.adjust(&env(&[var("B", "2")]), "20-b").unwrap_err();
    assert_eq!(
        error.to_string(),
        "plugins \"10-a\" and \"20-b\" both set Env \"B\" of container c"
    );
    draft.adjust(&env(&[var("-B", ""), var("B", "3")]), "20-b").unwrap();
    assert_eq!(draft.spec["process"]["env"], json!(["PATH=/bin", "A=1", "B=3"]));
    // What nobody has set yet is anybody's to remove.
    draft.adjust(&env(&[var("-A", "")]), "20-b").unwrap();
    draft.adjust(&env(&[var("-A", ""), var("A", "9")]), "30-c").unwrap();
    assert_eq!(draft.spec["process"]["env"], json!(["PATH=/bin", "B=3", "A=9"]));

    let args = |args: &[&str]| ContainerAdjustment {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..ContainerAdjustment::default()
    };
    draft.adjust(&args(&["a"]), "10-a").unwrap();
    assert!(draft.adjust(&args(&["b"]), "20-b").is_err());
    draft.adjust(&args(&["", "b"]), "20-b").unwrap();
    assert_eq!(draft.spec["process"]["args"], json!(["b"]));
    assert_eq!(draft.merged.args, ["b"]);
}

#[test]
fn values_without_sense_are_refused_by_name() {
    let env = |key: &str| ContainerAdjustment {
        env: vec![var(key, "x")],
        ..ContainerAdjustment::default()
    };
    is_invalid(&env(""), "not a variable");
    is_invalid(&env("A=B"), "not a variable");
    let annotations = [("io.kubernetes.cri.sandbox-id".to_owned(), "x".to_owned())].into();
    is_invalid(&ContainerAdjustment { annotations, ..Default::default() }, "the runtime's");
    let mounts = vec![mount("relative", &[])];
    is_invalid(&ContainerAdjustment { mounts, ..Default::default() }, "absolute");
    let rlimits = vec![PosixRlimit { r#type: "nofile".into(), hard: 1, soft: 2 }];
    is_invalid(&ContainerAdjustment { rlimits, ..Default::default() }, "above hard");
    let args = vec![String::new()];
    is_invalid(&ContainerAdjustment { args, ..Default::default() }, "needs a command");
    let namespaces = vec![LinuxNamespace { r#type: "net".into(), path: String::new() }];
    is_invalid(&linux(LinuxContainerAdjustment { namespaces, ..Default::default() }), "network");
    let oom_score_adj = Some(OptionalInt { value: 1001 });
    is_invalid(
        &linux(LinuxContainerAdjustment { oom_score_adj, ..Default::default() }),
        "-1000 to 1000",
    );
    let io_priority = Some(LinuxIoPriority { class: 9, priority: 0 });
    is_invalid(&linux(LinuxContainerAdjustment { io_priority, ..Default::default() }), "class 9");
    let cgroups_path = "/a/../b".to_owned();
    is_invalid(&linux(LinuxContainerAdjustment { cgroups_path, ..Default::default() }), "..");
    let devices = vec![LinuxDevice { path: "/dev/x".into(), ..LinuxDevice::default() }];
    is_invalid(&linux(LinuxContainerAdjustment { devices, ..Default::default() }), "/dev/x");
}

#[test]
fn what_an_old_runtime_would_pass_over_is_refused() {
    let mut draft = draft();
    draft.abilities = Abilities::default();
    let scheduler = LinuxScheduler {
        policy: LinuxSchedulerPolicy::SchedIdle as i32,
        ..LinuxScheduler::default()
    };
    let adjust =
        linux(LinuxContainerAdjustment { scheduler: Some(scheduler), ..Default::default() });
    let error = draft.adjust(&adjust, "10-a").unwrap_err();
    assert!(matches!(error, Error::Lacking { .. }), "{error}");
    assert!(error.to_string().contains("1.1"), "{error}");
    let unified = [("memory.high".to_owned(), "1".to_owned())].into();
    let error = draft
        .adjust(&resources(LinuxResources { unified, ..Default::default() }), "10-a")
        .unwrap_err();
    assert!(error.to_string().contains("cgroup v2"), "{error}");
}
