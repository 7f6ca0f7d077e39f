//! One open channel at a port: from the subscription to a chain of arrivals, and back to it after a fault.
//!
//! Owns: the cursor and what is held back while it is being read. Must not know: connections, time.
//!
//! The order that clause P7 asks for: the subscription is confirmed, then the position is read, and what
//! arrives meanwhile waits for the answer. After a cut the same with the cursor in hand: what was missed is
//! read and delivered, or told as `Gap` or `EpochChanged`. Invariant: what the sink gets of a channel is a
//! chain from one told position to the next.

use std::collections::VecDeque;
use std::rc::Rc;

use ringmain_proto::message::Publication;
use ringmain_proto::record::records;

use crate::epoch::Position;
use crate::sim::wire::{Message, PageReply};
use crate::types::{ChannelId, ChannelOptions, Event, HistoryQuery, Since, Token};

/// Arrivals held while a position is being read. Above it they are dropped and read from history.
pub const HELD_MAX: usize = 256;

/// Publications asked for in one read that fills a hole.
pub const FILL_PUBLICATIONS_MAX: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits for its turn to be subscribed (again).
    Unsynced,
    /// The subscription under this nonce is not confirmed yet.
    Subscribing(u64),
    /// The read under this call is not answered yet.
    Reading(u64),
    Live,
}

/// What the port is to do next for this channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Next {
    Nothing,
    /// Send [`Watch::query`] and note its call in `state`.
    Read,
}

#[derive(Debug)]
struct Held {
    message: Message,
    /// A position was read after this message came.
    judged: bool,
}

#[derive(Debug)]
pub(super) struct Watch {
    pub(super) name: Rc<str>,
    pub(super) options: ChannelOptions,
    pub(super) state: State,
    /// Opens not answered yet.
    pub(super) tokens: Vec<Token>,
    /// When they are given up.
    pub(super) open_by_ms: Option<u64>,
    /// The last position told; none until the first open is answered.
    cursor: Option<Position>,
    held: VecDeque<Held>,
    overrun: bool,
}

type Sink<'a> = &'a mut dyn FnMut(Event<'_>);

impl Watch {
    pub(super) fn new(
        name: Rc<str>,
        options: ChannelOptions,
        token: Token,
        open_by_ms: Option<u64>,
    ) -> Watch {
        Watch {
            name,
            options,
            state: State::Unsynced,
            tokens: vec![token],
            open_by_ms,
            cursor: None,
            held: VecDeque::new(),
            overrun: false,
        }
    }

    /// The last position told.
    pub(super) fn cursor(&self) -> Option<Position> {
        self.cursor
    }

    /// Starts over: everything that has not been told is to be read again.
    pub(super) fn unsync(&mut self) {
        self.state = State::Unsynced;
        self.held.clear();
        self.overrun = false;
    }

    /// What to read: the position alone at first, else what came after the cursor.
    pub(super) fn query(&self) -> HistoryQuery {
        match self.cursor {
            None => HistoryQuery::TOP,
            Some(cursor) => HistoryQuery {
                since: Some(Since { offset: cursor.offset, epoch: None }),
                limit: FILL_PUBLICATIONS_MAX,
                reverse: false,
            },
        }
    }

    /// The broker confirmed a subscription.
    pub(super) fn confirmed(&mut self, nonce: u64, id: ChannelId, sink: Sink<'_>) -> Next {
        if self.state != State::Subscribing(nonce) {
            return Next::Nothing;
        }
        if self.options.is_positioned() {
            return Next::Read;
        }
        if self.cursor.is_some() {
            sink(Event::Gap { channel: id, resumed: Position::NONE });
        }
        self.go_live(Position::NONE, id, sink);
        Next::Nothing
    }

    /// The broker answered [`Watch::query`].
    pub(super) fn read(&mut self, reply: &PageReply, id: ChannelId, sink: Sink<'_>) -> Next {
        let top = reply.page.top;
        match self.cursor {
            None => self.cursor = Some(top),
            Some(cursor) if cursor.epoch != top.epoch || top.offset < cursor.offset => {
                sink(Event::EpochChanged { channel: id, position: top });
                self.cursor = Some(top);
            }
            Some(cursor) if reply.page.floor > cursor.offset => {
                sink(Event::Gap { channel: id, resumed: top });
                self.cursor = Some(top);
            }
            Some(cursor) => {
                for publication in records(&reply.records) {
                    self.deliver(publication, cursor, id, sink);
                }
                if reply.page.more {
                    return Next::Read;
                }
            }
        }
        if std::mem::take(&mut self.overrun) {
            self.held.clear();
            return Next::Read;
        }
        self.go_live(self.cursor.unwrap_or(top), id, sink);
        self.release_held(id, sink)
    }

    /// A publication came over the subscription.
    pub(super) fn message(&mut self, message: Message, id: ChannelId, sink: Sink<'_>) -> Next {
        match self.state {
            // From before the subscription that is being confirmed: the read that follows covers it.
            State::Unsynced | State::Subscribing(_) => Next::Nothing,
            State::Reading(_) if self.held.len() < HELD_MAX => {
                self.held.push_back(Held { message, judged: false });
                Next::Nothing
            }
            State::Reading(_) => {
                self.overrun = true;
                Next::Nothing
            }
            State::Live => self.judge(Held { message, judged: false }, id, sink),
        }
    }

    fn go_live(&mut self, cursor: Position, id: ChannelId, sink: Sink<'_>) {
        self.cursor = Some(cursor);
        self.state = State::Live;
        self.open_by_ms = None;
        for token in self.tokens.drain(..) {
            sink(Event::Opened { token, channel: id, result: Ok(cursor) });
        }
    }

    fn release_held(&mut self, id: ChannelId, sink: Sink<'_>) -> Next {
        while let Some(held) = self.held.pop_front() {
            if self.judge(held, id, sink) == Next::Read {
                // The read that is now sent comes after all of them.
                self.held.iter_mut().for_each(|held| held.judged = true);
                return Next::Read;
            }
        }
        Next::Nothing
    }

    /// Delivers, drops, or holds a message and asks for the position.
    fn judge(&mut self, held: Held, id: ChannelId, sink: Sink<'_>) -> Next {
        let cursor = self.cursor.unwrap_or_default();
        let (message, judged) = (&held.message, held.judged);
        if message.epoch == cursor.epoch && (cursor.epoch.is_none() || message.previous == cursor.offset) {
            let record = message.record.clone();
            for publication in records(&record) {
                self.deliver(publication, cursor, id, sink);
            }
            return Next::Nothing;
        }
        let old = message.epoch == cursor.epoch && message.offset <= cursor.offset;
        // Of another epoch even after the position was read behind it: a voice from a life that is gone.
        let stale = message.epoch != cursor.epoch && judged;
        if old || stale {
            return Next::Nothing;
        }
        self.held.push_front(Held { judged: true, ..held });
        Next::Read
    }

    fn deliver(&mut self, publication: Publication<'_>, told: Position, id: ChannelId, sink: Sink<'_>) {
        let previous = self.cursor.unwrap_or(told).offset;
        let offset = publication.offset;
        sink(Event::Arrival { channel: id, epoch: told.epoch, previous, publication });
        if !told.epoch.is_none() {
            self.cursor = Some(Position::new(told.epoch, offset));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epoch;
    use crate::types::Page;

    const OPTIONS: ChannelOptions =
        ChannelOptions { history_size: 1000, history_ttl_ms: 60_000, meta_ttl_ms: 60_000 };
    const ID: ChannelId = ChannelId(0);

    fn record(offset: u64) -> Vec<u8> {
        let mut record = Vec::new();
        Publication { offset, data: b"x", ..Publication::default() }.write_record(&mut record);
        record
    }

    fn message(epoch: u64, previous: u64, offset: u64) -> Message {
        Message { epoch: Epoch::new(epoch), previous, offset, record: record(offset).into() }
    }

    fn page(epoch: u64, floor: u64, offsets: &[u64], top: u64, more: bool) -> PageReply {
        let page = Page { top: Position::new(Epoch::new(epoch), top), floor, more };
        PageReply { page, records: offsets.iter().flat_map(|offset| record(*offset)).collect() }
    }

    /// What was told, in short: `a5` an arrival, `o5` opened, `g5` a gap, `e5` another epoch, all with their
    /// offset.
    struct Told(Vec<String>);

    impl Told {
        fn take(&mut self) -> String {
            std::mem::take(&mut self.0).join(" ")
        }

        fn sink(&mut self) -> impl FnMut(Event<'_>) {
            |event| {
                self.0.push(match event {
                    Event::Arrival { publication, .. } => format!("a{}", publication.offset),
                    Event::Opened { result, .. } => format!("o{}", result.unwrap().offset),
                    Event::Gap { resumed, .. } => format!("g{}", resumed.offset),
                    Event::EpochChanged { position, .. } => format!("e{}", position.offset),
                    other => panic!("{other:?}"),
                });
            }
        }
    }

    fn reading() -> (Watch, Told) {
        let mut watch = Watch::new("room:a".into(), OPTIONS, Token(1), None);
        let mut told = Told(Vec::new());
        watch.state = State::Subscribing(7);
        assert_eq!(watch.confirmed(7, ID, &mut told.sink()), Next::Read);
        watch.state = State::Reading(1);
        (watch, told)
    }

    /// Open at offset 10 of epoch 1.
    fn live() -> (Watch, Told) {
        let (mut watch, mut told) = reading();
        assert_eq!(watch.read(&page(1, 0, &[], 10, false), ID, &mut told.sink()), Next::Nothing);
        assert_eq!(told.take(), "o10");
        (watch, told)
    }

    #[test]
    fn a_confirmation_of_an_earlier_subscription_is_none() {
        let mut watch = Watch::new("room:a".into(), ChannelOptions::EPHEMERAL, Token(1), None);
        let mut told = Told(Vec::new());
        watch.state = State::Subscribing(8);
        assert_eq!(watch.confirmed(7, ID, &mut told.sink()), Next::Nothing);
        assert_eq!((watch.state, told.take()), (State::Subscribing(8), String::new()));
        assert_eq!(watch.confirmed(8, ID, &mut told.sink()), Next::Nothing);
        assert_eq!((watch.state, told.take()), (State::Live, "o0".to_owned()));
    }

    #[test]
    fn arrivals_wait_for_the_position_and_those_below_it_are_dropped() {
        let (mut watch, mut told) = reading();
        for offset in 9..13 {
            let next = watch.message(message(1, offset - 1, offset), ID, &mut told.sink());
            assert_eq!(next, Next::Nothing);
        }
        assert_eq!(watch.read(&page(1, 0, &[], 10, false), ID, &mut told.sink()), Next::Nothing);
        assert_eq!(told.take(), "o10 a11 a12");
    }

    #[test]
    fn a_hole_is_read_in_as_many_pages_as_it_takes() {
        let (mut watch, mut told) = live();
        assert_eq!(watch.message(message(1, 14, 15), ID, &mut told.sink()), Next::Read);
        watch.state = State::Reading(2);
        assert_eq!(watch.query().since.unwrap().offset, 10);
        assert_eq!(watch.read(&page(1, 0, &[11, 12], 15, true), ID, &mut told.sink()), Next::Read);
        assert_eq!(watch.query().since.unwrap().offset, 12);
        assert_eq!(watch.read(&page(1, 0, &[13, 14, 15], 15, false), ID, &mut told.sink()), Next::Nothing);
        assert_eq!(told.take(), "a11 a12 a13 a14 a15");
    }

    #[test]
    fn more_than_can_be_held_is_read() {
        let (mut watch, mut told) = reading();
        let most = HELD_MAX as u64;
        for offset in 1..=most + 1 {
            let _ = watch.message(message(1, offset - 1, offset), ID, &mut told.sink());
        }
        assert_eq!(watch.held.len(), HELD_MAX);
        assert_eq!(watch.read(&page(1, 0, &[], 0, false), ID, &mut told.sink()), Next::Read);
        assert_eq!(watch.held.len(), 0);
        assert_eq!(watch.query().since.unwrap().offset, 0);
    }

    #[test]
    fn as_much_as_can_be_held_is_not_read() {
        let (mut watch, mut told) = reading();
        for offset in 1..=HELD_MAX as u64 {
            let _ = watch.message(message(1, offset - 1, offset), ID, &mut told.sink());
        }
        assert_eq!(watch.read(&page(1, 0, &[], 0, false), ID, &mut told.sink()), Next::Nothing);
        assert_eq!(watch.cursor().unwrap().offset, HELD_MAX as u64);
    }

    #[test]
    fn a_voice_of_another_epoch_is_believed_only_if_the_broker_says_the_same() {
        for (read_epoch, read_top, expected) in [(2, 3, "e3"), (1, 10, "")] {
            let (mut watch, mut told) = live();
            assert_eq!(watch.message(message(2, 2, 3), ID, &mut told.sink()), Next::Read);
            watch.state = State::Reading(2);
            let reply = page(read_epoch, 0, &[], read_top, false);
            assert_eq!(watch.read(&reply, ID, &mut told.sink()), Next::Nothing);
            assert_eq!((told.take().as_str(), watch.state), (expected, State::Live));
        }
    }

    #[test]
    fn a_voice_of_a_newer_epoch_than_the_answer_is_asked_about_again() {
        let (mut watch, mut told) = live();
        watch.unsync();
        watch.state = State::Reading(2);
        // It comes while an answer from before it is on its way.
        assert_eq!(watch.message(message(2, 0, 1), ID, &mut told.sink()), Next::Nothing);
        assert_eq!(watch.read(&page(1, 0, &[], 10, false), ID, &mut told.sink()), Next::Read);
        watch.state = State::Reading(3);
        assert_eq!(watch.read(&page(2, 0, &[], 1, false), ID, &mut told.sink()), Next::Nothing);
        assert_eq!((told.take().as_str(), watch.state), ("e1", State::Live));
    }

    #[test]
    fn what_history_does_not_reach_back_to_is_a_gap() {
        let (mut watch, mut told) = live();
        assert_eq!(watch.message(message(1, 29, 30), ID, &mut told.sink()), Next::Read);
        watch.state = State::Reading(2);
        assert_eq!(watch.read(&page(1, 28, &[29, 30], 30, false), ID, &mut told.sink()), Next::Nothing);
        assert_eq!(told.take(), "g30");
    }
}
