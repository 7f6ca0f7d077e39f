//! What the probe checks with every event.
//!
//! Owns: the clauses that hold at all times. Must not know: what a test is about.
//! Invariant: panics with the clause's number at the first event that breaks one.

use super::{Answer, NodeView, Probe, Seen, Sent, Told};
use crate::contract::ANSWER_MS_MAX;
use crate::epoch::Position;
use crate::suite::Cluster;
use crate::types::{Accepted, BusError, ChannelId, PublishError, Token};

impl<C: Cluster> Probe<C> {
    pub(super) fn hear(&mut self, node: usize, told: Told) {
        match told {
            Told::Opened(token, channel, result) => {
                let sent = self.note_answer(node, token, Answer::Opened(result));
                assert_eq!(sent.channel, channel);
                self.note_opened(node, token, channel, result);
            }
            Told::Published(token, result) => {
                let sent = self.note_answer(node, token, Answer::Published(result));
                match result {
                    Ok(accepted) => self.note_accepted(&sent, &accepted),
                    Err(PublishError::Unknown) => (),
                    Err(_) => *self.attempts.entry(sent.data).or_default() -= 1,
                }
            }
            Told::Read(token, result, page) => {
                let sent =
                    self.note_answer(node, token, Answer::Read(result.map(|head| (head, page.clone()))));
                if let Ok(head) = result {
                    for (offset, data) in page {
                        // Another probe may have published it.
                        assert_ne!(self.attempts.get(&data), Some(&0), "P5: {data} had been refused");
                        self.note_name(&sent.name, Position::new(head.top.epoch, offset), &data, None);
                    }
                }
            }
            Told::Cleared(token, result) => drop(self.note_answer(node, token, Answer::Cleared(result))),
            Told::Arrival { channel, epoch, previous, offset, data } => {
                self.note_arrival(node, channel, previous, Position::new(epoch, offset), &data);
            }
            Told::Gap(channel, resumed) => self.note_jump(node, channel, resumed, Seen::Gap(resumed)),
            Told::EpochChanged(channel, position) => {
                self.note_jump(node, channel, position, Seen::EpochChanged(position));
            }
            Told::Health(health) => {
                let at_ms = self.now_ms();
                assert_ne!(self.nodes[node].health.last().map(|(_, last)| *last), Some(health), "told twice");
                self.nodes[node].health.push((at_ms, health));
            }
            Told::Idle(channel) => {
                assert!(!self.nodes[node].views.contains_key(&channel), "an open channel is not idle");
            }
        }
    }

    fn note_opened(
        &mut self,
        node: usize,
        token: Token,
        channel: ChannelId,
        result: Result<Position, BusError>,
    ) {
        let NodeView { views, sent, .. } = &mut self.nodes[node];
        let Some(view) = views.get_mut(&channel).filter(|view| view.made_by <= token) else { return };
        let is_of_view =
            |(other, sent): (&Token, &Sent)| sent.opens && sent.channel == channel && *other >= view.made_by;
        match (result, view.cursor) {
            (Ok(position), None) => view.cursor = Some(position),
            (Ok(position), Some(cursor)) => assert_eq!(position, cursor, "P2: an open jumped"),
            // A failed open changes nothing: another one in flight may still open the channel.
            (Err(_), None) if !sent.iter().any(is_of_view) => drop(views.remove(&channel)),
            (Err(_), _) => (),
        }
    }

    /// C1: one answer, in time. A node that was not polled could not take it.
    fn note_answer(&mut self, node: usize, token: Token, answer: Answer) -> Sent {
        let now_ms = self.now_ms();
        let sent = self.nodes[node].sent.remove(&token);
        let sent =
            sent.unwrap_or_else(|| panic!("C1: {answer:?} to a command that was answered, or to none"));
        let took_ms = now_ms - sent.at_ms.max(self.nodes[node].polled_since_ms);
        let limit_ms = ANSWER_MS_MAX + self.cluster.late_ms() - sent.late_ms;
        assert!(took_ms <= limit_ms, "C1: {answer:?} after {took_ms} ms");
        self.nodes[node].answers.insert(token, answer);
        sent
    }

    fn note_accepted(&mut self, sent: &Sent, accepted: &Accepted) {
        if accepted.position.epoch.is_none() {
            assert_eq!(accepted.position, Position::NONE, "E4");
            return;
        }
        self.accepted.push((sent.name.clone(), accepted.position));
        if !accepted.repeated {
            self.note_name(&sent.name, accepted.position, &sent.data, None);
        }
    }

    /// P3: a position names one publication, with one predecessor.
    fn note_name(&mut self, name: &str, at: Position, data: &str, previous: Option<u64>) {
        let key = (name.to_owned(), at.epoch, at.offset);
        let standing = self.places.entry((name.to_owned(), at.epoch, data.to_owned())).or_insert(at.offset);
        assert_eq!(*standing, at.offset, "P5, P6: {data} stands twice in {name}");
        let (known, before) = self.names.entry(key).or_insert_with(|| (data.into(), previous));
        assert_eq!(known, data, "P3: {at:?} of {name} names two publications");
        if let Some(previous) = previous {
            let known = *before.get_or_insert(previous);
            assert_eq!(known, previous, "P2: {at:?} of {name} has two predecessors");
        }
    }

    fn note_arrival(&mut self, node: usize, channel: ChannelId, previous: u64, at: Position, data: &str) {
        let view = self.nodes[node].views.get_mut(&channel);
        let view = view.unwrap_or_else(|| panic!("C5: {data} arrived at a channel that is not open"));
        let cursor = view.cursor.unwrap_or_else(|| panic!("P7: {data} arrived before the open was answered"));
        assert!(self.attempts.get(data).is_some_and(|count| *count > 0), "P5: {data} had been refused");
        assert!(data.starts_with(&format!("{}/", view.name)), "C5: {data} arrived at {}", view.name);
        if view.options.is_positioned() {
            assert_eq!(at.epoch, cursor.epoch, "P13: {data} is of an epoch that was not told");
            assert_eq!(previous, cursor.offset, "P2: a hole or a repeat before {data} at {at:?}");
            assert!(at.offset > previous, "P1");
            view.cursor = Some(at);
        } else {
            assert_eq!((at, previous), (Position::NONE, 0), "E4");
            check_ephemeral(&view.seen, data);
        }
        view.seen.push(Seen::Arrival(at, data.to_owned()));
        let name = view.name.clone();
        if !at.epoch.is_none() {
            self.note_name(&name, at, data, Some(previous));
        }
    }

    fn note_jump(&mut self, node: usize, channel: ChannelId, to: Position, seen: Seen) {
        let view = self.nodes[node].views.get_mut(&channel);
        let view = view.unwrap_or_else(|| panic!("C5: {seen:?} for a channel that is not open"));
        let cursor = view.cursor.unwrap_or_else(|| panic!("P7: {seen:?} before the open was answered"));
        match seen {
            Seen::EpochChanged(_) => assert_ne!(to.epoch, cursor.epoch, "P13: the epoch did not change"),
            _ => assert_eq!(to.epoch, cursor.epoch, "P13: a gap is within an epoch"),
        }
        assert!(to.epoch != cursor.epoch || to.offset >= cursor.offset, "P2: the chain went back");
        view.cursor = Some(to);
        view.seen.push(seen);
    }
}

/// E1 and E2: what one publisher sent comes in its order, and once.
fn check_ephemeral(seen: &[Seen], data: &str) {
    let (publisher, number) = publisher_and_number(data);
    let earlier = seen.iter().map(Seen::data).filter(|data| !data.is_empty()).map(publisher_and_number);
    let last = earlier.filter(|(other, _)| *other == publisher).map(|(_, number)| number).max();
    assert!(last.is_none_or(|last| last < number), "E1, E2: {data} after {last:?}");
}

/// Parts of what [`Probe::data`] has made.
fn publisher_and_number(data: &str) -> (&str, u64) {
    let mut parts = data.rsplitn(3, '/');
    let number = parts.next().and_then(|number| number.parse().ok());
    (parts.next().unwrap_or_default(), number.expect("data of the suite ends with a number"))
}
