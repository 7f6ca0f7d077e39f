//! The bare epoll server: edge-triggered, one thread, plain accept4, recv and send.
//!
//! A recv that fills less than the buffer is not repeated, unless the end of input is announced: the next bytes raise
//! a new edge (epoll(7)). Writability is
//! asked for only after a send was refused.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::script::{Progress, Repeated, Script};

/// Events taken from the kernel at once.
const EVENTS_MAX: usize = 1024;
/// The buffer that all connections read into.
const RECV_BYTES: usize = 64 << 10;

const READ: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

struct Connection {
    socket: OwnedFd,
    progress: Progress,
    /// Bytes of whole units that are not sent yet.
    owed: u64,
    /// It has sent a steady request on a fan-out server: it is owed replies, not deliveries.
    publishes: bool,
    /// Writability is watched.
    blocked: bool,
}

/// Serves `script` on `listener` until the process is ended.
pub(crate) fn serve(listener: OwnedFd, script: Script) -> Result<(), Errno> {
    let mut server = Server::new(listener, script)?;
    let mut events = Vec::with_capacity(EVENTS_MAX);
    loop {
        match epoll::wait(&server.epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        for event in events.drain(..) {
            server.event(event.data.u64() as usize, event.flags);
        }
    }
}

struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    script: Script,
    reply: Repeated,
    delivery: Option<Repeated>,
    /// By descriptor number; the listener's own place stays empty.
    connections: Vec<Option<Connection>>,
    buffer: Vec<MaybeUninit<u8>>,
}

impl Server {
    fn new(listener: OwnedFd, script: Script) -> Result<Server, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let data = EventData::new_u64(listener.as_raw_fd() as u64);
        epoll::add(&epoll, &listener, data, EventFlags::IN | EventFlags::ET)?;
        Ok(Server {
            epoll,
            listener,
            reply: Repeated::new(&script.steady.reply),
            delivery: script.delivery.as_deref().map(Repeated::new),
            script,
            connections: Vec::new(),
            buffer: vec![MaybeUninit::uninit(); RECV_BYTES],
        })
    }

    fn event(&mut self, index: usize, flags: EventFlags) {
        if index == self.listener.as_raw_fd() as usize {
            return self.accept();
        }
        if flags.intersects(EventFlags::OUT) {
            self.unblock(index);
        }
        let ends = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        if ends || flags.contains(EventFlags::IN) {
            self.read(index, ends);
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // Any failure ends this round: EAGAIN, or a limit of descriptors; the next connection raises a new edge.
        while let Ok(socket) = accept_with(&self.listener, flags) {
            let index = socket.as_raw_fd() as usize;
            if epoll::add(&self.epoll, &socket, EventData::new_u64(index as u64), READ).is_err() {
                continue;
            }
            if self.connections.len() <= index {
                self.connections.resize_with(index + 1, || None);
            }
            let progress = Progress::default();
            self.connections[index] =
                Some(Connection { socket, progress, owed: 0, publishes: false, blocked: false });
        }
    }

    fn read(&mut self, index: usize, to_end: bool) {
        loop {
            let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else { return };
            let (heard, full) = match recv(&connection.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok(((data, _), _)) if !data.is_empty() => {
                    (connection.progress.hear(&self.script, data), data.len() == RECV_BYTES)
                }
                Err(Errno::AGAIN | Errno::INTR) => return,
                Ok(_) | Err(_) => {
                    self.connections[index] = None;
                    return;
                }
            };
            for exchange in &self.script.opening[heard.opening] {
                // A fresh socket has room for these; a peer that closed meanwhile is found by the next recv.
                let _ = send(&connection.socket, &exchange.reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            }
            if heard.units > 0 {
                self.answer(index, heard.units as u64);
            }
            if heard.close {
                self.close(index);
                return;
            }
            if !full && !to_end {
                return;
            }
        }
    }

    fn answer(&mut self, sender: usize, units: u64) {
        let Server { epoll, script, reply, delivery, connections, .. } = self;
        if let Some(delivery) = delivery {
            for (index, place) in connections.iter_mut().enumerate() {
                let Some(connection) = place else { continue };
                if index != sender && !connection.publishes && connection.progress.is_open(script) {
                    connection.owed += units * delivery.unit_bytes();
                    connection.flush(delivery, epoll, index);
                }
            }
        }
        if let Some(connection) = &mut connections[sender] {
            connection.publishes = true;
            connection.owed += units * reply.unit_bytes();
            connection.flush(reply, epoll, sender);
        }
    }

    fn unblock(&mut self, index: usize) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        if !std::mem::take(&mut connection.blocked) {
            return;
        }
        let stream = match &self.delivery {
            Some(delivery) if !connection.publishes => delivery,
            _ => &self.reply,
        };
        connection.flush(stream, &self.epoll, index);
        if !connection.blocked {
            let _ = epoll::modify(&self.epoll, &connection.socket, EventData::new_u64(index as u64), READ);
        }
    }

    fn close(&mut self, index: usize) {
        if let Some(connection) = self.connections[index].take() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            // The peer has said its last word, so closing right away sends FIN and no RST.
            let _ = send(&connection.socket, &self.script.close_reply, flags);
        }
    }
}

impl Connection {
    /// Sends what is owed, until nothing is or the socket is full.
    fn flush(&mut self, stream: &Repeated, epoll: &OwnedFd, index: usize) {
        while self.owed > 0 && !self.blocked {
            let bytes = stream.slice(self.owed);
            let sent = match send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => sent,
                Err(Errno::AGAIN) => 0,
                Err(Errno::INTR) => continue,
                // The connection is gone; its next recv says so and frees it.
                Err(_) => {
                    self.owed = 0;
                    return;
                }
            };
            self.owed -= sent as u64;
            if sent < bytes.len() {
                self.blocked = true;
                let _ = epoll::modify(
                    epoll,
                    &self.socket,
                    EventData::new_u64(index as u64),
                    READ | EventFlags::OUT,
                );
            }
        }
    }
}
