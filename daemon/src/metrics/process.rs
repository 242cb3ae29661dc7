//! The process' own figures, by the names that every Prometheus client library gives them.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Reads /proc/self when it is asked.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let seen = Seen::now();
        let mut gauge = |name: &str, help: &str, value: Option<f64>| match value {
            Some(value) => {
                let metric = ConstGauge::new(value);
                let encoder = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
                metric.encode(encoder)
            }
            None => Ok(()),
        };
        gauge("process_resident_memory_bytes", "Resident memory", seen.resident)?;
        gauge("process_virtual_memory_bytes", "Virtual memory", seen.virtual_memory)?;
        gauge("process_threads", "Threads", seen.threads)?;
        gauge("process_open_fds", "Open file descriptors", seen.open)?;
        gauge("process_max_fds", "Most file descriptors it may have open", seen.max_open)?;
        gauge("process_start_time_seconds", "When it started, in Unix seconds", seen.started)?;
        if let Some(cpu) = seen.cpu {
            let metric = ConstCounter::new(cpu);
            let help = "Processor time, in seconds";
            let encoder = encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                metric.metric_type(),
            )?;
            metric.encode(encoder)?;
        }
        Ok(())
    }
}

#[derive(Debug, Default, PartialEq)]
struct Seen {
    cpu: Option<f64>,
    resident: Option<f64>,
    virtual_memory: Option<f64>,
    threads: Option<f64>,
    open: Option<f64>,
    max_open: Option<f64>,
    started: Option<f64>,
}

/// What a tick is in /proc, whatever the kernel's own rate is.
const TICKS: f64 = 100.0;

impl Seen {
    fn now() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        Self {
            open: fs::read_dir("/proc/self/fd").ok().map(|all| all.count() as f64),
            max_open: limit.map(|limit| limit as f64),
            ..Self::parse(&read("/proc/self/stat"), &read("/proc/self/status"), &read("/proc/stat"))
        }
    }

    /// Of /proc/self/stat (proc_pid_stat(5)), /proc/self/status and /proc/stat.
    fn parse(stat: &str, status: &str, node: &str) -> Self {
        // Fields are counted behind the name, which may have anything in it.
        let behind = stat.rfind(')').and_then(|end| stat.get(end + 2..)).unwrap_or_default();
        let fields: Vec<&str> = behind.split_whitespace().collect();
        // Field 3, the state, is the first here.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let line = |text: &str, key: &str| {
            let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
            rest.split_whitespace().next()?.parse::<f64>().ok()
        };
        let boot = line(node, "btime ");
        Self {
            cpu: field(14).zip(field(15)).map(|(user, kernel)| (user + kernel) / TICKS),
            started: boot.zip(field(22)).map(|(boot, start)| boot + start / TICKS),
            threads: line(status, "Threads:"),
            virtual_memory: line(status, "VmSize:").map(|kib| kib * 1024.0),
            resident: line(status, "VmRSS:").map(|kib| kib * 1024.0),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_the_name() {
        let stat = "77 (a ) b) S 1 1 1 0 -1 0 0 0 0 0 150 50 0 0 20 0 9 0 1000 8192 3 0 0";
        let status = "Name:\tx\nVmSize:\t  8 kB\nVmRSS:\t  4 kB\nThreads:\t9\n";
        let seen = Seen::parse(stat, status, "cpu 1\nbtime 5\n");
        assert_eq!(seen.cpu, Some(2.0));
        assert_eq!(seen.threads, Some(9.0));
        assert_eq!(seen.started, Some(15.0));
        assert_eq!(seen.resident, Some(4096.0));
        assert_eq!(Seen::parse("garbage", "", ""), Seen::default());
        let now = Seen::now();
        assert!(now.resident.unwrap() > 0.0 && now.open.unwrap() >= 3.0);
        assert!(now.cpu.is_some() && now.started.unwrap() > 1e9);
    }
}
