//! Client ids: one per connection, drawn by the node.

use wide::u8x16;

/// A connection's id. On the wire a hyphenated lowercase UUID (RFC 9562 section 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u128);

/// Length of the text form, in bytes.
pub const CLIENT_ID_TEXT_BYTES: usize = 36;

impl ClientId {
    /// The text form: ASCII.
    #[inline]
    pub fn text_bytes(self) -> [u8; CLIENT_ID_TEXT_BYTES] {
        let hex = hexadecimal(self.0);
        let mut text = [b'-'; CLIENT_ID_TEXT_BYTES];
        text[..8].copy_from_slice(&hex[..8]);
        text[9..13].copy_from_slice(&hex[8..12]);
        text[14..18].copy_from_slice(&hex[12..16]);
        text[19..23].copy_from_slice(&hex[16..20]);
        text[24..].copy_from_slice(&hex[20..]);
        text
    }

    /// Whether `text` is this id's text form.
    pub fn is_text(self, text: &str) -> bool {
        text.as_bytes() == self.text_bytes()
    }
}

/// The 32 lowercase digits of `value`, highest first.
#[inline]
fn hexadecimal(value: u128) -> [u8; 32] {
    let low_nibble = u8x16::splat(0x0f);
    let digit = |nibbles: u8x16| {
        let letters = nibbles.max(u8x16::splat(10)).simd_eq(nibbles);
        nibbles + u8x16::splat(b'0') + (letters & u8x16::splat(b'a' - b'0' - 10))
    };
    let high = digit(u8x16::from((value >> 4).to_be_bytes()) & low_nibble);
    let low = digit(u8x16::from(value.to_be_bytes()) & low_nibble);
    let mut hex = [0; 32];
    hex[..16].copy_from_slice(&u8x16::unpack_low(high, low).to_array());
    hex[16..].copy_from_slice(&u8x16::unpack_high(high, low).to_array());
    hex
}

impl core::fmt::Display for ClientId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(
            core::str::from_utf8(&self.text_bytes()).expect("hexadecimal digits and hyphens are ASCII"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_the_usual_groups() {
        let client = ClientId(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
        assert_eq!(client.to_string(), "01234567-89ab-4def-8123-456789abcdef");
        assert!(client.is_text("01234567-89ab-4def-8123-456789abcdef"));
        assert!(!client.is_text("01234567-89ab-4def-8123-456789abcdee"));
    }

    #[test]
    fn digits_are_those_of_the_library() {
        let mut value = 1u128;
        for _ in 0..1000 {
            value = value.wrapping_mul(0x2d35_8dcc_aa6c_78a5_0000_0001_0000_00bf) ^ value >> 77;
            assert_eq!(hexadecimal(value), format!("{value:032x}").as_bytes());
        }
    }
}
