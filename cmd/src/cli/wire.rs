//! CRI messages as proto3 JSON and YAML, and other small conversions of wire values.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use holdfast_protos::cri;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::{Map, Value};

use super::args::Document;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(cri::DESCRIPTOR_SET).expect("the build compiled these descriptors")
});

/// The message `runtime.v1.NAME` as proto3 JSON, with fields that have their default value too: a
/// program that reads a state must not have to know that 0 is left out.
pub(super) fn to_json<M: prost::Message>(name: &str, message: &M) -> Value {
    let descriptor = POOL
        .get_message_by_name(&format!("runtime.v1.{name}"))
        .expect("every CRI message is in the descriptors");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("a message decodes as itself");
    let options = SerializeOptions::new().skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .expect("proto3 JSON of a CRI message is plain JSON")
}

/// The `info` of a verbose answer: its values are JSON in strings, which is nothing to read.
pub(super) fn info_to_json(info: HashMap<String, String>) -> Value {
    let mut sorted: Vec<_> = info.into_iter().collect();
    sorted.sort();
    let parsed = sorted.into_iter().map(|(key, text)| {
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (key, value)
    });
    Value::Object(Map::from_iter(parsed))
}

/// Writes a document to stdout.
pub(super) fn print(value: &Value, format: Document) -> Result<()> {
    let text = match format {
        Document::Json => serde_json::to_string_pretty(value).context("write JSON")? + "\n",
        Document::Yaml => serde_yaml_ng::to_string(value).context("write YAML")?,
    };
    write(&text)
}

/// Writes text to stdout.
pub(super) fn write(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// A CRI time: nanoseconds since 1970. Nothing before that is a time of ours.
pub(super) fn time(nanoseconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds.try_into().unwrap_or(0))
}

/// "ready" or "not ready".
pub(super) fn pod_state(state: i32) -> &'static str {
    match cri::PodSandboxState::try_from(state) {
        Ok(cri::PodSandboxState::SandboxReady) => "ready",
        Ok(cri::PodSandboxState::SandboxNotready) => "not ready",
        Err(_) => "unknown",
    }
}

/// "running" and so on.
pub(super) fn container_state(state: i32) -> &'static str {
    match cri::ContainerState::try_from(state) {
        Ok(cri::ContainerState::ContainerCreated) => "created",
        Ok(cri::ContainerState::ContainerRunning) => "running",
        Ok(cri::ContainerState::ContainerExited) => "exited",
        Ok(cri::ContainerState::ContainerUnknown) | Err(_) => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_proto3_json_with_defaults() {
        let response = cri::ListContainersResponse {
            containers: vec![cri::Container {
                id: "abc".into(),
                created_at: 5,
                metadata: Some(cri::ContainerMetadata { name: "web".into(), attempt: 0 }),
                ..Default::default()
            }],
        };
        let json = to_json("ListContainersResponse", &response);
        let container = &json["containers"][0];
        assert_eq!(container["id"], "abc");
        assert_eq!(container["createdAt"], "5", "64-bit numbers are strings in proto3 JSON");
        assert_eq!(container["state"], "CONTAINER_CREATED", "0 is not left out");
        assert_eq!(container["metadata"]["attempt"], 0);
    }

    #[test]
    fn info_is_parsed_where_it_is_json() {
        let info = [("a", "{\"pid\":1}"), ("b", "text")].map(|(k, v)| (k.into(), v.into()));
        let json = info_to_json(HashMap::from(info));
        assert_eq!(json, serde_json::json!({ "a": { "pid": 1 }, "b": "text" }));
    }
}
