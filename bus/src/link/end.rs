//! The control thread's end of a link.
//!
//! Owns: what is told to one shard. Must not know: what it means.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Command, Shared, Told, Wake};

/// The shard has not taken enough of what waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shard has not taken what waits for it")]
pub struct Full;

/// See the module's doc.
pub struct End {
    shared: Arc<Shared>,
    wake_shard: Wake,
    /// Something was pushed since the last ring.
    pushed: bool,
}

impl std::fmt::Debug for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("End").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl End {
    pub(super) fn new(shared: Arc<Shared>, wake_shard: Wake) -> End {
        End { shared, wake_shard, pushed: false }
    }

    /// The next command.
    pub fn command(&mut self) -> Option<Command> {
        self.shared.commands.pop()
    }

    /// Whether the shard can take an arrival.
    pub fn has_room(&self) -> bool {
        self.shared.has_room()
    }

    /// Tells the shard. Only an arrival can find no room; then [`End::has_room`] is to be asked after the hub was
    /// rung.
    pub fn tell(&mut self, told: Told) -> Result<(), Full> {
        if let Told::Arrival { record, .. } = &told {
            if !self.shared.has_room() {
                self.shared.refused.store(true, Ordering::Release);
                // It may have taken the last one between the two.
                if !self.shared.has_room() {
                    return Err(Full);
                }
            }
            self.shared.arrivals.fetch_add(1, Ordering::AcqRel);
            self.shared.arrival_bytes.fetch_add(record.len(), Ordering::AcqRel);
        }
        self.shared.told.push(told);
        self.pushed = true;
        Ok(())
    }

    /// Rings the shard if something was pushed since the last time.
    pub fn flush(&mut self) {
        if std::mem::take(&mut self.pushed) {
            (self.wake_shard)();
        }
    }
}
