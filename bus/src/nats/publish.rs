//! Publishing, reading and clearing on behalf of the hub.
//!
//! Owns: publishes in flight, their repeats and answers. Must not know: subscriptions' confirmations.
//!
//! A positioned publication goes into its stream, many at a time. Under an idempotency key (`Nats-Msg-Id`) it is sent again
//! where no answer comes, and the window of the stream makes it one. Others have no id there, which costs the server
//! two fifths of its rate and a place in the window each: where no answer comes it is not known what became of them. While a
//! stream refuses, what is asked waits with what was refused, and all goes again in the order of its asking. An
//! ephemeral one is never sent again; it is accepted when an echo that was sent behind it has come back.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{HeaderMap, Message, Subject};
use bytes::Bytes;

use super::api::{Ack, ApiError, read_ack};
use super::life::{In, Life};
use super::pulse::is_passing;
use super::read::Place;
use super::replies::{Replies, ReplyTo};
use super::wire::{self, Told};
use crate::backend::{Call, OwnedId, ReadPage, Reply, Target};
use crate::envelope::{self, Meta};
use crate::epoch::Position;
use crate::hub::COMMAND_MS_MAX;
use crate::types::{Accepted, BusError, HistoryQuery, IDEMPOTENCY_KEY_BYTES_MAX, PublishError};

/// After this time without an answer a publication is sent again, in milliseconds.
const ACK_MS: u64 = 700;

/// After this time a publication that was refused is sent again, in milliseconds.
const REFUSED_MS: u64 = 50;

/// After this time it is given up, in milliseconds: before the hub gives up the command.
const PUBLISH_MS_MAX: u64 = 2_800;
const _: () = assert!(PUBLISH_MS_MAX < COMMAND_MS_MAX);

/// Largest part of a message that is not the record, in bytes: envelope and headers.
const OVERHEAD_BYTES_MAX: usize = 8 << 10;

/// Channels whose subject is kept. When there are more, all are made anew.
const DESTINATIONS_MAX: usize = 65_536;

/// Where a channel is stored.
#[derive(Clone)]
struct Destination {
    stream: u16,
    subject: Subject,
}

struct Flight {
    call: Call,
    name: Arc<str>,
    to: Destination,
    reply_to: ReplyTo,
    /// Under which the stream's window knows it, if it does.
    id: Option<String>,
    payload: Bytes,
    begun: Instant,
    again: Instant,
    /// An attempt may have been taken.
    in_doubt: bool,
    /// The last attempt has no answer yet.
    open: bool,
    /// Two answers may come.
    was_repeated: bool,
}

impl Flight {
    /// Whether it is time to send it, or to send it again.
    fn is_due(&self, now: Instant) -> bool {
        self.again <= now && (self.id.is_some() || !(self.in_doubt || self.open))
    }

    fn is_over(&self, now: Instant) -> bool {
        now - self.begun > Duration::from_millis(PUBLISH_MS_MAX)
    }

    /// Its answer if nothing more is waited for.
    fn give_up(self, replies: &mut Replies) -> Reply {
        replies.give_back(self.reply_to, !(self.open || self.was_repeated));
        let is_known = !(self.in_doubt || self.open);
        let error = if is_known { PublishError::Unavailable } else { PublishError::Unknown };
        Reply::Published { call: self.call, result: Err(error) }
    }
}

/// Positioned publishes in flight.
pub(super) struct Publishes {
    /// By number, in the order of their asking.
    flights: BTreeMap<u64, Flight>,
    drawn: u64,
    replies: Replies,
    destinations: HashMap<Arc<str>, Destination>,
    /// Streams that refused, and until when nothing is sent there.
    held: HashMap<u16, Instant>,
    /// Reads and clears under way.
    walking: HashMap<Call, (u16, bool)>,
}

impl Publishes {
    /// None, whose answers come to the inbox.
    pub(super) fn new(inbox: &str) -> Publishes {
        Publishes {
            flights: BTreeMap::new(),
            drawn: 0,
            replies: Replies::new(format!("{inbox}.p")),
            destinations: HashMap::new(),
            held: HashMap::new(),
            walking: HashMap::new(),
        }
    }

    /// Takes out what is under way on a stream, as its answers.
    pub(super) fn fail(&mut self, stream: u16) -> Vec<Reply> {
        self.held.remove(&stream);
        let publishes = self.flights.extract_if(.., |_, flight| flight.to.stream == stream);
        let publishes = publishes.map(|(_, flight)| flight.give_up(&mut self.replies));
        let walks = self.walking.extract_if(|_, (of, _)| *of == stream).map(|(call, (_, is_read))| {
            let unavailable = BusError::Unavailable;
            match is_read {
                true => Reply::Read { call, result: Err(unavailable) },
                false => Reply::Cleared { call, result: Err(unavailable) },
            }
        });
        walks.chain(publishes).collect()
    }

    /// Reads and clears under way.
    pub(super) fn reads(&self) -> usize {
        self.walking.len()
    }

    /// Whether the call still waits; it does no more.
    pub(super) fn walked(&mut self, call: Call) -> bool {
        self.walking.remove(&call).is_some()
    }
}

/// Ephemeral publishes that wait for an echo.
#[derive(Default)]
pub(super) struct Echoes {
    /// Each with the number of the echo that was or will be sent behind it.
    waiting: VecDeque<(u64, Call)>,
    sent: u64,
    in_flight: bool,
}

impl Echoes {
    pub(super) fn fail(&mut self) -> Vec<Call> {
        self.waiting.drain(..).map(|(_, call)| call).collect()
    }
}

impl Life<'_> {
    pub(super) async fn publish(&mut self, call: Call, target: Target, id: &OwnedId, record: Bytes) {
        if let Err(error) = self.check(id, &record) {
            return self.node.tell(Reply::Published { call, result: Err(error) }).await;
        }
        if !target.options.is_positioned() {
            let extra = self.node.speech.say(self.node.incarnation, &target.name);
            let payload = envelope::encode(&target.name, &record, Meta { id: None, extra: &extra });
            let subject = self.node.subjects.ephemeral_channel(&target.name);
            self.send(subject, None, None, payload).await;
            self.echoes.waiting.push_back((self.echoes.sent + 1, call));
            return self.echo().await;
        }
        let to = self.destination(&target.name);
        if !self.is_stream_up(to.stream) {
            return self.node.tell(Reply::Published { call, result: Err(PublishError::Unavailable) }).await;
        }
        let now = Instant::now();
        let publishes = &mut self.publishes;
        let held = publishes.held.get(&to.stream).copied();
        publishes.drawn += 1;
        let number = publishes.drawn;
        let flight = Flight {
            call,
            id: message_id(&target.name, id),
            payload: envelope::encode(&target.name, &record, Meta::default()),
            name: target.name,
            to,
            reply_to: publishes.replies.take(number),
            begun: now,
            again: held.unwrap_or(now),
            in_doubt: false,
            open: false,
            was_repeated: false,
        };
        publishes.flights.insert(number, flight);
        if held.is_none() {
            self.attempt(number, now).await;
        }
    }

    fn destination(&mut self, name: &Arc<str>) -> Destination {
        if let Some(known) = self.publishes.destinations.get(name) {
            return known.clone();
        }
        let subject = self.node.subjects.stored_channel(name).into();
        let made = Destination { stream: self.stream_of(name), subject };
        let destinations = &mut self.publishes.destinations;
        if destinations.len() >= DESTINATIONS_MAX {
            destinations.clear();
        }
        destinations.insert(name.clone(), made.clone());
        made
    }

    fn check(&self, id: &OwnedId, record: &Bytes) -> Result<(), PublishError> {
        if let OwnedId::Key(key) = id
            && key.len() > IDEMPOTENCY_KEY_BYTES_MAX
        {
            return Err(PublishError::KeyTooLong { bytes: key.len() });
        }
        let room = self.client.max_payload().saturating_sub(OVERHEAD_BYTES_MAX);
        let bytes_max = self.node.options.record_bytes_max.min(room);
        let bytes = record.len();
        if bytes > bytes_max { Err(PublishError::TooLarge { bytes, bytes_max }) } else { Ok(()) }
    }

    /// Sends a publication into its stream.
    async fn attempt(&mut self, number: u64, now: Instant) {
        let Publishes { flights, replies, .. } = &mut self.publishes;
        let Some(flight) = flights.get_mut(&number) else { return };
        flight.was_repeated |= flight.open;
        flight.open = true;
        flight.again = now + Duration::from_millis(ACK_MS);
        let headers = flight.id.as_deref().map(|id| {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", id);
            headers
        });
        let (subject, reply_to) = (flight.to.subject.clone(), replies.subject(flight.reply_to));
        let payload = flight.payload.clone();
        self.send(subject, Some(reply_to), headers, payload).await;
    }

    /// Sends an echo behind the ephemeral publications, one at a time.
    async fn echo(&mut self) {
        if self.echoes.in_flight || self.echoes.waiting.is_empty() {
            return;
        }
        self.echoes.sent += 1;
        self.echoes.in_flight = true;
        let subject = format!("{}.e", self.inbox);
        self.send(subject, None, None, Bytes::new()).await;
    }

    /// Something came to our inbox.
    pub(super) async fn answer(&mut self, message: &Message) {
        let Some(tail) = message.subject.strip_prefix(self.inbox.as_str()) else { return };
        match tail.as_bytes() {
            [b'.', b'p', b'.', ..] => {
                if let Some(number) = self.publishes.replies.publication(&tail[3..]) {
                    self.acked(number, read_ack(message)).await;
                }
            }
            b".e" => self.echoed().await,
            b".c" => {
                if let Some(told) = wire::read::<Told>(&message.payload) {
                    self.peer_told(&told).await;
                }
            }
            _ => (),
        }
    }

    async fn echoed(&mut self) {
        self.echoes.in_flight = false;
        while let Some((_, call)) =
            self.echoes.waiting.pop_front_if(|(behind, _)| *behind <= self.echoes.sent)
        {
            let accepted = Accepted { position: Position::NONE, repeated: false };
            self.node.tell(Reply::Published { call, result: Ok(accepted) }).await;
        }
        self.echo().await;
    }

    async fn acked(&mut self, number: u64, result: Result<Ack, ApiError>) {
        let Publishes { flights, held, .. } = &mut self.publishes;
        let Some(flight) = flights.get_mut(&number) else { return };
        let ack = match result {
            Ok(ack) => ack,
            Err(error) => {
                tracing::debug!(%error, "a publication was not taken");
                flight.open = false;
                flight.in_doubt |= !is_passing(&error);
                let again = || Instant::now() + Duration::from_millis(REFUSED_MS);
                flight.again = *held.entry(flight.to.stream).or_insert_with(again);
                return;
            }
        };
        let Some(flight) = self.publishes.flights.remove(&number) else { return };
        self.publishes.replies.give_back(flight.reply_to, !flight.was_repeated);
        let stream = flight.to.stream;
        let n = usize::from(stream);
        let high = &mut self.node.memories[n].witness.high;
        *high = ack.sequence.max(*high);
        if !ack.repeated {
            self.streams[n].published.insert(flight.name.clone(), ack.sequence);
        }
        let position = Position::new(self.epoch_of(stream, &flight.name), ack.sequence);
        let accepted = Accepted { position, repeated: ack.repeated };
        self.node.tell(Reply::Published { call: flight.call, result: Ok(accepted) }).await;
    }

    pub(super) async fn look_after_publishes(&mut self, now: Instant) {
        self.publishes.held.retain(|_, until| *until > now);
        let flights = self.publishes.flights.iter();
        let due = flights.filter(|(_, flight)| flight.is_due(now) || flight.is_over(now));
        let numbers: Vec<u64> = due.map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(flight) = self.publishes.flights.get_mut(&number) else { continue };
            flight.in_doubt |= flight.open;
            if !flight.is_over(now) {
                self.attempt(number, now).await;
                continue;
            }
            let Publishes { flights, replies, .. } = &mut self.publishes;
            if let Some(reply) = flights.remove(&number).map(|flight| flight.give_up(replies)) {
                self.node.tell(reply).await;
            }
        }
    }

    pub(super) fn place(&self, stream: u16, name: &str) -> Place {
        let life = &self.streams[usize::from(stream)];
        let info = &life.info;
        let age_ms = super::read::unix_ms().saturating_sub(info.created_ms);
        let published = life.published.get(name).copied().unwrap_or(0);
        let heard = self.channels.heard.get(name).map_or(0, |heard| heard.last);
        Place {
            api: self.api(stream),
            subject: Rc::from(self.node.subjects.stored_channel(name)),
            mark: Rc::from(self.node.subjects.stored_mark(name)),
            epoch: self.epoch_of(stream, name),
            at_least: published.max(heard),
            per_subject_max: usize::try_from(info.per_subject_max).unwrap_or(usize::MAX).max(2),
            may_have_dropped: info.was_raised
                || info.bytes_max > 0
                || (info.age_max_ms > 0 && age_ms >= info.age_max_ms),
            clock_ahead_ms: life.clock_ahead_ms.unwrap_or(0),
            runs: self.runs.clone(),
        }
    }

    pub(super) async fn read(&mut self, call: Call, target: Target, query: HistoryQuery) {
        if !target.options.is_positioned() {
            let page = crate::types::Page { top: Position::NONE, floor: 0, more: false };
            let page = ReadPage { page, lineage: crate::lineage::Lineage::EMPTY, records: Vec::new() };
            return self.node.tell(Reply::Read { call, result: Ok(page) }).await;
        }
        let stream = self.stream_of(&target.name);
        let together = self.is_read_together(stream, &target.name, &query);
        self.publishes.walking.insert(call, (stream, true));
        if together {
            self.read_together(stream, call, target, query).await;
        } else {
            self.read_alone(call, &target, query);
        }
    }

    /// Reads a channel by itself. The call is among those under way.
    pub(super) fn read_alone(&mut self, call: Call, target: &Target, query: HistoryQuery) {
        let place = self.place(self.stream_of(&target.name), &target.name);
        let options = target.options;
        self.walk(async move { In::Read { call, result: place.read(&options, &query).await } });
    }

    /// A read is done, if anybody waits for it yet.
    pub(super) async fn handle_read(&mut self, call: Call, result: Result<ReadPage, BusError>) {
        if self.publishes.walked(call) {
            self.node.tell(Reply::Read { call, result }).await;
        }
    }

    pub(super) async fn clear(&mut self, call: Call, target: &Target) {
        if !target.options.is_positioned() {
            return self.node.tell(Reply::Cleared { call, result: Ok(Position::NONE) }).await;
        }
        let stream = self.stream_of(&target.name);
        let place = self.place(stream, &target.name);
        self.publishes.walking.insert(call, (stream, false));
        self.walk(async move { In::Cleared { call, result: place.clear().await } });
    }
}

/// The id under which the stream's window knows a publication: an API's key counts within its channel.
fn message_id(name: &str, id: &OwnedId) -> Option<String> {
    match id {
        OwnedId::Node(..) => None,
        OwnedId::Key(key) => {
            Some(format!("k{}.{}", super::subjects::token(name), super::subjects::token(key)))
        }
    }
}
