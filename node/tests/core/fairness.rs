//! A fan-out to 100,000 keeps nobody else waiting: turns stay in their budget, and what others are owed goes
//! before the rest of the pass.

use ringmain::core::api::{Call, ControlCommand};
use ringmain::core::engine::{Effect, Engine, Slot, TurnBudget};
use ringmain::core::{Core, CoreOptions};
use ringmain_proto::time::Now;

use crate::harness::START_UNIX_MS;
use crate::protocol::config;

const SUBSCRIBERS: u32 = 100_000;
/// What the loop allows a turn.
const BUDGET: TurnBudget = TurnBudget { sends_max: 512, background_max: 128, bytes_max: 4 * 1024 * 1024 };
/// The replies of a turn where a fan-out waits.
const REPLIES: usize = BUDGET.sends_max - BUDGET.background_max;
/// Beside a ping a turn and what is rounded down, every turn delivers its share.
const TURNS_MAX: usize = SUBSCRIBERS as usize / BUDGET.background_max * 3 / 2;
/// The last send of a turn may go beyond its bytes by what one send may hold.
const SEND_BYTES_MAX: usize = 64 * 1024;
const NOW: Now = Now { mono_ms: 1_000, unix_ms: START_UNIX_MS };
const PING: [u8; 6] = [0x89, 0x80, 0, 0, 0, 0];
const PONG: [u8; 2] = [0x8a, 0];

/// A shard whose sockets take everything.
struct Shard {
    core: Core,
    slots: Slot,
}

/// The sends of a turn: to whom, and what.
type Sent = Vec<(Slot, Vec<u8>)>;

impl Shard {
    /// A shard with `subscribers` of room:large; the first slots are theirs.
    fn new(subscribers: u32) -> Self {
        let mut config = config();
        for namespace in config.namespaces.values_mut() {
            namespace.join_leave = false;
            namespace.presence = false;
        }
        let options = CoreOptions {
            shard: 0,
            shards: 1,
            config: config.into(),
            seed: 1,
            proxy_listeners: vec![false],
            version: "0.0.0".into(),
            started_unix_ms: START_UNIX_MS,
            assets: [].into(),
        };
        let mut shard = Self { core: Core::new(options, NOW).expect("the configuration is good"), slots: 0 };
        for _ in 0..subscribers {
            shard.connect("room:large");
            if shard.slots.is_multiple_of(100) {
                shard.rest();
            }
        }
        shard.rest();
        shard
    }

    /// A connection that is subscribed to `channel`.
    fn connect(&mut self, channel: &str) -> Slot {
        let slot = self.slots;
        self.slots += 1;
        self.core.accept(slot, 0, NOW);
        let mut upgrade = *b"GET /connection/websocket HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n\
            Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
            Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        self.core.input(slot, &mut upgrade, NOW);
        let commands = format!(
            "{}\n{}",
            r#"{"id":1,"connect":{}}"#,
            format_args!(r#"{{"id":2,"subscribe":{{"channel":"{channel}"}}}}"#)
        );
        // Masked with zeroes.
        let mut frame = vec![0x81, 0x80 | commands.len() as u8, 0, 0, 0, 0];
        frame.extend_from_slice(commands.as_bytes());
        self.core.input(slot, &mut frame, NOW);
        slot
    }

    fn publish(&mut self, channel: &str, bytes: usize) {
        let call = Call::Publish {
            channel: channel.into(),
            data: format!(r#""{}""#, "x".repeat(bytes)).into_bytes().into(),
            tags: Vec::new(),
            skip_history: true,
            idempotency_key: None,
        };
        self.core.control(ControlCommand { token: 1, call }, NOW);
    }

    fn ping(&mut self, slot: Slot) {
        self.core.input(slot, &mut PING.clone(), NOW);
    }

    /// One turn, which must keep to its budget.
    fn turn(&mut self) -> Sent {
        self.core.tick(NOW);
        self.core.prepare(NOW, BUDGET);
        let sends = self.core.sends().to_vec();
        let sent: Sent = sends.iter().map(|send| (send.slot, self.core.bytes(send).to_vec())).collect();
        self.core.settle(NOW);
        assert!(sent.len() <= BUDGET.sends_max, "{} sends in a turn", sent.len());
        let bytes: usize = sent.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(bytes < BUDGET.bytes_max + SEND_BYTES_MAX, "{bytes} bytes in a turn");
        let mut effects: Vec<Effect> = Vec::new();
        self.core.take_effects(&mut effects);
        assert!(effects.is_empty(), "{effects:?}");
        self.core.take_answers(&mut Vec::new());
        sent
    }

    /// Turns until nothing is left to send.
    fn rest(&mut self) {
        while self.core.next_deadline_ms() == Some(0) {
            self.turn();
        }
    }
}

/// Whether this is the publication.
fn is_publication(bytes: &[u8]) -> bool {
    String::from_utf8_lossy(bytes).contains(r#""pub":{"#)
}

#[test]
fn a_ping_in_the_middle_of_a_fan_out_is_answered_first_in_the_next_turn() {
    let mut shard = Shard::new(SUBSCRIBERS);
    let bystanders: Vec<Slot> = (0..10).map(|_| shard.connect("room:other")).collect();
    shard.rest();
    shard.publish("room:large", 128);
    let mut delivered = vec![0_u32; SUBSCRIBERS as usize];
    let mut turns = 0;
    while delivered.contains(&0) {
        // Before every turn of the pass somebody pings; every other time it is a subscriber too.
        let pinging = match turns % 2 {
            0 => bystanders[turns / 2 % bystanders.len()],
            _ => (turns as u32 * 7_919) % SUBSCRIBERS,
        };
        shard.ping(pinging);
        let sent = shard.turn();
        assert_eq!(sent[0].0, pinging, "the pong leaves first, in turn {turns}");
        assert_eq!(sent[0].1[..2], PONG, "in turn {turns}");
        for (slot, bytes) in &sent {
            if is_publication(bytes) {
                delivered[*slot as usize] += 1;
            }
        }
        turns += 1;
        assert!(turns < TURNS_MAX, "the pass takes too many turns");
    }
    assert!(delivered.iter().all(|&count| count == 1), "somebody got it twice");
    assert!(turns >= SUBSCRIBERS as usize / BUDGET.background_max, "{turns} turns");
    shard.rest();
}

#[test]
fn a_small_channel_does_not_wait_for_a_large_one() {
    let mut shard = Shard::new(20_000);
    let neighbours: Vec<Slot> = (0..2).map(|_| shard.connect("room:small")).collect();
    shard.rest();
    shard.publish("room:large", 128);
    for _ in 0..10 {
        assert_eq!(shard.turn().len(), BUDGET.background_max, "the large channel is under way");
        shard.publish("room:small", 128);
        let both = [shard.turn(), shard.turn()].concat();
        for neighbour in &neighbours {
            assert!(both.iter().any(|(slot, bytes)| slot == neighbour && is_publication(bytes)));
        }
    }
}

#[test]
fn many_pings_and_a_fan_out_share_the_turns() {
    let mut shard = Shard::new(20_000);
    let pinging: Vec<Slot> = (0..600).map(|_| shard.connect("room:other")).collect();
    shard.rest();
    shard.publish("room:large", 128);
    for turn in 0..30 {
        // As many as a turn may answer beside a fan-out: all of them are.
        for &slot in &pinging[..REPLIES] {
            shard.ping(slot);
        }
        let sent = shard.turn();
        let pongs = sent.iter().filter(|(_, bytes)| *bytes == PONG).count();
        assert_eq!(pongs, REPLIES, "turn {turn}");
        assert_eq!(sent.len(), BUDGET.sends_max, "turn {turn}: the rest is the fan-out's");
    }
    // More than that: neither stands still.
    for turn in 0..30 {
        pinging.iter().for_each(|&slot| shard.ping(slot));
        let sent = shard.turn();
        let publications = sent.iter().filter(|(_, bytes)| is_publication(bytes)).count();
        assert!(publications >= BUDGET.background_max * 3 / 4, "turn {turn}: {publications} deliveries");
        assert!(sent.len() - publications >= REPLIES, "turn {turn}: {publications} deliveries");
    }
}

#[test]
fn large_publications_leave_room_for_those_behind() {
    let mut shard = Shard::new(20_000);
    let behind = shard.connect("room:other");
    shard.rest();
    shard.publish("room:large", 50_000);
    assert!(shard.turn().len() < BUDGET.sends_max, "bytes are what is short");
    // A socket that takes half a pong: the rest waits in a queue of its own.
    shard.ping(behind);
    shard.core.prepare(NOW, BUDGET);
    shard.core.short(behind, 1, NOW);
    shard.core.settle(NOW);
    shard.core.take_effects(&mut Vec::new());
    shard.core.writable(behind, NOW);
    let sent = shard.turn();
    assert!(sent.contains(&(behind, vec![0])), "the rest of the pong");
    assert!(sent.len() > 1, "beside the fan-out");
}
