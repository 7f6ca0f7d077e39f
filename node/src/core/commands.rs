//! What connected clients ask: every command but connect.
//!
//! Owns permission and the shape of each answer, with the rules that implementers get wrong (they are
//! named at each place). Subscriptions proper are in [`super::subscribe`], tokens in [`super::auth`].

use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{
    ClientInfo, Command, Publication, Push, RefreshResult, Reply, Request, SubscribeRequest,
};
use ringmain_proto::time::Now;

use super::api::home_of;
use super::auth::TokenError;
use super::channel::Namespace;
use super::config::RecoveryMode;
use super::engine::{ShardIndex, Slot};
use super::home::Publisher;
use super::mesh::*;
use super::metrics::Metric;
use super::session::*;
use super::shard::Core;
use super::subscribe::{NewSub, ttl_of};
use super::text::ClientText;

/// The channel that every connection is subscribed to.
pub(crate) const BROADCAST_CHANNEL: &str = "broadcast:global";
/// Subscribe flag: answer 112 where the position cannot be recovered.
const FLAG_STRICT_RECOVERY: i64 = 2;

/// What a command asks of a channel.
#[derive(Clone, Copy)]
enum Access {
    Publish,
    History,
    Presence,
}

impl Core {
    /// One command of a client. May close the connection.
    pub(crate) fn command(&mut self, slot: Slot, command: Command<'_>, now: Now) {
        self.metrics.add(Metric::Commands, 1);
        let Command { id, request } = command;
        let stage = self.sessions.get(slot).stage;
        if stage == Stage::Refused {
            return;
        }
        if id == 0 && !matches!(request, Request::Send { .. }) {
            // Whatever else it says, a command without id is the answer to a ping.
            return self.pong(slot, now);
        }
        if let Request::Connect(request) = request {
            return if stage == Stage::Opened {
                self.connect(slot, id, &request, now);
            } else {
                self.close(slot, CloseReason::BadRequest, now);
            };
        }
        if stage != Stage::Connected {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        match request {
            Request::Subscribe(request) => self.subscribe_command(slot, id, &request, now),
            Request::Unsubscribe { channel } => self.unsubscribe_command(slot, id, &channel, now),
            Request::Publish { channel, data } => self.publish_command(slot, id, &channel, data, now),
            Request::Presence { channel } => {
                self.query(slot, id, &channel, Access::Presence, Query::Presence, now)
            }
            Request::PresenceStats { channel } => {
                self.query(slot, id, &channel, Access::Presence, Query::PresenceStats, now);
            }
            Request::History { channel, limit, since, reverse } => {
                let since =
                    since.map(|since| RecoverFrom { offset: since.offset, epoch: since.epoch.into() });
                let query = Query::History { limit, since, reverse };
                self.query(slot, id, &channel, Access::History, query, now);
            }
            Request::Rpc { .. } => self.reply_error(slot, id, ErrorCode::NotAvailable),
            Request::Send { .. } => self.close(slot, CloseReason::NotAvailable, now),
            Request::Refresh { token } => self.refresh_command(slot, id, &token, now),
            Request::SubRefresh { channel, token } => {
                self.sub_refresh_command(slot, id, &channel, &token, now)
            }
            Request::Connect(_) | Request::Ping | Request::Pong | Request::Empty => {
                self.close(slot, CloseReason::BadRequest, now);
            }
        }
    }

    /// The answer to a ping. With none outstanding it breaks the protocol.
    pub(crate) fn pong(&mut self, slot: Slot, now: Now) {
        let session = self.sessions.get_mut(slot);
        if !session.awaits_pong || session.frame_pings {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        session.awaits_pong = false;
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
        let name = &*request.channel;
        if name.is_empty() || !matches!(&*request.delta, "" | "fossil") {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        if let Err(error) = self.subscribe_checked(slot, id, request, now) {
            match error {
                SubscribeRefusal::Error(error) => self.reply_error(slot, id, error),
                SubscribeRefusal::Close(reason) => self.close(slot, reason, now),
            }
        }
    }

    fn subscribe_checked(
        &mut self,
        slot: Slot,
        id: u32,
        request: &SubscribeRequest<'_>,
        now: Now,
    ) -> Result<(), SubscribeRefusal> {
        let name = &*request.channel;
        if name.len() > self.config.client.channel_bytes_max as usize {
            return Err(ErrorCode::BadRequest.into());
        }
        if let Some(index) = self.channels.find(name)
            && let Some(sub) = self.sessions.sub(slot, index)
        {
            let automatic = sub.flags & SUB_SERVER_SIDE != 0 && sub.state != SubState::Joining;
            if !(automatic && name == BROADCAST_CHANNEL) {
                return Err(ErrorCode::AlreadySubscribed.into());
            }
            // A client that subscribes to the channel of everyone itself takes the automatic one over.
            self.unsubscribe(slot, index, now);
        }
        if self.sessions.get(slot).subs.len() >= self.config.client.channel_limit as usize {
            return Err(ErrorCode::LimitExceeded.into());
        }
        if self.channels.namespace_of(name).is_none() {
            return Err(ErrorCode::UnknownChannel.into());
        }
        if request.tags_filter.is_some() || request.kind != 0 {
            return Err(ErrorCode::BadRequest.into());
        }
        let mut granted = NewSub { id, ..NewSub::default() };
        if request.token.is_empty() {
            self.may_subscribe(slot, name)?;
        } else {
            self.subscription_token(slot, name, &request.token, &mut granted, now)?;
        }
        let namespace = self.channels.namespace_of(name).expect("it was just found");
        let new = subscription_options(namespace, request, granted);
        self.subscribe(slot, name, new, now).map_err(SubscribeRefusal::Error)
    }

    /// Whether a client may subscribe without a token.
    pub(crate) fn may_subscribe(&self, slot: Slot, name: &str) -> Result<(), ErrorCode> {
        let namespace = &self.channels.namespace_of(name).ok_or(ErrorCode::UnknownChannel)?.config;
        let session = self.sessions.get(slot);
        let personal = name.strip_prefix("user:").is_some_and(|id| !id.is_empty() && *id == *session.user);
        let open = namespace.allow_subscribe_for_client
            && (!session.user.is_empty() || namespace.allow_subscribe_for_anonymous);
        if open || personal || name == BROADCAST_CHANNEL { Ok(()) } else { Err(ErrorCode::PermissionDenied) }
    }

    fn subscription_token(
        &self,
        slot: Slot,
        name: &str,
        token: &str,
        new: &mut NewSub,
        now: Now,
    ) -> Result<(), SubscribeRefusal> {
        let session = self.sessions.get(slot);
        let claims = self.verifier.subscription(token, now).map_err(|error| match error {
            TokenError::Expired => ErrorCode::TokenExpired,
            TokenError::Invalid => ErrorCode::PermissionDenied,
        })?;
        let client = ClientText::new(session.client);
        let other_client = !claims.client.is_empty() && claims.client != client.as_str();
        if claims.channel != name || other_client || (claims.client.is_empty() && claims.sub != *session.user)
        {
            return Err(SubscribeRefusal::Close(CloseReason::InvalidToken));
        }
        new.expire_at = claims.exp;
        new.chan_info = claims.info;
        Ok(())
    }

    fn unsubscribe_command(&mut self, slot: Slot, id: u32, name: &str, now: Now) {
        if name.is_empty() {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        if let Some(index) = self.channels.find(name)
            && let Some(sub) = self.sessions.sub(slot, index)
        {
            if sub.state == SubState::Joining {
                // Answered behind the subscribe reply, which is on its way.
                let extra = self.sessions.get_mut(slot).sub_extra_mut(index);
                if let Some(joining) = &mut extra.joining {
                    return joining.unsubscribe_ids.push(id);
                }
            }
            self.unsubscribe(slot, index, now);
        }
        self.reply(slot, id, &Reply::Unsubscribe);
    }

    // --- publish ---

    fn publish_command(&mut self, slot: Slot, id: u32, name: &str, data: &[u8], now: Now) {
        if name.is_empty() {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        let index = match self.allowed(slot, name, Access::Publish) {
            Ok(index) => index,
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
        // The identity is taken out of the session, which the publish may not touch: mostly it is empty.
        let client = ClientText::new(session.client);
        let user = session.user.clone();
        let conn_info = session.extra.as_ref().and_then(|extra| extra.conn_info.clone());
        let chan_info = session.sub_extra(index).and_then(|sub| sub.chan_info.clone());
        let info = ClientInfo {
            user: &user,
            client: client.as_str(),
            conn_info: conn_info.as_deref(),
            chan_info: chan_info.as_deref(),
        };
        let publication = Publication { data, info: Some(info), ..Publication::default() };
        self.publish_into(home, Publisher::Client(origin), index, None, &publication, now);
    }

    fn publish_elsewhere(
        &mut self,
        origin: Origin,
        name: &str,
        home: ShardIndex,
        index: Option<u32>,
        data: &[u8],
    ) {
        if !self.may_wait(origin.slot, home) {
            self.metrics.add(Metric::DropPublishRefused, 1);
            return self.reply_error(origin.slot, origin.id, ErrorCode::TooManyRequests);
        }
        let session = self.sessions.get_mut(origin.slot);
        session.pending += 1;
        let identity = Identity {
            client: session.client,
            info: std::sync::Arc::new(session.identity_info(index.unwrap_or(u32::MAX))),
        };
        let message =
            ToHome::Publish { origin, channel: name.into(), identity: Some(identity), data: data.into() };
        self.mesh.push(home, MeshMessage::Home(message));
    }

    /// Whether one more command of a connection may wait for another shard.
    fn may_wait(&self, slot: Slot, home: ShardIndex) -> bool {
        let pending = self.sessions.get(slot).pending;
        pending < self.config.client.pending_commands_max && !self.mesh.is_full(home)
    }

    // --- questions ---

    fn query(&mut self, slot: Slot, id: u32, name: &str, access: Access, query: Query, now: Now) {
        if name.is_empty() {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        if let Err(error) = self.allowed(slot, name, access) {
            return self.reply_error(slot, id, error);
        }
        let home = home_of(name, self.shards);
        if !self.may_wait(slot, home) {
            return self.reply_error(slot, id, ErrorCode::TooManyRequests);
        }
        let session = self.sessions.get_mut(slot);
        session.pending += 1;
        let origin = Origin { slot, serial: session.serial, id };
        self.send_home(home, ToHome::Query { origin, channel: name.into(), query }, now);
    }

    /// Whether a client may do this to a channel: 102 unknown, 108 switched off, 103 not allowed. Gives the
    /// channel's index, if this shard knows it: the name is looked up once.
    fn allowed(&self, slot: Slot, name: &str, access: Access) -> Result<Option<u32>, ErrorCode> {
        let index = self.channels.find(name);
        let namespace = match index {
            Some(index) => self.channels.namespace(self.channels.get(index).namespace),
            None => self.channels.namespace_of(name).ok_or(ErrorCode::UnknownChannel)?,
        };
        let Grants { available, subscriber, client, anonymous } = grants(namespace, access);
        if !available {
            return Err(ErrorCode::NotAvailable);
        }
        let session = self.sessions.get(slot);
        let known = !session.user.is_empty() || anonymous;
        let subscribed = || index.is_some_and(|index| self.sessions.sub(slot, index).is_some());
        if known && (client || subscriber && subscribed()) {
            Ok(index)
        } else {
            Err(ErrorCode::PermissionDenied)
        }
    }

    // --- refresh ---

    fn refresh_command(&mut self, slot: Slot, id: u32, token: &str, now: Now) {
        if token.is_empty() {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        let claims = match self.verifier.connection(token, now) {
            Ok(claims) => claims,
            Err(TokenError::Expired) => return self.close(slot, CloseReason::Expired, now),
            Err(TokenError::Invalid) => return self.close(slot, CloseReason::InvalidToken, now),
        };
        let session = self.sessions.get_mut(slot);
        if claims.sub != *session.user {
            return self.close(slot, CloseReason::InvalidToken, now);
        }
        session.expire_at = claims.exp.map_or(0, |exp| u32::try_from(exp).unwrap_or(u32::MAX));
        session.extra().conn_info = claims.info;
        session.trim_extra();
        let (expires, ttl) = ttl_of(claims.exp, now);
        let client = ClientText::new(session.client);
        let version = std::sync::Arc::clone(&self.version);
        let result = RefreshResult { client: client.as_str(), version: &version, expires, ttl };
        self.reply(slot, id, &Reply::Refresh(result));
        self.arm_timer(slot, now);
    }

    fn sub_refresh_command(&mut self, slot: Slot, id: u32, name: &str, token: &str, now: Now) {
        if name.is_empty() {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        let index = self.channels.find(name).filter(|index| self.sessions.sub(slot, *index).is_some());
        let Some(index) = index else { return self.reply_error(slot, id, ErrorCode::PermissionDenied) };
        if token.is_empty() {
            return self.close(slot, CloseReason::BadRequest, now);
        }
        let mut new = NewSub::default();
        match self.subscription_token(slot, name, token, &mut new, now) {
            Ok(()) => {}
            Err(SubscribeRefusal::Error(ErrorCode::TokenExpired)) => {
                // As Centrifugo answers it; the subscription then runs out by itself.
                return self.reply(slot, id, &Reply::SubRefresh(RefreshResult::default()));
            }
            Err(SubscribeRefusal::Error(_)) => return self.close(slot, CloseReason::InvalidToken, now),
            Err(SubscribeRefusal::Close(reason)) => return self.close(slot, reason, now),
        }
        let (expires, ttl) = ttl_of(new.expire_at, now);
        let extra = self.sessions.get_mut(slot).sub_extra_mut(index);
        extra.expire_at = new.expire_at;
        extra.chan_info = new.chan_info;
        let result = RefreshResult { expires, ttl, ..RefreshResult::default() };
        self.reply(slot, id, &Reply::SubRefresh(result));
        self.arm_timer(slot, now);
    }
}

/// Who may do something in a namespace.
struct Grants {
    available: bool,
    subscriber: bool,
    client: bool,
    anonymous: bool,
}

fn grants(namespace: &Namespace, access: Access) -> Grants {
    let config = &namespace.config;
    match access {
        Access::Publish => Grants {
            available: true,
            subscriber: config.allow_publish_for_subscriber,
            client: config.allow_publish_for_client,
            anonymous: config.allow_publish_for_anonymous,
        },
        Access::History => Grants {
            available: namespace.is_positioned(),
            subscriber: config.allow_history_for_subscriber,
            client: config.allow_history_for_client,
            anonymous: config.allow_history_for_anonymous,
        },
        Access::Presence => Grants {
            available: config.presence,
            subscriber: config.allow_presence_for_subscriber,
            client: config.allow_presence_for_client,
            anonymous: config.allow_presence_for_anonymous,
        },
    }
}

/// Why a subscribe command is refused.
#[derive(Debug)]
pub(crate) enum SubscribeRefusal {
    Error(ErrorCode),
    Close(CloseReason),
}

impl From<ErrorCode> for SubscribeRefusal {
    fn from(error: ErrorCode) -> Self {
        Self::Error(error)
    }
}

/// What the namespace and the request make of a permitted subscription.
pub(crate) fn subscription_options(
    namespace: &Namespace,
    request: &SubscribeRequest<'_>,
    new: NewSub,
) -> NewSub {
    let config = &namespace.config;
    let has_history = namespace.is_positioned();
    let recoverable = has_history && (config.force_recovery || request.recoverable && config.allow_recovery);
    let positioned =
        has_history && (config.force_positioning || request.positioned && config.allow_positioning);
    let recover =
        request.recover.then(|| RecoverFrom { offset: request.offset, epoch: (*request.epoch).into() });
    NewSub {
        positioned,
        recoverable,
        join_leave: config.join_leave && (config.force_push_join_leave || request.join_leave),
        presence: config.presence,
        announce: config.join_leave,
        recover,
        cache: config.force_recovery_mode == RecoveryMode::Cache,
        strict: request.flag & FLAG_STRICT_RECOVERY != 0,
        ..new
    }
}
