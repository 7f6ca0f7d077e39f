//! Into a shard's tables again: a connection that was plain data.
//!
//! Owns the check that it is one that left, and the way back of its session, output and cursors. It must
//! not know the encoding.
//!
//! Invariants:
//! * nothing is changed before everything is checked;
//! * a log is trusted to continue a position only as far as its marks prove it.

use ringmain_proto::time::Now;
use ringmain_proto::ws::Reader;

use super::state::{ConnectionState, SubscriptionState, codec_of};
use super::{Absent, AbsentSub, ImportError, Progress};
use crate::core::channel::VariantKey;
use crate::core::config::SlowConsumer;
use crate::core::engine::{Effect, Slot};
use crate::core::fanout::{group_is_at, lag};
use crate::core::infos::len;
use crate::core::log::Log;
use crate::core::metrics::Metric;
use crate::core::output::{Lag, log_id};
use crate::core::session::*;
use crate::core::shard::Core;

/// When something may expire at the latest, in seconds since 1970: milliseconds of it are numbers still.
const EXPIRE_AT_MAX: u64 = 1 << 48;

/// A subscription whose place is to be found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Restored {
    channel: u32,
    epoch: u64,
    progress: Progress,
    missed: bool,
}

impl Core {
    /// The reader that goes on, and since when a frame is unfinished.
    pub(super) fn reader_of(
        &self,
        state: &mut ConnectionState,
        now: Now,
    ) -> Result<(Reader, Option<u64>), ImportError> {
        let Some(partial) = state.partial.take() else { return Ok((Reader::new(), None)) };
        let since_ms = now.mono_ms.saturating_sub(partial.for_ms);
        let message_bytes_max = self.config.client.message_bytes_max as usize;
        let reader = Reader::from_state(partial.into_reader_state(), message_bytes_max);
        Ok((reader.ok_or(ImportError::Malformed)?, Some(since_ms)))
    }

    /// Whether a state has the subscriptions that are counted for it, and the infos.
    pub(super) fn is_as_it_left(&self, state: &ConnectionState, absent: &Absent) -> bool {
        let Some(codec) = codec_of(state.codec) else { return false };
        let same = |(sub, counted): (&SubscriptionState, &AbsentSub)| {
            let channel = self.channels.get(counted.channel);
            let key = VariantKey { codec, join_leave: sub.join_leave };
            *channel.name == *sub.channel
                && channel.variants[usize::from(counted.variant)].key == key
                && counted.flags == sub.flags
                && sub.expire_at.is_none_or(|at| at <= EXPIRE_AT_MAX)
        };
        let infos = state.subs.iter().map(|sub| len(sub.chan_info.as_deref()));
        state.subs.len() == absent.subs.len()
            && state.subs.iter().zip(&absent.subs).all(same)
            && infos.sum::<usize>() + len(state.conn_info.as_deref()) == absent.info_bytes
    }

    pub(super) fn restore_output(&mut self, slot: Slot, state: &ConnectionState, now: Now) {
        self.sessions.open(slot);
        self.out.open(slot);
        if let Some(blocked_for_ms) = state.blocked_for_ms {
            self.out.block(slot, now.mono_ms.saturating_sub(blocked_for_ms));
            self.effects.push(Effect::AwaitWritable(slot));
        }
        if !state.unsent.is_empty() {
            self.out.append_own(slot, |out| out.extend_from_slice(&state.unsent));
        }
    }

    /// Fills the session, all but its places in its channels. Returns the positions to find them from.
    pub(super) fn restore_session(
        &mut self,
        slot: Slot,
        state: ConnectionState,
        reader: Reader,
        absent: &Absent,
        now: Now,
    ) -> Vec<Restored> {
        let ping_in_ms = state.ping_in_ms.min(2 * self.config.client.ping_interval_ms);
        let session = self.sessions.get_mut(slot);
        session.client = state.client;
        session.user = state.user.into();
        session.codec = codec_of(state.codec).unwrap_or_default();
        session.set(FRAME_PINGS, state.frame_pings);
        session.set(AWAITS_PONG, state.awaits_pong);
        session.ping_tick = ((now.mono_ms + ping_in_ms) / TICK_MS) as u32;
        session.expire_at = state.expire_at;
        session.stage = Stage::Connected;
        session.reader = reader;
        if let Some(info) = state.conn_info {
            session.extra().conn_info = Some(info.into());
        }
        let mut restored = Vec::with_capacity(absent.subs.len());
        for (sub, counted) in state.subs.into_iter().zip(&absent.subs) {
            let &AbsentSub { channel, variant, flags, missed } = counted;
            session.subs.push(Sub { channel, index: 0, state: SubState::Member, variant, flags });
            if sub.expire_at.is_some() || sub.chan_info.is_some() {
                let extra = session.sub_extra_mut(channel);
                (extra.expire_at, extra.chan_info) = (sub.expire_at, sub.chan_info.map(Into::into));
            }
            let progress = Progress { offset: sub.offset, behind: sub.behind, fallen: sub.fallen };
            restored.push(Restored { channel, epoch: sub.epoch, progress, missed });
        }
        restored
    }

    /// Lists a session that is whole again, and counts it.
    pub(super) fn note_restored(&mut self, slot: Slot, partial_since_ms: Option<u64>) {
        self.sessions.add_user(slot);
        let session = self.sessions.get_mut(slot);
        let (subs, buffered) = (session.subs.len() as u64, session.reader.buffered_bytes());
        if partial_since_ms.is_some() {
            session.extra().partial_since_ms = partial_since_ms;
        }
        self.account_partial(slot, buffered);
        self.metrics.add(Metric::Sessions, 1);
        self.metrics.add(Metric::Subscriptions, subs);
        self.connections += 1;
        self.metrics.set(Metric::Connections, self.connections as u64);
    }

    /// Gives every subscription its place, those that were behind first and in their order; then tells
    /// what is lost.
    pub(super) fn restore_subs(&mut self, slot: Slot, mut subs: Vec<Restored>, now: Now) {
        subs.sort_by_key(|sub| sub.progress.behind.unwrap_or(u32::MAX));
        let mut behind = Vec::new();
        for sub in subs {
            let is_lost = sub.missed || self.channels.get(sub.channel).epoch != sub.epoch;
            if !self.restore_receiver(slot, sub.channel, sub.progress, is_lost) {
                behind.push((sub.channel, is_lost));
            }
        }
        for (index, is_lost) in behind {
            // Telling one may have closed the connection.
            if self.sessions.sub(slot, index).is_some() {
                self.catch_up(slot, index, is_lost, now);
            }
        }
    }

    /// Makes a subscription a member, or a laggard: below the log's tail where the log does not have what
    /// follows. Returns whether it has.
    fn restore_receiver(&mut self, slot: Slot, index: u32, progress: Progress, is_lost: bool) -> bool {
        let Core { channels, sessions, out, served, .. } = self;
        let channel = channels.get_mut(index);
        let (top, offset) = (channel.top, progress.offset);
        let sub = sessions.sub_mut(slot, index);
        let variant = &mut channel.variants[usize::from(sub.variant)];
        served.push(log_id(index, sub.variant));
        let resumed = match &variant.log {
            _ if is_lost || progress.fallen => None,
            Some(log) => log.resume_after(offset, top),
            None => (offset == top).then_some(0),
        };
        match (resumed, &mut variant.log) {
            (Some(pos), Some(log)) if !group_is_at(log, pos) => {
                lag(log, sessions, out, slot, Lag { channel: index, pos, offset });
            }
            (Some(_), _) => {
                sub.index = variant.members.len() as u32;
                variant.members.push(slot);
            }
            (None, log) => {
                let log = log.get_or_insert_with(|| {
                    let mut log = Box::<Log>::default();
                    log.reset(top);
                    log
                });
                lag(log, sessions, out, slot, Lag { channel: index, pos: log.base() - 1, offset });
            }
        }
        resumed.is_some()
    }

    /// What becomes of a subscription whose log does not have what follows: its namespace's policy decides
    /// when it is served, but nobody is closed for what it had no time to read.
    fn catch_up(&mut self, slot: Slot, index: u32, is_lost: bool, now: Now) {
        let namespace = self.channels.namespace(self.channels.get(index).namespace);
        match namespace.config.slow_consumer {
            _ if is_lost => {
                self.lose(slot, index, now);
            }
            SlowConsumer::Latest => {}
            _ if !namespace.is_positioned() => {
                self.lose(slot, index, now);
            }
            SlowConsumer::Replay => {}
            SlowConsumer::Close => self.start_replay(slot, index, now),
        }
    }
}
