//! Validation: from the first byte of a value to the byte after it.

use wide::u8x16;

use super::JsonError;
use crate::limits::JSON_DEPTH_MAX;

const _: () = assert!(JSON_DEPTH_MAX <= u128::BITS, "open containers are the bits of one integer");

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// The position of the first byte at or after `at` that is not whitespace.
#[inline]
pub(super) fn whitespace(bytes: &[u8], at: usize) -> usize {
    // Messages of machines hold none.
    match bytes.get(at) {
        Some(0..=b' ') => whitespace_run(bytes, at),
        _ => at,
    }
}

#[cold]
fn whitespace_run(bytes: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\t' | b'\n' | b'\r') = bytes.get(at) {
        at += 1;
    }
    at
}

/// The position of the first byte at or after `at` that ends a run of plain string bytes: a quote, a
/// backslash or a control character (the end, if there is none).
#[inline]
pub(crate) fn string_run(bytes: &[u8], mut at: usize) -> usize {
    while let Some(chunk) = bytes.get(at..).and_then(|rest| rest.first_chunk::<16>()) {
        let stops = string_stops_of_16(*chunk);
        if stops != 0 {
            return at + stops.trailing_zeros() as usize;
        }
        at += 16;
    }
    if let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let stops = string_stops(u64::from_le_bytes(*word));
        if stops != 0 {
            return at + (stops.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    while let Some(byte) = bytes.get(at) {
        if matches!(byte, b'"' | b'\\' | 0..=0x1f) {
            break;
        }
        at += 1;
    }
    at
}

/// A bit for each byte that ends a run.
#[inline]
fn string_stops_of_16(chunk: [u8; 16]) -> u32 {
    let bytes = u8x16::from(chunk);
    let quotes = bytes.simd_eq(u8x16::splat(b'"'));
    let backslashes = bytes.simd_eq(u8x16::splat(b'\\'));
    let controls = bytes.min(u8x16::splat(0x1f)).simd_eq(bytes);
    (quotes | backslashes | controls).to_bitmask()
}

/// Whether there is a newline.
#[inline]
pub(crate) fn has_newline(bytes: &[u8]) -> bool {
    let (chunks, tail) = bytes.as_chunks::<16>();
    let newline = u8x16::splat(b'\n');
    let found =
        chunks.iter().fold(u8x16::splat(0), |found, chunk| found | u8x16::from(*chunk).simd_eq(newline));
    found.to_bitmask() != 0 || tail.contains(&b'\n')
}

/// Flags, in the high bit of its byte, the first byte of `word` that ends a run. Flags above the
/// lowest may be false (a borrow), the lowest is exact.
#[inline]
const fn string_stops(word: u64) -> u64 {
    let quote = word ^ (ONES * b'"' as u64);
    let backslash = word ^ (ONES * b'\\' as u64);
    let quotes = quote.wrapping_sub(ONES) & !quote;
    let backslashes = backslash.wrapping_sub(ONES) & !backslash;
    let controls = word.wrapping_sub(ONES * 0x20) & !word;
    (quotes | backslashes | controls) & HIGHS
}

/// The string whose opening quote is at `at`: the position after its closing quote.
#[inline]
fn string(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    let end = string_run(bytes, at + 1);
    if bytes.get(end) == Some(&b'"') {
        return Ok(end + 1);
    }
    Ok(string_rest(bytes, end)? + 1)
}

/// The rest of a string from `at`, a position within it: that of its closing quote.
pub(super) fn string_rest(bytes: &[u8], mut at: usize) -> Result<usize, JsonError> {
    loop {
        match bytes.get(at) {
            Some(b'"') => return Ok(at),
            Some(b'\\') => at = escape(bytes, at)?,
            _ => return Err(JsonError::Syntax),
        }
        at = string_run(bytes, at);
    }
}

/// The escape whose backslash is at `at`: the position after it.
fn escape(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    match bytes.get(at + 1) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(at + 2),
        Some(b'u') => match bytes.get(at + 2..at + 6) {
            Some(digits) if digits.iter().all(u8::is_ascii_hexdigit) => Ok(at + 6),
            _ => Err(JsonError::Syntax),
        },
        _ => Err(JsonError::Syntax),
    }
}

/// The number at `at`, by its form: the position after it.
pub(super) fn number(bytes: &[u8], mut at: usize) -> Result<usize, JsonError> {
    if bytes.get(at) == Some(&b'-') {
        at += 1;
    }
    at = match bytes.get(at) {
        Some(b'0') => at + 1,
        Some(b'1'..=b'9') => digits(bytes, at)?,
        _ => return Err(JsonError::Syntax),
    };
    if bytes.get(at) == Some(&b'.') {
        at = digits(bytes, at + 1)?;
    }
    if let Some(b'e' | b'E') = bytes.get(at) {
        at += 1;
        if let Some(b'+' | b'-') = bytes.get(at) {
            at += 1;
        }
        at = digits(bytes, at)?;
    }
    Ok(at)
}

/// At least one digit at `at`: the position after the last.
fn digits(bytes: &[u8], mut at: usize) -> Result<usize, JsonError> {
    let start = at;
    while let Some(b'0'..=b'9') = bytes.get(at) {
        at += 1;
    }
    if at == start { Err(JsonError::Syntax) } else { Ok(at) }
}

pub(super) fn literal(bytes: &[u8], at: usize, literal: &str) -> Result<usize, JsonError> {
    let end = at + literal.len();
    if bytes.get(at..end) == Some(literal.as_bytes()) { Ok(end) } else { Err(JsonError::Syntax) }
}

/// A value that is no container.
#[inline]
fn scalar(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    match bytes.get(at) {
        Some(b'"') => string(bytes, at),
        Some(b't') => literal(bytes, at, "true"),
        Some(b'f') => literal(bytes, at, "false"),
        Some(b'n') => literal(bytes, at, "null"),
        _ => number(bytes, at),
    }
}

/// The value at `at`, `depth` containers deep: the position after it.
#[inline]
pub(super) fn value(bytes: &[u8], at: usize, depth: u32) -> Result<usize, JsonError> {
    match bytes.get(at) {
        Some(b'{' | b'[') => container(bytes, at, depth),
        _ => scalar(bytes, at),
    }
}

/// The object or array at `at`: the position after it. Open containers are a stack of bits, the
/// innermost lowest, one for an object.
fn container(bytes: &[u8], mut at: usize, depth: u32) -> Result<usize, JsonError> {
    let mut objects: u128 = 0;
    let mut open: u32 = 0;
    loop {
        // At the start of a value.
        match bytes.get(at) {
            Some(byte @ (b'{' | b'[')) => {
                open += 1;
                if depth + open > JSON_DEPTH_MAX {
                    return Err(JsonError::Depth);
                }
                let is_object = *byte == b'{';
                objects = objects << 1 | u128::from(is_object);
                at = whitespace(bytes, at + 1);
                if bytes.get(at) != Some(if is_object { &b'}' } else { &b']' }) {
                    at = if is_object { key(bytes, at)? } else { at };
                    continue;
                }
            }
            _ => at = whitespace(bytes, scalar(bytes, at)?),
        }
        // After a value, or at the end of an empty container.
        loop {
            match bytes.get(at) {
                Some(b',') => {
                    at = whitespace(bytes, at + 1);
                    at = if objects & 1 == 1 { key(bytes, at)? } else { at };
                    break;
                }
                Some(b'}') if objects & 1 == 1 => {}
                Some(b']') if objects & 1 == 0 => {}
                _ => return Err(JsonError::Syntax),
            }
            at += 1;
            open -= 1;
            objects >>= 1;
            if open == 0 {
                return Ok(at);
            }
            at = whitespace(bytes, at);
        }
    }
}

/// The key at `at` and its colon: the position of the value.
#[inline]
fn key(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    if bytes.get(at) != Some(&b'"') {
        return Err(JsonError::Syntax);
    }
    let at = whitespace(bytes, string(bytes, at)?);
    if bytes.get(at) == Some(&b':') { Ok(whitespace(bytes, at + 1)) } else { Err(JsonError::Syntax) }
}
