//! Limits of what a node keeps of a partition.

use ringmain_proto::message::Publication;
use ringmain_proto::record::records;

use super::*;
use crate::types::Since;

const GENERATION: Generation = Generation { number: 1, nonce: 7 };
const LIMITS: LogLimits =
    LogLimits { bytes_max: 1 << 20, channels_max: 100, ids_max: 4, ids_window_ms: 1_000 };
const ROOM: ChannelOptions = ChannelOptions { history_size: 5, history_ttl_ms: 1_000, meta_ttl_ms: 60_000 };
const ALL: HistoryQuery = HistoryQuery { since: None, limit: 1_000, reverse: false };

/// A log whose offsets begin at `first`, in its first generation.
struct Writer {
    log: PartitionLog,
    next: i64,
    time_ms: i64,
}

impl Writer {
    fn new(limits: LogLimits, first: i64) -> Writer {
        let mut writer = Writer { log: PartitionLog::new(limits), next: first, time_ms: 0 };
        let fence = Body::Fence { from: 0, next: GENERATION };
        assert_eq!(writer.write(Generation::NONE, fence), Applied::Fenced);
        writer
    }

    fn write(&mut self, generation: Generation, body: Body<'_>) -> Applied {
        let stamp = Stamp { generation, node: 1, sequence: self.next.cast_unsigned() };
        let applied = self.log.apply(0, self.next, self.time_ms, Some((stamp, body))).expect("no hole");
        self.next += 1;
        applied
    }

    fn publish(&mut self, channel: &str, id: Option<OwnedId>) -> Accepted {
        self.publish_bytes(channel, id, 10)
    }

    fn publish_bytes(&mut self, channel: &str, id: Option<OwnedId>, bytes: usize) -> Accepted {
        let mut record = Vec::new();
        Publication { data: &vec![b'x'; bytes], ..Publication::default() }.write_record(&mut record);
        let body = Body::Publication { channel, id, options: ROOM, record: record.into() };
        match self.write(GENERATION, body) {
            Applied::Publication { accepted, .. } => accepted,
            other => panic!("{other:?}"),
        }
    }

    /// Offsets kept, and how far back they reach.
    fn kept(&mut self, channel: &str) -> (Vec<u64>, u64) {
        let page = self.log.read(0, channel, &ROOM, &ALL).expect("no epoch was claimed");
        (records(&page.records).map(|publication| publication.offset).collect(), page.page.floor)
    }
}

#[test]
fn a_hole_is_none_of_ours_to_guess() {
    let mut writer = Writer::new(LIMITS, 0);
    writer.publish("a", None);
    let last = writer.log.last();
    assert_eq!(writer.log.apply(0, writer.next + 1, 0, None), Err(Hole));
    assert_eq!(writer.log.last(), last);
    assert_eq!(
        writer.log.apply(0, writer.next, 0, None),
        Ok(Applied::Nothing),
        "what is not ours is passed over"
    );
}

#[test]
fn the_oldest_goes_when_memory_is_full() {
    let record_bytes = ringmain_proto::record::RECORD_HEADER_BYTES + 10;
    let mut writer = Writer::new(LogLimits { bytes_max: 4 * record_bytes, ..LIMITS }, 0);
    let offsets: Vec<u64> =
        ["a", "b", "a", "b"].iter().map(|channel| writer.publish(channel, None).position.offset).collect();
    assert_eq!(writer.kept("a"), (vec![offsets[0], offsets[2]], 0), "at the limit");
    let last = writer.publish("b", None).position.offset;
    assert_eq!(writer.kept("a"), (vec![offsets[2]], offsets[0]), "above it");
    assert_eq!(writer.kept("b"), (vec![offsets[1], offsets[3], last], 0));
    // Larger than all that may be kept: nothing is.
    writer.publish_bytes("a", None, 5 * record_bytes);
    assert_eq!((writer.kept("a").0.len(), writer.kept("b").0.len()), (0, 0));
    assert_eq!((writer.log.kept_bytes, writer.log.kept_count), (0, 0));
}

#[test]
fn names_of_what_is_gone_do_not_pile_up() {
    let mut writer = Writer::new(LIMITS, 0);
    for _ in 0..10_000 {
        writer.publish("a", None);
    }
    assert_eq!(writer.log.kept_count, ROOM.history_size as usize);
    assert!(writer.log.kept.len() <= 2 * writer.log.kept_count + 1024 + 1, "{}", writer.log.kept.len());
}

#[test]
fn ids_are_forgotten_by_number_and_by_time() {
    let key = |n: usize| Some(OwnedId::Key(format!("key {n}").into()));
    let mut writer = Writer::new(LIMITS, 0);
    let first = writer.publish("a", key(0));
    (1..LIMITS.ids_max).for_each(|n| assert!(!writer.publish("a", key(n)).repeated));
    // Ids of nodes do not push out keys.
    (0..10).for_each(|n| assert!(!writer.publish("a", Some(OwnedId::Node(1, n))).repeated));
    assert!(writer.publish("a", key(0)).repeated, "as many as are remembered");
    assert!(!writer.publish("b", key(1)).repeated, "another channel's key is another, and one too many");
    assert!(writer.publish("a", key(1)).repeated);
    let again = writer.publish("a", key(0));
    assert!(!again.repeated && again.position.offset > first.position.offset);

    let mut writer = Writer::new(LIMITS, 0);
    writer.publish("a", key(0));
    writer.time_ms = LIMITS.ids_window_ms.cast_signed() - 1;
    assert!(writer.publish("a", key(0)).repeated);
    writer.time_ms += 1;
    assert!(!writer.publish("a", key(0)).repeated);
}

#[test]
fn a_forgotten_channel_stands_no_lower_than_before() {
    let mut writer = Writer::new(LogLimits { channels_max: 3, ..LIMITS }, 0);
    let held: Arc<str> = "held".into();
    writer.log.pin(&held, true);
    let top = writer.publish("a", None).position;
    writer.publish("b", None);
    assert_eq!(writer.log.position("a"), top);
    for n in 0..5 {
        writer.publish(&format!("c{n}"), None);
    }
    assert_eq!(writer.log.streams.len(), 3);
    assert_eq!(writer.log.position("held").offset, 0, "subscribed here");
    let forgotten = writer.log.position("a");
    assert!(forgotten.offset >= top.offset, "{forgotten:?}");
    let (kept, floor) = writer.kept("a");
    assert_eq!((kept.len(), floor), (0, forgotten.offset), "so that nobody counts on what is not known");
}

#[test]
fn history_ends_with_its_time_by_the_clock_of_the_log() {
    let mut writer = Writer::new(LIMITS, 0);
    writer.time_ms = 1_700_000_000_000;
    let top = writer.publish("a", None).position;
    let kept = |log: &mut PartitionLog, now_ms| {
        let page = log.read(now_ms, "a", &ROOM, &ALL).expect("no epoch was claimed");
        (page.records.len(), page.page.top, page.page.floor)
    };
    assert!(kept(&mut writer.log, ROOM.history_ttl_ms - 1).0 > 0);
    assert_eq!(kept(&mut writer.log, ROOM.history_ttl_ms), (0, top, top.offset));
}

#[test]
fn where_reading_began_is_the_base() {
    let mut writer = Writer::new(LIMITS, 500);
    assert_eq!(writer.log.position("a").offset, 500);
    let first = writer.publish("a", None);
    assert_eq!(first.position.offset, 502);
    assert_eq!(writer.kept("a"), (vec![502], 500));
    let since = Some(Since { offset: 0, epoch: None });
    let page = writer.log.read(0, "a", &ROOM, &HistoryQuery { since, ..ALL }).expect("not compared");
    assert_eq!(page.page.floor, 500, "a position below is not recoverable");
}

#[test]
fn reading_that_began_before_a_fence_it_cannot_judge_starts_at_the_next_generation() {
    let mut log = PartitionLog::new(LIMITS);
    let write = |log: &mut PartitionLog, offset, generation, body| {
        let stamp = Stamp { generation, node: 1, sequence: 1 };
        log.apply(0, offset, 0, Some((stamp, body))).expect("no hole")
    };
    let publication = || Body::Publication { channel: "a", id: None, options: ROOM, record: Bytes::new() };
    let next = Generation { number: 2, nonce: 9 };
    // Written for the first generation behind the fence, which is below what is read here.
    write(&mut log, 50, GENERATION, publication());
    assert_eq!(log.position("a").offset, 51);
    assert_eq!(write(&mut log, 51, next, Body::Mark), Applied::Nothing);
    assert_eq!((log.generation(), log.position("a").offset), (next, 51));
    assert_eq!(log.read(0, "a", &ROOM, &ALL).unwrap().page.floor, 51);
    assert_eq!(write(&mut log, 52, GENERATION, publication()), Applied::Stale);
    let fence = |from, number| Body::Fence { from, next: Generation { number, nonce: 11 } };
    assert_eq!(write(&mut log, 53, next, fence(7, 3)), Applied::Stale, "it follows another");
    assert_eq!(write(&mut log, 54, next, fence(9, 4)), Applied::Stale, "it skips one");
    assert_eq!(write(&mut log, 55, next, fence(9, 3)), Applied::Fenced);
    assert_eq!(write(&mut log, 56, next, fence(9, 3)), Applied::Stale, "somebody else was first");
}
