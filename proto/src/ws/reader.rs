//! Frames of a client: parsed and unmasked in place, incrementally.

use std::borrow::Cow;

use super::Opcode;
use crate::close::CloseReason;

/// Received bytes on their way through a [`Reader`]: what is not yet consumed.
///
/// The bytes are changed in place (unmasked), so they are borrowed mutably for as long as events of
/// them live, and no longer.
#[derive(Debug, Default)]
pub struct Chunk<'c> {
    rest: &'c mut [u8],
}

impl<'c> Chunk<'c> {
    /// All of `bytes` is to be read.
    pub fn new(bytes: &'c mut [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are not consumed yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Whether everything is consumed.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Splits off the next `count` bytes.
    fn take(&mut self, count: usize) -> &'c mut [u8] {
        let (head, tail) = std::mem::take(&mut self.rest).split_at_mut(count);
        self.rest = tail;
        head
    }
}

/// What a client sent. Payloads borrow from the chunk, or own what was assembled over several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'c> {
    /// A whole message: [`Opcode::Text`] (valid UTF-8) or [`Opcode::Binary`].
    Message {
        /// Text or Binary.
        opcode: Opcode,
        /// Unmasked payload, all fragments joined.
        payload: Cow<'c, [u8]>,
    },
    /// Answer with a pong of the same payload.
    Ping(Cow<'c, [u8]>),
    /// Answer to a ping, or unasked.
    Pong(Cow<'c, [u8]>),
    /// The client closes; nothing after it is read.
    Close {
        /// Its code, valid by RFC 6455 section 7.4; `None` when the frame was empty.
        code: Option<u16>,
        /// Its reason, at most 123 bytes.
        reason: Cow<'c, str>,
    },
}

/// What a client did wrong; the connection closes with [`WsError::close_reason`]. Always the peer's
/// fault; nothing after it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WsError {
    /// A broken rule of framing: closes with 1002.
    #[error("websocket protocol: {0}")]
    Protocol(&'static str),
    /// A text message or a close reason that is not UTF-8: closes with 1007.
    #[error("text is not valid UTF-8")]
    Utf8,
    /// A message larger than the limit, seen at its header: closes with 1009.
    #[error("message too big")]
    TooBig,
}

impl WsError {
    /// How the connection closes.
    pub fn close_reason(self) -> CloseReason {
        match self {
            Self::Protocol(_) => CloseReason::WsProtocol,
            Self::Utf8 => CloseReason::InvalidUtf8,
            Self::TooBig => CloseReason::MessageTooBig,
        }
    }
}

/// Incremental reader of one connection's frames.
///
/// ```
/// # use ringmain_proto::ws::{Chunk, Event, Reader};
/// # let (mut reader, mut bytes) = (Reader::new(), [0x81, 0x81, 1, 2, 3, 4, b'a' ^ 1]);
/// let mut chunk = Chunk::new(&mut bytes);
/// while let Some(event) = reader.next(&mut chunk, 65_536).unwrap() {
///     // an event borrows from the bytes only: reader and session are free
/// }
/// # assert!(chunk.is_empty());
/// ```
#[derive(Debug, Default)]
pub struct Reader {
    partial: Option<Box<Partial>>,
    ended: bool,
}

#[derive(Debug)]
struct Partial {}

impl Reader {
    /// A reader at the start of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next event of `chunk`; `None` when more bytes are needed (what is left of the chunk is
    /// kept in the reader then, and the chunk is empty). After a close event or an error everything
    /// is discarded.
    ///
    /// `message_bytes_max`: largest message, in bytes of payload, all fragments together.
    pub fn next<'c>(
        &mut self,
        chunk: &mut Chunk<'c>,
        message_bytes_max: usize,
    ) -> Result<Option<Event<'c>>, WsError> {
        let _ = (chunk.take(0), message_bytes_max, self.ended);
        Ok(None)
    }

    /// Heap bytes held for a partial frame or message; 0 when idle.
    pub fn buffered_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |_| 0)
    }
}
