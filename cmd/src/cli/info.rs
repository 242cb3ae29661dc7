//! `info` and `version`.

use std::fmt::Write as _;

use anyhow::Result;
use holdfast_protos::cri;
use serde_json::json;

use super::{
    Client,
    args::{Document, Global, Show, Shown},
    table::{printable, size},
    wire,
};

/// `holdfast version`: the client's own, even when there is no daemon.
pub(super) async fn version(global: &Global, args: Show) -> Result<u8> {
    let own = env!("CARGO_PKG_VERSION");
    if args.output == Shown::Text {
        wire::write(&format!("client     {own}\n"))?;
    }
    let client = Client::connect(global).await?;
    let mut runtime = client.runtime.clone();
    let server = client.quick(runtime.version(cri::VersionRequest::default())).await?;
    let document = || json!({ "client": own, "server": wire::to_json("VersionResponse", &server) });
    match args.output {
        Shown::Json => wire::print(&document(), Document::Json)?,
        Shown::Yaml => wire::print(&document(), Document::Yaml)?,
        Shown::Text => wire::write(&format!(
            "daemon     {} {}\nCRI        {}\n",
            printable(&server.runtime_name),
            printable(&server.runtime_version),
            printable(&server.runtime_api_version),
        ))?,
    }
    Ok(0)
}

/// `holdfast info`
pub(super) async fn info(client: &mut Client, args: Show) -> Result<u8> {
    let mut runtime = client.runtime.clone();
    let mut images = client.images.clone();
    let version = client.quick(runtime.version(cri::VersionRequest::default())).await?;
    let mut status = client.quick(runtime.status(cri::StatusRequest { verbose: true })).await?;
    let config = client.quick(runtime.runtime_config(cri::RuntimeConfigRequest {})).await?;
    let fs = client.quick(images.image_fs_info(cri::ImageFsInfoRequest {})).await?;
    if args.output != Shown::Text {
        let info = wire::info_to_json(std::mem::take(&mut status.info));
        let mut document = wire::to_json("StatusResponse", &status);
        document["info"] = info;
        document["version"] = wire::to_json("VersionResponse", &version);
        document["runtimeConfig"] = wire::to_json("RuntimeConfigResponse", &config);
        document["imageFsInfo"] = wire::to_json("ImageFsInfoResponse", &fs);
        let format = if args.output == Shown::Json { Document::Json } else { Document::Yaml };
        wire::print(&document, format)?;
        return Ok(0);
    }
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        writeln!(text, "{name:<15} {value}").expect("a String takes all that is written");
    };
    line("Runtime", &format!("{} {}", version.runtime_name, version.runtime_version));
    line("CRI", &version.runtime_api_version);
    for condition in status.status.iter().flat_map(|s| &s.conditions) {
        let value = match (condition.status, &*condition.reason, &*condition.message) {
            (true, ..) => "yes".to_owned(),
            (false, "", "") => "no".to_owned(),
            (false, reason, "") => format!("no: {reason}"),
            (false, reason, message) => format!("no: {reason}: {message}"),
        };
        line(&condition.r#type, &printable(&value));
    }
    let driver = config.linux.map(|l| l.cgroup_driver()).map_or("-", |d| match d {
        cri::CgroupDriver::Systemd => "systemd",
        cri::CgroupDriver::Cgroupfs => "cgroupfs",
    });
    line("Cgroup driver", driver);
    let mut handlers: Vec<_> = status
        .runtime_handlers
        .iter()
        .map(|h| if h.name.is_empty() { "(default)" } else { &*h.name })
        .collect();
    handlers.sort_unstable();
    line("Handlers", &printable(&handlers.join(", ")));
    line("NRI plugins", &printable(&plugins(status.info.get("nri").map(String::as_str))));
    for (name, value) in database(status.info.get("database").map(String::as_str)) {
        line(name, &printable(&value));
    }
    for fs in &fs.image_filesystems {
        let mountpoint = fs.fs_id.as_ref().map_or("-", |id| &*id.mountpoint);
        let used = fs.used_bytes.as_ref().map_or(0, |b| b.value);
        line("Images", &format!("{} in {}", size(used), printable(mountpoint)));
    }
    wire::write(&text)?;
    Ok(0)
}

/// How the daemon found its database when it started, and what it makes of that.
fn database(info: Option<&str>) -> Vec<(&'static str, String)> {
    let info = info.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    // A daemon of an earlier release does not say.
    let Some(info) = info else { return Vec::new() };
    let mut lines = Vec::new();
    if let Some(summary) = info["summary"].as_str() {
        lines.push(("Database", summary.to_owned()));
    }
    let unread = info["unread"].as_array().map_or(0, Vec::len);
    if unread > 0 {
        let text = format!("{unread} records cannot be read and are left alone: see info -o json");
        lines.push(("Unread", text));
    }
    match info["verification"].as_str() {
        None | Some("not needed") => {}
        Some(text) => lines.push(("Verification", text.to_owned())),
    }
    lines
}

/// The plugins by name, or why there are none.
fn plugins(info: Option<&str>) -> String {
    let info = info.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let Some(info) = info else { return "-".to_owned() };
    if info["enabled"] == json!(false) {
        return "off".to_owned();
    }
    let plugins = info["plugins"].as_array().into_iter().flatten();
    let names: Vec<_> = plugins.filter_map(|plugin| plugin["name"].as_str()).collect();
    match (names.is_empty(), info["socket"].is_null()) {
        (false, _) => names.join(", "),
        (true, false) => "none".to_owned(),
        (true, true) => "none, and no socket to connect to".to_owned(),
    }
}
