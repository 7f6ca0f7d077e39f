//! The embedded bus at its maxima: what happens at the maximum, one above it, and what is counted.

use ringmain_bus::memory::{
    EVICTIONS_PER_PUBLISH_MAX, EmbeddedBus, MemoryCounters, MemoryOptions, SWEEP_PERIOD_MS,
    SWEEP_SLOTS_PER_POLL_MAX,
};
use ringmain_bus::{
    Accepted, Bus, Channel, ChannelId, ChannelOptions, Event, HistoryQuery, IDEMPOTENCY_KEY_BYTES_MAX, Page,
    PublicationId, PublishError, Token,
};
use ringmain_proto::message::Publication;
use ringmain_proto::record::RECORD_HEADER_BYTES;
use ringmain_proto::time::Now;

const OPTIONS: ChannelOptions =
    ChannelOptions { history_size: 1000, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };

/// A data length whose record is a multiple of 16: rings grow in such steps.
const DATA_BYTES: usize = 128 - RECORD_HEADER_BYTES;

fn at(mono_ms: u64) -> Now {
    Now { mono_ms, unix_ms: 0 }
}

fn bus_with(change: impl FnOnce(&mut MemoryOptions)) -> EmbeddedBus {
    let mut options = MemoryOptions::new(1);
    change(&mut options);
    EmbeddedBus::new(&options)
}

fn channel(id: u32) -> Channel<'static> {
    Channel { id: ChannelId(id), name: "room:x", options: &OPTIONS }
}

fn publish_as(
    bus: &mut EmbeddedBus,
    now: Now,
    channel: Channel<'_>,
    id: PublicationId<'_>,
    bytes: usize,
) -> Result<Accepted, PublishError> {
    let data = vec![b'x'; bytes];
    let publication = Publication { data: &data, ..Publication::default() };
    bus.publish(now, Token(0), channel, id, &publication).done().expect("the embedded bus answers inline")
}

fn publish(bus: &mut EmbeddedBus, mono_ms: u64, id: u32, bytes: usize) -> Accepted {
    let name = PublicationId::Node { incarnation: 1, sequence: 0 };
    publish_as(bus, at(mono_ms), channel(id), name, bytes).expect("below every limit")
}

fn page(bus: &mut EmbeddedBus, mono_ms: u64, id: u32) -> Page {
    let answer = bus.read(at(mono_ms), Token(0), channel(id), &HistoryQuery::TOP, &mut |_| {});
    answer.done().expect("inline").expect("no epoch was claimed")
}

fn kept(bus: &mut EmbeddedBus, mono_ms: u64, id: u32) -> u64 {
    let page = page(bus, mono_ms, id);
    page.top.offset - page.floor
}

#[test]
fn a_record_at_the_maximum_is_taken_and_one_byte_more_refused() {
    let mut bus = bus_with(|options| options.record_bytes_max = 200);
    let name = PublicationId::Node { incarnation: 1, sequence: 0 };
    let fits = 200 - RECORD_HEADER_BYTES;
    assert!(publish_as(&mut bus, at(0), channel(0), name, fits).is_ok());
    let refused = publish_as(&mut bus, at(0), channel(0), name, fits + 1);
    assert_eq!(refused, Err(PublishError::TooLarge { bytes: 201, bytes_max: 200 }));
    assert_eq!(bus.counters(), MemoryCounters { published: 1, refused: 1, ..MemoryCounters::default() });
    assert_eq!(page(&mut bus, 0, 0).top.offset, 1, "a refused publication takes no offset");
}

#[test]
fn a_key_at_the_maximum_is_taken_and_one_byte_more_refused() {
    let mut bus = bus_with(|_| ());
    let longest = "k".repeat(IDEMPOTENCY_KEY_BYTES_MAX);
    let longer = "k".repeat(IDEMPOTENCY_KEY_BYTES_MAX + 1);
    assert!(publish_as(&mut bus, at(0), channel(0), PublicationId::Key(&longest), 10).is_ok());
    let refused = publish_as(&mut bus, at(0), channel(0), PublicationId::Key(&longer), 10);
    assert_eq!(refused, Err(PublishError::KeyTooLong { bytes: IDEMPOTENCY_KEY_BYTES_MAX + 1 }));
    assert_eq!(bus.counters().refused, 1);
}

#[test]
fn the_key_window_at_its_size_repeats_and_above_it_publishes_again() {
    let mut bus = bus_with(|options| options.idempotency_keys_max = 2);
    let mut offset = |key| {
        let accepted = publish_as(&mut bus, at(0), channel(0), PublicationId::Key(key), 10).unwrap();
        (accepted.position.offset, accepted.repeated)
    };
    assert_eq!(offset("one"), (1, false));
    assert_eq!(offset("two"), (2, false));
    assert_eq!(offset("one"), (1, true));
    assert_eq!(offset("three"), (3, false));
    assert_eq!(offset("two"), (2, true));
    assert_eq!(offset("one"), (4, false));
    assert_eq!((bus.counters().keys_evicted, bus.counters().repeated), (2, 2));
    assert_eq!(bus.usage().keys, 2);
}

/// Bytes of a channel with one publication of [`DATA_BYTES`].
fn footprint_of_one() -> usize {
    let mut bus = bus_with(|_| ());
    publish(&mut bus, 0, 0, DATA_BYTES);
    bus.usage().history_bytes
}

#[test]
fn a_pool_at_its_maximum_holds_and_one_byte_less_evicts() {
    let exact = 4 * footprint_of_one();
    for (history_bytes_max, evicted) in [(exact, 0), (exact - 1, 1)] {
        let mut bus = bus_with(|options| options.history_bytes_max = history_bytes_max);
        for id in 0..4 {
            publish(&mut bus, u64::from(id) * 1000, id, DATA_BYTES);
        }
        assert_eq!(bus.counters().histories_evicted, evicted, "{history_bytes_max}");
        assert_eq!(bus.counters().publications_evicted, evicted);
        assert_eq!(bus.usage().histories as u64, 4 - evicted);
        assert!(bus.usage().history_bytes <= history_bytes_max);
    }
}

#[test]
fn the_channel_used_longest_ago_goes_first_and_keeps_its_position() {
    let mut bus = bus_with(|options| options.history_bytes_max = 4 * footprint_of_one());
    for (mono_ms, id) in [(0, 0), (1000, 1), (2000, 2), (3000, 3)] {
        publish(&mut bus, mono_ms, id, DATA_BYTES);
    }
    // A use of channel 0 leaves 1 as the one used longest ago.
    page(&mut bus, 4000, 0);
    let before = page(&mut bus, 4000, 1).top;
    page(&mut bus, 5000, 0);
    page(&mut bus, 5000, 2);
    page(&mut bus, 5000, 3);
    publish(&mut bus, 6000, 4, DATA_BYTES);
    let counts: Vec<u64> = (0..5).map(|id| kept(&mut bus, 6000, id)).collect();
    assert_eq!(counts, [1, 0, 1, 1, 1]);
    assert_eq!(page(&mut bus, 6000, 1).top, before);
}

#[test]
fn a_channel_alone_in_a_full_pool_cuts_its_own_oldest() {
    let mut bus = bus_with(|options| options.history_bytes_max = 2000);
    for _ in 0..100 {
        publish(&mut bus, 0, 0, DATA_BYTES);
        assert!(bus.usage().history_bytes <= 2000);
    }
    let kept = kept(&mut bus, 0, 0);
    assert!((3..15).contains(&kept), "{kept}");
    assert_eq!(bus.counters().publications_cut, 100 - kept);
    assert_eq!(bus.counters().publications_unkept, 0);
}

#[test]
fn a_publication_larger_than_the_pool_is_delivered_and_not_kept() {
    let mut bus = bus_with(|options| options.history_bytes_max = 1000);
    publish(&mut bus, 0, 1, 10);
    publish(&mut bus, 0, 0, 10);
    let accepted = publish(&mut bus, 0, 0, 1000);
    assert_eq!(accepted.position.offset, 2);
    assert_eq!(bus.counters().publications_unkept, 1);
    assert_eq!(page(&mut bus, 0, 0).floor, 2, "a position before it is not recoverable");
    assert_eq!(bus.counters().histories_evicted, 0, "nobody else pays for what could never fit");
    publish(&mut bus, 0, 0, 10);
    assert_eq!(page(&mut bus, 0, 0).floor, 2);
    assert_eq!(kept(&mut bus, 0, 0), 1);
}

#[test]
fn evictions_for_one_publication_are_bounded() {
    let one = footprint_of_one();
    let holders = 2 * EVICTIONS_PER_PUBLISH_MAX as u32;
    let mut bus = bus_with(|options| options.history_bytes_max = one * holders as usize);
    for id in 0..holders {
        publish(&mut bus, 0, id, DATA_BYTES);
    }
    // Needs far more than the allowed number of evictions gives.
    publish(&mut bus, 1000, holders, one * (holders as usize - 2));
    assert_eq!(bus.counters().histories_evicted, EVICTIONS_PER_PUBLISH_MAX as u64);
    assert_eq!(bus.counters().publications_unkept, 1);
    // The next one finds the room that was made, and the rest is evicted.
    publish(&mut bus, 2000, holders, one * (holders as usize - 2));
    assert_eq!(kept(&mut bus, 2000, holders), 1);
    assert!(bus.usage().history_bytes <= one * holders as usize);
}

/// Polls at its deadlines until `until_ms`; returns the channels named idle and the most in one poll.
fn sweep(bus: &mut EmbeddedBus, until_ms: u64) -> (Vec<ChannelId>, usize) {
    let (mut idle, mut most) = (Vec::new(), 0);
    while let Some(due) = bus.next_deadline().filter(|due| *due <= until_ms) {
        let before = idle.len();
        bus.poll(at(due), &mut |event| match event {
            Event::Idle { channel } => idle.push(channel),
            other => panic!("{other:?}"),
        });
        most = most.max(idle.len() - before);
    }
    (idle, most)
}

#[test]
fn the_sweep_returns_memory_then_names_the_idle_within_its_period() {
    let mut bus = bus_with(|_| ());
    let channels = 5000;
    for id in 0..channels {
        publish(&mut bus, 0, id, DATA_BYTES);
    }
    let (idle, _) = sweep(&mut bus, OPTIONS.history_ttl_ms);
    assert_eq!((idle.len(), bus.usage().histories), (0, channels as usize), "nothing before its time");
    sweep(&mut bus, OPTIONS.history_ttl_ms + SWEEP_PERIOD_MS + 2000);
    assert_eq!((bus.usage().histories, bus.usage().history_bytes), (0, 0));
    assert_eq!(bus.counters().expired, u64::from(channels));
    // One channel is open: it is never idle.
    let open = bus.open(at(OPTIONS.meta_ttl_ms - 1000), Token(0), channel(7));
    assert_eq!(open.done().unwrap().unwrap().offset, 1);
    let (mut idle, most) = sweep(&mut bus, OPTIONS.meta_ttl_ms + SWEEP_PERIOD_MS + 2000);
    assert!(most <= SWEEP_SLOTS_PER_POLL_MAX, "{most}");
    idle.sort_unstable();
    idle.dedup();
    let expected: Vec<_> = (0..channels).filter(|id| *id != 7).map(ChannelId).collect();
    assert_eq!(idle, expected);
}

#[test]
fn a_forgotten_channel_starts_another_life() {
    let mut bus = bus_with(|_| ());
    let key = PublicationId::Key("k");
    let first = publish_as(&mut bus, at(0), channel(0), key, 10).unwrap();
    bus.forget(ChannelId(0));
    assert!(bus.is_idle(at(0), ChannelId(0)));
    let second = publish_as(&mut bus, at(0), channel(0), key, 10).unwrap();
    assert_ne!(first.position.epoch, second.position.epoch);
    assert_eq!((second.position.offset, second.repeated), (1, false), "the key died with the position");
    let third = publish_as(&mut bus, at(0), channel(0), key, 10).unwrap();
    assert_eq!((third.position, third.repeated), (second.position, true));
}

#[test]
fn epochs_of_two_starts_differ() {
    let mut epochs = std::collections::HashSet::new();
    for seed in 0..20 {
        let mut bus = EmbeddedBus::new(&MemoryOptions::new(seed));
        for id in 0..100 {
            assert!(epochs.insert(publish(&mut bus, 0, id, 1).position.epoch));
        }
    }
}
