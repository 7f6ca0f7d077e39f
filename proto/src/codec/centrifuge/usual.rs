//! Short cuts for the publish command, its reply, and the push that it causes: nearly all of what a busy
//! node decodes and encodes.
//!
//! Owns the command's two shapes as SDKs write them, recognised by their exact bytes, and the plainest form
//! of the push. What differs in any way (order, whitespace, escapes, a field more) is left to
//! [`super::decode`] and [`super::encode`], which decide.
//!
//! Invariant: both ways give the same (property tests compare them).

use crate::codec::UsualPublish;
use crate::json::{has_newline, is_plain, skip_value, string_run};
use crate::message::Publication;

/// Containers that are open where `data` stands.
const DATA_DEPTH: u32 = 2;

/// The publish command at the start of `text` (valid UTF-8), if it has the usual shape and is followed by
/// the end or a newline; with what comes behind that newline.
#[inline]
pub(in crate::codec) fn usual_publish(text: &[u8]) -> Option<(UsualPublish<'_>, &[u8])> {
    if let Some(rest) = text.strip_prefix(b"{\"id\":") {
        let (id, rest) = id(rest)?;
        let (channel, data, rest) = publish(rest.strip_prefix(b",\"publish\":{\"channel\":\"")?)?;
        let rest = line_end(rest.strip_prefix(b"}}")?)?;
        return Some((UsualPublish { id, channel, data }, rest));
    }
    let (channel, data, rest) = publish(text.strip_prefix(b"{\"publish\":{\"channel\":\"")?)?;
    let (id, rest) = id(rest.strip_prefix(b"},\"id\":")?)?;
    let rest = line_end(rest.strip_prefix(b"}")?)?;
    Some((UsualPublish { id, channel, data }, rest))
}

/// The rest of a channel's string, then the data: a value without a newline. With what follows.
#[inline]
fn publish(text: &[u8]) -> Option<(&str, &[u8], &[u8])> {
    let (channel, rest) = text.split_at(string_run(text, 0));
    let rest = rest.strip_prefix(b"\",\"data\":")?;
    let (data, rest) = rest.split_at(skip_value(rest, DATA_DEPTH)?);
    if has_newline(data) {
        return None;
    }
    Some((std::str::from_utf8(channel).ok()?, data, rest))
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

/// Appends the reply to a publish command.
#[inline]
pub(in crate::codec) fn publish_reply(id: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"id\":");
    out.extend_from_slice(itoa::Buffer::new().format(id).as_bytes());
    out.extend_from_slice(b",\"publish\":{}}");
}

/// Bytes of a usual publication's push beside channel, data and user.
const USUAL_PUSH_BYTES: usize = 160;

/// Appends the push of a publication with a publisher or without, if nothing of it needs an escape and it
/// says no more than data, user, client and offset. Otherwise nothing is appended.
#[inline]
pub(in crate::codec) fn usual_publication(
    channel: &str,
    publication: &Publication<'_>,
    out: &mut Vec<u8>,
) -> bool {
    let Publication { offset, data, info, tags, time_ms, epoch } = publication;
    let user = info.map_or("", |info| info.user);
    let is_bare = tags.is_empty() && *time_ms == 0 && epoch.is_none() && *offset != 0 && !data.is_empty();
    let shows_more = info.is_some_and(|info| info.conn_info.is_some() || info.chan_info.is_some());
    if !is_bare || shows_more || channel.is_empty() || !is_plain(channel) || !is_plain(user) {
        return false;
    }
    if has_newline(data) {
        return false;
    }
    out.reserve(USUAL_PUSH_BYTES + channel.len() + data.len() + user.len());
    out.extend_from_slice(b"{\"push\":{\"channel\":\"");
    out.extend_from_slice(channel.as_bytes());
    out.extend_from_slice(b"\",\"pub\":{\"data\":");
    out.extend_from_slice(data);
    if let Some(info) = info {
        out.extend_from_slice(b",\"info\":{\"user\":\"");
        out.extend_from_slice(user.as_bytes());
        out.extend_from_slice(b"\",\"client\":\"");
        out.extend_from_slice(&info.client.text_bytes());
        out.extend_from_slice(b"\"}");
    }
    out.extend_from_slice(b",\"offset\":");
    out.extend_from_slice(itoa::Buffer::new().format(*offset).as_bytes());
    out.extend_from_slice(b"}}}");
    true
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use proptest::prelude::*;

    use super::*;
    use crate::client::ClientId;
    use crate::codec::centrifuge::command;
    use crate::codec::centrifuge::encode::{general_push, general_reply};
    use crate::message::{ClientInfo, Command, Push, Reply, Request, TagsBuf};

    /// What the decoder makes of the first line, and what follows it.
    fn decoded(text: &str) -> Option<(Command<'_>, &[u8])> {
        let (line, rest) = text.split_once('\n').unwrap_or((text, ""));
        command(line).ok().map(|command| (command, rest.as_bytes()))
    }

    /// What the short cut makes of it, as the same kind of command.
    fn usual(text: &str) -> Option<(Command<'_>, &[u8])> {
        usual_publish(text.as_bytes()).map(|(publish, rest)| {
            let UsualPublish { id, channel, data } = publish;
            (Command { id, request: Request::Publish { channel: channel.into(), data } }, rest)
        })
    }

    #[test]
    fn both_orders_are_recognised() {
        for text in [
            r#"{"id":7,"publish":{"channel":"room:1","data":{"a":[1.50,"\u00e9"]}}}"#,
            r#"{"publish":{"channel":"room:1","data":"x"},"id":123456789}"#,
        ] {
            assert_eq!(usual(text), decoded(text), "{text}");
            assert!(usual(text).is_some(), "{text}");
            let two = format!("{text}\n{{}}");
            assert_eq!(usual(&two).map(|(_, rest)| rest), Some(&b"{}"[..]));
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
            assert_eq!(usual(text), None, "{text}");
        }
    }

    fn encoded(channel: &str, publication: &Publication<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        general_push(&Push::Publication { channel, publication }, &mut out);
        out
    }

    #[test]
    fn the_reply_is_the_encoders() {
        for id in [1, 9, 10, u32::MAX] {
            let (mut usual, mut general) = (Vec::new(), Vec::new());
            publish_reply(id, &mut usual);
            general_reply(id, &Reply::Publish, &mut general);
            assert_eq!(usual, general);
        }
    }

    #[test]
    fn plain_publications_are_usual() {
        let info = ClientInfo { user: "42", client: ClientId(7), conn_info: None, chan_info: None };
        for info in [None, Some(info)] {
            let publication = Publication { offset: 3, data: b"{}", info, ..Publication::default() };
            let mut out = Vec::new();
            assert!(usual_publication("room:1", &publication, &mut out));
            assert_eq!(out, encoded("room:1", &publication));
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
            if let Some(usual) = usual(&text) {
                prop_assert_eq!(Some(usual), decoded(&text));
            }
        }

        #[test]
        fn a_usual_push_is_what_the_encoder_writes(
            channel in prop_oneof!["[a-z:]{0,40}", "[a-z<>&\"é\u{2028}]{0,20}"],
            data in prop_oneof!["[0-9]{0,60}", "[\\[\\] \n0-9]{0,30}"],
            user in prop::option::of(prop_oneof!["[a-z0-9]{0,40}", "[a-z<\"\u{1}ü]{0,20}"]),
            conn_info in prop::option::of("[0-9]{0,3}"),
            chan_info in prop::option::of("[0-9]{0,3}"),
            offset in prop_oneof![Just(0), any::<u64>()],
            time_ms in prop_oneof![Just(0), any::<i64>()],
            epoch in prop::option::of("[a-z]{0,3}"),
            tag in any::<bool>(),
        ) {
            let mut tags = TagsBuf::new();
            if tag {
                tags.push("k", "v").unwrap();
            }
            let info = user.as_deref().map(|user| ClientInfo {
                user,
                client: ClientId(u128::from(offset)),
                conn_info: conn_info.as_deref().map(str::as_bytes),
                chan_info: chan_info.as_deref().map(str::as_bytes),
            });
            let epoch = epoch.map(Cow::Owned);
            let (data, tags) = (data.as_bytes(), tags.as_tags());
            let publication = Publication { offset, data, info, tags, time_ms, epoch };
            let mut out = Vec::new();
            if usual_publication(&channel, &publication, &mut out) {
                prop_assert_eq!(out, encoded(&channel, &publication));
            } else {
                prop_assert!(out.is_empty());
            }
        }
    }
}
