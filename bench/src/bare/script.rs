//! What a bare server hears and says, and how far a connection has come in it. No IO here.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The bytes kept ready for one send: as many replies as fit, at least one.
const REPEATED_BYTES: usize = 32 << 10;

/// So many bytes are answered with these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Exchange {
    pub(crate) request_bytes: usize,
    pub(crate) reply: Vec<u8>,
}

/// A connection's life on a bare server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Script {
    /// First these, in order: the upgrade, then what opens a session.
    pub(crate) opening: Vec<Exchange>,
    /// Then this, over and over.
    pub(crate) steady: Exchange,
    /// Every steady request also sends these bytes to every other connection that is past its opening.
    pub(crate) delivery: Option<Vec<u8>>,
    /// The answer to a close frame; then the connection is closed.
    pub(crate) close_reply: Vec<u8>,
}

/// A script that no connection could follow: a mistake of the caller.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a script needs at least one exchange to open, and no request may have 0 bytes")]
pub(crate) struct EmptyRequest;

impl Script {
    pub(crate) fn check(&self) -> Result<(), EmptyRequest> {
        let mut exchanges = self.opening.iter().chain([&self.steady]);
        if self.opening.is_empty() || exchanges.any(|exchange| exchange.request_bytes == 0) {
            return Err(EmptyRequest);
        }
        Ok(())
    }
}

/// How far one connection is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    /// How many exchanges of the opening are done.
    step: u32,
    /// Bytes at hand of the request that is not complete yet.
    have: u32,
}

/// What is to be done about the bytes that were heard.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    /// Send the replies of these exchanges of the opening.
    pub(crate) opening: Range<usize>,
    /// So many steady requests are complete.
    pub(crate) units: usize,
    /// A close frame came: answer it and close.
    pub(crate) close: bool,
}

impl Progress {
    /// Whether the opening is over: the connection takes part in deliveries.
    pub(crate) fn is_open(&self, script: &Script) -> bool {
        self.step as usize == script.opening.len()
    }

    pub(crate) fn hear(&mut self, script: &Script, mut data: &[u8]) -> Heard {
        let first = self.step as usize;
        let mut heard = Heard { opening: first..first, units: 0, close: false };
        while let Some(exchange) = script.opening.get(self.step as usize) {
            if self.closes(data) {
                heard.close = true;
                return heard;
            }
            let missing = exchange.request_bytes - self.have as usize;
            if data.len() < missing {
                self.have += data.len() as u32;
                return heard;
            }
            data = &data[missing..];
            self.have = 0;
            self.step += 1;
            heard.opening.end += 1;
        }
        if self.closes(data) {
            heard.close = true;
            return heard;
        }
        let total = self.have as usize + data.len();
        let rest = total % script.steady.request_bytes;
        heard.units = total / script.steady.request_bytes;
        self.have = rest as u32;
        // Only where the rest begins in this piece is its first byte one that begins a request.
        heard.close = rest > 0 && heard.units > 0 && is_close(data[data.len() - rest]);
        heard
    }

    fn closes(self, data: &[u8]) -> bool {
        self.have == 0 && self.step > 0 && data.first().is_some_and(|&first| is_close(first))
    }
}

/// RFC 6455 section 5.2: FIN and opcode 8.
fn is_close(first: u8) -> bool {
    first == 0x88
}

/// One reply many times over, so that any number of them leaves in one send.
#[derive(Clone, Debug)]
pub(crate) struct Repeated {
    bytes: Vec<u8>,
    unit: usize,
}

impl Repeated {
    pub(crate) fn new(unit: &[u8]) -> Repeated {
        let times = (REPEATED_BYTES / unit.len().max(1)).max(1);
        Repeated { bytes: unit.repeat(times), unit: unit.len() }
    }

    pub(crate) fn unit_bytes(&self) -> u64 {
        self.unit as u64
    }

    /// The next bytes of a stream of whole units of which `owed` bytes are left: what one send can take.
    pub(crate) fn slice(&self, owed: u64) -> &[u8] {
        if owed == 0 {
            return &[];
        }
        let in_unit = (self.unit - (owed % self.unit as u64) as usize) % self.unit;
        let end = (in_unit as u64 + owed).min(self.bytes.len() as u64) as usize;
        &self.bytes[in_unit..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script() -> Script {
        let exchange = |request_bytes, reply: &[u8]| Exchange { request_bytes, reply: reply.into() };
        Script {
            opening: vec![exchange(10, b"one"), exchange(5, b"two")],
            steady: exchange(4, b"pong"),
            delivery: None,
            close_reply: b"bye".into(),
        }
    }

    #[test]
    fn follows_the_script_however_the_bytes_are_cut() {
        let script = script();
        let input: Vec<u8> = [&[b'x'; 15 + 4 * 3][..], &[0x88, 0, 0]].concat();
        for size in 1..=input.len() {
            let mut progress = Progress::default();
            let (mut opening, mut units, mut closed) = (0, 0, false);
            for piece in input.chunks(size) {
                if closed {
                    break;
                }
                let heard = progress.hear(&script, piece);
                opening += heard.opening.len();
                units += heard.units;
                closed = heard.close;
            }
            assert_eq!((opening, units, closed), (2, 3, true), "pieces of {size}");
            assert!(progress.is_open(&script));
        }
    }

    #[test]
    fn a_close_may_come_in_the_middle_of_the_opening() {
        let mut progress = Progress::default();
        let heard = progress.hear(&script(), &[&[b'x'; 10][..], &[0x88, 0]].concat());
        assert_eq!(heard, Heard { opening: 0..1, units: 0, close: true });
        assert!(!progress.is_open(&script()));
    }

    #[test]
    fn slices_continue_in_the_middle_of_a_unit() {
        let repeated = Repeated::new(b"abcd");
        assert_eq!(repeated.slice(0), b"");
        assert_eq!(repeated.slice(8), b"abcdabcd");
        assert_eq!(repeated.slice(7), b"bcdabcd");
        assert_eq!(repeated.slice(1), b"d");
        assert_eq!(repeated.slice(1 << 40).len(), REPEATED_BYTES);
        let large = Repeated::new(&[7; REPEATED_BYTES + 1]);
        assert_eq!(large.slice(2 * REPEATED_BYTES as u64 + 2).len(), REPEATED_BYTES + 1);
    }

    #[test]
    fn checks_for_empty_requests() {
        assert_eq!(script().check(), Ok(()));
        let mut empty = script();
        empty.steady.request_bytes = 0;
        assert_eq!(empty.check(), Err(EmptyRequest));
        let mut none = script();
        none.opening.clear();
        assert_eq!(none.check(), Err(EmptyRequest));
    }
}
