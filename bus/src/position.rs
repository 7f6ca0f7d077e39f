//! Judging a client's position: can it continue, or must it be told that it cannot?
//!
//! Owns: the answer, and the rule where epochs have no lineage. Must not know: where the numbers come from.
//! Invariant: `Recoverable` only when every publication after the position is kept. Where epochs have a
//! lineage, [`judge_position`] is asked with it.

use crate::epoch::Position;
use crate::lineage::{Lineage, judge_position};
use crate::types::{Page, Since};

/// What a position is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Everything after it up to the top is kept.
    Recoverable {
        /// Whether there is nothing to recover: the position is the top.
        up_to_date: bool,
    },
    /// Something after it may be missing.
    NotRecoverable(Reason),
}

/// Why a position is not recoverable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The channel keeps no positions.
    Ephemeral,
    /// It names another epoch than the channel's, and none that it came from.
    OtherEpoch,
    /// It is above the top, or above where its epoch was left: of a life that is gone, or made up.
    AheadOfTop,
    /// The history does not reach back to it.
    Trimmed,
}

impl Reason {
    /// A label for counters.
    pub const fn label(self) -> &'static str {
        match self {
            Reason::Ephemeral => "ephemeral",
            Reason::OtherEpoch => "other_epoch",
            Reason::AheadOfTop => "ahead_of_top",
            Reason::Trimmed => "trimmed",
        }
    }
}

/// Judges `claim` against what a read of the channel told. An absent epoch is not compared.
///
/// `page.floor` is the predecessor of the oldest kept publication, so offsets need not be dense.
pub fn judge(claim: Since, page: &Page) -> Judgement {
    if page.top.epoch.is_none() {
        return Judgement::NotRecoverable(Reason::Ephemeral);
    }
    let claim = Position::new(claim.epoch.unwrap_or(page.top.epoch), claim.offset);
    judge_position(claim, page.top, &Lineage::EMPTY, page.floor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epoch;

    const CURRENT: Epoch = Epoch::new(7);

    fn check(offset: u64, epoch: Option<Epoch>, floor: u64, top: u64, expected: Judgement) {
        let page = Page { top: Position::new(CURRENT, top), floor, more: false };
        let judgement = judge(Since { offset, epoch }, &page);
        assert_eq!(judgement, expected, "{offset} {epoch:?} against {floor}..{top}");
    }

    #[test]
    fn positions_are_judged() {
        use Judgement::{NotRecoverable, Recoverable};
        let same = Some(CURRENT);
        let (behind, at_top) = (Recoverable { up_to_date: false }, Recoverable { up_to_date: true });
        let trimmed = NotRecoverable(Reason::Trimmed);
        let ahead = NotRecoverable(Reason::AheadOfTop);
        let other = NotRecoverable(Reason::OtherEpoch);
        // offset, epoch, floor, top
        check(10, same, 5, 10, at_top);
        check(9, same, 5, 10, behind);
        check(5, same, 5, 10, behind);
        check(4, same, 5, 10, trimmed);
        check(0, same, 5, 10, trimmed);
        check(11, same, 5, 10, ahead);
        check(u64::MAX, same, 5, 10, ahead);
        // nothing kept: only the top itself goes on
        check(10, same, 10, 10, at_top);
        check(9, same, 10, 10, trimmed);
        // a fresh channel
        check(0, same, 0, 0, at_top);
        check(1, same, 0, 0, ahead);
        // an epoch that is absent is not compared, a wrong or malformed one is
        check(9, None, 5, 10, behind);
        check(4, None, 5, 10, trimmed);
        check(9, Some(Epoch::new(8)), 5, 10, other);
        check(11, Some(Epoch::new(8)), 5, 10, other);
        check(10, Some(Epoch::NONE), 5, 10, other);
    }

    #[test]
    fn an_ephemeral_channel_has_no_positions() {
        let page = Page { top: Position::NONE, floor: 0, more: false };
        for epoch in [None, Some(Epoch::NONE), Some(CURRENT)] {
            let judgement = judge(Since { offset: 0, epoch }, &page);
            assert_eq!(judgement, Judgement::NotRecoverable(Reason::Ephemeral));
        }
    }

    #[test]
    fn offsets_need_not_be_dense() {
        // Kept: 40 (after 10) and 90; so 10 and everything between 10 and 40 goes on, 9 does not.
        for (offset, expected) in [
            (9, Judgement::NotRecoverable(Reason::Trimmed)),
            (10, Judgement::Recoverable { up_to_date: false }),
            (25, Judgement::Recoverable { up_to_date: false }),
            (90, Judgement::Recoverable { up_to_date: true }),
        ] {
            check(offset, Some(CURRENT), 10, 90, expected);
        }
    }
}
