//! From an OCI spec to what a plugin is told of a container.
//!
//! The spec is read as JSON, not as types: it is the text that the runtime gets, with words in it that
//! the types do not have.

use holdfast_protos::nri::{
    Container, Hook, Hooks, HugepageLimit, IoPrioClass, LinuxContainer, LinuxCpu, LinuxDevice,
    LinuxDeviceCgroup, LinuxIoPriority, LinuxMemory, LinuxNamespace, LinuxNetDevice, LinuxPids,
    LinuxRdt, LinuxResources, LinuxScheduler, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    LinuxSeccomp, LinuxSeccompArg, LinuxSyscall, Mount, OptionalBool, OptionalFileMode,
    OptionalInt, OptionalInt64, OptionalRepeatedString, OptionalString, OptionalUInt32,
    OptionalUInt64, PosixRlimit, User,
};
use serde_json::Value;

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    list(value).map(text).collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn map<T>(value: &Value, of: impl Fn(&Value) -> T) -> std::collections::BTreeMap<String, T> {
    let entries = value.as_object().into_iter().flatten();
    entries.map(|(key, value)| (key.clone(), of(value))).collect()
}

fn int64(value: &Value) -> Option<OptionalInt64> {
    value.as_i64().map(|value| OptionalInt64 { value })
}

fn uint64(value: &Value) -> Option<OptionalUInt64> {
    value.as_u64().map(|value| OptionalUInt64 { value })
}

fn uint32(value: &Value) -> Option<OptionalUInt32> {
    value.as_u64().map(|value| OptionalUInt32 { value: value as u32 })
}

fn boolean(value: &Value) -> Option<OptionalBool> {
    value.as_bool().map(|value| OptionalBool { value })
}

/// All that the spec says of a container. Who it is and how it is doing is for the caller to add.
pub fn container(spec: &Value) -> Container {
    let process = &spec["process"];
    let user = &process["user"];
    Container {
        annotations: map(&spec["annotations"], text),
        args: texts(&process["args"]),
        env: texts(&process["env"]),
        mounts: list(&spec["mounts"]).map(mount).collect(),
        hooks: spec.get("hooks").map(hooks),
        linux: Some(linux(spec)),
        rlimits: list(&process["rlimits"]).map(rlimit).collect(),
        user: Some(User {
            uid: user["uid"].as_u64().unwrap_or_default() as u32,
            gid: user["gid"].as_u64().unwrap_or_default() as u32,
            additional_gids: list(&user["additionalGids"])
                .filter_map(|gid| gid.as_u64().map(|gid| gid as u32))
                .collect(),
        }),
        ..Container::default()
    }
}

fn mount(value: &Value) -> Mount {
    Mount {
        destination: text(&value["destination"]),
        r#type: text(&value["type"]),
        source: text(&value["source"]),
        options: texts(&value["options"]),
    }
}

fn hooks(value: &Value) -> Hooks {
    let of = |name: &str| {
        let hooks = list(&value[name]).map(|hook| Hook {
            path: text(&hook["path"]),
            args: texts(&hook["args"]),
            env: texts(&hook["env"]),
            timeout: hook["timeout"].as_i64().map(|value| OptionalInt { value }),
        });
        hooks.collect()
    };
    Hooks {
        prestart: of("prestart"),
        create_runtime: of("createRuntime"),
        create_container: of("createContainer"),
        start_container: of("startContainer"),
        poststart: of("poststart"),
        poststop: of("poststop"),
    }
}

fn rlimit(value: &Value) -> PosixRlimit {
    PosixRlimit {
        r#type: text(&value["type"]),
        hard: value["hard"].as_u64().unwrap_or_default(),
        soft: value["soft"].as_u64().unwrap_or_default(),
    }
}

fn linux(spec: &Value) -> LinuxContainer {
    let (linux, process) = (&spec["linux"], &spec["process"]);
    LinuxContainer {
        namespaces: list(&linux["namespaces"])
            .map(|namespace| LinuxNamespace {
                r#type: text(&namespace["type"]),
                path: text(&namespace["path"]),
            })
            .collect(),
        devices: list(&linux["devices"]).map(device).collect(),
        resources: Some(resources(&linux["resources"])),
        oom_score_adj: process["oomScoreAdj"].as_i64().map(|value| OptionalInt { value }),
        cgroups_path: text(&linux["cgroupsPath"]),
        io_priority: process.get("ioPriority").map(|priority| LinuxIoPriority {
            class: IoPrioClass::from_str_name(&text(&priority["class"]))
                .unwrap_or(IoPrioClass::IoprioClassNone) as i32,
            priority: priority["priority"].as_i64().unwrap_or_default() as i32,
        }),
        seccomp_policy: linux.get("seccomp").map(seccomp),
        sysctl: map(&linux["sysctl"], text),
        net_devices: map(&linux["netDevices"], |device| LinuxNetDevice {
            name: text(&device["name"]),
        }),
        scheduler: process.get("scheduler").map(scheduler),
        rdt: linux.get("intelRdt").map(|rdt| LinuxRdt {
            clos_id: rdt["closID"].as_str().map(|id| OptionalString { value: id.to_owned() }),
            schemata: rdt["schemata"]
                .is_array()
                .then(|| OptionalRepeatedString { value: texts(&rdt["schemata"]) }),
            enable_monitoring: boolean(&rdt["enableMonitoring"]),
            remove: false,
        }),
        // Which profile was asked for is not in the spec.
        seccomp_profile: None,
    }
}

fn device(value: &Value) -> LinuxDevice {
    LinuxDevice {
        path: text(&value["path"]),
        r#type: text(&value["type"]),
        major: value["major"].as_i64().unwrap_or_default(),
        minor: value["minor"].as_i64().unwrap_or_default(),
        file_mode: value["fileMode"].as_u64().map(|value| OptionalFileMode { value: value as u32 }),
        uid: uint32(&value["uid"]),
        gid: uint32(&value["gid"]),
    }
}

/// `linux.resources` of a spec.
pub fn resources(value: &Value) -> LinuxResources {
    let (memory, cpu) = (&value["memory"], &value["cpu"]);
    LinuxResources {
        memory: memory.is_object().then(|| LinuxMemory {
            limit: int64(&memory["limit"]),
            reservation: int64(&memory["reservation"]),
            swap: int64(&memory["swap"]),
            kernel: int64(&memory["kernel"]),
            kernel_tcp: int64(&memory["kernelTCP"]),
            swappiness: uint64(&memory["swappiness"]),
            disable_oom_killer: boolean(&memory["disableOOMKiller"]),
            use_hierarchy: boolean(&memory["useHierarchy"]),
        }),
        cpu: cpu.is_object().then(|| LinuxCpu {
            shares: uint64(&cpu["shares"]),
            quota: int64(&cpu["quota"]),
            period: uint64(&cpu["period"]),
            realtime_runtime: int64(&cpu["realtimeRuntime"]),
            realtime_period: uint64(&cpu["realtimePeriod"]),
            cpus: text(&cpu["cpus"]),
            mems: text(&cpu["mems"]),
        }),
        hugepage_limits: list(&value["hugepageLimits"])
            .map(|limit| HugepageLimit {
                page_size: text(&limit["pageSize"]),
                limit: limit["limit"].as_u64().unwrap_or_default(),
            })
            .collect(),
        // The class's limits are in the spec, its name is not.
        blockio_class: None,
        rdt_class: None,
        unified: map(&value["unified"], text),
        devices: list(&value["devices"])
            .map(|rule| LinuxDeviceCgroup {
                allow: rule["allow"].as_bool().unwrap_or_default(),
                r#type: text(&rule["type"]),
                major: int64(&rule["major"]),
                minor: int64(&rule["minor"]),
                access: text(&rule["access"]),
            })
            .collect(),
        pids: value["pids"]["limit"].as_i64().map(|limit| LinuxPids { limit }),
    }
}

fn scheduler(value: &Value) -> LinuxScheduler {
    let flag =
        |value: &Value| LinuxSchedulerFlag::from_str_name(value.as_str()?).map(|flag| flag as i32);
    let policy = LinuxSchedulerPolicy::from_str_name(&text(&value["policy"]));
    LinuxScheduler {
        policy: policy.unwrap_or(LinuxSchedulerPolicy::SchedNone) as i32,
        nice: value["nice"].as_i64().unwrap_or_default() as i32,
        priority: value["priority"].as_i64().unwrap_or_default() as i32,
        flags: list(&value["flags"]).filter_map(flag).collect(),
        runtime: value["runtime"].as_u64().unwrap_or_default(),
        deadline: value["deadline"].as_u64().unwrap_or_default(),
        period: value["period"].as_u64().unwrap_or_default(),
    }
}

fn seccomp(value: &Value) -> LinuxSeccomp {
    LinuxSeccomp {
        default_action: text(&value["defaultAction"]),
        default_errno: uint32(&value["defaultErrnoRet"]),
        architectures: texts(&value["architectures"]),
        flags: texts(&value["flags"]),
        listener_path: text(&value["listenerPath"]),
        listener_metadata: text(&value["listenerMetadata"]),
        syscalls: list(&value["syscalls"])
            .map(|call| LinuxSyscall {
                names: texts(&call["names"]),
                action: text(&call["action"]),
                errno_ret: uint32(&call["errnoRet"]),
                args: list(&call["args"])
                    .map(|arg| LinuxSeccompArg {
                        index: arg["index"].as_u64().unwrap_or_default() as u32,
                        value: arg["value"].as_u64().unwrap_or_default(),
                        value_two: arg["valueTwo"].as_u64().unwrap_or_default(),
                        op: text(&arg["op"]),
                    })
                    .collect(),
            })
            .collect(),
    }
}
