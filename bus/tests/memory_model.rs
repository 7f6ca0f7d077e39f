//! The embedded bus against a naive model: vectors, no ring, no index, no sweep.
//!
//! With a pool larger than anything kept, every answer must equal the model's. With a small pool, what is
//! kept may be less, yet is always the newest publications without a hole, within the maximum.

use std::collections::HashMap;

use proptest::prelude::*;
use ringmain_bus::memory::{EmbeddedBus, MemoryOptions};
use ringmain_bus::{
    Accepted, Bus, BusError, Channel, ChannelId, ChannelOptions, Epoch, Event, HistoryQuery, Page, Position,
    PublicationId, Since, Token,
};
use ringmain_proto::message::Publication;
use ringmain_proto::record::records;
use ringmain_proto::time::Now;

const TICK_MS: u64 = 64;
const KEYS_MAX: usize = 4;
const KEYS_WINDOW_MS: u64 = 10_000;

#[derive(Clone, Debug)]
enum Operation {
    Open,
    Close,
    Publish { bytes: usize, key: Option<u8> },
    Read { since: Option<(u64, GivenEpoch)>, limit: u32, reverse: bool },
    Records { after: u64, bytes_max: usize },
    Clear,
    Forget,
    Pass { ms: u64 },
    Poll,
}

#[derive(Clone, Copy, Debug)]
enum GivenEpoch {
    Absent,
    Right,
    Wrong,
}

fn operation() -> impl Strategy<Value = Operation> {
    let epoch = prop_oneof![
        3 => Just(GivenEpoch::Absent),
        3 => Just(GivenEpoch::Right),
        1 => Just(GivenEpoch::Wrong),
    ];
    let since = proptest::option::of((0u64..40, epoch));
    let key = proptest::option::weighted(0.2, 0u8..6);
    prop_oneof![
        2 => Just(Operation::Open),
        2 => Just(Operation::Close),
        12 => (0usize..200, key).prop_map(|(bytes, key)| Operation::Publish { bytes, key }),
        5 => (since, 0u32..10, any::<bool>())
            .prop_map(|(since, limit, reverse)| Operation::Read { since, limit, reverse }),
        3 => (0u64..40, 0usize..1500)
            .prop_map(|(after, bytes_max)| Operation::Records { after, bytes_max }),
        1 => Just(Operation::Clear),
        1 => Just(Operation::Forget),
        3 => (0u64..3_000).prop_map(|ms| Operation::Pass { ms }),
        2 => Just(Operation::Poll),
    ]
}

/// Options by channel: they differ in everything, and the size of one changes on the way.
fn options_of(channel: u32, step: usize) -> ChannelOptions {
    match channel {
        0 => ChannelOptions { history_size: 5, history_ttl_ms: 2_000, meta_ttl_ms: 4_000 },
        1 => ChannelOptions { history_size: 1, history_ttl_ms: 60_000, meta_ttl_ms: 60_000 },
        2 => {
            let history_size = if (step / 20).is_multiple_of(2) { 12 } else { 3 };
            ChannelOptions { history_size, history_ttl_ms: 5_000, meta_ttl_ms: 1_000 }
        }
        _ => ChannelOptions::EPHEMERAL,
    }
}

struct Kept {
    offset: u64,
    data: Vec<u8>,
    at_ms: u64,
}

#[derive(Default)]
struct Stream {
    epoch: Epoch,
    top: u64,
    kept: Vec<Kept>,
    ttl_ms: u64,
    open: bool,
    last_use_ms: u64,
    meta_ms: u64,
}

fn is_older(now_ms: u64, at_ms: u64, ms: u64) -> bool {
    now_ms / TICK_MS - at_ms / TICK_MS > ms.div_ceil(TICK_MS)
}

impl Stream {
    fn expire(&mut self, now_ms: u64) {
        self.kept.retain(|kept| !is_older(now_ms, kept.at_ms, self.ttl_ms));
    }

    fn floor(&self) -> u64 {
        self.kept.first().map_or(self.top, |kept| kept.offset - 1)
    }

    fn position(&self) -> Position {
        Position::new(self.epoch, self.top)
    }

    fn is_idle(&self, now_ms: u64) -> bool {
        !self.open
            && self.kept.is_empty()
            && (self.epoch.is_none() || is_older(now_ms, self.last_use_ms, self.meta_ms))
    }
}

/// Both, side by side.
struct Pair {
    bus: EmbeddedBus,
    streams: HashMap<u32, Stream>,
    keys: Vec<(u64, u32, u8, Accepted)>,
    epochs_seen: Vec<Epoch>,
    now_ms: u64,
    published: u64,
    /// The pool is never full: every answer equals the model's.
    exact: bool,
}

impl Pair {
    fn new(history_bytes_max: usize, exact: bool) -> Pair {
        let options = MemoryOptions {
            history_bytes_max,
            idempotency_keys_max: KEYS_MAX,
            idempotency_window_ms: KEYS_WINDOW_MS,
            ..MemoryOptions::new(42)
        };
        Pair {
            bus: EmbeddedBus::new(&options),
            streams: HashMap::new(),
            keys: Vec::new(),
            epochs_seen: Vec::new(),
            now_ms: 1_000_000,
            published: 0,
            exact,
        }
    }

    fn now(&self) -> Now {
        Now { mono_ms: self.now_ms, unix_ms: 0 }
    }

    /// Brings the model's stream to what a command on this channel finds, with the epoch the bus drew.
    fn touch(&mut self, channel: u32, options: &ChannelOptions) {
        let now_ms = self.now_ms;
        let epoch = self.bus.position(ChannelId(channel)).unwrap().epoch;
        let stream = self.streams.entry(channel).or_default();
        if stream.epoch.is_none() {
            assert!(!self.epochs_seen.contains(&epoch), "an epoch was used twice");
            self.epochs_seen.push(epoch);
            stream.epoch = epoch;
        }
        assert_eq!(stream.epoch, epoch);
        stream.last_use_ms = now_ms;
        stream.meta_ms = options.meta_ttl_ms.max(options.history_ttl_ms);
        stream.expire(now_ms);
    }

    fn apply(&mut self, step: usize, channel: u32, operation: &Operation) {
        let options = options_of(channel, step);
        let name = format!("room:{channel}");
        let address = Channel { id: ChannelId(channel), name: &name, options: &options };
        let token = Token(step as u64);
        let now = self.now();
        match *operation {
            Operation::Open => {
                let position = self.bus.open(now, token, address).done().unwrap().unwrap();
                if options.is_positioned() {
                    self.touch(channel, &options);
                }
                let stream = self.streams.entry(channel).or_default();
                stream.open = true;
                assert_eq!(position, stream.position());
            }
            Operation::Close => {
                self.bus.close(now, address.id);
                if let Some(stream) = self.streams.get_mut(&channel).filter(|stream| stream.open) {
                    stream.open = false;
                    stream.last_use_ms = self.now_ms;
                }
            }
            Operation::Publish { bytes, key } => self.publish(address, bytes, key),
            Operation::Read { since, limit, reverse } => self.read(address, since, limit, reverse),
            Operation::Records { after, bytes_max } => self.records(address, after, bytes_max),
            Operation::Clear => {
                let position = self.bus.clear(now, token, address).done().unwrap().unwrap();
                if options.is_positioned() {
                    self.touch(channel, &options);
                    self.streams.get_mut(&channel).unwrap().kept.clear();
                }
                assert_eq!(position, self.streams.entry(channel).or_default().position());
            }
            Operation::Forget => {
                self.bus.forget(address.id);
                self.streams.remove(&channel);
            }
            Operation::Pass { ms } => self.now_ms += ms,
            Operation::Poll => self.poll(),
        }
        self.check_idle(channel);
    }

    fn check_idle(&mut self, channel: u32) {
        let (now, now_ms) = (self.now(), self.now_ms);
        let stream = self.streams.entry(channel).or_default();
        if self.bus.is_idle(now, ChannelId(channel)) {
            assert!(self.exact || !stream.open);
            // What has expired and was not looked at since still counts as held by the bus.
            stream.expire(now_ms);
            assert!(!self.exact || stream.is_idle(now_ms));
        }
    }

    fn publish(&mut self, address: Channel<'_>, bytes: usize, key: Option<u8>) {
        let (channel, now) = (address.id.0, self.now());
        self.published += 1;
        let mut data = self.published.to_le_bytes().to_vec();
        data.resize(8 + bytes, channel as u8);
        let text = key.map(|key| key.to_string());
        let id = text
            .as_deref()
            .map_or(PublicationId::Node { incarnation: 1, sequence: self.published }, PublicationId::Key);
        let publication = Publication { data: &data, offset: 99, ..Publication::default() };
        let accepted =
            self.bus.publish(now, Token(self.published), address, id, &publication).done().unwrap().unwrap();
        if let Some(first) = key.and_then(|key| self.find_key(channel, key)) {
            assert_eq!(accepted, Accepted { repeated: true, ..first });
            return;
        }
        if address.options.is_positioned() {
            self.touch(channel, address.options);
            let (now_ms, size) = (self.now_ms, address.options.history_size as usize);
            let stream = self.streams.get_mut(&channel).unwrap();
            stream.ttl_ms = address.options.history_ttl_ms;
            stream.expire(now_ms);
            stream.top += 1;
            stream.kept.push(Kept { offset: stream.top, data, at_ms: now_ms });
            let surplus = stream.kept.len().saturating_sub(size);
            stream.kept.drain(..surplus);
        }
        let stream = self.streams.entry(channel).or_default();
        let expected = Accepted { position: stream.position(), repeated: false };
        assert_eq!(accepted, expected);
        if let Some(key) = key {
            self.keys.retain(|(_, other, known, _)| (*other, *known) != (channel, key));
            self.keys.push((self.now_ms, channel, key, accepted));
            let surplus = self.keys.len().saturating_sub(KEYS_MAX);
            self.keys.drain(..surplus);
        }
    }

    fn find_key(&mut self, channel: u32, key: u8) -> Option<Accepted> {
        let now_ms = self.now_ms;
        self.keys.retain(|(at_ms, ..)| now_ms - at_ms < KEYS_WINDOW_MS);
        let epoch = self.streams.get(&channel).map_or(Epoch::NONE, |stream| stream.epoch);
        let (.., accepted) =
            self.keys.iter().find(|(_, other, known, _)| (*other, *known) == (channel, key))?;
        (accepted.position.epoch == epoch).then_some(*accepted)
    }

    fn read(&mut self, address: Channel<'_>, since: Option<(u64, GivenEpoch)>, limit: u32, reverse: bool) {
        let channel = address.id.0;
        let current = self.bus.position(address.id).map_or(Epoch::NONE, |position| position.epoch);
        let since = since.map(|(offset, epoch)| {
            let epoch = match epoch {
                GivenEpoch::Absent => None,
                GivenEpoch::Right if !current.is_none() => Some(current),
                GivenEpoch::Right => None,
                GivenEpoch::Wrong => Some(Epoch::new(current.get() ^ 1)),
            };
            Since { offset, epoch }
        });
        let query = HistoryQuery { since, limit, reverse };
        let mut got = Vec::new();
        let mut out =
            |publication: &Publication<'_>| got.push((publication.offset, publication.data.to_vec()));
        let answer = self.bus.read(self.now(), Token(0), address, &query, &mut out).done().unwrap();
        if !address.options.is_positioned() {
            assert_eq!(answer, Ok(Page { top: Position::NONE, floor: 0, more: false }));
            assert!(got.is_empty());
            return;
        }
        self.touch(channel, address.options);
        let stream = &self.streams[&channel];
        if since.and_then(|since| since.epoch).is_some_and(|epoch| epoch != stream.epoch) {
            assert_eq!(answer, Err(BusError::UnrecoverableEpoch { current: stream.position() }));
            assert!(got.is_empty());
            return;
        }
        let page = answer.unwrap();
        assert_eq!(page.top, stream.position());
        assert!(page.floor >= stream.floor());
        let floor = if self.exact { stream.floor() } else { page.floor };
        assert_eq!(page.floor, floor);
        let mut expected: Vec<_> = stream.kept.iter().filter(|kept| kept.offset > floor).collect();
        if reverse {
            expected.reverse();
            expected.retain(|kept| since.is_none_or(|since| kept.offset < since.offset));
        } else {
            expected.retain(|kept| since.is_none_or(|since| kept.offset > since.offset));
        }
        assert_eq!(page.more, expected.len() > limit as usize);
        let expected: Vec<_> =
            expected.iter().take(limit as usize).map(|kept| (kept.offset, kept.data.clone())).collect();
        assert_eq!(got, expected);
    }

    fn records(&mut self, address: Channel<'_>, after: u64, bytes_max: usize) {
        let now = self.now();
        let Some(run) = self.bus.records(now, address.id, after, bytes_max) else {
            assert!(self.streams.get(&address.id.0).is_none_or(|stream| stream.epoch.is_none()));
            return;
        };
        let stream = self.streams.get_mut(&address.id.0).unwrap();
        stream.expire(self.now_ms);
        assert_eq!(run.top, stream.position());
        assert!(if self.exact { run.floor == stream.floor() } else { run.floor >= stream.floor() });
        let got: Vec<_> = records(run.first)
            .chain(records(run.second))
            .map(|publication| (publication.offset, publication.data.to_vec()))
            .collect();
        let from = after.max(run.floor);
        assert_eq!(run.last, from + got.len() as u64);
        let expected: Vec<_> = stream
            .kept
            .iter()
            .filter(|kept| kept.offset > from)
            .take(got.len())
            .map(|kept| (kept.offset, kept.data.clone()))
            .collect();
        assert_eq!(got, expected);
        assert!(from >= run.top.offset || !got.is_empty(), "at least one record where there is one");
        assert!(got.len() <= 1 || run.first.len() + run.second.len() <= bytes_max);
    }

    fn poll(&mut self) {
        let (now, now_ms) = (self.now(), self.now_ms);
        let mut idle = Vec::new();
        self.bus.poll(now, &mut |event| match event {
            Event::Idle { channel } => idle.push(channel),
            other => panic!("{other:?}"),
        });
        for channel in idle {
            let stream = self.streams.get_mut(&channel.0).expect("a vacant slot is not idle");
            stream.expire(now_ms);
            assert!(!stream.open && (!self.exact || stream.is_idle(now_ms)));
            assert!(self.bus.is_idle(now, channel));
        }
    }
}

fn operations() -> impl Strategy<Value = Vec<(u32, Operation)>> {
    prop::collection::vec((0u32..4, operation()), 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_bus_with_room_answers_as_the_model(operations in operations()) {
        let mut pair = Pair::new(1 << 20, true);
        for (step, (channel, operation)) in operations.iter().enumerate() {
            pair.apply(step, *channel, operation);
        }
    }

    #[test]
    fn a_bus_without_room_keeps_less_and_never_wrong(
        operations in operations(),
        history_bytes_max in 0usize..3000,
    ) {
        let mut pair = Pair::new(history_bytes_max, false);
        for (step, (channel, operation)) in operations.iter().enumerate() {
            pair.apply(step, *channel, operation);
            prop_assert!(pair.bus.usage().history_bytes <= history_bytes_max);
        }
    }

    #[test]
    fn what_is_forgotten_gives_all_memory_back(operations in operations()) {
        let mut pair = Pair::new(3000, false);
        for (step, (channel, operation)) in operations.iter().enumerate() {
            pair.apply(step, *channel, operation);
        }
        for channel in 0..4 {
            pair.bus.forget(ChannelId(channel));
        }
        prop_assert_eq!(pair.bus.usage().history_bytes, 0);
        prop_assert_eq!(pair.bus.usage().histories, 0);
    }
}
