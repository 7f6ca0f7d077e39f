//! One connection, from its first word to its loss.
//!
//! Owns: the loop over requests, what comes from the server and time; which domains are up. Must not know: dialling.
//!
//! Everything that comes from the server goes through one bounded queue into this loop, which owns all state; walks
//! and barriers are tasks that report into the same queue. Invariants: nothing of a domain is told after its loss and
//! before its return; a task of a life that is over finds nobody to report to.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::subject::ToSubject;
use async_nats::{Client, HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, channel};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::api::{Api, ApiError, Listed};
use super::barrier::Believed;
use super::confirm::Confirm;
use super::ephemeral::Suspects;
use super::interest::Channels;
use super::keep::Keeping;
use super::node::{CORE, Node};
use super::publish::{Echoes, Publishes};
use super::read::Runs;
use super::streams::{Step, StreamLife};
use crate::backend::{Call, ReadPage, Reply, Request};
use crate::epoch::{Epoch, Position};
use crate::types::{BusError, PublishError};

/// Messages on their way into the loop.
const INCOMING_MAX: usize = 4_096;

/// Messages and requests handled before time is looked at.
const TURN_MAX: usize = 256;

/// Grain of everything that is due by time, in milliseconds.
pub(super) const TICK_MS: u64 = 50;

/// Longest wait for room towards the server, in milliseconds. The connection is lost then.
const ROOM_MS_MAX: u64 = crate::backend::SILENCE_MS_MAX;

/// Walks at the same time; others wait.
const WALKS_MAX: usize = 64;

/// Time within which a node that was heard counts as living, in milliseconds.
pub(super) const PEER_MS: u64 = 1_500;

/// Why a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The connection is lost or in doubt.
    Lost,
    /// The node ends.
    HubEnded,
}

/// What comes into the loop.
pub(super) enum In {
    /// A positioned channel's publication, said again by its stream.
    Heard {
        unit: u64,
        message: Message,
    },
    /// An ephemeral channel's publication.
    Said {
        unit: u64,
        message: Message,
    },
    Canary {
        stream: u16,
        message: Message,
    },
    Record {
        stream: u16,
        message: Message,
    },
    Heart(Message),
    Asked(Message),
    Passed {
        stream: u16,
        result: Result<Believed, ApiError>,
    },
    Read {
        call: Call,
        result: Result<ReadPage, BusError>,
    },
    Cleared {
        call: Call,
        result: Result<Position, BusError>,
    },
    Tops {
        stream: u16,
        number: u64,
        result: Result<Option<Listed>, ApiError>,
    },
    Clock {
        stream: u16,
        ahead_ms: i64,
    },
    /// Nothing to report.
    Done,
}

/// See the module's doc.
pub(super) struct Life<'n> {
    pub(super) node: &'n mut Node,
    pub(super) client: Client,
    pub(super) inbox: String,
    pub(super) incoming: Sender<In>,
    received: Option<Receiver<In>>,
    doubt: Arc<Notify>,
    /// The connection is not to be used any more.
    pub(super) broken: bool,
    pub(super) streams: Vec<StreamLife>,
    pub(super) core_up: bool,
    /// When our heart came back last.
    pub(super) core_heard: Instant,
    pub(super) pulsed: Instant,
    ticked: Instant,
    pub(super) channels: Channels,
    pub(super) confirm: Confirm,
    pub(super) publishes: Publishes,
    pub(super) echoes: Echoes,
    pub(super) suspects: Suspects,
    pub(super) keeping: Keeping,
    pub(super) walks: Arc<tokio::sync::Semaphore>,
    pub(super) runs: Rc<Runs>,
    /// Nodes that lived when the last life ended.
    pub(super) expected: Vec<u64>,
    /// Tasks that end with this life.
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        for stream in &self.streams {
            if let Step::Passing(task) = &stream.step {
                task.abort();
            }
        }
    }
}

impl<'n> Life<'n> {
    pub(super) fn new(node: &'n mut Node, client: Client, doubt: Arc<Notify>) -> Life<'n> {
        let (incoming, received) = channel(INCOMING_MAX);
        let (now, inbox) = (Instant::now(), client.new_inbox());
        let streams = (0..node.subjects.streams()).map(|_| StreamLife::new(now)).collect();
        let expected = node.living(node.alive);
        Life {
            publishes: Publishes::new(&inbox),
            inbox,
            node,
            client,
            incoming,
            received: Some(received),
            doubt,
            broken: false,
            streams,
            core_up: false,
            core_heard: now,
            pulsed: now,
            ticked: now,
            channels: Channels::default(),
            confirm: Confirm::default(),
            echoes: Echoes::default(),
            suspects: Suspects::default(),
            keeping: Keeping::default(),
            walks: Arc::new(tokio::sync::Semaphore::new(WALKS_MAX)),
            runs: Rc::default(),
            expected,
            tasks: Vec::new(),
        }
    }

    /// Lives until the connection is lost or the hub ends.
    pub(super) async fn run(mut self, requests: &mut UnboundedReceiver<Request>) -> End {
        let Some(mut received) = self.received.take() else { return End::Lost };
        let Some(mut answers) = self.open(format!("{}.>", self.inbox)).await else { return End::Lost };
        self.listen().await;
        self.pulse().await;
        let mut tick = tokio::time::interval(Duration::from_millis(TICK_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(TURN_MAX);
        let mut asked = Vec::with_capacity(TURN_MAX);
        let doubt = self.doubt.clone();
        let end = loop {
            tokio::select! {
                () = doubt.notified() => break End::Lost,
                count = requests.recv_many(&mut asked, TURN_MAX) => {
                    if count == 0 {
                        break End::HubEnded;
                    }
                    for request in asked.drain(..) {
                        self.request(request).await;
                    }
                }
                answer = answers.next() => {
                    let Some(answer) = answer else { break End::Lost };
                    self.answer(&answer).await;
                    for _ in 1..TURN_MAX {
                        let Some(Some(answer)) = answers.next().now_or_never() else { break };
                        self.answer(&answer).await;
                    }
                }
                _ = received.recv_many(&mut batch, TURN_MAX) => {
                    for message in batch.drain(..) {
                        self.handle(message).await;
                    }
                }
                _ = tick.tick() => self.tick().await,
            }
            if self.broken {
                break End::Lost;
            }
        };
        if end == End::HubEnded {
            self.say_goodbye().await;
        } else {
            self.give_up_all().await;
        }
        end
    }

    /// The subscriptions that every life has.
    async fn listen(&mut self) {
        let (heart, sync) = (self.node.subjects.heart(), self.node.subjects.sync());
        self.forward(heart, In::Heart).await;
        self.forward(sync, In::Asked).await;
        for stream in 0..self.node.subjects.streams() {
            let canaries = self.node.subjects.heard_canaries(stream);
            self.forward(canaries, move |message| In::Canary { stream, message }).await;
            let record = self.node.subjects.heard_epoch(stream);
            self.forward(record, move |message| In::Record { stream, message }).await;
        }
    }

    async fn forward(&mut self, subject: String, wrap: impl Fn(Message) -> In + 'static) {
        if let Some(task) = self.subscribe(subject, wrap).await {
            self.tasks.push(task);
        }
    }

    async fn open(&mut self, subject: String) -> Option<Subscriber> {
        let subscribed = self.client.subscribe(subject);
        let subscribed = tokio::time::timeout(Duration::from_millis(ROOM_MS_MAX), subscribed).await;
        let messages = subscribed.ok().and_then(Result::ok);
        self.broken |= messages.is_none();
        messages
    }

    /// Subscribes, and brings what comes into the loop until the task is aborted.
    pub(super) async fn subscribe(
        &mut self,
        subject: String,
        wrap: impl Fn(Message) -> In + 'static,
    ) -> Option<JoinHandle<()>> {
        let mut messages = self.open(subject).await?;
        let incoming = self.incoming.clone();
        Some(tokio::task::spawn_local(async move {
            while let Some(message) = messages.next().await {
                if incoming.send(wrap(message)).await.is_err() {
                    return;
                }
            }
        }))
    }

    /// Sends to the server; if there is no room for long, the connection is lost.
    pub(super) async fn send(
        &mut self,
        subject: impl ToSubject,
        reply_to: Option<Subject>,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) {
        let client = &self.client;
        let mut sending = pin!(async {
            match (reply_to, headers) {
                (None, None) => client.publish(subject, payload).await,
                (None, Some(headers)) => client.publish_with_headers(subject, headers, payload).await,
                (Some(reply_to), None) => client.publish_with_reply(subject, reply_to, payload).await,
                (Some(reply_to), Some(headers)) => {
                    client.publish_with_reply_and_headers(subject, reply_to, headers, payload).await
                }
            }
        });
        let sent = match sending.as_mut().now_or_never() {
            Some(sent) => sent.is_ok(),
            None => {
                let room = tokio::time::timeout(Duration::from_millis(ROOM_MS_MAX), sending);
                matches!(room.await, Ok(Ok(())))
            }
        };
        self.broken |= !sent;
    }

    /// Runs a task that reports into the loop, when it is its turn.
    pub(super) fn walk(&mut self, task: impl Future<Output = In> + 'static) {
        let (incoming, walks) = (self.incoming.clone(), self.walks.clone());
        tokio::task::spawn_local(async move {
            let Ok(_turn) = walks.acquire().await else { return };
            let _ = incoming.send(task.await).await;
        });
    }

    async fn request(&mut self, request: Request) {
        if !self.is_up(&request) {
            if let Request::Unsubscribe { target } = &request {
                self.unsubscribe(target);
            } else if let Some(reply) = request.refusal() {
                self.node.tell(reply).await;
            }
            return;
        }
        match request {
            Request::Subscribe { call, target } => self.want(call, &target).await,
            Request::Unsubscribe { target } => self.unsubscribe(&target),
            Request::Publish { call, target, id, record } => self.publish(call, target, &id, record).await,
            Request::Read { call, target, query } => self.read(call, target, query).await,
            Request::Clear { call, target } => self.clear(call, &target).await,
        }
    }

    fn is_up(&self, request: &Request) -> bool {
        let target = request.target();
        match (request, target.options.is_positioned()) {
            // Looked after when its stream is known.
            (Request::Publish { .. }, true) => true,
            (_, true) => self.is_stream_up(self.stream_of(&target.name)),
            (_, false) => self.core_up,
        }
    }

    pub(super) fn is_stream_up(&self, stream: u16) -> bool {
        matches!(self.streams[usize::from(stream)].step, Step::Up)
    }

    pub(super) fn stream_of(&self, name: &str) -> u16 {
        self.node.subjects.stream_of(crate::slot::slot_of(name))
    }

    /// A channel's epoch: of the stream's nonce and the channel's name, for no two channels share one.
    pub(super) fn epoch_of(&self, stream: u16, name: &str) -> Epoch {
        let nonce = self.streams[usize::from(stream)].record.nonce;
        let mut mixed = crate::nonce::Nonces::new(nonce ^ super::subjects::hash(name));
        Epoch::new(mixed.draw())
    }

    pub(super) fn api(&self, stream: u16) -> Api {
        Api::new(self.client.clone(), self.node.subjects.stream_name(stream))
    }

    async fn handle(&mut self, message: In) {
        match message {
            In::Heard { unit, message } => self.heard(unit, &message).await,
            In::Said { unit, message } => self.said(unit, &message).await,
            In::Canary { stream, message } => self.canary(stream, &message).await,
            In::Record { stream, message } => self.record(stream, &message).await,
            In::Heart(message) => self.heart(&message).await,
            In::Asked(message) => self.asked(message).await,
            In::Passed { stream, result } => self.passed(stream, result).await,
            In::Read { call, result } => self.handle_read(call, result).await,
            In::Tops { stream, number, result } => self.tops_listed(stream, number, result).await,
            In::Cleared { call, result } => {
                if self.publishes.walked(call) {
                    self.node.tell(Reply::Cleared { call, result }).await;
                }
            }
            In::Done => (),
            In::Clock { stream, ahead_ms } => {
                self.streams[usize::from(stream)].clock_ahead_ms = Some(ahead_ms);
            }
        }
    }

    async fn tick(&mut self) {
        let now = Instant::now();
        // What this thread slept through is no silence of the server.
        let late = (now - self.ticked).saturating_sub(Duration::from_millis(2 * TICK_MS));
        self.ticked = now;
        self.core_heard = (self.core_heard + late).min(now);
        for stream in &mut self.streams {
            stream.heard = (stream.heard + late).min(now);
        }
        let silence = Duration::from_millis(crate::backend::SILENCE_MS_MAX);
        if now - self.core_heard > silence {
            self.broken = true;
            return;
        }
        for stream in 0..self.node.subjects.streams() {
            let n = usize::from(stream);
            let due = match &self.streams[n].step {
                Step::Again(at) => *at <= now && self.core_up,
                Step::Passing(_) => false,
                Step::Proving | Step::Up if now - self.streams[n].heard > silence => {
                    self.stream_lost(stream).await;
                    false
                }
                Step::Proving | Step::Up => false,
            };
            if due {
                self.pass(stream);
            }
        }
        self.pulse_if_due(now).await;
        self.look_after_publishes(now).await;
        self.look_after_rounds(now).await;
        self.look_after_tops(now);
        self.look_after_suspects(now).await;
        self.look_after_keeping(now).await;
    }

    /// The connection is lost: everything that waits is answered.
    async fn give_up_all(&mut self) {
        for stream in 0..self.node.subjects.streams() {
            self.forget_stream(stream).await;
        }
        for call in self.confirm.fail(CORE) {
            self.node.tell(Reply::Subscribed { call, result: Err(BusError::Unavailable) }).await;
        }
        for call in self.echoes.fail() {
            self.node.tell(Reply::Published { call, result: Err(PublishError::Unknown) }).await;
        }
    }

    /// Whether all that this node uses can be reached.
    pub(super) async fn settle_reach(&mut self) {
        let up = self.core_up && self.streams.iter().all(|stream| matches!(stream.step, Step::Up));
        self.node.reach(up).await;
    }
}
