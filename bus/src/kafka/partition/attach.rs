//! A partition's coming and going: reading from where it was left, the generation, silence, loss.
//!
//! Owns: when reading starts and where, when the partition counts as lost, when a generation is raised. Must not know:
//! what is asked of a partition that is live.

use super::{Act, Partition, Pending, Phase, Shared, Start, give_up, refuse};
use crate::backend::{Domain, Reply, SILENCE_MS_MAX};
use crate::kafka::log::PartitionLog;
use crate::kafka::wire::{Body, Generation};
use crate::types::{BusError, PublishError};

/// Without any progress for so long, reading starts anew, in milliseconds.
const STALL_MS_MAX: u64 = 3_000;

/// First and longest pause before reading starts again, in milliseconds.
const RETRY_MS_MIN: u64 = 50;
const RETRY_MS_MAX: u64 = 1_000;

/// Nonces remembered of a partition's generations.
const KNOWN_MAX: usize = 32;

impl Partition {
    /// Starts to read: where it was left, or some messages before the end.
    pub(super) fn attach(&mut self, shared: &mut Shared, now_ms: u64) {
        let start = match self.log.last() {
            Some(last) => Start::At(last.offset),
            None => Start::Tail(shared.options.scan_messages_max.min(i64::MAX as u64).cast_signed()),
        };
        self.attach_at(shared, now_ms, start);
    }

    pub(super) fn attach_at(&mut self, shared: &mut Shared, now_ms: u64, start: Start) {
        self.phase = Phase::Reading;
        (self.start, self.verified) = (start, false);
        self.progress_ms = now_ms;
        self.scanned_bytes = 0;
        shared.acts.push_back(Act::Unassign { partition: self.index });
        shared.acts.push_back(Act::Assign { partition: self.index, start });
        self.mark(shared, now_ms);
    }

    /// What was read cannot be continued: forgets it and reads anew, to compare what was seen last.
    pub(super) fn start_over(&mut self, shared: &mut Shared, now_ms: u64) {
        self.lose(shared, now_ms);
        self.remember_generation();
        // What is not compared yet, or was and differs, is not forgotten for what was read since.
        if self.seen.is_none() && !self.truncated {
            self.seen = self.log.last();
        }
        self.log = PartitionLog::new(shared.options.log_limits());
        self.attach(shared, now_ms);
    }

    pub(super) fn remember_generation(&mut self) {
        let nonce = self.log.generation().nonce;
        if nonce != 0 && !self.known.contains(&nonce) {
            self.known.push_back(nonce);
            if self.known.len() > KNOWN_MAX {
                self.known.pop_front();
            }
        }
    }

    /// The client could not start where it was told to.
    pub(in crate::kafka) fn cannot_start(&mut self, shared: &mut Shared, now_ms: u64) {
        if self.phase != Phase::Reading || self.verified {
            return;
        }
        match self.start {
            Start::At(_) => self.start_over(shared, now_ms),
            // Fewer messages are kept than were asked for.
            Start::Tail(_) => self.attach_at(shared, now_ms, Start::Beginning),
            Start::Beginning => (),
        }
    }

    /// Everything up to our own mark at offset `end` is read; or our fence was.
    pub(super) fn read_to_end(&mut self, shared: &mut Shared, now_ms: u64, end: i64) {
        if let Some(seen) = self.seen.take_if(|seen| end <= seen.offset) {
            self.truncated |= end != seen.offset;
        }
        self.seen = None;
        let generation = self.log.generation();
        let is_old = self.truncated && self.known.contains(&generation.nonce);
        if generation == Generation::NONE || is_old {
            self.phase = Phase::Raising;
            return self.raise(shared);
        }
        self.truncated = false;
        self.remember_generation();
        self.go_live(shared, now_ms);
    }

    fn raise(&mut self, shared: &mut Shared) {
        let Generation { number, nonce: from } = self.log.generation();
        let next = Generation { number: number + 1, nonce: shared.nonces.draw() };
        self.send(shared, Pending::Fence, &Body::Fence { from, next });
    }

    fn go_live(&mut self, shared: &mut Shared, now_ms: u64) {
        self.phase = Phase::Live;
        self.failures = 0;
        self.heard_ms = now_ms;
        if std::mem::take(&mut self.is_lost) {
            shared.replies.push_back(Reply::Back { domain: Domain(self.index) });
        }
        for (_, request) in std::mem::take(&mut self.waiting) {
            self.serve(shared, now_ms, request);
        }
    }

    // Losing

    /// The way there or back is in doubt. Reading goes on, or starts again, by the caller's doing.
    fn lose(&mut self, shared: &mut Shared, now_ms: u64) {
        if self.phase == Phase::Live {
            self.is_lost = true;
            self.down_since_ms = now_ms;
            shared.replies.push_back(Reply::Lost { domain: Domain(self.index) });
        }
        self.forget_subscriptions();
        self.sync = None;
        self.marks = 0;
        for (_, pending) in self.pending.drain() {
            match pending {
                Pending::Publish { call, .. } => {
                    let result = Err(PublishError::Unknown);
                    shared.replies.push_back(Reply::Published { call, result });
                }
                Pending::Clear { call } => {
                    shared.replies.push_back(Reply::Cleared { call, result: Err(BusError::Unavailable) });
                }
                Pending::Mark | Pending::Fence => (),
            }
        }
        for (_, read) in self.reads.drain(..) {
            refuse(shared, &read);
        }
        if self.is_lost {
            for (_, request) in self.waiting.drain(..) {
                give_up(shared, &request);
            }
        }
    }

    pub(super) fn forget_subscriptions(&mut self) {
        for name in self.subscribed.drain() {
            self.log.pin(&name, false);
        }
        self.moved.clear();
    }

    /// The client is gone, or has failed: starts again with the next one.
    pub(in crate::kafka) fn client_lost(&mut self, shared: &mut Shared, now_ms: u64) {
        if self.phase != Phase::Detached {
            self.lose(shared, now_ms);
            self.phase = Phase::Down { retry_ms: now_ms };
        }
    }

    fn retry_later(&mut self, shared: &mut Shared, now_ms: u64) {
        self.lose(shared, now_ms);
        let pause_ms = (RETRY_MS_MIN << self.failures.min(5)).min(RETRY_MS_MAX);
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Down { retry_ms: now_ms + pause_ms / 2 + shared.nonces.below(pause_ms / 2 + 1) };
    }

    /// Starts to read although no channel asks for it: the node's own watch.
    pub(in crate::kafka) fn hold_open(&mut self, shared: &mut Shared, now_ms: u64) {
        self.used_ms = now_ms;
        if self.phase == Phase::Detached {
            self.down_since_ms = now_ms;
            self.attach(shared, now_ms);
        }
    }

    /// Does what is due; whether it was found silent. `late_ms`: how long it may have waited for this process, which is
    /// no silence of the broker.
    pub(in crate::kafka) fn tick(
        &mut self,
        shared: &mut Shared,
        now_ms: u64,
        late_ms: u64,
        has_client: bool,
    ) -> bool {
        self.heard_ms = (self.heard_ms + late_ms).min(now_ms);
        self.progress_ms = (self.progress_ms + late_ms).min(now_ms);
        while let Some((_, request)) = self.waiting.pop_front_if(|(by_ms, _)| *by_ms <= now_ms) {
            give_up(shared, &request);
        }
        match self.phase {
            Phase::Detached => return false,
            Phase::Down { retry_ms } if retry_ms <= now_ms && has_client => {
                self.attach(shared, now_ms);
                return false;
            }
            Phase::Down { .. } => return false,
            Phase::Live if now_ms >= self.heard_ms + SILENCE_MS_MAX => {
                self.retry_later(shared, now_ms);
                return true;
            }
            Phase::Reading | Phase::Raising if now_ms >= self.progress_ms + STALL_MS_MAX => {
                self.retry_later(shared, now_ms);
                return false;
            }
            Phase::Raising if !self.pending.values().any(|pending| matches!(pending, Pending::Fence)) => {
                self.raise(shared);
            }
            Phase::Live if self.is_idle(shared, now_ms) => {
                self.detach(shared);
                return false;
            }
            _ => (),
        }
        if now_ms >= self.canary_ms {
            self.mark(shared, now_ms);
        }
        false
    }

    /// Another partition was found silent: this one counts as lost, too, unless it has answered a moment ago.
    pub(in crate::kafka) fn doubt(&mut self, shared: &mut Shared, now_ms: u64) {
        if self.phase == Phase::Live && !self.is_answering(now_ms) {
            self.retry_later(shared, now_ms);
        }
    }

    fn is_idle(&self, shared: &Shared, now_ms: u64) -> bool {
        let unused_ms = now_ms.saturating_sub(self.used_ms);
        self.subscribed.is_empty()
            && self.reads.is_empty()
            && self.pending.values().all(|pending| matches!(pending, Pending::Mark))
            && unused_ms >= shared.options.detach_after_ms
    }

    fn detach(&mut self, shared: &mut Shared) {
        self.remember_generation();
        self.seen = self.log.last();
        self.truncated = false;
        self.log = PartitionLog::new(shared.options.log_limits());
        self.pending.clear();
        self.marks = 0;
        self.sync = None;
        self.phase = Phase::Detached;
        shared.acts.push_back(Act::Unassign { partition: self.index });
    }
}
