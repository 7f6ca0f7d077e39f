//! Reads of ports, joined: of one channel at most one is under way, and those that come meanwhile are asked together
//! in the next. So ten thousand clients that recover one channel cost the broker two reads.
//!
//! Owns: who waits for which read, and cutting a page for each. Must not know: calls, deadlines.
//! Invariant: a reader's page was read after it asked (P8): nobody joins a read that was sent before.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use ringmain_proto::record::{record_offset, record_total};

use crate::backend::{ReadPage, Target};
use crate::epoch::Position;
use crate::link::{End, Told};
use crate::types::{BusError, HistoryQuery, Page, Since, Token};

/// A read that a port waits for.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) port: usize,
    pub(super) token: Token,
    pub(super) query: HistoryQuery,
}

/// The reads of one channel.
#[derive(Debug)]
struct Joined {
    target: Target,
    /// Whom the read under way is for, and whether it is wider than what each asked for.
    under_way: Vec<Waiter>,
    is_wide: bool,
    next: Vec<Waiter>,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Reads {
    channels: HashMap<Arc<str>, Joined>,
}

/// Whether a query can be answered from a wider one.
fn can_join(query: &HistoryQuery) -> bool {
    !query.reverse
}

/// One query that holds what all ask for. The limit is the channel's: what is kept is no more.
fn wider(waiters: &[Waiter], target: &Target) -> HistoryQuery {
    let all_since = waiters.iter().all(|waiter| waiter.query.since.is_some());
    let offset = waiters.iter().filter_map(|waiter| waiter.query.since).map(|since| since.offset).min();
    HistoryQuery {
        since: offset.filter(|_| all_since).map(|offset| Since { offset, epoch: None }),
        // Room for what comes between the trimming and the read.
        limit: target.options.history_size.saturating_mul(2),
        reverse: false,
    }
}

impl Reads {
    /// A port asks. What is to be sent now, if anything.
    pub(super) fn ask(&mut self, target: Target, waiter: Waiter) -> Option<(Target, HistoryQuery)> {
        if let Some(joined) = self.channels.get_mut(&target.name) {
            joined.target.options = target.options;
            joined.next.push(waiter);
            return None;
        }
        let query = waiter.query;
        let joined =
            Joined { target: target.clone(), under_way: vec![waiter], is_wide: false, next: Vec::new() };
        self.channels.insert(target.name.clone(), joined);
        Some((target, query))
    }

    /// The read under way was answered, or given up: tells those it was for, and gives what is to be sent next.
    pub(super) fn answered(
        &mut self,
        name: &Arc<str>,
        result: &Result<ReadPage, BusError>,
        ends: &mut [End],
    ) -> Option<(Target, HistoryQuery)> {
        let joined = self.channels.get_mut(name)?;
        let waiters = std::mem::take(&mut joined.under_way);
        let shared = result.as_ref().ok().map(|read| Bytes::copy_from_slice(&read.records));
        for waiter in waiters {
            let (result, records) = match (result, &shared) {
                (Ok(read), Some(records)) if joined.is_wide => cut(&waiter.query, read, records),
                (Ok(read), Some(records)) => (Ok(read.page), records.clone()),
                (Err(error), _) => (Err(*error), Bytes::new()),
                (Ok(_), None) => continue,
            };
            super::tell(ends, waiter.port, Told::Read { token: waiter.token, result, records });
        }
        if joined.next.is_empty() {
            self.channels.remove(name);
            return None;
        }
        let waits = std::mem::take(&mut joined.next);
        let (mut now, later): (Vec<Waiter>, Vec<Waiter>) =
            waits.into_iter().partition(|waiter| can_join(&waiter.query));
        joined.next = later;
        if now.is_empty() {
            now.push(joined.next.remove(0));
        }
        joined.is_wide = now.len() > 1;
        let query = if joined.is_wide { wider(&now, &joined.target) } else { now[0].query };
        joined.under_way = now;
        Some((joined.target.clone(), query))
    }
}

/// One reader's page out of a wider one.
fn cut(query: &HistoryQuery, read: &ReadPage, records: &Bytes) -> (Result<Page, BusError>, Bytes) {
    let page = read.page;
    if let Some(claimed) = query.since.and_then(|since| since.epoch)
        && claimed != page.top.epoch
    {
        let offset = query.since.map_or(0, |since| since.offset);
        if read.lineage.left_at(claimed).is_none_or(|branch| offset > branch) {
            let current: Position = page.top;
            return (Err(BusError::UnrecoverableEpoch { current }), Bytes::new());
        }
    }
    let after = query.since.map_or(0, |since| since.offset);
    let (mut start, mut end, mut count) = (0, 0, 0);
    let mut more = page.more;
    while let (Some(total), Some(offset)) = (record_total(&records[end..]), record_offset(&records[end..])) {
        if offset > after || query.since.is_none() {
            if count == query.limit {
                more = true;
                break;
            }
            count += 1;
        } else {
            start = end + total;
        }
        end += total;
    }
    (Ok(Page { more, ..page }), records.slice(start.min(end)..end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epoch;
    use crate::lineage::{Branch, Lineage};
    use ringmain_proto::message::Publication;
    use ringmain_proto::record::records;

    fn read() -> ReadPage {
        let mut page = Vec::new();
        for offset in [11, 13, 15] {
            Publication { offset, data: b"x", ..Publication::default() }.write_record(&mut page);
        }
        let mut lineage = Lineage::EMPTY;
        lineage.push(Branch { epoch: Epoch::new(1), top: 13 });
        let top = Position::new(Epoch::new(2), 15);
        ReadPage { page: Page { top, floor: 10, more: false }, lineage, records: page }
    }

    fn check(since: Option<(u64, Option<u64>)>, limit: u32, expected: Result<(&[u64], bool), ()>) {
        let since = since.map(|(offset, epoch)| Since { offset, epoch: epoch.map(Epoch::new) });
        let query = HistoryQuery { since, limit, reverse: false };
        let read = read();
        let (page, cut) = cut(&query, &read, &Bytes::copy_from_slice(&read.records));
        let offsets: Vec<u64> = records(&cut).map(|publication| publication.offset).collect();
        let got = page.as_ref().map(|page| (&offsets[..], page.more)).map_err(|_| ());
        assert_eq!(got, expected, "{query:?}");
    }

    #[test]
    fn each_reader_gets_its_page() {
        check(None, 10, Ok((&[11, 13, 15], false)));
        check(None, 2, Ok((&[11, 13], true)));
        check(None, 0, Ok((&[], true)));
        check(Some((11, None)), 10, Ok((&[13, 15], false)));
        check(Some((12, Some(2))), 1, Ok((&[13], true)));
        check(Some((15, None)), 0, Ok((&[], false)));
        check(Some((99, None)), 5, Ok((&[], false)));
        check(Some((13, Some(1))), 5, Ok((&[15], false)));
        check(Some((14, Some(1))), 5, Err(()));
        check(Some((11, Some(9))), 5, Err(()));
    }

    fn waiter(token: u64, reverse: bool, offset: u64) -> Waiter {
        let since = Some(Since { offset, epoch: None });
        Waiter { port: 0, token: Token(token), query: HistoryQuery { since, limit: 5, reverse } }
    }

    #[test]
    fn what_comes_during_a_read_is_asked_together() {
        let options = crate::types::ChannelOptions { history_size: 10, history_ttl_ms: 1, meta_ttl_ms: 1 };
        let target = Target { name: "room:a".into(), options };
        let mut reads = Reads::default();
        assert_eq!(reads.ask(target.clone(), waiter(1, false, 7)).unwrap().1.since.unwrap().offset, 7);
        for (token, reverse, offset) in [(2, false, 9), (3, true, 3), (4, false, 5)] {
            assert!(reads.ask(target.clone(), waiter(token, reverse, offset)).is_none());
        }
        let (_, joined) = reads.answered(&target.name, &Ok(read()), &mut []).unwrap();
        assert_eq!((joined.since.unwrap().offset, joined.limit, joined.reverse), (5, 20, false));
        let (_, reversed) = reads.answered(&target.name, &Ok(read()), &mut []).unwrap();
        assert!(reversed.reverse);
        assert!(reads.answered(&target.name, &Ok(read()), &mut []).is_none());
        assert!(reads.channels.is_empty());
    }
}
