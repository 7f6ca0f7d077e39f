//! Three brokers, three nodes: one broker killed, one paused, all killed; and topics that are refused.
//!
//! The probe checks with every event that no publication is missing unsaid, doubled or out of order; each test adds
//! that nothing acknowledged was lost, for two of three copies confirm each publish.

#[path = "live/kafka.rs"]
mod kafka;
mod live;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kafka::{NODES, Servers};
use live::proxy::Proxies;
use live::{Broker, Live, Start};
use ringmain_bus::ChannelOptions;
use ringmain_bus::kafka::{KafkaOptions, TopicError, check, ensure, run};
use ringmain_bus::suite::{Cluster, Probe};

const BROKERS: usize = 3;
const CHANNELS: usize = 12;

const ROOM: ChannelOptions =
    ChannelOptions { history_size: 1_000, history_ttl_ms: 600_000, meta_ttl_ms: 600_000 };

/// The brokers, which one test at a time has.
struct Brokers {
    servers: MutexGuard<'static, Servers>,
    topic: String,
}

impl Brokers {
    fn new(topic: &str) -> Brokers {
        static SERVERS: OnceLock<Mutex<Servers>> = OnceLock::new();
        let servers = SERVERS.get_or_init(|| Mutex::new(Servers::new(BROKERS)));
        let mut servers = servers.lock().unwrap_or_else(PoisonError::into_inner);
        // A test that failed may have left some dead.
        servers.restore();
        Brokers { servers, topic: topic.into() }
    }

    fn options(&self) -> KafkaOptions {
        let options = kafka::options(self.servers.brokers(), BROKERS);
        KafkaOptions { topic: self.topic.clone(), partitions: 6, ..options }
    }
}

impl Broker for Brokers {
    fn backend(&self, _: usize, _: &Arc<Proxies>) -> Start {
        let options = self.options();
        Box::new(move |ends| Box::pin(run(options, ends)))
    }

    fn patience_ms(&self) -> u64 {
        120_000
    }
}

/// Nodes on the brokers, with channels open at the last node.
fn opened(topic: &str) -> (Probe<Live<Brokers>>, Vec<String>) {
    let mut probe = Probe::new(Live::new(Brokers::new(topic), NODES));
    let names: Vec<String> = (0..CHANNELS).map(|n| probe.name(&format!("{topic}-{n}"))).collect();
    for name in &names {
        probe.open(probe.last(), name, &ROOM);
        probe.publish(0, name, &ROOM);
    }
    probe.settle_arrivals();
    (probe, names)
}

/// Publishes in every channel until each has taken one, and gives how long the last one waited, in milliseconds.
fn until_all_flow(probe: &mut Probe<Live<Brokers>>, names: &[String]) -> u64 {
    let begun_ms = probe.now_ms();
    let mut dry: Vec<&String> = names.iter().collect();
    while !dry.is_empty() {
        assert!(probe.now_ms() < begun_ms + probe.cluster.patience_ms(), "nothing flows in {dry:?}");
        dry.retain(|name| probe.try_publish(0, name, &ROOM).is_err());
        probe.run_for(20);
    }
    probe.now_ms() - begun_ms
}

/// All that was accepted has arrived, and nobody was told of a loss.
fn nothing_was_lost(probe: &mut Probe<Live<Brokers>>, names: &[String]) {
    probe.settle_arrivals();
    let last = probe.last();
    for name in names {
        probe.check_accepted(last, name, &ROOM);
        assert!(!probe.was_told(last, name), "{name}: {:?}", probe.seen(last, name));
    }
}

#[test]
fn a_killed_broker_takes_nothing_along() {
    let (mut probe, names) = opened("killed");
    probe.cluster.broker().servers.kill(0);
    let took_ms = until_all_flow(&mut probe, &names);
    println!("all flow {took_ms} ms after a broker was killed");
    nothing_was_lost(&mut probe, &names);
    probe.cluster.broker().servers.restore();
    until_all_flow(&mut probe, &names);
    nothing_was_lost(&mut probe, &names);
}

#[test]
fn a_paused_broker_that_wakes_is_not_believed() {
    let (mut probe, names) = opened("paused");
    probe.cluster.broker().servers.pause(1);
    let took_ms = until_all_flow(&mut probe, &names);
    println!("all flow {took_ms} ms after a broker was paused");
    nothing_was_lost(&mut probe, &names);
    probe.cluster.broker().servers.restore();
    for _ in 0..20 {
        until_all_flow(&mut probe, &names);
    }
    nothing_was_lost(&mut probe, &names);
}

#[test]
fn all_brokers_killed_at_once_come_back_whole() {
    let (mut probe, names) = opened("all");
    (0..BROKERS).for_each(|server| probe.cluster.broker().servers.kill(server));
    probe.run_for(1_500);
    probe.cluster.broker().servers.restore();
    until_all_flow(&mut probe, &names);
    nothing_was_lost(&mut probe, &names);
}

#[test]
fn what_cannot_keep_the_contract_is_refused() {
    let brokers = Brokers::new("checked");
    let options = brokers.options();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ensured = |options: &KafkaOptions| {
        let ends = Instant::now() + Duration::from_secs(60);
        loop {
            match runtime.block_on(ensure(options)) {
                Err(error) if error.is_temporary() && Instant::now() < ends => (),
                result => return result,
            }
        }
    };
    assert_eq!(runtime.block_on(check(&options)), [], "not made yet");
    assert_eq!(ensured(&options), Ok(Vec::new()), "made, and nothing is given up");
    assert_eq!(runtime.block_on(check(&options)), []);
    let more = KafkaOptions { partitions: 7, ..options.clone() };
    let (topic, found, wanted) = ("checked".to_owned(), 6, 7);
    assert_eq!(ensured(&more), Err(TopicError::Partitions { topic, found, wanted }));
    assert_eq!(runtime.block_on(check(&more)).len(), 1);
    kafka::make_topic(&options, "weak", 6, 1);
    let weak = KafkaOptions { topic: "weak".into(), ..options };
    assert!(matches!(ensured(&weak), Err(TopicError::Unsafe { .. })), "one copy");
    let small = KafkaOptions { small: true, ..weak };
    assert_eq!(ensured(&small).map(|given_up| given_up.len()), Ok(2), "copies, and confirmations");
    assert_eq!(runtime.block_on(check(&small)).len(), 2);
}
