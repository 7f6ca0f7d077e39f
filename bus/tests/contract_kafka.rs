//! The contract suite on a real Kafka: three nodes on one broker. Tests that break the broker have it alone.

#[path = "live/kafka.rs"]
mod kafka;
mod live;

use std::sync::Arc;

use kafka::{Kafka, NODES, PASSWORD, USER};
use live::proxy::Proxies;
use live::{Broker, Live, Start};
use ringmain_bus::ChannelOptions;
use ringmain_bus::kafka::{KafkaOptions, TopicError, ensure, run};
use ringmain_bus::suite::Probe;

fn shared() -> Live<Kafka> {
    Live::new(Kafka::shared(), NODES)
}

fn alone() -> Live<Kafka> {
    Live::new(Kafka::alone(), NODES)
}

ringmain_bus::contract_suite!(shared());
ringmain_bus::contract_suite_late!(shared());

mod faults {
    use super::*;

    ringmain_bus::contract_suite_faults!(alone());
}

/// The shared broker, used with user and password.
struct WithLogin(Kafka);

impl WithLogin {
    fn options(&self, password: &str) -> KafkaOptions {
        let brokers = self.0.servers().brokers_with_login().join(",");
        let url = format!("kafka://{brokers}/login?partitions=2&small=true");
        let login = |name: &str| Some(if name.ends_with("USER") { USER } else { password }.to_owned());
        KafkaOptions::from_url(&url, login).expect("a Kafka URL")
    }
}

impl Broker for WithLogin {
    fn backend(&self, _: usize, _: &Arc<Proxies>) -> Start {
        let options = self.options(PASSWORD);
        Box::new(move |ends| Box::pin(run(options, ends)))
    }
}

#[test]
fn a_node_logs_in() {
    const ROOM: ChannelOptions =
        ChannelOptions { history_size: 5, history_ttl_ms: 60_000, meta_ttl_ms: 60_000 };
    let mut probe = Probe::new(Live::new(WithLogin(Kafka::shared()), 2));
    let name = probe.name("login");
    probe.open(1, &name, &ROOM);
    probe.publish(0, &name, &ROOM);
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(1, &name).len(), 1);
}

#[test]
fn a_wrong_password_is_refused_and_not_told() {
    let options = WithLogin(Kafka::shared()).options("wrong-password");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refused = runtime.block_on(ensure(&options)).expect_err("the password is wrong");
    assert!(matches!(refused, TopicError::Unreachable(_)), "{refused}");
    let told = format!("{refused} {refused:?} {options:?}");
    assert!(!told.contains("wrong-password"), "{told}");
}

/// In a build whose client can encrypt: `cargo test -p ringmain-bus --features kafka-tls`.
#[cfg(feature = "kafka-tls")]
mod encrypted {
    use super::*;

    struct WithTls(Kafka);

    impl Broker for WithTls {
        fn backend(&self, _: usize, _: &Arc<Proxies>) -> Start {
            let (brokers, authority) = self.0.servers().brokers_with_tls();
            let (brokers, authority) = (brokers.join(","), authority.display());
            let url = format!("kafkas://{brokers}/tls?partitions=2&small=true&ca={authority}");
            let options = KafkaOptions::from_url(&url, |_| None).expect("a Kafka URL");
            Box::new(move |ends| Box::pin(run(options, ends)))
        }
    }

    #[test]
    fn nodes_speak_tls() {
        const ROOM: ChannelOptions =
            ChannelOptions { history_size: 5, history_ttl_ms: 60_000, meta_ttl_ms: 60_000 };
        let mut probe = Probe::new(Live::new(WithTls(Kafka::shared()), 2));
        let name = probe.name("tls");
        probe.open(1, &name, &ROOM);
        probe.publish(0, &name, &ROOM);
        probe.settle_arrivals();
        assert_eq!(probe.arrivals(1, &name).len(), 1);
    }

    #[test]
    fn who_is_not_vouched_for_is_refused() {
        let kafka = Kafka::shared();
        let (brokers, _) = kafka.servers().brokers_with_tls();
        let url = format!("kafkas://{}/tls?partitions=2&small=true", brokers.join(","));
        let options = KafkaOptions::from_url(&url, |_| None).expect("a Kafka URL");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let refused = runtime.block_on(ensure(&options)).expect_err("nobody vouches for it");
        assert!(matches!(refused, TopicError::Unreachable(_)), "{refused}");
    }
}
