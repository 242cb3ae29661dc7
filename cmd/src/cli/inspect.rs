//! `inspect` and `image inspect`: the CRI's verbose status, one document for each name.

use anyhow::Result;
use holdfast_protos::cri;
use serde_json::Value;
use tonic::Code;

use super::{
    Client, Hint,
    args::{Document, Inspect, InspectImages, Kind},
    client,
    find::{self, All, Found},
    wire,
};

/// `holdfast inspect`
pub(super) async fn inspect(client: &mut Client, args: Inspect) -> Result<u8> {
    let all = match args.kind {
        Some(Kind::Image) => None,
        _ => Some(All::list(client).await?),
    };
    for (index, name) in args.names.iter().enumerate() {
        let document = match (args.kind, &all) {
            (Some(Kind::Pod), Some(all)) => pod(client, all.pod(name)?.id).await?,
            (Some(Kind::Container), Some(all)) => {
                container(client, all.container(name)?.id).await?
            }
            (None, Some(all)) => match all.any(name) {
                Ok(Found::Pod(found)) => pod(client, found.id).await?,
                Ok(Found::Container(found)) => container(client, found.id).await?,
                Err(first) => match image(client, name).await {
                    Ok(document) => document,
                    // An ambiguous name is the better message than "no image".
                    Err(_) if first.to_string().contains("more than one") => return Err(first),
                    Err(error) if client::code(&error).is_some() => return Err(error),
                    Err(_) => {
                        return Err(Hint::on(
                            anyhow::anyhow!("there is no pod, container or image {name}"),
                            "see `holdfast pods`, `holdfast ps -a` and `holdfast images`",
                        ));
                    }
                },
            },
            (_, None) | (Some(Kind::Image), _) => image(client, name).await?,
        };
        print(index, &document, args.output)?;
    }
    Ok(0)
}

/// `holdfast image inspect`
pub(super) async fn images(client: &mut Client, args: InspectImages) -> Result<u8> {
    for (index, name) in args.images.iter().enumerate() {
        let document = image(client, name).await?;
        print(index, &document, args.output)?;
    }
    Ok(0)
}

fn print(index: usize, document: &Value, format: Document) -> Result<()> {
    if index > 0 && format == Document::Yaml {
        wire::write("---\n")?;
    }
    wire::print(document, format)
}

async fn pod(client: &mut Client, pod_sandbox_id: String) -> Result<Value> {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id, verbose: true };
    let mut runtime = client.runtime.clone();
    let mut response = client.quick(runtime.pod_sandbox_status(request)).await?;
    let info = wire::info_to_json(std::mem::take(&mut response.info));
    let mut document = wire::to_json("PodSandboxStatusResponse", &response);
    document["info"] = info;
    Ok(document)
}

async fn container(client: &mut Client, container_id: String) -> Result<Value> {
    let request = cri::ContainerStatusRequest { container_id, verbose: true };
    let mut runtime = client.runtime.clone();
    let mut response = client.quick(runtime.container_status(request)).await?;
    let info = wire::info_to_json(std::mem::take(&mut response.info));
    let mut document = wire::to_json("ContainerStatusResponse", &response);
    document["info"] = info;
    Ok(document)
}

async fn image(client: &mut Client, name: &str) -> Result<Value> {
    let found = find::image(client, name).await?;
    let spec = cri::ImageSpec { image: found.id, ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(spec), verbose: true };
    let mut images = client.images.clone();
    let mut response = client.quick(images.image_status(request)).await?;
    if response.image.is_none() {
        // Removed since we found it.
        return Err(client.stream_error(tonic::Status::new(
            Code::NotFound,
            format!("there is no image {name} any more"),
        )));
    }
    let info = wire::info_to_json(std::mem::take(&mut response.info));
    let mut document = wire::to_json("ImageStatusResponse", &response);
    document["info"] = info;
    Ok(document)
}
