//! Clauses C1 to C7 without faults.

use ringmain_proto::record::RECORD_HEADER_BYTES;

use crate::suite::ephemeral::EPHEMERAL;
use crate::suite::stream::{ALL, ROOM};
use crate::suite::{Cluster, Probe};
use crate::types::{HistoryQuery, IDEMPOTENCY_KEY_BYTES_MAX, PublicationId, PublishError};

/// How long a test listens for what must not come, in milliseconds.
const LISTEN_MS: u64 = 300;

/// C1: commands of every kind at once; the probe takes one answer for each.
pub fn c1_every_command_is_answered_once(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let nodes = probe.last() + 1;
    for round in 0..5 {
        let name = probe.name(&format!("c1-{round}"));
        for node in 0..nodes {
            let _ = probe.send_open(node, &name, &ROOM);
            let _ = probe.send_publish(node, &name, &ROOM);
            let _ = probe.send_read(node, &name, &ROOM, &ALL);
            let _ = probe.send_clear(node, &name, &ROOM);
            let _ = probe.send_read(node, &name, &ROOM, &HistoryQuery::TOP);
        }
    }
    probe.settle_answers();
    probe.run_for(LISTEN_MS);
}

/// C4: a record as large as the limit, and one byte more.
pub fn c4_a_publication_at_the_limit_is_taken_and_above_it_refused(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, bytes_max) = (probe.name("c4-size"), probe.cluster.record_bytes_max());
    for (bytes, expected) in
        [(bytes_max, None), (bytes_max + 1, Some(PublishError::TooLarge { bytes: bytes_max + 1, bytes_max }))]
    {
        let number = probe.data(0, &name);
        let padding = bytes - RECORD_HEADER_BYTES - number.len();
        let (place, count) = number.rsplit_once('/').expect("data has parts");
        let data = format!("{place}{}/{count}", "x".repeat(padding));
        let id = PublicationId::Key(if expected.is_none() { "at" } else { "above" });
        let token = probe.send_publish_as(0, &name, &ROOM, id, &data);
        assert_eq!(probe.published(0, token).err(), expected);
    }
    assert_eq!(probe.read(0, &name, &ROOM, &ALL).expect("no error").1.len(), 1);
}

/// C4: a key as long as the limit, and one byte more.
pub fn c4_a_key_at_the_limit_is_taken_and_above_it_refused(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let name = probe.name("c4-key");
    let bytes = IDEMPOTENCY_KEY_BYTES_MAX;
    let longest = "k".repeat(bytes);
    assert!(!probe.publish_key(0, &name, &ROOM, &longest).expect("at the limit").repeated);
    assert!(probe.publish_key(0, &name, &ROOM, &longest).expect("at the limit").repeated);
    let longer = "k".repeat(bytes + 1);
    let refused = probe.publish_key(0, &name, &ROOM, &longer);
    assert_eq!(refused, Err(PublishError::KeyTooLong { bytes: bytes + 1 }));
}

/// C5: after close nothing is told, whatever is on its way; the probe fails at any event.
pub fn c5_a_closed_channel_is_quiet(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    for options in [ROOM, EPHEMERAL] {
        let name = probe.name(&format!("c5-{}", options.history_size));
        probe.open(last, &name, &options);
        for _ in 0..5 {
            let _ = probe.send_publish(0, &name, &options);
        }
        probe.close(last, &name);
        for _ in 0..5 {
            let _ = probe.send_publish(0, &name, &options);
        }
        probe.settle_answers();
        probe.run_for(LISTEN_MS);
        // Open again: from here on, and from nowhere before.
        probe.open(last, &name, &options);
        let data = probe.data(0, &name);
        probe.publish(0, &name, &options);
        probe.settle("an arrival", |probe| probe.arrivals(last, &name) == [data.as_str()]);
    }
}

/// C5: what is on its way to a forgotten channel does not come to the next one under its id; the probe
/// compares every arrival's name with the channel's.
pub fn c5_an_id_given_to_another_channel_is_that_channel(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    let mut old = probe.name("c5-life-0");
    probe.open(last, &old, &ROOM);
    for life in 1..6 {
        for _ in 0..3 {
            let _ = probe.send_publish(0, &old, &ROOM);
        }
        probe.forget(last, &old);
        let new = probe.name(&format!("c5-life-{life}"));
        probe.open(last, &new, &ROOM);
        let data = probe.data(0, &new);
        probe.publish(0, &new, &ROOM);
        probe.settle("its own arrival", |probe| probe.arrivals(last, &new) == [data.as_str()]);
        old = new;
    }
}

/// C6: a publisher that has the channel open gets its own publication once, however it is answered.
pub fn c6_ones_own_publication_comes_once(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    for options in [ROOM, EPHEMERAL] {
        let name = probe.name(&format!("c6-{}", options.history_size));
        probe.open(0, &name, &options);
        let mut expected = Vec::new();
        for _ in 0..5 {
            expected.push(probe.data(0, &name));
            probe.publish(0, &name, &options);
        }
        probe.settle("its own publications", |probe| probe.arrivals(0, &name).len() >= 5);
        probe.run_for(LISTEN_MS);
        assert_eq!(probe.arrivals(0, &name), expected);
    }
}

/// C7: publish, read and clear on channels that nobody has opened; the first gives the epoch.
pub fn c7_commands_need_no_open(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    let (published, read, cleared) = (probe.name("c7-p"), probe.name("c7-r"), probe.name("c7-c"));
    let by_publish = probe.publish(0, &published, &ROOM).position;
    let by_read = probe.top(0, &read, &ROOM);
    let by_clear = probe.clear(0, &cleared, &ROOM);
    assert_eq!((by_read.offset, by_clear.offset), (0, 0));
    for (name, position) in [(published, by_publish), (read, by_read), (cleared, by_clear)] {
        assert!(!position.epoch.is_none());
        assert_eq!(probe.top(last, &name, &ROOM), position);
        assert_eq!(probe.open(last, &name, &ROOM), position);
    }
}

/// C7: open is answered as often as it is called; one close ends it.
pub fn c7_opening_twice_answers_twice_and_closes_once(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("c7-twice"), probe.last());
    let _ = probe.send_open(last, &name, &ROOM);
    let first = probe.open(last, &name, &ROOM);
    let top = probe.publish(0, &name, &ROOM).position;
    probe.settle("the arrival", |probe| probe.cursor(last, &name) == Some(top));
    assert_eq!(probe.open(last, &name, &ROOM), top);
    assert!(first.offset < top.offset);
    probe.close(last, &name);
    probe.publish(0, &name, &ROOM);
    probe.run_for(LISTEN_MS);
}
