//! Appending strings and raw values.

use wide::u8x16;

use super::skip::has_newline;

/// Appends `text` as a JSON string, escaped as Go's `encoding/json` does: besides what RFC 8259
/// section 7 demands, `<`, `>`, `&`, U+2028 and U+2029 are written as `\u` escapes.
#[inline]
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    match first_escaped(text.as_bytes()) {
        None => out.extend_from_slice(text.as_bytes()),
        Some(at) => write_escaped(out, text.as_bytes(), at),
    }
    out.push(b'"');
}

/// Whether `text` stands for itself within a string.
#[inline]
pub(crate) fn is_plain(text: &str) -> bool {
    first_escaped(text.as_bytes()).is_none()
}

/// Appends a value that is JSON already, byte for byte, but without raw newlines: they separate
/// commands and replies, and within valid JSON they are whitespace only. Nothing is `null`.
#[inline]
pub fn write_raw(out: &mut Vec<u8>, raw: &[u8]) {
    if has_newline(raw) {
        let start = out.len();
        out.extend(raw.iter().filter(|byte| **byte != b'\n'));
        if out.len() > start {
            return;
        }
    } else if !raw.is_empty() {
        return out.extend_from_slice(raw);
    }
    out.extend_from_slice(b"null");
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// The position of the first byte that may need an escape: exact for ASCII, any byte of a non-ASCII
/// character otherwise (U+2028 and U+2029 are rare; the slow path looks closer).
#[inline]
fn first_escaped(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(chunk) = bytes.get(at..).and_then(|rest| rest.first_chunk::<16>()) {
        let escaped = escaped_of_16(*chunk);
        if escaped != 0 {
            return Some(at + escaped.trailing_zeros() as usize);
        }
        at += 16;
    }
    if let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>())
        && maybe_escaped(u64::from_le_bytes(*word)) == 0
    {
        at += 8;
    }
    bytes[at..].iter().position(|byte| !PLAIN[usize::from(*byte)]).map(|offset| at + offset)
}

/// A bit for each byte that may need an escape, as [`PLAIN`] has it.
#[inline]
fn escaped_of_16(chunk: [u8; 16]) -> u32 {
    let bytes = u8x16::from(chunk);
    let is = |byte| bytes.simd_eq(u8x16::splat(byte));
    let special = is(b'"') | is(b'\\') | is(b'<') | is(b'>') | is(b'&');
    let control = bytes.min(u8x16::splat(0x1f)).simd_eq(bytes);
    let beyond_ascii = bytes.max(u8x16::splat(0x80)).simd_eq(bytes);
    (special | control | beyond_ascii).to_bitmask()
}

/// Not zero if any byte of `word` may need an escape. May flag a word without one, never miss one.
const fn maybe_escaped(word: u64) -> u64 {
    const fn equal(word: u64, byte: u8) -> u64 {
        (word ^ (ONES * byte as u64)).wrapping_sub(ONES)
    }
    let special =
        equal(word, b'"') | equal(word, b'\\') | equal(word, b'<') | equal(word, b'>') | equal(word, b'&');
    (special | word.wrapping_sub(ONES * 0x20) | word) & HIGHS
}

/// ASCII that stands for itself within a string.
static PLAIN: [bool; 256] = {
    let mut plain = [false; 256];
    let mut byte = 0x20;
    while byte < 0x80 {
        plain[byte] = !matches!(byte as u8, b'"' | b'\\' | b'<' | b'>' | b'&');
        byte += 1;
    }
    plain
};

#[cold]
fn write_escaped(out: &mut Vec<u8>, bytes: &[u8], first: usize) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut written = 0;
    let mut at = first;
    while let Some(&byte) = bytes.get(at) {
        if PLAIN[usize::from(byte)] {
            at += 1;
            continue;
        }
        let hex = [b'\\', b'u', b'0', b'0', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
        let (escape, taken): (&[u8], usize) = match byte {
            b'"' => (b"\\\"", 1),
            b'\\' => (b"\\\\", 1),
            b'\n' => (b"\\n", 1),
            b'\r' => (b"\\r", 1),
            b'\t' => (b"\\t", 1),
            0xe2 if bytes[at..].starts_with(&[0xe2, 0x80, 0xa8]) => (b"\\u2028", 3),
            0xe2 if bytes[at..].starts_with(&[0xe2, 0x80, 0xa9]) => (b"\\u2029", 3),
            0x80.. => {
                at += 1;
                continue;
            }
            _ => (&hex, 1),
        };
        out.extend_from_slice(&bytes[written..at]);
        out.extend_from_slice(escape);
        at += taken;
        written = at;
    }
    out.extend_from_slice(&bytes[written..]);
}
