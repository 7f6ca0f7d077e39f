//! The node among others: membership, placement, presence between nodes, commands to users on other nodes.
//!
//! Owns what is so between nodes, without IO: [`Cluster`] is given the time, a port of the bus, what the shards report
//! and what the API asks, and gives [`Effect`]s. [`driver`] runs it on the control thread. It must not know which
//! bus it is, nor a connection, nor HTTP.
//!
//! | module | owns |
//! |---|---|
//! | [`message`] | the bytes between nodes, readable by the release before and after |
//! | `net` | the node's own channels on the bus |
//! | `peers` | who lives |
//! | [`presence`] | streams of joins and leaves, questions about who is there |
//! | [`commands`] | commands about users, slots |
//! | [`surveys`] | questions to every node |
//! | [`ring`], [`ticket`] | where users belong |
//! | [`driver`] | the control thread's end |
//!
//! Invariants:
//! * a node of which nothing was heard for [`DEAD_MS`] is gone for the shards, with its members, at once and once;
//! * a node that did not run for [`PAUSED_MS`] (by either clock) begins a new incarnation before it does anything else:
//!   the others had told that its members are gone; and it holds nobody for gone before it has listened again;
//! * nothing here is needed for a publication to arrive: all of it may be slow, or wrong for a moment.

pub mod commands;
pub mod driver;
pub mod message;
mod net;
mod peers;
pub mod presence;
pub mod ring;
pub mod surveys;
pub mod ticket;

use std::collections::BTreeSet;

use ringmain_bus::{Bus, PublishError};
use ringmain_proto::time::Now;

use self::commands::{CommandError, Commands};
use self::message::{AnswerPart, Body, DecodeError, Heartbeat, Question, Sender};
use self::net::{Line, Net, NetEvent, To};
use self::peers::{Heard, Peer, Peers};
use self::presence::Presence;
use self::ring::{Ring, RingNode};
use self::surveys::Surveys;
use self::ticket::{TICKET_TTL_S, Ticket};
use crate::core::api;
use crate::core::cluster::{ClusterCall, News, NodeId, Report, slot_of};
use crate::core::config::Secret;
use crate::core::engine::ShardIndex;

pub use self::peers::{DEAD_MS, HEARTBEAT_MS, PEERS_MAX};

/// A time without a poll after which others may have held this node for gone, in milliseconds.
pub const PAUSED_MS: u64 = 3 * HEARTBEAT_MS;

/// What a cluster is made with.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Random for every run of the process.
    pub node: NodeId,
    /// For people and for the ring: the same after a restart, different from every other node's.
    pub name: String,
    /// Where clients reach this node and no other; empty: users are not placed here.
    pub address: String,
    /// The node's share of users, relative to others.
    pub capacity: u32,
    /// Groups of slots that the bus gives a node together; 4,096 and more: none.
    pub slot_groups: u32,
    /// Shards of this node.
    pub shards: u16,
    /// Signs tickets; the same on every node. `None`: no placement.
    pub ticket_key: Option<Secret>,
}

/// What is to be done.
#[derive(Debug)]
pub enum Effect {
    /// Tell a shard. If it cannot take it, now or later and in this order: [`Cluster::shard_overrun`].
    Shard(ShardIndex, ClusterCall),
    /// Have a shard carry out a command of another node. Nobody waits for the answer.
    Command(ShardIndex, api::Call),
    /// [`Cluster::command`] has come to an end.
    Told {
        /// The caller's.
        ticket: u64,
        /// Whether the bus has it.
        result: Result<(), CommandError>,
    },
    /// Another node asks about this one; answered by [`Cluster::answer_survey`].
    Survey {
        /// Who.
        to: NodeId,
        /// Its question's number.
        id: u64,
        /// What.
        question: Question,
    },
    /// [`Cluster::survey`] has come to an end.
    Surveyed {
        /// The caller's.
        ticket: u64,
        /// What other nodes answered.
        parts: Vec<AnswerPart>,
        /// One did not.
        partial: bool,
    },
}

/// Where a user belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The node's name.
    pub node: String,
    /// Where clients reach it.
    pub address: String,
    /// Says so, signed.
    pub ticket: String,
    /// When the ticket expires, in seconds since 1970.
    pub expires: u64,
}

/// Why a user is placed nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// The operator configured no key for tickets.
    #[error("placement is not configured")]
    NoKey,
    /// No node takes users. Safe to retry.
    #[error("no node takes users now")]
    Nowhere,
}

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Other nodes that live now.
    pub peers: u64,
    /// Messages that could not be read: of an unknown version.
    pub unknown_version: u64,
    /// Of an unknown kind.
    pub unknown_kind: u64,
    /// Broken.
    pub malformed: u64,
    /// Messages with fields that are not known here.
    pub longer: u64,
    /// Messages of nodes, or lives of nodes, that are not known here.
    pub strangers: u64,
    /// Nodes that were not taken because there are too many.
    pub too_many: u64,
    /// Messages that the bus did not take.
    pub unsent: u64,
    /// How often something that a node told was lost, so that it was asked anew.
    pub doubts: u64,
    /// How often this node was away for so long that it began a new incarnation.
    pub pauses: u64,
    /// Commands of other nodes that were carried out.
    pub commands: u64,
    /// Commands that came twice.
    pub commands_repeated: u64,
    /// Questions to every node that not all answered in time.
    pub surveys_partial: u64,
    /// How often a shard was told everything anew.
    pub overruns: u64,
}

/// Family without prefix, reason or nothing, help, and where the value is.
pub type FigureInfo = (&'static str, &'static str, &'static str, fn(&Figures) -> u64);

const DROPPED: &str = "Messages between nodes that were dropped or not sent, by reason";
const COMMANDS: &str = "Commands of other nodes about users here";

impl Figures {
    /// How the counters are rendered; members of a family stand together. The number of peers is a gauge.
    pub const COUNTERS: &[FigureInfo] = &[
        ("cluster_messages_dropped", "unknown_version", DROPPED, |figures| figures.unknown_version),
        ("cluster_messages_dropped", "unknown_kind", DROPPED, |figures| figures.unknown_kind),
        ("cluster_messages_dropped", "malformed", DROPPED, |figures| figures.malformed),
        ("cluster_messages_dropped", "stranger", DROPPED, |figures| figures.strangers),
        ("cluster_messages_dropped", "too_many_nodes", DROPPED, |figures| figures.too_many),
        ("cluster_messages_dropped", "unsent", DROPPED, |figures| figures.unsent),
        ("cluster_messages_longer", "", "Messages of nodes of a later release, read in part", |figures| {
            figures.longer
        }),
        ("cluster_doubts", "", "How often other nodes were asked for their members anew", |figures| {
            figures.doubts
        }),
        (
            "cluster_pauses",
            "",
            "How often this node stood still for so long that others gave it up",
            |figures| figures.pauses,
        ),
        ("cluster_commands", "done", COMMANDS, |figures| figures.commands),
        ("cluster_commands", "repeated", COMMANDS, |figures| figures.commands_repeated),
        ("cluster_surveys_partial", "", "Questions to every node that not all answered in time", |figures| {
            figures.surveys_partial
        }),
        (
            "cluster_shard_overruns",
            "",
            "How often a shard was told everything of the cluster anew",
            |figures| figures.overruns,
        ),
    ];
}

#[derive(Debug, Default)]
struct Shard {
    /// Of its reports.
    stream: u32,
    sequence: u32,
    slots: BTreeSet<u16>,
}

/// See the module's doc.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    me: Sender,
    net: Net,
    peers: Peers,
    presence: Presence,
    commands: Commands,
    surveys: Surveys,
    shards: Vec<Shard>,
    effects: Vec<Effect>,
    figures: Figures,
    /// Nodes that take users, by name, and the ring of them; none until it is needed.
    placement: Option<(Vec<(String, String)>, Ring)>,
    load: u32,
    accepting: bool,
    heartbeat_ms: u64,
    begun_ms: u64,
    polled: Now,
    left: bool,
}

impl Cluster {
    /// A node that joins now.
    pub fn new(options: ClusterOptions, now: Now) -> Cluster {
        let me = Sender { node: options.node, incarnation: now.unix_ms };
        let mut net = Net::new(options.node);
        [Line::All, Line::Presence, Line::Inbox].into_iter().for_each(|line| net.want(now, line));
        let mut cluster = Cluster {
            me,
            net,
            peers: Peers::default(),
            presence: Presence::default(),
            commands: Commands::default(),
            surveys: Surveys::default(),
            shards: (0..options.shards).map(|_| Shard::default()).collect(),
            effects: Vec::new(),
            figures: Figures::default(),
            placement: None,
            load: 0,
            accepting: true,
            heartbeat_ms: now.mono_ms,
            begun_ms: now.mono_ms,
            polled: now,
            left: false,
            options,
        };
        (0..cluster.options.shards).for_each(|shard| cluster.start_shard(shard, now));
        cluster
    }

    /// Does what is due, and gives what is to be done.
    pub fn poll(&mut self, now: Now, bus: &mut dyn Bus) -> Vec<Effect> {
        self.notice_pause(now);
        for event in self.net.poll(now, bus) {
            self.net_event(now, bus, event);
        }
        let mut opened = Vec::new();
        self.net.open_due(now, bus, &mut opened);
        for event in opened {
            self.net_event(now, bus, event);
        }
        self.heartbeat(now, bus);
        while let Some((node, peer)) = self.peers.pop_dead(now.mono_ms) {
            self.peer_down(bus, node, &peer);
        }
        if !self.left {
            self.drive_commands(now, bus);
            self.drive_presence(now, bus);
        }
        self.drive_surveys(now, bus);
        std::mem::take(&mut self.effects)
    }

    /// When to poll next, in `mono_ms`; the bus has a time of its own ([`Bus::next_deadline`]).
    pub fn next_deadline(&self) -> u64 {
        let is_up = self.net.is_up();
        let others = [
            self.net.next_ms(),
            self.peers.next_ms(),
            self.presence.next_ms(),
            self.next_want_ms(),
            self.commands.next_ms(is_up),
            self.surveys.next_ms(is_up),
        ];
        let others = others.into_iter().flatten().filter(|_| !self.left);
        others.chain([self.heartbeat_ms]).min().unwrap_or(self.heartbeat_ms)
    }

    /// What the node says of itself from now on.
    pub fn set_load(&mut self, connections: u32, accepting: bool) {
        self.load = connections;
        if self.accepting != accepting {
            self.accepting = accepting;
            self.placement = None;
            // Others are to know before they place somebody here.
            self.heartbeat_ms = 0;
        }
    }

    /// Says good-bye: the others need not wait. Nothing is said after it.
    pub fn leave(&mut self, now: Now, bus: &mut dyn Bus) {
        if !self.left {
            self.publish(now, bus, To::All, &Body::Leaving);
            self.left = true;
        }
    }

    /// What is counted.
    pub fn figures(&self) -> Figures {
        Figures { peers: self.peers.by_node.len() as u64, ..self.figures }
    }

    /// The other nodes that live: names and what they say of themselves.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Heartbeat)> {
        self.peers.by_node.iter().map(|(node, peer)| (*node, &peer.says))
    }

    // --- shards ---

    /// A report of a shard.
    pub fn report(&mut self, now: Now, shard: ShardIndex, report: &Report) {
        let Some(known) = self.shards.get_mut(usize::from(shard)) else { return };
        if report.stream != known.stream {
            return;
        }
        let ack = ClusterCall::Ack { stream: report.stream, sequence: report.sequence };
        self.effects.push(Effect::Shard(shard, ack));
        if report.sequence <= known.sequence {
            return;
        }
        known.sequence = report.sequence;
        if report.lost {
            self.presence.lose();
        }
        if report.lost || report.sequence == 1 {
            self.presence.forget_shard(shard);
            self.forget_slots(shard, now);
        }
        for (slot, here) in &report.slots {
            self.slot_changed(shard, *slot, *here, now);
        }
        for news in &report.news {
            match news {
                News::Held { channel } => self.presence.hold(channel.clone(), shard, now),
                News::Released { channel } => self.presence.release(channel),
                News::Asked { channel } => self.presence.ask(channel.clone(), shard, now),
                News::Changed(item) => self.presence.changed(item, now),
                News::Whole { to, channel, members } => self.presence.whole(*to, channel, members, now),
            }
        }
    }

    /// A shard could not be told everything: it is told anew.
    pub fn shard_overrun(&mut self, now: Now, shard: ShardIndex) {
        self.figures.overruns += 1;
        self.effects.retain(|effect| !matches!(effect, Effect::Shard(to, _) if *to == shard));
        // What it had to tell is lost with it.
        self.presence.lose();
        self.start_shard(shard, now);
    }

    fn start_shard(&mut self, shard: ShardIndex, now: Now) {
        self.presence.forget_shard(shard);
        self.forget_slots(shard, now);
        let known = &mut self.shards[usize::from(shard)];
        known.stream += 1;
        known.sequence = 0;
        self.effects.push(Effect::Shard(shard, ClusterCall::Start { stream: known.stream }));
        let peers = self.peers.by_node.values();
        self.effects.extend(peers.map(|peer| Effect::Shard(shard, ClusterCall::PeerUp { peer: peer.id })));
    }

    fn tell_shards(&mut self, call: impl Fn() -> ClusterCall) {
        self.effects.extend((0..self.options.shards).map(|shard| Effect::Shard(shard, call())));
    }

    // --- life ---

    /// Finds out whether this node stood still.
    fn notice_pause(&mut self, now: Now) {
        let by_mono = now.mono_ms.saturating_sub(self.polled.mono_ms);
        // A machine that slept shows it on the wall clock alone.
        let by_wall = now.unix_ms.saturating_sub(self.polled.unix_ms);
        self.polled = now;
        if by_mono.max(by_wall) < PAUSED_MS {
            return;
        }
        self.figures.pauses += 1;
        self.me.incarnation = now.unix_ms.max(self.me.incarnation + 1);
        self.presence.start_over();
        self.heartbeat_ms = 0;
        self.peers.renew_leases(now.mono_ms);
        self.doubt_all();
        self.commands.miss_all();
    }

    fn heartbeat(&mut self, now: Now, bus: &mut dyn Bus) {
        if now.mono_ms < self.heartbeat_ms {
            return;
        }
        self.heartbeat_ms = now.mono_ms + HEARTBEAT_MS;
        if self.left || !self.net.is_up() {
            return;
        }
        let says = Heartbeat {
            name: self.options.name.clone(),
            address: self.options.address.clone(),
            capacity: self.options.capacity,
            load: self.load,
            accepting: self.accepting,
            presence_top: self.presence.top,
        };
        self.publish(now, bus, To::All, &Body::Heartbeat(says));
    }

    fn peer_heard(&mut self, now: Now, bus: &mut dyn Bus, sender: Sender, says: Heartbeat) {
        let placed =
            |says: &Heartbeat| (says.accepting, says.capacity, says.name.clone(), says.address.clone());
        let before = self.peers.by_node.get(&sender.node).map(|peer| placed(&peer.says));
        if before != Some(placed(&says)) {
            self.placement = None;
        }
        match self.peers.heard(sender, says, now.mono_ms) {
            Heard::Known => return self.check_tail(sender),
            Heard::Old => return,
            Heard::TooMany => {
                self.figures.too_many += 1;
                return;
            }
            Heard::Again(peer, index) => {
                self.net.forget_node(bus, index);
                self.tell_shards(|| ClusterCall::PeerDown { peer });
                self.survey_without(sender.node);
            }
            // It may not know this one yet.
            Heard::New => self.heartbeat_ms = 0,
        }
        if let Some(peer) = self.peers.by_node.get(&sender.node) {
            self.peer_up(peer.id);
        }
    }

    fn peer_down(&mut self, bus: &mut dyn Bus, node: NodeId, peer: &Peer) {
        self.placement = None;
        self.net.forget_node(bus, peer.index);
        self.survey_without(node);
        let peer = peer.id;
        self.tell_shards(|| ClusterCall::PeerDown { peer });
    }

    // --- messages ---

    fn encode(&self, body: &Body) -> Option<Vec<u8>> {
        message::encode(self.me, body)
    }

    /// Publishes; `false`: the bus has not taken it.
    fn publish(&mut self, now: Now, bus: &mut dyn Bus, to: To, body: &Body) -> bool {
        let Some(bytes) = self.encode(body) else {
            self.figures.unsent += 1;
            return false;
        };
        let (_, done) = self.net.publish(now, bus, to, &bytes);
        let taken = !matches!(done, Some(Err(_)));
        self.figures.unsent += u64::from(!taken);
        taken
    }

    fn net_event(&mut self, now: Now, bus: &mut dyn Bus, event: NetEvent) {
        match event {
            NetEvent::Message(bytes) => self.message(now, bus, &bytes),
            NetEvent::Published(token, result) => {
                self.figures.unsent +=
                    u64::from(matches!(&result, Err(error) if *error != PublishError::Unknown));
                self.confirmed(now, token, result);
            }
            // What was told before is asked for.
            NetEvent::Opened(Line::Slot(slot)) | NetEvent::Gap(Line::Slot(slot)) => self.commands.miss(slot),
            NetEvent::Opened(Line::Presence) | NetEvent::Gap(Line::Presence) => self.doubt_all(),
            NetEvent::Opened(Line::All) | NetEvent::Gap(Line::All) => {
                self.heartbeat_ms = 0;
                self.commands.repeat_all();
            }
            // Questions that got lost there are asked again by those who asked.
            NetEvent::Opened(Line::Inbox) | NetEvent::Gap(Line::Inbox) => {}
            NetEvent::HealthChanged => self.heartbeat_ms = 0,
        }
    }

    fn message(&mut self, now: Now, bus: &mut dyn Bus, bytes: &[u8]) {
        let decoded = match message::decode(bytes) {
            Ok(decoded) => decoded,
            Err(error) => {
                let count = match error {
                    DecodeError::Version(_) => &mut self.figures.unknown_version,
                    DecodeError::Kind(_) => &mut self.figures.unknown_kind,
                    DecodeError::Malformed => &mut self.figures.malformed,
                };
                *count += 1;
                return;
            }
        };
        self.figures.longer += u64::from(decoded.is_longer);
        let sender = decoded.sender;
        if sender.node == self.me.node {
            return;
        }
        match decoded.body {
            Body::Heartbeat(says) => self.peer_heard(now, bus, sender, says),
            Body::Leaving => {
                if self.peers.get_mut(sender).is_some()
                    && let Some(peer) = self.peers.by_node.remove(&sender.node)
                {
                    self.peer_down(bus, sender.node, &peer);
                }
            }
            Body::Presence(batch) => self.presence_arrived(sender, batch),
            Body::Want(want) => self.want_arrived(sender, want),
            Body::Command(command) => self.command_arrived(now, sender, command),
            Body::Again(again) => self.again_arrived(&again),
            Body::Ask(ask) => {
                self.effects.push(Effect::Survey { to: sender.node, id: ask.id, question: ask.question });
            }
            Body::Answer(answer) => self.answer_arrived(sender, answer),
        }
    }

    // --- placement ---

    /// Where a user belongs, with a ticket that says so.
    pub fn place(&mut self, now: Now, user: &str) -> Result<Placement, PlaceError> {
        let key = self.options.ticket_key.clone().ok_or(PlaceError::NoKey)?;
        if self.placement.is_none() {
            self.placement = Some(self.make_ring());
        }
        let (nodes, ring) = self.placement.as_ref().ok_or(PlaceError::Nowhere)?;
        let index = ring.node_of(slot_of(user)).ok_or(PlaceError::Nowhere)?;
        let (node, address) = nodes[index].clone();
        let expires = now.unix_s() + TICKET_TTL_S;
        let ticket =
            Ticket { sub: user.to_owned(), node: node.clone(), address: address.clone(), exp: expires };
        let ticket = ticket::sign(&ticket, &key).map_err(|_| PlaceError::NoKey)?;
        Ok(Placement { node, address, ticket, expires })
    }

    fn make_ring(&self) -> (Vec<(String, String)>, Ring) {
        let options = &self.options;
        let own = (&options.name, &options.address, options.capacity, self.accepting, self.me.node);
        let others = self.peers.by_node.iter().map(|(node, peer)| {
            let Heartbeat { name, address, capacity, accepting, .. } = &peer.says;
            (name, address, *capacity, *accepting, *node)
        });
        let taking =
            others.chain([own]).filter(|(_, address, _, accepting, _)| *accepting && !address.is_empty());
        let mut taking: Vec<_> = taking.collect();
        taking.sort_by_key(|(name, .., node)| ((*name).clone(), *node));
        let mut nodes: Vec<(String, String)> = Vec::new();
        let mut ring: Vec<RingNode> = Vec::new();
        for (name, address, capacity, _, node) in taking {
            let is_double = nodes.last().is_some_and(|(before, _)| before == name);
            let key = if is_double { format!("{name}#{node:032x}") } else { name.clone() };
            nodes.push((name.clone(), address.clone()));
            ring.push(RingNode { key, capacity });
        }
        (nodes, Ring::new(&ring, options.slot_groups))
    }
}
