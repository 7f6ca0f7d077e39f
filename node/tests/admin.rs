//! The server API, health and metrics of a real node, with real clients connected.

mod admin_support;

use std::time::Instant;

use admin_support::{Client, Node, PATIENCE, until_some};

/// What stands under a name in a JSON text; enough for flat replies.
fn field<'a>(json: &'a str, name: &str) -> &'a str {
    let rest = json.split(&format!("\"{name}\":")).nth(1).unwrap_or_else(|| panic!("no {name} in {json}"));
    let end = rest.find([',', '}', ']']).expect("an end");
    rest[..end].trim_matches('"')
}

fn demo() -> Node {
    Node::start(&["--demo", "--shards=2"])
}

#[test]
fn publications_get_positions_and_stay_in_history_byte_for_byte() {
    let node = demo();
    let data = r#"{"n":1.50,"e":"\u00e9","big":123456789012345678901234567890}"#;
    let body = format!(r#"{{"channel":"room:a","data":{data},"tags":{{"key":"k"}}}}"#);
    let first = node.call("publish", &body);
    let epoch = field(&first, "epoch").to_owned();
    assert_eq!(first, format!(r#"{{"result":{{"offset":1,"epoch":"{epoch}"}}}}"#));
    node.call("publish", r#"{"channel":"room:a","data":"second"}"#);
    let history = node.call("history", r#"{"channel":"room:a","limit":-1}"#);
    let expected = format!(
        r#"{{"result":{{"publications":[{{"data":{data},"offset":1,"tags":{{"key":"k"}}}},{{"data":"second","offset":2}}],"epoch":"{epoch}","offset":2}}}}"#
    );
    assert_eq!(history, expected);
    let since = format!(r#"{{"channel":"room:a","limit":10,"since":{{"offset":1,"epoch":"{epoch}"}}}}"#);
    let expected = format!(
        r#"{{"result":{{"publications":[{{"data":"second","offset":2}}],"epoch":"{epoch}","offset":2}}}}"#
    );
    assert_eq!(node.call("history", &since), expected);
    let elsewhere = r#"{"channel":"room:a","limit":10,"since":{"offset":1,"epoch":"elsewhere"}}"#;
    assert!(node.call("history", elsewhere).contains(r#""code":112"#));

    assert_eq!(node.call("history_remove", r#"{"channel":"room:a"}"#), r#"{"result":{}}"#);
    let expected = format!(r#"{{"result":{{"publications":[],"epoch":"{epoch}","offset":2}}}}"#);
    assert_eq!(node.call("history", r#"{"channel":"room:a","limit":10}"#), expected);
    let third = node.call("publish", r#"{"channel":"room:a","data":3}"#);
    assert_eq!(third, format!(r#"{{"result":{{"offset":3,"epoch":"{epoch}"}}}}"#));
}

#[test]
fn a_repeat_under_one_key_is_one_publication() {
    let node = demo();
    let body = r#"{"channel":"room:a","data":1,"idempotency_key":"once"}"#;
    let first = node.call("publish", body);
    assert_eq!(node.call("publish", body), first);
    assert_eq!(field(&node.call("history", r#"{"channel":"room:a"}"#), "offset"), "1");
}

#[test]
fn subscribers_on_every_shard_get_what_the_api_publishes() {
    let node = demo();
    let mut clients: Vec<Client> = (0..8).map(|_| node.connect()).collect();
    for client in &mut clients {
        let reply = client.ask(r#"{"id":2,"subscribe":{"channel":"room:a"}}"#);
        assert!(reply.contains(r#""subscribe":"#), "{reply}");
    }
    let broadcast = node.call("broadcast", r#"{"channels":["room:a","room:b"],"data":{"n":1.50}}"#);
    assert_eq!(broadcast.matches(r#"{"result":{"offset":1"#).count(), 2, "{broadcast}");
    for client in &mut clients {
        let push = client.next_with(r#""pub":"#);
        assert!(push.contains(r#""channel":"room:a""#) && push.contains(r#""data":{"n":1.50}"#), "{push}");
        assert!(push.contains(r#""offset":1"#), "{push}");
    }
    assert_eq!(
        node.call("presence_stats", r#"{"channel":"room:a"}"#),
        r#"{"result":{"num_clients":8,"num_users":1}}"#
    );
    assert_eq!(
        node.call("channels", r#"{"pattern":"room:*"}"#),
        r#"{"result":{"channels":{"room:a":{"num_clients":8}}}}"#
    );
    let info = node.call("info", "{}");
    assert_eq!(field(&info, "num_clients"), "8", "{info}");
    assert_eq!(field(&info, "num_users"), "1", "{info}");
    assert_eq!(field(&info, "version"), env!("CARGO_PKG_VERSION"), "{info}");
    let presence = node.call("presence", r#"{"channel":"room:a"}"#);
    assert_eq!(presence.matches(r#""user":"""#).count(), 8, "{presence}");
}

#[test]
fn users_are_subscribed_unsubscribed_refreshed_and_disconnected() {
    let secret = "0123456789abcdef0123456789abcdef";
    let node = Node::start_with(&["--demo", "--shards=2"], &[("RINGMAIN_TOKEN_HMAC_SECRET", secret)]);
    let token = |user: &str| {
        let mut command = assert_cmd::Command::cargo_bin("ringmain").expect("built by cargo");
        let output = command.env_clear().args(["token", "--user", user, "--secret", secret]).output();
        String::from_utf8(output.expect("it runs").stdout).expect("UTF-8").trim().to_owned()
    };
    let connect = |user: &str| {
        let mut client = node.open();
        let reply = client.ask(&format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, token(user)));
        assert!(reply.contains(r#""connect":"#), "{reply}");
        let id = Client::client_id(&reply).to_owned();
        (client, id)
    };
    let (mut one, one_id) = connect("alice");
    let (mut two, two_id) = connect("alice");
    let (mut other, _) = connect("bob");

    let done = r#"{"result":{}}"#;
    let subscribe = r#"{"user":"alice","channel":"room:a","info":{"role":"guest"}}"#;
    assert_eq!(node.call("subscribe", subscribe), done);
    for client in [&mut one, &mut two] {
        let push = client.next_with(r#""subscribe":"#);
        assert!(push.contains(r#""channel":"room:a""#), "{push}");
    }
    let presence = node.call("presence", r#"{"channel":"room:a"}"#);
    for id in [&one_id, &two_id] {
        let expected = format!(r#""{id}":{{"user":"alice","client":"{id}","chan_info":{{"role":"guest"}}}}"#);
        assert!(presence.contains(&expected), "{expected} in {presence}");
    }

    let unsubscribe = format!(r#"{{"user":"alice","channel":"room:a","client":"{one_id}"}}"#);
    assert_eq!(node.call("unsubscribe", &unsubscribe), done);
    let push = one.next_with(r#""unsubscribe":"#);
    assert!(push.contains(r#""code":2000"#), "{push}");
    // The home shard hears of it in its own time.
    until_some(Instant::now() + PATIENCE, || {
        let stats = node.call("presence_stats", r#"{"channel":"room:a"}"#);
        (field(&stats, "num_clients") == "1").then_some(())
    });

    let whitelisted = format!(r#"{{"user":"alice","whitelist":["{two_id}"]}}"#);
    assert_eq!(node.call("disconnect", &whitelisted), done);
    assert_eq!(one.closed(), (3503, "force disconnect".to_owned()));
    let custom = r#"{"user":"alice","disconnect":{"code":4001,"reason":"go away"}}"#;
    assert_eq!(node.call("disconnect", custom), done);
    assert_eq!(two.closed(), (4001, "go away".to_owned()));
    assert_eq!(node.call("refresh", r#"{"user":"bob","expired":true}"#), done);
    assert_eq!(other.closed().0, 3005);
}

#[test]
fn without_a_key_the_api_is_closed_and_the_rest_is_open() {
    let node = Node::start(&["--shards=1"]);
    for key in ["", "guess"] {
        assert_eq!(node.call_with_key("info", key, "{}"), (401, "Unauthorized\n".to_owned()));
    }
    assert!(node.banner.contains("refuses every call"), "{}", node.banner);
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(node.get(path).0, 200, "{path}");
    }
    let keyed = Node::start_with(&["--shards=1"], &[("RINGMAIN_API_KEY", "sesame")]);
    assert_eq!(keyed.call_with_key("info", "sesame", "{}").0, 200);
    assert_eq!(keyed.call_with_key("info", "sesam", "{}").0, 401);
    assert!(!keyed.banner.contains("sesame"), "{}", keyed.banner);
}

#[test]
fn a_namespace_without_history_or_presence_says_so() {
    let node = Node::start(&["--demo", "--shards=1", "--namespaces.cursor.history_size=0"]);
    let not_available = r#"{"error":{"code":108,"message":"not available"}}"#;
    for method in ["history", "history_remove", "presence", "presence_stats"] {
        assert_eq!(node.call(method, r#"{"channel":"cursor:a"}"#), not_available, "{method}");
    }
    assert_eq!(node.call("publish", r#"{"channel":"cursor:a","data":1}"#), r#"{"result":{}}"#);
}

#[test]
fn metrics_show_each_shard() {
    let node = demo();
    let _client = node.connect();
    let until = Instant::now() + PATIENCE;
    // Shards publish their figures in their own time.
    let text = until_some(until, || {
        let (status, text) = node.get("/metrics");
        assert_eq!(status, 200);
        let sessions =
            text.lines().filter(|line| line.starts_with("ringmain_sessions{") && line.ends_with(" 1"));
        (sessions.count() == 1).then_some(text)
    });
    for part in [
        "# TYPE ringmain_connections gauge",
        "# TYPE ringmain_accepted counter",
        "ringmain_accepted_total{shard=\"0\"}",
        "ringmain_accepted_total{shard=\"1\"}",
        "ringmain_closed_total{shard=\"0\",reason=\"no_pong\"} 0",
        "ringmain_dropped_total{shard=\"1\",reason=\"skipped\"} 0",
        "ringmain_turn_duration_seconds_bucket{le=\"+Inf\",shard=\"0\"}",
        "ringmain_loop_delay_seconds_count{shard=\"1\"}",
        "ringmain_process_private_memory_bytes ",
        "ringmain_ready 1",
        "ringmain_build_info{version=",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}
