//! Commands about users: to the nodes that hold them, and from other nodes.
//!
//! Owns the slots that this node is subscribed to, the commands that it gave and may give again, and the memory of
//! those that it has carried out. It must not know connections: shards do.
//!
//! A command goes to `node:slot:{slot}` of its user, one about anonymous connections to `node:all`; so does a
//! publication without history, which is nothing but a command to deliver it. It counts as given when the bus has confirmed it. Every node carries it out once: by its number. Where a node may have missed
//! some (a gap, a slot that it has just begun to hold, a pause) it asks for them again: every node keeps its own
//! for [`KEPT_MS`].
//!
//! Invariants:
//! * a command is carried out at most once on a node, and not on a slot held only after it was given (but for
//!   [`HOLD_MARGIN_MS`], the time that a connection may be older than what is known of its slot here): a user who
//!   comes back is not met by what was meant before;
//! * a slot stays subscribed [`LINGER_MS`] after its last user.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ringmain_bus::{Bus, PublishError};
use ringmain_proto::time::Now;

use super::message::{Action, Again, Body, Command, Selector, Sender, SubscribeOptions};
use super::net::{Line, To};
use super::{Cluster, Effect};
use crate::core::api;
use crate::core::cluster::{NodeId, SLOTS, slot_of};
use crate::core::engine::ShardIndex;

/// How long a slot stays subscribed after its last user, in milliseconds.
pub const LINGER_MS: u64 = 10_000;

/// How long a command may be asked for again, in milliseconds: longer than any pause that a node is likely to survive.
pub const KEPT_MS: u64 = 60_000;

/// Commands kept at the most; the oldest go first.
pub const KEPT_MAX: usize = 8_192;

/// Numbers of a node's commands that are remembered: it can give none again that is older.
pub const SEEN_MAX: u64 = 2 * KEPT_MAX as u64;

/// Nodes whose commands are remembered at the most.
pub const SEEN_NODES_MAX: usize = 1_024;

/// How long the bus may take to confirm a command, in milliseconds; within it, it is tried again.
pub const CONFIRM_MS: u64 = 3_000;

/// Pause before a command that the bus did not take is tried again, in milliseconds.
pub const TRY_AGAIN_MS: u64 = 100;

/// Commands that wait for the bus at the most.
pub const WAITING_MAX: usize = 4_096;

/// Commands given again in one poll at the most.
pub const AGAIN_PER_POLL_MAX: usize = 128;

/// How much older than the news of its slot a connection may be, in milliseconds.
pub const HOLD_MARGIN_MS: u64 = 250;

/// In [`Again::slots`]: commands about anonymous connections.
const EVERYONE: u16 = SLOTS;

/// Why a command did not reach the other nodes for certain. This node's connections were served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The bus is away: nobody else has it; safe to retry.
    #[error("the bus cannot be reached")]
    Unavailable,
    /// Some may have it; safe to retry, for what it does it does once for each connection.
    #[error("whether other nodes were told is unknown")]
    Unknown,
    /// It is more than a message may be; the caller's fault.
    #[error("the command is too large")]
    TooLarge,
    /// Too many wait; safe to retry later.
    #[error("too many commands wait for the bus")]
    Busy,
}

/// A slot that some shard holds users of, or held until lately.
#[derive(Debug)]
struct Held {
    shards: u16,
    since_ms: u64,
    /// When it is given up, if nobody comes.
    linger_ms: Option<u64>,
}

#[derive(Debug)]
struct Kept {
    sequence: u64,
    at_ms: u64,
    slot: u16,
    selector: Selector,
    action: Action,
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    to: To,
    bytes: Vec<u8>,
    until_ms: u64,
    /// Sent under this number, or to be sent at this time.
    state: Result<u64, u64>,
    error: CommandError,
}

#[derive(Debug, Default)]
struct Seen {
    top: u64,
    numbers: BTreeSet<u64>,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Commands {
    slots: BTreeMap<u16, Held>,
    lingering: BTreeSet<(u64, u16)>,
    sequence: u64,
    kept: VecDeque<Kept>,
    waiting: BTreeMap<u64, Waiting>,
    by_token: BTreeMap<u64, u64>,
    seen: BTreeMap<NodeId, Seen>,
    /// Slots whose commands this node may have missed.
    missed: BTreeSet<u16>,
    /// Own commands that somebody may have missed.
    repeat: BTreeSet<u64>,
}

impl Commands {
    /// Whether a command is new here.
    fn is_new(&mut self, node: NodeId, sequence: u64) -> bool {
        if !self.seen.contains_key(&node) && self.seen.len() >= SEEN_NODES_MAX {
            self.seen.pop_first();
        }
        let seen = self.seen.entry(node).or_default();
        if sequence + SEEN_MAX <= seen.top || !seen.numbers.insert(sequence) {
            return false;
        }
        seen.top = seen.top.max(sequence);
        while seen.numbers.first().is_some_and(|oldest| oldest + SEEN_MAX <= seen.top) {
            seen.numbers.pop_first();
        }
        true
    }

    /// When something is due, in `mono_ms`.
    pub(super) fn next_ms(&self, is_up: bool) -> Option<u64> {
        if is_up && !(self.missed.is_empty() && self.repeat.is_empty()) {
            return Some(0);
        }
        let waiting = self.waiting.values().map(|waiting| match waiting.state {
            Ok(_) => waiting.until_ms,
            Err(at_ms) => at_ms.min(waiting.until_ms),
        });
        waiting.chain(self.lingering.first().map(|(at_ms, _)| *at_ms)).min()
    }

    /// Every slot held, and everyone.
    pub(super) fn miss_all(&mut self) {
        self.missed.extend(self.slots.keys());
        self.missed.insert(EVERYONE);
    }

    /// The bus lost something of a slot, or it is heard from now on only.
    pub(super) fn miss(&mut self, slot: u16) {
        self.missed.insert(slot);
    }

    /// The bus lost something that was for all: whoever asked for commands may not have been heard.
    pub(super) fn repeat_all(&mut self) {
        self.missed.insert(EVERYONE);
        self.repeat.extend(self.kept.iter().map(|kept| kept.sequence));
    }
}

impl Cluster {
    // --- slots ---

    /// A shard has users of a slot, or no longer.
    pub(super) fn slot_changed(&mut self, shard: ShardIndex, slot: u16, here: bool, now: Now) {
        let known = &mut self.shards[usize::from(shard)].slots;
        let changed = if here { known.insert(slot) } else { known.remove(&slot) };
        if !changed || slot >= SLOTS {
            return;
        }
        let commands = &mut self.commands;
        let held =
            commands.slots.entry(slot).or_insert(Held { shards: 0, since_ms: now.mono_ms, linger_ms: None });
        if here {
            held.shards += 1;
            if let Some(at_ms) = held.linger_ms.take() {
                commands.lingering.remove(&(at_ms, slot));
            }
            self.net.want(now, Line::Slot(slot));
            return;
        }
        held.shards -= 1;
        if held.shards == 0 {
            let at_ms = now.mono_ms + LINGER_MS;
            held.linger_ms = Some(at_ms);
            commands.lingering.insert((at_ms, slot));
        }
    }

    /// A shard begins anew: what it holds it will say again.
    pub(super) fn forget_slots(&mut self, shard: ShardIndex, now: Now) {
        for slot in std::mem::take(&mut self.shards[usize::from(shard)].slots) {
            self.shards[usize::from(shard)].slots.insert(slot);
            self.slot_changed(shard, slot, false, now);
        }
    }

    /// Slots that this node is subscribed to, or will be.
    pub fn slots(&self) -> impl Iterator<Item = u16> {
        self.commands.slots.keys().copied()
    }

    // --- own commands ---

    /// Tells the other nodes a command about users. Answered by [`Effect::Told`] under the caller's `ticket`, when
    /// the bus has confirmed it.
    pub fn command(&mut self, now: Now, ticket: u64, call: &api::Call) {
        let Some((selector, action)) = to_wire(call) else {
            self.effects.push(Effect::Told { ticket, result: Ok(()) });
            return;
        };
        let slot = if selector.user.is_empty() { EVERYONE } else { slot_of(&selector.user) };
        self.commands.sequence += 1;
        let sequence = self.commands.sequence;
        let command = Command { sequence, age_ms: 0, selector, action };
        let refuse = |error| Effect::Told { ticket, result: Err(error) };
        let Some(bytes) = self.encode(&Body::Command(command.clone())) else {
            return self.effects.push(refuse(CommandError::TooLarge));
        };
        if self.commands.waiting.len() >= WAITING_MAX {
            return self.effects.push(refuse(CommandError::Busy));
        }
        let Command { selector, action, .. } = command;
        self.commands.kept.push_back(Kept { sequence, at_ms: now.mono_ms, slot, selector, action });
        if self.commands.kept.len() > KEPT_MAX {
            self.commands.kept.pop_front();
        }
        let to = if slot == EVERYONE { To::All } else { To::Slot(slot) };
        let until_ms = now.mono_ms + CONFIRM_MS;
        let (state, error) = (Err(now.mono_ms), CommandError::Unavailable);
        self.commands.waiting.insert(sequence, Waiting { ticket, to, bytes, until_ms, state, error });
    }

    /// The bus answered something published.
    pub(super) fn confirmed(&mut self, now: Now, token: u64, result: Result<(), PublishError>) {
        if let Some(sequence) = self.commands.by_token.remove(&token) {
            self.command_published(now, sequence, result);
        }
    }

    fn command_published(&mut self, now: Now, sequence: u64, result: Result<(), PublishError>) {
        let Some(waiting) = self.commands.waiting.get_mut(&sequence) else { return };
        let over = match result {
            Ok(()) => Ok(()),
            Err(PublishError::TooLarge { .. } | PublishError::KeyTooLong { .. }) => {
                Err(CommandError::TooLarge)
            }
            Err(error) => {
                if error == PublishError::Unknown {
                    waiting.error = CommandError::Unknown;
                }
                waiting.state = Err(now.mono_ms + TRY_AGAIN_MS);
                return;
            }
        };
        let ticket = waiting.ticket;
        self.commands.waiting.remove(&sequence);
        self.effects.push(Effect::Told { ticket, result: over });
    }

    /// Sends what is due, gives up what has waited too long, and leaves slots.
    pub(super) fn drive_commands(&mut self, now: Now, bus: &mut dyn Bus) {
        self.send_commands(now, bus);
        self.leave_slots(now, bus);
        while self.commands.kept.front().is_some_and(|kept| kept.at_ms + KEPT_MS <= now.mono_ms) {
            self.commands.kept.pop_front();
        }
        if !self.net.is_up() {
            return;
        }
        if !self.commands.missed.is_empty() {
            let slots = std::mem::take(&mut self.commands.missed);
            let again = Again { slots: slots.iter().copied().collect() };
            if !self.publish(now, bus, To::All, &Body::Again(again)) {
                self.commands.missed = slots;
            }
        }
        self.repeat(now, bus);
    }

    fn send_commands(&mut self, now: Now, bus: &mut dyn Bus) {
        let due = |waiting: &Waiting| {
            waiting.until_ms <= now.mono_ms || waiting.state.is_err_and(|at_ms| at_ms <= now.mono_ms)
        };
        let commands = self.commands.waiting.iter();
        let due: Vec<u64> =
            commands.filter(|(_, waiting)| due(waiting)).map(|(sequence, _)| *sequence).collect();
        for sequence in due {
            let Some(waiting) = self.commands.waiting.get_mut(&sequence) else { continue };
            if waiting.until_ms <= now.mono_ms {
                let error = if waiting.state.is_ok() { CommandError::Unknown } else { waiting.error };
                let ticket = waiting.ticket;
                self.commands.waiting.remove(&sequence);
                self.effects.push(Effect::Told { ticket, result: Err(error) });
                continue;
            }
            let (token, done) = self.net.publish(now, bus, waiting.to, &waiting.bytes);
            match done {
                Some(result) => self.command_published(now, sequence, result),
                None => {
                    waiting.state = Ok(token);
                    self.commands.by_token.insert(token, sequence);
                }
            }
        }
        let live = &self.commands.waiting;
        self.commands.by_token.retain(|_, sequence| live.contains_key(sequence));
    }

    fn leave_slots(&mut self, now: Now, bus: &mut dyn Bus) {
        while let Some((at_ms, slot)) = self.commands.lingering.first().copied()
            && at_ms <= now.mono_ms
        {
            self.commands.lingering.pop_first();
            self.commands.slots.remove(&slot);
            self.net.unwant(now, bus, Line::Slot(slot));
        }
    }

    /// Gives own commands again.
    fn repeat(&mut self, now: Now, bus: &mut dyn Bus) {
        for _ in 0..AGAIN_PER_POLL_MAX {
            let Some(sequence) = self.commands.repeat.pop_first() else { return };
            let kept = self.commands.kept.iter().find(|kept| kept.sequence == sequence);
            let Some(Kept { at_ms, slot, selector, action, .. }) = kept else { continue };
            let to = if *slot == EVERYONE { To::All } else { To::Slot(*slot) };
            let age_ms = now.mono_ms.saturating_sub(*at_ms);
            let command = Command { sequence, age_ms, selector: selector.clone(), action: action.clone() };
            if !self.publish(now, bus, to, &Body::Command(command)) {
                self.commands.repeat.insert(sequence);
                return;
            }
        }
    }

    // --- other nodes' commands ---

    /// Another node may have missed commands.
    pub(super) fn again_arrived(&mut self, again: &Again) {
        let slots: BTreeSet<u16> = again.slots.iter().copied().collect();
        let asked = self.commands.kept.iter().filter(|kept| slots.contains(&kept.slot));
        self.commands.repeat.extend(asked.map(|kept| kept.sequence));
    }

    /// A command of another node.
    pub(super) fn command_arrived(&mut self, now: Now, sender: Sender, command: Command) {
        if !self.commands.is_new(sender.node, command.sequence) {
            self.figures.commands_repeated += 1;
            return;
        }
        let given_ms = now.mono_ms.saturating_sub(command.age_ms) + HOLD_MARGIN_MS;
        let user = &command.selector.user;
        // Who connected to this node did so after it began.
        let since_ms = match user.is_empty() {
            true => Some(self.begun_ms),
            false => self.commands.slots.get(&slot_of(user)).map(|held| held.since_ms),
        };
        if since_ms.is_none_or(|since_ms| given_ms < since_ms) {
            return;
        }
        self.figures.commands += 1;
        let call = from_wire(command);
        let shards = match &call {
            api::Call::Publish { channel, .. } => {
                let home = api::home_of(channel, self.options.shards);
                home..home + 1
            }
            _ => 0..self.options.shards,
        };
        self.effects.extend(shards.map(|shard| Effect::Command(shard, call.clone())));
    }
}

fn to_wire(call: &api::Call) -> Option<(Selector, Action)> {
    let (selector, action) = match call {
        api::Call::Subscribe { selector, channel, options } => {
            let options = Box::new(SubscribeOptions {
                info: options.info.clone(),
                data: options.data.clone(),
                expire_at: options.expire_at,
                presence: options.presence,
                join_leave: options.join_leave,
                push_join_leave: options.push_join_leave,
                position: options.position,
                recover: options.recover,
                recover_since: options.recover_since.clone(),
            });
            (selector, Action::Subscribe { channel: channel.to_string(), options })
        }
        api::Call::Unsubscribe { selector, channel } => {
            (selector, Action::Unsubscribe { channel: channel.to_string() })
        }
        api::Call::Disconnect { selector, code, reason } => {
            (selector, Action::Disconnect { code: *code, reason: reason.to_string() })
        }
        api::Call::Refresh { selector, expired, expire_at } => {
            (selector, Action::Refresh { expired: *expired, expire_at: *expire_at })
        }
        api::Call::Publish { channel, data, tags, skip_history: true, .. } => {
            // Who listens to a user's own channel is that user, as far as can be known here.
            let user = channel.strip_prefix("user:").unwrap_or_default().to_owned();
            let selector = Selector { user, client: None, whitelist: Vec::new() };
            let (channel, data, tags) = (channel.to_string(), data.to_vec(), tags.clone());
            return Some((selector, Action::Deliver { channel, data, tags }));
        }
        _ => return None,
    };
    let api::UserSelector { user, client, whitelist } = selector.clone();
    Some((Selector { user: user.to_string(), client, whitelist }, action))
}

fn from_wire(command: Command) -> api::Call {
    let Selector { user, client, whitelist } = command.selector;
    let selector = api::UserSelector { user: user.into(), client, whitelist };
    match command.action {
        Action::Subscribe { channel, options } => {
            let options = api::SubscribeOptions {
                info: options.info,
                data: options.data,
                expire_at: options.expire_at,
                presence: options.presence,
                join_leave: options.join_leave,
                push_join_leave: options.push_join_leave,
                position: options.position,
                recover: options.recover,
                recover_since: options.recover_since,
            };
            api::Call::Subscribe { selector, channel: channel.into(), options }
        }
        Action::Unsubscribe { channel } => api::Call::Unsubscribe { selector, channel: channel.into() },
        Action::Disconnect { code, reason } => {
            api::Call::Disconnect { selector, code, reason: reason.into() }
        }
        Action::Refresh { expired, expire_at } => api::Call::Refresh { selector, expired, expire_at },
        Action::Deliver { channel, data, tags } => api::Call::Publish {
            channel: channel.into(),
            data: data.into(),
            tags,
            skip_history: true,
            idempotency_key: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_new_once_and_while_it_is_remembered() {
        let mut commands = Commands::default();
        assert!(commands.is_new(1, 5));
        assert!(!commands.is_new(1, 5));
        assert!(commands.is_new(2, 5), "of another node");
        assert!(commands.is_new(1, 4), "later on its way");
        assert!(commands.is_new(1, SEEN_MAX + 4));
        assert!(!commands.is_new(1, 4), "too old to be told");
        assert!(!commands.is_new(1, 5));
        for sequence in 0..3 * SEEN_MAX {
            commands.is_new(1, 10_000 + sequence);
        }
        assert_eq!(commands.seen[&1].numbers.len() as u64, SEEN_MAX);
    }

    #[test]
    fn the_memory_of_nodes_has_a_maximum() {
        let mut commands = Commands::default();
        for node in 0..2 * SEEN_NODES_MAX as u128 {
            assert!(commands.is_new(node, 1));
        }
        assert_eq!(commands.seen.len(), SEEN_NODES_MAX);
    }

    #[test]
    fn commands_travel_whole() {
        let selector =
            api::UserSelector { user: "7".into(), client: Some("c".into()), whitelist: vec!["w".into()] };
        let options = api::SubscribeOptions {
            info: Some(b"{}".to_vec()),
            expire_at: Some(5),
            presence: Some(false),
            recover_since: Some((3, "e".into())),
            ..api::SubscribeOptions::default()
        };
        let calls = [
            api::Call::Subscribe { selector: selector.clone(), channel: "a".into(), options },
            api::Call::Unsubscribe { selector: selector.clone(), channel: "a".into() },
            api::Call::Disconnect { selector: selector.clone(), code: 3000, reason: "r".into() },
            api::Call::Refresh { selector, expired: true, expire_at: None },
            api::Call::Publish {
                channel: "user:7".into(),
                data: b"{}".as_slice().into(),
                tags: vec![("k".into(), "v".into())],
                skip_history: true,
                idempotency_key: None,
            },
        ];
        for call in calls {
            let (selector, action) = to_wire(&call).expect("it is about users");
            let command = Command { sequence: 1, age_ms: 0, selector, action };
            assert_eq!(format!("{:?}", from_wire(command)), format!("{call:?}"));
        }
        assert!(to_wire(&api::Call::Info).is_none());
    }
}
