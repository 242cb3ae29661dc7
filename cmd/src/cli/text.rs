//! What people write on the command line: sizes, durations, ports, volumes, users, names.
//!
//! Each error says what is allowed, by example.

use std::{
    env,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::Duration,
};

use holdfast_protos::cri;

/// "30s", "500ms", "5m", "1h".
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let rule = || "it must be a whole number and ms, s, m, h or d, as in 30s".to_owned();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(rule()),
    };
    let ms = number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)).ok_or_else(rule)?;
    if ms == 0 { Err("it must be more than 0".to_owned()) } else { Ok(Duration::from_millis(ms)) }
}

/// A duration ago, or an RFC 3339 time.
pub(super) fn parse_since(text: &str) -> Result<jiff::Timestamp, String> {
    let rule =
        || "it must be a duration, as in 10m, or a time, as in 2024-05-01T12:00:00Z".to_owned();
    if let Ok(duration) = parse_duration(text) {
        return jiff::Timestamp::now().checked_sub(duration).map_err(|_| rule());
    }
    text.parse().map_err(|_| rule())
}

/// Bytes. Powers of 1024, however they are written: "64MiB", "64M", "64m", "64mb".
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let rule = || "it must be a whole number of bytes, or one with a unit, as in 64MiB".to_owned();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" | "ki" => 10,
        "m" | "mb" | "mib" | "mi" => 20,
        "g" | "gb" | "gib" | "gi" => 30,
        "t" | "tb" | "tib" | "ti" => 40,
        _ => return Err(rule()),
    };
    let bytes =
        number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(rule)?;
    match i64::try_from(bytes) {
        Ok(1..) => Ok(bytes),
        Ok(_) => Err("it must be more than 0".to_owned()),
        Err(_) => Err(rule()),
    }
}

/// CPUs, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cpus {
    milli: u32,
}

impl Cpus {
    /// CFS quota in microseconds, per period of 100 ms.
    pub(super) fn quota(self) -> i64 {
        i64::from(self.milli) * 100
    }
    /// Relative weight: 1024 for each CPU.
    pub(super) fn shares(self) -> i64 {
        (i64::from(self.milli) * 1024 / 1000).max(2)
    }
}

/// "0.5", "2".
pub(super) fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let number: f64 = text.parse().map_err(|_| "it must be a number, as in 0.5 or 2".to_owned())?;
    // The kernel's smallest quota is 1 ms per period.
    if !(0.01..=100_000.0).contains(&number) {
        return Err("it must be more than 0 (at least 0.01) and at most 100000".to_owned());
    }
    Ok(Cpus { milli: (number * 1000.0).round() as u32 })
}

/// `KEY=VALUE`.
pub(super) fn parse_key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it must be KEY=VALUE".to_owned()),
    }
}

/// `KEY=VALUE`, or `KEY` for the value that this process has.
pub(super) fn parse_env(text: &str) -> Result<(String, String), String> {
    if let Some((key, value)) = text.split_once('=') {
        return match key {
            "" => Err("it must be KEY=VALUE or KEY".to_owned()),
            _ => Ok((key.to_owned(), value.to_owned())),
        };
    }
    match env::var(text) {
        Ok(value) => Ok((text.to_owned(), value)),
        Err(_) => Err(format!("{text} is not set here; give it a value: {text}=VALUE")),
    }
}

/// A Kubernetes pod name: a DNS subdomain (RFC 1123), which is a host name too.
pub(super) fn parse_pod_name(text: &str) -> Result<String, String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let ok = (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-');
    match ok {
        true => Ok(text.to_owned()),
        false => Err("it must be up to 63 lower-case letters, digits and -".to_owned()),
    }
}

/// A mount from the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    pub(super) host: PathBuf,
    pub(super) container: String,
    pub(super) readonly: bool,
    pub(super) propagation: cri::MountPropagation,
}

/// `HOST:CONTAINER[:OPTIONS]`; a relative HOST is below the working directory.
pub(super) fn parse_volume(text: &str) -> Result<Volume, String> {
    let rule =
        || "it must be HOST:CONTAINER or HOST:CONTAINER:OPTIONS, as in ./data:/data:ro".to_owned();
    let mut parts = text.split(':');
    let (Some(host), Some(container)) = (parts.next(), parts.next()) else { return Err(rule()) };
    let options = parts.next().unwrap_or_default();
    if parts.next().is_some() || host.is_empty() || container.is_empty() {
        return Err(rule());
    }
    if !container.starts_with('/') {
        return Err(format!("the path in the container must be absolute: {container}"));
    }
    let host = std::path::absolute(host).map_err(|e| format!("{host}: {e}"))?;
    let mut volume = Volume {
        host,
        container: container.to_owned(),
        readonly: false,
        propagation: cri::MountPropagation::PropagationPrivate,
    };
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option {
            "ro" => volume.readonly = true,
            "rw" => volume.readonly = false,
            "rprivate" => volume.propagation = cri::MountPropagation::PropagationPrivate,
            "rslave" => volume.propagation = cri::MountPropagation::PropagationHostToContainer,
            "rshared" => volume.propagation = cri::MountPropagation::PropagationBidirectional,
            other => {
                return Err(format!(
                    "{other} is no option; there are ro, rw, rprivate, rslave and rshared"
                ));
            }
        }
    }
    Ok(volume)
}

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) host_ip: String,
    pub(super) host: u16,
    pub(super) container: u16,
    pub(super) protocol: cri::Protocol,
}

/// `[ADDRESS:]HOST:CONTAINER[/PROTOCOL]`.
pub(super) fn parse_port(text: &str) -> Result<Port, String> {
    let rule = || {
        "it must be HOST:CONTAINER, as in 8080:80, 127.0.0.1:8080:80 or [::1]:5353:53/udp"
            .to_owned()
    };
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => cri::Protocol::Tcp,
        "udp" => cri::Protocol::Udp,
        "sctp" => cri::Protocol::Sctp,
        other => return Err(format!("{other} is no protocol; there are tcp, udp and sctp")),
    };
    let (rest, container) = ports.rsplit_once(':').ok_or_else(rule)?;
    let (host_ip, host) = match rest.rsplit_once(':') {
        Some((ip, host)) => {
            let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
            let ip: IpAddr = ip.parse().map_err(|_| rule())?;
            (ip.to_string(), host)
        }
        None => (String::new(), rest),
    };
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("{text:?} is no port; a port is a number from 1 to 65535")),
    };
    Ok(Port { host_ip, host: port(host)?, container: port(container)?, protocol })
}

/// A port of this node that leads to one of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) address: IpAddr,
    /// 0: any that is free.
    pub(super) local: u16,
    pub(super) remote: u16,
}

/// `[ADDRESS:]LOCAL:REMOTE`, or `PORT` for the same at both ends.
pub(super) fn parse_forward(text: &str) -> Result<Forward, String> {
    let rule = || {
        "it must be LOCAL:REMOTE, as in 8080:80, 0:80, 0.0.0.0:8080:80 or [::1]:8080:80".to_owned()
    };
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("{text:?} is no port; a port is a number from 1 to 65535")),
    };
    let Some((rest, remote)) = text.rsplit_once(':') else {
        let port = port(text)?;
        return Ok(Forward { address: Ipv4Addr::LOCALHOST.into(), local: port, remote: port });
    };
    let (address, local) = match rest.rsplit_once(':') {
        Some((ip, local)) => {
            let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
            (ip.parse().map_err(|_| rule())?, local)
        }
        None => (Ipv4Addr::LOCALHOST.into(), rest),
    };
    let local = if local == "0" { 0 } else { port(local)? };
    Ok(Forward { address, local, remote: port(remote)? })
}

/// Who a container runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) who: Who,
    pub(super) gid: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Id(i64),
    Name(String),
}

/// `1000`, `1000:1000`, `nobody`, `nobody:1000`.
pub(super) fn parse_user(text: &str) -> Result<User, String> {
    let (who, group) = match text.split_once(':') {
        Some((who, group)) => (who, Some(group)),
        None => (text, None),
    };
    let id = |text: &str| text.parse::<u32>().ok().map(i64::from);
    // The CRI has a user's name, but no group's name.
    let gid = match group {
        Some(group) => {
            Some(id(group).ok_or_else(|| format!("the group must be a number, and is {group:?}"))?)
        }
        None => None,
    };
    let who = match id(who) {
        Some(id) => Who::Id(id),
        None if who.is_empty() || who.starts_with('-') => {
            return Err("it must be USER or USER:GID, as in 1000:1000".to_owned());
        }
        None => Who::Name(who.to_owned()),
    };
    Ok(User { who, gid })
}

/// The last part of an image's name, for a pod's: "registry:5000/a/Web_app:1" is "web-app".
pub(super) fn image_base(image: &str) -> String {
    let name = image.split('@').next().unwrap_or(image);
    let name = name.rsplit('/').next().unwrap_or(name);
    let name = name.split(':').next().unwrap_or(name);
    let plain: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(40)
        .collect();
    let plain = plain.trim_matches('-');
    if plain.is_empty() { "pod".to_owned() } else { plain.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("64m"), Ok(64 << 20));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        for bad in ["", "m", "-1m", "1.5g", "0", "9999999999t", "1x"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2d"), Ok(Duration::from_secs(172_800)));
        for bad in ["", "5", "s", "0s", "1w", "99999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn since_is_a_duration_ago_or_a_time() {
        let since = parse_since("10m").unwrap();
        let ago = jiff::Timestamp::now().duration_since(since).as_secs();
        assert!((600..605).contains(&ago), "{ago}");
        assert_eq!(parse_since("1970-01-01T00:00:01Z").unwrap().as_second(), 1);
        assert!(parse_since("yesterday").is_err());
        assert!(parse_since("99999999d").is_err());
    }

    #[test]
    fn cpus_become_quota_and_shares() {
        let half = parse_cpus("0.5").unwrap();
        assert_eq!((half.quota(), half.shares()), (50_000, 512));
        for bad in ["0", "-1", "x", "NaN", "inf", "1e9"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_may_have_an_address_and_a_protocol() {
        let port = |host_ip: &str, host, container, protocol| {
            Ok(Port { host_ip: host_ip.to_owned(), host, container, protocol })
        };
        assert_eq!(parse_port("8080:80"), port("", 8080, 80, cri::Protocol::Tcp));
        assert_eq!(
            parse_port("127.0.0.1:53:53/udp"),
            port("127.0.0.1", 53, 53, cri::Protocol::Udp)
        );
        assert_eq!(parse_port("[::1]:53:53/sctp"), port("::1", 53, 53, cri::Protocol::Sctp));
        for bad in ["80", "0:80", "80:0", "80:70000", "a:80", "1.2.3:80:80", "80:80/quic", "::80"] {
            assert!(parse_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn forwarded_ports_have_a_local_and_a_remote_end() {
        let forward = |address: &str, local, remote| {
            Ok(Forward { address: address.parse().unwrap(), local, remote })
        };
        assert_eq!(parse_forward("80"), forward("127.0.0.1", 80, 80));
        assert_eq!(parse_forward("8080:80"), forward("127.0.0.1", 8080, 80));
        assert_eq!(parse_forward("0:80"), forward("127.0.0.1", 0, 80));
        assert_eq!(parse_forward("0.0.0.0:1:2"), forward("0.0.0.0", 1, 2));
        assert_eq!(parse_forward("[::1]:0:2"), forward("::1", 0, 2));
        for bad in
            ["", "0", "80:0", ":80", "80:", "a:80", "70000:80", "1.2.3:80:80", "::80", "80:80/udp"]
        {
            assert!(parse_forward(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes_have_absolute_paths_in_the_container() {
        let volume = parse_volume("/a:/b:ro,rslave").unwrap();
        assert_eq!((volume.host, &*volume.container), (PathBuf::from("/a"), "/b"));
        assert!(volume.readonly);
        assert_eq!(volume.propagation, cri::MountPropagation::PropagationHostToContainer);
        assert!(parse_volume("x:/b").unwrap().host.is_absolute());
        for bad in ["/a", "/a:b", ":/b", "/a:", "/a:/b:rw:x", "/a:/b:loud"] {
            assert!(parse_volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn users_are_ids_or_names_with_a_numeric_group() {
        assert_eq!(parse_user("0"), Ok(User { who: Who::Id(0), gid: None }));
        let nobody = User { who: Who::Name("nobody".into()), gid: Some(7) };
        assert_eq!(parse_user("nobody:7"), Ok(nobody));
        for bad in ["", ":1", "a:b", "-1", "1:"] {
            assert!(parse_user(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_images_name_gives_a_pods_name() {
        for (image, base) in [
            ("busybox", "busybox"),
            ("registry:5000/a/Web_app:1", "web-app"),
            ("r/x@sha256:00", "x"),
            ("///", "pod"),
        ] {
            assert_eq!(image_base(image), base);
            assert!(parse_pod_name(base).is_ok());
        }
    }
}
