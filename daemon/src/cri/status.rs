//! Status, and the `info` of verbose answers: JSON for people and for tools like crictl.

use std::{collections::HashMap, sync::Arc};

use holdfast_protos::cri;
use serde_json::json;

use crate::{
    config::Handler,
    error::chain,
    image::Image,
    pod::{ContainerView, PodView, Pods, Services},
};

/// The node's conditions and what its handlers can do.
pub(super) async fn status(pods: &Pods, verbose: bool) -> cri::StatusResponse {
    let services = pods.services();
    let network = services.network.status().await;
    let condition = |kind: &str, ok: bool, reason: &str, message: String| cri::RuntimeCondition {
        r#type: kind.into(),
        status: ok,
        reason: if ok { String::new() } else { reason.into() },
        message,
    };
    let missing = missing_runtime(services);
    let conditions = vec![
        condition("RuntimeReady", missing.is_none(), "RuntimeMissing", missing.unwrap_or_default()),
        condition(
            "NetworkReady",
            network.is_ok(),
            "NetworkPluginNotReady",
            network.err().map(|e| chain(&e)).unwrap_or_default(),
        ),
    ];
    let runtime = &services.config.runtime;
    let handler = |name: &str, path: &Handler| {
        let features = services.features.of(path.runtime());
        cri::RuntimeHandler {
            name: name.to_owned(),
            features: Some(cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: features.recursive_read_only(&services.node),
                user_namespaces: features.user_namespaces(&services.node),
            }),
        }
    };
    let mut runtime_handlers: Vec<_> =
        runtime.handlers.iter().map(|(name, path)| handler(name, path)).collect();
    // The empty name is the default handler.
    if let Some(path) = runtime.handlers.get(&runtime.default) {
        runtime_handlers.push(handler("", path));
    }
    let user_namespaces_host_network = runtime_handlers
        .iter()
        .any(|handler| handler.features.is_some_and(|features| features.user_namespaces));
    let info = match verbose {
        false => HashMap::new(),
        true => HashMap::from([
            ("config".to_owned(), services.config.to_toml()),
            ("cni".to_owned(), services.network.config_info().to_string()),
            ("apparmor".to_owned(), services.apparmor.to_string()),
            ("nri".to_owned(), services.nri.info().to_string()),
            ("database".to_owned(), database(pods).to_string()),
            ("node".to_owned(), format!("{:?}", services.node)),
        ]),
    };
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        info,
        runtime_handlers,
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            // Nothing more is needed for it: /sys of the node is bound, as it cannot be mounted.
            user_namespaces_host_network,
            mount_options: true,
        }),
    }
}

/// How the database was found at the start, and what follows from it.
fn database(pods: &Pods) -> serde_json::Value {
    let services = pods.services();
    let mut info = services.store.opening().to_json();
    let unread = pods.unread().into_iter();
    info["unread"] = unread
        .map(|record| json!({ "id": record.id, "pod": record.pod, "error": record.error }))
        .collect();
    info["verification"] = services.images.verification().into();
    info
}

/// What keeps the default handler from running anything.
fn missing_runtime(services: &Services) -> Option<String> {
    let runtime = &services.config.runtime;
    let shim = &runtime.shim;
    if !shim.exists() {
        return Some(format!("shim {} does not exist: set runtime.shim", shim.display()));
    }
    match runtime.handlers.get(&runtime.default) {
        Some(Handler::Oci { path, .. }) if crate::config::find_program(path).is_none() => {
            Some(format!(
                "OCI runtime {} of handler {:?} is not found: install it or set its path",
                path.display(),
                runtime.default
            ))
        }
        Some(Handler::Foreign(foreign)) if crate::config::find_program(&foreign.shim).is_none() => {
            Some(format!(
                "shim {} of handler {:?} is not found: install it or set its path",
                foreign.shim.display(),
                runtime.default
            ))
        }
        _ => None,
    }
}

/// A pod in full.
pub(super) fn pod_info(view: &PodView) -> HashMap<String, String> {
    let record = &view.record;
    let info = json!({
        "runtimeHandler": record.handler,
        "runtime": record.runtime,
        "shim": record.endpoint,
        "config": record.config,
        "ips": record.ips,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

/// A container in full, with the spec that its runtime was given.
pub(super) fn container_info(
    services: &Services,
    pod: &PodView,
    view: &ContainerView,
) -> HashMap<String, String> {
    let record = &view.record;
    let bundle = services.shims.container_bundle(&record.id);
    let spec = std::fs::read(bundle.config()).ok();
    let spec = spec.and_then(|json| serde_json::from_slice::<serde_json::Value>(&json).ok());
    let info = json!({
        "sandboxID": record.pod,
        "pid": record.state.pid().unwrap_or_default(),
        "runtime": pod.record.runtime,
        "bundle": bundle.dir(),
        "state": record.state,
        "config": record.config,
        "user": record.user,
        "runtimeSpec": spec,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

/// An image in full.
pub(super) async fn image_info(services: &Services, image: &Arc<Image>) -> HashMap<String, String> {
    let config = services.images.raw_config(image).await.ok();
    let config = config.and_then(|c| serde_json::from_str::<serde_json::Value>(&c).ok());
    let info = json!({ "imageSpec": config, "layers": image.layers().len() });
    HashMap::from([("info".to_owned(), info.to_string())])
}
