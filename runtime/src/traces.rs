//! Traces: calls of the socket and their stages ([`hull_base::stages`]), for a collector of OpenTelemetry (OTLP over
//! gRPC). A call belongs to its caller's trace, as kubelet says in its head (W3C trace context).
//!
//! No call waits for the collector: a thread sends what is over, from a queue of bounded length, and what finds
//! it full is lost.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::HeaderMap;
use hull_base::blocking;
use nix::sys::utsname::uname;
use opentelemetry::{
    Context, KeyValue, global,
    propagation::{Extractor, TextMapPropagator},
    trace::{FutureExt, SpanBuilder, SpanKind, Status, TraceContextExt},
};
use opentelemetry_otlp::{ExporterBuildError, RetryPolicy, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, SpanData, SpanExporter,
    },
};
use tonic::{Code, transport::Endpoint};
use tracing::{info, warn};

/// Most spans that wait to be sent. A start of a pod has some thirty.
const QUEUE: usize = 4096;
/// Most spans of a message.
const BATCH: usize = 512;
/// How long spans wait for others.
const DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take for a message, retries included.
const SEND: Duration = Duration::from_secs(10);
/// How long the end of the daemon may take for what is left.
const LAST: Duration = Duration::from_secs(2);
/// Longest name of a method.
const PATH_MAX: usize = 128;
/// The head that names the caller's trace and span.
const PARENT: &str = "traceparent";

/// The export of traces.
#[derive(Debug)]
pub(crate) struct Traces(SdkTracerProvider);

impl Traces {
    /// Exports to this collector from now on. It is connected to when there is something to send.
    ///
    /// # Errors
    /// When the exporter can't be made; not when there is no collector.
    pub(crate) fn start(endpoint: Endpoint) -> Result<Self, ExporterBuildError> {
        let channel = endpoint.connect_timeout(SEND).timeout(SEND).connect_lazy();
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(SEND)
            .with_retry_policy(RetryPolicy::recommended())
            .build()?;
        let exporter = Told {
            exporter,
            fails: AtomicBool::new(false),
        };
        let queue = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY)
            .build();
        let queue = BatchSpanProcessor::builder(exporter).with_batch_config(queue);
        let daemon = Resource::builder_empty()
            .with_service_name("hull")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        let host = host_name().map(|name| KeyValue::new("host.name", name));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(queue.build())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
            .with_resource(daemon.with_attributes(host).build())
            .build();
        global::set_tracer_provider(provider.clone());
        Ok(Self(provider))
    }

    /// Sends what is left, if the collector takes it soon.
    pub(crate) async fn end(self) {
        let ended = blocking(move || self.0.shutdown_with_timeout(LAST)).await;
        if let Err(reason) = ended {
            warn!(%reason, "the last traces are lost");
        }
    }
}

fn host_name() -> Option<String> {
    let system = uname().ok()?;
    Some(system.nodename().to_str()?.to_owned())
}

/// An exporter that says when it begins to fail, and when it does no more.
#[derive(Debug)]
struct Told<E> {
    exporter: E,
    fails: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Told<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let failed = self.fails.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(reason) if !failed => {
                warn!(%reason, "the collector takes no traces: they are lost")
            }
            Ok(()) if failed => info!("the collector takes traces again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// A call, for its trace, until it is dropped.
#[derive(Debug)]
pub(crate) struct Call {
    context: Context,
    code: Code,
}

impl Call {
    /// A call with this path and head; none, if it is not traced: its caller's trace is not, or it is in none and
    /// only asks how things are, as kubelet does all the time.
    pub(crate) fn begin(path: &str, head: &HeaderMap) -> Option<Self> {
        let name = path
            .strip_prefix('/')
            .filter(|name| name.len() < PATH_MAX)?;
        let (service, method) = name.split_once('/')?;
        let parent =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &Head(head));
        if !parent.has_active_span() && only_asks(method) {
            return None;
        }
        let attributes = [
            KeyValue::new("rpc.system", "grpc"),
            KeyValue::new("rpc.service", service.to_owned()),
            KeyValue::new("rpc.method", method.to_owned()),
        ];
        let span = SpanBuilder::from_name(name.to_owned())
            .with_kind(SpanKind::Server)
            .with_attributes(attributes);
        let span = span.start_with_context(&global::tracer("hull"), &parent);
        Some(Self {
            context: Context::new().with_span(span),
            // The client is gone before it is answered.
            code: Code::Cancelled,
        })
    }

    /// Does its work.
    pub(crate) fn of<T>(&self, work: impl Future<Output = T>) -> impl Future<Output = T> {
        work.with_context(self.context.clone())
    }

    /// It was answered.
    pub(crate) fn answered(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let span = self.context.span();
        span.set_attribute(KeyValue::new(
            "rpc.grpc.status_code",
            i64::from(i32::from(self.code)),
        ));
        // What is the client's fault, as a name that is not there, is no error of ours.
        let is_ours = matches!(
            self.code,
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unimplemented
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss
        );
        if is_ours {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

/// Whether a method changes nothing.
fn only_asks(method: &str) -> bool {
    let asks = [
        "List",
        "Stream",
        "GetContainerEvents",
        "Version",
        "RuntimeConfig",
    ];
    let about = ["Status", "Stats", "FsInfo"];
    asks.iter().any(|start| method.starts_with(start))
        || about.iter().any(|end| method.ends_with(end))
}

/// Of the head, the one that names the parent, if it is there once. What vendors add has no use here.
struct Head<'a>(&'a HeaderMap);

impl Extractor for Head<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let mut values = self.0.get_all(key).iter();
        match (key, values.next(), values.next()) {
            (PARENT, Some(only), None) => only.to_str().ok(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![PARENT]
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_parent_is_one_that_makes_sense() {
        const ONE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = |heads: &[&[u8]]| {
            let mut map = HeaderMap::new();
            for head in heads {
                map.append(PARENT, HeaderValue::from_bytes(head).unwrap());
            }
            map.insert("tracestate", HeaderValue::from_static("vendor=secret"));
            let context =
                TraceContextPropagator::new().extract_with_context(&Context::new(), &Head(&map));
            context
                .has_active_span()
                .then(|| context.span().span_context().clone())
        };
        let found = parent(&[ONE.as_bytes()]).unwrap();
        assert_eq!(found.span_id().to_string(), "00f067aa0ba902b7");
        assert!(found.is_sampled() && found.is_remote());
        assert_eq!(found.trace_state().header(), "");
        let long = [b'0'; 10_000];
        for wrong in [
            &[][..],
            &[ONE.as_bytes(), ONE.as_bytes()],
            &[b""],
            &[b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"],
            &[b"00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
            &[b"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"],
            &[b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
            &[b"\xff\xfe-------"],
            &[&long],
        ] {
            assert_eq!(parent(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_kubelet_asks_all_the_time_begins_no_trace() {
        for method in [
            "ListPodSandbox",
            "ContainerStatus",
            "Status",
            "StreamContainers",
            "ImageFsInfo",
        ] {
            let path = format!("/runtime.v1.RuntimeService/{method}");
            assert!(Call::begin(&path, &HeaderMap::new()).is_none(), "{method}");
        }
        for method in ["RunPodSandbox", "StopContainer", "ExecSync", "PullImage"] {
            let path = format!("/runtime.v1.RuntimeService/{method}");
            assert!(Call::begin(&path, &HeaderMap::new()).is_some(), "{method}");
        }
        for path in ["", "/", "/x", &format!("/x/{}", "y".repeat(500))] {
            assert!(Call::begin(path, &HeaderMap::new()).is_none(), "{path}");
        }
    }
}
