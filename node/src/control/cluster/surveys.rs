//! Questions to every node, and their answers.
//!
//! Owns the questions under way and whose answers are missing. It must not know what is asked: the driver asks its own
//! shards, and the API makes a result of the parts.
//!
//! A question is over when every node that lived when it was asked has answered or is gone, or after [`SURVEY_MS`]; the
//! answer is partial where one has not.

use std::collections::{BTreeMap, BTreeSet};

use ringmain_bus::Bus;
use ringmain_proto::time::Now;

use super::message::{Answer, AnswerPart, Ask, Body, Question, Sender};
use super::net::To;
use super::{Cluster, Effect};
use crate::core::cluster::NodeId;

/// How long a question waits for the other nodes, in milliseconds.
pub const SURVEY_MS: u64 = 500;

/// Questions under way at the most; beyond it they are answered at once, without the other nodes.
pub const SURVEYS_MAX: usize = 256;

/// Channels of one part of an answer at the most.
pub const CHANNELS_PER_PART_MAX: usize = 256;

/// Parts of all nodes' answers to one question at the most; the rest is left out, and that is said.
pub const PARTS_MAX: usize = 8_192;

/// Parts of answers that wait to be sent at the most; beyond it an answer is not given.
pub const ANSWERS_MAX: usize = 8_192;

#[derive(Debug)]
struct Survey {
    ticket: u64,
    waiting: BTreeSet<NodeId>,
    parts: Vec<AnswerPart>,
    until_ms: u64,
    partial: bool,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Surveys {
    drawn: u64,
    open: BTreeMap<u64, Survey>,
    answers: Vec<(NodeId, Answer)>,
}

impl Surveys {
    /// When one is over at the latest, in `mono_ms`.
    pub(super) fn next_ms(&self, is_up: bool) -> Option<u64> {
        let over = self.open.values().map(|survey| survey.until_ms).min();
        if is_up && !self.answers.is_empty() { Some(0) } else { over }
    }
}

impl Cluster {
    /// Asks every other node. Answered by [`Effect::Surveyed`] under the caller's `ticket`.
    pub fn survey(&mut self, now: Now, bus: &mut dyn Bus, ticket: u64, question: Question) {
        let waiting: BTreeSet<NodeId> = self.peers.by_node.keys().copied().collect();
        let full = self.surveys.open.len() >= SURVEYS_MAX;
        if full || waiting.is_empty() {
            let partial = full && !waiting.is_empty();
            self.effects.push(Effect::Surveyed { ticket, parts: Vec::new(), partial });
            return;
        }
        self.surveys.drawn += 1;
        let id = self.surveys.drawn;
        let sent = self.net.is_up() && self.publish(now, bus, To::All, &Body::Ask(Ask { id, question }));
        // What nobody was asked nobody answers.
        let until_ms = if sent { now.mono_ms + SURVEY_MS } else { now.mono_ms };
        let survey = Survey { ticket, waiting, parts: Vec::new(), until_ms, partial: false };
        self.surveys.open.insert(id, survey);
    }

    /// Gives this node's answer to another's question, as [`Effect::Survey`] asked.
    pub fn answer_survey(&mut self, to: NodeId, id: u64, part: AnswerPart) {
        let parts: Vec<AnswerPart> = match part {
            AnswerPart::Channels(channels) if channels.len() > CHANNELS_PER_PART_MAX => {
                let chunks = channels.chunks(CHANNELS_PER_PART_MAX);
                chunks.map(|chunk| AnswerPart::Channels(chunk.to_vec())).collect()
            }
            part => vec![part],
        };
        let parts = if self.surveys.answers.len() + parts.len() > ANSWERS_MAX {
            vec![AnswerPart::Nothing]
        } else {
            parts
        };
        let count = parts.len();
        let answers = parts.into_iter().enumerate();
        let answers = answers.map(|(index, part)| (to, Answer { id, last: index + 1 == count, part }));
        self.surveys.answers.extend(answers);
    }

    /// A part of another node's answer.
    pub(super) fn answer_arrived(&mut self, sender: Sender, answer: Answer) {
        let Some(survey) = self.surveys.open.get_mut(&answer.id) else { return };
        if !survey.waiting.contains(&sender.node) {
            return;
        }
        survey.partial |= answer.part == AnswerPart::Nothing || survey.parts.len() >= PARTS_MAX;
        if survey.parts.len() < PARTS_MAX {
            survey.parts.push(answer.part);
        }
        if answer.last {
            survey.waiting.remove(&sender.node);
        }
    }

    /// A node that is gone answers nothing any more.
    pub(super) fn survey_without(&mut self, node: NodeId) {
        self.surveys.open.values_mut().for_each(|survey| {
            survey.waiting.remove(&node);
        });
    }

    /// Sends answers, and ends what is over.
    pub(super) fn drive_surveys(&mut self, now: Now, bus: &mut dyn Bus) {
        if self.net.is_up() {
            for (node, answer) in std::mem::take(&mut self.surveys.answers) {
                if let Some(peer) = self.peers.by_node.get(&node) {
                    let to = To::Node(node, peer.index);
                    self.publish(now, bus, to, &Body::Answer(answer));
                }
            }
        }
        let over = |survey: &Survey| survey.waiting.is_empty() || survey.until_ms <= now.mono_ms;
        for (_, survey) in self.surveys.open.extract_if(.., |_, survey| over(survey)) {
            let Survey { ticket, waiting, parts, partial, .. } = survey;
            let partial = partial || !waiting.is_empty();
            self.figures.surveys_partial += u64::from(partial);
            self.effects.push(Effect::Surveyed { ticket, parts, partial });
        }
    }
}
