//! The CRI's image service.

use std::{sync::Arc, time::SystemTime};

use holdfast_protos::cri::{self, image_service_server::ImageService};
use tonic::{Request, Response, Status};

use super::{Answer, Service, convert, streams};
use crate::{
    error::status as to_status,
    image::{Auth, Error, Image, PullFailure},
};

/// An image as the CRI has it.
fn image(image: &Arc<Image>) -> cri::Image {
    let (uid, username) = match image.defaults.user.split(':').next().unwrap_or_default() {
        "" => (Some(cri::Int64Value { value: 0 }), String::new()),
        user => match user.parse::<u32>() {
            Ok(uid) => (Some(cri::Int64Value { value: uid.into() }), String::new()),
            Err(_) => (None, user.to_owned()),
        },
    };
    cri::Image {
        id: image.id.to_string(),
        repo_tags: image.names.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        uid,
        username,
        spec: Some(cri::ImageSpec {
            image: image.id.to_string(),
            annotations: image.annotations.clone().into_iter().collect(),
            ..Default::default()
        }),
        pinned: image.pinned,
    }
}

fn spec(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    match spec.map(|spec| spec.image).filter(|image| !image.is_empty()) {
        Some(image) => Ok(image),
        None => Err(Status::invalid_argument("image.image: it is required")),
    }
}

pub(super) fn auth(auth: cri::AuthConfig) -> Auth {
    Auth {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    }
}

/// The error of a pull. The kubelet has reasons of its own for some, which it knows by how the text
/// begins (cri-api, pkg/errors).
fn not_pulled(error: &Error) -> Status {
    let status = to_status(error);
    let word = match error.pull_failure() {
        Some(PullFailure::Signature) => "SignatureValidationFailed",
        Some(PullFailure::Unavailable) => "RegistryUnavailable",
        None => return status,
    };
    Status::new(status.code(), format!("{word}: {}", status.message()))
}

impl Service {
    fn select_images(&self, filter: Option<cri::ImageFilter>) -> Vec<Arc<Image>> {
        let images = &self.pods.services().images;
        let name = filter.and_then(|f| f.image).map(|spec| spec.image);
        match name.filter(|name| !name.is_empty()) {
            Some(name) => images.find(&name).into_iter().collect(),
            None => images.list(),
        }
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let found = self.select_images(request.into_inner().filter);
        Ok(Response::new(cri::ListImagesResponse { images: found.iter().map(image).collect() }))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let found = self.pods.services().images.find(&spec(request.image)?);
        let info = match (&found, request.verbose) {
            (Some(found), true) => super::status::image_info(self.pods.services(), found).await,
            _ => Default::default(),
        };
        // Not there is not an error: the answer has no image.
        Ok(Response::new(cri::ImageStatusResponse { image: found.as_ref().map(image), info }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = spec(request.image)?;
        let images = &self.pods.services().images;
        let image = images.pull(&name, request.auth.map(auth), None).await;
        let image = image.map_err(|error| not_pulled(&error))?;
        Ok(Response::new(cri::PullImageResponse { image_ref: image.id.to_string() }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let name = spec(request.into_inner().image)?;
        let images = &self.pods.services().images;
        images.remove(&name).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let usage = self.pods.services().images.fs_usage();
        let usage = cri::FilesystemUsage {
            timestamp: convert::nanos(SystemTime::now()),
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: usage.mountpoint.display().to_string(),
            }),
            used_bytes: Some(cri::UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(cri::UInt64Value { value: usage.inodes_used }),
        };
        Ok(Response::new(cri::ImageFsInfoResponse {
            // Images and writable layers are on one file system.
            image_filesystems: vec![usage.clone()],
            container_filesystems: vec![usage],
        }))
    }

    type StreamImagesStream = streams::Answers<cri::StreamImagesResponse>;
    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let found = self.select_images(request.into_inner().filter);
        let message = |images| cri::StreamImagesResponse { images };
        Ok(Response::new(streams::list(found, image, message)))
    }
}
