//! The real program with 2,000 readers of which 100 stand still, under each policy of a namespace, while
//! others unsubscribe, subscribe again, close and vanish. Every byte of every publication is compared, and
//! nothing of it all may be left.

mod admin_support;
mod crowd_support;
mod wire_support;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use admin_support::Node;
use crowd_support::{Crowd, Heard, PATIENCE, Random, answer_to, clients_allowed, private_bytes};
use wire_support::sockets::{End, await_live};
use wire_support::websocket::{CLOSE, FIN, close_payload, frame};

const READERS: usize = 2_000;
const STOPPED: usize = 100;
const PUBLICATIONS: u64 = 100;
/// Publications that a reader who reads may be behind before the next one is made: less than a log holds.
const BEHIND_MAX: u64 = 8;
/// Tags `key` of publications.
const KEYS: u64 = 5;
const CLIENT_RECEIVE_BUFFER_BYTES: usize = 32_768;
/// Rounds until the allocator's high-water marks are reached, at least.
const WARM_ROUNDS: u64 = 2;
/// How often memory may grow by more than [`GROWTH_BYTES_MAX`] from one round to the next; a leak does it in each.
const GROWING_ROUNDS_MAX: u64 = 4;
/// What the allocator holds differs by about as much from round to round.
const GROWTH_BYTES_MAX: u64 = 4 * 1_024 * 1_024;

/// Buffers as small as they may be, so that who stops is felt at once.
const CONFIG: &str = r#"
[server]
send_buffer_bytes = 4096
receive_buffer_bytes = 4096
tcp_notsent_lowat_bytes = 4096
tcp_user_timeout_ms = 120000

[client]
close_timeout_ms = 1000
ping_interval_ms = 60000
pong_timeout_ms = 50000
"#;

/// The table of a namespace with this policy.
fn namespace(policy: &str) -> String {
    format!(
        r#"
[namespaces.{policy}]
slow_consumer = "{policy}"
history_size = 1000
history_ttl_ms = 60000
log_bytes_max = 65536
stall_ms = 1000
allow_subscribe_for_client = true
allow_subscribe_for_anonymous = true
"#
    )
}

const POLICIES: [&str; 3] = ["replay", "latest", "close"];

/// The data of the publication with this offset.
fn data(offset: u64) -> String {
    let size = 200 + (offset * 7_919) as usize % 3_500;
    let text: String =
        (0..size).map(|at| char::from(b'a' + ((offset as usize + at * at) % 26) as u8)).collect();
    format!(r#"{{"n":{offset},"text":"{text}"}}"#)
}

/// A channel and what is published to it.
struct Stream {
    channel: String,
    policy: &'static str,
    published: u64,
    epoch: String,
    data: Vec<String>,
}

impl Stream {
    fn publish(&mut self, node: &Node) {
        self.published += 1;
        let offset = self.published;
        self.data.push(data(offset));
        let (channel, text, key) = (&self.channel, &self.data[offset as usize - 1], offset % KEYS);
        let body = format!(r#"{{"channel":"{channel}","data":{text},"tags":{{"key":"k{key}"}}}}"#);
        let reply: serde_json::Value = serde_json::from_str(&node.call("publish", &body)).expect("JSON");
        assert_eq!(reply["result"]["offset"], offset);
        reply["result"]["epoch"].as_str().expect("an epoch").clone_into(&mut self.epoch);
    }

    /// The offset of a push, every byte of which must be as published.
    fn check(&self, line: &str) -> u64 {
        let before = format!(r#"{{"push":{{"channel":"{}","pub":{{"data":"#, self.channel);
        let rest = line.strip_prefix(&before).unwrap_or_else(|| panic!("not a publication: {line}"));
        let offset = rest.strip_prefix(r#"{"n":"#).and_then(|rest| rest.split(',').next()?.parse().ok());
        let offset: u64 = offset.unwrap_or_else(|| panic!("no number: {line}"));
        let text = self.data.get(offset as usize - 1).unwrap_or_else(|| panic!("made up: {line}"));
        let key = offset % KEYS;
        let end = |epoch: &str| format!(r#"{text},"offset":{offset},"tags":{{"key":"k{key}"}}{epoch}}}}}}}"#);
        // The first one of a subscription names the epoch.
        let epoch = format!(r#","epoch":"{}""#, self.epoch);
        assert!(rest == end("") || rest == end(&epoch), "{rest}");
        offset
    }
}

/// What a client has asked for last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Subscribing,
    Subscribed,
    Unsubscribing,
    Unsubscribed,
    Closing,
}

/// A reader as it should be.
#[derive(Debug)]
struct Reader {
    stage: Stage,
    /// Offset of the last publication that it has.
    last: u64,
    /// Where its subscription began.
    since: u64,
    /// The newest offset per key.
    newest: [u64; KEYS as usize],
    reads: bool,
    has_stopped: bool,
    next_id: u32,
    close_code: Option<u16>,
}

impl Reader {
    fn hear(&mut self, stream: &Stream, line: &str) {
        if line.starts_with(r#"{"push":"#) {
            assert!(!matches!(self.stage, Stage::Subscribing | Stage::Unsubscribed), "{self:?} hears {line}");
            return self.take(stream, stream.check(line));
        }
        let reply: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(reply.get("error").is_none(), "{line}");
        if let Some(result) = reply.get("subscribe") {
            self.subscribed(stream, result);
        } else if reply.get("unsubscribe").is_some() && self.stage == Stage::Unsubscribing {
            self.stage = Stage::Unsubscribed;
        }
    }

    fn subscribed(&mut self, stream: &Stream, result: &serde_json::Value) {
        let offset = result["offset"].as_u64().unwrap_or(0);
        if result["was_recovering"] == true {
            // The offset is the one that was asked from.
            assert!(result["recovered"] == true && offset == self.last, "{self:?}: {result}");
        } else {
            (self.last, self.since) = (offset, offset);
        }
        for publication in result["publications"].as_array().into_iter().flatten() {
            let offset = publication["offset"].as_u64().expect("an offset");
            assert_eq!(publication["data"].to_string(), stream.data[offset as usize - 1]);
            self.take(stream, offset);
        }
        if self.stage == Stage::Subscribing {
            self.stage = Stage::Subscribed;
        }
    }

    fn take(&mut self, stream: &Stream, offset: u64) {
        match stream.policy {
            "latest" => assert!(offset > self.last, "{offset} for {self:?}"),
            _ => assert_eq!(offset, self.last + 1, "{self:?}"),
        }
        self.last = offset;
        self.newest[(offset % KEYS) as usize] = offset;
    }

    /// Whether it has all that it is to get.
    fn is_done(&self, stream: &Stream) -> bool {
        let first = self.since.max(stream.published.saturating_sub(KEYS)) + 1;
        self.stage != Stage::Subscribed
            || (first..=stream.published).all(|offset| self.newest[(offset % KEYS) as usize] == offset)
    }
}

/// A round with one policy.
struct Round<'n> {
    node: &'n Node,
    stream: Stream,
    crowd: Crowd,
    readers: HashMap<usize, Reader>,
    random: Random,
    /// Closed with 3008, or cut because they did not take the close frame in time.
    slow: usize,
}

impl<'n> Round<'n> {
    fn new(node: &'n Node, policy: &'static str, number: u64) -> Self {
        let channel = format!("{policy}:{number}");
        let stream = Stream { channel, policy, published: 0, epoch: String::new(), data: Vec::new() };
        let mut crowd = Crowd::new(node.clients);
        crowd.receive_buffer_bytes = Some(CLIENT_RECEIVE_BUFFER_BYTES);
        let mut round =
            Self { node, stream, crowd, readers: HashMap::new(), random: Random(number), slow: 0 };
        while round.readers.len() < READERS.min(clients_allowed()) {
            round.join();
            if round.readers.len().is_multiple_of(500) {
                round.until("subscribed", |round| round.all(|reader| reader.stage == Stage::Subscribed));
            }
        }
        round
    }

    fn join(&mut self) {
        let subscribe = format!(r#"{{"id":2,"subscribe":{{"channel":"{}"}}}}"#, self.stream.channel);
        let client =
            self.crowd.open("/connection/websocket", &format!("{}\n{subscribe}", r#"{"id":1,"connect":{}}"#));
        let reader = Reader {
            stage: Stage::Subscribing,
            last: 0,
            since: 0,
            newest: [0; KEYS as usize],
            reads: true,
            has_stopped: false,
            next_id: 3,
            close_code: None,
        };
        self.readers.insert(client, reader);
    }

    fn all(&self, holds: impl Fn(&Reader) -> bool) -> bool {
        self.readers.values().all(holds)
    }

    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < end, "{}: {what}: not in time", self.stream.channel);
            self.listen(Duration::from_millis(20));
        }
    }

    fn listen(&mut self, wait: Duration) {
        for (client, heard) in self.crowd.listen(wait) {
            let Some(reader) = self.readers.get_mut(&client) else { continue };
            match heard {
                Heard::Frame(CLOSE, payload) => {
                    reader.close_code = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
                }
                Heard::Frame(opcode, payload) => match answer_to(opcode, &payload) {
                    Some(pong) => self.crowd.send(client, &pong),
                    None => {
                        let text = String::from_utf8(payload).expect("UTF-8");
                        text.lines().for_each(|line| reader.hear(&self.stream, line));
                    }
                },
                Heard::Ended(how) => {
                    let reader = self.readers.remove(&client).expect("it is there");
                    self.ended(&reader, how);
                }
            }
        }
    }

    /// A reader that read all the time sees an end only when it asked for it, and then an orderly one.
    fn ended(&mut self, reader: &Reader, how: End) {
        match (reader.stage, reader.close_code) {
            (_, Some(3_008)) if self.stream.policy == "close" && reader.has_stopped => self.slow += 1,
            (Stage::Closing, Some(1_000)) => assert_eq!(how, End::Fin, "{reader:?}"),
            // Did not take what was before the close frame in time.
            (Stage::Closing, None) if reader.has_stopped => {}
            (_, None) if self.stream.policy == "close" && reader.has_stopped => self.slow += 1,
            _ => panic!("{}: {how:?} for {reader:?}", self.stream.channel),
        }
    }

    fn some(&mut self, count: usize, holds: impl Fn(&Reader) -> bool) -> Vec<usize> {
        let mut some: Vec<usize> =
            self.readers.iter().filter(|(_, reader)| holds(reader)).map(|(client, _)| *client).collect();
        some.sort_unstable();
        (0..count.min(some.len())).map(|_| some.swap_remove(self.random.below(some.len()))).collect()
    }

    fn set_reading(&mut self, client: usize, reads: bool) {
        let reader = self.readers.get_mut(&client).expect("chosen among them");
        reader.reads = reads;
        reader.has_stopped |= !reads;
        self.crowd.set_reading(client, reads);
    }

    fn command(&mut self, client: usize, method: &str, more: &str, stage: Stage) {
        let reader = self.readers.get_mut(&client).expect("chosen among them");
        let (id, channel) = (reader.next_id, &self.stream.channel);
        reader.next_id += 1;
        reader.stage = stage;
        self.crowd.text(client, &format!(r#"{{"id":{id},"{method}":{{"channel":"{channel}"{more}}}}}"#));
    }

    /// Some leave the channel, those that left come back, some close, some vanish, some stop or go on.
    fn disturb(&mut self) {
        for client in self.some(usize::MAX, |reader| reader.stage == Stage::Unsubscribed) {
            let (last, epoch) = (self.readers[&client].last, &self.stream.epoch);
            let more = format!(r#","recover":true,"offset":{last},"epoch":"{epoch}""#);
            self.command(client, "subscribe", &more, Stage::Subscribing);
        }
        for client in self.some(8, |reader| reader.stage == Stage::Subscribed) {
            self.command(client, "unsubscribe", "", Stage::Unsubscribing);
        }
        for client in self.some(3, |reader| reader.stage == Stage::Subscribed) {
            self.readers.get_mut(&client).expect("chosen among them").stage = Stage::Closing;
            self.crowd.send(client, &frame(FIN | CLOSE, &close_payload(1_000, b"")));
            self.join();
        }
        for client in self.some(3, |_| true) {
            self.readers.remove(&client);
            self.crowd.drop_member(client);
            self.join();
        }
        for client in self.some(4, |reader| !reader.reads) {
            self.set_reading(client, true);
        }
        let missing = STOPPED.saturating_sub(self.readers.values().filter(|reader| !reader.reads).count());
        for client in self.some(missing, |reader| reader.reads && reader.stage == Stage::Subscribed) {
            self.set_reading(client, false);
        }
    }

    fn play(mut self) -> usize {
        for step in 0..PUBLICATIONS {
            self.stream.publish(self.node);
            if step % 4 == 0 {
                self.disturb();
            }
            self.until("kept up", |round| {
                let due = round.stream.published.saturating_sub(BEHIND_MAX);
                round.all(|reader| !reader.reads || reader.stage != Stage::Subscribed || reader.last >= due)
            });
        }
        for client in self.some(usize::MAX, |reader| !reader.reads) {
            self.set_reading(client, true);
        }
        self.until("caught up", |round| round.all(|reader| reader.is_done(&round.stream)));
        for client in self.some(usize::MAX, |reader| reader.stage != Stage::Closing) {
            self.readers.get_mut(&client).expect("chosen among them").stage = Stage::Closing;
            self.crowd.send(client, &frame(FIN | CLOSE, &close_payload(1_000, b"")));
        }
        self.until("closed", |round| round.readers.is_empty());
        self.node.call("history_remove", &format!(r#"{{"channel":"{}"}}"#, self.stream.channel));
        self.slow
    }
}

#[test]
fn every_byte_is_right_under_each_policy_and_nothing_is_left() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("ringmain.toml");
    std::fs::write(&file, CONFIG.to_owned() + &POLICIES.map(namespace).concat()).expect("a file");
    let node = Node::start_large(&["--demo", "--shards=2", "--config", file.to_str().expect("UTF-8")], &[]);
    let mut memory: Vec<u64> = Vec::new();
    let mut slow = 0;
    for number in 0.. {
        for policy in POLICIES {
            let begun = Instant::now();
            slow += Round::new(&node, policy, number).play();
            for metric in ["connections", "subscriptions", "own_queue_bytes", "log_bytes"] {
                node.await_metric(metric, 0);
            }
            await_live(node.clients.port(), 0);
            println!("{policy} {number}: {:.1?}", begun.elapsed());
        }
        let after = private_bytes(node.pid());
        let grows = memory.iter().max().is_none_or(|most| after >= most + GROWTH_BYTES_MAX);
        memory.push(after);
        if number >= WARM_ROUNDS && !grows {
            break;
        }
        assert!(number < WARM_ROUNDS + GROWING_ROUNDS_MAX, "memory grows: {memory:?}");
    }
    println!("{memory:?} bytes, {slow} closed as slow");
    // Otherwise the sockets held everything, and nobody was ever behind.
    assert!(node.metric("sends_short_total", "") > 1_000);
    assert!(
        node.metric("dropped_total", r#"reason="skipped""#) > 0,
        "nobody fell out of a log under `latest`"
    );
    assert!(slow > STOPPED, "{slow} were closed as slow");
}
