//! The contract between a shard and a bus: the [`Bus`] trait and its numbered clauses.
//!
//! Owns: the clauses and their limits. Must not know: any backend.
//! Invariant: every clause is checked by [`crate::suite`] under its number, against every backend.
//!
//! A *port* is one value that implements [`Bus`]: one shard's view. *Node* below means the port of a node.
//! A channel is *open* at a port from the answer to [`Bus::open`] to the call of [`Bus::close`].
//!
//! # Positioned channels (`history_size > 0`)
//!
//! - **P1 one order.** All ports get the arrivals of a channel in one order, that of their offsets. What one port
//!   published and was accepted stands in the order of its asking, over an outage too; only where a broker refuses a part
//!   of what is on its way (a leader that changes) may what it took come before what is tried again.
//! - **P2 no silent gap.** At a port, what an open channel is told is a chain: each arrival's `previous` is
//!   the offset of the arrival before it, the first one's the position that `open` answered. Where that
//!   cannot be held, [`Event::Gap`] or [`Event::EpochChanged`] comes first and the chain goes on from its
//!   position. So no arrival comes twice, and none is missing unsaid. Filling holes is the backend's work.
//! - **P3 one name, one publication.** No (epoch, offset) ever names two publications, whatever was lost.
//! - **P4 kept or told.** An accepted publication is read from history under its position until it is
//!   trimmed, expired or cleared. One that the broker lost afterwards is told: `Gap` or `EpochChanged` at
//!   every port where the channel is open, and a position that counted on it is not recoverable.
//! - **P5 unknown is said.** A publish whose answer never came is [`PublishError::Unknown`], never a
//!   temporary error. Published again under the same key it stands in the stream once; an id that a node drew
//!   is published once.
//! - **P6 idempotency.** Within the window (size and time, the backend's options) a publish under a key
//!   that its channel has seen answers what the first one did, with `repeated`, and adds nothing. A
//!   position and the keys that led to it live and die together.
//! - **P7 interest first.** The position that `open` answers is read after interest was confirmed: every
//!   publication above it arrives.
//! - **P8 a page is whole.** A read with `since` and no `more` holds every publication of (since, top] that
//!   is kept, in order; with `reverse` every kept one below `since`, newest first. `limit` cuts at the far
//!   end. Publications accepted before the read was sent are not above its top.
//! - **P9 trimmed is not an error.** A read since a trimmed, expired or cleared offset gives what is left.
//!   `floor` says how far back that reaches; one at or below `since` says only that nothing after it is missing.
//!   Since an offset above the top it gives nothing.
//! - **P10 the epoch is compared unless absent.** A read whose `since` names another epoch is
//!   [`BusError::UnrecoverableEpoch`] with the current position; one without epoch is not compared.
//! - **P11 clearing keeps the stream.** After `clear` the history is empty, its floor is the top, and
//!   offsets go on in the same epoch.
//! - **P12 limits of history.** At most `history_size` publications are kept, each at most
//!   `history_ttl_ms` (and what [`HISTORY_LATE_MS`] allows). The position outlives them by `meta_ttl_ms`
//!   from the last use, and is kept while the channel is open at any node that reaches the broker.
//! - **P13 a new life is told.** When a channel's epoch changes (data wiped, a tail lost, a position
//!   expired), every port where it is open gets `EpochChanged` before an arrival of the new epoch.
//!
//! # Ephemeral channels (`history_size = 0`)
//!
//! - **E1 order per publisher.** What one port published arrives in the order of its publishing.
//! - **E2 at most once.** No publication arrives twice at a port.
//! - **E3 never in silence.** An accepted publication reaches every port where the channel is open, or that
//!   port gets `Gap` for the channel.
//! - **E4 no position.** Positions are [`Position::NONE`], reads give nothing, the previous offset is 0.
//!
//! # All channels
//!
//! - **C1 one answer.** Each command is answered exactly once: inline, or by one event with its token
//!   within [`ANSWER_MS_MAX`]. Also when the channel is closed or forgotten meanwhile.
//! - **C2 loss is visible.** A lost broker makes [`Event::Health`] `Down` within [`LOSS_VISIBLE_MS_MAX`];
//!   from then on publishes fail at once as temporary, and so do opens, reads and clears.
//! - **C3 it heals by itself.** When the broker is back, every open channel is confirmed again; what was
//!   missed has arrived or is told; then `Health` is `Up`. Nothing has to be opened again.
//! - **C4 bounded.** Every queue has a maximum. Too many commands are refused inline as `Overloaded`; too
//!   many arrivals for a port that does not poll become `Gap`.
//! - **C5 closed is quiet.** After `close` no arrival, gap or epoch change for that id comes until it is
//!   opened again, also when the id was given to another channel meanwhile.
//! - **C6 one's own publications.** A publish answered inline with `Done(Ok)` and not `repeated` *is* its
//!   arrival at that port: the caller delivers it, no event follows. A publish answered late arrives by an
//!   [`Event::Arrival`] like anybody's, before or after its answer.
//! - **C7 no command is required before another.** Publish, read and clear work on a channel that is not
//!   open; the first of them, or open, gives the channel its epoch.

use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use crate::epoch::Position;
use crate::types::*;

/// Longest time between a command and its answer, in milliseconds. Below the 5 s after which the official
/// JavaScript client gives a command up.
pub const ANSWER_MS_MAX: u64 = 4_000;

/// Longest time between the loss of the broker and [`Health::Down`], in milliseconds.
pub const LOSS_VISIBLE_MS_MAX: u64 = 1_000;

/// How much longer than `history_ttl_ms` a publication may still be readable, in milliseconds. Brokers
/// expire in seconds; the embedded bus counts time in ticks of 64 ms.
pub const HISTORY_LATE_MS: u64 = 2_000;

/// One shard's view of the message bus.
///
/// Synchronous and without IO: commands go in, answers come back inline or as events of [`Bus::poll`]. `now`
/// is the caller's clock and never goes back. The clauses are at [the module](self).
pub trait Bus {
    /// Registers interest in a channel and gives its top (clause P7). Opening an open channel again is
    /// allowed and answers where its chain stands; it stays open until one `close`. An open that failed
    /// changes nothing: a channel that was open is open, one whose other open is in flight may become so.
    fn open(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>>;

    /// Ends the interest. No answer. Nothing happens to a channel that is not open.
    fn close(&mut self, now: Now, channel: ChannelId);

    /// Publishes. `publication.offset` is ignored: the bus gives the offset. Refuses what is larger than
    /// the backend's limit, with [`PublishError::TooLarge`].
    fn publish(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        id: PublicationId<'_>,
        publication: &Publication<'_>,
    ) -> Outcome<Result<Accepted, PublishError>>;

    /// Reads history. Answered inline, the publications have been passed to `out` in the order asked for;
    /// answered late, `out` is not called and the event carries them.
    fn read(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        query: &HistoryQuery,
        out: &mut dyn FnMut(&Publication<'_>),
    ) -> Outcome<Result<Page, BusError>>;

    /// Removes a channel's history (clause P11).
    fn clear(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>>;

    /// Whether the bus keeps nothing for this channel here: it is closed, and its position and history, if
    /// they live on this shard at all, have expired. Then its id may be reused after [`Bus::forget`].
    fn is_idle(&self, now: Now, channel: ChannelId) -> bool;

    /// Says that the id will name another channel. Closes the channel, and drops what is kept here for it.
    fn forget(&mut self, channel: ChannelId);

    /// Sends off what was asked since the last time. To be called at the end of a turn, so that another thread is woken
    /// once for all of it; [`Bus::poll`] does it too. Nothing where there is no other thread.
    fn flush(&mut self) {}

    /// Does what is due and gives what has happened, a bounded number of events per call. Call it at
    /// [`Bus::next_deadline`], and when the backend's inbox has rung.
    fn poll(&mut self, now: Now, sink: &mut dyn FnMut(Event<'_>));

    /// When to poll next, in `mono_ms`; not after now when there is more to do already, `None` when
    /// nothing is due by time alone.
    fn next_deadline(&self) -> Option<u64>;

    /// Bytes of history kept in this shard's memory; 0 where a broker keeps it.
    fn history_bytes(&self) -> usize {
        0
    }

    /// The last health told; a port starts `Down` until its first contact, the embedded bus is always `Up`.
    fn health(&self) -> Health;
}
