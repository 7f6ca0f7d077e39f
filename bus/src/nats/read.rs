//! Reading a channel from its stream: position and history.
//!
//! Owns: walks over one subject's messages, what of them is history, the page. Must not know: subscriptions.
//!
//! The leader is asked for the last message (`STREAM.MSG.GET`), for a follower lags. Those before it may come from any
//! server that has them, in runs (`DIRECT.GET` with a batch, since 2.11): what a follower has is whole as far as it goes,
//! and where it ends before its time the leader gives the next one. Older servers give one message at a time.
//!
//! The API steps forward within a subject and knows its last message, but not the one before; so the walk begins where,
//! by how densely the channel's messages lie, the wanted ones should begin, and widens. Where about as much is wanted as the
//! stream keeps of a channel at most, it begins at the beginning.
//!
//! What is kept is decided here, by the channel's options at the time of the read: the newest `history_size`
//! publications, not older than `history_ttl_ms`, after the last mark of a clearing. The stream keeps more: so the
//! publication before the oldest kept one is usually there, and its sequence is the history's floor.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::api::{Api, ApiError, Stored, Which};
use super::wire::{self, Mark};
use crate::backend::{ReadPage, append_record};
use crate::envelope;
use crate::epoch::{Epoch, Position};
use crate::lineage::Lineage;
use crate::types::{BusError, ChannelOptions, HistoryQuery, Page};

/// Longest time for one read, in milliseconds.
const READ_MS_MAX: u64 = 2_500;

/// How long servers that do not give runs are left alone with it, and those where one failed.
const RUNS_AGAIN: Duration = Duration::from_secs(60);
const FAILED_RUNS_AGAIN: Duration = Duration::from_secs(3);

/// Messages so few that they are read together without a thought.
const RUN_MIN: usize = 64;

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
    /// Whether the stream may have dropped messages: for their age or their bytes, or because it kept less before.
    pub(super) may_have_dropped: bool,
    /// The server's clock less ours, in milliseconds.
    pub(super) clock_ahead_ms: i64,
    pub(super) runs: Rc<Runs>,
}

/// Whether servers give messages in runs, as far as is known.
#[derive(Debug, Default)]
pub(super) struct Runs {
    not_before: Cell<Option<Instant>>,
}

impl Runs {
    fn are_given(&self) -> bool {
        self.not_before.get().is_none_or(|at| at <= Instant::now())
    }

    /// Somebody did not: a server of an older release for one, that is so for longer.
    fn were_not_given(&self, pause: Duration) {
        self.not_before.set(Some(Instant::now() + pause));
    }
}

/// A channel's last mark; all 0: none.
#[derive(Clone, Copy, Debug, Default)]
struct Marked {
    sequence: u64,
    unix_ms: u64,
    top: u64,
    cleared: u64,
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
        let unavailable = |_| BusError::Unavailable;
        let since = self.goes_on_from(query);
        let (last, mark) = match since {
            Some(offset) => {
                let last = self.last().await.map_err(unavailable)?;
                if last.as_ref().is_some_and(|last| last.sequence == offset) {
                    return Ok(self.stands_at(offset, query));
                }
                (last, self.mark().await.map_err(unavailable)?)
            }
            None => {
                let (last, mark) = tokio::join!(self.last(), self.mark());
                (last.map_err(unavailable)?, mark.map_err(unavailable)?)
            }
        };
        let top = last.as_ref().map_or(0, |last| last.sequence).max(mark.top);
        let now_ms = unix_ms().saturating_add_signed(self.clock_ahead_ms);
        let keeps = Keeps { cleared: mark.cleared, marked: mark.top, now_ms, options };
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
                    let missed = match since.filter(|offset| (1..last.sequence).contains(offset)) {
                        Some(offset) => {
                            self.missed(&last, offset, query, &keeps).await.map_err(unavailable)?
                        }
                        None => None,
                    };
                    match missed {
                        Some(history) => history,
                        None => self.history(last, query, &keeps).await.map_err(unavailable)?,
                    }
                }
            }
            _ => History { top, floor: top, kept: Vec::new() },
        };
        Ok(page_of(history, query, self.epoch))
    }

    /// What a read that goes on from `since` gets where nothing came after it.
    pub(super) fn stands_at(&self, since: u64, query: &HistoryQuery) -> ReadPage {
        page_of(History { top: since, floor: since, kept: Vec::new() }, query, self.epoch)
    }

    /// The channel's last message.
    async fn last(&self) -> Result<Option<Stored>, ApiError> {
        let deadline = deadline();
        loop {
            let last = self.ask(Which::Last(&self.subject), deadline).await?;
            let sequence = last.as_ref().map_or(0, |last| last.sequence);
            if sequence >= self.at_least {
                return Ok(last);
            }
            // What we know of has expired, or the one who answered is behind.
            if self.api.info().await.is_ok_and(|info| info.last_sequence >= self.at_least) {
                return self.ask(Which::Last(&self.subject), deadline).await;
            }
            if Instant::now() >= deadline {
                return Err(ApiError::NoAnswer);
            }
            tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
        }
    }

    /// The channel's last mark.
    async fn mark(&self) -> Result<Marked, ApiError> {
        let Some(stored) = self.ask(Which::Last(&self.mark), deadline()).await? else {
            return Ok(Marked::default());
        };
        let Stored { sequence, unix_ms, payload, .. } = stored;
        let Mark { top, cleared } = wire::read(&payload).unwrap_or(Mark { top: 0, cleared: None });
        Ok(Marked { sequence, unix_ms, top, cleared: cleared.unwrap_or(sequence) })
    }

    /// Writes a mark, then removes what it hides but for the last publication.
    pub(super) async fn clear(&self) -> Result<Position, BusError> {
        let unavailable = |_| BusError::Unavailable;
        let (last, mark) = tokio::join!(self.last(), self.mark());
        let last = last.map_err(unavailable)?.map_or(0, |last| last.sequence);
        let top = last.max(mark.map_err(unavailable)?.top);
        if top > 0 {
            let mark = wire::write(&Mark { top, cleared: None });
            let mark = self.api.publish(&self.mark, mark).await.map_err(unavailable)?;
            // The mark hides what they do not remove.
            let _ =
                tokio::join!(self.api.purge(&self.subject, last), self.api.purge(&self.mark, mark.sequence));
        }
        Ok(Position::new(self.epoch, top))
    }

    /// Writes a mark where the channel's position would expire within half of `retention_ms`.
    pub(super) async fn keep(&self, retention_ms: u64) -> Result<(), ApiError> {
        let (last, mark) = tokio::join!(self.last(), self.mark());
        let (last, mark) = (last?, mark?);
        let (sequence, at_ms) = last.map_or((0, 0), |last| (last.sequence, last.unix_ms));
        let top = sequence.max(mark.top);
        let newest_ms = if sequence >= mark.top { at_ms.max(mark.unix_ms) } else { mark.unix_ms };
        let now_ms = unix_ms().saturating_add_signed(self.clock_ahead_ms);
        if top == 0 || newest_ms + retention_ms / 2 > now_ms {
            return Ok(());
        }
        let kept = wire::write(&Mark { top, cleared: Some(mark.cleared) });
        match self.api.publish_after(&self.mark, mark.sequence, kept).await {
            // Another node, or a clearing.
            Ok(_) | Err(ApiError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
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
        if self.may_have_dropped { first - 1 } else { 0 }
    }

    /// The offset after which the query asks for all that there is: it is that of somebody who goes on from there, to
    /// whom nothing before it matters.
    fn goes_on_from(&self, query: &HistoryQuery) -> Option<u64> {
        let since = query.since.filter(|since| since.epoch.is_none_or(|epoch| epoch == self.epoch));
        since.filter(|_| !query.reverse).map(|since| since.offset)
    }

    /// The subject's next messages from a sequence on, oldest first, at most `most`, or as many as come together; none:
    /// there is none.
    async fn run(&self, from: u64, most: usize, deadline: Instant) -> Result<Vec<Stored>, ApiError> {
        if most > 1 && self.runs.are_given() {
            match self.api.run(&self.subject, from, most).await {
                Ok(run) => {
                    if run.is_single {
                        self.runs.were_not_given(RUNS_AGAIN);
                    }
                    if !run.messages.is_empty() {
                        return Ok(run.messages);
                    }
                }
                Err(_) => self.runs.were_not_given(FAILED_RUNS_AGAIN),
            }
        }
        Ok(self.ask(Which::From(&self.subject, from), deadline).await?.into_iter().collect())
    }

    /// What came after the publication at `offset`, if that and all of it are there: then nothing before it matters.
    async fn missed(
        &self,
        last: &Stored,
        offset: u64,
        query: &HistoryQuery,
        keeps: &Keeps<'_>,
    ) -> Result<Option<History>, ApiError> {
        let wanted = self.wanted(keeps.options);
        let deadline = deadline();
        // One more than is asked for says that there are more.
        let most = query.limit as usize + 1;
        let mut kept: Vec<Stored> = Vec::new();
        let (mut next, mut runs) = (offset, 0);
        while next <= last.sequence && kept.len() < most {
            if Instant::now() >= deadline {
                return Err(ApiError::NoAnswer);
            }
            let run = self.run(next, most + 1 - kept.len(), deadline).await?;
            runs += 1;
            let Some(newest) = run.last().map(|newest| newest.sequence) else { return Ok(None) };
            let mut run = run.into_iter();
            if next == offset && run.next().is_none_or(|first| first.sequence != offset) {
                return Ok(None);
            }
            next = newest + 1;
            let before = kept.len();
            kept.extend(run.filter(|entry| entry.sequence <= last.sequence));
            if kept.len() > wanted || !kept[before..].iter().all(|entry| keeps.keeps(entry)) {
                return Ok(None);
            }
        }
        if runs > 1 && self.first_from(offset, deadline).await? != Some(offset) {
            return Ok(None);
        }
        Ok(Some(History { top: last.sequence.max(keeps.marked), floor: offset, kept }))
    }

    /// The sequence of the subject's first message from a sequence on, by the leader. Messages go oldest first: where what
    /// was read lay at several moments, what is still there was there at all of them, and nothing between is missing.
    async fn first_from(&self, from: u64, deadline: Instant) -> Result<Option<u64>, ApiError> {
        Ok(self.ask(Which::From(&self.subject, from), deadline).await?.map(|first| first.sequence))
    }

    /// Publications kept of a channel at most.
    fn wanted(&self, options: &ChannelOptions) -> usize {
        (options.history_size as usize).min(self.per_subject_max - 1).max(1)
    }

    /// Walks back from the last message until the history's end is found, or as much as is asked for from its newest on.
    async fn history(
        &self,
        last: Stored,
        query: &HistoryQuery,
        keeps: &Keeps<'_>,
    ) -> Result<History, ApiError> {
        let deadline = deadline();
        let top = last.sequence.max(keeps.marked);
        let mut wanted = self.wanted(keeps.options);
        if query.reverse && query.since.is_none() {
            // One more says that there are more.
            wanted = wanted.min(query.limit as usize + 1);
        }
        // The newest; beyond them one that is not kept, which gives the floor.
        let (mut entries, mut runs) = (vec![last], 0);
        let mut width = match self.runs.are_given() && self.per_subject_max <= 2 * wanted + RUN_MIN {
            true => u64::MAX,
            false => 4 * wanted as u64,
        };
        loop {
            let oldest = entries[0].sequence;
            let from = oldest.saturating_sub(width);
            let (mut before, count) = self.walk(from, oldest, wanted + 2, deadline).await?;
            runs += count;
            // Now it comes with how many are behind it.
            if before.last().is_some_and(|entry| entry.sequence == oldest) {
                entries.remove(0);
            }
            before.append(&mut entries);
            entries = before;
            let found = entries.iter().take_while(|entry| entry.sequence < oldest).count();
            if let Some(mut history) = settled(top, &mut entries, wanted, keeps) {
                if runs > 1 {
                    history.forget_below(self.first_from(1, deadline).await?);
                }
                return Ok(history);
            }
            if from <= 1 {
                return self.whole(top, entries, deadline).await;
            }
            width = next_width(width, found, wanted.saturating_sub(entries.len()));
        }
    }

    /// All that the subject has, down to its first message, where that is less than the history's size.
    async fn whole(&self, top: u64, entries: Vec<Stored>, deadline: Instant) -> Result<History, ApiError> {
        let (oldest, newest) = (&entries[0], entries[entries.len() - 1].sequence);
        let (first, mark) = tokio::join!(self.first_from(1, deadline), self.mark());
        let (first, mark) = (first?, mark?);
        let top = top.max(mark.top);
        if mark.cleared > newest {
            // Meanwhile.
            return Ok(History { top, floor: top, kept: Vec::new() });
        }
        // How many it had: as many as the stream keeps at most, if it dropped some.
        let most = match oldest.behind {
            Some(behind) => behind + 1,
            None => {
                let last = self.ask(Which::Last(&self.subject), deadline).await?;
                entries.len() as u64 + last.map_or(0, |last| last.sequence.saturating_sub(newest))
            }
        };
        let is_trimmed = most >= self.per_subject_max as u64 || first != Some(oldest.sequence);
        let floor = match oldest.sequence {
            first if is_trimmed => first - 1,
            first if (1..first).contains(&mark.top) => mark.top,
            first => self.floor_of(first),
        };
        let mut history = History { top, floor, kept: entries };
        history.forget_below(first);
        Ok(history)
    }

    /// The last `most` of the subject's messages of `from..=to`, oldest first, and in how many runs they were read.
    async fn walk(
        &self,
        from: u64,
        to: u64,
        most: usize,
        deadline: Instant,
    ) -> Result<(Vec<Stored>, usize), ApiError> {
        let mut entries = VecDeque::new();
        let (mut next, mut runs) = (from, 0);
        while next < to {
            let run = self.run(next, usize::MAX, deadline).await?;
            runs += 1;
            let Some(newest) = run.last() else { break };
            next = newest.sequence + 1;
            entries.extend(run.into_iter().filter(|entry| entry.sequence <= to));
            entries.drain(..entries.len().saturating_sub(most));
            if Instant::now() >= deadline {
                return Err(ApiError::NoAnswer);
            }
        }
        Ok((entries.into(), runs))
    }
}

impl History {
    /// Leaves out what is no longer there, for behind it there may be a hole: `first` is the sequence of the subject's first
    /// message now, if it has any.
    fn forget_below(&mut self, first: Option<u64>) {
        let first = first.unwrap_or(u64::MAX);
        let gone = self.kept.iter().take_while(|entry| entry.sequence < first).count();
        if gone > 0 {
            self.kept.drain(..gone);
            self.floor = self.kept.first().map_or(self.top, |entry| entry.sequence - 1);
        }
    }
}

/// What of a channel is history.
struct Keeps<'a> {
    /// What has a lower sequence is cleared.
    cleared: u64,
    /// The last publication before the last mark; 0: none.
    marked: u64,
    /// Now, by the server's clock.
    now_ms: u64,
    options: &'a ChannelOptions,
}

impl Keeps<'_> {
    /// Whether a message is, its place among the newest apart.
    fn keeps(&self, entry: &Stored) -> bool {
        let ends_ms = entry.unix_ms.saturating_add(self.options.history_ttl_ms);
        entry.sequence >= self.cleared && ends_ms > self.now_ms
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
