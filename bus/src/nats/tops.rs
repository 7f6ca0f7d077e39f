//! Where many channels of a stream stand, asked for together while a node comes back.
//!
//! Owns: the table of last sequences, the reads that wait for it, when it is made. Must not know: what is in a history.
//!
//! A node that comes back with 100,000 channels reads the position of each; asked one by one that takes seconds. So
//! while many reads wait, the stream is asked once for the last sequence of every subject, and then for what came
//! since: a read of a channel where nothing came after the reader's position is answered from that, all others are
//! read as ever. The server that answers may be a follower: what it says counts up to the sequence that it has, which
//! has to reach all that was seen of the stream when the read came, a canary that is younger than the channel's
//! subscription among it. What came after that is heard.
//!
//! Invariant: a table in doubt is not used; then every channel is read by itself.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::api::{ApiError, Listed};
use super::life::{In, Life};
use crate::backend::{Call, Target};
use crate::types::HistoryQuery;

/// Reads under way from which on others wait for the table.
const READS_MIN: usize = 512;

/// Subjects, and messages since, that are asked for at the most for each read that waits.
const ENTRIES_PER_READ_MAX: usize = 64;

/// How long a server that is behind is left alone, and how often.
const BEHIND: Duration = Duration::from_millis(30);
const BEHIND_MAX: u32 = 20;

/// How long a table is kept that nobody asks for.
const KEPT: Duration = Duration::from_secs(2);

/// A read that waits.
struct Waiting {
    /// The highest sequence that was seen when it came.
    seen: u64,
    call: Call,
    target: Target,
    query: HistoryQuery,
}

/// The last sequences of a stream's subjects.
#[derive(Default)]
pub(super) struct Tops {
    /// Up to this sequence; 0: there is no table.
    upto: u64,
    last: HashMap<String, u64>,
    waiting: VecDeque<Waiting>,
    /// Names the question under way. Numbers are not used again.
    asked: Option<u64>,
    drawn: u64,
    used: Option<Instant>,
    /// Answers that brought nothing new, one after the other.
    behind: u32,
    /// No table is made for a while: it was refused, or too large.
    not_before: Option<Instant>,
}

impl Tops {
    /// Forgets the table; the answer to a question under way is not taken.
    pub(super) fn clear(&mut self) {
        *self = Tops { drawn: self.drawn, ..Tops::default() };
    }

    /// Whether the table says that nothing came after `since` on a channel.
    fn is_last(&self, since: u64, subject: &str, mark: &str) -> bool {
        let last = self.last.get(subject).copied().unwrap_or(0);
        last == since && !self.last.contains_key(mark)
    }
}

impl Life<'_> {
    /// Whether a read is to wait for the table: many are under way, it goes on from a position, and the channel is heard.
    pub(super) fn is_read_together(&self, stream: u16, name: &str, query: &HistoryQuery) -> bool {
        let tops = &self.streams[usize::from(stream)].tops;
        let goes_on = query.since.is_some_and(|since| since.epoch.is_none()) && !query.reverse;
        goes_on
            && self.channels.heard.contains_key(name)
            && (self.publishes.reads() >= READS_MIN || tops.upto > 0 || tops.asked.is_some())
            && tops.not_before.is_none_or(|at| at <= Instant::now())
    }

    /// Lets a read wait for the table.
    pub(super) async fn read_together(
        &mut self,
        stream: u16,
        call: Call,
        target: Target,
        query: HistoryQuery,
    ) {
        let n = usize::from(stream);
        let seen = self.node.memories[n].witness.high;
        let tops = &mut self.streams[n].tops;
        tops.used = Some(Instant::now());
        tops.waiting.push_back(Waiting { seen, call, target, query });
        if tops.asked.is_none() {
            self.serve_together(stream).await;
        }
    }

    /// Answers the reads that the table reaches, and asks for more of it for the others.
    async fn serve_together(&mut self, stream: u16) {
        let n = usize::from(stream);
        let next = |tops: &mut Tops| {
            let upto = tops.upto;
            tops.waiting.pop_front_if(|waiting| upto > 0 && waiting.seen <= upto)
        };
        while let Some(Waiting { call, target, query, .. }) = next(&mut self.streams[n].tops) {
            let place = self.place(stream, &target.name);
            let since = query.since.map_or(0, |since| since.offset);
            let tops = &self.streams[n].tops;
            if since >= place.at_least && tops.is_last(since, &place.subject, &place.mark) {
                let result = Ok(place.stands_at(since, &query));
                self.handle_read(call, result).await;
            } else {
                self.read_alone(call, &target, query);
            }
        }
        let tops = &mut self.streams[n].tops;
        let Some(last) = tops.waiting.back() else { return };
        tops.drawn += 1;
        tops.asked = Some(tops.drawn);
        let (number, after, until) = (tops.drawn, tops.upto, last.seen);
        let most = tops.waiting.len().max(READS_MIN) * ENTRIES_PER_READ_MAX;
        let (api, all) = (self.api(stream), self.node.subjects.stored(stream));
        let incoming = self.incoming.clone();
        tokio::task::spawn_local(async move {
            let result = api.last_of_subjects(&all, after, most).await;
            let is_enough =
                matches!(&result, Ok(None)) || matches!(&result, Ok(Some(listed)) if listed.upto >= until);
            if !is_enough {
                tokio::time::sleep(BEHIND).await;
            }
            let _ = incoming.send(In::Tops { stream, number, result }).await;
        });
    }

    /// The table, or what came since.
    pub(super) async fn tops_listed(
        &mut self,
        stream: u16,
        number: u64,
        result: Result<Option<Listed>, ApiError>,
    ) {
        let n = usize::from(stream);
        let tops = &mut self.streams[n].tops;
        if tops.asked != Some(number) {
            return;
        }
        tops.asked = None;
        // An error takes long where nobody answers.
        tops.behind += if result.is_err() { BEHIND_MAX / 4 } else { 1 };
        match result {
            Ok(Some(Listed { upto, last })) if upto > tops.upto => {
                tops.behind = 0;
                tops.last.extend(last);
                tops.upto = upto;
                self.serve_together(stream).await;
            }
            // A consumer that is not there yet, a follower that has no more.
            Ok(Some(_)) | Err(_) if tops.behind < BEHIND_MAX => self.serve_together(stream).await,
            result => {
                tracing::debug!(stream, ?result, "positions are read one by one");
                let waiting = std::mem::take(&mut tops.waiting);
                tops.clear();
                tops.not_before = Some(Instant::now() + 10 * KEPT);
                for Waiting { call, target, query, .. } in waiting {
                    self.read_alone(call, &target, query);
                }
            }
        }
    }

    /// Lets go of tables that nobody asks for any more.
    pub(super) fn look_after_tops(&mut self, now: Instant) {
        for stream in &mut self.streams {
            let tops = &mut stream.tops;
            if tops.asked.is_none() && tops.used.is_some_and(|used| now - used > KEPT) {
                tops.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_stands_where_the_table_says_unless_it_has_a_mark() {
        let mut tops = Tops::default();
        tops.last.extend([("c.a".to_owned(), 5), ("c.b".to_owned(), 6), ("m.b".to_owned(), 3)]);
        let check = |since: u64, name: &str, expected: bool| {
            assert_eq!(tops.is_last(since, &format!("c.{name}"), &format!("m.{name}")), expected, "{name}");
        };
        check(5, "a", true);
        check(4, "a", false);
        check(6, "a", false);
        check(6, "b", false);
        check(0, "never published on", true);
        check(1, "never published on", false);
    }
}
