//! JetStream's API: streams, single messages, purges, acks.
//!
//! Owns: the requests and answers as JSON. Must not know: channels, epochs.
//! Invariant: an answer of the server is parsed, never trusted; every request ends within [`CALL_MS_MAX`].

use std::time::Duration;

use async_nats::{Client, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};

use super::options::NatsOptions;
use super::subjects::Subjects;

/// Longest wait for one answer of the API, in milliseconds.
pub(super) const CALL_MS_MAX: u64 = 1_000;

/// How long a consumer lives that is not asked, in milliseconds.
const LISTING_MS_MAX: u64 = 5_000;

/// Messages that are asked for together: far fewer than a subscription holds.
const LISTED_PER_BATCH: usize = 4_096;

/// Messages that are read together, and their bytes (what many reads at once hold is so many times as much).
const READ_MESSAGES_MAX: usize = 1_024;
const READ_BYTES_MAX: usize = 1 << 20;

/// Longest wait for the first word of a stream, in milliseconds: while nobody leads it, nobody answers, and the leader
/// should not be found late for that.
const FIRST_WORD_MS_MAX: u64 = 300;

/// How a stream's description begins; then comes the number of streams.
const DESCRIPTION: &str = "Ringmain, streams: ";

/// How the description ends of a stream that kept less before: what it dropped then nothing else tells.
const RAISED: &str = ", raised";

/// How answers to direct reads end (NATS ADR-31).
const END_OF_BATCH: u16 = 204;
const NOT_FOUND: u16 = 404;

/// The server has no such message (JetStream's error codes).
const NO_MESSAGE: u64 = 10_037;
const NO_STREAM: u64 = 10_059;
const NO_CLUSTER: u64 = 10_074;
const WRONG_LAST_SEQUENCE: u64 = 10_071;
const STREAM_EXISTS: u64 = 10_058;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ApiError {
    /// There is no such message or stream.
    #[error("not found")]
    NotFound,
    /// The last message of the subject is not the expected one.
    #[error("another message came before")]
    Conflict,
    /// Nobody answered in time: it may have been done or not.
    #[error("no answer")]
    NoAnswer,
    /// Nobody leads, or nobody listens: certainly not done.
    #[error("nobody there")]
    Nobody,
    /// The server refuses; certainly not done.
    #[error("refused with {code}: {text}")]
    Refused {
        /// JetStream's number of the error.
        code: u64,
        /// What it says.
        text: String,
    },
    /// An answer that is not understood.
    #[error("an answer that is not understood")]
    Malformed,
    /// Channels lie elsewhere there than where this node would look.
    #[error("it was made for a bus of so many streams: {0}")]
    OtherStreams(u16),
}

#[derive(Debug, Deserialize)]
struct Failure {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        match failure.err_code {
            NO_MESSAGE | NO_STREAM => ApiError::NotFound,
            WRONG_LAST_SEQUENCE => ApiError::Conflict,
            code => ApiError::Refused { code, text: failure.description },
        }
    }
}

#[derive(Debug, Deserialize)]
struct Answer {
    error: Option<Failure>,
}

/// The answer to a publish into a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ack {
    pub(super) sequence: u64,
    /// Its id was seen before: this is the first one's sequence.
    pub(super) repeated: bool,
}

#[derive(Debug, Deserialize)]
struct RawAck {
    error: Option<Failure>,
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
}

/// A stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) sequence: u64,
    /// When the leader took it, in milliseconds since 1970, by its clock.
    pub(super) unix_ms: u64,
    /// Messages of the subject behind it, where the server says.
    pub(super) behind: Option<u64>,
    pub(super) payload: Vec<u8>,
}

/// Messages of one subject that were read together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Oldest first, without a hole between them.
    pub(super) messages: Vec<Stored>,
    /// The server gives one at a time: it is older than 2.11.
    pub(super) is_single: bool,
}

#[derive(Debug, Deserialize)]
struct RawMessage {
    message: RawStored,
}

#[derive(Debug, Deserialize)]
struct RawStored {
    seq: u64,
    #[serde(default)]
    data: String,
    time: String,
}

/// What is known of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) last_sequence: u64,
    /// When it was made, in milliseconds since 1970.
    pub(super) created_ms: u64,
    pub(super) replicas: u64,
    pub(super) in_memory: bool,
    pub(super) per_subject_max: i64,
    pub(super) bytes_max: i64,
    pub(super) age_max_ms: u64,
    pub(super) window_ms: u64,
    /// Among how many streams channels are spread, if it says.
    pub(super) streams: Option<u16>,
    /// It kept less before.
    pub(super) was_raised: bool,
}

impl Info {
    /// How many streams its bus has, where that is more or fewer.
    pub(super) fn other_streams(&self, options: &NatsOptions) -> Option<u16> {
        self.streams.filter(|streams| *streams != options.streams)
    }

    /// Whether the stream keeps less than is wanted.
    pub(super) fn is_less_than(&self, options: &NatsOptions) -> bool {
        let is_small = self.per_subject_max > 0 && (self.per_subject_max as u64) < per_subject_max(options);
        is_small || (self.age_max_ms > 0 && self.age_max_ms < options.retention_ms)
    }
}

/// Which message of a subject.
#[derive(Clone, Copy, Debug)]
pub(super) enum Which<'a> {
    /// The last one.
    Last(&'a str),
    /// The first one from a sequence on.
    From(&'a str, u64),
    /// The one of a sequence, whatever its subject.
    At(u64),
}

/// The last sequences of subjects, as they are stored up to a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) upto: u64,
    pub(super) last: Vec<(String, u64)>,
}

#[derive(Debug, Deserialize)]
struct RawConsumer {
    name: String,
    #[serde(default)]
    num_pending: u64,
}

/// Where a consumer's message stands.
#[derive(Debug, PartialEq, Eq)]
struct Delivered {
    sequence: u64,
    /// How many the consumer had given with it.
    number: u64,
    /// How many it has left.
    pending: u64,
}

/// Reads the subject to which a consumer's message would be acknowledged:
/// `$JS.ACK.[domain.hash.]stream.consumer.tries.sequence.number.time.pending[.more]`.
fn delivered(subject: &str) -> Option<Delivered> {
    let tokens: Vec<&str> = subject.strip_prefix("$JS.ACK.")?.split('.').collect();
    let at = match tokens.len() {
        7 => 3,
        9.. => 5,
        _ => return None,
    };
    let number = |token: usize| tokens.get(token)?.parse().ok();
    Some(Delivered { sequence: number(at)?, number: number(at + 1)?, pending: number(at + 3)? })
}

/// One stream's API over one connection.
#[derive(Clone, Debug)]
pub(super) struct Api {
    client: Client,
    stream: String,
}

impl Api {
    pub(super) fn new(client: Client, stream: String) -> Api {
        Api { client, stream }
    }

    async fn call(&self, what: &str, body: Value) -> Result<Bytes, ApiError> {
        self.call_within(CALL_MS_MAX, what, body).await
    }

    async fn call_within(&self, ms_max: u64, what: &str, body: Value) -> Result<Bytes, ApiError> {
        let subject = format!("$JS.API.{what}.{}", self.stream);
        request(&self.client, subject, body.to_string().into(), ms_max).await
    }

    /// The first word of a stream, if somebody leads it.
    pub(super) async fn first_word(&self) -> Result<Info, ApiError> {
        info_of(&self.call_within(FIRST_WORD_MS_MAX, "STREAM.INFO", json!({})).await?)
    }

    pub(super) async fn message(&self, which: Which<'_>) -> Result<Stored, ApiError> {
        let body = match which {
            Which::Last(subject) => json!({ "last_by_subj": subject }),
            Which::From(subject, sequence) => json!({ "seq": sequence.max(1), "next_by_subj": subject }),
            Which::At(sequence) => json!({ "seq": sequence }),
        };
        let answer = self.call("STREAM.MSG.GET", body).await?;
        let raw: RawMessage = serde_json::from_slice(&answer).map_err(|_| ApiError::Malformed)?;
        let payload = STANDARD.decode(raw.message.data).map_err(|_| ApiError::Malformed)?;
        let unix_ms = unix_ms(&raw.message.time).ok_or(ApiError::Malformed)?;
        Ok(Stored { sequence: raw.message.seq, unix_ms, behind: None, payload })
    }

    /// Up to `most` of a subject's messages, from a sequence on, as many as come together and as far as the server that
    /// answers has them: it may be a follower. None where it knows of none.
    pub(super) async fn run(&self, subject: &str, from: u64, most: usize) -> Result<Run, ApiError> {
        let inbox = self.client.new_inbox();
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(|_| ApiError::NoAnswer)?;
        let body = json!({
            "seq": from.max(1),
            "next_by_subj": subject,
            "batch": most.clamp(1, READ_MESSAGES_MAX),
            "max_bytes": READ_BYTES_MAX,
        });
        let asked = format!("$JS.API.DIRECT.GET.{}", self.stream);
        let asked = self.client.publish_with_reply(asked, inbox, body.to_string().into());
        asked.await.map_err(|_| ApiError::NoAnswer)?;
        let taken = tokio::time::timeout(Duration::from_millis(CALL_MS_MAX), take_run(&mut answers));
        taken.await.map_err(|_| ApiError::NoAnswer)?
    }

    pub(super) async fn info(&self) -> Result<Info, ApiError> {
        info_of(&self.call("STREAM.INFO", json!({})).await?)
    }

    /// Makes the stream if it is not there. Three copies where nothing else is said and there is a cluster.
    pub(super) async fn create(
        &self,
        options: &NatsOptions,
        subjects: &Subjects,
        n: u16,
    ) -> Result<(), ApiError> {
        let create = async |replicas: u8| {
            let body = config(&self.stream, options, subjects, n, replicas);
            match self.call("STREAM.CREATE", body).await {
                Ok(_) => Ok(()),
                Err(ApiError::Refused { code: STREAM_EXISTS, .. }) => Ok(()),
                Err(error) => Err(error),
            }
        };
        match (options.replicas, create(options.replicas.unwrap_or(3)).await) {
            (None, Err(ApiError::Refused { code: NO_CLUSTER, .. })) => create(1).await,
            (_, result) => result,
        }
    }

    /// Makes an older stream keep as much as is wanted now, for as long. Nothing is made less.
    pub(super) async fn raise(&self, options: &NatsOptions) -> Result<(), ApiError> {
        let answer = self.call("STREAM.INFO", json!({})).await?;
        let mut answer: Value = serde_json::from_slice(&answer).map_err(|_| ApiError::Malformed)?;
        let config = &mut answer["config"];
        let mut raise = |name: &str, wanted: u64| {
            let is_less = config[name].as_i64().is_some_and(|now| (1..wanted as i64).contains(&now));
            if is_less {
                config[name] = wanted.into();
            }
            is_less
        };
        let size = raise("max_msgs_per_subject", per_subject_max(options));
        let age = raise("max_age", options.retention_ms * 1_000_000);
        if size || age {
            let description = config["description"].as_str().unwrap_or_default();
            config["description"] = format!("{}{RAISED}", description.trim_end_matches(RAISED)).into();
            self.call("STREAM.UPDATE", answer["config"].take()).await?;
        }
        Ok(())
    }

    /// The last sequence of every subject that `all` covers, or (`after` is not 0) of those that have a message after
    /// that sequence; as far as the server that answers has them, which may be a follower. `None` if more than `most`
    /// messages would have to be looked at.
    pub(super) async fn last_of_subjects(
        &self,
        all: &str,
        after: u64,
        most: usize,
    ) -> Result<Option<Listed>, ApiError> {
        let mut config = json!({
            "filter_subject": all,
            "ack_policy": "none",
            "replay_policy": "instant",
            "headers_only": true,
            "mem_storage": true,
            "num_replicas": 1,
            "inactive_threshold": LISTING_MS_MAX * 1_000_000,
        });
        if after == 0 {
            config["deliver_policy"] = "last_per_subject".into();
        } else {
            config["deliver_policy"] = "by_start_sequence".into();
            config["opt_start_seq"] = (after + 1).into();
        }
        let body = json!({ "stream_name": self.stream, "config": config });
        let made: RawConsumer = serde_json::from_slice(&self.call("CONSUMER.CREATE", body).await?)
            .map_err(|_| ApiError::Malformed)?;
        let listed = match made.num_pending as usize > most {
            true => Ok(None),
            false => self.listed(&made, after).await.map(Some),
        };
        let gone = format!("$JS.API.CONSUMER.DELETE.{}.{}", self.stream, made.name);
        // Else it goes by itself.
        let _ = self.client.publish(gone, Bytes::new()).await;
        listed
    }

    /// Takes what a consumer has, batch by batch.
    async fn listed(&self, consumer: &RawConsumer, after: u64) -> Result<Listed, ApiError> {
        let inbox = self.client.new_inbox();
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.stream, consumer.name);
        let mut messages = self.client.subscribe(inbox.clone()).await.map_err(|_| ApiError::NoAnswer)?;
        let mut listed = Listed { upto: after, last: Vec::new() };
        let (mut pending, mut taken) = (consumer.num_pending, 0);
        while pending > 0 {
            let body = json!({ "batch": LISTED_PER_BATCH, "expires": CALL_MS_MAX * 1_000_000 }).to_string();
            let asked = self.client.publish_with_reply(next.clone(), inbox.clone(), body.into());
            asked.await.map_err(|_| ApiError::NoAnswer)?;
            for _ in 0..LISTED_PER_BATCH {
                let waited = tokio::time::timeout(Duration::from_millis(CALL_MS_MAX), messages.next());
                let message = waited.await.ok().flatten().ok_or(ApiError::NoAnswer)?;
                let place = message.reply.as_deref().and_then(delivered).ok_or(ApiError::NoAnswer)?;
                taken += 1;
                if place.number != taken {
                    return Err(ApiError::Malformed);
                }
                listed.upto = listed.upto.max(place.sequence);
                listed.last.push((message.subject.to_string(), place.sequence));
                pending = place.pending;
                if pending == 0 {
                    break;
                }
            }
        }
        Ok(listed)
    }

    /// Removes what a subject has before a sequence.
    pub(super) async fn purge(&self, subject: &str, before: u64) -> Result<(), ApiError> {
        self.call("STREAM.PURGE", json!({ "filter": subject, "seq": before })).await.map(drop)
    }

    pub(super) async fn publish(&self, subject: &str, payload: Vec<u8>) -> Result<Ack, ApiError> {
        let timeout = Some(Duration::from_millis(CALL_MS_MAX));
        let sent = async_nats::Request::new().payload(payload.into()).timeout(timeout);
        let answer =
            self.client.send_request(subject.to_owned(), sent).await.map_err(|error| no_answer(&error))?;
        read_ack(&answer)
    }

    /// Removes all but the newest messages of a subject.
    pub(super) async fn purge_but(&self, subject: &str, keep: u64) -> Result<(), ApiError> {
        self.call("STREAM.PURGE", json!({ "filter": subject, "keep": keep })).await.map(drop)
    }

    /// Publishes if the subject's last message is the expected one (0: none).
    pub(super) async fn publish_after(
        &self,
        subject: &str,
        expected: u64,
        payload: Vec<u8>,
    ) -> Result<Ack, ApiError> {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Expected-Last-Subject-Sequence", expected.to_string());
        let sent = async_nats::Request::new()
            .payload(payload.into())
            .headers(headers)
            .timeout(Some(Duration::from_millis(CALL_MS_MAX)));
        let answer =
            self.client.send_request(subject.to_owned(), sent).await.map_err(|error| no_answer(&error))?;
        read_ack(&answer)
    }
}

/// Messages of one subject: beside the publications kept, the one before them, which is the history's floor.
fn per_subject_max(options: &NatsOptions) -> u64 {
    u64::from(options.history_size_max) + 2
}

fn config(name: &str, options: &NatsOptions, subjects: &Subjects, n: u16, replicas: u8) -> Value {
    json!({
        "name": name,
        "description": format!("{DESCRIPTION}{}", options.streams),
        "subjects": [subjects.stored(n)],
        "retention": "limits",
        "discard": "old",
        "storage": if options.in_memory { "memory" } else { "file" },
        "num_replicas": replicas,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_msgs_per_subject": per_subject_max(options),
        "max_age": options.retention_ms * 1_000_000,
        "duplicate_window": options.idempotency_ms.min(options.retention_ms) * 1_000_000,
        "allow_direct": true,
        "republish": { "src": subjects.stored(n), "dest": subjects.republished(n) },
    })
}

fn info_of(answer: &[u8]) -> Result<Info, ApiError> {
    let answer: Value = serde_json::from_slice(answer).map_err(|_| ApiError::Malformed)?;
    let (config, state) = (&answer["config"], &answer["state"]);
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let description = config["description"].as_str().unwrap_or_default();
    Ok(Info {
        last_sequence: state["last_seq"].as_u64().ok_or(ApiError::Malformed)?,
        created_ms: answer["created"].as_str().and_then(unix_ms).ok_or(ApiError::Malformed)?,
        replicas: number(&config["num_replicas"]),
        in_memory: config["storage"] == "memory",
        per_subject_max: config["max_msgs_per_subject"].as_i64().unwrap_or(-1),
        bytes_max: config["max_bytes"].as_i64().unwrap_or(-1),
        age_max_ms: number(&config["max_age"]) / 1_000_000,
        window_ms: number(&config["duplicate_window"]) / 1_000_000,
        streams: description
            .strip_prefix(DESCRIPTION)
            .and_then(|text| text.trim_end_matches(RAISED).parse().ok()),
        was_raised: description.ends_with(RAISED),
    })
}

fn no_answer(error: &async_nats::RequestError) -> ApiError {
    match error.kind() {
        async_nats::RequestErrorKind::NoResponders => ApiError::Nobody,
        _ => ApiError::NoAnswer,
    }
}

async fn request(client: &Client, subject: String, body: Bytes, ms_max: u64) -> Result<Bytes, ApiError> {
    let request = async_nats::Request::new().payload(body).timeout(Some(Duration::from_millis(ms_max)));
    let answer = client.send_request(subject, request).await.map_err(|error| no_answer(&error))?;
    check(&answer.payload)?;
    Ok(answer.payload)
}

fn check(payload: &[u8]) -> Result<(), ApiError> {
    let answer: Answer = serde_json::from_slice(payload).map_err(|_| ApiError::Malformed)?;
    answer.error.map_or(Ok(()), |failure| Err(failure.into()))
}

/// Takes what a server gives to one direct read. Each message names the one before it, and the end names the last: what comes
/// over a route between servers that broke meanwhile may have a hole.
async fn take_run(answers: &mut async_nats::Subscriber) -> Result<Run, ApiError> {
    let mut messages: Vec<Stored> = Vec::new();
    loop {
        let answer = answers.next().await.ok_or(ApiError::NoAnswer)?;
        let last = messages.last().map_or(0, |message| message.sequence);
        let follows = number(&answer, "Nats-Last-Sequence").is_none_or(|before| before == last);
        match answer.status.map(|status| status.as_u16()) {
            _ if !follows => return Err(ApiError::Malformed),
            None => messages.push(stored_directly(&answer).ok_or(ApiError::Malformed)?),
            Some(END_OF_BATCH | NOT_FOUND) => return Ok(Run { messages, is_single: false }),
            Some(_) if answer.status == Some(StatusCode::NO_RESPONDERS) => return Err(ApiError::Nobody),
            Some(_) => return Err(ApiError::Malformed),
        }
        if messages.last().is_some_and(|message| message.behind.is_none()) {
            // Nothing will say where it ends.
            return Ok(Run { messages, is_single: true });
        }
    }
}

fn number(message: &async_nats::Message, header: &str) -> Option<u64> {
    message.headers.as_ref()?.get(header)?.as_str().parse().ok()
}

/// A message as a direct read gives it: its place in headers, its payload as it is.
fn stored_directly(message: &async_nats::Message) -> Option<Stored> {
    let time = message.headers.as_ref()?.get("Nats-Time-Stamp")?;
    Some(Stored {
        sequence: number(message, "Nats-Sequence")?,
        unix_ms: unix_ms(time.as_str())?,
        behind: number(message, "Nats-Num-Pending"),
        payload: message.payload.to_vec(),
    })
}

/// Reads what a stream answers to a publish.
pub(super) fn read_ack(answer: &async_nats::Message) -> Result<Ack, ApiError> {
    if answer.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(ApiError::Nobody);
    }
    let ack: RawAck = serde_json::from_slice(&answer.payload).map_err(|_| ApiError::Malformed)?;
    match ack {
        RawAck { error: Some(failure), .. } => Err(failure.into()),
        RawAck { seq: 0, .. } => Err(ApiError::Malformed),
        RawAck { seq, duplicate, .. } => Ok(Ack { sequence: seq, repeated: duplicate }),
    }
}

/// `2026-11-21T19:55:16.123456789Z` as milliseconds since 1970; any offset other than `Z` is `None`.
fn unix_ms(text: &str) -> Option<u64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<u64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let fraction = text.get(19..)?.strip_suffix('Z')?;
    let ms = match fraction.strip_prefix('.') {
        Some(digits) => format!("{digits:0<3}").get(..3)?.parse::<u64>().ok()?,
        None => 0,
    };
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days by the civil calendar, counted from March (Howard Hinnant, "chrono-compatible date algorithms").
    let shifted = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let year_of_era = shifted % 400;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (shifted / 400 * 146_097 + day_of_era).checked_sub(719_468)?;
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) * 1_000 + ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_consumers_message_stands_is_read() {
        let at = |sequence, number, pending| Some(Delivered { sequence, number, pending });
        assert_eq!(delivered("$JS.ACK.stream.consumer.1.42.7.1763770000000000000.3"), at(42, 7, 3));
        let with_domain = "$JS.ACK.domain.hash.stream.consumer.1.42.7.1763770000000000000.3";
        assert_eq!(delivered(with_domain), at(42, 7, 3));
        assert_eq!(delivered(&format!("{with_domain}.random")), at(42, 7, 3));
        for other in ["", "$JS.ACK.", "_INBOX.x", "$JS.ACK.s.c.1.x.7.1.3", "$JS.ACK.a.b.c.d.e.f.g.h"] {
            assert_eq!(delivered(other), None, "{other}");
        }
    }

    #[test]
    fn times_are_read() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2000-03-01T00:00:01.5Z", Some(951_868_801_500)),
            ("2026-11-21T19:55:16.123456789Z", Some(1_795_290_916_123)),
            ("2024-02-29T23:59:59.999Z", Some(1_709_251_199_999)),
            ("2026-11-21T19:55:16+01:00", None),
            ("", None),
            ("nonsense", None),
        ] {
            assert_eq!(unix_ms(text), expected, "{text}");
        }
    }

    #[test]
    fn failures_are_told_apart() {
        let failure = |code: u64| format!(r#"{{"error":{{"code":1,"err_code":{code},"description":"x"}}}}"#);
        assert_eq!(check(b"{}"), Ok(()));
        assert_eq!(check(failure(NO_MESSAGE).as_bytes()), Err(ApiError::NotFound));
        assert_eq!(check(failure(WRONG_LAST_SEQUENCE).as_bytes()), Err(ApiError::Conflict));
        assert_eq!(check(failure(7).as_bytes()), Err(ApiError::Refused { code: 7, text: "x".into() }));
        assert_eq!(check(b"<html>"), Err(ApiError::Malformed));
    }
}
