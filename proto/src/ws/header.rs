//! The header of a client's frame (RFC 6455 section 5.2).

use super::{Opcode, WsError};
use crate::limits::CONTROL_PAYLOAD_BYTES_MAX;

/// Longest header of a masked frame, in bytes.
pub(super) const CLIENT_HEADER_BYTES_MAX: usize = 14;

/// A frame's header, valid in itself (whether the frame may come now is the reader's business).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) opcode: Opcode,
    pub(super) fin: bool,
    pub(super) mask: [u8; 4],
    pub(super) payload_len: u64,
}

/// Parses the header at the start of `bytes`: with its length, or `None` if it is cut short. Errors
/// show as early as their byte is there.
#[inline]
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(FrameHeader, usize)>, WsError> {
    let Some(&first) = bytes.first() else {
        return Ok(None);
    };
    if first & 0x70 != 0 {
        return Err(WsError::Protocol("a reserved bit is set"));
    }
    let opcode = Opcode::from_bits(first).ok_or(WsError::Protocol("reserved opcode"))?;
    let fin = first & 0x80 != 0;
    let Some(&second) = bytes.get(1) else {
        return Ok(None);
    };
    if second & 0x80 == 0 {
        return Err(WsError::Protocol("client frame is not masked"));
    }
    let short_len = second & 0x7f;
    if opcode.is_control() && (!fin || usize::from(short_len) > CONTROL_PAYLOAD_BYTES_MAX) {
        return Err(WsError::Protocol("control frame is fragmented or too long"));
    }
    let Some((payload_len, mask_at)) = payload_len(bytes, short_len)? else {
        return Ok(None);
    };
    let Some(mask) = bytes.get(mask_at..).and_then(|rest| rest.first_chunk::<4>()) else {
        return Ok(None);
    };
    Ok(Some((FrameHeader { opcode, fin, mask: *mask, payload_len }, mask_at + 4)))
}

/// The payload's length and where the mask begins; `None` if it is cut short.
#[inline]
fn payload_len(bytes: &[u8], short_len: u8) -> Result<Option<(u64, usize)>, WsError> {
    const NOT_MINIMAL: WsError = WsError::Protocol("length is not in its shortest form");
    match short_len {
        126 => match bytes[2..].first_chunk::<2>() {
            Some(len) if u16::from_be_bytes(*len) < 126 => Err(NOT_MINIMAL),
            Some(len) => Ok(Some((u64::from(u16::from_be_bytes(*len)), 4))),
            None => Ok(None),
        },
        127 => match bytes[2..].first_chunk::<8>() {
            Some(len) if len[0] & 0x80 != 0 => Err(WsError::Protocol("length has its highest bit set")),
            Some(len) if u64::from_be_bytes(*len) <= u64::from(u16::MAX) => Err(NOT_MINIMAL),
            Some(len) => Ok(Some((u64::from_be_bytes(*len), 10))),
            None => Ok(None),
        },
        short => Ok(Some((u64::from(short), 2))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: Result<Option<(Opcode, bool, u64, usize)>, &str>) {
        let parsed = parse(bytes)
            .map(|done| done.map(|(h, len)| (h.opcode, h.fin, h.payload_len, len)))
            .map_err(|error| error.to_string());
        let expected = expected.map_err(|text| format!("websocket protocol: {text}"));
        assert_eq!(parsed, expected, "{bytes:02x?}");
    }

    #[test]
    fn headers() {
        use Opcode::*;
        let reserved = "a reserved bit is set";
        let control = "control frame is fragmented or too long";
        let minimal = "length is not in its shortest form";
        check(&[], Ok(None));
        check(&[0x81], Ok(None));
        check(&[0x81, 0x85, 1, 2, 3], Ok(None));
        check(&[0x81, 0x85, 1, 2, 3, 4], Ok(Some((Text, true, 5, 6))));
        check(&[0x02, 0x80, 1, 2, 3, 4], Ok(Some((Binary, false, 0, 6))));
        check(&[0x80, 0xfe, 0, 126, 1, 2, 3, 4], Ok(Some((Continuation, true, 126, 8))));
        check(&[0x81, 0xfe, 0, 125], Err(minimal));
        check(&[0x81, 0xff, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3, 4], Ok(Some((Text, true, 65_536, 14))));
        check(&[0x81, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff], Err(minimal));
        check(&[0x81, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0], Err("length has its highest bit set"));
        check(&[0xc1], Err(reserved));
        check(&[0xa1], Err(reserved));
        check(&[0x91], Err(reserved));
        check(&[0x83], Err("reserved opcode"));
        check(&[0x8b], Err("reserved opcode"));
        check(&[0x81, 0x05], Err("client frame is not masked"));
        check(&[0x89, 0xfd, 1, 2, 3, 4], Ok(Some((Ping, true, 125, 6))));
        check(&[0x89, 0xfe], Err(control));
        check(&[0x09, 0x80], Err(control));
    }
}
