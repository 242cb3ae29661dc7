//! seccomp profiles: from a profile, with its conditions, to the filter of one container.
//!
//! The form is that of the OCI spec's `linux.seccomp`, with the conditions that profiles written
//! for Docker and CRI-O have: `includes`, `excludes` and `archMap`. A profile that uses them must
//! not lose them on the way, or it would allow what it means to forbid.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall,
};
use serde::Deserialize;

use super::{Error, RuntimeFeatures, caps, seccomp_default};
use crate::node::Node;

/// The filter of the default profile for a container with these capabilities.
pub(super) fn runtime_default(bounding: u64, node: &Node) -> LinuxSeccomp {
    seccomp_default::profile().filter(bounding, node)
}

/// The filter of a profile that the node's administrator wrote.
pub(super) fn localhost(
    name: &str,
    text: &[u8],
    bounding: u64,
    node: &Node,
    features: &RuntimeFeatures,
) -> Result<LinuxSeccomp, Error> {
    let profile: Profile = serde_json::from_slice(text)
        .map_err(|source| Error::SeccompProfile { name: name.to_owned(), source })?;
    for rule in &profile.syscalls {
        let unknown = rule.includes.caps.iter().chain(&rule.excludes.caps);
        if let Some(unknown) = unknown.into_iter().find(|cap| caps::bit(cap).is_none()) {
            return Err(Error::invalid(
                format!("seccomp profile {name}"),
                format!("{unknown:?} is no capability"),
            ));
        }
    }
    let filter = profile.filter(bounding, node);
    let used = std::iter::once(filter.default_action())
        .chain(filter.syscalls().iter().flatten().map(LinuxSyscall::action));
    for action in used {
        if !features.allows_seccomp_action(&action.to_string()) {
            return Err(Error::lacking(
                format!("seccomp profile {name}"),
                format!("the OCI runtime does not know {action}"),
            ));
        }
    }
    Ok(filter)
}

/// A profile.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Profile {
    pub(super) default_action: LinuxSeccompAction,
    #[serde(default)]
    pub(super) default_errno_ret: Option<u32>,
    #[serde(default)]
    pub(super) architectures: Vec<Arch>,
    #[serde(default)]
    pub(super) arch_map: Vec<ArchMap>,
    #[serde(default)]
    pub(super) flags: Option<Vec<LinuxSeccompFilterFlag>>,
    #[serde(default)]
    pub(super) listener_path: Option<std::path::PathBuf>,
    #[serde(default)]
    pub(super) listener_metadata: Option<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) syscalls: Vec<Rule>,
}

/// Which further architectures a machine of one kind can run.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ArchMap {
    pub(super) architecture: Arch,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) sub_architectures: Vec<Arch>,
}

/// A rule for some system calls.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rule {
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) names: Vec<String>,
    /// The older form, for one.
    #[serde(default)]
    pub(super) name: Option<String>,
    pub(super) action: LinuxSeccompAction,
    #[serde(default)]
    pub(super) errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) args: Vec<Argument>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) includes: Condition,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) excludes: Condition,
}

/// A condition on one argument.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Argument {
    pub(super) index: usize,
    pub(super) value: u64,
    #[serde(default)]
    pub(super) value_two: u64,
    pub(super) op: LinuxSeccompOperator,
}

/// When a rule counts.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Condition {
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) caps: Vec<String>,
    /// As Go names them: "amd64", "arm64".
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) arches: Vec<String>,
    /// "4.8"
    #[serde(default)]
    pub(super) min_kernel: Option<String>,
}

/// Profiles written by Go programs have `null` where a list is empty.
fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Profile {
    /// What is left of it for a container with these capabilities on this node.
    fn filter(&self, bounding: u64, node: &Node) -> LinuxSeccomp {
        let mut architectures = self.architectures.clone();
        if architectures.is_empty()
            && let Some(map) =
                self.arch_map.iter().find(|map| Some(map.architecture) == native(node.arch))
        {
            architectures.push(map.architecture);
            architectures.extend(&map.sub_architectures);
        }
        let syscalls = self
            .syscalls
            .iter()
            .filter(|rule| rule.includes.all_met(bounding, node))
            .filter(|rule| !rule.excludes.any_met(bounding, node))
            .map(Rule::to_oci)
            .collect();
        let mut filter = LinuxSeccomp::default();
        filter
            .set_default_action(self.default_action)
            .set_default_errno_ret(self.default_errno_ret)
            .set_architectures((!architectures.is_empty()).then_some(architectures))
            .set_flags(self.flags.clone())
            .set_listener_path(self.listener_path.clone())
            .set_listener_metadata(self.listener_metadata.clone())
            .set_syscalls(Some(syscalls));
        filter
    }
}

impl Rule {
    fn to_oci(&self) -> LinuxSyscall {
        let args: Vec<LinuxSeccompArg> = self
            .args
            .iter()
            .map(|arg| {
                let out =
                    LinuxSeccompArgBuilder::default().index(arg.index).value(arg.value).op(arg.op);
                let out = match arg.value_two {
                    0 => out,
                    two => out.value_two(two),
                };
                out.build().expect("every field has a default")
            })
            .collect();
        let mut out = LinuxSyscall::default();
        out.set_names(self.names.iter().chain(&self.name).cloned().collect())
            .set_action(self.action)
            .set_errno_ret(self.errno_ret)
            .set_args((!args.is_empty()).then_some(args));
        out
    }
}

impl Condition {
    fn all_met(&self, bounding: u64, node: &Node) -> bool {
        self.caps.iter().all(|cap| has(bounding, cap))
            && (self.arches.is_empty() || self.arches.iter().any(|arch| is_arch(node.arch, arch)))
            && self.min_kernel.as_deref().is_none_or(|version| node.kernel >= parse(version))
    }

    fn any_met(&self, bounding: u64, node: &Node) -> bool {
        self.caps.iter().any(|cap| has(bounding, cap))
            || self.arches.iter().any(|arch| is_arch(node.arch, arch))
            || self.min_kernel.as_deref().is_some_and(|version| node.kernel >= parse(version))
    }
}

fn has(bounding: u64, cap: &str) -> bool {
    caps::bit(cap).is_some_and(|bit| bounding & bit != 0)
}

/// A version that cannot be read is later than any kernel, so that its rule does not count.
fn parse(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    match (parts.next().flatten(), parts.next().unwrap_or(Some(0))) {
        (Some(major), Some(minor)) => (major, minor),
        _ => (u32::MAX, u32::MAX),
    }
}

/// Whether `go`, in Go's names (and "x86", "x32", "arm" for what the machine can run as well), is
/// this machine.
fn is_arch(ours: &str, go: &str) -> bool {
    match ours {
        "x86_64" => matches!(go, "amd64" | "x32" | "x86"),
        "aarch64" => matches!(go, "arm64" | "arm"),
        "powerpc64" => matches!(go, "ppc64le" | "ppc64"),
        other => other == go,
    }
}

fn native(arch: &str) -> Option<Arch> {
    Some(match arch {
        "x86_64" => Arch::ScmpArchX86_64,
        "aarch64" => Arch::ScmpArchAarch64,
        "riscv64" => Arch::ScmpArchRiscv64,
        "s390x" => Arch::ScmpArchS390x,
        "powerpc64" if cfg!(target_endian = "little") => Arch::ScmpArchPpc64le,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::tests::node, *};
    use crate::error::{Kind, Kinded, chain};

    fn load(text: &str, bounding: u64) -> Result<LinuxSeccomp, Error> {
        localhost("p.json", text.as_bytes(), bounding, &node(), &RuntimeFeatures::default())
    }

    /// What the filter does with a call, without a look at its arguments.
    fn rules<'a>(filter: &'a LinuxSeccomp, call: &str) -> Vec<&'a LinuxSyscall> {
        let all = filter.syscalls().as_ref().unwrap().iter();
        all.filter(|rule| rule.names().iter().any(|name| name == call)).collect()
    }

    #[test]
    fn a_plain_oci_profile_is_kept_as_it_is() {
        let text = r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
              {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
               "args": [{"index": 0, "value": 8, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}]}]}"#;
        let filter = load(text, 0).unwrap();
        let same: LinuxSeccomp = serde_json::from_str(text).unwrap();
        assert_eq!(filter, same);
    }

    #[test]
    fn conditions_are_kept() {
        let text = r#"{"defaultAction": "SCMP_ACT_ERRNO",
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
            "syscalls": [
              {"name": "read", "action": "SCMP_ACT_ALLOW", "args": null, "includes": {}},
              {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
              {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
              {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
              {"names": ["cacheflush"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
              {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
              {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}}
            ]}"#;
        let names = |bounding| {
            let filter = load(text, bounding).unwrap();
            assert_eq!(filter.architectures().as_ref().unwrap().len(), 2);
            filter
                .syscalls()
                .as_ref()
                .unwrap()
                .iter()
                .flat_map(|rule| rule.names().clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(0), ["read", "clone", "arch_prctl", "ptrace"]);
        let admin = caps::bit("SYS_ADMIN").unwrap();
        assert_eq!(names(admin), ["read", "mount", "arch_prctl", "ptrace"]);
    }

    #[test]
    fn a_bad_profile_names_its_file() {
        let error = load("{\"defaultAction\": \"SCMP_ACT_PERHAPS\"}", 0).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        let text = chain(&error);
        assert!(text.starts_with("seccomp profile p.json: unknown variant"), "{text}");
        assert!(load("", 0).is_err());
        let cap = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["a"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_NOPE"]}}]}"#;
        assert!(load(cap, 0).unwrap_err().to_string().contains("CAP_NOPE"));
        let features = RuntimeFeatures {
            seccomp_actions: Some(["SCMP_ACT_ALLOW".to_owned()].into()),
            ..RuntimeFeatures::default()
        };
        let error =
            localhost("p", b"{\"defaultAction\":\"SCMP_ACT_NOTIFY\"}", 0, &node(), &features)
                .unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
    }

    #[test]
    fn the_default_profile_follows_the_capabilities() {
        let plain = runtime_default(0, &node());
        assert_eq!(plain.default_action(), LinuxSeccompAction::ScmpActErrno);
        for call in ["read", "execve", "openat", "futex", "clone", "socket", "arch_prctl"] {
            assert!(!rules(&plain, call).is_empty(), "{call}");
        }
        for call in [
            "mount",
            "bpf",
            "reboot",
            "init_module",
            "setns",
            "unshare",
            "keyctl",
            "io_uring_setup",
            "kexec_load",
            "add_key",
            "userfaultfd",
        ] {
            assert!(rules(&plain, call).is_empty(), "{call}");
        }
        let clone3 = rules(&plain, "clone3");
        assert_eq!((clone3.len(), clone3[0].errno_ret()), (1, Some(38)));
        let admin = runtime_default(caps::bit("SYS_ADMIN").unwrap(), &node());
        for call in ["mount", "bpf", "setns", "unshare", "clone3"] {
            let rules = rules(&admin, call);
            assert!(rules.iter().all(|rule| rule.action() == LinuxSeccompAction::ScmpActAllow));
            assert!(!rules.is_empty(), "{call}");
        }
        assert!(rules(&admin, "clone").iter().all(|rule| rule.args().is_none()));
        assert!(rules(&admin, "reboot").is_empty());
    }

    #[test]
    fn no_call_of_the_default_profile_is_allowed_twice_without_condition() {
        for bounding in [0, u64::MAX] {
            let filter = runtime_default(bounding, &node());
            let mut plain: Vec<String> = filter
                .syscalls()
                .as_ref()
                .unwrap()
                .iter()
                .filter(|rule| rule.args().is_none())
                .flat_map(|rule| rule.names().clone())
                .collect();
            let count = plain.len();
            plain.sort_unstable();
            plain.dedup();
            // bpf, syslog, perf_event_open, ptrace and its kin have two capabilities or more.
            assert!(count - plain.len() <= 8, "{}", count - plain.len());
        }
    }

    proptest! {
        #[test]
        fn no_profile_panics(text: String, bytes: Vec<u8>) {
            let _ = load(&text, 0);
            let _ = localhost("p", &bytes, u64::MAX, &node(), &RuntimeFeatures::default());
            parse(&text);
        }
    }
}
