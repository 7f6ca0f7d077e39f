//! The seam between a shard's loop and what runs on it.
//!
//! Owns the vocabulary only: [`Engine`] is synchronous, takes bytes, messages and `now`, and is
//! *pulled* for output. It knows no socket, ring, clock or runtime; the loop in `io` and the
//! simulator drive the same calls. The node's engine is [`super::Core`]; the wire's own tests run an
//! echo engine through the same loop.
//!
//! A turn of the loop, in this order:
//!
//! 1. completions: [`Engine::input`], [`Engine::input_ended`], [`Engine::broken`], [`Engine::writable`];
//! 2. inboxes: [`Engine::inbox`], [`Engine::control`];
//! 3. timers: [`Engine::tick`];
//! 4. [`Engine::prepare`], then one send for every entry of [`Engine::sends`], all in few enters;
//! 5. [`Engine::short`] for every send that the kernel did not take whole, before any other
//!    completion is looked at; then [`Engine::settle`];
//! 6. [`Engine::take_mesh`] for the shards in [`Engine::mesh_targets`] that have credit, and
//!    [`Engine::take_effects`].
//!
//! Between `prepare` and `settle` only [`Engine::bytes`] and [`Engine::short`] may be called: the
//! bytes of a send do not move in that time.

use ringmain_proto::time::Now;

/// A connection's index in its shard's direct-descriptor table.
pub type Slot = u32;

/// A shard's number, dense from 0.
pub type ShardIndex = u16;

/// One send of the turn: at most one per slot. Its bytes come from [`Engine::bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Send {
    /// The connection.
    pub slot: Slot,
    /// How many bytes are offered to the kernel.
    pub len: u32,
    /// Where they are: the engine's own affair.
    pub source: Source,
}

/// Where the bytes of a [`Send`] lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The turn's arena, from this byte.
    Arena(u32),
    /// The connection's own queue, from its head.
    Own,
    /// A channel's log (by index) from this stream position.
    Log(u32, u64),
}

/// What a turn may cost at the most.
#[derive(Clone, Copy, Debug)]
pub struct TurnBudget {
    /// Sends offered in this turn.
    pub sends_max: usize,
    /// Of these, fan-out and what goes to connections that are behind: what a reply waits for.
    pub background_max: usize,
    /// Bytes offered in this turn.
    pub bytes_max: usize,
}

/// What the engine wants done with a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Report [`Engine::writable`] once when the socket takes bytes again.
    AwaitWritable(Slot),
    /// Everything is flushed: shutdown(WR), discard what still comes for a bounded time, close, free
    /// the slot, then [`Engine::released`].
    Finish(Slot),
    /// Everything is flushed and the peer has sent its last byte: close, which sends FIN, free the slot,
    /// then [`Engine::released`].
    Close(Slot),
    /// Close without ceremony, free the slot, then [`Engine::released`].
    Abort(Slot),
    /// Stop accepting for good: the node drains.
    StopAccepting,
    /// This shard has no connections left after a drain.
    Drained,
}

/// What runs on a shard.
pub trait Engine {
    /// A batch from one shard to another.
    type Mesh: core::marker::Send + 'static;
    /// A command from the control plane.
    type Control: core::marker::Send + 'static;
    /// An answer to a command of the control plane.
    type Answer: core::marker::Send + 'static;

    /// A new connection in `slot`, accepted by the listener with index `listener`.
    fn accept(&mut self, slot: Slot, listener: u16, now: Now);
    /// Bytes arrived; they are the kernel's buffer and may be changed in place.
    fn input(&mut self, slot: Slot, chunk: &mut [u8], now: Now);
    /// The peer sent FIN. What was parsed is still answered.
    fn input_ended(&mut self, slot: Slot, now: Now);
    /// The socket failed with `errno`; nothing can be sent any more.
    fn broken(&mut self, slot: Slot, errno: i32, now: Now);
    /// The slot is free again; nothing of it is left in the kernel.
    fn released(&mut self, slot: Slot);

    /// A batch of another shard. Must not refuse.
    fn inbox(&mut self, from: ShardIndex, batch: Self::Mesh, now: Now);
    /// A command of the control plane. Must not refuse.
    fn control(&mut self, command: Self::Control, now: Now);

    /// Timers. Called when [`Engine::next_deadline_ms`] has passed, at the latest.
    fn tick(&mut self, now: Now);
    /// When the next turn has work by itself, in monotonic milliseconds: a timer, or at once (0) where
    /// output waits. Asked after `settle`, before the loop sleeps.
    fn next_deadline_ms(&self) -> Option<u64>;

    /// Builds the sends of this turn. Returns whether more is left than the budget allowed.
    fn prepare(&mut self, now: Now, budget: TurnBudget) -> bool;
    /// The sends of this turn.
    fn sends(&self) -> &[Send];
    /// The bytes of one of them.
    fn bytes(&self, send: &Send) -> &[u8];
    /// The kernel took only `accepted` bytes of this slot's send (0: none, the socket is full).
    fn short(&mut self, slot: Slot, accepted: u32, now: Now);
    /// Every send not reported short was taken whole.
    fn settle(&mut self, now: Now);
    /// The socket takes bytes again.
    fn writable(&mut self, slot: Slot, now: Now);

    /// The shards for which something waits.
    fn mesh_targets(&self) -> &[ShardIndex];
    /// The next batch for `to`, if any: called only with credit in hand.
    fn take_mesh(&mut self, to: ShardIndex, now: Now) -> Option<Self::Mesh>;
    /// Moves the effects of this turn to the end of `into`.
    fn take_effects(&mut self, into: &mut Vec<Effect>);
    /// Moves the answers for the control plane to the end of `into`.
    fn take_answers(&mut self, into: &mut Vec<Self::Answer>);

    /// What the engine counts; the loop adds its own.
    fn metrics(&mut self) -> &mut super::metrics::Values;

    /// Connections in this shard now.
    fn connections(&self) -> usize;
}
