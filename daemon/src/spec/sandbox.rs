//! The container that a foreign shim is given for a pod itself: it only waits, in the pod's
//! namespaces. Its one file is our shim's binary, in its part as a pod's init; so there is no image.

use std::{collections::HashMap, path::Path};

use oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxResources, Mount, Process, Root, Spec, User,
};

use super::{Error, NamespacePaths, cgroups_path, joined, mounts, resources};
use crate::{config::CgroupDriver, id::ContainerId, node::Node, pod::config::PodRef};

/// What it runs: the name by which our shim's binary knows its part.
const INIT: &str = "pod-init";

/// Few shares of the CPU: it never runs.
const CPU_SHARES: u64 = 2;

/// Among the last that the OOM killer takes: without it some shims lose the whole pod.
const OOM_SCORE_ADJ: i64 = -998;

/// Its spec. `binary` is our shim's.
pub fn sandbox(
    pod: &PodRef<'_>,
    id: &ContainerId,
    namespaces: &NamespacePaths,
    binary: &Path,
    log_directory: &Path,
    node: &Node,
    driver: CgroupDriver,
) -> Result<Spec, Error> {
    let config = pod.config;
    let mut root = Root::default();
    root.set_path("rootfs".into()).set_readonly(Some(true));

    let none = || Some(Default::default());
    let mut caps = LinuxCapabilities::default();
    caps.set_bounding(none())
        .set_effective(none())
        .set_inheritable(none())
        .set_permitted(none())
        .set_ambient(none());
    let mut process = Process::default();
    process
        .set_terminal(Some(false))
        .set_user(User::default())
        .set_args(Some(vec![format!("/{INIT}")]))
        .set_env(Some(vec!["PATH=/".to_owned()]))
        .set_cwd("/".into())
        .set_capabilities(Some(caps))
        .set_rlimits(None)
        .set_no_new_privileges(Some(true))
        .set_oom_score_adj(Some(resources::oom_score_adj(OOM_SCORE_ADJ, node)?));

    let options = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect());
    let mount = |destination: &str, kind: &str, source: &Path, words: &[&str]| {
        let mut mount = Mount::default();
        mount
            .set_destination(destination.into())
            .set_typ(Some(kind.to_owned()))
            .set_source(Some(source.to_owned()))
            .set_options(options(words));
        mount
    };
    let mounts = vec![
        mount("/proc", "proc", Path::new("proc"), &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", Path::new("tmpfs"), &["nosuid", "mode=755", "size=64k"]),
        mount(&format!("/{INIT}"), "bind", binary, &["bind", "ro", "nosuid", "nodev"]),
    ];

    let mut cpu = oci_spec::runtime::LinuxCpu::default();
    cpu.set_shares(Some(CPU_SHARES));
    let mut deny = LinuxDeviceCgroup::default();
    deny.set_allow(false).set_access(Some("rwm".to_owned()));
    let mut limits = LinuxResources::default();
    limits.set_cpu(Some(cpu)).set_devices(Some(vec![deny]));

    let user = config.namespaces.user.as_ref();
    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(joined(namespaces)))
        .set_uid_mappings(user.map(|user| mounts::mappings(&user.uids)))
        .set_gid_mappings(user.map(|user| mounts::mappings(&user.gids)))
        .set_resources(Some(limits))
        .set_cgroups_path(Some(cgroups_path(&config.cgroup_parent, pod.id, id, driver).into()))
        .set_sysctl(None);

    let ours = [
        ("container-type", "sandbox"),
        ("sandbox-id", pod.id.as_str()),
        ("sandbox-uid", &config.uid),
        ("sandbox-namespace", &config.namespace),
        ("sandbox-name", &config.name),
        ("sandbox-log-directory", &log_directory.to_string_lossy()),
    ]
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value.to_owned()));
    let mut spec = Spec::default();
    spec.set_version("1.0.2".to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts))
        .set_process(Some(process))
        .set_hostname(None)
        .set_annotations(Some(HashMap::from(ours)))
        .set_linux(Some(linux));
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::PodId,
        pod::config::PodConfig,
        spec::{PidNamespace, tests::node},
    };

    #[test]
    fn it_joins_the_pods_namespaces_and_may_do_nothing() {
        let id: PodId = "1".repeat(64).parse().unwrap();
        let config = PodConfig { name: "web".into(), ..Default::default() };
        let namespaces = NamespacePaths {
            net: Some("/ns/net".into()),
            ipc: None,
            uts: Some("/ns/uts".into()),
            user: None,
            pid: PidNamespace::New,
        };
        let pod = PodRef { id: &id, config: &config };
        let spec = sandbox(
            &pod,
            &"1".repeat(64).parse().unwrap(),
            &namespaces,
            Path::new("/usr/bin/shim"),
            Path::new("/var/log/pods/web"),
            &node(),
            CgroupDriver::Cgroupfs,
        )
        .unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let paths: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|ns| (ns.typ().to_string(), ns.path().clone()))
            .collect();
        assert_eq!(
            paths,
            [
                ("mnt".to_owned(), None),
                ("pid".to_owned(), None),
                ("net".to_owned(), Some("/ns/net".into())),
                ("uts".to_owned(), Some("/ns/uts".into())),
            ]
        );
        let process = spec.process().as_ref().unwrap();
        let caps = process.capabilities().as_ref().unwrap();
        assert!(caps.bounding().as_ref().unwrap().is_empty());
        assert_eq!(process.args().as_deref(), Some(&["/pod-init".to_owned()][..]));
        let annotations = spec.annotations().as_ref().unwrap();
        assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], id.as_str());
    }
}
