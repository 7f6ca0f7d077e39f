//! Masking (RFC 6455 section 5.3).

/// Applies `mask` in place; `offset` is the position of `payload`'s first byte within its frame.
pub(super) fn unmask(payload: &mut [u8], mask: [u8; 4], offset: usize) {
    let mut rotated = mask;
    rotated.rotate_left(offset % 4);
    let key = u64::from(u32::from_ne_bytes(rotated));
    let key = key << 32 | key;
    let (words, tail) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ key).to_ne_bytes();
    }
    for (byte, mask) in tail.iter_mut().zip(key.to_ne_bytes()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_at_every_length_and_offset() {
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        for len in 0..70 {
            for offset in 0..9 {
                let mut payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
                let expected: Vec<u8> =
                    payload.iter().enumerate().map(|(i, byte)| byte ^ mask[(i + offset) % 4]).collect();
                unmask(&mut payload, mask, offset);
                assert_eq!(payload, expected, "length {len}, offset {offset}");
            }
        }
    }
}
