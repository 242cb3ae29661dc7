//! `pods`, `ps`, `images`.

use std::{collections::HashMap, time::SystemTime};

use anyhow::Result;
use holdfast_protos::cri;

use super::{
    Client,
    args::{Document, Images, Output, Pods, Ps},
    find::{self, All},
    table::{Table, age, short_id, size},
    wire,
};

/// `holdfast pods`
pub(super) async fn pods(client: &mut Client, args: Pods) -> Result<u8> {
    let ready = cri::PodSandboxStateValue { state: cri::PodSandboxState::SandboxReady.into() };
    let filter = cri::PodSandboxFilter {
        state: args.ready.then_some(ready),
        label_selector: HashMap::from_iter(args.label),
        ..Default::default()
    };
    let request = cri::ListPodSandboxRequest { filter: Some(filter) };
    let mut runtime = client.runtime.clone();
    let mut response = client.quick(runtime.list_pod_sandbox(request)).await?;
    if let Some(namespace) = &args.namespace {
        response.items.retain(|pod| find::pod_name(pod).0 == namespace);
    }
    // The newest first: that is what people look for.
    response.items.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
    let id = |id: &str| if args.listing.no_trunc { id.to_owned() } else { short_id(id).to_owned() };
    match args.listing.output() {
        Output::Json => print("ListPodSandboxResponse", &response, Document::Json)?,
        Output::Yaml => print("ListPodSandboxResponse", &response, Document::Yaml)?,
        Output::Name => names(response.items.iter().map(|p| &p.id))?,
        Output::Table => {
            let now = SystemTime::now();
            let mut table =
                Table::new(["POD ID", "NAME", "NAMESPACE", "STATE", "AGE", "ATTEMPT", "RUNTIME"]);
            for pod in &response.items {
                let (namespace, name) = find::pod_name(pod);
                table.row([
                    id(&pod.id),
                    name.to_owned(),
                    namespace.to_owned(),
                    wire::pod_state(pod.state).to_owned(),
                    age(pod.created_at, now),
                    pod.metadata.as_ref().map_or(0, |m| m.attempt).to_string(),
                    or(&pod.runtime_handler, "(default)"),
                ]);
            }
            wire::write(&table.render())?;
        }
    }
    Ok(0)
}

/// `holdfast ps`
pub(super) async fn containers(client: &mut Client, args: Ps) -> Result<u8> {
    let pod_sandbox_id = match &args.pod {
        Some(name) => All::list(client).await?.pod(name)?.id,
        None => String::new(),
    };
    let running = cri::ContainerStateValue { state: cri::ContainerState::ContainerRunning.into() };
    let filter = cri::ContainerFilter {
        state: (!args.all).then_some(running),
        pod_sandbox_id,
        label_selector: HashMap::from_iter(args.label),
        ..Default::default()
    };
    let request = cri::ListContainersRequest { filter: Some(filter) };
    let mut runtime = client.runtime.clone();
    let mut response = client.quick(runtime.list_containers(request)).await?;
    response.containers.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
    let id = |id: &str| if args.listing.no_trunc { id.to_owned() } else { short_id(id).to_owned() };
    match args.listing.output() {
        Output::Json => print("ListContainersResponse", &response, Document::Json)?,
        Output::Yaml => print("ListContainersResponse", &response, Document::Yaml)?,
        Output::Name => names(response.containers.iter().map(|c| &c.id))?,
        Output::Table => {
            let pods = client.pods().await?;
            let pods: HashMap<_, _> =
                pods.iter().map(|p| (p.id.as_str(), find::pod_name(p))).collect();
            let now = SystemTime::now();
            let mut table = Table::new([
                "CONTAINER ID",
                "NAME",
                "STATE",
                "AGE",
                "ATTEMPT",
                "IMAGE",
                "POD",
                "NAMESPACE",
            ]);
            for container in &response.containers {
                let (namespace, pod) =
                    pods.get(&*container.pod_sandbox_id).copied().unwrap_or(("", ""));
                table.row([
                    id(&container.id),
                    find::container_name(container).to_owned(),
                    wire::container_state(container.state).to_owned(),
                    age(container.created_at, now),
                    container.metadata.as_ref().map_or(0, |m| m.attempt).to_string(),
                    image_of(container),
                    pod.to_owned(),
                    namespace.to_owned(),
                ]);
            }
            wire::write(&table.render())?;
        }
    }
    Ok(0)
}

/// `holdfast images`
pub(super) async fn images(client: &mut Client, args: Images) -> Result<u8> {
    let image = args.filter.map(|image| cri::ImageFilter {
        image: Some(cri::ImageSpec { image, ..Default::default() }),
    });
    let request = cri::ListImagesRequest { filter: image };
    let mut images = client.images.clone();
    let mut response = client.quick(images.list_images(request)).await?;
    response.images.sort_by(|a, b| a.repo_tags.cmp(&b.repo_tags).then(a.id.cmp(&b.id)));
    match args.listing.output() {
        Output::Json => print("ListImagesResponse", &response, Document::Json)?,
        Output::Yaml => print("ListImagesResponse", &response, Document::Yaml)?,
        Output::Name => names(response.images.iter().map(|i| &i.id))?,
        Output::Table => {
            let id = |id: &str| {
                if args.listing.no_trunc { id.to_owned() } else { short_id(id).to_owned() }
            };
            let rows = response.images.iter().flat_map(|i| image_rows(i).map(move |r| (i, r)));
            let text = if args.digests {
                let mut table = Table::new(["IMAGE", "TAG", "DIGEST", "IMAGE ID", "SIZE"]);
                for (image, row) in rows {
                    let [repo, tag, digest] = row;
                    table.row([repo, tag, digest, id(&image.id), size(image.size)]);
                }
                table.render()
            } else {
                let mut table = Table::new(["IMAGE", "TAG", "IMAGE ID", "SIZE"]);
                for (image, row) in rows {
                    let [repo, tag, _] = row;
                    table.row([repo, tag, id(&image.id), size(image.size)]);
                }
                table.render()
            };
            wire::write(&text)?;
        }
    }
    Ok(0)
}

/// Repository, tag and digest of each name of an image: one row for each tag; for an image without
/// tags, one for each digest.
fn image_rows(image: &cri::Image) -> impl Iterator<Item = [String; 3]> + use<> {
    let digests: Vec<(String, String)> = image
        .repo_digests
        .iter()
        .filter_map(|d| d.split_once('@'))
        .map(|(repo, digest)| (repo.to_owned(), digest.to_owned()))
        .collect();
    let mut rows: Vec<[String; 3]> = image
        .repo_tags
        .iter()
        .map(|name| {
            let (repo, tag) = split_tag(name);
            let digest = digests.iter().find(|(r, _)| r == repo);
            let digest = digest.map(|(_, d)| d.clone()).unwrap_or_default();
            [repo.to_owned(), tag.to_owned(), digest]
        })
        .collect();
    if rows.is_empty() {
        rows = digests.into_iter().map(|(repo, digest)| [repo, String::new(), digest]).collect();
    }
    if rows.is_empty() {
        rows.push(Default::default());
    }
    rows.into_iter()
}

/// A colon after the last slash is a tag's; before it, a port's.
fn split_tag(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repo, tag)) if !tag.contains('/') => (repo, tag),
        _ => (name, ""),
    }
}

/// The image as the user wrote it, if the daemon knows, else as the container's request did.
fn image_of(container: &cri::Container) -> String {
    let Some(spec) = &container.image else { return String::new() };
    let name =
        if spec.user_specified_image.is_empty() { &spec.image } else { &spec.user_specified_image };
    if name.starts_with("sha256:") { short_id(name).to_owned() } else { name.clone() }
}

fn or(text: &str, default: &str) -> String {
    if text.is_empty() { default.to_owned() } else { text.to_owned() }
}

fn print<M: prost::Message>(name: &str, message: &M, format: Document) -> Result<()> {
    wire::print(&wire::to_json(name, message), format)
}

fn names<'a>(ids: impl Iterator<Item = &'a String>) -> Result<()> {
    wire::write(&ids.map(|id| format!("{id}\n")).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tag_is_a_row_with_its_own_digest() {
        let image = cri::Image {
            repo_tags: vec!["r:5000/a/x:1".into(), "docker.io/library/x:latest".into()],
            repo_digests: vec!["docker.io/library/x@sha256:aa".into()],
            ..Default::default()
        };
        assert_eq!(
            image_rows(&image).collect::<Vec<_>>(),
            [["r:5000/a/x", "1", ""], ["docker.io/library/x", "latest", "sha256:aa"]]
        );
        let untagged =
            cri::Image { repo_digests: vec!["r:5000/x@sha256:bb".into()], ..Default::default() };
        assert_eq!(image_rows(&untagged).collect::<Vec<_>>(), [["r:5000/x", "", "sha256:bb"]]);
        assert_eq!(image_rows(&cri::Image::default()).count(), 1, "no image is hidden");
    }
}
