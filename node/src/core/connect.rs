//! The connect command: who the client is, and its server-side subscriptions.
//!
//! Owns a session's way from [`Stage::Opened`] to [`Stage::Connected`]. Server-side subscriptions are
//! asked of their homes at once; the reply goes out when all have answered. Until then the
//! connection's logs are held, and commands that came in the same frame wait in a backlog.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringmain_bus::Epoch;
use ringmain_proto::client::ClientId;
use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{ConnectRequest, ConnectResult, Reply, SubscribeRequest, SubscribeResult};
use ringmain_proto::time::Now;

use super::auth::{ConnectionClaims, SubOptions, TokenError};
use super::commands::BROADCAST_CHANNEL;
use super::engine::Slot;
use super::infos::len;
use super::mesh::RecoverFrom;
use super::metrics::Metric;
use super::permission::{Refusal, subscription_options};
use super::session::*;
use super::shard::Core;
use super::subscribe::{NewSub, bounded_expiry, publications_in, ttl_of};

/// Bytes of commands that wait for a connect reply at the most; more closes with 3013.
const BACKLOG_BYTES_MAX: usize = 256 * 1024;
/// A client that names itself so is told its shard: the demo page.
const DEMO_CLIENT: &str = "ringmain-demo";

/// A server-side subscription wanted on connect.
#[derive(Debug, Default)]
struct Wanted {
    options: SubOptions,
    of_token: bool,
    automatic: bool,
}

impl Core {
    pub(crate) fn connect(&mut self, slot: Slot, id: u32, request: &ConnectRequest<'_>, now: Now) {
        match self.permitted(slot, request, now) {
            Ok(wanted) => self.begin_connect(slot, id, request, wanted, now),
            Err(Refusal::Error(error)) => self.refuse_connect(slot, id, error, now),
            Err(Refusal::Close(reason)) => self.close(slot, reason, now),
        }
    }

    /// Who connects, and what it is subscribed to. Nobody else knows of the session yet.
    fn permitted(
        &mut self,
        slot: Slot,
        request: &ConnectRequest<'_>,
        now: Now,
    ) -> Result<BTreeMap<String, Wanted>, Refusal> {
        let claims = self.authenticate(request, now)?;
        let session = self.sessions.get_mut(slot);
        session.user = claims.sub.as_str().into();
        if claims.info.is_some() {
            self.infos.admit(len(claims.info.as_deref()))?;
            session.extra().conn_info = claims.info;
        }
        let wanted = self.wanted_subs(slot, claims.subs, request)?;
        let counted = wanted.values().filter(|wanted| !wanted.automatic).count();
        if counted > self.config.client.channel_limit as usize {
            return Err(Refusal::Close(CloseReason::ChannelLimit));
        }
        let expire_at = bounded_expiry(claims.expire_at, now);
        if expire_at.is_some_and(|at| at < now.unix_s()) {
            return Err(ErrorCode::Expired.into());
        }
        self.sessions.get_mut(slot).expire_at = seconds32(expire_at);
        Ok(wanted)
    }

    fn begin_connect(
        &mut self,
        slot: Slot,
        id: u32,
        request: &ConnectRequest<'_>,
        wanted: BTreeMap<String, Wanted>,
        now: Now,
    ) {
        let connecting = Connecting {
            id,
            waiting: wanted.len() as u32 + 1,
            demo: &*request.name == DEMO_CLIENT,
            ..Connecting::default()
        };
        let session = self.sessions.get_mut(slot);
        session.stage = Stage::Connecting;
        session.pending += 1;
        session.extra().connecting = Some(Box::new(connecting));
        let serial = session.serial;
        self.sessions.add_user(slot);
        self.out.hold(slot);
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

    fn authenticate(&self, request: &ConnectRequest<'_>, now: Now) -> Result<ConnectionClaims, Refusal> {
        if request.token.is_empty() {
            if !self.config.client.allow_anonymous_connect_without_token {
                return Err(Refusal::Close(CloseReason::BadRequest));
            }
            return Ok(ConnectionClaims::default());
        }
        let claims = self.verifier.connection(&request.token, now).map_err(|error| match error {
            TokenError::Expired => Refusal::Error(ErrorCode::TokenExpired),
            TokenError::Invalid => Refusal::Close(CloseReason::InvalidToken),
        })?;
        if claims.sub.len() > self.config.client.user_bytes_max as usize {
            return Err(Refusal::Close(CloseReason::InvalidToken));
        }
        Ok(claims)
    }

    /// The channels that the connection is subscribed to: the token's, its user's, everyone's, and those
    /// that it wants recovered and might subscribe to itself.
    fn wanted_subs(
        &self,
        slot: Slot,
        claimed: Vec<(String, SubOptions)>,
        request: &ConnectRequest<'_>,
    ) -> Result<BTreeMap<String, Wanted>, Refusal> {
        let mut wanted = BTreeMap::new();
        for (name, options) in claimed {
            if self.channels.namespace_of(&name).is_none() {
                return Err(ErrorCode::UnknownChannel.into());
            }
            if name.len() > self.config.client.channel_bytes_max as usize {
                return Err(ErrorCode::BadRequest.into());
            }
            if !name.is_empty() {
                wanted.insert(name, Wanted { options, of_token: true, ..Wanted::default() });
            }
        }
        for name in self.automatic_subs(slot) {
            wanted.entry(name).or_default().automatic = true;
        }
        for (name, _) in &request.subs {
            match self.may_subscribe(slot, name) {
                Ok(()) => {
                    wanted.entry(name.to_string()).or_default();
                }
                // As Centrifugo does it: what is merely not permitted is passed over.
                Err(ErrorCode::UnknownChannel) => return Err(Refusal::Close(CloseReason::BadRequest)),
                Err(_) => {}
            }
        }
        Ok(wanted)
    }

    /// The channels that every connection, or every user, has.
    fn automatic_subs(&self, slot: Slot) -> impl Iterator<Item = String> {
        let user = &*self.sessions.get(slot).user;
        let automatic = [
            (self.config.client.personal_channel && !user.is_empty()).then(|| format!("user:{user}")),
            self.config.client.broadcast_channel.then(|| BROADCAST_CHANNEL.to_owned()),
        ];
        let known = automatic.map(|name| {
            name.filter(|name| {
                self.channels.namespace_of(name).is_some()
                    && name.len() <= self.config.client.channel_bytes_max as usize
            })
        });
        known.into_iter().flatten()
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
        let Wanted { options, of_token, automatic } = wanted;
        // Of what the client says of such a channel only the position counts.
        let recover = asked.filter(|asked| asked.recover);
        let recover = recover.map(|asked| RecoverFrom::new(asked.offset, &asked.epoch));
        let new = NewSub { server_side: true, of_token, automatic, recover, ..NewSub::default() };
        let new = subscription_options(namespace, options, new);
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
        self.refuse_connect(slot, connecting.id, error, now);
    }

    fn refuse_connect(&mut self, slot: Slot, id: u32, error: ErrorCode, now: Now) {
        let was_connecting = self.sessions.get(slot).stage == Stage::Connecting;
        if was_connecting {
            self.sessions.remove_user(slot);
        }
        self.sessions.get_mut(slot).stage = Stage::Refused;
        self.out.release(slot);
        self.reply_error(slot, id, error);
        if was_connecting {
            self.command_answered(slot, now);
        }
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
        // Never at once: who connects is left alone for half an interval.
        let phase = ping_interval / 2 + self.random.next() % (ping_interval / 2);
        let session = self.sessions.get_mut(slot);
        let Some(connecting) = session.extra().connecting.take() else { return };
        session.stage = Stage::Connected;
        if !session.is(INPUT_ENDED) {
            session.deadline_tick = 0;
        }
        session.ping_tick = ((now.mono_ms + phase).div_ceil(TICK_MS) + 1) as u32;
        session.trim_extra();
        let serial = session.serial;
        self.reply_connect(slot, &connecting, now);
        self.metrics.add(Metric::Sessions, 1);
        self.out.release(slot);
        self.arm_timer(slot, now);
        for message in connecting.backlog {
            if !self.message(slot, serial, super::wire::Message::Binary(&message), now) {
                break;
            }
        }
        if self.sessions.by_serial(slot, serial).is_some() {
            self.command_answered(slot, now);
        }
    }

    fn reply_connect(&mut self, slot: Slot, connecting: &Connecting, now: Now) {
        let session = self.sessions.get(slot);
        let (client, frame_pings) = (ClientId(session.client).to_string(), session.is(FRAME_PINGS));
        let expire_at = (session.expire_at != 0).then(|| u64::from(session.expire_at));
        let (expires, ttl) = ttl_of(expire_at, now);
        let data = if connecting.demo {
            format!(r#"{{"shard":{},"shards":{}}}"#, self.shard, self.shards)
        } else {
            String::new()
        };
        let epochs: Vec<_> = connecting.subs.iter().map(|sub| Epoch::new(sub.epoch).text()).collect();
        let publications: Vec<_> = connecting
            .subs
            .iter()
            .zip(&epochs)
            .map(|(sub, epoch)| publications_in(&sub.records, epoch.as_str()))
            .collect();
        let subs: Vec<(&str, SubscribeResult<'_>)> = connecting
            .subs
            .iter()
            .zip(epochs.iter().zip(&publications))
            .map(|(sub, (epoch, publications))| (&*sub.channel, sub.result(epoch.as_str(), publications)))
            .collect();
        let version = Arc::clone(&self.version);
        let ping_s = self.config.client.ping_interval_ms.div_ceil(1000);
        let result = ConnectResult {
            client: client.as_str(),
            version: &version,
            expires,
            ttl,
            data: data.as_bytes(),
            subs: &subs,
            ping: if frame_pings { 0 } else { u32::try_from(ping_s).unwrap_or(u32::MAX) },
            pong: !frame_pings,
        };
        self.reply(slot, connecting.id, &Reply::Connect(result));
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

/// A moment as sessions keep it; 0: never.
pub(crate) fn seconds32(at: Option<u64>) -> u32 {
    at.map_or(0, |at| u32::try_from(at).unwrap_or(u32::MAX))
}
