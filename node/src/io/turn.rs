//! The loop of a shard: one turn after the other.
//!
//! Owns the order of a turn (see [`crate::core::engine`]), its budget, and when the shard waits. It knows
//! nothing of what the engine does with bytes.
//!
//! A turn makes one enter when it sends: the sends are submitted, and the kernel runs deferred work in
//! the same call. What that brings in is handled in the next turn, failures of sends apart, which are
//! handled at once. Accepts, timers and inboxes get their share of every turn, however long the queues of
//! the others are, because each part of a turn has a maximum of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringmain_proto::time::Now;

use super::accept::Acceptor;
use super::clock::{Clock, mono_ns_of};
use super::doorbell::Doorbell;
use super::handover::Handovers;
use super::inbox::ControlInbox;
use super::mesh::Mesh;
use super::metrics::{PUBLISH_INTERVAL_MS, ShardMetrics, WireMetric};
use super::options::TurnOptions;
use super::send::{Failures, Sent, send_all};
use super::shard::ShardEvent;
use super::sleep::Sleeper;
use super::wire::Wire;
use crate::core::engine::{Effect, Engine, ShardIndex, TurnBudget};
use crate::core::metrics::Metric;

/// Entries of an inbox between two looks at the clock.
const CLOCK_STRIDE: usize = 32;

/// A running shard.
pub(super) struct ShardLoop<E: Engine> {
    pub(super) options: TurnOptions,
    pub(super) engine: E,
    pub(super) wire: Wire,
    pub(super) acceptor: Acceptor,
    pub(super) handovers: Handovers,
    pub(super) sleeper: Sleeper,
    pub(super) seat: Seat<E>,
    pub(super) outlets: Outlets<E>,
    pub(super) clock: Clock,
    pub(super) scratch: Scratch<E>,
    pub(super) counts: Counts,
}

/// What the shard shares with other threads.
pub(super) struct Seat<E: Engine> {
    pub(super) index: ShardIndex,
    pub(super) mesh: Mesh<E::Mesh>,
    pub(super) doorbell: Arc<Doorbell>,
    pub(super) inbox: Arc<ControlInbox<E::Control>>,
    pub(super) stop: Arc<AtomicBool>,
    /// Shards for which a batch waits for credit. At most one entry per shard.
    pub(super) blocked: Vec<ShardIndex>,
}

/// Where a shard's figures, answers and events go.
pub(super) struct Outlets<E: Engine> {
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) answers: Box<dyn Fn(E::Answer) + Send>,
    pub(super) events: Arc<dyn Fn(ShardEvent) + Send + Sync>,
    pub(super) published_ms: u64,
    /// A turn was made since the figures were published.
    pub(super) stale: bool,
}

/// Memory that turns reuse; empty between turns.
pub(super) struct Scratch<E: Engine> {
    failures: Failures,
    effects: Vec<Effect>,
    answers: Vec<E::Answer>,
    targets: Vec<ShardIndex>,
}

impl<E: Engine> Default for Scratch<E> {
    fn default() -> Self {
        Self { failures: Failures::default(), effects: Vec::new(), answers: Vec::new(), targets: Vec::new() }
    }
}

/// What the loop adds to the engine's values at the end of a turn.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) accepted: u64,
    pub(super) refused: u64,
    pub(super) handed_over: u64,
    pub(super) bytes_in: u64,
    pub(super) batches: u64,
    pub(super) sent: Sent,
}

/// What follows a turn.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Another turn: something is left to do.
    Again,
    /// Nothing is left to do.
    Wait,
}

/// How late a turn is that began at `started_ns` for a deadline of the engine; `None`: the deadline is
/// "at once" (0), which was not waited for.
fn lateness_ns(deadline_ms: u64, started_ns: u64) -> Option<u64> {
    (deadline_ms > 0).then(|| started_ns.saturating_sub(mono_ns_of(deadline_ms)))
}

impl<E: Engine> Seat<E> {
    /// Whether other threads left work. Asked at the end of a turn and again after a wait was announced.
    fn work_waits(&self) -> bool {
        !self.inbox.is_empty()
            || !self.mesh.inbox_is_empty(self.index)
            || self.blocked.iter().any(|&to| self.mesh.has_credit(self.index, to))
            || self.stop.load(Ordering::Acquire)
    }
}

impl<E: Engine> ShardLoop<E> {
    /// Runs until the shard is stopped.
    pub(super) async fn run(mut self) {
        while !self.seat.stop.load(Ordering::Acquire) {
            let started_ns = self.clock.mono_ns();
            match self.turn(started_ns) {
                Next::Again => {
                    self.let_others_run(started_ns);
                    // Costs two loads unless the executor has other work whose time has come.
                    glommio::yield_if_needed().await;
                }
                Next::Wait => self.wait().await,
            }
        }
        self.publish(self.clock.at(self.clock.mono_ns()).mono_ms);
    }

    /// After a long turn, gives a core that shards share to the next of them. Left to itself the scheduler
    /// changes threads at its tick: with six that send, a ping waited for 24 ms and more.
    fn let_others_run(&self, started_ns: u64) {
        let Some(yield_after_us) = self.options.yield_after_us else { return };
        if self.clock.mono_ns() - started_ns > yield_after_us * 1_000 {
            std::thread::yield_now();
        }
    }

    fn turn(&mut self, started_ns: u64) -> Next {
        let now = self.clock.at(started_ns);
        let ring = &mut self.wire.ring;
        if ring.ready() == 0 && (ring.has_unsubmitted() || ring.has_pending()) {
            ring.submit_and_run(self.options.completions_max);
        }
        self.completions(started_ns, now);
        self.commands(now);
        self.batches_in(started_ns, now);
        self.timers(started_ns, now);
        let more = self.outputs(now);
        self.batches_out(now);
        self.effects(now);
        self.acceptor.arm(&mut self.wire, now.mono_ms);
        self.count();
        self.publish_if_due(now.mono_ms);
        self.wire.figures.turn.observe_ns(self.clock.mono_ns() - started_ns);
        let left = more || self.wire.ring.ready() > 0 || self.wire.ring.has_pending();
        if left || self.seat.work_waits() { Next::Again } else { Next::Wait }
    }

    /// Whether the turn has taken its time.
    pub(super) fn is_over(&self, started_ns: u64) -> bool {
        self.clock.mono_ns() - started_ns > self.options.time_max_us * 1_000
    }

    fn commands(&mut self, now: Now) {
        for _ in 0..self.options.controls_max {
            let Some(command) = self.seat.inbox.pop() else { return };
            self.engine.control(command, now);
        }
    }

    fn batches_in(&mut self, started_ns: u64, now: Now) {
        for count in 1..=self.options.mesh_batches_max {
            let Some((from, batch)) = self.seat.mesh.receive(self.seat.index) else { return };
            self.counts.batches += 1;
            self.engine.inbox(from, batch, now);
            if count % CLOCK_STRIDE == 0 && self.is_over(started_ns) {
                return;
            }
        }
    }

    fn timers(&mut self, started_ns: u64, now: Now) {
        self.wire.end_discards(now.mono_ms);
        let Some(deadline_ms) = self.engine.next_deadline_ms() else { return };
        if deadline_ms <= now.mono_ms {
            if let Some(late_ns) = lateness_ns(deadline_ms, started_ns) {
                self.wire.figures.delay.observe_ns(late_ns);
            }
            self.engine.tick(now);
        }
    }

    /// Sends what the engine has. Returns whether more is left than the budget allowed.
    fn outputs(&mut self, now: Now) -> bool {
        let TurnOptions { sends_max, background_max, send_bytes_max: bytes_max, .. } = self.options;
        let budget = TurnBudget { sends_max, background_max, bytes_max };
        let more = self.engine.prepare(now, budget);
        if self.engine.sends().is_empty() {
            self.engine.settle(now);
        } else {
            let ready_max = self.options.completions_max;
            let failures = &mut self.scratch.failures;
            self.counts.sent += send_all(&mut self.wire, &mut self.engine, failures, ready_max, now);
        }
        more
    }

    fn batches_out(&mut self, now: Now) {
        self.seat.blocked.clear();
        self.scratch.targets.extend_from_slice(self.engine.mesh_targets());
        for to in self.scratch.targets.drain(..) {
            loop {
                if !self.seat.mesh.take_credit(self.seat.index, to) {
                    self.seat.blocked.push(to);
                    self.wire.figures.add(WireMetric::MeshBlocked, 1);
                    break;
                }
                let Some(batch) = self.engine.take_mesh(to, now) else {
                    self.seat.mesh.return_credit(self.seat.index, to);
                    break;
                };
                self.seat.mesh.send(self.seat.index, to, batch);
            }
        }
    }

    fn effects(&mut self, now: Now) {
        let mut effects = std::mem::take(&mut self.scratch.effects);
        self.engine.take_effects(&mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::AwaitWritable(slot) => self.wire.await_writable(slot),
                Effect::Finish(slot) => self.wire.finish(slot, now.mono_ms),
                Effect::Close(slot) => self.wire.close_after_peer(slot),
                Effect::Abort(slot) => self.wire.abort(slot),
                Effect::StopAccepting => {
                    self.seat.mesh.close_seat(self.seat.index);
                    self.acceptor.drain(&mut self.wire);
                }
                Effect::Drained => (self.outlets.events)(ShardEvent::Drained(self.seat.index)),
            }
        }
        self.scratch.effects = effects;
        self.engine.take_answers(&mut self.scratch.answers);
        self.scratch.answers.drain(..).for_each(&self.outlets.answers);
    }

    fn count(&mut self) {
        let counts = std::mem::take(&mut self.counts);
        let values = self.engine.metrics();
        values.add(Metric::Turns, 1);
        for (metric, n) in [
            (Metric::Accepted, counts.accepted),
            (Metric::Refused, counts.refused),
            (Metric::HandedOver, counts.handed_over),
            (Metric::BytesIn, counts.bytes_in),
            (Metric::BytesOut, counts.sent.bytes),
            (Metric::Sends, counts.sent.sends),
            (Metric::SendsShort, counts.sent.short),
            (Metric::MeshBatches, counts.batches),
        ] {
            values.add(metric, n);
        }
        self.outlets.stale = true;
    }

    async fn wait(&mut self) {
        let now_ns = self.clock.mono_ns();
        let deadline_ns = self.next_deadline_ms().map(mono_ns_of);
        let (seat, engine) = (&self.seat, &self.engine);
        // A bus on another thread leaves its events with the engine.
        let work_waits = || seat.work_waits() || engine.next_deadline_ms() == Some(0);
        let waiting = self.sleeper.wait(&mut self.wire, &seat.doorbell, now_ns, deadline_ns, work_waits);
        waiting.await;
        let woken_ns = self.clock.mono_ns();
        self.sleeper.waited(woken_ns - now_ns);
        if let Some(rung_ns) = self.seat.doorbell.wake_up() {
            self.wire.figures.delay.observe_ns(woken_ns.saturating_sub(rung_ns));
        }
    }

    fn next_deadline_ms(&self) -> Option<u64> {
        let publish_ms = self.outlets.stale.then_some(self.outlets.published_ms + PUBLISH_INTERVAL_MS);
        let engine_ms = self.engine.next_deadline_ms();
        let wire_ms = [self.wire.next_discard_ms(), self.acceptor.next_retry_ms()];
        [engine_ms, publish_ms].into_iter().chain(wire_ms).flatten().min()
    }

    fn publish_if_due(&mut self, now_ms: u64) {
        if self.outlets.stale && self.outlets.published_ms + PUBLISH_INTERVAL_MS <= now_ms {
            self.publish(now_ms);
        }
    }

    fn publish(&mut self, now_ms: u64) {
        self.outlets.published_ms = now_ms;
        self.outlets.stale = false;
        let (enters, overflows) = self.wire.ring.counts();
        self.wire.figures.set(WireMetric::Enters, enters);
        self.wire.figures.set(WireMetric::Overflows, overflows);
        self.wire.figures.set(WireMetric::Rings, self.seat.doorbell.rings());
        self.outlets.metrics.publish(self.engine.metrics(), &self.wire.figures);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_waited_for_can_be_late() {
        let check = |deadline_ms: u64, started_ms: u64, expected: Option<u64>| {
            let late = lateness_ns(deadline_ms, mono_ns_of(started_ms)).map(|ns| ns / 1_000_000);
            assert_eq!(late, expected, "{deadline_ms} {started_ms}");
        };
        check(0, 86_400_000, None);
        check(1, 1, Some(0));
        check(1_000, 1_003, Some(3));
        check(1_000, 999, Some(0));
    }
}
