//! A node's way to its broker: TCP through this process, so that it can be cut or go silent.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How soon a forwarder sees that the way was cut.
const LOOK: Duration = Duration::from_millis(20);

/// What all connections of one node look at.
#[derive(Default)]
struct Way {
    /// Connections of an earlier number are cut.
    number: AtomicU64,
    /// Nothing passes, nothing ends.
    silent: AtomicBool,
}

/// The proxies of one node, one per address of the broker, made when first asked for.
#[derive(Default)]
pub(crate) struct Proxies {
    ports: Mutex<HashMap<(String, u16), u16>>,
    way: Arc<Way>,
}

impl Proxies {
    /// The address to dial instead of this one.
    pub(crate) fn through(&self, host: &str, port: u16) -> (String, u16) {
        let mut ports = self.ports.lock().unwrap();
        // What it gives is known to it too: a broker may have been told the proxy's address.
        if ports.values().any(|ours| *ours == port) {
            return (host.to_owned(), port);
        }
        let ours = *ports
            .entry((host.to_owned(), port))
            .or_insert_with(|| listen(host.to_owned(), port, self.way.clone()));
        (Ipv4Addr::LOCALHOST.to_string(), ours)
    }

    /// Ends every connection.
    pub(crate) fn cut(&self) {
        self.way.number.fetch_add(1, Ordering::AcqRel);
    }

    /// Nothing passes any more, and nobody is told.
    pub(crate) fn isolate(&self) {
        self.way.silent.store(true, Ordering::Release);
    }

    /// New connections pass; those that were silent end.
    pub(crate) fn rejoin(&self) {
        if self.way.silent.load(Ordering::Acquire) {
            self.cut();
            self.way.silent.store(false, Ordering::Release);
        }
    }
}

fn listen(host: String, port: u16, way: Arc<Way>) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let ours = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), way) = (client, way.clone()) else { continue };
            let host = host.clone();
            std::thread::spawn(move || pass(&client, (&host, port), &way));
        }
    });
    ours
}

/// One connection, both ways, until an end or a cut.
fn pass(client: &TcpStream, to: (&str, u16), way: &Way) {
    let number = way.number.load(Ordering::Acquire);
    while way.silent.load(Ordering::Acquire) {
        if way.number.load(Ordering::Acquire) != number {
            return;
        }
        std::thread::sleep(LOOK);
    }
    let Ok(server) = TcpStream::connect(to) else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    std::thread::scope(|scope| {
        scope.spawn(|| forward(client, &server, way, number));
        forward(&server, client, way, number);
    });
}

fn forward(mut from: &TcpStream, mut to: &TcpStream, way: &Way, number: u64) {
    let mut buffer = vec![0; 64 << 10];
    let _ = from.set_read_timeout(Some(LOOK));
    while way.number.load(Ordering::Acquire) == number {
        if way.silent.load(Ordering::Acquire) {
            std::thread::sleep(LOOK);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            // What was read when silence fell is lost with the connection, which ends with the silence.
            Ok(_) if way.silent.load(Ordering::Acquire) => (),
            Ok(bytes) if to.write_all(&buffer[..bytes]).is_ok() => (),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => (),
            Ok(_) | Err(_) => break,
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
