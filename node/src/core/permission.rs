//! Who may do what to a channel, and what a permitted subscription is made of.
//!
//! Owns the rules of namespaces and of subscription tokens. It decides and changes nothing: what is
//! refused is told by [`super::commands`], and by [`super::connect`] for what the server subscribes.

use ringmain_proto::client::ClientId;
use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::SubscribeRequest;
use ringmain_proto::time::Now;

use super::auth::{BoolValue, Overrides, SubOptions, TokenError};
use super::channel::Namespace;
use super::commands::BROADCAST_CHANNEL;
use super::config::{PRIVATE_PREFIX, RecoveryMode};
use super::engine::Slot;
use super::mesh::RecoverFrom;
use super::shard::Core;
use super::subscribe::NewSub;

/// Subscribe flag: answer 112 where the position cannot be recovered.
const FLAG_STRICT_RECOVERY: i64 = 2;
/// Subscribe `type` of shared polling; those between it and 0, a stream, are of map channels.
pub(crate) const KIND_SHARED_POLL: i64 = 4;

/// What a command asks of a channel.
#[derive(Clone, Copy)]
pub(crate) enum Access {
    Publish,
    History,
    Presence,
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

/// Why a command is refused.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// An error reply.
    Error(ErrorCode),
    /// The connection closes.
    Close(CloseReason),
}

impl From<ErrorCode> for Refusal {
    fn from(error: ErrorCode) -> Self {
        Self::Error(error)
    }
}

impl Core {
    /// A subscription as its client may have it.
    pub(crate) fn permitted_sub(
        &self,
        slot: Slot,
        id: u32,
        request: &SubscribeRequest<'_>,
        now: Now,
    ) -> Result<NewSub, Refusal> {
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
    pub(crate) fn is_valid_name(&self, name: &str) -> bool {
        !name.is_empty() && name.is_ascii() && name.len() <= self.config.client.channel_bytes_max as usize
    }

    /// What a token grants: 103 for a bad one, but one for somebody or something else closes.
    pub(crate) fn subscription_token(
        &self,
        slot: Slot,
        name: &str,
        token: &str,
        now: Now,
    ) -> Result<(SubOptions, Option<u64>), Refusal> {
        let session = self.sessions.get(slot);
        let claims = self.verifier.subscription(token, now).map_err(|error| match error {
            TokenError::Expired => ErrorCode::TokenExpired,
            TokenError::Invalid => ErrorCode::PermissionDenied,
        })?;
        if self.channels.namespace_of(&claims.channel).is_none() {
            return Err(ErrorCode::UnknownChannel.into());
        }
        let other_client = !claims.client.is_empty() && !ClientId(session.client).is_text(&claims.client);
        if claims.channel != name || claims.sub != *session.user || other_client {
            return Err(Refusal::Close(CloseReason::InvalidToken));
        }
        Ok((claims.options, claims.expire_at))
    }

    /// Whether a client may do this to a channel: 102 unknown, 107 no name, 108 switched off, 103 not allowed. Gives the
    /// channel's index, if this shard knows it: the name is looked up once.
    pub(crate) fn allowed(&self, slot: Slot, name: &str, access: Access) -> Result<Option<u32>, ErrorCode> {
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
        let subscribed = || index.is_some_and(|index| session.holds(index));
        if known && (client || subscriber && subscribed()) {
            Ok(index)
        } else {
            Err(ErrorCode::PermissionDenied)
        }
    }
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
pub(crate) fn is_map(kind: i64) -> bool {
    (1..KIND_SHARED_POLL).contains(&kind)
}
