//! What this backend writes into a partition: its own bytes in the envelope's `extra`.
//!
//! Owns: kinds of messages and their stamps. Must not know: Kafka's client, what the kinds do.
//! Invariants: what [`encode`] wrote, [`decode`] reads back equal; bytes behind the known ones are skipped, so that
//! the release before and after this one can be read; no input panics.
//!
//! `extra`, little endian: kind (1), generation (4 + 8), node (8), sequence (8), then for a publication and a
//! clearing the channel's options (4 + 8 + 8), for a fence the nonce it follows and the next generation (8 + 4 + 8).

use bytes::Bytes;

use crate::backend::OwnedId;
use crate::envelope::{self, Meta};
use crate::slot::{hash, slot_of};
use crate::types::ChannelOptions;

/// A life of a partition's offsets. Raised when offsets that somebody has seen are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Generation {
    /// Counts up.
    pub(super) number: u32,
    /// Drawn by who raised it; the channels' epochs are made of it.
    pub(super) nonce: u64,
}

impl Generation {
    /// Before the first fence of a partition.
    pub(super) const NONE: Generation = Generation { number: 0, nonce: 0 };
}

/// Who wrote a message, and what it believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The generation that the writer had read.
    pub(super) generation: Generation,
    /// The writer: a nonce of its start.
    pub(super) node: u64,
    /// Counts the writer's messages.
    pub(super) sequence: u64,
}

/// What a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body<'a> {
    /// Nothing but proof that the way there and back works, and that all before it was read.
    Mark,
    /// Of a positioned channel.
    Publication { channel: &'a str, id: Option<OwnedId>, options: ChannelOptions, record: Bytes },
    /// Of an ephemeral channel.
    Ephemeral { channel: &'a str, record: Bytes },
    /// The channel's history is empty from here.
    Clear { channel: &'a str },
    /// The next generation, if the one with the nonce `from` is the current one here.
    Fence { from: u64, next: Generation },
}

const MARK: u8 = 0;
const PUBLICATION: u8 = 1;
const EPHEMERAL: u8 = 2;
const CLEAR: u8 = 3;
const FENCE: u8 = 4;

/// Bytes of `extra` that every kind has.
const STAMP_BYTES: usize = 29;

/// The message as bytes.
pub(super) fn encode(stamp: &Stamp, body: &Body<'_>) -> Bytes {
    let mut extra = Vec::with_capacity(STAMP_BYTES + 20);
    extra.push(match body {
        Body::Mark => MARK,
        Body::Publication { .. } => PUBLICATION,
        Body::Ephemeral { .. } => EPHEMERAL,
        Body::Clear { .. } => CLEAR,
        Body::Fence { .. } => FENCE,
    });
    put_generation(&mut extra, stamp.generation);
    extra.extend(stamp.node.to_le_bytes());
    extra.extend(stamp.sequence.to_le_bytes());
    let (channel, id, record): (&str, Option<&OwnedId>, &[u8]) = match body {
        Body::Mark => ("", None, &[]),
        Body::Publication { channel, id, options, record } => {
            extra.extend(options.history_size.to_le_bytes());
            extra.extend(options.history_ttl_ms.to_le_bytes());
            extra.extend(options.meta_ttl_ms.to_le_bytes());
            (channel, id.as_ref(), record)
        }
        Body::Ephemeral { channel, record } => (channel, None, record),
        Body::Clear { channel } => (channel, None, &[]),
        Body::Fence { from, next } => {
            extra.extend(from.to_le_bytes());
            put_generation(&mut extra, *next);
            ("", None, &[])
        }
    };
    envelope::encode(channel, record, Meta { id, extra: &extra })
}

/// Reads a message. `None`: not one of ours, or of a release that we do not know.
pub(super) fn decode(bytes: &Bytes) -> Option<(Stamp, Body<'_>)> {
    let read = envelope::decode(bytes).ok()?;
    let mut extra = Reader(read.extra);
    let kind = extra.take::<1>()?[0];
    let generation = extra.generation()?;
    let stamp = Stamp { generation, node: extra.u64()?, sequence: extra.u64()? };
    let channel = read.channel;
    let record = match read.record {
        std::borrow::Cow::Borrowed(record) => bytes.slice_ref(record),
        std::borrow::Cow::Owned(record) => record.into(),
    };
    let body = match kind {
        MARK => Body::Mark,
        PUBLICATION => {
            let history_size = u32::from_le_bytes(extra.take()?);
            let (history_ttl_ms, meta_ttl_ms) = (extra.u64()?, extra.u64()?);
            let options = ChannelOptions { history_size, history_ttl_ms, meta_ttl_ms };
            Body::Publication { channel, id: read.id, options, record }
        }
        EPHEMERAL => Body::Ephemeral { channel, record },
        CLEAR => Body::Clear { channel },
        FENCE => Body::Fence { from: extra.u64()?, next: extra.generation()? },
        _ => return None,
    };
    Some((stamp, body))
}

fn put_generation(out: &mut Vec<u8>, generation: Generation) {
    out.extend(generation.number.to_le_bytes());
    out.extend(generation.nonce.to_le_bytes());
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn generation(&mut self) -> Option<Generation> {
        Some(Generation { number: u32::from_le_bytes(self.take()?), nonce: self.u64()? })
    }
}

/// In which of `count` partitions a channel lives. `count` is at least 1.
///
/// The first is for what every node hears; a user's channel and the commands of a slot share the partition of that slot
/// ([`slot_partitions`]), so that a node without users there need not read it.
pub(super) fn partition_of(channel: &str, count: u32) -> u32 {
    let others = u64::from(slot_partitions(count));
    let of_slot = |slot: u16| first_of_slots(count) + (u64::from(slot) % others) as u32;
    match channel.strip_prefix("node:slot:").and_then(|slot| slot.parse().ok()) {
        Some(slot) => of_slot(slot),
        None if channel.starts_with("user:") => of_slot(slot_of(channel)),
        None if channel.starts_with("node:") || channel.starts_with("broadcast:") => 0,
        None => first_of_slots(count) + (hash(0, channel) % others) as u32,
    }
}

/// Of `count` partitions, those that are not for every node. Slot `s` is in the one with the number `s` modulo this.
pub(super) fn slot_partitions(count: u32) -> u32 {
    count.saturating_sub(1).max(1)
}

fn first_of_slots(count: u32) -> u32 {
    u32::from(count > 1)
}

/// The epoch of a channel in a generation with this nonce; never [`crate::Epoch::NONE`].
pub(super) fn epoch_of(nonce: u64, channel: &str) -> crate::Epoch {
    crate::Epoch::new(hash(nonce, channel).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STAMP: Stamp =
        Stamp { generation: Generation { number: 3, nonce: 77 }, node: 5, sequence: u64::MAX };

    #[test]
    fn a_slot_has_one_partition_and_what_all_hear_another() {
        for count in [1, 2, 6, 64, 5_000] {
            for user in 0..200 {
                let channel = format!("user:{user}");
                let partition = partition_of(&channel, count);
                assert_eq!(partition_of(&format!("node:slot:{}", slot_of(&channel)), count), partition);
                assert!(partition < count && (partition > 0 || count == 1));
                assert!(partition_of(&format!("room:{user}"), count) < count);
            }
            for name in ["node:all", "node:presence", "node:id:7", "broadcast:global", "node:slot:none"] {
                assert_eq!(partition_of(name, count), 0);
            }
        }
    }

    #[test]
    fn every_kind_is_read_back() {
        let options = ChannelOptions { history_size: 7, history_ttl_ms: 60_000, meta_ttl_ms: 70_000 };
        let record = Bytes::from_static(b"record");
        let long = Bytes::from(vec![b'x'; 5000]);
        let id = Some(OwnedId::Key("key".into()));
        for body in [
            Body::Mark,
            Body::Publication { channel: "room:a", id, options, record: record.clone() },
            Body::Publication { channel: "room:ü", id: Some(OwnedId::Node(1, 2)), options, record: long },
            Body::Ephemeral { channel: "room:a", record },
            Body::Clear { channel: "room:a" },
            Body::Fence { from: 1, next: Generation { number: 4, nonce: 9 } },
        ] {
            assert_eq!(decode(&encode(&STAMP, &body)), Some((STAMP, body)));
        }
    }

    #[test]
    fn what_a_later_release_adds_is_skipped_and_what_is_cut_is_none() {
        let whole = encode(&STAMP, &Body::Mark);
        let extra = envelope::decode(&whole).unwrap().extra.to_vec();
        let longer = [extra.as_slice(), b"more"].concat();
        let read = envelope::encode("", &[], Meta { id: None, extra: &longer });
        assert_eq!(decode(&read), Some((STAMP, Body::Mark)));
        for cut in 0..extra.len() {
            let read = envelope::encode("", &[], Meta { id: None, extra: &extra[..cut] });
            assert_eq!(decode(&read), None, "cut at {cut}");
        }
        let unknown = [&[9], &extra[1..]].concat();
        assert_eq!(decode(&envelope::encode("", &[], Meta { id: None, extra: &unknown })), None);
    }

    #[test]
    fn places_and_epochs_do_not_change_between_releases() {
        assert_eq!(partition_of("room:a", 16), partition_of("room:a", 16));
        let mut counts = [0u32; 16];
        for n in 0..16_000 {
            counts[partition_of(&format!("room:{n}"), 16) as usize] += 1;
        }
        assert!(counts[0] == 0 && counts[1..].iter().all(|count| (900..1_250).contains(count)), "{counts:?}");
        assert_eq!((partition_of("room:a", 16), partition_of("user:42", 64)), (PINNED.0, PINNED.1));
        assert_eq!(epoch_of(1, "room:a").get(), PINNED.2);
        assert_ne!(epoch_of(1, "room:a"), epoch_of(1, "room:b"));
        assert_ne!(epoch_of(1, "room:a"), epoch_of(2, "room:a"));
    }

    /// Values of the first release: another result moves every channel.
    const PINNED: (u32, u32, u64) = (4, 2, 3_769_436_311_441_160_545);

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&Bytes::from(bytes));
        }
    }
}
