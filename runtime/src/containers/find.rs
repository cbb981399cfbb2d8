//! Which container a person means.

use anyhow::{Result, bail};
use hull_proto_cri::v1::{
    Container, ContainerState, ContainerStatus, ContainerStatusRequest, ListContainersRequest,
    ListPodSandboxRequest, PodSandbox, PodSandboxMetadata,
};

use super::own;
use crate::{
    client::{self, Client, refused},
    table::short,
};

/// How many candidates an error tells of.
const TOLD: usize = 5;

/// A container and its pod.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Found {
    pub(super) container: Container,
    pub(super) pod: PodSandbox,
}

impl Found {
    /// The names of its pod and its own.
    pub(super) fn names(&self) -> (PodSandboxMetadata, String) {
        let pod = self.pod.metadata.clone().unwrap_or_default();
        let name = self.container.metadata.clone().unwrap_or_default().name;
        (pod, name)
    }

    /// What a person may call it.
    pub(super) fn name(&self) -> String {
        let (pod, name) = self.names();
        if self.is_own() {
            return pod.name;
        }
        format!("{}/{}/{name}", pod.namespace, pod.name)
    }

    /// Whether `hull run` made it, and its pod for it alone.
    pub(super) fn is_own(&self) -> bool {
        let (pod, name) = self.names();
        pod.namespace == own::NAMESPACE && name == own::CONTAINER
    }

    /// Whether its process runs.
    pub(super) fn is_running(&self) -> bool {
        self.container.state() == ContainerState::ContainerRunning
    }

    /// The image's name, as it was asked for.
    pub(super) fn image(&self) -> String {
        let image = self.container.image.clone().unwrap_or_default();
        if image.user_specified_image.is_empty() {
            return image.image;
        }
        image.user_specified_image
    }
}

/// All of the node, the youngest first.
pub(super) async fn all(client: &Client) -> Result<Vec<Found>> {
    let mut runtime = client.runtime.clone();
    let containers = runtime
        .list_containers(ListContainersRequest::default())
        .await;
    let containers = containers.map_err(refused("list containers"))?.into_inner();
    let pods = runtime
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await;
    let pods = pods.map_err(refused("list sandboxes"))?.into_inner().items;
    let of = |container: Container| {
        let pod = pods.iter().find(|pod| pod.id == container.pod_sandbox_id);
        // One whose pod went between the two calls is gone as well.
        let pod = pod.cloned()?;
        Some(Found { container, pod })
    };
    let mut all: Vec<_> = containers.containers.into_iter().filter_map(of).collect();
    all.sort_by_key(|found| std::cmp::Reverse(found.container.created_at));
    Ok(all)
}

/// The one that is meant.
pub(super) async fn one(client: &Client, meant: &str) -> Result<Found> {
    choose(&all(client).await?, meant).cloned()
}

/// By id, name or the start of an id, in this order, of all with the youngest first. A name is the youngest one's:
/// earlier ones are those that it was restarted from. None: those whose ids begin so.
fn pick<'a, T>(
    all: &'a [T],
    meant: &str,
    id: impl Fn(&T) -> &str,
    name: impl Fn(&T) -> String,
) -> Result<&'a T, Vec<&'a T>> {
    let exact = all.iter().find(|one| id(one) == meant);
    if let Some(found) = exact.or_else(|| all.iter().find(|one| name(one) == meant)) {
        return Ok(found);
    }
    let starts = |one: &&T| !meant.is_empty() && id(one).starts_with(meant);
    let candidates: Vec<_> = all.iter().filter(starts).collect();
    match candidates[..] {
        [found] => Ok(found),
        _ => Err(candidates),
    }
}

fn choose<'a>(all: &'a [Found], meant: &str) -> Result<&'a Found> {
    pick(all, meant, |found| &found.container.id, Found::name).or_else(
        |candidates| match candidates[..] {
            [] if all.is_empty() => bail!("there is no container {meant:?}, and no other one"),
            [] => bail!(
                "there is no container {meant:?}; there are {}",
                tell(all.iter())
            ),
            _ => bail!("{meant:?} may be any of {}", tell(candidates.into_iter())),
        },
    )
}

/// The first of them, by name and id.
fn tell<'a>(all: impl ExactSizeIterator<Item = &'a Found>) -> String {
    let more = all.len().saturating_sub(TOLD);
    let one = |found: &Found| format!("{} ({})", found.name(), short(&found.container.id));
    let mut told: Vec<_> = all.take(TOLD).map(one).collect();
    if more > 0 {
        told.push(format!("{more} more"));
    }
    told.join(", ")
}

/// The pod that is meant.
pub(super) async fn pod(client: &Client, meant: &str) -> Result<PodSandbox> {
    let list = ListPodSandboxRequest::default();
    let pods = client.runtime.clone().list_pod_sandbox(list).await;
    let pods = pods.map_err(refused("list sandboxes"))?.into_inner().items;
    choose_pod(&pods, meant).cloned()
}

/// What a person may call a pod.
pub(super) fn pod_name(pod: &PodSandbox) -> String {
    let metadata = pod.metadata.clone().unwrap_or_default();
    if metadata.namespace == own::NAMESPACE {
        return metadata.name;
    }
    format!("{}/{}", metadata.namespace, metadata.name)
}

fn choose_pod<'a>(pods: &'a [PodSandbox], meant: &str) -> Result<&'a PodSandbox> {
    let mut pods: Vec<_> = pods.iter().collect();
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    match pick(&pods, meant, |pod| &pod.id, |pod| pod_name(pod)) {
        Ok(pod) => Ok(pod),
        Err(several) if !several.is_empty() => {
            bail!("several pods have an id that begins with {meant:?}")
        }
        Err(_) => {
            bail!("there is no pod {meant:?}; `hull ps` and `crictl pods` list what there is")
        }
    }
}

/// The exit code that a client of a container ends with: 128 and the signal at most; anything else is a
/// failure all the same.
pub(crate) fn exit_code(status: &ContainerStatus) -> u8 {
    u8::try_from(status.exit_code).unwrap_or(u8::MAX)
}

/// Its status, with what is told under `info` as well if `verbose`.
pub(crate) async fn status(
    client: &Client,
    id: &str,
    verbose: bool,
) -> Result<(ContainerStatus, Option<serde_json::Value>)> {
    let request = ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose,
    };
    let answer = client.runtime.clone().container_status(request).await;
    let answer = answer.map_err(refused("ask for the container's state"))?;
    let answer = answer.into_inner();
    let info = client::info(&answer.info);
    Ok((answer.status.unwrap_or_default(), info))
}

#[cfg(test)]
mod tests {
    use hull_proto_cri::v1::ContainerMetadata;

    use super::*;

    fn found(id: &str, namespace: &str, pod: &str, name: &str) -> Found {
        Found {
            container: Container {
                id: id.to_owned(),
                metadata: Some(ContainerMetadata {
                    name: name.to_owned(),
                    attempt: 0,
                }),
                ..Default::default()
            },
            pod: PodSandbox {
                metadata: Some(PodSandboxMetadata {
                    name: pod.to_owned(),
                    namespace: namespace.to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            },
        }
    }

    #[test]
    fn ids_names_and_starts_of_ids_are_understood() {
        let all = [
            found("ab12", own::NAMESPACE, "db", own::CONTAINER),
            found("ab34", "default", "web", "main"),
            found("cd56", "default", "web", "main"),
            // Its name is how the first one's id begins.
            found("ef78", own::NAMESPACE, "ab1", own::CONTAINER),
        ];
        let id = |meant| choose(&all, meant).map(|found| found.container.id.clone());
        for (meant, expected) in [
            ("ab12", "ab12"),
            ("db", "ab12"),
            ("default/web/main", "ab34"),
            ("cd", "cd56"),
            ("ab1", "ef78"),
            ("ab3", "ab34"),
        ] {
            assert_eq!(id(meant).unwrap(), expected, "{meant}");
        }
        let told = |meant| id(meant).unwrap_err().to_string();
        assert_eq!(
            told("ab"),
            "\"ab\" may be any of db (ab12), default/web/main (ab34)"
        );
        assert!(told("x").starts_with("there is no container \"x\"; there are db (ab12), "));
        assert!(told("").contains("no container"));
        assert!(told("web").contains("no container"));
        let none = choose(&[], "x").unwrap_err().to_string();
        assert_eq!(none, "there is no container \"x\", and no other one");
    }

    #[test]
    fn an_error_tells_of_few_candidates() {
        let many: Vec<_> = (0..9)
            .map(|n| found(&format!("a{n}"), "ns", "p", &n.to_string()))
            .collect();
        let told = choose(&many, "a").unwrap_err().to_string();
        assert!(told.ends_with("ns/p/4 (a4), 4 more"), "{told}");
    }

    #[test]
    fn pods_are_found_by_id_and_name() {
        let pod = |id: &str, namespace: &str, name: &str, created_at| PodSandbox {
            id: id.to_owned(),
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                ..Default::default()
            }),
            created_at,
            ..Default::default()
        };
        let pods = [
            pod("ab12", "default", "web", 1),
            pod("ab34", "default", "web", 2),
            pod("cd56", own::NAMESPACE, "db", 3),
        ];
        let id = |meant| choose_pod(&pods, meant).map(|pod| pod.id.as_str());
        for (meant, expected) in [
            ("ab12", "ab12"),
            ("default/web", "ab34"),
            ("db", "cd56"),
            ("ab3", "ab34"),
        ] {
            assert_eq!(id(meant).unwrap(), expected, "{meant}");
        }
        for (meant, told) in [("ab", "several"), ("x", "no pod"), ("", "no pod")] {
            assert!(id(meant).unwrap_err().to_string().contains(told), "{meant}");
        }
    }
}
