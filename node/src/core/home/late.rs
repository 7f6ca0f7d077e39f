//! Recoveries that a broker answers late.
//!
//! Owns what arrives in a channel while the history for a subscriber is being read, and who waits for it. It
//! must not know how a recovery is judged: that is [`super::subscribe`]'s.
//!
//! The page that comes back is of another moment than the channel here. It may reach beyond what has arrived:
//! then the subscriber waits until that has arrived too, for what it is told later must follow its page. It may
//! end below: then what arrived meanwhile is put behind it. Invariant: a subscriber's page ends where the
//! channel stands when it is answered.

use ringmain_bus::{BusError, Page, Position};
use ringmain_proto::record::{record_offset, record_total, records};
use ringmain_proto::time::Now;

use super::waiters::Waiter;
use super::{PageRead, bus_error};
use crate::core::engine::ShardIndex;
use crate::core::mesh::SubscribeAtHome;
use crate::core::shard::Core;

/// Bytes of arrivals kept for the recoveries of one channel. Beyond them these are not recovered, and say so.
const KEPT_BYTES_MAX: usize = 1024 * 1024;

/// How often a recovery is read again whose channel has moved to another position meanwhile.
const READS_MAX: u8 = 3;

/// A subscriber that recovers, and what it asked under.
#[derive(Debug)]
pub(super) struct Recovery {
    pub(super) index: u32,
    pub(super) from: ShardIndex,
    pub(super) request: Box<SubscribeAtHome>,
    /// Jumps of the channel that it knows of.
    jumps: u32,
    reads: u8,
}

/// What is kept for the recoveries of one channel.
#[derive(Debug, Default)]
pub(super) struct Late {
    /// Recoveries whose page has not come, or waits below.
    count: u32,
    /// Arrivals since the first of them asked.
    records: Vec<u8>,
    overrun: bool,
    jumps: u32,
    /// Pages that reach beyond what has arrived.
    ahead: Vec<(Recovery, Page, PageRead)>,
}

impl Core {
    /// The history for a subscriber was asked for; the answer comes under this token.
    pub(super) fn await_recovery(
        &mut self,
        token: u64,
        index: u32,
        from: ShardIndex,
        request: Box<SubscribeAtHome>,
        reads: u8,
    ) {
        let late = self.waiters.late.entry(index).or_default();
        late.count += 1;
        let recovery = Recovery { index, from, request, jumps: late.jumps, reads };
        self.waiters.waiting.insert(token, Waiter::Subscribe(recovery));
    }

    /// The page for a subscriber came.
    pub(super) fn recovery_read(
        &mut self,
        recovery: Recovery,
        result: Result<Page, BusError>,
        bytes: Vec<u8>,
        now: Now,
    ) {
        let mut read = PageRead { records: bytes, ..PageRead::default() };
        for publication in records(&read.records) {
            read.count += 1;
            read.last = publication.offset;
        }
        let channel = self.channels.get(recovery.index);
        let (epoch, top) = (channel.epoch, channel.top);
        let late = self.waiters.late.entry(recovery.index).or_default();
        match result {
            Ok(page) if recovery.jumps != late.jumps || page.top.epoch.get() != epoch => {
                self.recovery_jumped(recovery, page, now);
            }
            Ok(page) if page.top.offset > top => late.ahead.push((recovery, page, read)),
            result => self.end_recovery(recovery, result, read, now),
        }
    }

    /// The channel went on elsewhere while the page was read: it is read again, or is none.
    fn recovery_jumped(&mut self, recovery: Recovery, page: Page, now: Now) {
        let Recovery { index, from, request, reads, .. } = recovery;
        self.release_recovery(index);
        if reads < READS_MAX {
            return self.subscribe_opened(index, from, request, reads + 1, now);
        }
        let unknown = Err(BusError::UnrecoverableEpoch { current: page.top });
        self.recovered(index, from, request, unknown, PageRead::default(), now);
    }

    /// Answers a subscriber: its page, and what has arrived behind it.
    fn end_recovery(
        &mut self,
        recovery: Recovery,
        result: Result<Page, BusError>,
        mut read: PageRead,
        now: Now,
    ) {
        let Recovery { index, from, request, .. } = recovery;
        let channel = self.channels.get(index);
        let top = channel.top;
        let late = self.waiters.late.entry(index).or_default();
        let result = match result {
            Ok(page) if page.top.offset < top && late.overrun => {
                Err(BusError::UnrecoverableEpoch { current: page.top })
            }
            Ok(page) => {
                append_above(&mut read, &late.records, page.top.offset, request.cache);
                Ok(Page { top: Position::new(page.top.epoch, top), ..page })
            }
            error => error,
        };
        self.release_recovery(index);
        self.recovered(index, from, request, result, read, now);
    }

    fn release_recovery(&mut self, index: u32) {
        let Some(late) = self.waiters.late.get_mut(&index) else { return };
        late.count -= 1;
        if late.count == 0 {
            self.waiters.late.remove(&index);
        }
    }

    /// A publication arrived and was delivered: it is kept for pages that end below it, and those that reach up
    /// to it are complete.
    pub(super) fn arrived_late(&mut self, index: u32, record: &[u8], now: Now) {
        let Some(late) = self.waiters.late.get_mut(&index) else { return };
        if late.records.len() + record.len() > KEPT_BYTES_MAX {
            late.overrun = true;
            late.records = Vec::new();
        }
        if !late.overrun {
            late.records.extend_from_slice(record);
        }
        let top = self.channels.get(index).top;
        let late = self.waiters.late.get_mut(&index).expect("it was there");
        let complete: Vec<_> = late.ahead.extract_if(.., |(_, page, _)| page.top.offset <= top).collect();
        for (recovery, page, read) in complete {
            self.end_recovery(recovery, Ok(page), read, now);
        }
    }

    /// The channel's position jumped: pages from before say nothing any more.
    pub(super) fn recoveries_jumped(&mut self, index: u32, now: Now) {
        let Some(late) = self.waiters.late.get_mut(&index) else { return };
        late.jumps += 1;
        late.records.clear();
        late.overrun = false;
        for (recovery, page, _) in std::mem::take(&mut late.ahead) {
            self.recovery_jumped(recovery, page, now);
        }
    }

    /// The broker is lost: nobody waits for what may not arrive for long.
    pub(super) fn refuse_recoveries(&mut self, now: Now) {
        let waiting: Vec<_> =
            self.waiters.late.values_mut().flat_map(|late| std::mem::take(&mut late.ahead)).collect();
        for (recovery, ..) in waiting {
            let Recovery { index, from, request, .. } = recovery;
            self.release_recovery(index);
            self.refuse_opened(index, from, request, bus_error(BusError::Unavailable), now);
        }
    }
}

/// Puts the records above `top` behind a page; of a cache only the newest is wanted.
fn append_above(read: &mut PageRead, kept: &[u8], top: u64, newest_only: bool) {
    let mut rest = kept;
    while let (Some(total), Some(offset)) = (record_total(rest), record_offset(rest)) {
        if offset > top {
            if newest_only {
                read.records.clear();
                read.count = 0;
            }
            read.records.extend_from_slice(&rest[..total]);
            read.count += 1;
            read.last = offset;
        }
        rest = &rest[total..];
    }
}
