//! Which pod, container or image a name means.
//!
//! A name is, in this order: an id, a name, or the beginning of an id. `POD/CONTAINER` and
//! `NAMESPACE/POD` name one exactly where the short name is not enough. Of several attempts of one
//! container the last is meant. More than one match is an error that lists them.

use anyhow::{Result, anyhow, bail};
use holdfast_protos::cri;

use super::{
    Client, Hint,
    table::{printable, short_id},
    wire,
};

/// A pod or a container.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Found {
    Pod(cri::PodSandbox),
    Container(cri::Container),
}

impl Found {
    fn describe(&self, all: &All) -> String {
        match self {
            Self::Pod(pod) => {
                let (namespace, name) = pod_name(pod);
                let state = wire::pod_state(pod.state);
                format!("pod {} {namespace}/{name} ({state})", short_id(&pod.id))
            }
            Self::Container(container) => {
                let pod = all.pods.iter().find(|p| p.id == container.pod_sandbox_id);
                let pod = pod.map_or("-", |p| pod_name(p).1);
                let state = wire::container_state(container.state);
                let name = container_name(container);
                format!("container {} {pod}/{name} ({state})", short_id(&container.id))
            }
        }
    }
}

/// Every pod and container of the node.
pub(super) struct All {
    pub(super) pods: Vec<cri::PodSandbox>,
    pub(super) containers: Vec<cri::Container>,
}

impl All {
    pub(super) async fn list(client: &mut Client) -> Result<Self> {
        Ok(Self { pods: client.pods().await?, containers: client.containers().await? })
    }

    /// A pod or a container. A pod comes before the containers in it, because `holdfast run` gives
    /// both the same name.
    pub(super) fn any(&self, name: &str) -> Result<Found> {
        let pods = self.matching_pods(name);
        let containers = self.matching_containers(name);
        let matched = match (pods, containers) {
            (Some((how, pods)), Some((container_how, containers))) if how == container_how => {
                let others = containers
                    .into_iter()
                    .filter(|c| how != How::Name || pods.iter().all(|p| p.id != c.pod_sandbox_id));
                let others: Vec<_> = others.map(Found::Container).collect();
                pods.into_iter().map(Found::Pod).chain(others).collect()
            }
            (Some((how, pods)), Some((container_how, _))) if how < container_how => {
                pods.into_iter().map(Found::Pod).collect()
            }
            (_, Some((_, containers))) => containers.into_iter().map(Found::Container).collect(),
            (Some((_, pods)), None) => pods.into_iter().map(Found::Pod).collect(),
            (None, None) => Vec::new(),
        };
        self.one(matched, name, "pod or container", "holdfast pods` and `holdfast ps -a")
    }

    /// A container; a pod's name stands for its only container.
    pub(super) fn container(&self, name: &str) -> Result<cri::Container> {
        let mut matched = self.matching_containers(name).map(|(_, c)| c).unwrap_or_default();
        if matched.is_empty() {
            let pods = self.matching_pods(name).map(|(_, p)| p).unwrap_or_default();
            if let [pod] = &*pods {
                let of_pod = self.containers.iter().filter(|c| c.pod_sandbox_id == pod.id);
                matched = last_attempts(of_pod.cloned().collect());
                if matched.is_empty() {
                    bail!("pod {name} has no container");
                }
            }
        }
        let matched = matched.into_iter().map(Found::Container).collect();
        match self.one(matched, name, "container", "holdfast ps -a")? {
            Found::Container(container) => Ok(container),
            Found::Pod(_) => unreachable!("only containers were looked for"),
        }
    }

    /// A pod.
    pub(super) fn pod(&self, name: &str) -> Result<cri::PodSandbox> {
        let matched = self.matching_pods(name).map(|(_, p)| p).unwrap_or_default();
        let matched = matched.into_iter().map(Found::Pod).collect();
        match self.one(matched, name, "pod", "holdfast pods")? {
            Found::Pod(pod) => Ok(pod),
            Found::Container(_) => unreachable!("only pods were looked for"),
        }
    }

    fn one(&self, mut matched: Vec<Found>, name: &str, what: &str, list: &str) -> Result<Found> {
        match matched.len() {
            1 => Ok(matched.remove(0)),
            0 => Err(Hint::on(not_found(what, name), format!("see `{list}`"))),
            _ => {
                let list: Vec<_> = matched.iter().map(|m| m.describe(self)).collect();
                Err(Hint::on(
                    anyhow!("{} names more than one {what}: {}", printable(name), list.join(", ")),
                    "use an id, or POD/CONTAINER",
                ))
            }
        }
    }

    fn matching_pods(&self, name: &str) -> Option<(How, Vec<cri::PodSandbox>)> {
        best(&self.pods, |pod| {
            let (namespace, pod_name) = pod_name(pod);
            let full = name.split_once('/') == Some((namespace, pod_name));
            how(name, &pod.id, full || name == pod_name)
        })
    }

    fn matching_containers(&self, name: &str) -> Option<(How, Vec<cri::Container>)> {
        let (how, matched) = best(&self.containers, |container| {
            let of_pod = || {
                let (pod, container_part) = name.split_once('/')?;
                let owner = self.pods.iter().find(|p| p.id == container.pod_sandbox_id)?;
                let owns = pod_name(owner).1 == pod || owner.id == pod;
                Some(owns && container_part == container_name(container))
            };
            let named = name == container_name(container) || of_pod().unwrap_or(false);
            how(name, &container.id, named)
        })?;
        Some((how, if how == How::Name { last_attempts(matched) } else { matched }))
    }
}

/// The image of a name, digest, id, or beginning of an id.
pub(super) async fn image(client: &mut Client, name: &str) -> Result<cri::Image> {
    // The daemon knows best what a reference means (docker.io, :latest).
    let spec = cri::ImageSpec { image: name.to_owned(), ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(spec), verbose: false };
    let mut images = client.images.clone();
    let answer = client.quick(images.image_status(request)).await;
    match answer {
        Ok(status) => {
            if let Some(image) = status.image {
                return Ok(image);
            }
        }
        // "abc" may be no reference and still be the beginning of an id.
        Err(error) if super::client::code(&error) == Some(tonic::Code::InvalidArgument) => {}
        Err(error) => return Err(error),
    }
    let list = client.quick(images.list_images(cri::ListImagesRequest::default())).await?.images;
    let matched: Vec<_> = list.into_iter().filter(|i| is_prefix(name, &i.id)).collect();
    match &*matched {
        [image] => Ok(image.clone()),
        [] => Err(Hint::on(not_found("image", name), "see `holdfast images`")),
        several => {
            let ids: Vec<_> = several.iter().map(|i| i.id.as_str()).collect();
            Err(anyhow!("{name} is the beginning of more than one image: {}", ids.join(", ")))
        }
    }
}

fn not_found(what: &str, name: &str) -> anyhow::Error {
    anyhow!("there is no {what} {}", printable(name))
}

/// How a name matched, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum How {
    Id,
    Name,
    Prefix,
}

fn how(name: &str, id: &str, named: bool) -> Option<How> {
    if name == id {
        Some(How::Id)
    } else if named {
        Some(How::Name)
    } else {
        is_prefix(name, id).then_some(How::Prefix)
    }
}

fn is_prefix(name: &str, id: &str) -> bool {
    let strip = |text: &str| text.strip_prefix("sha256:").unwrap_or(text).to_owned();
    let name = strip(name);
    !name.is_empty() && strip(id).starts_with(&name)
}

/// The items with the strongest match.
fn best<T: Clone>(items: &[T], how: impl Fn(&T) -> Option<How>) -> Option<(How, Vec<T>)> {
    let strongest = items.iter().filter_map(&how).min()?;
    let matched = items.iter().filter(|item| how(item) == Some(strongest)).cloned();
    Some((strongest, matched.collect()))
}

/// Of the containers of one name in one pod, only the one that was made last.
fn last_attempts(containers: Vec<cri::Container>) -> Vec<cri::Container> {
    let key = |c: &cri::Container| (c.metadata.as_ref().map_or(0, |m| m.attempt), c.created_at);
    let is_last = |c: &cri::Container| {
        containers.iter().all(|other| {
            other.id == c.id
                || other.pod_sandbox_id != c.pod_sandbox_id
                || container_name(other) != container_name(c)
                || key(other) < key(c)
        })
    };
    containers.iter().filter(|c| is_last(c)).cloned().collect()
}

/// Namespace and name.
pub(super) fn pod_name(pod: &cri::PodSandbox) -> (&str, &str) {
    pod.metadata.as_ref().map_or(("", ""), |m| (&m.namespace, &m.name))
}

pub(super) fn container_name(container: &cri::Container) -> &str {
    container.metadata.as_ref().map_or("", |m| &m.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, namespace: &str, name: &str) -> cri::PodSandbox {
        cri::PodSandbox {
            id: id.into(),
            metadata: Some(cri::PodSandboxMetadata {
                name: name.into(),
                namespace: namespace.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn container(id: &str, pod: &str, name: &str, attempt: u32) -> cri::Container {
        cri::Container {
            id: id.into(),
            pod_sandbox_id: pod.into(),
            metadata: Some(cri::ContainerMetadata { name: name.into(), attempt }),
            ..Default::default()
        }
    }

    fn node() -> All {
        All {
            pods: vec![
                pod("aaa1", "default", "web"),
                pod("aab2", "kube-system", "dns"),
                pod("ccc3", "default", "both"),
                pod("ddd4", "other", "web2"),
            ],
            containers: vec![
                container("0a01", "aaa1", "app", 0),
                container("0a02", "aaa1", "app", 1),
                container("0a03", "aaa1", "sidecar", 0),
                container("0b04", "aab2", "app", 0),
                container("0c05", "ccc3", "both", 0),
                container("0d06", "ddd4", "aab2", 0),
            ],
        }
    }

    fn any(name: &str) -> Result<String, String> {
        node().any(name).map_err(|e| e.to_string()).map(|found| match found {
            Found::Pod(p) => p.id,
            Found::Container(c) => c.id,
        })
    }

    fn container_id(name: &str) -> Result<String, String> {
        node().container(name).map(|c| c.id).map_err(|e| e.to_string())
    }

    #[test]
    fn an_id_comes_before_a_name_and_a_name_before_a_prefix() {
        assert_eq!(any("web").unwrap(), "aaa1");
        assert_eq!(any("aab2").unwrap(), "aab2", "the id of a pod, and the name of a container");
        assert_eq!(any("cc").unwrap(), "ccc3");
        assert_eq!(any("0c").unwrap(), "0c05");
        assert_eq!(any("kube-system/dns").unwrap(), "aab2");
        assert_eq!(any("web/sidecar").unwrap(), "0a03");
    }

    #[test]
    fn a_pod_comes_before_its_container_of_the_same_name() {
        assert_eq!(any("both").unwrap(), "ccc3");
        assert_eq!(container_id("both").unwrap(), "0c05");
    }

    #[test]
    fn the_last_attempt_is_meant() {
        assert_eq!(container_id("web/app").unwrap(), "0a02");
        assert_eq!(container_id("0a01").unwrap(), "0a01", "by id every attempt can be named");
    }

    #[test]
    fn a_pod_stands_for_its_only_container() {
        assert_eq!(container_id("dns").unwrap(), "0b04");
        let error = container_id("web").unwrap_err();
        assert!(error.contains("web/app") && error.contains("web/sidecar"), "{error}");
    }

    #[test]
    fn ambiguous_names_list_what_they_may_mean() {
        let error = any("app").unwrap_err();
        assert!(error.contains("container 0a02 web/app"), "{error}");
        assert!(error.contains("container 0b04 dns/app"), "{error}");
        assert!(!error.contains("0a01"), "an earlier attempt is no candidate: {error}");
        assert!(any("aa").unwrap_err().contains("kube-system/dns"));
    }

    #[test]
    fn what_is_not_there_is_not_there() {
        assert_eq!(any("nope").unwrap_err(), "there is no pod or container nope");
        assert_eq!(any("").unwrap_err(), "there is no pod or container -");
        assert!(node().pod("sidecar").is_err());
    }
}
