//! The connect command: who the client is, and its server-side subscriptions.
//!
//! Owns a session's way from [`Stage::Opened`] to [`Stage::Connected`]. Server-side subscriptions are
//! asked of their homes at once; the reply goes out when all have answered. Until then the
//! connection's logs are held, and commands that came in the same frame wait in a backlog.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringmain_bus::Epoch;
use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{ConnectRequest, ConnectResult, Reply, SubscribeRequest, SubscribeResult};
use ringmain_proto::time::Now;

use super::auth::{ClaimedSub, ConnectionClaims, TokenError};
use super::commands::{BROADCAST_CHANNEL, subscription_options};
use super::engine::Slot;
use super::metrics::Metric;
use super::session::*;
use super::shard::Core;
use super::subscribe::{NewSub, publications_of, ttl_of};
use super::text::ClientText;

/// Bytes of commands that wait for a connect reply at the most; more closes with 3013.
const BACKLOG_BYTES_MAX: usize = 256 * 1024;
/// A client that names itself so is told its shard: the demo page.
const DEMO_CLIENT: &str = "ringmain-demo";

/// A server-side subscription wanted on connect.
#[derive(Debug, Default)]
struct Wanted {
    claimed: Option<ClaimedSub>,
    info: Option<Box<[u8]>>,
}

impl Core {
    pub(crate) fn connect(&mut self, slot: Slot, id: u32, request: &ConnectRequest<'_>, now: Now) {
        let claims = match self.authenticate(request, now) {
            Ok(claims) => claims,
            Err(ConnectRefusal::Error(error)) => return self.refuse_connect(slot, id, error),
            Err(ConnectRefusal::Close(reason)) => return self.close(slot, reason, now),
        };
        let expire_at = claims.exp.map_or(0, |exp| u32::try_from(exp).unwrap_or(u32::MAX));
        let session = self.sessions.get_mut(slot);
        session.user = claims.sub.as_str().into();
        session.expire_at = expire_at;
        session.stage = Stage::Connecting;
        if claims.info.is_some() {
            session.extra().conn_info.clone_from(&claims.info);
        }
        self.sessions.add_user(slot);
        let wanted = match self.wanted_subs(slot, claims, request) {
            Ok(wanted) => wanted,
            Err(error) => return self.refuse_connect(slot, id, error),
        };
        if wanted.len() > self.config.client.channel_limit as usize {
            return self.close(slot, CloseReason::ChannelLimit, now);
        }
        let connecting = Connecting {
            id,
            waiting: wanted.len() as u32 + 1,
            demo: &*request.name == DEMO_CLIENT,
            ..Connecting::default()
        };
        self.sessions.get_mut(slot).extra().connecting = Some(Box::new(connecting));
        self.out.hold(slot);
        let serial = self.sessions.get(slot).serial;
        for (name, wanted) in wanted {
            let asked = request.subs.iter().find(|(channel, _)| *channel == *name).map(|(_, asked)| asked);
            let result = self.subscribe_server_side(slot, &name, wanted, asked, now);
            if let Err(error) = result {
                return self.connect_sub_failed(slot, error, now);
            }
            let still = self.sessions.by_serial(slot, serial);
            if !still.is_some_and(|session| session.stage == Stage::Connecting) {
                return;
            }
        }
        self.connect_step(slot, now);
    }

    fn authenticate(
        &self,
        request: &ConnectRequest<'_>,
        now: Now,
    ) -> Result<ConnectionClaims, ConnectRefusal> {
        if request.token.is_empty() {
            if !self.config.client.allow_anonymous_connect_without_token {
                return Err(ConnectRefusal::Close(CloseReason::BadRequest));
            }
            return Ok(ConnectionClaims {
                sub: String::new(),
                exp: None,
                info: None,
                channels: Vec::new(),
                subs: Vec::new(),
            });
        }
        let claims = self.verifier.connection(&request.token, now).map_err(|error| match error {
            TokenError::Expired => ConnectRefusal::Error(ErrorCode::TokenExpired),
            TokenError::Invalid => ConnectRefusal::Close(CloseReason::InvalidToken),
        })?;
        if claims.sub.len() > self.config.client.user_bytes_max as usize {
            return Err(ConnectRefusal::Close(CloseReason::InvalidToken));
        }
        Ok(claims)
    }

    /// The channels that the connection is subscribed to: the token's, its user's, everyone's, and those
    /// that it wants recovered and might subscribe to itself.
    fn wanted_subs(
        &self,
        slot: Slot,
        claims: ConnectionClaims,
        request: &ConnectRequest<'_>,
    ) -> Result<BTreeMap<String, Wanted>, ErrorCode> {
        let mut wanted = BTreeMap::new();
        let user = &*self.sessions.get(slot).user;
        for name in claims.channels {
            wanted.insert(name, Wanted::default());
        }
        for (name, claimed) in claims.subs {
            let info = claimed.info.as_ref().map(|info| info.get().as_bytes().into());
            wanted.insert(name, Wanted { claimed: Some(claimed), info });
        }
        if wanted.keys().any(|name| self.channels.namespace_of(name).is_none()) {
            return Err(ErrorCode::UnknownChannel);
        }
        let automatic = [
            (self.config.client.personal_channel && !user.is_empty()).then(|| format!("user:{user}")),
            self.config.client.broadcast_channel.then(|| BROADCAST_CHANNEL.to_owned()),
        ];
        for name in automatic.into_iter().flatten() {
            if self.channels.namespace_of(&name).is_some()
                && name.len() <= self.config.client.channel_bytes_max as usize
            {
                wanted.entry(name).or_default();
            }
        }
        for (name, _) in &request.subs {
            if !wanted.contains_key(&**name) && self.may_subscribe(slot, name).is_ok() {
                wanted.insert(name.to_string(), Wanted::default());
            }
        }
        Ok(wanted)
    }

    fn subscribe_server_side(
        &mut self,
        slot: Slot,
        name: &str,
        wanted: Wanted,
        asked: Option<&SubscribeRequest<'_>>,
        now: Now,
    ) -> Result<(), ErrorCode> {
        let namespace = self.channels.namespace_of(name).ok_or(ErrorCode::UnknownChannel)?;
        let default = SubscribeRequest::default();
        let asked = asked.unwrap_or(&default);
        let granted = NewSub { server_side: true, chan_info: wanted.info, ..NewSub::default() };
        let mut new = subscription_options(namespace, asked, granted);
        if let Some(overrides) = wanted.claimed.and_then(|claimed| claimed.overrides) {
            let positioned = namespace.is_positioned();
            for (value, option) in [
                (overrides.presence, &mut new.presence),
                (overrides.join_leave, &mut new.announce),
                (overrides.force_push_join_leave, &mut new.join_leave),
            ] {
                *option = value.map_or(*option, |value| value.value);
            }
            for (value, option) in [
                (overrides.force_recovery, &mut new.recoverable),
                (overrides.force_positioning, &mut new.positioned),
            ] {
                *option = value.map_or(*option, |value| value.value && positioned);
            }
        }
        self.subscribe(slot, name, new, now)
    }

    /// One server-side subscription is confirmed.
    pub(crate) fn connect_sub_done(&mut self, slot: Slot, sub: ConnectedSub, now: Now) {
        if let Some(connecting) = &mut self.sessions.get_mut(slot).extra().connecting {
            connecting.subs.push(sub);
        }
        self.connect_step(slot, now);
    }

    /// One server-side subscription failed, and connect with it.
    pub(crate) fn connect_sub_failed(&mut self, slot: Slot, error: ErrorCode, now: Now) {
        let Some(connecting) = self.sessions.get_mut(slot).extra().connecting.take() else { return };
        self.unsubscribe_all(slot, now);
        self.refuse_connect(slot, connecting.id, error);
    }

    fn refuse_connect(&mut self, slot: Slot, id: u32, error: ErrorCode) {
        if self.sessions.get(slot).stage == Stage::Connecting {
            self.sessions.remove_user(slot);
        }
        let session = self.sessions.get_mut(slot);
        session.stage = Stage::Refused;
        self.out.release(slot);
        self.reply_error(slot, id, error);
    }

    /// One thing less to wait for; the last one sends the reply.
    fn connect_step(&mut self, slot: Slot, now: Now) {
        let Some(connecting) = &mut self.sessions.get_mut(slot).extra().connecting else { return };
        connecting.waiting -= 1;
        if connecting.waiting == 0 {
            self.finish_connect(slot, now);
        }
    }

    fn finish_connect(&mut self, slot: Slot, now: Now) {
        let ping_interval = self.config.client.ping_interval_ms;
        let phase = self.random.next() % ping_interval;
        let session = self.sessions.get_mut(slot);
        let Some(connecting) = session.extra().connecting.take() else { return };
        session.stage = Stage::Connected;
        session.extra().deadline_ms = None;
        session.ping_tick = ((now.mono_ms + phase).div_ceil(PING_TICK_MS) + 1) as u32;
        session.trim_extra();
        let (client, frame_pings) = (ClientText::new(session.client), session.frame_pings);
        let expire_at = (session.expire_at != 0).then(|| u64::from(session.expire_at));
        let (expires, ttl) = ttl_of(expire_at, now);
        let data = if connecting.demo {
            format!(r#"{{"shard":{},"shards":{}}}"#, self.shard, self.shards)
        } else {
            String::new()
        };
        let epochs: Vec<_> = connecting.subs.iter().map(|sub| Epoch::new(sub.epoch).text()).collect();
        let publications: Vec<_> = connecting.subs.iter().map(|sub| publications_of(&sub.records)).collect();
        let subs: Vec<(&str, SubscribeResult<'_>)> = connecting
            .subs
            .iter()
            .zip(epochs.iter().zip(&publications))
            .map(|(sub, (epoch, publications))| {
                let result = SubscribeResult {
                    recoverable: sub.recoverable,
                    positioned: sub.positioned,
                    epoch: if sub.positioned { epoch.as_str().into() } else { "".into() },
                    offset: if sub.positioned { sub.offset } else { 0 },
                    publications,
                    recovered: sub.recovered,
                    was_recovering: sub.was_recovering,
                    ..SubscribeResult::default()
                };
                (&*sub.channel, result)
            })
            .collect();
        let version = Arc::clone(&self.version);
        let result = ConnectResult {
            client: client.as_str(),
            version: &version,
            expires,
            ttl,
            data: data.as_bytes(),
            subs: &subs,
            ping: if frame_pings {
                0
            } else {
                u32::try_from(ping_interval.div_ceil(1000)).unwrap_or(u32::MAX)
            },
            pong: !frame_pings,
        };
        self.reply(slot, connecting.id, &Reply::Connect(result));
        self.metrics.add(Metric::Sessions, 1);
        self.out.release(slot);
        self.arm_timer(slot, now);
        for message in connecting.backlog {
            self.message(slot, &message, now);
        }
    }

    /// Keeps a message that came before the connect reply could be made.
    pub(crate) fn keep_for_connected(&mut self, slot: Slot, message: &[u8], now: Now) {
        let Some(connecting) = &mut self.sessions.get_mut(slot).extra().connecting else { return };
        let waiting: usize = connecting.backlog.iter().map(Vec::len).sum();
        if waiting + message.len() > BACKLOG_BYTES_MAX {
            return self.close(slot, CloseReason::TooManyRequests, now);
        }
        connecting.backlog.push(message.to_vec());
    }
}

/// Why a connect command is refused.
enum ConnectRefusal {
    /// An error reply; the client may be told of nothing else until it goes.
    Error(ErrorCode),
    /// The connection closes.
    Close(CloseReason),
}
