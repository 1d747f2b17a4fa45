//! For those who watch: `/metrics`, health checks, and, on the control socket alone, `/status`.
//!
//! HTTP/1.1 by hyper, one request for each connection: nobody holds a place for longer than [`TIME_LIMIT`], whatever they
//! send or don't read.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::unistd::Pid;
use tokio::{sync::watch, time::timeout};
use tracing::debug;

use super::{Drain, Stream};
use crate::{
    config::Config,
    metrics::Service,
    monitor::History,
    pipeline::Pipeline,
    status::{Status, Worker},
};

/// Connections at a time, for each socket. A Prometheus server or a load balancer has one.
pub(super) const MAX_CONNECTIONS: usize = 32;

/// How long a connection may take, from accept to the last byte.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Longest request line and header, in bytes: the least that hyper allows.
const MAX_REQUEST_LENGTH: usize = 8192;

/// Most header fields of a request.
const MAX_FIELDS: usize = 64;

/// OpenMetrics 1.0.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// What can be seen.
pub(super) struct Watched {
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) settings: Arc<Config>,
    pub(super) history: watch::Receiver<History>,
    pub(super) drain: watch::Receiver<Option<Drain>>,
    pub(super) monitor: Pid,
    pub(super) started: SystemTime,
}

/// Answers one request.
pub(super) async fn serve(watched: Arc<Watched>, service: Service, stream: Stream) {
    let answer = service_fn(|request: Request<Incoming>| {
        let response = watched.respond(service, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_REQUEST_LENGTH)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(TIME_LIMIT, connection).await {
        Ok(Ok(())) => (),
        Ok(Err(error)) => debug!(interface = service.as_str(), "request: {error}"),
        Err(_) => debug!(interface = service.as_str(), "connection closed: it takes too long"),
    }
}

impl Watched {
    fn respond(&self, service: Service, method: &Method, path: &str) -> Response<String> {
        let found = match (path, service) {
            ("/metrics", _) => match self.pipeline.metrics().encode() {
                Ok(text) => response(StatusCode::OK, OPEN_METRICS, text),
                Err(_) => response(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, String::new()),
            },
            ("/healthz", _) => response(StatusCode::OK, PLAIN, "alive\n".into()),
            ("/readyz", _) if self.is_draining() => {
                response(StatusCode::SERVICE_UNAVAILABLE, PLAIN, "draining\n".into())
            }
            ("/readyz", _) => response(StatusCode::OK, PLAIN, "ready\n".into()),
            ("/status", Service::Control) => match serde_json::to_string(&self.status()) {
                Ok(text) => response(StatusCode::OK, JSON, text),
                Err(_) => response(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, String::new()),
            },
            _ => return response(StatusCode::NOT_FOUND, PLAIN, "not found\n".into()),
        };
        if [Method::GET, Method::HEAD].contains(method) {
            return found;
        }
        let mut refused = response(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "method not allowed\n".into());
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        refused
    }

    /// Whether the daemon is about to end. A worker that leaves to another still answers who asked before.
    fn is_draining(&self) -> bool {
        self.drain.borrow().is_some_and(|drain| !drain.connections)
    }

    fn status(&self) -> Status {
        let worker = Worker {
            monitor: self.monitor,
            started: self.started,
            is_draining: self.is_draining(),
            watchers_limit: MAX_CONNECTIONS,
        };
        Status::new(&self.settings, &self.pipeline, &self.history.borrow(), worker)
    }
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
