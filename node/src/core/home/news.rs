//! What a shard tells the control plane of a cluster: who came, who left, what is held, whose users are here.
//!
//! Owns the queue of news and the stream of reports. One report is under way at a time: it is sent again
//! until it was taken, and what happens meanwhile is told together, so that many joins cost few messages.
//! It must not know other nodes; outside of a cluster ([`NewsQueue::is_on`]) it keeps nothing.
//!
//! Bounds: [`NEWS_MAX`] entries wait, each member counted; beyond it all are dropped, which the next report says, and
//! what is held is told anew. A report has [`REPORT_NEWS_MAX`], or one that is larger alone.

use std::collections::VecDeque;
use std::sync::Arc;

use ringmain_proto::time::Now;

use crate::core::api::{Answer, ControlAnswer, REPORT_TOKEN};
use crate::core::cluster::{News, NodeId, PresenceItem, Report};
use crate::core::mesh::Identity;
use crate::core::metrics::Metric;
use crate::core::shard::Core;

/// News that wait at the most; a member of a whole channel counts as one. About 12 MiB.
pub(crate) const NEWS_MAX: usize = 262_144;

/// News of one report at the most, counted the same.
pub(crate) const REPORT_NEWS_MAX: usize = 4_096;

/// When a report that was not taken is sent again, in milliseconds.
pub(crate) const REPORT_AGAIN_MS: u64 = 1_000;

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct NewsQueue {
    /// 0: no cluster.
    stream: u32,
    sequence: u32,
    queue: VecDeque<News>,
    weight: usize,
    lost: bool,
    /// The report that is under way, and when it is sent again.
    unacked: Option<(Arc<Report>, u64)>,
}

fn weight(news: &News) -> usize {
    match news {
        News::Whole { members, .. } => 1 + members.len(),
        _ => 1,
    }
}

impl NewsQueue {
    /// Whether this node is part of a cluster.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.stream != 0
    }

    /// Takes news, or drops all.
    pub(crate) fn push(&mut self, news: News) {
        if !self.is_on() || self.lost {
            return;
        }
        self.weight += weight(&news);
        self.queue.push_back(news);
        if self.weight > NEWS_MAX {
            self.queue = VecDeque::new();
            self.weight = 0;
            self.lost = true;
        }
    }

    fn start(&mut self, stream: u32) {
        *self = Self { stream, ..Self::default() };
    }

    fn take(&mut self) -> Vec<News> {
        let (mut taken, mut taken_weight) = (Vec::new(), 0);
        while let Some(next) = self.queue.front() {
            let next_weight = weight(next);
            if taken_weight > 0 && taken_weight + next_weight > REPORT_NEWS_MAX {
                break;
            }
            taken_weight += next_weight;
            taken.extend(self.queue.pop_front());
        }
        self.weight = self.weight.saturating_sub(taken_weight);
        taken
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && !self.lost
    }
}

impl Core {
    /// Begins a stream of reports, as if nothing had been told before.
    pub(super) fn start_news(&mut self, stream: u32) {
        self.news.start(stream);
        self.sessions.start_slots();
        self.tell_all_held();
    }

    /// News of a channel's index, where the node is part of a cluster.
    pub(super) fn tell_joined(&mut self, index: u32, member: &Identity, listed: bool) {
        if self.news.is_on() && (listed || member.is_announced()) {
            let channel = Arc::clone(&self.channels.get(index).name);
            self.news.push(News::Changed(PresenceItem::Joined { channel, member: member.clone(), listed }));
        }
    }

    /// The same for one who left.
    pub(super) fn tell_left(&mut self, index: u32, member: &Identity, listed: bool) {
        if self.news.is_on() && (listed || member.is_announced()) {
            let channel = Arc::clone(&self.channels.get(index).name);
            let member = if listed { member.bare() } else { member.clone() };
            self.news.push(News::Changed(PresenceItem::Left { channel, member, listed }));
        }
    }

    /// Tells another node who is in these channels.
    pub(super) fn tell_whole(&mut self, to: NodeId, channels: Vec<Arc<str>>) {
        for channel in channels {
            let members = self.presence_of(&channel).map(|presence| presence.iter().cloned().collect());
            self.news.push(News::Whole { to, channel, members: members.unwrap_or_default() });
        }
    }

    /// The control plane took a report.
    pub(super) fn news_taken(&mut self, stream: u32, sequence: u32) {
        let unacked = &mut self.news.unacked;
        if unacked.as_ref().is_some_and(|(report, _)| (report.stream, report.sequence) == (stream, sequence))
        {
            *unacked = None;
        }
    }

    /// When a report is due.
    pub(crate) fn next_report_ms(&self) -> Option<u64> {
        match &self.news.unacked {
            _ if !self.news.is_on() => None,
            Some((_, again_ms)) => Some(*again_ms),
            None => (!self.news.is_empty() || self.sessions.slots_changed()).then_some(0),
        }
    }

    /// Sends what is due.
    pub(crate) fn report_news(&mut self, now: Now) {
        if self.next_report_ms().is_none_or(|at| at > now.mono_ms) {
            return;
        }
        let report = match &self.news.unacked {
            Some((report, _)) => Arc::clone(report),
            None => Arc::new(self.next_report()),
        };
        self.news.unacked = Some((Arc::clone(&report), now.mono_ms + REPORT_AGAIN_MS));
        let result = Ok(Answer::Report(report));
        self.answers.push(ControlAnswer { token: REPORT_TOKEN, shard: self.shard, result });
    }

    fn next_report(&mut self) -> Report {
        let lost = std::mem::take(&mut self.news.lost);
        if lost {
            self.metrics.add(Metric::DropNews, 1);
            self.sessions.start_slots();
            self.tell_all_held();
        }
        self.news.sequence += 1;
        Report {
            stream: self.news.stream,
            sequence: self.news.sequence,
            lost,
            slots: self.sessions.take_slots(),
            news: self.news.take(),
        }
    }

    fn tell_all_held(&mut self) {
        // As many as the shard's table of channels holds: not counted among what may wait.
        let held = self.remote.names().map(|(name, held)| match held {
            true => News::Held { channel: Arc::clone(name) },
            false => News::Asked { channel: Arc::clone(name) },
        });
        self.news.queue.extend(held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(number: usize) -> News {
        News::Held { channel: number.to_string().into() }
    }

    #[test]
    fn what_waits_has_a_maximum_and_then_all_is_lost_and_said() {
        let mut queue = NewsQueue::default();
        queue.push(held(0));
        assert!(queue.is_empty() && !queue.is_on(), "outside of a cluster nothing waits");
        queue.start(1);
        (0..NEWS_MAX).for_each(|number| queue.push(held(number)));
        assert!(!queue.lost);
        queue.push(held(0));
        assert!(queue.lost && queue.queue.is_empty() && !queue.is_empty());
    }

    #[test]
    fn a_report_has_a_maximum_unless_one_entry_is_more() {
        let whole = |members: usize| News::Whole {
            to: 1,
            channel: "c".into(),
            members: vec![Identity::new(ringmain_proto::client::ClientId(1), "u", None, None); members],
        };
        let mut queue = NewsQueue::default();
        queue.start(1);
        queue.push(whole(REPORT_NEWS_MAX));
        queue.push(whole(0));
        queue.push(whole(REPORT_NEWS_MAX - 2));
        queue.push(held(0));
        assert_eq!([queue.take().len(), queue.take().len(), queue.take().len()], [1, 2, 1]);
        assert_eq!(queue.weight, 0);
    }
}
