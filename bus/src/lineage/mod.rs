//! Epochs have a lineage: the rule of a channel's offsets over brokers that replicate asynchronously.
//!
//! Owns: the rule, as pure functions. Must not know: connections, scripts' text, time; nonces are arguments.
//!
//! A master that fails can take acknowledged publications with it, and its successor then gives their
//! offsets to others; a paused master that wakes goes on giving offsets beside its successor. So offsets
//! have a meaning only within an [`Epoch`], an epoch belongs to one life of one master, and a key carries
//! from which epochs it came and where it left each of them.
//!
//! | clause | what it says | where |
//! |---|---|---|
//! | L1 | one key holds {epoch, replid, top, lineage}, history and ids: they live and die together | [`KeyState`] |
//! | L2 | no key: the attempt's nonce is the epoch, the lineage is empty | [`KeyState::touch`] |
//! | L3 | a replication id that is not the server's: (epoch, top) goes to the lineage, the nonce is the epoch | [`KeyState::touch`] |
//! | L4 | each attempt has a nonce of its own; nothing repeats an attempt | the caller |
//! | L5 | a read of a position creates and renews like a publish | the caller, [`KeyState::touch`] |
//! | L6 | a reply carries the key as it is now, also when the id was seen before | [`KeyState::publish`] |
//! | L7 | a position is good in the current epoch up to the top, in an earlier one up to its branch | [`judge_position`] |
//! | L8 | and only if the history reaches back to it; what is not good is told | [`judge_position`] |
//! | L9 | a re-read: subscription confirmed, then the read at the owner, by a fresh connection; arrivals wait | the caller |
//! | L10 | it settles the replication id that it returns, and no other | [`Link::settled`] |
//! | L11 | an arrival that came from our epoch above our cursor: fill and cross; below: tell | [`judge_arrival`] |
//! | L12 | an arrival of an epoch that ours came from is a stale master's: drop | [`judge_arrival`] |
//! | L13 | an arrival of an epoch unrelated to ours: read at the owner, adopt, judge again | [`judge_arrival_again`] |
//! | L14 | an ack of our epoch or of one that came from ours is passed on, any other is in doubt | [`judge_ack`] |
//! | L15 | an ack from a server that is not the owner, or not of the life that was read, is in doubt | [`judge_ack`] |
//! | L16 | every ack passed on is kept until all configured replicas confirmed it | [`KeptAck::is_confirmed`] |
//! | L17 | at each read a kept ack that is not good, and of another life, is published again under its id | [`KeptAck::is_lost`] |
//!
//! [`search`] exhausts the rule, and what breaks without a clause.
//!
//! Invariants: no (epoch, offset) ever names two publications; offsets go on across a branch, so a good
//! position of an earlier epoch is the same place as that offset of the current one.

mod judge;
pub mod search;

pub use judge::{
    Ack, Arrival, Doubt, KeptAck, Link, Place, Voice, judge_ack, judge_arrival, judge_arrival_again,
    judge_position,
};

use crate::epoch::{Epoch, Position};
use crate::types::Accepted;

/// Earlier epochs that a key remembers. A position of an older one is told.
pub const LINEAGE_MAX: usize = 8;

/// Which life of a master wrote: Redis's `master_replid`, 160 bits. A replica that is promoted and a master
/// that is started again draw a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplicationId([u8; 20]);

impl ReplicationId {
    /// From its bits.
    pub const fn new(bytes: [u8; 20]) -> ReplicationId {
        ReplicationId(bytes)
    }

    /// From exactly 40 characters of lowercase hexadecimal, as `INFO replication` gives it; else `None`.
    pub fn parse(text: &str) -> Option<ReplicationId> {
        let digits: &[u8; 40] = text.as_bytes().try_into().ok()?;
        let mut bytes = [0; 20];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = hex(pair[0])? << 4 | hex(pair[1])?;
        }
        Some(ReplicationId(bytes))
    }

    /// Its bits.
    pub const fn bytes(&self) -> &[u8; 20] {
        &self.0
    }
}

const fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// An epoch that a key has left, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Branch {
    /// The epoch.
    pub epoch: Epoch,
    /// The key's top when it was left: offsets up to here are the same publications in the next epoch.
    pub top: u64,
}

/// The last [`LINEAGE_MAX`] epochs that a key has left, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Lineage {
    branches: [Branch; LINEAGE_MAX],
    length: u8,
}

impl Lineage {
    /// Of a key that has had one epoch only.
    pub const EMPTY: Lineage = Lineage { branches: [Branch { epoch: Epoch::NONE, top: 0 }; 8], length: 0 };

    /// Adds the epoch just left. When full, the oldest is forgotten.
    pub fn push(&mut self, branch: Branch) {
        if usize::from(self.length) == LINEAGE_MAX {
            self.branches.rotate_left(1);
            self.length -= 1;
        }
        self.branches[usize::from(self.length)] = branch;
        self.length += 1;
    }

    /// Oldest first.
    pub fn branches(&self) -> &[Branch] {
        &self.branches[..usize::from(self.length)]
    }

    /// Where `epoch` was left; `None` if it is not remembered.
    pub fn left_at(&self, epoch: Epoch) -> Option<u64> {
        self.branches().iter().find(|branch| branch.epoch == epoch).map(|branch| branch.top)
    }
}

/// What a channel's key holds beside history and ids (L1), and what every reply carries of it (L6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyState {
    /// The current epoch, never [`Epoch::NONE`].
    pub epoch: Epoch,
    /// The life of the master that the epoch belongs to.
    pub replid: ReplicationId,
    /// Offset of the last publication.
    pub top: u64,
    /// The epochs that it came from.
    pub lineage: Lineage,
}

/// What [`KeyState::touch`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Nothing: key and server are of one life.
    Kept,
    /// A new key (L2): positions of other epochs are void. To be published, without a publication.
    Created,
    /// A new epoch after a branch (L3). To be published, without a publication.
    Renewed,
}

impl KeyState {
    /// The beginning of the script, the same for a publish and for every read of a position (L2, L3, L5).
    /// `server` is the replication id that the server has now, `nonce` the attempt's own (L4), not none.
    pub fn touch(stored: Option<&KeyState>, server: ReplicationId, nonce: Epoch) -> (KeyState, Touched) {
        match stored {
            None => {
                (KeyState { epoch: nonce, replid: server, top: 0, lineage: Lineage::EMPTY }, Touched::Created)
            }
            Some(key) if key.replid == server => (*key, Touched::Kept),
            Some(key) => {
                let mut lineage = key.lineage;
                lineage.push(Branch { epoch: key.epoch, top: key.top });
                (KeyState { epoch: nonce, replid: server, top: key.top, lineage }, Touched::Renewed)
            }
        }
    }

    /// The rest of the script for a publication, after [`KeyState::touch`]: the next offset, `step` above
    /// the top, or the place that the same id was given (`first`), named in the epoch of now (L6).
    pub fn publish(&mut self, first: Option<Accepted>, step: u64) -> Accepted {
        if let Some(first) = first {
            let position = Position::new(self.epoch, first.position.offset);
            return Accepted { position, repeated: true };
        }
        self.top += step;
        Accepted { position: self.position(), repeated: false }
    }

    /// The top as a position.
    pub const fn position(&self) -> Position {
        Position::new(self.epoch, self.top)
    }

    /// Where a node stands that has read, and delivered, everything.
    pub const fn place(&self) -> Place {
        Place { position: self.position(), lineage: self.lineage }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVES: [ReplicationId; 2] = [ReplicationId::new([1; 20]), ReplicationId::new([2; 20])];

    #[test]
    fn a_replication_id_is_forty_digits() {
        let text = "0123456789abcdef0123456789abcdef01234567";
        let id = ReplicationId::parse(text).unwrap();
        assert_eq!((id.bytes()[0], id.bytes()[19]), (0x01, 0x67));
        for wrong in ["", &text[1..], &text.to_uppercase(), &format!("{text}0")] {
            assert_eq!(ReplicationId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_key_is_created_kept_and_renewed() {
        let (mut key, touched) = KeyState::touch(None, LIVES[0], Epoch::new(1));
        assert_eq!((touched, key.position()), (Touched::Created, Position::new(Epoch::new(1), 0)));
        let first = key.publish(None, 5);
        assert_eq!((first.position.offset, first.repeated), (5, false));
        assert_eq!(KeyState::touch(Some(&key), LIVES[0], Epoch::new(2)), (key, Touched::Kept));

        let (mut renewed, touched) = KeyState::touch(Some(&key), LIVES[1], Epoch::new(3));
        assert_eq!((touched, renewed.position()), (Touched::Renewed, Position::new(Epoch::new(3), 5)));
        assert_eq!(renewed.lineage.branches(), [Branch { epoch: Epoch::new(1), top: 5 }]);
        let again = renewed.publish(Some(first), 1);
        assert_eq!((again.position, again.repeated), (Position::new(Epoch::new(3), 5), true));
        assert_eq!(renewed.top, 5);
    }

    #[test]
    fn a_lineage_forgets_the_oldest() {
        let mut lineage = Lineage::EMPTY;
        for nonce in 1..=LINEAGE_MAX as u64 {
            lineage.push(Branch { epoch: Epoch::new(nonce), top: nonce * 10 });
        }
        assert_eq!(lineage.left_at(Epoch::new(1)), Some(10));
        lineage.push(Branch { epoch: Epoch::new(9), top: 90 });
        assert_eq!(lineage.branches().len(), LINEAGE_MAX);
        assert_eq!(lineage.left_at(Epoch::new(1)), None);
        assert_eq!(lineage.left_at(Epoch::new(2)), Some(20));
        assert_eq!(lineage.left_at(Epoch::new(9)), Some(90));
        assert_eq!(lineage.left_at(Epoch::NONE), None);
    }
}
