//! Client protocols: bytes of one WebSocket message to [`Command`]s, [`Reply`] and [`Push`] to bytes.
//!
//! Owns the choice of wire format, and is all that the core sees of it: codecs are leaves. Must not
//! know frames, sessions, or what a command does.

mod centrifuge;

use crate::json::JsonError;
use crate::message::{Command, Push, Reply};
use crate::ws::{Opcode, Text};

/// A wire format; one arm each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Centrifuge v2 client protocol in JSON, newline-separated.
    #[default]
    Json,
}

/// Why a message could not be decoded. The peer's fault; the connection closes with 3501, once the
/// commands before it are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not UTF-8.
    #[error("message is not UTF-8")]
    Utf8,
    /// Not what the format's grammar allows.
    #[error("malformed message")]
    Syntax,
    /// A known field with a value of another type, or out of its range.
    #[error("field has the wrong type")]
    Type,
    /// Nested deeper, or longer lists, than the limits allow.
    #[error("a limit is exceeded")]
    Limit,
    /// One command that asks for two things.
    #[error("more than one request in a command")]
    Ambiguous,
}

impl From<JsonError> for DecodeError {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::Syntax => Self::Syntax,
            JsonError::Type => Self::Type,
            JsonError::Depth => Self::Limit,
        }
    }
}

impl Codec {
    /// The commands of one text message, in order. Ends after the first error, which comes after the
    /// commands before it: an empty message and a blank line are errors too.
    #[inline]
    pub fn decode_text<'a>(self, message: &'a Text<'_>) -> Commands<'a> {
        match self {
            Self::Json => Commands { state: State::JsonLines(message.as_bytes()) },
        }
    }

    /// The same for a binary message.
    pub fn decode(self, message: &[u8]) -> Commands<'_> {
        match (self, simdutf8::basic::from_utf8(message)) {
            (Self::Json, Ok(_)) => Commands { state: State::JsonLines(message) },
            (Self::Json, Err(_)) => Commands { state: State::Failed(DecodeError::Utf8) },
        }
    }

    /// Appends the reply to command `id`: the payload only, no frame header, no separator.
    pub fn encode_reply(self, id: u32, reply: &Reply<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Json => centrifuge::reply(id, reply, out),
        }
    }

    /// Appends a push: the payload only, no frame header, no separator.
    pub fn encode_push(self, push: &Push<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Json => centrifuge::push(push, out),
        }
    }

    /// Frame type of this format's messages.
    pub const fn opcode(self) -> Opcode {
        match self {
            Self::Json => Opcode::Text,
        }
    }

    /// Subprotocol to answer with, if the client offered it.
    pub const fn subprotocol(self) -> Option<&'static str> {
        match self {
            Self::Json => Some("centrifuge-json"),
        }
    }

    /// What separates messages of this format that share one frame.
    pub const fn separator(self) -> &'static [u8] {
        match self {
            Self::Json => b"\n",
        }
    }
}

/// Iterator of [`Codec::decode`].
#[derive(Clone, Debug)]
pub struct Commands<'a> {
    state: State<'a>,
}

#[derive(Clone, Debug)]
enum State<'a> {
    /// What is left of a message, from the start of a line: valid UTF-8.
    JsonLines(&'a [u8]),
    /// Nothing was decodable; to be told once.
    Failed(DecodeError),
    Ended,
}

/// A publish command of the usual shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsualPublish<'a> {
    /// Of the command; not 0.
    pub id: u32,
    /// As it stands in the message, without escapes.
    pub channel: &'a str,
    /// One JSON value.
    pub data: &'a [u8],
}

impl<'a> Commands<'a> {
    /// The next command, if it is a publish in the shape that SDKs write: a short cut for the most frequent
    /// command. Otherwise nothing is consumed, and [`Iterator::next`] decides.
    #[inline]
    pub fn next_publish(&mut self) -> Option<UsualPublish<'a>> {
        let State::JsonLines(text) = self.state else { return None };
        let (publish, rest) = centrifuge::usual_publish(text)?;
        self.state = if rest.is_empty() { State::Ended } else { State::JsonLines(rest) };
        Some(publish)
    }

    /// What is not decoded yet: a message of its own, empty at the end.
    pub fn rest(&self) -> &'a [u8] {
        match self.state {
            State::JsonLines(text) => text,
            State::Failed(_) | State::Ended => &[],
        }
    }
}

impl<'a> Iterator for Commands<'a> {
    type Item = Result<Command<'a>, DecodeError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let text = match self.state {
            State::JsonLines(text) => text,
            State::Failed(error) => {
                self.state = State::Ended;
                return Some(Err(error));
            }
            State::Ended => return None,
        };
        let (line, rest) = match memchr::memchr(b'\n', text) {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (text, &[][..]),
        };
        let line = simdutf8::basic::from_utf8(line).map_err(|_| DecodeError::Utf8);
        let command = line.and_then(centrifuge::command);
        self.state = if rest.is_empty() || command.is_err() { State::Ended } else { State::JsonLines(rest) };
        Some(command)
    }
}
