//! The admin port's paths with stand-ins for the shards: what is asked of them is recorded, and their
//! answers are written down. The same calls against a real node are in `tests/admin.rs`.

use std::sync::Mutex;

use axum::body::to_bytes;
use ringmain_proto::client::ClientId;
use ringmain_proto::close::ErrorCode;
use ringmain_proto::message::{ClientInfo, Publication, TagsBuf};
use tower::ServiceExt as _;

use super::*;
use crate::control::router::tests::router;
use crate::control::router::{CALLS_MAX, Router};
use crate::control::state::Phase;
use crate::core::api::{Answer, Call, ControlAnswer, Member};
use crate::core::config::{NamespaceConfig, Secret};

const KEY: &str = "sesame";

/// An admin port whose shards answer by `answer`; what they were asked is in `asked`.
struct Port {
    routes: HttpRouter,
    asked: Arc<Mutex<Vec<Call>>>,
    node: Arc<NodeState>,
}

fn options(router: Arc<Router>, change: impl FnOnce(&mut AdminConfig)) -> AdminOptions {
    let mut core = CoreConfig::default();
    core.namespaces.insert("room".to_owned(), NamespaceConfig::default());
    let mut config = AdminConfig::default();
    change(&mut config);
    let node = Arc::new(NodeState::new("name".to_owned(), "uid".to_owned()));
    node.enter(Phase::Running);
    let access = Access::Key(Secret(KEY.to_owned()));
    AdminOptions { access, config, core: Arc::new(core), router, node, shards: Vec::new() }
}

fn port_with(
    shards: u16,
    change: impl FnOnce(&mut AdminConfig),
    answer: impl Fn(u16, &Call) -> Option<Result<Answer, ErrorCode>> + Send + Sync + 'static,
) -> Port {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let record = asked.clone();
    let router = router(shards, move |shard, call| {
        record.lock().expect("not poisoned").push(call.clone());
        answer(shard, call)
    });
    let options = options(router, change);
    let node = options.node.clone();
    Port { routes: routes(options), asked, node }
}

fn port(answer: impl Fn(u16, &Call) -> Option<Result<Answer, ErrorCode>> + Send + Sync + 'static) -> Port {
    port_with(2, |_| (), answer)
}

impl Port {
    async fn send(&self, request: Request<Body>) -> (StatusCode, String) {
        let response = self.routes.clone().oneshot(request).await.expect("routes never fail");
        let status = response.status();
        let body = to_bytes(response.into_body(), 1 << 24).await.expect("a whole body");
        (status, String::from_utf8(body.to_vec()).expect("UTF-8"))
    }

    async fn call(&self, method: &str, body: &str) -> (StatusCode, String) {
        let mut request = request(method, KEY, body.to_owned());
        request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        self.send(request).await
    }

    /// Calls and expects 200 with this body.
    async fn check(&self, method: &str, body: &str, expected: &str) {
        assert_eq!(self.call(method, body).await, (StatusCode::OK, expected.to_owned()), "{method} {body}");
    }

    /// What the shards were asked, as text without type noise.
    fn asked(&self) -> String {
        let asked = std::mem::take(&mut *self.asked.lock().expect("not poisoned"));
        asked.iter().map(|call| format!("{call:?}\n")).collect()
    }
}

fn request(method: &str, key: &str, body: impl Into<Body>) -> Request<Body> {
    let builder = Request::post(format!("/api/{method}")).header("x-api-key", key);
    builder.body(body.into()).expect("a request")
}

fn get_request(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).expect("a request")
}

fn error(code: u32, message: &str) -> String {
    format!(r#"{{"error":{{"code":{code},"message":"{message}"}}}}"#)
}

fn published(offset: u64, epoch: &str) -> Option<Result<Answer, ErrorCode>> {
    Some(Ok(Answer::Published { offset, epoch: epoch.to_owned() }))
}

fn done() -> Option<Result<Answer, ErrorCode>> {
    Some(Ok(Answer::Done))
}

#[tokio::test]
async fn publish_passes_data_byte_for_byte_and_leaves_zeros_out() {
    let port = port(|_, call| match call {
        Call::Publish { skip_history: true, .. } => published(0, ""),
        _ => published(7, "epoch"),
    });
    let data = r#"{"n":1.50, "e":"\u00e9","big":123456789012345678901234567890}"#;
    let body = format!(r#"{{"channel":"room:a","data":{data},"tags":{{"k":"v"}},"idempotency_key":"i"}}"#);
    port.check("publish", &body, r#"{"result":{"offset":7,"epoch":"epoch"}}"#).await;
    let asked = std::mem::take(&mut *port.asked.lock().unwrap());
    match asked.as_slice() {
        [Call::Publish { channel, data: sent, tags, skip_history, idempotency_key }] => {
            assert_eq!(&**channel, "room:a");
            assert_eq!(&**sent, data.as_bytes());
            assert_eq!(tags, &[("k".to_owned(), "v".to_owned())]);
            assert!(!skip_history);
            assert_eq!(idempotency_key.as_deref(), Some("i"));
        }
        other => panic!("{other:?}"),
    }
    port.check("publish", r#"{"channel":"room:a","data":{},"skip_history":true}"#, r#"{"result":{}}"#).await;
}

#[tokio::test]
async fn data_is_what_the_client_protocol_can_carry() {
    let port = port(|_, _| published(1, "e"));
    let check = async |body: &str, expected: Option<&str>| {
        let (status, reply) = port.call("publish", body).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let asked = std::mem::take(&mut *port.asked.lock().unwrap());
        let sent = match asked.as_slice() {
            [Call::Publish { data, .. }] => Some(String::from_utf8(data.to_vec()).unwrap()),
            _ => None,
        };
        assert_eq!(sent.as_deref(), expected, "{body}");
        assert_eq!(reply.contains("\"error\":{\"code\":107"), expected.is_none(), "{reply}");
    };
    check(r#"{"channel":"room:a","data":null}"#, Some("null")).await;
    check(r#"{"channel":"room:a","data":"x"}"#, Some("\"x\"")).await;
    check("{\"channel\":\"room:a\",\"data\":{\n\"a\":\r\n1}}", Some("{ \"a\":  1}")).await;
    check(r#"{"channel":"room:a","b64data":"eyJhIjoxfQ=="}"#, Some("{\"a\":1}")).await;
    check(r#"{"channel":"room:a","b64data":"/w=="}"#, None).await;
    check(r#"{"channel":"room:a","b64data":"%"}"#, None).await;
    check(r#"{"channel":"room:a"}"#, None).await;
    check(r#"{"data":{}}"#, None).await;
}

#[tokio::test]
async fn what_is_refused_never_reaches_a_shard() {
    let port = port(|_, _| panic!("asked"));
    let bad = error(107, "bad request");
    let unknown = error(102, "unknown channel");
    let not_available = error(108, "not available");
    let not_found = error(104, "method not found");
    let long_name = "n".repeat(256);
    let long_key = "k".repeat(IDEMPOTENCY_KEY_BYTES_MAX + 1);
    let long_reason = "r".repeat(124);
    let check = async |method: &str, body: String, expected: &str| port.check(method, &body, expected).await;
    for method in ["publish", "subscribe", "presence", "presence_stats", "history", "history_remove"] {
        check(method, r#"{"data":1}"#.into(), &bad).await;
        check(method, r#"{"channel":"nope:a","data":1}"#.into(), &unknown).await;
        check(method, format!(r#"{{"channel":"{long_name}","data":1}}"#), &bad).await;
    }
    check("unsubscribe", r#"{"user":"u","channel":"nope:a"}"#.into(), &unknown).await;
    check("publish", r#"{"channel":"room:a","data":1,"version":2}"#.into(), &not_available).await;
    check("publish", format!(r#"{{"channel":"room:a","data":1,"idempotency_key":"{long_key}"}}"#), &bad)
        .await;
    check("broadcast", r#"{"data":1}"#.into(), &bad).await;
    check("broadcast", r#"{"channels":["room:a"]}"#.into(), &bad).await;
    check("subscribe", r#"{"user":"u","channel":"room:a","session":"s"}"#.into(), &bad).await;
    check("subscribe", r#"{"user":"u","channel":"room:a","expire_at":-1}"#.into(), &bad).await;
    check("disconnect", r#"{"user":"u","disconnect":{"code":1000}}"#.into(), &bad).await;
    check("disconnect", r#"{"user":"u","disconnect":{"code":5000}}"#.into(), &bad).await;
    check(
        "disconnect",
        format!(r#"{{"user":"u","disconnect":{{"code":4000,"reason":"{long_reason}"}}}}"#),
        &bad,
    )
    .await;
    check("refresh", r#"{"user":"u","info":{}}"#.into(), &not_available).await;
    check("rpc", r#"{"method":"m"}"#.into(), &not_found).await;
    check("rpc", "{}".into(), &bad).await;
}

#[tokio::test]
async fn broadcast_answers_each_channel_in_order() {
    let port = port(|_, call| match call {
        Call::Publish { channel, .. } if &**channel == "room:full" => Some(Err(ErrorCode::LimitExceeded)),
        Call::Publish { channel, .. } => published(channel.len() as u64, "e"),
        other => panic!("{other:?}"),
    });
    let expected = concat!(
        r#"{"result":{"responses":[{"result":{"offset":6,"epoch":"e"}},"#,
        r#"{"error":{"code":102,"message":"unknown channel"}},"#,
        r#"{"error":{"code":106,"message":"limit exceeded"}},"#,
        r#"{"error":{"code":107,"message":"bad request"}},"#,
        r#"{"result":{"offset":7,"epoch":"e"}}]}}"#
    );
    let body = r#"{"channels":["room:a","x:y","room:full","","room:bb"],"data":{}}"#;
    port.check("broadcast", body, expected).await;

    let channels: Vec<_> =
        (0..PARALLEL_MAX * 3).map(|index| format!("room:{}", "x".repeat(index + 1))).collect();
    let body = format!(r#"{{"channels":{channels:?},"data":1}}"#);
    let (_, reply) = port.call("broadcast", &body).await;
    let offsets: Vec<_> =
        reply.split("\"offset\":").skip(1).map(|rest| rest.split(',').next().unwrap()).collect();
    let expected: Vec<_> = channels.iter().map(|channel| channel.len().to_string()).collect();
    assert_eq!(offsets, expected);
}

#[tokio::test]
async fn calls_about_users_ask_every_shard() {
    let port = port_with(3, |_| (), |_, _| done());
    let check = async |method: &str, body: &str, parts: &[&str]| {
        port.check(method, body, r#"{"result":{}}"#).await;
        let asked = port.asked();
        assert_eq!(asked.lines().count(), 3, "{method}: {asked}");
        for part in parts {
            assert!(asked.contains(part), "{method}: {part} in {asked}");
        }
    };
    let any = r#"selector: UserSelector { user: "u", client: None, whitelist: [] }"#;
    check("disconnect", r#"{"user":"u"}"#, &[any, "code: 3503", r#"reason: "force disconnect""#]).await;
    check(
        "disconnect",
        r#"{"user":"u","client":"c","whitelist":["w"],"disconnect":{"code":4000,"reason":"bye"}}"#,
        &[r#"client: Some("c"), whitelist: ["w"]"#, "code: 4000", r#"reason: "bye""#],
    )
    .await;
    check("disconnect", r#"{"user":"u","code":4000,"reason":"flat"}"#, &["code: 3503"]).await;
    check("unsubscribe", r#"{"user":"u","channel":"room:a"}"#, &[any, r#"channel: "room:a""#]).await;
    check("unsubscribe", r#"{"user":"u"}"#, &[r#"channel: """#]).await;
    check("refresh", r#"{"user":"u","expired":true}"#, &[any, "expired: true, expire_at: None"]).await;
    check("refresh", r#"{"user":"u","expire_at":99}"#, &["expired: false, expire_at: Some(99)"]).await;
    check("subscribe", r#"{"user":"u","channel":"room:a"}"#, &[any, "presence: None", "recover_since: None"])
        .await;
    check(
        "subscribe",
        concat!(
            r#"{"user":"u","channel":"room:a","expire_at":5,"recover_since":{"offset":3,"epoch":"e"},"#,
            r#""override":{"presence":{"value":false},"force_recovery":{"value":true},"join_leave":{}}}"#
        ),
        &[
            "expire_at: Some(5)",
            "presence: Some(false)",
            "join_leave: Some(false)",
            "recover: Some(true)",
            "position: None",
            r#"recover_since: Some((3, "e"))"#,
        ],
    )
    .await;
}

#[tokio::test]
async fn presence_and_its_figures() {
    let port = port(|_, call| match call {
        Call::Presence { channel } if &**channel == "room:empty" => {
            Some(Ok(Answer::Presence { members: Vec::new(), partial: false }))
        }
        Call::Presence { .. } => Some(Ok(Answer::Presence {
            partial: false,
            members: vec![
                Member {
                    client: ClientId(0xc2),
                    user: "u".into(),
                    conn_info: Some(b"{\"a\":1.50}".to_vec()),
                    chan_info: None,
                },
                Member {
                    client: ClientId(0xc1),
                    user: String::new(),
                    conn_info: None,
                    chan_info: Some(b"[]".to_vec()),
                },
            ],
        })),
        Call::PresenceStats { .. } => {
            Some(Ok(Answer::PresenceStats { num_clients: 0, num_users: 0, partial: false }))
        }
        other => panic!("{other:?}"),
    });
    let expected = concat!(
        r#"{"result":{"presence":{"00000000-0000-0000-0000-0000000000c1":{"user":"","client":"00000000-0000-0000-0000-0000000000c1","#,
        r#""chan_info":[]},"#,
        r#""00000000-0000-0000-0000-0000000000c2":{"user":"u","client":"00000000-0000-0000-0000-0000000000c2","#,
        r#""conn_info":{"a":1.50}}}}}"#
    );
    port.check("presence", r#"{"channel":"room:a"}"#, expected).await;
    port.check("presence", r#"{"channel":"room:empty"}"#, r#"{"result":{"presence":{}}}"#).await;
    let stats = r#"{"result":{"num_clients":0,"num_users":0}}"#;
    port.check("presence_stats", r#"{"channel":"room:a"}"#, stats).await;
}

#[tokio::test]
async fn history_shows_its_records() {
    let mut tags = TagsBuf::new();
    tags.push("key", "a").unwrap();
    let info = ClientInfo { user: "u", client: ClientId(0xc), conn_info: Some(b"1"), chan_info: None };
    let mut records = Vec::new();
    Publication { offset: 4, data: b"{\"n\":1.50}", ..Publication::default() }.write_record(&mut records);
    let second = Publication {
        offset: 5,
        data: b"2",
        info: Some(info),
        tags: tags.as_tags(),
        ..Publication::default()
    };
    second.write_record(&mut records);
    let port = port(move |_, call| match call {
        Call::History { limit: 0, .. } => {
            Some(Ok(Answer::History { records: Vec::new(), offset: 0, epoch: "e".into() }))
        }
        Call::History { .. } => {
            Some(Ok(Answer::History { records: records.clone(), offset: 5, epoch: "e".into() }))
        }
        Call::HistoryRemove { .. } => done(),
        other => panic!("{other:?}"),
    });
    let expected = concat!(
        r#"{"result":{"publications":[{"data":{"n":1.50},"offset":4},"#,
        r#"{"data":2,"info":{"user":"u","client":"00000000-0000-0000-0000-00000000000c","conn_info":1},"#,
        r#""offset":5,"tags":{"key":"a"}}],"#,
        r#""epoch":"e","offset":5}}"#
    );
    let body = r#"{"channel":"room:a","limit":10,"since":{"offset":3,"epoch":"e"},"reverse":true}"#;
    port.check("history", body, expected).await;
    let asked = port.asked();
    assert!(asked.contains(r#"limit: 10, since: Some((3, "e")), reverse: true"#), "{asked}");
    let empty = r#"{"result":{"publications":[],"epoch":"e","offset":0}}"#;
    port.check("history", r#"{"channel":"room:a"}"#, empty).await;
    port.check("history_remove", r#"{"channel":"room:a"}"#, r#"{"result":{}}"#).await;
}

#[tokio::test]
async fn channels_and_info_add_the_shards_up() {
    let port = port(|shard, call| match call {
        Call::Channels { pattern } => {
            assert_eq!(&**pattern, "room:*");
            Some(Ok(Answer::Channels(vec![(format!("room:{shard}").into(), 2), ("room:x".into(), 1)])))
        }
        Call::Info => Some(Ok(Answer::Info {
            num_clients: 3,
            user_hashes: vec![7, 8 + u64::from(shard)],
            num_channels: 2,
            num_subs: 4,
        })),
        other => panic!("{other:?}"),
    });
    let expected = concat!(
        r#"{"result":{"channels":{"room:0":{"num_clients":2},"room:1":{"num_clients":2},"#,
        r#""room:x":{"num_clients":2}}}}"#
    );
    port.check("channels", r#"{"pattern":"room:*"}"#, expected).await;
    let expected = format!(
        r#"{{"result":{{"nodes":[{{"uid":"uid","name":"name","version":"{VERSION}","num_clients":6,"num_users":3,"num_subs":8,"num_channels":4,"uptime":0}}]}}}}"#
    );
    port.check("info", "{}", &expected).await;
}

#[tokio::test]
async fn a_batch_is_not_wrapped_in_a_result() {
    let port = port(|_, call| match call {
        Call::Publish { channel, .. } if &**channel == "room:no" => Some(Err(ErrorCode::PermissionDenied)),
        Call::Publish { channel, .. } => published(channel.len() as u64, ""),
        Call::PresenceStats { .. } => {
            Some(Ok(Answer::PresenceStats { num_clients: 1, num_users: 0, partial: false }))
        }
        Call::Disconnect { .. } => done(),
        other => panic!("{other:?}"),
    });
    let expected = concat!(
        r#"{"replies":[{"publish":{"offset":6}},{"error":{"code":103,"message":"permission denied"}},"#,
        r#"{"presence_stats":{"num_clients":1,"num_users":0}},{"disconnect":{}},"#,
        r#"{"error":{"code":104,"message":"method not found"}}]}"#
    );
    let commands = concat!(
        r#""commands":[{"publish":{"channel":"room:a","data":1}},{"publish":{"channel":"room:no","data":1}},"#,
        r#"{"presence_stats":{"channel":"room:a"}},{"disconnect":{"user":"u"}},{"fly":{}}]"#
    );
    port.check("batch", &format!("{{{commands}}}"), expected).await;
    port.check("batch", &format!("{{{commands},\"parallel\":true}}"), expected).await;
    port.check("batch", "{}", r#"{"replies":[]}"#).await;
}

#[tokio::test]
async fn lists_have_a_maximum() {
    let port = port(|_, _| published(1, ""));
    let check = async |count: usize, ok: bool| {
        let channels = vec!["\"room:a\""; count].join(",");
        let (_, broadcast) =
            port.call("broadcast", &format!(r#"{{"channels":[{channels}],"data":1}}"#)).await;
        assert_eq!(!broadcast.contains("\"code\":106"), ok, "broadcast {count}");
        let commands = vec!["{}"; count].join(",");
        let (_, batch) = port.call("batch", &format!(r#"{{"commands":[{commands}]}}"#)).await;
        assert_eq!(!batch.contains("\"code\":106"), ok, "batch {count}");
    };
    check(ITEMS_MAX, true).await;
    check(ITEMS_MAX + 1, false).await;
}

#[tokio::test]
async fn who_has_no_key_gets_nowhere() {
    let port = port(|_, _| panic!("asked"));
    for method in requests::METHODS.into_iter().chain(["batch", "nope"]) {
        let (status, body) = port.send(request(method, "wrong", "{}")).await;
        assert_eq!((status, body.as_str()), (StatusCode::UNAUTHORIZED, "Unauthorized\n"), "{method}");
    }
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(port.send(get_request(path)).await.0, StatusCode::OK, "{path} is open");
    }
}

#[tokio::test]
async fn http_errors_have_their_status() {
    let port = port(|_, _| panic!("asked"));
    let check = async |method: &str, body: &str, status: StatusCode| {
        assert_eq!(port.call(method, body).await.0, status, "{method} {body}");
    };
    for method in requests::METHODS.into_iter().chain(["batch"]) {
        check(method, "", StatusCode::BAD_REQUEST).await;
        check(method, "{", StatusCode::BAD_REQUEST).await;
        check(method, "3", StatusCode::BAD_REQUEST).await;
        check(method, "{} {}", StatusCode::BAD_REQUEST).await;
    }
    check("publish", r#"{"channel":5,"data":1}"#, StatusCode::BAD_REQUEST).await;
    check("batch", r#"{"commands":[{"publish":5}]}"#, StatusCode::BAD_REQUEST).await;
    check("fly", "{}", StatusCode::NOT_FOUND).await;
    assert_eq!(port.send(get_request("/api/info")).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(port.send(get_request("/")).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_body_may_reach_its_maximum_and_no_more() {
    let limits =
        |config: &mut AdminConfig| (config.request_bytes_max, config.request_pool_bytes) = (2_048, 8_192);
    let port = port_with(1, limits, |_, _| published(1, ""));
    let body = |bytes: usize| {
        let head = r#"{"channel":"room:a","data":""#;
        format!("{head}{}\"}}", "x".repeat(bytes - head.len() - 2))
    };
    assert_eq!(port.call("publish", &body(2_048)).await.0, StatusCode::OK);
    assert_eq!(port.call("publish", &body(2_049)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let chunked = |bytes: usize| {
        let chunks = body(bytes)
            .into_bytes()
            .chunks(100)
            .map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec()))
            .collect::<Vec<_>>();
        Body::from_stream(futures_util::stream::iter(chunks))
    };
    assert_eq!(port.send(request("publish", KEY, chunked(2_048))).await.0, StatusCode::OK);
    assert_eq!(port.send(request("publish", KEY, chunked(2_049))).await.0, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn a_full_pool_and_too_many_calls_are_busy() {
    let limits = |config: &mut AdminConfig| (config.request_pool_bytes, config.inflight_max) = (8 << 20, 3);
    // The shard answers when it is told to: until then calls are under way.
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (answers, answered) = crate::control::router::answers();
    let record = asked.clone();
    let router = Router::new(vec![Box::new(move |command| {
        record.lock().expect("not poisoned").push(command.token);
        true
    })]);
    tokio::spawn(router.clone().deliver(answered));
    let options = options(router, limits);
    let port = Arc::new(Port { node: options.node.clone(), routes: routes(options), asked: Arc::default() });
    let under_way = async |count: usize| {
        while asked.lock().expect("not poisoned").len() < count {
            tokio::task::yield_now().await;
        }
    };
    let big = format!(r#"{{"channel":"room:a","data":"{}"}}"#, "x".repeat(3 << 20));
    let mut waiting = Vec::new();
    for count in 1..=2 {
        let (port, big) = (port.clone(), big.clone());
        waiting.push(tokio::spawn(async move { port.call("publish", &big).await }));
        under_way(count).await;
    }
    let busy = (StatusCode::SERVICE_UNAVAILABLE, error(111, "too many requests"));
    assert_eq!(port.call("publish", &big).await, busy, "two of 3 MiB leave no room for a third in 8 MiB");
    let other = port.clone();
    waiting.push(tokio::spawn(async move { other.call("info", "{}").await }));
    under_way(3).await;
    assert_eq!(port.call("info", "{}").await, busy, "three are under way");
    let release = || {
        for token in std::mem::take(&mut *asked.lock().expect("not poisoned")) {
            answers.put(ControlAnswer { token, shard: 0, result: Err(ErrorCode::NotAvailable) });
        }
    };
    release();
    let refused = (StatusCode::OK, error(108, "not available"));
    for call in waiting {
        assert_eq!(call.await.expect("no panic"), refused);
    }
    let again = tokio::spawn(async move { port.call("info", "{}").await });
    under_way(1).await;
    release();
    assert_eq!(again.await.expect("no panic"), refused, "there is room again");
}

#[tokio::test]
async fn a_shards_full_inbox_is_busy() {
    let full = Router::new(vec![Box::new(|_| false)]);
    let routes = routes(options(full, |_| ()));
    let response = routes.oneshot(request("info", KEY, "{}")).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()[RETRY_AFTER], "1");
    const { assert!(CALLS_MAX >= 1_024) };
}

#[tokio::test]
async fn health_and_readiness() {
    let port = port(|_, _| None);
    let (status, body) = port.send(get_request("/health")).await;
    assert_eq!(status, StatusCode::OK);
    for part in [r#""status":"ok""#, r#""timestamp":"#, r#""uptime":0"#, &format!(r#""version":"{VERSION}""#)]
    {
        assert!(body.contains(part), "{part} in {body}");
    }
    let check = async |phase: Phase, expected: StatusCode, text: &str| {
        port.node.enter(phase);
        assert_eq!(port.send(get_request("/ready")).await, (expected, text.to_owned()));
        assert_eq!(port.send(get_request("/health")).await.0, StatusCode::OK, "{phase:?}: the process lives");
    };
    let unready = StatusCode::SERVICE_UNAVAILABLE;
    check(Phase::Starting, unready, r#"{"status":"not ready","reasons":["starting"]}"#).await;
    check(Phase::Running, StatusCode::OK, r#"{"status":"ready","reasons":[]}"#).await;
    check(Phase::Draining, unready, r#"{"status":"not ready","reasons":["draining"]}"#).await;
}

#[tokio::test]
async fn metrics_count_calls_errors_and_refusals() {
    let port = port(|_, _| published(1, ""));
    port.call("publish", r#"{"channel":"room:a","data":1}"#).await;
    port.call("publish", r#"{"channel":"no:a","data":1}"#).await;
    port.call("publish", "{").await;
    port.send(request("publish", "wrong", "{}")).await;
    let (status, text) = port.send(get_request("/metrics")).await;
    assert_eq!(status, StatusCode::OK);
    for line in [
        "ringmain_api_call_duration_seconds_count{method=\"publish\"} 3",
        "ringmain_api_errors_total{code=\"102\"} 1",
        "ringmain_api_refused_total{reason=\"bad_json\"} 1",
        "ringmain_api_refused_total{reason=\"unauthorized\"} 1",
        "ringmain_ready 1",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    assert!(!text.contains(KEY));
}

#[tokio::test]
async fn a_node_on_its_own_places_nobody_and_only_an_application_may_ask() {
    let port = port(|_, _| done());
    let ask = async |path: &str, key: &str| {
        let request = Request::get(path).header("x-api-key", key).body(Body::empty()).expect("a request");
        port.send(request).await.0
    };
    assert_eq!(ask("/v1/place?user=7", "wrong").await, StatusCode::UNAUTHORIZED);
    assert_eq!(ask("/v1/place?user=7", KEY).await, StatusCode::NOT_FOUND);
    assert_eq!(ask("/v1/place", KEY).await, StatusCode::BAD_REQUEST);
}
