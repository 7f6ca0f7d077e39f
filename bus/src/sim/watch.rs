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
