//! Frames of a client: parsed and unmasked in place, incrementally.

use std::borrow::Cow;

use tungstenite::protocol::frame::coding::CloseCode;

use super::header::{self, CLIENT_HEADER_BYTES_MAX, FrameHeader};
use super::mask::unmask;
use super::{Opcode, WsError};

mod state;

pub use state::{FrameState, ReaderState};

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
    /// A whole text message, unmasked, all fragments joined.
    Text(Text<'c>),
    /// A whole binary message, likewise.
    Binary(Cow<'c, [u8]>),
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

/// The payload of a text message: valid UTF-8, checked once, by the reader that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text<'c>(Cow<'c, [u8]>);

impl Text<'_> {
    /// The text as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<String> for Text<'static> {
    fn from(text: String) -> Self {
        Self(Cow::Owned(text.into_bytes()))
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
    /// What is held between chunks; `None` when the last chunk ended with a whole message.
    partial: Option<Box<Partial>>,
    /// A close frame or an error was seen.
    ended: bool,
}

const _: () = assert!(size_of::<Reader>() <= 32, "an idle connection pays for a reader");

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
        if self.ended {
            *chunk = Chunk::default();
            return Ok(None);
        }
        let result = self.advance(chunk, message_bytes_max);
        if matches!(result, Err(_) | Ok(Some(Event::Close { .. }))) {
            self.ended = true;
            self.partial = None;
            *chunk = Chunk::default();
        }
        result
    }

    /// Heap bytes held for a partial frame or message; 0 when idle.
    pub fn buffered_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| {
            size_of::<Partial>() + partial.message.capacity() + partial.control.capacity()
        })
    }

    fn advance<'c>(&mut self, chunk: &mut Chunk<'c>, max: usize) -> Result<Option<Event<'c>>, WsError> {
        loop {
            if let Some(frame) = self.partial.as_mut().and_then(|partial| partial.frame.take()) {
                match self.continue_frame(frame, chunk, max)? {
                    Step::Event(event) => return Ok(Some(event)),
                    Step::FrameDone => {}
                    Step::NeedsBytes => return Ok(None),
                }
            }
            let Some(header) = self.next_header(chunk)? else {
                return Ok(None);
            };
            let frame = self.admit(header, max)?;
            let in_message = self.partial.as_ref().is_some_and(|partial| partial.message_opcode.is_some());
            let is_whole = frame.remaining <= chunk.remaining();
            if is_whole && (frame.opcode.is_control() || (frame.fin && !in_message)) {
                let payload = chunk.take(frame.remaining);
                let is_ascii = unmask(payload, frame.mask, 0);
                self.free_if_idle();
                return whole(frame.opcode, Cow::Borrowed(payload), is_ascii).map(Some);
            }
            self.partial.get_or_insert_default().frame = Some(frame);
        }
    }

    /// The next frame's header, taken from the chunk and what the last one left of it.
    fn next_header(&mut self, chunk: &mut Chunk<'_>) -> Result<Option<FrameHeader>, WsError> {
        let held = self.partial.as_ref().map_or(0, |partial| partial.header_len);
        if held == 0 {
            if let Some((header, header_len)) = header::parse(chunk.rest)? {
                chunk.take(header_len);
                return Ok(Some(header));
            }
            if chunk.is_empty() {
                return Ok(None);
            }
        }
        let partial = self.partial.get_or_insert_default();
        while !chunk.is_empty() {
            partial.header[partial.header_len] = chunk.take(1)[0];
            partial.header_len += 1;
            if let Some((header, header_len)) = header::parse(&partial.header[..partial.header_len])? {
                debug_assert_eq!(header_len, partial.header_len);
                partial.header_len = 0;
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    /// Whether this frame may come now, and how much it may hold.
    fn admit(&self, header: FrameHeader, max: usize) -> Result<Frame, WsError> {
        let FrameHeader { opcode, fin, mask, payload_len } = header;
        let frame = |remaining| Frame { opcode, fin, mask, remaining, unmasked: 0 };
        if opcode.is_control() {
            return Ok(frame(payload_len as usize));
        }
        let (message_opcode, message_len) = self
            .partial
            .as_ref()
            .map_or((None, 0), |partial| (partial.message_opcode, partial.message.len()));
        match (opcode, message_opcode) {
            (Opcode::Continuation, None) => Err(WsError::Protocol("continuation of nothing")),
            (Opcode::Text | Opcode::Binary, Some(_)) => {
                Err(WsError::Protocol("a new message within a fragmented one"))
            }
            _ if payload_len > max.saturating_sub(message_len) as u64 => Err(WsError::TooBig),
            _ => Ok(frame(payload_len as usize)),
        }
    }

    /// Takes what the chunk has of a frame that does not go the short way.
    fn continue_frame<'c>(
        &mut self,
        mut frame: Frame,
        chunk: &mut Chunk<'c>,
        max: usize,
    ) -> Result<Step<'c>, WsError> {
        let partial = self.partial.get_or_insert_default();
        let bytes = chunk.take(frame.remaining.min(chunk.remaining()));
        unmask(bytes, frame.mask, frame.unmasked);
        let still_remaining = frame.remaining - bytes.len();
        if frame.opcode.is_control() {
            partial.control.extend_from_slice(bytes);
        } else {
            partial.append(bytes, &frame, max)?;
        }
        frame.unmasked += bytes.len();
        frame.remaining = still_remaining;
        if still_remaining > 0 {
            partial.frame = Some(frame);
            return Ok(Step::NeedsBytes);
        }
        let event = if frame.opcode.is_control() {
            whole(frame.opcode, Cow::Owned(std::mem::take(&mut partial.control)), false)?
        } else if frame.fin {
            partial.finish_message()?
        } else {
            return Ok(Step::FrameDone);
        };
        self.free_if_idle();
        Ok(Step::Event(event))
    }

    fn free_if_idle(&mut self) {
        if self.partial.as_ref().is_some_and(|partial| partial.message_opcode.is_none()) {
            self.partial = None;
        }
    }
}

/// A frame whose payload is being read.
#[derive(Clone, Copy, Debug)]
struct Frame {
    opcode: Opcode,
    fin: bool,
    mask: [u8; 4],
    /// Payload bytes still to come.
    remaining: usize,
    /// Payload bytes taken.
    unmasked: usize,
}

/// What [`Reader::continue_frame`] came to.
enum Step<'c> {
    Event(Event<'c>),
    FrameDone,
    NeedsBytes,
}

/// What a reader holds between chunks. Freed as soon as nothing of it is needed.
#[derive(Debug, Default)]
struct Partial {
    /// A header cut short: its first `header_len` bytes.
    header: [u8; CLIENT_HEADER_BYTES_MAX],
    header_len: usize,
    /// The frame whose payload is awaited.
    frame: Option<Frame>,
    /// Text or Binary, while a message is being put together.
    message_opcode: Option<Opcode>,
    /// Payload of that message, unmasked.
    message: Vec<u8>,
    /// How much of it is known to be UTF-8.
    checked: usize,
    /// Payload of a control frame.
    control: Vec<u8>,
}

impl Partial {
    /// Adds to the message, and fails at the first byte that cannot belong to UTF-8 text.
    fn append(&mut self, bytes: &[u8], frame: &Frame, max: usize) -> Result<(), WsError> {
        if frame.opcode != Opcode::Continuation {
            self.message_opcode = Some(frame.opcode);
        }
        // Grow by doubling, but never beyond what may still come.
        let needed = self.message.len() + bytes.len();
        if needed > self.message.capacity() {
            let most = if frame.fin { self.message.len() + frame.remaining } else { max };
            let target = needed.max(self.message.capacity() * 2).min(most.max(needed));
            self.message.reserve_exact(target - self.message.len());
        }
        self.message.extend_from_slice(bytes);
        if self.message_opcode == Some(Opcode::Text) {
            self.checked += match simdutf8::compat::from_utf8(&self.message[self.checked..]) {
                Ok(text) => text.len(),
                Err(error) if error.error_len().is_some() => return Err(WsError::Utf8),
                Err(error) => error.valid_up_to(),
            };
        }
        Ok(())
    }

    fn finish_message<'c>(&mut self) -> Result<Event<'c>, WsError> {
        let payload = std::mem::take(&mut self.message);
        let checked = std::mem::take(&mut self.checked);
        match self.message_opcode.take() {
            Some(Opcode::Text) if checked < payload.len() => Err(WsError::Utf8),
            Some(Opcode::Text) => Ok(Event::Text(Text(Cow::Owned(payload)))),
            _ => Ok(Event::Binary(Cow::Owned(payload))),
        }
    }
}

/// The event of a message that came in one frame, or of a control frame.
#[inline]
fn whole(opcode: Opcode, payload: Cow<'_, [u8]>, is_ascii: bool) -> Result<Event<'_>, WsError> {
    match opcode {
        Opcode::Text if is_ascii || simdutf8::basic::from_utf8(&payload).is_ok() => {
            Ok(Event::Text(Text(payload)))
        }
        Opcode::Text => Err(WsError::Utf8),
        Opcode::Binary | Opcode::Continuation => Ok(Event::Binary(payload)),
        Opcode::Ping => Ok(Event::Ping(payload)),
        Opcode::Pong => Ok(Event::Pong(payload)),
        Opcode::Close => close(payload),
    }
}

/// A close frame's body (RFC 6455 sections 5.5.1 and 7.4).
fn close(payload: Cow<'_, [u8]>) -> Result<Event<'_>, WsError> {
    let Some(code) = payload.first_chunk::<2>() else {
        return match payload.len() {
            0 => Ok(Event::Close { code: None, reason: Cow::Borrowed("") }),
            _ => Err(WsError::Protocol("close frame of one byte")),
        };
    };
    let code = u16::from_be_bytes(*code);
    if !CloseCode::from(code).is_allowed() {
        return Err(WsError::Protocol("close code is not allowed"));
    }
    let reason = match payload {
        Cow::Borrowed(bytes) => std::str::from_utf8(&bytes[2..]).ok().map(Cow::Borrowed),
        Cow::Owned(bytes) => std::str::from_utf8(&bytes[2..]).ok().map(|text| Cow::Owned(text.to_owned())),
    };
    Ok(Event::Close { code: Some(code), reason: reason.ok_or(WsError::Utf8)? })
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
