//! A stream of checkable bytes to many readers: an engine that serves all of them from one log by
//! cursor, and readers that check every byte, stop, and leave in the middle.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use ringmain::core::engine::{Effect, Engine, Send, ShardIndex, Slot, Source, TurnBudget};
use ringmain::core::metrics::{Metric, Values};
use ringmain::io::{ShardOptions, SocketOptions};
use ringmain_proto::time::Now;

use super::node::{Node, PATIENCE, Plan};
use super::sockets::connect;

/// Bytes of the log at the most; a reader further behind is aborted.
const LOG_BYTES_MAX: usize = 256 * 1024;
/// Bytes of one send at the most.
const SEND_BYTES_MAX: usize = 32 * 1024;
/// What a stream begins with: its id and the position of its first byte.
const HEAD_BYTES: usize = 16;

/// The stream repeats after this many bytes: a prime, so that a loss of any usual size shows.
const PERIOD_BYTES: usize = 65_521;

/// The stream, twice over, so that any `PERIOD_BYTES` of it are one slice.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 1_u64;
    let period: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(PERIOD_BYTES)
    .collect();
    period.repeat(2)
});

/// The `len` bytes (at most [`PERIOD_BYTES`]) of the stream from a position on.
fn bytes_at(position: u64, len: usize) -> &'static [u8] {
    let start = (position % PERIOD_BYTES as u64) as usize;
    &PATTERN[start..start + len]
}

/// A stream that the engine has closed in the orderly way.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    pub id: u64,
    /// Bytes that were taken by the socket, head included.
    pub bytes: u64,
}

#[derive(Debug)]
struct Reader {
    id: u64,
    head: Vec<u8>,
    head_sent: usize,
    cursor: u64,
    /// Where the stream ends, once it is to end.
    end: Option<u64>,
    sent: u64,
    blocked: bool,
    gone: bool,
}

/// Streams one log to everybody. `Control` is the number of bytes appended per millisecond.
#[derive(Debug, Default)]
pub struct Streamer {
    log: Vec<u8>,
    tail: u64,
    readers: Vec<Option<Reader>>,
    ids: u64,
    sends: Vec<Send>,
    shorts: Vec<(Slot, u32)>,
    effects: Vec<Effect>,
    answers: Vec<Finished>,
    values: Values,
    connections: usize,
    append_bytes: usize,
    appended_ms: u64,
    next: usize,
}

impl Streamer {
    fn head(&self) -> u64 {
        self.tail + self.log.len() as u64
    }

    fn append(&mut self, bytes: usize) {
        let head = self.head();
        self.log.extend_from_slice(bytes_at(head, bytes));
        if self.log.len() > LOG_BYTES_MAX {
            // Cut at half: the bytes move, as those of a real log do.
            let cut = self.log.len() - LOG_BYTES_MAX / 2;
            self.log.drain(..cut);
            self.tail += cut as u64;
        }
        for (slot, reader) in self.readers.iter_mut().enumerate() {
            let Some(reader) = reader else { continue };
            if reader.cursor < self.tail && !reader.gone {
                reader.gone = true;
                self.effects.push(Effect::Abort(slot as Slot));
            }
        }
    }

    fn finish(&mut self, slot: Slot) {
        let head = self.head();
        let reader = self.readers[slot as usize].as_mut().unwrap();
        reader.end.get_or_insert(head);
        self.finish_if_done(slot);
    }

    fn finish_if_done(&mut self, slot: Slot) {
        let reader = self.readers[slot as usize].as_mut().unwrap();
        if !reader.gone && reader.end == Some(reader.cursor) && reader.head_sent == HEAD_BYTES {
            reader.gone = true;
            self.effects.push(Effect::Finish(slot));
            self.answers.push(Finished { id: reader.id, bytes: reader.sent });
        }
    }
}

impl Engine for Streamer {
    type Mesh = ();
    type Control = usize;
    type Answer = Finished;

    fn accept(&mut self, slot: Slot, _listener: u16, _now: Now) {
        if self.readers.len() <= slot as usize {
            self.readers.resize_with(slot as usize + 1, || None);
        }
        assert!(self.readers[slot as usize].is_none(), "slot {slot} accepted twice");
        self.ids += 1;
        self.connections += 1;
        let (id, cursor) = (self.ids, self.head());
        let head = [id.to_le_bytes(), cursor.to_le_bytes()].concat();
        let (end, sent, blocked, gone) = (None, 0, false, false);
        self.readers[slot as usize] =
            Some(Reader { id, head, head_sent: 0, cursor, end, sent, blocked, gone });
    }
    fn input(&mut self, slot: Slot, chunk: &mut [u8], _now: Now) {
        assert!(chunk.iter().all(|&byte| byte == b'F'), "a reader says F, or nothing");
        self.finish(slot);
    }
    fn input_ended(&mut self, slot: Slot, _now: Now) {
        self.finish(slot);
    }
    fn broken(&mut self, slot: Slot, _errno: i32, _now: Now) {
        let reader = self.readers[slot as usize].as_mut().unwrap();
        if !std::mem::replace(&mut reader.gone, true) {
            self.effects.push(Effect::Abort(slot));
        }
    }
    fn released(&mut self, slot: Slot) {
        let reader = self.readers[slot as usize].take().expect("released once");
        assert!(reader.gone, "released without being closed");
        self.connections -= 1;
    }
    fn inbox(&mut self, _from: ShardIndex, (): (), _now: Now) {}
    fn control(&mut self, append_bytes: usize, now: Now) {
        self.append_bytes = append_bytes;
        self.appended_ms = now.mono_ms;
    }
    fn tick(&mut self, now: Now) {
        // At most a tenth of a second at once, however late it is.
        let elapsed_ms = (now.mono_ms - self.appended_ms).min(100);
        self.appended_ms = now.mono_ms;
        self.append(self.append_bytes * elapsed_ms as usize);
    }
    fn next_deadline_ms(&self) -> Option<u64> {
        (self.append_bytes > 0).then_some(self.appended_ms + 1)
    }
    fn prepare(&mut self, _now: Now, budget: TurnBudget) -> bool {
        let (head, tail) = (self.head(), self.tail);
        let count = self.readers.len();
        let mut more = false;
        for step in 0..count {
            let slot = (self.next + step) % count;
            let Some(reader) = &self.readers[slot] else { continue };
            let until = reader.end.unwrap_or(head);
            let behind = until - reader.cursor;
            if reader.gone || reader.blocked || reader.cursor < tail {
                continue;
            }
            let (len, source) = if reader.head_sent < HEAD_BYTES {
                more |= behind > 0;
                ((HEAD_BYTES - reader.head_sent) as u64, Source::Own)
            } else {
                more |= behind > SEND_BYTES_MAX as u64;
                (behind.min(SEND_BYTES_MAX as u64), Source::Log(0, reader.cursor))
            };
            if len > 0 && self.sends.len() < budget.sends_max {
                self.sends.push(Send { slot: slot as Slot, len: len as u32, source });
            } else if len > 0 {
                self.next = slot;
                return true;
            }
        }
        more
    }
    fn sends(&self) -> &[Send] {
        &self.sends
    }
    fn bytes(&self, send: &Send) -> &[u8] {
        match send.source {
            Source::Log(_, position) => {
                let start = (position - self.tail) as usize;
                &self.log[start..start + send.len as usize]
            }
            _ => {
                let reader = self.readers[send.slot as usize].as_ref().unwrap();
                &reader.head[reader.head_sent..]
            }
        }
    }
    fn short(&mut self, slot: Slot, accepted: u32, _now: Now) {
        self.shorts.push((slot, accepted));
    }
    fn settle(&mut self, _now: Now) {
        let shorts: HashMap<Slot, u32> = self.shorts.drain(..).collect();
        for send in std::mem::take(&mut self.sends) {
            let short = shorts.get(&send.slot);
            let accepted = short.map_or(send.len, |&accepted| accepted);
            let reader = self.readers[send.slot as usize].as_mut().unwrap();
            reader.sent += u64::from(accepted);
            match send.source {
                Source::Log(..) => reader.cursor += u64::from(accepted),
                _ => reader.head_sent += accepted as usize,
            }
            if short.is_some() {
                reader.blocked = true;
                self.effects.push(Effect::AwaitWritable(send.slot));
            }
            self.finish_if_done(send.slot);
        }
    }
    fn writable(&mut self, slot: Slot, _now: Now) {
        self.readers[slot as usize].as_mut().unwrap().blocked = false;
    }
    fn mesh_targets(&self) -> &[ShardIndex] {
        &[]
    }
    fn take_mesh(&mut self, _to: ShardIndex, _now: Now) -> Option<()> {
        None
    }
    fn take_effects(&mut self, into: &mut Vec<Effect>) {
        into.append(&mut self.effects);
    }
    fn take_answers(&mut self, into: &mut Vec<Finished>) {
        into.append(&mut self.answers);
    }
    fn metrics(&mut self) -> &mut Values {
        self.values.set(Metric::Connections, self.connections as u64);
        &mut self.values
    }
    fn connections(&self) -> usize {
        self.connections
    }
}

/// A reader's end of a stream.
pub struct Checked {
    stream: TcpStream,
    head: Vec<u8>,
    position: u64,
    pub received: u64,
    /// Does not read before this moment.
    stopped_until: Option<Instant>,
    asked: bool,
    /// A write found the stream reset; reads then see a plain end.
    reset: bool,
}

/// How a stream ended for its reader.
#[derive(Debug)]
pub enum Ending {
    /// With FIN after this many bytes.
    Fin { id: u64, received: u64 },
    /// With RST, as one who stopped for too long is told.
    Reset,
}

impl Checked {
    pub fn open(address: SocketAddr) -> Self {
        let stream = connect(address);
        stream.set_nonblocking(true).unwrap();
        // A small window, so that who stops reading is felt by the sender.
        rustix::net::sockopt::set_socket_recv_buffer_size(&stream, 8_192).unwrap();
        Self {
            stream,
            head: Vec::new(),
            position: 0,
            received: 0,
            stopped_until: None,
            asked: false,
            reset: false,
        }
    }

    /// Stops reading for a while.
    pub fn stop_for(&mut self, time: Duration) {
        self.stopped_until = Some(Instant::now() + time);
    }

    /// Asks for an orderly end.
    pub fn ask_for_the_end(&mut self) {
        if !std::mem::replace(&mut self.asked, true) {
            self.stopped_until = None;
            // It may have been aborted in the meantime.
            self.reset = self.stream.write_all(b"F").is_err();
        }
    }

    /// Reads what is there and checks it.
    pub fn read(&mut self, scratch: &mut [u8]) -> Result<Option<Ending>, String> {
        if self.stopped_until.is_some_and(|until| until > Instant::now()) {
            return Ok(None);
        }
        self.stopped_until = None;
        match self.stream.read(scratch) {
            Ok(0) if self.reset => Ok(Some(Ending::Reset)),
            Ok(0) => {
                let id = self.head.get(..8).map_or(0, |id| u64::from_le_bytes(id.try_into().unwrap()));
                Ok(Some(Ending::Fin { id, received: self.received }))
            }
            Ok(n) => self.check(&scratch[..n]).map(|()| None),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Some(Ending::Reset)),
            Err(error) => Err(error.to_string()),
        }
    }

    fn check(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        self.received += bytes.len() as u64;
        let of_head = (HEAD_BYTES - self.head.len()).min(bytes.len());
        if of_head > 0 {
            self.head.extend_from_slice(&bytes[..of_head]);
            bytes = &bytes[of_head..];
            if self.head.len() == HEAD_BYTES {
                self.position = u64::from_le_bytes(self.head[8..].try_into().unwrap());
            }
        }
        if bytes != bytes_at(self.position, bytes.len()) {
            return Err(format!("a byte before {} of a stream is wrong", self.received));
        }
        self.position += bytes.len() as u64;
        Ok(())
    }
}

/// What readers saw in all.
#[derive(Debug, Default)]
pub struct Tally {
    pub bytes: u64,
    pub fins: u64,
    pub resets: u64,
    pub left: u64,
}

/// Compares what readers got until FIN with what the engine says its sockets took.
fn compare(fins: &HashMap<u64, u64>, finished: &[Finished]) -> Result<u64, String> {
    let mut compared = 0;
    for Finished { id, bytes } in finished {
        if let Some(received) = fins.get(id) {
            compared += 1;
            if received != bytes {
                return Err(format!("stream {id} ended after {received} of {bytes} bytes"));
            }
        }
    }
    Ok(compared)
}

/// Readers at a time.
const READERS: usize = 400;
/// Bytes that the log grows by in a millisecond.
const APPEND_BYTES: usize = 200;
/// How often readers are disturbed.
const DISTURB_EVERY: Duration = Duration::from_millis(5);
/// One reader of these stops for a while each time.
const STOPS_ONE_OF: u64 = 100;
/// One reader of these leaves, and one ends, each time.
const LEAVES_ONE_OF: u64 = 250;

/// A node whose sockets hold little.
pub fn plan(tune: fn(&mut ShardOptions)) -> Plan {
    let sockets = SocketOptions {
        send_buffer_bytes: 4_096,
        receive_buffer_bytes: 4_096,
        notsent_lowat_bytes: 4_096,
        ..SocketOptions::default()
    };
    Plan { slots_max: 1_000, sockets, tune, ..Plan::default() }
}

/// Streams `bytes` to many readers. `Err` says which byte was wrong, or what never came.
pub fn run(node: &Node<Streamer>, bytes: u64, seed: u64) -> Result<Tally, String> {
    let started = Instant::now();
    let mut random = random(seed);
    let mut readers: Vec<_> = (0..READERS).map(|_| Checked::open(node.address())).collect();
    // All begin stopped for a while: every socket is full at least once.
    for reader in &mut readers {
        reader.stop_for(Duration::from_millis(100 + random() % 200));
    }
    node.order(0, APPEND_BYTES);
    let mut tally = Tally::default();
    let mut fins = HashMap::new();
    let mut scratch = vec![0; 16_384];
    let mut ending = false;
    let mut disturbed = Instant::now();
    while !readers.is_empty() {
        if started.elapsed() > PATIENCE {
            return Err(format!("{} of {bytes} bytes in time", tally.bytes));
        }
        let mut i = 0;
        while i < readers.len() {
            let reader = &mut readers[i];
            let before = reader.received;
            let outcome = reader.read(&mut scratch)?;
            tally.bytes += reader.received - before;
            match outcome {
                Some(Ending::Fin { id, received }) => {
                    tally.fins += 1;
                    fins.insert(id, received);
                }
                Some(Ending::Reset) => tally.resets += 1,
                None => {
                    i += 1;
                    continue;
                }
            }
            readers.swap_remove(i);
        }
        if tally.bytes >= bytes && !ending {
            ending = true;
            readers.iter_mut().for_each(Checked::ask_for_the_end);
        }
        if !ending && disturbed.elapsed() > DISTURB_EVERY {
            disturbed = Instant::now();
            disturb(node, &mut readers, &mut random, &mut tally);
        }
    }
    node.order(0, 0);
    node.await_used(0);
    let finished: Vec<Finished> = node.answers.try_iter().collect();
    let compared = compare(&fins, &finished)?;
    if compared != tally.fins {
        return Err(format!("{} streams ended with FIN, {compared} were finished", tally.fins));
    }
    Ok(tally)
}

/// Stops some readers, makes some leave, asks some to be ended, and brings new ones.
fn disturb(
    node: &Node<Streamer>,
    readers: &mut Vec<Checked>,
    random: &mut impl FnMut() -> u64,
    tally: &mut Tally,
) {
    for reader in readers.iter_mut() {
        if random().is_multiple_of(STOPS_ONE_OF) {
            reader.stop_for(Duration::from_millis(random() % 500));
        }
        if random().is_multiple_of(LEAVES_ONE_OF) {
            reader.ask_for_the_end();
        }
    }
    let before = readers.len();
    readers.retain(|_| !random().is_multiple_of(LEAVES_ONE_OF));
    tally.left += (before - readers.len()) as u64;
    while readers.len() < READERS {
        readers.push(Checked::open(node.address()));
    }
}

/// Numbers that are the same for a seed.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 31)
    }
}
