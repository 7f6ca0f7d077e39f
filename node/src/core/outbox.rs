//! What waits to be told to other shards.
//!
//! Owns one outbox per peer shard, and the account of its bytes. Publications of channels with peers are
//! not queued here: the outbox only remembers *that* a channel moved, and the home reads them from the
//! channel's relay or history when the peer has credit, so a peer that sleeps costs a cursor. The outbox
//! knows no inbox, no credit and no doorbell: the loop asks for a batch when it may send.
//!
//! What waits for other shards, and what is on its way to them, is counted in bytes against one pool of
//! the shard, together with the relays of its channels. A shard that takes nothing gets at most as much
//! as it leaves free, so that the others go on.
//!
//! What is asked for the first time is refused where it does not fit: publishes, questions,
//! subscriptions, answers with content, joins. What ends something, or says that it was refused, is not:
//! there is at most one of it for each subscription and each command that waits, and it is small.
//!
//! Invariant: bytes are counted from before they wait until they are handled.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::config::LimitsConfig;
use super::engine::ShardIndex;
use super::mesh::MeshMessage;

/// Messages in one batch at the most; a receiver's turn is bounded by this times its senders.
pub(crate) const BATCH_MESSAGES_MAX: usize = 1024;

/// Bytes of one batch at the most, unless its only message has more. Beside so many, what a batch costs by
/// itself no longer shows; and each credit of a pair may have them on the way.
pub const BATCH_BYTES_MAX: usize = 256 * 1024;

/// One batch between two shards: what waited, in order, up to a maximum. Its bytes count as the sender's
/// until it is dropped.
#[derive(Debug)]
pub struct MeshBatch {
    messages: Vec<MeshMessage>,
    bytes: usize,
    on_the_way: Arc<AtomicUsize>,
}

impl MeshBatch {
    /// Takes the messages out; the batch is dropped when they are handled.
    pub(crate) fn take(&mut self) -> Vec<MeshMessage> {
        std::mem::take(&mut self.messages)
    }
}

impl Drop for MeshBatch {
    fn drop(&mut self) {
        self.on_the_way.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A message that waits, and its bytes.
#[derive(Debug)]
struct Waiting {
    message: MeshMessage,
    bytes: usize,
}

/// A message's place in a queue, in bytes: the queue doubles as it grows.
const MESSAGE_BYTES: usize = 2 * size_of::<Waiting>();

/// What waits for one peer shard.
#[derive(Debug, Default)]
struct Outbox {
    messages: VecDeque<Waiting>,
    bytes: usize,
    moved: VecDeque<u32>,
    listed: bool,
}

/// What waits for every peer shard.
#[derive(Debug)]
pub(crate) struct Outboxes {
    boxes: Vec<Outbox>,
    targets: Vec<ShardIndex>,
    pending_max: usize,
    pending: usize,
    /// Bytes of all outboxes, of all relays, and of the batches that have not been handled.
    bytes: usize,
    relay_bytes: usize,
    on_the_way: Arc<AtomicUsize>,
    bytes_max: usize,
}

impl Outboxes {
    pub(crate) fn new(shards: u16, limits: &LimitsConfig) -> Self {
        Self {
            boxes: (0..shards).map(|_| Outbox::default()).collect(),
            targets: Vec::new(),
            pending_max: limits.mesh_pending_max as usize,
            pending: 0,
            bytes: 0,
            relay_bytes: 0,
            on_the_way: Arc::default(),
            bytes_max: usize::try_from(limits.mesh_pool_bytes).unwrap_or(usize::MAX),
        }
    }

    fn list(&mut self, to: ShardIndex) {
        let outbox = &mut self.boxes[usize::from(to)];
        if !outbox.listed {
            outbox.listed = true;
            self.targets.push(to);
        }
    }

    /// Queues a message.
    pub(crate) fn push(&mut self, to: ShardIndex, message: MeshMessage) {
        let bytes = MESSAGE_BYTES + message.bytes();
        let outbox = &mut self.boxes[usize::from(to)];
        outbox.messages.push_back(Waiting { message, bytes });
        outbox.bytes += bytes;
        self.bytes += bytes;
        self.pending += 1;
        self.list(to);
    }

    /// Whether a message with so many bytes beside its place still fits; else it is to be refused or
    /// dropped. For one shard no more waits than is left free for the others.
    pub(crate) fn fits(&self, to: ShardIndex, bytes: usize) -> bool {
        let outbox = &self.boxes[usize::from(to)];
        let free = self.bytes_max.saturating_sub(self.bytes());
        outbox.messages.len() < self.pending_max && outbox.bytes + MESSAGE_BYTES + bytes <= free
    }

    /// Bytes of a message that may never fit: more than a shard gets where nothing else waits.
    pub(crate) fn never_fits(&self, bytes: usize) -> bool {
        MESSAGE_BYTES + bytes > self.bytes_max / 2
    }

    /// Bytes that wait for other shards or are on their way to them, relays included.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes + self.relay_bytes + self.on_the_way.load(Ordering::Relaxed)
    }

    /// Keeps account of the bytes in relays.
    pub(crate) fn note_relay_bytes(&mut self, grown: usize, dropped: usize) {
        self.relay_bytes = self.relay_bytes + grown - dropped;
    }

    /// Whether relays hold more than they may: half of the pool, or what the outboxes leave.
    pub(crate) fn relays_are_full(&self) -> bool {
        self.relay_bytes > self.bytes_max / 2 || self.bytes() > self.bytes_max
    }

    /// Remembers that a channel homed here has news for `to`.
    pub(crate) fn moved(&mut self, to: ShardIndex, channel: u32) {
        self.boxes[usize::from(to)].moved.push_back(channel);
        self.list(to);
    }

    /// Remembers that the channel served last has more.
    pub(crate) fn moved_on(&mut self, to: ShardIndex, channel: u32) {
        self.boxes[usize::from(to)].moved.push_front(channel);
        self.list(to);
    }

    /// The next channel with news for `to`.
    pub(crate) fn next_moved(&mut self, to: ShardIndex) -> Option<u32> {
        self.boxes[usize::from(to)].moved.pop_front()
    }

    /// Takes what is queued for `to`, at most a batch.
    pub(crate) fn take(&mut self, to: ShardIndex) -> Option<MeshBatch> {
        let outbox = &mut self.boxes[usize::from(to)];
        let (mut count, mut bytes) = (0, 0);
        for waiting in outbox.messages.iter().take(BATCH_MESSAGES_MAX) {
            if count > 0 && bytes + waiting.bytes > BATCH_BYTES_MAX {
                break;
            }
            count += 1;
            bytes += waiting.bytes;
        }
        let messages: Vec<MeshMessage> =
            outbox.messages.drain(..count).map(|waiting| waiting.message).collect();
        self.pending -= count;
        outbox.bytes -= bytes;
        self.bytes -= bytes;
        if outbox.messages.is_empty() && outbox.moved.is_empty() {
            outbox.messages.shrink_to(BATCH_MESSAGES_MAX);
            outbox.listed = false;
            self.targets.retain(|target| *target != to);
        }
        if messages.is_empty() {
            return None;
        }
        self.on_the_way.fetch_add(bytes, Ordering::Relaxed);
        Some(MeshBatch { messages, bytes, on_the_way: Arc::clone(&self.on_the_way) })
    }

    /// Whether a batch's worth is queued for `to`.
    pub(crate) fn has_batch(&self, to: ShardIndex) -> bool {
        let outbox = &self.boxes[usize::from(to)];
        outbox.messages.len() >= BATCH_MESSAGES_MAX || outbox.bytes >= BATCH_BYTES_MAX
    }

    /// The shards for which something waits.
    pub(crate) fn targets(&self) -> &[ShardIndex] {
        &self.targets
    }

    /// Messages that wait, over all peers.
    pub(crate) fn pending(&self) -> usize {
        self.pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::mesh::ToMember;

    /// A message of so many bytes, its place included.
    fn message(bytes: usize) -> MeshMessage {
        let member = crate::core::mesh::ChannelRef { index: 0, serial: 0 };
        let records = vec![0; bytes - MESSAGE_BYTES].into();
        MeshMessage::Member(ToMember::Records { member, epoch: 0, records })
    }

    fn outboxes(pool: usize) -> Outboxes {
        let limits = LimitsConfig { mesh_pool_bytes: pool as u64, ..LimitsConfig::default() };
        Outboxes::new(4, &limits)
    }

    #[test]
    fn a_batch_has_its_bytes_and_not_one_more() {
        let check = |sizes: &[usize], counts: &[usize]| {
            let mut outboxes = outboxes(1 << 30);
            sizes.iter().for_each(|bytes| outboxes.push(1, message(*bytes)));
            let mut taken = Vec::new();
            while let Some(mut batch) = outboxes.take(1) {
                taken.push(batch.take().len());
            }
            assert_eq!(taken, counts, "{sizes:?}");
            assert_eq!((outboxes.bytes(), outboxes.pending(), outboxes.targets()), (0, 0, &[][..]));
        };
        let half = BATCH_BYTES_MAX / 2;
        check(&[half, half], &[2]);
        check(&[half, half + 1], &[1, 1]);
        check(&[half, 2 * BATCH_BYTES_MAX, half], &[1, 1, 1]);
        check(&vec![300; BATCH_MESSAGES_MAX + 1], &[BATCH_BYTES_MAX / 300, 1025 - BATCH_BYTES_MAX / 300]);
        check(&vec![MESSAGE_BYTES; BATCH_MESSAGES_MAX + 1], &[BATCH_MESSAGES_MAX, 1]);
    }

    #[test]
    fn a_shard_that_takes_nothing_gets_as_much_as_it_leaves() {
        let mut outboxes = outboxes(8_000);
        let fits = |outboxes: &Outboxes, to, bytes: usize| outboxes.fits(to, bytes - MESSAGE_BYTES);
        assert!(fits(&outboxes, 1, 8_000) && !fits(&outboxes, 1, 8_001));
        outboxes.push(1, message(3_000));
        assert!(fits(&outboxes, 1, 2_000) && !fits(&outboxes, 1, 2_001));
        assert!(fits(&outboxes, 2, 5_000) && !fits(&outboxes, 2, 5_001));
        let batch = outboxes.take(1);
        assert!(fits(&outboxes, 1, 5_000) && !fits(&outboxes, 1, 5_001), "on its way it counts for all");
        outboxes.note_relay_bytes(1_000, 0);
        assert!(fits(&outboxes, 1, 4_000) && !fits(&outboxes, 1, 4_001), "as relays do");
        drop(batch);
        assert!(fits(&outboxes, 1, 7_000) && !fits(&outboxes, 1, 7_001));
        assert!(!outboxes.never_fits(4_000 - MESSAGE_BYTES) && outboxes.never_fits(4_001 - MESSAGE_BYTES));
    }

    #[test]
    fn relays_have_half_of_the_pool_and_what_outboxes_leave() {
        let mut outboxes = outboxes(8_000);
        let full = |outboxes: &mut Outboxes, bytes: usize| {
            outboxes.note_relay_bytes(bytes, 0);
            let full = outboxes.relays_are_full();
            outboxes.note_relay_bytes(0, bytes);
            full
        };
        assert!(!full(&mut outboxes, 4_000) && full(&mut outboxes, 4_001));
        outboxes.push(1, message(5_000));
        assert!(!full(&mut outboxes, 3_000) && full(&mut outboxes, 3_001));
    }
}
