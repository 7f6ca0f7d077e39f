//! Thousands of WebSocket clients in one thread, and what is known of a node's process from outside.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::wire_support::sockets::End;
use crate::wire_support::websocket::{FIN, PING, PONG, TEXT, frame, handshake, server_frame};

/// How long a crowd may need for what it does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What a client hears.
#[derive(Debug)]
pub(crate) enum Heard {
    /// A frame: opcode and payload.
    Frame(u8, Vec<u8>),
    /// The end of the stream.
    Ended(End),
}

/// One client.
struct Member {
    stream: TcpStream,
    bytes: Vec<u8>,
    unsent: Vec<u8>,
    upgraded: bool,
    reads: bool,
}

/// Clients by number; numbers are not used again.
pub(crate) struct Crowd {
    address: SocketAddr,
    poll: OwnedFd,
    members: HashMap<usize, Member>,
    next: usize,
    /// SO_RCVBUF of those that are opened.
    pub(crate) receive_buffer_bytes: Option<usize>,
}

impl Crowd {
    pub(crate) fn new(address: SocketAddr) -> Self {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
        Self { address, poll, members: HashMap::new(), next: 0, receive_buffer_bytes: None }
    }

    /// A client that has asked for `path` and then said `commands`, one message a line.
    pub(crate) fn open(&mut self, path: &str, commands: &str) -> usize {
        let stream = self.connect();
        stream.set_nodelay(true).expect("a socket");
        stream.set_nonblocking(true).expect("a socket");
        let index = self.next;
        self.next += 1;
        epoll::add(&self.poll, &stream, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)
            .expect("a watch");
        let member = Member { stream, bytes: Vec::new(), unsent: Vec::new(), upgraded: false, reads: true };
        self.members.insert(index, member);
        self.send(index, handshake(path).as_bytes());
        if !commands.is_empty() {
            self.text(index, commands);
        }
        index
    }

    fn connect(&self) -> TcpStream {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
        let (family, kind) = (AddressFamily::INET, SocketType::STREAM);
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None).expect("a socket");
        if let Some(bytes) = self.receive_buffer_bytes {
            // Before the connection: a window that was promised and is not there makes the node's kernel
            // retransmit into nothing, slower and slower.
            sockopt::set_socket_recv_buffer_size(&socket, bytes).expect("a socket");
        }
        connect(&socket, &self.address).expect("the node accepts");
        socket.into()
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Bytes that lie unread in the socket of a client that was told not to read.
    pub(crate) fn unread(&self, index: usize) -> u64 {
        rustix::io::ioctl_fionread(&self.members[&index].stream).expect("a socket")
    }

    /// Sends bytes; what the socket does not take waits.
    pub(crate) fn send(&mut self, index: usize, bytes: &[u8]) {
        if let Some(member) = self.members.get_mut(&index) {
            member.unsent.extend_from_slice(bytes);
            member.flush();
        }
    }

    pub(crate) fn text(&mut self, index: usize, text: &str) {
        self.send(index, &frame(FIN | TEXT, text.as_bytes()));
    }

    /// Ends the client's own direction.
    pub(crate) fn send_fin(&mut self, index: usize) {
        let stream = &self.members[&index].stream;
        // The node may have ended it in the meantime.
        let _ = stream.shutdown(Shutdown::Write);
    }

    /// Drops a client without a word.
    pub(crate) fn drop_member(&mut self, index: usize) {
        self.members.remove(&index);
    }

    /// Stops reading, or goes on.
    pub(crate) fn set_reading(&mut self, index: usize, reads: bool) {
        let Some(member) = self.members.get_mut(&index) else { return };
        member.reads = reads;
        let flags = if reads { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        epoll::modify(&self.poll, &member.stream, epoll::EventData::new_u64(index as u64), flags)
            .expect("a watch");
    }

    /// What those that read hear, waiting for it for a while.
    pub(crate) fn listen(&mut self, wait: Duration) -> Vec<(usize, Heard)> {
        let mut events = Vec::with_capacity(1_024);
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)).expect("epoll");
        let mut heard = Vec::new();
        for event in events {
            let index = event.data.u64() as usize;
            let Some(member) = self.members.get_mut(&index) else { continue };
            member.flush();
            // A socket that has failed is told whether it is watched or not.
            if !member.reads {
                continue;
            }
            let end = member.read();
            member.take_frames(|opcode, payload| heard.push((index, Heard::Frame(opcode, payload))));
            if let Some(end) = end {
                let whole = member.bytes.is_empty();
                assert!(whole || end == End::Reset, "client {index} has half a frame before FIN");
                heard.push((index, Heard::Ended(end)));
                self.members.remove(&index);
            }
        }
        heard
    }
}

impl Member {
    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => {
                    self.unsent.drain(..count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The read tells how it ended.
                Err(_) => self.unsent.clear(),
            }
        }
    }

    /// Reads what is there.
    fn read(&mut self) -> Option<End> {
        let mut buffer = [0; 65_536];
        match self.stream.read(&mut buffer) {
            Ok(0) => Some(End::Fin),
            Ok(count) => {
                self.bytes.extend_from_slice(&buffer[..count]);
                None
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(End::Reset),
            Err(error) => panic!("{error}"),
        }
    }

    fn take_frames(&mut self, mut take: impl FnMut(u8, Vec<u8>)) {
        let mut used = 0;
        if !self.upgraded {
            let Some(end) = self.bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return };
            assert!(self.bytes.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&self.bytes));
            used = end + 4;
            self.upgraded = true;
        }
        while let Some(((opcode, payload), length)) = server_frame(&self.bytes[used..]) {
            take(opcode, payload);
            used += length;
        }
        self.bytes.drain(..used);
    }
}

/// Raises this process's limit of open files, and gives how many clients it may have.
pub(crate) fn clients_allowed() -> usize {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("up to the hard limit");
    maximum.unwrap_or(1 << 20).saturating_sub(500) as usize
}

/// Private memory of a process in bytes.
pub(crate) fn private_bytes(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("our child");
    let private = rollup.lines().filter(|line| line.starts_with("Private_"));
    private.map(|line| line.split_whitespace().nth(1).expect("kB").parse::<u64>().expect("kB") * 1_024).sum()
}

/// The answer to a ping, of the client protocol or of WebSocket's own.
pub(crate) fn answer_to(opcode: u8, payload: &[u8]) -> Option<Vec<u8>> {
    match opcode {
        PING => Some(frame(FIN | PONG, payload)),
        TEXT if payload == b"{}" => Some(frame(FIN | TEXT, b"{}")),
        _ => None,
    }
}

/// Clients that connect and subscribe to `channel`, once all have their replies.
pub(crate) fn subscribers(
    crowd: &mut Crowd,
    count: usize,
    path: impl Fn(usize) -> &'static str,
    channel: &str,
) -> Vec<usize> {
    let commands =
        format!("{}\n{{\"id\":2,\"subscribe\":{{\"channel\":\"{channel}\"}}}}", r#"{"id":1,"connect":{}}"#);
    let end = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    let mut replies = 0;
    while all.len() < count || replies < 2 * count {
        assert!(Instant::now() < end, "{replies} replies for {} of {count} clients", all.len());
        // Never more on their way than the node's backlog holds.
        while all.len() < count && all.len() < replies / 2 + 1_000 {
            all.push(crowd.open(path(all.len()), &commands));
        }
        for (index, heard) in crowd.listen(Duration::from_millis(20)) {
            let Heard::Frame(opcode, payload) = heard else { panic!("client {index}: {heard:?}") };
            match answer_to(opcode, &payload) {
                Some(pong) => crowd.send(index, &pong),
                None => replies += replies_in(&payload),
            }
        }
    }
    all
}

/// Replies in a message, none of them an error.
fn replies_in(payload: &[u8]) -> usize {
    let text = String::from_utf8_lossy(payload);
    assert!(!text.contains(r#""error":"#), "{text}");
    text.lines().filter(|line| line.starts_with(r#"{"id":"#)).count()
}

/// Numbers that are the same for a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 31)) as usize % n
    }
}
