//! How long calls take, and how they end, measured around the services, and their traces.

use std::{
    task::{Context, Poll},
    time::Instant,
};

use futures::future::{BoxFuture, FutureExt};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, combinators::MapFrame};
use hull_base::metrics;
use hyper::body::{Body, Frame};
use tonic::Code;
use tower::{Layer, Service};

use crate::traces::Call;

/// Measures the calls of the services below it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// Whether they are traced too.
    pub(crate) traced: bool,
}

/// A service that is measured.
#[derive(Debug, Clone)]
pub(crate) struct Timed<S> {
    service: S,
    traced: bool,
}

impl<S> Layer<S> for Times {
    type Service = Timed<S>;

    fn layer(&self, inner: S) -> Timed<S> {
        Timed {
            service: inner,
            traced: self.traced,
        }
    }
}

/// An answer whose end is noticed: it may be long behind its head.
type Noticed<B> =
    MapFrame<B, Box<dyn FnMut(Frame<<B as Body>::Data>) -> Frame<<B as Body>::Data> + Send>>;

impl<S, A, B> Service<Request<A>> for Timed<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: Body,
{
    type Response = Response<Noticed<B>>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (begun, path) = (Instant::now(), request.uri().path().to_owned());
        let call = self.traced.then(|| Call::begin(&path, request.headers()));
        let mut call = call.flatten();
        let answer = self.service.call(request);
        async move {
            let answer = match &call {
                Some(call) => call.of(answer).await?,
                None => answer.await?,
            };
            // Of an error it is in the head, of what succeeds behind the body.
            let known = code(answer.headers()).unwrap_or(Code::Ok);
            let (service, method) = names(&path, known);
            metrics::RPC.observe(&[service, method, &format!("{known:?}")], begun.elapsed());
            let mut tell = move |heads: &HeaderMap| {
                if let (Some(call), Some(code)) = (&mut call, code(heads)) {
                    call.answered(code);
                }
            };
            tell(answer.headers());
            Ok(answer.map(|body| {
                body.map_frame(Box::new(move |frame: Frame<B::Data>| {
                    frame.trailers_ref().into_iter().for_each(&mut tell);
                    frame
                }) as Box<dyn FnMut(_) -> _ + Send>)
            }))
        }
        .boxed()
    }
}

fn code(heads: &HeaderMap) -> Option<Code> {
    let code = heads.get("grpc-status")?;
    Some(Code::from_bytes(code.as_bytes()))
}

/// Service and method of a path, as `/runtime.v1.RuntimeService/Version`. What there is not has no name.
fn names(path: &str, code: Code) -> (&str, &str) {
    let mut parts = path.trim_start_matches('/').split('/');
    match (parts.next(), parts.next(), code) {
        (_, _, Code::Unimplemented) | (None, ..) | (_, None, _) => ("", "other"),
        (Some(service), Some(method), _) => (service, method),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_the_names_of_their_paths() {
        let version = "/runtime.v1.RuntimeService/Version";
        let named = ("runtime.v1.RuntimeService", "Version");
        assert_eq!(names(version, Code::Ok), named);
        assert_eq!(names(version, Code::NotFound), named);
        assert_eq!(names("/a/b", Code::Unimplemented), ("", "other"));
        assert_eq!(names("", Code::Ok), ("", "other"));
    }
}
