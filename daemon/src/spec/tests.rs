//! One configuration, one reviewed JSON. `plain.snap` is a whole spec; every other snapshot has
//! what its configuration changes in it, as `added` and `removed` where a list differs.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::{
    id::PodId,
    node::{CapabilityMasks, Cgroup, HostPropagation, MountFacts, SelinuxContexts},
    pod::config::{
        Device, IdMapping, Mount, PodConfig, Propagation, Resources, Selinux, UserNamespace,
    },
};

/// A node that has everything: cgroup v2, all capabilities; but no AppArmor and no SELinux.
pub(crate) fn node() -> Node {
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

/// Everything that goes in, to be changed by a case.
struct Scene {
    pod_id: PodId,
    pod: PodConfig,
    id: ContainerId,
    container: ContainerConfig,
    image: ImageDefaults,
    user: User,
    namespaces: NamespacePaths,
    files: PodFiles,
    node: Node,
    host: HostFacts,
    driver: CgroupDriver,
    features: RuntimeFeatures,
    volumes: Vec<BoundVolume>,
    pids_limit: i64,
    seccomp: Option<&'static str>,
}

impl Scene {
    fn plain() -> Scene {
        let path = |name: &str| Some(PathBuf::from(format!("/run/holdfast/pods/p/{name}")));
        Scene {
            pod_id: "a".repeat(64).parse().unwrap(),
            pod: PodConfig {
                name: "web-0".into(),
                uid: "11111111-2222".into(),
                namespace: "default".into(),
                hostname: "web-0".into(),
                cgroup_parent: "/kubepods/burstable/pod1".into(),
                ..PodConfig::default()
            },
            id: "b".repeat(64).parse().unwrap(),
            container: ContainerConfig {
                name: "nginx".into(),
                annotations: [("io.kubernetes.container.hash".to_owned(), "1f".to_owned())].into(),
                ..ContainerConfig::default()
            },
            image: ImageDefaults {
                entrypoint: vec!["/entry.sh".into()],
                cmd: vec!["nginx".into(), "-g".into()],
                env: vec!["NGINX=1.27".into()],
                ..ImageDefaults::default()
            },
            user: User { additional_gids: vec![0], home: "/root".into(), ..User::default() },
            namespaces: NamespacePaths {
                net: path("net"),
                ipc: path("ipc"),
                uts: path("uts"),
                user: None,
                pid: PidNamespace::New,
            },
            files: PodFiles {
                hostname: path("hostname"),
                hosts: path("hosts"),
                resolv_conf: path("resolv.conf"),
                shm: path("shm"),
            },
            node: node(),
            host: HostFacts::default(),
            driver: CgroupDriver::Cgroupfs,
            features: RuntimeFeatures {
                oci_version_max: Some((1, 2)),
                mount_options: ["rro", "idmap", "ridmap", "noexec", "nosuid", "nodev", "noatime"]
                    .map(str::to_owned)
                    .into(),
                idmap: true,
                ..RuntimeFeatures::default()
            },
            volumes: Vec::new(),
            pids_limit: 0,
            seccomp: None,
        }
    }

    fn with(change: impl FnOnce(&mut Scene)) -> Scene {
        let mut scene = Scene::plain();
        change(&mut scene);
        scene
    }

    fn privileged(change: impl FnOnce(&mut Scene)) -> Scene {
        Scene::with(|scene| {
            scene.pod.security.privileged = true;
            scene.container.security.privileged = true;
            scene.host.host_devices =
                vec![device("/dev/kvm", false, (10, 232)), device("/dev/vda", true, (254, 0))];
            change(scene);
        })
    }

    fn spec(&self) -> Result<Spec, Error> {
        generate(&Input {
            pod: PodRef { id: &self.pod_id, config: &self.pod },
            container_id: &self.id,
            container: &self.container,
            image: &self.image,
            image_name: "docker.io/library/nginx:1.27",
            user: &self.user,
            namespaces: &self.namespaces,
            files: &self.files,
            node: &self.node,
            host: &self.host,
            cgroup_driver: self.driver,
            features: &self.features,
            image_volumes: &self.volumes,
            pids_limit: self.pids_limit,
            seccomp_localhost: self.seccomp.map(str::as_bytes),
        })
    }

    fn json(&self) -> Value {
        sorted(serde_json::to_value(self.spec().unwrap()).unwrap())
    }

    fn mount(&mut self, mount: Mount, propagation: HostPropagation) {
        self.host
            .mounts
            .push(MountFacts { source: Some(mount.host_path.clone().into()), propagation });
        self.container.mounts.push(mount);
    }

    fn user_namespace(&mut self) {
        let range = IdMapping { host_id: 100_000, container_id: 0, length: 65_536 };
        self.pod.namespaces.user = Some(UserNamespace { uids: vec![range], gids: vec![range] });
        self.namespaces.user = Some("/run/holdfast/pods/p/user".into());
    }
}

fn bind(host: &str, container: &str) -> Mount {
    Mount { host_path: host.into(), container_path: container.into(), ..Mount::default() }
}

fn device(path: &str, block: bool, (major, minor): (u32, u32)) -> DeviceNode {
    DeviceNode { path: path.into(), block, major, minor, mode: 0o660, uid: 0, gid: 6 }
}

/// The kubelet fills `image_sub_path` from a volume mount's `subPath` whatever the volume is.
#[test]
fn an_image_sub_path_without_an_image_means_nothing() {
    let mounted = |image_sub_path: &str| {
        Scene::with(|s| {
            let mount =
                Mount { image_sub_path: image_sub_path.into(), ..bind("/srv/one", "/data") };
            s.mount(mount, HostPropagation::Private);
        })
        .json()
    };
    assert_eq!(mounted("one"), mounted(""));
}

/// Keys in order, and sets in order: the library keeps both in hash tables.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().map(|(key, value)| (key, sorted(value))).collect())
        }
        Value::Array(list) => {
            let mut list: Vec<Value> = list.into_iter().map(sorted).collect();
            if list.iter().all(|v| v.as_str().is_some_and(|text| text.starts_with("CAP_"))) {
                list.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
            Value::Array(list)
        }
        other => other,
    }
}

/// What `new` has that `old` has not, and the other way round.
fn difference(old: &Value, new: &Value) -> Value {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let mut out = Map::new();
            for key in old.keys().chain(new.keys()) {
                let (a, b) = (old.get(key), new.get(key));
                if a != b && !out.contains_key(key) {
                    let value = difference(a.unwrap_or(&Value::Null), b.unwrap_or(&Value::Null));
                    out.insert(key.clone(), value);
                }
            }
            Value::Object(out)
        }
        (Value::Array(old), Value::Array(new)) => {
            let missing = |from: &[Value], of: &[Value]| -> Vec<Value> {
                of.iter().filter(|value| !from.contains(value)).cloned().collect()
            };
            let (added, removed) = (missing(old, new), missing(new, old));
            match (added.is_empty(), removed.is_empty()) {
                (true, true) => json!({"reordered": new}),
                (true, false) => json!({"removed": removed}),
                (false, true) => json!({"added": added}),
                (false, false) => json!({"added": added, "removed": removed}),
            }
        }
        (_, new) => new.clone(),
    }
}

fn snapshot(name: &str, value: &Value) {
    insta::with_settings!({prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_json_snapshot!(name, value);
    });
}

#[test]
fn the_whole_spec_of_a_plain_container() {
    snapshot("plain", &Scene::plain().json());
}

#[test]
fn the_whole_default_seccomp_profile() {
    let scene = Scene::with(|s| s.container.security.seccomp = Some(Profile::RuntimeDefault));
    snapshot("seccomp_runtime_default", &scene.json()["linux"]["seccomp"]);
}

#[test]
fn the_security_matrix() {
    let plain = Scene::plain().json();
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let cases: Vec<(&str, Scene)> = vec![
        ("privileged", Scene::privileged(|_| {})),
        (
            "privileged_with_profiles_is_unconfined",
            Scene::privileged(|s| {
                s.node.apparmor = true;
                s.host.apparmor_profiles = [APPARMOR_DEFAULT.to_owned()].into();
                s.container.security.seccomp = Some(Profile::RuntimeDefault);
                s.container.security.apparmor = Some(Profile::RuntimeDefault);
            }),
        ),
        ("privileged_without_host_devices", Scene::privileged(|s| s.host.host_devices.clear())),
        (
            "privileged_where_the_daemon_lacks_a_capability",
            Scene::privileged(|s| {
                s.host.host_devices.clear();
                s.node.capabilities.grantable &= !caps::SYS_RESOURCE;
            }),
        ),
        (
            "capabilities_add_and_drop",
            Scene::with(|s| {
                s.container.security.add_capabilities = words(&["NET_ADMIN", "cap_sys_time"]);
                s.container.security.drop_capabilities = words(&["MKNOD", "NET_RAW"]);
            }),
        ),
        (
            "capabilities_drop_all",
            Scene::with(|s| {
                s.container.security.drop_capabilities = words(&["ALL"]);
            }),
        ),
        (
            "capabilities_restricted",
            Scene::with(|s| {
                s.container.security.drop_capabilities = words(&["ALL"]);
                s.container.security.add_capabilities = words(&["NET_BIND_SERVICE"]);
            }),
        ),
        (
            "capabilities_ambient",
            Scene::with(|s| {
                s.user =
                    User { uid: 1000, gid: 1000, additional_gids: vec![1000], home: String::new() };
                s.container.security.drop_capabilities = words(&["ALL"]);
                s.container.security.add_ambient_capabilities = words(&["NET_BIND_SERVICE"]);
            }),
        ),
        (
            "no_new_privs_and_readonly_rootfs",
            Scene::with(|s| {
                s.container.security.no_new_privs = true;
                s.container.security.readonly_rootfs = true;
            }),
        ),
        (
            "proc_mount_unmasked",
            Scene::with(|s| {
                s.container.security.masked_paths = Some(vec![]);
                s.container.security.readonly_paths = Some(vec![]);
            }),
        ),
        (
            "masked_and_readonly_paths_of_the_request",
            Scene::with(|s| {
                s.container.security.masked_paths = Some(words(&["/proc/kcore"]));
                s.container.security.readonly_paths = Some(words(&["/proc/sys"]));
            }),
        ),
        (
            "seccomp_unconfined",
            Scene::with(|s| {
                s.container.security.seccomp = Some(Profile::Unconfined);
            }),
        ),
        (
            "seccomp_localhost",
            Scene::with(|s| {
                s.container.security.seccomp = Some(Profile::Localhost("audit.json".into()));
                s.seccomp = Some(r#"{"defaultAction": "SCMP_ACT_LOG", "syscalls": null}"#);
            }),
        ),
        (
            "apparmor_default_when_loaded",
            Scene::with(|s| {
                s.node.apparmor = true;
                s.host.apparmor_profiles = [APPARMOR_DEFAULT.to_owned()].into();
            }),
        ),
        (
            "apparmor_localhost",
            Scene::with(|s| {
                s.node.apparmor = true;
                s.host.apparmor_profiles = ["k8s-deny-write".to_owned()].into();
                s.container.security.apparmor =
                    Some(Profile::Localhost("localhost/k8s-deny-write".into()));
            }),
        ),
        (
            "apparmor_unconfined",
            Scene::with(|s| {
                s.node.apparmor = true;
                s.container.security.apparmor = Some(Profile::Unconfined);
            }),
        ),
        ("selinux_of_the_policy", Scene::with(selinux)),
        (
            "selinux_of_the_request",
            Scene::with(|s| {
                selinux(s);
                s.container.security.selinux = Some(Selinux {
                    kind: "container_init_t".into(),
                    level: "s0:c1,c2".into(),
                    ..Selinux::default()
                });
            }),
        ),
        (
            "selinux_of_the_pod",
            Scene::with(|s| {
                selinux(s);
                s.pod.security.selinux =
                    Some(Selinux { level: "s0:c7,c8".into(), ..Selinux::default() });
            }),
        ),
        (
            "selinux_privileged_has_no_label",
            Scene::privileged(|s| {
                s.host.host_devices.clear();
                selinux(s);
            }),
        ),
        (
            "selinux_spc_t_without_selinux",
            Scene::with(|s| {
                s.container.security.selinux = Some(Selinux {
                    kind: "spc_t".into(),
                    level: "s0".into(),
                    ..Selinux::default()
                });
            }),
        ),
        (
            "user_and_groups",
            Scene::with(|s| {
                s.user = User {
                    uid: 1000,
                    gid: 2000,
                    additional_gids: vec![10, 2000, 3000],
                    home: "/home/alice".into(),
                };
            }),
        ),
    ];
    for (name, scene) in cases {
        snapshot(name, &difference(&plain, &scene.json()));
    }
}

fn selinux(scene: &mut Scene) {
    scene.node.selinux = Some(SelinuxContexts {
        process: "system_u:system_r:container_t:s0".into(),
        file: "system_u:object_r:container_file_t:s0".into(),
    });
}

#[test]
fn namespaces_mounts_devices_and_limits() {
    let plain = Scene::plain().json();
    let cases: Vec<(&str, Scene)> = vec![
        (
            "namespaces_of_the_node",
            Scene::with(|s| {
                s.namespaces =
                    NamespacePaths { pid: PidNamespace::Host, ..NamespacePaths::default() };
                s.files.shm = None;
                s.pod.hostname = String::new();
            }),
        ),
        (
            "pid_of_the_pod",
            Scene::with(|s| {
                s.namespaces.pid = PidNamespace::Path("/run/holdfast/pods/p/pid".into());
            }),
        ),
        ("user_namespace", Scene::with(|s| s.user_namespace())),
        (
            "user_namespace_with_the_nodes_network_and_ipc",
            Scene::with(|s| {
                s.user_namespace();
                s.namespaces.net = None;
                s.namespaces.ipc = None;
                s.files.shm = None;
            }),
        ),
        (
            "user_namespace_has_all_capabilities_of_its_own",
            Scene::with(|s| {
                s.user_namespace();
                s.node.capabilities.grantable = 0;
                s.container.security.add_capabilities = vec!["SYS_RESOURCE".into()];
            }),
        ),
        (
            "user_namespace_without_group_tty",
            Scene::with(|s| {
                s.user_namespace();
                let one = IdMapping { host_id: 100_000, container_id: 0, length: 1 };
                s.pod.namespaces.user = Some(UserNamespace { uids: vec![one], gids: vec![one] });
            }),
        ),
        ("cgroup_v1", Scene::with(|s| s.node.cgroup.mode = CgroupMode::V1)),
        (
            "cgroup_systemd",
            Scene::with(|s| {
                s.driver = CgroupDriver::Systemd;
                s.pod.cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".into();
            }),
        ),
        (
            "mounts",
            Scene::with(|s| {
                s.mount(bind("/srv/deep", "/data/deep"), HostPropagation::Private);
                s.mount(bind("/srv/data", "/data"), HostPropagation::Private);
                s.mount(
                    Mount { readonly: true, ..bind("/srv/ro", "/ro/") },
                    HostPropagation::Private,
                );
                s.mount(bind("/srv/hosts", "/etc/hosts"), HostPropagation::Private);
                s.mount(
                    Mount { options: vec!["noexec".into()], ..bind("/srv/x", "/a/../x") },
                    HostPropagation::Private,
                );
            }),
        ),
        (
            "mounts_twice_at_one_place_the_last_is_seen",
            Scene::with(|s| {
                s.mount(bind("/srv/first", "/data"), HostPropagation::Private);
                s.mount(bind("/srv/second", "/data"), HostPropagation::Private);
            }),
        ),
        (
            "mounts_of_a_whole_dev",
            Scene::with(|s| {
                s.mount(bind("/dev", "/dev"), HostPropagation::Private);
            }),
        ),
        (
            "mounts_recursive_read_only",
            Scene::with(|s| {
                let mount =
                    Mount { readonly: true, recursive_read_only: true, ..bind("/srv", "/rro") };
                s.mount(mount, HostPropagation::Private);
            }),
        ),
        (
            "mounts_host_to_container",
            Scene::with(|s| {
                let mount =
                    Mount { propagation: Propagation::HostToContainer, ..bind("/srv", "/slave") };
                s.mount(mount, HostPropagation::Slave);
            }),
        ),
        (
            "mounts_bidirectional",
            Scene::with(|s| {
                let slave =
                    Mount { propagation: Propagation::HostToContainer, ..bind("/srv", "/slave") };
                let shared =
                    Mount { propagation: Propagation::Bidirectional, ..bind("/srv", "/shared") };
                s.mount(shared, HostPropagation::Shared);
                s.mount(slave, HostPropagation::Shared);
            }),
        ),
        (
            "mounts_id_mapped",
            Scene::with(|s| {
                s.user_namespace();
                let range = s.pod.namespaces.user.as_ref().unwrap().uids.clone();
                s.mount(
                    Mount {
                        uid_mappings: range.clone(),
                        gid_mappings: range,
                        ..bind("/srv", "/mapped")
                    },
                    HostPropagation::Private,
                );
            }),
        ),
        (
            "mounts_image_and_image_volumes",
            Scene::with(|s| {
                s.host.mounts = vec![MountFacts {
                    source: Some("/var/lib/holdfast/views/1/models".into()),
                    ..MountFacts::default()
                }];
                s.container.mounts = vec![Mount {
                    container_path: "/models".into(),
                    image: Some("quay.io/models:1".into()),
                    image_sub_path: "models".into(),
                    readonly: true,
                    ..Mount::default()
                }];
                s.volumes = ["/models", "/var/lib/data"]
                    .map(|target| BoundVolume {
                        source: format!("/var/lib/holdfast/volumes{target}").into(),
                        target: target.to_owned(),
                    })
                    .into();
            }),
        ),
        (
            "devices",
            Scene::with(|s| {
                s.container.devices = vec![
                    Device {
                        container_path: "/dev/fuse".into(),
                        host_path: "/dev/fuse".into(),
                        permissions: String::new(),
                    },
                    Device {
                        container_path: "/dev/disk".into(),
                        host_path: "/dev/vda".into(),
                        permissions: "r".into(),
                    },
                ];
                s.host.devices = vec![
                    vec![device("/dev/fuse", false, (10, 229))],
                    vec![device("/dev/disk", true, (254, 0))],
                ];
            }),
        ),
        (
            "resources",
            Scene::with(|s| {
                s.pids_limit = 4096;
                s.container.resources = Resources {
                    cpu_period: 100_000,
                    cpu_quota: 150_000,
                    cpu_shares: 1536,
                    memory_limit: 256 << 20,
                    oom_score_adj: 937,
                    cpuset_cpus: "0-1".into(),
                    cpuset_mems: "0".into(),
                    hugepages: vec![("2Mi".into(), 4 << 20), ("1GB".into(), 0)],
                    unified: [("memory.high".to_owned(), "209715200".to_owned())].into(),
                    ..Resources::default()
                };
            }),
        ),
        (
            "process",
            Scene::with(|s| {
                s.container.command = vec!["sh".into(), "-c".into()];
                s.container.args = vec!["sleep 1".into()];
                s.container.working_dir = "/srv".into();
                s.container.env = vec![("NGINX".into(), "2".into()), ("A".into(), "b=c".into())];
                s.container.tty = true;
            }),
        ),
    ];
    for (name, scene) in cases {
        snapshot(name, &difference(&plain, &scene.json()));
    }
}

#[test]
fn what_cannot_be_is_refused_and_says_why() {
    let first_mount = |mount: Mount| Scene::with(|s| s.mount(mount, HostPropagation::Private));
    let cases: Vec<(Scene, Kind, &str)> = vec![
        (
            Scene::with(|s| s.container.security.privileged = true),
            Kind::Invalid,
            "security.privileged: the pod may have no privileged container: its own security context says so",
        ),
        (
            Scene::with(|s| s.image = ImageDefaults::default()),
            Kind::Invalid,
            "command: nothing to run: the image has no entrypoint or cmd, so the container must have a command",
        ),
        (
            Scene::with(|s| s.container.working_dir = "srv".into()),
            Kind::Invalid,
            "working_dir: \"srv\" is not an absolute path",
        ),
        (
            Scene::with(|s| s.container.stop_signal = Some("SIGNOPE".into())),
            Kind::Invalid,
            "stop_signal: \"SIGNOPE\" is not a signal",
        ),
        (
            Scene::with(|s| s.pod.cgroup_parent = "/a/../../b".into()),
            Kind::Invalid,
            "linux.cgroup_parent: \"/a/../../b\" has a \"..\"",
        ),
        (
            Scene::with(|s| s.driver = CgroupDriver::Systemd),
            Kind::Invalid,
            "linux.cgroup_parent: \"/kubepods/burstable/pod1\" is not a slice: the systemd cgroup driver is set, is the kubelet's as well?",
        ),
        (
            first_mount(bind("/srv", "data")),
            Kind::Invalid,
            "mounts[0].container_path: \"data\" is not an absolute path",
        ),
        (
            first_mount(bind("/srv", "/x/..")),
            Kind::Invalid,
            "mounts[0].container_path: it cannot be the root itself",
        ),
        (
            first_mount(bind("srv", "/data")),
            Kind::Invalid,
            "mounts[0].host_path: \"srv\" is not an absolute path",
        ),
        (
            first_mount(Mount { image: Some("i".into()), readonly: true, ..bind("/srv", "/data") }),
            Kind::Invalid,
            "mounts[0]: it has both an image and a host_path",
        ),
        (
            first_mount(Mount { image: Some("i".into()), ..bind("", "/data") }),
            Kind::Invalid,
            "mounts[0].readonly: an image can be mounted read-only only",
        ),
        (
            first_mount(Mount { recursive_read_only: true, ..bind("/srv", "/data") }),
            Kind::Invalid,
            "mounts[0].recursive_read_only: it needs readonly as well",
        ),
        (
            first_mount(Mount {
                readonly: true,
                recursive_read_only: true,
                propagation: Propagation::HostToContainer,
                ..bind("/srv", "/data")
            }),
            Kind::Invalid,
            "mounts[0].recursive_read_only: it needs private propagation: a mount that comes later could not be made read-only",
        ),
        (
            first_mount(Mount { options: vec!["rw".into()], ..bind("/srv", "/data") }),
            Kind::Invalid,
            "mounts[0].mount_options: \"rw\" is not one of atime, dev, diratime, exec, noatime, nodev, nodiratime, noexec, norelatime, nostrictatime, nosuid, nosymfollow, relatime, strictatime, suid, symfollow",
        ),
        (
            first_mount(Mount {
                options: vec!["exec".into(), "noexec".into()],
                ..bind("/srv", "/data")
            }),
            Kind::Invalid,
            "mounts[0].mount_options: \"exec\" and \"noexec\" exclude each other",
        ),
        (
            first_mount(Mount { options: vec!["nosymfollow".into()], ..bind("/srv", "/data") }),
            Kind::Precondition,
            "mounts[0].mount_options: the OCI runtime does not know \"nosymfollow\"",
        ),
        (
            first_mount(Mount {
                uid_mappings: vec![IdMapping { host_id: 1, container_id: 0, length: 1 }],
                ..bind("/srv", "/data")
            }),
            Kind::Invalid,
            "mounts[0]: uid_mappings and gid_mappings must be given together",
        ),
        (
            Scene::with(|s| {
                s.features.idmap = false;
                let range = vec![IdMapping { host_id: 1, container_id: 0, length: 1 }];
                s.mount(
                    Mount {
                        uid_mappings: range.clone(),
                        gid_mappings: range,
                        ..bind("/srv", "/data")
                    },
                    HostPropagation::Private,
                );
            }),
            Kind::Precondition,
            "mounts[0].uid_mappings: the OCI runtime does not support id-mapped mounts",
        ),
        (
            first_mount(Mount { propagation: Propagation::Bidirectional, ..bind("/srv", "/data") }),
            Kind::Precondition,
            "mounts[0].propagation: /srv is not on a shared mount of the host",
        ),
        (
            first_mount(Mount {
                propagation: Propagation::HostToContainer,
                ..bind("/srv", "/data")
            }),
            Kind::Precondition,
            "mounts[0].propagation: /srv is not on a shared or slave mount of the host",
        ),
        (
            Scene::with(|s| {
                s.features.mount_options.clear();
                s.mount(
                    Mount { readonly: true, recursive_read_only: true, ..bind("/srv", "/data") },
                    HostPropagation::Private,
                );
            }),
            Kind::Precondition,
            "mounts[0].recursive_read_only: it needs Linux 5.12 and an OCI runtime that knows rro",
        ),
        (
            Scene::with(|s| {
                s.container.mounts = vec![Mount {
                    container_path: "/m".into(),
                    image: Some("quay.io/m:1".into()),
                    readonly: true,
                    ..Mount::default()
                }];
            }),
            Kind::Precondition,
            "mounts[0].image: image \"quay.io/m:1\" is not mounted on this node",
        ),
        (
            Scene::with(|s| {
                s.container.devices =
                    vec![Device { host_path: "dev/fuse".into(), ..Device::default() }];
            }),
            Kind::Invalid,
            "devices[0].host_path: \"dev/fuse\" is not an absolute path",
        ),
        (
            Scene::with(|s| {
                s.container.devices = vec![Device {
                    host_path: "/dev/fuse".into(),
                    container_path: "/dev/fuse".into(),
                    permissions: "rx".into(),
                }];
            }),
            Kind::Invalid,
            "devices[0].permissions: \"rx\" has more than r, w and m",
        ),
        (
            Scene::with(|s| s.pod.namespaces.user = Some(UserNamespace::default())),
            Kind::Invalid,
            "namespace_options.userns_options.uids: it must have ranges of one id or more, below 2^32",
        ),
        (
            Scene::with(|s| s.container.security.apparmor = Some(Profile::RuntimeDefault)),
            Kind::Precondition,
            "security.apparmor: this node has no AppArmor",
        ),
        (
            Scene::with(|s| {
                s.node.apparmor = true;
                s.container.security.apparmor = Some(Profile::Localhost("x".into()));
            }),
            Kind::Precondition,
            "security.apparmor: profile \"x\" is not loaded",
        ),
        (
            Scene::with(|s| {
                s.node.apparmor = true;
                s.features.apparmor = Some(false);
                s.container.security.apparmor = Some(Profile::RuntimeDefault);
            }),
            Kind::Precondition,
            "security.apparmor: the OCI runtime was built without AppArmor",
        ),
        (
            Scene::with(|s| {
                s.container.security.selinux =
                    Some(Selinux { level: "s0:c1,c2".into(), ..Selinux::default() });
            }),
            Kind::Precondition,
            "security.selinux_options: this node has no SELinux",
        ),
        (
            Scene::with(|s| {
                s.node.seccomp = false;
                s.container.security.seccomp = Some(Profile::RuntimeDefault);
            }),
            Kind::Precondition,
            "security.seccomp: this kernel has no seccomp",
        ),
        (
            Scene::with(|s| {
                s.features.seccomp = Some(false);
                s.container.security.seccomp = Some(Profile::RuntimeDefault);
            }),
            Kind::Precondition,
            "security.seccomp: the OCI runtime was built without seccomp",
        ),
        (
            Scene::with(|s| {
                s.container.security.seccomp = Some(Profile::Localhost("gone.json".into()));
            }),
            Kind::Precondition,
            "security.seccomp: profile \"gone.json\" is not on this node",
        ),
    ];
    for (scene, kind, says) in cases {
        let error = scene.spec().expect_err(says);
        assert_eq!(error.to_string(), says);
        assert_eq!(error.kind(), kind, "{says}");
    }
}

proptest! {
    #[test]
    fn mounts_are_absolute_unique_and_after_their_parents(
        targets in proptest::collection::vec("(/(a|b|dev|shm|sys|etc|hosts|\\.|\\.\\.)){1,5}/?", 0..8)
    ) {
        let scene = Scene::with(|s| {
            for target in &targets {
                s.mount(bind("/srv", target), HostPropagation::Private);
            }
        });
        let Ok(spec) = scene.spec() else {
            let root = |target: &String| mounts::clean(target) == Path::new("/");
            prop_assert!(targets.iter().any(root), "refused: {targets:?}");
            return Ok(());
        };
        let order: Vec<_> = spec
            .mounts()
            .as_ref()
            .unwrap()
            .iter()
            .map(|mount| mount.destination().clone())
            .collect();
        for (at, target) in order.iter().enumerate() {
            prop_assert!(target.is_absolute());
            prop_assert!(!target.components().any(|part| part == std::path::Component::ParentDir));
            for later in &order[at + 1..] {
                prop_assert!(!target.starts_with(later), "{later:?} hides {target:?}");
            }
        }
        for target in &targets {
            prop_assert!(order.contains(&mounts::clean(target)), "{target} is mounted");
        }
    }

    #[test]
    fn no_path_panics_and_none_leads_out(path: String) {
        let clean = mounts::clean(&path);
        prop_assert!(clean.is_absolute());
        prop_assert_eq!(mounts::clean(clean.to_str().unwrap()), clean);
    }

    #[test]
    fn no_output_of_a_runtime_panics(bytes: Vec<u8>) {
        let _ = RuntimeFeatures::parse(&bytes);
    }
}

#[test]
fn annotations_cannot_move_a_container_to_another_pod() {
    let scene = Scene::with(|s| {
        s.container.annotations.insert("io.kubernetes.cri.sandbox-id".into(), "other".into());
    });
    let spec = scene.spec().unwrap();
    let annotations = spec.annotations().as_ref().unwrap();
    assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], scene.pod_id.as_str());
}

#[test]
fn the_version_is_the_lowest_that_has_the_words() {
    assert_eq!(Scene::plain().spec().unwrap().version(), "1.0.2");
    let mapped = |max| {
        Scene::with(|s| {
            s.features.oci_version_max = max;
            let range = vec![IdMapping { host_id: 1, container_id: 0, length: 1 }];
            s.mount(
                Mount { uid_mappings: range.clone(), gid_mappings: range, ..bind("/srv", "/m") },
                HostPropagation::Private,
            );
        })
        .spec()
        .unwrap()
        .version()
        .clone()
    };
    assert_eq!(mapped(Some((1, 2))), "1.1.0");
    assert_eq!(mapped(Some((1, 0))), "1.0.2");
}

#[test]
fn an_exec_is_the_containers_process_with_other_arguments() {
    let spec = Scene::with(|s| {
        s.container.security.no_new_privs = true;
        s.container.resources.oom_score_adj = 300;
    })
    .spec()
    .unwrap();
    let ours = spec.process().as_ref().unwrap();
    let exec = process_for_exec(&spec, &["ls".into(), "-l".into()], false);
    assert_eq!(exec.args().as_deref().unwrap(), ["ls", "-l"]);
    assert_eq!(exec.capabilities(), ours.capabilities());
    assert_eq!(exec.user(), ours.user());
    assert_eq!(exec.env(), ours.env());
    assert_eq!(exec.cwd(), ours.cwd());
    assert_eq!((exec.oom_score_adj(), exec.no_new_privileges()), (Some(300), Some(true)));
    assert_eq!(exec.terminal(), Some(false));
    let with_terminal = process_for_exec(&spec, &["sh".into()], true);
    assert_eq!(with_terminal.terminal(), Some(true));
    assert!(with_terminal.env().as_ref().unwrap().contains(&"TERM=xterm".to_owned()));
}

#[test]
fn what_runtimes_say_of_themselves_is_read() {
    let features = RuntimeFeatures::parse(
        br#"{"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0", "hooks": ["prestart"],
            "mountOptions": ["ro", "rro"], "linux": {"namespaces": ["time"],
            "seccomp": {"enabled": true, "actions": ["SCMP_ACT_ALLOW"], "archs": ["SCMP_ARCH_NEW"]},
            "apparmor": {"enabled": true}, "selinux": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}}, "somethingNew": {}}}"#,
    )
    .unwrap();
    assert_eq!(features.oci_version_max, Some((1, 2)));
    assert!(features.idmap && features.recursive_read_only(&node()));
    assert_eq!((features.seccomp, features.selinux), (Some(true), Some(false)));
    let old = RuntimeFeatures::parse(br#"{"ociVersionMax": "1.0.2-dev", "linux": null}"#).unwrap();
    assert_eq!(
        old,
        RuntimeFeatures { oci_version_max: Some((1, 0)), ..RuntimeFeatures::default() }
    );
    assert_eq!(RuntimeFeatures::parse(b"unknown command").unwrap_err().kind(), Kind::Internal);
}
