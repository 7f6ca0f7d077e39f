//! Latency histograms: recorded in the load processes, carried over as (value, count) pairs, merged by the parent.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest latency told apart, in nanoseconds; a longer one counts as this long.
const LATENCY_NS_MAX: u64 = 120_000_000_000;
/// Decimal digits kept of every value.
const SIGNIFICANT_DIGITS: u8 = 3;

/// A histogram of nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

/// A histogram on its way from one process to another.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recorded(Vec<(u64, u64)>);

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) count: u64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
}

impl Latencies {
    pub(crate) fn new() -> Latencies {
        let histogram = Histogram::new_with_max(LATENCY_NS_MAX, SIGNIFICANT_DIGITS);
        Latencies(histogram.expect("constant bounds that the crate documents as valid"))
    }

    pub(crate) fn record_ns(&mut self, ns: u64) {
        self.0.saturating_record(ns);
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn recorded(&self) -> Recorded {
        Recorded(
            self.0.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect(),
        )
    }

    pub(crate) fn add(&mut self, recorded: &Recorded) {
        for &(value, count) in &recorded.0 {
            self.0.saturating_record_n(value, count);
        }
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        let us = |quantile: f64| self.0.value_at_quantile(quantile) as f64 / 1e3;
        Percentiles {
            count: self.0.len(),
            p50_us: us(0.5),
            p90_us: us(0.9),
            p99_us: us(0.99),
            p999_us: us(0.999),
            max_us: self.0.max() as f64 / 1e3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_way_between_processes() {
        let (mut one, mut two) = (Latencies::new(), Latencies::new());
        (1..=1000).for_each(|us| one.record_ns(us * 1000));
        two.record_ns(u64::MAX);
        let mut merged = Latencies::new();
        merged.add(&one.recorded());
        merged.add(&two.recorded());
        let percentiles = merged.percentiles();
        assert_eq!(percentiles.count, 1001);
        assert!((percentiles.p50_us - 500.0).abs() / 500.0 < 0.005, "{percentiles:?}");
        assert!((percentiles.p99_us - 990.0).abs() / 990.0 < 0.005, "{percentiles:?}");
        assert!((percentiles.max_us - 1.2e8).abs() / 1.2e8 < 0.002, "{percentiles:?}");
    }
}
