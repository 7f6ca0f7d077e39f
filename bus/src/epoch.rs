//! Stream positions: [`Epoch`], [`Position`] and how an epoch is written.
//!
//! Owns: the epoch's text form. Must not know: who draws the nonces.
//! Invariant: an epoch's text and its number convert both ways without loss, and only one text stands for
//! each number (13 characters, lowercase, no other spelling is accepted).

use std::fmt;

/// Length of an epoch's text: 64 bits in base32hex (RFC 4648 section 7), most significant bits first. The
/// first character carries the top 4 bits, the twelve others 5 each.
pub const EPOCH_TEXT_BYTES: usize = 13;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";

/// The life of a channel's offsets: a nonce, so that offsets which start again are never taken for the
/// old ones. Two positions compare only within one epoch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Epoch(u64);

impl Epoch {
    /// No epoch: what ephemeral channels have, and what no stored position ever carries.
    pub const NONE: Epoch = Epoch(0);

    /// An epoch from a nonce; 0 is [`Epoch::NONE`].
    pub const fn new(nonce: u64) -> Epoch {
        Epoch(nonce)
    }

    /// The nonce.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether this is [`Epoch::NONE`].
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// The epoch of exactly [`EPOCH_TEXT_BYTES`] characters of lowercase base32hex, else `None`.
    pub fn parse(text: &str) -> Option<Epoch> {
        let bytes: &[u8; EPOCH_TEXT_BYTES] = text.as_bytes().try_into().ok()?;
        let mut nonce = digit(bytes[0]).filter(|top| *top < 16)?;
        for byte in &bytes[1..] {
            nonce = nonce << 5 | digit(*byte)?;
        }
        Some(Epoch(nonce))
    }

    /// The epoch that a client claims to stand in. Empty text is *not compared*: `None`. Text that is no
    /// epoch of ours is `Some(Epoch::NONE)`, which equals no channel's epoch.
    pub fn from_claim(text: &str) -> Option<Epoch> {
        if text.is_empty() { None } else { Some(Epoch::parse(text).unwrap_or(Epoch::NONE)) }
    }

    /// The text of the epoch; empty for [`Epoch::NONE`].
    pub fn text(self) -> EpochText {
        EpochText::new(self)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text().as_str())
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() { f.write_str("Epoch(none)") } else { write!(f, "Epoch({})", self.text().as_str()) }
    }
}

/// An epoch's text without an allocation.
#[derive(Clone, Copy)]
pub struct EpochText {
    bytes: [u8; EPOCH_TEXT_BYTES],
    length: u8,
}

impl EpochText {
    fn new(epoch: Epoch) -> EpochText {
        let mut bytes = [0u8; EPOCH_TEXT_BYTES];
        let mut nonce = epoch.0;
        for byte in bytes.iter_mut().rev() {
            *byte = ALPHABET[(nonce & 31) as usize];
            nonce >>= 5;
        }
        EpochText { bytes, length: if epoch.is_none() { 0 } else { EPOCH_TEXT_BYTES as u8 } }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        // The bytes are from the alphabet above: always ASCII.
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

fn digit(byte: u8) -> Option<u64> {
    match byte {
        b'0'..=b'9' => Some(u64::from(byte - b'0')),
        b'a'..=b'v' => Some(u64::from(byte - b'a') + 10),
        _ => None,
    }
}

/// A place in a channel's stream: after the publication with this offset. Offset 0 is before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Position {
    /// The life that the offset belongs to.
    pub epoch: Epoch,
    /// Offset of the last publication before this place.
    pub offset: u64,
}

impl Position {
    /// What an ephemeral channel has.
    pub const NONE: Position = Position { epoch: Epoch::NONE, offset: 0 };

    /// A position of `epoch` after `offset`.
    pub const fn new(epoch: Epoch, offset: u64) -> Position {
        Position { epoch, offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_both_ways() {
        for nonce in [1, 31, 32, 0x0123_4567_89ab_cdef, u64::MAX, 1 << 63, 1 << 60, (1 << 60) - 1] {
            let text = Epoch::new(nonce).to_string();
            assert_eq!(text.len(), EPOCH_TEXT_BYTES, "{text}");
            assert_eq!(Epoch::parse(&text), Some(Epoch::new(nonce)), "{text}");
        }
        assert_eq!(Epoch::new(u64::MAX).to_string(), "fvvvvvvvvvvvv");
        assert_eq!(Epoch::new(1).to_string(), "0000000000001");
        assert_eq!(Epoch::NONE.to_string(), "");
    }

    #[test]
    fn only_one_spelling_is_an_epoch() {
        for bad in
            ["", "1", "000000000000", "00000000000001", "gvvvvvvvvvvvv", "fvvvvvvvvvvvV", "fvvvvvvvvvvvw"]
        {
            assert_eq!(Epoch::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_claim_is_compared_unless_empty() {
        assert_eq!(Epoch::from_claim(""), None);
        assert_eq!(Epoch::from_claim("0000000000001"), Some(Epoch::new(1)));
        for malformed in ["xyz", "0000000000000"] {
            assert_eq!(Epoch::from_claim(malformed), Some(Epoch::NONE), "{malformed}");
        }
    }
}
