//! What of a node's bus outlives its connections, and how it gets the next one.
//!
//! Owns: the node's incarnation, what it has seen of the streams, which nodes it knows to live; dialling, with
//! backoff. Must not know: what goes over a connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{Client, ConnectOptions, Event};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Sender, UnboundedReceiver};

use super::barrier::{Stage, Witness};
use super::ephemeral::Speech;
use super::life::{End, Life};
use super::options::{Login, NatsOptions};
use super::subjects::Subjects;
use crate::backend::{BackendEnds, Domain, Reply, Request};
use crate::backoff::Backoff;
use crate::nonce::Nonces;
use crate::runtime::tell;
use crate::seldom::Seldom;

/// The domain of ephemeral channels; stream `n` is domain `n + 1`.
pub(super) const CORE: Domain = Domain(0);

/// Longest wait for a connection, in milliseconds.
const CONNECT_MS_MAX: u64 = 1_000;

/// First and longest pause between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The client's own check of its connection, beside our canaries.
const PING: Duration = Duration::from_millis(500);

/// Messages that one subscription may hold before they are lost, which ends the connection.
const SUBSCRIPTION_MESSAGES_MAX: usize = 65_536;

/// Commands to the client's writer.
const COMMANDS_MAX: usize = 16_384;

/// Nodes known to live at the same time; beyond them new ones are not waited for.
pub(super) const PEERS_MAX: usize = 1_024;

/// What is remembered of a stream.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) witness: Witness,
    /// Our last canary that came back.
    pub(super) canary: Option<(u64, Vec<u8>)>,
}

/// A node, over all its connections.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) options: NatsOptions,
    pub(super) subjects: Subjects,
    pub(super) incarnation: u64,
    pub(super) nonces: Nonces,
    pub(super) memories: Vec<Memory>,
    /// When each other node was heard last.
    pub(super) peers: HashMap<u64, Instant>,
    /// What this node has published on ephemeral channels.
    pub(super) speech: Speech,
    /// When our heart came back last, in any life.
    pub(super) alive: Instant,
    pub(super) replies: Sender<Reply>,
    /// Number of the last canary and of the last heart.
    pub(super) pulses: u64,
    pub(super) warned: Seldom,
    /// Which domains the hub takes for lost.
    lost: Vec<bool>,
    reachable: bool,
}

/// Runs a node's bus until the hub ends. On a [`tokio::runtime::LocalRuntime`].
pub async fn run(options: NatsOptions, ends: BackendEnds) {
    let BackendEnds { mut requests, replies, .. } = ends;
    let mut nonces = Nonces::new(seed());
    let streams = usize::from(options.streams.max(1));
    let mut node = Node {
        subjects: Subjects::new(&options),
        incarnation: nonces.draw(),
        nonces,
        memories: vec![Memory { witness: Witness::NEW, canary: None }; streams],
        peers: HashMap::new(),
        speech: Speech::default(),
        alive: Instant::now(),
        replies,
        pulses: 0,
        warned: Seldom::default(),
        lost: vec![false; streams + 1],
        reachable: false,
        options,
    };
    node.tell(Reply::Reachable(false)).await;
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut turn = node.nonces.below(node.options.servers.len().max(1) as u64) as usize;
    loop {
        turn = turn.wrapping_add(1);
        let doubt = Arc::new(Notify::new());
        let attempt = dial(&node.options, turn, doubt.clone());
        let Some(attempt) = refusing(&mut requests, &node.replies, attempt).await else { return };
        if let Err(why) = &attempt
            && node.warned.is_due()
        {
            tracing::warn!("{why}; it is tried again until it works");
        }
        if let Ok(client) = attempt {
            let begun = Instant::now();
            if Life::new(&mut node, client, doubt).run(&mut requests).await == End::HubEnded {
                return;
            }
            node.all_lost().await;
            if begun.elapsed() > 4 * PAUSE_MAX {
                backoff.reset();
            }
        }
        let pause = tokio::time::sleep(backoff.next(node.nonces.draw()));
        if refusing(&mut requests, &node.replies, pause).await.is_none() {
            return;
        }
    }
}

/// A seed of this node's nonces; from the clock and an address where the system has no randomness.
fn seed() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => {
            super::read::unix_ms() ^ (std::ptr::from_ref(&bytes) as u64) << 20 ^ u64::from(std::process::id())
        }
    }
}

/// Answers requests as a lost broker does, while `until` is awaited; `None` when the hub ended.
async fn refusing<T>(
    requests: &mut UnboundedReceiver<Request>,
    replies: &Sender<Reply>,
    until: impl Future<Output = T>,
) -> Option<T> {
    let mut until = std::pin::pin!(until);
    loop {
        tokio::select! {
            done = &mut until => return Some(done),
            request = requests.recv() => {
                if let Some(reply) = request?.refusal() {
                    replies.send(reply).await.ok()?;
                }
            }
        }
    }
}

/// One attempt at one server; the error is for people and shows no credential.
async fn dial(options: &NatsOptions, turn: usize, doubt: Arc<Notify>) -> Result<Client, String> {
    let server = options.servers.get(turn % options.servers.len().max(1));
    let (host, port) = server.ok_or_else(|| "no NATS server is configured".to_owned())?;
    let connect = connect_options(options, doubt).await;
    let connect =
        connect.map_err(|error| format!("the NATS credentials cannot be read: {}", error.kind()))?;
    let dialling = connect.connect(options.dialed(host, *port));
    match tokio::time::timeout(Duration::from_millis(2 * CONNECT_MS_MAX), dialling).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(format!("no connection to the NATS server {host}:{port}: {error}")),
        Err(_) => Err(format!("the NATS server {host}:{port} does not answer")),
    }
}

pub(super) async fn connect_options(
    options: &NatsOptions,
    doubt: Arc<Notify>,
) -> std::io::Result<ConnectOptions> {
    let mut dialled = ConnectOptions::new()
        .name("ringmain")
        .connection_timeout(Duration::from_millis(CONNECT_MS_MAX))
        .ping_interval(PING)
        .subscription_capacity(SUBSCRIPTION_MESSAGES_MAX)
        .client_capacity(COMMANDS_MAX)
        .ignore_discovered_servers()
        // A connection that is cut is given up: the next one is ours to make, and nothing outlives it.
        .max_reconnects(1)
        .require_tls(options.tls)
        .event_callback(move |event| {
            let doubt = doubt.clone();
            async move {
                match event {
                    Event::Connected => return,
                    // A permission that is missing shows here.
                    Event::ServerError(error) => tracing::warn!(%error, "the NATS server complains"),
                    event => tracing::debug!(%event, "NATS"),
                }
                doubt.notify_one();
            }
        });
    if let Some(path) = &options.tls_ca {
        dialled = dialled.add_root_certificates(path.clone());
    }
    if let Some((certificate, key)) = &options.tls_identity {
        dialled = dialled.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(match &options.login {
        Login::None => dialled,
        Login::Password(user, password) => dialled.user_and_password(user.clone(), password.clone()),
        Login::Token(token) => dialled.token(token.clone()),
        Login::Nkey(seed) => dialled.nkey(seed.clone()),
        Login::Credentials(path) => dialled.credentials_file(path).await?,
    })
}

impl Node {
    pub(super) async fn tell(&self, reply: Reply) {
        tell(&self.replies, reply).await;
    }

    /// Says that a domain is lost, once.
    pub(super) async fn lost(&mut self, domain: Domain) {
        if let Some(stream) = domain.0.checked_sub(1) {
            let witness = &mut self.memories[stream as usize].witness;
            if witness.stage == Stage::Watching {
                witness.stage = Stage::Broken;
            }
        }
        if !std::mem::replace(&mut self.lost[domain.0 as usize], true) {
            self.tell(Reply::Lost { domain }).await;
        }
        self.reach(false).await;
    }

    /// Says that a domain is back, if it was lost.
    pub(super) async fn back(&mut self, domain: Domain) {
        if std::mem::replace(&mut self.lost[domain.0 as usize], false) {
            self.tell(Reply::Back { domain }).await;
        }
    }

    pub(super) async fn reach(&mut self, reachable: bool) {
        if std::mem::replace(&mut self.reachable, reachable) != reachable {
            self.tell(Reply::Reachable(reachable)).await;
        }
    }

    async fn all_lost(&mut self) {
        for domain in 0..self.lost.len() as u32 {
            self.lost(Domain(domain)).await;
        }
    }
}
