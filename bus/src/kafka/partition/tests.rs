//! Partitions on a log in memory: nodes that read and write it, cut off, truncated, wiped.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use ringmain_proto::message::Publication;

use super::{Act, Partition, Phase, SendError, Shared, Start};
use crate::backend::{Call, Domain, OwnedId, Reply, Request, SILENCE_MS_MAX, Target};
use crate::epoch::{Epoch, Position};
use crate::kafka::KafkaOptions;
use crate::types::{Accepted, BusError, ChannelOptions, HistoryQuery, PublishError};

const ROOM: ChannelOptions = ChannelOptions { history_size: 10, history_ttl_ms: 60_000, meta_ttl_ms: 60_000 };

/// One node, as the loop would drive it.
struct Node {
    shared: Shared,
    partition: Partition,
    /// Of the next message that it fetches; none: it is assigned nothing.
    next: Option<i64>,
    now_ms: u64,
    calls: u64,
    replies: Vec<Reply>,
    /// What it writes is not written, and it fetches nothing.
    is_cut: bool,
}

type Log = Vec<Bytes>;

fn options() -> KafkaOptions {
    KafkaOptions { partitions: 1, ..KafkaOptions::new(Vec::new()) }
}

fn target(name: &str, options: ChannelOptions) -> Target {
    Target { name: name.into(), options }
}

fn record(data: &str) -> Bytes {
    let mut record = Vec::new();
    Publication { data: data.as_bytes(), ..Publication::default() }.write_record(&mut record);
    record.into()
}

impl Node {
    fn new(seed: u64) -> Node {
        Node::with(seed, options())
    }

    fn with(seed: u64, options: KafkaOptions) -> Node {
        let options = Arc::new(options);
        let partition = Partition::new(0, &options);
        let shared = Shared::new(options, seed);
        Node { shared, partition, next: None, now_ms: 1_000, calls: 0, replies: Vec::new(), is_cut: false }
    }

    /// Does what is asked for, fetches what there is, until there is no more.
    fn run(&mut self, log: &mut Log) {
        loop {
            let acts: VecDeque<Act> = std::mem::take(&mut self.shared.acts);
            let is_quiet = acts.is_empty();
            acts.into_iter().for_each(|act| self.act(act, log));
            let fetched = self.next.filter(|_| !self.is_cut);
            if let Some(payload) = fetched.and_then(|next| log.get(usize::try_from(next).unwrap())) {
                let offset = fetched.unwrap();
                self.next = Some(offset + 1);
                let payload = payload.clone();
                self.partition.message(&mut self.shared, self.now_ms, offset, 0, &payload);
            } else if is_quiet {
                break;
            }
        }
        self.replies.extend(self.shared.replies.drain(..));
    }

    fn act(&mut self, act: Act, log: &mut Log) {
        match act {
            Act::Send { sequence, .. } if self.is_cut => {
                let error = Err(SendError::Unknown);
                self.partition.delivered(&mut self.shared, self.now_ms, sequence, error);
            }
            Act::Send { sequence, payload, .. } => {
                log.push(payload);
                let offset = log.len() as i64 - 1;
                self.partition.delivered(&mut self.shared, self.now_ms, sequence, Ok(offset));
            }
            Act::Assign { start, .. } => {
                let end = log.len() as i64;
                self.next = Some(match start {
                    Start::At(offset) => offset,
                    Start::Tail(messages) => (end - messages).max(0),
                    Start::Beginning => 0,
                });
                if matches!(start, Start::At(offset) if offset > end) {
                    self.next = None;
                    self.partition.cannot_start(&mut self.shared, self.now_ms);
                }
            }
            Act::Unassign { .. } => self.next = None,
        }
    }

    fn pass(&mut self, ms: u64, log: &mut Log) {
        self.now_ms += ms;
        self.partition.tick(&mut self.shared, self.now_ms, 0, true);
        self.run(log);
    }

    /// Ticks until it is live.
    fn settle(&mut self, log: &mut Log) {
        for _ in 0..200 {
            if self.partition.phase() == Phase::Live {
                return;
            }
            self.pass(25, log);
        }
        panic!("not live: {:?}", self.partition.phase());
    }

    fn ask(&mut self, log: &mut Log, request: impl FnOnce(Call) -> Request) -> Vec<Reply> {
        self.calls += 1;
        let request = request(Call(self.calls));
        self.partition.request(&mut self.shared, self.now_ms, request);
        self.run(log);
        std::mem::take(&mut self.replies)
    }

    fn subscribe(&mut self, log: &mut Log, name: &str) {
        let replies = self.ask(log, |call| Request::Subscribe { call, target: target(name, ROOM) });
        let expected = |reply: &Reply| matches!(reply, Reply::Subscribed { result: Ok(Domain(0)), .. });
        assert!(replies.iter().any(expected), "{replies:?}");
    }

    fn publish_as(&mut self, log: &mut Log, id: OwnedId, data: &str) -> Result<Accepted, PublishError> {
        let replies = self.ask(log, |call| {
            let target = target("room:a", ROOM);
            Request::Publish { call, target, id, record: record(data) }
        });
        let asked = Call(self.calls);
        let answer = |reply: &Reply| match reply {
            Reply::Published { call, result } if *call == asked => Some(*result),
            _ => None,
        };
        let answers: Vec<_> = replies.iter().filter_map(answer).collect();
        self.replies = replies;
        assert_eq!(answers.len(), 1, "{:?}", self.replies);
        answers[0]
    }

    fn publish(&mut self, log: &mut Log, data: &str) -> Accepted {
        let id = OwnedId::Node(self.shared.node, self.calls);
        self.publish_as(log, id, data).unwrap()
    }

    fn top(&mut self, log: &mut Log) -> Position {
        let query = HistoryQuery::TOP;
        let replies = self.ask(log, |call| Request::Read { call, target: target("room:a", ROOM), query });
        let answer = |reply: &Reply| match reply {
            Reply::Read { result, .. } => Some(result.clone().unwrap().page.top),
            _ => None,
        };
        replies.iter().find_map(answer).expect("an answer")
    }

    fn is_told(&mut self, expected: impl Fn(&Reply) -> bool) -> bool {
        std::mem::take(&mut self.replies).iter().any(expected)
    }
}

#[test]
fn two_nodes_agree_on_positions_and_repeats() {
    let (mut log, mut one, mut other) = (Log::new(), Node::new(1), Node::new(2));
    one.subscribe(&mut log, "room:a");
    other.subscribe(&mut log, "room:a");
    let first = one.publish(&mut log, "first");
    other.run(&mut log);
    let heard = |reply: &Reply| matches!(reply, Reply::Message { message, .. } if message.offset == first.position.offset);
    assert!(other.is_told(heard));
    let key = || OwnedId::Key("key".into());
    let second = other.publish_as(&mut log, key(), "second").unwrap();
    assert!(!second.repeated && second.position.offset > first.position.offset);
    let repeated = one.publish_as(&mut log, key(), "second").unwrap();
    assert_eq!(repeated, Accepted { repeated: true, ..second });
    assert_eq!((one.top(&mut log), other.top(&mut log)), (second.position, second.position));
    // One that reads the log later knows the same.
    assert_eq!(Node::new(3).top(&mut log), second.position);
}

#[test]
fn a_node_that_was_cut_off_goes_on_where_it_was() {
    let (mut log, mut one, mut other) = (Log::new(), Node::new(1), Node::new(2));
    one.subscribe(&mut log, "room:a");
    let epoch = other.publish(&mut log, "before").position.epoch;
    one.is_cut = true;
    for _ in 0..40 {
        one.pass(25, &mut log);
    }
    assert!(one.is_told(|reply| matches!(reply, Reply::Lost { domain: Domain(0) })));
    let refused = one.publish_as(&mut log, OwnedId::Node(1, 1), "refused");
    assert_eq!(refused, Err(PublishError::Unavailable));
    let missed = other.publish(&mut log, "missed");
    one.is_cut = false;
    one.settle(&mut log);
    assert!(one.is_told(|reply| matches!(reply, Reply::Back { domain: Domain(0) })));
    assert_eq!(one.top(&mut log), missed.position);
    assert_eq!(missed.position.epoch, epoch);
}

#[test]
fn silence_is_told_in_time_and_lateness_of_our_own_is_none() {
    let (mut log, mut node) = (Log::new(), Node::new(1));
    node.subscribe(&mut log, "room:a");
    node.is_cut = true;
    let begun_ms = node.now_ms;
    while !node.is_told(|reply| matches!(reply, Reply::Lost { .. })) {
        node.pass(25, &mut log);
    }
    assert!(node.now_ms - begun_ms <= SILENCE_MS_MAX + 25, "{} ms", node.now_ms - begun_ms);

    let (mut log, mut node) = (Log::new(), Node::new(1));
    node.subscribe(&mut log, "room:a");
    node.now_ms += 5_000;
    node.partition.tick(&mut node.shared, node.now_ms, 5_000, true);
    node.run(&mut log);
    assert_eq!(node.partition.phase(), Phase::Live);
}

/// Cuts a node off, does something to the log, and lets the node come back.
fn away(node: &mut Node, log: &mut Log, meanwhile: impl FnOnce(&mut Log)) {
    node.is_cut = true;
    for _ in 0..40 {
        node.pass(25, log);
    }
    assert!(node.is_told(|reply| matches!(reply, Reply::Lost { .. })));
    meanwhile(log);
    node.is_cut = false;
    node.settle(log);
}

#[test]
fn a_lost_tail_is_another_epoch() {
    for regrown in [0, 1, 20] {
        let (mut log, mut node) = (Log::new(), Node::new(1));
        node.subscribe(&mut log, "room:a");
        node.publish(&mut log, "kept");
        let length = log.len();
        let lost = node.publish(&mut log, "lost").position;
        away(&mut node, &mut log, |log| {
            log.truncate(length);
            // Somebody else writes before we are back.
            let mut other = Node::new(2);
            for n in 0..regrown {
                other.publish(log, &format!("other {n}"));
            }
        });
        let top = node.top(&mut log);
        assert_ne!(top.epoch, lost.epoch, "regrown by {regrown}");
        let next = node.publish(&mut log, "next").position;
        assert_eq!(next.epoch, top.epoch);
        assert_eq!(Node::new(3).top(&mut log), next, "all agree");
    }
}

#[test]
fn wiped_and_made_anew_is_another_epoch() {
    let (mut log, mut node) = (Log::new(), Node::new(1));
    node.subscribe(&mut log, "room:a");
    let old = node.publish(&mut log, "old").position;
    away(&mut node, &mut log, Log::clear);
    let new = node.top(&mut log);
    assert_eq!(new.offset, 0);
    assert_ne!(new.epoch, old.epoch);
}

#[test]
fn a_copy_from_before_a_fence_is_another_epoch() {
    let (mut log, mut node) = (Log::new(), Node::new(1));
    node.subscribe(&mut log, "room:a");
    let mut epochs = vec![node.publish(&mut log, "one").position.epoch];
    let copy = log.clone();
    for _ in 0..3 {
        node.publish(&mut log, "lost");
        let copy = copy.clone();
        away(&mut node, &mut log, move |log| *log = copy);
        let epoch = node.top(&mut log).epoch;
        assert!(!epochs.contains(&epoch));
        epochs.push(epoch);
    }
}

#[test]
fn who_follows_a_fence_is_told_and_what_was_written_before_it_is_void() {
    let (mut log, mut one, mut other) = (Log::new(), Node::new(1), Node::new(2));
    one.subscribe(&mut log, "room:a");
    other.subscribe(&mut log, "room:a");
    let length = log.len();
    one.publish(&mut log, "lost");
    // The other one has not read it: for it, nothing is wrong.
    away(&mut one, &mut log, |log| log.truncate(length));
    let stale = {
        other.calls += 1;
        let request = Request::Publish {
            call: Call(other.calls),
            target: target("room:a", ROOM),
            id: OwnedId::Node(7, 7),
            record: record("stale"),
        };
        other.partition.request(&mut other.shared, other.now_ms, request);
        other.run(&mut log);
        std::mem::take(&mut other.replies)
    };
    assert!(stale.iter().any(|reply| matches!(reply, Reply::Lost { .. })), "{stale:?}");
    assert!(stale.iter().any(|reply| matches!(reply, Reply::Back { .. })));
    let refused =
        |reply: &Reply| matches!(reply, Reply::Published { result: Err(PublishError::Unavailable), .. });
    assert!(stale.iter().any(refused), "{stale:?}");
    assert_eq!(one.top(&mut log), other.top(&mut log));
    assert_eq!(one.top(&mut log).offset, 0, "nothing of it stands");
}

#[test]
fn reading_begins_a_number_of_messages_before_the_end() {
    let (mut log, mut one) = (Log::new(), Node::new(1));
    let quiet = one.publish(&mut log, "quiet");
    for n in 0..50 {
        let request = |call| {
            let (target, id) = (target("room:b", ROOM), OwnedId::Node(1, 1_000 + n));
            Request::Publish { call, target, id, record: record("b") }
        };
        one.ask(&mut log, request);
    }
    let end = log.len() as u64;
    let mut late = Node::with(2, KafkaOptions { scan_messages_max: 20, ..options() });
    let top = late.top(&mut log);
    assert_eq!(top.epoch, quiet.position.epoch);
    assert!(top.offset > quiet.position.offset && top.offset < end, "the base of what was read: {top:?}");
    // By bytes it reads less than it is told in messages.
    let limits = KafkaOptions { scan_messages_max: 256, scan_bytes_max: 2_000, ..options() };
    for n in 0..300 {
        let request = |call| {
            let (target, id) = (target("room:b", ROOM), OwnedId::Node(2, n));
            Request::Publish { call, target, id, record: record("b") }
        };
        one.ask(&mut log, request);
    }
    assert!(Node::with(3, limits).top(&mut log).offset > log.len() as u64 - 70);
}

#[test]
fn requests_for_a_partition_that_cannot_be_read_are_answered() {
    let (mut log, mut node) = (Log::new(), Node::new(1));
    node.is_cut = true;
    let (a, id) = (target("room:a", ROOM), OwnedId::Node(1, 1));
    node.ask(&mut log, |call| Request::Subscribe { call, target: a.clone() });
    node.ask(&mut log, |call| Request::Publish { call, target: a.clone(), id, record: record("x") });
    node.ask(&mut log, |call| Request::Clear { call, target: a.clone() });
    for _ in 0..200 {
        node.pass(25, &mut log);
    }
    let replies = std::mem::take(&mut node.replies);
    assert_eq!(replies.len(), 3, "{replies:?}");
    for reply in replies {
        assert!(matches!(
            reply,
            Reply::Subscribed { result: Err(BusError::Unavailable), .. }
                | Reply::Published { result: Err(PublishError::Unknown), .. }
                | Reply::Cleared { result: Err(BusError::Unavailable), .. }
        ));
    }
}

#[test]
fn too_large_is_refused_and_the_largest_taken() {
    let (mut log, bytes_max) = (Log::new(), record("12345").len());
    let mut node = Node::with(1, KafkaOptions { record_bytes_max: bytes_max, ..options() });
    assert!(node.publish_as(&mut log, OwnedId::Node(1, 1), "12345").is_ok());
    let bytes = bytes_max + 1;
    let refused = Err(PublishError::TooLarge { bytes, bytes_max });
    assert_eq!(node.publish_as(&mut log, OwnedId::Node(1, 2), "123456"), refused);
}

#[test]
fn what_nobody_uses_is_read_no_more_and_can_be_again() {
    let (mut log, mut node) = (Log::new(), Node::new(1));
    let position = node.publish(&mut log, "one").position;
    for _ in 0..30 {
        node.pass(100, &mut log);
    }
    assert_eq!(node.partition.phase(), Phase::Live, "not yet");
    node.now_ms += 57_000;
    node.partition.tick(&mut node.shared, node.now_ms, 57_000, true);
    for _ in 0..2 {
        node.pass(100, &mut log);
    }
    assert_eq!(node.partition.phase(), Phase::Detached);
    assert_eq!(node.top(&mut log), position);
    let nowhere = Position::new(Epoch::NONE, 0);
    assert_ne!(position, nowhere);
}
