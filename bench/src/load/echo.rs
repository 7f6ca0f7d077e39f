//! Echo: what a connection sends comes back to it, as a pong or as a publication with its acknowledgement.
//!
//! Closed loop keeps `window` requests in flight on every connection and sends as many as came back, in one piece.
//! Open loop takes connections in turn at a fixed rate and counts latency from the time that was meant.

use super::net::Net;
use super::openings::Openings;
use super::scenario::{Incoming, Scenario};
use crate::io::board::Phase;
use crate::measure::latency::Latencies;
use crate::measure::schedule::Schedule;
use crate::plan::{Channels, EchoMode, EchoPlan, Pace, WorkerReport};
use crate::wire::centrifuge::{ID_END, ID_FIRST, publish_own_template};
use crate::wire::frame::Opcode;
use crate::wire::template::Template;

/// Requests in flight on one connection in open loop; when all connections have as many, requests wait, and their
/// latency counts the wait.
pub(crate) const OPEN_LOOP_IN_FLIGHT_MAX: u32 = 256;
/// Requests of one turn in open loop, so that answers are read in between.
const SENDS_PER_TURN_MAX: u32 = 256;

/// One connection's requests.
#[derive(Clone, Copy, Default)]
struct Flight {
    sent: u64,
    completed: u64,
    /// Acknowledgements minus publications: who is ahead of the other.
    ahead: i64,
    last_offset: u64,
    /// Came back since the last send.
    returned: u32,
}

pub(crate) struct Echo {
    plan: EchoPlan,
    openings: Openings,
    session: Option<Channels>,
    template: Template,
    first: u64,
    window: u32,
    flights: Vec<Flight>,
    /// When each request was meant to leave: `window` places for each connection, by request number.
    meant_ns: Vec<u64>,
    schedule: Option<Schedule>,
    next: usize,
    next_id: u64,
    phase: Phase,
    latencies: Latencies,
    units: u64,
    scratch: Vec<u8>,
}

impl Echo {
    pub(crate) fn new(plan: EchoPlan, openings: Openings, first: u64, count: usize) -> Echo {
        let window = match plan.pace {
            Pace::Window(window) => window.max(1),
            Pace::PerSecond(_) => OPEN_LOOP_IN_FLIGHT_MAX,
        };
        let (session, template) = match &plan.mode {
            EchoMode::Ping { session } => {
                (session.clone(), Template::builder().text(&"x".repeat(plan.size)).finish(Opcode::Ping))
            }
            EchoMode::Publish { prefix } => {
                (Some(Channels::Own(prefix.clone())), publish_own_template(prefix, plan.size))
            }
        };
        Echo {
            plan,
            openings,
            session,
            template,
            first,
            window,
            flights: vec![Flight::default(); count],
            meant_ns: vec![0; count * window as usize],
            schedule: None,
            next: 0,
            next_id: ID_FIRST,
            phase: Phase::Setup,
            latencies: Latencies::new(),
            units: 0,
            scratch: Vec::new(),
        }
    }

    /// Sends `count` requests on connection `index` in one piece, meant for `meant_ns`.
    fn request(&mut self, net: &mut Net, index: usize, count: u32, meant_ns: u64) {
        self.scratch.clear();
        for _ in 0..count {
            match self.plan.mode {
                EchoMode::Ping { .. } => self.template.append(&mut self.scratch, &[]),
                EchoMode::Publish { .. } => {
                    self.template.append(&mut self.scratch, &[self.next_id, self.first + index as u64]);
                    self.next_id = if self.next_id + 1 < ID_END { self.next_id + 1 } else { ID_FIRST };
                }
            }
            let flight = &mut self.flights[index];
            let place = index * self.window as usize + (flight.sent % u64::from(self.window)) as usize;
            self.meant_ns[place] = meant_ns;
            flight.sent += 1;
        }
        net.send(index, &self.scratch);
    }

    fn completed(&mut self, net: &Net, index: usize) {
        let flight = &mut self.flights[index];
        let place = index * self.window as usize + (flight.completed % u64::from(self.window)) as usize;
        if flight.completed == flight.sent {
            return; // More answers than requests; the caller has counted the problem.
        }
        flight.completed += 1;
        flight.returned += 1;
        self.units += 1;
        if self.phase == Phase::Measure {
            self.latencies.record_ns(net.now_ns().saturating_sub(self.meant_ns[place]));
        }
    }

    fn publication(&mut self, net: &mut Net, index: usize, offset: u64) {
        let flight = &mut self.flights[index];
        if self.plan.check && flight.last_offset != 0 && offset != flight.last_offset + 1 {
            net.problem("an offset that does not follow the one before");
        }
        flight.last_offset = offset;
        flight.ahead -= 1;
        if flight.ahead >= 0 {
            self.completed(net, index);
        }
    }

    fn reply(&mut self, net: &mut Net, index: usize, error: Option<u32>) {
        if let Some(code) = error {
            return net.problem(&format!("a publish was refused with error {code}"));
        }
        let flight = &mut self.flights[index];
        flight.ahead += 1;
        if flight.ahead <= 0 {
            self.completed(net, index);
        }
    }

    /// The next connection that may have another request in flight, if any.
    fn next_free(&mut self, net: &Net) -> Option<usize> {
        for _ in 0..self.flights.len() {
            let index = self.next;
            self.next = (self.next + 1) % self.flights.len();
            let flight = &self.flights[index];
            let open = net.state(index) == super::net::State::Open;
            if open && flight.sent - flight.completed < u64::from(self.window) {
                return Some(index);
            }
        }
        None
    }
}

impl Scenario for Echo {
    fn opening(&mut self, index: usize, out: &mut Vec<u8>) -> u32 {
        let number = self.first + index as u64;
        match &self.session {
            Some(channels) => self.openings.append(number, channels.of(number).as_deref(), out),
            None => 0,
        }
    }

    fn message(&mut self, net: &mut Net, index: usize, incoming: Incoming) {
        match (incoming, &self.plan.mode) {
            (Incoming::Pong, EchoMode::Ping { .. }) => self.completed(net, index),
            (Incoming::Reply { error }, EchoMode::Publish { .. }) => self.reply(net, index, error),
            (Incoming::Publication { offset }, EchoMode::Publish { .. }) => {
                self.publication(net, index, offset);
            }
            _ => net.problem("a message that nobody asked for"),
        }
    }

    fn drained(&mut self, net: &mut Net, index: usize) {
        let returned = std::mem::take(&mut self.flights[index].returned);
        let closed_loop = matches!(self.plan.pace, Pace::Window(_));
        if returned > 0 && closed_loop && matches!(self.phase, Phase::Warmup | Phase::Measure) {
            self.request(net, index, returned, net.now_ns());
        }
    }

    fn phase(&mut self, net: &mut Net, phase: Phase) {
        self.phase = phase;
        net.schedule(&mut self.schedule, phase, self.plan.pace);
        match (phase, self.plan.pace) {
            (Phase::Warmup, Pace::Window(window)) => {
                for index in 0..self.flights.len() {
                    if net.state(index) == super::net::State::Open {
                        net.tick();
                        self.request(net, index, window, net.now_ns());
                    }
                }
            }
            (Phase::Measure, _) => self.latencies.clear(),
            _ => {}
        }
    }

    fn turn(&mut self, net: &mut Net) -> Option<u64> {
        self.schedule.as_ref()?;
        for _ in 0..SENDS_PER_TURN_MAX {
            if self.schedule.as_ref()?.next_ns() > net.now_ns() {
                break;
            }
            let Some(index) = self.next_free(net) else { break };
            if let Some(meant_ns) = self.schedule.as_mut()?.take_due(net.now_ns()) {
                self.request(net, index, 1, meant_ns);
            }
        }
        self.schedule.as_ref().map(Schedule::next_ns)
    }

    fn units(&self) -> u64 {
        self.units
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

    fn echo(pace: Pace) -> (Echo, Net) {
        let mode = EchoMode::Publish { prefix: "room:own-".into() };
        let plan = EchoPlan { mode, pace, size: 16, check: true };
        let target = Target { address: "127.0.0.1:1".parse().expect("an address"), path: "/".into() };
        let net = Net::new(target, 2, 0, 1, false).expect("an epoll");
        (Echo::new(plan, Openings::new(None).expect("no secret"), 0, 2), net)
    }

    const ACK: Incoming = Incoming::Reply { error: None };

    fn publication(offset: u64) -> Incoming {
        Incoming::Publication { offset }
    }

    #[test]
    fn a_request_is_done_when_both_halves_are_there() {
        fn check(messages: &[Incoming], units: u64) {
            let (mut echo, mut net) = echo(Pace::Window(8));
            echo.request(&mut net, 0, 3, 0);
            messages.iter().for_each(|&message| echo.message(&mut net, 0, message));
            assert_eq!((echo.units(), net.problems().count()), (units, 0), "{messages:?}");
        }
        check(&[ACK], 0);
        check(&[publication(1)], 0);
        check(&[ACK, publication(1)], 1);
        check(&[publication(1), ACK], 1);
        check(&[ACK, ACK, publication(1)], 1);
        check(&[publication(1), publication(2), ACK, ACK, ACK, publication(3)], 3);
    }

    #[test]
    fn sees_gaps_refusals_and_what_was_not_asked_for() {
        fn check(messages: &[Incoming], expected: &str) {
            let (mut echo, mut net) = echo(Pace::Window(8));
            echo.request(&mut net, 0, 3, 0);
            messages.iter().for_each(|&message| echo.message(&mut net, 0, message));
            let problems: Vec<&String> = net.problems().map(|(what, _)| what).collect();
            assert_eq!(problems, [expected], "{messages:?}");
        }
        check(&[publication(1), publication(3)], "an offset that does not follow the one before");
        check(&[publication(2), publication(2)], "an offset that does not follow the one before");
        check(&[Incoming::Reply { error: Some(103) }], "a publish was refused with error 103");
        check(&[Incoming::Pong], "a message that nobody asked for");
    }

    #[test]
    fn the_open_loop_stops_at_the_limit_in_flight_and_goes_on_from_where_it_was_meant() {
        let (mut echo, mut net) = echo(Pace::PerSecond(1e6));
        (0..2).for_each(|index| net.set_state(index, super::super::net::State::Open));
        echo.phase(&mut net, Phase::Warmup);
        // A million a second for far longer than both connections may have in flight.
        let deadline_ns = net.now_ns() + 80_000_000;
        while net.now_ns() < deadline_ns {
            net.tick();
            echo.turn(&mut net);
        }
        let sent = |echo: &Echo| echo.flights.iter().map(|flight| flight.sent).sum::<u64>();
        assert_eq!(sent(&echo), 2 * u64::from(OPEN_LOOP_IN_FLIGHT_MAX));
        echo.message(&mut net, 0, ACK);
        echo.message(&mut net, 0, publication(1));
        echo.turn(&mut net);
        assert_eq!(sent(&echo), 2 * u64::from(OPEN_LOOP_IN_FLIGHT_MAX) + 1);
        let meant_ns = echo.meant_ns[0];
        assert!(meant_ns + 10_000_000 < net.now_ns(), "the next is as late as the wait was long");
        echo.phase(&mut net, Phase::Finish);
        assert_eq!(
            net.problems().map(|(what, _)| what.as_str()).collect::<Vec<_>>(),
            ["the rate was not kept up"]
        );
    }
}
