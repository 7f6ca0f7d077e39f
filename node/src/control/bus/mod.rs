//! The node's link to a broker: the ports of its shards, the hub, the broker's client, on the control thread.
//!
//! Owns which backend an address means, and what of its state the node shows. It must not know what travels: that is
//! the ports' and the hub's.

use std::sync::Arc;
use std::time::Duration;

use ringmain_bus::backend::{BackendEnds, Interest, Warning, ends};
use ringmain_bus::hub::{self, Hub, HubOptions};
use ringmain_bus::kafka::KafkaOptions;
use ringmain_bus::link::{Bell, End, LinkOptions, Port, Wake, link};
use ringmain_bus::nats::NatsOptions;
use ringmain_bus::redis::RedisOptions;
use ringmain_proto::time::Now;
use tokio::sync::Notify;

use super::config::sections::{BusDurability, BusInterest};
use super::config::{BusConfig, BusUrl};
use super::state::NodeState;
use crate::core::cluster::SLOTS;
use crate::core::config::CoreConfig;
use crate::io::Waker;

/// How long a broker may take to say what its configuration gives up.
const CHECK_MAX: Duration = Duration::from_secs(15);

/// A broker and how it is used.
#[derive(Clone, Debug)]
pub enum Backend {
    /// `redis://`, `redis+cluster://`, `redis+sentinel://`.
    Redis(Box<RedisOptions>),
    /// `nats://`, `tls://`.
    Nats(Box<NatsOptions>),
    /// `kafka://`.
    Kafka(Box<KafkaOptions>),
}

impl Backend {
    /// What the configuration names; `None`: the embedded bus. Errors name what is wrong with the address and show no
    /// secret. Files that it names are read.
    pub fn from_config(config: &BusConfig, core: &CoreConfig) -> Result<Option<Self>, String> {
        let BusUrl::Broker(url) = &config.url else { return Ok(None) };
        let environment = |name: &str| std::env::var(name).ok();
        let backend = match config.url.scheme() {
            "nats" | "tls" => NatsOptions::from_url(url, environment)
                .map(|options| Self::Nats(Box::new(fit_nats(options, config, core))))
                .map_err(|error| error.to_string()),
            "kafka" | "kafkas" => KafkaOptions::from_url(url, environment)
                .map(|options| Self::Kafka(Box::new(fit_kafka(options, core))))
                .map_err(|error| error.to_string()),
            _ => RedisOptions::from_url(url, environment)
                .map(|options| Self::Redis(Box::new(fit_redis(options, config))))
                .map_err(|error| error.to_string()),
        };
        backend.map(Some)
    }

    /// Groups of the slots of users that it gives a node together ([`ClusterOptions`](super::cluster::ClusterOptions)).
    pub fn slot_groups(&self) -> u32 {
        match self {
            Self::Redis(_) | Self::Nats(_) => u32::from(SLOTS),
            Self::Kafka(options) => options.slot_groups(),
        }
    }

    /// Asks the broker what its configuration gives up, for at most 15 s. Changes nothing there.
    pub fn check(&self) -> Vec<Warning> {
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(Default::default())
        {
            Ok(runtime) => runtime,
            Err(error) => {
                return vec![Warning::new(format!("the broker cannot be asked: {error}"), "try again")];
            }
        };
        let asked = async {
            match self {
                Self::Redis(options) => ringmain_bus::redis::check(options).await,
                Self::Nats(options) => ringmain_bus::nats::check(options).await,
                Self::Kafka(options) => ringmain_bus::kafka::check(options).await,
            }
        };
        let limited = async { tokio::time::timeout(CHECK_MAX, asked).await };
        let warnings = runtime.block_on(limited);
        // What a client left to finish may take its time elsewhere.
        runtime.shutdown_background();
        warnings.unwrap_or_else(|_| {
            let what = format!("the broker does not answer within {} s", CHECK_MAX.as_secs());
            vec![Warning::new(what, "start it, or mend its address in bus.url")]
        })
    }

    /// The broker's client. Runs as long as the node.
    async fn run(self, ends: BackendEnds) {
        match self {
            Self::Redis(options) => {
                if let Err(error) = ringmain_bus::redis::run(*options, ends).await {
                    tracing::error!(%error, "the bus cannot be used");
                }
            }
            Self::Nats(options) => ringmain_bus::nats::run(*options, ends).await,
            Self::Kafka(options) => ringmain_bus::kafka::run(*options, ends).await,
        }
    }
}

fn interest(config: &BusConfig) -> Interest {
    match config.interest {
        BusInterest::Channels => Interest::Channels,
        BusInterest::Slots => Interest::Slots,
    }
}

fn fit_redis(mut options: RedisOptions, config: &BusConfig) -> RedisOptions {
    use ringmain_bus::redis::Durability;
    options.interest = interest(config);
    options.durability = match config.durability {
        BusDurability::Master => Durability::Master,
        BusDurability::Replica => Durability::Replicas(1),
    };
    options
}

fn fit_nats(mut options: NatsOptions, config: &BusConfig, core: &CoreConfig) -> NatsOptions {
    options.interest = interest(config);
    options.history_size_max = history_size_max(core).max(1);
    options.retention_ms = options.retention_ms.max(meta_ttl_ms_max(core));
    options
}

fn fit_kafka(mut options: KafkaOptions, core: &CoreConfig) -> KafkaOptions {
    options.retention_ms = options.retention_ms.max(meta_ttl_ms_max(core));
    options
}

fn history_size_max(core: &CoreConfig) -> u32 {
    core.namespaces.values().map(|namespace| namespace.history_size).max().unwrap_or(0)
}

fn meta_ttl_ms_max(core: &CoreConfig) -> u64 {
    core.namespaces.values().map(|namespace| namespace.history_meta_ttl_ms).max().unwrap_or(0)
}

/// The two sides of the link, before anything runs.
#[derive(Debug)]
pub struct BusLink {
    /// One per shard.
    pub ports: Vec<Port>,
    /// The control plane's own, and what is notified when it has events.
    pub own: (Port, Arc<Notify>),
    driver: BusDriver,
}

impl BusLink {
    /// Ports for shards that are woken like this.
    pub fn new(shards: impl Iterator<Item = Waker>) -> Self {
        let options = LinkOptions::default();
        let commands = Arc::new(Notify::new());
        let rung = commands.clone();
        let bell = Bell::new(Arc::new(move || rung.notify_one()));
        let connect = |wake_port: Wake| link(options, bell.clone(), wake_port);
        let (ports, mut ends): (Vec<_>, Vec<_>) =
            shards.map(|waker| connect(Arc::new(move || waker.wake()))).unzip();
        let events = Arc::new(Notify::new());
        let notified = events.clone();
        let (own, end) = connect(Arc::new(move || notified.notify_one()));
        ends.push(end);
        Self { ports, own: (own, events), driver: BusDriver { ends, bell, commands } }
    }

    /// The ports of the shards, the control plane's own, and the rest.
    pub fn split(self) -> (Vec<Port>, (Port, Arc<Notify>), BusDriver) {
        (self.ports, self.own, self.driver)
    }
}

/// What drives the ports.
#[derive(Debug)]
pub struct BusDriver {
    ends: Vec<End>,
    bell: Arc<Bell>,
    commands: Arc<Notify>,
}

impl BusDriver {
    /// Runs hub and client on this thread's local set. `clock` is the shards'.
    pub fn start(self, backend: Backend, state: Arc<NodeState>, clock: impl Fn() -> Now + 'static) {
        let (hub_ends, backend_ends) = ends(self.bell);
        tokio::task::spawn_local(backend.run(backend_ends));
        let shown = move |hub: &Hub| state.set_bus(hub.health(), hub.figures);
        let hub = Hub::new(HubOptions::default());
        let running = hub::run(hub, self.ends, hub_ends, self.commands, clock, shown);
        tokio::task::spawn_local(async move {
            running.await;
            tracing::error!(
                "the client of the bus ended; this is a bug: please report it with the lines above"
            );
        });
    }
}
