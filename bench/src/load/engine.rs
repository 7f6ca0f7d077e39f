//! The turn: wait for readiness, read, take frames, tell the scenario, open and close connections.

use std::mem::MaybeUninit;

use rustix::event::epoll::{Event, EventFlags};
use rustix::io::Errno;

use super::net::{Net, State};
use super::scenario::{Incoming, Scenario};
use crate::bare::script::Exchange;
use crate::io::board::{Board, Counter, Phase};
use crate::plan::{Heard, Target, WorkerReport};
use crate::wire::centrifuge::{self, Message};
use crate::wire::frame::{Frame, Opcode, next_frame, push_client_frame};
use crate::wire::upgrade;

/// Readiness events of one turn.
const EVENTS_MAX: usize = 1024;
/// What one read takes.
const RECV_BYTES: usize = 64 << 10;
/// Reads from one connection before the others have their turn.
const READS_MAX: usize = 16;
/// How long a turn waits at most, so that a new phase is seen.
const WAIT_NS_MAX: u64 = 2_000_000;
/// Below this the engine asks again instead of sleeping: epoll's timeout has a granularity of its own.
const SPIN_NS: u64 = 1_000_000;
/// Connections that are in their closing handshake at once when a run ends.
const CLOSING_MAX: usize = 512;
/// How long a run's end may take: this, and a second for every so many connections.
const FINISH_NS: u64 = 10_000_000_000;
const FINISH_CONNECTIONS_PER_S: u64 = 2_000;

/// The engine could not go on; the load process ends with this.
#[derive(Debug, thiserror::Error)]
#[error("epoll: {0}")]
pub(crate) struct EngineError(#[from] Errno);

/// A load process at work.
pub(crate) struct Engine<S> {
    net: Net,
    scenario: S,
    request: Vec<u8>,
    /// Where this process counts on the board.
    worker: usize,
    heard: Heard,
    /// Connections whose bytes are kept: a subscriber and the publisher.
    watched: [Option<usize>; 2],
    /// Connections that have more to read than one turn took.
    unread: Vec<usize>,
    scratch: Vec<u8>,
}

impl<S: Scenario> Engine<S> {
    pub(crate) fn new(
        net: Net,
        scenario: S,
        request: Vec<u8>,
        worker: usize,
        watched: [Option<usize>; 2],
    ) -> Engine<S> {
        Engine {
            net,
            scenario,
            request,
            worker,
            heard: Heard::default(),
            watched,
            unread: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Connections from number `first` on go to another server.
    pub(crate) fn redirect(&mut self, first: usize, target: Target) {
        self.net.redirect(first, target);
    }

    /// Runs until the parent says finish and every connection is closed, or the time for that is over.
    pub(crate) fn run(mut self, board: &Board) -> Result<WorkerReport, EngineError> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut buffer = vec![MaybeUninit::uninit(); RECV_BYTES];
        let mut phase = Phase::Setup;
        while phase != Phase::Finish {
            let next = self.turn(&mut events, &mut buffer)?;
            self.count(board);
            let told = board.phase();
            if told != phase {
                phase = told;
                self.scenario.phase(&mut self.net, phase);
            }
            let timeout_ns = if self.unread.is_empty() { wait_ns(next, self.net.now_ns()) } else { 0 };
            self.net.wait(&mut events, timeout_ns)?;
        }
        self.finish(&mut events, &mut buffer)?;
        self.count(board);
        let mut report = WorkerReport { heard: self.heard, ..WorkerReport::default() };
        report.problems = self.net.problems().map(|(what, count)| (what.clone(), *count)).collect();
        self.scenario.report(&mut report);
        Ok(report)
    }

    /// Handles what the last wait brought, then lets connections open and the scenario send.
    fn turn(
        &mut self,
        events: &mut Vec<Event>,
        buffer: &mut [MaybeUninit<u8>],
    ) -> Result<Option<u64>, EngineError> {
        self.net.tick();
        for index in std::mem::take(&mut self.unread) {
            self.read(index, true, buffer);
        }
        for event in events.drain(..) {
            if let Some(index) = self.net.of_event(event.data.u64()) {
                self.ready(index, event.flags, buffer);
            }
        }
        self.net.ramp();
        Ok(self.scenario.turn(&mut self.net))
    }

    fn count(&self, board: &Board) {
        let (bytes_in, bytes_out) = self.net.bytes();
        for (counter, value) in [
            (Counter::Open, self.net.open_count() as u64),
            (Counter::Failed, self.net.failed_count()),
            (Counter::Units, self.scenario.units()),
            (Counter::BytesIn, bytes_in),
            (Counter::BytesOut, bytes_out),
            (Counter::Completed, self.scenario.completed()),
        ] {
            board.set(self.worker, counter, value);
        }
    }

    fn ready(&mut self, index: usize, flags: EventFlags, buffer: &mut [MaybeUninit<u8>]) {
        if self.net.state(index) == State::Connecting {
            if let Some(error) = self.net.socket_error(index) {
                return self.lose(index, &format!("connect: {error}"));
            }
            if flags.contains(EventFlags::OUT) {
                self.net.set_state(index, State::Upgrading);
                self.net.send(index, &self.request);
            }
        } else if flags.contains(EventFlags::OUT) {
            self.net.flush(index);
        }
        let ends = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        if (ends || flags.contains(EventFlags::IN)) && !self.net.is_paused(index) {
            self.read(index, ends, buffer);
        }
    }

    /// Reads what is there. A read that does not fill the buffer took all of it, and more raises a new edge; but with
    /// `to_end` there may be an end of input behind it, whose edge has passed.
    fn read(&mut self, index: usize, to_end: bool, buffer: &mut [MaybeUninit<u8>]) {
        for _ in 0..READS_MAX {
            match self.net.receive(index, buffer) {
                None => return,
                Some(Err(error)) => return self.ended(index, Some(error)),
                Some(Ok([])) => return self.ended(index, None),
                Some(Ok(bytes)) => {
                    self.net.tick();
                    self.take(index, bytes);
                    if bytes.len() < RECV_BYTES && !to_end {
                        return;
                    }
                }
            }
        }
        self.unread.push(index);
    }

    /// Takes whole frames off what was read, and keeps the rest.
    fn take(&mut self, index: usize, bytes: &[u8]) {
        let mut held = self.net.take_partial(index);
        if held.is_empty() {
            let used = self.frames(index, bytes);
            if used < bytes.len() && self.net.state(index) != State::Unused {
                self.net.keep_partial(index, bytes[used..].to_vec());
            }
            return;
        }
        held.extend_from_slice(bytes);
        let used = self.frames(index, &held);
        held.drain(..used);
        if !held.is_empty() && self.net.state(index) != State::Unused {
            self.net.keep_partial(index, held);
        }
    }

    /// Handles all that is complete in `input`; returns how many bytes that was.
    fn frames(&mut self, index: usize, input: &[u8]) -> usize {
        let mut used = 0;
        if self.net.state(index) == State::Upgrading {
            match upgrade::response_bytes(input) {
                Ok(None) => return 0,
                Ok(Some(head)) => used = head,
                Err(error) => {
                    self.lose(index, &error.to_string());
                    return input.len();
                }
            }
            self.upgraded(index, &input[..used]);
        }
        while self.net.state(index) != State::Unused {
            match next_frame(&input[used..]) {
                Ok(None) => break,
                Ok(Some(frame)) => {
                    let raw = &input[used..used + frame.wire_bytes];
                    used += frame.wire_bytes;
                    self.frame(index, &frame, raw);
                }
                Err(error) => {
                    self.lose(index, &error.to_string());
                    return input.len();
                }
            }
        }
        if self.net.state(index) == State::Open {
            self.scenario.drained(&mut self.net, index);
        }
        used
    }

    fn upgraded(&mut self, index: usize, head: &[u8]) {
        let mut opening = std::mem::take(&mut self.scratch);
        opening.clear();
        let replies = self.scenario.opening(index, &mut opening);
        if self.learns_opening(index) {
            self.heard.opening = vec![Exchange { request_bytes: self.request.len(), reply: head.to_vec() }];
            if replies > 0 {
                self.heard.opening.push(Exchange { request_bytes: opening.len(), reply: Vec::new() });
            }
        }
        if replies > 0 {
            self.net.set_state(index, State::Opening(replies));
            self.net.send(index, &opening);
        } else {
            self.open(index);
        }
        self.scratch = opening;
    }

    /// Whether the opening of connection `index` is still to be remembered: once, also where connections come and go.
    fn learns_opening(&self, index: usize) -> bool {
        self.watched[0] == Some(index) && self.heard.close.is_empty()
    }

    fn open(&mut self, index: usize) {
        self.net.set_state(index, State::Open);
        self.scenario.opened(&mut self.net, index);
    }

    fn frame(&mut self, index: usize, frame: &Frame<'_>, raw: &[u8]) {
        match frame.opcode {
            Opcode::Text | Opcode::Binary => self.text(index, frame.payload, raw),
            Opcode::Ping => {
                let mut pong = Vec::new();
                push_client_frame(&mut pong, Opcode::Pong, frame.payload);
                self.net.send(index, &pong);
            }
            Opcode::Pong => {
                if self.watched[0] == Some(index) {
                    raw.clone_into(&mut self.heard.pong);
                }
                self.give(index, Incoming::Pong);
            }
            Opcode::Close => self.close_frame(index, frame.payload, raw),
        }
    }

    fn text(&mut self, index: usize, payload: &[u8], raw: &[u8]) {
        let opening = matches!(self.net.state(index), State::Opening(_));
        let (mut replies, mut publications) = (0, 0);
        for message in centrifuge::messages(payload) {
            match message {
                // Nothing follows our close frame (RFC 6455 section 5.5.1).
                Message::Ping if self.net.state(index) == State::Closing => {}
                Message::Ping => {
                    let mut pong = Vec::new();
                    push_client_frame(&mut pong, Opcode::Text, centrifuge::PONG);
                    self.net.send(index, &pong);
                }
                Message::Reply { error, .. } => {
                    replies += 1;
                    self.reply(index, error);
                }
                Message::Publication { offset } => {
                    publications += 1;
                    self.give(index, Incoming::Publication { offset });
                }
                Message::OtherPush => {}
                Message::Unknown => self.net.problem("a message that is not of this protocol"),
            }
        }
        if self.watched.contains(&Some(index)) {
            self.remember(index, opening, replies, publications, raw);
        }
    }

    /// Keeps the bytes of a watched connection's frame, by what it carried.
    fn remember(&mut self, index: usize, opening: bool, replies: u32, publications: u32, raw: &[u8]) {
        let subscriber = self.watched[0] == Some(index);
        if opening {
            let learns = self.learns_opening(index);
            if let Some(exchange) = self.heard.opening.get_mut(1).filter(|_| learns) {
                exchange.reply.extend_from_slice(raw);
            }
            return;
        }
        let place = match (replies > 0, publications > 0) {
            (true, true) => &mut self.heard.both,
            (true, false) => &mut self.heard.reply,
            (false, true) if subscriber => &mut self.heard.publication,
            _ => return,
        };
        raw.clone_into(place);
    }

    fn reply(&mut self, index: usize, error: Option<u32>) {
        match (self.net.state(index), error) {
            (State::Opening(_), Some(code)) => {
                self.lose(index, &format!("the opening was refused with error {code}"));
            }
            (State::Opening(1), None) => self.open(index),
            (State::Opening(missing), None) => self.net.set_state(index, State::Opening(missing - 1)),
            _ => self.give(index, Incoming::Reply { error }),
        }
    }

    fn give(&mut self, index: usize, incoming: Incoming) {
        if self.net.state(index) == State::Open {
            self.scenario.message(&mut self.net, index, incoming);
        }
    }

    fn close_frame(&mut self, index: usize, payload: &[u8], raw: &[u8]) {
        if self.watched[0] == Some(index) {
            raw.clone_into(&mut self.heard.close);
        }
        if self.net.state(index) == State::Closing {
            return self.net.set_state(index, State::Closed);
        }
        let code = payload.get(..2).map_or(1005, |code| u16::from_be_bytes([code[0], code[1]]));
        let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or_default());
        let what = format!("closed by the server: {code} {reason}");
        let mut answer = Vec::new();
        push_client_frame(&mut answer, Opcode::Close, payload.get(..2).unwrap_or_default());
        self.net.send(index, &answer);
        self.lose(index, what.trim_end());
    }

    /// The server's input is over: in good order after close frames both ways, a loss otherwise.
    fn ended(&mut self, index: usize, error: Option<Errno>) {
        let clean = self.net.state(index) == State::Closed && error.is_none();
        if clean {
            self.net.discard(index);
            self.scenario.closed(&mut self.net, index, true);
        } else {
            let what = match error {
                Some(error) => format!("connection lost: {error}"),
                None => "connection ended without a close frame".to_owned(),
            };
            self.lose(index, &what);
        }
    }

    fn lose(&mut self, index: usize, what: &str) {
        self.net.problem(what);
        self.net.fail(index);
        self.scenario.closed(&mut self.net, index, false);
    }

    /// Closes every connection by the closing handshake, so many at a time, and waits for FIN.
    fn finish(&mut self, events: &mut Vec<Event>, buffer: &mut [MaybeUninit<u8>]) -> Result<(), EngineError> {
        let deadline_ns =
            self.net.now_ns() + FINISH_NS + self.net.len() as u64 * 1_000_000_000 / FINISH_CONNECTIONS_PER_S;
        self.net.want_none();
        let mut next = 0;
        while self.net.live_count() > 0 && self.net.now_ns() < deadline_ns {
            while next < self.net.len() && self.net.live_count() - self.net.open_count() < CLOSING_MAX {
                self.begin_close(next, buffer);
                next += 1;
            }
            self.turn(events, buffer)?;
            let timeout_ns = if self.unread.is_empty() { WAIT_NS_MAX } else { 0 };
            self.net.wait(events, timeout_ns)?;
        }
        if self.net.live_count() > 0 {
            self.net.problem("connections that the server did not close in time");
        }
        Ok(())
    }

    fn begin_close(&mut self, index: usize, buffer: &mut [MaybeUninit<u8>]) {
        match self.net.state(index) {
            State::Open => {
                let paused = self.net.is_paused(index);
                self.net.set_paused(index, false);
                self.net.close(index);
                if paused {
                    // What lies unread would turn our FIN into a reset, and its edge is long gone.
                    self.read(index, true, buffer);
                }
            }
            State::Connecting | State::Upgrading | State::Opening(_) => self.net.discard(index),
            State::Unused | State::Closing | State::Closed => {}
        }
    }
}

/// How long to wait for readiness when the scenario wants its turn at `next`.
fn wait_ns(next: Option<u64>, now_ns: u64) -> u64 {
    match next.map(|at_ns| at_ns.saturating_sub(now_ns)) {
        Some(left) if left < SPIN_NS => 0,
        Some(left) => left.min(WAIT_NS_MAX),
        None => WAIT_NS_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_short_or_not_at_all() {
        assert_eq!(wait_ns(None, 5), WAIT_NS_MAX);
        assert_eq!(wait_ns(Some(3), 5), 0);
        assert_eq!(wait_ns(Some(5 + SPIN_NS - 1), 5), 0);
        assert_eq!(wait_ns(Some(5 + SPIN_NS), 5), SPIN_NS);
        assert_eq!(wait_ns(Some(u64::MAX), 5), WAIT_NS_MAX);
    }
}
