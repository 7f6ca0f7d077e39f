//! What the control plane asks of a shard: the server API, drains.
//!
//! Owns the meaning of each [`Call`]. Permission was the API key's affair.

use std::sync::Arc;

use ringmain_bus::{Epoch, HistoryQuery, Position, Since};
use ringmain_proto::client::ClientId;
use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::message::{Publication, Push, TagsBuf};
use ringmain_proto::time::Now;

use super::api::*;
use super::channel::Channel;
use super::channel::Namespace;
use super::config::RecoveryMode;
use super::connect::seconds32;
use super::engine::{Effect, Slot};
use super::home::{Asker, Publisher, Question};
use super::infos::is_short;
use super::mesh::{QueryAnswer, RecoverFrom};
use super::metrics::Metric;
use super::session::{Follow, Stage, SubState};
use super::shard::{Core, Drain};
use super::subscribe::{NewSub, bounded_expiry, ttl_of};

impl Core {
    pub(crate) fn call(&mut self, command: ControlCommand, now: Now) {
        let ControlCommand { token, call } = command;
        let result = match call {
            Call::Publish { channel, data, tags, skip_history, idempotency_key } => {
                let call = ApiPublish { channel, data, tags, skip_history, idempotency_key };
                match self.call_publish(token, &call, now) {
                    Some(result) => result,
                    None => return,
                }
            }
            Call::Subscribe { selector, channel, options } => {
                self.call_subscribe(&selector, &channel, &options, now)
            }
            Call::Unsubscribe { selector, channel } => {
                self.call_unsubscribe(&selector, &channel, now).map(|()| Answer::Done)
            }
            Call::Disconnect { selector, code, reason } => {
                for slot in self.selected(&selector) {
                    self.close_with(slot, code, &reason, Metric::CloseForced, now);
                }
                Ok(Answer::Done)
            }
            Call::Refresh { selector, expired, expire_at } => {
                self.call_refresh(&selector, expired, expire_at, now);
                Ok(Answer::Done)
            }
            Call::Presence { channel } => match self.presence_available(&channel) {
                Err(error) => Err(error),
                Ok(()) => {
                    let question = Question { asker: Asker::Call(token), stats: false };
                    return self.ask_presence(&channel, question, now);
                }
            },
            Call::PresenceStats { channel } => match self.presence_available(&channel) {
                Err(error) => Err(error),
                Ok(()) => {
                    let question = Question { asker: Asker::Call(token), stats: true };
                    return self.ask_presence(&channel, question, now);
                }
            },
            Call::Cluster(call) => return self.cluster_call(call, now),
            Call::History { channel, limit, since, reverse } => {
                match self.call_read_history(token, &channel, limit, since, reverse, now) {
                    Some(result) => result,
                    None => return,
                }
            }
            Call::HistoryRemove { channel } => match self.history_available(&channel) {
                Err(error) => Err(error),
                Ok(()) => match self.clear_history(&channel, token, now) {
                    Some(result) => result.map(|()| Answer::Done),
                    None => return,
                },
            },
            Call::Channels { pattern } => Ok(Answer::Channels(self.active_channels(&pattern))),
            Call::Info => Ok(self.figures()),
            Call::Readiness { ready } => {
                self.ready = ready;
                Ok(Answer::Done)
            }
            Call::Drain { closes_per_second } => {
                self.start_drain(closes_per_second, now);
                Ok(Answer::Done)
            }
        };
        self.answer(token, result);
    }

    fn answer(&mut self, token: u64, result: Result<Answer, ErrorCode>) {
        self.answers.push(ControlAnswer { token, shard: self.shard, result });
    }

    /// A publish of the API was answered.
    pub(crate) fn call_published(&mut self, token: u64, result: Result<Position, ErrorCode>) {
        self.answer(token, result.map(published_answer));
    }

    /// A late answer without content.
    pub(crate) fn call_done(&mut self, token: u64, result: Result<(), ErrorCode>) {
        self.answer(token, result.map(|()| Answer::Done));
    }

    /// A late page of history.
    pub(crate) fn call_history(&mut self, token: u64, result: Result<QueryAnswer, ErrorCode>) {
        let answer = result.and_then(history_answer);
        self.answer(token, answer);
    }

    /// Who is in a channel.
    pub(crate) fn call_presence(&mut self, token: u64, members: Vec<Member>, partial: bool) {
        self.answer(token, Ok(Answer::Presence { members, partial }));
    }

    /// How many are in a channel.
    pub(crate) fn call_presence_stats(&mut self, token: u64, stats: (u32, u32), partial: bool) {
        let (num_clients, num_users) = stats;
        self.answer(token, Ok(Answer::PresenceStats { num_clients, num_users, partial }));
    }

    fn call_publish(&mut self, token: u64, call: &ApiPublish, now: Now) -> Option<Result<Answer, ErrorCode>> {
        let mut tags = TagsBuf::new();
        for (key, value) in &call.tags {
            if tags.push(key, value).is_err() {
                return Some(Err(ErrorCode::LimitExceeded));
            }
        }
        if self.channels.namespace_of(&call.channel).is_none() {
            return Some(Err(ErrorCode::UnknownChannel));
        }
        let mut publication =
            Publication { data: &call.data, tags: tags.as_tags(), ..Publication::default() };
        if call.skip_history {
            if let Some(index) = self.channels.find(&call.channel) {
                let epoch = self.channels.get(index).epoch;
                self.metrics.add(Metric::Publications, 1);
                self.deliver(index, epoch, &publication, now);
            }
            return Some(Ok(Answer::Published { offset: 0, epoch: String::new() }));
        }
        let key = call.idempotency_key.as_deref();
        self.publish_at_home(self.shard, Publisher::Call(token), &call.channel, key, &mut publication, now);
        None
    }

    fn presence_available(&self, channel: &str) -> Result<(), ErrorCode> {
        let namespace = self.channels.namespace_of(channel).ok_or(ErrorCode::UnknownChannel)?;
        if namespace.config.presence { Ok(()) } else { Err(ErrorCode::NotAvailable) }
    }

    fn history_available(&self, channel: &str) -> Result<(), ErrorCode> {
        let namespace = self.channels.namespace_of(channel).ok_or(ErrorCode::UnknownChannel)?;
        if namespace.is_positioned() { Ok(()) } else { Err(ErrorCode::NotAvailable) }
    }

    fn call_read_history(
        &mut self,
        token: u64,
        channel: &str,
        limit: i32,
        since: Option<(u64, String)>,
        reverse: bool,
        now: Now,
    ) -> Option<Result<Answer, ErrorCode>> {
        if let Err(error) = self.history_available(channel) {
            return Some(Err(error));
        }
        if reverse && since.as_ref().is_some_and(|(offset, _)| *offset == 0) {
            return Some(Err(ErrorCode::BadRequest));
        }
        let since = since.map(|(offset, epoch)| Since { offset, epoch: Epoch::from_claim(&epoch) });
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let (late, answer) = self.read_history(channel, &HistoryQuery { since, limit, reverse }, now);
        if answer.is_none() {
            self.await_call(late, token);
        }
        answer.map(|result| result.and_then(history_answer))
    }

    // --- users ---

    fn selected(&self, selector: &UserSelector) -> Vec<Slot> {
        let slots = self.sessions.of_user(&selector.user).into_iter();
        let chosen = slots.filter(|slot| {
            let session = self.sessions.get(*slot);
            let client = ClientId(session.client);
            session.stage == Stage::Connected
                && selector.client.as_ref().is_none_or(|wanted| client.is_text(wanted))
                && !selector.whitelist.iter().any(|spared| client.is_text(spared))
        });
        chosen.collect()
    }

    fn call_subscribe(
        &mut self,
        selector: &UserSelector,
        channel: &str,
        options: &SubscribeOptions,
        now: Now,
    ) -> Result<Answer, ErrorCode> {
        let namespace = self.channels.namespace_of(channel).ok_or(ErrorCode::UnknownChannel)?;
        if options.expire_at.is_some_and(|at| at <= now.unix_s()) {
            return Err(ErrorCode::Expired);
        }
        if !is_short(options.info.as_deref()) {
            return Err(ErrorCode::BadRequest);
        }
        let new = subscription_by_server(namespace, options);
        for slot in self.selected(selector) {
            let known =
                self.channels.find(channel).is_some_and(|index| self.sessions.sub(slot, index).is_some());
            if known {
                continue;
            }
            if self.sessions.get(slot).counted_subs() >= self.config.client.channel_limit as usize {
                self.close(slot, CloseReason::ChannelLimit, now);
                continue;
            }
            self.subscribe(slot, channel, new.clone(), now)?;
        }
        Ok(Answer::Done)
    }

    fn call_unsubscribe(
        &mut self,
        selector: &UserSelector,
        channel: &str,
        now: Now,
    ) -> Result<(), ErrorCode> {
        if !channel.is_empty() && self.channels.namespace_of(channel).is_none() {
            return Err(ErrorCode::UnknownChannel);
        }
        for slot in self.selected(selector) {
            if channel.is_empty() {
                // One push without a channel stands for all of them.
                self.unsubscribe_settled(slot, now);
                self.revoke(slot, "", None, now);
            } else if let Some(joining) = self.joining(slot, channel) {
                joining.then.push(Follow::Revoke);
            } else {
                let index = self.channels.find(channel);
                let index = index.filter(|index| self.sessions.sub(slot, *index).is_some());
                self.revoke(slot, channel, index, now);
            }
        }
        Ok(())
    }

    /// Ends all subscriptions of a connection but those that are still on their way.
    fn unsubscribe_settled(&mut self, slot: Slot, now: Now) {
        let subs = self.sessions.get(slot).subs.iter();
        let settled: Vec<u32> =
            subs.filter(|sub| sub.state != SubState::Joining).map(|sub| sub.channel).collect();
        for index in settled {
            self.unsubscribe(slot, index, now);
        }
    }

    fn call_refresh(&mut self, selector: &UserSelector, expired: bool, expire_at: Option<u64>, now: Now) {
        let expire_at = bounded_expiry(expire_at, now);
        let expired = expired || expire_at.is_some_and(|at| at <= now.unix_s());
        for slot in self.selected(selector) {
            if expired {
                self.close(slot, CloseReason::Expired, now);
                continue;
            }
            self.sessions.get_mut(slot).expire_at = seconds32(expire_at);
            let (expires, ttl) = ttl_of(expire_at, now);
            self.push(slot, &Push::Refresh { expires, ttl });
            self.arm_timer(slot, now);
        }
    }

    // --- the node ---

    /// Channels homed here that somebody in the node is subscribed to, with their subscriptions.
    fn active(&self) -> impl Iterator<Item = (&Channel, u32)> {
        let homed = self.channels.iter().filter(|(_, channel)| channel.home == self.shard);
        let counted = homed.map(|(_, channel)| (channel, self.subscriptions_of(channel)));
        counted.filter(|(_, subs)| *subs > 0)
    }

    fn active_channels(&self, pattern: &str) -> Vec<(Arc<str>, u32)> {
        let matching = self
            .active()
            .filter(|(channel, _)| pattern.is_empty() || glob(pattern.as_bytes(), channel.name.as_bytes()));
        matching.map(|(channel, subs)| (Arc::clone(&channel.name), subs)).collect()
    }

    fn figures(&self) -> Answer {
        Answer::Info {
            num_clients: self.metrics.get(Metric::Sessions) as u32,
            user_hashes: self.sessions.user_hashes(),
            num_channels: self.active().count() as u32,
            num_subs: self.metrics.get(Metric::Subscriptions) as u32,
        }
    }

    fn start_drain(&mut self, closes_per_second: u32, now: Now) {
        if self.drain.is_none() {
            self.ready = false;
            self.effects.push(Effect::StopAccepting);
            self.drain = Some(Drain {
                closes_per_second,
                begun_ms: now.mono_ms,
                closed: 0,
                next_slot: 0,
                told: false,
            });
        }
    }
}

/// A publish of the API.
struct ApiPublish {
    channel: Arc<str>,
    data: Arc<[u8]>,
    tags: Vec<(String, String)>,
    skip_history: bool,
    idempotency_key: Option<String>,
}

/// A subscription as the server API asks for it.
fn subscription_by_server(namespace: &Namespace, options: &SubscribeOptions) -> NewSub {
    let config = &namespace.config;
    let has_history = namespace.is_positioned();
    let recover = options.recover_since.as_ref();
    NewSub {
        server_side: true,
        positioned: options.position.unwrap_or(config.force_positioning) && has_history,
        recoverable: options.recover.unwrap_or(config.force_recovery) && has_history,
        cache: config.force_recovery_mode == RecoveryMode::Cache,
        join_leave: options.push_join_leave.unwrap_or(config.force_push_join_leave),
        presence: options.presence.unwrap_or(config.presence),
        announce: options.join_leave.unwrap_or(config.join_leave),
        recover: recover.map(|(offset, epoch)| RecoverFrom::new(*offset, epoch)),
        chan_info: options.info.as_deref().map(Box::from),
        expire_at: options.expire_at,
        data: options.data.as_deref().map(Box::from),
        ..NewSub::default()
    }
}

fn published_answer(position: Position) -> Answer {
    let epoch =
        if position.epoch.is_none() { String::new() } else { position.epoch.text().as_str().to_owned() };
    Answer::Published { offset: position.offset, epoch }
}

fn history_answer(answer: QueryAnswer) -> Result<Answer, ErrorCode> {
    match answer {
        QueryAnswer::History { records, offset, epoch } => {
            Ok(Answer::History { records, offset, epoch: Epoch::new(epoch).text().as_str().to_owned() })
        }
        QueryAnswer::Presence(_) | QueryAnswer::PresenceStats { .. } => Err(ErrorCode::Internal),
    }
}

/// Whether a name matches a pattern of `*` (any run) and `?` (any byte). Linear in both: it goes back
/// to the last `*` only.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(b'?') => (p, n) = (p + 1, n + 1),
            Some(byte) if *byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn globs() {
        for (pattern, name, expected) in [
            ("*", "room:a", true),
            ("room:*", "room:a", true),
            ("room:*", "user:a", false),
            ("r?om:*a", "room:banana", true),
            ("*a*b", "xxaxxb", true),
            ("*a*b", "xxaxxbc", false),
            ("", "x", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }
}
