//! Frames of the server: never masked, never fragmented.

use super::Opcode;
use crate::limits::{CLOSE_REASON_BYTES_MAX, CONTROL_PAYLOAD_BYTES_MAX};

const FIN: u8 = 0x80;

/// Bytes kept free by [`begin_frame`]: the header of payloads from 126 to 65,535 bytes.
const HEADER_RESERVED: usize = 4;

/// Bytes kept free by [`begin_small_frame`]: the header of payloads below 126 bytes.
const SMALL_HEADER_RESERVED: usize = 2;

/// Longest header of an unmasked frame, in bytes.
const HEADER_BYTES_MAX: usize = 10;

/// Where a frame under construction begins; made by [`begin_frame`], given to [`finish_frame`].
#[derive(Debug)]
#[must_use = "a frame that is begun must be finished"]
pub struct FrameStart {
    start: usize,
    reserved: usize,
}

/// Begins a frame at the end of `out`: append its payload, then call [`finish_frame`].
#[inline]
pub fn begin_frame(out: &mut Vec<u8>) -> FrameStart {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_RESERVED]);
    FrameStart { start, reserved: HEADER_RESERVED }
}

/// The same for a payload that is most likely below 126 bytes.
#[inline]
pub fn begin_small_frame(out: &mut Vec<u8>) -> FrameStart {
    let start = out.len();
    out.extend_from_slice(&[0; SMALL_HEADER_RESERVED]);
    FrameStart { start, reserved: SMALL_HEADER_RESERVED }
}

/// Writes the header before all that was appended since `start`.
///
/// A payload whose header has another length than was kept free is moved: frames of the expected size end
/// up where they were written.
#[expect(clippy::needless_pass_by_value, reason = "a frame is finished once")]
#[inline]
pub fn finish_frame(out: &mut Vec<u8>, start: FrameStart, opcode: Opcode) {
    let FrameStart { start, reserved } = start;
    let payload_len = out.len() - start - reserved;
    match (reserved, payload_len) {
        (SMALL_HEADER_RESERVED, 0..126) => {
            out[start..start + 2].copy_from_slice(&[FIN | opcode as u8, payload_len as u8]);
        }
        (HEADER_RESERVED, 126..=0xffff) => {
            let [high, low] = (payload_len as u16).to_be_bytes();
            out[start..start + 4].copy_from_slice(&[FIN | opcode as u8, 126, high, low]);
        }
        _ => finish_moved(out, start, reserved, opcode),
    }
}

#[cold]
fn finish_moved(out: &mut Vec<u8>, start: usize, reserved: usize, opcode: Opcode) {
    let payload = start + reserved..out.len();
    let (header, header_len) = frame_header(payload.len(), opcode);
    let end = start + header_len + payload.len();
    out.resize(out.len().max(end), 0);
    out.copy_within(payload, start + header_len);
    out.truncate(end);
    out[start..start + header_len].copy_from_slice(&header[..header_len]);
}

/// The header of an unmasked FIN frame: the bytes, and how many of them count (2, 4 or 10).
pub fn frame_header(payload_len: usize, opcode: Opcode) -> ([u8; HEADER_BYTES_MAX], usize) {
    let mut header = [0; HEADER_BYTES_MAX];
    header[0] = FIN | opcode as u8;
    if payload_len < 126 {
        header[1] = payload_len as u8;
        (header, 2)
    } else if let Ok(len) = u16::try_from(payload_len) {
        header[1] = 126;
        header[2..4].copy_from_slice(&len.to_be_bytes());
        (header, 4)
    } else {
        header[1] = 127;
        header[2..10].copy_from_slice(&(payload_len as u64).to_be_bytes());
        (header, 10)
    }
}

/// Appends a whole frame. A control payload beyond 125 bytes is cut: it can only be our own mistake,
/// and a frame that breaks the rules would cost the connection.
pub fn write_frame(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8]) {
    debug_assert!(!opcode.is_control() || payload.len() <= CONTROL_PAYLOAD_BYTES_MAX);
    let cut = if opcode.is_control() { CONTROL_PAYLOAD_BYTES_MAX } else { usize::MAX };
    let payload = &payload[..payload.len().min(cut)];
    let (header, header_len) = frame_header(payload.len(), opcode);
    out.extend_from_slice(&header[..header_len]);
    out.extend_from_slice(payload);
}

/// Appends a close frame. `code: None` writes the empty one (the answer to an empty one); the reason
/// is cut at a character boundary to [`CLOSE_REASON_BYTES_MAX`].
pub fn write_close(out: &mut Vec<u8>, code: Option<u16>, reason: &str) {
    let Some(code) = code else {
        return write_frame(out, Opcode::Close, &[]);
    };
    let reason = &reason[..reason.floor_char_boundary(CLOSE_REASON_BYTES_MAX)];
    let (header, header_len) = frame_header(2 + reason.len(), Opcode::Close);
    out.extend_from_slice(&header[..header_len]);
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(reason.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(payload_len: usize, begin: fn(&mut Vec<u8>) -> FrameStart) -> Vec<u8> {
        let mut out = b"before".to_vec();
        let start = begin(&mut out);
        out.extend((0..payload_len).map(|i| i as u8));
        finish_frame(&mut out, start, Opcode::Text);
        assert_eq!(&out[..6], b"before");
        out.split_off(6)
    }

    #[test]
    fn headers_at_the_edges_of_the_three_length_forms() {
        for (payload_len, header) in [
            (0, vec![0x81, 0]),
            (1, vec![0x81, 1]),
            (125, vec![0x81, 125]),
            (126, vec![0x81, 126, 0, 126]),
            (65_535, vec![0x81, 126, 0xff, 0xff]),
            (65_536, vec![0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let frame = framed(payload_len, begin_frame);
            assert_eq!(frame, framed(payload_len, begin_small_frame));
            assert_eq!(&frame[..header.len()], header, "{payload_len}");
            let payload: Vec<u8> = (0..payload_len).map(|i| i as u8).collect();
            assert_eq!(&frame[header.len()..], payload, "{payload_len}");
            let mut whole = Vec::new();
            write_frame(&mut whole, Opcode::Text, &payload);
            assert_eq!(whole, frame);
        }
    }

    #[test]
    fn close_frames_hold_code_and_a_cut_reason() {
        let mut out = Vec::new();
        write_close(&mut out, Some(3501), "bad request");
        assert_eq!(out, b"\x88\x0d\x0d\xadbad request");
        out.clear();
        write_close(&mut out, None, "never written");
        assert_eq!(out, [0x88, 0]);
        out.clear();
        write_close(&mut out, Some(4000), &"é".repeat(100));
        assert_eq!(out[1] as usize, 2 + 122, "123 would cut a character in two");
        assert!(std::str::from_utf8(&out[4..]).is_ok());
    }
}
