//! Names on the server: channel names as subject tokens, slots, the subjects of a node.
//!
//! Owns: every subject and stream name. Must not know: connections.
//! Invariant: a token is a valid part of a subject whatever the channel is called, and two channels never share one.
//!
//! | subject | what |
//! |---|---|
//! | `P.s0.c.<slot>.<channel>` | a positioned channel, stored in stream `P_0` |
//! | `P.s0.m.<slot>.<channel>` | a mark: what the channel had before it is cleared |
//! | `P.s0.epoch`, `P.s0.canary.<node>` | the stream's epoch record, a node's canary |
//! | `P.r0.…` | what the stream says again after it stored it (RePublish), the same endings |
//! | `P.e.<slot>.<channel>` | an ephemeral channel, stored nowhere |
//! | `P.heart`, `P.sync` | from every node to every node: hearts, and questions at a barrier or a subscription |

use super::options::NatsOptions;
use crate::slot::slot_of;

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// A channel's name as one token of a subject: letters, digits and `-_:#@/+!&` stand for themselves, any other byte
/// is `=XX`.
pub(super) fn token(name: &str) -> String {
    let mut token = String::with_capacity(name.len() + 8);
    for &byte in name.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => token.push(char::from(byte)),
            b'-' | b'_' | b':' | b'#' | b'@' | b'/' | b'+' | b'!' | b'&' => token.push(char::from(byte)),
            _ => {
                token.push('=');
                token.push(char::from(HEX[usize::from(byte >> 4)]));
                token.push(char::from(HEX[usize::from(byte & 15)]));
            }
        }
    }
    if token.is_empty() { "=".to_owned() } else { token }
}

/// The channel of a token; `None` for what [`token`] does not write.
pub(super) fn channel_of(written: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(written.len());
    let mut rest = if written == "=" { b"" } else { written.as_bytes() };
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'=' {
            bytes.push(byte);
            continue;
        }
        let (pair, after) = rest.split_at_checked(2)?;
        rest = after;
        let digit = |digit: u8| HEX.iter().position(|hex| *hex == digit);
        bytes.push((digit(pair[0])? << 4 | digit(pair[1])?) as u8);
    }
    String::from_utf8(bytes).ok().filter(|name| token(name) == written)
}

/// A channel's name as a number: what marks name it by, and what its epochs are made of.
pub(super) fn hash(name: &str) -> u64 {
    crate::slot::hash(0, name)
}

/// The subjects of one bus.
#[derive(Clone, Debug)]
pub(super) struct Subjects {
    prefix: String,
    streams: u16,
}

impl Subjects {
    pub(super) fn new(options: &NatsOptions) -> Subjects {
        Subjects { prefix: options.prefix.clone(), streams: options.streams }
    }

    pub(super) fn streams(&self) -> u16 {
        self.streams
    }

    /// The stream of a slot.
    pub(super) fn stream_of(&self, slot: u16) -> u16 {
        slot % self.streams
    }

    pub(super) fn stream_name(&self, stream: u16) -> String {
        format!("{}_{stream}", self.prefix)
    }

    /// Everything that a stream stores.
    pub(super) fn stored(&self, stream: u16) -> String {
        format!("{}.s{stream}.>", self.prefix)
    }

    /// Where it says it again.
    pub(super) fn republished(&self, stream: u16) -> String {
        format!("{}.r{stream}.>", self.prefix)
    }

    pub(super) fn stored_channel(&self, name: &str) -> String {
        let slot = slot_of(name);
        format!("{}.s{}.c.{slot}.{}", self.prefix, self.stream_of(slot), token(name))
    }

    pub(super) fn stored_mark(&self, name: &str) -> String {
        let slot = slot_of(name);
        format!("{}.s{}.m.{slot}.{}", self.prefix, self.stream_of(slot), token(name))
    }

    pub(super) fn heard_channel(&self, name: &str) -> String {
        let slot = slot_of(name);
        format!("{}.r{}.c.{slot}.{}", self.prefix, self.stream_of(slot), token(name))
    }

    pub(super) fn heard_slot(&self, slot: u16) -> String {
        format!("{}.r{}.c.{slot}.>", self.prefix, self.stream_of(slot))
    }

    pub(super) fn ephemeral_channel(&self, name: &str) -> String {
        format!("{}.e.{}.{}", self.prefix, slot_of(name), token(name))
    }

    pub(super) fn ephemeral_slot(&self, slot: u16) -> String {
        format!("{}.e.{slot}.>", self.prefix)
    }

    pub(super) fn stored_epoch(&self, stream: u16) -> String {
        format!("{}.s{stream}.epoch", self.prefix)
    }

    pub(super) fn heard_epoch(&self, stream: u16) -> String {
        format!("{}.r{stream}.epoch", self.prefix)
    }

    pub(super) fn stored_canary(&self, stream: u16, incarnation: u64) -> String {
        format!("{}.s{stream}.canary.{incarnation:016x}", self.prefix)
    }

    pub(super) fn heard_canaries(&self, stream: u16) -> String {
        format!("{}.r{stream}.canary.*", self.prefix)
    }

    pub(super) fn heart(&self) -> String {
        format!("{}.heart", self.prefix)
    }

    pub(super) fn sync(&self) -> String {
        format!("{}.sync", self.prefix)
    }
}

/// The last token of a subject, as a channel.
pub(super) fn channel_of_subject(subject: &str) -> Option<String> {
    channel_of(subject.rsplit('.').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tokens_are_reversible_and_valid() {
        for (name, written) in [
            ("news", "news"),
            ("user:#42", "user:#42"),
            ("a.b c", "a=2Eb=20c"),
            ("*>", "=2A=3E"),
            ("é", "=C3=A9"),
            ("", "="),
            ("=", "=3D"),
        ] {
            assert_eq!(token(name), written);
            assert_eq!(channel_of(written).as_deref(), Some(name));
        }
        for bad in ["=2e", "=4", "=61", "a b", "=FF", "a."] {
            assert_eq!(channel_of(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_name_comes_back(name: String) {
            let written = token(&name);
            prop_assert!(written.bytes().all(|byte| byte.is_ascii_graphic() && !b".*>".contains(&byte)));
            let back = channel_of_subject(&format!("x.e.12.{written}"));
            prop_assert_eq!(back, Some(name));
        }
    }
}
