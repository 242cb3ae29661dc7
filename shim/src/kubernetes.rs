//! Pods that containerd's CRI plugin leaves to our Sandbox service (containerd 2.x, sandboxer "shim"):
//! its `runtime.v1.PodSandboxConfig` in our options, and what containers of such a pod lack.
//!
//! Two things differ from a pod of our daemon. The plugin names a pod's namespaces by the pid that
//! StartSandbox gives, whichever of them are the node's: so there is always an init. And it makes the files
//! of a pod (hosts, resolv.conf, shared memory) only beside a pause container, so here they are made in the
//! pod's bundle, and given to each container whose configuration has none.

use std::{fs, io, path::Path};

use holdfast_protos::shim::protobuf::{self, CodedInputStream, rt::WireType};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value as Json, json};

use crate::{
    bundle::{Bundle, replace},
    options::{Dns, IdMap, PodFiles, PodOptions, UserMappings},
};

/// `runtime.v1.NamespaceMode`.
const NODE: u64 = 2;

/// Size of a pod's /dev/shm, as containerd has it.
const SHM: &str = "mode=1777,size=65536k";

/// A field's value, as far as anything here asks for it.
#[derive(Clone, Debug)]
enum Value {
    /// Text, bytes, or a message.
    Bytes(Vec<u8>),
    Number(u64),
}

/// A message of which no code was generated: its fields by their numbers.
struct Fields(Vec<(u32, Value)>);

impl Fields {
    fn parse(bytes: &[u8]) -> Result<Self, protobuf::Error> {
        let mut input = CodedInputStream::from_bytes(bytes);
        let mut found = Vec::new();
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            let value = match WireType::new(tag & 7) {
                Some(WireType::LengthDelimited) => Value::Bytes(input.read_bytes()?),
                Some(WireType::Varint) => Value::Number(input.read_raw_varint64()?),
                Some(kind) => {
                    input.skip_field(kind)?;
                    continue;
                }
                None => break,
            };
            found.push((tag >> 3, value));
        }
        Ok(Self(found))
    }

    fn all(&self, number: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter_map(move |(n, value)| match value {
            Value::Bytes(bytes) if *n == number => Some(bytes.as_slice()),
            _ => None,
        })
    }

    fn texts(&self, number: u32) -> Vec<String> {
        self.all(number).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    /// Empty if it is not there.
    fn text(&self, number: u32) -> String {
        self.texts(number).pop().unwrap_or_default()
    }

    fn message(&self, number: u32) -> Result<Option<Self>, protobuf::Error> {
        self.all(number).last().map(Self::parse).transpose()
    }

    /// 0 if it is not there.
    fn number(&self, number: u32) -> u64 {
        let found = self.0.iter().rev().find_map(|(n, value)| match value {
            Value::Number(value) if *n == number => Some(*value),
            _ => None,
        });
        found.unwrap_or_default()
    }

    /// `runtime.v1.IDMapping`s.
    fn mappings(&self, number: u32) -> Result<Vec<IdMap>, protobuf::Error> {
        let side = |value| u32::try_from(value).unwrap_or(u32::MAX);
        self.all(number)
            .map(|bytes| {
                let map = Self::parse(bytes)?;
                Ok(IdMap {
                    host_id: side(map.number(1)),
                    container_id: side(map.number(2)),
                    length: side(map.number(3)),
                })
            })
            .collect()
    }
}

/// `config_path` of `runtimeoptions.v1.Options{type_url=1, config_path=2, config_body=3}`.
pub(crate) fn config_path(bytes: &[u8]) -> Result<String, protobuf::Error> {
    Ok(Fields::parse(bytes)?.text(2))
}

/// What a `runtime.v1.PodSandboxConfig` asks for. Its network namespace comes apart from it.
pub(crate) fn pod(bytes: &[u8]) -> Result<PodOptions, protobuf::Error> {
    let none = || Fields(Vec::new());
    let config = Fields::parse(bytes)?;
    let linux = config.message(8)?.unwrap_or_else(none);
    let security = linux.message(2)?.unwrap_or_else(none);
    let namespaces = security.message(1)?.unwrap_or_else(none);
    let user = match namespaces.message(5)? {
        Some(user) if user.number(1) != NODE => {
            Some(UserMappings { uids: user.mappings(2)?, gids: user.mappings(3)? })
        }
        _ => None,
    };
    let dns = config.message(4)?.map(|dns| Dns {
        servers: dns.texts(1),
        searches: dns.texts(2),
        options: dns.texts(3),
    });
    // A pod on the node's network has the node's name.
    let uts = namespaces.number(1) != NODE;
    let mut options = PodOptions {
        hostname: if uts { config.text(2) } else { String::new() },
        uts,
        pid: namespaces.number(2) != NODE,
        ipc: namespaces.number(3) != NODE,
        user,
        init: true,
        files: Some(PodFiles { dns }),
        cgroup: cgroup_path(&linux.text(1)),
        ..PodOptions::default()
    };
    for entry in linux.all(3) {
        let entry = Fields::parse(entry)?;
        options.sysctls.insert(entry.text(1), entry.text(2));
    }
    Ok(options)
}

/// The path of a `cgroup_parent`. With systemd it may be a slice's name: "a-b.slice" is in "a.slice"
/// (systemd.slice(5)).
fn cgroup_path(parent: &str) -> Option<String> {
    if parent.is_empty() {
        return None;
    }
    let Some(name) = parent.strip_suffix(".slice").filter(|name| !name.contains('/')) else {
        return Some(parent.to_owned());
    };
    let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
    Some(ends.map(|end| format!("/{}.slice", &name[..end])).collect())
}

/// Makes the files of a pod in its bundle; `ipc`: it has shared memory of its own.
pub(crate) fn make_files(bundle: &Bundle, options: &PodOptions) -> io::Result<()> {
    let Some(files) = &options.files else { return Ok(()) };
    let node = |path: &str| match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    };
    let name = match options.hostname.is_empty() {
        true => nix::unistd::gethostname()?.to_string_lossy().into_owned(),
        false => options.hostname.clone(),
    };
    write(&bundle.hostname(), format!("{name}\n").as_bytes())?;
    write(&bundle.hosts(), &node("/etc/hosts")?)?;
    match &files.dns {
        Some(dns) => write(&bundle.resolv_conf(), dns.resolv_conf().as_bytes())?,
        None => write(&bundle.resolv_conf(), &node("/etc/resolv.conf")?)?,
    }
    if options.ipc {
        let shm = bundle.shm();
        fs::create_dir_all(&shm)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(SHM))?;
    }
    Ok(())
}

/// Containers read them as whoever they run as.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    replace(path, bytes, false)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

/// Unmounts what [`make_files`] has mounted. May be repeated.
pub(crate) fn remove_files(bundle: &Bundle, options: &PodOptions) {
    if options.files.is_some() && options.ipc {
        while umount2(&bundle.shm(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    }
}

/// Gives a container of the pod those of its files that its configuration mounts nothing over.
pub(crate) fn give_files(pod: &Bundle, options: &PodOptions, config: &Path) -> io::Result<()> {
    let mut spec: Json = serde_json::from_slice(&fs::read(config)?)?;
    mount_files(pod, options, &mut spec);
    fs::write(config, serde_json::to_vec(&spec)?)
}

fn mount_files(pod: &Bundle, options: &PodOptions, spec: &mut Json) {
    let read_only = spec["root"]["readonly"].as_bool().unwrap_or_default();
    let Some(spec) = spec.as_object_mut() else { return };
    let mounts = spec.entry("mounts").or_insert_with(|| json!([]));
    let Some(mounts) = mounts.as_array_mut() else { return };
    let there = |mounts: &[Json], at: &str| mounts.iter().any(|m| m["destination"] == at);
    for (at, file) in [
        ("/etc/hostname", pod.hostname()),
        ("/etc/hosts", pod.hosts()),
        ("/etc/resolv.conf", pod.resolv_conf()),
    ] {
        if !there(mounts, at) {
            let access = if read_only { "ro" } else { "rw" };
            mounts.push(json!({"destination": at, "type": "bind", "source": file,
                               "options": ["rbind", "rprivate", access]}));
        }
    }
    // A /dev/shm that is the container's alone is the plugin's makeshift.
    let alone = |m: &Json| m["destination"] == "/dev/shm" && m["type"] == "tmpfs";
    mounts.retain(|mount| !alone(mount));
    if !there(mounts, "/dev/shm") {
        let shm = if options.ipc { pod.shm() } else { "/dev/shm".into() };
        mounts.push(json!({"destination": "/dev/shm", "type": "bind", "source": shm,
                           "options": ["rbind", "rprivate", "nosuid", "nodev", "noexec", "rw"]}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, value: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(value.len()).unwrap()][..], value].concat()
    }

    fn number(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    #[test]
    fn what_containerd_tells_of_a_pod_becomes_its_options() {
        let sysctl = [field(1, b"net.core.somaxconn"), field(2, b"64")].concat();
        let linux = [field(1, b"/kubepods"), field(3, &sysctl)].concat();
        let dns = [field(1, b"10.0.0.1"), field(2, b"a.b"), field(3, b"ndots:2")].concat();
        let bytes = [field(2, b"web"), field(3, b"/var/log"), field(4, &dns), field(8, &linux)];
        let options = pod(&bytes.concat()).unwrap();
        assert_eq!(options.hostname, "web");
        assert_eq!(options.sysctls["net.core.somaxconn"], "64");
        assert_eq!(options.cgroup.as_deref(), Some("/kubepods"));
        assert!(options.ipc && options.uts && options.pid && options.init && !options.net);
        let dns = options.files.unwrap().dns.unwrap();
        assert_eq!(dns.resolv_conf(), "search a.b\nnameserver 10.0.0.1\noptions ndots:2\n");
        assert!(pod(&[0x12, 9, b'x']).is_err());
        assert_eq!(config_path(&field(2, b"/etc/kata.toml")).unwrap(), "/etc/kata.toml");
    }

    #[test]
    fn namespaces_of_the_node_are_the_nodes_and_there_is_an_init_all_the_same() {
        let with = |namespaces: Vec<u8>| {
            let linux = field(2, &field(1, &namespaces));
            pod(&[field(2, b"web"), field(8, &linux)].concat()).unwrap()
        };
        let node = with([number(1, 2), number(2, 2), number(3, 2)].concat());
        assert!(!node.uts && !node.pid && !node.ipc && node.init);
        assert_eq!((node.hostname.as_str(), node.user), ("", None));
        let map = [number(1, 100), number(2, 0), number(3, 50)].concat();
        let user = with(field(5, &[field(2, &map), field(3, &map)].concat()));
        let map = IdMap { host_id: 100, container_id: 0, length: 50 };
        assert_eq!(user.user, Some(UserMappings { uids: vec![map], gids: vec![map] }));
        assert_eq!(with(field(5, &number(1, 2))).user, None);
        assert!(with(number(2, 1)).pid, "one for each container: the init has its own too");
    }

    #[test]
    fn a_slice_is_where_systemd_has_it() {
        assert_eq!(cgroup_path(""), None);
        assert_eq!(cgroup_path("/kubepods/pod1").as_deref(), Some("/kubepods/pod1"));
        let slice = cgroup_path("kubepods-burstable-pod1.slice");
        let path = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice";
        assert_eq!(slice.as_deref(), Some(path));
    }

    #[test]
    fn a_container_gets_what_it_has_not_and_keeps_what_it_has() {
        let bundle = Bundle::new("/pod");
        let options = PodOptions { ipc: true, ..PodOptions::default() };
        let mut spec = json!({"root": {"readonly": true}, "mounts": [
            {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]});
        mount_files(&bundle, &options, &mut spec);
        let at = |spec: &Json, at: &str| {
            let mounts = spec["mounts"].as_array().unwrap();
            let found: Vec<_> = mounts.iter().filter(|m| m["destination"] == at).collect();
            assert_eq!(found.len(), 1, "{at}");
            found[0]["source"].as_str().unwrap().to_owned()
        };
        assert_eq!(at(&spec, "/etc/hosts"), "/kubelet/hosts");
        assert_eq!(at(&spec, "/etc/resolv.conf"), "/pod/resolv.conf");
        assert_eq!(at(&spec, "/dev/shm"), "/pod/shm");
        let before = spec.clone();
        mount_files(&bundle, &options, &mut spec);
        assert_eq!(spec, before, "twice is once");
        let mut spec = json!({"mounts": []});
        mount_files(&bundle, &PodOptions::default(), &mut spec);
        assert_eq!(at(&spec, "/dev/shm"), "/dev/shm", "the node's IPC");
    }
}
