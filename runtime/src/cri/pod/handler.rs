//! The choice of the runtime handler, for all of Hull in this one place.

use hull_spec::spec::{Resources, SandboxSpec};

use crate::{
    config::{Handler, Handlers},
    cri::error::CriError,
};

/// One CPU, as a quota per [`PERIOD_US`].
const PERIOD_US: i64 = 100_000;

/// Finds the handler that a request names; empty is the default one.
pub(crate) fn choose<'a>(handlers: &'a Handlers, name: &str) -> Result<&'a Handler, CriError> {
    handlers.get(name).ok_or_else(|| {
        let known: Vec<&str> = handlers.names().collect();
        CriError::invalid(
            "runtime_handler",
            format!("there is no handler {name:?} on this node; known are {known:?}"),
        )
    })
}

/// Gives the VM the handler's sizes where the pod names none.
pub(crate) fn apply(handler: &Handler, spec: &mut SandboxSpec) {
    if handler.memory_mib.is_none() && handler.vcpus.is_none() {
        return;
    }
    let resources = spec.resources.get_or_insert_with(Resources::default);
    if let Some(memory_mib) = handler.memory_mib
        && resources.memory_limit_bytes <= 0
    {
        resources.memory_limit_bytes = i64::from(memory_mib) << 20;
    }
    if let Some(vcpus) = handler.vcpus
        && resources.cpu_quota_us <= 0
    {
        resources.cpu_period_us = PERIOD_US;
        resources.cpu_quota_us = PERIOD_US * i64::from(vcpus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_pod_win() {
        let handler = Handler {
            memory_mib: Some(512),
            vcpus: Some(2),
            delegate: None,
        };
        let mut spec = SandboxSpec::default();
        apply(&handler, &mut spec);
        let resources = spec.resources.clone().unwrap();
        assert_eq!(resources.memory_limit_bytes, 512 << 20);
        assert_eq!(resources.cpu_quota_us, 2 * resources.cpu_period_us);

        spec.resources = Some(Resources {
            memory_limit_bytes: 1 << 20,
            cpu_period_us: 10,
            cpu_quota_us: 5,
            ..Default::default()
        });
        let own = spec.clone();
        apply(&handler, &mut spec);
        assert_eq!(spec, own);
    }

    #[test]
    fn an_unknown_handler_is_refused() {
        let handlers = Handlers::default();
        assert!(choose(&handlers, "").is_ok());
        let error = choose(&handlers, "gvisor").unwrap_err().to_string();
        assert!(error.starts_with("runtime_handler: there is no handler \"gvisor\""));
    }
}
