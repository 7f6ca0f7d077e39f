//! Clauses P8 to P12: reading, clearing and keeping history.

use crate::contract::HISTORY_LATE_MS;
use crate::epoch::{Epoch, Position};
use crate::suite::stream::{ALL, ROOM};
use crate::suite::{Cluster, Probe};
use crate::types::{BusError, ChannelOptions, HistoryQuery, Since};

/// Publishes `count` times; the offsets and data, and the last position.
fn fill<C: Cluster>(
    probe: &mut Probe<C>,
    name: &str,
    options: &ChannelOptions,
    count: usize,
) -> (Vec<(u64, String)>, Position) {
    let mut filled = Vec::new();
    let mut top = Position::NONE;
    for _ in 0..count {
        let data = probe.data(0, name);
        top = probe.publish(0, name, options).position;
        filled.push((top.offset, data));
    }
    (filled, top)
}

fn since(offset: u64, epoch: Option<Epoch>) -> Option<Since> {
    Some(Since { offset, epoch })
}

/// P8: since each offset, all that comes after it.
pub fn p8_history_since_gives_all_after_it(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p8"), probe.last());
    let (filled, top) = fill(&mut probe, &name, &ROOM, 6);
    for n in 0..=6 {
        let offset = if n == 0 { 0 } else { filled[n - 1].0 };
        let query = HistoryQuery { since: since(offset, Some(top.epoch)), ..ALL };
        let (page, publications) = probe.read(last, &name, &ROOM, &query).expect("its own epoch");
        assert_eq!(publications, filled[n..], "since {offset}");
        assert_eq!((page.top, page.more), (top, false));
        assert!(page.floor < filled[0].0 || page.floor <= offset, "nothing was trimmed");
    }
}

/// P8: a limit keeps what is nearest to where the read begins, and says that more is kept.
pub fn p8_history_is_limited_at_its_far_end(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p8-limit"), probe.last());
    let (filled, top) = fill(&mut probe, &name, &ROOM, 5);
    for (since, begin) in [(None, 0), (since(filled[1].0, None), 2)] {
        for limit in 0..7u32 {
            let query = HistoryQuery { since, limit, reverse: false };
            let (page, publications) = probe.read(last, &name, &ROOM, &query).expect("no epoch");
            let end = (begin + limit as usize).min(5);
            assert_eq!(publications, filled[begin..end], "{query:?}");
            assert_eq!((page.top, page.more), (top, end < 5), "{query:?}");
        }
    }
}

/// P8: reversed, the newest first, from before `since` back to the oldest.
pub fn p8_history_reversed_goes_back_from_since(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p8-reverse"), probe.last());
    let (filled, top) = fill(&mut probe, &name, &ROOM, 5);
    for (since, end) in
        [(None, 5), (since(filled[3].0, None), 3), (since(filled[0].0, None), 0), (since(0, None), 0)]
    {
        for limit in [0u32, 2, 10] {
            let query = HistoryQuery { since, limit, reverse: true };
            let (page, publications) = probe.read(last, &name, &ROOM, &query).expect("no epoch");
            let expected: Vec<_> = filled[..end].iter().rev().take(limit as usize).cloned().collect();
            assert_eq!(publications, expected, "{query:?}");
            assert_eq!((page.top, page.more), (top, expected.len() < end), "{query:?}");
        }
    }
}

const SMALL: ChannelOptions =
    ChannelOptions { history_size: 3, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };

/// P9: since an offset that is not kept any more, what is left; the floor tells that something is missing.
pub fn p9_history_since_a_trimmed_offset_gives_what_is_left(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p9"), probe.last());
    let (filled, top) = fill(&mut probe, &name, &SMALL, 8);
    for offset in [0, filled[0].0, filled[3].0] {
        let query = HistoryQuery { since: since(offset, Some(top.epoch)), ..ALL };
        let (page, publications) = probe.read(last, &name, &SMALL, &query).expect("no error");
        assert_eq!(publications, filled[5..], "since {offset}");
        assert_eq!(page.top, top);
        assert!(page.floor > offset && page.floor == filled[4].0, "{page:?}");
    }
}

/// P9: since above the top, nothing, and the top tells.
pub fn p9_history_since_above_the_top_gives_nothing(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p9-above"), probe.last());
    let (_, top) = fill(&mut probe, &name, &ROOM, 3);
    for offset in [top.offset, top.offset + 1, u64::from(u32::MAX)] {
        let query = HistoryQuery { since: since(offset, Some(top.epoch)), ..ALL };
        let (page, publications) = probe.read(last, &name, &ROOM, &query).expect("no error");
        assert_eq!((publications.len(), page.top, page.more), (0, top, false), "since {offset}");
    }
}

/// P10: another epoch is an error that carries the position, whatever the offset and direction.
pub fn p10_a_wrong_epoch_is_an_error(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p10"), probe.last());
    let (_, top) = fill(&mut probe, &name, &ROOM, 3);
    for epoch in [Epoch::new(top.epoch.get() ^ 1), Epoch::NONE] {
        for offset in [0, top.offset, top.offset + 5] {
            for reverse in [false, true] {
                let query = HistoryQuery { since: since(offset, Some(epoch)), limit: 10, reverse };
                let answer = probe.read(last, &name, &ROOM, &query);
                assert_eq!(answer, Err(BusError::UnrecoverableEpoch { current: top }), "{query:?}");
            }
        }
    }
}

/// P10: without epoch nothing is compared.
pub fn p10_an_absent_epoch_is_not_compared(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p10-absent"), probe.last());
    let (filled, _) = fill(&mut probe, &name, &ROOM, 3);
    let query = HistoryQuery { since: since(filled[0].0, None), ..ALL };
    let (_, publications) = probe.read(last, &name, &ROOM, &query).expect("not compared");
    assert_eq!(publications, filled[1..]);
}

/// P11: cleared history is empty, its floor is the top, and the stream goes on.
pub fn p11_after_clear_offsets_go_on_in_the_same_epoch(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p11"), probe.last());
    probe.open(last, &name, &ROOM);
    let (_, top) = fill(&mut probe, &name, &ROOM, 4);
    assert_eq!(probe.clear(last, &name, &ROOM), top);
    let (page, publications) = probe.read(0, &name, &ROOM, &ALL).expect("no error");
    assert_eq!((page.top, page.floor, publications.len()), (top, top.offset, 0));
    let query = HistoryQuery { since: since(0, Some(top.epoch)), ..ALL };
    assert_eq!(probe.read(0, &name, &ROOM, &query).expect("the same epoch").1.len(), 0);
    let accepted = probe.publish(0, &name, &ROOM);
    assert_eq!(accepted.position.epoch, top.epoch);
    assert!(accepted.position.offset > top.offset);
    let (page, publications) = probe.read(0, &name, &ROOM, &ALL).expect("no error");
    assert_eq!((page.floor, publications.len()), (top.offset, 1));
    probe.settle_arrivals();
    assert!(!probe.was_told(last, &name) || probe.last() > 0, "an embedded bus misses nothing by a clear");
}

/// P12: not more than the size, and exactly that once there were as many.
pub fn p12_history_keeps_its_size(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p12"), probe.last());
    let mut filled = Vec::new();
    for count in 1..=7usize {
        filled.extend(fill(&mut probe, &name, &SMALL, 1).0);
        let (_, publications) = probe.read(last, &name, &SMALL, &ALL).expect("no error");
        assert_eq!(publications, filled[count.saturating_sub(3)..], "after {count}");
    }
}

/// P12: not longer than the time (and what may be late), and not shorter; the position stays.
pub fn p12_history_keeps_its_time(cluster: impl Cluster) {
    const BRIEF: ChannelOptions =
        ChannelOptions { history_size: 10, history_ttl_ms: 1500, meta_ttl_ms: 120_000 };
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p12-time"), probe.last());
    let published_ms = probe.now_ms();
    let (filled, top) = fill(&mut probe, &name, &BRIEF, 2);
    let (_, publications) = probe.read(last, &name, &BRIEF, &ALL).expect("no error");
    // On a stalled machine the time may be over already; on any other this is what is asked.
    assert!(publications == filled || probe.now_ms() - published_ms >= BRIEF.history_ttl_ms);
    probe.run_for(BRIEF.history_ttl_ms + HISTORY_LATE_MS);
    let (page, publications) = probe.read(last, &name, &BRIEF, &ALL).expect("no error");
    assert_eq!((publications.len(), page.top, page.floor), (0, top, top.offset));
}

/// P12: with history gone by its time, offsets go on where they were.
pub fn p12_the_position_outlives_the_history(cluster: impl Cluster) {
    const BRIEF: ChannelOptions =
        ChannelOptions { history_size: 10, history_ttl_ms: 200, meta_ttl_ms: 120_000 };
    let mut probe = Probe::new(cluster);
    let name = probe.name("p12-meta");
    let (_, top) = fill(&mut probe, &name, &BRIEF, 2);
    probe.run_for(BRIEF.history_ttl_ms + HISTORY_LATE_MS);
    let accepted = probe.publish(0, &name, &BRIEF);
    assert_eq!(accepted.position.epoch, top.epoch);
    assert!(accepted.position.offset > top.offset);
}
