//! Limits: who sets which, what they make of an OCI spec, and one change over another.

use holdfast_protos::nri::{Field, LinuxResources};
use serde_json::{Value, json};

use super::{
    adjust::{array, object},
    owners::{Conflict, Owners},
};

/// Claims every limit that `resources` gives.
pub fn claim_resources(
    owners: &mut Owners,
    container: &str,
    resources: &LinuxResources,
    plugin: &str,
) -> Result<(), Conflict> {
    let mut claim = |given: bool, field, key: Option<&str>| match given {
        true => owners.claim(container, field, key, plugin),
        false => Ok(()),
    };
    if let Some(memory) = &resources.memory {
        claim(memory.limit.is_some(), Field::MemLimit, None)?;
        claim(memory.reservation.is_some(), Field::MemReservation, None)?;
        claim(memory.swap.is_some(), Field::MemSwapLimit, None)?;
        claim(memory.kernel.is_some(), Field::MemKernelLimit, None)?;
        claim(memory.kernel_tcp.is_some(), Field::MemTcpLimit, None)?;
        claim(memory.swappiness.is_some(), Field::MemSwappiness, None)?;
        claim(memory.disable_oom_killer.is_some(), Field::MemDisableOomKiller, None)?;
        claim(memory.use_hierarchy.is_some(), Field::MemUseHierarchy, None)?;
    }
    if let Some(cpu) = &resources.cpu {
        claim(cpu.shares.is_some(), Field::CpuShares, None)?;
        claim(cpu.quota.is_some(), Field::CpuQuota, None)?;
        claim(cpu.period.is_some(), Field::CpuPeriod, None)?;
        claim(cpu.realtime_runtime.is_some(), Field::CpuRealtimeRuntime, None)?;
        claim(cpu.realtime_period.is_some(), Field::CpuRealtimePeriod, None)?;
        claim(!cpu.cpus.is_empty(), Field::CpuSetCpUs, None)?;
        claim(!cpu.mems.is_empty(), Field::CpuSetMems, None)?;
    }
    for limit in &resources.hugepage_limits {
        claim(true, Field::HugepageLimits, Some(&limit.page_size))?;
    }
    for key in resources.unified.keys() {
        claim(true, Field::CgroupsUnified, Some(key))?;
    }
    claim(resources.blockio_class.is_some(), Field::BlockioClass, None)?;
    claim(resources.rdt_class.is_some(), Field::RdtClass, None)?;
    claim(resources.pids.is_some(), Field::PidsLimit, None)
}

/// Puts the limits that `resources` gives over `linux.resources` of a spec. Without a word on swap, a
/// container that may not swap still may not: on a node that counts swap its limit moves along.
pub fn overlay(spec: &mut Value, resources: &LinuxResources, swap: bool) {
    let old = spec["memory"].clone();
    let mut put = |group: &str, key: &str, value: Option<Value>| {
        if let Some(value) = value {
            object(object(spec).entry(group).or_insert(Value::Null)).insert(key.into(), value);
        }
    };
    if let Some(memory) = &resources.memory {
        put("memory", "limit", memory.limit.map(|v| json!(v.value)));
        put("memory", "reservation", memory.reservation.map(|v| json!(v.value)));
        put("memory", "swap", memory.swap.map(|v| json!(v.value)));
        put("memory", "kernel", memory.kernel.map(|v| json!(v.value)));
        put("memory", "kernelTCP", memory.kernel_tcp.map(|v| json!(v.value)));
        put("memory", "swappiness", memory.swappiness.map(|v| json!(v.value)));
        put("memory", "disableOOMKiller", memory.disable_oom_killer.map(|v| json!(v.value)));
        put("memory", "useHierarchy", memory.use_hierarchy.map(|v| json!(v.value)));
        if let (Some(limit), None, true) = (memory.limit, memory.swap, swap) {
            // One that may swap keeps its own limit, as long as the kernel would take it.
            let may_swap = old["swap"].is_i64() && old["swap"] != old["limit"];
            let fits = old["swap"].as_i64().is_some_and(|s| s < 0 || s >= limit.value);
            if !(may_swap && fits) {
                put("memory", "swap", Some(json!(limit.value)));
            }
        }
    }
    if let Some(cpu) = &resources.cpu {
        let list = |text: &str| (!text.is_empty()).then(|| json!(text));
        put("cpu", "shares", cpu.shares.map(|v| json!(v.value)));
        put("cpu", "quota", cpu.quota.map(|v| json!(v.value)));
        put("cpu", "period", cpu.period.map(|v| json!(v.value)));
        put("cpu", "realtimeRuntime", cpu.realtime_runtime.map(|v| json!(v.value)));
        put("cpu", "realtimePeriod", cpu.realtime_period.map(|v| json!(v.value)));
        put("cpu", "cpus", list(&cpu.cpus));
        put("cpu", "mems", list(&cpu.mems));
    }
    // No limit is the absence of one: a runtime takes 0 as none at all, and -1 as "max".
    put("pids", "limit", resources.pids.map(|pids| json!(pids.limit)));
    for (key, value) in &resources.unified {
        put("unified", key, Some(json!(value)));
    }
    for limit in &resources.hugepage_limits {
        let list = array(object(spec).entry("hugepageLimits").or_insert(Value::Null));
        list.retain(|known| known["pageSize"].as_str() != Some(limit.page_size.as_str()));
        list.push(json!({ "pageSize": limit.page_size, "limit": limit.limit }));
    }
}

/// Puts what `over` gives over `base`.
pub fn merge_resources(base: &mut LinuxResources, over: &LinuxResources) {
    fn put<T: Clone>(base: &mut Option<T>, over: &Option<T>) {
        if over.is_some() {
            base.clone_from(over);
        }
    }
    if let Some(over) = &over.memory {
        let memory = base.memory.get_or_insert_default();
        put(&mut memory.limit, &over.limit);
        put(&mut memory.reservation, &over.reservation);
        put(&mut memory.swap, &over.swap);
        put(&mut memory.kernel, &over.kernel);
        put(&mut memory.kernel_tcp, &over.kernel_tcp);
        put(&mut memory.swappiness, &over.swappiness);
        put(&mut memory.disable_oom_killer, &over.disable_oom_killer);
        put(&mut memory.use_hierarchy, &over.use_hierarchy);
    }
    if let Some(over) = &over.cpu {
        let cpu = base.cpu.get_or_insert_default();
        put(&mut cpu.shares, &over.shares);
        put(&mut cpu.quota, &over.quota);
        put(&mut cpu.period, &over.period);
        put(&mut cpu.realtime_runtime, &over.realtime_runtime);
        put(&mut cpu.realtime_period, &over.realtime_period);
        for (base, over) in [(&mut cpu.cpus, &over.cpus), (&mut cpu.mems, &over.mems)] {
            if !over.is_empty() {
                base.clone_from(over);
            }
        }
    }
    for limit in &over.hugepage_limits {
        base.hugepage_limits.retain(|known| known.page_size != limit.page_size);
        base.hugepage_limits.push(limit.clone());
    }
    base.unified.extend(over.unified.clone());
    base.devices.extend(over.devices.iter().cloned());
    put(&mut base.blockio_class, &over.blockio_class);
    put(&mut base.rdt_class, &over.rdt_class);
    put(&mut base.pids, &over.pids);
}

#[cfg(test)]
mod tests {
    use holdfast_protos::nri::{LinuxMemory, OptionalInt64};

    use super::*;

    #[test]
    fn swap_moves_with_memory_unless_it_is_allowed() {
        let set = |before: Value, limit: i64, swap: bool| {
            let mut spec = json!({ "memory": before });
            let memory =
                LinuxMemory { limit: Some(OptionalInt64 { value: limit }), ..Default::default() };
            let over = LinuxResources { memory: Some(memory), ..LinuxResources::default() };
            overlay(&mut spec, &over, swap);
            spec["memory"]["swap"].as_i64()
        };
        assert_eq!(set(json!({"limit": 10, "swap": 10}), 20, true), Some(20));
        assert_eq!(set(json!({"limit": 10, "swap": 30}), 20, true), Some(30));
        assert_eq!(set(json!({"limit": 10, "swap": 30}), 40, true), Some(40));
        assert_eq!(set(json!({"limit": 10, "swap": -1}), 40, true), Some(-1));
        assert_eq!(set(Value::Null, 40, true), Some(40));
        assert_eq!(set(Value::Null, 40, false), None);
    }
}
