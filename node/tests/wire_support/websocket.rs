//! A WebSocket client of bare bytes: it can say what no proper client would.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::sockets::{End, connect};

pub const FIN: u8 = 0x80;
pub const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// Any mask that changes every byte.
const MASK: [u8; 4] = [0xa1, 0x35, 0x5c, 0xee];

/// A masked frame; `first` is its first byte: FIN, reserved bits and opcode.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
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
    bytes.extend(MASK);
    let start = bytes.len();
    bytes.extend_from_slice(payload);
    for (byte, mask) in bytes[start..].iter_mut().zip(MASK.into_iter().cycle()) {
        *byte ^= mask;
    }
    bytes
}

/// The payload of a close frame.
pub fn close_payload(code: u16, reason: &[u8]) -> Vec<u8> {
    [&code.to_be_bytes(), reason].concat()
}

/// The request of an opening handshake.
pub fn handshake(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

/// What that key is answered with (RFC 6455 section 1.3).
const ACCEPT: &str = "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";

/// One frame of a server: opcode and payload.
pub type Received = (u8, Vec<u8>);

/// See the module's doc.
pub struct WebSocket {
    pub stream: TcpStream,
    bytes: Vec<u8>,
}

impl WebSocket {
    /// Connects, and upgrades at `path`.
    pub fn open(address: SocketAddr, path: &str) -> Self {
        let mut stream = connect(address);
        stream.write_all(handshake(path).as_bytes()).unwrap();
        let mut client = Self { stream, bytes: Vec::new() };
        let head = loop {
            if let Some(end) = client.bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break client.bytes.drain(..end + 4).collect();
            }
            assert!(client.read().is_ok(), "the stream ends in the handshake");
        };
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101 ") && head.contains(ACCEPT), "{head}");
        client
    }

    /// Sends a frame.
    pub fn send(&mut self, first: u8, payload: &[u8]) {
        self.stream.write_all(&frame(first, payload)).unwrap();
    }

    /// What writes to the stream from another thread, a piece at a time. It stops where the server has
    /// ended the connection.
    pub fn sender(&self) -> impl FnMut(&[u8]) + Send + 'static {
        let mut stream = self.stream.try_clone().unwrap();
        move |piece| match stream.write_all(piece) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Err(error) => panic!("the server takes nothing: {error}"),
        }
    }

    /// Reads once.
    fn read(&mut self) -> Result<(), End> {
        let mut buffer = [0; 65_536];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(End::Fin),
            Ok(n) => {
                self.bytes.extend_from_slice(&buffer[..n]);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(End::Reset),
            Err(error) => panic!("after {} bytes: {error}", self.bytes.len()),
        }
    }

    /// The next frame, or how the stream ended.
    pub fn receive(&mut self) -> Result<Received, End> {
        loop {
            if let Some((received, used)) = server_frame(&self.bytes) {
                self.bytes.drain(..used);
                return Ok(received);
            }
            if let Err(end) = self.read() {
                assert!(self.bytes.is_empty(), "the stream ends within a frame");
                return Err(end);
            }
        }
    }

    /// The next frame's text.
    pub fn text(&mut self) -> String {
        let (opcode, payload) = self.receive().expect("a frame");
        assert_eq!(opcode, TEXT, "{}", String::from_utf8_lossy(&payload));
        String::from_utf8(payload).unwrap()
    }
}

/// The frame at the start of `bytes` and its length. A server's frames are whole and unmasked (RFC 6455
/// section 5.1), their lengths in the shortest form.
pub fn server_frame(bytes: &[u8]) -> Option<(Received, usize)> {
    let (&first, &second) = (bytes.first()?, bytes.get(1)?);
    assert_eq!((first & 0xf0, second & 0x80), (FIN, 0), "a fragment, a reserved bit, or a mask");
    let (len, head) = match second {
        126 => (usize::from(u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?)), 4),
        127 => (u64::from_be_bytes(*bytes.get(2..)?.first_chunk()?) as usize, 10),
        len => (usize::from(len), 2),
    };
    let shortest = match len {
        0..126 => 2,
        126..65_536 => 4,
        _ => 10,
    };
    assert_eq!(head, shortest, "a length of {len}");
    let payload = bytes.get(head..head + len)?;
    Some(((first & 0x0f, payload.to_vec()), head + len))
}
