//! Starting the shards, and what the control plane holds of them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ringmain_bus::Health;
use ringmain_bus::hub::HubFigures;
use ringmain_bus::link::Port;
use ringmain_proto::time::Now;
use tokio::sync::{Notify, mpsc};

use super::assets::assets;
use super::{NodeState, ServeError, system};
use crate::control::VERSION;
use crate::control::bus::{Backend, BusLink};
use crate::control::check::Plan;
use crate::control::router::{self, Answers, SendToShard};
use crate::core::api::{ControlAnswer, ControlCommand};
use crate::core::config::CoreConfig;
use crate::core::engine::ShardIndex;
use crate::core::mesh::MeshBatch;
use crate::core::metrics::Metric;
use crate::core::{Core, CoreOptions};
use crate::io::{
    BoundAddress, Listeners, Mesh, ShardEvent, ShardHandle, ShardMetrics, ShardOptions, ShardParts,
    SocketOptions, TurnOptions, spawn_shard,
};

/// The running shards.
pub(super) struct Shards {
    handles: Vec<ShardHandle<ControlCommand>>,
    events: mpsc::Receiver<ShardEvent>,
    answers: Option<mpsc::Receiver<ControlAnswer>>,
    addresses: Vec<BoundAddress>,
    own_port: Option<OwnPort>,
    config: Arc<CoreConfig>,
}

/// The control plane's own port of the bus.
pub(super) struct OwnPort {
    pub(super) port: Port,
    /// Notified when the port has something.
    pub(super) rung: Arc<Notify>,
    /// From when its time counts.
    pub(super) origin: Instant,
}

impl Shards {
    /// Binds every address and starts every shard; on the first failure all are gone again.
    pub(super) fn start(
        plan: &Plan,
        state: &Arc<NodeState>,
        backend: Option<Backend>,
    ) -> Result<Self, ServeError> {
        let config = Arc::new(plan.resolved.config.core.clone());
        let server = &plan.resolved.config.node.server;
        let specs: Vec<_> = server.listen.iter().map(|listen| listen.address.clone()).collect();
        let mut listeners = Listeners::bind(&specs, &socket_options(plan), plan.shards)?;
        let addresses = listeners.addresses().to_vec();
        let credits = u16::try_from(config.limits.mesh_credits).unwrap_or(u16::MAX);
        let mesh = Mesh::new(plan.shards, credits).map_err(system("make the mesh"))?;
        // Each shard tells at most twice: drained and stopped.
        let (tell, events) = mpsc::channel(2 * usize::from(plan.shards));
        let (answers, answered) = router::answers();
        let origin = mesh.origin();
        let bus = backend.map(|backend| start_bus(plan, state, backend, &mesh));
        let (ports, own_port) = bus.unzip();
        let mut shards = Self {
            handles: Vec::new(),
            events,
            answers: Some(answered),
            addresses,
            own_port,
            config: config.clone(),
        };
        let mut ports = ports.into_iter().flatten();
        for shard in 0..plan.shards {
            let port = ports.next();
            let parts = parts(listeners.take(shard), &mesh, &answers, &tell);
            let options = core_options(plan, &config, state, shard)?;
            let incarnation = random()?;
            let make = move || {
                let core = Core::new(options, now(origin));
                let mut core = core.expect("the plan has tried the same keys");
                if let Some(port) = port {
                    core.use_bus(Box::new(port), incarnation);
                }
                core
            };
            shards.handles.push(spawn_shard(shard_options(plan, shard), parts, make)?);
        }
        Ok(shards)
    }

    /// What is listened on, with real ports.
    pub(super) fn addresses(&self) -> &[BoundAddress] {
        &self.addresses
    }

    /// The configuration that the shards share.
    pub(super) fn config(&self) -> Arc<CoreConfig> {
        self.config.clone()
    }

    /// The ways to the shards, for a router.
    pub(super) fn senders(&self) -> Vec<SendToShard> {
        let sender = |handle: &ShardHandle<ControlCommand>| -> SendToShard {
            let control = handle.control();
            Box::new(move |command| control.try_send(command).is_ok())
        };
        self.handles.iter().map(sender).collect()
    }

    /// Where the shards' answers arrive. Once.
    pub(super) fn take_answers(&mut self) -> mpsc::Receiver<ControlAnswer> {
        self.answers.take().expect("taken once, by the router")
    }

    /// The control plane's own port of the bus, where there is one. Once.
    pub(super) fn take_own_port(&mut self) -> Option<OwnPort> {
        self.own_port.take()
    }

    /// The figures that the shards publish.
    pub(super) fn metrics(&self) -> Vec<Arc<ShardMetrics>> {
        self.handles.iter().map(|handle| handle.metrics.clone()).collect()
    }

    /// How many shards there are.
    pub(super) fn len(&self) -> usize {
        self.handles.len()
    }

    /// Connections of the fullest shard.
    pub(super) fn connections_max(&self) -> u64 {
        let connections = self.handles.iter().map(|handle| handle.metrics.value(Metric::Connections));
        connections.max().unwrap_or(0)
    }

    /// The next thing that a shard tells. Never ends while shards run.
    pub(super) async fn event(&mut self) -> ShardEvent {
        match self.events.recv().await {
            Some(event) => event,
            // Every shard is gone, each has told so before.
            None => std::future::pending().await,
        }
    }

    /// Waits until a shard ends that nobody asked to, and says why.
    pub(super) async fn failed(&mut self) -> ServeError {
        loop {
            if let ShardEvent::Stopped(shard) = self.event().await {
                return self.failure_of(shard);
            }
        }
    }

    /// Why a shard ended.
    pub(super) fn failure_of(&mut self, shard: ShardIndex) -> ServeError {
        let index = self.handles.iter().position(|handle| handle.index == shard);
        let message = match index.map(|index| self.handles.swap_remove(index).join()) {
            Some(Err(panic)) => panic_message(panic.as_ref()),
            Some(Ok(())) | None => "its loop ended".to_owned(),
        };
        ServeError::Shard { shard, message }
    }

    /// Asks every shard to end after its turn.
    pub(super) fn stop(&self) {
        for handle in &self.handles {
            handle.stop();
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".to_owned())
}

fn parts(
    listeners: Vec<crate::io::ShardListener>,
    mesh: &Mesh<MeshBatch>,
    answers: &Answers,
    tell: &mpsc::Sender<ShardEvent>,
) -> ShardParts<Core> {
    let (answers, tell) = (answers.clone(), tell.clone());
    ShardParts {
        listeners,
        mesh: mesh.clone(),
        answers: Box::new(move |answer| answers.put(answer)),
        events: Box::new(move |event| {
            // There is room for all that a shard ever tells.
            let _ = tell.try_send(event);
        }),
    }
}

fn socket_options(plan: &Plan) -> SocketOptions {
    let server = &plan.resolved.config.node.server;
    SocketOptions {
        send_buffer_bytes: server.send_buffer_bytes,
        receive_buffer_bytes: server.receive_buffer_bytes,
        notsent_lowat_bytes: server.tcp_notsent_lowat_bytes,
        user_timeout_ms: server.tcp_user_timeout_ms,
        backlog: server.backlog,
    }
}

/// The time as the shards count it.
pub(super) fn now(origin: Instant) -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { mono_ms: origin.elapsed().as_millis() as u64 + 1, unix_ms: unix.as_millis() as u64 }
}

/// Connects to the broker in the background; the node is not ready before that is done.
fn start_bus(
    plan: &Plan,
    state: &Arc<NodeState>,
    backend: Backend,
    mesh: &Mesh<MeshBatch>,
) -> (Vec<Port>, OwnPort) {
    let wakers = (0..plan.shards).map(|shard| mesh.waker(shard));
    let (ports, (port, rung), driver) = BusLink::new(wakers).split();
    let origin = mesh.origin();
    state.set_bus(Health::Down, HubFigures::default());
    driver.start(backend, state.clone(), move || now(origin));
    (ports, OwnPort { port, rung, origin })
}

fn shard_options(plan: &Plan, shard: ShardIndex) -> ShardOptions {
    let limits = &plan.resolved.config.core.limits;
    let core = plan.cpus[usize::from(shard)];
    let on_this_core = plan.cpus.iter().filter(|cpu| **cpu == core).count();
    ShardOptions {
        core: Some(core),
        control_inbox_max: limits.control_inbox_max as usize,
        turn: TurnOptions::default().shared_by(on_this_core),
        ..ShardOptions::new(shard, limits.connections_per_shard)
    }
}

fn core_options(
    plan: &Plan,
    config: &Arc<CoreConfig>,
    state: &NodeState,
    shard: ShardIndex,
) -> Result<CoreOptions, ServeError> {
    let listen = &plan.resolved.config.node.server.listen;
    Ok(CoreOptions {
        shard,
        shards: plan.shards,
        config: config.clone(),
        seed: random()?,
        proxy_listeners: listen.iter().map(|listen| listen.proxy_protocol).collect(),
        version: VERSION.into(),
        started_unix_ms: state.started_unix_ms(),
        assets: assets(plan.resolved.demo),
    })
}

pub(super) fn random() -> Result<u64, ServeError> {
    getrandom::u64().map_err(|error| system("read random bytes")(error.into()))
}

/// A name for this run of the process, unlike any other's.
pub(super) fn uid() -> Result<String, ServeError> {
    Ok(format!("{:016x}{:016x}", random()?, random()?))
}

/// Keeps the control plane's thread off the cores of the shards, where there are others.
pub(super) fn leave_cores_to_shards(plan: &Plan) {
    let others: Vec<usize> =
        crate::io::cores().into_iter().filter(|core| !plan.cpus.contains(core)).collect();
    if others.is_empty() {
        return;
    }
    let mut set = rustix::thread::CpuSet::new();
    for core in &others {
        set.set(*core);
    }
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(%error, "cannot keep the control plane off the shards' cores");
    }
}

/// How a person on this machine writes the host of an address.
pub(super) fn host_text(ip: IpAddr) -> String {
    match ip {
        ip if ip.is_unspecified() => "localhost".to_owned(),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_in_its_own_words() {
        let told = |panic: Box<dyn std::any::Any + Send>| panic_message(panic.as_ref());
        assert_eq!(told(Box::new("plain")), "plain");
        assert_eq!(told(Box::new(format!("slot {}", 7))), "slot 7");
        assert_eq!(told(Box::new(7)), "it panicked");
    }

    #[test]
    fn an_address_is_written_for_people() {
        let check = |ip: &str, text: &str| assert_eq!(host_text(ip.parse().unwrap()), text);
        check("127.0.0.1", "127.0.0.1");
        check("::1", "[::1]");
        check("0.0.0.0", "localhost");
        check("::", "localhost");
    }
}
