//! What monitoring asks over HTTP, on a port of its own: `/metrics`, `/healthz` and `/readyz`.

use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use clutch_server::metrics::Watch;
use tokio::{net::TcpListener, task::JoinHandle};

use crate::output::talk;

/// The format that is answered.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers until it is dropped.
pub(crate) struct Monitored {
    watch: Arc<OnceLock<Watch>>,
    serving: Option<JoinHandle<()>>,
}

impl Drop for Monitored {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

/// Listens, where an address is given, and says of the node that it starts.
pub(crate) async fn listen(address: Option<&str>) -> Result<Monitored> {
    let watch = Arc::new(OnceLock::new());
    let Some(address) = address else { return Ok(Monitored { watch, serving: None }) };
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("listen on {address} for metrics"))?;
    let at = listener.local_addr()?;
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(watch.clone());
    let serving = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!(%error, "metrics are not served any more");
        }
    });
    talk!("clutch: metrics on http://{at}/metrics");
    Ok(Monitored { watch, serving: Some(serving) })
}

impl Monitored {
    /// From now on it is asked of this node.
    pub(crate) fn of(&self, watch: Watch) {
        // A process has one node.
        let _ = self.watch.set(watch);
    }
}

async fn metrics(State(watch): State<Arc<OnceLock<Watch>>>) -> impl IntoResponse {
    match watch.get() {
        Some(watch) => (StatusCode::OK, [(CONTENT_TYPE, OPEN_METRICS)], watch.text().await),
        None => (StatusCode::SERVICE_UNAVAILABLE, [(CONTENT_TYPE, "text/plain")], "starting\n".into()),
    }
}

async fn ready(State(watch): State<Arc<OnceLock<Watch>>>) -> impl IntoResponse {
    let reasons = match watch.get() {
        Some(watch) => watch.unready().await,
        None => vec!["starting".into()],
    };
    match reasons.is_empty() {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n"),
    }
}
