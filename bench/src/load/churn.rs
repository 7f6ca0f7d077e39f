//! Churn: connections that open, subscribe and close in good order, over and over.

use super::net::Net;
use super::openings::Openings;
use super::scenario::{Incoming, Scenario};
use crate::io::board::Phase;
use crate::measure::latency::Latencies;
use crate::plan::{ChurnPlan, WorkerReport};

/// Prepared openings, each of another user; used in turn.
const OPENINGS: usize = 1024;

pub(crate) struct Churn {
    /// Frames and the replies to expect; empty for a bare handshake.
    openings: Vec<(Vec<u8>, u32)>,
    next: usize,
    started_ns: Vec<u64>,
    running: bool,
    measuring: bool,
    latencies: Latencies,
    units: u64,
}

impl Churn {
    pub(crate) fn new(plan: &ChurnPlan, openings: &Openings, first: u64, count: usize) -> Churn {
        let prepare = |number: usize| {
            let mut frame = Vec::new();
            let replies = openings.append(first + number as u64, Some(&plan.channel), &mut frame);
            (frame, replies)
        };
        let openings = if plan.bare { Vec::new() } else { (0..OPENINGS).map(prepare).collect() };
        Churn {
            openings,
            next: 0,
            started_ns: vec![0; count],
            running: false,
            measuring: false,
            latencies: Latencies::new(),
            units: 0,
        }
    }

    fn start(&mut self, net: &mut Net, index: usize) {
        self.started_ns[index] = net.now_ns();
        net.want(index);
    }
}

impl Scenario for Churn {
    fn opening(&mut self, _index: usize, out: &mut Vec<u8>) -> u32 {
        if self.openings.is_empty() {
            return 0;
        }
        self.next = (self.next + 1) % self.openings.len();
        let (frame, replies) = &self.openings[self.next];
        out.extend_from_slice(frame);
        *replies
    }

    fn opened(&mut self, net: &mut Net, index: usize) {
        net.close(index);
    }

    fn message(&mut self, _net: &mut Net, _index: usize, _incoming: Incoming) {
        // A publication to the channel on its way while we close: of no interest here.
    }

    fn closed(&mut self, net: &mut Net, index: usize, clean: bool) {
        if clean {
            self.units += 1;
            if self.measuring {
                self.latencies.record_ns(net.now_ns().saturating_sub(self.started_ns[index]));
            }
        }
        if self.running {
            self.start(net, index);
        }
    }

    fn phase(&mut self, net: &mut Net, phase: Phase) {
        self.measuring = phase == Phase::Measure;
        self.running = matches!(phase, Phase::Warmup | Phase::Measure);
        match phase {
            Phase::Warmup => (0..self.started_ns.len()).for_each(|index| self.start(net, index)),
            Phase::Measure => self.latencies.clear(),
            Phase::Setup | Phase::Finish => {}
        }
    }

    fn units(&self) -> u64 {
        self.units
    }

    fn report(&mut self, report: &mut WorkerReport) {
        report.latencies = self.latencies.recorded();
    }
}
