//! Clients, and what the kernel knows of a server's sockets.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};

use super::node::{PATIENCE, await_that};

/// A connected client that fails rather than hangs.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// FIN.
    Fin,
    /// RST.
    Reset,
}

/// Reads to the end.
pub fn read_to_end(mut stream: impl Read) -> (Vec<u8>, End) {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => (all, End::Fin),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (all, End::Reset),
        Err(error) => panic!("after {} bytes: {error}", all.len()),
    }
}

/// Sockets of this machine that some process holds with this local port, listeners apart: what
/// `ss -tn sport = :PORT` shows with an inode.
pub fn live_sockets(port: u16) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let live = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local_port = fields[1].rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        local_port == Some(port) && fields[3] != "0A" && fields[9] != "0"
    };
    table.lines().skip(1).filter(live).count()
}

/// Waits until `count` sockets are live on the server's port.
pub fn await_live(port: u16, count: usize) {
    await_that(
        || live_sockets(port) == count,
        || format!("{} live sockets, not {count}", live_sockets(port)),
    );
}

/// Private memory of this process in bytes.
pub fn private_bytes() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let private = rollup.lines().filter(|line| line.starts_with("Private_"));
    private.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024).sum()
}
