//! The port's connection: watching over it, making it again, and bringing the channels back.
//!
//! Owns: what happens at a cut, a silence, a lost message. Must not know: how commands are admitted.
//! Invariant: after any doubt every open channel is subscribed and read again, at most
//! [`SYNCS_IN_FLIGHT_MAX`] at a time.

use std::cell::RefCell;

use ringmain_proto::record::records;
use ringmain_proto::time::Now;

use super::{
    CANARY_MS, Call, Command, MESSAGES_PER_POLL_MAX, RECONNECT_MS, RESEND_MS, SILENCE_MS_MAX,
    SYNCS_IN_FLIGHT_MAX, SimPort, Sink,
};
use crate::sim::watch::{Next, State, Watch};
use crate::sim::wire::{Link, Push, PushBody, Reply, ReplyBody, Request};
use crate::types::{Accepted, BusError, ChannelId, Event, Health, PublishError};

impl SimPort {
    pub(super) fn notice_cut(&mut self, now: Now, sink: Sink<'_>) {
        let mut link = self.link.borrow_mut();
        if link.cut_seen_ms.is_some_and(|at_ms| at_ms <= now.mono_ms) {
            link.cut_seen_ms = None;
            drop(link);
            self.disconnected(now, sink);
        }
    }

    fn disconnected(&mut self, now: Now, sink: Sink<'_>) {
        self.connected = false;
        self.canary_heard = false;
        self.reconnect_ms = now.mono_ms + RECONNECT_MS;
        if self.health == Health::Up {
            self.health = Health::Down;
            sink(Event::Health(Health::Down));
        }
        let kept = |call: &Call| matches!(call.command, Command::Publish { retry: true, .. });
        let lost: Vec<u64> = self.calls.iter().filter(|(_, call)| !kept(call)).map(|(id, _)| *id).collect();
        for call in lost {
            self.give_up(call, sink);
        }
        let watched: Vec<ChannelId> = self.watches.keys().copied().collect();
        for channel in watched {
            self.fail_opens(now, channel, sink);
        }
        self.resync_all();
    }

    /// Answers the opens of a channel as failed. One that was not open before is not open.
    fn fail_opens(&mut self, now: Now, channel: ChannelId, sink: Sink<'_>) {
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        for token in watch.tokens.drain(..) {
            self.commands -= 1;
            sink(Event::Opened { token, channel, result: Err(BusError::Unavailable) });
        }
        watch.open_by_ms = None;
        if watch.cursor().is_none() {
            self.unwatch(now, channel);
        }
    }

    /// Ends a call without an answer from the broker.
    fn give_up(&mut self, call: u64, sink: Sink<'_>) {
        let Some(Call { command, .. }) = self.calls.remove(&call) else { return };
        match command {
            Command::Publish { token, .. } => {
                sink(Event::Published { token, result: Err(PublishError::Unknown) });
            }
            Command::Read { token } => {
                let publications = records(&[]);
                sink(Event::Read { token, result: Err(BusError::Unavailable), publications });
            }
            Command::Clear { token } => {
                sink(Event::Cleared { token, result: Err(BusError::Unavailable) });
            }
            Command::Sync { .. } => return,
        }
        self.commands -= 1;
    }

    /// Every open channel is subscribed and read again, in turns.
    fn resync_all(&mut self) {
        for watch in self.watches.values_mut() {
            watch.unsync();
        }
        self.recovering = self.watches.keys().copied().collect();
        self.waiting = self.recovering.iter().copied().collect();
        self.calls.retain(|_, call| !matches!(call.command, Command::Sync { .. }));
    }

    pub(super) fn reconnect(&mut self, now: Now) {
        if self.connected || now.mono_ms < self.reconnect_ms {
            return;
        }
        if !self.link.borrow_mut().connect() {
            self.reconnect_ms = now.mono_ms + RECONNECT_MS;
            return;
        }
        self.connected = true;
        self.canary_ms = now.mono_ms;
        self.heard_ms = now.mono_ms;
        self.push_sequence = 0;
        for call in self.calls.values_mut() {
            resend(&self.link, now, call);
        }
    }

    /// Takes what has come. Returns whether there may be more.
    pub(super) fn receive(&mut self, now: Now, sink: Sink<'_>) -> bool {
        for _ in 0..MESSAGES_PER_POLL_MAX {
            let mut link = self.link.borrow_mut();
            let reply_first = match (link.replies.next_ms(), link.pushes.next_ms()) {
                (Some(reply), Some(push)) => reply <= push,
                (reply, _) => reply.is_some(),
            };
            if reply_first {
                let Some(reply) = link.replies.take_due(now.mono_ms) else { return false };
                drop(link);
                self.reply(now, reply, sink);
            } else {
                let Some(push) = link.pushes.take_due(now.mono_ms) else { return false };
                drop(link);
                self.push(now, push, sink);
            }
        }
        true
    }

    fn reply(&mut self, now: Now, reply: Reply, sink: Sink<'_>) {
        let Some(Call { command, .. }) = self.calls.remove(&reply.call) else { return };
        match (command, reply.body) {
            (Command::Publish { token, attempts, own_id, .. }, ReplyBody::Published(accepted)) => {
                // A repeat of our own making is none to the caller.
                let repeated = accepted.repeated && !(own_id && attempts > 1);
                sink(Event::Published { token, result: Ok(Accepted { repeated, ..accepted }) });
            }
            (Command::Read { token }, ReplyBody::Read(result)) => match result {
                Ok(reply) => {
                    let publications = records(&reply.records);
                    sink(Event::Read { token, result: Ok(reply.page), publications });
                }
                Err(error) => {
                    sink(Event::Read { token, result: Err(error), publications: records(&[]) });
                }
            },
            (Command::Clear { token }, ReplyBody::Cleared(position)) => {
                sink(Event::Cleared { token, result: Ok(position) });
            }
            (Command::Sync { channel }, ReplyBody::Read(Ok(page))) => {
                let state = State::Reading(reply.call);
                self.advance(now, channel, sink, |watch, sink| {
                    if watch.state == state { watch.read(&page, channel, sink) } else { Next::Nothing }
                });
                return;
            }
            (command, body) => unreachable!("the broker answered {body:?} to {command:?}"),
        }
        self.commands -= 1;
    }

    fn push(&mut self, now: Now, push: Push, sink: Sink<'_>) {
        let expected = self.push_sequence + 1;
        self.push_sequence = push.sequence;
        if push.sequence != expected {
            // Something was lost on this connection, and nobody can say in which channel.
            self.resync_all();
        }
        match push.body {
            PushBody::Canary { generation } => {
                self.heard_ms = now.mono_ms;
                self.canary_heard = true;
                if self.generation.replace(generation).is_some_and(|known| known != generation) {
                    self.resync_all();
                }
            }
            PushBody::Subscribed { name, nonce } => {
                let Some(channel) = self.names.get(&name).copied() else { return };
                self.advance(now, channel, sink, |watch, sink| watch.confirmed(nonce, channel, sink));
            }
            PushBody::Message { name, message } => {
                let Some(channel) = self.names.get(&name).copied() else { return };
                self.advance(now, channel, sink, |watch, sink| watch.message(message, channel, sink));
            }
        }
    }

    /// Lets a channel take a step, and does what it asks for next.
    fn advance(
        &mut self,
        now: Now,
        channel: ChannelId,
        sink: Sink<'_>,
        step: impl FnOnce(&mut Watch, Sink<'_>) -> Next,
    ) {
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        let unanswered = watch.tokens.len();
        let next = step(watch, sink);
        self.commands -= unanswered - watch.tokens.len();
        if watch.state == State::Live {
            self.recovering.remove(&channel);
        }
        if next == Next::Read {
            self.read_position(now, channel);
        }
    }

    fn read_position(&mut self, now: Now, channel: ChannelId) {
        let call = self.call(now, Command::Sync { channel });
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        watch.state = State::Reading(call);
        let (name, options, query) = (watch.name.clone(), watch.options, watch.query());
        self.send(now, Request::Read { call, name, options, query });
    }

    fn read_position_again(&mut self, now: Now, call: u64, channel: ChannelId) {
        self.calls.remove(&call);
        if self.watches.get(&channel).is_some_and(|watch| watch.state == State::Reading(call)) {
            self.read_position(now, channel);
        }
    }

    pub(super) fn subscribe(&mut self, now: Now, channel: ChannelId) {
        let nonce = self.draw();
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        watch.state = State::Subscribing(nonce);
        let name = watch.name.clone();
        self.send(now, Request::Subscribe { name, nonce });
    }

    pub(super) fn unwatch(&mut self, now: Now, channel: ChannelId) {
        let Some(watch) = self.watches.remove(&channel) else { return };
        self.names.remove(&watch.name);
        self.recovering.remove(&channel);
        self.waiting.retain(|other| *other != channel);
        self.orphans.extend(watch.tokens.iter().map(|token| (*token, channel)));
        if self.connected {
            self.send(now, Request::Unsubscribe { name: watch.name });
        }
    }

    pub(super) fn expire_calls(&mut self, now: Now, sink: Sink<'_>) {
        let ids: Vec<u64> = self.calls.keys().copied().collect();
        for id in ids {
            let Some(call) = self.calls.get_mut(&id) else { continue };
            if call.give_up_ms.is_some_and(|at_ms| at_ms <= now.mono_ms) {
                self.give_up(id, sink);
            } else if self.connected && call.resend_ms.is_some_and(|at_ms| at_ms <= now.mono_ms) {
                match call.command {
                    Command::Sync { channel } => self.read_position_again(now, id, channel),
                    _ => resend(&self.link, now, call),
                }
            }
        }
        let late = |watch: &Watch| watch.open_by_ms.is_some_and(|by_ms| by_ms <= now.mono_ms);
        let late: Vec<ChannelId> =
            self.watches.iter().filter(|(_, watch)| late(watch)).map(|(id, _)| *id).collect();
        for channel in late {
            self.fail_opens(now, channel, sink);
        }
    }

    pub(super) fn watch_over(&mut self, now: Now, sink: Sink<'_>) {
        if !self.connected {
            return;
        }
        if now.mono_ms >= self.heard_ms + SILENCE_MS_MAX {
            self.link.borrow_mut().abandon();
            self.disconnected(now, sink);
        } else if now.mono_ms >= self.canary_ms {
            self.canary_ms = now.mono_ms + CANARY_MS;
            self.send(now, Request::Canary);
        }
    }

    pub(super) fn sync_more(&mut self, now: Now) {
        while self.connected && self.recovering.len() - self.waiting.len() < SYNCS_IN_FLIGHT_MAX {
            let Some(channel) = self.waiting.pop_front() else { return };
            self.subscribe(now, channel);
        }
    }

    pub(super) fn settle_health(&mut self, sink: Sink<'_>) {
        let whole = self.connected && self.canary_heard && self.recovering.is_empty();
        if self.health == Health::Down && whole {
            self.health = Health::Up;
            sink(Event::Health(Health::Up));
        }
    }
}

/// Sends a publish again, if it may be.
fn resend(link: &RefCell<Link>, now: Now, call: &mut Call) {
    if let Command::Publish { request, retry: true, attempts, .. } = &mut call.command {
        *attempts += 1;
        link.borrow_mut().request(now.mono_ms, request.clone());
        call.resend_ms = Some(now.mono_ms + RESEND_MS);
    }
}
