//! Whose a call is.

use std::{
    collections::BTreeMap,
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use futures::future::join_all;
use hull_proto_cri::v1;
use tonic::{Code, Response, Status};
use tracing::debug;

use super::{
    credentials::Credentials,
    peer::{Delegate, PATIENCE},
};
use crate::cri::{Cri, filter};

/// Both services for all runtimes of the node. Clones share the others.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    pub(super) own: Cri,
    delegates: Arc<Mutex<BTreeMap<PathBuf, Arc<Delegate>>>>,
    pub(super) credentials: Arc<Credentials>,
}

impl Router {
    /// In front of Hull's own services; who the others are is configured by handlers.
    pub(crate) fn new(own: Cri) -> Self {
        Self {
            own,
            delegates: Arc::default(),
            credentials: Arc::default(),
        }
    }

    /// The other runtimes; they can change.
    pub(super) fn delegates(&self) -> Vec<Arc<Delegate>> {
        let handlers = self.own.0.handlers.borrow();
        let named = handlers.delegates();
        let mut known = self
            .delegates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        known.retain(|socket, delegate| named.get(socket.as_path()) == Some(&delegate.handler()));
        for (socket, handler) in named {
            if !known.contains_key(socket) {
                known.insert(socket.to_owned(), Delegate::new(socket, handler));
            }
        }
        known.values().cloned().collect()
    }

    pub(super) fn delegate(&self, socket: &Path) -> Option<Arc<Delegate>> {
        let all = self.delegates();
        all.into_iter().find(|delegate| delegate.socket() == socket)
    }

    /// Who has a pod; none: Hull, which also tells that nobody has it.
    pub(super) async fn of_pod(&self, id: &str) -> Result<Option<Arc<Delegate>>, Status> {
        if id.is_empty() || self.own.0.pods.sandbox(id).await.is_ok() {
            return Ok(None);
        }
        self.first(
            |delegate| delegate.has_told_of_pod(id),
            |delegate| async move {
                let request = v1::PodSandboxStatusRequest {
                    pod_sandbox_id: id.to_owned(),
                    verbose: false,
                };
                let status = delegate.runtime().pod_sandbox_status(request).await;
                status.map(drop)
            },
        )
        .await
    }

    /// Who has a container; none: Hull, which also tells that nobody has it.
    pub(super) async fn of_container(&self, id: &str) -> Result<Option<Arc<Delegate>>, Status> {
        if id.is_empty() || self.own.0.pods.container(id).await.is_ok() {
            return Ok(None);
        }
        self.first(
            |delegate| delegate.has_told_of_container(id),
            |delegate| async move {
                let request = v1::ContainerStatusRequest {
                    container_id: id.to_owned(),
                    verbose: false,
                };
                let status = delegate.runtime().container_status(request).await;
                status.map(drop)
            },
        )
        .await
    }

    /// The first one that told of something, or that tells of it now.
    async fn first<F>(
        &self,
        has_told: impl Fn(&Delegate) -> bool,
        ask: impl Fn(Arc<Delegate>) -> F,
    ) -> Result<Option<Arc<Delegate>>, Status>
    where
        F: Future<Output = Result<(), Status>>,
    {
        let all = self.delegates();
        if let Some(delegate) = all.iter().find(|delegate| has_told(delegate)) {
            return Ok(Some(Arc::clone(delegate)));
        }
        for delegate in all {
            match delegate.within(PATIENCE, ask(Arc::clone(&delegate))).await {
                Ok(()) => return Ok(Some(delegate)),
                Err(status) if status.code() == Code::NotFound => {}
                // It may be the one that has it.
                Err(status) => return Err(status),
            }
        }
        Ok(None)
    }

    /// The pods of the others that a filter selects.
    pub(super) async fn pods(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        let Ok(filter) = filter::Sandboxes::new(filter) else {
            return Vec::new();
        };
        let all = self.delegates();
        let all = join_all(all.iter().map(Delegate::pods)).await;
        let all = all.into_iter().flatten();
        all.filter(|pod| filter.selects_item(pod)).collect()
    }

    /// The containers of the others that a filter selects.
    pub(super) async fn containers(
        &self,
        filter: Option<v1::ContainerFilter>,
    ) -> Vec<v1::Container> {
        let Ok(filter) = filter::Containers::new(filter) else {
            return Vec::new();
        };
        let all = self.delegates();
        let all = join_all(all.iter().map(Delegate::containers)).await;
        let all = all.into_iter().flatten();
        all.filter(|container| filter.selects_item(container))
            .collect()
    }

    /// What those of the others answer that can.
    pub(super) async fn gather<T, F>(&self, ask: impl Fn(Arc<Delegate>) -> F) -> Vec<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let asked = self.delegates().into_iter().filter(|one| !one.is_late());
        let asked = asked.map(|delegate| {
            let answer = ask(Arc::clone(&delegate));
            async move {
                match delegate.within(PATIENCE, answer).await {
                    Ok(answer) => Some(answer.into_inner()),
                    Err(status) => {
                        debug!(error = status.message(), "another runtime does not tell");
                        None
                    }
                }
            }
        });
        join_all(asked).await.into_iter().flatten().collect()
    }
}
