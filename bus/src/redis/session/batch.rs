//! Operations on their way: grouped, batched, sent.
//!
//! Owns: when a call is sent and what is in it, and when the hub need not come with more. Must not know: what answers
//! mean.
//!
//! Calls: operations of one hash slot (of any, where there is no cluster) go together. They are sent at once while
//! fewer than [`UNDER_WAY_FEW`] of the group are unanswered; under load they wait for an answer, at most
//! [`BATCH_WAIT_MAX`], and then go as one call of up to [`BATCH_MAX`], while fewer than [`CALLS_IN_FLIGHT_MAX`] are
//! unanswered. Sent sooner they would go in smaller calls, which cost more: with 256 publications in flight one call
//! at a time gave 20 to 30 % more than two (kernel 6.18, two cores).
//!
//! Invariant: operations of a channel are sent in the order in which they were queued.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Ending, Flight, Session, Work};
use crate::redis::script::{BATCH_MAX, Operation};

/// Operations of one group without an answer while more are sent at once.
pub(super) const UNDER_WAY_FEW: usize = 4;

/// Calls of one group without an answer, where operations have waited their time or fill a call. The canary waits
/// behind them all.
pub(super) const CALLS_IN_FLIGHT_MAX: usize = 8;

/// Bytes of one call, if it is more than one operation.
pub(super) const BATCH_BYTES_MAX: usize = 256 << 10;

/// Longest wait for company under load.
pub(super) const BATCH_WAIT_MAX: Duration = Duration::from_millis(10);

#[derive(Default)]
pub(super) struct Group {
    pub(super) waiting: VecDeque<(Work, Operation)>,
    since: Option<Instant>,
    /// Calls without an answer, and the operations in them.
    calls: usize,
    operations: usize,
}

impl Group {
    /// Whether so few operations are unanswered that more are sent at once.
    fn has_few(&self) -> bool {
        self.operations < UNDER_WAY_FEW
    }
}

impl Session {
    pub(super) fn queue(&mut self, work: Work, operation: Operation) {
        let slot = if self.context.options.is_cluster() { operation.slot() } else { 0 };
        let group = self.groups.entry(slot).or_default();
        if group.waiting.is_empty() {
            group.since = Some(Instant::now());
            self.restless.push(slot);
        }
        group.waiting.push_back((work, operation));
    }

    pub(super) fn send_restless(&mut self) -> Result<(), Ending> {
        let now = Instant::now();
        for slot in std::mem::take(&mut self.restless) {
            while self.send_batch(slot, now)? {}
            if self.groups.get(&slot).is_some_and(|group| !group.waiting.is_empty()) {
                self.restless.push(slot);
            }
        }
        Ok(())
    }

    /// Sends one call of a group, if it is time.
    fn send_batch(&mut self, slot: u16, now: Instant) -> Result<bool, Ending> {
        let Some(group) = self.groups.get_mut(&slot) else { return Ok(false) };
        let is_late = group.since.is_some_and(|since| now.duration_since(since) >= BATCH_WAIT_MAX);
        let is_full = group.waiting.len() >= BATCH_MAX;
        let has_room = match is_late || is_full {
            true => group.calls < CALLS_IN_FLIGHT_MAX,
            false => group.has_few(),
        };
        if group.waiting.is_empty() || !has_room {
            return Ok(false);
        }
        let (mut count, mut bytes) = (0, 0);
        while count < BATCH_MAX.min(group.waiting.len()) && bytes < BATCH_BYTES_MAX {
            bytes += group.waiting[count].1.bytes();
            count += 1;
        }
        let mut batch: Vec<(Work, Operation)> = group.waiting.drain(..count).collect();
        // Channels have no order between them; those of one go together.
        batch.sort_by(|(_, one), (_, other)| one.key().cmp(other.key()));
        let (works, operations): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        group.since = (!group.waiting.is_empty()).then_some(now);
        group.calls += 1;
        group.operations += count;
        self.send(&operations)?;
        self.flights.push_back(Flight::Call { group: slot, works });
        Ok(true)
    }

    /// Mutes the hub's bell where nothing more would be sent before an answer comes or operations are late, whatever they
    /// are: without a cluster there is one group.
    pub(super) fn hush(&mut self, now: Instant) {
        let is_full =
            !self.context.options.is_cluster() && self.groups.get(&0).is_some_and(|group| !group.has_few());
        match self.muted {
            None if is_full => {
                self.muted = Some(now);
                self.context.bell.mute();
            }
            Some(since) if !is_full || now.duration_since(since) >= BATCH_WAIT_MAX => self.unmute(),
            _ => (),
        }
    }

    fn unmute(&mut self) {
        self.muted = None;
        self.context.bell.unmute();
    }

    /// A call of so many operations was answered.
    pub(super) fn landed(&mut self, slot: u16, operations: usize) {
        self.unmute();
        let Some(group) = self.groups.get_mut(&slot) else { return };
        group.calls -= 1;
        group.operations -= operations;
        if group.calls == 0 && group.waiting.is_empty() {
            self.groups.remove(&slot);
        }
    }
}
