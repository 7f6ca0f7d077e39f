//! Small texts without allocation.

/// Every byte as two lowercase hexadecimal digits.
const HEX_PAIRS: [[u8; 2]; 256] = {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [HEX[byte >> 4], HEX[byte & 0xf]];
        byte += 1;
    }
    pairs
};

/// A client id as UUID text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientText([u8; 36]);

impl ClientText {
    /// Hyphenated lowercase (RFC 9562 section 4).
    pub(crate) fn new(client: u128) -> Self {
        let mut text = [b'-'; 36];
        let mut at = 0;
        for (position, byte) in client.to_be_bytes().into_iter().enumerate() {
            if matches!(position, 4 | 6 | 8 | 10) {
                at += 1;
            }
            text[at..at + 2].copy_from_slice(&HEX_PAIRS[usize::from(byte)]);
            at += 2;
        }
        Self(text)
    }

    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("hexadecimal digits and hyphens are ASCII")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_the_usual_groups() {
        let text = ClientText::new(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
        assert_eq!(text.as_str(), "01234567-89ab-4def-8123-456789abcdef");
    }
}
