//! What must hold.
//!
//! Owns: the properties. Must not know: how a state came about.
//! Invariant: a state is quiescent when only faults, new publications, and what may never happen are left.

use super::state::*;
use crate::lineage::judge_position;
use crate::position::Judgement;

/// A property that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// An (epoch, offset) was delivered or acknowledged for two publications.
    OneNameForTwo {
        /// Both.
        publications: (u8, u8),
    },
    /// A subscriber got a publication again without having been told.
    Twice {
        /// It.
        publication: u8,
    },
    /// A subscriber got a publication that does not follow the one before, without having been told.
    OutOfOrder {
        /// It.
        publication: u8,
    },
    /// An acknowledged publication reached a subscriber neither by itself nor as a gap told.
    LostInSilence {
        /// It.
        publication: u8,
        /// The subscriber's.
        node: u8,
    },
    /// All is calm, and a subscriber does not stand at the top of the owner's stream.
    NotHealed {
        /// The subscriber's.
        node: u8,
    },
    /// All is calm, and what a subscriber got since it was told is not what the stream holds there.
    OtherStream {
        /// The subscriber's.
        node: u8,
    },
    /// All is calm, and a publish has no answer.
    Unanswered {
        /// It.
        publication: u8,
    },
    /// Steps that need neither faults nor publications go on for ever.
    NeverCalm,
}

impl State {
    pub(super) fn check_quiescent(&self) -> Result<(), Violation> {
        let Some(held) = &self.servers[usize::from(self.owner())].key else { return self.check_absent() };
        let key = &held.state;
        for (index, node) in (0..).zip(&self.nodes) {
            let Some(place) = node.place else { return Err(Violation::NotHealed { node: index }) };
            let judgement = judge_position(place.position, key.position(), &key.lineage, self.floor(held));
            if judgement != (Judgement::Recoverable { up_to_date: true }) {
                return Err(Violation::NotHealed { node: index });
            }
            let stream = &held.log[node.seen_after as usize..];
            if stream != node.seen {
                return Err(Violation::OtherStream { node: index });
            }
            let lost = self.acked & !self.excused & !node.delivered & !node.told;
            if lost != 0 {
                return Err(Violation::LostInSilence {
                    publication: lost.trailing_zeros() as u8,
                    node: index,
                });
            }
            if node.waiting != 0 {
                return Err(Violation::Unanswered { publication: node.waiting.trailing_zeros() as u8 });
            }
        }
        Ok(())
    }

    /// No key, and calm: nobody can have been told a position.
    fn check_absent(&self) -> Result<(), Violation> {
        match self.nodes.iter().position(|node| node.place.is_some()) {
            Some(node) => Err(Violation::NotHealed { node: node as u8 }),
            None => Ok(()),
        }
    }
}
