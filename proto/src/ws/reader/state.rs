//! What a [`Reader`] holds of an unfinished frame or message, as plain data.
//!
//! Owns both ways: out of a reader, and back with every field checked, for the data may come from anywhere.
//! It must not know how the data is encoded.

use super::{CLIENT_HEADER_BYTES_MAX, Frame, Opcode, Partial, Reader, header};
use crate::limits::CONTROL_PAYLOAD_BYTES_MAX;

/// An unfinished frame or message: what came of it, unmasked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReaderState {
    /// A header cut short: at most 13 bytes. Empty while a frame's payload is awaited.
    pub header: Vec<u8>,
    /// The frame whose payload is awaited.
    pub frame: Option<FrameState>,
    /// Opcode of the message that is being put together: 1 or 2.
    pub message_opcode: Option<u8>,
    /// What came of that message, in bytes of payload.
    pub message: Vec<u8>,
    /// What came of a control frame: at most 125 bytes.
    pub control: Vec<u8>,
}

/// A frame whose payload is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameState {
    /// Its opcode (RFC 6455 section 5.2).
    pub opcode: u8,
    /// The last of its message.
    pub fin: bool,
    /// Its masking key.
    pub mask: [u8; 4],
    /// Payload bytes still to come.
    pub remaining: u64,
    /// Payload bytes that came.
    pub unmasked: u64,
}

impl Reader {
    /// What is held between chunks; `None`: nothing is, the next byte begins a frame and a message.
    pub fn state(&self) -> Option<ReaderState> {
        let partial = self.partial.as_ref()?;
        Some(ReaderState {
            header: partial.header[..partial.header_len].to_vec(),
            frame: partial.frame.map(|frame| FrameState {
                opcode: frame.opcode as u8,
                fin: frame.fin,
                mask: frame.mask,
                remaining: frame.remaining as u64,
                unmasked: frame.unmasked as u64,
            }),
            message_opcode: partial.message_opcode.map(|opcode| opcode as u8),
            message: partial.message.clone(),
            control: partial.control.clone(),
        })
    }

    /// A reader that goes on from `state`; `None`: no reader comes to hold such a thing.
    ///
    /// `message_bytes_max`: as for [`Reader::next`].
    pub fn from_state(state: ReaderState, message_bytes_max: usize) -> Option<Self> {
        let ReaderState { header: begun, frame, message_opcode, message, control } = state;
        let cut_short = begun.len() < CLIENT_HEADER_BYTES_MAX && matches!(header::parse(&begun), Ok(None));
        if !cut_short || (frame.is_some() && !begun.is_empty()) {
            return None;
        }
        let message_opcode = match message_opcode.map(opcode) {
            None if message.is_empty() => None,
            Some(Some(opcode @ (Opcode::Text | Opcode::Binary))) => Some(opcode),
            _ => return None,
        };
        let checked = match message_opcode {
            Some(Opcode::Text) => valid_utf8(&message)?,
            _ => 0,
        };
        let frame = match frame {
            Some(frame) => Some(checked_frame(frame, message_opcode, message.len(), control.len())?),
            None => None,
        };
        let in_control = frame.is_some_and(|frame| frame.opcode.is_control());
        let awaited = frame.filter(|_| !in_control).map_or(0, |frame| frame.remaining);
        if (!control.is_empty() && !in_control) || message_bytes_max.saturating_sub(message.len()) < awaited {
            return None;
        }
        let mut partial = Partial { frame, message_opcode, message, checked, control, ..Partial::default() };
        partial.header[..begun.len()].copy_from_slice(&begun);
        partial.header_len = begun.len();
        Some(Self { partial: Some(Box::new(partial)), ended: false })
    }
}

/// The opcode of a number, if it is one and nothing else.
fn opcode(bits: u8) -> Option<Opcode> {
    Opcode::from_bits(bits).filter(|opcode| *opcode as u8 == bits)
}

/// How much of a text is whole characters; `None`: no text begins so.
fn valid_utf8(text: &[u8]) -> Option<usize> {
    match simdutf8::compat::from_utf8(text) {
        Ok(text) => Some(text.len()),
        Err(error) if error.error_len().is_some() => None,
        Err(error) => Some(error.valid_up_to()),
    }
}

/// The frame, if it may be what came so far.
fn checked_frame(
    state: FrameState,
    message_opcode: Option<Opcode>,
    message_len: usize,
    control_len: usize,
) -> Option<Frame> {
    let FrameState { fin, mask, .. } = state;
    let remaining = usize::try_from(state.remaining).ok()?;
    let unmasked = usize::try_from(state.unmasked).ok()?;
    let opcode = opcode(state.opcode)?;
    let is_possible = if opcode.is_control() {
        fin && unmasked == control_len && remaining <= CONTROL_PAYLOAD_BYTES_MAX.saturating_sub(control_len)
    } else {
        let continues = opcode == Opcode::Continuation && message_opcode.is_some();
        (continues || message_opcode == Some(opcode)) && unmasked <= message_len
    };
    is_possible.then_some(Frame { opcode, fin, mask, remaining, unmasked })
}

#[cfg(test)]
mod tests {
    use super::super::{Chunk, Event};
    use super::*;

    /// A fragmented text with a ping inside, then a binary message, as a client sends them.
    fn frames() -> Vec<u8> {
        let mut bytes = Vec::new();
        for (first, payload) in [
            (0x01, "gr\u{fc}".as_bytes()),
            (0x89, b"still there?"),
            (0x00, "\u{df} \u{1f310}".as_bytes()),
            (0x80, b"!"),
            (0x82, &[7; 300]),
        ] {
            bytes.push(first);
            if payload.len() < 126 {
                bytes.push(0x80 | payload.len() as u8);
            } else {
                bytes.push(0x80 | 126);
                bytes.extend((payload.len() as u16).to_be_bytes());
            }
            let mask = [1, 2, 3, 4];
            bytes.extend(mask);
            bytes.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
        }
        bytes
    }

    fn read(reader: &mut Reader, bytes: &[u8], events: &mut Vec<String>) {
        let mut bytes = bytes.to_vec();
        let mut chunk = Chunk::new(&mut bytes);
        while let Some(event) = reader.next(&mut chunk, 1024).expect("good frames") {
            events.push(match event {
                Event::Text(text) => format!("{:?}", text.as_bytes()),
                other => format!("{other:?}"),
            });
        }
    }

    fn renewed(reader: &Reader) -> Reader {
        let Some(state) = reader.state() else { return Reader::new() };
        let renewed = Reader::from_state(state.clone(), 1024).expect("a reader held it");
        assert_eq!(renewed.state(), Some(state));
        renewed
    }

    #[test]
    fn goes_on_from_every_byte() {
        let bytes = frames();
        let mut expected = Vec::new();
        read(&mut Reader::new(), &bytes, &mut expected);
        assert_eq!(expected.len(), 3);
        for cut in 0..=bytes.len() {
            let (mut reader, mut events) = (Reader::new(), Vec::new());
            read(&mut reader, &bytes[..cut], &mut events);
            read(&mut renewed(&reader), &bytes[cut..], &mut events);
            assert_eq!(events, expected, "cut at {cut}");
        }
        let (mut reader, mut events) = (Reader::new(), Vec::new());
        for byte in &bytes {
            read(&mut reader, &[*byte], &mut events);
            reader = renewed(&reader);
        }
        assert_eq!(events, expected, "renewed at every byte");
    }

    #[test]
    fn refuses_what_no_reader_holds() {
        let text =
            ReaderState { message_opcode: Some(1), message: b"abc".to_vec(), ..ReaderState::default() };
        let frame = FrameState { opcode: 1, fin: true, mask: [0; 4], remaining: 5, unmasked: 3 };
        let good = ReaderState { frame: Some(frame), ..text.clone() };
        assert!(Reader::from_state(good.clone(), 8).is_some());
        let with = |frame: FrameState| ReaderState { frame: Some(frame), ..good.clone() };
        let control = FrameState { opcode: 9, unmasked: 0, ..frame };
        assert!(Reader::from_state(with(control), 8).is_some());
        for (state, why) in [
            (ReaderState { header: vec![0x81; 2], ..good.clone() }, "a header and a payload at once"),
            (ReaderState { header: vec![0x81, 0x81, 0, 0, 0, 0], ..text.clone() }, "a whole header"),
            (ReaderState { header: vec![0x81; 14], ..text.clone() }, "more than a header"),
            (ReaderState { header: vec![0xff], ..text.clone() }, "a header of nothing"),
            (ReaderState { message_opcode: None, ..text.clone() }, "a message of no kind"),
            (ReaderState { message_opcode: Some(9), ..text.clone() }, "a fragmented ping"),
            (ReaderState { message_opcode: Some(17), ..text.clone() }, "more than an opcode"),
            (ReaderState { message: vec![0xff], ..text.clone() }, "text that is none"),
            (ReaderState { control: vec![0], ..good.clone() }, "a control payload without a frame"),
            (with(FrameState { opcode: 2, ..frame }), "a frame of another message"),
            (with(FrameState { opcode: 3, ..frame }), "a reserved opcode"),
            (with(FrameState { remaining: 6, ..frame }), "more than a message may hold"),
            (with(FrameState { remaining: u64::MAX, ..frame }), "far more"),
            (with(FrameState { unmasked: 4, ..frame }), "more unmasked than came"),
            (with(FrameState { remaining: 126, ..control }), "more than a ping may hold"),
            (with(FrameState { fin: false, ..control }), "a ping to be continued"),
            (with(FrameState { unmasked: 1, ..control }), "a ping's byte that is not there"),
        ] {
            assert!(Reader::from_state(state, 8).is_none(), "{why}");
        }
    }
}
