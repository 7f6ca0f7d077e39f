//! The subscriber's side of a session: who is subscribed, what comes in.
//!
//! Owns: units of interest at the broker and the channels counted in them. Must not know: the script's connection.
//!
//! Each channel is subscribed by a command of its own (a command of several is refused by a cluster), all of them
//! pipelined. Invariants: a subscription that the server ends by itself ends the session; a message of a channel that
//! is not open here is dropped; a hole in an ephemeral channel's counter is a doubt.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use redis::{PushKind, Value};

use super::{Ending, Session};
use crate::backend::{Call, Message, Reply, Target};
use crate::envelope;
use crate::epoch::{Epoch, Position};
use crate::lineage::{Lineage, Place};
use crate::redis::canary::{self, Mark};
use crate::redis::names::Names;
use crate::redis::script::{Heard, Life, heard};
use crate::redis::topology::text;
use crate::redis::wire::{Connection, WireError};

/// A subscription at the broker.
#[derive(Debug, Default)]
struct Unit {
    /// Open channels of it.
    channels: usize,
    /// Commands not confirmed yet.
    joining: usize,
    leaving: usize,
    /// Answered when the last of `joining` is.
    waiting: Vec<Call>,
}

/// An open channel.
#[derive(Debug)]
struct Open {
    target: Target,
    /// Where this node stands, as far as it was read or heard here; of an ephemeral channel its counter.
    place: Option<Place>,
    /// When its position is touched next; other plans are void.
    touch: Option<Instant>,
}

pub(super) struct Ears {
    connection: Connection,
    names: Names,
    cluster: bool,
    units: HashMap<String, Unit>,
    open: HashMap<Arc<str>, Open>,
}

impl Ears {
    /// Listens to the canary alone.
    pub(super) fn new(connection: Connection, names: Names, cluster: bool, canary_key: &str) -> Ears {
        let ears = Ears { connection, names, cluster, units: HashMap::new(), open: HashMap::new() };
        ears.command(true, canary_key);
        ears
    }

    pub(super) async fn next(&mut self) -> Result<Value, WireError> {
        self.connection.next().await
    }

    pub(super) fn next_now(&mut self) -> Option<Result<Value, WireError>> {
        self.connection.next_now()
    }

    fn command(&self, join: bool, unit: &str) -> bool {
        let name = match (join, self.cluster) {
            (true, true) => "SSUBSCRIBE",
            (true, false) => "SUBSCRIBE",
            (false, true) => "SUNSUBSCRIBE",
            (false, false) => "UNSUBSCRIBE",
        };
        self.connection.send(redis::cmd(name).arg(unit))
    }

    pub(super) fn plan_touch(&mut self, name: &str, due: Instant) {
        if let Some(open) = self.open.get_mut(name) {
            open.touch = Some(due);
        }
    }

    /// The channel, if it is open and this is when it is to be touched.
    pub(super) fn target_due(&self, name: &str, due: Instant) -> Option<Target> {
        self.open.get(name).filter(|open| open.touch == Some(due)).map(|open| open.target.clone())
    }

    pub(super) fn place(&self, name: &str) -> Option<Place> {
        self.open.get(name).filter(|open| open.target.options.is_positioned()).and_then(|open| open.place)
    }

    /// A read said where a channel is.
    pub(super) fn stand(&mut self, name: &str, place: Place) {
        if let Some(open) = self.open.get_mut(name) {
            open.place = Some(place);
        }
    }

    /// `Some(true)`: it is subscribed already; `Some(false)`: it will be.
    fn join(&mut self, call: Call, target: Target) -> Option<bool> {
        let unit_name = self.names.unit(&target.name);
        let unit = self.units.entry(unit_name.clone()).or_default();
        let was_wanted = unit.channels > 0;
        match self.open.get_mut(&target.name) {
            Some(open) => open.target = target,
            None => {
                unit.channels += 1;
                self.open.insert(target.name.clone(), Open { target, place: None, touch: None });
            }
        }
        if was_wanted && unit.joining == 0 {
            return Some(true);
        }
        unit.waiting.push(call);
        if was_wanted {
            return Some(false);
        }
        unit.joining += 1;
        self.command(true, &unit_name).then_some(false)
    }

    pub(super) fn unsubscribe(&mut self, name: &str) -> Result<(), Ending> {
        if self.open.remove(name).is_none() {
            return Ok(());
        }
        let unit_name = self.names.unit(name);
        let Some(unit) = self.units.get_mut(&unit_name) else { return Ok(()) };
        unit.channels -= 1;
        if unit.channels > 0 {
            return Ok(());
        }
        unit.leaving += 1;
        self.command(false, &unit_name).then_some(()).ok_or(Ending::because("outgoing"))
    }

    /// Calls that no confirmation answered.
    pub(super) fn waiting(&mut self) -> Vec<Call> {
        self.units.values_mut().flat_map(|unit| unit.waiting.drain(..)).collect()
    }

    /// Which calls a confirmation answers.
    fn joined(&mut self, unit: &str) -> Vec<Call> {
        let Some(unit) = self.units.get_mut(unit) else { return Vec::new() };
        unit.joining = unit.joining.saturating_sub(1);
        if unit.joining == 0 { std::mem::take(&mut unit.waiting) } else { Vec::new() }
    }

    fn left(&mut self, name: &str) -> Result<(), Ending> {
        let unit = self.units.get_mut(name).filter(|unit| unit.leaving > 0);
        let unit = unit.ok_or(Ending::because("unsubscribed by the server"))?;
        unit.leaving -= 1;
        if unit.leaving == 0 && unit.channels == 0 && unit.joining == 0 {
            self.units.remove(name);
        }
        Ok(())
    }
}

impl Session {
    pub(super) async fn subscribe(&mut self, call: Call, target: Target) -> Result<(), Ending> {
        let new = target.options.is_positioned() && !self.ears.open.contains_key(&target.name);
        let joined = self.ears.join(call, target.clone());
        if new {
            self.plan_touch(&target, Instant::now());
        }
        if joined.ok_or(Ending::because("outgoing"))? {
            self.context.tell(Reply::Subscribed { call, result: Ok(self.domain) }).await;
        }
        Ok(())
    }

    /// One answer or push of the subscriber's connection.
    pub(super) async fn heard(&mut self, value: Value) -> Result<(), Ending> {
        let (kind, data) = match value {
            Value::Push { kind, data } => (kind, data),
            Value::ServerError(error) => {
                tracing::debug!(code = error.code(), "Redis refused a subscription");
                return Err(Ending::because("subscription refused"));
            }
            _ => return Ok(()),
        };
        match kind {
            PushKind::Message | PushKind::SMessage => match data.into_iter().nth(1) {
                Some(Value::BulkString(bytes)) => self.message(bytes.into()).await,
                _ => Ok(()),
            },
            PushKind::Subscribe | PushKind::SSubscribe => {
                let unit = data.first().and_then(text).unwrap_or_default();
                for call in self.ears.joined(&unit) {
                    self.context.tell(Reply::Subscribed { call, result: Ok(self.domain) }).await;
                }
                Ok(())
            }
            PushKind::Unsubscribe | PushKind::SUnsubscribe => {
                self.ears.left(&data.first().and_then(text).unwrap_or_default())
            }
            _ => Ok(()),
        }
    }

    async fn message(&mut self, bytes: Bytes) -> Result<(), Ending> {
        match heard(&bytes) {
            None => tracing::warn!("a message that is none of ours"),
            Some(Heard::Canary { life, payload }) => return self.canary_heard(life, payload).await,
            Some(Heard::Message { key, ephemeral, epoch, lineage, previous, offset, envelopes }) => {
                let Some(name) = self.ears.names.name_of(key) else { return Ok(()) };
                let Some((name, _)) = self.ears.open.get_key_value(name) else { return Ok(()) };
                let name = name.clone();
                let at = |offset| Place { position: Position::new(epoch, offset), lineage };
                if envelopes.is_empty() {
                    self.arrived(&name, ephemeral, at(offset), offset, Bytes::new()).await;
                }
                for (envelope, before) in envelopes.into_iter().zip(previous..) {
                    match open_envelope(&bytes, envelope) {
                        Some(record) => {
                            self.arrived(&name, ephemeral, at(before + 1), before, record).await;
                        }
                        None => self.context.tell(Reply::Doubt { name: name.clone() }).await,
                    }
                }
            }
        }
        Ok(())
    }

    /// A publication, or word of a position where the record is empty.
    async fn arrived(&mut self, name: &Arc<str>, ephemeral: bool, here: Place, previous: u64, record: Bytes) {
        let ours = self.ears.open.get(name).and_then(|open| open.place);
        if ephemeral {
            return self.counted_up(name, ours, here, previous, record).await;
        }
        let Place { position: Position { epoch, offset }, lineage } = here;
        let follows = ours.is_some_and(|Place { position: ours, .. }| {
            lineage.left_at(ours.epoch).is_some() || (epoch == ours.epoch && offset > ours.offset)
        });
        if follows {
            self.ears.stand(name, here);
        }
        let message = Message { epoch, lineage, previous, offset, record };
        self.context.tell(Reply::Message { name: name.clone(), message }).await;
    }

    /// A message of an ephemeral channel, by its counter.
    async fn counted_up(
        &mut self,
        name: &Arc<str>,
        ours: Option<Place>,
        here: Place,
        previous: u64,
        record: Bytes,
    ) {
        let fits = match ours.map(|place| place.position) {
            None => true,
            Some(ours) if ours.epoch == here.position.epoch && here.position.offset <= ours.offset => return,
            Some(ours) if ours.epoch == here.position.epoch => previous == ours.offset,
            Some(ours) => here.lineage.left_at(ours.epoch) == Some(ours.offset) && previous == ours.offset,
        };
        self.ears.stand(name, here);
        if !fits {
            self.context.tell(Reply::Doubt { name: name.clone() }).await;
        }
        if !record.is_empty() {
            let none = (Epoch::NONE, Lineage::EMPTY);
            let message = Message { epoch: none.0, lineage: none.1, previous: 0, offset: 0, record };
            self.context.tell(Reply::Message { name: name.clone(), message }).await;
        }
    }

    async fn canary_heard(&mut self, life: Life, payload: &[u8]) -> Result<(), Ending> {
        if life != self.life {
            return Err(Ending::because("another life"));
        }
        let Some((incarnation, sequence, marks)) = canary::decode(payload) else { return Ok(()) };
        if incarnation == self.context.incarnation {
            self.unheard.retain(|(sent, _)| *sent > sequence);
        }
        for (name, mark) in marks {
            let Some((name, open)) = self.ears.open.get_key_value(name) else { continue };
            let Mark { epoch, top, lineage, ephemeral } = mark;
            let (name, place) = (name.clone(), open.place);
            if ephemeral {
                let here = Place { position: Position::new(epoch, top), lineage };
                match place {
                    None => self.ears.stand(&name, here),
                    Some(place) if place.position.epoch != epoch => (),
                    Some(_) => self.counted_up(&name, place, here, top, Bytes::new()).await,
                }
                continue;
            }
            let message = Message { epoch, lineage, previous: top, offset: top, record: Bytes::new() };
            self.context.tell(Reply::Message { name, message }).await;
        }
        Ok(())
    }
}

/// The record of an envelope inside a message's bytes, without a copy where it is not compressed. `None`: it is not
/// read here.
fn open_envelope(bytes: &Bytes, envelope: &[u8]) -> Option<Bytes> {
    match envelope::decode(envelope) {
        Ok(read) => Some(match read.record {
            std::borrow::Cow::Borrowed(record) => bytes.slice_ref(record),
            std::borrow::Cow::Owned(record) => record.into(),
        }),
        Err(error) => {
            tracing::warn!(%error, "a publication is not read here");
            None
        }
    }
}
