use std::borrow::Cow;

use proptest::prelude::*;

use crate::codec::{Codec, DecodeError};
use crate::limits::CONNECT_SUBS_MAX;
use crate::message::{Command, ConnectRequest, Request, SincePosition, SubscribeRequest};

fn decode(message: &str) -> Vec<Result<Command<'_>, DecodeError>> {
    Codec::Json.decode(message.as_bytes()).collect()
}

fn check(message: &str, id: u32, request: Request<'_>) {
    assert_eq!(decode(message), [Ok(Command { id, request })], "{message}");
}

fn refused(message: &str, error: DecodeError) {
    assert_eq!(decode(message), [Err(error)], "{message}");
}

fn channel<'a>() -> Cow<'a, str> {
    "room:1".into()
}

#[test]
fn the_small_commands() {
    let c = channel;
    check(r#"{"id":1,"unsubscribe":{"channel":"room:1"}}"#, 1, Request::Unsubscribe { channel: c() });
    check(r#"{"id":2,"presence":{"channel":"room:1"}}"#, 2, Request::Presence { channel: c() });
    check(r#"{"id":3,"presence_stats":{"channel":"room:1"}}"#, 3, Request::PresenceStats { channel: c() });
    check(
        r#"{"id":4,"rpc":{"method":"m","data":[1]}}"#,
        4,
        Request::Rpc { method: "m".into(), data: b"[1]" },
    );
    check(r#"{"send":{"data":"x"}}"#, 0, Request::Send { data: b"\"x\"" });
    check(r#"{"id":5,"refresh":{"token":"t"}}"#, 5, Request::Refresh { token: "t".into() });
    let sub_refresh = Request::SubRefresh { channel: c(), token: "t".into() };
    check(r#"{"id":6,"sub_refresh":{"channel":"room:1","token":"t"}}"#, 6, sub_refresh);
    check(r#"{"id":7,"ping":{}}"#, 7, Request::Ping);
    check("{}", 0, Request::Pong);
    check(r#"{"id":8}"#, 8, Request::Empty);
    check(r#"{"id":9,"whatever":{"a":[{}]}}"#, 9, Request::Empty);
    check(r#"{"id":10,"publish":null}"#, 10, Request::Empty);
}

#[test]
fn publish_keeps_data_byte_for_byte() {
    for data in
        ["1.50", r#""\u00e9\/""#, "123456789012345678901234567890", "{ \"a\" : [ 1 ,2] }", "null", "1e999"]
    {
        let request = Request::Publish { channel: channel(), data: data.as_bytes() };
        check(&format!(r#"{{"id":1,"publish":{{"channel":"room:1","data":{data}}}}}"#), 1, request.clone());
        check(
            &format!(" {{ \"publish\" :\t{{\"data\": {data} , \"channel\":\"room:1\"}} , \"id\" : 1 }}\r"),
            1,
            request,
        );
    }
    check(r#"{"id":1,"publish":{}}"#, 1, Request::Publish { channel: "".into(), data: b"" });
    let stream = Request::Publish { channel: channel(), data: b"1" };
    check(r#"{"id":1,"publish":{"type":0,"removed":true,"channel":"room:1","data":1,"key":"k"}}"#, 1, stream);
}

#[test]
fn a_publish_to_a_map_is_not_taken_for_one_to_a_stream() {
    let map = |data, removed| Request::MapPublish { channel: channel(), data, removed };
    let set = r#"{"id":1,"publish":{"type":1,"channel":"room:1","key":"k","data":1}}"#;
    check(set, 1, map(b"1", false));
    check(r#"{"id":1,"publish":{"removed":true,"channel":"room:1","type":1}}"#, 1, map(b"", true));
}

#[test]
fn subscribe_with_everything() {
    let message = r#"{"id":2,"subscribe":{"channel":"room:1","token":"t","data":{"x":1},"positioned":true,
        "recoverable":true,"join_leave":true,"flag":2,"recover":true,"offset":18446744073709551615,"epoch":"e",
        "delta":"fossil","tf":{"op":"eq","key":"k","val":"v"},"type":1,"unknown":[1,{"a":null}]}}"#
        .replace('\n', "");
    let request = SubscribeRequest {
        channel: channel(),
        token: "t".into(),
        data: br#"{"x":1}"#,
        positioned: true,
        recoverable: true,
        join_leave: true,
        flag: 2,
        recover: true,
        offset: u64::MAX,
        epoch: "e".into(),
        delta: "fossil".into(),
        tags_filter: Some(br#"{"op":"eq","key":"k","val":"v"}"#),
        kind: 1,
    };
    check(&message, 2, Request::Subscribe(request.into()));
    let bare = SubscribeRequest { channel: channel(), ..SubscribeRequest::default() };
    let nulls =
        r#"{"id":2,"subscribe":{"channel":"room:1","token":null,"positioned":null,"offset":null,"tf":null}}"#;
    check(nulls, 2, Request::Subscribe(bare.into()));
}

#[test]
fn connect_as_the_javascript_client_sends_it() {
    let message = r#"{"connect":{"token":"jwt","data":{"a":1},"name":"js","version":"5.5.2","headers":{"x":"y"},"flag":1,"subs":{"b":{"recover":true,"offset":5,"epoch":"e"},"a":null,"b":{"recover":true,"offset":6}}},"id":1}"#;
    let position = |offset| SubscribeRequest { recover: true, offset, ..SubscribeRequest::default() };
    let request = ConnectRequest {
        token: "jwt".into(),
        data: br#"{"a":1}"#,
        name: "js".into(),
        version: "5.5.2".into(),
        subs: vec![("a".into(), SubscribeRequest::default()), ("b".into(), position(6))],
        flag: 1,
    };
    check(message, 1, Request::Connect(request.into()));
    check(r#"{"id":1,"connect":{}}"#, 1, Request::Connect(Box::default()));
    check(r#"{"id":1,"connect":{"subs":null}}"#, 1, Request::Connect(Box::default()));
}

#[test]
fn connect_subs_are_limited() {
    let message = |count: usize| {
        let subs: Vec<String> = (0..count).map(|i| format!("\"c{i}\":{{}}")).collect();
        format!(r#"{{"id":1,"connect":{{"subs":{{{}}}}}}}"#, subs.join(","))
    };
    let at_the_limit = message(CONNECT_SUBS_MAX);
    let decoded = decode(&at_the_limit);
    assert!(
        matches!(&decoded[0], Ok(Command { request: Request::Connect(c), .. }) if c.subs.len() == CONNECT_SUBS_MAX)
    );
    refused(&message(CONNECT_SUBS_MAX + 1), DecodeError::Limit);
}

#[test]
fn history_with_and_without_since() {
    let history = |limit, since, reverse| Request::History { channel: channel(), limit, since, reverse };
    check(r#"{"id":1,"history":{"channel":"room:1"}}"#, 1, history(0, None, false));
    check(r#"{"id":1,"history":{"channel":"room:1","limit":-1,"since":null}}"#, 1, history(-1, None, false));
    let since = Some(SincePosition { offset: 7, epoch: "e".into() });
    let message = r#"{"id":1,"history":{"reverse":true,"since":{"epoch":"e","offset":7},"limit":5,"channel":"room:1"}}"#;
    check(message, 1, history(5, since, true));
    let origin = Some(SincePosition::default());
    check(r#"{"id":1,"history":{"channel":"room:1","since":{}}}"#, 1, history(0, origin, false));
}

#[test]
fn escapes_and_repeated_keys() {
    let request = Request::Publish { channel: "a\"é😀".into(), data: b"2" };
    check(
        r#"{"id":1,"id":2,"publish":{"channel":"x","data":1,"ch\u0061nnel":"a\"\u00e9\ud83d\ude00","data":2}}"#,
        2,
        request,
    );
    let last = Request::Publish { channel: "b".into(), data: b"" };
    check(r#"{"id":1,"publish":{"channel":"a"},"publish":{"channel":"b"}}"#, 1, last);
}

#[test]
fn several_commands_in_one_message() {
    let publish = |data: &'static str| Request::Publish { channel: channel(), data: data.as_bytes() };
    let line =
        |id: u32, data: &str| format!(r#"{{"id":{id},"publish":{{"channel":"room:1","data":{data}}}}}"#);
    let (one, two) = (line(1, "1"), line(2, "2"));
    let both = [Ok(Command { id: 1, request: publish("1") }), Ok(Command { id: 2, request: publish("2") })];
    for message in [format!("{one}\n{two}"), format!("{one}\n{two}\n"), format!("{one}\r\n{two}\r\n")] {
        assert_eq!(decode(&message), both, "{message:?}");
    }
}

#[test]
fn a_malformed_line_comes_after_the_commands_before_it_and_ends_the_message() {
    let first = || Ok(Command { id: 1, request: Request::Empty });
    for bad in ["", "{", " ", "\r", "null", "[]", "1", "{}x", "{} {}", "{\"id\":\n2}", "{\n}"] {
        let decoded_error = decode(bad);
        assert_eq!(decoded_error.len(), 1, "{bad:?}");
        assert!(decoded_error[0].is_err(), "{bad:?}");
        let message = format!("{{\"id\":1}}\n{bad}\n{{\"id\":3}}");
        let decoded = decode(&message);
        assert_eq!((decoded.len(), &decoded[0]), (2, &first()), "{bad:?}");
        assert!(decoded[1].is_err(), "{bad:?}");
    }
    assert_eq!(decode("\n").len(), 1);
    assert_eq!(decode("{\"id\":1}\n\n").len(), 2, "a blank line at the end is one too many");
}

#[test]
fn wrong_types_are_refused() {
    for message in [
        r#"{"id":-1}"#,
        r#"{"id":1.0}"#,
        r#"{"id":4294967296}"#,
        r#"{"id":"1"}"#,
        r#"{"id":1,"publish":[]}"#,
        r#"{"id":1,"publish":"x"}"#,
        r#"{"id":1,"publish":{"channel":5}}"#,
        r#"{"id":1,"connect":{"subs":[]}}"#,
        r#"{"id":1,"connect":{"subs":{"a":1}}}"#,
        r#"{"id":1,"subscribe":{"recover":1}}"#,
        r#"{"id":1,"history":{"limit":2147483648}}"#,
        r#"{"id":1,"history":{"since":5}}"#,
        "[]",
        "5",
    ] {
        refused(message, DecodeError::Type);
    }
}

#[test]
fn other_refusals() {
    refused(r#"{"id":1,"publish":{"data":{"a":}}}"#, DecodeError::Syntax);
    refused(r#"{"id":1,"ping":{"a":}}"#, DecodeError::Syntax);
    refused(r#"{"id":1,"presence":{},"history":{}}"#, DecodeError::Ambiguous);
    let deep = format!(r#"{{"id":1,"publish":{{"data":{}{}}}}}"#, "[".repeat(200), "]".repeat(200));
    refused(&deep, DecodeError::Limit);
    let bytes = b"{\"id\":1}\n\"\xff\"";
    let decoded: Vec<_> = Codec::Json.decode(bytes).collect();
    assert_eq!(decoded, [Err(DecodeError::Utf8)], "the frame reader refuses such text long before");
}

proptest! {
    #[test]
    fn any_text_is_survived_and_ends(message in "(\\{\"(id|publish|connect|subs|data)\":|[{}\\[\\],:\"\\\\0-9a-z\n ä]){0,60}") {
        let count = decode(&message).len();
        prop_assert!(count >= 1 && count <= message.len() + 1);
    }

    #[test]
    fn data_is_a_document_of_its_own(data in "[{}\\[\\],:\"0-9a-z ]{0,24}") {
        let message = format!(r#"{{"id":1,"send":{{"data":{data}}}}}"#);
        if let [Ok(Command { request: Request::Send { data }, .. })] = decode(&message).as_slice() {
            prop_assert!(data.is_empty() || serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok());
        }
    }
}
