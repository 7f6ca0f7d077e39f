//! `/metrics`: the figures of the node in the OpenMetrics text format.
//!
//! Owns names and labels: everything starts with `ringmain_`, a shard's figures carry `shard` and
//! where they need it `reason`. No user, channel or id is ever a label. Shards count by themselves;
//! here their published figures are only read.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::control::VERSION;
use crate::control::cluster::Figures;
use crate::control::router::Router;
use crate::control::state::NodeState;
use crate::core::metrics::{Kind, METRICS, MetricInfo};
use crate::io::{BUCKET_BOUNDS_US, HistogramSnapshot, ShardMetrics, WIRE_METRICS};

/// The format's `Content-Type`.
pub(super) const CONTENT_TYPE_TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the buckets of API calls, in seconds.
const CALL_BOUNDS_S: [f64; 12] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0];

type Labels = [(&'static str, String); 1];

/// Everything that `/metrics` shows.
pub struct Metrics {
    registry: Registry,
    calls: Family<Labels, Histogram>,
    errors: Family<Labels, Counter>,
    refused: Family<Labels, Counter>,
}

impl Metrics {
    /// The metrics of a node with these shards, in the order of their numbers.
    pub fn new(node: Arc<NodeState>, router: Arc<Router>, shards: Vec<Arc<ShardMetrics>>) -> Self {
        let mut registry = Registry::with_prefix("ringmain");
        let calls = Family::<Labels, Histogram>::new_with_constructor(|| Histogram::new(CALL_BOUNDS_S));
        let (errors, refused) = (Family::default(), Family::default());
        registry.register("build", "Version of the node", Info::new([("version", VERSION)]));
        registry.register("api_call_duration_seconds", "Calls of the server API, by method", calls.clone());
        registry.register(
            "api_errors",
            "Calls of the server API answered with an error, by code",
            errors.clone(),
        );
        registry.register(
            "api_refused",
            "Requests to the server API refused before the call, by reason",
            refused.clone(),
        );
        registry.register_collector(Box::new(ShardFigures(shards)));
        registry.register_collector(Box::new(ClusterFigures(router.clone())));
        registry.register_collector(Box::new(BusFigures(node.clone())));
        registry.register_collector(Box::new(ProcessFigures { node, router }));
        Self { registry, calls, errors, refused }
    }

    /// Counts a call of the API. `method` is one of the known ones.
    pub fn called(&self, method: &str, duration: Duration) {
        self.calls.get_or_create(&[("method", method.to_owned())]).observe(duration.as_secs_f64());
    }

    /// Counts an error object.
    pub fn error(&self, code: u32) {
        self.errors.get_or_create(&[("code", code.to_string())]).inc();
    }

    /// Counts a request that was not carried out.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&[("reason", reason.to_owned())]).inc();
    }

    /// The text of `/metrics`.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

/// The figures that shards publish.
struct ShardFigures(Vec<Arc<ShardMetrics>>);

impl fmt::Debug for ShardFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShardFigures({} shards)", self.0.len())
    }
}

impl Collector for ShardFigures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let values: Vec<Vec<u64>> = self.0.iter().map(|shard| shard.values()).collect();
        for family in METRICS.chunk_by(|one, next| one.family == next.family) {
            encode_family(&mut encoder, family, &values)?;
        }
        for (metric, family, help) in WIRE_METRICS {
            let mut encoder = encoder.encode_descriptor(family, help, None, MetricType::Counter)?;
            for (shard, figures) in self.0.iter().enumerate() {
                let labels = [("shard", shard.to_string())];
                ConstCounter::new(figures.wire(*metric)).encode(encoder.encode_family(&labels)?)?;
            }
        }
        let turn = "How long turns of the shard's loop took, sleep excluded";
        self.encode_histogram(&mut encoder, "turn_duration_seconds", turn, |shard| shard.turn())?;
        let delay = "How late the shard's loop served a timer or its doorbell";
        self.encode_histogram(&mut encoder, "loop_delay_seconds", delay, |shard| shard.delay())
    }
}

/// One family of the core's metrics: all its reasons on all shards.
fn encode_family(
    encoder: &mut DescriptorEncoder<'_>,
    family: &[MetricInfo],
    values: &[Vec<u64>],
) -> Result<(), fmt::Error> {
    let MetricInfo { family: name, help, kind, .. } = family[0];
    let metric_type = match kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
    };
    let mut encoder = encoder.encode_descriptor(name, help, None, metric_type)?;
    for (shard, values) in values.iter().enumerate() {
        for info in family {
            let value = values[info.metric as usize];
            let mut labels = vec![("shard", shard.to_string())];
            if !info.label.is_empty() {
                labels.push(("reason", info.label.to_owned()));
            }
            let encoder = encoder.encode_family(&labels)?;
            match kind {
                Kind::Counter => ConstCounter::new(value).encode(encoder)?,
                Kind::Gauge => ConstGauge::new(signed(value)).encode(encoder)?,
            }
        }
    }
    Ok(())
}

impl ShardFigures {
    fn encode_histogram(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        of: impl Fn(&ShardMetrics) -> HistogramSnapshot,
    ) -> Result<(), fmt::Error> {
        let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (shard, figures) in self.0.iter().enumerate() {
            let snapshot = of(figures);
            let bounds = BUCKET_BOUNDS_US.iter().map(|bound| *bound as f64 / 1e6).chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(snapshot.counts.iter().copied()).collect();
            let labels = [("shard", shard.to_string())];
            let sum_s = snapshot.sum_us as f64 / 1e6;
            let mut encoder = encoder.encode_family(&labels)?;
            encoder.encode_histogram::<NoLabelSet>(sum_s, snapshot.count(), &buckets, None)?;
        }
        Ok(())
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The figures of the cluster's services, where the node is part of one.
struct ClusterFigures(Arc<Router>);

impl fmt::Debug for ClusterFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterFigures")
    }
}

impl Collector for ClusterFigures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(cluster) = self.0.cluster() else { return Ok(()) };
        let figures = cluster.figures();
        let peers = ConstGauge::new(signed(figures.peers));
        let help = "Other nodes that live";
        peers.encode(encoder.encode_descriptor("cluster_peers", help, None, MetricType::Gauge)?)?;
        for family in Figures::COUNTERS.chunk_by(|one, next| one.0 == next.0) {
            let (name, _, help, value) = family[0];
            let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            if let [(_, "", ..)] = family {
                ConstCounter::new(value(&figures)).encode(encoder)?;
                continue;
            }
            for (_, reason, _, value) in family {
                let labels = [("reason", *reason)];
                ConstCounter::new(value(&figures)).encode(encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What the hub of a broker counts; nothing where the bus is embedded.
struct BusFigures(Arc<NodeState>);

impl fmt::Debug for BusFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BusFigures")
    }
}

impl Collector for BusFigures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(figures) = self.0.bus_figures() else { return Ok(()) };
        let counters = [
            ("bus_publishes", "Publications sent to the broker", figures.publishes),
            (
                "bus_publishes_unknown",
                "Publishes of which nobody knows whether they were accepted",
                figures.unknown,
            ),
            ("bus_arrivals", "Publications from the broker, given to shards", figures.arrivals),
            (
                "bus_arrivals_refused",
                "Publications that a full shard did not take, read again later",
                figures.refused,
            ),
            ("bus_arrivals_stale", "Publications of a master that was replaced, dropped", figures.stale),
            ("bus_gaps", "Channels told that publications may be missing", figures.gaps),
            ("bus_epoch_changes", "Channels told that their positions are void", figures.epochs_changed),
            ("bus_reads", "Reads of history asked for", figures.reads),
            ("bus_reads_sent", "Reads of history sent to the broker for them", figures.reads_sent),
            ("bus_losses", "Parts of the broker that were lost", figures.losses),
        ];
        for (name, help, value) in counters {
            let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(counter)?;
        }
        Ok(())
    }
}

/// The figures of the process.
struct ProcessFigures {
    node: Arc<NodeState>,
    router: Arc<Router>,
}

impl fmt::Debug for ProcessFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProcessFigures")
    }
}

impl Collector for ProcessFigures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let memory = memory_of(&fs::read_to_string("/proc/self/statm").unwrap_or_default());
        let gauges = [
            ("ready", "1 while the node takes connections", u64::from(self.node.not_ready().is_empty())),
            ("uptime_seconds", "Seconds since the start", self.node.uptime().as_secs()),
            ("api_calls_under_way", "Calls that wait for shards", self.router.calls() as u64),
            ("process_resident_memory_bytes", "Resident memory", memory.resident_bytes),
            (
                "process_private_memory_bytes",
                "Resident memory that is not shared with files",
                memory.private_bytes,
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(signed(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct ProcessMemory {
    resident_bytes: u64,
    private_bytes: u64,
}

/// Reads `/proc/self/statm` (proc(5)): pages of total, resident, shared, …
fn memory_of(statm: &str) -> ProcessMemory {
    let page_bytes = rustix::param::page_size() as u64;
    let field = |index: usize| statm.split_whitespace().nth(index)?.parse::<u64>().ok();
    let (Some(resident), Some(shared)) = (field(1), field(2)) else { return ProcessMemory::default() };
    ProcessMemory {
        resident_bytes: resident * page_bytes,
        private_bytes: resident.saturating_sub(shared) * page_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_stand_together_so_that_each_has_one_descriptor() {
        let mut seen = std::collections::BTreeSet::new();
        for family in METRICS.chunk_by(|one, next| one.family == next.family) {
            assert!(seen.insert(family[0].family), "{} is in two places", family[0].family);
            assert!(family.iter().all(|info| info.kind == family[0].kind && info.help == family[0].help));
            let labels: std::collections::BTreeSet<_> = family.iter().map(|info| info.label).collect();
            assert_eq!(labels.len(), family.len(), "{}: a reason twice", family[0].family);
        }
        for (_, family, _) in WIRE_METRICS {
            assert!(seen.insert(family), "{family} is in two places");
        }
    }

    #[test]
    fn memory_is_read_from_statm() {
        let page_bytes = rustix::param::page_size() as u64;
        let expected = ProcessMemory { resident_bytes: 100 * page_bytes, private_bytes: 60 * page_bytes };
        assert_eq!(memory_of("1000 100 40 1 0 1 0\n"), expected);
        assert_eq!(memory_of(""), ProcessMemory::default());
    }
}
