//! The connections of one load process: sockets, states, unsent bytes, counters.
//!
//! Invariants: a connection is counted in `pending` from connect until it is open and in `open` while it is open;
//! events of a socket that is gone are told by the slot's generation. Unsent bytes are bounded by
//! [`UNSENT_BYTES_MAX`]; a connection above it is given up.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::time::{ClockId, clock_gettime};

use crate::io::alarm;
use crate::io::board::Phase;
use crate::io::socket::start_connect;
use crate::measure::schedule::Schedule;
use crate::plan::{Pace, Target};
use crate::wire::frame::push_close_frame;

/// What one connection may keep unsent, in bytes.
pub(crate) const UNSENT_BYTES_MAX: usize = 1 << 20;
/// Connections from one source address: well below the 28,232 ports of the default range.
const CONNECTIONS_PER_SOURCE: u64 = 16_000;
/// Source addresses for connections that come and go: enough that no port is reused within seconds.
const CHURN_SOURCES: u64 = 200;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Unused,
    Connecting,
    /// The upgrade request is sent.
    Upgrading,
    /// So many replies are missing until it is open.
    Opening(u32),
    Open,
    /// Our close frame is sent.
    Closing,
    /// The server's close frame is here too: only FIN is missing.
    Closed,
}

impl State {
    fn is_pending(self) -> bool {
        matches!(self, State::Connecting | State::Upgrading | State::Opening(_))
    }

    fn is_live(self) -> bool {
        self != State::Unused
    }
}

#[derive(Default)]
struct Connection {
    socket: Option<OwnedFd>,
    state: State,
    generation: u32,
    /// It is not read from.
    paused: bool,
    /// The beginning of a frame whose end has not come.
    partial: Vec<u8>,
    unsent: Vec<u8>,
}

/// All connections of this process.
pub(crate) struct Net {
    epoll: OwnedFd,
    target: Target,
    /// Connections from this number on go there instead.
    other: Option<(usize, Target)>,
    /// Wakes a wait at a time of the scenario's.
    timer: Option<OwnedFd>,
    connections: Vec<Connection>,
    queue: VecDeque<u32>,
    connect_window: usize,
    /// The number of this process's first connection among all: decides source addresses.
    first: u64,
    /// Connections come and go: sources rotate.
    churns: bool,
    started: u64,
    pending: usize,
    open: usize,
    live: usize,
    failed: u64,
    bytes_in: u64,
    bytes_out: u64,
    now_ns: u64,
    problems: BTreeMap<String, u64>,
}

impl Net {
    /// `count` connections, none opened yet.
    pub(crate) fn new(
        target: Target,
        count: usize,
        first: u64,
        connect_window: usize,
        churns: bool,
    ) -> Result<Net, Errno> {
        let mut connections = Vec::new();
        connections.resize_with(count, Connection::default);
        let mut net = Net {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            target,
            other: None,
            timer: None,
            connections,
            queue: VecDeque::new(),
            connect_window: connect_window.max(1),
            first,
            churns,
            started: 0,
            pending: 0,
            open: 0,
            live: 0,
            failed: 0,
            bytes_in: 0,
            bytes_out: 0,
            now_ns: 0,
            problems: BTreeMap::new(),
        };
        net.tick();
        Ok(net)
    }

    /// Reads the clock; [`Net::now_ns`] gives this time until the next call.
    pub(crate) fn tick(&mut self) {
        let now = clock_gettime(ClockId::Monotonic);
        self.now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    }

    /// Nanoseconds of the monotonic clock, which all processes of a machine share.
    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Connections from number `first` on go to `target`, whose path is that of the others.
    pub(crate) fn redirect(&mut self, first: usize, target: Target) {
        self.other = Some((first, target));
    }

    fn target_of(&self, index: usize) -> &Target {
        self.other.as_ref().filter(|(first, _)| index >= *first).map_or(&self.target, |(_, target)| target)
    }

    /// The wait that is under way at `at_ns` ends then, to the precision of the kernel's timers, without spinning.
    pub(crate) fn wake_at(&mut self, at_ns: u64) -> Result<(), Errno> {
        if self.timer.is_none() {
            let timer = alarm::create()?;
            // No connection has this number, so the event means nothing else.
            let data = EventData::new_u64(u64::MAX);
            epoll::add(&self.epoll, &timer, data, EventFlags::IN | EventFlags::ET)?;
            self.timer = Some(timer);
        }
        self.timer.as_ref().map_or(Ok(()), |timer| alarm::set(timer, at_ns))
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    pub(crate) fn open_count(&self) -> usize {
        self.open
    }

    /// Connections with a socket.
    pub(crate) fn live_count(&self) -> usize {
        self.live
    }

    pub(crate) fn failed_count(&self) -> u64 {
        self.failed
    }

    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.bytes_in, self.bytes_out)
    }

    pub(crate) fn problems(&self) -> impl Iterator<Item = (&String, &u64)> {
        self.problems.iter()
    }

    /// Begins an open loop's schedule with the warm-up; at the end, counts it if it was not kept up.
    pub(crate) fn schedule(&mut self, schedule: &mut Option<Schedule>, phase: Phase, pace: Pace) {
        if let (Phase::Warmup, Pace::PerSecond(rate)) = (phase, pace) {
            *schedule = Some(Schedule::new(self.now_ns(), rate));
        }
        let over = schedule.take_if(|_| phase == Phase::Finish);
        if over.is_some_and(|schedule| schedule.is_behind(self.now_ns())) {
            self.problem("the rate was not kept up");
        }
    }

    /// Counts something that should not happen.
    pub(crate) fn problem(&mut self, what: &str) {
        match self.problems.get_mut(what) {
            Some(count) => *count += 1,
            None => _ = self.problems.insert(what.to_owned(), 1),
        }
    }

    /// Connection `index` is to be opened when its turn comes.
    pub(crate) fn want(&mut self, index: usize) {
        self.queue.push_back(index as u32);
    }

    /// Nothing more is to be opened.
    pub(crate) fn want_none(&mut self) {
        self.queue.clear();
    }

    /// Starts to connect what is wanted, as far as the window allows.
    pub(crate) fn ramp(&mut self) {
        while self.pending < self.connect_window {
            let Some(index) = self.queue.pop_front() else { return };
            self.connect(index as usize);
        }
    }

    fn connect(&mut self, index: usize) {
        let source = self.source(index);
        let address = self.target_of(index).address;
        self.started += 1;
        let connection = &mut self.connections[index];
        let generation = connection.generation.wrapping_add(1);
        let opened = start_connect(address, source).and_then(|socket| {
            let data = EventData::new_u64(u64::from(generation) << 32 | index as u64);
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(&self.epoll, &socket, data, flags)?;
            Ok(socket)
        });
        match opened {
            Ok(socket) => {
                let socket = Some(socket);
                *connection =
                    Connection { socket, state: State::Connecting, generation, ..Connection::default() };
                self.pending += 1;
                self.live += 1;
            }
            Err(error) => {
                self.failed += 1;
                self.problem(&format!("connect: {error}"));
            }
        }
    }

    /// The source address of the next connection; the kernel's choice when the target is not on loopback.
    fn source(&self, index: usize) -> Option<Ipv4Addr> {
        if !self.target_of(index).address.ip().is_loopback() {
            return None;
        }
        let number = if self.churns {
            (self.first + self.started) % CHURN_SOURCES
        } else {
            (self.first + index as u64) / CONNECTIONS_PER_SOURCE
        };
        Some(Ipv4Addr::new(127, 0, 1 + (number / 250) as u8, 1 + (number % 250) as u8))
    }

    /// The connection that an event belongs to, unless its socket is gone.
    pub(crate) fn of_event(&self, data: u64) -> Option<usize> {
        let index = data as u32 as usize;
        let connection = self.connections.get(index)?;
        (connection.socket.is_some() && u64::from(connection.generation) == data >> 32).then_some(index)
    }

    pub(crate) fn state(&self, index: usize) -> State {
        self.connections[index].state
    }

    pub(crate) fn set_state(&mut self, index: usize, state: State) {
        let before = std::mem::replace(&mut self.connections[index].state, state);
        self.pending = self.pending - usize::from(before.is_pending()) + usize::from(state.is_pending());
        self.open = self.open - usize::from(before == State::Open) + usize::from(state == State::Open);
        self.live = self.live - usize::from(before.is_live()) + usize::from(state.is_live());
    }

    pub(crate) fn is_paused(&self, index: usize) -> bool {
        self.connections[index].paused
    }

    /// Stops (or goes on) reading from connection `index`.
    pub(crate) fn set_paused(&mut self, index: usize, paused: bool) {
        self.connections[index].paused = paused;
    }

    pub(crate) fn take_partial(&mut self, index: usize) -> Vec<u8> {
        std::mem::take(&mut self.connections[index].partial)
    }

    pub(crate) fn keep_partial(&mut self, index: usize, partial: Vec<u8>) {
        self.connections[index].partial = partial;
    }

    /// Waits for readiness.
    pub(crate) fn wait(&mut self, events: &mut Vec<epoll::Event>, timeout_ns: u64) -> Result<(), Errno> {
        let timeout = rustix::event::Timespec {
            tv_sec: (timeout_ns / 1_000_000_000) as _,
            tv_nsec: (timeout_ns % 1_000_000_000) as _,
        };
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads once from connection `index`. `None`: nothing there. An empty slice: end of input.
    pub(crate) fn receive<'b>(
        &mut self,
        index: usize,
        buffer: &'b mut [std::mem::MaybeUninit<u8>],
    ) -> Option<Result<&'b [u8], Errno>> {
        let socket = self.connections[index].socket.as_ref()?;
        match rustix::net::recv(socket, buffer, rustix::net::RecvFlags::DONTWAIT) {
            Ok(((bytes, _), _)) => {
                self.bytes_in += bytes.len() as u64;
                Some(Ok(bytes))
            }
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// The error that a socket has met, if any.
    pub(crate) fn socket_error(&self, index: usize) -> Option<Errno> {
        let socket = self.connections[index].socket.as_ref()?;
        rustix::net::sockopt::socket_error(socket).ok()?.err()
    }

    /// Sends `bytes`, or keeps what the socket does not take.
    pub(crate) fn send(&mut self, index: usize, bytes: &[u8]) {
        let connection = &mut self.connections[index];
        let Some(socket) = &connection.socket else { return };
        let mut sent = 0;
        if connection.unsent.is_empty() {
            // An error of the connection is found by the next read.
            sent = send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).unwrap_or(0);
            self.bytes_out += sent as u64;
        }
        if sent < bytes.len() {
            connection.unsent.extend_from_slice(&bytes[sent..]);
            if connection.unsent.len() > UNSENT_BYTES_MAX {
                self.problem("the server takes nothing: more than 1 MiB unsent");
                self.fail(index);
            }
        }
    }

    /// The socket has room: sends what was kept.
    pub(crate) fn flush(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let Some(socket) = &connection.socket else { return };
        if connection.unsent.is_empty() {
            return;
        }
        let sent = send(socket, &connection.unsent, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).unwrap_or(0);
        connection.unsent.drain(..sent);
        if connection.unsent.is_empty() {
            connection.unsent = Vec::new();
        }
        self.bytes_out += sent as u64;
    }

    /// Begins the closing handshake of an open connection.
    pub(crate) fn close(&mut self, index: usize) {
        if self.state(index) != State::Open {
            return;
        }
        let mut frame = Vec::with_capacity(8);
        push_close_frame(&mut frame);
        self.set_state(index, State::Closing);
        self.send(index, &frame);
    }

    /// Gives the socket back, whatever its state.
    pub(crate) fn discard(&mut self, index: usize) {
        self.set_state(index, State::Unused);
        let generation = self.connections[index].generation;
        self.connections[index] = Connection { generation, ..Connection::default() };
    }

    /// Gives up a connection that should have lived.
    pub(crate) fn fail(&mut self, index: usize) {
        self.failed += 1;
        self.discard(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::socket::listen_on_loopback;

    /// A process with one open connection to a listener that never reads.
    fn one_open() -> (Net, OwnedFd) {
        let (listener, address) = listen_on_loopback(false).expect("a free port");
        let target = Target { address, path: "/".into() };
        let mut net = Net::new(target, 1, 0, 1, false).expect("an epoll");
        net.want(0);
        net.ramp();
        let mut events = Vec::with_capacity(4);
        while !events.iter().any(|event: &epoll::Event| { event.flags }.contains(EventFlags::OUT)) {
            net.wait(&mut events, 1_000_000_000).expect("epoll");
        }
        net.set_state(0, State::Open);
        (net, listener)
    }

    #[test]
    fn unsent_bytes_have_a_limit() {
        let (mut net, _listener) = one_open();
        let piece = vec![0; 64 << 10];
        // Far more than the socket buffers of both ends can take.
        for _ in 0..10_000 {
            net.send(0, &piece);
            if net.failed_count() > 0 {
                break;
            }
            assert!(net.connections[0].unsent.len() <= UNSENT_BYTES_MAX);
        }
        assert_eq!((net.failed_count(), net.live_count(), net.open_count()), (1, 0, 0));
        assert_eq!(net.problems().count(), 1);
    }

    #[test]
    fn counts_states_and_knows_stale_events() {
        let (mut net, _listener) = one_open();
        let event = u64::from(net.connections[0].generation) << 32;
        assert_eq!((net.open_count(), net.live_count(), net.of_event(event)), (1, 1, Some(0)));
        net.close(0);
        assert_eq!((net.open_count(), net.live_count(), net.state(0)), (0, 1, State::Closing));
        net.discard(0);
        assert_eq!((net.live_count(), net.of_event(event)), (0, None));
        net.want(0);
        net.ramp();
        assert_eq!(net.of_event(event), None, "an event of the socket before");
    }

    #[test]
    fn sources_change_before_ports_run_out() {
        let target = Target { address: "127.0.0.1:1".parse().expect("an address"), path: "/".into() };
        let net = |first, churns| Net::new(target.clone(), 1, first, 1, churns).expect("an epoll");
        assert_eq!(net(0, false).source(0), Some(Ipv4Addr::new(127, 0, 1, 1)));
        assert_eq!(net(CONNECTIONS_PER_SOURCE - 1, false).source(0), Some(Ipv4Addr::new(127, 0, 1, 1)));
        assert_eq!(net(CONNECTIONS_PER_SOURCE, false).source(0), Some(Ipv4Addr::new(127, 0, 1, 2)));
        assert_eq!(net(1_999_999, false).source(0), Some(Ipv4Addr::new(127, 0, 1, 125)));
        let mut churning = net(0, true);
        let first = churning.source(0);
        churning.started += 1;
        assert_ne!(churning.source(0), first);
    }
}
