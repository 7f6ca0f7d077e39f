//! Out of a shard's tables: what a connection is, as plain data.
//!
//! Owns the reading of a session, its cursors and its output, and their removal. It must not know the
//! encoding.
//!
//! Invariant: what is read changes nothing; what is removed is told to nobody.

use ringmain_proto::time::Now;

use super::state::{ConnectionState, PartialState, SubscriptionState, codec_number};
use super::{Absent, AbsentSub, NotNow, Progress};
use crate::core::config::SlowConsumer;
use crate::core::engine::Slot;
use crate::core::infos::len;
use crate::core::metrics::Metric;
use crate::core::output::BLOCKED;
use crate::core::session::*;
use crate::core::shard::Core;

impl Core {
    pub(super) fn state_of(&self, slot: Slot, now: Now) -> Result<ConnectionState, NotNow> {
        let session = self.sessions.get(slot);
        match session.stage {
            Stage::Connected if session.is(INPUT_ENDED) || session.is(ENDING) => return Err(NotNow::Ending),
            Stage::Connected if session.pending > 0 => return Err(NotNow::Pending),
            Stage::Connected => {}
            _ => return Err(NotNow::NotConnected),
        }
        let mut unsent = self.out.pending(slot).to_vec();
        let subs: Result<Vec<_>, NotNow> =
            session.subs.iter().map(|sub| self.sub_state(slot, sub, &mut unsent)).collect();
        let extra = session.extra.as_deref();
        let partial_since_ms = extra.and_then(|extra| extra.partial_since_ms).unwrap_or(now.mono_ms);
        let waiting = self.out.waiting(slot).filter(|_| self.out.hot(slot) & BLOCKED != 0);
        Ok(ConnectionState {
            client: session.client,
            user: session.user.to_string(),
            codec: codec_number(session.codec),
            frame_pings: session.is(FRAME_PINGS),
            awaits_pong: session.is(AWAITS_PONG),
            ping_in_ms: (u64::from(session.ping_tick) * TICK_MS).saturating_sub(now.mono_ms),
            expire_at: session.expire_at,
            conn_info: extra.and_then(|extra| extra.conn_info.as_deref()).map(<[u8]>::to_vec),
            subs: subs?,
            unsent,
            blocked_for_ms: waiting.map(|waiting| now.mono_ms.saturating_sub(waiting.blocked_since_ms)),
            partial: session
                .reader
                .state()
                .map(|state| PartialState::new(state, now.mono_ms.saturating_sub(partial_since_ms))),
        })
    }

    fn sub_state(&self, slot: Slot, sub: &Sub, unsent: &mut Vec<u8>) -> Result<SubscriptionState, NotNow> {
        let Progress { offset, behind, fallen } = self.progress(slot, sub, unsent)?;
        let channel = self.channels.get(sub.channel);
        let extra = self.sessions.get(slot).sub_extra(sub.channel);
        Ok(SubscriptionState {
            channel: channel.name.to_string(),
            join_leave: channel.variants[usize::from(sub.variant)].key.join_leave,
            flags: sub.flags,
            expire_at: extra.and_then(|extra| extra.expire_at),
            chan_info: extra.and_then(|extra| extra.chan_info.as_deref()).map(<[u8]>::to_vec),
            epoch: channel.epoch,
            offset,
            behind,
            fallen,
        })
    }

    /// Where a subscription stands. Frames behind its cursor that its offset does not tell from those
    /// before are added to `unsent`; where offsets tell nothing (a gap, another epoch) all of them are.
    fn progress(&self, slot: Slot, sub: &Sub, unsent: &mut Vec<u8>) -> Result<Progress, NotNow> {
        let channel = self.channels.get(sub.channel);
        if channel.is_set_aside(slot, sub) {
            return Err(NotNow::Ending);
        }
        let log = channel.variants[usize::from(sub.variant)].log.as_deref();
        let (pos, seen, behind) = match (sub.state, log) {
            (SubState::Joining | SubState::Replaying, _) => return Err(NotNow::Pending),
            (_, None) => return Ok(Progress { offset: channel.top, ..Progress::default() }),
            (SubState::Member, Some(log)) => {
                let served = log.pass.filter(|pass| sub.index >= pass.unserved);
                let pos = served.map_or(log.group, |pass| pass.to);
                (pos, log.offset_at(pos), None)
            }
            (SubState::Lagging, Some(_)) => {
                let mut lags = self.out.waiting(slot).into_iter().flat_map(|waiting| &waiting.lags);
                let rank = lags.position(|lag| lag.channel == sub.channel).ok_or(NotNow::Pending)?;
                let lag = self.out.waiting(slot).map(|waiting| waiting.lags[rank]).ok_or(NotNow::Pending)?;
                (lag.pos, lag.offset, Some(rank as u32))
            }
        };
        let log = log.expect("whoever has a cursor has a log");
        if pos < log.base() {
            let policy = self.channels.namespace(channel.namespace).config.slow_consumer;
            let closes = policy == SlowConsumer::Close;
            return if closes {
                Err(NotNow::Ending)
            } else {
                Ok(Progress { offset: seen, behind, fallen: true })
            };
        }
        let (to, offset) = match log.resume_after(seen, channel.top) {
            Some(at) if at >= pos => (at, seen),
            _ => (log.head(), channel.top),
        };
        let frames = log.slice(pos, to);
        if !frames.is_empty() && unsent.len() + frames.len() > self.config.client.own_queue_bytes_max as usize
        {
            return Err(NotNow::TooLarge);
        }
        unsent.extend_from_slice(frames);
        Ok(Progress { offset, behind, fallen: false })
    }

    /// Takes a connection out of every table. Its subscriptions stay counted.
    pub(super) fn remove_silently(&mut self, slot: Slot) {
        let subs = self.sessions.get(slot).subs.clone();
        for sub in &subs {
            self.remove_receiver(slot, sub.channel);
        }
        self.account_partial(slot, 0);
        self.sessions.remove_user(slot);
        self.out.forget(slot);
        self.wheel.cancel(slot);
        let session = std::mem::take(self.sessions.get_mut(slot));
        let subs = subs.iter().map(|sub| AbsentSub {
            channel: sub.channel,
            variant: sub.variant,
            flags: sub.flags,
            missed: false,
        });
        let absent =
            Absent { subs: subs.collect(), info_bytes: session.extra.as_deref().map_or(0, info_bytes) };
        self.metrics.sub(Metric::Sessions, 1);
        self.metrics.sub(Metric::Subscriptions, absent.subs.len() as u64);
        self.snapshots.0.insert(session.client, absent);
        self.connections -= 1;
        self.metrics.set(Metric::Connections, self.connections as u64);
    }
}

/// Bytes of what a session shows.
fn info_bytes(extra: &Extra) -> usize {
    let subs = extra.subs.iter().map(|sub| len(sub.chan_info.as_deref()));
    len(extra.conn_info.as_deref()) + subs.sum::<usize>()
}
