use crate::client::ClientId;
use crate::close::ErrorCode;
use crate::codec::Codec;
use crate::message::{
    ClientInfo, ConnectResult, HistoryResult, Publication, Push, RefreshResult, Reply, SubscribeResult,
    TagsBuf,
};

fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = b"before".to_vec();
    encode(&mut out);
    let text = String::from_utf8(out).unwrap().strip_prefix("before").expect("only appends").to_owned();
    serde_json::from_str::<serde::de::IgnoredAny>(&text).expect("valid JSON");
    assert!(!text.contains('\n'), "newlines separate messages");
    text
}

fn check_reply(id: u32, reply: &Reply<'_>, expected: &str) {
    assert_eq!(encoded(|out| Codec::Json.encode_reply(id, reply, out)), expected);
}

fn check_push(push: &Push<'_>, expected: &str) {
    assert_eq!(encoded(|out| Codec::Json.encode_push(push, out)), expected);
}

const INFO: ClientInfo<'static> = ClientInfo {
    user: "u\"1",
    client: ClientId(0xc1),
    conn_info: Some(b"{\"n\":1.50}"),
    chan_info: Some(b"[]"),
};
const ANONYMOUS: ClientInfo<'static> =
    ClientInfo { user: "", client: ClientId(0xc2), conn_info: None, chan_info: None };

fn publication(offset: u64) -> Publication<'static> {
    Publication { offset, data: b"{\"a\":1}", ..Publication::default() }
}

#[test]
fn small_replies() {
    check_reply(7, &Reply::Publish, r#"{"id":7,"publish":{}}"#);
    check_reply(4_294_967_295, &Reply::Unsubscribe, r#"{"id":4294967295,"unsubscribe":{}}"#);
    check_reply(1, &Reply::Rpc { data: b"1.50" }, r#"{"id":1,"rpc":{"data":1.50}}"#);
    check_reply(1, &Reply::Rpc { data: b"" }, r#"{"id":1,"rpc":{}}"#);
    let denied = ErrorCode::PermissionDenied.reply();
    check_reply(2, &denied, r#"{"id":2,"error":{"code":103,"message":"permission denied"}}"#);
    let internal = ErrorCode::Internal.reply();
    let expected = r#"{"id":2,"error":{"code":100,"message":"internal server error","temporary":true}}"#;
    check_reply(2, &internal, expected);
    let result = RefreshResult { client: "c", version: "1", expires: true, ttl: 60 };
    let expected = r#"{"id":3,"refresh":{"client":"c","version":"1","expires":true,"ttl":60}}"#;
    check_reply(3, &Reply::Refresh(result), expected);
    check_reply(3, &Reply::SubRefresh(result), r#"{"id":3,"sub_refresh":{"expires":true,"ttl":60}}"#);
    check_reply(3, &Reply::SubRefresh(RefreshResult::default()), r#"{"id":3,"sub_refresh":{}}"#);
}

#[test]
fn presence_and_stats_keep_their_zeros() {
    check_reply(1, &Reply::Presence(&[]), r#"{"id":1,"presence":{"presence":{}}}"#);
    let expected = concat!(
        r#"{"id":1,"presence":{"presence":{"00000000-0000-0000-0000-0000000000c1":{"user":"u\"1","client":"00000000-0000-0000-0000-0000000000c1","conn_info":{"n":1.50},"#,
        r#""chan_info":[]},"00000000-0000-0000-0000-0000000000c2":{"user":"","client":"00000000-0000-0000-0000-0000000000c2"}}}}"#
    );
    check_reply(1, &Reply::Presence(&[INFO, ANONYMOUS]), expected);
    let stats = Reply::PresenceStats { num_clients: 0, num_users: 0 };
    check_reply(1, &stats, r#"{"id":1,"presence_stats":{"num_clients":0,"num_users":0}}"#);
}

#[test]
fn history_keeps_its_zeros() {
    let empty = Reply::History(HistoryResult::default());
    check_reply(1, &empty, r#"{"id":1,"history":{"publications":[],"epoch":"","offset":0}}"#);
    let publications = [publication(1), publication(2)];
    let result = HistoryResult { publications: &publications, epoch: "xyz".into(), offset: 2 };
    let expected = concat!(
        r#"{"id":1,"history":{"publications":[{"data":{"a":1},"offset":1},{"data":{"a":1},"offset":2}],"#,
        r#""epoch":"xyz","offset":2}}"#
    );
    check_reply(1, &Reply::History(result), expected);
}

#[test]
fn subscribe_results() {
    check_reply(1, &Reply::Subscribe(SubscribeResult::default()), r#"{"id":1,"subscribe":{}}"#);
    let publications = [publication(6)];
    let result = SubscribeResult {
        expires: true,
        ttl: 30,
        recoverable: true,
        positioned: true,
        epoch: "xyz".into(),
        offset: 5,
        publications: &publications,
        recovered: true,
        was_recovering: true,
        data: b"null",
        delta: true,
    };
    let expected = concat!(
        r#"{"id":1,"subscribe":{"expires":true,"ttl":30,"recoverable":true,"epoch":"xyz","#,
        r#""publications":[{"data":{"a":1},"offset":6}],"recovered":true,"offset":5,"positioned":true,"#,
        r#""data":null,"was_recovering":true,"delta":true}}"#
    );
    check_reply(1, &Reply::Subscribe(result), expected);
}

#[test]
fn connect_results_and_pushes_differ_in_order() {
    check_reply(1, &Reply::Connect(ConnectResult::default()), r#"{"id":1,"connect":{}}"#);
    let sub = SubscribeResult { recoverable: true, ..SubscribeResult::default() };
    let subs = [("user:1", sub), ("b", SubscribeResult::default())];
    let result = ConnectResult {
        client: "c1",
        version: "0.1",
        expires: true,
        ttl: 9,
        data: b"{}",
        subs: &subs,
        ping: 25,
        pong: true,
    };
    let expected = concat!(
        r#"{"id":1,"connect":{"client":"c1","version":"0.1","expires":true,"ttl":9,"data":{},"#,
        r#""subs":{"user:1":{"recoverable":true},"b":{}},"ping":25,"pong":true}}"#
    );
    check_reply(1, &Reply::Connect(result.clone()), expected);
    let expected = concat!(
        r#"{"push":{"connect":{"client":"c1","version":"0.1","data":{},"#,
        r#""subs":{"user:1":{"recoverable":true},"b":{}},"expires":true,"ttl":9,"ping":25,"pong":true}}}"#
    );
    check_push(&Push::Connect(result), expected);
}

#[test]
fn publications() {
    let check = |publication, expected| {
        check_push(&Push::Publication { channel: "room:1", publication: &publication }, expected);
    };
    check(publication(12), r#"{"push":{"channel":"room:1","pub":{"data":{"a":1},"offset":12}}}"#);
    check(Publication::default(), r#"{"push":{"channel":"room:1","pub":{}}}"#);
    let mut tags = TagsBuf::new();
    tags.push("k", "<v>").unwrap();
    tags.push("l\n", "").unwrap();
    let full = Publication {
        offset: u64::MAX,
        data: b"\"\\u00e9\"",
        info: Some(INFO),
        tags: tags.as_tags(),
        time_ms: 1_700_000_000_123,
        epoch: Some("xyz".into()),
    };
    let expected = concat!(
        r#"{"push":{"channel":"room:1","pub":{"data":"\u00e9","info":{"user":"u\"1","#,
        r#""client":"00000000-0000-0000-0000-0000000000c1","conn_info":{"n":1.50},"chan_info":[]},"offset":18446744073709551615,"#,
        r#""tags":{"k":"\u003cv\u003e","l\n":""},"time":1700000000123,"epoch":"xyz"}}}"#
    );
    check(full, expected);
    let pretty = Publication { data: b"{\n  \"a\": 1\n}", ..Publication::default() };
    check(pretty, r#"{"push":{"channel":"room:1","pub":{"data":{  "a": 1}}}}"#);
}

#[test]
fn the_other_pushes() {
    let channel = "ch";
    let expected = r#"{"push":{"channel":"ch","join":{"info":{"user":"","client":"00000000-0000-0000-0000-0000000000c2"}}}}"#;
    check_push(&Push::Join { channel, info: ANONYMOUS }, expected);
    let expected = r#"{"push":{"channel":"ch","leave":{"info":{"user":"","client":"00000000-0000-0000-0000-0000000000c2"}}}}"#;
    check_push(&Push::Leave { channel, info: ANONYMOUS }, expected);
    let unsubscribe = |channel| Push::Unsubscribe { channel, code: 2000, reason: "server unsubscribe" };
    let expected = r#"{"push":{"channel":"ch","unsubscribe":{"code":2000,"reason":"server unsubscribe"}}}"#;
    check_push(&unsubscribe("ch"), expected);
    let expected = r#"{"push":{"unsubscribe":{"code":2000,"reason":"server unsubscribe"}}}"#;
    check_push(&unsubscribe(""), expected);
    let epoch = "e".into();
    let push = Push::Subscribe { channel, recoverable: true, positioned: true, epoch, offset: 3, data: b"1" };
    let expected = concat!(
        r#"{"push":{"channel":"ch","subscribe":{"recoverable":true,"epoch":"e","offset":3,"#,
        r#""positioned":true,"data":1}}}"#
    );
    check_push(&push, expected);
    check_push(&Push::Message { data: b"[]" }, r#"{"push":{"message":{"data":[]}}}"#);
    let push = Push::Disconnect { code: 3001, reason: "shutdown", reconnect: true };
    check_push(&push, r#"{"push":{"disconnect":{"code":3001,"reason":"shutdown","reconnect":true}}}"#);
    let push = Push::Refresh { expires: true, ttl: 5 };
    check_push(&push, r#"{"push":{"refresh":{"expires":true,"ttl":5}}}"#);
    check_push(&Push::Ping, "{}");
}
