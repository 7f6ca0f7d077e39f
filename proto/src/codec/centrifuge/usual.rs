//! The publish command as SDKs write it, recognised by its exact bytes.
//!
//! Owns a short cut: nearly all commands of a busy connection have one of two shapes. What differs in
//! any way (order, whitespace, escapes, a field more) is left to [`super::decode`], which decides.
//!
//! Invariant: what this recognises, the decoder takes for the same command (a property test compares
//! them).

use std::borrow::Cow;

use crate::json::{has_newline, skip_value, string_run};
use crate::message::{Command, Request};

/// Containers that are open where `data` stands.
const DATA_DEPTH: u32 = 2;

/// The publish command at the start of `text` (valid UTF-8), if it has the usual shape and is followed by
/// the end or a newline; with what comes behind that newline.
#[inline]
pub(in crate::codec) fn usual_publish(text: &[u8]) -> Option<(Command<'_>, &[u8])> {
    if let Some(rest) = text.strip_prefix(b"{\"id\":") {
        let (id, rest) = id(rest)?;
        let (request, rest) = publish(rest.strip_prefix(b",\"publish\":{\"channel\":\"")?)?;
        let rest = line_end(rest.strip_prefix(b"}}")?)?;
        return Some((Command { id, request }, rest));
    }
    let (request, rest) = publish(text.strip_prefix(b"{\"publish\":{\"channel\":\"")?)?;
    let (id, rest) = id(rest.strip_prefix(b"},\"id\":")?)?;
    let rest = line_end(rest.strip_prefix(b"}")?)?;
    Some((Command { id, request }, rest))
}

/// The rest of a channel's string, then the data: a value without a newline.
#[inline]
fn publish(text: &[u8]) -> Option<(Request<'_>, &[u8])> {
    let (channel, rest) = text.split_at(string_run(text, 0));
    let rest = rest.strip_prefix(b"\",\"data\":")?;
    let (data, rest) = rest.split_at(skip_value(rest, DATA_DEPTH)?);
    if has_newline(data) {
        return None;
    }
    let channel = Cow::Borrowed(std::str::from_utf8(channel).ok()?);
    Some((Request::Publish { channel, data }, rest))
}

/// A positive integer of at most nine digits, without a zero in front.
#[inline]
fn id(text: &[u8]) -> Option<(u32, &[u8])> {
    let mut value = 0;
    for (count, byte) in text.iter().enumerate() {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return (value > 0).then_some((value, &text[count..]));
        }
        if count == 9 || count > 0 && value == 0 {
            return None;
        }
        value = value * 10 + u32::from(digit);
    }
    None
}

/// What follows a line that ends here.
#[inline]
fn line_end(text: &[u8]) -> Option<&[u8]> {
    if text.is_empty() { Some(text) } else { text.strip_prefix(b"\n") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::centrifuge::command;

    /// What the decoder makes of the first line, and what follows it.
    fn decoded(text: &str) -> Option<(Command<'_>, &[u8])> {
        let (line, rest) = text.split_once('\n').unwrap_or((text, ""));
        command(line).ok().map(|command| (command, rest.as_bytes()))
    }

    #[test]
    fn both_orders_are_recognised() {
        for text in [
            r#"{"id":7,"publish":{"channel":"room:1","data":{"a":[1.50,"\u00e9"]}}}"#,
            r#"{"publish":{"channel":"room:1","data":"x"},"id":123456789}"#,
        ] {
            assert_eq!(usual_publish(text.as_bytes()), decoded(text), "{text}");
            assert!(usual_publish(text.as_bytes()).is_some(), "{text}");
            let two = format!("{text}\n{{}}");
            assert_eq!(usual_publish(two.as_bytes()).map(|(_, rest)| rest), Some(&b"{}"[..]));
        }
    }

    #[test]
    fn anything_else_is_left_to_the_decoder() {
        for text in [
            r#"{"id":1234567890,"publish":{"channel":"c","data":1}}"#,
            r#"{"id":0,"publish":{"channel":"c","data":1}}"#,
            r#"{"id":01,"publish":{"channel":"c","data":1}}"#,
            r#"{"id":1,"publish":{"channel":"\u0063","data":1}}"#,
            r#"{"id":1,"publish":{"channel":"c","data": 1}}"#,
            r#"{"id":1,"publish":{"channel":"c","data":1,"type":1}}"#,
            r#"{"id":1,"publish":{"channel":"c","data":1}} "#,
            r#"{"id":1,"publish":{"channel":"c","data":1}}x"#,
            r#"{"id":1,"publish":{"channel":"c","data":}}"#,
            "{\"id\":1,\"publish\":{\"channel\":\"c\",\"data\":[1,\n2]}}",
            r#"{"id":1"#,
            r#"{"publish":{"channel":"c","data":1},"id""#,
        ] {
            assert_eq!(usual_publish(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_recognised_is_what_the_decoder_says(
            id_first in any::<bool>(),
            id in prop_oneof![Just("1".to_owned()), "[0-9]{1,11}"],
            channel in prop_oneof!["[a-z:]{0,20}", "[a-z\"\\\\é\u{1}]{0,20}"],
            data in prop_oneof![
                Just(r#"{"text":"hello, world, this is longer than a chunk"}"#.to_owned()),
                "[\\[\\]{}\",:0-9a-z\n .]{0,30}",
                "\"[^\"\\\\]{0,40}\"",
            ],
            cut in 0usize..200,
            tail in prop_oneof![Just(String::new()), "[\n {}x]{0,3}"],
        ) {
            let body = format!(r#""publish":{{"channel":"{channel}","data":{data}}}"#);
            let mut text = if id_first {
                format!(r#"{{"id":{id},{body}}}{tail}"#)
            } else {
                format!(r#"{{{body},"id":{id}}}{tail}"#)
            };
            if cut < text.len() && text.is_char_boundary(cut) && cut % 3 == 0 {
                text.truncate(cut);
            }
            if let Some(usual) = usual_publish(text.as_bytes()) {
                prop_assert_eq!(Some(usual), decoded(&text));
            }
        }
    }
}
