//! Clauses P1 to P7: order, the chain, names, what is kept, idempotency, opening.

use crate::suite::{Answer, Cluster, Probe};
use crate::types::{ChannelOptions, HistoryQuery};

pub(super) const ROOM: ChannelOptions =
    ChannelOptions { history_size: 50, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };

pub(super) const ALL: HistoryQuery = HistoryQuery { since: None, limit: 1000, reverse: false };

/// P1: publications of all nodes, sent without waiting, arrive in one order at all of them.
pub fn p1_all_nodes_see_one_order(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("p1"), probe.last() + 1);
    probe.open_all(&name, &ROOM);
    for _ in 0..10 {
        for node in 0..nodes {
            let _ = probe.send_publish(node, &name, &ROOM);
        }
        probe.run_for(3);
    }
    probe.settle_arrivals();
    let expected: Vec<String> = probe.arrivals(0, &name).into_iter().map(str::to_owned).collect();
    assert_eq!(expected.len(), 10 * nodes);
    for node in 0..nodes {
        assert_eq!(probe.arrivals(node, &name), expected);
        assert!(!probe.was_told(node, &name), "nothing was lost");
    }
}

/// P2: the first arrival's predecessor is the opened position, also in the middle of a stream.
pub fn p2_arrivals_chain_from_the_opened_position(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p2"), probe.last());
    let mut top = probe.publish(0, &name, &ROOM).position;
    for _ in 0..5 {
        top = probe.publish(0, &name, &ROOM).position;
    }
    assert_eq!(probe.open(last, &name, &ROOM), top);
    for _ in 0..5 {
        let accepted = probe.publish(0, &name, &ROOM);
        assert_eq!(accepted.position.epoch, top.epoch);
        assert!(accepted.position.offset > top.offset, "P1");
        assert!(!accepted.repeated);
        top = accepted.position;
    }
    // The probe has checked that each names the one before.
    probe.settle("five arrivals", |probe| probe.arrivals(last, &name).len() == 5);
    assert_eq!(probe.cursor(last, &name), Some(top));
}

/// P3: two channels have two epochs, so a position of one means nothing in the other.
pub fn p3_an_epoch_is_not_shared_by_channels(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (one, other) = (probe.name("p3-one"), probe.name("p3-other"));
    let one = probe.publish(0, &one, &ROOM).position;
    let other = probe.publish(0, &other, &ROOM).position;
    assert!(!one.epoch.is_none() && !other.epoch.is_none());
    assert_ne!(one.epoch, other.epoch);
}

/// P4: every node reads back what was accepted, under its position, in order.
pub fn p4_what_was_accepted_is_read_back(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("p4"), probe.last() + 1);
    let mut expected = Vec::new();
    for n in 0..20 {
        let data = probe.data(n % nodes, &name);
        expected.push((probe.publish(n % nodes, &name, &ROOM).position.offset, data));
    }
    for node in 0..nodes {
        let (page, publications) = probe.read(node, &name, &ROOM, &ALL).expect("history is on");
        assert_eq!(publications, expected);
        assert_eq!((page.top.offset, page.more), (expected[19].0, false));
    }
}

/// P6: a key seen within the window adds nothing, at whichever node it comes in.
pub fn p6_a_repeated_key_answers_the_first_position(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p6"), probe.last());
    probe.open(last, &name, &ROOM);
    let first = probe.publish_key(0, &name, &ROOM, "key").expect("accepted");
    let between = probe.publish(0, &name, &ROOM);
    let repeat = probe.publish_key(last, &name, &ROOM, "key").expect("answered as before");
    assert!(!first.repeated && repeat.repeated);
    assert_eq!(repeat.position, first.position);
    let fresh = probe.publish_key(0, &name, &ROOM, "another key").expect("accepted");
    assert!(!fresh.repeated && fresh.position.offset > between.position.offset);
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(last, &name).len(), 3);
}

/// P6: the same key in another channel is another publication.
pub fn p6_a_key_is_compared_within_its_channel(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    for label in ["p6-one", "p6-other"] {
        let name = probe.name(label);
        let accepted = probe.publish_key(0, &name, &ROOM, "key").expect("accepted");
        assert!(!accepted.repeated, "{label}");
    }
}

/// P7: while node 0 publishes all the time, another opens at some moment, many times over: what is above
/// its position arrives.
pub fn p7_no_publication_between_the_opened_position_and_the_arrivals(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    for round in 0..10u64 {
        let name = probe.name(&format!("p7-{round}"));
        let mut open = None;
        for step in 0..20 {
            let _ = probe.send_publish(0, &name, &ROOM);
            if step == round {
                open = Some(probe.send_open(last, &name, &ROOM));
            }
            probe.run_for(1 + round % 4);
        }
        let opened = match probe.answer(last, open.expect("opened on the way")) {
            Answer::Opened(Ok(position)) => position,
            other => panic!("{other:?}"),
        };
        // The probe checks the chain; standing at the top at last, nothing above the position is missing.
        probe.settle_arrivals();
        let (_, publications) = probe.read(last, &name, &ROOM, &ALL).expect("history is on");
        let above = publications.iter().filter(|(offset, _)| *offset > opened.offset);
        let expected: Vec<&str> = above.map(|(_, data)| data.as_str()).collect();
        assert_eq!(probe.arrivals(last, &name), expected, "round {round}");
        assert!(!probe.was_told(last, &name));
    }
}
