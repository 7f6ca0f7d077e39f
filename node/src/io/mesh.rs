//! The mesh: bounded inboxes between the shards of a node.
//!
//! Owns one inbox per shard, the credits of every pair of shards, the doorbells, how full each shard
//! is and where its ring is. It knows nothing of what a batch holds.
//!
//! Invariants:
//! - an inbox has room for every credit of every sender, so a send with credit in hand never fails;
//! - a batch takes a credit from when it is put into the inbox until the receiver has taken it out;
//! - a sender that found no credit is rung when the receiver gives one back. Nobody waits while
//!   holding anything, so full inboxes cannot deadlock.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Instant;

use crossbeam_queue::ArrayQueue;

use super::doorbell::{Doorbell, Waker};
use crate::core::engine::ShardIndex;

/// Shards of one node at the most. 1,024 keeps the matrix of credits at 4 MiB.
pub const SHARDS_MAX: u16 = 1_024;
/// Credits of one pair of shards at the most.
pub const CREDITS_MAX: u16 = 1_024;

/// Set in a pair's cell when its sender found no credit and wants to be rung.
const WAITING: u32 = 1 << 31;
/// "No ring yet": the shard has not started, or has stopped.
const NO_RING: i32 = -1;

/// What the shards of one node share. Cheap to clone.
#[derive(Debug)]
pub struct Mesh<M> {
    shared: Arc<Shared<M>>,
}

impl<M> Clone for Mesh<M> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

#[derive(Debug)]
struct Shared<M> {
    origin: Instant,
    credits: u32,
    seats: Box<[Seat<M>]>,
    /// Batches in flight, by sender and receiver: `sender * shards + receiver`.
    in_flight: Box<[AtomicU32]>,
}

/// What the node knows of one shard. Aligned, so that shards do not share cache lines.
#[derive(Debug)]
#[repr(align(128))]
struct Seat<M> {
    inbox: ArrayQueue<(ShardIndex, M)>,
    doorbell: Arc<Doorbell>,
    /// Connections held, plus those promised to it by shards that hand sockets over.
    used: AtomicU32,
    slots_max: AtomicU32,
    /// Where sockets are sent to; [`NO_RING`] while it takes none.
    ring_fd: AtomicI32,
}

impl<M: Send + 'static> Mesh<M> {
    /// A mesh of `shards` shards where every shard may have `credits` batches on their way to every
    /// other one.
    ///
    /// # Panics
    /// If either number is 0 or above [`SHARDS_MAX`] or [`CREDITS_MAX`]: configuration is checked
    /// before.
    pub fn new(shards: u16, credits: u16) -> std::io::Result<Self> {
        assert!((1..=SHARDS_MAX).contains(&shards), "1 to {SHARDS_MAX} shards");
        assert!((1..=CREDITS_MAX).contains(&credits), "1 to {CREDITS_MAX} credits");
        let origin = Instant::now();
        let capacity = usize::from(shards) * usize::from(credits);
        let seat = |_| {
            Ok(Seat {
                inbox: ArrayQueue::new(capacity),
                doorbell: Arc::new(Doorbell::new(origin)?),
                used: AtomicU32::new(0),
                slots_max: AtomicU32::new(0),
                ring_fd: AtomicI32::new(NO_RING),
            })
        };
        let seats = (0..shards).map(seat).collect::<std::io::Result<_>>()?;
        let pairs = usize::from(shards) * usize::from(shards);
        let in_flight = (0..pairs).map(|_| AtomicU32::new(0)).collect();
        Ok(Self { shared: Arc::new(Shared { origin, credits: u32::from(credits), seats, in_flight }) })
    }
}

impl<M> Mesh<M> {
    /// The number of shards.
    pub fn shards(&self) -> u16 {
        self.shared.seats.len() as u16
    }

    /// Connections that a shard holds now, those on their way to it included.
    pub fn used(&self, shard: ShardIndex) -> u32 {
        self.seat(shard).used.load(Ordering::Relaxed)
    }

    /// The start of this node's monotonic time.
    pub(crate) fn origin(&self) -> Instant {
        self.shared.origin
    }

    /// A shard's doorbell.
    /// What wakes a shard; also before it runs.
    pub fn waker(&self, shard: ShardIndex) -> Waker {
        Waker(self.doorbell(shard).clone())
    }

    pub(crate) fn doorbell(&self, shard: ShardIndex) -> &Arc<Doorbell> {
        &self.seat(shard).doorbell
    }

    fn seat(&self, shard: ShardIndex) -> &Seat<M> {
        &self.shared.seats[usize::from(shard)]
    }

    fn pair(&self, from: ShardIndex, to: ShardIndex) -> &AtomicU32 {
        &self.shared.in_flight[usize::from(from) * self.shared.seats.len() + usize::from(to)]
    }

    /// Takes a credit for one batch. Without one the sender is noted: the receiver rings it when a
    /// credit returns.
    pub(crate) fn take_credit(&self, from: ShardIndex, to: ShardIndex) -> bool {
        let pair = self.pair(from, to);
        let mut value = pair.load(Ordering::Relaxed);
        loop {
            let next = if value & !WAITING < self.shared.credits { value + 1 } else { value | WAITING };
            // Acquire, with the release of `receive`: who holds a credit sees the place it stands for.
            match pair.compare_exchange_weak(value, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return next & !WAITING > value & !WAITING,
                Err(seen) => value = seen,
            }
        }
    }

    /// Whether a credit could be taken now.
    pub(crate) fn has_credit(&self, from: ShardIndex, to: ShardIndex) -> bool {
        self.pair(from, to).load(Ordering::Relaxed) & !WAITING < self.shared.credits
    }

    /// Gives back a credit that was not used.
    pub(crate) fn return_credit(&self, from: ShardIndex, to: ShardIndex) {
        let before = self.pair(from, to).fetch_sub(1, Ordering::Relaxed);
        debug_assert!(before & !WAITING > 0, "a credit returned that was not taken");
    }

    /// Sends a batch with a credit in hand.
    pub(crate) fn send(&self, from: ShardIndex, to: ShardIndex, batch: M) {
        let seat = self.seat(to);
        assert!(seat.inbox.push((from, batch)).is_ok(), "an inbox has room for every credit");
        seat.doorbell.ring();
    }

    /// The next batch for shard `to`; its credit returns to the sender, who is rung if it waits.
    pub(crate) fn receive(&self, to: ShardIndex) -> Option<(ShardIndex, M)> {
        let (from, batch) = self.seat(to).inbox.pop()?;
        let pair = self.pair(from, to);
        let mut value = pair.load(Ordering::Relaxed);
        loop {
            debug_assert!(value & !WAITING > 0, "a batch without a credit");
            let next = (value & !WAITING) - 1;
            match pair.compare_exchange_weak(value, next, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(seen) => value = seen,
            }
        }
        if value & WAITING != 0 {
            self.seat(from).doorbell.ring();
        }
        Some((from, batch))
    }

    /// Whether nothing waits for shard `to`.
    pub(crate) fn inbox_is_empty(&self, to: ShardIndex) -> bool {
        self.seat(to).inbox.is_empty()
    }
}

/// Places for connections. The counts are exact: a place is taken before a socket is kept or handed
/// over, and freed when its slot is.
impl<M> Mesh<M> {
    /// The shard's ring is up: it may be handed sockets, at most `slots_max` of them.
    pub(crate) fn open_seat(&self, shard: ShardIndex, ring_fd: i32, slots_max: u32) {
        self.seat(shard).slots_max.store(slots_max, Ordering::Relaxed);
        self.seat(shard).ring_fd.store(ring_fd, Ordering::Release);
    }

    /// The shard takes no more sockets of others: it drains, or its ring is gone.
    pub(crate) fn close_seat(&self, shard: ShardIndex) {
        self.seat(shard).ring_fd.store(NO_RING, Ordering::Release);
    }

    /// The ring of a shard, if it takes sockets.
    pub(crate) fn ring_fd(&self, shard: ShardIndex) -> Option<i32> {
        match self.seat(shard).ring_fd.load(Ordering::Acquire) {
            NO_RING => None,
            fd => Some(fd),
        }
    }

    /// Takes a place in `shard`, unless it is full.
    pub(crate) fn reserve(&self, shard: ShardIndex) -> bool {
        let seat = self.seat(shard);
        let max = seat.slots_max.load(Ordering::Relaxed);
        let step = |used: u32| (used < max).then(|| used + 1);
        seat.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).is_ok()
    }

    /// Takes a place in the emptiest shard other than `except`, unless all are full.
    pub(crate) fn reserve_emptiest(&self, except: ShardIndex) -> Option<ShardIndex> {
        loop {
            let shard = self.emptiest(except)?;
            // Lost to another shard that hands over at the same time: look again. Each round, some
            // shard got a place, so this ends.
            if self.reserve(shard) {
                return Some(shard);
            }
        }
    }

    fn emptiest(&self, except: ShardIndex) -> Option<ShardIndex> {
        let free = |shard: ShardIndex| {
            let seat = self.seat(shard);
            if seat.ring_fd.load(Ordering::Relaxed) == NO_RING {
                return 0;
            }
            seat.slots_max.load(Ordering::Relaxed).saturating_sub(seat.used.load(Ordering::Relaxed))
        };
        let others = (0..self.shards()).filter(|&shard| shard != except && free(shard) > 0);
        others.max_by_key(|&shard| free(shard))
    }

    /// Frees a place.
    pub(crate) fn release(&self, shard: ShardIndex) {
        let before = self.seat(shard).used.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a place freed twice");
    }
}
