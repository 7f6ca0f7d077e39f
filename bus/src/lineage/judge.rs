//! The node's side of the rule: what positions, arrivals, acks and kept acks are worth.
//!
//! Owns: the judgements (L7 to L17 of [`super`]). Must not know: how they are acted on.
//! Invariant: every judgement compares with what the node stands on and one key's state, nothing else.

use super::{KeyState, Lineage, ReplicationId};
use crate::epoch::{Epoch, Position};
use crate::position::{Judgement, Reason};

/// Judges a position against the current one, `top` with `lineage`, and a history that reaches back to
/// `floor` (L7, L8).
pub fn judge_position(claim: Position, top: Position, lineage: &Lineage, floor: u64) -> Judgement {
    use Judgement::{NotRecoverable, Recoverable};
    let end = if claim.epoch == top.epoch { Some(top.offset) } else { lineage.left_at(claim.epoch) };
    match end {
        None => NotRecoverable(Reason::OtherEpoch),
        Some(end) if claim.offset > end => NotRecoverable(Reason::AheadOfTop),
        Some(_) if claim.offset < floor => NotRecoverable(Reason::Trimmed),
        Some(_) => Recoverable { up_to_date: claim.offset == top.offset },
    }
}

/// Where a node stands in a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Everything up to here was delivered or told.
    pub position: Position,
    /// The epochs that its epoch came from, as last read.
    pub lineage: Lineage,
}

/// What an arrival says of itself beside its publication.
#[derive(Clone, Copy, Debug)]
pub struct Voice<'a> {
    /// Its epoch.
    pub epoch: Epoch,
    /// The epochs that its epoch came from.
    pub lineage: &'a Lineage,
    /// The offset before it; its own where it only says that a key was created or renewed.
    pub previous: u64,
    /// Its offset.
    pub offset: u64,
}

/// What to do with an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Deliver: it follows the cursor.
    Next,
    /// Drop: it was delivered.
    Repeat,
    /// Read at the owner what is missing before it, then judge again.
    Hole,
    /// Its epoch came from ours at or above our cursor: read at the owner, deliver, stand there (L11).
    Cross,
    /// Its epoch left ours below our cursor: tell, then read at the owner where to go on (L11).
    Tell,
    /// Ours came from its epoch, a stale master's voice: drop and count (L12).
    Stale,
    /// Unrelated: read at the owner, adopt that, then [`judge_arrival_again`] (L13).
    Unknown,
}

/// Judges an arrival by where the node stands (L11 to L13).
pub fn judge_arrival(ours: &Place, voice: &Voice<'_>) -> Arrival {
    let cursor = ours.position;
    if voice.epoch == cursor.epoch {
        return match () {
            () if voice.offset <= cursor.offset => Arrival::Repeat,
            () if voice.previous == cursor.offset => Arrival::Next,
            () => Arrival::Hole,
        };
    }
    match voice.lineage.left_at(cursor.epoch) {
        Some(branch) if cursor.offset <= branch => Arrival::Cross,
        Some(_) => Arrival::Tell,
        None if ours.lineage.left_at(voice.epoch).is_some() => Arrival::Stale,
        None => Arrival::Unknown,
    }
}

/// Judges an arrival that waited for a read: of another epoch than the one read, it is dropped (L13).
pub fn judge_arrival_again(ours: &Place, voice: &Voice<'_>) -> Arrival {
    if voice.epoch == ours.position.epoch { judge_arrival(ours, voice) } else { Arrival::Stale }
}

/// The connection that an ack came by.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Whether its server is the owner that the node names now.
    pub is_owner: bool,
    /// The replication id that the last re-read by this connection returned (L10).
    pub settled: Option<ReplicationId>,
}

/// What to do with the ack of a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// Keep it (L16), then pass it on.
    PassOn,
    /// Publish again under its id, after a read; who may not answers
    /// [`PublishError::Unknown`](crate::PublishError::Unknown).
    Retry(Doubt),
}

/// Why an ack is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// From a server that is no longer the owner (L15).
    NotTheOwner,
    /// Of another life of the server than the one that was read (L15).
    OtherLife,
    /// Ours came from its epoch: a stale master (L14).
    Stale,
    /// Neither epoch came from the other (L14).
    Unrelated,
}

/// Judges an ack by the key's state in its reply (L14, L15). `ours` is `None` where the node does not stand
/// in the channel.
pub fn judge_ack(ours: Option<&Place>, reply: &KeyState, link: &Link) -> Ack {
    if !link.is_owner {
        return Ack::Retry(Doubt::NotTheOwner);
    }
    if link.settled != Some(reply.replid) {
        return Ack::Retry(Doubt::OtherLife);
    }
    let Some(ours) = ours else { return Ack::PassOn };
    let epoch = ours.position.epoch;
    match () {
        () if reply.epoch == epoch || reply.lineage.left_at(epoch).is_some() => Ack::PassOn,
        () if ours.lineage.left_at(reply.epoch).is_some() => Ack::Retry(Doubt::Stale),
        () => Ack::Retry(Doubt::Unrelated),
    }
}

/// An ack that was passed on, beside its channel, id and payload (L16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptAck {
    /// Where the publication stands.
    pub position: Position,
    /// The life that its reply carried.
    pub replid: ReplicationId,
}

impl KeptAck {
    /// Of a reply that [`judge_ack`] passes on.
    pub const fn new(position: Position, reply: &KeyState) -> KeptAck {
        KeptAck { position, replid: reply.replid }
    }

    /// Judges it by a read of its key: whether the publication may be lost, and is to be published again
    /// under its id (L17). If it is there, it counts as of the life that was read. What is gone within one
    /// life was trimmed, expired or cleared, not lost.
    pub fn is_lost(&mut self, read: &KeyState, floor: u64) -> bool {
        match judge_position(self.position, read.position(), &read.lineage, floor) {
            Judgement::Recoverable { .. } => {
                self.replid = read.replid;
                false
            }
            Judgement::NotRecoverable(_) => self.replid != read.replid,
        }
    }

    /// Whether it may be let go (L16): `confirmed` replicas of `configured` answered a WAIT that was sent
    /// behind a write of the same connection, which is settled on the life that the ack counts as of.
    pub fn is_confirmed(&self, link: &Link, confirmed: usize, configured: usize) -> bool {
        link.is_owner && link.settled == Some(self.replid) && confirmed >= configured
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lineage::Branch;

    const LIVES: [ReplicationId; 2] = [ReplicationId::new([1; 20]), ReplicationId::new([2; 20])];

    /// Epoch 1 was left at 10, epoch 2 at 15; epoch 3 is at 20.
    fn key() -> KeyState {
        let mut lineage = Lineage::EMPTY;
        lineage.push(Branch { epoch: Epoch::new(1), top: 10 });
        lineage.push(Branch { epoch: Epoch::new(2), top: 15 });
        KeyState { epoch: Epoch::new(3), replid: LIVES[1], top: 20, lineage }
    }

    fn at(epoch: u64, offset: u64) -> Position {
        Position::new(Epoch::new(epoch), offset)
    }

    #[test]
    fn positions_are_judged_by_their_epoch_and_reach() {
        use Judgement::{NotRecoverable, Recoverable};
        let key = key();
        for (epoch, offset, floor, expected) in [
            (3, 20, 0, Recoverable { up_to_date: true }),
            (3, 21, 0, NotRecoverable(Reason::AheadOfTop)),
            (2, 15, 0, Recoverable { up_to_date: false }),
            (2, 16, 0, NotRecoverable(Reason::AheadOfTop)),
            (1, 10, 10, Recoverable { up_to_date: false }),
            (1, 10, 11, NotRecoverable(Reason::Trimmed)),
            (1, 11, 0, NotRecoverable(Reason::AheadOfTop)),
            (4, 1, 0, NotRecoverable(Reason::OtherEpoch)),
            (0, 0, 0, NotRecoverable(Reason::OtherEpoch)),
        ] {
            let judgement = judge_position(at(epoch, offset), key.position(), &key.lineage, floor);
            assert_eq!(judgement, expected, "({epoch}, {offset}) down to {floor}");
        }
    }

    #[test]
    fn arrivals_are_judged_by_both_lineages() {
        let (new, old) = (key(), Lineage::EMPTY);
        let check = |place: &Place, epoch, lineage, previous, offset, expected| {
            let voice = Voice { epoch: Epoch::new(epoch), lineage, previous, offset };
            assert_eq!(judge_arrival(place, &voice), expected, "{epoch} {previous} {offset}");
        };
        let here = new.place();
        check(&here, 3, &new.lineage, 20, 21, Arrival::Next);
        check(&here, 3, &new.lineage, 19, 20, Arrival::Repeat);
        check(&here, 3, &new.lineage, 21, 22, Arrival::Hole);
        // A key renewed and nothing more: there is nothing to deliver.
        check(&here, 3, &new.lineage, 20, 20, Arrival::Repeat);
        check(&here, 3, &new.lineage, 22, 22, Arrival::Hole);
        check(&here, 2, &old, 20, 21, Arrival::Stale);
        check(&here, 9, &old, 20, 21, Arrival::Unknown);
        let behind = |offset| Place { position: at(1, offset), lineage: Lineage::EMPTY };
        check(&behind(10), 3, &new.lineage, 20, 21, Arrival::Cross);
        check(&behind(11), 3, &new.lineage, 20, 21, Arrival::Tell);
    }

    #[test]
    fn after_a_read_only_its_epoch_is_heard() {
        let key = key();
        for (epoch, expected) in [(3, Arrival::Next), (2, Arrival::Stale), (9, Arrival::Stale)] {
            let voice =
                Voice { epoch: Epoch::new(epoch), lineage: &Lineage::EMPTY, previous: 20, offset: 21 };
            assert_eq!(judge_arrival_again(&key.place(), &voice), expected, "{epoch}");
        }
    }

    #[test]
    fn acks_are_judged_by_owner_life_and_epoch() {
        let reply = key();
        let link = Link { is_owner: true, settled: Some(LIVES[1]) };
        let place = |epoch, lineage| Place { position: at(epoch, 1), lineage };
        let mut ahead = Lineage::EMPTY;
        ahead.push(Branch { epoch: Epoch::new(3), top: 20 });
        for (ours, link, expected) in [
            (None, link, Ack::PassOn),
            (Some(place(3, Lineage::EMPTY)), link, Ack::PassOn),
            (Some(place(1, Lineage::EMPTY)), link, Ack::PassOn),
            (Some(place(4, ahead)), link, Ack::Retry(Doubt::Stale)),
            (Some(place(4, Lineage::EMPTY)), link, Ack::Retry(Doubt::Unrelated)),
            (None, Link { is_owner: false, ..link }, Ack::Retry(Doubt::NotTheOwner)),
            (None, Link { settled: Some(LIVES[0]), ..link }, Ack::Retry(Doubt::OtherLife)),
            (None, Link { settled: None, ..link }, Ack::Retry(Doubt::OtherLife)),
        ] {
            assert_eq!(judge_ack(ours.as_ref(), &reply, &link), expected, "{ours:?} {link:?}");
        }
    }

    #[test]
    fn kept_acks_are_lost_only_with_their_life() {
        let read = key();
        for (epoch, offset, life, floor, expected) in [
            (1, 10, 0, 0, false),
            (1, 11, 0, 0, true),
            (9, 1, 0, 0, true),
            // Gone within one life: trimmed or cleared.
            (3, 5, 1, 6, false),
            (9, 1, 1, 0, false),
        ] {
            let mut kept = KeptAck { position: at(epoch, offset), replid: LIVES[life] };
            assert_eq!(kept.is_lost(&read, floor), expected, "({epoch}, {offset}) of {life}");
        }
        let mut kept = KeptAck { position: at(1, 10), replid: LIVES[0] };
        let link = Link { is_owner: true, settled: Some(LIVES[1]) };
        assert!(!kept.is_confirmed(&link, 2, 2), "not read yet");
        assert!(!kept.is_lost(&read, 0));
        assert!(kept.is_confirmed(&link, 2, 2));
        assert!(!kept.is_confirmed(&link, 1, 2));
    }
}
