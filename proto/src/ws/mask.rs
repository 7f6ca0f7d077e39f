//! Masking (RFC 6455 section 5.3).

use wide::u8x16;

/// Applies `mask` in place; `offset` is the position of `payload`'s first byte within its frame. Returns
/// whether what came out is ASCII: that is known in passing.
#[inline]
pub(super) fn unmask(payload: &mut [u8], mask: [u8; 4], offset: usize) -> bool {
    let half = u32::from_le_bytes(mask).rotate_right(8 * (offset as u32 % 4));
    let key = u64::from(half) << 32 | u64::from(half);
    let wide_key = u8x16::from((u128::from(key) << 64 | u128::from(key)).to_le_bytes());
    let mut seen_wide = u8x16::splat(0);
    let (chunks, tail) = payload.as_chunks_mut::<16>();
    for chunk in chunks {
        let plain = u8x16::from(*chunk) ^ wide_key;
        seen_wide |= plain;
        *chunk = plain.to_array();
    }
    let mut seen = 0;
    let (words, tail) = tail.as_chunks_mut::<8>();
    for word in words {
        let plain = u64::from_le_bytes(*word) ^ key;
        seen |= plain;
        *word = plain.to_le_bytes();
    }
    for (byte, mask) in tail.iter_mut().zip(key.to_le_bytes()) {
        *byte ^= mask;
        seen |= u64::from(*byte);
    }
    seen_wide.to_bitmask() == 0 && seen & HIGHS == 0
}

const HIGHS: u64 = 0x8080_8080_8080_8080;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_at_every_length_and_offset() {
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        for len in 0..70 {
            for offset in 0..9 {
                let mut payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
                if len % 2 == 0 {
                    // ASCII once unmasked, but for one byte of every other length.
                    payload
                        .iter_mut()
                        .enumerate()
                        .for_each(|(i, byte)| *byte = b'a' ^ mask[(i + offset) % 4]);
                    if len % 4 == 0 && len > 0 {
                        payload[(offset * 7) % len] ^= 0x80;
                    }
                }
                let expected: Vec<u8> =
                    payload.iter().enumerate().map(|(i, byte)| byte ^ mask[(i + offset) % 4]).collect();
                let is_ascii = unmask(&mut payload, mask, offset);
                assert_eq!(is_ascii, expected.is_ascii(), "length {len}, offset {offset}");
                assert_eq!(payload, expected, "length {len}, offset {offset}");
            }
        }
    }
}
