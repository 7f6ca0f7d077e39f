//! One partition at this node: from the first use to a log that is read to its end, and back to it after a loss.
//!
//! Owns: when reading starts and where, marks and silence, generations, who waits for what. Must not know: Kafka's
//! client, runtimes, clocks: `now_ms` is an argument, and what is to be done comes out as [`Act`]s.
//!
//! Reading starts a number of messages before the end, which fills the histories, and is complete when a mark that
//! this node wrote afterwards has been read back. The same marks are the canary (every [`CANARY_MS`]), and what a read
//! of history waits for: whoever has read its own mark has read all that was accepted before.
//!
//! **Generations.** An epoch is made of the partition's generation. It is raised by a fence in the log itself, so that
//! all readers change it at the same offset, and what was written for another generation is as if it were not there.
//! A node raises it when it comes back and finds that what it had read is gone: the end is below, or another message
//! stands there (topic made anew, disk lost, an election of a replica that was behind). Until then it neither
//! publishes nor answers. Not covered: a node that never saw the lost tail, was not cut off when the log was cut, and
//! publishes before any that saw it is back; the two publications of one name are then told as another epoch as soon
//! as one of those is back.
//!
//! Invariants: nothing is given to the hub but in [`Phase::Live`]; every request is answered once.

mod attach;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::log::{Applied, PartitionLog, Seen};
use super::options::KafkaOptions;
use super::wire::{self, Body, Stamp};
use crate::backend::{CANARY_MS, Call, Domain, Message, OwnedId, Reply, Request, Target};
use crate::epoch::Position;
use crate::lineage::Lineage;
use crate::nonce::Nonces;
use crate::types::{Accepted, BusError, PublishError};

/// How long requests wait for a partition that is being read for the first time, in milliseconds.
const ATTACH_MS_MAX: u64 = 2_500;

/// Marks without an answer, above which no more are written.
const MARKS_MAX: usize = 8;

/// A scan of fewer messages is not made shorter, however large they are.
const SCAN_LESS_MIN: i64 = 64;

/// Offset of a read that starts at the partition's beginning is not known: so many messages before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kafka) enum Start {
    /// At this message, which was read before.
    At(i64),
    /// So many messages before the end.
    Tail(i64),
    /// At the oldest kept.
    Beginning,
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kafka) enum Act {
    /// Fetch the partition from here, and nothing of before.
    Assign { partition: u32, start: Start },
    /// Fetch it no more.
    Unassign { partition: u32 },
    /// Write a message; tell [`Partition::delivered`] under its sequence.
    Send { partition: u32, sequence: u64, payload: Bytes },
}

/// What all partitions of a node share.
#[derive(Debug)]
pub(in crate::kafka) struct Shared {
    pub(in crate::kafka) options: Arc<KafkaOptions>,
    /// This start of this node, in its messages.
    pub(in crate::kafka) node: u64,
    pub(in crate::kafka) nonces: Nonces,
    sequence: u64,
    /// To be done, in order.
    pub(in crate::kafka) acts: VecDeque<Act>,
    /// To be told to the hub, in order.
    pub(in crate::kafka) replies: VecDeque<Reply>,
}

impl Shared {
    pub(in crate::kafka) fn new(options: Arc<KafkaOptions>, seed: u64) -> Shared {
        let mut nonces = Nonces::new(seed);
        let node = nonces.draw();
        Shared { options, node, nonces, sequence: 0, acts: VecDeque::new(), replies: VecDeque::new() }
    }
}

/// How far a partition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kafka) enum Phase {
    /// Nobody needs it.
    Detached,
    /// Reading starts again at this time.
    Down { retry_ms: u64 },
    /// Being read; its end is not reached.
    Reading,
    /// Read to its end; a new generation is being raised.
    Raising,
    /// Read to its end.
    Live,
}

/// What one of our messages is for.
#[derive(Debug)]
enum Pending {
    Mark,
    Fence,
    Publish { call: Call, positioned: bool },
    Clear { call: Call },
}

/// See the module's doc.
#[derive(Debug)]
pub(in crate::kafka) struct Partition {
    index: u32,
    phase: Phase,
    log: PartitionLog,
    /// Where reading started, and whether the first message was what it should be.
    start: Start,
    verified: bool,
    /// The last message read in an earlier reading, until it is known whether it still stands.
    seen: Option<Seen>,
    /// It stands no more.
    truncated: bool,
    /// Nonces of generations that this node stood in.
    known: VecDeque<u64>,
    pending: HashMap<u64, Pending>,
    marks: usize,
    /// The mark that reads wait for, while one is on its way for them.
    sync: Option<u64>,
    reads: VecDeque<(u64, Request)>,
    /// Requests that came before the partition was live, with when they are given up.
    waiting: VecDeque<(u64, Request)>,
    subscribed: HashSet<Arc<str>>,
    /// Subscribed channels that moved since the last canary.
    moved: HashSet<Arc<str>>,
    /// The hub was told that it is lost.
    is_lost: bool,
    failures: u32,
    heard_ms: u64,
    progress_ms: u64,
    canary_ms: u64,
    used_ms: u64,
    down_since_ms: u64,
    /// Since reading started.
    scanned_bytes: u64,
}

impl Partition {
    pub(in crate::kafka) fn new(index: u32, options: &KafkaOptions) -> Partition {
        Partition {
            index,
            phase: Phase::Detached,
            log: PartitionLog::new(options.log_limits()),
            start: Start::Beginning,
            verified: false,
            seen: None,
            truncated: false,
            known: VecDeque::new(),
            pending: HashMap::new(),
            marks: 0,
            sync: None,
            reads: VecDeque::new(),
            waiting: VecDeque::new(),
            subscribed: HashSet::new(),
            moved: HashSet::new(),
            is_lost: false,
            failures: 0,
            heard_ms: 0,
            progress_ms: 0,
            canary_ms: 0,
            used_ms: 0,
            down_since_ms: 0,
            scanned_bytes: 0,
        }
    }

    pub(in crate::kafka) fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it is used, and has not been live for this long, in milliseconds.
    pub(in crate::kafka) fn down_for_ms(&self, now_ms: u64) -> Option<u64> {
        let is_down = !matches!(self.phase, Phase::Detached | Phase::Live);
        is_down.then(|| now_ms.saturating_sub(self.down_since_ms))
    }

    /// Whether the hub counts on it and it cannot be reached.
    pub(in crate::kafka) fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Whether it has answered a moment ago, and not only once.
    pub(in crate::kafka) fn is_answering(&self, now_ms: u64) -> bool {
        self.phase == Phase::Live && now_ms < self.heard_ms + 2 * CANARY_MS
    }

    // Requests

    /// A request for one of the partition's channels.
    pub(in crate::kafka) fn request(&mut self, shared: &mut Shared, now_ms: u64, request: Request) {
        self.used_ms = now_ms;
        match self.phase {
            Phase::Live => self.serve(shared, now_ms, request),
            _ if self.is_lost => refuse(shared, &request),
            Phase::Detached => {
                self.hold(now_ms, request);
                self.down_since_ms = now_ms;
                self.attach(shared, now_ms);
            }
            _ => self.hold(now_ms, request),
        }
    }

    fn hold(&mut self, now_ms: u64, request: Request) {
        if let Request::Unsubscribe { target } = &request {
            let is_this = |other: &Request| matches!(other, Request::Subscribe { target: other, .. } if other.name == target.name);
            // The hub has given it up, and waits for no answer.
            self.waiting.retain(|(_, other)| !is_this(other));
            return;
        }
        self.waiting.push_back((now_ms + ATTACH_MS_MAX, request));
    }

    fn serve(&mut self, shared: &mut Shared, now_ms: u64, request: Request) {
        match request {
            Request::Subscribe { call, target } => {
                self.log.pin(&target.name, true);
                self.subscribed.insert(target.name);
                shared.replies.push_back(Reply::Subscribed { call, result: Ok(Domain(self.index)) });
            }
            Request::Unsubscribe { target } => {
                self.log.pin(&target.name, false);
                self.subscribed.remove(&target.name);
                self.moved.remove(&target.name);
            }
            Request::Publish { call, target, id, record } => self.publish(shared, call, &target, id, record),
            Request::Clear { call, target } => {
                self.send(shared, Pending::Clear { call }, &Body::Clear { channel: &target.name });
            }
            Request::Read { .. } => {
                self.reads.push_back((shared.sequence, request));
                self.sync(shared, now_ms);
            }
        }
    }

    fn publish(&mut self, shared: &mut Shared, call: Call, target: &Target, id: OwnedId, record: Bytes) {
        let (bytes, bytes_max) = (record.len(), shared.options.record_bytes_max);
        if bytes > bytes_max {
            let result = Err(PublishError::TooLarge { bytes, bytes_max });
            return shared.replies.push_back(Reply::Published { call, result });
        }
        let (channel, options) = (&*target.name, target.options);
        let positioned = options.is_positioned();
        let body = match positioned {
            true => Body::Publication { channel, id: Some(id), options, record },
            false => Body::Ephemeral { channel, record },
        };
        self.send(shared, Pending::Publish { call, positioned }, &body);
    }

    fn send(&mut self, shared: &mut Shared, pending: Pending, body: &Body<'_>) -> u64 {
        shared.sequence += 1;
        let sequence = shared.sequence;
        let stamp = Stamp { generation: self.log.generation(), node: shared.node, sequence };
        self.marks += usize::from(matches!(pending, Pending::Mark));
        self.pending.insert(sequence, pending);
        let payload = wire::encode(&stamp, body);
        shared.acts.push_back(Act::Send { partition: self.index, sequence, payload });
        sequence
    }

    fn mark(&mut self, shared: &mut Shared, now_ms: u64) {
        self.canary_ms = now_ms + CANARY_MS;
        if self.marks < MARKS_MAX {
            self.send(shared, Pending::Mark, &Body::Mark);
        }
    }

    /// Sends the mark that reads wait for, if none is on its way for them.
    fn sync(&mut self, shared: &mut Shared, now_ms: u64) {
        if self.sync.is_none() && self.marks < MARKS_MAX {
            self.sync = Some(self.send(shared, Pending::Mark, &Body::Mark));
            self.canary_ms = now_ms + CANARY_MS;
        }
    }

    // What comes from the broker

    /// The broker has taken one of our messages, at this offset, or has not.
    pub(in crate::kafka) fn delivered(
        &mut self,
        shared: &mut Shared,
        now_ms: u64,
        sequence: u64,
        result: Result<i64, SendError>,
    ) {
        let Some(pending) = self.pending.get(&sequence) else { return };
        match (result, pending) {
            (Ok(_), Pending::Publish { call, positioned: false }) => {
                let accepted = Accepted { position: Position::NONE, repeated: false };
                shared.replies.push_back(Reply::Published { call: *call, result: Ok(accepted) });
                self.pending.remove(&sequence);
            }
            // It was written where we have read, and we have not read it: the log is another one.
            (Ok(offset), _) if self.log.last().is_some_and(|last| (0..=last.offset).contains(&offset)) => {
                self.start_over(shared, now_ms);
            }
            (Ok(_), _) => (),
            (Err(error), _) => self.not_delivered(shared, sequence, error),
        }
    }

    fn not_delivered(&mut self, shared: &mut Shared, sequence: u64, error: SendError) {
        match self.pending.remove(&sequence) {
            Some(Pending::Publish { call, .. }) => {
                let result = Err(match error {
                    SendError::Refused => PublishError::Unavailable,
                    SendError::Full => PublishError::Overloaded,
                    SendError::Unknown => PublishError::Unknown,
                });
                shared.replies.push_back(Reply::Published { call, result });
            }
            Some(Pending::Clear { call }) => {
                shared.replies.push_back(Reply::Cleared { call, result: Err(BusError::Unavailable) });
            }
            Some(Pending::Mark) => {
                self.marks -= 1;
                self.sync = self.sync.filter(|sync| *sync != sequence);
            }
            // The next tick notices that none is on its way.
            Some(Pending::Fence) | None => (),
        }
    }

    /// The next message of the partition.
    pub(in crate::kafka) fn message(
        &mut self,
        shared: &mut Shared,
        now_ms: u64,
        offset: i64,
        time_ms: i64,
        payload: &Bytes,
    ) {
        if !matches!(self.phase, Phase::Reading | Phase::Raising | Phase::Live) {
            return;
        }
        let message = wire::decode(payload);
        let stamp = message.as_ref().map(|(stamp, _)| *stamp);
        let writer = stamp.map_or((0, 0), |stamp| (stamp.node, stamp.sequence));
        if !self.verified {
            self.verified = true;
            if let (Start::At(_), Some(last)) = (self.start, self.log.last()) {
                match (Seen { offset, writer }) == last {
                    true => return,
                    false => return self.start_over(shared, now_ms),
                }
            }
        }
        if let Some(seen) = self.seen.filter(|seen| seen.offset == offset) {
            self.truncated |= seen.writer != writer;
            self.seen = None;
        }
        self.progress_ms = now_ms;
        let current = self.log.generation().number;
        if self.phase == Phase::Live && stamp.is_some_and(|stamp| stamp.generation.number > current) {
            // There was a fence, and we have not read it.
            return self.start_over(shared, now_ms);
        }
        if self.is_too_much(payload.len() as u64, shared.options.scan_bytes_max) {
            return self.scan_less(shared, now_ms);
        }
        match self.log.apply(now_ms, offset, time_ms, message) {
            Err(_) => self.start_over(shared, now_ms),
            Ok(applied) => {
                let own = stamp.filter(|stamp| stamp.node == shared.node).map(|stamp| stamp.sequence);
                self.applied(shared, now_ms, own, &applied);
            }
        }
    }

    /// Counts what is read before the end is reached.
    fn is_too_much(&mut self, bytes: u64, bytes_max: u64) -> bool {
        self.scanned_bytes += bytes;
        let is_scan = self.phase == Phase::Reading && matches!(self.start, Start::Tail(SCAN_LESS_MIN..));
        is_scan && self.scanned_bytes > bytes_max
    }

    /// Messages are larger than was thought: starts nearer to the end.
    fn scan_less(&mut self, shared: &mut Shared, now_ms: u64) {
        let Start::Tail(messages) = self.start else { return };
        self.log = PartitionLog::new(shared.options.log_limits());
        self.attach_at(shared, now_ms, Start::Tail(messages / 4));
    }

    fn applied(&mut self, shared: &mut Shared, now_ms: u64, own: Option<u64>, applied: &Applied) {
        let pending = own.and_then(|sequence| Some((sequence, self.pending.remove(&sequence)?)));
        match applied {
            Applied::Publication { name, accepted, previous, record } if !accepted.repeated => {
                self.tell(shared, name, accepted.position, *previous, record);
            }
            Applied::Ephemeral { name, record } => {
                self.tell(shared, name, Position::NONE, 0, record);
            }
            Applied::Fenced => self.fenced(shared),
            _ => (),
        }
        match pending {
            Some((sequence, Pending::Mark)) => self.heard(shared, now_ms, sequence),
            Some((_, Pending::Fence)) => self.read_to_end(shared, now_ms, i64::MAX),
            Some((_, Pending::Publish { call, .. })) => {
                let result = match applied {
                    Applied::Publication { accepted, .. } => Ok(*accepted),
                    Applied::Ephemeral { .. } => Ok(Accepted { position: Position::NONE, repeated: false }),
                    _ => Err(PublishError::Unavailable),
                };
                shared.replies.push_back(Reply::Published { call, result });
            }
            Some((_, Pending::Clear { call })) => {
                let result = match applied {
                    Applied::Cleared { position } => Ok(*position),
                    _ => Err(BusError::Unavailable),
                };
                shared.replies.push_back(Reply::Cleared { call, result });
            }
            None => (),
        }
    }

    /// Tells the hub of a publication.
    fn tell(
        &mut self,
        shared: &mut Shared,
        name: &Arc<str>,
        position: Position,
        previous: u64,
        record: &Bytes,
    ) {
        if self.phase != Phase::Live {
            return;
        }
        let Some(name) = self.subscribed.get(name).cloned() else { return };
        let Position { epoch, offset } = position;
        if !epoch.is_none() {
            self.moved.insert(name.clone());
        }
        let message = Message { epoch, lineage: Lineage::EMPTY, previous, offset, record: record.clone() };
        shared.replies.push_back(Reply::Message { name, message });
    }

    /// Every epoch is another one: the hub is to read all channels again.
    fn fenced(&mut self, shared: &mut Shared) {
        if self.phase == Phase::Live {
            self.remember_generation();
            self.forget_subscriptions();
            let domain = Domain(self.index);
            shared.replies.push_back(Reply::Lost { domain });
            shared.replies.push_back(Reply::Back { domain });
        }
    }

    /// One of our marks came back.
    fn heard(&mut self, shared: &mut Shared, now_ms: u64, sequence: u64) {
        self.marks -= 1;
        self.heard_ms = now_ms;
        let is_sync = self.sync.is_some_and(|sync| sync <= sequence);
        if is_sync {
            self.sync = None;
        }
        match self.phase {
            Phase::Reading => {
                let end = self.log.last().map_or(0, |last| last.offset);
                return self.read_to_end(shared, now_ms, end);
            }
            Phase::Live => (),
            _ => return,
        }
        while let Some((_, read)) = self.reads.pop_front_if(|(asked, _)| *asked < sequence) {
            self.answer_read(shared, now_ms, read);
        }
        if !self.reads.is_empty() {
            self.sync(shared, now_ms);
        }
        self.tell_tops(shared);
    }

    /// High-water marks of the channels that moved: a tail lost on the way to the hub is found without a message.
    fn tell_tops(&mut self, shared: &mut Shared) {
        for name in self.moved.drain() {
            let Position { epoch, offset } = self.log.position(&name);
            let record = Bytes::new();
            let message = Message { epoch, lineage: Lineage::EMPTY, previous: offset, offset, record };
            shared.replies.push_back(Reply::Message { name, message });
        }
    }

    fn answer_read(&mut self, shared: &mut Shared, now_ms: u64, read: Request) {
        if let Request::Read { call, target, query } = read {
            let result = self.log.read(now_ms, &target.name, &target.options, &query);
            shared.replies.push_back(Reply::Read { call, result });
        }
    }
}

/// Why a message was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kafka) enum SendError {
    /// It certainly was not written.
    Refused,
    /// There was no room for it: it certainly was not written.
    Full,
    /// It may have been written.
    Unknown,
}

/// Answers a request that has waited in vain. A publish that was taken and not refused at once is told as unknown.
fn give_up(shared: &mut Shared, request: &Request) {
    match *request {
        Request::Publish { call, .. } => {
            shared.replies.push_back(Reply::Published { call, result: Err(PublishError::Unknown) });
        }
        _ => refuse(shared, request),
    }
}

/// Answers a request that cannot be served: nothing was written for it.
pub(in crate::kafka) fn refuse(shared: &mut Shared, request: &Request) {
    shared.replies.extend(request.refusal());
}
