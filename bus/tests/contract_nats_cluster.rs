//! The contract on a NATS cluster of three, streams in three copies; and what only a cluster can suffer: one of its
//! servers killed or paused, the stream's leader or another.

mod live;
#[path = "live/nats.rs"]
mod nats;

use live::{Broker as _, Live};
use nats::{Nats, Version};
use ringmain_bus::suite::{Cluster as _, Probe};
use ringmain_bus::{ChannelOptions, PublishError};

const NODES: usize = 3;

fn cluster() -> Live<Nats> {
    Live::new(Nats::cluster(Version::Newest), NODES)
}

fn cluster_of_debian() -> Live<Nats> {
    Live::new(Nats::cluster(Version::Debian), NODES)
}

ringmain_bus::contract_tests!(cluster();
    c3_thousands_of_channels_come_back,
    p1_all_nodes_see_one_order,
    p4_what_was_accepted_is_read_back,
    p6_a_repeated_key_answers_the_first_position,
    p7_no_publication_between_the_opened_position_and_the_arrivals,
    p11_after_clear_offsets_go_on_in_the_same_epoch,
    e1_ephemeral_order_per_publisher,
    e3_ephemeral_publications_reach_all_nodes,
    e3_a_channel_opened_again_at_once_misses_nothing,
    p3_a_failover_reuses_no_name,
    p4_accepted_publications_that_a_failover_took_are_told,
    p7_opening_during_faults_misses_nothing,
    p13_wiped_data_is_told_to_quiet_channels,
    c2_a_silent_broker_is_visible,
    c3_a_cut_node_catches_up_by_itself,
    c3_all_is_whole_after_the_broker_is_back,
);

const ROOM: ChannelOptions =
    ChannelOptions { history_size: 1000, history_ttl_ms: 600_000, meta_ttl_ms: 600_000 };
const EPHEMERAL: ChannelOptions = ChannelOptions::EPHEMERAL;

/// Publications that each node must get accepted while the fault lasts.
const ACCEPTED: usize = 10;

/// Which server.
#[derive(Clone, Copy, Debug)]
enum Which {
    Leader,
    Other,
}

/// What happens to it.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Killed,
    Paused,
}

/// One of three servers is gone: what is accepted meanwhile and before is at every node afterwards, nobody is told
/// of a loss on a positioned channel, and on an ephemeral one whoever misses something is told.
fn one_server_gone(cluster: Live<Nats>, which: Which, fault: Fault) {
    let mut probe = Probe::new(cluster);
    let (kept, passing) = (probe.name("one-gone"), probe.name("one-gone-e"));
    probe.open_all(&kept, &ROOM);
    probe.open_all(&passing, &EPHEMERAL);
    let mut accepted = [(kept.clone(), ROOM, Vec::new()), (passing, EPHEMERAL, Vec::new())];
    publish(&mut probe, &mut accepted, 2);
    let nats = probe.cluster.broker();
    let leader = nats.leader();
    let server = match which {
        Which::Leader => leader,
        Which::Other => (leader + 1) % 3,
    };
    match fault {
        Fault::Killed => nats.kill_one(server),
        Fault::Paused => nats.pause_one(server),
    }
    publish(&mut probe, &mut accepted, ACCEPTED);
    probe.cluster.broker().restore();
    probe.settle_up();
    publish(&mut probe, &mut accepted, 2);
    probe.settle_arrivals();
    probe.settle_up();
    for (name, options, accepted) in &accepted {
        for node in 0..NODES {
            let told = probe.was_told(node, name);
            assert!(!told || !options.is_positioned(), "{which:?} {fault:?}: node {node} was told of a loss");
            let arrivals = probe.arrivals(node, name);
            let missing = accepted.iter().find(|data| !arrivals.contains(&data.as_str()));
            assert!(told || missing.is_none(), "{which:?} {fault:?}: node {node} misses {missing:?}");
        }
    }
    probe.check_accepted(0, &kept, &ROOM);
}

type Accepted = (String, ChannelOptions, Vec<String>);

/// Every node gets so many publications accepted on each channel, however long that takes.
fn publish(probe: &mut Probe<Live<Nats>>, channels: &mut [Accepted], count: usize) {
    for node in 0..NODES {
        for (name, options, accepted) in &mut *channels {
            let gives_up_ms = probe.now_ms() + probe.cluster.patience_ms();
            let wanted = accepted.len() + count;
            while accepted.len() < wanted {
                let data = probe.data(node, name);
                match probe.try_publish(node, name, options) {
                    Ok(_) => accepted.push(data),
                    Err(error) => {
                        assert!(error.is_temporary() || error == PublishError::Unknown, "{error:?}");
                        assert!(probe.now_ms() < gives_up_ms, "node {node} gets nothing accepted on {name}");
                        probe.run_for(20);
                    }
                }
            }
        }
    }
}

#[test]
fn the_leader_killed() {
    one_server_gone(cluster(), Which::Leader, Fault::Killed);
}

#[test]
fn the_leader_paused() {
    one_server_gone(cluster(), Which::Leader, Fault::Paused);
}

#[test]
fn another_server_killed() {
    one_server_gone(cluster(), Which::Other, Fault::Killed);
}

#[test]
fn another_server_paused() {
    one_server_gone(cluster(), Which::Other, Fault::Paused);
}

#[test]
fn the_leader_killed_of_debian() {
    one_server_gone(cluster_of_debian(), Which::Leader, Fault::Killed);
}

#[test]
fn another_server_paused_of_debian() {
    one_server_gone(cluster_of_debian(), Which::Other, Fault::Paused);
}
