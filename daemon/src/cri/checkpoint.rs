//! CheckpointContainer, CheckpointPod and RestorePod.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use holdfast_protos::cri;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{Answer, Service, convert, failed, id, seconds};

pub(super) async fn container(
    service: &Service,
    request: Request<cri::CheckpointContainerRequest>,
) -> Answer<cri::CheckpointContainerResponse> {
    let request = request.into_inner();
    let container = id("container_id", request.container_id)?;
    let to = path("location", request.location)?;
    let limit = seconds("timeout", request.timeout)?;
    service.pods.checkpoint(&container, to, limit).await.map_err(failed)?;
    Ok(Response::new(cri::CheckpointContainerResponse {}))
}

pub(super) async fn pod(
    service: &Service,
    request: Request<cri::CheckpointPodRequest>,
) -> Answer<cri::CheckpointPodResponse> {
    // There is no field for it: the caller's own deadline is the limit.
    let limit = deadline(request.metadata());
    let request = request.into_inner();
    let pod = id("pod_sandbox_id", request.pod_sandbox_id)?;
    let to = path("output_path", request.output_path)?;
    no_options(&request.options)?;
    let containers = request.container_ids;
    if containers.iter().any(String::is_empty) {
        return Err(Status::invalid_argument("container_ids: an id is empty"));
    }
    service.pods.checkpoint_pod(&pod, containers, to, limit).await.map_err(failed)?;
    Ok(Response::new(cri::CheckpointPodResponse {}))
}

pub(super) async fn restore(
    service: &Service,
    request: Request<cri::RestorePodRequest>,
) -> Answer<cri::RestorePodResponse> {
    let request = request.into_inner();
    let from = path("checkpoint_path", request.checkpoint_path)?;
    no_options(&request.options)?;
    let config =
        request.config.ok_or_else(|| Status::invalid_argument("config: it is required"))?;
    let config = convert::pod_config(config)?;
    let containers = request.container_configs.into_iter().map(convert::container_config);
    let containers = containers.collect::<Result<Vec<_>, _>>()?;
    let handler = &request.runtime_handler;
    let restored = service.pods.restore_pod(&from, config, handler, containers).await;
    let (pod, containers) = restored.map_err(failed)?;
    let restored_containers = containers
        .into_iter()
        .map(|(name, id)| cri::RestoredContainer { name, container_id: id.to_string() })
        .collect();
    Ok(Response::new(cri::RestorePodResponse {
        pod_sandbox_id: pod.to_string(),
        restored_containers,
    }))
}

fn path(field: &str, path: String) -> Result<PathBuf, Status> {
    match path.as_str() {
        "" => Err(Status::invalid_argument(format!("{field}: it is required"))),
        path if !path.starts_with('/') || path.contains('\0') => {
            Err(Status::invalid_argument(format!("{field}: {path:?} is not an absolute path")))
        }
        path => Ok(path.into()),
    }
}

/// An option that is not understood must not be passed over: it may change what is captured.
fn no_options(options: &HashMap<String, String>) -> Result<(), Status> {
    match options.keys().min() {
        None => Ok(()),
        Some(option) => Err(Status::invalid_argument(format!(
            "options: {option:?} is unknown: this runtime has no options for checkpoints"
        ))),
    }
}

/// What is left of the caller's patience (gRPC over HTTP/2, `grpc-timeout`), less a tenth: what is
/// not done by then must still be undone, and the answer be sent.
fn deadline(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    let time = match unit {
        "H" => Duration::from_secs(number.checked_mul(3600)?),
        "M" => Duration::from_secs(number.checked_mul(60)?),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Some(time - time / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_deadline_is_the_limit() {
        let of = |text: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata)
        };
        assert_eq!(of("10S"), Some(Duration::from_secs(9)));
        assert_eq!(of("1000m"), Some(Duration::from_millis(900)));
        assert_eq!(of("1H"), Some(Duration::from_secs(3240)));
        for bad in ["", "S", "5", "-5S", "5s"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(deadline(&MetadataMap::new()), None);
    }

    #[test]
    fn an_unknown_option_is_named() {
        no_options(&HashMap::new()).unwrap();
        let error = no_options(&HashMap::from([("tcp".to_owned(), "1".to_owned())])).unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
        assert!(error.message().contains("\"tcp\""), "{error}");
    }
}
