//! A connection leaves as plain data, and comes back.
//!
//! Owns the way of a session, its cursors and its unfinished input out of a shard's tables and into them
//! again, for the simulator, which does it as one of its faults, and for handing sockets to another binary.
//! Neither the client nor a channel's home is told: who left as data is still counted in its
//! channels and present there. It must not know the socket, which is the caller's affair.
//!
//! What is not data: commands that wait for an answer, replays, and what is about to be closed
//! ([`NotNow`]); and logs, which are shared. Of a log only what no position names is taken along: frames
//! behind the cursor that have its own offset, as joins and all that an ephemeral channel sends.
//!
//! Invariants:
//! * the bytes are the connection: imported once they are worth nothing, and until then its subscriptions
//!   stay counted, here and at the home;
//! * who comes back is sent what was published meanwhile, from the log or from history, or is told
//!   that it cannot be had.

mod export;
mod import;
mod state;

use std::collections::HashMap;

use ringmain_proto::time::Now;

use self::state::ConnectionState;
pub use self::state::SNAPSHOT_VERSION;
use super::engine::Slot;
use super::shard::Core;

/// Why a connection cannot leave. Nobody's fault, and nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotNow {
    /// It is not connected: there is no session yet, or no more.
    #[error("not connected")]
    NotConnected,
    /// Something that it waits for is on its way: later it can.
    #[error("an answer is on its way")]
    Pending,
    /// It is to be told of a gap, or to be closed: later that is done.
    #[error("about to be told or closed")]
    Ending,
    /// More waits for it than its own queue may hold: later it has read, or is closed.
    #[error("too much is unsent")]
    TooLarge,
}

/// Why bytes are no connection of this shard. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// The slot has a connection: the caller's fault.
    #[error("the slot is taken")]
    SlotTaken,
    /// Written by another version: they are of no use here.
    #[error("unknown version {0} of the encoding")]
    Version(u16),
    /// Not what an export writes.
    #[error("malformed")]
    Malformed,
    /// No connection that left this shard and has not come back; or not as it left.
    #[error("not a connection that left this shard")]
    Unknown,
}

/// The connections that left and have not come back, by client id.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(HashMap<u128, Absent>);

/// What stays of a connection while it is data.
#[derive(Debug, Default)]
struct Absent {
    subs: Vec<AbsentSub>,
    /// Bytes of its infos, which stay in the account.
    info_bytes: usize,
}

/// A subscription that is counted, and receives nothing.
#[derive(Clone, Copy, Debug)]
struct AbsentSub {
    channel: u32,
    variant: u8,
    flags: u8,
    /// Something came that no position names.
    missed: bool,
}

/// Where a subscription stands that leaves.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    offset: u64,
    behind: Option<u32>,
    fallen: bool,
}

impl Snapshots {
    /// Notes that a channel sent something which cannot be asked for again.
    #[inline]
    pub(crate) fn missed(&mut self, channel: u32) {
        if self.0.is_empty() {
            return;
        }
        let subs = self.0.values_mut().flat_map(|absent| &mut absent.subs);
        subs.filter(|sub| sub.channel == channel).for_each(|sub| sub.missed = true);
    }
}

impl Core {
    /// Takes a connection out of this shard, as bytes for [`Core::import_connection`]. To be called between
    /// turns. The slot is free then and nothing of it is in the effects to come; the socket stays open, and
    /// what it receives must wait. On an error nothing has changed.
    ///
    /// To end a connection that is data, import it and abort it: its channels count it until then.
    pub fn export_connection(&mut self, slot: Slot, now: Now) -> Result<Vec<u8>, NotNow> {
        if self.sessions.is_free(slot) {
            return Err(NotNow::NotConnected);
        }
        let state = self.state_of(slot, now)?;
        let bytes = state.encode().ok_or(NotNow::TooLarge)?;
        self.remove_silently(slot);
        Ok(bytes)
    }

    /// Puts a connection that left this shard into a free slot. What was published meanwhile follows, or
    /// the client is told that it is lost (unsubscribe 2500; close 3010 where the server subscribed it).
    /// Where the socket was full [`Effect::AwaitWritable`](crate::core::engine::Effect) is asked for anew. On an error nothing has
    /// changed, and the bytes that were exported are still good.
    pub fn import_connection(&mut self, slot: Slot, bytes: &[u8], now: Now) -> Result<(), ImportError> {
        if !self.sessions.is_free(slot) {
            return Err(ImportError::SlotTaken);
        }
        let mut state = ConnectionState::decode(bytes)?;
        let (reader, partial_since_ms) = self.reader_of(&mut state, now)?;
        let absent = self.snapshots.0.get(&state.client).ok_or(ImportError::Unknown)?;
        if !self.is_as_it_left(&state, absent) {
            return Err(ImportError::Unknown);
        }
        let absent = self.snapshots.0.remove(&state.client).unwrap_or_default();
        self.restore_output(slot, &state, now);
        let restored = self.restore_session(slot, state, reader, &absent, now);
        self.note_restored(slot, partial_since_ms);
        self.restore_subs(slot, restored, now);
        self.arm_timer(slot, now);
        Ok(())
    }
}
