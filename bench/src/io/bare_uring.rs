//! The bare io_uring server: multishot accept into direct descriptors, multishot recv into provided buffers, and sends
//! that leave together and complete only when they fail.
//!
//! Invariants: a completion of an older generation of its slot is dropped; at most one send for each connection and
//! turn, so that a failed one can be continued where it stopped; failures of a turn's sends are handled before
//! anything else. A connection is closed by cancelling its recv and then close_direct: shutdown would run on a
//! kernel worker thread, because IORING_OP_SHUTDOWN is always punted.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::buffers::Buffers;
use crate::bare::script::{Progress, Repeated, Script};

/// Submissions that wait for one io_uring_enter.
const SQ_ENTRIES: u32 = 512;
/// Completions that the kernel can keep; above the connections, so that even a send failing on each one fits.
const CQ_ENTRIES: u32 = 1 << 15;
/// The most connections; lower where RLIMIT_NOFILE is.
pub(crate) const CONNECTIONS_MAX: u32 = 20_000;
const _: () = assert!(CONNECTIONS_MAX <= CQ_ENTRIES);

const BUFFER_GROUP: u16 = 0;
const SEND_FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_WAITALL | libc::MSG_NOSIGNAL;

/// What a completion is about; the top byte of its user_data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Accept = 1,
    Recv,
    Send,
    Writable,
    Cancel,
    Close,
}

impl Operation {
    fn of(user_data: u64) -> Option<Operation> {
        use Operation::*;
        [Accept, Recv, Send, Writable, Cancel, Close].into_iter().find(|op| *op as u64 == user_data >> 56)
    }
}

#[derive(Clone, Copy, Default)]
struct Connection {
    open: bool,
    generation: u32,
    progress: Progress,
    /// Bytes of whole units that are not handed to the kernel yet.
    owed: u64,
    /// The size of the last send: what of it was not sent comes back to `owed` when it fails.
    sending: u32,
    publishes: bool,
    /// It stands in `dirty`.
    dirty: bool,
    /// A poll for writability is armed.
    blocked: bool,
    /// The recv is being cancelled; its last completion closes the slot.
    closing: bool,
}

/// Serves `script` on `listener` until the process is ended.
pub(crate) fn serve(listener: &OwnedFd, script: Script) -> io::Result<()> {
    let mut server = Server::new(listener.as_raw_fd(), script)?;
    let mut completions = Vec::with_capacity(CQ_ENTRIES as usize);
    server.arm_accept()?;
    loop {
        server.ring.submitter().submit_and_wait(usize::from(server.dirty.is_empty()))?;
        completions.clear();
        completions.extend(server.ring.completion());
        for completion in &completions {
            server.failed_send(completion)?;
        }
        for completion in &completions {
            server.complete(completion)?;
        }
        server.flush()?;
    }
}

struct Server {
    // Dropped in this order: the ring before the memory that the kernel may write to.
    ring: IoUring,
    buffers: Buffers,
    listener: i32,
    script: Script,
    reply: Repeated,
    delivery: Option<Repeated>,
    connections: Vec<Connection>,
    /// Slots below this have been used: what a fan-out looks at.
    used: usize,
    dirty: Vec<u32>,
}

impl Server {
    fn new(listener: i32, script: Script) -> io::Result<Server> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(CQ_ENTRIES)
            .build(SQ_ENTRIES)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let slots = u64::from(CONNECTIONS_MAX).min(limit) as u32;
        ring.submitter().register_files_sparse(slots)?;
        let buffers = Buffers::register(&ring, BUFFER_GROUP)?;
        Ok(Server {
            ring,
            buffers,
            listener,
            reply: Repeated::new(&script.steady.reply),
            delivery: script.delivery.as_deref().map(Repeated::new),
            script,
            connections: vec![Connection::default(); slots as usize],
            used: 0,
            dirty: Vec::with_capacity(slots as usize),
        })
    }

    fn push(&mut self, entry: squeue::Entry, operation: Operation, slot: u32) -> io::Result<()> {
        let generation = self.connections.get(slot as usize).map_or(0, |connection| connection.generation);
        let user_data = (operation as u64) << 56 | u64::from(generation & 0xff_ffff) << 32 | u64::from(slot);
        let entry = entry.user_data(user_data);
        loop {
            // SAFETY: all memory that entries point to (replies, deliveries, buffers) lives as long as the ring and
            // does not move: it is allocated once in `new` and never changed.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submitter().submit()?;
        }
    }

    fn arm_accept(&mut self) -> io::Result<()> {
        let entry = opcode::AcceptMulti::new(Fd(self.listener)).allocate_file_index(true).build();
        self.push(entry, Operation::Accept, u32::MAX)
    }

    fn arm_recv(&mut self, slot: u32) -> io::Result<()> {
        self.push(opcode::RecvMulti::new(Fixed(slot), BUFFER_GROUP).build(), Operation::Recv, slot)
    }

    fn push_send(&mut self, slot: u32, bytes: *const u8, length: usize) -> io::Result<()> {
        let entry = opcode::Send::new(Fixed(slot), bytes, length as u32).flags(SEND_FLAGS).build();
        self.push(entry.flags(squeue::Flags::SKIP_SUCCESS), Operation::Send, slot)
    }

    /// The connection that a completion belongs to, unless it belongs to one that held the slot before.
    fn current(&mut self, user_data: u64) -> Option<(u32, &mut Connection)> {
        let slot = user_data as u32;
        let connection = self.connections.get_mut(slot as usize)?;
        let same = u64::from(connection.generation & 0xff_ffff) == (user_data >> 32) & 0xff_ffff;
        (connection.open && same).then_some((slot, connection))
    }

    /// First pass: a send that did not send all puts the rest back and waits for room.
    fn failed_send(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        if Operation::of(completion.user_data()) != Some(Operation::Send) {
            return Ok(());
        }
        let sent = completion.result();
        let Some((slot, connection)) = self.current(completion.user_data()) else { return Ok(()) };
        if connection.closing || connection.sending == 0 || (sent < 0 && sent != -libc::EAGAIN) {
            return Ok(()); // A reply of the opening or the last one, or the peer is gone: its recv ends too.
        }
        connection.owed += u64::from(connection.sending) - sent.max(0) as u64;
        connection.sending = 0;
        connection.blocked = true;
        self.push(opcode::PollAdd::new(Fixed(slot), libc::POLLOUT as u32).build(), Operation::Writable, slot)
    }

    fn complete(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        match Operation::of(completion.user_data()) {
            Some(Operation::Accept) => self.accepted(completion),
            Some(Operation::Recv) => self.received(completion),
            Some(Operation::Writable) => {
                if let Some((slot, connection)) = self.current(completion.user_data()) {
                    connection.blocked = false;
                    self.owe(slot, 0);
                }
                Ok(())
            }
            Some(Operation::Send | Operation::Cancel | Operation::Close) | None => Ok(()),
        }
    }

    fn accepted(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        if completion.result() >= 0 {
            let slot = completion.result() as u32;
            self.used = self.used.max(slot as usize + 1);
            let place = &mut self.connections[slot as usize];
            *place = Connection { open: true, generation: place.generation + 1, ..Connection::default() };
            self.arm_recv(slot)?;
        }
        if cqueue::more(completion.flags()) { Ok(()) } else { self.arm_accept() }
    }

    fn received(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        let buffer = cqueue::buffer_select(completion.flags());
        let result = self.heard(completion, buffer);
        if let Some(id) = buffer {
            self.buffers.give_back(id);
        }
        result
    }

    fn heard(&mut self, completion: &cqueue::Entry, buffer: Option<u16>) -> io::Result<()> {
        let (result, more) = (completion.result(), cqueue::more(completion.flags()));
        let Some((slot, connection)) = self.current(completion.user_data()) else { return Ok(()) };
        if connection.closing {
            return if more { Ok(()) } else { self.free(slot) };
        }
        let Some(id) = buffer.filter(|_| result > 0) else {
            // Without bytes the recv is over: out of buffers, end of input, or an error.
            return if result == -libc::ENOBUFS { self.arm_recv(slot) } else { self.free(slot) };
        };
        let mut progress = connection.progress;
        let heard = progress.hear(&self.script, self.buffers.filled(id, result as usize));
        self.connections[slot as usize].progress = progress;
        for step in heard.opening {
            let reply = &self.script.opening[step].reply;
            let (bytes, length) = (reply.as_ptr(), reply.len());
            self.push_send(slot, bytes, length)?;
        }
        if heard.units > 0 {
            self.answer(slot, heard.units as u64);
        }
        if heard.close {
            return self.close(slot, more);
        }
        if more { Ok(()) } else { self.arm_recv(slot) }
    }

    fn answer(&mut self, sender: u32, units: u64) {
        self.connections[sender as usize].publishes = true;
        if let Some(unit_bytes) = self.delivery.as_ref().map(Repeated::unit_bytes) {
            for slot in 0..self.used {
                let connection = &self.connections[slot];
                if connection.open && !connection.publishes && connection.progress.is_open(&self.script) {
                    self.owe(slot as u32, units * unit_bytes);
                }
            }
        }
        self.owe(sender, units * self.reply.unit_bytes());
    }

    fn owe(&mut self, slot: u32, bytes: u64) {
        let connection = &mut self.connections[slot as usize];
        connection.owed += bytes;
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(slot);
        }
    }

    /// One send for each connection that is owed something; the failures come with the next completions.
    fn flush(&mut self) -> io::Result<()> {
        let dirty = std::mem::take(&mut self.dirty);
        for &slot in &dirty {
            let connection = &mut self.connections[slot as usize];
            connection.dirty = false;
            if !connection.open || connection.closing || connection.blocked || connection.owed == 0 {
                continue;
            }
            let stream = match &self.delivery {
                Some(delivery) if !connection.publishes => delivery,
                _ => &self.reply,
            };
            let bytes = stream.slice(connection.owed);
            let (pointer, length) = (bytes.as_ptr(), bytes.len());
            connection.owed -= length as u64;
            connection.sending = length as u32;
            self.push_send(slot, pointer, length)?;
            if self.connections[slot as usize].owed > 0 {
                self.owe(slot, 0);
            }
        }
        if self.dirty.is_empty() {
            self.dirty = dirty;
            self.dirty.clear();
        }
        Ok(())
    }

    fn close(&mut self, slot: u32, recv_armed: bool) -> io::Result<()> {
        let (bytes, length) = (self.script.close_reply.as_ptr(), self.script.close_reply.len());
        self.push_send(slot, bytes, length)?;
        if !recv_armed {
            return self.free(slot);
        }
        let connection = &mut self.connections[slot as usize];
        connection.closing = true;
        let generation = u64::from(connection.generation & 0xff_ffff);
        let recv = (Operation::Recv as u64) << 56 | generation << 32 | u64::from(slot);
        let entry = opcode::AsyncCancel::new(recv).build().flags(squeue::Flags::SKIP_SUCCESS);
        self.push(entry, Operation::Cancel, slot)
    }

    /// Closes the socket; nothing may be armed on it.
    fn free(&mut self, slot: u32) -> io::Result<()> {
        let connection = &mut self.connections[slot as usize];
        connection.open = false;
        let entry = opcode::Close::new(Fixed(slot)).build().flags(squeue::Flags::SKIP_SUCCESS);
        self.push(entry, Operation::Close, slot)
    }
}
