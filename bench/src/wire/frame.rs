//! Client-side WebSocket framing (RFC 6455 section 5).
//!
//! Every frame we send is masked with one fixed key, so that a request can be prepared once and its digits patched
//! afterwards. Frames of the server are read whole and in place; a fragmented message is refused, because no server
//! that is measured here fragments the small messages of a benchmark, and following fragments would cost each read.

use thiserror::Error;

/// The masking key of every frame we send. RFC 6455 section 5.3 asks for an unpredictable one to protect proxies;
/// a benchmark wants equal bytes in every run.
pub(crate) const MASK: [u8; 4] = [0x52, 0x4d, 0x42, 0x31];

/// The largest payload that is accepted from a server, in bytes: bounds the buffer of a partial frame.
pub(crate) const SERVER_PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// RFC 6455 section 5.2, the opcodes that a bench meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opcode {
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Opcode {
    fn bits(self) -> u8 {
        match self {
            Opcode::Text => 0x1,
            Opcode::Binary => 0x2,
            Opcode::Close => 0x8,
            Opcode::Ping => 0x9,
            Opcode::Pong => 0xa,
        }
    }

    fn from_bits(bits: u8) -> Option<Opcode> {
        Some(match bits {
            0x1 => Opcode::Text,
            0x2 => Opcode::Binary,
            0x8 => Opcode::Close,
            0x9 => Opcode::Ping,
            0xa => Opcode::Pong,
            _ => return None,
        })
    }
}

/// What is wrong with a server's frame. Always the server's fault; the connection is given up and counted.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum FrameError {
    #[error("the server sent a masked frame")]
    Masked,
    #[error("the server sent a frame with reserved bits or an unknown opcode: {0:#04x}")]
    Reserved(u8),
    #[error("the server fragmented a message")]
    Fragmented,
    #[error("the server sent a frame of {0} bytes, more than {SERVER_PAYLOAD_BYTES_MAX}")]
    TooLong(u64),
}

/// A whole frame of the server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) opcode: Opcode,
    pub(crate) payload: &'a [u8],
    /// Header and payload together, in bytes: where the next frame begins.
    pub(crate) wire_bytes: usize,
}

/// Takes the first frame off `input`. `Ok(None)`: more bytes are needed.
pub(crate) fn next_frame(input: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    let [first, second, ..] = *input else { return Ok(None) };
    let opcode = match Opcode::from_bits(first & 0x0f) {
        _ if first & 0x70 != 0 => return Err(FrameError::Reserved(first)),
        Some(opcode) if first & 0x80 != 0 => opcode,
        Some(_) => return Err(FrameError::Fragmented),
        None if first & 0x0f == 0 => return Err(FrameError::Fragmented),
        None => return Err(FrameError::Reserved(first)),
    };
    if second & 0x80 != 0 {
        return Err(FrameError::Masked);
    }
    let (header, length) = match second {
        126 => match input.get(2..4) {
            Some(bytes) => (4, u64::from(u16::from_be_bytes([bytes[0], bytes[1]]))),
            None => return Ok(None),
        },
        127 => match input.get(2..10).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok()) {
            Some(bytes) => (10, u64::from_be_bytes(bytes)),
            None => return Ok(None),
        },
        short => (2, u64::from(short)),
    };
    if length > SERVER_PAYLOAD_BYTES_MAX as u64 {
        return Err(FrameError::TooLong(length));
    }
    let wire_bytes = header + length as usize;
    Ok(input.get(header..wire_bytes).map(|payload| Frame { opcode, payload, wire_bytes }))
}

/// The size of a client frame's header for a payload of `payload_bytes`: 6, 8 or 14 bytes.
pub(crate) fn client_header_bytes(payload_bytes: usize) -> usize {
    match payload_bytes {
        0..=125 => 6,
        126..=0xffff => 8,
        _ => 14,
    }
}

/// Appends one masked, unfragmented client frame.
pub(crate) fn push_client_frame(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8]) {
    push_header(out, opcode, 0x80, payload.len());
    out.extend_from_slice(&MASK);
    out.extend(payload.iter().enumerate().map(|(index, byte)| byte ^ MASK[index & 3]));
}

/// Appends one unmasked server frame: what the bare servers' canned replies are made of.
pub(crate) fn push_server_frame(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8]) {
    push_header(out, opcode, 0, payload.len());
    out.extend_from_slice(payload);
}

/// The first bytes of a whole message: opcode, mask bit, and the length in its shortest form (section 5.2).
fn push_header(out: &mut Vec<u8>, opcode: Opcode, mask_bit: u8, payload_bytes: usize) {
    out.push(0x80 | opcode.bits());
    match payload_bytes {
        short @ 0..=125 => out.push(mask_bit | short as u8),
        medium @ 126..=0xffff => {
            out.push(mask_bit | 126);
            out.extend_from_slice(&(medium as u16).to_be_bytes());
        }
        long => {
            out.push(mask_bit | 127);
            out.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
}

/// The close frame that ends a connection in good order: status 1000 (RFC 6455 section 7.4.1).
pub(crate) fn push_close_frame(out: &mut Vec<u8>) {
    push_client_frame(out, Opcode::Close, &1000u16.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server_frame(payload_bytes: usize) -> Vec<u8> {
        let mut wire = Vec::new();
        push_server_frame(&mut wire, Opcode::Text, &vec![b'x'; payload_bytes]);
        wire
    }

    #[test]
    fn reads_each_length_encoding_and_waits_for_every_byte() {
        for payload_bytes in [0, 1, 125, 126, 127, 0xffff, 0x10000] {
            let wire = server_frame(payload_bytes);
            for cut in [0, 1, 2, 3, 9, wire.len().saturating_sub(1)] {
                if cut < wire.len() {
                    assert_eq!(next_frame(&wire[..cut]), Ok(None), "{payload_bytes} bytes cut at {cut}");
                }
            }
            let frame = next_frame(&wire).expect("a valid frame").expect("a whole frame");
            assert_eq!((frame.payload.len(), frame.wire_bytes), (payload_bytes, wire.len()));
        }
    }

    #[test]
    fn the_length_limit_holds_at_max_and_one_above() {
        let header = |length: usize| {
            let mut wire = vec![0x82, 127];
            wire.extend_from_slice(&(length as u64).to_be_bytes());
            wire
        };
        assert_eq!(next_frame(&header(SERVER_PAYLOAD_BYTES_MAX)), Ok(None));
        let above = SERVER_PAYLOAD_BYTES_MAX + 1;
        assert_eq!(next_frame(&header(above)), Err(FrameError::TooLong(above as u64)));
    }

    #[test]
    fn refuses_what_a_server_must_not_send() {
        fn check(input: &[u8], expected: FrameError) {
            assert_eq!(next_frame(input), Err(expected), "{input:02x?}");
        }
        check(&[0x81, 0x81, 0, 0, 0, 0, 0], FrameError::Masked);
        check(&[0xc1, 0x01, 0], FrameError::Reserved(0xc1));
        check(&[0x83, 0x00], FrameError::Reserved(0x83));
        check(&[0x01, 0x01, 0], FrameError::Fragmented);
        check(&[0x80, 0x00], FrameError::Fragmented);
    }

    #[test]
    fn client_frames_are_masked_and_as_long_as_announced() {
        for payload_bytes in [0, 5, 125, 126, 0xffff, 0x10000] {
            let payload: Vec<u8> = (0..payload_bytes).map(|index| index as u8).collect();
            let mut wire = Vec::new();
            push_client_frame(&mut wire, Opcode::Binary, &payload);
            let header = client_header_bytes(payload_bytes);
            assert_eq!(wire.len(), header + payload_bytes);
            assert_eq!(wire[1] & 0x80, 0x80);
            let unmasked: Vec<u8> =
                wire[header..].iter().enumerate().map(|(index, byte)| byte ^ MASK[index & 3]).collect();
            assert_eq!(unmasked, payload);
        }
    }
}
