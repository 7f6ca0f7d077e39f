//! What the addresses of all brokers have in common.
//!
//! Owns: percent-encoding. Must not know: schemes, parameters.

/// The text that is percent-encoded (RFC 3986 section 2.1); `None` where two hexadecimal digits are missing behind a
/// percent sign, or what they stand for is no UTF-8.
pub(crate) fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            rest = after;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}
