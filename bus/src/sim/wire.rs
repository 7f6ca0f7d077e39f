//! What travels between a port and the simulated broker, and the connection that carries it.
//!
//! Owns: messages, queues with latency, the faults of a connection. Must not know: what the messages mean.
//! Invariants: each of the three queues of a connection keeps its order; the queues do not wait for each
//! other, so an answer and the arrival it belongs to come in either order. Nothing crosses a cut but
//! publishes that already lay in a paused broker's socket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::backend::{Message, OwnedId, ReadPage, Target};
use crate::epoch::Position;
use crate::nonce::Nonces;
use crate::types::{Accepted, BusError, HistoryQuery};

/// From a port to the broker.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Subscribe { name: Arc<str>, nonce: u64 },
    Unsubscribe { name: Arc<str> },
    Publish { call: u64, target: Target, id: OwnedId, record: Bytes },
    Read { call: u64, target: Target, query: HistoryQuery },
    Clear { call: u64, target: Target },
    Canary,
}

/// From the broker to a port, on the connection's command side.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) call: u64,
    pub(super) body: ReplyBody,
}

#[derive(Clone, Debug)]
pub(super) enum ReplyBody {
    Published(Accepted),
    Read(Result<ReadPage, BusError>),
    Cleared(Position),
}

/// From the broker to a port, on the connection's subscription side.
#[derive(Clone, Debug)]
pub(super) struct Push {
    /// Counts within the connection: a hole is a lost push.
    pub(super) sequence: u64,
    pub(super) body: PushBody,
}

#[derive(Clone, Debug)]
pub(super) enum PushBody {
    Subscribed {
        nonce: u64,
    },
    Message {
        name: Arc<str>,
        message: Message,
    },
    /// Carries the number of the broker's life, which changes when its data does.
    Canary {
        generation: u64,
    },
}

#[derive(Debug)]
struct Timed<T> {
    at_ms: u64,
    item: T,
}

/// A first-in first-out queue whose items take time.
#[derive(Debug)]
pub(super) struct Lane<T> {
    items: VecDeque<Timed<T>>,
}

impl<T> Lane<T> {
    fn new() -> Lane<T> {
        Lane { items: VecDeque::new() }
    }

    /// Never overtakes what was sent before.
    fn send(&mut self, at_ms: u64, item: T) {
        let at_ms = self.items.back().map_or(at_ms, |last| last.at_ms.max(at_ms));
        self.items.push_back(Timed { at_ms, item });
    }

    pub(super) fn next_ms(&self) -> Option<u64> {
        self.items.front().map(|first| first.at_ms)
    }

    pub(super) fn take_due(&mut self, now_ms: u64) -> Option<T> {
        if self.next_ms()? > now_ms {
            return None;
        }
        self.items.pop_front().map(|timed| timed.item)
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }
}

/// One port's connection to the broker, seen from both ends.
#[derive(Debug)]
pub(super) struct Link {
    latency: Nonces,
    latency_ms: (u64, u64),
    /// Counts connections; requests of an older one get no reply.
    pub(super) connection: u64,
    pub(super) connected: bool,
    /// The broker's machine accepts connections; a paused broker's does too.
    pub(super) reachable: bool,
    /// When the port gets to know that the broker cut the connection.
    pub(super) cut_seen_ms: Option<u64>,
    pub(super) requests: Lane<(u64, Request)>,
    pub(super) replies: Lane<Reply>,
    pub(super) pushes: Lane<Push>,
    /// The broker's list of this connection's subscriptions.
    pub(super) subscriptions: BTreeMap<Arc<str>, u64>,
    push_sequence: u64,
    pub(super) lose_replies: u32,
    pub(super) lose_pushes: u32,
}

impl Link {
    pub(super) fn new(seed: u64, latency_ms: (u64, u64)) -> Link {
        Link {
            latency: Nonces::new(seed),
            latency_ms,
            connection: 0,
            connected: false,
            reachable: true,
            cut_seen_ms: None,
            requests: Lane::new(),
            replies: Lane::new(),
            pushes: Lane::new(),
            subscriptions: BTreeMap::new(),
            push_sequence: 0,
            lose_replies: 0,
            lose_pushes: 0,
        }
    }

    /// One way across, from now.
    pub(super) fn arrival_ms(&mut self, now_ms: u64) -> u64 {
        let (least, most) = self.latency_ms;
        now_ms + least + self.latency.below(most - least + 1)
    }

    /// The port connects. Returns whether it could.
    pub(super) fn connect(&mut self) -> bool {
        if self.reachable {
            self.connection += 1;
            self.connected = true;
            self.push_sequence = 0;
        }
        self.reachable
    }

    /// The port sends. Into a connection that was cut, though it does not know yet, it sends in vain.
    pub(super) fn request(&mut self, now_ms: u64, request: Request) {
        if !self.connected {
            return;
        }
        let at_ms = self.arrival_ms(now_ms);
        self.requests.send(at_ms, (self.connection, request));
    }

    /// The port gives the connection up, knowing nothing of the broker. What it sent may still be read by
    /// a broker that was only paused: publishes take effect, nothing else matters then.
    pub(super) fn abandon(&mut self) {
        self.close();
        self.requests.items.retain(|timed| matches!(timed.item.1, Request::Publish { .. }));
    }

    /// The broker's end is gone: what was on the way in either direction is lost, and the port gets to
    /// know it a little later.
    pub(super) fn cut(&mut self, now_ms: u64) {
        if self.connected {
            self.cut_seen_ms = Some(self.arrival_ms(now_ms));
        }
        self.close();
        self.requests.items.clear();
    }

    fn close(&mut self) {
        self.connected = false;
        self.replies.items.clear();
        self.pushes.items.clear();
        self.subscriptions.clear();
    }

    /// The broker answers a request of `connection`.
    pub(super) fn reply(&mut self, now_ms: u64, connection: u64, reply: Reply) {
        if !self.connected || connection != self.connection {
            return;
        }
        if self.lose_replies > 0 {
            self.lose_replies -= 1;
            return;
        }
        let at_ms = self.arrival_ms(now_ms);
        self.replies.send(at_ms, reply);
    }

    /// The broker pushes.
    pub(super) fn push(&mut self, now_ms: u64, body: PushBody) {
        if !self.connected {
            return;
        }
        self.push_sequence += 1;
        if self.lose_pushes > 0 && matches!(body, PushBody::Message { .. }) {
            self.lose_pushes -= 1;
            return;
        }
        let at_ms = self.arrival_ms(now_ms);
        self.pushes.send(at_ms, Push { sequence: self.push_sequence, body });
    }
}
