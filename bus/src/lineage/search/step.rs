//! Which steps a state allows, and taking one.
//!
//! Owns: the list of steps and when each is enabled. Must not know: what the steps do.
//! Invariant: a pause is the absence of steps, so it needs none of its own; nor does a death for good.

use super::Clause;
use super::check::Violation;
use super::state::*;

/// One thing that happens. Numbers are nodes, servers, publications, and places in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A client publishes by its node.
    Publish(u8, u8),
    /// The server confirms a node's subscription, and the node hears it: between the two nothing can happen
    /// that would end otherwise.
    Subscribe(u8),
    /// The server executes the first request of a node's connection.
    Execute(u8),
    /// The same of the connection that should have been closed.
    ExecuteOld(u8),
    /// The server executes what lay in its socket when the connection was closed.
    ExecuteOrphan(u8),
    /// The first answer comes.
    Reply(u8),
    /// The same by the connection that should have been closed.
    ReplyOld(u8),
    /// The first message to the subscription comes.
    Push(u8),
    /// The same by the connection that should have been closed.
    PushOld(u8),
    /// A server that is not the owner becomes its replica.
    Follow(u8),
    /// A node learns who is the owner now.
    Learn(u8),
    /// A node's canary shows another life, or a lost key.
    Canary(u8),
    /// A node's WAIT is answered.
    Confirm(u8),
    /// Fault: a server is made the owner, having applied so many writes of those on their way.
    Promote(u8, u8),
    /// Fault: a node's connections are cut.
    Cut(u8),
    /// A server's link carries one of its publications to a node's subscription at another server.
    Stray(u8, u8, u8),
    /// Fault: a master loses the key.
    Flush(u8),
    /// Fault: a master starts again.
    Restart(u8),
    /// Fault: a master starts again with an old disk.
    RestartOld(u8),
    /// Fault: a node dies and starts again.
    Crash(u8),
}

impl Step {
    /// Whether it happens sooner or later if it stays possible.
    pub(super) fn must_happen(self) -> bool {
        use Step::*;
        match self {
            Subscribe(_) | Execute(_) | ExecuteOld(_) | Reply(_) | ReplyOld(_) | Push(_) | PushOld(_)
            | Follow(_) | Learn(_) | Canary(_) => true,
            Publish(..) | ExecuteOrphan(_) | Confirm(_) | Promote(..) | Cut(_) | Stray(..) | Flush(_)
            | Restart(_) | RestartOld(_) | Crash(_) => false,
        }
    }
}

impl State {
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for node in 0..self.nodes.len() as u8 {
            self.steps_of_node(node, &mut steps);
        }
        for server in 0..self.servers.len() as u8 {
            self.steps_of_server(server, &mut steps);
        }
        for orphan in 0..self.orphans.len() as u8 {
            steps.push(Step::ExecuteOrphan(orphan));
        }
        steps
    }

    fn steps_of_node(&self, index: u8, steps: &mut Vec<Step>) {
        let node = &self.nodes[usize::from(index)];
        let server = &self.servers[usize::from(node.wire.server)];
        let mut allow = |allowed: bool, step| {
            if allowed {
                steps.push(step);
            }
        };
        allow(!node.wire.subscribed, Step::Subscribe(index));
        allow(!node.wire.requests.is_empty(), Step::Execute(index));
        allow(!node.wire.replies.is_empty(), Step::Reply(index));
        allow(!node.wire.pushes.is_empty(), Step::Push(index));
        if let Some(wire) = &node.old_wire {
            allow(!wire.requests.is_empty(), Step::ExecuteOld(index));
            allow(!wire.replies.is_empty(), Step::ReplyOld(index));
            allow(!wire.pushes.is_empty(), Step::PushOld(index));
        }
        allow(node.owner + 1 < self.owners.len(), Step::Learn(index));
        let other_life = node.wire.settled != Some(server.replid) && !self.rule.lacks(Clause::AckLives);
        let doubt = other_life || node.wire.flushes != server.flushes;
        let is_live = node.mode == Mode::Live && server.follows.is_none();
        allow(is_live && doubt, Step::Canary(index));
        allow(self.can_confirm(index), Step::Confirm(index));
        if node.mode == Mode::Live {
            let first = (index..self.left.publications).step_by(2).find(|one| self.sent & bit(*one) == 0);
            if let Some(publication) = first {
                steps.push(Step::Publish(index, publication));
            }
        }
        if self.left.cuts > 0 {
            steps.push(Step::Cut(index));
        }
        if self.left.crashes > 0 {
            steps.push(Step::Crash(index));
        }
    }

    fn steps_of_server(&self, index: u8, steps: &mut Vec<Step>) {
        let server = &self.servers[usize::from(index)];
        let is_master = server.follows.is_none();
        let is_owner = self.owner() == index;
        if !is_owner && server.follows != Some(self.owner()) {
            steps.push(Step::Follow(index));
        }
        if !is_owner && self.left.promotions > 0 && !self.has_twin(index) {
            steps.extend((0..=server.lag.len() as u8).map(|applied| Step::Promote(index, applied)));
        }
        if is_master && self.left.flushes > 0 && server.key.is_some() {
            steps.push(Step::Flush(index));
        }
        if is_master && self.left.restarts > 0 {
            steps.push(Step::Restart(index));
        }
        if is_master && self.left.old_disks > 0 {
            steps.push(Step::RestartOld(index));
        }
        if self.left.strays > 0 {
            for stray in 0..server.strays.len() as u8 {
                for (at, node) in (0..).zip(&self.nodes) {
                    if node.wire.server != index && node.wire.subscribed {
                        steps.push(Step::Stray(index, stray, at));
                    }
                }
            }
        }
    }

    /// Whether an earlier server is the same in everything but its number: then its promotion is enough.
    fn has_twin(&self, index: u8) -> bool {
        let is_named = |server| {
            self.nodes.iter().any(|node| node.names(server))
                || self.owners.contains(&server)
                || self.orphans.iter().any(|(at, _)| *at == server)
        };
        let server = &self.servers[usize::from(index)];
        let mut earlier = (0..index).filter(|twin| !is_named(*twin) && !is_named(index));
        earlier.any(|twin| self.servers[usize::from(twin)].is_like(server))
    }

    /// Takes a step that [`State::steps`] gave.
    pub(super) fn apply(&mut self, step: Step) -> Result<(), Violation> {
        match step {
            Step::Publish(node, publication) => self.publish(node, publication),
            Step::Subscribe(node) => {
                self.node(node).wire.subscribed = true;
                self.subscribed(node);
            }
            Step::Execute(node) => self.execute_of(node, false),
            Step::ExecuteOld(node) => self.execute_of(node, true),
            Step::ExecuteOrphan(index) => {
                let (server, publication) = self.orphans.remove(usize::from(index));
                self.execute(server, publication % 2, Request::Publish(publication));
            }
            Step::Reply(node) | Step::ReplyOld(node) => {
                let by_old = matches!(step, Step::ReplyOld(_));
                let reply = self.wire(node, by_old).replies.pop_front().expect("an answer");
                return self.on_reply(node, reply, by_old);
            }
            Step::Push(node) | Step::PushOld(node) => {
                let by_old = matches!(step, Step::PushOld(_));
                let push = self.wire(node, by_old).pushes.pop_front().expect("a message");
                return self.on_push(node, push);
            }
            Step::Follow(server) => self.follow(server),
            Step::Learn(node) => self.learn(node),
            Step::Canary(node) => self.reconnect(node),
            Step::Confirm(node) => self.confirm(node),
            fault => self.fail(fault),
        }
        Ok(())
    }

    fn fail(&mut self, fault: Step) {
        match fault {
            Step::Promote(server, applied) => self.promote(server, applied),
            Step::Cut(node) => {
                self.left.cuts -= 1;
                self.reconnect(node);
            }
            Step::Stray(server, stray, node) => {
                self.left.strays -= 1;
                let message = self.servers[usize::from(server)].strays[usize::from(stray)].clone();
                self.node(node).wire.pushes.push_back(message);
                if self.left.strays == 0 {
                    self.servers.iter_mut().for_each(|server| server.strays.clear());
                }
            }
            Step::Flush(server) => self.flush(server),
            Step::Restart(server) => {
                self.left.restarts -= 1;
                self.restart(server);
            }
            Step::RestartOld(server) => {
                self.left.old_disks -= 1;
                self.servers[usize::from(server)].key =
                    State::new(&self.left, self.rule).servers[0].key.clone();
                self.restart(server);
            }
            Step::Crash(node) => self.crash(node),
            _ => unreachable!("apply takes the others"),
        }
    }

    fn wire(&mut self, node: u8, old: bool) -> &mut Wire {
        let node = self.node(node);
        if old { node.old_wire.as_mut().expect("an old wire") } else { &mut node.wire }
    }

    fn execute_of(&mut self, node: u8, old: bool) {
        let wire = self.wire(node, old);
        let server = wire.server;
        let request = wire.requests.pop_front().expect("a request");
        let reply = self.execute(server, node, request);
        let flushes = self.servers[usize::from(server)].flushes;
        let wire = self.wire(node, old);
        wire.replies.push_back(reply);
        if request == Request::Read {
            wire.flushes = flushes;
        }
    }
}
