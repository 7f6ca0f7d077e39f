//! The embedded bus passes the contract suite: one node, answers inline.

use ringmain_bus::Bus;
use ringmain_bus::memory::{EmbeddedBus, MemoryOptions};
use ringmain_bus::suite::Cluster;
use ringmain_proto::time::Now;

struct Alone {
    bus: EmbeddedBus,
    mono_ms: u64,
}

const OPTIONS: MemoryOptions = MemoryOptions::new(7);

impl Cluster for Alone {
    fn nodes(&self) -> usize {
        1
    }

    fn node(&mut self, _: usize) -> &mut dyn Bus {
        &mut self.bus
    }

    fn now(&self) -> Now {
        Now { mono_ms: self.mono_ms, unix_ms: self.mono_ms }
    }

    fn pass(&mut self, ms_max: u64) {
        self.mono_ms += ms_max;
    }

    fn run_id(&self) -> u64 {
        1
    }

    fn record_bytes_max(&self) -> usize {
        OPTIONS.record_bytes_max
    }
}

ringmain_bus::contract_suite!(Alone { bus: EmbeddedBus::new(&OPTIONS), mono_ms: 1_000_000 });
