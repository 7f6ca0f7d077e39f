//! What connected clients ask: every command but connect.
//!
//! Owns permission and the shape of each answer, with the rules that implementers get wrong (they are
//! named at each place). The order of the checks is Centrifugo's. Subscriptions proper are in
//! [`super::subscribe`], tokens in [`super::auth`].
//!
//! Invariant: what a client does wrong closes its connection only behind the answers that it is owed
//! ([`Core::end_input`]).

use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{
    ClientInfo, Command, Publication, Push, RefreshResult, Reply, Request, SubscribeRequest,
};
use ringmain_proto::time::Now;

use super::api::home_of;
use super::auth::{BoolValue, Overrides, SubOptions, TokenError};
use super::channel::Namespace;
use super::config::{PRIVATE_PREFIX, RecoveryMode};
use super::connect::seconds32;
use super::engine::{ShardIndex, Slot};
use super::home::Publisher;
use super::mesh::*;
use super::metrics::Metric;
use super::session::*;
use super::shard::Core;
use super::subscribe::{NewSub, bounded_expiry, ttl_of};
use super::text::ClientText;

/// The channel that every connection is subscribed to.
pub(crate) const BROADCAST_CHANNEL: &str = "broadcast:global";
/// Subscribe flag: answer 112 where the position cannot be recovered.
const FLAG_STRICT_RECOVERY: i64 = 2;
/// Subscribe `type` of shared polling; those between it and 0, a stream, are of map channels.
const KIND_SHARED_POLL: i64 = 4;

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
            Request::Presence { channel } => {
                self.query(slot, id, &channel, Access::Presence, Query::Presence, now);
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
        if !session.awaits_pong || session.frame_pings {
            return self.end_input(slot, CloseReason::BadRequest, now);
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
            Err(SubscribeRefusal::Error(error)) => self.reply_error(slot, id, error),
            Err(SubscribeRefusal::Close(reason)) => self.end_input(slot, reason, now),
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
    fn standing(&mut self, slot: Slot, name: &str) -> Standing {
        let Some(index) = self.channels.find(name) else { return Standing::None };
        let Some(sub) = self.sessions.sub(slot, index) else { return Standing::None };
        if sub.state == SubState::Joining {
            let last = self.joining(slot, name).and_then(|joining| joining.then.last());
            return match last {
                Some(Follow::Unsubscribe(_) | Follow::Revoke) => Standing::Leaving,
                Some(Follow::Subscribe(_)) | None => Standing::Subscribed,
            };
        }
        if sub.flags & SUB_SERVER_SIDE != 0 && name == BROADCAST_CHANNEL {
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

    /// A subscription as its client may have it.
    fn permitted_sub(
        &self,
        slot: Slot,
        id: u32,
        request: &SubscribeRequest<'_>,
        now: Now,
    ) -> Result<NewSub, SubscribeRefusal> {
        let name = &*request.channel;
        let namespace = self.channels.namespace_of(name).ok_or(ErrorCode::UnknownChannel)?;
        if !self.is_valid_name(name) {
            return Err(ErrorCode::BadRequest.into());
        }
        if is_map(request.kind) {
            return Err(ErrorCode::PermissionDenied.into());
        }
        let (options, expire_at) = if request.token.is_empty() {
            self.may_subscribe(slot, name)?;
            (SubOptions::default(), None)
        } else {
            self.subscription_token(slot, name, &request.token, now)?
        };
        if expire_at.is_some_and(|at| at <= now.unix_s()) {
            return Err(ErrorCode::Expired.into());
        }
        if request.tags_filter.is_some() || request.kind > KIND_SHARED_POLL {
            return Err(ErrorCode::BadRequest.into());
        }
        let recover = request.recover.then(|| RecoverFrom::new(request.offset, &request.epoch));
        let new = NewSub { id, expire_at, recover, ..NewSub::default() };
        let new = subscription_options(namespace, options, new);
        Ok(self.requested_options(slot, namespace, request, new))
    }

    /// What a client asked for beyond that, if it may have it.
    fn requested_options(
        &self,
        slot: Slot,
        namespace: &Namespace,
        request: &SubscribeRequest<'_>,
        mut new: NewSub,
    ) -> NewSub {
        let config = &namespace.config;
        let known = !self.sessions.get(slot).user.is_empty();
        let granted = |access| {
            let Grants { subscriber, client, anonymous, .. } = grants(namespace, access);
            (known || anonymous) && (client || subscriber)
        };
        if namespace.is_positioned() {
            let reads = granted(Access::History);
            new.positioned |= request.positioned && (config.allow_positioning || reads);
            new.recoverable |= request.recoverable && (config.allow_recovery || reads);
        }
        new.join_leave |= request.join_leave && config.join_leave && granted(Access::Presence);
        new.strict = request.flag & FLAG_STRICT_RECOVERY != 0 && new.recoverable && !new.cache;
        new
    }

    /// Whether a client may subscribe without a token.
    pub(crate) fn may_subscribe(&self, slot: Slot, name: &str) -> Result<(), ErrorCode> {
        let namespace = &self.channels.namespace_of(name).ok_or(ErrorCode::UnknownChannel)?.config;
        let session = self.sessions.get(slot);
        let personal = name.strip_prefix("user:").is_some_and(|id| !id.is_empty() && *id == *session.user);
        let open = namespace.allow_subscribe_for_client
            && (!session.user.is_empty() || namespace.allow_subscribe_for_anonymous);
        let valid = self.is_valid_name(name) && !name.starts_with(PRIVATE_PREFIX);
        if valid && (open || personal || name == BROADCAST_CHANNEL) {
            Ok(())
        } else {
            Err(ErrorCode::PermissionDenied)
        }
    }

    /// Names of channels are ASCII, as Centrifugo has it, and bounded.
    fn is_valid_name(&self, name: &str) -> bool {
        !name.is_empty() && name.is_ascii() && name.len() <= self.config.client.channel_bytes_max as usize
    }

    /// What a token grants: 103 for a bad one, but one for somebody or something else closes.
    fn subscription_token(
        &self,
        slot: Slot,
        name: &str,
        token: &str,
        now: Now,
    ) -> Result<(SubOptions, Option<u64>), SubscribeRefusal> {
        let session = self.sessions.get(slot);
        let claims = self.verifier.subscription(token, now).map_err(|error| match error {
            TokenError::Expired => ErrorCode::TokenExpired,
            TokenError::Invalid => ErrorCode::PermissionDenied,
        })?;
        if self.channels.namespace_of(&claims.channel).is_none() {
            return Err(ErrorCode::UnknownChannel.into());
        }
        let client = ClientText::new(session.client);
        let other_client = !claims.client.is_empty() && claims.client != client.as_str();
        if claims.channel != name || claims.sub != *session.user || other_client {
            return Err(SubscribeRefusal::Close(CloseReason::InvalidToken));
        }
        Ok((claims.options, claims.expire_at))
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

    fn publish_command(&mut self, slot: Slot, id: u32, name: &str, data: &[u8], now: Now) {
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
            return self.end_input(slot, CloseReason::BadRequest, now);
        }
        if let Err(error) = self.allowed(slot, name, access) {
            return self.reply_error(slot, id, error);
        }
        if query.is_before_the_first() {
            return self.reply_error(slot, id, ErrorCode::BadRequest);
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

    /// Whether a client may do this to a channel: 102 unknown, 107 no name, 108 switched off, 103 not allowed. Gives the
    /// channel's index, if this shard knows it: the name is looked up once.
    fn allowed(&self, slot: Slot, name: &str, access: Access) -> Result<Option<u32>, ErrorCode> {
        let index = self.channels.find(name);
        let namespace = match index {
            Some(index) => self.channels.namespace(self.channels.get(index).namespace),
            None => {
                let namespace = self.channels.namespace_of(name).ok_or(ErrorCode::UnknownChannel)?;
                if !self.is_valid_name(name) {
                    return Err(ErrorCode::BadRequest);
                }
                namespace
            }
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
        match self.refresh(slot, token, now) {
            Ok(expire_at) => {
                let (expires, ttl) = ttl_of(expire_at, now);
                let result = RefreshResult { expires, ttl, ..RefreshResult::default() };
                self.reply(slot, id, &Reply::Refresh(result));
                self.arm_timer(slot, now);
            }
            Err(SubscribeRefusal::Error(error)) => self.reply_error(slot, id, error),
            Err(SubscribeRefusal::Close(reason)) => self.end_input(slot, reason, now),
        }
    }

    fn refresh(&mut self, slot: Slot, token: &str, now: Now) -> Result<Option<u64>, SubscribeRefusal> {
        if token.is_empty() {
            return Err(SubscribeRefusal::Close(CloseReason::BadRequest));
        }
        let claims = self.verifier.connection(token, now).map_err(|error| match error {
            TokenError::Expired => SubscribeRefusal::Close(CloseReason::Expired),
            TokenError::Invalid => SubscribeRefusal::Close(CloseReason::InvalidToken),
        })?;
        if claims.subs.iter().any(|(name, _)| self.channels.namespace_of(name).is_none()) {
            return Err(ErrorCode::UnknownChannel.into());
        }
        if claims.sub != *self.sessions.get(slot).user {
            return Err(SubscribeRefusal::Close(CloseReason::InvalidToken));
        }
        if self.subs_differ(slot, &claims.subs) {
            // It comes back, and gets those of the new token.
            return Err(SubscribeRefusal::Close(CloseReason::InsufficientState));
        }
        let expire_at = bounded_expiry(claims.expire_at, now);
        if expire_at.is_some_and(|at| at <= now.unix_s()) {
            return Err(ErrorCode::Expired.into());
        }
        let session = self.sessions.get_mut(slot);
        session.expire_at = seconds32(expire_at);
        if claims.info.is_some() {
            session.extra().conn_info = claims.info;
        }
        Ok(expire_at)
    }

    /// Whether a new token names other channels than the connection's own did.
    fn subs_differ(&self, slot: Slot, claimed: &[(String, SubOptions)]) -> bool {
        let session = self.sessions.get(slot);
        let has = |name: &str| {
            self.channels.find(name).is_some_and(|index| session.subs.iter().any(|sub| sub.channel == index))
        };
        let named = |sub: &Sub| {
            let name = &*self.channels.get(sub.channel).name;
            claimed.iter().any(|(claimed, _)| *claimed == *name)
        };
        claimed.iter().any(|(name, _)| !has(name))
            || session.subs.iter().any(|sub| sub.flags & SUB_OF_TOKEN != 0 && !named(sub))
    }

    fn sub_refresh_command(&mut self, slot: Slot, id: u32, name: &str, token: &str, now: Now) {
        match self.sub_refresh(slot, name, token, now) {
            Ok(expire_at) => {
                let (expires, ttl) = ttl_of(expire_at, now);
                let result = RefreshResult { expires, ttl, ..RefreshResult::default() };
                self.reply(slot, id, &Reply::SubRefresh(result));
                self.arm_timer(slot, now);
            }
            // As Centrifugo answers it; the subscription then runs out by itself.
            Err(SubscribeRefusal::Error(ErrorCode::TokenExpired)) => {
                self.reply(slot, id, &Reply::SubRefresh(RefreshResult::default()));
            }
            Err(SubscribeRefusal::Error(error)) => self.reply_error(slot, id, error),
            Err(SubscribeRefusal::Close(reason)) => self.end_input(slot, reason, now),
        }
    }

    fn sub_refresh(
        &mut self,
        slot: Slot,
        name: &str,
        token: &str,
        now: Now,
    ) -> Result<Option<u64>, SubscribeRefusal> {
        if name.is_empty() {
            return Err(SubscribeRefusal::Close(CloseReason::BadRequest));
        }
        let index = self.channels.find(name);
        let sub = index.and_then(|index| self.sessions.sub(slot, index));
        let &Sub { channel, flags, .. } = sub.ok_or(ErrorCode::PermissionDenied)?;
        if flags & SUB_SERVER_SIDE != 0 {
            return Err(SubscribeRefusal::Close(CloseReason::BadRequest));
        }
        if token.is_empty() {
            return Err(ErrorCode::BadRequest.into());
        }
        let (options, expire_at) = match self.subscription_token(slot, name, token, now) {
            Err(SubscribeRefusal::Error(ErrorCode::PermissionDenied)) => {
                return Err(SubscribeRefusal::Close(CloseReason::InvalidToken));
            }
            result => result?,
        };
        let expire_at = bounded_expiry(expire_at, now);
        if expire_at.is_some_and(|at| at < now.unix_s()) {
            return Err(ErrorCode::Expired.into());
        }
        let extra = self.sessions.get_mut(slot).sub_extra_mut(channel);
        (extra.expire_at, extra.chan_info) = (expire_at, options.info);
        Ok(expire_at)
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

/// Why a subscribe, refresh or sub_refresh command is refused.
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

/// What the namespace, and a token's word on it, make of a subscription.
pub(crate) fn subscription_options(namespace: &Namespace, options: SubOptions, new: NewSub) -> NewSub {
    let config = &namespace.config;
    let has_history = namespace.is_positioned();
    let Overrides { presence, join_leave, force_push_join_leave, force_recovery, force_positioning } =
        options.overrides;
    let or = |value: Option<BoolValue>, option: bool| value.map_or(option, |value| value.value);
    NewSub {
        positioned: has_history && or(force_positioning, config.force_positioning),
        recoverable: has_history && or(force_recovery, config.force_recovery),
        join_leave: or(force_push_join_leave, config.force_push_join_leave),
        presence: or(presence, config.presence),
        announce: or(join_leave, config.join_leave),
        cache: config.force_recovery_mode == RecoveryMode::Cache,
        chan_info: options.info,
        data: options.data,
        ..new
    }
}

/// Kinds 1 to 3 are those of map channels, which no namespace here is.
fn is_map(kind: i64) -> bool {
    (1..KIND_SHARED_POLL).contains(&kind)
}
