//! SELinux labels of a container's process and files.

use super::{Error, Input};
use crate::pod::config::Selinux;

/// The type of processes that the policy leaves alone.
const UNCONFINED_TYPE: &str = "spc_t";

/// Categories of the targeted policy: c0 to c1023.
const CATEGORIES: u32 = 1024;

/// Labels.
pub(super) struct Labels {
    /// Of the process.
    pub(super) process: String,
    /// Of the files that the runtime mounts.
    pub(super) mount: String,
}

/// The labels, or none where the container has none: privileged, or no SELinux.
pub(super) fn labels(input: &Input<'_>) -> Result<Option<Labels>, Error> {
    let security = &input.container.security;
    let asked = security.selinux.as_ref().or(input.pod.config.security.selinux.as_ref());
    let asked = asked.filter(|selinux| **selinux != Selinux::default());
    let Some(contexts) = &input.node.selinux else {
        return match asked {
            // No confinement is what a node without SELinux gives.
            Some(selinux) if selinux.kind != UNCONFINED_TYPE => {
                Err(Error::lacking("security.selinux_options", "this node has no SELinux"))
            }
            _ => Ok(None),
        };
    };
    if security.privileged {
        return Ok(None);
    }
    if input.features.selinux == Some(false) {
        return match asked {
            Some(_) => Err(Error::lacking(
                "security.selinux_options",
                "the OCI runtime was built without SELinux",
            )),
            None => Ok(None),
        };
    }
    if let Some(selinux) = asked {
        let parts = [&selinux.user, &selinux.role, &selinux.kind];
        // The level has a ":" of its own before its categories.
        if parts.iter().any(|part| part.contains(':')) {
            return Err(Error::invalid(
                "security.selinux_options",
                "user, role and type may have no \":\"",
            ));
        }
    }
    let level = match asked.map(|selinux| selinux.level.as_str()) {
        Some(level) if !level.is_empty() => level.to_owned(),
        _ => own_level(input.pod.id.as_str()),
    };
    let mut process = Context::parse(&contexts.process);
    let mut file = Context::parse(&contexts.file);
    if let Some(selinux) = asked {
        for (ours, part) in process.0.iter_mut().zip([&selinux.user, &selinux.role, &selinux.kind])
        {
            if !part.is_empty() {
                *ours = part;
            }
        }
        if !selinux.user.is_empty() {
            file.0[0] = &selinux.user;
        }
    }
    Ok(Some(Labels { process: process.with_level(&level), mount: file.with_level(&level) }))
}

/// user, role and type
struct Context<'a>([&'a str; 3]);

impl<'a> Context<'a> {
    fn parse(text: &'a str) -> Self {
        let mut parts = text.splitn(4, ':');
        Context(std::array::from_fn(|_| parts.next().unwrap_or_default()))
    }

    fn with_level(&self, level: &str) -> String {
        format!("{}:{level}", self.0.join(":"))
    }
}

/// A level with two categories, the same for all containers of a pod at all times, and with
/// 523,776 pairs seldom that of another pod.
fn own_level(pod: &str) -> String {
    let number =
        |digits: &str| u32::from_str_radix(digits, 16).expect("a pod's id is 64 hex digits");
    let first = number(&pod[..8]) % CATEGORIES;
    let second = number(&pod[8..16]) % (CATEGORIES - 1);
    let second = if second >= first { second + 1 } else { second };
    format!("s0:c{},c{}", first.min(second), first.max(second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_level_has_two_categories_in_order() {
        for pod in ["0".repeat(64), "f".repeat(64), format!("{:08x}{}", 5, "0".repeat(56))] {
            let level = own_level(&pod);
            let (a, b) = level.strip_prefix("s0:c").unwrap().split_once(",c").unwrap();
            let (a, b): (u32, u32) = (a.parse().unwrap(), b.parse().unwrap());
            assert!(a < b && b < CATEGORIES, "{level}");
            assert_eq!(level, own_level(&pod));
        }
    }
}
