//! The nodes' steps: what the rule's judgements lead to.
//!
//! Owns: the clauses that are the caller's (L9, L10, L13), and every place where a clause is left out. Must
//! not know: what servers hold, beyond what came over a wire.
//! Invariant: what a subscriber gets goes through [`State::deliver`], what a publisher gets through
//! [`State::pass_on`], and both are checked there.

use super::Clause;
use super::check::Violation;
use super::state::*;
use crate::epoch::Position;
use crate::lineage::{
    Ack, Arrival, Doubt, KeptAck, Lineage, Link, Place, Voice, judge_ack, judge_arrival, judge_arrival_again,
    judge_position,
};
use crate::position::{Judgement, Reason};

type Checked = Result<(), Violation>;

impl State {
    pub(super) fn node(&mut self, node: u8) -> &mut Node {
        &mut self.nodes[usize::from(node)]
    }

    /// The client publishes.
    pub(super) fn publish(&mut self, node: u8, publication: u8) {
        self.sent |= bit(publication);
        self.node(node).wire.requests.push_back(Request::Publish(publication));
    }

    /// The node learns who is the owner now.
    pub(super) fn learn(&mut self, node: u8) {
        let newest = self.owners.len() - 1;
        self.node(node).owner = newest;
        if !self.rule.lacks(Clause::ClosedConnections) {
            return self.reconnect(node);
        }
        let old_wire = self.nodes[usize::from(node)].wire.clone();
        self.open_wire(node);
        if let Some(older) = self.node(node).old_wire.replace(old_wire) {
            self.abandon(node, &older);
        }
    }

    /// Closes the connections and opens fresh ones to the owner that the node names: the start of a re-read.
    pub(super) fn reconnect(&mut self, node: u8) {
        let wire = self.nodes[usize::from(node)].wire.clone();
        self.abandon(node, &wire);
        self.open_wire(node);
    }

    /// What was sent may be executed all the same; what was answered is not known.
    fn abandon(&mut self, node: u8, wire: &Wire) {
        for request in &wire.requests {
            if let Request::Publish(publication) = *request {
                self.orphans.push((wire.server, publication));
                self.wait(node, publication);
            }
        }
        for reply in &wire.replies {
            if let Reply::Ack { publication, .. } | Reply::Refused(Request::Publish(publication)) = *reply {
                self.wait(node, publication);
            }
        }
    }

    fn open_wire(&mut self, node: u8) {
        let read_at_once = self.rule.lacks(Clause::SubscriptionFirst);
        let owner = self.owners[self.nodes[usize::from(node)].owner];
        let node = self.node(node);
        node.wire = Wire::new(owner);
        node.mode = Mode::Subscribing;
        node.held.clear();
        if read_at_once {
            node.wire.requests.push_back(Request::Read);
        }
    }

    /// A publish without an answer is tried again; one that was passed on before is judged at the next read.
    fn wait(&mut self, node: u8, publication: u8) {
        let node = self.node(node);
        if node.kept.iter().all(|kept| kept.publication != publication) {
            node.waiting |= bit(publication);
        }
    }

    /// The node dies and starts again; its subscriber comes back with its position alone.
    pub(super) fn crash(&mut self, node: u8) {
        self.left.crashes -= 1;
        self.reconnect(node);
        let dead = self.node(node);
        let kept = dead.kept.drain(..).fold(0, |all, kept| all | bit(kept.publication));
        dead.waiting = 0;
        if let Some(place) = &mut dead.place {
            place.lineage = Lineage::EMPTY;
        }
        self.excused |= kept;
    }

    /// Takes the first answer of a wire.
    pub(super) fn on_reply(&mut self, node: u8, reply: Reply, by_old: bool) -> Checked {
        match reply {
            Reply::Read { .. } if by_old => Ok(()),
            Reply::Read { key, executed } => self.on_read(node, &key, executed),
            Reply::Ack { publication, offset, key } => self.on_ack(node, publication, offset, &key, by_old),
            Reply::Refused(request) => {
                if let Request::Publish(publication) = request {
                    self.wait(node, publication);
                }
                if by_old {
                    self.send_waiting(node);
                } else {
                    let node = self.node(node);
                    (node.mode, node.wire.settled) = (Mode::Refused, None);
                }
                Ok(())
            }
        }
    }

    fn on_ack(&mut self, node: u8, publication: u8, offset: u64, key: &Snapshot, by_old: bool) -> Checked {
        let place = self.nodes[usize::from(node)].place;
        let settled = self.nodes[usize::from(node)].wire.settled;
        let link = Link {
            is_owner: !by_old || self.rule.lacks(Clause::AckOwners),
            settled: if by_old || self.rule.lacks(Clause::AckLives) {
                Some(key.state.replid)
            } else {
                settled
            },
        };
        let ours = place.as_ref().filter(|_| !self.rule.lacks(Clause::AckEpochs));
        match judge_ack(ours, &key.state, &link) {
            Ack::PassOn => return self.pass_on(node, publication, offset, key),
            Ack::Retry(Doubt::NotTheOwner) => {
                self.wait(node, publication);
                self.send_waiting(node);
            }
            Ack::Retry(Doubt::OtherLife) => {
                self.wait(node, publication);
                self.reconnect(node);
            }
            Ack::Retry(Doubt::Stale | Doubt::Unrelated) => {
                self.wait(node, publication);
                self.read(node);
            }
        }
        Ok(())
    }

    /// Keeps the ack, and answers the publisher if it has not been answered.
    fn pass_on(&mut self, node: u8, publication: u8, offset: u64, key: &Key) -> Checked {
        let position = Position::new(key.state.epoch, offset);
        self.acked |= bit(publication);
        let kept = Kept { publication, ack: KeptAck::new(position, &key.state) };
        let node = self.node(node);
        node.kept.retain(|kept| kept.publication != publication);
        node.kept.push(kept);
        self.name(position, publication)
    }

    /// Reads at the owner by the connection that is there.
    fn read(&mut self, node: u8) {
        let node = self.node(node);
        if node.mode == Mode::Live {
            node.mode = Mode::Reading;
            node.held.iter_mut().for_each(|held| held.again = true);
            node.wire.requests.push_back(Request::Read);
        }
    }

    fn send_waiting(&mut self, node: u8) {
        let publications = self.left.publications;
        let node = self.node(node);
        if node.mode == Mode::Live && node.wire.settled.is_some() {
            for publication in (0..publications).filter(|publication| node.waiting & bit(*publication) != 0) {
                node.wire.requests.push_back(Request::Publish(publication));
            }
            node.waiting = 0;
        }
    }

    fn on_read(&mut self, node: u8, key: &Snapshot, executed: u8) -> Checked {
        let settled = self.nodes[usize::from(node)].wire.settled;
        if settled.is_some_and(|settled| settled != key.state.replid) && !self.rule.lacks(Clause::AckLives) {
            self.reconnect(node);
            return Ok(());
        }
        self.node(node).wire.settled = Some(key.state.replid);
        let (place, floor) = (self.nodes[usize::from(node)].place, self.floor(key));
        match place {
            Some(place) if self.is_good(place.position, key) => {
                for offset in place.position.offset.max(floor) + 1..=key.state.top {
                    self.deliver(node, Position::new(key.state.epoch, offset), key.log[offset as usize - 1])?;
                }
            }
            _ => self.tell(node, executed, key.state.top),
        }
        self.node(node).place = Some(key.state.place());
        self.publish_again(node, key);
        self.node(node).mode = Mode::Live;
        self.release_held(node)?;
        self.send_waiting(node);
        Ok(())
    }

    pub(super) fn is_good(&self, position: Position, key: &Key) -> bool {
        let state = &key.state;
        match judge_position(position, state.position(), &state.lineage, self.floor(key)) {
            Judgement::Recoverable { .. } => true,
            Judgement::NotRecoverable(Reason::Trimmed) => self.rule.lacks(Clause::Reach),
            Judgement::NotRecoverable(Reason::AheadOfTop) => {
                self.rule.lacks(Clause::Branches) && position.epoch != state.epoch
            }
            Judgement::NotRecoverable(_) => false,
        }
    }

    fn publish_again(&mut self, node: u8, key: &Key) {
        let floor = self.floor(key);
        if self.rule.lacks(Clause::PublishingAgain) {
            return;
        }
        let node = self.node(node);
        for kept in &mut node.kept {
            if kept.ack.is_lost(&key.state, floor) {
                node.wire.requests.push_back(Request::Publish(kept.publication));
            }
        }
    }

    /// The subscription is confirmed: now the position is read (L9).
    pub(super) fn subscribed(&mut self, node: u8) {
        let was_read = self.rule.lacks(Clause::SubscriptionFirst);
        let node = self.node(node);
        if node.mode == Mode::Subscribing && !was_read {
            node.mode = Mode::Reading;
            node.wire.requests.push_back(Request::Read);
        }
    }

    /// Takes the first message of a subscription. Those that come during a read wait for its answer (L9).
    pub(super) fn on_push(&mut self, node: u8, message: Message) -> Checked {
        let waits = !self.rule.lacks(Clause::Waiting);
        let this = self.node(node);
        match this.mode {
            Mode::Subscribing | Mode::Refused => Ok(()),
            Mode::Reading if waits || this.place.is_none() => {
                this.held.push_back(Held { message, again: false });
                Ok(())
            }
            Mode::Reading | Mode::Live => self.judge(node, Held { message, again: false }),
        }
    }

    fn release_held(&mut self, node: u8) -> Checked {
        while self.nodes[usize::from(node)].mode == Mode::Live {
            let Some(held) = self.node(node).held.pop_front() else { break };
            self.judge(node, held)?;
        }
        Ok(())
    }

    fn judge(&mut self, node: u8, held: Held) -> Checked {
        let Some(place) = self.nodes[usize::from(node)].place else { return Ok(()) };
        let key = held.message.key.clone();
        let top = key.state.top;
        let previous = if held.message.has_publication { top - 1 } else { top };
        let voice = Voice { epoch: key.state.epoch, lineage: &key.state.lineage, previous, offset: top };
        match self.judgement(&place, &voice, held.again) {
            Arrival::Next => {
                let publication = *key.log.last().expect("its publication");
                self.deliver(node, Position::new(voice.epoch, top), publication)?;
                let place = Place { position: key.state.position(), ..place };
                self.node(node).place = Some(place);
            }
            Arrival::Repeat | Arrival::Stale => {}
            Arrival::Hole | Arrival::Cross | Arrival::Unknown => {
                self.node(node).held.push_front(held);
                self.read(node);
            }
            Arrival::Tell => {
                // Told at once; where to go on is what the read says.
                self.node(node).place = None;
                self.node(node).held.push_front(held);
                self.read(node);
            }
        }
        Ok(())
    }

    fn judgement(&self, place: &Place, voice: &Voice<'_>, again: bool) -> Arrival {
        let follows = voice.previous == place.position.offset && voice.offset > voice.previous;
        let judgement = if again { judge_arrival_again(place, voice) } else { judge_arrival(place, voice) };
        match judgement {
            Arrival::Tell if self.rule.lacks(Clause::Telling) => Arrival::Stale,
            Arrival::Stale if follows && !again && self.rule.lacks(Clause::StaleArrivals) => Arrival::Next,
            Arrival::Stale if follows && again && self.rule.lacks(Clause::JudgingAgain) => Arrival::Next,
            judgement => judgement,
        }
    }

    /// The subscriber starts over after `offset`; what has been executed by now it may not get.
    fn tell(&mut self, node: u8, executed: u8, offset: u64) {
        let node = self.node(node);
        node.told |= executed;
        node.seen = Vec::new();
        node.seen_after = offset;
    }

    fn deliver(&mut self, node: u8, position: Position, publication: u8) -> Checked {
        self.name(position, publication)?;
        let node = self.node(node);
        if node.seen.contains(&publication) {
            return Err(Violation::Twice { publication });
        }
        if position.offset != node.seen_after + node.seen.len() as u64 + 1 {
            return Err(Violation::OutOfOrder { publication });
        }
        node.seen.push(publication);
        node.delivered |= bit(publication);
        Ok(())
    }

    /// A position is said to somebody.
    fn name(&mut self, position: Position, publication: u8) -> Checked {
        match self.names.iter().find(|name| name.position == position) {
            None => self.names.push(Name { position, publication }),
            Some(name) if name.publication == publication => {}
            Some(name) => {
                return Err(Violation::OneNameForTwo { publications: (name.publication, publication) });
            }
        }
        Ok(())
    }

    /// A WAIT is answered: its replicas have everything that the server had.
    pub(super) fn confirm(&mut self, node: u8) {
        let (confirmed, configured) = self.replicas(node);
        for server in confirmed.iter().take(configured) {
            let replica = &mut self.servers[usize::from(*server)];
            if let Some(newest) = replica.lag.drain(..).next_back() {
                replica.key = newest;
            }
        }
        let link = Link { is_owner: true, settled: self.nodes[usize::from(node)].wire.settled };
        let node = self.node(node);
        node.kept.retain(|kept| !kept.ack.is_confirmed(&link, confirmed.len(), configured));
    }

    /// Whether the answer to a WAIT would let go of something kept.
    pub(super) fn can_confirm(&self, node: u8) -> bool {
        let (confirmed, configured) = self.replicas(node);
        let node = &self.nodes[usize::from(node)];
        let master = &self.servers[usize::from(node.wire.server)];
        let link = Link { is_owner: true, settled: node.wire.settled };
        let any_life = self.rule.lacks(Clause::ConfirmedLife);
        let is_settled = any_life || node.wire.settled == Some(master.replid);
        let mut kept = node.kept.iter();
        node.mode == Mode::Live
            && is_settled
            && kept.any(|kept| kept.ack.is_confirmed(&link, confirmed.len(), configured))
    }

    /// Who can confirm to a node, and how many must.
    fn replicas(&self, node: u8) -> (Vec<u8>, usize) {
        let server = self.nodes[usize::from(node)].wire.server;
        let followers = (0..).zip(&self.servers).filter(|(_, other)| other.follows == Some(server));
        let configured = if self.rule.lacks(Clause::AllReplicas) { 1 } else { self.servers.len() - 1 };
        (followers.map(|(index, _)| index).collect(), configured)
    }
}
