//! Counters of pods' network interfaces.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    thread,
};

/// A network interface's counters (/proc/net/dev).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Received.
    pub rx: Traffic,
    /// Sent.
    pub tx: Traffic,
}

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Errors.
    pub errors: u64,
    /// Packets dropped.
    pub dropped: u64,
}

/// The interfaces of each of these pinned network namespaces. Blocks.
pub(super) fn interfaces(pins: Vec<PathBuf>) -> Vec<io::Result<Vec<Interface>>> {
    let count = pins.len();
    if count == 0 {
        return Vec::new();
    }
    // A thread of its own that ends: no other work may ever run in the wrong namespace.
    let visit = move || pins.iter().map(|pin| parse(&read_in(pin)?)).collect();
    let started = thread::Builder::new().name("net-stats".into()).spawn(visit);
    let read = started.map(thread::JoinHandle::join);
    match read {
        Ok(Ok(all)) => all,
        Ok(Err(_)) => broken(count, || io::Error::other("the reader broke off")),
        Err(error) => broken(count, || io::Error::new(error.kind(), error.to_string())),
    }
}

fn broken(count: usize, error: impl Fn() -> io::Error) -> Vec<io::Result<Vec<Interface>>> {
    (0..count).map(|_| Err(error())).collect()
}

fn read_in(pin: &PathBuf) -> io::Result<String> {
    let namespace = File::open(pin)?;
    nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
    fs::read_to_string("/proc/thread-self/net/dev")
}

/// What a pod makes inside of itself is not its connection to the world, and would be counted twice.
fn inner(name: &str) -> bool {
    name == "lo" || ["veth", "docker", "nerdctl"].iter().any(|prefix| name.starts_with(prefix))
}

/// Kernel format: two header lines, then "name: 8 receive columns, 8 transmit columns".
fn parse(text: &str) -> io::Result<Vec<Interface>> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let columns: Vec<u64> = rest.split_whitespace().map_while(|c| c.parse().ok()).collect();
        let traffic = |first: usize| {
            Some(Traffic {
                bytes: *columns.get(first)?,
                packets: *columns.get(first + 1)?,
                errors: *columns.get(first + 2)?,
                dropped: *columns.get(first + 3)?,
            })
        };
        Some(Interface { name: name.trim().to_owned(), rx: traffic(0)?, tx: traffic(8)? })
    };
    let mut found = Vec::new();
    for text in text.lines().skip(2) {
        let interface = line(text).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/net/dev: {text:?}"))
        })?;
        if !inner(&interface.name) {
            found.push(interface);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn net_dev_is_read_by_column() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0: 1500 10 1 3 0 0 0 0 2500 20 2 4 0 0 0 0
 veth7: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0
";
        let eth0 = Interface {
            name: "eth0".into(),
            rx: Traffic { bytes: 1500, packets: 10, errors: 1, dropped: 3 },
            tx: Traffic { bytes: 2500, packets: 20, errors: 2, dropped: 4 },
        };
        assert_eq!(parse(text).unwrap(), [eth0]);
        assert_eq!(parse("").unwrap(), []);
        assert!(parse("garbage\n\nx: 1 2\n").unwrap_err().to_string().contains("x: 1 2"));
    }

    #[test]
    fn a_namespace_that_is_gone_spoils_no_other() {
        let read = interfaces(vec!["/no/such/pin".into(), "/proc/self/ns/net".into()]);
        assert_eq!(read[0].as_ref().unwrap_err().kind(), io::ErrorKind::NotFound);
        // Whoever runs this without rights to enter its own namespace again is told so.
        if let Err(error) = &read[1] {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }
}
