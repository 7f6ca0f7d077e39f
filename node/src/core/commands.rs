//! What connected clients ask: every command but connect.
//!
//! Owns the shape of each answer, with the rules that implementers get wrong (they are named at each
//! place). The order of the checks is Centrifugo's. Who may do what is in [`super::permission`],
//! subscriptions proper are in [`super::subscribe`], new tokens in [`super::refresh`].
//!
//! Invariant: what a client does wrong closes its connection only behind the answers that it is owed
//! ([`Core::end_input`]).

use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{Command, Publication, Push, Reply, Request, SubscribeRequest};
use ringmain_proto::time::Now;

use super::api::home_of;
use super::engine::{ShardIndex, Slot};
use super::home::Publisher;
use super::mesh::*;
use super::metrics::Metric;
use super::permission::{Access, KIND_SHARED_POLL, Refusal, is_map};
use super::session::*;
use super::shard::Core;

/// The channel that every connection is subscribed to.
pub(crate) const BROADCAST_CHANNEL: &str = "broadcast:global";

impl Core {
    /// One command of a client. May close the connection.
    pub(crate) fn command(&mut self, slot: Slot, command: Command<'_>, now: Now) {
        self.metrics.add(Metric::Commands, 1);
        let Command { id, request } = command;
        let stage = self.sessions.get(slot).stage;
        if id == 0 && !matches!(request, Request::Send { .. }) {
            // Whatever else it says, a command without id is the answer to a ping.
            return self.pong(slot, now);
        }
        if let Request::Connect(request) = request {
            return if stage == Stage::Opened {
                self.connect(slot, id, &request, now);
            } else {
                self.end_input(slot, CloseReason::BadRequest, now);
            };
        }
        if stage != Stage::Connected {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        match request {
            Request::Subscribe(request) => self.subscribe_command(slot, id, &request, now),
            Request::Unsubscribe { channel } => self.unsubscribe_command(slot, id, &channel, now),
            Request::Publish { channel, data } => self.publish_command(slot, id, &channel, data, now),
            Request::MapPublish { channel, data, removed } => {
                self.map_publish_command(slot, id, &channel, removed || !data.is_empty(), now);
            }
            Request::Presence { channel } => {
                self.query(slot, id, &channel, Access::Presence, Query::Presence, now);
            }
            Request::PresenceStats { channel } => {
                self.query(slot, id, &channel, Access::Presence, Query::PresenceStats, now);
            }
            Request::History { channel, limit, since, reverse } => {
                let since = since.map(|since| RecoverFrom::new(since.offset, &since.epoch));
                let query = Query::History { limit, since, reverse };
                self.query(slot, id, &channel, Access::History, query, now);
            }
            Request::Rpc { .. } => self.reply_error(slot, id, ErrorCode::NotAvailable),
            Request::Send { .. } => self.end_input(slot, CloseReason::NotAvailable, now),
            Request::Refresh { token } => self.refresh_command(slot, id, &token, now),
            Request::SubRefresh { channel, token } => {
                self.sub_refresh_command(slot, id, &channel, &token, now);
            }
            Request::Connect(_) | Request::Ping | Request::Pong | Request::Empty => {
                self.end_input(slot, CloseReason::BadRequest, now);
            }
        }
    }

    /// The answer to a ping. With none outstanding it breaks the protocol.
    pub(crate) fn pong(&mut self, slot: Slot, now: Now) {
        let session = self.sessions.get_mut(slot);
        if !session.is(AWAITS_PONG) || session.is(FRAME_PINGS) {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        session.set(AWAITS_PONG, false);
    }

    /// Queues a reply.
    pub(crate) fn reply(&mut self, slot: Slot, id: u32, reply: &Reply<'_>) {
        let codec = self.sessions.get(slot).codec;
        self.out.frame(slot, codec.opcode(), |out| codec.encode_reply(id, reply, out));
    }

    /// Queues an error reply.
    pub(crate) fn reply_error(&mut self, slot: Slot, id: u32, error: ErrorCode) {
        self.metrics.add(Metric::CommandErrors, 1);
        self.reply(slot, id, &error.reply());
    }

    /// Queues a push of this connection's own.
    pub(crate) fn push(&mut self, slot: Slot, push: &Push<'_>) {
        let codec = self.sessions.get(slot).codec;
        self.out.frame(slot, codec.opcode(), |out| codec.encode_push(push, out));
    }

    // --- subscribe, unsubscribe ---

    fn subscribe_command(&mut self, slot: Slot, id: u32, request: &SubscribeRequest<'_>, now: Now) {
        if request.channel.is_empty() {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        if request.kind == KIND_SHARED_POLL {
            return self.reply_error(slot, id, ErrorCode::NotAvailable);
        }
        if !is_map(request.kind) && !matches!(&*request.delta, "" | "fossil") {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        match self.subscribe_checked(slot, id, request, now) {
            Ok(()) => {}
            Err(Refusal::Error(error)) => self.reply_error(slot, id, error),
            Err(Refusal::Close(reason)) => self.end_input(slot, reason, now),
        }
    }

    fn subscribe_checked(
        &mut self,
        slot: Slot,
        id: u32,
        request: &SubscribeRequest<'_>,
        now: Now,
    ) -> Result<(), Refusal> {
        let name = &*request.channel;
        if name.len() > self.config.client.channel_bytes_max as usize {
            return Err(ErrorCode::BadRequest.into());
        }
        let standing = self.standing(slot, name);
        if standing == Standing::Subscribed {
            return Err(ErrorCode::AlreadySubscribed.into());
        }
        let leaving = usize::from(standing == Standing::Leaving);
        if self.sessions.get(slot).counted_subs() - leaving >= self.config.client.channel_limit as usize {
            return Err(ErrorCode::LimitExceeded.into());
        }
        let new = self.permitted_sub(slot, id, request, now)?;
        match standing {
            Standing::Leaving => self.follow_later(slot, name, Follow::Subscribe(Box::new(new)))?,
            Standing::Automatic(index) => {
                // A client that subscribes to the channel of everyone itself takes the automatic one over.
                self.unsubscribe(slot, index, now);
                self.subscribe(slot, name, new, now)?;
            }
            Standing::Subscribed | Standing::None => self.subscribe(slot, name, new, now)?,
        }
        Ok(())
    }

    /// What a connection has to do with a channel, as far as its commands until now go.
    fn standing(&self, slot: Slot, name: &str) -> Standing {
        let Some(index) = self.channels.find(name) else { return Standing::None };
        let Some(sub) = self.sessions.sub(slot, index) else { return Standing::None };
        if !self.sessions.get(slot).holds(index) {
            return Standing::Leaving;
        }
        let settled = sub.state != SubState::Joining;
        if settled && sub.flags & SUB_SERVER_SIDE != 0 && name == BROADCAST_CHANNEL {
            return Standing::Automatic(index);
        }
        Standing::Subscribed
    }

    /// Has a command wait for the subscription before it.
    fn follow_later(&mut self, slot: Slot, name: &str, next: Follow) -> Result<(), ErrorCode> {
        if self.sessions.get(slot).pending >= self.config.client.pending_commands_max {
            return Err(ErrorCode::TooManyRequests);
        }
        let counts = !matches!(next, Follow::Revoke);
        if let Some(joining) = self.joining(slot, name) {
            joining.then.push(next);
            self.sessions.get_mut(slot).pending += u32::from(counts);
        }
        Ok(())
    }

    fn unsubscribe_command(&mut self, slot: Slot, id: u32, name: &str, now: Now) {
        if name.is_empty() {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        if self.joining(slot, name).is_some() {
            // Answered behind the subscribe reply, which is on its way.
            if let Err(error) = self.follow_later(slot, name, Follow::Unsubscribe(id)) {
                self.reply_error(slot, id, error);
            }
            return;
        }
        if let Some(index) = self.channels.find(name) {
            self.unsubscribe(slot, index, now);
        }
        self.reply(slot, id, &Reply::Unsubscribe);
    }

    // --- publish ---

    pub(crate) fn publish_command(&mut self, slot: Slot, id: u32, name: &str, data: &[u8], now: Now) {
        if name.is_empty() {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        let index = match self.allowed(slot, name, Access::Publish) {
            Ok(index) => index,
            // That something is missing is said before that it is not allowed.
            Err(ErrorCode::PermissionDenied) if data.is_empty() => {
                return self.reply_error(slot, id, ErrorCode::BadRequest);
            }
            Err(error) => return self.reply_error(slot, id, error),
        };
        if data.is_empty() {
            return self.reply_error(slot, id, ErrorCode::BadRequest);
        }
        let origin = Origin { slot, serial: self.sessions.get(slot).serial, id };
        let home = index.map_or_else(|| home_of(name, self.shards), |index| self.channels.get(index).home);
        if home != self.shard {
            return self.publish_elsewhere(origin, name, home, index, data);
        }
        let index = match index.map_or_else(|| self.channels.get_or_create(name), Ok) {
            Ok(index) => index,
            Err(reason) => return self.reply_error(slot, id, super::home::no_channel(reason)),
        };
        let session = self.sessions.get_mut(slot);
        session.pending += 1;
        // Copied, for the publish may touch the session.
        let mut publisher = self.publisher.take().unwrap_or_default();
        publisher.copy_from(session, index);
        let info = Some(publisher.as_client_info());
        let mut publication = Publication { data, info, ..Publication::default() };
        self.publish_into(home, Publisher::Client(origin), index, None, &mut publication, now);
        self.publisher = Some(publisher);
    }

    /// No namespace holds maps: what is well-formed is not permitted.
    fn map_publish_command(&mut self, slot: Slot, id: u32, name: &str, complete: bool, now: Now) {
        if name.is_empty() {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        let error = match self.channels.namespace_of(name) {
            None => ErrorCode::UnknownChannel,
            Some(_) if !self.is_valid_name(name) || !complete => ErrorCode::BadRequest,
            Some(_) => ErrorCode::PermissionDenied,
        };
        self.reply_error(slot, id, error);
    }

    fn publish_elsewhere(
        &mut self,
        origin: Origin,
        name: &str,
        home: ShardIndex,
        index: Option<u32>,
        data: &[u8],
    ) {
        let identity = self.sessions.get(origin.slot).identity(index.unwrap_or(u32::MAX));
        let message =
            ToHome::Publish { origin, channel: name.into(), identity: Some(identity), data: data.into() };
        if !self.may_wait(origin.slot, home, &message) {
            self.metrics.add(Metric::DropPublishRefused, 1);
            return self.reply_error(origin.slot, origin.id, ErrorCode::TooManyRequests);
        }
        self.sessions.get_mut(origin.slot).pending += 1;
        self.mesh.push(home, MeshMessage::Home(message));
    }

    /// Whether one more command of a connection may wait for its channel's home.
    fn may_wait(&self, slot: Slot, home: ShardIndex, message: &ToHome) -> bool {
        let pending = self.sessions.get(slot).pending;
        pending < self.config.client.pending_commands_max
            && (home == self.shard || self.mesh.fits(home, message.bytes()))
    }

    // --- questions ---

    fn query(&mut self, slot: Slot, id: u32, name: &str, access: Access, query: Query, now: Now) {
        if name.is_empty() {
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        if let Err(error) = self.allowed(slot, name, access) {
            return self.reply_error(slot, id, error);
        }
        if query.is_before_the_first() {
            return self.reply_error(slot, id, ErrorCode::BadRequest);
        }
        let home = home_of(name, self.shards);
        let origin = Origin { slot, serial: self.sessions.get(slot).serial, id };
        let message = ToHome::Query { origin, channel: name.into(), query };
        if !self.may_wait(slot, home, &message) {
            return self.reply_error(slot, id, ErrorCode::TooManyRequests);
        }
        self.sessions.get_mut(slot).pending += 1;
        self.send_home(home, message, now);
    }
}

/// What a connection has to do with a channel that it wants to subscribe to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    None,
    Subscribed,
    /// A subscription is on its way, and will be ended.
    Leaving,
    /// The server subscribed it, and it may take that over.
    Automatic(u32),
}
