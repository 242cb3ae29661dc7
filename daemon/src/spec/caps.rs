//! Capabilities: from the CRI's words to the five sets of the OCI spec.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::Error;
use crate::{node::CapabilityMasks, pod::config::Security};

/// Names by number, as linux/capability.h numbers them.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has unless it says otherwise: the set that images of the last decade are
/// tested with.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// CAP_SYS_RESOURCE's bit.
pub(super) const SYS_RESOURCE: u64 = 1 << 24;

/// The sets of a container's first process, as bit masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sets {
    /// Bounding, permitted and effective: runtimes give all three alike, and execve(2) of a user
    /// other than root keeps the bounding and ambient ones only.
    pub(super) bounding: u64,
    /// Ambient, and so inheritable. Inheritable is otherwise empty: with more in it, files that
    /// carry inheritable capabilities would give them to any user (CVE-2022-24769).
    pub(super) ambient: u64,
}

impl Sets {
    /// What the container is given.
    ///
    /// "ALL" and privileged mean all that may be given: the daemon's own permitted and bounding
    /// set, or in a user namespace (where every capability is there anew) all that the kernel knows.
    /// A capability that is asked for by name and cannot be given is an error.
    pub(super) fn of(
        security: &Security,
        node: &CapabilityMasks,
        user_namespace: bool,
    ) -> Result<Sets, Error> {
        let all = known() & node.known & if user_namespace { u64::MAX } else { node.grantable };
        let default = DEFAULT.iter().filter_map(|name| bit(name)).fold(0, |sum, bit| sum | bit);
        let added = List::parse("add_capabilities", &security.add_capabilities)?;
        let dropped = List::parse("drop_capabilities", &security.drop_capabilities)?;
        let ambient = List::parse("add_ambient_capabilities", &security.add_ambient_capabilities)?;
        for list in [&added, &ambient] {
            list.must_be_in(all, node)?;
        }
        let ambient = ambient.mask(all);
        if security.privileged {
            return Ok(Sets { bounding: all, ambient });
        }
        let mut bounding = default & all;
        if added.all {
            bounding = all;
        }
        if dropped.all {
            bounding = 0;
        }
        // What is named wins over ALL, and what is dropped by name over what is added.
        bounding |= added.named | ambient;
        bounding &= !dropped.named;
        Ok(Sets { bounding, ambient: ambient & bounding })
    }

    /// As the OCI spec writes them.
    pub(super) fn to_oci(self) -> LinuxCapabilities {
        let mut caps = LinuxCapabilities::default();
        let ambient = (self.ambient != 0).then(|| set(self.ambient));
        caps.set_bounding(Some(set(self.bounding)))
            .set_effective(Some(set(self.bounding)))
            .set_permitted(Some(set(self.bounding)))
            .set_inheritable(ambient.clone())
            .set_ambient(ambient);
        caps
    }
}

/// A list of the CRI's.
struct List {
    field: &'static str,
    all: bool,
    named: u64,
}

impl List {
    fn parse(field: &'static str, names: &[String]) -> Result<List, Error> {
        let mut list = List { field, all: false, named: 0 };
        for name in names {
            if name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL") {
                list.all = true;
            } else {
                list.named |= bit(name).ok_or_else(|| {
                    Error::invalid(
                        format!("security.{field}"),
                        format!("{name:?} is no capability"),
                    )
                })?;
            }
        }
        Ok(list)
    }

    fn must_be_in(&self, all: u64, node: &CapabilityMasks) -> Result<(), Error> {
        let Some(missing) = names(self.named & !all).next() else { return Ok(()) };
        let lacks = if bit(missing).is_some_and(|bit| node.known & bit == 0) {
            format!("the kernel knows no CAP_{missing}")
        } else {
            format!("the daemon itself has no CAP_{missing} to give")
        };
        Err(Error::lacking(format!("security.{}", self.field), lacks))
    }

    fn mask(&self, all: u64) -> u64 {
        self.named | if self.all { all } else { 0 }
    }
}

/// The bit of a capability: "CAP_SYS_ADMIN", "SYS_ADMIN", any case.
pub(super) fn bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|known| *known == short).map(|number| 1 << number)
}

fn known() -> u64 {
    u64::MAX >> (64 - NAMES.len())
}

fn names(mask: u64) -> impl Iterator<Item = &'static str> {
    NAMES.iter().enumerate().filter(move |(number, _)| mask & (1 << number) != 0).map(|(_, n)| *n)
}

fn set(mask: u64) -> Capabilities {
    names(mask)
        .map(|name| name.parse::<Capability>().expect("oci-spec knows every name of the table"))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::{Kind, Kinded};

    const NODE: CapabilityMasks =
        CapabilityMasks { known: (1 << 41) - 1, grantable: !SYS_RESOURCE, effective: 0 };

    fn sets(add: &[&str], drop: &[&str], ambient: &[&str]) -> Result<Sets, Error> {
        let words = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let security = Security {
            add_capabilities: words(add),
            drop_capabilities: words(drop),
            add_ambient_capabilities: words(ambient),
            ..Security::default()
        };
        Sets::of(&security, &NODE, false)
    }

    fn bits(list: &[&str]) -> u64 {
        list.iter().fold(0, |sum, name| sum | bit(name).unwrap())
    }

    #[test]
    fn every_name_is_known_to_the_spec_library() {
        assert_eq!(set(known()).len(), NAMES.len());
        assert_eq!(bit("cap_sys_resource"), Some(SYS_RESOURCE));
        assert_eq!(bit("Checkpoint_Restore"), Some(1 << 40));
        assert_eq!(bit("CAP_CAP_KILL"), None);
    }

    #[test]
    fn defaults_all_and_names_combine() {
        let default = bits(&DEFAULT);
        assert_eq!(sets(&[], &[], &[]).unwrap().bounding, default);
        assert_eq!(
            sets(&["net_admin"], &["CAP_MKNOD"], &[]).unwrap().bounding,
            default & !bits(&["MKNOD"]) | bits(&["NET_ADMIN"])
        );
        assert_eq!(sets(&["NET_ADMIN"], &["ALL"], &[]).unwrap().bounding, bits(&["NET_ADMIN"]));
        let all = sets(&["ALL"], &["SYS_TIME"], &[]).unwrap().bounding;
        assert_eq!(all, known() & !SYS_RESOURCE & !bits(&["SYS_TIME"]));
        assert_eq!(sets(&["ALL"], &["all"], &[]).unwrap().bounding, 0);
        assert_eq!(sets(&["KILL"], &["KILL"], &[]).unwrap().bounding, default & !bits(&["KILL"]));
    }

    #[test]
    fn ambient_capabilities_are_in_every_set() {
        let sets = sets(&[], &["ALL"], &["NET_BIND_SERVICE"]).unwrap();
        assert_eq!(sets.bounding, bits(&["NET_BIND_SERVICE"]));
        assert_eq!(sets.ambient, sets.bounding);
        let oci = sets.to_oci();
        assert_eq!(oci.inheritable(), oci.ambient());
        assert_eq!(oci.permitted(), oci.ambient());
    }

    #[test]
    fn what_cannot_be_given_is_said() {
        let error = sets(&["SYS_RESOURCE"], &[], &[]).unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        assert_eq!(
            error.to_string(),
            "security.add_capabilities: the daemon itself has no CAP_SYS_RESOURCE to give"
        );
        assert_eq!(sets(&["WINGS"], &[], &[]).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(sets(&[], &["WINGS"], &[]).unwrap_err().kind(), Kind::Invalid);
        let security =
            Security { add_capabilities: vec!["SYS_RESOURCE".into()], ..Security::default() };
        assert!(Sets::of(&security, &NODE, true).is_ok(), "a user namespace has its own");
    }

    proptest! {
        #[test]
        fn nothing_beyond_what_may_be_given(
            add in proptest::collection::vec(0..NAMES.len(), 0..6),
            drop in proptest::collection::vec(0..NAMES.len(), 0..6),
            ambient in proptest::collection::vec(0..NAMES.len(), 0..3),
            all: (bool, bool), grantable: u64, privileged: bool,
        ) {
            let words = |list: &[usize], all: bool| {
                let mut words: Vec<String> = list.iter().map(|n| NAMES[*n].to_owned()).collect();
                if all { words.push("ALL".into()); }
                words
            };
            let security = Security {
                privileged,
                add_capabilities: words(&add, all.0),
                drop_capabilities: words(&drop, all.1),
                add_ambient_capabilities: words(&ambient, false),
                ..Security::default()
            };
            let node = CapabilityMasks { grantable, ..NODE };
            match Sets::of(&security, &node, false) {
                Ok(sets) => {
                    prop_assert_eq!(sets.bounding & !grantable, 0);
                    prop_assert_eq!(sets.ambient & !sets.bounding, 0);
                    if !privileged {
                        for n in drop { prop_assert_eq!(sets.bounding & (1 << n), 0); }
                    }
                }
                Err(error) => {
                    prop_assert_eq!(error.kind(), Kind::Precondition);
                    prop_assert!(add.iter().chain(&ambient).any(|n| grantable & (1 << n) == 0));
                }
            }
        }
    }
}
