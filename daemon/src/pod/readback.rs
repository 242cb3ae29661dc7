//! What the kernel made of limits that were changed: it rounds memory to pages and CPU weights to
//! its own scale, and clamps. The CRI's status has to say what is in effect, not what was wished.

use std::{fs, path::Path};

use holdfast_shim::cgroup::{Cgroup, Version};

use super::config::Resources;

/// `asked`, with those of its memory and CPU limits that the container's cgroup can tell as they are
/// there. What was never given stays so; what cannot be read stays as it was asked.
pub(super) fn observed(asked: Resources, cgroup: &Cgroup) -> Resources {
    let mut out = asked;
    match cgroup.version() {
        Version::V1 => version_1(&mut out, cgroup),
        Version::V2 => {
            if let Some(dir) = cgroup.unified() {
                version_2(&mut out, dir);
            }
        }
    }
    out
}

fn version_1(out: &mut Resources, cgroup: &Cgroup) {
    let number = |controller: &str, file: &str| -> Option<i64> {
        read(&cgroup.controller(controller)?.join(file))?.parse().ok()
    };
    put(&mut out.memory_limit, number("memory", "memory.limit_in_bytes").map(unlimited_v1));
    let swap = number("memory", "memory.memsw.limit_in_bytes").map(unlimited_v1);
    put(&mut out.memory_swap_limit, swap);
    put(&mut out.cpu_shares, number("cpu", "cpu.shares"));
    put(&mut out.cpu_quota, number("cpu", "cpu.cfs_quota_us"));
    put(&mut out.cpu_period, number("cpu", "cpu.cfs_period_us"));
    let list = |file: &str| read(&cgroup.controller("cpuset")?.join(file));
    put_list(&mut out.cpuset_cpus, list("cpuset.cpus"));
    put_list(&mut out.cpuset_mems, list("cpuset.mems"));
}

fn version_2(out: &mut Resources, dir: &Path) {
    let max = |file: &str| match read(&dir.join(file))?.as_str() {
        "max" => Some(-1),
        text => text.parse::<i64>().ok(),
    };
    let memory = max("memory.max");
    put(&mut out.memory_limit, memory);
    // The CRI counts memory and swap together; version 2 has swap alone.
    let both = match (memory, max("memory.swap.max")) {
        (Some(memory), Some(swap)) if memory >= 0 && swap >= 0 => Some(memory.saturating_add(swap)),
        (_, Some(-1)) => Some(-1),
        _ => None,
    };
    put(&mut out.memory_swap_limit, both);
    if let Some(text) = read(&dir.join("cpu.max"))
        && let Some((quota, period)) = text.split_once(' ')
    {
        let quota = if quota == "max" { Some(-1) } else { quota.parse().ok() };
        put(&mut out.cpu_quota, quota);
        put(&mut out.cpu_period, period.parse().ok());
    }
    if let Some(weight) = read(&dir.join("cpu.weight")).and_then(|text| text.parse::<i64>().ok())
        // Many shares have one weight: what was asked is in effect if it has this one.
        && !weights(out.cpu_shares).contains(&weight)
    {
        put(&mut out.cpu_shares, Some(2 + ((weight - 1) * 262_142) / 9_999));
    }
    put_list(&mut out.cpuset_cpus, read(&dir.join("cpuset.cpus")));
    put_list(&mut out.cpuset_mems, read(&dir.join("cpuset.mems")));
}

/// The weights that runtimes make of shares: linear (KEP-2254), and since runc 1.3.2 and crun 1.23
/// by a curve through 1024 shares = weight 100.
fn weights(shares: i64) -> [i64; 2] {
    let shares = shares.clamp(2, 262_144);
    let linear = 1 + ((shares - 2) * 9_999) / 262_142;
    let log = (shares as f64).log2();
    let curve = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil() as i64;
    [linear, curve.min(10_000)]
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Without a limit version 1 has the largest multiple of the page size.
fn unlimited_v1(bytes: i64) -> i64 {
    if bytes >= i64::MAX - (1 << 20) { -1 } else { bytes }
}

fn put(field: &mut i64, kernel: Option<i64>) {
    if *field != 0
        && let Some(value) = kernel
    {
        *field = value;
    }
}

fn put_list(field: &mut String, kernel: Option<String>) {
    if !field.is_empty()
        && let Some(list) = kernel.filter(|list| !list.is_empty())
    {
        *field = list;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Resources {
        Resources {
            cpu_shares: 1024,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit: 100_000_001,
            memory_swap_limit: 100_000_001,
            cpuset_cpus: "0,1".into(),
            ..Resources::default()
        }
    }

    #[test]
    fn version_1_rounds_and_clamps() {
        let tmp = tempfile::tempdir().unwrap();
        let controllers = ["cpu", "memory", "cpuset"].map(|name| {
            fs::create_dir(tmp.path().join(name)).unwrap();
            (name.to_owned(), tmp.path().join(name))
        });
        for (file, text) in [
            ("memory/memory.limit_in_bytes", "99999744\n"),
            ("memory/memory.memsw.limit_in_bytes", "9223372036854771712\n"),
            ("cpu/cpu.shares", "1024\n"),
            ("cpu/cpu.cfs_quota_us", "-1\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
            ("cpuset/cpuset.cpus", "0-1\n"),
        ] {
            fs::write(tmp.path().join(file), text).unwrap();
        }
        let cgroup = Cgroup::from_paths(None, controllers);
        let seen = observed(asked(), &cgroup);
        assert_eq!((seen.memory_limit, seen.memory_swap_limit), (99_999_744, -1));
        assert_eq!((seen.cpu_shares, seen.cpu_quota, seen.cpu_period), (1024, -1, 100_000));
        assert_eq!(seen.cpuset_cpus, "0-1");
        // What nobody asked for is not made up.
        assert_eq!(observed(Resources::default(), &cgroup), Resources::default());
    }

    #[test]
    fn version_2_speaks_another_scale() {
        let tmp = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(tmp.path().join(file), text).unwrap();
        write("memory.max", "99999744\n");
        write("memory.swap.max", "0\n");
        write("cpu.max", "max 100000\n");
        write("cpuset.cpus", "0-1\n");
        let cgroup = Cgroup::from_paths(Some(tmp.path().to_owned()), []);
        let shares = |weight: &str| {
            write("cpu.weight", weight);
            observed(asked(), &cgroup).cpu_shares
        };
        assert_eq!(shares("39\n"), 1024, "linear");
        assert_eq!(shares("100\n"), 1024, "curve");
        assert_eq!(shares("1\n"), 2);
        assert_eq!(shares("10000\n"), 262_144);
        let seen = observed(asked(), &cgroup);
        assert_eq!((seen.memory_limit, seen.memory_swap_limit), (99_999_744, 99_999_744));
        assert_eq!((seen.cpu_quota, seen.cpu_period), (-1, 100_000));
        write("memory.swap.max", "max\n");
        assert_eq!(observed(asked(), &cgroup).memory_swap_limit, -1);
    }

    #[test]
    fn a_cgroup_that_is_gone_changes_nothing() {
        let gone = Cgroup::from_paths(Some("/no/such/cgroup".into()), []);
        assert_eq!(observed(asked(), &gone), asked());
    }
}
