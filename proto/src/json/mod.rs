//! A strict JSON scanner for the data path (RFC 8259): zero-copy, one pass, no tree.
//!
//! Owns validation and the few conversions that commands need: strings (borrowed unless they carry
//! escapes), integers, booleans, and *raw* values that are validated and handed on byte for byte. Must
//! not know which fields exist: callers drive it value by value.
//!
//! Conversions follow Go's `encoding/json`, which the protocol's other servers use: integers take no
//! fraction, no exponent and no value out of range, `null` stands for absence, a lone surrogate
//! escape becomes U+FFFD. Numbers within raw values are checked for their form only.
//!
//! Invariants: positions advance only over ASCII structure or whole strings, so slices of the input
//! are always at character boundaries; nesting is bounded by
//! [`JSON_DEPTH_MAX`](crate::limits::JSON_DEPTH_MAX) and kept in one integer, never on the stack of
//! calls; every step consumes input, so time is linear in its length.

mod scan;
mod skip;
mod write;

pub use scan::Scanner;
pub(crate) use skip::{has_newline, string_run};
pub(crate) use write::is_plain;
pub use write::{write_raw, write_string};

/// Why a document was refused. Always the author's fault; position is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not JSON.
    #[error("malformed JSON")]
    Syntax,
    /// JSON, but not of the type or range asked for.
    #[error("JSON value of another type")]
    Type,
    /// Nested deeper than the limit.
    #[error("JSON nested too deeply")]
    Depth,
}

/// Whether `text` is one JSON document within the depth limit.
pub fn is_valid(text: &str) -> bool {
    let mut scanner = Scanner::new(text);
    scanner.raw().is_ok() && scanner.end().is_ok()
}

/// The length of the value at the start of `text` (valid UTF-8), `depth` containers deep.
#[inline]
pub(crate) fn skip_value(text: &[u8], depth: u32) -> Option<usize> {
    skip::value(text, 0, depth).ok()
}

#[cfg(test)]
mod tests;
