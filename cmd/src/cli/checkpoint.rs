//! `checkpoint`: a container's state, or that of a whole pod, as files; what it is made of runs on.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use holdfast_protos::cri;

use super::{Client, args::Checkpoint, find::All};

/// `holdfast checkpoint`
pub(super) async fn checkpoint(client: &mut Client, args: Checkpoint) -> Result<u8> {
    let all = All::list(client).await?;
    let to = std::path::absolute(&args.export).context("--export")?;
    let to = to.to_string_lossy().into_owned();
    let mut runtime = client.runtime.clone();
    if args.pod {
        let pod_sandbox_id = all.pod(&args.name)?.id;
        let request =
            cri::CheckpointPodRequest { pod_sandbox_id, output_path: to, ..Default::default() };
        client.long(runtime.checkpoint_pod(request)).await?;
    } else {
        let container_id = all.container(&args.name)?.id;
        // The daemon ends it when our own patience does.
        let timeout = client.timeout().map_or(0, |limit| limit.as_secs().max(1));
        let timeout = i64::try_from(timeout).unwrap_or(i64::MAX);
        let request = cri::CheckpointContainerRequest { container_id, location: to, timeout };
        client.long(runtime.checkpoint_container(request)).await?;
    }
    Ok(0)
}

/// The archive that `run` is given in an image's place: a path, as no reference is one.
pub(super) fn archive(image: &str) -> Option<PathBuf> {
    let path = image.starts_with('/') || image.starts_with("./") || image.starts_with("../");
    path.then(|| std::path::absolute(Path::new(image)).unwrap_or_else(|_| image.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_no_reference() {
        assert_eq!(archive("/a/c.tar"), Some("/a/c.tar".into()));
        assert!(archive("./c.tar").is_some_and(|path| path.is_absolute()));
        assert_eq!(archive("busybox"), None);
        assert_eq!(archive("registry.example/a/b.tar:1"), None);
    }
}
