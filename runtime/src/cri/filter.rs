//! Which pods and containers a list call asks for. All conditions must hold.

use std::collections::BTreeMap;

use hull_proto_cri::v1;
use hull_spec::info::{ContainerInfo, SandboxInfo};

use super::{
    convert::{container, enumeration, sandbox},
    error::CriError,
};

/// A condition on sandboxes.
#[derive(Debug, Default)]
pub(crate) struct Sandboxes {
    id: String,
    state: Option<v1::PodSandboxState>,
    labels: BTreeMap<String, String>,
}

impl Sandboxes {
    /// Reads a request's filter; none selects all.
    pub(crate) fn new(filter: Option<v1::PodSandboxFilter>) -> Result<Self, CriError> {
        let filter = filter.unwrap_or_default();
        Ok(Self {
            id: filter.id,
            state: filter
                .state
                .map(|value| enumeration("filter.state", value.state))
                .transpose()?,
            labels: filter.label_selector,
        })
    }

    /// Tells whether the sandbox is asked for.
    pub(crate) fn selects(&self, info: &SandboxInfo) -> bool {
        info.id.as_str().starts_with(&self.id)
            && self
                .state
                .is_none_or(|state| state == sandbox::state(info.state))
            && has(&info.spec.labels, &self.labels)
    }

    /// The same of a sandbox that another runtime tells of.
    pub(crate) fn selects_item(&self, pod: &v1::PodSandbox) -> bool {
        pod.id.starts_with(&self.id)
            && self.state.is_none_or(|state| state == pod.state())
            && has(&pod.labels, &self.labels)
    }
}

/// A condition on containers.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    id: String,
    pod: String,
    state: Option<v1::ContainerState>,
    labels: BTreeMap<String, String>,
}

impl Containers {
    /// Reads a request's filter; none selects all.
    pub(crate) fn new(filter: Option<v1::ContainerFilter>) -> Result<Self, CriError> {
        let filter = filter.unwrap_or_default();
        Ok(Self {
            id: filter.id,
            pod: filter.pod_sandbox_id,
            state: filter
                .state
                .map(|value| enumeration("filter.state", value.state))
                .transpose()?,
            labels: filter.label_selector,
        })
    }

    /// What the ids of the pods begin with whose containers are asked for; empty: all.
    pub(crate) fn pod(&self) -> &str {
        &self.pod
    }

    /// Tells whether the container is asked for.
    pub(crate) fn selects(&self, info: &ContainerInfo) -> bool {
        info.id.as_str().starts_with(&self.id)
            && info.pod.as_str().starts_with(&self.pod)
            && self
                .state
                .is_none_or(|state| state == container::state(info.state))
            && has(&info.spec.labels, &self.labels)
    }

    /// The same of a container that another runtime tells of.
    pub(crate) fn selects_item(&self, container: &v1::Container) -> bool {
        container.id.starts_with(&self.id)
            && container.pod_sandbox_id.starts_with(&self.pod)
            && self.state.is_none_or(|state| state == container.state())
            && has(&container.labels, &self.labels)
    }
}

fn has(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hull_spec::{id::PodId, info::SandboxState, spec::SandboxSpec};

    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect()
    }

    fn sandbox(id: &str, state: SandboxState, labels: &[(&str, &str)]) -> SandboxInfo {
        SandboxInfo {
            id: PodId::try_from(id.repeat(64 / id.len())).unwrap(),
            spec: Arc::new(SandboxSpec {
                labels: map(labels),
                ..Default::default()
            }),
            state,
            message: String::new(),
            created_at_ns: 0,
            ips: Vec::new(),
            vm: None,
            guest: None,
            boot: None,
        }
    }

    fn selected(filter: v1::PodSandboxFilter) -> Vec<char> {
        let filter = Sandboxes::new(Some(filter)).unwrap();
        [
            sandbox("a", SandboxState::Ready, &[("app", "x"), ("tier", "1")]),
            sandbox("b", SandboxState::NotReady, &[("app", "x")]),
            sandbox("ab", SandboxState::Ready, &[]),
        ]
        .iter()
        .filter(|info| filter.selects(info))
        .map(|info| info.id.as_str().chars().nth(1).unwrap())
        .collect()
    }

    #[test]
    fn conditions_are_anded() {
        let ready = Some(v1::PodSandboxStateValue {
            state: v1::PodSandboxState::SandboxReady.into(),
        });
        assert_eq!(selected(Default::default()), ['a', 'b', 'b']);
        assert_eq!(
            selected(v1::PodSandboxFilter {
                id: "a".into(),
                ..Default::default()
            }),
            ['a', 'b']
        );
        assert_eq!(
            selected(v1::PodSandboxFilter {
                id: "a".repeat(64),
                ..Default::default()
            }),
            ['a']
        );
        assert_eq!(
            selected(v1::PodSandboxFilter {
                state: ready,
                label_selector: map(&[("app", "x")]),
                ..Default::default()
            }),
            ['a']
        );
        assert!(
            selected(v1::PodSandboxFilter {
                label_selector: map(&[("app", "x"), ("tier", "2")]),
                ..Default::default()
            })
            .is_empty()
        );
    }

    #[test]
    fn an_unknown_state_is_refused() {
        let filter = v1::PodSandboxFilter {
            state: Some(v1::PodSandboxStateValue { state: 9 }),
            ..Default::default()
        };
        let error = Sandboxes::new(Some(filter)).unwrap_err();
        assert_eq!(error.to_string(), "filter.state: 9 is no known value");
    }
}
