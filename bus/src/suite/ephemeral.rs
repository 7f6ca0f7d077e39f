//! Clauses E1 to E4 without faults.

use crate::epoch::Position;
use crate::suite::stream::ALL;
use crate::suite::{Cluster, Probe};
use crate::types::ChannelOptions;

pub(super) const EPHEMERAL: ChannelOptions = ChannelOptions::EPHEMERAL;

/// E1: two publishers at once; the probe checks the order of each at every node.
pub fn e1_ephemeral_order_per_publisher(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("e1"), probe.last() + 1);
    probe.open_all(&name, &EPHEMERAL);
    for _ in 0..20 {
        for node in 0..nodes {
            let _ = probe.send_publish(node, &name, &EPHEMERAL);
        }
    }
    probe.settle_answers();
    for node in 0..nodes {
        probe.settle("all arrivals", |probe| probe.arrivals(node, &name).len() == 20 * nodes);
    }
}

/// E3: accepted and nothing wrong: there at every node.
pub fn e3_ephemeral_publications_reach_all_nodes(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("e3"), probe.last() + 1);
    probe.open_all(&name, &EPHEMERAL);
    let data = probe.data(0, &name);
    probe.publish(0, &name, &EPHEMERAL);
    for node in 0..nodes {
        probe.settle("the arrival", |probe| probe.arrivals(node, &name) == [data.as_str()]);
        assert!(!probe.was_told(node, &name));
    }
}

/// E4: no epoch, no offset, no history.
pub fn e4_ephemeral_channels_have_no_position(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("e4"), probe.last());
    assert_eq!(probe.open(last, &name, &EPHEMERAL), Position::NONE);
    for _ in 0..2 {
        let accepted = probe.publish(0, &name, &EPHEMERAL);
        assert_eq!(accepted.position, Position::NONE);
    }
    let (page, publications) = probe.read(last, &name, &EPHEMERAL, &ALL).expect("no error");
    assert_eq!((page.top, page.floor, page.more, publications.len()), (Position::NONE, 0, false, 0));
    assert_eq!(probe.clear(last, &name, &EPHEMERAL), Position::NONE);
}

/// E3: closed and opened again at once; what is published after the second open's answer is there.
pub fn e3_a_channel_opened_again_at_once_misses_nothing(cluster: impl Cluster) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("e3-again"), probe.last());
    for _ in 0..60 {
        let _ = probe.send_open(last, &name, &EPHEMERAL);
        probe.close(last, &name);
        probe.open(last, &name, &EPHEMERAL);
        let data = probe.data(0, &name);
        probe.publish(0, &name, &EPHEMERAL);
        probe.settle("the arrival", |probe| probe.arrivals(last, &name) == [data.as_str()]);
        probe.close(last, &name);
    }
}
