//! What plugins answer: results of every version of the specification, and errors.
//!
//! A result travels as the JSON that the plugin printed, so that keys we do not know reach the next
//! plugin. Formats: CNI specification, section 5.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::{Attached, config::Version};
use crate::pod::config::Dns;

/// Longest message that is taken from a plugin, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Why an answer is not a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// The output is no JSON; says where and shows how it begins.
    #[error("it is not valid JSON ({reason}); it begins with {begin:?}")]
    Json {
        /// The parser's words.
        reason: String,
        /// First characters of the output.
        begin: String,
    },
    /// Some other JSON value.
    #[error("it is not a JSON object")]
    NotAnObject,
    /// A key has a value of the wrong type or form.
    #[error("`{0}` is not valid")]
    Key(&'static str),
    /// The result is of another version than asked for, and cannot be expressed in that one.
    #[error("it is of CNI version {got}, asked for was {want}")]
    Version {
        /// What the result says.
        got: String,
        /// What the configuration says.
        want: &'static str,
    },
    /// There is no address for the pod in it.
    #[error("it has no address for {0}")]
    NoAddress(String),
}

/// The result of one plugin, with `cniVersion` set to the version that was asked for.
pub(super) fn parse(output: &[u8], want: Version) -> Result<Value, Flaw> {
    let value: Value = serde_json::from_slice(output)
        .map_err(|error| Flaw::Json { reason: error.to_string(), begin: excerpt(output, 80) })?;
    let Value::Object(mut object) = value else { return Err(Flaw::NotAnObject) };
    let got = match object.get("cniVersion") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(_) => return Err(Flaw::Key("cniVersion")),
    };
    match got.as_deref().map(Version::parse) {
        // Plugins that never set it answer in the version they were asked in.
        None => {}
        Some(Some(got)) if got == want => {}
        Some(Some(got)) if got >= Version::V0_3_0 && want >= Version::V0_3_0 => {
            convert(&mut object, want)?;
        }
        Some(_) => {
            let got = got.unwrap_or_default().chars().take(40).collect();
            return Err(Flaw::Version { got, want: want.as_str() });
        }
    }
    object.insert("cniVersion".into(), want.as_str().into());
    Ok(Value::Object(object))
}

/// From 0.3.0 on, versions differ in one key only: `ips[].version` must be there before 1.0.0.
fn convert(object: &mut Map<String, Value>, want: Version) -> Result<(), Flaw> {
    let Some(ips) = object.get_mut("ips").filter(|ips| !ips.is_null()) else { return Ok(()) };
    for ip in ips.as_array_mut().ok_or(Flaw::Key("ips"))? {
        let ip = ip.as_object_mut().ok_or(Flaw::Key("ips"))?;
        if want >= Version::V1_0_0 {
            ip.remove("version");
        } else {
            let v4 = address(ip.get("address")).ok_or(Flaw::Key("ips.address"))?.is_ipv4();
            ip.insert("version".into(), if v4 { "4" } else { "6" }.into());
        }
    }
    Ok(())
}

/// What a final result says of the pod's own interface.
pub(super) fn attached(result: &Value, interface: &str) -> Result<Attached, Flaw> {
    let object = result.as_object().ok_or(Flaw::NotAnObject)?;
    let interfaces = list(object, "interfaces")?;
    let is_pods = |entry: &Value| {
        entry.get("sandbox").and_then(Value::as_str).is_some_and(|sandbox| !sandbox.is_empty())
    };
    let is_named =
        |entry: &Value| entry.get("name").and_then(Value::as_str).is_some_and(|n| n == interface);
    let mut ips = Vec::new();
    for ip in list(object, "ips")? {
        let owner = match ip.get("interface") {
            // Without interfaces, or without an index, an address can only be the pod's.
            None | Some(Value::Null) => None,
            Some(index) => {
                let index = index.as_u64().ok_or(Flaw::Key("ips.interface"))?;
                let index = usize::try_from(index).map_err(|_| Flaw::Key("ips.interface"))?;
                Some(interfaces.get(index).ok_or(Flaw::Key("ips.interface"))?)
            }
        };
        if owner.is_none_or(|entry| is_pods(entry) && is_named(entry)) {
            ips.push(address(ip.get("address")).ok_or(Flaw::Key("ips.address"))?);
        }
    }
    // 0.1.0 and 0.2.0: one address of each family.
    for (key, family) in [("ip4", "ip4.ip"), ("ip6", "ip6.ip")] {
        if let Some(entry) = object.get(key).filter(|entry| !entry.is_null()) {
            ips.push(address(entry.get("ip")).ok_or(Flaw::Key(family))?);
        }
    }
    if ips.is_empty() {
        return Err(Flaw::NoAddress(interface.to_owned()));
    }
    let mac = interfaces
        .iter()
        .find(|entry| is_pods(entry) && is_named(entry))
        .and_then(|entry| entry.get("mac").and_then(Value::as_str))
        .filter(|mac| !mac.is_empty())
        .map(str::to_owned);
    Ok(Attached {
        ips,
        interface: interface.to_owned(),
        mac,
        dns: object.get("dns").and_then(dns),
        result: result.clone(),
    })
}

fn list<'a>(object: &'a Map<String, Value>, key: &'static str) -> Result<&'a [Value], Flaw> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(Flaw::Key(key)),
    }
}

/// The address of `10.1.2.3/24`.
fn address(value: Option<&Value>) -> Option<IpAddr> {
    let text = value?.as_str()?;
    text.split('/').next().unwrap_or(text).parse().ok()
}

fn dns(value: &Value) -> Option<Dns> {
    let texts = |key: &str| -> Vec<String> {
        let list = value.get(key).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let mut dns =
        Dns { servers: texts("nameservers"), searches: texts("search"), options: texts("options") };
    if dns.searches.is_empty()
        && let Some(domain) = value.get("domain").and_then(Value::as_str)
        && !domain.is_empty()
    {
        dns.searches.push(domain.to_owned());
    }
    (dns != Dns::default()).then_some(dns)
}

/// What a plugin prints when it fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: u64,
    pub(super) message: String,
    pub(super) details: String,
}

/// The error in a failed plugin's output, if there is one.
pub(super) fn refusal(output: &[u8]) -> Option<Refusal> {
    let value: Value = serde_json::from_slice(output).ok()?;
    let text = |key| {
        value
            .get(key)
            .and_then(Value::as_str)
            .map(|text| excerpt(text.as_bytes(), MAX_MESSAGE))
            .unwrap_or_default()
    };
    let code = value.get("code").and_then(Value::as_u64);
    let refusal =
        Refusal { code: code.unwrap_or_default(), message: text("msg"), details: text("details") };
    (code.is_some() || !refusal.message.is_empty()).then_some(refusal)
}

/// The first `max` bytes as one line of printable text.
pub(super) fn excerpt(bytes: &[u8], max: usize) -> String {
    let cut = &bytes[..bytes.len().min(max)];
    let text: String = String::from_utf8_lossy(cut)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let mut text = text.trim().to_owned();
    if bytes.len() > max {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn ips(value: &Value, version: Version) -> Result<Vec<String>, Flaw> {
        let result = parse(value.to_string().as_bytes(), version)?;
        let attached = attached(&result, "eth0")?;
        Ok(attached.ips.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn results_of_every_version_give_the_pods_addresses_in_order() {
        let old = json!({
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1"},
            "ip6": {"ip": "fd00::5/64"},
        });
        assert_eq!(ips(&old, Version::V0_2_0).unwrap(), ["10.1.0.5", "fd00::5"]);
        for version in [Version::V0_3_0, Version::V0_3_1, Version::V0_4_0, Version::V1_1_0] {
            let new = json!({
                "cniVersion": version.as_str(),
                "interfaces": [
                    {"name": "hf0", "mac": "aa:bb:cc:dd:ee:ff"},
                    {"name": "veth1"},
                    {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/ns/a"},
                    {"name": "net1", "sandbox": "/run/ns/a"},
                ],
                "ips": [
                    {"version": "6", "address": "fd00::5/64", "interface": 2},
                    {"version": "4", "address": "10.1.0.1/16", "interface": 0},
                    {"version": "4", "address": "10.1.0.5/16", "interface": 2},
                    {"version": "4", "address": "10.9.0.5/16", "interface": 3},
                ],
                "dns": {"domain": "a.example"},
            });
            assert_eq!(ips(&new, version).unwrap(), ["fd00::5", "10.1.0.5"]);
            let attached = attached(&new, "eth0").unwrap();
            assert_eq!(attached.mac.as_deref(), Some("02:00:00:00:00:01"));
            assert_eq!(attached.dns.unwrap().searches, ["a.example"]);
        }
        let bare = json!({"ips": [{"address": "10.1.0.5/16"}], "dns": {}});
        assert_eq!(ips(&bare, Version::V1_0_0).unwrap(), ["10.1.0.5"]);
    }

    #[test]
    fn a_result_of_another_version_is_converted_or_refused() {
        let old =
            json!({"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.0.0.1/8"}]});
        let new = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/8"}]});
        assert_eq!(parse(old.to_string().as_bytes(), Version::V1_0_0).unwrap(), new);
        assert_eq!(parse(new.to_string().as_bytes(), Version::V0_4_0).unwrap(), old);
        for (got, want) in
            [("0.2.0", Version::V1_0_0), ("1.0.0", Version::V0_1_0), ("x", Version::V1_0_0)]
        {
            let result = json!({"cniVersion": got, "ips": []}).to_string();
            let error = parse(result.as_bytes(), want).unwrap_err();
            assert!(matches!(error, Flaw::Version { .. }), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_result_is_refused_with_the_reason() {
        let refuse = |value: Value, reason: &str| {
            let error = ips(&value, Version::V1_0_0).unwrap_err().to_string();
            assert!(error.contains(reason), "{value}: {error}");
        };
        refuse(json!([]), "not a JSON object");
        refuse(json!({}), "no address for eth0");
        refuse(json!({"cniVersion": 1}), "`cniVersion`");
        refuse(json!({"ips": 7}), "`ips`");
        refuse(json!({"ips": [{"address": "pony"}]}), "`ips.address`");
        refuse(json!({"ips": [{"address": 5}]}), "`ips.address`");
        refuse(json!({"ips": [{"address": "10.0.0.1/8", "interface": 0}]}), "`ips.interface`");
        refuse(json!({"ips": [{"address": "10.0.0.1/8", "interface": -1}]}), "`ips.interface`");
        refuse(
            json!({
                "interfaces": [{"name": "hf0"}],
                "ips": [{"address": "10.0.0.1/8", "interface": 0}],
            }),
            "no address",
        );
        let error = parse(b"panic: oh\nno", Version::V1_0_0).unwrap_err().to_string();
        assert!(error.contains("begins with \"panic: oh no\""), "{error}");
    }

    #[test]
    fn errors_of_plugins_are_recognised() {
        let text = br#"{"cniVersion":"1.0.0","code":11,"msg":"try\nlater","details":"busy"}"#;
        let found = refusal(text).unwrap();
        assert_eq!((found.code, found.message.as_str()), (11, "try later"));
        assert_eq!(found.details, "busy");
        assert_eq!(refusal(b"oops"), None);
        assert_eq!(refusal(b"{}"), None);
        assert_eq!(refusal(br#"{"code":"x"}"#), None);
        let long = json!({"code": 999, "msg": "x".repeat(1 << 20)}).to_string();
        assert!(refusal(long.as_bytes()).unwrap().message.len() < MAX_MESSAGE + 8);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            prop::sample::select(vec![
                "eth0",
                "/run/ns",
                "10.0.0.1/8",
                "fd00::1/64",
                "1.0.0",
                "0.4.0"
            ])
            .prop_map(Value::from),
        ];
        let keys = prop::sample::select(vec![
            "cniVersion",
            "interfaces",
            "ips",
            "ip4",
            "ip6",
            "ip",
            "address",
            "interface",
            "name",
            "sandbox",
            "mac",
            "dns",
            "domain",
            "search",
            "nameservers",
            "code",
            "msg",
            "version",
        ]);
        leaf.prop_recursive(4, 64, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((keys.clone(), inner), 0..6).prop_map(|pairs| {
                    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Value>()
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_output_of_a_plugin_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = refusal(&bytes);
            let _ = excerpt(&bytes, 100);
            if let Ok(result) = parse(&bytes, Version::V1_0_0) {
                let _ = attached(&result, "eth0");
            }
        }

        #[test]
        fn no_result_of_a_plugin_panics(value in any_json()) {
            let text = value.to_string();
            let _ = refusal(text.as_bytes());
            for version in [Version::V0_2_0, Version::V0_4_0, Version::V1_1_0] {
                if let Ok(result) = parse(text.as_bytes(), version) {
                    prop_assert_eq!(&result["cniVersion"], version.as_str());
                    let _ = attached(&result, "eth0");
                }
            }
        }
    }
}
