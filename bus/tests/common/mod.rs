//! A simulated broker and its nodes as a cluster of the contract suite.

use ringmain_bus::Bus;
use ringmain_bus::sim::{SimBroker, SimOptions, SimPort};
use ringmain_bus::suite::{Cluster, Faults, Late};
use ringmain_proto::time::Now;

/// Three nodes on virtual time.
pub(crate) struct Simulated {
    broker: SimBroker,
    ports: Vec<SimPort>,
    options: SimOptions,
    mono_ms: u64,
}

impl Simulated {
    pub(crate) fn new(options: SimOptions) -> Simulated {
        let (broker, ports) = SimBroker::new(&options, 3);
        Simulated { broker, ports, options, mono_ms: 1_000_000 }
    }
}

impl Cluster for Simulated {
    fn nodes(&self) -> usize {
        self.ports.len()
    }

    fn node(&mut self, node: usize) -> &mut dyn Bus {
        &mut self.ports[node]
    }

    fn now(&self) -> Now {
        Now { mono_ms: self.mono_ms, unix_ms: self.mono_ms }
    }

    /// To the next thing that is due, or the end of the nap. What a node that does not poll leaves undone
    /// does not hold time.
    fn pass(&mut self, ms_max: u64) {
        let deadlines = self.ports.iter().filter_map(Bus::next_deadline).chain(self.broker.next_deadline());
        let next = deadlines.filter(|due| *due > self.mono_ms).min();
        self.mono_ms = next.unwrap_or(u64::MAX).min(self.mono_ms + ms_max);
        self.broker.step(self.mono_ms);
    }

    fn run_id(&self) -> u64 {
        self.options.seed
    }

    fn record_bytes_max(&self) -> usize {
        self.options.record_bytes_max
    }
}

impl Late for Simulated {
    fn commands_max(&self) -> usize {
        self.options.commands_max
    }

    fn overrun_publications(&self) -> usize {
        self.options.pushes_max
    }
}

impl Faults for Simulated {
    fn kill_broker(&mut self) {
        self.broker.kill(self.mono_ms);
    }

    fn pause_broker(&mut self) {
        self.broker.pause();
    }

    fn restore_broker(&mut self) {
        self.broker.start();
    }

    fn wipe(&mut self) {
        self.broker.wipe();
    }

    fn stop_replication(&mut self) {
        self.broker.take_replica();
    }

    fn fail_over(&mut self) {
        self.broker.fail_over(self.mono_ms);
    }

    fn cut(&mut self, node: usize) {
        self.broker.cut(self.mono_ms, node);
    }

    fn isolate(&mut self, node: usize) {
        self.broker.isolate(self.mono_ms, node);
    }

    fn rejoin(&mut self, node: usize) {
        self.broker.rejoin(node);
    }

    fn lose_answers(&mut self, node: usize, count: u32) {
        self.broker.lose_answers(node, count);
    }

    fn lose_arrivals(&mut self, node: usize, count: u32) {
        self.broker.lose_arrivals(node, count);
    }
}
