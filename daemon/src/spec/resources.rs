//! Resource limits, and the cgroup that they are set on.

use holdfast_shim::cgroup::page_name;
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources};

use super::{Error, caps};
use crate::{
    config::CgroupDriver,
    id::{ContainerId, PodId},
    node::{CgroupMode, Node},
    pod::config::Resources,
};

/// The cgroup of a container as the OCI spec names it: a path for the cgroupfs driver,
/// "slice:prefix:name" for systemd.
///
/// `parent` is the CRI's `cgroup_parent`; without one the pod's cgroup is ours to name.
pub fn cgroups_path(parent: &str, pod: &PodId, id: &ContainerId, driver: CgroupDriver) -> String {
    match driver {
        CgroupDriver::Cgroupfs => match parent.trim_matches('/') {
            "" if parent.is_empty() => format!("{}/{id}", own_cgroup(pod)),
            "" => format!("/{id}"),
            parent => format!("/{parent}/{id}"),
        },
        CgroupDriver::Systemd => {
            // The kubelet may give the whole path of the slice; systemd wants its name.
            let slice = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            format!("{slice}:holdfast:{id}")
        }
    }
}

/// The cgroup of a pod, with its containers' below: a path in the hierarchies. `None` for a slice
/// whose name systemd would not take.
pub fn pod_cgroup(parent: &str, pod: &PodId) -> Option<String> {
    let name = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    match parent.trim_matches('/') {
        "" if parent.is_empty() => Some(own_cgroup(pod)),
        // Every pod of the node would be counted for this one.
        "" => None,
        _ if name.ends_with(".slice") => slice_path(name),
        path => Some(format!("/{path}")),
    }
}

/// The path of a systemd slice: "a-b.slice" is in "a.slice" (systemd.slice(5)).
fn slice_path(name: &str) -> Option<String> {
    let stem = name.strip_suffix(".slice")?;
    if stem.split('-').any(str::is_empty) {
        return None;
    }
    let mut path = String::new();
    for (at, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
        path.push('/');
        path.push_str(&stem[..at]);
        path.push_str(".slice");
    }
    Some(path)
}

/// The cgroup of a pod that is given no parent (cgroupfs driver).
pub fn own_cgroup(pod: &PodId) -> String {
    format!("/holdfast/{pod}")
}

/// Refuses a parent that would lead out of the cgroup tree.
pub(super) fn check_parent(parent: &str, driver: CgroupDriver) -> Result<(), Error> {
    let refuse =
        |reason: &str| Err(Error::invalid("linux.cgroup_parent", format!("{parent:?} {reason}")));
    if parent.split('/').any(|part| part == "..") || parent.contains('\0') {
        return refuse("has a \"..\"");
    }
    let slice = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    if driver == CgroupDriver::Systemd && !slice.is_empty() && !slice.ends_with(".slice") {
        return refuse(
            "is not a slice: the systemd cgroup driver is set, is the kubelet's as well?",
        );
    }
    Ok(())
}

/// What Task.Update sends to change a running container's limits. Only what is given is in it.
pub fn update(resources: &Resources, node: &Node) -> Result<LinuxResources, Error> {
    let mut out = LinuxResources::default();
    apply(&mut out, resources, node)?;
    Ok(out)
}

/// Limits of a new container; `pids_limit` 0 or less: no limit on processes.
pub(super) fn create(
    resources: &Resources,
    pids_limit: i64,
    node: &Node,
) -> Result<LinuxResources, Error> {
    let mut out = LinuxResources::default();
    apply(&mut out, resources, node)?;
    // A new cgroup has no quota, and crun 1.8 cannot write "none" on v1.
    if let Some(mut cpu) = out.cpu().clone().filter(|cpu| cpu.quota() == Some(-1)) {
        cpu.set_quota(None);
        out.set_cpu((cpu != LinuxCpu::default()).then_some(cpu));
    }
    if pids_limit > 0 && node.cgroup.has("pids") && !resources.unified.contains_key("pids.max") {
        let mut pids = LinuxPids::default();
        pids.set_limit(pids_limit);
        out.set_pids(Some(pids));
    }
    Ok(out)
}

fn apply(out: &mut LinuxResources, resources: &Resources, node: &Node) -> Result<(), Error> {
    out.set_cpu(cpu(resources, node)?);
    out.set_memory(memory(resources, node)?);
    out.set_hugepage_limits(hugepages(resources, node)?);
    out.set_unified(unified(resources, node)?);
    Ok(())
}

fn needs(node: &Node, field: &str, controller: &str) -> Result<(), Error> {
    if node.cgroup.has(controller) {
        return Ok(());
    }
    Err(Error::lacking(
        format!("resources.{field}"),
        format!("this node has no {controller} cgroup controller"),
    ))
}

fn not_negative(field: &str, value: i64) -> Result<u64, Error> {
    u64::try_from(value)
        .map_err(|_| Error::invalid(format!("resources.{field}"), format!("{value} is negative")))
}

fn cpu(resources: &Resources, node: &Node) -> Result<Option<LinuxCpu>, Error> {
    let mut cpu = LinuxCpu::default();
    let shares = not_negative("cpu_shares", resources.cpu_shares)?;
    let period = not_negative("cpu_period", resources.cpu_period)?;
    if resources.cpu_quota < -1 {
        return Err(Error::invalid(
            "resources.cpu_quota",
            format!("{} is neither a quota nor -1 (no limit)", resources.cpu_quota),
        ));
    }
    if shares != 0 || period != 0 || resources.cpu_quota != 0 {
        needs(node, "cpu", "cpu")?;
    }
    if shares != 0 {
        // The kernel's own bounds (sched/sched.h); it would clamp on v1 and refuse nothing.
        cpu.set_shares(Some(shares.clamp(2, 262_144)));
    }
    if period != 0 {
        cpu.set_period(Some(period));
    }
    if resources.cpu_quota != 0 {
        cpu.set_quota(Some(resources.cpu_quota));
    }
    for (field, list) in
        [("cpuset_cpus", &resources.cpuset_cpus), ("cpuset_mems", &resources.cpuset_mems)]
    {
        if list.is_empty() {
            continue;
        }
        needs(node, field, "cpuset")?;
        if !is_cpu_list(list) {
            return Err(Error::invalid(
                format!("resources.{field}"),
                format!("{list:?} is not a list like \"0-3,5\""),
            ));
        }
        match field {
            "cpuset_cpus" => cpu.set_cpus(Some(list.clone())),
            _ => cpu.set_mems(Some(list.clone())),
        };
    }
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

/// cpuset(7), "List format".
fn is_cpu_list(list: &str) -> bool {
    list.split(',').all(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => first <= last,
            _ => false,
        }
    })
}

fn memory(resources: &Resources, node: &Node) -> Result<Option<LinuxMemory>, Error> {
    let (limit, swap) = (resources.memory_limit, resources.memory_swap_limit);
    for (field, value) in [("memory_limit_in_bytes", limit), ("memory_swap_limit_in_bytes", swap)] {
        if value < -1 {
            return Err(Error::invalid(
                format!("resources.{field}"),
                format!("{value} is neither a size nor -1 (no limit)"),
            ));
        }
    }
    if limit == 0 && swap <= 0 {
        return Ok(None);
    }
    needs(node, "memory_limit_in_bytes", "memory")?;
    if swap > 0 && limit > swap {
        return Err(Error::invalid(
            "resources.memory_swap_limit_in_bytes",
            format!(
                "{swap} is less than the memory limit {limit}: it bounds memory and swap together"
            ),
        ));
    }
    let mut memory = LinuxMemory::default();
    if limit != 0 {
        memory.set_limit(Some(limit));
    }
    // A limit on memory alone would be met by swapping, so without further word there is no swap.
    // The kubelet's own setting, in `unified`, wins.
    if node.cgroup.swap && !resources.unified.contains_key("memory.swap.max") {
        memory.set_swap(Some(if swap == 0 { limit } else { swap }));
    }
    Ok(Some(memory))
}

fn hugepages(resources: &Resources, node: &Node) -> Result<Option<Vec<LinuxHugepageLimit>>, Error> {
    let mut limits: Vec<LinuxHugepageLimit> = Vec::new();
    for (index, (text, limit)) in resources.hugepages.iter().enumerate() {
        let field = || format!("resources.hugepage_limits[{index}]");
        let size = page_size(text).ok_or_else(|| {
            Error::invalid(field(), format!("{text:?} is not a page size like \"2MB\""))
        })?;
        let lacks = if !node.cgroup.has("hugetlb") {
            Some("this node has no hugetlb cgroup controller".to_owned())
        } else if !node.cgroup.hugepage_sizes.contains(&size) {
            Some(format!("this node has no huge pages of {}", page_name(size)))
        } else {
            None
        };
        if let Some(lacks) = lacks {
            // The kubelet sends 0 for every size to every container: that much is always so.
            if *limit == 0 {
                continue;
            }
            return Err(Error::lacking(field(), lacks));
        }
        let mut out = LinuxHugepageLimit::default();
        out.set_page_size(page_name(size)).set_limit(i64::try_from(*limit).unwrap_or(i64::MAX));
        match limits.iter_mut().find(|known| known.page_size() == out.page_size()) {
            Some(known) => *known = out,
            None => limits.push(out),
        }
    }
    Ok((!limits.is_empty()).then_some(limits))
}

/// Bytes of "2MB", "2Mi", "2048kB", "1Gi", "2097152": always powers of 1024, whatever the letters.
fn page_size(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        _ => return None,
    };
    let number: u64 = number.parse().ok()?;
    number.checked_mul(1 << shift).filter(|size| *size > 0)
}

fn unified(
    resources: &Resources,
    node: &Node,
) -> Result<Option<std::collections::HashMap<String, String>>, Error> {
    if resources.unified.is_empty() {
        return Ok(None);
    }
    if node.cgroup.mode != CgroupMode::V2 {
        return Err(Error::lacking(
            "resources.unified",
            "it needs cgroup v2, and this node's controllers are on v1",
        ));
    }
    for name in resources.unified.keys() {
        // The runtime opens it below the container's cgroup.
        if name.is_empty() || name.contains('/') || name.contains('\0') || !name.contains('.') {
            return Err(Error::invalid(
                "resources.unified",
                format!("{name:?} is not the name of a cgroup file"),
            ));
        }
    }
    Ok(Some(resources.unified.clone().into_iter().collect()))
}

/// The oom_score_adj that the container can have: without CAP_SYS_RESOURCE nobody may lower his own.
pub fn oom_score_adj(wanted: i64, node: &Node) -> Result<i32, Error> {
    let wanted =
        i32::try_from(wanted).ok().filter(|v| (-1000..=1000).contains(v)).ok_or_else(|| {
            Error::invalid("resources.oom_score_adj", format!("{wanted} is not in -1000 to 1000"))
        })?;
    let may_lower = node.capabilities.effective & caps::SYS_RESOURCE != 0;
    Ok(if may_lower { wanted } else { wanted.max(node.oom_score_adj) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::tests::node, *};
    use crate::error::{Kind, Kinded};

    #[test]
    fn cgroup_paths_for_both_drivers() {
        let pod: PodId = "1".repeat(64).parse().unwrap();
        let id: ContainerId = "2".repeat(64).parse().unwrap();
        let fs = |parent| cgroups_path(parent, &pod, &id, CgroupDriver::Cgroupfs);
        assert_eq!(fs(""), format!("/holdfast/{pod}/{id}"));
        assert_eq!(fs("/kubepods/burstable/pod1/"), format!("/kubepods/burstable/pod1/{id}"));
        assert_eq!(fs("kubepods"), format!("/kubepods/{id}"));
        assert_eq!(fs("/"), format!("/{id}"));
        let systemd = |parent| cgroups_path(parent, &pod, &id, CgroupDriver::Systemd);
        assert_eq!(systemd(""), format!("system.slice:holdfast:{id}"));
        assert_eq!(
            systemd("/kubepods.slice/kubepods-pod1.slice"),
            format!("kubepods-pod1.slice:holdfast:{id}")
        );
        assert!(check_parent("/a/../b", CgroupDriver::Cgroupfs).is_err());
        assert!(check_parent("/kubepods/pod1", CgroupDriver::Systemd).is_err());
        assert!(check_parent("/a.slice/a-b.slice/", CgroupDriver::Systemd).is_ok());
        assert!(check_parent("", CgroupDriver::Systemd).is_ok());
    }

    #[test]
    fn a_pods_cgroup_is_a_path_for_both_drivers() {
        let pod: PodId = "1".repeat(64).parse().unwrap();
        let of = |parent| pod_cgroup(parent, &pod);
        assert_eq!(of("").unwrap(), format!("/holdfast/{pod}"));
        assert_eq!(of("/kubepods/pod1/").as_deref(), Some("/kubepods/pod1"));
        assert_eq!(of("/"), None);
        let whole = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice";
        assert_eq!(of("kubepods-burstable-pod1_2.slice").as_deref(), Some(whole));
        assert_eq!(of(whole).as_deref(), Some(whole));
        assert_eq!(of("system.slice").as_deref(), Some("/system.slice"));
        assert_eq!(of("a--b.slice"), None);
    }

    #[test]
    fn memory_without_a_word_on_swap_has_none() {
        let memory = |limit, swap, accounting| {
            let mut node = node();
            node.cgroup.swap = accounting;
            let resources =
                Resources { memory_limit: limit, memory_swap_limit: swap, ..Resources::default() };
            update(&resources, &node).map(|r| r.memory().map(|m| (m.limit(), m.swap())))
        };
        assert_eq!(memory(0, 0, true).unwrap(), None);
        assert_eq!(memory(100, 0, true).unwrap(), Some((Some(100), Some(100))));
        assert_eq!(memory(100, 150, true).unwrap(), Some((Some(100), Some(150))));
        assert_eq!(memory(100, -1, true).unwrap(), Some((Some(100), Some(-1))));
        assert_eq!(memory(-1, 0, true).unwrap(), Some((Some(-1), Some(-1))));
        assert_eq!(memory(100, 150, false).unwrap(), Some((Some(100), None)));
        assert_eq!(memory(100, 50, true).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(memory(-2, 0, true).unwrap_err().kind(), Kind::Invalid);
        let kubelet = Resources {
            memory_limit: 100,
            unified: [("memory.swap.max".to_owned(), "0".to_owned())].into(),
            ..Resources::default()
        };
        let out = update(&kubelet, &node()).unwrap();
        assert_eq!(out.memory().unwrap().swap(), None);
    }

    #[test]
    fn hugepages_are_named_as_the_kernel_names_them() {
        let pages = |text: &str, limit, sizes: &[u64], controller: bool| {
            let mut node = node();
            node.cgroup.hugepage_sizes = sizes.iter().copied().collect();
            if !controller {
                node.cgroup.controllers.remove("hugetlb");
            }
            let resources =
                Resources { hugepages: vec![(text.to_owned(), limit)], ..Resources::default() };
            update(&resources, &node).map(|r| {
                r.hugepage_limits().as_ref().map(|l| (l[0].page_size().clone(), l[0].limit()))
            })
        };
        for text in ["2MB", "2Mi", "2048kB", "2048KB", "2097152"] {
            assert_eq!(
                pages(text, 1, &[2 << 20], true).unwrap(),
                Some(("2MB".to_owned(), 1)),
                "{text}"
            );
        }
        assert_eq!(pages("1024Mi", 0, &[1 << 30], true).unwrap(), Some(("1GB".to_owned(), 0)));
        assert_eq!(pages("64Ki", 1, &[1 << 16], true).unwrap(), Some(("64KB".to_owned(), 1)));
        assert_eq!(pages("2MB", 0, &[2 << 20], false).unwrap(), None);
        assert_eq!(pages("1GB", 0, &[2 << 20], true).unwrap(), None);
        assert_eq!(pages("2MB", 1, &[2 << 20], false).unwrap_err().kind(), Kind::Precondition);
        assert_eq!(pages("1GB", 1, &[2 << 20], true).unwrap_err().kind(), Kind::Precondition);
        for bad in ["", "MB", "2TB", "0MB", "99999999999999999999MB"] {
            assert_eq!(pages(bad, 1, &[2 << 20], true).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }

    #[test]
    fn cpu_limits_are_checked() {
        let mut resources = Resources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 1,
            cpuset_cpus: "0-1,3".into(),
            cpuset_mems: "0".into(),
            ..Resources::default()
        };
        let cpu = update(&resources, &node()).unwrap().cpu().clone().unwrap();
        assert_eq!((cpu.shares(), cpu.quota(), cpu.period()), (Some(2), Some(-1), Some(100_000)));
        assert_eq!((cpu.cpus().as_deref(), cpu.mems().as_deref()), (Some("0-1,3"), Some("0")));
        for bad in ["a", "3-1", "1,", "-1", "0-"] {
            resources.cpuset_cpus = bad.into();
            assert_eq!(update(&resources, &node()).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
        resources.cpuset_cpus = "0".into();
        let mut lacking = node();
        lacking.cgroup.controllers.remove("cpuset");
        assert_eq!(
            update(&resources, &lacking).unwrap_err().to_string(),
            "resources.cpuset_cpus: this node has no cpuset cgroup controller"
        );
        assert_eq!(update(&Resources::default(), &lacking).unwrap(), LinuxResources::default());
    }

    #[test]
    fn unified_keys_need_cgroup_v2_and_are_file_names() {
        let mut resources = Resources {
            unified: [("memory.high".to_owned(), "1000".to_owned())].into(),
            ..Resources::default()
        };
        assert!(update(&resources, &node()).unwrap().unified().is_some());
        let mut v1 = node();
        v1.cgroup.mode = CgroupMode::Hybrid;
        assert_eq!(update(&resources, &v1).unwrap_err().kind(), Kind::Precondition);
        resources.unified = [("../x.y".to_owned(), String::new())].into();
        assert_eq!(update(&resources, &node()).unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn oom_score_adj_is_clamped_where_it_may_not_be_lowered() {
        let mut node = node();
        node.oom_score_adj = -500;
        node.capabilities.effective = !caps::SYS_RESOURCE;
        assert_eq!(oom_score_adj(-997, &node).unwrap(), -500);
        assert_eq!(oom_score_adj(3, &node).unwrap(), 3);
        node.capabilities.effective = u64::MAX;
        assert_eq!(oom_score_adj(-997, &node).unwrap(), -997);
        assert!(oom_score_adj(1001, &node).is_err());
        assert!(oom_score_adj(i64::MIN, &node).is_err());
    }

    proptest! {
        #[test]
        fn page_sizes_round_trip(shift in 10u32..40) {
            let size = 1u64 << shift;
            prop_assert_eq!(page_size(&page_name(size)), Some(size));
        }

        #[test]
        fn no_text_panics(text: String, limit: u64) {
            page_size(&text);
            is_cpu_list(&text);
            let resources = Resources {
                hugepages: vec![(text.clone(), limit)],
                cpuset_cpus: text,
                ..Resources::default()
            };
            let _ = update(&resources, &node());
        }
    }
}
