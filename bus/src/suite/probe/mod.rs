//! What the suite drives a cluster with: it sends commands, writes down what it is told, and checks with
//! every event the clauses that hold at all times.
//!
//! Owns: the record of what each node was told. Must not know: the backend.
//! Invariant: panics at the first event that breaks P2, P3, P5, P13, E1, E2, E4, C1, C5 or C6.

mod check;

use std::collections::{BTreeSet, HashMap};

use ringmain_proto::message::Publication;

use crate::contract::{Bus, LOSS_VISIBLE_MS_MAX};
use crate::epoch::{Epoch, Position};
use crate::suite::{Cluster, Faults};
use crate::types::{
    Accepted, BusError, Channel, ChannelId, ChannelOptions, Event, Health, HistoryQuery, Outcome, Page,
    PublicationId, PublishError, Token,
};

/// Longest nap of a loop that waits, in milliseconds.
const NAP_MS: u64 = 10;

/// What a node was told about an open channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A publication, at its position (none on an ephemeral channel).
    Arrival(Position, String),
    /// Something may be missing; the chain goes on here.
    Gap(Position),
    /// Another life; the chain goes on here.
    EpochChanged(Position),
}

/// The answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To open.
    Opened(Result<Position, BusError>),
    /// To publish.
    Published(Result<Accepted, PublishError>),
    /// To read, with offsets and data.
    Read(Result<(Page, Vec<(u64, String)>), BusError>),
    /// To clear.
    Cleared(Result<Position, BusError>),
}

#[derive(Debug)]
struct View {
    name: String,
    options: ChannelOptions,
    /// Of the open that made it; answers to earlier opens are not for it.
    made_by: Token,
    /// None until the open is answered.
    cursor: Option<Position>,
    seen: Vec<Seen>,
}

/// A command in flight.
#[derive(Debug)]
struct Sent {
    at_ms: u64,
    /// What the machine was late until then.
    late_ms: u64,
    opens: bool,
    channel: ChannelId,
    name: String,
    data: String,
}

#[derive(Debug, Default)]
struct NodeView {
    views: HashMap<ChannelId, View>,
    ids: HashMap<String, ChannelId>,
    free: Vec<ChannelId>,
    sent: HashMap<Token, Sent>,
    answers: HashMap<Token, Answer>,
    health: Vec<(u64, Health)>,
    /// It has been polled all the time since then.
    polled_since_ms: u64,
}

/// Drives a cluster.
#[derive(Debug)]
pub struct Probe<C: Cluster> {
    /// The cluster, for its faults.
    pub cluster: C,
    nodes: Vec<NodeView>,
    /// Nodes that are not polled.
    deaf: BTreeSet<usize>,
    drawn: u64,
    /// P3: what each position names, with its predecessor where it is known.
    names: HashMap<(String, Epoch, u64), (String, Option<u64>)>,
    /// P5: where each publication stands, for the suite publishes no data under two ids.
    places: HashMap<(String, Epoch, String), u64>,
    /// P5: how many attempts to publish some data were not certainly refused.
    attempts: HashMap<String, u32>,
    /// P4: what was accepted.
    accepted: Vec<(String, Position)>,
}

impl<C: Cluster> Probe<C> {
    /// Waits until every node is up.
    pub fn new(cluster: C) -> Probe<C> {
        let nodes = (0..cluster.nodes()).map(|_| NodeView::default()).collect();
        let mut probe = Probe {
            cluster,
            nodes,
            deaf: BTreeSet::new(),
            drawn: 0,
            names: HashMap::new(),
            places: HashMap::new(),
            attempts: HashMap::new(),
            accepted: Vec::new(),
        };
        probe.settle_up();
        probe
    }

    /// The last node: the one that listens while node 0 publishes.
    pub fn last(&self) -> usize {
        self.nodes.len() - 1
    }

    /// A channel name of this run.
    pub fn name(&self, label: &str) -> String {
        format!("suite:{:x}-{label}", self.cluster.run_id())
    }

    /// The time, in `mono_ms`.
    pub fn now_ms(&self) -> u64 {
        self.cluster.now().mono_ms
    }

    /// Stops polling a node, or polls it again.
    pub fn set_deaf(&mut self, node: usize, deaf: bool) {
        if deaf {
            self.deaf.insert(node);
        } else {
            self.deaf.remove(&node);
            self.nodes[node].polled_since_ms = self.now_ms();
        }
    }

    // Waiting

    /// Polls every node once.
    pub fn poll(&mut self) {
        for node in 0..self.nodes.len() {
            if self.deaf.contains(&node) {
                continue;
            }
            let now = self.cluster.now();
            let mut told = Vec::new();
            self.cluster.node(node).poll(now, &mut |event| told.push(Told::new(&event)));
            for event in told {
                self.hear(node, event);
            }
        }
    }

    /// Polls until the condition holds; fails when the cluster's patience is at its end.
    pub fn settle(&mut self, what: &str, mut until: impl FnMut(&Probe<C>) -> bool) {
        let end_ms = self.now_ms() + self.cluster.patience_ms();
        self.poll();
        while !until(self) {
            assert!(self.now_ms() < end_ms, "did not come: {what}");
            self.cluster.pass(NAP_MS);
            self.poll();
        }
    }

    /// Polls until a node says that the broker is lost.
    pub fn settle_down(&mut self, node: usize) {
        self.settle("word of the broker's loss", |probe| {
            probe.health_events(node).last().is_some_and(|(_, health)| *health == Health::Down)
        });
    }

    /// Polls for a time.
    pub fn run_for(&mut self, ms: u64) {
        let end_ms = self.now_ms() + ms;
        while self.now_ms() < end_ms {
            self.cluster.pass(NAP_MS.min(end_ms - self.now_ms()));
            self.poll();
        }
    }

    /// Until every node's bus is up.
    pub fn settle_up(&mut self) {
        let end_ms = self.now_ms() + self.cluster.patience_ms();
        self.poll();
        while (0..self.nodes.len()).any(|node| self.health(node) == Health::Down) {
            assert!(self.now_ms() < end_ms, "the bus does not come up");
            self.cluster.pass(NAP_MS);
            self.poll();
        }
    }

    /// Until no command waits for its answer.
    pub fn settle_answers(&mut self) {
        self.settle("answers to every command", |probe| probe.unanswered() == 0);
    }

    /// Until every open channel of every node stands at its top: nothing is on its way any more.
    pub fn settle_arrivals(&mut self) {
        self.settle_up();
        self.settle_answers();
        for node in 0..self.nodes.len() {
            let open: Vec<_> =
                self.nodes[node].views.values().map(|view| (view.name.clone(), view.options)).collect();
            for (name, options) in open.iter().filter(|(_, options)| options.is_positioned()) {
                let top = self.top(node, name, options);
                self.settle("the top at an open channel", |probe| probe.cursor(node, name) == Some(top));
            }
        }
    }

    // Commands

    /// A turn of one command.
    fn ask<T>(&mut self, node: usize, command: impl FnOnce(&mut dyn Bus) -> T) -> T {
        let bus = self.cluster.node(node);
        let answer = command(bus);
        bus.flush();
        answer
    }

    /// Sends an open.
    pub fn send_open(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Token {
        let id = self.id(node, name);
        let token = self.sent(node, id, name, "");
        self.nodes[node].sent.entry(token).and_modify(|sent| sent.opens = true);
        let view =
            View { name: name.into(), options: *options, made_by: token, cursor: None, seen: Vec::new() };
        self.nodes[node].views.entry(id).or_insert(view);
        let (now, channel) = (self.cluster.now(), Channel { id, name, options });
        if let Outcome::Done(result) = self.ask(node, |bus| bus.open(now, token, channel)) {
            self.hear(node, Told::Opened(token, id, result));
        }
        token
    }

    /// Opens a channel and waits for the answer.
    pub fn open(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Position {
        let token = self.send_open(node, name, options);
        match self.answer(node, token) {
            Answer::Opened(result) => result.expect("a healthy bus opens channels"),
            other => panic!("{other:?} to an open"),
        }
    }

    /// Opens a channel at every node.
    pub fn open_all(&mut self, name: &str, options: &ChannelOptions) {
        for node in 0..self.nodes.len() {
            self.open(node, name, options);
        }
    }

    /// Closes a channel.
    pub fn close(&mut self, node: usize, name: &str) {
        let (now, id) = (self.cluster.now(), self.id(node, name));
        self.nodes[node].views.remove(&id);
        self.ask(node, |bus| bus.close(now, id));
    }

    /// Closes a channel, and gives its id to the next new name.
    pub fn forget(&mut self, node: usize, name: &str) {
        let id = self.id(node, name);
        self.nodes[node].views.remove(&id);
        self.nodes[node].ids.remove(name);
        self.nodes[node].free.push(id);
        self.ask(node, |bus| bus.forget(id));
    }

    /// Sends a publication under a node's own id.
    pub fn send_publish(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Token {
        let sequence = self.drawn + 1;
        let id = PublicationId::Node { incarnation: self.cluster.run_id(), sequence };
        let data = self.data(node, name);
        self.send_publish_as(node, name, options, id, &data)
    }

    /// Data that no other publication has, and that tells where it came from.
    pub fn data(&self, node: usize, name: &str) -> String {
        format!("{name}/{node}/{}", self.drawn + 1)
    }

    /// Sends a publication.
    pub fn send_publish_as(
        &mut self,
        node: usize,
        name: &str,
        options: &ChannelOptions,
        id: PublicationId<'_>,
        data: &str,
    ) -> Token {
        let channel_id = self.id(node, name);
        let token = self.sent(node, channel_id, name, data);
        *self.attempts.entry(data.into()).or_default() += 1;
        let (now, channel) = (self.cluster.now(), Channel { id: channel_id, name, options });
        let publication = Publication { data: data.as_bytes(), ..Publication::default() };
        let outcome = self.ask(node, |bus| bus.publish(now, token, channel, id, &publication));
        if let Outcome::Done(result) = outcome {
            self.hear(node, Told::Published(token, result));
            if let Ok(accepted) = result.as_ref()
                && !accepted.repeated
                && self.nodes[node].views.contains_key(&channel_id)
            {
                // C6: the inline answer is the arrival; a bus that answers inline counts by one.
                let Position { epoch, offset } = accepted.position;
                let previous = offset.saturating_sub(1);
                self.hear(
                    node,
                    Told::Arrival { channel: channel_id, epoch, previous, offset, data: data.into() },
                );
            }
        }
        token
    }

    /// Publishes and waits for the answer.
    pub fn try_publish(
        &mut self,
        node: usize,
        name: &str,
        options: &ChannelOptions,
    ) -> Result<Accepted, PublishError> {
        let token = self.send_publish(node, name, options);
        self.published(node, token)
    }

    /// Publishes, waits for the answer, and expects that it was accepted.
    pub fn publish(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Accepted {
        self.try_publish(node, name, options).expect("a healthy bus accepts publications")
    }

    /// Publishes under a key, and waits for the answer.
    pub fn publish_key(
        &mut self,
        node: usize,
        name: &str,
        options: &ChannelOptions,
        key: &str,
    ) -> Result<Accepted, PublishError> {
        let data = self.data(node, name);
        let token = self.send_publish_as(node, name, options, PublicationId::Key(key), &data);
        self.published(node, token)
    }

    /// Waits for the answer to a publish.
    pub fn published(&mut self, node: usize, token: Token) -> Result<Accepted, PublishError> {
        match self.answer(node, token) {
            Answer::Published(result) => result,
            other => panic!("{other:?} to a publish"),
        }
    }

    /// Sends a read.
    pub fn send_read(
        &mut self,
        node: usize,
        name: &str,
        options: &ChannelOptions,
        query: &HistoryQuery,
    ) -> Token {
        let id = self.id(node, name);
        let token = self.sent(node, id, name, "");
        let (now, channel) = (self.cluster.now(), Channel { id, name, options });
        let mut page = Vec::new();
        let mut out = |publication: &Publication<'_>| page.push(named(publication));
        let outcome = self.ask(node, |bus| bus.read(now, token, channel, query, &mut out));
        match outcome {
            Outcome::Done(result) => self.hear(node, Told::Read(token, result, page)),
            Outcome::Pending => assert!(page.is_empty(), "a late answer passed publications inline"),
        }
        token
    }

    /// Reads history and waits for the answer; asked again if the bus was lost over it, which is visible (C2).
    pub fn read(
        &mut self,
        node: usize,
        name: &str,
        options: &ChannelOptions,
        query: &HistoryQuery,
    ) -> Result<(Page, Vec<(u64, String)>), BusError> {
        let end_ms = self.now_ms() + self.cluster.patience_ms();
        loop {
            let told = self.health_events(node).len();
            let token = self.send_read(node, name, options, query);
            let result = match self.answer(node, token) {
                Answer::Read(result) => result,
                other => panic!("{other:?} to a read"),
            };
            if !matches!(result, Err(error) if error.is_temporary()) || self.now_ms() >= end_ms {
                return result;
            }
            let visible_ms = self.now_ms() + LOSS_VISIBLE_MS_MAX;
            while self.health_events(node).len() == told {
                if self.now_ms() >= visible_ms {
                    return result;
                }
                self.run_for(NAP_MS);
            }
            self.settle_up();
        }
    }

    /// The channel's top, asked again while the bus is away or answers are lost.
    pub fn top(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Position {
        let end_ms = self.now_ms() + self.cluster.patience_ms();
        loop {
            match self.read(node, name, options, &HistoryQuery::TOP) {
                Ok((page, _)) => return page.top,
                Err(error) => assert!(error.is_temporary() && self.now_ms() < end_ms, "{error}"),
            }
        }
    }

    /// Sends a clear.
    pub fn send_clear(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Token {
        let id = self.id(node, name);
        let token = self.sent(node, id, name, "");
        let (now, channel) = (self.cluster.now(), Channel { id, name, options });
        if let Outcome::Done(result) = self.ask(node, |bus| bus.clear(now, token, channel)) {
            self.hear(node, Told::Cleared(token, result));
        }
        token
    }

    /// Clears a history and waits for the answer.
    pub fn clear(&mut self, node: usize, name: &str, options: &ChannelOptions) -> Position {
        let token = self.send_clear(node, name, options);
        match self.answer(node, token) {
            Answer::Cleared(result) => result.expect("a healthy bus clears"),
            other => panic!("{other:?} to a clear"),
        }
    }

    /// Waits for the answer to a command.
    pub fn answer(&mut self, node: usize, token: Token) -> Answer {
        self.settle("an answer", |probe| probe.nodes[node].answers.contains_key(&token));
        self.nodes[node].answers[&token].clone()
    }

    /// The answer to a command, if it has come.
    pub fn answered(&self, node: usize, token: Token) -> Option<&Answer> {
        self.nodes[node].answers.get(&token)
    }

    /// Commands without an answer.
    pub fn unanswered(&self) -> usize {
        self.nodes.iter().map(|node| node.sent.len()).sum()
    }

    // What was told

    /// Everything that a node was told of an open channel, in order.
    pub fn seen(&self, node: usize, name: &str) -> &[Seen] {
        self.view(node, name).map_or(&[], |view| &view.seen)
    }

    /// The data of the publications that a node was given.
    pub fn arrivals(&self, node: usize, name: &str) -> Vec<&str> {
        let data = |seen: &'_ Seen| matches!(seen, Seen::Arrival(..));
        self.seen(node, name).iter().filter(|seen| data(seen)).map(Seen::data).collect()
    }

    /// Whether a node was told of a gap or another epoch.
    pub fn was_told(&self, node: usize, name: &str) -> bool {
        self.seen(node, name).iter().any(|seen| !matches!(seen, Seen::Arrival(..)))
    }

    /// Where a node stands in an open channel.
    pub fn cursor(&self, node: usize, name: &str) -> Option<Position> {
        self.view(node, name).and_then(|view| view.cursor)
    }

    /// What a node's bus says of itself.
    pub fn health(&mut self, node: usize) -> Health {
        self.cluster.node(node).health()
    }

    /// When a node was told what of its bus's health.
    pub fn health_events(&self, node: usize) -> &[(u64, Health)] {
        &self.nodes[node].health
    }

    /// P4, at the end of a test whose channels are all whole again: what was accepted in a channel's present
    /// epoch is not above its top.
    pub fn check_accepted(&mut self, node: usize, name: &str, options: &ChannelOptions) {
        let top = self.top(node, name, options);
        for (_, position) in self.accepted.iter().filter(|(other, _)| other == name) {
            assert!(
                position.epoch != top.epoch || position.offset <= top.offset,
                "{position:?} above {top:?}"
            );
        }
    }

    fn view(&self, node: usize, name: &str) -> Option<&View> {
        self.nodes[node].views.get(self.nodes[node].ids.get(name)?)
    }

    fn id(&mut self, node: usize, name: &str) -> ChannelId {
        let node = &mut self.nodes[node];
        if let Some(id) = node.ids.get(name) {
            return *id;
        }
        let fresh = ChannelId((node.ids.len() + node.free.len()) as u32);
        let id = node.free.pop().unwrap_or(fresh);
        node.ids.insert(name.into(), id);
        id
    }

    fn sent(&mut self, node: usize, channel: ChannelId, name: &str, data: &str) -> Token {
        self.drawn += 1;
        let token = Token(self.drawn);
        let (at_ms, late_ms) = (self.now_ms(), self.cluster.late_ms());
        self.nodes[node].sent.insert(
            token,
            Sent { at_ms, late_ms, opens: false, channel, name: name.into(), data: data.into() },
        );
        token
    }
}

impl<C: Faults> Probe<C> {
    /// Cuts a node off, does something at the others while it is away, and lets it come back.
    pub fn cut_off(&mut self, node: usize, meanwhile: impl FnOnce(&mut Probe<C>)) {
        let known = self.nodes[node].health.len();
        self.cluster.isolate(node);
        self.settle("word of the cut", |probe| probe.nodes[node].health.len() > known);
        meanwhile(self);
        self.cluster.rejoin(node);
        self.settle_up();
    }
}

impl Seen {
    fn data(&self) -> &str {
        match self {
            Seen::Arrival(_, data) => data,
            Seen::Gap(_) | Seen::EpochChanged(_) => "",
        }
    }
}

fn named(publication: &Publication<'_>) -> (u64, String) {
    (publication.offset, String::from_utf8_lossy(publication.data).into_owned())
}

/// An [`Event`] that owns what it says.
#[derive(Debug)]
enum Told {
    Opened(Token, ChannelId, Result<Position, BusError>),
    Published(Token, Result<Accepted, PublishError>),
    Read(Token, Result<Page, BusError>, Vec<(u64, String)>),
    Cleared(Token, Result<Position, BusError>),
    Arrival { channel: ChannelId, epoch: Epoch, previous: u64, offset: u64, data: String },
    Gap(ChannelId, Position),
    EpochChanged(ChannelId, Position),
    Health(Health),
    Idle(ChannelId),
}

impl Told {
    fn new(event: &Event<'_>) -> Told {
        match event {
            Event::Opened { token, channel, result } => Told::Opened(*token, *channel, *result),
            Event::Published { token, result } => Told::Published(*token, *result),
            Event::Read { token, result, publications } => {
                let page = publications.clone().map(|publication| named(&publication)).collect();
                Told::Read(*token, *result, page)
            }
            Event::Cleared { token, result } => Told::Cleared(*token, *result),
            Event::Arrival { channel, epoch, previous, publication } => {
                let (offset, data) = named(publication);
                Told::Arrival { channel: *channel, epoch: *epoch, previous: *previous, offset, data }
            }
            Event::Gap { channel, resumed } => Told::Gap(*channel, *resumed),
            Event::EpochChanged { channel, position } => Told::EpochChanged(*channel, *position),
            Event::Health(health) => Told::Health(*health),
            Event::Idle { channel } => Told::Idle(*channel),
        }
    }
}
