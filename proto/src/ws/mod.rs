//! Server-side WebSocket framing (RFC 6455).
//!
//! Owns frames in both directions: [`Reader`] turns received bytes into messages and control frames,
//! the functions of [`write`] put frame headers around what is sent. Must not know the handshake (see
//! [`http`](crate::http)), what messages mean, or how answers to pings and closes are queued.

mod header;
mod mask;
mod reader;
mod write;

use crate::close::CloseReason;
pub use reader::{Chunk, Event, FrameState, Reader, ReaderState, Text};

pub use write::{
    FrameStart, begin_frame, begin_small_frame, finish_frame, frame_header, write_close, write_frame,
};

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

/// Frame types (RFC 6455 section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// A further fragment of a message.
    Continuation = 0,
    /// UTF-8 text.
    Text = 1,
    /// Bytes.
    Binary = 2,
    /// Close handshake.
    Close = 8,
    /// Heartbeat.
    Ping = 9,
    /// Answer to a ping.
    Pong = 10,
}

impl Opcode {
    /// The opcode in the low four bits of a frame's first byte; `None` for reserved ones.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits & 0x0f {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return None,
        })
    }

    /// Whether it is a control frame (RFC 6455 section 5.5).
    pub const fn is_control(self) -> bool {
        self as u8 & 0x8 != 0
    }
}
