//! What happens by time alone: pings, pongs, expiry, stalled readers, drains, full pools; and what is
//! spread over turns.
//!
//! Owns no deadline: each session's are worked out from its state when its one entry in the wheel
//! comes up. Pings are spread over the interval by a random phase drawn on connect.

use ringmain_proto::close::{CloseReason, UnsubscribeReason};
use ringmain_proto::message::Push;
use ringmain_proto::time::Now;
use ringmain_proto::ws::Opcode;

use super::config::SlowConsumer;
use super::engine::{Effect, Slot};
use super::metrics::Metric;
use super::output::BLOCKED;
use super::session::{AWAITS_PONG, FRAME_PINGS, INPUT_ENDED, SUB_SERVER_SIDE, Stage, SubState, TICK_MS};
use super::shard::Core;

/// How often the pools are looked at, in milliseconds.
const POOL_CHECK_MS: u64 = 32;
/// Timers run in one turn at the most; the rest comes with the next.
const TIMERS_PER_TURN_MAX: usize = 4096;

impl Core {
    /// Runs what is due.
    pub(crate) fn run_timers(&mut self, now: Now) {
        for _ in 0..TIMERS_PER_TURN_MAX {
            let Some(slot) = self.wheel.pop(now.mono_ms) else { break };
            self.slot_timer(slot, now);
        }
        if self.bus.next_deadline().is_some_and(|at| at <= now.mono_ms) {
            self.poll_bus(now);
        }
        self.tell_gaps(now);
        self.remote_timers(now);
        self.report_news(now);
        self.drain_step(now);
        if now.mono_ms >= self.pools_checked_ms + POOL_CHECK_MS {
            self.pools_checked_ms = now.mono_ms;
            self.check_pools(now);
        }
        self.finish_flushed();
    }

    /// When the next is due.
    pub(crate) fn next_timer_ms(&self) -> Option<u64> {
        if self.has_output() || !self.gaps.is_empty() {
            return Some(0);
        }
        let drain = self.drain.as_ref().filter(|drain| !drain.told);
        let drain = drain.map(|_| self.pools_checked_ms + POOL_CHECK_MS);
        let pools = self.over_pool().then_some(self.pools_checked_ms + POOL_CHECK_MS);
        let cluster = [self.remote.next_ms(), self.next_report_ms()].into_iter().flatten().min();
        [self.wheel.next_ms(), self.bus.next_deadline(), drain, pools, cluster].into_iter().flatten().min()
    }

    /// Sets a slot's entry in the wheel to its next deadline.
    pub(crate) fn arm_timer(&mut self, slot: Slot, now: Now) {
        if let Some(at) = self.next_deadline_of(slot, now) {
            self.wheel.set(slot, at);
        }
    }

    fn next_deadline_of(&self, slot: Slot, now: Now) -> Option<u64> {
        let session = self.sessions.get(slot);
        let client = &self.config.client;
        let partial = session.extra.as_ref().and_then(|extra| extra.partial_since_ms);
        let partial = partial.map(|since| since + client.frame_timeout_ms);
        let stage = match session.stage {
            Stage::Free | Stage::Gone => return None,
            Stage::Connected => {
                let ping = u64::from(session.ping_tick) * TICK_MS;
                let pong = ping.saturating_sub(client.ping_interval_ms) + client.pong_timeout_ms;
                let next = if session.is(AWAITS_PONG) { ping.min(pong) } else { ping };
                let expiry = self.expiries(slot).map(|at| mono_of(at, now)).min();
                let input_end = session.deadline_ms().filter(|_| session.is(INPUT_ENDED));
                [Some(next), expiry, self.stall_deadline(slot), input_end].into_iter().flatten().min()
            }
            _ => session.deadline_ms(),
        };
        [stage, partial].into_iter().flatten().min()
    }

    /// When the connection and its subscriptions expire, delays included, in milliseconds since 1970.
    fn expiries(&self, slot: Slot) -> impl Iterator<Item = u64> + '_ {
        let session = self.sessions.get(slot);
        let client = &self.config.client;
        let connection = (session.expire_at != 0)
            .then(|| u64::from(session.expire_at) * 1000 + client.expired_close_delay_ms);
        let subs = session.extra.as_ref().map(|extra| &extra.subs[..]).unwrap_or_default();
        let subs = subs.iter().filter_map(|sub| sub.expire_at);
        connection.into_iter().chain(subs.map(|at| at * 1000 + client.expired_sub_close_delay_ms))
    }

    /// When a blocked reader counts as stalled, where a namespace closes those.
    fn stall_deadline(&self, slot: Slot) -> Option<u64> {
        if self.out.hot(slot) & BLOCKED == 0 {
            return None;
        }
        let since = self.out.waiting(slot)?.blocked_since_ms;
        let subs = self.sessions.get(slot).subs.iter();
        let configs =
            subs.map(|sub| &self.channels.namespace(self.channels.get(sub.channel).namespace).config);
        let closing = configs.filter(|config| config.slow_consumer == SlowConsumer::Close);
        closing.map(|config| since + config.stall_ms).min()
    }

    fn slot_timer(&mut self, slot: Slot, now: Now) {
        let session = self.sessions.get(slot);
        let due = session.deadline_ms().is_some_and(|at| at <= now.mono_ms);
        match session.stage {
            Stage::Free | Stage::Gone => return,
            Stage::Proxy | Stage::Http if due => {
                self.metrics.add(Metric::HandshakeFailed, 1);
                return self.abort(slot, now);
            }
            Stage::Connecting | Stage::Connected if due && session.is(INPUT_ENDED) => {
                return self.finish_input(slot, now);
            }
            Stage::Opened | Stage::Refused | Stage::Connecting if due => {
                return self.close(slot, CloseReason::Stale, now);
            }
            Stage::Closing if due => {
                self.metrics.add(Metric::CloseTimeout, 1);
                return self.abort(slot, now);
            }
            Stage::Connected => self.connected_timer(slot, now),
            _ => {}
        }
        let partial = self.sessions.get(slot).extra.as_ref().and_then(|extra| extra.partial_since_ms);
        if partial.is_some_and(|since| since + self.config.client.frame_timeout_ms <= now.mono_ms) {
            return self.close(slot, CloseReason::SlowFrame, now);
        }
        self.arm_timer(slot, now);
    }

    fn connected_timer(&mut self, slot: Slot, now: Now) {
        let client = &self.config.client;
        let (interval, timeout) = (client.ping_interval_ms, client.pong_timeout_ms);
        let session = self.sessions.get(slot);
        let ping = u64::from(session.ping_tick) * TICK_MS;
        if session.is(AWAITS_PONG) && ping.saturating_sub(interval) + timeout <= now.mono_ms {
            return self.close(slot, CloseReason::NoPong, now);
        }
        if self.expire(slot, now) || self.close_if_stalled(slot, now) {
            return;
        }
        if ping <= now.mono_ms {
            let session = self.sessions.get_mut(slot);
            session.ping_tick = ((now.mono_ms + interval) / TICK_MS) as u32;
            session.set(AWAITS_PONG, true);
            if session.is(FRAME_PINGS) {
                self.out.frame(slot, Opcode::Ping, |_| {});
            } else {
                self.push(slot, &Push::Ping);
            }
        }
    }

    /// Ends what has expired. Returns whether the connection closes.
    fn expire(&mut self, slot: Slot, now: Now) -> bool {
        let session = self.sessions.get(slot);
        let client = &self.config.client;
        let connection = u64::from(session.expire_at) * 1000 + client.expired_close_delay_ms;
        if session.expire_at != 0 && connection <= now.unix_ms {
            self.close(slot, CloseReason::Expired, now);
            return true;
        }
        let delay = client.expired_sub_close_delay_ms;
        let expired: Vec<u32> = session.extra.as_ref().map_or_else(Vec::new, |extra| {
            let over = extra
                .subs
                .iter()
                .filter(|sub| sub.expire_at.is_some_and(|at| at * 1000 + delay <= now.unix_ms));
            over.map(|sub| sub.channel).collect()
        });
        for index in expired {
            match self.sessions.sub(slot, index) {
                Some(sub) if sub.state == SubState::Joining => {}
                // The client could not subscribe to it again: the whole connection begins anew.
                Some(sub) if sub.flags & SUB_SERVER_SIDE != 0 => {
                    self.close(slot, CloseReason::SubscriptionExpired, now);
                    return true;
                }
                Some(_) => self.unsubscribe_push(slot, index, UnsubscribeReason::Expired, now),
                None => {}
            }
        }
        false
    }

    fn close_if_stalled(&mut self, slot: Slot, now: Now) -> bool {
        let stalled = self.stall_deadline(slot).is_some_and(|at| at <= now.mono_ms);
        if stalled {
            self.close(slot, CloseReason::Slow, now);
        }
        stalled
    }

    // --- drain ---

    /// Closes the next connections of a drain, at its pace.
    fn drain_step(&mut self, now: Now) {
        let Some(mut drain) = self.drain else { return };
        let elapsed = now.mono_ms.saturating_sub(drain.begun_ms);
        let due = 1 + elapsed * u64::from(drain.closes_per_second) / 1000;
        if drain.closed < due && self.connections > 0 {
            let live: Vec<Slot> = self.sessions.live().collect();
            let start = live.partition_point(|slot| *slot < drain.next_slot);
            for slot in live[start..].iter().chain(&live[..start]) {
                if drain.closed >= due {
                    break;
                }
                if !matches!(self.sessions.get(*slot).stage, Stage::Closing | Stage::Gone) {
                    self.close(*slot, CloseReason::Shutdown, now);
                    drain.closed += 1;
                }
                drain.next_slot = slot + 1;
            }
        }
        if self.connections == 0 && !drain.told {
            drain.told = true;
            self.effects.push(Effect::Drained);
        }
        self.drain = Some(drain);
    }

    // --- pools ---

    fn over_pool(&self) -> bool {
        let limits = &self.config.limits;
        self.out.own_bytes() as u64 > limits.own_pool_bytes
            || self.channels.log_bytes() as u64 > limits.log_pool_bytes
            || self.partial_bytes as u64 > limits.partial_pool_bytes
    }

    /// Where a pool is full, the holder stalled longest goes first.
    fn check_pools(&mut self, now: Now) {
        if !self.over_pool() {
            return;
        }
        let limits = &self.config.limits;
        let (own, log, partial) = (limits.own_pool_bytes, limits.log_pool_bytes, limits.partial_pool_bytes);
        if self.out.own_bytes() as u64 > own
            && let Some(slot) = self.oldest(|core, slot| {
                let waiting = core.out.waiting(slot)?;
                (waiting.own_len() > 0 && core.out.hot(slot) & BLOCKED != 0)
                    .then_some(waiting.blocked_since_ms)
            })
        {
            // It does not read: there is no point in a close frame behind all that waits.
            self.metrics.add(Metric::CloseSlow, 1);
            self.abort(slot, now);
        }
        if self.partial_bytes as u64 > partial
            && let Some(slot) =
                self.oldest(|core, slot| core.sessions.get(slot).extra.as_ref()?.partial_since_ms)
        {
            self.close(slot, CloseReason::SlowFrame, now);
        }
        if self.channels.log_bytes() as u64 > log {
            self.cut_longest_log();
        }
    }

    /// The live connection with the smallest `since`.
    fn oldest(&self, since: impl Fn(&Self, Slot) -> Option<u64>) -> Option<Slot> {
        let live = self.sessions.live();
        let live =
            live.filter(|slot| !matches!(self.sessions.get(*slot).stage, Stage::Closing | Stage::Gone));
        live.filter_map(|slot| Some((since(self, slot)?, slot))).min().map(|(_, slot)| slot)
    }

    fn cut_longest_log(&mut self) {
        let longest = self
            .channels
            .iter()
            .flat_map(|(index, channel)| {
                channel.variants.iter().enumerate().map(move |(variant, entry)| {
                    (entry.log.as_ref().map_or(0, |log| log.len()), index, variant as u8)
                })
            })
            .max();
        if let Some((len, index, variant)) = longest
            && len > 0
        {
            self.bound_log(index, variant, len / 2);
        }
    }
}

/// A moment in milliseconds since 1970 on the monotonic clock.
fn mono_of(unix_ms: u64, now: Now) -> u64 {
    now.mono_ms + unix_ms.saturating_sub(now.unix_ms)
}
