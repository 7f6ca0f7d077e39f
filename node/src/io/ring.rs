//! A shard's own io_uring.
//!
//! Owns the ring, its table of direct descriptors, and the queue of completions that were taken from the
//! kernel and not yet handled. It knows no slots and no sockets.
//!
//! Invariants:
//! - only the shard's thread touches it (`SINGLE_ISSUER`), and the kernel completes operations only
//!   inside [`Ring::submit_and_run`] and [`Ring::nap`] (`DEFER_TASKRUN`): whatever [`Ring::submit`]
//!   brings back was finished while it was being submitted;
//! - completions are handled in the order in which the kernel gave them, except that the caller may
//!   take failed sends out first ([`Ring::take_matching`]).

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};

use super::doorbell::{Bell, Doorbell};
use super::kernel::{KernelFacts, StartError, explain};

/// `IORING_ENTER_GETEVENTS` (io_uring_enter(2)).
const ENTER_GETEVENTS: u32 = 1;

/// Pieces of deferred work that one enter runs (`IO_LOCAL_TW_DEFAULT_MAX` of Linux 6.14 and later; earlier
/// ones run all there is). What is left is told by no flag.
const DEFERRED_WORK_MAX: usize = 20;

/// Attempts to submit in a row that may fail without any progress before the shard gives up. The kernel
/// refuses while it has no memory for requests; 1,000 attempts with a yield each are some milliseconds.
const SUBMIT_ATTEMPTS_MAX: u32 = 1_000;

/// A completion as the kernel gave it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) user_data: u64,
    pub(super) result: i32,
    pub(super) flags: u32,
}

/// Sizes of a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingSizes {
    pub(super) entries: u32,
    pub(super) completion_entries: u32,
    /// Slots of the table of direct descriptors.
    pub(super) table_slots: u32,
}

/// The ring of one shard.
pub(super) struct Ring {
    uring: IoUring,
    ready: VecDeque<Completion>,
    enters: u64,
    overflows: u64,
}

impl Ring {
    /// Sets the ring up on the calling thread, which alone may use it. The kernel signals `event` when
    /// work appears while nobody is inside the ring, if [`Ring::signal_events`] is on.
    pub(super) fn open(sizes: RingSizes, event: BorrowedFd<'_>) -> Result<Self, StartError> {
        let facts = KernelFacts::read();
        let at = |step| {
            let facts = facts.clone();
            move |error: std::io::Error| explain(step, error, &facts)
        };
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Tells in shared memory whether deferred work waits, so that an idle look costs no call.
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(sizes.completion_entries)
            .build(sizes.entries)
            .map_err(at("io_uring_setup"))?;
        uring
            .submitter()
            .register_files_sparse(sizes.table_slots)
            .map_err(at("the table of direct descriptors"))?;
        uring.submitter().register_eventfd(event.as_raw_fd()).map_err(at("registering the eventfd"))?;
        let mut ring = Self { uring, ready: VecDeque::new(), enters: 0, overflows: 0 };
        ring.signal_events(false);
        Ok(ring)
    }

    /// The ring's descriptor, by which other shards send sockets to it.
    pub(super) fn fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Switches the signalling of the event descriptor. Off while the shard is awake: each first piece
    /// of work would cost a write that nobody reads.
    pub(super) fn signal_events(&mut self, on: bool) {
        let queue = self.uring.completion();
        if on {
            queue.enable_eventfd();
            // Whatever the kernel queued before it could see this is found by the enter that the
            // caller makes next.
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        } else {
            queue.disable_eventfd();
        }
    }

    /// Registers a ring of provided buffers.
    ///
    /// # Safety
    /// The `entries` entries at `address` must stay valid until the ring is dropped.
    pub(super) unsafe fn register_buffers(
        &self,
        address: u64,
        entries: u16,
        group: u16,
    ) -> Result<(), StartError> {
        // SAFETY: the caller's promise is the one that is asked for.
        let result =
            unsafe { self.uring.submitter().register_buf_ring_with_flags(address, entries, group, 0) };
        result.map_err(|error| explain("the ring of receive buffers", error, &KernelFacts::read()))
    }

    /// Queues an operation; submits what is queued when the queue is full.
    ///
    /// # Safety
    /// Memory that the operation points to must stay valid and in place until it has completed; for a
    /// send that cannot wait, and for what the kernel copies when it reads the entry, until the next
    /// submission has returned.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the caller's promise is the one that is asked for.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            self.submit();
        }
    }

    /// Whether operations wait to be submitted.
    pub(super) fn has_unsubmitted(&mut self) -> bool {
        !self.uring.submission().is_empty()
    }

    /// Whether the kernel has work or completions that only an enter or a look brings in.
    pub(super) fn has_pending(&mut self) -> bool {
        let queue = self.uring.submission();
        let kernel_waits = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        kernel_waits || !self.uring.completion().is_empty()
    }

    /// Submits what is queued and brings in what completed meanwhile, without running deferred work.
    pub(super) fn submit(&mut self) {
        self.enter_all(0);
        self.collect();
    }

    /// Submits what is queued, lets the kernel run deferred work, and brings in all completions, until
    /// `ready_max` wait to be handled.
    ///
    /// An enter that brought as much as one may is followed by another: with one enter for 512 sends, what
    /// clients say would come in at 20 pieces a turn, and a shard that shares its core would not keep up
    /// with the pongs of its connections.
    pub(super) fn submit_and_run(&mut self, ready_max: usize) {
        loop {
            let before = self.ready.len();
            self.enter_all(ENTER_GETEVENTS);
            self.collect();
            if self.ready.len() - before < DEFERRED_WORK_MAX || self.ready.len() >= ready_max {
                return;
            }
        }
    }

    /// Submits what is queued and waits until something completes, but for `timeout` at the most.
    pub(super) fn nap(&mut self, timeout: Duration) {
        let timespec = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&timespec);
        self.enters += 1;
        // ETIME: nothing came. EINTR: a signal; the loop looks around and comes back. EBUSY and EAGAIN:
        // what was not submitted stays queued and is submitted by the next enter.
        let _ = self.uring.submitter().submit_with_args(1, &args);
        self.collect();
    }

    /// The next completion to handle.
    pub(super) fn pop(&mut self) -> Option<Completion> {
        self.ready.pop_front()
    }

    /// How many completions wait to be handled.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Takes out the completions after the first `skip` for which `wanted` holds; the others keep their
    /// order.
    pub(super) fn take_matching(
        &mut self,
        skip: usize,
        wanted: impl Fn(&Completion) -> bool,
        mut take: impl FnMut(Completion),
    ) {
        let mut index = skip;
        for position in skip..self.ready.len() {
            let completion = self.ready[position];
            if wanted(&completion) {
                take(completion);
            } else {
                self.ready[index] = completion;
                index += 1;
            }
        }
        self.ready.truncate(index);
    }

    /// Calls of `io_uring_enter` and turns with an overflown completion queue, so far.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.enters, self.overflows)
    }

    fn collect(&mut self) {
        let overflown = self.uring.submission().cq_overflow();
        self.overflows += u64::from(overflown);
        self.ready.extend(self.uring.completion().map(|entry| Completion {
            user_data: entry.user_data(),
            result: entry.result(),
            flags: entry.flags(),
        }));
    }

    /// Enters until the submission queue is empty.
    fn enter_all(&mut self, flags: u32) {
        let mut attempts = 0;
        loop {
            let queued = self.uring.submission().len() as u32;
            if queued == 0 && flags == 0 {
                return;
            }
            self.enters += 1;
            // SAFETY: no argument is passed, and the count is that of the submission queue.
            let result = unsafe { self.uring.submitter().enter::<libc::sigset_t>(queued, 0, flags, None) };
            if self.uring.submission().is_empty() {
                return;
            }
            attempts = if result.is_ok_and(|submitted| submitted > 0) { 0 } else { attempts + 1 };
            assert!(attempts < SUBMIT_ATTEMPTS_MAX, "the kernel takes no more operations");
            if attempts > 0 {
                // EBUSY: completions must be taken first. EAGAIN: no memory for requests just now.
                self.collect();
                std::thread::yield_now();
            }
        }
    }
}

/// Sets up what a shard sets up and lets it go again: for a check before anything is started.
///
/// Errors are those of [`super::spawn_shard`]. The size of the table is [`super::table_slots`].
pub fn probe_kernel(table_slots: u32) -> Result<KernelFacts, StartError> {
    let facts = KernelFacts::read();
    let doorbell = Doorbell::new(std::time::Instant::now());
    let doorbell = doorbell.map_err(|error| explain("an eventfd", error, &facts))?;
    let sizes = RingSizes { entries: 8, completion_entries: 16, table_slots };
    let ring = Ring::open(sizes, doorbell.fd(Bell::Sleep))?;
    super::recv::RecvBuffers::open(&ring, 8, 64)?;
    // Leaving the buffers before the ring is fine here: nothing was ever armed.
    drop(ring);
    Ok(facts)
}
