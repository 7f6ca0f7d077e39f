//! Drives cores as the shard loop does, without a socket: bytes in, sends out, any of them cut.

use std::collections::VecDeque;
use std::sync::Arc;

use ringmain::core::api::{Call, ControlAnswer, ControlCommand};
use ringmain::core::config::CoreConfig;
use ringmain::core::engine::{Effect, Engine, TurnBudget};
use ringmain::core::mesh::MeshBatch;
use ringmain::core::{Core, CoreOptions, NotNow};
use ringmain_proto::time::Now;
use serde_json::Value;

/// A small seeded generator for the tests' own choices.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// A client's side of a connection.
pub(crate) struct Client {
    pub(crate) shard: usize,
    pub(crate) slot: u32,
    bytes: Vec<u8>,
    /// Frames that were received whole: opcode and payload.
    pub(crate) frames: VecDeque<(u8, Vec<u8>)>,
    /// Bytes that its socket still takes; `None`: any number.
    pub(crate) window: Option<usize>,
    awaits_writable: bool,
    /// It awaited that when it became bytes: whoever puts it back must ask anew.
    rearms: bool,
    /// The node finished or aborted the socket.
    pub(crate) gone: Option<Effect>,
    next_id: u32,
}

/// A node of several shards and its clients.
pub(crate) struct World {
    pub(crate) cores: Vec<Core>,
    pub(crate) now: Now,
    pub(crate) clients: Vec<Client>,
    pub(crate) answers: Vec<ControlAnswer>,
    pub(crate) dice: Dice,
    /// One send in so many is cut at a random byte; 0: none.
    pub(crate) cut_one_in: u64,
    /// In one turn out of so many a connection becomes bytes, and a connection again once the turn's
    /// messages have come; 0: never.
    pub(crate) snapshot_one_in: u64,
    /// How often that has been done.
    pub(crate) snapshots: u64,
    /// Batches that one shard may have in another's inbox.
    pub(crate) credits: usize,
    /// Sends of one turn at the most.
    pub(crate) sends_max: usize,
    /// A shard that is not run.
    pub(crate) paused: Option<usize>,
    inboxes: Vec<VecDeque<(u16, MeshBatch)>>,
    free: Vec<Vec<u32>>,
    slots: Vec<u32>,
    token: u64,
}

pub(crate) const START_UNIX_MS: u64 = 1_790_000_000_000;

impl World {
    pub(crate) fn new(shards: u16, seed: u64, config: &CoreConfig) -> Self {
        let now = Now { mono_ms: 1_000, unix_ms: START_UNIX_MS };
        let config = Arc::new(config.clone());
        let cores = (0..shards).map(|shard| {
            let options = CoreOptions {
                shard,
                shards,
                config: Arc::clone(&config),
                seed: seed * 1_000 + u64::from(shard),
                proxy_listeners: vec![false, true],
                version: "0.0.0".into(),
                started_unix_ms: START_UNIX_MS,
                assets: Arc::new([]),
            };
            Core::new(options, now).expect("the test's configuration is good")
        });
        Self {
            cores: cores.collect(),
            now,
            clients: Vec::new(),
            answers: Vec::new(),
            dice: Dice::new(seed),
            cut_one_in: 0,
            snapshot_one_in: 0,
            snapshots: 0,
            credits: 2,
            sends_max: 8,
            paused: None,
            inboxes: (0..shards).map(|_| VecDeque::new()).collect(),
            free: vec![Vec::new(); usize::from(shards)],
            slots: vec![0; usize::from(shards)],
            token: 0,
        }
    }

    /// A TCP connection on the first listener.
    pub(crate) fn open(&mut self, shard: usize) -> usize {
        self.open_on(shard, 0)
    }

    pub(crate) fn open_on(&mut self, shard: usize, listener: u16) -> usize {
        let slot = self.free[shard].pop().unwrap_or_else(|| {
            self.slots[shard] += 1;
            self.slots[shard] - 1
        });
        self.cores[shard].accept(slot, listener, self.now);
        self.clients.push(Client {
            shard,
            slot,
            bytes: Vec::new(),
            frames: VecDeque::new(),
            window: None,
            awaits_writable: false,
            rearms: false,
            gone: None,
            next_id: 1,
        });
        self.clients.len() - 1
    }

    /// A WebSocket connection.
    pub(crate) fn websocket(&mut self, shard: usize) -> usize {
        let client = self.open(shard);
        self.upgrade(client, "/connection/websocket");
        client
    }

    pub(crate) fn upgrade(&mut self, client: usize, path: &str) {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        self.bytes(client, request.as_bytes());
        self.run();
        let head = self.take_http(client);
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    }

    /// A connected client; its connect reply.
    pub(crate) fn connected(&mut self, shard: usize, connect: &str) -> (usize, Value) {
        let client = self.websocket(shard);
        self.text(client, &format!(r#"{{"id":1,"connect":{connect}}}"#));
        self.clients[client].next_id = 2;
        self.run();
        let reply = self.next(client);
        assert!(reply.get("connect").is_some(), "{reply}");
        (client, reply)
    }

    /// Raw bytes of a client.
    pub(crate) fn bytes(&mut self, client: usize, bytes: &[u8]) {
        let Client { shard, slot, .. } = self.clients[client];
        if self.clients[client].gone.is_none() {
            self.cores[shard].input(slot, &mut bytes.to_vec(), self.now);
        }
    }

    /// A masked text frame.
    pub(crate) fn text(&mut self, client: usize, text: &str) {
        self.frame(client, 1, text.as_bytes());
    }

    pub(crate) fn frame(&mut self, client: usize, opcode: u8, payload: &[u8]) {
        let mask = [0x11, 0x22, 0x33, 0x44];
        let mut bytes = vec![0x80 | opcode];
        match payload.len() {
            len @ 0..126 => bytes.push(0x80 | len as u8),
            len @ 126..65_536 => {
                bytes.push(0x80 | 126);
                bytes.extend((len as u16).to_be_bytes());
            }
            len => {
                bytes.push(0x80 | 127);
                bytes.extend((len as u64).to_be_bytes());
            }
        }
        bytes.extend(mask);
        bytes.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
        self.bytes(client, &bytes);
    }

    /// Sends a command under the next id and returns the id.
    pub(crate) fn send(&mut self, client: usize, method: &str, body: &str) -> u32 {
        let id = self.clients[client].next_id;
        self.clients[client].next_id += 1;
        self.text(client, &format!(r#"{{"id":{id},"{method}":{body}}}"#));
        id
    }

    /// Sends a command, runs, and gives its reply; pushes stay queued.
    pub(crate) fn ask(&mut self, client: usize, method: &str, body: &str) -> Value {
        let id = self.send(client, method, body);
        self.run();
        let all = self.take_json(client);
        let mut reply = None;
        for value in all {
            if value["id"] == id {
                reply = Some(value);
            } else {
                self.clients[client].frames.push_back((1, value.to_string().into_bytes()));
            }
        }
        let mut reply = reply.unwrap_or_else(|| panic!("no reply to {method} {body}"));
        match reply.get_mut(method) {
            Some(result) => result.take(),
            None => reply,
        }
    }

    /// A call of the control plane to one shard, and its answer.
    pub(crate) fn call(&mut self, shard: usize, call: Call) -> ControlAnswer {
        self.token += 1;
        let token = self.token;
        self.cores[shard].control(ControlCommand { token, call }, self.now);
        self.run();
        let position = self.answers.iter().position(|answer| answer.token == token);
        self.answers.swap_remove(position.expect("every call is answered"))
    }

    /// A publication by the control plane that nobody waits for: the shards are not run.
    pub(crate) fn publish_unanswered(&mut self, shard: usize, channel: &str, bytes: usize) {
        let call = Call::Publish {
            channel: channel.into(),
            data: format!(r#""{}""#, "x".repeat(bytes)).into_bytes().into(),
            tags: Vec::new(),
            skip_history: false,
            idempotency_key: None,
        };
        self.cores[shard].control(ControlCommand { token: 0, call }, self.now);
    }

    /// Lets virtual time pass, in steps in which timers run.
    pub(crate) fn pass(&mut self, ms: u64) {
        let end = self.now.mono_ms + ms;
        while self.now.mono_ms < end {
            let step = (end - self.now.mono_ms).min(16);
            self.now.mono_ms += step;
            self.now.unix_ms += step;
            self.run();
        }
    }

    /// Lets a client's socket take so many more bytes (`None`: any number).
    pub(crate) fn open_window(&mut self, client: usize, bytes: Option<usize>) {
        self.clients[client].window = bytes;
        if self.clients[client].awaits_writable && bytes != Some(0) && self.clients[client].gone.is_none() {
            self.clients[client].awaits_writable = false;
            let Client { shard, slot, .. } = self.clients[client];
            self.cores[shard].writable(slot, self.now);
        }
    }

    /// Runs all shards until nothing moves.
    pub(crate) fn run(&mut self) {
        for round in 0.. {
            assert!(round < 100_000, "the shards never come to rest");
            let mut moved = false;
            for shard in 0..self.cores.len() {
                if self.paused != Some(shard) {
                    moved |= self.turn(shard);
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// One turn of a shard. Returns whether anything happened.
    pub(crate) fn turn(&mut self, shard: usize) -> bool {
        let mut moved = self.wake_writable(shard);
        let absent = self.export_one(shard);
        while let Some((from, batch)) = self.inboxes[shard].pop_front() {
            self.cores[shard].inbox(from, batch, self.now);
            moved = true;
        }
        if let Some((slot, bytes)) = absent {
            self.cores[shard].import_connection(slot, &bytes, self.now).expect("it comes back");
        }
        if self.cores[shard].next_deadline_ms().is_some_and(|at| at <= self.now.mono_ms) {
            self.cores[shard].tick(self.now);
        }
        let budget =
            TurnBudget { sends_max: self.sends_max, background_max: self.sends_max, bytes_max: 256 * 1024 };
        moved |= self.cores[shard].prepare(self.now, budget);
        moved |= self.perform_sends(shard);
        self.cores[shard].settle(self.now);
        moved |= self.cores[shard].next_deadline_ms() == Some(0);
        moved |= self.perform_effects(shard);
        let targets: Vec<u16> = self.cores[shard].mesh_targets().to_vec();
        for to in targets {
            let inbox = &mut self.inboxes[usize::from(to)];
            if inbox.iter().filter(|(from, _)| usize::from(*from) == shard).count() < self.credits
                && let Some(batch) = self.cores[shard].take_mesh(to, self.now)
            {
                inbox.push_back((shard as u16, batch));
                moved = true;
            }
        }
        self.cores[shard].take_answers(&mut self.answers);
        moved
    }

    /// Turns a random connection of a shard into bytes, if it is time for that fault.
    fn export_one(&mut self, shard: usize) -> Option<(u32, Vec<u8>)> {
        if self.snapshot_one_in == 0 || self.dice.below(self.snapshot_one_in) > 0 {
            return None;
        }
        let here = |client: &Client| client.shard == shard && client.gone.is_none();
        let here: Vec<usize> = (0..self.clients.len()).filter(|n| here(&self.clients[*n])).collect();
        let client = *here.get(self.dice.below(here.len().max(1) as u64) as usize)?;
        let bytes = self.export(client).ok()?;
        self.snapshots += 1;
        Some((self.clients[client].slot, bytes))
    }

    /// Turns a client's connection into bytes and back.
    pub(crate) fn renew(&mut self, client: usize) -> Result<(), NotNow> {
        let Client { shard, slot, .. } = self.clients[client];
        let bytes = self.export(client)?;
        self.cores[shard].import_connection(slot, &bytes, self.now).expect("it comes back");
        Ok(())
    }

    /// Turns a client's connection into bytes: what was armed on its socket is no more.
    fn export(&mut self, client: usize) -> Result<Vec<u8>, NotNow> {
        let Client { shard, slot, .. } = self.clients[client];
        let bytes = self.cores[shard].export_connection(slot, self.now)?;
        let client = &mut self.clients[client];
        client.rearms |= std::mem::take(&mut client.awaits_writable);
        Ok(bytes)
    }

    fn wake_writable(&mut self, shard: usize) -> bool {
        let mut woken = false;
        for client in 0..self.clients.len() {
            let Client { shard: at, slot, awaits_writable, window, ref gone, .. } = self.clients[client];
            if at == shard && awaits_writable && window != Some(0) && gone.is_none() {
                self.clients[client].awaits_writable = false;
                self.cores[shard].writable(slot, self.now);
                woken = true;
            }
        }
        woken
    }

    fn perform_sends(&mut self, shard: usize) -> bool {
        let sends = self.cores[shard].sends().to_vec();
        let mut short = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for send in &sends {
            assert!(seen.insert(send.slot), "two sends of one slot in a turn");
            assert!(send.len > 0, "an empty send");
            let bytes = self.cores[shard].bytes(send);
            assert_eq!(bytes.len(), send.len as usize);
            let client =
                self.clients.iter_mut().rfind(|client| client.shard == shard && client.slot == send.slot);
            let client = client.expect("sends go to clients");
            assert!(client.gone.is_none(), "a send to a socket that was given up");
            assert!(!client.awaits_writable && !client.rearms, "a send to a socket that is known to be full");
            let mut taken = bytes.len().min(client.window.unwrap_or(usize::MAX));
            if self.cut_one_in > 0 && self.dice.below(self.cut_one_in) == 0 {
                taken = taken.min(self.dice.below(bytes.len() as u64 + 1) as usize);
            }
            client.bytes.extend_from_slice(&bytes[..taken]);
            if let Some(window) = &mut client.window {
                *window -= taken;
            }
            if taken < bytes.len() {
                short.push((send.slot, taken as u32));
            }
        }
        for (slot, taken) in short {
            self.cores[shard].short(slot, taken, self.now);
        }
        !sends.is_empty()
    }

    fn perform_effects(&mut self, shard: usize) -> bool {
        let mut effects = Vec::new();
        self.cores[shard].take_effects(&mut effects);
        let mut moved = false;
        for effect in effects {
            match effect {
                Effect::AwaitWritable(slot) => {
                    if let Some(client) = self.client_at(shard, slot) {
                        // To ask for what was armed before is no news, unless it is due.
                        moved |= !std::mem::take(&mut client.rearms) || client.window != Some(0);
                        client.awaits_writable = true;
                    }
                }
                Effect::Finish(slot) | Effect::Close(slot) | Effect::Abort(slot) => {
                    if let Some(client) = self.client_at(shard, slot) {
                        client.gone = Some(effect);
                    }
                    moved = true;
                    self.cores[shard].released(slot);
                    self.free[shard].push(slot);
                }
                Effect::StopAccepting | Effect::Drained => moved = true,
            }
        }
        moved
    }

    fn client_at(&mut self, shard: usize, slot: u32) -> Option<&mut Client> {
        self.clients
            .iter_mut()
            .rfind(|client| client.shard == shard && client.slot == slot && client.gone.is_none())
    }

    // --- what a client sees ---

    pub(crate) fn take_http(&mut self, client: usize) -> String {
        let bytes = &mut self.clients[client].bytes;
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a whole head") + 4;
        String::from_utf8(bytes.drain(..end).collect()).expect("ASCII")
    }

    fn parse(&mut self, client: usize) {
        let Client { bytes, frames, .. } = &mut self.clients[client];
        let mut at = 0;
        while bytes.len() >= at + 2 {
            assert_eq!(bytes[at] & 0x70, 0, "reserved bits");
            let (len, head) = match bytes[at + 1] {
                126 if bytes.len() >= at + 4 => {
                    (usize::from(u16::from_be_bytes([bytes[at + 2], bytes[at + 3]])), 4)
                }
                127 if bytes.len() >= at + 10 => {
                    (u64::from_be_bytes(bytes[at + 2..at + 10].try_into().expect("8 bytes")) as usize, 10)
                }
                len @ 0..126 => (usize::from(len), 2),
                126 | 127 => break,
                _ => panic!("a masked frame of the server"),
            };
            if bytes.len() < at + head + len {
                break;
            }
            frames.push_back((bytes[at] & 0xf, bytes[at + head..at + head + len].to_vec()));
            at += head + len;
        }
        bytes.drain(..at);
    }

    /// Every JSON object received since the last look.
    pub(crate) fn take_json(&mut self, client: usize) -> Vec<Value> {
        self.parse(client);
        let mut values = Vec::new();
        let frames = &mut self.clients[client].frames;
        while frames.front().is_some_and(|(opcode, _)| *opcode == 1) {
            let (_, payload) = frames.pop_front().expect("it is there");
            for line in payload.split(|byte| *byte == b'\n') {
                values.push(serde_json::from_slice(line).expect("JSON"));
            }
        }
        values
    }

    /// Every frame received since the last look: opcode and payload.
    pub(crate) fn take_frames(&mut self, client: usize) -> Vec<(u8, Vec<u8>)> {
        self.parse(client);
        self.clients[client].frames.drain(..).collect()
    }

    /// The next JSON object; more stay queued.
    pub(crate) fn next(&mut self, client: usize) -> Value {
        self.parse(client);
        let (opcode, payload) = self.clients[client].frames.pop_front().expect("a frame");
        assert_eq!(opcode, 1, "a text frame, not {payload:?}");
        serde_json::from_slice(&payload).expect("JSON")
    }

    /// The close code that the client received, as the last thing, and that the socket is finished.
    pub(crate) fn close_code(&mut self, client: usize) -> u16 {
        self.parse(client);
        let (opcode, payload) = self.clients[client].frames.pop_back().expect("a close frame");
        assert_eq!(opcode, 8, "a close frame, not {}", String::from_utf8_lossy(&payload));
        assert!(self.clients[client].gone.is_some(), "the socket is finished after the close frame");
        u16::from_be_bytes([payload[0], payload[1]])
    }

    /// Whether a half-received frame is left over.
    pub(crate) fn has_partial(&self, client: usize) -> bool {
        !self.clients[client].bytes.is_empty()
    }
}
