//! What is asked of a channel homed here: members, pages of history, replays for those who fell behind.
//!
//! Owns the questions and the form of their answers. It must not know who asks: answers go to an origin
//! or to a call of the control plane, at once or when the bus answers.
//!
//! Invariant: every question is answered once.

use ringmain_bus::{BusError, Epoch, HistoryQuery, Outcome, Page, Since, Token};
use ringmain_proto::close::ErrorCode;
use ringmain_proto::time::Now;

use super::relay::RELAY_MESSAGE_BYTES_MAX;
use super::waiters::Waiter;
use super::{Asker, PageRead, Question, bus_channel, bus_error, no_channel};
use crate::core::engine::ShardIndex;
use crate::core::mesh::{Origin, Query, QueryAnswer, ToMember};
use crate::core::shard::Core;

/// Publications of one replay step at the most.
const REPLAY_PUBLICATIONS_MAX: u32 = 256;

impl Core {
    pub(super) fn query_at_home(
        &mut self,
        from: ShardIndex,
        origin: Origin,
        channel: &str,
        query: &Query,
        now: Now,
    ) {
        let result = match query {
            Query::Presence | Query::PresenceStats => {
                let stats = matches!(query, Query::PresenceStats);
                return self.ask_presence(
                    channel,
                    Question { asker: Asker::Client(from, origin), stats },
                    now,
                );
            }
            Query::History { limit, since, reverse } => {
                let max = self.config.client.history_publications_max;
                let limit = u32::try_from(*limit).map_or(max, |limit| limit.min(max));
                let since = since
                    .as_ref()
                    .map(|since| Since { offset: since.offset, epoch: Epoch::from_claim(&since.epoch) });
                let query = HistoryQuery { since, limit, reverse: *reverse };
                let (token, outcome) = self.read_history(channel, &query, now);
                match outcome {
                    Some(result) => result,
                    None => {
                        self.waiters.waiting.insert(token.0, Waiter::Query(from, origin));
                        return;
                    }
                }
            }
        };
        self.give_answer(from, origin, result, now);
    }

    /// Answers a question. What does not fit on the way to another shard is refused: 111 for now, 106
    /// where it never would.
    pub(super) fn give_answer(
        &mut self,
        from: ShardIndex,
        origin: Origin,
        result: Result<QueryAnswer, ErrorCode>,
        now: Now,
    ) {
        let fits = |answer: &QueryAnswer| match answer.bytes() {
            _ if from == self.shard => Ok(()),
            bytes if self.mesh.never_fits(bytes) => Err(ErrorCode::LimitExceeded),
            bytes if !self.mesh.fits(from, bytes) => Err(ErrorCode::TooManyRequests),
            _ => Ok(()),
        };
        let result = result.and_then(|answer| fits(&answer).map(|()| answer));
        self.send_member(from, ToMember::Answer { origin, result }, now);
    }

    /// Answers a replay. What does not fit on the way to another shard is as lost as what history no longer
    /// has: memory is short, and the reader was behind.
    pub(super) fn give_replay(
        &mut self,
        from: ShardIndex,
        origin: Origin,
        after: u64,
        records: Vec<u8>,
        whole: bool,
        now: Now,
    ) {
        let whole = whole && (from == self.shard || self.mesh.fits(from, records.len()));
        let records = if whole { records } else { Vec::new() };
        self.send_member(from, ToMember::Replayed { origin, after, records, whole }, now);
    }

    /// Reads history of a channel homed here; `None`: the answer comes late, under the token.
    pub(crate) fn read_history(
        &mut self,
        channel: &str,
        query: &HistoryQuery,
        now: Now,
    ) -> (Token, Option<Result<QueryAnswer, ErrorCode>>) {
        let token = self.waiters.token();
        let index = match self.channels.get_or_create(channel) {
            Ok(index) => index,
            Err(reason) => return (token, Some(Err(no_channel(reason)))),
        };
        let mut read = PageRead::default();
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        let outcome = bus.read(now, token, target, query, &mut |publication| read.push(publication));
        (token, outcome.done().map(|result| history_answer(result, read.records)))
    }

    /// Removes the history of a channel homed here.
    pub(crate) fn clear_history(
        &mut self,
        channel: &str,
        call: u64,
        now: Now,
    ) -> Option<Result<(), ErrorCode>> {
        let index = match self.channels.get_or_create(channel) {
            Ok(index) => index,
            Err(reason) => return Some(Err(no_channel(reason))),
        };
        let token = self.waiters.token();
        let Self { bus, channels, .. } = self;
        match bus.clear(now, token, bus_channel(channels, index)) {
            Outcome::Done(result) => Some(result.map(|_| ()).map_err(bus_error)),
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Call(call));
                None
            }
        }
    }

    /// Notes that the answer to a read belongs to a call of the control plane.
    pub(crate) fn await_call(&mut self, token: Token, call: u64) {
        self.waiters.waiting.insert(token.0, Waiter::Call(call));
    }

    pub(super) fn replay_at_home(
        &mut self,
        from: ShardIndex,
        origin: Origin,
        channel: &str,
        after: u64,
        epoch: u64,
        now: Now,
    ) {
        let since = Since { offset: after, epoch: Some(Epoch::new(epoch)) };
        let limit = REPLAY_PUBLICATIONS_MAX;
        let token = self.waiters.token();
        let mut read = PageRead::bounded(RELAY_MESSAGE_BYTES_MAX);
        let outcome = match self.channels.find(channel) {
            Some(index) if epoch != 0 => {
                let Self { bus, channels, .. } = self;
                let query = HistoryQuery { since: Some(since), limit, reverse: false };
                bus.read(now, token, bus_channel(channels, index), &query, &mut |publication| {
                    read.push(publication);
                })
            }
            _ => Outcome::Done(Err(BusError::Unavailable)),
        };
        match outcome {
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Replay(from, origin, after));
            }
            Outcome::Done(result) => {
                let whole = result.is_ok_and(|page| page.floor <= after);
                self.give_replay(from, origin, after, read.records, whole, now);
            }
        }
    }
}

pub(super) fn history_answer(
    result: Result<Page, BusError>,
    records: Vec<u8>,
) -> Result<QueryAnswer, ErrorCode> {
    let page = result.map_err(bus_error)?;
    Ok(QueryAnswer::History { records, offset: page.top.offset, epoch: page.top.epoch.get() })
}
