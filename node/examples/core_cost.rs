//! What the node's own code costs, without a kernel: clients drive a core in memory, and the time of each
//! unit of work is printed. Run it under `valgrind --tool=callgrind` for instructions, `perf` for time.
//!
//!     cargo run --release -p ringmain --example core_cost -- publish 1000000
//!     cargo run --release -p ringmain --example core_cost -- churn 100000

use std::sync::Arc;
use std::time::Instant;

use ringmain::core::config::{CoreConfig, NamespaceConfig, Secret};
use ringmain::core::engine::{Effect, Engine, TurnBudget};
use ringmain::core::{Core, CoreOptions};
use ringmain_proto::time::Now;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CONNECTIONS: u32 = 64;
const WINDOW: usize = 8;
const BUDGET: TurnBudget = TurnBudget { sends_max: 512, background_max: 128, bytes_max: 4 << 20 };
const START: Now = Now { mono_ms: 1_000, unix_ms: 1_790_000_000_000 };

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mode = arguments.next().unwrap_or_else(|| "publish".into());
    let units: u64 = arguments.next().map_or(1_000_000, |units| units.parse().expect("units is a number"));
    match mode.as_str() {
        "publish" => publish(units),
        "churn" => churn(units),
        other => {
            eprintln!("unknown mode {other}: publish or churn, then how many");
            std::process::exit(2);
        }
    }
}

/// A core and its clock.
struct Shard {
    core: Core,
    now: Now,
    effects: Vec<Effect>,
    bytes_out: usize,
}

impl Shard {
    fn new(config: CoreConfig) -> Self {
        let options = CoreOptions {
            shard: 0,
            shards: 1,
            config: Arc::new(config),
            seed: 1,
            proxy_listeners: vec![false],
            version: "0.0.0".into(),
            started_unix_ms: START.unix_ms,
            assets: Arc::new([]),
        };
        let core = Core::new(options, START).expect("the configuration is good");
        Self { core, now: START, effects: Vec::new(), bytes_out: 0 }
    }

    fn input(&mut self, slot: u32, bytes: &mut [u8]) {
        self.core.input(slot, bytes, self.now);
    }

    /// Everything is sent, and what is closed is released.
    fn turn(&mut self) {
        self.now.mono_ms += 1;
        self.core.tick(self.now);
        loop {
            let more = self.core.prepare(self.now, BUDGET);
            for send in self.core.sends() {
                self.bytes_out += self.core.bytes(send).len();
            }
            self.core.settle(self.now);
            if !more {
                break;
            }
        }
        self.core.take_effects(&mut self.effects);
        for effect in std::mem::take(&mut self.effects) {
            if let Effect::Finish(slot) | Effect::Close(slot) | Effect::Abort(slot) = effect {
                self.core.released(slot);
            }
        }
    }

    fn open(&mut self, slot: u32) {
        self.core.accept(slot, 0, self.now);
        let mut request = *b"GET /connection/websocket HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n\
            Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        self.input(slot, &mut request);
        self.turn();
    }
}

/// A masked text frame of a client.
fn frame(payload: &str, frames: &mut Vec<u8>) {
    let mask = [1, 2, 3, 4];
    frames.push(0x81);
    match u8::try_from(payload.len()) {
        Ok(len) if len < 126 => frames.push(0x80 | len),
        _ => {
            frames.push(0x80 | 126);
            frames.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        }
    }
    frames.extend_from_slice(&mask);
    frames.extend(payload.bytes().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

fn config() -> CoreConfig {
    let mut config = CoreConfig::default();
    config.client.allow_anonymous_connect_without_token = true;
    let namespace = NamespaceConfig {
        history_size: 100,
        history_ttl_ms: 300_000,
        allow_subscribe_for_client: true,
        allow_subscribe_for_anonymous: true,
        allow_publish_for_client: true,
        allow_publish_for_anonymous: true,
        ..NamespaceConfig::default()
    };
    config.namespaces.insert("bench".into(), namespace);
    config
}

fn publish(units: u64) {
    let mut shard = Shard::new(config());
    let data = "x".repeat(48);
    let mut inputs = Vec::new();
    for slot in 0..CONNECTIONS {
        shard.open(slot);
        let mut frames = Vec::new();
        frame("{\"id\":1,\"connect\":{}}", &mut frames);
        frame(&format!("{{\"id\":2,\"subscribe\":{{\"channel\":\"bench:{slot}\"}}}}"), &mut frames);
        shard.input(slot, &mut frames);
        shard.turn();
        let mut frames = Vec::new();
        for id in 0..WINDOW {
            let id = 1_000_000 + id;
            let body = format!("{{\"channel\":\"bench:{slot}\",\"data\":{{\"t\":\"{data}\"}}}}");
            frame(&format!("{{\"id\":{id},\"publish\":{body}}}"), &mut frames);
        }
        inputs.push(frames);
    }
    shard.bytes_out = 0;
    let turns = units / (u64::from(CONNECTIONS) * WINDOW as u64);
    let began = Instant::now();
    let mut buffer = Vec::new();
    for _ in 0..turns {
        for slot in 0..CONNECTIONS {
            buffer.clear();
            buffer.extend_from_slice(&inputs[slot as usize]);
            shard.input(slot, &mut buffer);
        }
        shard.turn();
    }
    let units = turns * u64::from(CONNECTIONS) * WINDOW as u64;
    report("publish to oneself", units, began, &shard);
}

fn churn(units: u64) {
    let mut config = config();
    config.token.hmac_secret = Some(Secret("secret".into()));
    let mut shard = Shard::new(config);
    let token = TOKEN;
    let began = Instant::now();
    for unit in 0..units {
        let slot = (unit % u64::from(CONNECTIONS)) as u32;
        shard.open(slot);
        let mut frames = Vec::new();
        frame(&format!("{{\"id\":1,\"connect\":{{\"token\":\"{token}\"}}}}"), &mut frames);
        frame("{\"id\":2,\"subscribe\":{\"channel\":\"bench:room\"}}", &mut frames);
        shard.input(slot, &mut frames);
        shard.turn();
        let mut close = [0x88, 0x80, 0, 0, 0, 0];
        shard.input(slot, &mut close);
        shard.turn();
    }
    report("connect, subscribe, close", units, began, &shard);
    assert_eq!(shard.core.connections(), 0);
}

/// HS256 with the secret `secret`: {"sub":"42"}.
const TOKEN: &str = "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0MiIsImlhdCI6MTc5NTI3NzYxNX0.a1cPIEaE4__4AMHBm8IUo3776wsPrHD7vuvx0jQ8QJM";

fn report(what: &str, units: u64, began: Instant, shard: &Shard) {
    let elapsed = began.elapsed();
    println!(
        "{what}: {units} units, {:.1} ns each, {:.1} bytes out each",
        elapsed.as_nanos() as f64 / units as f64,
        shard.bytes_out as f64 / units as f64
    );
}
