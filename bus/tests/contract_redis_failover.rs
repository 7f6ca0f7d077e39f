//! What only Redis does: stale masters that wake, replicas that lack the tail, Sentinels that change their mind; and
//! what an operator may ask for: durability, credentials, TLS.

mod live;
#[path = "live/redis.rs"]
mod servers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use live::proxy::Proxies;
use live::{Broker, Live};
use ringmain_bus::backend::{Call, HubEnds, OwnedId, Reply, Request, Target, ends};
use ringmain_bus::redis::{Credentials, Durability, RedisOptions, Secret, Tls, check};
use ringmain_bus::suite::{Faults, Probe};
use ringmain_bus::{ChannelOptions, HistoryQuery, PublishError};
use servers::{Kind, Pair, ROOM, Redises, Server, Shared, Trio, shared_trio};

/// All that is kept.
const ALL: HistoryQuery = HistoryQuery { since: None, limit: 1000, reverse: false };

/// Lets the nodes go on until something holds of the broker.
fn settle_broker<B: Broker>(probe: &mut Probe<Live<B>>, what: &str, holds: impl Fn(&B) -> bool) {
    let ends = Instant::now() + Duration::from_secs(60);
    while !holds(probe.cluster.broker()) {
        assert!(Instant::now() < ends, "no {what}");
        probe.run_for(10);
    }
}

/// The publications that stand in a channel's history.
fn history<C: Faults>(probe: &mut Probe<C>, name: &str) -> Vec<String> {
    let (_, publications) = probe.read(0, name, &ROOM, &ALL).expect("no epoch was claimed");
    publications.into_iter().map(|(_, data)| data).collect()
}

/// Publishes until a publication is accepted, as a client does while servers change their roles; gives its data.
fn accepted<C: Faults>(probe: &mut Probe<C>, node: usize, name: &str) -> String {
    let ends = Instant::now() + Duration::from_secs(60);
    loop {
        let data = probe.data(node, name);
        if probe.try_publish(node, name, &ROOM).is_ok() {
            return data;
        }
        assert!(Instant::now() < ends, "no publication is taken");
        probe.run_for(20);
    }
}

/// Each of them once.
fn assert_once(seen: &[String], accepted: &[String]) {
    for data in accepted {
        assert_eq!(seen.iter().filter(|seen| *seen == data).count(), 1, "{data} in {seen:?}");
    }
}

/// What a node was told.
fn arrivals<C: Faults>(probe: &Probe<C>, node: usize, name: &str) -> Vec<String> {
    probe.arrivals(node, name).into_iter().map(str::to_owned).collect()
}

/// The master is paused with commands in its socket, its replica promoted, the master woken: it executes them, and goes
/// on as a master for the node that still finds it there.
#[test]
fn a_stale_master_that_wakes_names_nothing_twice_and_loses_nothing() {
    let mut probe = Probe::new(Live::new(Pair::start(Kind::Redis, |_| ()), 2));
    let name = probe.name("stale");
    probe.open_all(&name, &ROOM);
    let mut taken: Vec<String> = (0..3).map(|_| accepted(&mut probe, 0, &name)).collect();
    probe.settle_arrivals();
    probe.cluster.broker().pause();
    let waiting = (probe.data(1, &name), probe.send_publish(1, &name, &ROOM));
    probe.settle_down(0);
    probe.settle_down(1);
    // Node 0 finds the replica at the address, node 1 the old master.
    probe.cluster.broker().promote_for(&[0]);
    probe.cluster.broker().old_master().resume();
    probe.settle_up();
    for node in [0, 1, 0, 1, 1] {
        taken.push(accepted(&mut probe, node, &name));
    }
    // At last the old master follows the new one, and node 1 too.
    probe.cluster.broker().follow();
    probe.run_for(100);
    probe.settle_up();
    taken.push(accepted(&mut probe, 1, &name));
    probe.settle_arrivals();
    let kept = history(&mut probe, &name);
    assert_once(&kept, &taken);
    let stands = kept.iter().filter(|kept| **kept == waiting.0).count();
    match probe.published(1, waiting.1) {
        Ok(_) => assert_eq!(stands, 1, "{} in {kept:?}", waiting.0),
        Err(PublishError::Unknown) => assert!(stands <= 1, "{} in {kept:?}", waiting.0),
        Err(error) => panic!("it was sent: {error}"),
    }
}

/// What a promoted replica does not have is published again by the node that passed its ack on, once.
#[test]
fn what_a_failover_took_is_published_again() {
    let mut probe = Probe::new(Live::new(Pair::start(Kind::Redis, |_| ()), 2));
    let name = probe.name("again");
    probe.open_all(&name, &ROOM);
    let mut taken = Vec::new();
    for round in 0..12 {
        if round == 4 {
            probe.cluster.stop_replication();
        }
        taken.push(accepted(&mut probe, round % 2, &name));
    }
    probe.cluster.fail_over();
    probe.run_for(100);
    probe.settle_up();
    taken.push(accepted(&mut probe, 0, &name));
    let kept = history(&mut probe, &name);
    assert_once(&kept, &taken);
    assert_eq!(kept[..4], taken[..4]);
}

/// A replica that is connected and confirms nothing: publishing goes on without a stop, and nobody takes the master for
/// silent. Where acks wait for a replica, none is given.
#[test]
fn a_replica_that_hangs_takes_no_node_down() {
    let of_master = |options: &mut RedisOptions| options.durability = Durability::Master;
    let of_replica = |options: &mut RedisOptions| options.durability = Durability::Replicas(1);
    for (adapt, is_of_replica) in [(of_master as fn(&mut RedisOptions), false), (of_replica, true)] {
        // On a busy machine the master may be silent or slow for other reasons: once it must not be.
        for round in 1.. {
            let mut probe = Probe::new(Live::new(Pair::start(Kind::Redis, adapt), 1));
            let name = probe.name("hangs");
            while probe.try_publish(0, &name, &ROOM).is_err() {}
            let told = probe.health_events(0).len();
            probe.cluster.broker().replica().pause();
            // The master gives it up after 5 s (`repl-timeout`).
            let ends = Instant::now() + Duration::from_millis(4_500);
            let mut stops = 0;
            while Instant::now() < ends {
                let begun = Instant::now();
                let result = probe.try_publish(0, &name, &ROOM);
                let is_late = begun.elapsed() > Duration::from_millis(200);
                stops += u32::from(if is_of_replica { result.is_ok() } else { is_late });
                probe.read(0, &name, &ROOM, &HistoryQuery::TOP).expect("a healthy bus reads");
                probe.run_for(20);
            }
            probe.cluster.broker().replica().resume();
            if probe.health_events(0).len() == told && stops <= 1 {
                break;
            }
            assert!(round < 5, "{is_of_replica}: {stops}, {:?}", probe.health_events(0));
        }
    }
}

/// An ack under `durability = replica` means that a replica has it.
#[test]
fn durability_of_a_replica_waits_for_it() {
    let adapt = |options: &mut RedisOptions| options.durability = Durability::Replicas(1);
    let mut probe = Probe::new(Live::new(Pair::start(Kind::Redis, adapt), 1));
    let name = probe.name("durable");
    // On a busy machine the replica may be late: then the answer is not known, and another is published.
    let ends = Instant::now() + Duration::from_secs(60);
    let first = loop {
        let data = probe.data(0, &name);
        if probe.try_publish(0, &name, &ROOM).is_ok() {
            break data;
        }
        assert!(Instant::now() < ends, "no replica confirms");
    };
    probe.cluster.stop_replication();
    // The master answers, the replica does not.
    let second = probe.data(0, &name);
    assert_eq!(probe.try_publish(0, &name, &ROOM), Err(PublishError::Unknown));
    probe.cluster.fail_over();
    probe.run_for(100);
    probe.settle_up();
    let kept = history(&mut probe, &name);
    assert!(kept.contains(&first) && !kept.contains(&second), "{kept:?}");
}

/// A master that was started again goes by another replication id once its first replica comes: what was accepted
/// before stands once.
#[test]
fn a_master_that_is_followed_again_loses_nothing() {
    let mut probe = Probe::new(Live::new(Pair::start(Kind::Redis, |_| ()), 2));
    let name = probe.name("followed");
    probe.open_all(&name, &ROOM);
    let mut taken = vec![accepted(&mut probe, 0, &name)];
    probe.settle_arrivals();
    probe.cluster.broker().replica().kill();
    probe.cluster.broker().master().kill();
    probe.cluster.broker().master().restart();
    taken.push(accepted(&mut probe, 0, &name));
    probe.settle_up();
    taken.push(accepted(&mut probe, 1, &name));
    let alone = probe.top(0, &name, &ROOM);
    probe.cluster.broker().replica().restart();
    probe.cluster.broker().follow();
    let ends = Instant::now() + Duration::from_secs(60);
    while taken.len() < 5 || probe.top(1, &name, &ROOM).epoch == alone.epoch {
        assert!(Instant::now() < ends, "the replica never comes");
        taken.push(accepted(&mut probe, taken.len() % 2, &name));
        probe.run_for(50);
        probe.settle_up();
    }
    probe.settle_arrivals();
    assert_once(&history(&mut probe, &name), &taken);
    for node in [0, 1] {
        assert_once(&arrivals(&probe, node, &name), &taken);
    }
}

/// A server that forgot the script, or refuses to write, or lost the life of its data: nothing is lost, and all goes on.
#[test]
fn a_server_that_forgets_and_refuses_is_healed() {
    let mut probe = Probe::new(Live::new(Pair::start(Kind::Redis, |_| ()), 2));
    let name = probe.name("forgets");
    probe.open_all(&name, &ROOM);
    let mut taken = vec![accepted(&mut probe, 0, &name)];
    probe.settle_arrivals();
    probe.cluster.broker().master().ask("SCRIPT FLUSH");
    taken.push(accepted(&mut probe, 0, &name));
    probe.settle_up();
    probe.cluster.broker().master().ask("CONFIG SET min-replicas-to-write 2");
    assert!(probe.try_publish(0, &name, &ROOM).is_err_and(|error| error.is_temporary()));
    probe.cluster.broker().master().ask("CONFIG SET min-replicas-to-write 0");
    taken.push(accepted(&mut probe, 0, &name));
    // Connections that the server ends.
    for kind in ["pubsub", "normal"] {
        probe.cluster.broker().master().try_ask(redis::cmd("CLIENT").arg(&["KILL", "TYPE", kind]));
        taken.push(accepted(&mut probe, 1, &name));
    }
    probe.settle_up();
    probe.settle_arrivals();
    for node in [0, 1] {
        assert_once(&arrivals(&probe, node, &name), &taken);
        assert!(!probe.was_told(node, &name));
    }
}

/// A cluster's own election after kill -9, and after a master was paused: all goes on, and nothing acknowledged is
/// lost, for the publisher lives.
#[test]
fn a_cluster_elects_and_all_goes_on() {
    for paused in [false, true] {
        let mut probe = Probe::new(Live::new(Redises::start(Kind::Redis, |_| ()), 2));
        let names: Vec<String> = (0..12).map(|index| probe.name(&format!("elect-{index}"))).collect();
        names.iter().for_each(|name| probe.open_all(name, &ROOM));
        let mut taken: Vec<Vec<String>> = vec![Vec::new(); names.len()];
        let mut publish_all = |probe: &mut Probe<Live<Redises>>| {
            for (name, taken) in names.iter().zip(&mut taken) {
                taken.push(accepted(probe, 0, name));
            }
        };
        publish_all(&mut probe);
        let cluster = probe.cluster.broker();
        let (master, replica) = cluster.shards()[0];
        if paused {
            cluster.servers[master].pause();
        } else {
            cluster.servers[master].kill();
        }
        probe.settle_down(0);
        settle_broker(&mut probe, "elected replica", |cluster| cluster.servers[replica].is_master());
        let elected = Instant::now();
        probe.settle_up();
        println!("up {:?} after the election", elected.elapsed());
        publish_all(&mut probe);
        if paused {
            probe.cluster.broker().servers[master].resume();
            probe.run_for(1500);
            probe.settle_up();
            publish_all(&mut probe);
        }
        probe.settle_arrivals();
        probe.settle_up();
        for (name, taken) in names.iter().zip(&taken) {
            assert_once(&arrivals(&probe, 1, name), taken);
        }
    }
}

/// Slots move from one master to another, and their channels with them.
#[test]
fn channels_follow_their_slots() {
    let mut probe = Probe::new(Live::new(Redises::start(Kind::Redis, |_| ()), 2));
    let name = probe.name("moving");
    probe.open_all(&name, &ROOM);
    let mut taken = vec![accepted(&mut probe, 0, &name)];
    probe.settle_arrivals();
    probe.cluster.broker().move_slot_of(&format!("rm.c:{{{name}}}"));
    probe.settle_down(1);
    probe.settle_up();
    taken.push(accepted(&mut probe, 0, &name));
    probe.settle_up();
    probe.settle_arrivals();
    assert_once(&arrivals(&probe, 1, &name), &taken);
}

/// Behind Sentinels everything works.
mod sentinel {
    use super::*;

    fn cluster() -> Live<Shared> {
        Live::new(Shared::new(shared_trio()), 2)
    }

    ringmain_bus::contract_tests!(cluster();
        p1_all_nodes_see_one_order,
        p4_what_was_accepted_is_read_back,
        p6_a_repeated_key_answers_the_first_position,
        p7_no_publication_between_the_opened_position_and_the_arrivals,
        e3_ephemeral_publications_reach_all_nodes,
        c4_commands_at_the_limit_are_taken_and_above_it_refused,
    );

    /// The master is paused until the Sentinels have replaced it, then it wakes; with and without a fence.
    fn replaced_and_woken(lines: &[&str]) {
        let mut probe = Probe::new(Live::new(Trio::start(lines, |_| ()), 2));
        let name = probe.name("sentinel");
        probe.open_all(&name, &ROOM);
        for _ in 0..3 {
            accepted(&mut probe, 0, &name);
        }
        probe.settle_arrivals();
        let old = probe.cluster.broker().master();
        probe.cluster.broker().servers[old].pause();
        let waiting = probe.send_publish(1, &name, &ROOM);
        probe.settle_down(0);
        settle_broker(&mut probe, "promoted replica", |trio| trio.servers[1 - old].is_master());
        probe.cluster.broker().servers[old].resume();
        probe.settle_up();
        settle_broker(&mut probe, "old master that follows", |trio| !trio.servers[old].is_master());
        // With a fence the new master takes publications once it has a replica again.
        accepted(&mut probe, 0, &name);
        let _ = probe.published(1, waiting);
        probe.settle_up();
        probe.settle_arrivals();
        probe.check_accepted(1, &name, &ROOM);
    }

    #[test]
    fn a_master_replaced_and_woken_loses_nothing() {
        replaced_and_woken(&[]);
    }

    #[test]
    fn a_fenced_master_replaced_and_woken_loses_nothing() {
        replaced_and_woken(&["min-replicas-to-write 1", "min-replicas-max-lag 2"]);
    }

    #[test]
    fn check_warns_of_a_missing_fence() {
        let warnings = live::block_on(async { check(&shared_trio()).await });
        assert!(
            warnings.iter().any(|warning| warning.mend.contains("min-replicas-to-write")),
            "{warnings:?}"
        );
    }
}

/// Speaks to a backend as a hub does, once it has reached its servers, with a record to publish.
fn with_backend(options: RedisOptions, test: impl AsyncFnOnce(HubEnds, bytes::Bytes)) {
    live::block_on(async move {
        let (mut hub, backend) = ends(Arc::default());
        tokio::task::spawn_local(ringmain_bus::redis::run(options, backend));
        while !matches!(hub.replies.recv().await, Some(Reply::Reachable(true))) {}
        let mut record = Vec::new();
        ringmain_proto::message::Publication { data: b"x", ..Default::default() }.write_record(&mut record);
        test(hub, record.into()).await;
    });
}

/// More at once than one turn of a session takes, positioned and ephemeral: all is answered and all arrives.
#[test]
fn a_burst_arrives_whole() {
    const BURST: u64 = 5_000;
    let options = servers::shared_single();
    with_backend(options, async |HubEnds { requests, mut replies }, record| {
        let mut whole = 0;
        // Where the server was silent for too long on a busy machine, the burst is made again.
        for attempt in 1..100u64 {
            let options = [ROOM, ChannelOptions::EPHEMERAL][whole];
            let target = Target { name: format!("burst-{attempt}").into(), options };
            requests.send(Request::Subscribe { call: Call(attempt), target: target.clone() }).unwrap();
            let mut subscribed = false;
            while !subscribed {
                match replies.recv().await.expect("it runs") {
                    Reply::Subscribed { call, result } if call == Call(attempt) => {
                        subscribed = true;
                        result.expect("it can be reached");
                    }
                    _ => (),
                }
            }
            for sequence in 0..BURST {
                let (call, id) = (Call((attempt << 20) + sequence), OwnedId::Node(attempt, sequence));
                let (target, record) = (target.clone(), record.clone());
                requests.send(Request::Publish { call, target, id, record }).unwrap();
            }
            let (mut answered, mut arrived) = (0, 0);
            while answered < BURST || arrived < BURST {
                let reply = tokio::time::timeout(Duration::from_secs(60), replies.recv()).await;
                match reply.expect("an answer to everything").expect("it runs") {
                    Reply::Published { result, .. } => answered += u64::from(result.is_ok()),
                    Reply::Message { message, .. } => arrived += u64::from(!message.record.is_empty()),
                    Reply::Lost { .. } => break,
                    _ => (),
                }
            }
            if (answered, arrived) != (BURST, BURST) {
                while !matches!(replies.recv().await, Some(Reply::Reachable(true))) {}
                continue;
            }
            whole += 1;
            if whole == 2 {
                return;
            }
        }
        panic!("no burst was whole");
    });
}

/// What waits for the server to come back under its id is stored before what is asked from then on.
#[test]
fn publications_keep_their_order_over_an_outage() {
    let mut server = Server::start(Kind::Redis, servers::ports(1)[0], &[]);
    let options = RedisOptions::from_url(&format!("redis://127.0.0.1:{}", server.port), |_| None).unwrap();
    with_backend(options, async |HubEnds { requests, mut replies }, record| {
        let target = Target { name: "waits".into(), options: ROOM };
        // On a busy machine the server may come back so late that the first is given up.
        for round in 0..20 {
            let publish = |number: u64| {
                let (target, id, record) = (target.clone(), OwnedId::Node(round, number), record.clone());
                requests.send(Request::Publish { call: Call(number), target, id, record }).unwrap();
            };
            server.pause();
            publish(1);
            while !matches!(replies.recv().await, Some(Reply::Lost { .. })) {}
            server.kill();
            server.restart();
            while !matches!(replies.recv().await, Some(Reply::Back { .. })) {}
            publish(2);
            let mut places = std::collections::BTreeMap::new();
            while places.len() < 2 {
                if let Reply::Published { call, result } = replies.recv().await.expect("it runs") {
                    places.insert(call.0, result.map(|accepted| accepted.position.offset));
                }
            }
            if let [Ok(first), Ok(second)] = [places[&1], places[&2]] {
                return assert_eq!([first, second], [1, 2]);
            }
        }
        panic!("it was never tried again in time");
    });
}

/// P6: an id is known again within its window, also among those it was sent with; after its time, or when too many came
/// behind it, it names another publication, and takes no room.
#[test]
fn ids_are_known_for_their_time_and_let_go() {
    const WINDOW: Duration = Duration::from_secs(3);
    const IDS_MAX: u32 = 100;
    let server = Server::start(Kind::Redis, servers::ports(1)[0], &[]);
    let options = RedisOptions::from_url(&format!("redis://127.0.0.1:{}", server.port), |_| None).unwrap();
    let options = RedisOptions { ids_window: WINDOW, ids_max: IDS_MAX, ..options };
    with_backend(options, async |HubEnds { requests, mut replies }, record| {
        let mut calls = 0;
        // Sends them in one turn; gives where each stands, and whether it did before.
        let mut publish = async |ids: Vec<OwnedId>| {
            let first = calls;
            for id in ids {
                let target = Target { name: "ids".into(), options: ROOM };
                let (call, record) = (Call(calls), record.clone());
                requests.send(Request::Publish { call, target, id, record }).unwrap();
                calls += 1;
            }
            let mut answers = std::collections::BTreeMap::new();
            while answers.len() as u64 != calls - first {
                if let Reply::Published { call, result } = replies.recv().await.expect("it runs") {
                    let accepted = result.expect("it can be reached");
                    answers.insert(call, (accepted.position.offset, accepted.repeated));
                }
            }
            answers.into_values().collect::<Vec<_>>()
        };
        let key = |key: &str| OwnedId::Key(key.into());
        assert_eq!(publish(vec![key("a")]).await, [(1, false)]);
        let together = publish(vec![key("b"), key("a"), key("b"), key("c")]).await;
        assert_eq!(together, [(2, false), (1, true), (2, true), (3, false)]);
        tokio::time::sleep(WINDOW).await;
        assert_eq!(publish(vec![key("c"), key("a"), key("c")]).await, [(4, false), (5, false), (4, true)]);
        assert_eq!(publish(vec![key("a")]).await, [(5, true)]);
        let many = |from: u64| (from..from + 500).map(|sequence| OwnedId::Node(1, sequence)).collect();
        let last = publish(many(0)).await[499];
        assert_eq!(last, (505, false));
        assert_eq!(publish(vec![key("a"), key("a")]).await, [(506, false), (506, true)]);
        assert_eq!(publish(many(1_000)).await[499], (1_006, false));
        let node = |sequence| OwnedId::Node(1, sequence);
        assert_eq!(publish(vec![node(1_500), node(1_499)]).await, [(1_007, false), (1_006, true)]);
        tokio::time::sleep(WINDOW).await;
        assert_eq!(publish(vec![node(1_500)]).await, [(1_008, false)]);
    });
    let redis::Value::Int(fields) = server.ask("HLEN rm.c:{ids}") else { panic!("no number") };
    // What is one of a kind; chunks of history and those removed together; each key and each chunk's ids.
    let most = 5 + i64::from(ROOM.history_size) + 2 * 128 + 2 * (i64::from(IDS_MAX) + 256);
    assert!((5..most).contains(&fields), "{fields} fields, {most} at most");
}

/// The script against a naive model: groups of all sizes, ids of nodes that rise, fall and come again, keys, reads from
/// anywhere, small histories, removals. Whatever is kept together, each offset is given out once and read as it was.
#[test]
fn history_and_ids_are_what_a_naive_model_says() {
    const CHANNELS: usize = 3;
    const SIZES: [u32; CHANNELS] = [1, 40, 700];
    let server = Server::start(Kind::Redis, servers::ports(1)[0], &[]);
    let options = RedisOptions::from_url(&format!("redis://127.0.0.1:{}", server.port), |_| None).unwrap();
    // No id is let go: what the model says of them does not depend on time.
    let options = RedisOptions { ids_window: Duration::from_secs(3_600), ids_max: 1 << 20, ..options };
    let target = |channel: usize| {
        let history_size = SIZES[channel];
        Target { name: format!("model-{channel}").into(), options: ChannelOptions { history_size, ..ROOM } }
    };
    let mut dice = 0x9e37_79b9_7f4a_7c15u64;
    let mut roll = move |below: u64| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        dice % below
    };
    #[derive(Default)]
    struct Model {
        /// With what each offset above 0 was published.
        data: Vec<String>,
        floor: u64,
        ids: std::collections::HashMap<OwnedId, u64>,
        /// Ids that were used, to be used again.
        used: Vec<OwnedId>,
    }
    let mut models: [Model; CHANNELS] = Default::default();
    let mut sequences = [0u64; 3];
    with_backend(options, async |HubEnds { requests, mut replies }, _| {
        let mut calls = 0;
        let mut ask = async |requested: Vec<Request>| {
            let mut answers = std::collections::BTreeMap::new();
            let count = requested.len();
            for request in requested {
                requests.send(request).unwrap();
            }
            while answers.len() < count {
                match replies.recv().await.expect("it runs") {
                    Reply::Published { call, .. }
                    | Reply::Read { call, .. }
                    | Reply::Cleared { call, .. }
                        if answers.contains_key(&call) =>
                    {
                        panic!("{call:?} twice")
                    }
                    reply @ (Reply::Published { call, .. }
                    | Reply::Read { call, .. }
                    | Reply::Cleared { call, .. }) => {
                        answers.insert(call, reply);
                    }
                    _ => (),
                }
            }
            answers.into_values().collect::<Vec<_>>()
        };
        for step in 0..600 {
            let channel = roll(CHANNELS as u64) as usize;
            let (model, target, size) = (&mut models[channel], target(channel), u64::from(SIZES[channel]));
            match roll(10) {
                0..6 => {
                    let mut requested = Vec::new();
                    let mut expected = Vec::new();
                    let kind = roll(6);
                    let most = [1, 3, 30, 200][roll(4) as usize];
                    for _ in 0..=roll(most) {
                        let node = if kind == 0 { roll(3) as usize } else { channel };
                        sequences[node] += 1 + roll(3);
                        let again = (kind < 3 && roll(4) == 0 && !model.used.is_empty()).then(|| {
                            let back = roll(model.used.len().min(300) as u64) as usize;
                            model.used[model.used.len() - 1 - back].clone()
                        });
                        let id = match again {
                            Some(id) => id,
                            None if kind == 1 && roll(3) == 0 => {
                                OwnedId::Key(format!("key-{}", roll(10_000)).into())
                            }
                            None => OwnedId::Node(node as u64 + 1, sequences[node]),
                        };
                        let data = format!("{step}-{}", requested.len());
                        let known = model.ids.get(&id).copied();
                        let offset = known.unwrap_or_else(|| {
                            model.data.push(data.clone());
                            let offset = model.data.len() as u64;
                            model.ids.insert(id.clone(), offset);
                            model.used.push(id.clone());
                            offset
                        });
                        expected.push((offset, known.is_some()));
                        let mut record = Vec::new();
                        let publication = ringmain_proto::message::Publication {
                            data: data.as_bytes(),
                            ..Default::default()
                        };
                        publication.write_record(&mut record);
                        let (call, target) = (Call(calls), target.clone());
                        calls += 1;
                        requested.push(Request::Publish { call, target, id, record: record.into() });
                    }
                    model.floor = model.floor.max((model.data.len() as u64).saturating_sub(size));
                    let answers = ask(requested).await.into_iter().map(|reply| match reply {
                        Reply::Published { result: Ok(accepted), .. } => {
                            (accepted.position.offset, accepted.repeated)
                        }
                        other => panic!("{other:?}"),
                    });
                    assert_eq!(answers.collect::<Vec<_>>(), expected, "step {step}, channel {channel}");
                }
                6..9 => {
                    let top = model.data.len() as u64;
                    let since = (roll(3) > 0).then(|| roll(top + 3));
                    let (limit, reverse) = ([roll(5), roll(1_000)][roll(2) as usize] as u32, roll(2) == 0);
                    let (mut after, mut last) = (model.floor, top);
                    match since {
                        Some(since) if reverse => last = last.min(since.saturating_sub(1)),
                        Some(since) => after = after.max(since),
                        None => (),
                    }
                    let mut meant: Vec<u64> = (after + 1..=last).collect();
                    if reverse {
                        meant.reverse();
                    }
                    let more = meant.len() > limit as usize;
                    meant.truncate(limit as usize);
                    let since = since.map(|offset| ringmain_bus::Since { offset, epoch: None });
                    let query = HistoryQuery { since, limit, reverse };
                    calls += 1;
                    let mut answers = ask(vec![Request::Read { call: Call(calls - 1), target, query }]).await;
                    let Some(Reply::Read { result: Ok(read), .. }) = answers.pop() else {
                        panic!("{answers:?}")
                    };
                    let records = ringmain_proto::record::records(&read.records);
                    let read_data: Vec<(u64, String)> =
                        records.map(|one| (one.offset, String::from_utf8_lossy(one.data).into())).collect();
                    let meant =
                        meant.into_iter().map(|offset| (offset, model.data[offset as usize - 1].clone()));
                    assert_eq!(read_data, meant.collect::<Vec<_>>(), "step {step}, {query:?} of {channel}");
                    assert_eq!(
                        (read.page.top.offset, read.page.floor, read.page.more),
                        (top, model.floor, more)
                    );
                }
                _ if roll(8) == 0 => {
                    calls += 1;
                    let answers = ask(vec![Request::Clear { call: Call(calls - 1), target }]).await;
                    assert!(matches!(answers[..], [Reply::Cleared { result: Ok(_), .. }]), "{answers:?}");
                    model.floor = model.data.len() as u64;
                }
                _ => (),
            }
        }
    });
    assert!(models.iter().all(|model| model.data.len() > 2_000), "too little was published");
    // The newest channel's history and what is removed together in chunks; its index; what is known of ids.
    for (channel, model) in models.iter().enumerate() {
        let key = format!("rm.c:{{model-{channel}}}");
        let redis::Value::Int(all) = server.ask(&format!("HLEN {key}")) else { panic!("no number") };
        let keys = model.ids.keys().filter(|id| matches!(id, OwnedId::Key(_))).count();
        let most = model.data.len() + keys + 300 + SIZES[channel] as usize;
        assert!(all as usize <= most, "{all} fields in {key}, {most} at most");
    }
}

/// A page ends before it is too large for the server to build, and the next goes on there, from both ends.
#[test]
fn pages_of_large_publications_are_cut_and_go_on() {
    const COUNT: u64 = 60;
    const BYTES: usize = 200_000;
    with_backend(servers::shared_single(), async |HubEnds { requests, mut replies }, _| {
        let target =
            Target { name: "large-pages".into(), options: ChannelOptions { history_size: 100, ..ROOM } };
        let mut noise = 0x9e37_79b9_7f4a_7c15u64;
        for sequence in 1..=COUNT {
            let mut data = vec![0; BYTES];
            for byte in &mut data {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = b'a' + (noise >> 59) as u8 % 26;
            }
            let mut record = Vec::new();
            ringmain_proto::message::Publication { data: &data, ..Default::default() }
                .write_record(&mut record);
            let (id, record) = (OwnedId::Node(9, sequence), record.into());
            requests
                .send(Request::Publish { call: Call(sequence), target: target.clone(), id, record })
                .unwrap();
        }
        let mut answered = 0;
        while answered < COUNT {
            if let Reply::Published { result, .. } = replies.recv().await.expect("it runs") {
                answered += u64::from(result.expect("it can be reached").position.offset > 0);
            }
        }
        for reverse in [false, true] {
            let (mut since, mut offsets, mut pages) = (None, Vec::new(), 0);
            loop {
                let query = HistoryQuery { since, limit: 1_000, reverse };
                requests.send(Request::Read { call: Call(1_000), target: target.clone(), query }).unwrap();
                let read = loop {
                    if let Reply::Read { result, .. } = replies.recv().await.expect("it runs") {
                        break result.expect("it can be reached");
                    }
                };
                offsets.extend(ringmain_proto::record::records(&read.records).map(|one| one.offset));
                pages += 1;
                if !read.page.more {
                    break;
                }
                since = offsets.last().map(|offset| ringmain_bus::Since { offset: *offset, epoch: None });
            }
            let mut expected: Vec<u64> = (1..=COUNT).collect();
            if reverse {
                expected.reverse();
            }
            assert_eq!(offsets, expected);
            assert!((3..=COUNT).contains(&pages), "{pages} pages");
        }
    });
}

/// P12: a position is kept while its channel is open, however short its time, and goes when it is not.
#[test]
fn an_open_channel_keeps_its_position() {
    const BRIEF: ChannelOptions = ChannelOptions { history_size: 5, history_ttl_ms: 200, meta_ttl_ms: 4_000 };
    let mut probe = Probe::new(Live::new(Shared::new(servers::shared_single()), 2));
    let (open, closed) = (probe.name("kept"), probe.name("left"));
    probe.open(1, &open, &BRIEF);
    probe.publish(0, &open, &BRIEF);
    let left = probe.publish(0, &closed, &BRIEF).position;
    probe.settle_arrivals();
    let before = probe.cursor(1, &open);
    probe.run_for(9_000);
    assert_eq!(Some(probe.top(0, &open, &BRIEF)), before);
    assert_ne!(probe.top(0, &closed, &BRIEF).epoch, left.epoch);
}

/// Interest in many channels is whole again soon after a cut.
mod interest {
    use super::*;
    use tokio::sync::mpsc::{Receiver, UnboundedSender};

    /// Time from a cut until the last of so many channels is subscribed again.
    fn healed(options: RedisOptions, names: Vec<String>) -> Duration {
        let proxies = Arc::new(Proxies::default());
        let through = proxies.clone();
        let mut options = options;
        options.addresses = Some(Arc::new(move |host, port| through.through(host, port)));
        live::block_on(async move {
            let (HubEnds { requests, mut replies }, backend) = ends(Arc::default());
            tokio::task::spawn_local(ringmain_bus::redis::run(options, backend));
            let whole = async {
                subscribe_all(&names, 0, &requests, &mut replies).await;
                let cut = Instant::now();
                proxies.cut();
                subscribe_all(&names, 1 << 40, &requests, &mut replies).await;
                cut.elapsed()
            };
            tokio::time::timeout(Duration::from_secs(120), whole).await.expect("whole again")
        })
    }

    /// Waits for the broker, subscribes all and waits for that; again where it was lost meanwhile, as a hub does.
    async fn subscribe_all(
        names: &[String],
        first_call: u64,
        requests: &UnboundedSender<Request>,
        replies: &mut Receiver<Reply>,
    ) {
        for attempt in 0.. {
            while !matches!(replies.recv().await, Some(Reply::Reachable(true))) {}
            let calls = first_call + (attempt << 20)..;
            for (call, name) in calls.clone().zip(names) {
                let target = Target { name: name.as_str().into(), options: ROOM };
                requests.send(Request::Subscribe { call: Call(call), target }).unwrap();
            }
            let mut confirmed = 0;
            while confirmed < names.len() {
                match replies.recv().await.expect("it runs") {
                    Reply::Subscribed { call, result: Ok(_) } if call.0 >= calls.start => confirmed += 1,
                    Reply::Lost { .. } => break,
                    _ => (),
                }
            }
            if confirmed == names.len() {
                return;
            }
        }
    }

    #[test]
    fn ten_thousand_channels_of_a_cluster() {
        let cluster = Redises::start(Kind::Redis, |_| ());
        let names = (0..10_000).map(|index| format!("channel-{index}")).collect();
        let took = healed(cluster.options(), names);
        println!("10,000 channels are subscribed {took:?} after a cut");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[test]
    fn a_hundred_thousand_users_by_slot() {
        let cluster = Redises::start(Kind::Redis, |_| ());
        let names = (0..100_000).map(|index| format!("user:{index}")).collect();
        let took = healed(cluster.options(), names);
        println!("100,000 users are subscribed {took:?} after a cut");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
}

/// Passwords and TLS.
mod secured {
    use super::*;

    fn works(options: RedisOptions) {
        let mut probe = Probe::new(Live::new(Shared::new(options), 2));
        let name = probe.name("secured");
        probe.open_all(&name, &ROOM);
        probe.publish(0, &name, &ROOM);
        probe.settle_arrivals();
        assert_eq!(probe.arrivals(1, &name).len(), 1);
    }

    fn url(port: u16) -> RedisOptions {
        RedisOptions::from_url(&format!("redis://127.0.0.1:{port}"), |_| None).unwrap()
    }

    #[test]
    fn a_user_and_password_are_asked_for() {
        let port = servers::ports(1)[0];
        let lines = ["user default off".to_owned(), "user node on >secret ~rm.* &rm.* +@all".to_owned()];
        let _server = Server::start_unready(port, &lines);
        let mut options = url(port);
        let wrong = Credentials { username: Some("node".to_owned()), password: Some(Secret("x".to_owned())) };
        options.credentials = wrong;
        let warnings = live::block_on(check(&options));
        assert!(warnings[0].what.contains("WRONGPASS"), "{warnings:?}");
        options.credentials.password = Some(Secret("secret".to_owned()));
        works(options);
    }

    #[test]
    fn tls_with_certificates_of_both_sides() {
        let directory = tempfile::tempdir().unwrap();
        servers::make_certificate(directory.path());
        let file = |name: &str| directory.path().join(name);
        let port = servers::ports(1)[0];
        let lines = [
            "port 0".to_owned(),
            format!("tls-port {port}"),
            format!("tls-cert-file {}", file("cert.pem").display()),
            format!("tls-key-file {}", file("key.pem").display()),
            format!("tls-ca-cert-file {}", file("cert.pem").display()),
        ];
        let _server = Server::start_unready(port, &lines);
        let mut options = url(port);
        let identity = Some((file("cert.pem"), file("key.pem")));
        options.tls = Some(Tls { ca: Some(file("cert.pem")), identity });
        works(options);
    }
}
