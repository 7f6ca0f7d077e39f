//! The admin port: the server API, health, readiness and metrics over HTTP/1.1.
//!
//! Owns paths, status codes, bodies and their limits. What calls mean is in `methods`; who may call
//! in `auth`. Nothing here is on the way of a frame between two connections.
//!
//! Bounds: `admin.inflight_max` calls, `admin.request_pool_bytes` of bodies, `admin.connections_max`
//! connections, [`BODY_TIMEOUT`] to send a body; beyond them 503, 408 or a wait in the kernel.
//!
//! Shapes are those of Centrifugo's HTTP API, see `centrifugal.dev/docs/server/server_api`.

mod auth;
pub mod listener;
mod methods;
mod metrics;
mod requests;
mod results;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router as HttpRouter;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};

pub use auth::Access;
pub use methods::{IDEMPOTENCY_KEY_BYTES_MAX, ITEMS_MAX, PARALLEL_MAX};
pub use metrics::Metrics;

use self::methods::{MethodError, Methods};
use self::results::Outcome;
use super::VERSION;
use super::cluster::{PlaceError, Placement};
use super::config::AdminConfig;
use super::router::Router;
use super::state::NodeState;
use crate::core::config::CoreConfig;
use crate::io::ShardMetrics;

/// How long a body may take to arrive.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes that one permit of the body pool stands for.
const POOL_UNIT_BYTES: u64 = 1_024;

/// What the admin port is made of.
pub struct AdminOptions {
    /// Who may call the API.
    pub access: Access,
    /// Its limits.
    pub config: AdminConfig,
    /// For the rules about channels.
    pub core: Arc<CoreConfig>,
    /// The way to the shards.
    pub router: Arc<Router>,
    /// The node's phase and names.
    pub node: Arc<NodeState>,
    /// Figures of the shards, in the order of their numbers.
    pub shards: Vec<Arc<ShardMetrics>>,
}

struct Admin {
    access: Access,
    request_bytes_max: usize,
    pool: Semaphore,
    inflight: Semaphore,
    methods: Methods,
    node: Arc<NodeState>,
    metrics: Metrics,
}

/// The admin port's paths.
pub fn routes(options: AdminOptions) -> HttpRouter {
    let AdminOptions { access, config, core, router, node, shards } = options;
    let pool_units = usize::try_from(config.request_pool_bytes / POOL_UNIT_BYTES).unwrap_or(usize::MAX);
    let admin = Arc::new(Admin {
        access,
        request_bytes_max: config.request_bytes_max as usize,
        pool: Semaphore::new(pool_units.min(Semaphore::MAX_PERMITS)),
        inflight: Semaphore::new(config.inflight_max as usize),
        metrics: Metrics::new(node.clone(), router.clone(), shards),
        methods: Methods { router, config: core, node: node.clone() },
        node,
    });
    HttpRouter::new()
        .route("/api/{method}", post(api))
        .route("/v1/place", get(place))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(render_metrics))
        .with_state(admin)
}

fn json_response(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => (status, [(CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot write a response");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// A refusal before the call was understood: plain text, as Centrifugo answers.
fn refusal(status: StatusCode) -> Response {
    (status, format!("{}\n", status.canonical_reason().unwrap_or_default())).into_response()
}

/// Too much is under way, or the broker is lost; the same call may succeed in a moment.
fn try_again(error: MethodError) -> Response {
    let mut response = json_response(StatusCode::SERVICE_UNAVAILABLE, &Outcome::Error(error.object()));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

async fn api(
    State(admin): State<Arc<Admin>>,
    Path(method): Path<String>,
    request: Request<Body>,
) -> Response {
    let known = method == "batch" || requests::METHODS.contains(&method.as_str());
    if !admin.access.allows(request.headers()) {
        admin.metrics.refused("unauthorized");
        return refusal(StatusCode::UNAUTHORIZED);
    }
    if !known {
        admin.metrics.refused("unknown_method");
        return refusal(StatusCode::NOT_FOUND);
    }
    let started = Instant::now();
    let response = match admin.inflight.try_acquire() {
        Ok(_permit) => admin.answer(&method, request).await,
        Err(_) => {
            admin.metrics.refused("busy");
            try_again(MethodError::Busy)
        }
    };
    admin.metrics.called(&method, started.elapsed());
    response
}

impl Admin {
    async fn answer(&self, method: &str, request: Request<Body>) -> Response {
        let (_held, body) = match self.body(request).await {
            Ok(body) => body,
            Err(response) => return response,
        };
        if method == "batch" {
            return self.answer_batch(&body).await;
        }
        let request = match requests::Request::parse(method, &body) {
            Some(Ok(request)) => request,
            Some(Err(error)) => return self.bad_json(method, &error),
            None => return refusal(StatusCode::NOT_FOUND),
        };
        match self.methods.call(request).await {
            Ok(result) => json_response(StatusCode::OK, &Outcome::Result(result)),
            Err(error) => self.failed(error),
        }
    }

    async fn answer_batch(&self, body: &[u8]) -> Response {
        let batch = match serde_json::from_slice(body) {
            Ok(batch) => batch,
            Err(error) => return self.bad_json("batch", &error),
        };
        match self.methods.batch(batch).await {
            Ok(replies) => json_response(StatusCode::OK, &replies),
            Err(error) => self.failed(error),
        }
    }

    fn failed(&self, error: MethodError) -> Response {
        let object = error.object();
        self.metrics.error(object.code);
        match error {
            MethodError::Busy | MethodError::Unavailable => try_again(error),
            MethodError::Code(_) => json_response(StatusCode::OK, &Outcome::Error(object)),
        }
    }

    fn bad_json(&self, method: &str, error: &serde_json::Error) -> Response {
        self.metrics.refused("bad_json");
        // The position only: the text may hold a payload.
        tracing::debug!(
            method,
            line = error.line(),
            column = error.column(),
            "a body is not what the method takes"
        );
        refusal(StatusCode::BAD_REQUEST)
    }

    /// Reads a body within its limit and the pool's.
    async fn body(&self, request: Request<Body>) -> Result<(SemaphorePermit<'_>, Bytes), Response> {
        let refuse = |reason: &'static str, response: Response| {
            self.metrics.refused(reason);
            response
        };
        let length = content_length(request.headers());
        if length.is_some_and(|length| length > self.request_bytes_max) {
            return Err(refuse("too_large", refusal(StatusCode::PAYLOAD_TOO_LARGE)));
        }
        // A body of unknown length may become as large as is allowed.
        let bytes = length.unwrap_or(self.request_bytes_max) as u64;
        let units = u32::try_from(bytes.div_ceil(POOL_UNIT_BYTES)).unwrap_or(u32::MAX);
        let Ok(held) = self.pool.try_acquire_many(units) else {
            return Err(refuse("busy", try_again(MethodError::Busy)));
        };
        let body = to_bytes(request.into_body(), self.request_bytes_max);
        match tokio::time::timeout(BODY_TIMEOUT, body).await {
            Ok(Ok(body)) => Ok((held, body)),
            Ok(Err(_)) => Err(refuse("too_large", refusal(StatusCode::PAYLOAD_TOO_LARGE))),
            Err(_) => Err(refuse("slow_body", refusal(StatusCode::REQUEST_TIMEOUT))),
        }
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[derive(Deserialize)]
struct PlaceQuery {
    user: String,
}

/// Where a user belongs, for an application's backend: 404 where the node is on its own or signs no tickets, 503
/// where no node takes users.
async fn place(
    State(admin): State<Arc<Admin>>,
    query: Result<Query<PlaceQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Response {
    if !admin.access.allows(&headers) {
        admin.metrics.refused("unauthorized");
        return refusal(StatusCode::UNAUTHORIZED);
    }
    let Ok(Query(PlaceQuery { user })) = query else { return refusal(StatusCode::BAD_REQUEST) };
    let Ok(_permit) = admin.inflight.try_acquire() else {
        admin.metrics.refused("busy");
        return try_again(MethodError::Busy);
    };
    match admin.methods.place(user).await {
        Some(Ok(Placement { node, address, ticket, expires })) => {
            let placed = results::Placed { node: &node, address: &address, ticket: &ticket, expires };
            json_response(StatusCode::OK, &placed)
        }
        Some(Err(PlaceError::Nowhere)) => try_again(MethodError::Busy),
        Some(Err(PlaceError::NoKey)) | None => refusal(StatusCode::NOT_FOUND),
    }
}

async fn health(State(admin): State<Arc<Admin>>) -> Response {
    let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let body = json!({
        "status": "ok",
        "timestamp": timestamp,
        "version": VERSION,
        "uptime": admin.node.uptime().as_secs(),
    });
    json_response(StatusCode::OK, &body)
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    let reasons = admin.node.not_ready();
    let (code, status) = match reasons {
        [] => (StatusCode::OK, "ready"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    };
    json_response(code, &json!({ "status": status, "reasons": reasons }))
}

async fn render_metrics(State(admin): State<Arc<Admin>>) -> Response {
    match admin.metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE_TEXT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot render the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
