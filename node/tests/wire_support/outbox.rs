//! The output half of a test engine: a queue of bytes per connection, sent as the engine contract asks.

use ringmain::core::engine::{Effect, Send, Slot, Source, TurnBudget};

/// Bytes of one send at the most.
const SEND_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// How much of `bytes` was sent.
    head: usize,
    /// In the list of those that have something.
    listed: bool,
    /// Waits for the socket to take bytes.
    blocked: bool,
    /// Close once everything is sent.
    closing: bool,
    /// The peer said its last word: close at once then.
    peer_ended: bool,
    open: bool,
}

impl Queue {
    fn end(&self, slot: Slot) -> Effect {
        if self.peer_ended { Effect::Close(slot) } else { Effect::Finish(slot) }
    }
}

/// The queues of all connections of a shard.
#[derive(Debug, Default)]
pub struct Outbox {
    queues: Vec<Queue>,
    ready: Vec<Slot>,
    sends: Vec<Send>,
    shorts: Vec<(Slot, u32)>,
    pub effects: Vec<Effect>,
    /// POLLOUTs reported for connections that waited for none.
    pub needless_writables: u64,
    prepared: bool,
}

impl Outbox {
    pub fn open(&mut self, slot: Slot) {
        if self.queues.len() <= slot as usize {
            self.queues.resize_with(slot as usize + 1, Queue::default);
        }
        let queue = &mut self.queues[slot as usize];
        assert!(!queue.open, "slot {slot} opened twice");
        *queue = Queue { open: true, listed: queue.listed, ..Queue::default() };
    }

    pub fn is_open(&self, slot: Slot) -> bool {
        self.queues.get(slot as usize).is_some_and(|queue| queue.open)
    }

    pub fn waiting(&self, slot: Slot) -> usize {
        let queue = &self.queues[slot as usize];
        queue.bytes.len() - queue.head
    }

    /// Queues bytes; what comes after `finish` or `abort` is dropped.
    pub fn push(&mut self, slot: Slot, bytes: &[u8]) {
        if !self.queues[slot as usize].closing {
            self.queues[slot as usize].bytes.extend_from_slice(bytes);
            self.list(slot);
        }
    }

    /// Closes once everything is sent.
    pub fn finish(&mut self, slot: Slot) {
        let queue = &mut self.queues[slot as usize];
        if queue.open && !queue.closing {
            queue.closing = true;
            if queue.head == queue.bytes.len() {
                self.effects.push(queue.end(slot));
            }
        }
    }

    /// The same for a peer that has said its last word.
    pub fn finish_after_peer(&mut self, slot: Slot) {
        self.queues[slot as usize].peer_ended = true;
        self.finish(slot);
    }

    /// Drops what waits and closes at once.
    pub fn abort(&mut self, slot: Slot) {
        let queue = &mut self.queues[slot as usize];
        if queue.open && !(queue.closing && queue.head == queue.bytes.len()) {
            queue.closing = true;
            queue.head = queue.bytes.len();
            self.effects.push(Effect::Abort(slot));
        }
    }

    pub fn released(&mut self, slot: Slot) {
        let queue = &mut self.queues[slot as usize];
        assert!(queue.open && queue.closing, "slot {slot} released without being closed");
        *queue = Queue { listed: queue.listed, ..Queue::default() };
    }

    fn list(&mut self, slot: Slot) {
        let queue = &mut self.queues[slot as usize];
        if !queue.listed && !queue.blocked {
            queue.listed = true;
            self.ready.push(slot);
        }
    }

    pub fn prepare(&mut self, budget: TurnBudget) -> bool {
        assert!(!self.prepared, "prepare without settle");
        self.prepared = true;
        let mut bytes = 0;
        let mut taken = 0;
        // A connection sends once a turn: what is left of it needs another turn.
        let mut more = false;
        for &slot in &self.ready {
            if self.sends.len() >= budget.sends_max || bytes >= budget.bytes_max {
                break;
            }
            taken += 1;
            let queue = &mut self.queues[slot as usize];
            queue.listed = false;
            let len = (queue.bytes.len() - queue.head).min(SEND_BYTES_MAX);
            if queue.open && len > 0 && !queue.blocked {
                bytes += len;
                more |= len < queue.bytes.len() - queue.head;
                self.sends.push(Send { slot, len: len as u32, source: Source::Own });
            }
        }
        self.ready.drain(..taken);
        more || !self.ready.is_empty()
    }

    pub fn sends(&self) -> &[Send] {
        &self.sends
    }

    pub fn bytes(&self, send: &Send) -> &[u8] {
        let queue = &self.queues[send.slot as usize];
        &queue.bytes[queue.head..queue.head + send.len as usize]
    }

    pub fn short(&mut self, slot: Slot, accepted: u32) {
        assert!(self.prepared, "short outside a turn");
        self.shorts.push((slot, accepted));
    }

    pub fn settle(&mut self) {
        assert!(std::mem::take(&mut self.prepared), "settle without prepare");
        let mut shorts = self.shorts.drain(..).peekable();
        for send in std::mem::take(&mut self.sends) {
            // Shorts come in the order of the sends.
            let short = shorts.next_if(|short| short.0 == send.slot);
            let queue = &mut self.queues[send.slot as usize];
            queue.head += short.map_or(send.len, |short| short.1) as usize;
            if queue.head == queue.bytes.len() {
                assert!(short.is_none());
                queue.bytes = Vec::new();
                queue.head = 0;
                if queue.closing {
                    self.effects.push(queue.end(send.slot));
                }
                continue;
            }
            // Moving what is left is what a send that the kernel still held would notice.
            queue.bytes.drain(..queue.head);
            queue.head = 0;
            queue.blocked = short.is_some();
            if queue.blocked {
                self.effects.push(Effect::AwaitWritable(send.slot));
            } else if !queue.listed {
                queue.listed = true;
                self.ready.push(send.slot);
            }
        }
        assert!(shorts.next().is_none(), "a short send that was not offered");
    }

    pub fn writable(&mut self, slot: Slot) {
        let queue = &mut self.queues[slot as usize];
        if !std::mem::take(&mut queue.blocked) {
            self.needless_writables += 1;
        }
        self.list(slot);
    }
}
