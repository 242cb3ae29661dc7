//! The Images service: what our command line does with images beyond the CRI.

use holdfast_protos::images::{self as wire, images_server::Images};
use tonic::{Request, Response};

use super::{Answer, Service};
use crate::{
    error::{chain, status as to_status},
    image::registry,
};

fn endpoint(endpoint: registry::Endpoint) -> wire::Endpoint {
    wire::Endpoint {
        url: endpoint.url,
        mirror: endpoint.mirror,
        resolve: endpoint.resolve,
        pull: endpoint.pull,
        push: endpoint.push,
        unverified: endpoint.unverified,
        fallback: endpoint.fallback,
        credentials: endpoint.credentials,
        file: endpoint.from.map(|path| path.display().to_string()).unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl Images for Service {
    async fn resolve(
        &self,
        request: Request<wire::ResolveRequest>,
    ) -> Answer<wire::ResolveResponse> {
        let images = &self.pods.services().images;
        let resolved = images.resolve(&request.into_inner().reference).await;
        let resolved = resolved.map_err(|e| to_status(&e))?;
        let names = resolved.into_iter().map(|(reference, endpoints)| {
            let reference = reference.to_string();
            match endpoints {
                Ok(found) => wire::ResolvedName {
                    reference,
                    endpoints: found.into_iter().map(endpoint).collect(),
                    error: String::new(),
                },
                Err(error) => {
                    wire::ResolvedName { reference, endpoints: Vec::new(), error: chain(&error) }
                }
            }
        });
        Ok(Response::new(wire::ResolveResponse { names: names.collect() }))
    }
}
