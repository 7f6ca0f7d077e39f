//! One channel that a port has open: from the subscription to a chain of arrivals, and back to it after a fault.
//!
//! Owns: the place in the stream and what is held back while it is being read. Must not know: domains, deadlines,
//! time.
//!
//! The order that clause P7 asks for: the subscription is confirmed, then the position is read, and what arrives
//! meanwhile waits for the answer. After a loss the same with the place in hand: what was missed is read and
//! delivered, or told as `Gap` or `EpochChanged`. Invariant: what the outlet gets of a channel is a chain from one
//! told position to the next; what the outlet refuses is not part of it yet.

use std::collections::VecDeque;

use bytes::Bytes;
use ringmain_proto::record::{record_offset, record_total};

use crate::backend::{Call, Message, ReadPage};
use crate::epoch::Position;
use crate::lineage::{Arrival, Place, Voice, judge_arrival, judge_arrival_again};
use crate::types::{ChannelOptions, HistoryQuery, Since, Token};

/// Messages held while a position is being read. Above it they are dropped and read from history.
pub const HELD_MAX: usize = 256;

/// Publications asked for in one read that fills a hole.
pub const FILL_PUBLICATIONS_MAX: u32 = 256;

/// Reads that one message may cause. What does not fit the chain after them is dropped and told.
const READS_PER_MESSAGE_MAX: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits for its turn to be subscribed (again).
    Unsynced,
    /// This subscription is not confirmed yet.
    Subscribing(Call),
    /// This read is not answered yet.
    Reading(Call),
    /// Subscribed; the port took no more, and what came since is to be read.
    Overrun,
    Live,
}

/// What is to be done next for this channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Next {
    Nothing,
    /// Send [`Watch::query`] and note its call in `state`.
    Read,
}

/// Where a watch tells. `false`: there is no room, ask again later.
pub(super) trait Outlet {
    fn arrival(&mut self, position: Position, previous: u64, record: Bytes) -> bool;
    fn gap(&mut self, resumed: Position);
    fn epoch_changed(&mut self, position: Position);
    fn opened(&mut self, token: Token, position: Position);
    /// A stale master's voice was dropped.
    fn stale(&mut self);
}

#[derive(Debug)]
struct Held {
    message: Message,
    /// Positions that were asked for since it came.
    reads: u8,
}

#[derive(Debug)]
pub(super) struct Watch {
    pub(super) state: State,
    positioned: bool,
    /// Opens not answered yet.
    pub(super) tokens: Vec<Token>,
    /// Where the port stands; none until the first open is answered.
    place: Option<Place>,
    held: VecDeque<Held>,
    /// The answer that is awaited is not enough: read once more.
    again: bool,
}

impl Watch {
    pub(super) fn new(options: &ChannelOptions, token: Token) -> Watch {
        Watch {
            state: State::Unsynced,
            positioned: options.is_positioned(),
            tokens: vec![token],
            place: None,
            held: VecDeque::new(),
            again: false,
        }
    }

    /// The last position told.
    pub(super) fn cursor(&self) -> Option<Position> {
        self.place.map(|place| place.position)
    }

    /// Starts over: everything that has not been told is to be read again.
    pub(super) fn unsync(&mut self) {
        self.state = State::Unsynced;
        self.held.clear();
        self.again = false;
    }

    /// What to read: the position alone at first, else what came after the cursor.
    pub(super) fn query(&self) -> HistoryQuery {
        match self.cursor() {
            None => HistoryQuery::TOP,
            Some(cursor) => HistoryQuery {
                since: Some(Since { offset: cursor.offset, epoch: None }),
                limit: FILL_PUBLICATIONS_MAX,
                reverse: false,
            },
        }
    }

    /// The broker confirmed the subscription.
    pub(super) fn confirmed(&mut self, outlet: &mut impl Outlet) -> Next {
        if self.positioned {
            return Next::Read;
        }
        if self.place.is_some() {
            outlet.gap(Position::NONE);
        }
        self.place = Some(Place { position: Position::NONE, lineage: crate::lineage::Lineage::EMPTY });
        self.go_live(outlet);
        Next::Nothing
    }

    /// The channel is in doubt: its position is to be read, whatever state it is in.
    pub(super) fn doubt(&mut self, outlet: &mut impl Outlet) -> Next {
        match self.state {
            State::Live if self.positioned => Next::Read,
            State::Live => {
                outlet.gap(Position::NONE);
                Next::Nothing
            }
            State::Reading(_) => {
                self.again = true;
                Next::Nothing
            }
            State::Unsynced | State::Subscribing(_) | State::Overrun => Next::Nothing,
        }
    }

    /// The port has room again.
    pub(super) fn room(&mut self, outlet: &mut impl Outlet) -> Next {
        if self.positioned {
            return Next::Read;
        }
        outlet.gap(Position::NONE);
        self.state = State::Live;
        Next::Nothing
    }

    /// The broker answered [`Watch::query`].
    pub(super) fn read(&mut self, reply: ReadPage, outlet: &mut impl Outlet) -> Next {
        let more = reply.page.more;
        let before = self.cursor();
        let whole = match self.place {
            None => {
                self.place = Some(Place { position: reply.page.top, lineage: reply.lineage });
                true
            }
            Some(place) => {
                if !self.go_on(place.position, reply, outlet) {
                    self.overrun();
                    return Next::Nothing;
                }
                // A page without progress is the last one, whatever it says.
                !more || self.cursor() == before
            }
        };
        if !whole || std::mem::take(&mut self.again) {
            return Next::Read;
        }
        self.go_live(outlet);
        self.release_held(outlet)
    }

    /// Goes on from `cursor` by what was read, or tells. `false`: the port took not all.
    fn go_on(&mut self, cursor: Position, reply: ReadPage, outlet: &mut impl Outlet) -> bool {
        let (top, floor, lineage) = (reply.page.top, reply.page.floor, reply.lineage);
        let same = top.epoch == cursor.epoch;
        let branch = if same { Some(top.offset) } else { lineage.left_at(cursor.epoch) };
        match branch {
            // The cursor is the same place in the epoch of now, and what follows it is kept.
            Some(branch) if cursor.offset <= branch && floor <= cursor.offset => {
                let position = Position::new(top.epoch, cursor.offset);
                if !same {
                    outlet.epoch_changed(position);
                }
                self.place = Some(Place { position, lineage });
                self.deliver_page(reply.records, outlet)
            }
            Some(branch) if same && cursor.offset <= branch => {
                outlet.gap(top);
                self.place = Some(Place { position: top, lineage });
                true
            }
            _ => {
                outlet.epoch_changed(top);
                self.place = Some(Place { position: top, lineage });
                true
            }
        }
    }

    /// Something came over the subscription.
    pub(super) fn message(&mut self, message: Message, outlet: &mut impl Outlet) -> Next {
        match self.state {
            // From before the subscription that is being confirmed, or read again later.
            State::Unsynced | State::Subscribing(_) | State::Overrun => Next::Nothing,
            State::Reading(_) if self.held.len() < HELD_MAX => {
                self.held.push_back(Held { message, reads: 0 });
                Next::Nothing
            }
            State::Reading(_) => {
                self.held.clear();
                self.again = true;
                Next::Nothing
            }
            State::Live => self.judge(Held { message, reads: 0 }, outlet),
        }
    }

    fn overrun(&mut self) {
        self.state = State::Overrun;
        self.held.clear();
        self.again = false;
    }

    fn go_live(&mut self, outlet: &mut impl Outlet) {
        self.state = State::Live;
        let position = self.cursor().unwrap_or(Position::NONE);
        for token in self.tokens.drain(..) {
            outlet.opened(token, position);
        }
    }

    fn release_held(&mut self, outlet: &mut impl Outlet) -> Next {
        while let Some(held) = self.held.pop_front() {
            match self.judge(held, outlet) {
                Next::Read => {
                    // The read that is sent now comes after all of them.
                    self.held.iter_mut().skip(1).for_each(|held| held.reads += 1);
                    return Next::Read;
                }
                Next::Nothing if self.state != State::Live => return Next::Nothing,
                Next::Nothing => (),
            }
        }
        Next::Nothing
    }

    /// Delivers, drops, or holds a message and asks for the position.
    fn judge(&mut self, held: Held, outlet: &mut impl Outlet) -> Next {
        let Some(place) = self.place else { return Next::Nothing };
        let message = &held.message;
        if !self.positioned {
            return self.deliver_ephemeral(held.message, outlet);
        }
        let voice = Voice {
            epoch: message.epoch,
            lineage: &message.lineage,
            previous: message.previous,
            offset: message.offset,
        };
        let judgement = match held.reads {
            0 => judge_arrival(&place, &voice),
            _ => judge_arrival_again(&place, &voice),
        };
        match judgement {
            Arrival::Next => {
                if !self.deliver(message.offset, message.record.clone(), outlet) {
                    self.overrun();
                }
                Next::Nothing
            }
            Arrival::Repeat => Next::Nothing,
            Arrival::Stale => {
                outlet.stale();
                Next::Nothing
            }
            Arrival::Hole | Arrival::Cross | Arrival::Tell | Arrival::Unknown => {
                if held.reads >= READS_PER_MESSAGE_MAX {
                    outlet.gap(place.position);
                    return Next::Nothing;
                }
                self.held.push_front(Held { reads: held.reads + 1, ..held });
                Next::Read
            }
        }
    }

    fn deliver_ephemeral(&mut self, message: Message, outlet: &mut impl Outlet) -> Next {
        if !message.record.is_empty() && !outlet.arrival(Position::NONE, 0, message.record) {
            self.overrun();
        }
        Next::Nothing
    }

    /// `false`: the port took not all.
    fn deliver_page(&mut self, page: Vec<u8>, outlet: &mut impl Outlet) -> bool {
        let mut rest = Bytes::from(page);
        while let (Some(total), Some(offset)) = (record_total(&rest), record_offset(&rest)) {
            let record = rest.split_to(total);
            let is_new = self.cursor().is_none_or(|cursor| offset > cursor.offset);
            if is_new && !self.deliver(offset, record, outlet) {
                return false;
            }
        }
        true
    }

    fn deliver(&mut self, offset: u64, record: Bytes, outlet: &mut impl Outlet) -> bool {
        let Some(place) = &mut self.place else { return true };
        let position = Position::new(place.position.epoch, offset);
        // Without a record it was only word of a position, which is now known to be whole.
        let took = record.is_empty() || outlet.arrival(position, place.position.offset, record);
        if took {
            place.position = position;
        }
        took
    }
}

#[cfg(test)]
mod tests {
    use ringmain_proto::message::Publication;

    use super::*;
    use crate::epoch::Epoch;
    use crate::lineage::{Branch, Lineage};
    use crate::types::Page;

    const OPTIONS: ChannelOptions =
        ChannelOptions { history_size: 1000, history_ttl_ms: 60_000, meta_ttl_ms: 60_000 };

    fn record(offset: u64) -> Vec<u8> {
        let mut record = Vec::new();
        Publication { offset, data: b"x", ..Publication::default() }.write_record(&mut record);
        record
    }

    fn message(epoch: u64, previous: u64, offset: u64) -> Message {
        let lineage = Lineage::EMPTY;
        Message { epoch: Epoch::new(epoch), lineage, previous, offset, record: record(offset).into() }
    }

    fn page(epoch: u64, floor: u64, offsets: &[u64], top: u64, more: bool) -> ReadPage {
        let page = Page { top: Position::new(Epoch::new(epoch), top), floor, more };
        let records = offsets.iter().flat_map(|offset| record(*offset)).collect();
        ReadPage { page, lineage: Lineage::EMPTY, records }
    }

    /// What was told, in short: `a5` an arrival, `o5` opened, `g5` a gap, `e5` another epoch, all with their
    /// offset; `s` a stale voice.
    #[derive(Default)]
    struct Told {
        told: Vec<String>,
        /// Arrivals that there is no more room for.
        is_full: bool,
    }

    impl Told {
        fn take(&mut self) -> String {
            std::mem::take(&mut self.told).join(" ")
        }
    }

    impl Outlet for Told {
        fn arrival(&mut self, position: Position, _: u64, _: Bytes) -> bool {
            if !self.is_full {
                self.told.push(format!("a{}", position.offset));
            }
            !self.is_full
        }

        fn gap(&mut self, resumed: Position) {
            self.told.push(format!("g{}", resumed.offset));
        }

        fn epoch_changed(&mut self, position: Position) {
            self.told.push(format!("e{}", position.offset));
        }

        fn opened(&mut self, _: Token, position: Position) {
            self.told.push(format!("o{}", position.offset));
        }

        fn stale(&mut self) {
            self.told.push("s".to_owned());
        }
    }

    fn reading() -> (Watch, Told) {
        let mut watch = Watch::new(&OPTIONS, Token(1));
        let mut told = Told::default();
        watch.state = State::Subscribing(Call(7));
        assert_eq!(watch.confirmed(&mut told), Next::Read);
        watch.state = State::Reading(Call(1));
        (watch, told)
    }

    /// Open at offset 10 of epoch 1.
    fn live() -> (Watch, Told) {
        let (mut watch, mut told) = reading();
        assert_eq!(watch.read(page(1, 0, &[], 10, false), &mut told), Next::Nothing);
        assert_eq!(told.take(), "o10");
        (watch, told)
    }

    #[test]
    fn arrivals_wait_for_the_position_and_those_below_it_are_dropped() {
        let (mut watch, mut told) = reading();
        for offset in 9..13 {
            let next = watch.message(message(1, offset - 1, offset), &mut told);
            assert_eq!(next, Next::Nothing);
        }
        assert_eq!(watch.read(page(1, 0, &[], 10, false), &mut told), Next::Nothing);
        assert_eq!(told.take(), "o10 a11 a12");
    }

    #[test]
    fn a_hole_is_read_in_as_many_pages_as_it_takes() {
        let (mut watch, mut told) = live();
        assert_eq!(watch.message(message(1, 14, 15), &mut told), Next::Read);
        watch.state = State::Reading(Call(2));
        assert_eq!(watch.query().since.unwrap().offset, 10);
        assert_eq!(watch.read(page(1, 0, &[11, 12], 15, true), &mut told), Next::Read);
        assert_eq!(watch.query().since.unwrap().offset, 12);
        assert_eq!(watch.read(page(1, 0, &[13, 14, 15], 15, false), &mut told), Next::Nothing);
        assert_eq!(told.take(), "a11 a12 a13 a14 a15");
    }

    #[test]
    fn more_than_can_be_held_is_read() {
        let (mut watch, mut told) = reading();
        let most = HELD_MAX as u64;
        for offset in 1..=most + 1 {
            let _ = watch.message(message(1, offset - 1, offset), &mut told);
        }
        assert_eq!(watch.held.len(), 0);
        assert_eq!(watch.read(page(1, 0, &[], 0, false), &mut told), Next::Read);
        assert_eq!(watch.held.len(), 0);
        assert_eq!(watch.query().since.unwrap().offset, 0);
    }

    #[test]
    fn as_much_as_can_be_held_is_not_read() {
        let (mut watch, mut told) = reading();
        for offset in 1..=HELD_MAX as u64 {
            let _ = watch.message(message(1, offset - 1, offset), &mut told);
        }
        assert_eq!(watch.read(page(1, 0, &[], 0, false), &mut told), Next::Nothing);
        assert_eq!(watch.cursor().unwrap().offset, HELD_MAX as u64);
    }

    #[test]
    fn a_voice_of_another_epoch_is_believed_only_if_the_broker_says_the_same() {
        for (read_epoch, read_top, expected) in [(2, 3, "e3"), (1, 10, "s")] {
            let (mut watch, mut told) = live();
            assert_eq!(watch.message(message(2, 2, 3), &mut told), Next::Read);
            watch.state = State::Reading(Call(2));
            let reply = page(read_epoch, 0, &[], read_top, false);
            assert_eq!(watch.read(reply, &mut told), Next::Nothing);
            assert_eq!((told.take().as_str(), watch.state), (expected, State::Live));
        }
    }

    #[test]
    fn a_voice_of_a_newer_epoch_than_the_answer_is_asked_about_again() {
        let (mut watch, mut told) = live();
        watch.unsync();
        watch.state = State::Reading(Call(2));
        // It comes while an answer from before it is on its way.
        assert_eq!(watch.message(message(2, 0, 1), &mut told), Next::Nothing);
        assert_eq!(watch.read(page(1, 0, &[], 10, false), &mut told), Next::Read);
        watch.state = State::Reading(Call(3));
        assert_eq!(watch.read(page(2, 0, &[], 1, false), &mut told), Next::Nothing);
        assert_eq!((told.take().as_str(), watch.state), ("e1", State::Live));
    }

    #[test]
    fn what_history_does_not_reach_back_to_is_a_gap() {
        let (mut watch, mut told) = live();
        assert_eq!(watch.message(message(1, 29, 30), &mut told), Next::Read);
        watch.state = State::Reading(Call(2));
        assert_eq!(watch.read(page(1, 28, &[29, 30], 30, false), &mut told), Next::Nothing);
        assert_eq!(told.take(), "g30");
    }
    #[test]
    fn a_branch_at_or_above_the_cursor_is_crossed_and_below_it_told() {
        for (branch, expected) in [(10, "e10 a11 a12"), (12, "e10 a11 a12"), (9, "e12")] {
            let (mut watch, mut told) = live();
            watch.unsync();
            watch.state = State::Reading(Call(2));
            let mut reply = page(2, 3, &[11, 12], 12, false);
            reply.lineage.push(Branch { epoch: Epoch::new(1), top: branch });
            assert_eq!(watch.read(reply, &mut told), Next::Nothing);
            assert_eq!(told.take(), expected, "left at {branch}");
            // What the old master says now is not heard.
            assert_eq!(watch.message(message(1, 10, 11), &mut told), Next::Nothing);
            assert_eq!(told.take(), "s");
        }
    }

    #[test]
    fn what_a_port_does_not_take_is_read_when_it_has_room() {
        let (mut watch, mut told) = live();
        told.is_full = true;
        for offset in 11..13 {
            assert_eq!(watch.message(message(1, offset - 1, offset), &mut told), Next::Nothing);
        }
        assert_eq!((watch.state, watch.cursor().unwrap().offset), (State::Overrun, 10));
        told.is_full = false;
        assert_eq!(watch.room(&mut told), Next::Read);
        watch.state = State::Reading(Call(2));
        assert_eq!(watch.read(page(1, 0, &[11, 12], 12, false), &mut told), Next::Nothing);
        assert_eq!(told.take(), "a11 a12");
    }

    #[test]
    fn word_of_a_top_without_a_publication_is_read() {
        let (mut watch, mut told) = live();
        let word = |offset| Message { record: Bytes::new(), ..message(1, offset, offset) };
        assert_eq!(watch.message(word(10), &mut told), Next::Nothing);
        assert_eq!(watch.message(word(11), &mut told), Next::Read);
        watch.state = State::Reading(Call(2));
        assert_eq!(watch.read(page(1, 0, &[11], 11, false), &mut told), Next::Nothing);
        assert_eq!(told.take(), "a11");
    }

    #[test]
    fn what_no_read_explains_is_told() {
        let (mut watch, mut told) = live();
        assert_eq!(watch.message(message(1, 11, 12), &mut told), Next::Read);
        for call in 2..5 {
            watch.state = State::Reading(Call(call));
            let next = watch.read(page(1, 0, &[], 10, false), &mut told);
            assert_eq!(next, if call < 4 { Next::Read } else { Next::Nothing }, "{call}");
        }
        assert_eq!(told.take(), "g10");
    }
}
