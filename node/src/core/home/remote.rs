//! Who is in a channel on other nodes: copies of what they told, and questions that wait for them.
//!
//! Owns a copy per node of the members of every channel with presence that is homed and listened to here
//! (*held*), and of those that somebody asked about (*asked*, for [`PRESENCE_ASK_MS`]). Fed by the control plane in the
//! order in which the other node told it. It must not know how that came, nor any node beyond its number.
//!
//! Invariants:
//! * a copy is whole from a [`PresenceItem::Whole`] until its peer is doubted, and an answer is partial unless
//!   the copies of all live peers are whole;
//! * members of a peer that is gone are in no answer from that moment; they are removed [`SWEPT_PER_TURN_MAX`]
//!   channels or members a turn;
//! * joins and leaves are told in order, [`TOLD_PER_TURN_MAX`] a turn: a crowd that goes at once would be more than
//!   the logs of its channels hold;
//! * a join or leave is told to subscribers here once, when the copy changes; who was there before the channel was
//!   held joined for nobody here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use ringmain_proto::client::ClientId;
use ringmain_proto::time::Now;
use smallvec::SmallVec;

use crate::core::api::Member;
use crate::core::cluster::{ClusterCall, News, PRESENCE_ASK_MS, PeerId, PresenceItem};
use crate::core::engine::ShardIndex;
use crate::core::infos::{Infos, member_bytes};
use crate::core::mesh::{Identity, Origin, QueryAnswer};
use crate::core::metrics::Metric;
use crate::core::presence::Presence;
use crate::core::shard::Core;

/// Channels that are asked about at the same time, and questions that wait, at the most: beyond it answers are
/// partial at once.
pub(crate) const QUESTIONS_MAX: usize = 4_096;

/// Channels or members of a peer that is gone that one turn removes at the most.
pub(crate) const SWEPT_PER_TURN_MAX: usize = 1_024;

/// Joins and leaves of other nodes that one turn tells subscribers at the most: some 100 KiB for a channel with
/// short infos, of a log of 256 KiB.
pub(crate) const TOLD_PER_TURN_MAX: usize = 512;

/// A question about the members of a channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) asker: Asker,
    /// Numbers are enough.
    pub(crate) stats: bool,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Asker {
    /// A command of a connection of this shard.
    Client(ShardIndex, Origin),
    /// The control plane, under this token.
    Call(u64),
}

/// What a peer told of one channel.
#[derive(Debug, Default)]
struct Copy {
    peer: PeerId,
    /// Whole as of this generation of its peer; 0: it never was.
    generation: u32,
    /// The peer lived when the channel became held: who was there then joins for nobody.
    silent: bool,
    members: Presence,
    /// Parts of the whole, and the generation of the first.
    incoming: Option<(u32, Vec<Identity>)>,
}

#[derive(Debug, Default)]
struct RemoteChannel {
    held: bool,
    /// When the oldest question is answered as it is.
    until_ms: Option<u64>,
    questions: Vec<Question>,
    copies: SmallVec<[Copy; 2]>,
}

#[derive(Debug)]
struct Sweep {
    peer: PeerId,
    /// Everything up to this channel is done.
    after: Option<Arc<str>>,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Remotes {
    /// Peers that live, with a generation from 1 that grows with each doubt.
    peers: Vec<(PeerId, u32)>,
    channels: BTreeMap<Arc<str>, RemoteChannel>,
    /// Channels with questions, in the order of their times.
    deadlines: VecDeque<(u64, Arc<str>)>,
    questions: usize,
    sweeps: VecDeque<Sweep>,
    /// Joins and leaves that subscribers here are still to be told; members are shared with the copies.
    untold: VecDeque<(Arc<str>, Told)>,
}

impl RemoteChannel {
    fn copy(&mut self, peer: PeerId) -> &mut Copy {
        let position = self.copies.iter().position(|copy| copy.peer == peer).unwrap_or_else(|| {
            self.copies.push(Copy { peer, ..Copy::default() });
            self.copies.len() - 1
        });
        &mut self.copies[position]
    }

    fn release(self, infos: &mut Infos) {
        let members = self.copies.iter().flat_map(|copy| copy.members.iter());
        infos.release(members.map(member_bytes).sum());
    }
}

impl Remotes {
    /// The channels of which copies are kept, and whether they are held.
    pub(super) fn names(&self) -> impl Iterator<Item = (&Arc<str>, bool)> {
        self.channels.iter().map(|(name, channel)| (name, channel.held))
    }

    /// Members of live peers.
    pub(super) fn members(&self, channel: &str) -> impl Iterator<Item = &Identity> {
        let copies = self.channels.get(channel).into_iter().flat_map(|channel| &channel.copies);
        copies.filter(|copy| self.generation(copy.peer).is_some()).flat_map(|copy| copy.members.iter())
    }

    fn generation(&self, peer: PeerId) -> Option<u32> {
        self.peers.iter().find(|(live, _)| *live == peer).map(|(_, generation)| *generation)
    }

    fn is_whole(&self, channel: &RemoteChannel) -> bool {
        self.peers.iter().all(|(peer, generation)| {
            channel.copies.iter().any(|copy| copy.peer == *peer && copy.generation == *generation)
        })
    }

    /// When something is due by time.
    pub(crate) fn next_ms(&self) -> Option<u64> {
        if !self.sweeps.is_empty() || !self.untold.is_empty() {
            return Some(0);
        }
        self.deadlines.front().map(|(at_ms, _)| *at_ms)
    }
}

/// A join or leave to tell subscribers here.
type Told = (bool, Identity);

impl Core {
    /// What the control plane of a cluster says.
    pub(crate) fn cluster_call(&mut self, call: ClusterCall, now: Now) {
        match call {
            ClusterCall::Start { stream } => self.start_cluster(stream, now),
            _ if !self.news.is_on() => {}
            ClusterCall::Ack { stream, sequence } => self.news_taken(stream, sequence),
            ClusterCall::PeerUp { peer } => {
                if self.remote.generation(peer).is_none() {
                    self.remote.peers.push((peer, 1));
                }
            }
            ClusterCall::PeerDoubt { peer } => {
                if let Some((_, generation)) = self.remote.peers.iter_mut().find(|(live, _)| *live == peer) {
                    *generation += 1;
                }
            }
            ClusterCall::PeerDown { peer } => {
                self.remote.peers.retain(|(live, _)| *live != peer);
                self.remote.sweeps.push_back(Sweep { peer, after: None });
                let waiting: BTreeSet<_> =
                    self.remote.deadlines.iter().map(|(_, name)| Arc::clone(name)).collect();
                waiting.iter().for_each(|name| self.settle_questions(name, now));
            }
            ClusterCall::Told { peer, items } => {
                // Of a peer that is gone nothing is true any more.
                if self.remote.generation(peer).is_some() {
                    items.into_iter().for_each(|item| self.remote_item(peer, item, now));
                }
            }
            ClusterCall::Tell { to, channels } => self.tell_whole(to, channels),
        }
    }

    fn start_cluster(&mut self, stream: u32, now: Now) {
        let before = std::mem::take(&mut self.remote);
        for (name, channel) in before.channels {
            for question in &channel.questions {
                self.answer_presence(&name, *question, true, now);
            }
            channel.release(&mut self.infos);
        }
        let opened = self.channels.iter().filter(|(_, channel)| channel.opened);
        let opened: Vec<u32> = opened.map(|(index, _)| index).collect();
        for index in opened {
            self.hold_if_present(index);
        }
        self.start_news(stream);
    }

    /// Somebody here listens to a channel homed here.
    pub(super) fn hold(&mut self, index: u32) {
        if self.news.is_on() && self.hold_if_present(index) {
            let channel = Arc::clone(&self.channels.get(index).name);
            self.news.push(News::Held { channel });
        }
    }

    /// Keeps copies of a channel, if there is presence in it. Returns whether it does now.
    fn hold_if_present(&mut self, index: u32) -> bool {
        let channel = self.channels.get(index);
        let config = &self.channels.namespace(channel.namespace).config;
        if !config.presence && !config.join_leave {
            return false;
        }
        let Remotes { channels, peers, .. } = &mut self.remote;
        let entry = channels.entry(Arc::clone(&channel.name)).or_default();
        if !entry.held {
            entry.held = true;
            for (peer, _) in peers {
                entry.copy(*peer).silent = true;
            }
        }
        true
    }

    /// Nobody here listens to it any more.
    pub(super) fn release(&mut self, index: u32) {
        if !self.news.is_on() {
            return;
        }
        let name = Arc::clone(&self.channels.get(index).name);
        let Some(entry) = self.remote.channels.get_mut(&name) else { return };
        entry.held = false;
        self.drop_unasked(&name);
        self.news.push(News::Released { channel: name });
    }

    fn drop_unasked(&mut self, name: &str) {
        let idle = |entry: &RemoteChannel| !entry.held && entry.questions.is_empty();
        if self.remote.channels.get(name).is_some_and(idle)
            && let Some(entry) = self.remote.channels.remove(name)
        {
            entry.release(&mut self.infos);
        }
    }

    // --- questions ---

    /// Answers who is in a channel homed here: at once where the other nodes' members are known, else when
    /// they are, or when it is time.
    pub(crate) fn ask_presence(&mut self, name: &str, question: Question, now: Now) {
        let whole = |entry: &RemoteChannel| self.remote.is_whole(entry);
        if self.remote.peers.is_empty() || self.remote.channels.get(name).is_some_and(whole) {
            return self.answer_presence(name, question, false, now);
        }
        if self.remote.questions >= QUESTIONS_MAX {
            return self.answer_presence(name, question, true, now);
        }
        let until_ms = now.mono_ms + PRESENCE_ASK_MS;
        let key =
            self.remote.channels.get_key_value(name).map_or_else(|| name.into(), |(key, _)| Arc::clone(key));
        let entry = self.remote.channels.entry(Arc::clone(&key)).or_default();
        entry.questions.push(question);
        self.remote.questions += 1;
        if entry.until_ms.is_none() {
            entry.until_ms = Some(until_ms);
            self.remote.deadlines.push_back((until_ms, Arc::clone(&key)));
            if !entry.held {
                self.news.push(News::Asked { channel: key });
            }
        }
    }

    /// Answers the questions of a channel if there is nothing more to wait for.
    fn settle_questions(&mut self, name: &str, now: Now) {
        let Some(entry) = self.remote.channels.get(name) else { return };
        let overdue = entry.until_ms.is_some_and(|at| at <= now.mono_ms);
        let whole = self.remote.is_whole(entry);
        if entry.questions.is_empty() || !(whole || overdue) {
            return;
        }
        let Some(entry) = self.remote.channels.get_mut(name) else { return };
        entry.until_ms = None;
        let questions = std::mem::take(&mut entry.questions);
        self.remote.questions -= questions.len();
        for question in questions {
            self.answer_presence(name, question, !whole, now);
        }
        self.drop_unasked(name);
    }

    fn answer_presence(&mut self, name: &str, question: Question, partial: bool, now: Now) {
        self.metrics.add(Metric::PresencePartial, u64::from(partial));
        match (question.asker, question.stats) {
            (Asker::Client(from, origin), false) => {
                let answer = QueryAnswer::Presence(self.members_of(name));
                self.give_answer(from, origin, Ok(answer), now);
            }
            (Asker::Client(from, origin), true) => {
                let (clients, users) = self.presence_stats_of(name);
                self.give_answer(from, origin, Ok(QueryAnswer::PresenceStats { clients, users }), now);
            }
            (Asker::Call(token), false) => {
                let members: Vec<Member> = self.members_of(name);
                self.call_presence(token, members, partial);
            }
            (Asker::Call(token), true) => {
                let stats = self.presence_stats_of(name);
                self.call_presence_stats(token, stats, partial);
            }
        }
    }

    /// Answers what has waited long enough, and removes the next members of peers that are gone.
    pub(crate) fn remote_timers(&mut self, now: Now) {
        while let Some((_, name)) = self.remote.deadlines.pop_front_if(|(at_ms, _)| *at_ms <= now.mono_ms) {
            self.settle_questions(&name, now);
        }
        self.sweep();
        self.tell_of_remote(now);
    }

    // --- what other nodes tell ---

    fn remote_item(&mut self, peer: PeerId, item: PresenceItem, now: Now) {
        let name = Arc::clone(item.channel());
        let Some(generation) = self.remote.generation(peer) else { return };
        let Some(entry) = self.remote.channels.get_mut(&name) else { return };
        let held = entry.held;
        let copy = entry.copy(peer);
        let told: Vec<Told> = match item {
            PresenceItem::Joined { member, listed, .. } => {
                let new = !listed || insert(copy, &member, &mut self.infos, &mut self.metrics);
                (new && member.is_announced()).then_some((true, member)).into_iter().collect()
            }
            PresenceItem::Left { member, listed, .. } => {
                let left = if listed { remove(copy, member.client(), &mut self.infos) } else { Some(member) };
                left.filter(Identity::is_announced).map(|member| (false, member)).into_iter().collect()
            }
            PresenceItem::Whole { members, first, last, .. } => {
                if first {
                    copy.incoming = Some((generation, Vec::new()));
                }
                // Parts that began before a doubt lack what was lost.
                let begun = copy.incoming.as_mut().filter(|(begun, _)| *begun == generation);
                let Some((_, incoming)) = begun else { return };
                incoming.extend(members);
                if !last {
                    return;
                }
                let members = copy.incoming.take().map(|(_, members)| members).unwrap_or_default();
                let silent = std::mem::take(&mut copy.silent);
                copy.generation = generation;
                let told = replace(copy, members, &mut self.infos, &mut self.metrics);
                self.settle_questions(&name, now);
                if silent { Vec::new() } else { told }
            }
        };
        if held {
            self.remote.untold.extend(told.into_iter().map(|told| (Arc::clone(&name), told)));
        }
    }

    /// Tells subscribers here the next joins and leaves.
    fn tell_of_remote(&mut self, now: Now) {
        for _ in 0..TOLD_PER_TURN_MAX {
            let Some((name, (joined, member))) = self.remote.untold.pop_front() else { return };
            // Nobody may listen any more.
            if let Some(index) = self.channels.find(&name)
                && self.channels.get(index).opened
            {
                self.announce(index, joined, &member, now);
            }
        }
        if self.remote.untold.is_empty() {
            self.remote.untold = VecDeque::new();
        }
    }

    /// Removes members of peers that are gone, channel by channel.
    fn sweep(&mut self) {
        let mut done = 0;
        while done < SWEPT_PER_TURN_MAX
            && let Some(sweep) = self.remote.sweeps.front_mut()
        {
            let peer = sweep.peer;
            let after = sweep.after.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
            let next = self.remote.channels.range_mut::<str, _>((after, Bound::Unbounded)).next();
            let Some((name, entry)) = next else {
                self.remote.sweeps.pop_front();
                continue;
            };
            let (name, held) = (Arc::clone(name), entry.held);
            sweep.after = Some(Arc::clone(&name));
            done += 1;
            let Some(position) = entry.copies.iter().position(|copy| copy.peer == peer) else { continue };
            let gone = entry.copies.swap_remove(position).members;
            self.infos.release(gone.iter().map(member_bytes).sum());
            done += gone.len();
            if held {
                let told = gone.iter().filter(|member| member.is_announced());
                let told = told.map(|member| (Arc::clone(&name), (false, member.clone())));
                self.remote.untold.extend(told);
            }
        }
    }
}

/// Adds a member to a copy, if the pool has room. Returns whether it is new there.
fn insert(
    copy: &mut Copy,
    member: &Identity,
    infos: &mut Infos,
    metrics: &mut crate::core::metrics::Values,
) -> bool {
    if infos.admit(member_bytes(member)).is_err() {
        // Answers are partial from here on, until the whole comes again and there is room.
        copy.generation = 0;
        metrics.add(Metric::DropMember, 1);
        return false;
    }
    let before = copy.members.insert(member);
    infos.release(before.as_ref().map_or(0, member_bytes));
    before.is_none()
}

fn remove(copy: &mut Copy, client: ClientId, infos: &mut Infos) -> Option<Identity> {
    let member = copy.members.remove(client)?;
    infos.release(member_bytes(&member));
    Some(member)
}

/// Makes `members` the copy's. Gives the difference as joins and leaves of those who announce themselves.
fn replace(
    copy: &mut Copy,
    members: Vec<Identity>,
    infos: &mut Infos,
    metrics: &mut crate::core::metrics::Values,
) -> Vec<Told> {
    let now_there: BTreeSet<u128> = members.iter().map(|member| member.client().0).collect();
    let gone: Vec<ClientId> =
        copy.members.iter().map(Identity::client).filter(|client| !now_there.contains(&client.0)).collect();
    let mut told = Vec::new();
    for client in gone {
        told.extend(remove(copy, client, infos).filter(Identity::is_announced).map(|member| (false, member)));
    }
    for member in members {
        if insert(copy, &member, infos, metrics) && member.is_announced() {
            told.push((true, member));
        }
    }
    told
}
