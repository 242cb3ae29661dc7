//! What a container has beyond what its configuration says in full: CDI devices, classes of block
//! I/O and RDT, owners of devices, SELinux labels of volumes. All of it may block.

use std::path::Path;

use oci_spec::runtime::{LinuxIntelRdt, Spec};

use super::{Error, Services, config::ContainerConfig};
use crate::{
    cdi,
    classes::{self, Resource},
    config::Handler,
    label,
    node::HostFacts,
    store::pods::PodRecord,
};

/// Where the kernel's RDT interface is mounted.
pub(super) const RESCTRL: &str = "/sys/fs/resctrl";

/// Devices as this node's configuration wants them.
pub(super) fn devices(
    services: &Services,
    pod: &PodRecord,
    container: &ContainerConfig,
    facts: &mut HostFacts,
) {
    let runtime = &services.config.runtime;
    let handler = if pod.handler.is_empty() { &runtime.default } else { &pod.handler };
    if runtime.handlers.get(handler).is_some_and(Handler::privileged_without_host_devices) {
        facts.host_devices.clear();
    }
    if runtime.device_ownership_from_security_context {
        let id = |id: Option<i64>| id.and_then(|id| u32::try_from(id).ok());
        own(facts, id(container.security.run_as_user), id(container.security.run_as_group));
    }
}

/// Gives the devices that were asked for to a user and a group.
fn own(facts: &mut HostFacts, user: Option<u32>, group: Option<u32>) {
    for node in facts.devices.iter_mut().flatten() {
        node.uid = user.unwrap_or(node.uid);
        node.gid = group.unwrap_or(node.gid);
    }
}

/// Adds to a spec what the node's files say, and labels the volumes.
pub(super) fn amend(
    services: &Services,
    pod: &PodRecord,
    container: &ContainerConfig,
    facts: &HostFacts,
    spec: &mut Spec,
) -> Result<(), Error> {
    let name = &container.name;
    let cdi_error = |source| Error::Cdi { name: name.clone(), source };
    let names = cdi::names(container).map_err(cdi_error)?;
    let edits = services.cdi.edits(&names).map_err(cdi_error)?;
    cdi::apply(spec, edits);

    let class_error = |source| Error::Class { name: name.clone(), source };
    let choice =
        |what| classes::choice(what, name, &container.annotations, &pod.config.annotations);
    if let Some(choice) = choice(Resource::BlockIo) {
        let limits = services.blockio.class(&choice, &services.node).map_err(class_error)?;
        if let Some(linux) = spec.linux_mut() {
            let mut resources = linux.resources().clone().unwrap_or_default();
            resources.set_block_io(Some(limits));
            linux.set_resources(Some(resources));
        }
    }
    if let Some(choice) = choice(Resource::Rdt) {
        let group = classes::rdt(&choice, Path::new(RESCTRL)).map_err(class_error)?;
        if let Some(linux) = spec.linux_mut() {
            let mut rdt = LinuxIntelRdt::default();
            rdt.set_clos_id(Some(group));
            linux.set_intel_rdt(Some(rdt));
        }
    }

    // Only there with SELinux, and not for containers that it does not confine.
    let label = spec.linux().as_ref().and_then(|linux| linux.mount_label().clone());
    if let Some(label) = label {
        for (mount, facts) in container.mounts.iter().zip(&facts.mounts) {
            if let (true, Some(source)) = (mount.selinux_relabel, &facts.source) {
                let relabelled = label::relabel(source, &label, label::SELINUX);
                relabelled.map_err(|source| Error::Label { name: name.clone(), source })?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::DeviceNode;

    #[test]
    fn asked_devices_belong_to_the_user_and_others_do_not() {
        let node = |path: &str| DeviceNode {
            path: path.into(),
            block: false,
            major: 1,
            minor: 3,
            mode: 0o660,
            uid: 0,
            gid: 6,
        };
        let mut facts = HostFacts {
            devices: vec![vec![node("/dev/a"), node("/dev/b")]],
            host_devices: vec![node("/dev/c")],
            ..HostFacts::default()
        };
        own(&mut facts, Some(1000), None);
        let owners =
            |nodes: &[DeviceNode]| nodes.iter().map(|n| (n.uid, n.gid)).collect::<Vec<_>>();
        assert_eq!(owners(&facts.devices[0]), [(1000, 6), (1000, 6)]);
        assert_eq!(owners(&facts.host_devices), [(0, 6)]);
        own(&mut facts, None, Some(7));
        assert_eq!(owners(&facts.devices[0]), [(1000, 7), (1000, 7)]);
    }
}
