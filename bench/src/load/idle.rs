//! Idle: connections that are there, each with its subscription, and receive one publication.

use super::net::{Net, State};
use super::openings::Openings;
use super::scenario::{Incoming, Scenario};
use crate::io::board::Phase;
use crate::measure::schedule::Schedule;
use crate::plan::{Channels, IdlePlan, WorkerReport};
use crate::wire::centrifuge::{ID_FIRST, publish_own_template, publish_template};
use crate::wire::template::Template;

/// Publications a second when every connection publishes to its own channel.
const PUBLICATIONS_PER_S: f64 = 5_000.0;

pub(crate) struct Idle {
    plan: IdlePlan,
    openings: Openings,
    template: Option<Template>,
    first: u64,
    received: Vec<bool>,
    units: u64,
    schedule: Option<Schedule>,
    next: usize,
    scratch: Vec<u8>,
}

impl Idle {
    pub(crate) fn new(plan: IdlePlan, openings: Openings, first: u64, count: usize) -> Idle {
        let template = match &plan.channels {
            Channels::Own(prefix) => Some(publish_own_template(prefix, plan.size)),
            Channels::Shared(channel) => Some(publish_template(channel, plan.size)),
            Channels::None => None,
        };
        Idle {
            template: template.filter(|_| plan.publish),
            plan,
            openings,
            first,
            received: vec![false; count],
            units: 0,
            schedule: None,
            next: 0,
            scratch: Vec::new(),
        }
    }

    /// How many connections publish: each to its own channel, or the very first to the shared one.
    fn publishers(&self) -> usize {
        match self.plan.channels {
            Channels::Own(_) => self.received.len(),
            Channels::Shared(_) => usize::from(self.first == 0),
            Channels::None => 0,
        }
    }

    fn publish(&mut self, net: &mut Net, index: usize) {
        let Some(template) = &self.template else { return };
        let number = self.first + index as u64;
        self.scratch.clear();
        match self.plan.channels {
            Channels::Own(_) => template.append(&mut self.scratch, &[ID_FIRST, number]),
            Channels::Shared(_) | Channels::None => template.append(&mut self.scratch, &[ID_FIRST]),
        }
        net.send(index, &self.scratch);
    }
}

impl Scenario for Idle {
    fn opening(&mut self, index: usize, out: &mut Vec<u8>) -> u32 {
        let number = self.first + index as u64;
        self.openings.append(number, self.plan.channels.of(number).as_deref(), out)
    }

    fn message(&mut self, net: &mut Net, index: usize, incoming: Incoming) {
        match incoming {
            Incoming::Publication { .. } if !self.received[index] => {
                self.received[index] = true;
                self.units += 1;
            }
            Incoming::Publication { .. } => net.problem("a publication twice"),
            Incoming::Reply { error: Some(code) } => {
                net.problem(&format!("a publish was refused with error {code}"));
            }
            Incoming::Reply { error: None } | Incoming::Pong => {}
        }
    }

    fn phase(&mut self, net: &mut Net, phase: Phase) {
        if phase == Phase::Measure && self.template.is_some() {
            self.schedule = Some(Schedule::new(net.now_ns(), PUBLICATIONS_PER_S));
        }
    }

    fn turn(&mut self, net: &mut Net) -> Option<u64> {
        while self.next < self.publishers() {
            let due = self.schedule.as_mut()?.take_due(net.now_ns());
            if due.is_none() {
                return self.schedule.as_ref().map(Schedule::next_ns);
            }
            if net.state(self.next) == State::Open {
                self.publish(net, self.next);
            }
            self.next += 1;
        }
        None
    }

    fn units(&self) -> u64 {
        self.units
    }

    fn report(&mut self, report: &mut WorkerReport) {
        report.heard.request_bytes = self.template.as_ref().map_or(0, Template::wire_bytes);
    }
}
