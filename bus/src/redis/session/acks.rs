//! What the script answered: judged, told, kept.
//!
//! Owns: the fate of every operation in flight. Must not know: sockets.
//! Invariant: an answer of another life of the server, or of its data, is not believed and ends the session (L15).

use bytes::Bytes;
use redis::Value;

use super::{Ending, Session, Work, give_back};
use crate::backend::{OwnedId, ReadPage, Reply, append_record};
use crate::envelope;
use crate::epoch::Position;
use crate::lineage::{Ack, KeptAck, KeyState, Link, judge_ack, judge_position};
use crate::position::{Judgement, Reason};
use crate::redis::canary::Mark;
use crate::redis::context::{Kept, Publication};
use crate::redis::options::{Deployment, Durability};
use crate::redis::script::{Answer, answers};
use crate::types::{Accepted, BusError, HistoryQuery, Page, PublishError};

/// Errors of a whole call or operation after which nothing was done, and the server stays the right one.
const REFUSALS: [&str; 7] = ["OOM", "MISCONF", "NOREPLICAS", "ASK", "TRYAGAIN", "NOPERM", "BUSY"];

/// Errors after which nothing was done, because this is not the server to ask.
const WRONG_SERVER: [&str; 7] =
    ["MOVED", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "LOADING", "NOSCRIPT", "CROSSSLOT"];

fn code(message: &str) -> &str {
    message.split(' ').next().unwrap_or_default()
}

impl Session {
    pub(super) async fn call_answered(&mut self, works: Vec<Work>, value: Value) -> Result<(), Ending> {
        let count = works.len();
        let answers = match value {
            Value::ServerError(error) => {
                let message = format!("{} {}", error.code(), error.details().unwrap_or_default());
                vec![Answer::Failed(message); count]
            }
            value => answers(value).filter(|answers| answers.len() == count).unwrap_or_default(),
        };
        let mut ending = if answers.len() == count { Ok(()) } else { Err(Ending::because("protocol")) };
        let mut answers = answers.into_iter();
        for work in works {
            match answers.next() {
                Some(answer) if ending.is_ok() => ending = self.settle(work, answer).await,
                _ => give_back(&self.context, work, true).await,
            }
        }
        ending
    }

    async fn settle(&mut self, work: Work, answer: Answer) -> Result<(), Ending> {
        match (work, answer) {
            (Work::Publish(publication), Answer::Published { key, offset, repeated }) => {
                self.published(publication, &key, offset, repeated).await
            }
            (Work::Publish(publication), Answer::Counted { key }) => self.counted(publication, &key).await,
            (Work::Read { call, target, query }, Answer::Page { key, floor, more, entries }) => {
                if key.replid != self.life.replid {
                    give_back(&self.context, Work::Read { call, target, query }, true).await;
                    return Err(Ending::because("another life"));
                }
                let result = page(&query, &key, floor, more, entries);
                self.ears.stand(&target.name, key.place());
                self.context.tell(Reply::Read { call, result }).await;
                Ok(())
            }
            (Work::Clear { call, target }, Answer::Cleared { key }) => {
                if key.replid != self.life.replid {
                    give_back(&self.context, Work::Clear { call, target }, true).await;
                    return Err(Ending::because("another life"));
                }
                self.context.tell(Reply::Cleared { call, result: Ok(key.position()) }).await;
                Ok(())
            }
            (Work::Touch(target), Answer::Page { key, .. }) => {
                let place = self.ears.place(&target.name);
                if place.is_some_and(|place| place.position.epoch != key.epoch) {
                    self.context.tell(Reply::Doubt { name: target.name }).await;
                }
                Ok(())
            }
            (work, Answer::Failed(message)) => self.failed(work, &message).await,
            (work, _) => {
                give_back(&self.context, work, true).await;
                Err(Ending::because("protocol"))
            }
        }
    }

    /// The server refused, or failed half way.
    async fn failed(&mut self, work: Work, message: &str) -> Result<(), Ending> {
        let code = code(message);
        if REFUSALS.contains(&code) {
            match work {
                // An earlier attempt may have been accepted.
                Work::Publish(publication) if publication.attempts > 1 => {
                    self.context.orphan(publication).await;
                }
                Work::Publish(publication) => {
                    self.context.answer(&publication, Err(PublishError::Unavailable)).await;
                }
                work => give_back(&self.context, work, true).await,
            }
            return Ok(());
        }
        if self.context.failures.is_due() {
            tracing::warn!(message, "Redis fails operations");
        }
        match work {
            // Nothing was done; an ephemeral publication may be tried again by the caller.
            Work::Publish(publication)
                if WRONG_SERVER.contains(&code) && !publication.target.options.is_positioned() =>
            {
                self.context.answer(&publication, Err(PublishError::Unavailable)).await;
            }
            work => give_back(&self.context, work, true).await,
        }
        if WRONG_SERVER.contains(&code) { Err(Ending::because("redirected")) } else { Ok(()) }
    }

    async fn published(
        &mut self,
        publication: Publication,
        key: &KeyState,
        offset: u64,
        repeated: bool,
    ) -> Result<(), Ending> {
        if key.replid != self.life.replid {
            self.context.orphan(publication).await;
            return Err(Ending::because("another life"));
        }
        let place = self.ears.place(&publication.target.name);
        let link = Link { is_owner: true, settled: Some(self.life.replid) };
        if let Ack::Retry(doubt) = judge_ack(place.as_ref(), key, &link) {
            tracing::debug!(?doubt, "an ack of Redis is in doubt");
            self.context.tell(Reply::Doubt { name: publication.target.name.clone() }).await;
            self.context.orphan(publication).await;
            return Ok(());
        }
        let mark = Mark { epoch: key.epoch, top: key.top, lineage: key.lineage, ephemeral: false };
        self.marks.insert(publication.target.name.clone(), mark);
        // A repeat of our own making is none to the caller.
        let own = publication.attempts > 1 && matches!(publication.id, OwnedId::Node(..));
        let accepted = Accepted { position: Position::new(key.epoch, offset), repeated: repeated && !own };
        if self.is_confirmed_by_replicas() {
            self.confirming.push_back((publication, accepted));
            return Ok(());
        }
        // A repeat is kept too: the attempt that stored it may have had no answer, so nobody keeps it.
        let may_tell = self.keep(&publication, KeptAck::new(accepted.position, key));
        let result = if may_tell { Ok(accepted) } else { Err(PublishError::Unknown) };
        self.context.answer(&publication, result).await;
        Ok(())
    }

    async fn counted(&mut self, publication: Publication, key: &KeyState) -> Result<(), Ending> {
        if key.replid != self.life.replid {
            self.context.answer(&publication, Err(PublishError::Unknown)).await;
            return Err(Ending::because("another life"));
        }
        let mark = Mark { epoch: key.epoch, top: key.top, lineage: key.lineage, ephemeral: true };
        self.marks.insert(publication.target.name.clone(), mark);
        let accepted = Accepted { position: Position::NONE, repeated: false };
        if self.is_confirmed_by_replicas() {
            self.confirming.push_back((publication, accepted));
        } else {
            self.context.answer(&publication, Ok(accepted)).await;
        }
        Ok(())
    }

    /// Whether an ack is told only once replicas have what it is of.
    fn is_confirmed_by_replicas(&self) -> bool {
        matches!(self.context.options.durability, Durability::Replicas(_))
    }

    /// Keeps an ack until replicas have it (L16). `false`: there is no room for it.
    fn keep(&mut self, publication: &Publication, ack: KeptAck) -> bool {
        if self.replicas.get() == 0 {
            return true;
        }
        let Publication { target, id, envelope, .. } = publication.clone();
        let kept = Kept { ack, target, id, envelope };
        let room = self.context.keep(&kept);
        if room {
            self.kept.push_back(kept);
        }
        room
    }

    /// Replicas confirmed everything below this number.
    pub(super) fn let_go(&mut self, up_to: u64) {
        while self.kept_from < up_to
            && let Some(kept) = self.kept.pop_front()
        {
            self.context.let_go(&kept);
            self.kept_from += 1;
        }
    }

    pub(super) fn canary_answered(&mut self, value: Value) -> Result<(), Ending> {
        match answers(value).as_deref() {
            Some([Answer::Canary(life, replicas)]) if *life == self.life => {
                let options = &self.context.options;
                if options.deployment == Deployment::Single && options.replicas.is_none() {
                    self.replicas.set(*replicas);
                }
                Ok(())
            }
            Some([Answer::Canary(..)]) => Err(Ending::because("another life")),
            _ => Err(Ending::because("canary refused")),
        }
    }
}

/// The answer to a read (P8 to P10).
fn page(
    query: &HistoryQuery,
    key: &KeyState,
    floor: u64,
    more: bool,
    mut entries: Vec<(u64, Bytes)>,
) -> Result<ReadPage, BusError> {
    if let Some(since) = query.since
        && let Some(epoch) = since.epoch
        && epoch != key.epoch
    {
        let claim = Position::new(epoch, since.offset);
        let judgement = judge_position(claim, key.position(), &key.lineage, floor);
        if matches!(judgement, Judgement::NotRecoverable(Reason::OtherEpoch | Reason::AheadOfTop)) {
            return Err(BusError::UnrecoverableEpoch { current: key.position() });
        }
    }
    let mut records = Vec::new();
    if query.reverse {
        entries.reverse();
    }
    for (offset, entry) in entries {
        match envelope::decode(&entry) {
            Ok(envelope) if append_record(&mut records, offset, &envelope.record) => (),
            Ok(_) => tracing::warn!("history holds what is no record"),
            Err(error) => tracing::warn!(%error, "history holds what is not read here"),
        }
    }
    Ok(ReadPage { page: Page { top: key.position(), floor, more }, lineage: key.lineage, records })
}
