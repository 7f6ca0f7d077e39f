//! How a shard without work waits, and what ends the wait.
//!
//! Owns the choice between two ways to wait, the doorbell's place in the ring, and the timer that ends a
//! sleep.
//!
//! - A **nap** waits inside the shard's own ring: one enter, which also submits what is queued. The
//!   doorbell's eventfd for naps is polled by the ring, so it ends a nap as a completion does. Naps are bounded by
//!   [`super::TurnOptions::nap_max_us`] and taken only when the wait before was short too.
//! - A **sleep** goes through the executor: it reads the doorbell's eventfd for sleeps and parks. The
//!   kernel signals the same eventfd when the ring has work (a completion, the timer): it is the one wake
//!   source. A sleep costs the executor about ten system calls and an interrupt of every other shard's core
//!   (`membarrier`), which under load would be a price per turn: hence the naps.
//!
//! Neither polls. No wake-up is lost: the shard announces its wait, looks at its inboxes once more, and
//! only then waits; who brings work publishes it before looking at the announcement.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::time::Duration;

use glommio::io::BufferedFile;
use io_uring::types::{Fd, Timespec};
use io_uring::{cqueue, opcode, squeue};

use super::doorbell::{Bell, Doorbell};
use super::kernel::{KernelFacts, StartError, explain};
use super::metrics::WireMetric;
use super::ring::{Completion, Ring};
use super::tag::{Op, Tag};
use super::wire::Wire;

/// Without any deadline the shard wakes this often, in nanoseconds. An hour: the kernel wants a time.
const WAIT_NS_MAX: u64 = 3_600_000_000_000;

/// How a shard waits.
pub(super) struct Sleeper {
    /// The doorbell's eventfd for sleeps, which is the ring's too.
    event: BufferedFile,
    nap_max_ns: u64,
    /// The last wait was shorter than a nap.
    dense: bool,
    /// When the ring's timer goes off, if it is armed.
    timer_ns: Option<u64>,
    /// The kernel reads it when the timer is submitted.
    timespec: Box<Timespec>,
}

impl Sleeper {
    /// Prepares the waiting of a shard and puts its doorbell into the ring. Must run on the executor.
    pub(super) fn open(wire: &mut Wire, doorbell: &Doorbell, nap_max_us: u64) -> Result<Self, StartError> {
        let event = doorbell.fd(Bell::Sleep).try_clone_to_owned();
        let event = event.map_err(|error| explain("an eventfd", error, &KernelFacts::read()))?;
        // SAFETY: the descriptor was just made for it alone, and `into_raw_fd` gives it up.
        let event = unsafe { BufferedFile::from_raw_fd(event.into_raw_fd()) };
        let sleeper = Self {
            event,
            nap_max_ns: nap_max_us * 1_000,
            dense: true,
            timer_ns: None,
            timespec: Box::new(Timespec::new()),
        };
        arm_doorbell(&mut wire.ring, doorbell);
        Ok(sleeper)
    }

    /// Waits from `now_ns` until `deadline_ns` at the most. `announced` looks once more for work after
    /// the wait was announced, and gives whether there is any; then nothing is waited for.
    pub(super) async fn wait(
        &mut self,
        wire: &mut Wire,
        doorbell: &Doorbell,
        now_ns: u64,
        deadline_ns: Option<u64>,
        work_waits: impl Fn() -> bool,
    ) {
        let wait_ns = deadline_ns.map_or(WAIT_NS_MAX, |deadline| deadline.saturating_sub(now_ns));
        if wait_ns == 0 {
            return;
        }
        let bell = if self.dense && self.nap_max_ns > 0 { Bell::Nap } else { Bell::Sleep };
        doorbell.fall_asleep(bell);
        if work_waits() {
            return;
        }
        if bell == Bell::Nap {
            wire.figures.add(WireMetric::Naps, 1);
            wire.ring.nap(Duration::from_nanos(wait_ns.min(self.nap_max_ns)));
            // A nap that ended with nothing is followed by a sleep.
            self.dense = wire.ring.ready() > 0;
        } else {
            self.sleep(wire, now_ns, now_ns + wait_ns).await;
        }
    }

    /// Notes how long the last wait took.
    pub(super) fn waited(&mut self, ns: u64) {
        self.dense |= ns < self.nap_max_ns;
    }

    async fn sleep(&mut self, wire: &mut Wire, now_ns: u64, until_ns: u64) {
        self.arm_timer(&mut wire.ring, now_ns, until_ns);
        wire.ring.signal_events(true);
        wire.ring.submit_and_run(1);
        if wire.ring.ready() == 0 && !wire.ring.has_pending() {
            wire.figures.add(WireMetric::Sleeps, 1);
            // It cannot fail on an eventfd; if it did, the loop would look around and come back.
            let _ = self.event.read_at(0, 8).await;
        }
        wire.ring.signal_events(false);
    }

    /// Arms the timer for `until_ns`, unless it goes off earlier anyway: then the shard looks around and
    /// sleeps again.
    fn arm_timer(&mut self, ring: &mut Ring, now_ns: u64, until_ns: u64) {
        if self.timer_ns.is_some_and(|timer_ns| timer_ns <= until_ns) {
            return;
        }
        *self.timespec = Timespec::from(Duration::from_nanos(until_ns - now_ns));
        let timer = Tag::of(Op::Timer, 0).pack();
        let entry = if self.timer_ns.is_none() {
            opcode::Timeout::new(&raw const *self.timespec).build().user_data(timer)
        } else {
            let update = opcode::TimeoutUpdate::new(timer, &raw const *self.timespec).build();
            // Failure means that the timer has just gone off: its completion ends the sleep.
            update.flags(squeue::Flags::SKIP_SUCCESS).user_data(Tag::of(Op::TimerUpdate, 0).pack())
        };
        // SAFETY: the timespec is boxed and is not touched before the submission that follows in
        // `sleep`, in which the kernel copies it.
        unsafe { ring.push(&entry) };
        self.timer_ns = Some(until_ns);
    }

    /// The timer went off.
    pub(super) fn timer_completed(&mut self) {
        self.timer_ns = None;
    }
}

/// The doorbell's poll completed: arms it again if it has ended.
pub(super) fn doorbell_completed(ring: &mut Ring, doorbell: &Doorbell, completion: Completion) {
    if !cqueue::more(completion.flags) {
        arm_doorbell(ring, doorbell);
    }
}

/// Polls the doorbell's eventfd for naps for as long as the ring lives. Edge-triggered: each write
/// completes once, and the eventfd's count is never read.
fn arm_doorbell(ring: &mut Ring, doorbell: &Doorbell) {
    let entry =
        opcode::PollAdd::new(Fd(doorbell.fd(Bell::Nap).as_raw_fd()), libc::POLLIN as u32).multi(true).build();
    // SAFETY: the entry points to no memory.
    unsafe { ring.push(&entry.user_data(Tag::of(Op::Doorbell, 0).pack())) };
}
