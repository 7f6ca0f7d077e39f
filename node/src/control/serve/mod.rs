//! `ringmain serve`: one node from start to drain.
//!
//! Owns the order of things: look at the machine, bind, start the shards, serve the admin port, say
//! so, wait for a signal, drain, end. The control plane is one tokio runtime on the main thread; it is
//! never on the way of a frame.
//!
//! A shard that ends by itself takes the process down: a node with a dead shard would hold a part of
//! its channels and answer for none of them.

mod assets;
mod banner;
mod drain;
mod shards;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::drain::Ending;
use self::shards::{OwnPort, Shards};
use super::admin::{self, Access, AdminOptions};
use super::bus::Backend;
use super::check::Plan;
use super::check::facts::Facts;
use super::cli::say;
use super::cluster::{self, ClusterOptions};
use super::config::Resolved;
use super::failure::Failure;
use super::logging;
use super::router::Router;
use super::state::{NodeState, Phase};
use crate::core::engine::ShardIndex;
use crate::core::metrics::Metric;
use crate::io::{ListenError, ListenSpec, Listeners, SocketOptions, StartError};

/// Why a node did not start, or did not go on.
#[derive(Debug, Error)]
pub enum ServeError {
    /// An address for clients, or the admin port's, cannot be had.
    #[error("{}", listen_error(.0))]
    Listen(#[from] ListenError),
    /// The admin port cannot be opened for another reason.
    #[error("cannot listen on {address} for the admin port: {source}")]
    Admin {
        /// The configured address.
        address: SocketAddr,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// A shard cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Something of the operating system's that every program needs.
    #[error("cannot {step}: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// A shard failed. A bug.
    #[error("shard {shard} failed: {message}")]
    Shard {
        /// Which one.
        shard: ShardIndex,
        /// What its panic said.
        message: String,
    },
}

fn listen_error(error: &ListenError) -> String {
    match error {
        ListenError::InUse { address, holder: Some(holder) } => {
            format!("{address} is already in use by process {} ({})", holder.pid, holder.name)
        }
        ListenError::InUse { address, holder: None } => format!("{address} is already in use"),
        other => other.to_string(),
    }
}

impl ServeError {
    /// What to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Listen(ListenError::InUse { holder: Some(holder), .. }) => {
                Some(format!("stop it (kill {}), or listen elsewhere (--listen, --admin)", holder.pid))
            }
            Self::Listen(ListenError::InUse { .. }) => Some(
                "`ss -ltnp` as root names the process; or listen elsewhere (--listen, --admin)".to_owned(),
            ),
            Self::Listen(_) | Self::Start(_) => None,
            Self::Admin { .. } => Some("listen elsewhere: --admin 127.0.0.1:8001".to_owned()),
            Self::System { .. } => None,
            Self::Shard { .. } => Some("this is a bug: please report it with the lines above".to_owned()),
        }
    }

    /// Whether the node is broken, rather than refused something.
    pub fn is_bug(&self) -> bool {
        matches!(self, Self::Shard { .. })
    }
}

/// Maps an IO error of a named step.
fn system(step: &'static str) -> impl Fn(std::io::Error) -> ServeError {
    move |source| ServeError::System { step, source }
}

/// Runs a node until it has drained.
pub fn run(resolved: Resolved) -> Result<ExitCode, Failure> {
    crate::io::prefault_code();
    logging::init(&resolved.config.node.log);
    let plan = Plan::new(resolved, &Facts::read());
    if let Some(error) = plan.refusal() {
        return Err(error.into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
    let runtime = runtime.map_err(system("start the control plane"))?;
    // The broker's client stays on this thread, and so do its tasks. Not a `LocalSet`: each of its wake-ups is a
    // system call.
    let ending = runtime.block_on(node(&plan))?;
    // Connections to the admin port are cut here; nobody is served by them any more.
    drop(runtime);
    Ok(match ending {
        Ending::Drained => ExitCode::SUCCESS,
        Ending::Cut { exit_code } => ExitCode::from(exit_code),
    })
}

/// How long telling the other nodes may take.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, ServeError> {
        let error = system("handle signals");
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(&error)?,
            interrupt: signal(SignalKind::interrupt()).map_err(&error)?,
        })
    }

    /// Waits for either; gives its name and number.
    async fn next(&mut self) -> (&'static str, u8) {
        tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", 15),
            _ = self.interrupt.recv() => ("SIGINT", 2),
        }
    }
}

async fn node(plan: &Plan) -> Result<Ending, ServeError> {
    let mut signals = Signals::new()?;
    let state = Arc::new(NodeState::new(node_name(plan), shards::uid()?));
    let admin_config = plan.resolved.config.node.admin.clone();
    let (admin_listener, admin_address) = bind_admin(admin_config.listen.0)?;
    let mut shards = Shards::start(plan, &state, plan.backend.clone())?;
    shards::leave_cores_to_shards(plan);

    let router = Router::new(shards.senders());
    tokio::spawn(router.clone().deliver(shards.take_answers()));
    join_cluster(plan, &state, &router, &mut shards)?;
    let connections_max = admin_config.connections_max as usize;
    let routes = admin::routes(AdminOptions {
        access: access(&plan.resolved),
        config: admin_config,
        core: shards.config(),
        router: router.clone(),
        node: state.clone(),
        shards: shards.metrics(),
    });
    tokio::spawn(admin::listener::serve(admin_listener, routes, connections_max));

    state.enter(Phase::Running);
    say(&banner::text(plan, shards.addresses(), admin_address));
    notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(version = super::VERSION, shards = plan.shards, "ready");

    let (name, _) = tokio::select! {
        signal = signals.next() => signal,
        failed = shards.failed() => return Err(failed),
    };
    tracing::info!(signal = name, "draining");
    state.enter(Phase::Draining);
    notify(&[sd_notify::NotifyState::Stopping]);
    let ending = drain::run(&plan.resolved.config.node.server, &mut shards, &router, &mut signals).await;
    // Nobody is here any more: others need not wait until this node counts as dead.
    if let Some(cluster) = router.cluster() {
        // A bus that does not answer keeps no node from ending.
        let _ = tokio::time::timeout(LEAVE_TIMEOUT, cluster.leave()).await;
    }
    ending
}

/// Runs the services between nodes, where there is a bus.
fn join_cluster(
    plan: &Plan,
    state: &Arc<NodeState>,
    router: &Arc<Router>,
    shards: &mut Shards,
) -> Result<(), ServeError> {
    let Some(OwnPort { port, rung, origin }) = shards.take_own_port() else { return Ok(()) };
    let config = &plan.resolved.config.node.cluster;
    let options = ClusterOptions {
        node: u128::from(shards::random()?) << 64 | u128::from(shards::random()?),
        // Two nodes of one host differ by where they listen.
        name: match (&plan.resolved.config.node.server.name, shards.addresses().first()) {
            (None, Some(listens)) => format!("{}/{listens}", state.name),
            _ => state.name.clone(),
        },
        address: config.address.clone().unwrap_or_default(),
        capacity: config.capacity,
        slot_groups: plan.backend.as_ref().map_or(1, Backend::slot_groups),
        shards: plan.shards,
        ticket_key: config.ticket_key.clone(),
    };
    let (metrics, node) = (shards.metrics(), state.clone());
    let load = move || {
        let connections: u64 = metrics.iter().map(|shard| shard.value(Metric::Connections)).sum();
        (u32::try_from(connections).unwrap_or(u32::MAX), node.not_ready().is_empty())
    };
    let (handle, reports, driver) = cluster::driver::new(router.clone(), state.clone(), Box::new(load));
    router.join_cluster(handle, reports);
    tokio::task::spawn_local(driver.run(options, Box::new(port), rung, move || shards::now(origin)));
    Ok(())
}

fn access(resolved: &Resolved) -> Access {
    match &resolved.config.node.admin.api_key {
        Some(key) => Access::Key(key.clone()),
        None if resolved.demo => Access::Open,
        None => Access::Closed,
    }
}

fn node_name(plan: &Plan) -> String {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    plan.resolved.config.node.server.name.clone().unwrap_or_else(host)
}

fn bind_admin(address: SocketAddr) -> Result<(tokio::net::TcpListener, SocketAddr), ServeError> {
    admin::listener::bind(address).map_err(|source| {
        // The same look as for the addresses of clients names the process that holds the port.
        let spec = ListenSpec::Tcp { ip: address.ip(), first: address.port(), last: address.port() };
        match Listeners::bind(&[spec], &SocketOptions::default(), 1) {
            Err(error) => ServeError::Listen(error),
            Ok(_) => ServeError::Admin { address, source },
        }
    })
}

/// Tells systemd, where it asked to be told.
fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}
