//! What a pod tells the plugins: `CNI_ARGS`, capability arguments, labels.
//!
//! Capabilities are CNI's conventions (CONVENTIONS.md, "Dynamic plugin specific fields"): a value is
//! passed to a plugin only if the configuration says that the plugin wants it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Attach, Error};
use crate::pod::config::Protocol;

/// Ingress limit of a pod, bits per second, as a Kubernetes quantity.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Egress limit of a pod, bits per second, as a Kubernetes quantity.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Addresses to ask for, separated by commas.
const IPS: &str = "cni.holdfast/ips";
/// Hardware address to ask for.
const MAC: &str = "cni.holdfast/mac";
/// Subnets to take addresses from, one of each, separated by commas.
const IP_RANGES: &str = "cni.holdfast/ip-ranges";

/// Kubernetes' bounds on the bandwidth of a pod (1k and 1P bits per second).
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;
/// Burst in bits; the same for every pod, since the annotations cannot tell it. The largest that
/// the bandwidth plugin takes on every architecture.
const BURST: u64 = i32::MAX as u64;

/// `CNI_ARGS` for a pod. Every plugin for Kubernetes reads these names.
pub(super) fn cni_args(pod: &Attach) -> Result<String, Error> {
    let id = pod.pod.as_str();
    for (what, value) in [("namespace", &pod.namespace), ("name", &pod.name), ("uid", &pod.uid)] {
        // The format has no escapes, so such a value would be read as other arguments.
        if value.contains(|c: char| c == ';' || c == '=' || c.is_control()) {
            return Err(Error::Argument {
                what: format!("pod {what}"),
                value: value.chars().take(80).collect(),
                rule: "it must not have `;`, `=` or control characters, which CNI_ARGS cannot carry",
            });
        }
    }
    Ok(format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={id};\
         K8S_POD_UID={}",
        pod.namespace, pod.name, pod.uid
    ))
}

/// Every capability argument that the pod has a value for.
pub(super) fn capabilities(pod: &Attach) -> Result<Map<String, Value>, Error> {
    let mut all = Map::new();
    let ports: Vec<_> = pod.port_mappings.iter().filter(|port| port.host_port != 0).collect();
    if !ports.is_empty() {
        let ports: Vec<_> = ports
            .iter()
            .map(|port| {
                json!({
                    "hostPort": port.host_port,
                    "containerPort": port.container_port,
                    "protocol": match port.protocol {
                        Protocol::Tcp => "tcp",
                        Protocol::Udp => "udp",
                        Protocol::Sctp => "sctp",
                    },
                    "hostIP": port.host_ip,
                })
            })
            .collect();
        all.insert("portMappings".into(), ports.into());
    }
    let mut bandwidth = Map::new();
    for (annotation, rate, burst) in
        [(INGRESS, "ingressRate", "ingressBurst"), (EGRESS, "egressRate", "egressBurst")]
    {
        if let Some(text) = pod.annotations.get(annotation) {
            let bits = quantity(text).filter(|bits| BANDWIDTH.contains(bits)).ok_or_else(|| {
                argument(
                    annotation,
                    text,
                    "it must be a quantity from 1k to 1P, in bits per second",
                )
            })?;
            bandwidth.insert(rate.into(), bits.into());
            bandwidth.insert(burst.into(), BURST.into());
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".into(), bandwidth.into());
    }
    if let Some(dns) = &pod.dns {
        let dns = json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options});
        all.insert("dns".into(), dns);
    }
    if let Some(text) = pod.annotations.get(IPS) {
        let ips: Vec<_> = text.split(',').map(str::trim).collect();
        if !ips.iter().all(|ip| is_address(ip)) {
            return Err(argument(IPS, text, "it must be addresses, separated by commas"));
        }
        all.insert("ips".into(), ips.into());
    }
    if let Some(text) = pod.annotations.get(MAC) {
        if !is_mac(text) {
            return Err(argument(MAC, text, "it must be six pairs of hex digits between colons"));
        }
        all.insert("mac".into(), text.as_str().into());
    }
    if let Some(text) = pod.annotations.get(IP_RANGES) {
        let subnets: Vec<_> = text.split(',').map(str::trim).collect();
        if !subnets.iter().all(|subnet| subnet.contains('/') && is_address(subnet)) {
            return Err(argument(IP_RANGES, text, "it must be subnets, separated by commas"));
        }
        let ranges: Vec<_> = subnets.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
        all.insert("ipRanges".into(), ranges.into());
    }
    if !pod.cgroup_parent.is_empty() {
        all.insert("cgroupPath".into(), pod.cgroup_parent.as_str().into());
    }
    if !pod.annotations.is_empty() {
        // Not one of the conventions, but what plugins that read annotations ask containerd for.
        all.insert("io.kubernetes.cri.pod-annotations".into(), json!(pod.annotations));
    }
    Ok(all)
}

/// Labels as `args.cni.labels` has them.
pub(super) fn labels(pod: &Attach) -> Vec<Value> {
    pod.labels.iter().map(|(key, value)| json!({"key": key, "value": value})).collect()
}

/// What every operation on an attachment passes beside the configuration.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) container: &'a str,
    /// `None`: the namespace is gone.
    pub(super) netns: Option<&'a Path>,
    pub(super) interface: &'a str,
    pub(super) args: &'a str,
}

fn argument(annotation: &str, value: &str, rule: &'static str) -> Error {
    Error::Argument {
        what: format!("annotation {annotation}"),
        value: value.chars().take(80).collect(),
        rule,
    }
}

/// An address, with or without a prefix length that fits.
fn is_address(text: &str) -> bool {
    let (ip, prefix) = match text.split_once('/') {
        Some((ip, prefix)) => (ip, Some(prefix)),
        None => (text, None),
    };
    let Ok(ip) = ip.parse::<std::net::IpAddr>() else { return false };
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    prefix.is_none_or(|prefix| prefix.parse::<u8>().is_ok_and(|prefix| prefix <= longest))
}

fn is_mac(text: &str) -> bool {
    let mut pairs = 0;
    text.split(':').all(|pair| {
        pairs += 1;
        pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit())
    }) && pairs == 6
}

/// A Kubernetes quantity (apimachinery's `resource.Quantity`), rounded up to a whole number.
/// `None`: not one, negative, or beyond `u64`.
fn quantity(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // 36 digits of fraction are far more than any suffix can use, and bound the arithmetic.
    if whole.len() + fraction.len() == 0
        || whole.len() > 18
        || fraction.len() > 18
        || fraction.contains('.')
    {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let (numerator, denominator): (u128, u128) = match suffix {
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "" => (1, 1),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10u128.checked_pow(exponent.unsigned_abs())?;
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    };
    let denominator = denominator.checked_mul(10u128.pow(fraction.len() as u32))?;
    u64::try_from(digits.checked_mul(numerator)?.div_ceil(denominator)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        id::PodId,
        pod::config::{Dns, PortMapping},
    };

    fn pod() -> Attach {
        Attach {
            pod: PodId::random(),
            name: "web-0".into(),
            namespace: "shop".into(),
            uid: "u-1".into(),
            netns: "/run/holdfast/netns/x".into(),
            port_mappings: Vec::new(),
            dns: None,
            annotations: Default::default(),
            labels: Default::default(),
            cgroup_parent: String::new(),
        }
    }

    #[test]
    fn cni_args_have_the_names_that_plugins_read() {
        let mut pod = pod();
        let id = pod.pod.clone();
        assert_eq!(
            cni_args(&pod).unwrap(),
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;\
                 K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID=u-1"
            )
        );
        for bad in ["a;K8S_POD_NAME=root", "a=b", "a\nb", "a\0"] {
            pod.name = bad.into();
            let error = cni_args(&pod).unwrap_err().to_string();
            assert!(error.starts_with("pod name"), "{error}");
        }
    }

    #[test]
    fn a_plain_pod_has_no_capability_arguments() {
        assert_eq!(capabilities(&pod()).unwrap(), Map::new());
    }

    #[test]
    fn every_capability_has_the_shape_of_the_conventions() {
        let mut pod = pod();
        let port = |host_port, protocol, host_ip: &str| PortMapping {
            protocol,
            container_port: 80,
            host_port,
            host_ip: host_ip.into(),
        };
        pod.port_mappings = vec![
            port(8080, Protocol::Tcp, ""),
            port(0, Protocol::Tcp, ""),
            port(53, Protocol::Udp, "::1"),
        ];
        pod.dns = Some(Dns {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["svc".into()],
            options: vec!["ndots:5".into()],
        });
        pod.cgroup_parent = "/kubepods/pod1".into();
        for (key, value) in [
            (INGRESS, "10M"),
            (EGRESS, "1.5Mi"),
            (IPS, "10.1.0.5/24, fd00::5"),
            (MAC, "02:00:00:00:00:0A"),
            (IP_RANGES, "10.1.0.0/24,fd00::/64"),
        ] {
            pod.annotations.insert(key.into(), value.into());
        }
        let expected = json!({
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
                {"hostPort": 53, "containerPort": 80, "protocol": "udp", "hostIP": "::1"},
            ],
            "bandwidth": {
                "ingressRate": 10_000_000, "ingressBurst": 2_147_483_647,
                "egressRate": 1_572_864, "egressBurst": 2_147_483_647,
            },
            "dns": {"servers": ["10.0.0.10"], "searches": ["svc"], "options": ["ndots:5"]},
            "ips": ["10.1.0.5/24", "fd00::5"],
            "mac": "02:00:00:00:00:0A",
            "ipRanges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]],
            "cgroupPath": "/kubepods/pod1",
            "io.kubernetes.cri.pod-annotations": pod.annotations,
        });
        assert_eq!(Value::Object(capabilities(&pod).unwrap()), expected);
    }

    #[test]
    fn annotations_that_make_no_sense_are_refused_by_name() {
        for (key, value) in [
            (INGRESS, "999"),
            (INGRESS, "2P"),
            (EGRESS, "fast"),
            (EGRESS, "-5M"),
            (IPS, "10.0.0.300"),
            (IPS, ""),
            (IPS, "10.0.0.1/33"),
            (MAC, "02:00:00:00:00"),
            (MAC, "02:00:00:00:00:0g"),
            (IP_RANGES, "10.0.0.0"),
        ] {
            let mut pod = pod();
            pod.annotations.insert(key.into(), value.into());
            let error = capabilities(&pod).unwrap_err().to_string();
            assert!(error.starts_with(&format!("annotation {key} ")), "{error}");
        }
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, expected) in [
            ("0", Some(0)),
            ("10", Some(10)),
            ("+10", Some(10)),
            ("1k", Some(1_000)),
            ("1.5M", Some(1_500_000)),
            (".5k", Some(500)),
            ("5.k", Some(5_000)),
            ("1Ki", Some(1_024)),
            ("1e3", Some(1_000)),
            ("1E3", Some(1_000)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("1500m", Some(2)),
            ("1e-3", Some(1)),
            ("100E", None),
            ("1e99", None),
            ("", None),
            (".", None),
            ("1.2.3", None),
            ("1 M", None),
            ("M", None),
            ("1K", None),
            ("-1", None),
            ("1e", None),
        ] {
            assert_eq!(quantity(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_quantity_panic(text in "\\PC{0,40}|[0-9.]{0,40}[a-zA-Z]{0,2}[-+0-9]{0,12}") {
            let _ = quantity(&text);
        }
    }
}
