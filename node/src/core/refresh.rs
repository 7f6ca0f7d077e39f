//! New tokens of a connection and of its subscriptions, and what of a refused one closes.
//!
//! Owns the commands refresh and sub_refresh. When what is not refreshed ends is the timers' affair.

use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{RefreshResult, Reply};
use ringmain_proto::time::Now;

use super::auth::{SubOptions, TokenError};
use super::connect::seconds32;
use super::engine::Slot;
use super::permission::Refusal;
use super::session::*;
use super::shard::Core;
use super::subscribe::{bounded_expiry, ttl_of};

impl Core {
    pub(crate) fn refresh_command(&mut self, slot: Slot, id: u32, token: &str, now: Now) {
        match self.refresh(slot, token, now) {
            Ok(expire_at) => {
                let (expires, ttl) = ttl_of(expire_at, now);
                let result = RefreshResult { expires, ttl, ..RefreshResult::default() };
                self.reply(slot, id, &Reply::Refresh(result));
                self.arm_timer(slot, now);
            }
            Err(Refusal::Error(error)) => self.reply_error(slot, id, error),
            Err(Refusal::Close(reason)) => self.end_input(slot, reason, now),
        }
    }

    fn refresh(&mut self, slot: Slot, token: &str, now: Now) -> Result<Option<u64>, Refusal> {
        if token.is_empty() {
            return Err(Refusal::Close(CloseReason::BadRequest));
        }
        let claims = self.verifier.connection(token, now).map_err(|error| match error {
            TokenError::Expired => Refusal::Close(CloseReason::Expired),
            TokenError::Invalid => Refusal::Close(CloseReason::InvalidToken),
        })?;
        if claims.subs.iter().any(|(name, _)| self.channels.namespace_of(name).is_none()) {
            return Err(ErrorCode::UnknownChannel.into());
        }
        if claims.sub != *self.sessions.get(slot).user {
            return Err(Refusal::Close(CloseReason::InvalidToken));
        }
        if self.subs_differ(slot, &claims.subs) {
            // It comes back, and gets those of the new token.
            return Err(Refusal::Close(CloseReason::InsufficientState));
        }
        let expire_at = bounded_expiry(claims.expire_at, now);
        if expire_at.is_some_and(|at| at <= now.unix_s()) {
            return Err(ErrorCode::Expired.into());
        }
        let session = self.sessions.get_mut(slot);
        if claims.info.is_some() {
            let old = session.extra.as_ref().and_then(|extra| extra.conn_info.as_deref());
            self.infos.replace(old, claims.info.as_deref())?;
            session.extra().conn_info = claims.info;
        }
        session.expire_at = seconds32(expire_at);
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

    pub(crate) fn sub_refresh_command(&mut self, slot: Slot, id: u32, name: &str, token: &str, now: Now) {
        match self.sub_refresh(slot, name, token, now) {
            Ok(expire_at) => {
                let (expires, ttl) = ttl_of(expire_at, now);
                let result = RefreshResult { expires, ttl, ..RefreshResult::default() };
                self.reply(slot, id, &Reply::SubRefresh(result));
                self.arm_timer(slot, now);
            }
            // As Centrifugo answers it; the subscription then runs out by itself.
            Err(Refusal::Error(ErrorCode::TokenExpired)) => {
                self.reply(slot, id, &Reply::SubRefresh(RefreshResult::default()));
            }
            Err(Refusal::Error(error)) => self.reply_error(slot, id, error),
            Err(Refusal::Close(reason)) => self.end_input(slot, reason, now),
        }
    }

    fn sub_refresh(&mut self, slot: Slot, name: &str, token: &str, now: Now) -> Result<Option<u64>, Refusal> {
        if name.is_empty() {
            return Err(Refusal::Close(CloseReason::BadRequest));
        }
        let index = self.channels.find(name).filter(|index| self.sessions.get(slot).holds(*index));
        let sub = index.and_then(|index| self.sessions.sub(slot, index));
        let &Sub { channel, flags, .. } = sub.ok_or(ErrorCode::PermissionDenied)?;
        if flags & SUB_SERVER_SIDE != 0 {
            return Err(Refusal::Close(CloseReason::BadRequest));
        }
        if token.is_empty() {
            return Err(ErrorCode::BadRequest.into());
        }
        let (options, expire_at) = match self.subscription_token(slot, name, token, now) {
            Err(Refusal::Error(ErrorCode::PermissionDenied)) => {
                return Err(Refusal::Close(CloseReason::InvalidToken));
            }
            result => result?,
        };
        let expire_at = bounded_expiry(expire_at, now);
        if expire_at.is_some_and(|at| at < now.unix_s()) {
            return Err(ErrorCode::Expired.into());
        }
        let session = self.sessions.get_mut(slot);
        let old = session.sub_extra(channel).and_then(|sub| sub.chan_info.as_deref());
        self.infos.replace(old, options.info.as_deref())?;
        let extra = session.sub_extra_mut(channel);
        (extra.expire_at, extra.chan_info) = (expire_at, options.info);
        Ok(expire_at)
    }
}
