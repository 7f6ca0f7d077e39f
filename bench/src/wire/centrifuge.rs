//! The little of the Centrifuge v2 JSON protocol that a load generator speaks: commands as prepared bytes, and a
//! scan of what comes back that finds ids, errors and offsets without parsing JSON.
//!
//! The scan relies on the order in which servers of this protocol write an envelope (`{"id":`, `{"push":`), and falls
//! back to a JSON parser for anything else, so that another order costs time but no correctness.

use memchr::memmem;
use serde_json::Value;

use super::frame::Opcode;
use super::template::Template;

/// The digits of a command id in prepared requests: ten, so that ids from [`ID_FIRST`] on never change the size.
pub(crate) const ID_DIGITS: usize = 10;
/// The first id of prepared requests.
pub(crate) const ID_FIRST: u64 = 1_000_000_000;
/// Ids stay below this (a uint32 on the wire) and then start again at [`ID_FIRST`].
pub(crate) const ID_END: u64 = 4_000_000_000;
const _: () = assert!(ID_END <= u32::MAX as u64 && ID_FIRST.ilog10() == ID_END.ilog10());

/// The digits of a connection's number in the name of its own channel.
pub(crate) const CHANNEL_DIGITS: usize = 7;

/// The ids of the two commands of an opening.
const CONNECT_ID: u32 = 1;
const SUBSCRIBE_ID: u32 = 2;

/// One message of the server, as far as a bench cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// The empty reply: the server's ping, to be answered with an empty command.
    Ping,
    /// A reply; `error` is the code of a refused command.
    Reply { id: u32, error: Option<u32> },
    /// A publication; `offset` is 0 where the channel has no history.
    Publication { offset: u64 },
    /// Any other push: join, leave, unsubscribe, disconnect, …
    OtherPush,
    /// Not JSON of this protocol.
    Unknown,
}

/// The messages of one text frame: they are separated by newlines.
pub(crate) fn messages(payload: &[u8]) -> impl Iterator<Item = Message> + '_ {
    payload.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(classify)
}

/// What one line says.
pub(crate) fn classify(line: &[u8]) -> Message {
    if line == b"{}" {
        return Message::Ping;
    }
    if let Some(rest) = line.strip_prefix(b"{\"id\":") {
        let (id, rest) = leading_number(rest);
        // In every known server an error follows the id directly; whatever else follows is the result.
        let plain = id != 0 && rest.starts_with(b",\"") && !rest.starts_with(b",\"error\"");
        return if plain { Message::Reply { id: id as u32, error: None } } else { parse(line) };
    }
    if line.starts_with(b"{\"push\":{") {
        if memmem::find(line, b"\"pub\":{").is_none() {
            return Message::OtherPush;
        }
        let offset = memmem::rfind(line, b"\"offset\":").map_or(0, |at| leading_number(&line[at + 9..]).0);
        return Message::Publication { offset };
    }
    parse(line)
}

/// The slow way: for errors and for envelopes written in another order.
fn parse(line: &[u8]) -> Message {
    let Ok(Value::Object(object)) = serde_json::from_slice::<Value>(line) else { return Message::Unknown };
    if object.is_empty() {
        return Message::Ping;
    }
    if let Some(push) = object.get("push") {
        return match push.get("pub") {
            Some(publication) => Message::Publication {
                offset: publication.get("offset").and_then(Value::as_u64).unwrap_or(0),
            },
            None => Message::OtherPush,
        };
    }
    let error =
        object.get("error").map(|error| error.get("code").and_then(Value::as_u64).unwrap_or(0) as u32);
    match object.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Message::Reply { id, error },
        None => Message::Unknown,
    }
}

/// The decimal number at the start of `text` (0 when there is none) and what follows it.
fn leading_number(text: &[u8]) -> (u64, &[u8]) {
    let digits = text.iter().take(20).take_while(|byte| byte.is_ascii_digit()).count();
    let number = text[..digits]
        .iter()
        .fold(0u64, |sum, byte| sum.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')));
    (number, &text[digits..])
}

/// Connect, and subscribe to `channel` when one is named: one text message of one or two commands, as the SDK sends
/// it. It is answered by as many replies as it has commands.
pub(crate) fn opening(token: Option<&str>, channel: Option<&str>) -> Vec<u8> {
    let token = token.map_or(String::new(), |token| format!("\"token\":{},", Value::from(token)));
    let mut text = format!("{{\"id\":{CONNECT_ID},\"connect\":{{{token}\"name\":\"bench\"}}}}");
    if let Some(channel) = channel {
        let channel = Value::from(channel);
        text.push_str(&format!(
            "\n{{\"id\":{SUBSCRIBE_ID},\"subscribe\":{{\"channel\":{channel},\"positioned\":true,\"recoverable\":true}}}}"
        ));
    }
    text.into_bytes()
}

/// The empty command that answers a server's ping.
pub(crate) const PONG: &[u8] = b"{}";

/// The name of connection number `index`'s own channel.
pub(crate) fn own_channel(prefix: &str, index: u64) -> String {
    format!("{prefix}{index:0CHANNEL_DIGITS$}")
}

/// `publish` of `data_bytes` bytes of JSON to a fixed channel. Values: the id.
pub(crate) fn publish_template(channel: &str, data_bytes: usize) -> Template {
    Template::builder()
        .text("{\"id\":")
        .digits(ID_DIGITS)
        .text(",\"publish\":{\"channel\":")
        .text(&Value::from(channel).to_string())
        .text(",\"data\":")
        .text(&data(data_bytes))
        .text("}}")
        .finish(Opcode::Text)
}

/// `publish` of `data_bytes` bytes of JSON to a connection's own channel. Values: the id, the connection's number.
pub(crate) fn publish_own_template(prefix: &str, data_bytes: usize) -> Template {
    let quoted = Value::from(prefix).to_string();
    Template::builder()
        .text("{\"id\":")
        .digits(ID_DIGITS)
        .text(",\"publish\":{\"channel\":")
        .text(quoted.trim_end_matches('"'))
        .digits(CHANNEL_DIGITS)
        .text("\",\"data\":")
        .text(&data(data_bytes))
        .text("}}")
        .finish(Opcode::Text)
}

/// A JSON string of `bytes` bytes, its quotes included (at least 2).
pub(crate) fn data(bytes: usize) -> String {
    format!("\"{}\"", "x".repeat(bytes.saturating_sub(2)))
}

#[cfg(test)]
mod tests {
    use super::super::frame::MASK;
    use super::*;

    #[test]
    fn classifies_messages() {
        fn check(line: &str, expected: Message) {
            assert_eq!(classify(line.as_bytes()), expected, "{line}");
        }
        let ok = |id| Message::Reply { id, error: None };
        check("{}", Message::Ping);
        check("{ }", Message::Ping);
        check(r#"{"id":1000000007,"publish":{}}"#, ok(1_000_000_007));
        check(r#"{"id":2,"subscribe":{"offset":7,"epoch":"x"}}"#, ok(2));
        check(r#"{"subscribe":{},"id":2}"#, ok(2));
        check(r#"{"id":3,"error":{"code":103,"message":"no"}}"#, Message::Reply { id: 3, error: Some(103) });
        check(r#"{"error":{"code":100},"id":3}"#, Message::Reply { id: 3, error: Some(100) });
        check(
            r#"{"push":{"channel":"a","pub":{"data":"x","offset":12}}}"#,
            Message::Publication { offset: 12 },
        );
        check(r#"{"push":{"channel":"a","pub":{"offset":9,"data":1}}}"#, Message::Publication { offset: 9 });
        check(r#"{"push":{"pub":{"data":"x"},"channel":"a"}}"#, Message::Publication { offset: 0 });
        check(r#"{"push":{"channel":"a","join":{"info":{}}}}"#, Message::OtherPush);
        check(r#"{"id":"#, Message::Unknown);
        check("hello", Message::Unknown);
    }

    #[test]
    fn splits_batches() {
        let batch = b"{\"id\":1,\"connect\":{}}\n{\"id\":2,\"subscribe\":{}}\n{}\n";
        let found: Vec<Message> = messages(batch).collect();
        let reply = |id| Message::Reply { id, error: None };
        assert_eq!(found, [reply(1), reply(2), Message::Ping]);
    }

    #[test]
    fn requests_are_json_of_a_fixed_size() {
        let template = publish_own_template("room:own-", 64);
        let mut sizes = Vec::new();
        for (id, index) in [(ID_FIRST, 0), (ID_END - 1, 9_999_999)] {
            let mut frame = Vec::new();
            template.append(&mut frame, &[id, index]);
            sizes.push(frame.len());
            let payload: Vec<u8> =
                frame[8..].iter().enumerate().map(|(i, byte)| byte ^ MASK[i & 3]).collect();
            let value: Value = serde_json::from_slice(&payload).expect("valid JSON");
            assert_eq!(value["id"], id);
            assert_eq!(value["publish"]["channel"], own_channel("room:own-", index));
            assert_eq!(value["publish"]["data"].to_string().len(), 64);
        }
        assert_eq!(sizes[0], sizes[1]);
    }

    #[test]
    fn an_opening_is_one_command_a_line() {
        let text = opening(Some("t.o.k"), Some("room:bench"));
        let lines: Vec<Value> =
            text.split(|&b| b == b'\n').map(|line| serde_json::from_slice(line).expect("JSON")).collect();
        assert_eq!(lines[0]["connect"]["token"], "t.o.k");
        assert_eq!(lines[1]["subscribe"]["channel"], "room:bench");
        assert_eq!(opening(None, None), br#"{"id":1,"connect":{"name":"bench"}}"#);
    }
}
