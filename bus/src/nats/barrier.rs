//! The barrier before a stream is believed: who has seen more of it than it has now?
//!
//! Owns: the rule of a stream's epochs, as the pure function [`decide`], and its steps over a connection. Must not
//! know: channels.
//!
//! A stream's epoch is a [`Record`] *in* the stream: a nonce and its generation. After a start, a cut or a canary gap
//! no node publishes or reads before it has gone through here: it asks every node that it knows to live what it has
//! seen, and compares the highest sequence that anybody saw *or had acknowledged* with the stream's last one. Lower:
//! acknowledged messages are gone, and their sequences would be given to others; so a record of a higher generation
//! is written (only if the last record is still the one compared with), and with it every position is void and told.
//! Nobody has watched the stream without a break: the same.

use std::time::{Duration, Instant};

use async_nats::Client;
use bincode::{Decode, Encode};
use futures_util::StreamExt as _;

use super::api::{Api, ApiError, Info, Stored, Which};
use super::options::NatsOptions;
use super::subjects::Subjects;
use super::wire::{self, Ask, Record, Told};

/// How long a node that was alive a moment ago is waited for, in milliseconds. Then it counts as dead.
pub(super) const PEER_WAIT_MS: u64 = 2_000;

/// How long one question is listened to, in milliseconds.
const ANSWER_MS: u64 = 100;

/// How long a node that has not watched a stream asks for one that has, in milliseconds: others may be slow.
const LISTEN_MS: u64 = 1_000;

/// A record younger than this was written by a node that is on its way, in milliseconds.
const FRESH_MS: u64 = 5_000;

/// How long nodes that know are waited for until one is through, in milliseconds.
const DEFER_MS_MAX: u64 = 3_000;

/// Time between two questions, in milliseconds.
const AGAIN_MS: u64 = 50;

/// How far a node is with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum Stage {
    /// Never saw it.
    New,
    /// Saw it until some moment.
    Broken,
    /// Is through the barrier and has watched it since.
    Watching,
}

/// What a node has seen of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Witness {
    pub(super) stage: Stage,
    /// Highest sequence seen or acknowledged.
    pub(super) high: u64,
    /// The record that it believed last; 0 before the first.
    pub(super) generation: u64,
    pub(super) nonce: u64,
}

impl Witness {
    pub(super) const NEW: Witness = Witness { stage: Stage::New, high: 0, generation: 0, nonce: 0 };
}

/// What the barrier decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The stream has all that anybody saw: believe its record.
    Adopt,
    /// Write a record of this generation.
    Renew(u64),
    /// Others know more, or go first.
    Wait,
}

/// What there is to decide by.
#[derive(Clone, Debug)]
pub(super) struct Evidence<'a> {
    pub(super) incarnation: u64,
    pub(super) ours: Witness,
    /// Of the other nodes, by incarnation.
    pub(super) others: &'a [(u64, Witness)],
    pub(super) record: Option<Record>,
    pub(super) last_sequence: u64,
    /// What we stored last is not there any more.
    pub(super) contradicted: bool,
    /// A stream that nobody watched is believed.
    pub(super) trusts: bool,
    /// The record was written a moment ago.
    pub(super) is_fresh: bool,
    /// Others were asked for long enough to be heard.
    pub(super) listened: bool,
    /// Those on their way were waited for long enough.
    pub(super) waited: bool,
}

/// The rule.
pub(super) fn decide(evidence: &Evidence<'_>) -> Decision {
    let Evidence { ours, others, .. } = evidence;
    let all = || others.iter().map(|(_, witness)| witness).chain([ours]);
    let known = all().map(|witness| witness.generation).max().unwrap_or(0);
    let Some(record) = evidence.record else { return Decision::Renew(known + 1) };
    let renewed = Decision::Renew(known.max(record.generation) + 1);
    // An older life, or another one of the same generation.
    let differs =
        |witness: &Witness| witness.generation == record.generation && witness.nonce != record.nonce;
    if record.generation < known || all().any(differs) {
        return renewed;
    }
    let of_now = |witness: &&Witness| witness.generation == record.generation;
    let lost = all().filter(of_now).any(|witness| witness.high > evidence.last_sequence);
    if lost || (evidence.contradicted && of_now(&ours)) {
        return renewed;
    }
    if of_now(&ours) || all().filter(of_now).any(|witness| witness.stage == Stage::Watching) {
        return Decision::Adopt;
    }
    // Nobody here has watched it. Somebody may be on the way who has, or who decides before us.
    let goes_first = |&(incarnation, witness): &(u64, Witness)| {
        of_now(&&witness) || (witness.stage == Stage::New && incarnation < evidence.incarnation)
    };
    let on_their_way = evidence.is_fresh || others.iter().any(goes_first);
    match () {
        () if on_their_way && !evidence.waited => Decision::Wait,
        () if evidence.trusts => Decision::Adopt,
        () if !evidence.listened => Decision::Wait,
        () => renewed,
    }
}

/// A barrier to go through.
#[derive(Debug)]
pub(super) struct Barrier {
    pub(super) client: Client,
    pub(super) options: NatsOptions,
    pub(super) subjects: Subjects,
    pub(super) stream: u16,
    pub(super) incarnation: u64,
    pub(super) ours: Witness,
    /// Nodes that lived when the stream was last believed.
    pub(super) expected: Vec<u64>,
    /// Sequence and bytes of our last canary that came back.
    pub(super) canary: Option<(u64, Vec<u8>)>,
    pub(super) nonce: u64,
}

/// The stream as it is believed now.
#[derive(Clone, Debug)]
pub(super) struct Believed {
    pub(super) record: Record,
    pub(super) info: Info,
}

impl Barrier {
    /// Goes through. Ends with an error when the stream cannot be asked; try again then.
    pub(super) async fn pass(mut self) -> Result<Believed, ApiError> {
        let api = Api::new(self.client.clone(), self.subjects.stream_name(self.stream));
        let subject = self.subjects.stored_epoch(self.stream);
        let begun = Instant::now();
        loop {
            match api.first_word().await {
                Err(ApiError::NotFound) => api.create(&self.options, &self.subjects, self.stream).await?,
                Err(error) => return Err(error),
                Ok(info) => {
                    if let Some(streams) = info.other_streams(&self.options) {
                        return Err(ApiError::OtherStreams(streams));
                    }
                    if info.is_less_than(&self.options) {
                        api.raise(&self.options).await?;
                    }
                }
            }
            let others = self.ask().await?;
            let waited_ms = begun.elapsed().as_millis() as u64;
            let missing = self.expected.iter().any(|peer| !others.iter().any(|(other, _)| other == peer));
            if missing && waited_ms < PEER_WAIT_MS {
                tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
                continue;
            }
            let contradicted = self.is_contradicted(&api).await?;
            let info = api.info().await?;
            // Read behind the last sequence: if nobody has renewed the record by then, nobody had at that sequence.
            let found = match api.message(Which::Last(&subject)).await {
                Ok(stored) => Some(stored),
                Err(ApiError::NotFound) => None,
                Err(error) => return Err(error),
            };
            let record = found.as_ref().and_then(|stored| wire::read::<Record>(&stored.payload));
            let is_fresh = |stored: &Stored| stored.unix_ms.abs_diff(super::read::unix_ms()) < FRESH_MS;
            let decision = decide(&Evidence {
                incarnation: self.incarnation,
                ours: self.ours,
                others: &others,
                record,
                last_sequence: info.last_sequence,
                contradicted,
                trusts: self.options.trust_unwatched,
                is_fresh: found.as_ref().is_some_and(is_fresh),
                listened: waited_ms >= LISTEN_MS,
                waited: waited_ms >= DEFER_MS_MAX,
            });
            match (decision, record) {
                (Decision::Adopt, Some(record)) => return Ok(Believed { record, info }),
                (Decision::Renew(generation), _) => {
                    let record = Record { generation, nonce: self.nonce };
                    let expected = found.map_or(0, |stored| stored.sequence);
                    match api.publish_after(&subject, expected, wire::write(&record)).await {
                        Ok(_) => return Ok(Believed { record, info }),
                        Err(ApiError::Conflict) => (),
                        Err(error) => return Err(error),
                    }
                }
                _ => tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await,
            }
        }
    }

    /// What the other nodes have seen: until all expected have answered; who knows nobody listens for a while.
    async fn ask(&mut self) -> Result<Vec<(u64, Witness)>, ApiError> {
        let inbox = self.client.new_inbox();
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(|_| ApiError::Nobody)?;
        let ask = wire::write(&Ask { incarnation: self.incarnation, number: 0 });
        let sent = self.client.publish_with_reply(self.subjects.sync(), inbox, ask.into()).await;
        sent.map_err(|_| ApiError::Nobody)?;
        let until = tokio::time::Instant::now() + Duration::from_millis(ANSWER_MS);
        let mut others: Vec<(u64, Witness)> = Vec::new();
        let mut own = false;
        while let Ok(Some(answer)) = tokio::time::timeout_at(until, answers.next()).await {
            let Some(told) = wire::read::<Told>(&answer.payload) else { continue };
            own |= told.incarnation == self.incarnation;
            let witness = told.witnesses.get(usize::from(self.stream));
            if told.incarnation != self.incarnation
                && let Some(witness) = witness
                && !others.iter().any(|(other, _)| *other == told.incarnation)
            {
                others.push((told.incarnation, *witness));
            }
            let all = self.expected.iter().all(|peer| others.iter().any(|(other, _)| other == peer));
            if own && all && self.ours.stage != Stage::New {
                break;
            }
        }
        Ok(others)
    }

    /// Whether the sequence of our last canary now names something else. Trimmed: it says nothing.
    async fn is_contradicted(&self, api: &Api) -> Result<bool, ApiError> {
        let Some((sequence, payload)) = &self.canary else { return Ok(false) };
        match api.message(Which::At(*sequence)).await {
            Ok(stored) => Ok(stored.payload != *payload),
            Err(ApiError::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness(stage: Stage, high: u64, generation: u64) -> Witness {
        Witness { stage, high, generation, nonce: generation * 10 }
    }

    fn check(ours: Witness, others: &[(u64, Witness)], generation: u64, expected: Decision) {
        let record = (generation > 0).then_some(Record { generation, nonce: generation * 10 });
        let evidence = Evidence {
            incarnation: 5,
            ours,
            others,
            record,
            last_sequence: 100,
            contradicted: false,
            trusts: false,
            is_fresh: false,
            listened: true,
            waited: false,
        };
        assert_eq!(decide(&evidence), expected, "{evidence:?}");
        let waited = decide(&Evidence { waited: true, ..evidence.clone() });
        assert!(waited != Decision::Wait);
        let early = decide(&Evidence { listened: false, ..evidence.clone() });
        let unwatched = ours.generation != generation && expected == Decision::Renew(generation + 1);
        assert!(early == expected || (early == Decision::Wait && unwatched), "{evidence:?}");
        if expected != Decision::Wait {
            assert_eq!(waited, expected);
        }
        if ours.stage == Stage::Broken && expected == Decision::Adopt && ours.generation == generation {
            let renewed = decide(&Evidence { contradicted: true, ..evidence });
            assert_eq!(renewed, Decision::Renew(generation + 1));
        }
    }

    #[test]
    fn a_stream_is_believed_if_it_has_all_that_was_seen() {
        use Decision::{Adopt, Renew, Wait};
        use Stage::{Broken, Watching};
        let new = Witness::NEW;
        // The first node of all.
        check(new, &[], 0, Renew(1));
        // It has, or lost, what we saw.
        check(witness(Broken, 100, 2), &[], 2, Adopt);
        check(witness(Broken, 101, 2), &[], 2, Renew(3));
        // It lost what another saw.
        check(witness(Broken, 90, 2), &[(9, witness(Watching, 101, 2))], 2, Renew(3));
        check(new, &[(9, witness(Broken, 101, 2))], 2, Renew(3));
        // It is another one, or an older one.
        check(witness(Broken, 90, 2), &[], 0, Renew(3));
        check(witness(Broken, 90, 2), &[], 1, Renew(3));
        check(witness(Broken, 0, 2), &[(9, witness(Broken, 0, 7))], 2, Renew(8));
        check(Witness { nonce: 1, ..witness(Broken, 90, 2) }, &[], 2, Renew(3));
        // It was renewed meanwhile: what we saw of the life before is void already.
        check(witness(Broken, 200, 2), &[(9, witness(Watching, 100, 3))], 3, Adopt);
        check(witness(Broken, 90, 2), &[], 3, Renew(4));
        // A new node believes who watches it, waits for who did, and for who decides before it.
        check(new, &[(9, witness(Watching, 100, 2))], 2, Adopt);
        check(new, &[(9, witness(Broken, 100, 2))], 2, Wait);
        check(new, &[(4, new)], 2, Wait);
        check(new, &[(6, new)], 2, Renew(3));
        check(new, &[], 2, Renew(3));
    }

    #[test]
    fn an_unwatched_stream_is_believed_where_that_is_chosen() {
        let evidence = Evidence {
            incarnation: 5,
            ours: Witness::NEW,
            others: &[],
            record: Some(Record { generation: 4, nonce: 40 }),
            last_sequence: 100,
            contradicted: false,
            trusts: true,
            is_fresh: false,
            listened: false,
            waited: false,
        };
        assert_eq!(decide(&evidence), Decision::Adopt);
    }

    #[test]
    fn who_wrote_a_record_just_now_is_waited_for() {
        let evidence = Evidence {
            incarnation: 5,
            ours: Witness::NEW,
            others: &[],
            record: Some(Record { generation: 4, nonce: 40 }),
            last_sequence: 100,
            contradicted: false,
            trusts: false,
            is_fresh: true,
            listened: true,
            waited: false,
        };
        assert_eq!(decide(&evidence), Decision::Wait);
        assert_eq!(decide(&Evidence { waited: true, ..evidence.clone() }), Decision::Renew(5));
        let watching = [(9, witness(Stage::Watching, 90, 4))];
        assert_eq!(decide(&Evidence { others: &watching, ..evidence }), Decision::Adopt);
    }
}
