//! Cross: publishers on one server, subscribers on another; every offset is checked.
//!
//! Publication number s of the run goes to channel s mod C, so the n-th of channel c is number n·C + c, and nothing
//! needs to be read from a delivery to know when it was meant to leave: a jump of the offset counts as so many lost,
//! where offsets are dense. Where they are not, only order is checked.
//! A channel has one publisher, so that its order is known. One process has all connections. It does not spin, so that
//! what it measures has the core: a timer wakes it, here as in [`super::bus`].

use super::net::{Net, State};
use super::openings::Openings;
use super::scenario::{Incoming, Scenario};
use crate::io::board::{IN_FLIGHT_MAX, Phase};
use crate::measure::latency::Latencies;
use crate::measure::schedule::Schedule;
use crate::plan::{CrossPlan, Pace, WorkerReport};
use crate::wire::centrifuge::{ID_END, ID_FIRST, own_channel, publish_own_template};
use crate::wire::template::Template;

/// Publications of one turn, so that deliveries are read in between.
const PUBLICATIONS_PER_TURN_MAX: u64 = 256;
/// Open loop: bytes of publications without an acknowledgement, for each publisher; half of what a connection may keep
/// unsent. Above it publications wait, and their latency counts the wait.
const UNACKNOWLEDGED_BYTES_MAX: u64 = 512 << 10;
/// The first publisher's user: a number that no subscriber has.
const PUBLISHER_NUMBER: u64 = 9_990_000;

#[derive(Clone, Copy, Default)]
struct Subscriber {
    /// Publications that it has, or has lost.
    received: u64,
    last_offset: u64,
}

pub(crate) struct Cross {
    plan: CrossPlan,
    openings: Openings,
    template: Template,
    subscribers: Vec<Subscriber>,
    /// When publications were meant to leave, by number.
    meant_ns: Vec<u64>,
    published: u64,
    acknowledged: u64,
    delivered: u64,
    next_id: u64,
    schedule: Option<Schedule>,
    publishing: bool,
    measuring: bool,
    latencies: Latencies,
    /// By publisher, what it sends in this turn.
    scratch: Vec<Vec<u8>>,
}

impl Cross {
    /// Connections from 0 on are `subscribers`, spread over the channels; those behind them publish.
    pub(crate) fn new(plan: CrossPlan, openings: Openings, subscribers: usize) -> Cross {
        Cross {
            template: publish_own_template(&plan.prefix, plan.size),
            openings,
            subscribers: vec![Subscriber::default(); subscribers],
            meant_ns: vec![0; IN_FLIGHT_MAX],
            published: 0,
            acknowledged: 0,
            delivered: 0,
            next_id: ID_FIRST,
            schedule: None,
            publishing: false,
            measuring: false,
            latencies: Latencies::new(),
            scratch: vec![Vec::new(); plan.publishers as usize],
            plan,
        }
    }

    fn delivery(&mut self, net: &mut Net, index: usize, offset: u64) {
        let subscriber = &mut self.subscribers[index];
        let last = subscriber.last_offset;
        if offset != 0 && offset <= last {
            return net.problem("a publication twice or out of order");
        }
        let lost = if last == 0 || !self.plan.dense { 0 } else { offset - last - 1 };
        let sequence = (subscriber.received + lost) * self.plan.channels + index as u64 % self.plan.channels;
        if sequence >= self.published {
            return net.problem("a publication that nobody published");
        }
        subscriber.last_offset = offset;
        subscriber.received += lost + 1;
        self.delivered += 1;
        (0..lost).for_each(|_| net.problem("a publication lost"));
        let meant_ns = self.meant_ns[sequence as usize % IN_FLIGHT_MAX];
        if self.measuring {
            self.latencies.record_ns(net.now_ns().saturating_sub(meant_ns));
        }
    }

    /// How many publications may leave now.
    fn room(&self) -> u64 {
        let unacknowledged = self.published - self.acknowledged;
        let most = match self.plan.pace {
            Pace::Window(window) => u64::from(window),
            Pace::PerSecond(_) => {
                let each = (UNACKNOWLEDGED_BYTES_MAX / self.template.wire_bytes() as u64).max(1);
                each * self.plan.publishers
            }
        };
        let behind = self.subscribers.iter().map(|subscriber| subscriber.received).min();
        let oldest = behind.map_or(self.published, |received| received * self.plan.channels);
        let places = (IN_FLIGHT_MAX as u64 - self.plan.channels)
            .saturating_sub(self.published - oldest.min(self.published));
        most.saturating_sub(unacknowledged).min(places).min(PUBLICATIONS_PER_TURN_MAX)
    }

    /// Publishes what the window or the schedule allows, each connection's in one piece.
    fn publish(&mut self, net: &mut Net) {
        for _ in 0..self.room() {
            let meant_ns = match &mut self.schedule {
                None => Some(net.now_ns()),
                Some(schedule) => schedule.take_due(net.now_ns()),
            };
            let Some(meant_ns) = meant_ns else { break };
            let channel = self.published % self.plan.channels;
            let publisher = (channel % self.plan.publishers) as usize;
            self.template.append(&mut self.scratch[publisher], &[self.next_id, channel]);
            self.next_id = if self.next_id + 1 < ID_END { self.next_id + 1 } else { ID_FIRST };
            self.meant_ns[self.published as usize % IN_FLIGHT_MAX] = meant_ns;
            self.published += 1;
        }
        for (publisher, bytes) in self.scratch.iter_mut().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
            net.send(self.subscribers.len() + publisher, bytes);
            bytes.clear();
        }
    }
}

impl Scenario for Cross {
    fn opening(&mut self, index: usize, out: &mut Vec<u8>) -> u32 {
        if index >= self.subscribers.len() {
            let number = PUBLISHER_NUMBER + (index - self.subscribers.len()) as u64;
            return self.openings.append(number, None, out);
        }
        let channel = own_channel(&self.plan.prefix, index as u64 % self.plan.channels);
        self.openings.append(index as u64, Some(&channel), out)
    }

    fn message(&mut self, net: &mut Net, index: usize, incoming: Incoming) {
        let publishes = index >= self.subscribers.len();
        match incoming {
            Incoming::Publication { offset } if !publishes => self.delivery(net, index, offset),
            Incoming::Reply { error } if publishes => {
                self.acknowledged += 1;
                if let Some(code) = error {
                    net.problem(&format!("a publish was refused with error {code}"));
                }
            }
            _ => net.problem("a message that nobody asked for"),
        }
    }

    fn phase(&mut self, net: &mut Net, phase: Phase) {
        self.publishing = matches!(phase, Phase::Warmup | Phase::Measure);
        self.measuring = phase == Phase::Measure;
        net.schedule(&mut self.schedule, phase, self.plan.pace);
        if self.measuring {
            self.latencies.clear();
        }
    }

    fn turn(&mut self, net: &mut Net) -> Option<u64> {
        let open = |net: &Net, index| net.state(index) == State::Open;
        let first = self.subscribers.len();
        if !self.publishing || !(first..net.len()).all(|index| open(net, index)) {
            return None;
        }
        self.publish(net);
        // Where there is no room, an answer wakes the next turn.
        if let Some(schedule) = self.schedule.as_ref().filter(|_| self.room() > 0)
            && let Err(error) = net.wake_at(schedule.next_ns())
        {
            net.problem(&format!("the timer: {error}"));
        }
        None
    }

    fn units(&self) -> u64 {
        if self.subscribers.is_empty() { self.acknowledged } else { self.delivered }
    }

    fn report(&mut self, report: &mut WorkerReport) {
        report.latencies = self.latencies.recorded();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Target;

    /// Two channels with a subscriber each, two publishers; nothing is connected.
    fn cross(pace: Pace, dense: bool) -> (Cross, Net) {
        let target = Target { address: "127.0.0.1:1".parse().expect("an address"), path: "/".into() };
        let prefix = "room:".into();
        let plan = CrossPlan {
            publish_to: target.clone(),
            publishers: 2,
            channels: 2,
            dense,
            prefix,
            pace,
            size: 16,
        };
        let net = Net::new(target, 4, 0, 1, false).expect("an epoll");
        (Cross::new(plan, Openings::new(None).expect("no secret"), 2), net)
    }

    #[test]
    fn sees_what_is_lost_doubled_reordered_or_made_up() {
        fn check(offsets: &[u64], published: u64, expected: &[(&str, u64)]) {
            checked(true, offsets, published, expected);
        }
        fn checked(dense: bool, offsets: &[u64], published: u64, expected: &[(&str, u64)]) {
            let (mut cross, mut net) = cross(Pace::Window(1), dense);
            cross.published = published * 2;
            offsets.iter().for_each(|&offset| cross.delivery(&mut net, 1, offset));
            let problems: Vec<(&str, u64)> =
                net.problems().map(|(what, count)| (what.as_str(), *count)).collect();
            assert_eq!(problems, expected, "{offsets:?}");
        }
        check(&[1, 2, 3], 3, &[]);
        check(&[0, 0, 0], 3, &[]);
        check(&[7, 8], 2, &[]);
        check(&[1, 4], 4, &[("a publication lost", 2)]);
        check(&[1, 2, 2], 3, &[("a publication twice or out of order", 1)]);
        check(&[1, 2], 1, &[("a publication that nobody published", 1)]);
        checked(false, &[5, 9, 30], 3, &[]);
        checked(false, &[5, 9, 7], 3, &[("a publication twice or out of order", 1)]);
    }

    #[test]
    fn a_delivery_is_late_from_the_time_its_publication_was_meant() {
        let (mut cross, mut net) = cross(Pace::Window(4), true);
        cross.measuring = true;
        cross.published = 4;
        let now_ns = net.now_ns();
        cross.meant_ns[..4].copy_from_slice(&[now_ns, now_ns - 1_000, now_ns, now_ns - 2_000_000]);
        cross.delivery(&mut net, 1, 1);
        cross.delivery(&mut net, 1, 2);
        let percentiles = cross.latencies.percentiles();
        assert!((percentiles.p50_us - 1.0).abs() < 0.1, "{percentiles:?}");
        assert!((percentiles.max_us - 2_000.0).abs() < 10.0, "{percentiles:?}");
    }

    #[test]
    fn a_window_is_of_all_publishers_and_opens_with_acknowledgements() {
        let (mut cross, mut net) = cross(Pace::Window(5), true);
        cross.publish(&mut net);
        assert_eq!((cross.published, cross.room()), (5, 0));
        cross.message(&mut net, 2, Incoming::Reply { error: None });
        cross.message(&mut net, 3, Incoming::Reply { error: Some(108) });
        assert_eq!(cross.room(), 2);
        let problems: Vec<&String> = net.problems().map(|(what, _)| what).collect();
        assert_eq!(problems, ["a publish was refused with error 108"]);
    }
}
