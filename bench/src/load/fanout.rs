//! Fan-out: one publisher, many subscribers that check every offset.
//!
//! A subscriber's n-th publication is the run's n-th, so nothing needs to be read from it to know when it left: a jump
//! of the offset counts as so many lost. `missing` holds for each publication in flight how many subscribers of this
//! process do not have it; the publisher goes on when that is 0 in every process.

use std::rc::Rc;

use super::net::{Net, State};
use super::openings::Openings;
use super::scenario::{Incoming, Scenario};
use crate::io::board::{Board, IN_FLIGHT_MAX, Phase};
use crate::measure::latency::Latencies;
use crate::measure::schedule::Schedule;
use crate::plan::{FanoutPlan, Pace, WorkerReport};
use crate::wire::centrifuge::{ID_END, ID_FIRST, publish_template};
use crate::wire::template::Template;

/// Publications of one turn, so that deliveries are read in between.
const PUBLICATIONS_PER_TURN_MAX: usize = 256;
/// The publisher's user: a number that no subscriber has.
const PUBLISHER_NUMBER: u64 = 9_999_999;

#[derive(Clone, Copy, Default)]
struct Subscriber {
    /// Publications that it has, or has lost.
    received: u64,
    last_offset: u64,
}

pub(crate) struct Fanout {
    plan: FanoutPlan,
    openings: Openings,
    board: Rc<Board>,
    workers: usize,
    template: Template,
    first: u64,
    subscribers: Vec<Subscriber>,
    /// Subscribers from 0 up to this never read.
    stopped: usize,
    /// The connection that publishes, in the first process only; it comes after the subscribers.
    publisher: Option<usize>,
    /// Subscribers that read and live.
    readers: u32,
    missing: Vec<u32>,
    completed: u64,
    units: u64,
    next_id: u64,
    schedule: Option<Schedule>,
    publishing: bool,
    measuring: bool,
    latencies: Latencies,
    scratch: Vec<u8>,
}

impl Fanout {
    /// `count` subscribers, the first of which is number `first` of the run; the stopped ones and the publisher are
    /// in the process that `leads`.
    pub(crate) fn new(
        plan: FanoutPlan,
        openings: Openings,
        board: Rc<Board>,
        workers: usize,
        leads: bool,
        first: u64,
        count: usize,
    ) -> Fanout {
        let stopped = if leads { (plan.stopped as usize).min(count) } else { 0 };
        let readers = (count - stopped) as u32;
        Fanout {
            template: publish_template(&plan.channel, plan.size),
            openings,
            board,
            workers,
            first,
            subscribers: vec![Subscriber::default(); count],
            stopped,
            publisher: leads.then_some(count),
            readers,
            missing: vec![readers; IN_FLIGHT_MAX],
            completed: 0,
            units: 0,
            next_id: ID_FIRST,
            schedule: None,
            publishing: false,
            measuring: false,
            latencies: Latencies::new(),
            scratch: Vec::new(),
            plan,
        }
    }

    /// Which connections' bytes are worth keeping: the first reader's and the publisher's.
    pub(crate) fn watched(&self) -> [Option<usize>; 2] {
        [Some(self.stopped).filter(|_| self.readers > 0), self.publisher]
    }

    fn delivery(&mut self, net: &mut Net, index: usize, offset: u64) {
        let subscriber = &mut self.subscribers[index];
        let last = std::mem::replace(&mut subscriber.last_offset, offset);
        let mut lost = 0;
        if self.plan.check && last != 0 && offset != last + 1 {
            if offset <= last {
                subscriber.last_offset = last;
                return net.problem("a publication twice or out of order");
            }
            lost = offset - last - 1;
        }
        let sequence = subscriber.received + lost;
        if sequence >= self.board.published() {
            return net.problem("a publication that nobody published");
        }
        for lost_sequence in subscriber.received..=sequence {
            self.missing[lost_sequence as usize % IN_FLIGHT_MAX] -= 1;
        }
        subscriber.received = sequence + 1;
        self.units += 1;
        if lost > 0 {
            (0..lost).for_each(|_| net.problem("a publication lost"));
        }
        if self.measuring {
            self.latencies.record_ns(net.now_ns().saturating_sub(self.board.sent_ns(sequence)));
        }
        if sequence == self.completed {
            self.advance();
        }
    }

    /// Moves past the publications that every reader has.
    fn advance(&mut self) {
        while self.completed < self.board.published() {
            let missing = &mut self.missing[self.completed as usize % IN_FLIGHT_MAX];
            if *missing > 0 {
                return;
            }
            *missing = self.readers;
            self.completed += 1;
        }
    }

    fn completed_everywhere(&self) -> u64 {
        if self.workers == 1 { self.completed } else { self.board.completed(self.workers) }
    }

    /// Publishes what the window or the schedule allows, in one piece.
    fn publish(&mut self, net: &mut Net, publisher: usize) {
        let in_flight = self.board.published() - self.completed_everywhere();
        let room = match self.plan.pace {
            Pace::Window(window) => u64::from(window).saturating_sub(in_flight),
            Pace::PerSecond(_) => (IN_FLIGHT_MAX as u64 - 1).saturating_sub(in_flight),
        };
        self.scratch.clear();
        for _ in 0..room.min(PUBLICATIONS_PER_TURN_MAX as u64) {
            let meant_ns = match &mut self.schedule {
                None => Some(net.now_ns()),
                Some(schedule) => schedule.take_due(net.now_ns()),
            };
            let Some(meant_ns) = meant_ns else { break };
            self.template.append(&mut self.scratch, &[self.next_id]);
            self.next_id = if self.next_id + 1 < ID_END { self.next_id + 1 } else { ID_FIRST };
            self.board.note_published(self.board.published(), meant_ns);
        }
        if !self.scratch.is_empty() {
            net.send(publisher, &self.scratch);
        }
    }
}

impl Scenario for Fanout {
    fn opening(&mut self, index: usize, out: &mut Vec<u8>) -> u32 {
        let publishes = self.publisher == Some(index);
        if publishes {
            return self.openings.append(PUBLISHER_NUMBER, Some(&self.plan.publisher_channel), out);
        }
        self.openings.append(self.first + index as u64, Some(&self.plan.channel), out)
    }

    fn opened(&mut self, net: &mut Net, index: usize) {
        if index < self.stopped {
            net.set_paused(index, true);
        }
    }

    fn message(&mut self, net: &mut Net, index: usize, incoming: Incoming) {
        match incoming {
            Incoming::Publication { offset } if index >= self.stopped && index < self.subscribers.len() => {
                self.delivery(net, index, offset);
            }
            Incoming::Reply { error: None } if self.publisher == Some(index) => {}
            Incoming::Reply { error: Some(code) } => {
                net.problem(&format!("a publish was refused with error {code}"));
            }
            _ => net.problem("a message that nobody asked for"),
        }
    }

    fn closed(&mut self, _net: &mut Net, index: usize, clean: bool) {
        if clean || index < self.stopped || index >= self.subscribers.len() {
            return;
        }
        // Nobody waits for a subscriber that is gone.
        let received = self.subscribers[index].received;
        self.readers -= 1;
        for sequence in received..self.completed + IN_FLIGHT_MAX as u64 {
            self.missing[sequence as usize % IN_FLIGHT_MAX] -= 1;
        }
        self.advance();
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
        let publisher = self.publisher.filter(|_| self.publishing)?;
        if net.state(publisher) != State::Open {
            return None;
        }
        self.publish(net, publisher);
        self.schedule.as_ref().map(Schedule::next_ns)
    }

    fn units(&self) -> u64 {
        self.units
    }

    fn completed(&self) -> u64 {
        // A process without readers keeps nobody waiting.
        if self.readers == 0 { self.board.published() } else { self.completed }
    }

    fn report(&mut self, report: &mut WorkerReport) {
        report.latencies = self.latencies.recorded();
        report.heard.request_bytes = self.template.wire_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Target;

    /// Three subscribers, the first of them stopped where `stopped` says so, and a publisher; nothing is connected.
    fn fanout(stopped: u64) -> (Fanout, Net, Rc<Board>) {
        let plan = FanoutPlan {
            channel: "room:bench".into(),
            publisher_channel: "room:bencp".into(),
            pace: Pace::Window(4),
            size: 16,
            stopped,
            check: true,
        };
        let target = Target { address: "127.0.0.1:1".parse().expect("an address"), path: "/".into() };
        let net = Net::new(target, 4, 0, 1, false).expect("an epoll");
        let board = Rc::new(Board::create().expect("a memfd"));
        let openings = Openings::new(None).expect("no secret");
        (Fanout::new(plan, openings, Rc::clone(&board), 1, true, 0, 3), net, board)
    }

    fn problems(net: &Net) -> Vec<(&str, u64)> {
        net.problems().map(|(what, count)| (what.as_str(), *count)).collect()
    }

    #[test]
    fn a_publication_is_complete_when_every_reader_has_it() {
        let (mut fanout, mut net, board) = fanout(1);
        (0..2).for_each(|sequence| board.note_published(sequence, 0));
        fanout.delivery(&mut net, 1, 7);
        fanout.delivery(&mut net, 1, 8);
        assert_eq!(fanout.completed(), 0, "the other reader has nothing yet");
        fanout.delivery(&mut net, 2, 7);
        assert_eq!(fanout.completed(), 1);
        fanout.delivery(&mut net, 2, 8);
        assert_eq!((fanout.completed(), fanout.units()), (2, 4));
        assert_eq!(problems(&net), []);
        assert_eq!(fanout.watched(), [Some(1), Some(3)]);
    }

    #[test]
    fn sees_what_is_lost_doubled_reordered_or_made_up() {
        fn check(offsets: &[u64], published: u64, expected: &[(&str, u64)]) {
            let (mut fanout, mut net, board) = fanout(0);
            (0..published).for_each(|sequence| board.note_published(sequence, 0));
            offsets.iter().for_each(|&offset| fanout.delivery(&mut net, 0, offset));
            assert_eq!(problems(&net), expected, "{offsets:?}");
        }
        check(&[1, 2, 3], 3, &[]);
        check(&[1, 4], 4, &[("a publication lost", 2)]);
        check(&[1, 2, 2], 3, &[("a publication twice or out of order", 1)]);
        check(&[1, 3, 2], 3, &[("a publication lost", 1), ("a publication twice or out of order", 1)]);
        check(&[1, 2], 1, &[("a publication that nobody published", 1)]);
    }

    #[test]
    fn a_lost_publication_or_subscriber_keeps_nobody_waiting() {
        let (mut fanout, mut net, board) = fanout(0);
        (0..3).for_each(|sequence| board.note_published(sequence, 0));
        for index in [0, 1] {
            [1, 3].into_iter().for_each(|offset| fanout.delivery(&mut net, index, offset));
        }
        assert_eq!(fanout.completed(), 0);
        fanout.delivery(&mut net, 2, 1);
        assert_eq!(fanout.completed(), 1);
        fanout.closed(&mut net, 2, false);
        assert_eq!(fanout.completed(), 3, "the two that are left have, or have lost, all three");
        fanout.closed(&mut net, 0, false);
        fanout.closed(&mut net, 1, false);
        board.note_published(3, 0);
        assert_eq!(fanout.completed(), 4);
    }
}
