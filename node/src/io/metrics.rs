//! What a shard shows of itself while it runs.
//!
//! Owns the memory through which the shard's loop publishes its figures, at most every
//! [`PUBLISH_INTERVAL_MS`], and how the control plane reads them. The loop counts in plain integers of
//! its own; only the copy is atomic. It knows no exposition format.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::core::metrics::{METRIC_COUNT, Values};

/// How often the loop copies its figures at the most, in milliseconds.
pub const PUBLISH_INTERVAL_MS: u64 = 100;

/// Upper bounds of the latency buckets in microseconds; one more bucket takes what is above.
pub const BUCKET_BOUNDS_US: [u64; 20] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000,
    500_000, 1_000_000, 5_000_000,
];

const BUCKETS: usize = BUCKET_BOUNDS_US.len() + 1;

/// Declares the counters of the wire: variant, metric family, help.
macro_rules! wire_metrics {
    ($($variant:ident = ($family:literal, $help:literal),)*) => {
        /// What the wire counts beside [`crate::core::metrics::Metric`]. All of them only grow.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum WireMetric { $(
            #[doc = $help]
            $variant,
        )* }

        /// Every counter of the wire with its family (without prefix and `_total`) and its help.
        pub const WIRE_METRICS: &[(WireMetric, &str, &str)] =
            &[ $( (WireMetric::$variant, $family, $help), )* ];
    };
}

wire_metrics! {
    Enters = ("ring_enters", "Calls of io_uring_enter"),
    Completions = ("ring_completions", "Completions handled"),
    Stale = ("ring_stale_completions", "Completions of a slot's earlier holder, dropped"),
    Overflows = ("ring_overflows", "Turns that found the completion queue overflown"),
    Naps = ("naps", "Short waits inside the ring"),
    Sleeps = ("sleeps", "Sleeps through the executor"),
    Rings = ("doorbell_rings", "Times that the shard was woken by its doorbell"),
    RecvStarved = ("recv_buffer_shortages", "Receives armed again because no buffer was free"),
    AcceptErrors = ("accept_errors", "Accepts that failed"),
    MeshBlocked = ("mesh_blocked", "Times that a batch waited for another shard's credit"),
    DiscardTimeouts = ("discard_timeouts", "Closings where the peer sent no FIN in time"),
    DiscardOverruns = ("discard_overruns", "Closings where the peer sent more than is discarded"),
    EffectsIgnored = ("effects_ignored", "Effects for a slot that was not open"),
}

const WIRE_COUNT: usize = WIRE_METRICS.len();

/// A shard's published figures. Shared with whoever renders them.
#[derive(Debug)]
pub struct ShardMetrics {
    values: Box<[AtomicU64]>,
    wire: [AtomicU64; WIRE_COUNT],
    turn: PublishedHistogram,
    delay: PublishedHistogram,
}

impl ShardMetrics {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            values: (0..METRIC_COUNT).map(|_| AtomicU64::new(0)).collect(),
            wire: [const { AtomicU64::new(0) }; WIRE_COUNT],
            turn: PublishedHistogram::new(),
            delay: PublishedHistogram::new(),
        })
    }

    /// The engine's values in the order of [`crate::core::metrics::METRICS`].
    pub fn values(&self) -> Vec<u64> {
        self.values.iter().map(|value| value.load(Ordering::Relaxed)).collect()
    }

    /// One of the engine's values.
    pub fn value(&self, metric: crate::core::metrics::Metric) -> u64 {
        self.values[metric as usize].load(Ordering::Relaxed)
    }

    /// One of the wire's counters.
    pub fn wire(&self, metric: WireMetric) -> u64 {
        self.wire[metric as usize].load(Ordering::Relaxed)
    }

    /// How long turns of the loop took, sleep excluded.
    pub fn turn(&self) -> HistogramSnapshot {
        self.turn.snapshot()
    }

    /// How late the loop served a timer or its doorbell.
    pub fn delay(&self) -> HistogramSnapshot {
        self.delay.snapshot()
    }

    pub(crate) fn publish(&self, values: &Values, own: &LoopFigures) {
        for (to, from) in self.values.iter().zip(values.as_slice()) {
            to.store(*from, Ordering::Relaxed);
        }
        for (to, from) in self.wire.iter().zip(own.wire) {
            to.store(from, Ordering::Relaxed);
        }
        self.turn.publish(&own.turn);
        self.delay.publish(&own.delay);
    }
}

/// A latency histogram as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// Observations per bucket of [`BUCKET_BOUNDS_US`], not cumulative; the last one is above all.
    pub counts: Vec<u64>,
    /// Sum of all observations in microseconds.
    pub sum_us: u64,
}

impl HistogramSnapshot {
    /// The number of observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper bound of the bucket that holds the `quantile` (0 to 1) of the observations, in
    /// microseconds; `None` without observations or above all bounds.
    pub fn quantile_us(&self, quantile: f64) -> Option<u64> {
        let rank = (self.count() as f64 * quantile).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (count, bound) in self.counts.iter().zip(BUCKET_BOUNDS_US) {
            seen += count;
            if seen >= rank {
                return Some(bound);
            }
        }
        None
    }
}

#[derive(Debug)]
struct PublishedHistogram {
    counts: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

impl PublishedHistogram {
    fn new() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BUCKETS], sum_us: AtomicU64::new(0) }
    }

    fn publish(&self, from: &Histogram) {
        for (to, from) in self.counts.iter().zip(from.counts) {
            to.store(from, Ordering::Relaxed);
        }
        self.sum_us.store(from.sum_ns / 1_000, Ordering::Relaxed);
    }

    fn snapshot(&self) -> HistogramSnapshot {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        HistogramSnapshot { counts, sum_us: self.sum_us.load(Ordering::Relaxed) }
    }
}

/// The loop's own histogram.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: [u64; BUCKETS],
    sum_ns: u64,
}

impl Histogram {
    fn new() -> Self {
        Self { counts: [0; BUCKETS], sum_ns: 0 }
    }

    /// Notes one observation.
    pub(crate) fn observe_ns(&mut self, ns: u64) {
        let bucket = BUCKET_BOUNDS_US.partition_point(|bound| bound * 1_000 < ns);
        self.counts[bucket] += 1;
        self.sum_ns += ns;
    }
}

/// What the loop counts of itself.
#[derive(Clone, Debug)]
pub(crate) struct LoopFigures {
    wire: [u64; WIRE_COUNT],
    /// Duration of turns.
    pub(crate) turn: Histogram,
    /// Lateness of timers and doorbells.
    pub(crate) delay: Histogram,
}

impl LoopFigures {
    pub(crate) fn new() -> Self {
        Self { wire: [0; WIRE_COUNT], turn: Histogram::new(), delay: Histogram::new() }
    }

    /// Adds `n` to a counter.
    pub(crate) fn add(&mut self, metric: WireMetric, n: u64) {
        self.wire[metric as usize] += n;
    }

    /// Sets a counter that is kept elsewhere.
    pub(crate) fn set(&mut self, metric: WireMetric, n: u64) {
        self.wire[metric as usize] = n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_fall_into_the_bucket_of_their_bound() {
        let check = |ns: u64, bucket: usize| {
            let mut histogram = Histogram::new();
            histogram.observe_ns(ns);
            assert_eq!(histogram.counts.iter().position(|&count| count == 1), Some(bucket), "{ns} ns");
        };
        check(0, 0);
        check(1_000, 0);
        check(1_001, 1);
        check(5_000_000_000, 19);
        check(5_000_000_001, 20);
    }

    #[test]
    fn quantiles_are_bounds_of_buckets() {
        let mut own = LoopFigures::new();
        for _ in 0..98 {
            own.turn.observe_ns(3_000);
        }
        own.turn.observe_ns(150_000);
        own.turn.observe_ns(10_000_000_000);
        let metrics = ShardMetrics::new();
        assert_eq!(metrics.turn().quantile_us(0.5), None);
        metrics.publish(&Values::default(), &own);
        let turn = metrics.turn();
        assert_eq!(turn.count(), 100);
        assert_eq!(turn.quantile_us(0.5), Some(5));
        assert_eq!(turn.quantile_us(0.99), Some(200));
        assert_eq!(turn.quantile_us(1.0), None);
    }
}
