//! A node on the simulated broker: the real port and hub, and a backend whose connection is simulated.
//!
//! Owns: the connection to the broker: requests in flight, watching over it, making it again. Must not know: the
//! broker's data, it learns everything from messages, late; nor what the hub makes of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use crate::backend::{CANARY_MS, Call, Domain, OwnedId, Reply, Request, SILENCE_MS_MAX};
use crate::contract::Bus;
use crate::epoch::Position;
use crate::hub::{Hub, HubOptions};
use crate::link::{End, LinkOptions, Port, link};
use crate::sim::SimOptions;
use crate::sim::wire::{self, Link, Push, PushBody, ReplyBody};
use crate::types::{
    Accepted, BusError, Channel, ChannelId, Event, Health, HistoryQuery, Outcome, Page, PublicationId,
    PublishError, Token,
};

/// Pause before connecting again, in milliseconds.
pub const RECONNECT_MS: u64 = 50;

/// When a publish without an answer is sent again, in milliseconds.
pub const RESEND_MS: u64 = 1_000;

/// Messages taken in one poll.
pub const MESSAGES_PER_POLL_MAX: usize = 256;

const _: () = assert!(SILENCE_MS_MAX + RECONNECT_MS < crate::contract::LOSS_VISIBLE_MS_MAX);

/// The one broker.
const DOMAIN: Domain = Domain(0);

type SharedLink = Arc<Mutex<Link>>;

/// One simulation runs on one thread at a time: nobody is ever waited for.
pub(super) fn lock(link: &Mutex<Link>) -> MutexGuard<'_, Link> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request without an answer.
#[derive(Debug)]
enum Pending {
    Publish {
        request: wire::Request,
        /// May be sent again under its id.
        retry: bool,
        attempts: u32,
        own_id: bool,
        resend_ms: u64,
    },
    Read,
    Clear,
    Subscribe,
}

#[derive(Debug)]
struct SimBackend {
    link: SharedLink,
    retries: bool,
    pending: BTreeMap<u64, Pending>,
    replies: VecDeque<Reply>,
    connected: bool,
    /// The canary has come back since the connection was made.
    is_back: bool,
    reconnect_ms: u64,
    canary_ms: u64,
    heard_ms: u64,
    polled_ms: u64,
    generation: Option<u64>,
    push_sequence: u64,
}

impl SimBackend {
    fn request(&mut self, now: Now, request: Request) {
        let (call, pending, request) = match request {
            Request::Subscribe { call, target } => {
                (call, Pending::Subscribe, wire::Request::Subscribe { name: target.name, nonce: call.0 })
            }
            Request::Unsubscribe { target } => {
                if self.connected {
                    lock(&self.link).request(now.mono_ms, wire::Request::Unsubscribe { name: target.name });
                }
                return;
            }
            Request::Publish { call, target, id, record } => {
                // An ephemeral channel's publication is never tried again: at most once.
                let retry = self.retries && target.options.is_positioned();
                let own_id = matches!(id, OwnedId::Node(..));
                let request = wire::Request::Publish { call: call.0, target, id, record };
                let resend_ms = now.mono_ms + RESEND_MS;
                let pending =
                    Pending::Publish { request: request.clone(), retry, attempts: 1, own_id, resend_ms };
                (call, pending, request)
            }
            Request::Read { call, target, query } => {
                (call, Pending::Read, wire::Request::Read { call: call.0, target, query })
            }
            Request::Clear { call, target } => {
                (call, Pending::Clear, wire::Request::Clear { call: call.0, target })
            }
        };
        if self.connected {
            lock(&self.link).request(now.mono_ms, request);
            self.pending.insert(call.0, pending);
        } else {
            self.fail(call, &pending, PublishError::Unavailable);
        }
    }

    /// Answers a request that the broker does not answer any more.
    fn fail(&mut self, call: Call, pending: &Pending, publish: PublishError) {
        let error = BusError::Unavailable;
        self.replies.push_back(match pending {
            Pending::Publish { .. } => Reply::Published { call, result: Err(publish) },
            Pending::Read => Reply::Read { call, result: Err(error) },
            Pending::Clear => Reply::Cleared { call, result: Err(error) },
            Pending::Subscribe => Reply::Subscribed { call, result: Err(error) },
        });
    }

    fn poll(&mut self, now: Now) {
        // While nobody polled, nobody listened: that is no silence of the broker.
        self.heard_ms += now.mono_ms.saturating_sub(self.polled_ms + CANARY_MS);
        self.polled_ms = now.mono_ms;
        let cut = {
            let mut link = lock(&self.link);
            let cut = link.cut_seen_ms.is_some_and(|at_ms| at_ms <= now.mono_ms);
            if cut {
                link.cut_seen_ms = None;
            }
            cut
        };
        if cut {
            self.disconnected(now);
        }
        self.reconnect(now);
        if !self.receive(now) {
            self.watch_over(now);
        }
        self.resend(now);
    }

    fn disconnected(&mut self, now: Now) {
        self.connected = false;
        self.is_back = false;
        self.reconnect_ms = now.mono_ms + RECONNECT_MS;
        let kept = |pending: &Pending| matches!(pending, Pending::Publish { retry: true, .. });
        let lost: Vec<u64> =
            self.pending.iter().filter(|(_, pending)| !kept(pending)).map(|(call, _)| *call).collect();
        self.replies.extend([Reply::Reachable(false), Reply::Lost { domain: DOMAIN }]);
        for call in lost {
            if let Some(pending) = self.pending.remove(&call) {
                self.fail(Call(call), &pending, PublishError::Unknown);
            }
        }
    }

    /// Something was lost, and nobody can say in which channel.
    fn doubt(&mut self) {
        self.replies.extend([Reply::Lost { domain: DOMAIN }, Reply::Back { domain: DOMAIN }]);
    }

    fn reconnect(&mut self, now: Now) {
        if self.connected || now.mono_ms < self.reconnect_ms {
            return;
        }
        if !lock(&self.link).connect() {
            self.reconnect_ms = now.mono_ms + RECONNECT_MS;
            return;
        }
        self.connected = true;
        self.canary_ms = now.mono_ms;
        self.heard_ms = now.mono_ms;
        self.push_sequence = 0;
        self.pending.values_mut().for_each(|pending| {
            if let Pending::Publish { resend_ms, .. } = pending {
                *resend_ms = now.mono_ms;
            }
        });
    }

    /// Takes what has come. Returns whether there may be more.
    fn receive(&mut self, now: Now) -> bool {
        for _ in 0..MESSAGES_PER_POLL_MAX {
            let mut link = lock(&self.link);
            let reply_first = match (link.replies.next_ms(), link.pushes.next_ms()) {
                (Some(reply), Some(push)) => reply <= push,
                (reply, _) => reply.is_some(),
            };
            if reply_first {
                let Some(reply) = link.replies.take_due(now.mono_ms) else { return false };
                drop(link);
                self.reply(reply);
            } else {
                let Some(push) = link.pushes.take_due(now.mono_ms) else { return false };
                drop(link);
                self.push(now, push);
            }
        }
        true
    }

    fn reply(&mut self, reply: wire::Reply) {
        let Some(pending) = self.pending.remove(&reply.call) else { return };
        let call = Call(reply.call);
        self.replies.push_back(match (pending, reply.body) {
            (Pending::Publish { attempts, own_id, .. }, ReplyBody::Published(accepted)) => {
                // A repeat of our own making is none to the caller.
                let repeated = accepted.repeated && !(own_id && attempts > 1);
                Reply::Published { call, result: Ok(Accepted { repeated, ..accepted }) }
            }
            (Pending::Read, ReplyBody::Read(result)) => Reply::Read { call, result },
            (Pending::Clear, ReplyBody::Cleared(position)) => Reply::Cleared { call, result: Ok(position) },
            (pending, body) => unreachable!("the broker answered {body:?} to {pending:?}"),
        });
    }

    fn push(&mut self, now: Now, push: Push) {
        let expected = self.push_sequence + 1;
        self.push_sequence = push.sequence;
        if push.sequence != expected {
            self.doubt();
        }
        match push.body {
            PushBody::Canary { generation } => {
                self.heard_ms = now.mono_ms;
                if self.generation.replace(generation).is_some_and(|known| known != generation) {
                    self.doubt();
                }
                if !std::mem::replace(&mut self.is_back, true) {
                    self.replies.extend([Reply::Back { domain: DOMAIN }, Reply::Reachable(true)]);
                }
            }
            PushBody::Subscribed { nonce, .. } => {
                if self.pending.remove(&nonce).is_some() {
                    self.replies.push_back(Reply::Subscribed { call: Call(nonce), result: Ok(DOMAIN) });
                }
            }
            PushBody::Message { name, message } => self.replies.push_back(Reply::Message { name, message }),
        }
    }

    fn watch_over(&mut self, now: Now) {
        if !self.connected {
            return;
        }
        if now.mono_ms >= self.heard_ms + SILENCE_MS_MAX {
            lock(&self.link).abandon();
            self.disconnected(now);
        } else if now.mono_ms >= self.canary_ms {
            self.canary_ms = now.mono_ms + CANARY_MS;
            lock(&self.link).request(now.mono_ms, wire::Request::Canary);
        }
    }

    /// Sends publishes again that may be.
    fn resend(&mut self, now: Now) {
        if !self.connected {
            return;
        }
        for pending in self.pending.values_mut() {
            if let Pending::Publish { request, retry: true, attempts, resend_ms, .. } = pending
                && *resend_ms <= now.mono_ms
            {
                *attempts += 1;
                *resend_ms = now.mono_ms + RESEND_MS;
                lock(&self.link).request(now.mono_ms, request.clone());
            }
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        let resend = |pending: &Pending| match pending {
            Pending::Publish { retry: true, resend_ms, .. } => Some(*resend_ms).filter(|_| self.connected),
            _ => None,
        };
        let resend = self.pending.values().filter_map(resend).min();
        let connection = match self.connected {
            true => self.canary_ms.min(self.heard_ms + SILENCE_MS_MAX),
            false => self.reconnect_ms,
        };
        let link = lock(&self.link);
        let messages = [link.cut_seen_ms, link.replies.next_ms(), link.pushes.next_ms()];
        messages.into_iter().chain([resend, Some(connection)]).flatten().min()
    }
}

/// One node's view of the simulated broker.
#[derive(Debug)]
pub struct SimPort {
    port: Port,
    ends: [End; 1],
    hub: Hub,
    backend: SimBackend,
}

impl SimPort {
    pub(super) fn new(shared: SharedLink, options: SimOptions) -> SimPort {
        let limits = LinkOptions {
            commands_max: options.commands_max,
            record_bytes_max: options.record_bytes_max,
            ..LinkOptions::default()
        };
        let (port, end) = link(limits, Arc::default(), Arc::new(|| ()));
        let backend = SimBackend {
            link: shared,
            retries: options.retries,
            pending: BTreeMap::new(),
            replies: VecDeque::new(),
            connected: false,
            is_back: false,
            reconnect_ms: 0,
            canary_ms: 0,
            heard_ms: 0,
            polled_ms: 0,
            generation: None,
            push_sequence: 0,
        };
        SimPort { port, ends: [end], hub: Hub::new(HubOptions::default()), backend }
    }

    /// Lets the hub and the backend do what they have to.
    fn pump(&mut self, now: Now) {
        while let Some(command) = self.ends[0].command() {
            self.hub.command(now, 0, command, &mut self.ends);
        }
        loop {
            while let Some(reply) = self.backend.replies.pop_front() {
                self.hub.reply(now, reply, &mut self.ends);
            }
            self.hub.poll(now, &mut self.ends);
            for request in self.hub.take_requests() {
                self.backend.request(now, request);
            }
            if self.backend.replies.is_empty() {
                return;
            }
        }
    }
}

impl Bus for SimPort {
    fn open(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        let outcome = self.port.open(now, token, channel);
        self.pump(now);
        outcome
    }

    fn close(&mut self, now: Now, channel: ChannelId) {
        self.port.close(now, channel);
        self.pump(now);
    }

    fn publish(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        id: PublicationId<'_>,
        publication: &Publication<'_>,
    ) -> Outcome<Result<Accepted, PublishError>> {
        let outcome = self.port.publish(now, token, channel, id, publication);
        self.pump(now);
        outcome
    }

    fn read(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        query: &HistoryQuery,
        out: &mut dyn FnMut(&Publication<'_>),
    ) -> Outcome<Result<Page, BusError>> {
        let outcome = self.port.read(now, token, channel, query, out);
        self.pump(now);
        outcome
    }

    fn clear(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        let outcome = self.port.clear(now, token, channel);
        self.pump(now);
        outcome
    }

    fn is_idle(&self, now: Now, channel: ChannelId) -> bool {
        self.port.is_idle(now, channel)
    }

    fn forget(&mut self, channel: ChannelId) {
        self.port.forget(channel);
    }

    fn poll(&mut self, now: Now, sink: &mut dyn FnMut(Event<'_>)) {
        self.backend.poll(now);
        self.pump(now);
        self.port.poll(now, sink);
    }

    fn next_deadline(&self) -> Option<u64> {
        let hub = self.hub.next_deadline();
        [self.port.next_deadline(), hub, self.backend.next_deadline()].into_iter().flatten().min()
    }

    fn health(&self) -> Health {
        self.port.health()
    }
}
