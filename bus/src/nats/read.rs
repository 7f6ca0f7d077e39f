//! Reading a channel from its stream: position, history, predecessors.
//!
//! Owns: walks over one subject's messages, what of them is history, the page. Must not know: subscriptions.
//!
//! The leader is asked (`STREAM.MSG.GET`), for a follower lags. The API steps forward within a subject and knows its
//! last message, but not the one before; so the walk begins where, by how densely the channel's messages lie, the
//! wanted ones should begin, and widens.
//!
//! What is kept is decided here, by the channel's options at the time of the read: the newest `history_size`
//! publications, not older than `history_ttl_ms`, after the last mark of a clearing. The stream keeps more: so the
//! publication before the oldest kept one is usually there, and its sequence is the history's floor.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::api::{Api, ApiError, Stored, Which};
use crate::backend::{ReadPage, append_record};
use crate::envelope;
use crate::epoch::{Epoch, Position};
use crate::lineage::Lineage;
use crate::types::{BusError, ChannelOptions, HistoryQuery, Page};

/// Longest time for one read, in milliseconds.
const READ_MS_MAX: u64 = 2_500;

/// Time before a failed request is made again, in milliseconds.
const AGAIN_MS: u64 = 50;

/// A channel in its stream.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) api: Api,
    pub(super) subject: Rc<str>,
    /// Where its marks lie.
    pub(super) mark: Rc<str>,
    pub(super) epoch: Epoch,
    /// The channel's highest sequence that this node knows of: an answer below it is of a leader that lags.
    pub(super) at_least: u64,
    /// Publications that the stream keeps of a channel at most.
    pub(super) per_subject_max: usize,
    /// Whether the stream may have dropped messages for their age.
    pub(super) has_aged: bool,
    /// The server's clock less ours, in milliseconds.
    pub(super) clock_ahead_ms: i64,
}

/// A channel's kept publications, oldest first.
struct History {
    top: u64,
    floor: u64,
    kept: Vec<Stored>,
}

impl Place {
    /// Reads a page.
    pub(super) async fn read(
        &self,
        options: &ChannelOptions,
        query: &HistoryQuery,
    ) -> Result<ReadPage, BusError> {
        let (last, mark) = tokio::join!(self.last(), self.cleared());
        let (last, cleared) =
            (last.map_err(|_| BusError::Unavailable)?, mark.map_err(|_| BusError::Unavailable)?);
        let top = last.as_ref().map_or(0, |last| last.sequence);
        let keeps = Keeps { cleared, now_ms: unix_ms().saturating_add_signed(self.clock_ahead_ms), options };
        let current = Position::new(self.epoch, top);
        if query.since.is_some_and(|since| since.epoch.is_some_and(|epoch| epoch != self.epoch)) {
            return Err(BusError::UnrecoverableEpoch { current });
        }
        let history = match last {
            Some(last) if keeps.keeps(&last) => {
                if query.limit == 0 && query.since.is_none() {
                    // Only the position is asked for: the floor says no more than is known without a walk.
                    History { top, floor: top, kept: vec![last] }
                } else {
                    self.history(last, &keeps).await.map_err(|_| BusError::Unavailable)?
                }
            }
            _ => History { top, floor: top, kept: Vec::new() },
        };
        Ok(page_of(history, query, self.epoch))
    }

    /// The channel's last publication before `sequence`, which is one of its own; 0: there is none.
    pub(super) async fn predecessor(&self, sequence: u64) -> Result<u64, ApiError> {
        let deadline = deadline();
        let mut width = 1u64;
        loop {
            let from = sequence.saturating_sub(width);
            let mut before = None;
            let mut next = from;
            while let Some(entry) = self.ask(Which::From(&self.subject, next), deadline).await?
                && entry.sequence < sequence
            {
                next = entry.sequence + 1;
                before = Some(entry.sequence);
                if Instant::now() >= deadline {
                    return Err(ApiError::NoAnswer);
                }
            }
            match before {
                Some(before) => return Ok(before),
                None if from <= 1 => return Ok(self.floor_of(sequence)),
                None => width = width.saturating_mul(4),
            }
        }
    }

    /// The channel's last message.
    async fn last(&self) -> Result<Option<Stored>, ApiError> {
        let deadline = deadline();
        loop {
            let last = self.ask(Which::Last(&self.subject), deadline).await?;
            if self.at_least == 0 || last.as_ref().is_some_and(|last| last.sequence >= self.at_least) {
                return Ok(last);
            }
            if Instant::now() >= deadline {
                return Err(ApiError::NoAnswer);
            }
            tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
        }
    }

    /// The channel's last mark: what is before it is cleared.
    async fn cleared(&self) -> Result<u64, ApiError> {
        Ok(self.ask(Which::Last(&self.mark), deadline()).await?.map_or(0, |mark| mark.sequence))
    }

    /// Writes a mark, then removes what it hides but for the last publication, which is the channel's position.
    pub(super) async fn clear(&self) -> Result<Position, BusError> {
        let unavailable = |_| BusError::Unavailable;
        let top = self.last().await.map_err(unavailable)?.map_or(0, |last| last.sequence);
        if top > 0 {
            let mark = self.api.publish(&self.mark).await.map_err(unavailable)?;
            // The mark hides what they do not remove.
            let _ =
                tokio::join!(self.api.purge(&self.subject, top), self.api.purge(&self.mark, mark.sequence));
        }
        Ok(Position::new(self.epoch, top))
    }

    async fn ask(&self, which: Which<'_>, deadline: Instant) -> Result<Option<Stored>, ApiError> {
        loop {
            match self.api.message(which).await {
                Ok(stored) => return Ok(Some(stored)),
                Err(ApiError::NotFound) => return Ok(None),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await,
            }
        }
    }

    /// What a message that seems to be the subject's first names as its predecessor: nothing, unless the stream
    /// may have dropped one.
    fn floor_of(&self, first: u64) -> u64 {
        if self.has_aged { first - 1 } else { 0 }
    }

    /// Walks back from the last message until the history's end is found.
    async fn history(&self, last: Stored, keeps: &Keeps<'_>) -> Result<History, ApiError> {
        let deadline = deadline();
        let top = last.sequence;
        let wanted = (keeps.options.history_size as usize).min(self.per_subject_max - 1).max(1);
        // The newest; beyond them one that is not kept, which gives the floor.
        let mut entries = vec![last];
        let mut width = 4 * wanted as u64;
        loop {
            let oldest = entries[0].sequence;
            let from = oldest.saturating_sub(width);
            let mut before = self.walk(from, oldest, wanted + 1, deadline).await?;
            let found = before.len();
            before.append(&mut entries);
            entries = before;
            if let Some(history) = settled(top, &mut entries, wanted, keeps) {
                return Ok(history);
            }
            if from <= 1 {
                let first = entries[0].sequence;
                let floor =
                    if entries.len() >= self.per_subject_max { first - 1 } else { self.floor_of(first) };
                return Ok(History { top, floor, kept: entries });
            }
            width = next_width(width, found, wanted.saturating_sub(entries.len()));
        }
    }

    /// The last `most` of the subject's messages of `from..to`, oldest first.
    async fn walk(
        &self,
        from: u64,
        to: u64,
        most: usize,
        deadline: Instant,
    ) -> Result<Vec<Stored>, ApiError> {
        let mut entries = VecDeque::new();
        let mut next = from;
        while next < to {
            match self.ask(Which::From(&self.subject, next), deadline).await? {
                Some(entry) if entry.sequence < to => {
                    next = entry.sequence + 1;
                    entries.push_back(entry);
                    if entries.len() > most {
                        entries.pop_front();
                    }
                }
                _ => break,
            }
            if Instant::now() >= deadline {
                return Err(ApiError::NoAnswer);
            }
        }
        Ok(entries.into())
    }
}

/// What of a channel is history.
struct Keeps<'a> {
    /// Sequence of the last mark.
    cleared: u64,
    /// Now, by the server's clock.
    now_ms: u64,
    options: &'a ChannelOptions,
}

impl Keeps<'_> {
    /// Whether a message is, its place among the newest apart.
    fn keeps(&self, entry: &Stored) -> bool {
        let ends_ms = entry.unix_ms.saturating_add(self.options.history_ttl_ms);
        entry.sequence > self.cleared && ends_ms > self.now_ms
    }
}

/// The history, if the entries (oldest first) hold its end.
fn settled(top: u64, entries: &mut Vec<Stored>, wanted: usize, keeps: &Keeps<'_>) -> Option<History> {
    let beyond_size = entries.len().checked_sub(wanted + 1);
    let gone = entries.iter().rposition(|entry| !keeps.keeps(entry)).max(beyond_size)?;
    let kept = entries.split_off(gone + 1);
    Some(History { top, floor: entries[gone].sequence, kept })
}

/// How far to step back next: by the density found, else much farther.
fn next_width(width: u64, found: usize, missing: usize) -> u64 {
    if found == 0 {
        return width.saturating_mul(4);
    }
    let gap = width / found as u64 + 1;
    gap.saturating_mul(missing as u64 + 2).saturating_mul(2).max(width)
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_millis(READ_MS_MAX)
}

/// Milliseconds since 1970 by this machine's clock.
pub(super) fn unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

fn page_of(history: History, query: &HistoryQuery, epoch: Epoch) -> ReadPage {
    let History { top, floor, mut kept } = history;
    if let Some(since) = query.since {
        let is_asked = |entry: &Stored| {
            if query.reverse { entry.sequence < since.offset } else { entry.sequence > since.offset }
        };
        kept.retain(is_asked);
    }
    if query.reverse {
        kept.reverse();
    }
    let limit = query.limit as usize;
    let more = kept.len() > limit;
    let mut records = Vec::new();
    for entry in kept.iter().take(limit) {
        // What is no envelope of ours is left out: somebody else writes there.
        if let Ok(read) = envelope::decode(&entry.payload) {
            append_record(&mut records, entry.sequence, &read.record);
        }
    }
    let page = Page { top: Position::new(epoch, top), floor, more };
    ReadPage { page, lineage: Lineage::EMPTY, records }
}
