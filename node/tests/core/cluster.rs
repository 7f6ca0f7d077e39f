//! A shard of a node that is part of a cluster: what it reports, whose members it shows, what it asks for.
//! Other nodes are what the test says; with real ones see `cluster_nodes`.

use std::sync::Arc;

use ringmain::core::api::{Answer, Call, ControlCommand, REPORT_TOKEN};
use ringmain::core::cluster::{ClusterCall, News, PRESENCE_ASK_MS, PeerId, PresenceItem, Report, slot_of};
use ringmain::core::config::CoreConfig;
use ringmain::core::engine::Engine;
use ringmain::core::mesh::Identity;
use ringmain::core::metrics::Metric;
use serde_json::{Value, json};

use crate::harness::World;
use crate::protocol::{config, token};

const CHANNEL: &str = "room:cluster";

/// Without channels that everybody is subscribed to: what is held is what the test subscribes to.
pub(crate) fn quiet_config() -> CoreConfig {
    let mut config = config();
    config.client.personal_channel = false;
    config
}

fn tell(world: &mut World, call: ClusterCall) {
    let command = ControlCommand { token: REPORT_TOKEN, call: Call::Cluster(call) };
    let now = world.now;
    world.cores[0].control(command, now);
    world.run();
}

/// The reports since the last look.
fn reports(world: &mut World) -> Vec<Arc<Report>> {
    let (reports, answers) = std::mem::take(&mut world.answers)
        .into_iter()
        .partition::<Vec<_>, _>(|answer| answer.token == REPORT_TOKEN);
    world.answers = answers;
    let report = |answer: ringmain::core::api::ControlAnswer| match answer.result {
        Ok(Answer::Report(report)) => report,
        other => panic!("no report: {other:?}"),
    };
    reports.into_iter().map(report).collect()
}

fn ack(world: &mut World, report: &Report) {
    tell(world, ClusterCall::Ack { stream: report.stream, sequence: report.sequence });
}

/// Takes reports until there is none, and gives their news.
fn news(world: &mut World) -> Vec<News> {
    let mut news = Vec::new();
    loop {
        world.run();
        let new = reports(world);
        if new.is_empty() {
            return news;
        }
        for report in new {
            news.extend(report.news.iter().cloned());
            ack(world, &report);
        }
    }
}

fn in_cluster() -> World {
    let mut world = World::new(1, 1, &quiet_config());
    tell(&mut world, ClusterCall::Start { stream: 1 });
    world
}

fn connect(world: &mut World, user: &str) -> usize {
    let connect = json!({"token": token(&json!({"sub": user}))}).to_string();
    world.connected(0, &connect).0
}

fn subscribe(world: &mut World, client: usize, channel: &str) {
    let body = json!({"channel": channel, "join_leave": true}).to_string();
    let reply = world.ask(client, "subscribe", &body);
    assert!(reply.get("error").is_none(), "{reply}");
}

/// A member of another node, as that one's core makes it.
fn member(client: u128, user: &str) -> Identity {
    let mut bytes = client.to_be_bytes().to_vec();
    bytes.push(user.len() as u8);
    bytes.extend(u32::MAX.to_le_bytes());
    bytes.push(2); // announced
    bytes.extend(user.as_bytes());
    Identity::from_bytes(&bytes).expect("an identity")
}

fn whole(members: &[Identity]) -> PresenceItem {
    PresenceItem::Whole { channel: CHANNEL.into(), members: members.to_vec(), first: true, last: true }
}

fn joined(member: Identity) -> PresenceItem {
    PresenceItem::Joined { channel: CHANNEL.into(), member, listed: true }
}

fn left(member: Identity) -> PresenceItem {
    PresenceItem::Left { channel: CHANNEL.into(), member, listed: true }
}

fn told(world: &mut World, peer: PeerId, items: &[PresenceItem]) {
    tell(world, ClusterCall::Told { peer, items: items.to_vec() });
}

/// Joins and leaves that a client was pushed since the last look, as `+user` and `-user`.
fn pushes(world: &mut World, client: usize) -> String {
    let pushes = world.take_json(client).into_iter().filter_map(|value| {
        let push = &value["push"];
        let user = |kind: &str| push[kind]["info"]["user"].as_str().map(str::to_owned);
        user("join").map(|user| format!("+{user}")).or(user("leave").map(|user| format!("-{user}")))
    });
    pushes.collect::<Vec<_>>().join(" ")
}

/// The users in the channel as a client sees them.
pub(crate) fn users(reply: &Value) -> Vec<String> {
    let members = reply["presence"].as_object().unwrap_or_else(|| panic!("{reply}"));
    let mut users: Vec<String> =
        members.values().map(|member| member["user"].as_str().unwrap_or("").to_owned()).collect();
    users.sort();
    users
}

fn presence(world: &mut World, client: usize) -> Vec<String> {
    let reply = world.ask(client, "presence", &json!({"channel": CHANNEL}).to_string());
    users(&reply)
}

fn partial(world: &mut World) -> u64 {
    world.cores[0].metrics().get(Metric::PresencePartial)
}

#[test]
fn outside_of_a_cluster_nothing_is_reported_and_nothing_kept() {
    let mut world = World::new(1, 1, &quiet_config());
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    tell(&mut world, ClusterCall::PeerUp { peer: 1 });
    told(&mut world, 1, &[whole(&[member(1, "8")])]);
    assert_eq!(presence(&mut world, client), ["7"]);
    world.pass(5_000);
    assert!(reports(&mut world).is_empty());
}

#[test]
fn a_start_tells_what_is_held_and_whose_users_are_here() {
    let mut world = World::new(1, 1, &quiet_config());
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    for stream in 1..3 {
        tell(&mut world, ClusterCall::Start { stream });
        let report = reports(&mut world).pop().expect("a report");
        assert_eq!((report.stream, report.sequence, report.lost), (stream, 1, false));
        assert_eq!(report.slots, [(slot_of("7"), true)]);
        let held = News::Held { channel: CHANNEL.into() };
        assert!(report.news.contains(&held), "{:?}", report.news);
        ack(&mut world, &report);
    }
    world.frame(client, 8, &[]);
    world.run();
    let report = reports(&mut world).pop().expect("a report");
    assert_eq!(report.slots, [(slot_of("7"), false)]);
    let last = report.news.last();
    assert_eq!(last, Some(&News::Released { channel: CHANNEL.into() }), "after the leave");
}

#[test]
fn joins_and_leaves_are_told_in_order_and_together_while_a_report_is_under_way() {
    let mut world = in_cluster();
    let first = connect(&mut world, "7");
    subscribe(&mut world, first, CHANNEL);
    let report = reports(&mut world).into_iter().next().expect("a report");
    for user in ["8", "9"] {
        let client = connect(&mut world, user);
        subscribe(&mut world, client, CHANNEL);
        world.ask(client, "unsubscribe", &json!({"channel": CHANNEL}).to_string());
    }
    assert!(reports(&mut world).is_empty(), "one at a time");
    ack(&mut world, &report);
    let changes: Vec<String> = news(&mut world)
        .into_iter()
        .filter_map(|news| match news {
            News::Changed(PresenceItem::Joined { member, listed: true, .. }) => {
                Some(format!("+{}", String::from_utf8_lossy(&member.as_bytes()[22..])))
            }
            News::Changed(PresenceItem::Left { listed: true, .. }) => Some("-".to_owned()),
            _ => None,
        })
        .collect();
    assert_eq!(changes.join(" "), "+7 +8 - +9 -");
    assert_eq!(world.cores[0].metrics().get(Metric::DropNews), 0);
}

#[test]
fn a_report_that_was_not_taken_comes_again_as_it_was() {
    let mut world = in_cluster();
    let client = connect(&mut world, "7");
    let report = reports(&mut world).into_iter().next().expect("a report");
    subscribe(&mut world, client, CHANNEL);
    tell(&mut world, ClusterCall::Ack { stream: 1, sequence: report.sequence + 1 });
    tell(&mut world, ClusterCall::Ack { stream: 2, sequence: report.sequence });
    assert!(reports(&mut world).is_empty());
    world.pass(1_100);
    assert_eq!(reports(&mut world).first(), Some(&report));
    ack(&mut world, &report);
    let next = reports(&mut world).pop().expect("what has waited");
    assert_eq!(next.sequence, report.sequence + 1);
}

#[test]
fn members_of_other_nodes_are_listed_counted_and_announced() {
    let mut world = in_cluster();
    tell(&mut world, ClusterCall::PeerUp { peer: 1 });
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    // Those who were there before are shown, and joined for nobody here.
    told(&mut world, 1, &[whole(&[member(1, "7"), member(2, "8")])]);
    assert_eq!(pushes(&mut world, client), "+7", "its own join alone");
    assert_eq!(presence(&mut world, client), ["7", "7", "8"]);
    let stats = world.ask(client, "presence_stats", &json!({"channel": CHANNEL}).to_string());
    assert_eq!(stats, json!({"num_clients": 3, "num_users": 2}));
    told(&mut world, 1, &[joined(member(3, "9")), joined(member(3, "9")), left(member(2, ""))]);
    told(&mut world, 1, &[left(member(2, ""))]);
    assert_eq!(pushes(&mut world, client), "+9 -8", "each once");
    // What is told of another channel, or by an unknown node, is nothing.
    told(&mut world, 2, &[joined(member(4, "4"))]);
    assert_eq!(presence(&mut world, client), ["7", "7", "9"]);
    assert_eq!(partial(&mut world), 0);
}

#[test]
fn the_members_of_a_node_that_is_gone_leave_at_once_and_are_told_once() {
    let mut world = in_cluster();
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    tell(&mut world, ClusterCall::PeerUp { peer: 1 });
    let members: Vec<Identity> = (0..2_500).map(|n| member(n, "8")).collect();
    told(&mut world, 1, &[whole(&members)]);
    assert_eq!(world.take_json(client).len(), 2_501, "a node that came later: its members join");
    let now = world.now;
    let gone = Call::Cluster(ClusterCall::PeerDown { peer: 1 });
    world.cores[0].control(ControlCommand { token: REPORT_TOKEN, call: gone }, now);
    // Before all leaves are told.
    assert_eq!(presence(&mut world, client), ["7"]);
    world.run();
    let told_leaves = pushes(&mut world, client);
    assert_eq!(told_leaves.split(' ').filter(|push| *push == "-8").count(), 2_500);
    tell(&mut world, ClusterCall::PeerDown { peer: 1 });
    assert_eq!(pushes(&mut world, client), "");
}

#[test]
fn what_a_gone_node_held_is_given_back_to_the_pool() {
    let mut world = in_cluster();
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    let before = world.cores[0].metrics().get(Metric::InfoBytes);
    for peer in 1..4 {
        tell(&mut world, ClusterCall::PeerUp { peer });
        told(&mut world, peer, &[whole(&[member(1, "8"), member(2, "9")])]);
        assert!(world.cores[0].metrics().get(Metric::InfoBytes) > before);
        match peer {
            1 => tell(&mut world, ClusterCall::PeerDown { peer }),
            2 => told(&mut world, peer, &[whole(&[])]),
            _ => tell(&mut world, ClusterCall::Start { stream: 2 }),
        }
        assert_eq!(world.cores[0].metrics().get(Metric::InfoBytes), before, "{peer}");
    }
}

#[test]
fn a_question_about_a_channel_that_is_not_held_waits_for_every_node() {
    let mut world = in_cluster();
    for peer in [1, 2] {
        tell(&mut world, ClusterCall::PeerUp { peer });
    }
    let call = Call::Presence { channel: CHANNEL.into() };
    let now = world.now;
    for token in [101, 102] {
        world.cores[0].control(ControlCommand { token, call: call.clone() }, now);
    }
    assert_eq!(news(&mut world), [News::Asked { channel: CHANNEL.into() }], "one question for both");
    told(&mut world, 1, &[whole(&[member(1, "8")])]);
    assert!(world.answers.is_empty());
    told(&mut world, 2, &[whole(&[member(2, "9")])]);
    let answers = std::mem::take(&mut world.answers);
    assert_eq!(answers.len(), 2);
    for answer in answers {
        match answer.result {
            Ok(Answer::Presence { members, partial: false }) => assert_eq!(members.len(), 2),
            other => panic!("{other:?}"),
        }
    }
    // Nothing is kept of it: the next question asks again.
    let infos = world.cores[0].metrics().get(Metric::InfoBytes);
    assert_eq!(infos, 0);
    world.cores[0].control(ControlCommand { token: 103, call }, now);
    assert_eq!(news(&mut world), [News::Asked { channel: CHANNEL.into() }]);
}

#[test]
fn a_question_that_a_node_does_not_answer_is_answered_as_partial_when_it_is_time() {
    let mut world = in_cluster();
    for peer in [1, 2] {
        tell(&mut world, ClusterCall::PeerUp { peer });
    }
    let now = world.now;
    for (token, call) in [
        (101, Call::Presence { channel: CHANNEL.into() }),
        (102, Call::PresenceStats { channel: CHANNEL.into() }),
    ] {
        world.cores[0].control(ControlCommand { token, call }, now);
    }
    told(&mut world, 1, &[whole(&[member(1, "8")])]);
    world.pass(PRESENCE_ASK_MS - 32);
    reports(&mut world);
    assert!(world.answers.is_empty());
    world.pass(48);
    let answers = std::mem::take(&mut world.answers);
    match &answers[..] {
        [first, second] => {
            assert!(
                matches!(&first.result, Ok(Answer::Presence { members, partial: true }) if members.len() == 1)
            );
            let stats = &second.result;
            assert!(matches!(
                stats,
                Ok(Answer::PresenceStats { num_clients: 1, num_users: 1, partial: true })
            ));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(partial(&mut world), 2);
}

#[test]
fn a_node_that_is_gone_is_waited_for_no_longer() {
    let mut world = in_cluster();
    for peer in [1, 2] {
        tell(&mut world, ClusterCall::PeerUp { peer });
    }
    let now = world.now;
    world.cores[0]
        .control(ControlCommand { token: 101, call: Call::Presence { channel: CHANNEL.into() } }, now);
    told(&mut world, 1, &[whole(&[member(1, "8")])]);
    tell(&mut world, ClusterCall::PeerDown { peer: 2 });
    reports(&mut world);
    assert!(matches!(&world.answers[..], [answer]
        if matches!(&answer.result, Ok(Answer::Presence { members, partial: false }) if members.len() == 1)));
}

#[test]
fn a_doubted_node_is_asked_anew_and_only_the_difference_is_announced() {
    let mut world = in_cluster();
    tell(&mut world, ClusterCall::PeerUp { peer: 1 });
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    told(&mut world, 1, &[whole(&[member(1, "8"), member(2, "9")])]);
    assert_eq!(pushes(&mut world, client), "+7");
    // A whole that began before the doubt lacks what was lost.
    let part = |members: &[Identity], first, last| PresenceItem::Whole {
        channel: CHANNEL.into(),
        members: members.to_vec(),
        first,
        last,
    };
    told(&mut world, 1, &[part(&[member(1, "8")], true, false)]);
    tell(&mut world, ClusterCall::PeerDoubt { peer: 1 });
    told(&mut world, 1, &[part(&[], false, true)]);
    assert_eq!(pushes(&mut world, client), "");
    // Until it is told as a whole, a question waits.
    let question = world.send(client, "presence", &json!({"channel": CHANNEL}).to_string());
    world.run();
    assert!(world.take_json(client).is_empty());
    told(&mut world, 1, &[part(&[member(2, "9")], true, false), part(&[member(3, "10")], false, true)]);
    let values = world.take_json(client);
    let reply = values.iter().find(|value| value["id"] == question).expect("the answer");
    assert_eq!(users(&reply["presence"]), ["10", "7", "9"]);
    let pushes: Vec<&Value> = values.iter().filter(|value| value.get("push").is_some()).collect();
    assert_eq!(pushes.len(), 2, "8 left, 10 joined: {pushes:?}");
    assert_eq!(partial(&mut world), 0);
}

#[test]
fn a_node_is_told_who_is_here_in_the_order_of_joins() {
    let mut world = in_cluster();
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    news(&mut world);
    tell(&mut world, ClusterCall::Tell { to: 99, channels: vec![CHANNEL.into(), "room:none".into()] });
    match &news(&mut world)[..] {
        [News::Whole { to: 99, channel, members }, News::Whole { to: 99, members: nobody, .. }] => {
            assert_eq!((&**channel, members.len(), nobody.len()), (CHANNEL, 1, 0));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pool_without_room_for_others_members_says_so() {
    let mut config = quiet_config();
    config.limits.info_pool_bytes = 2_000;
    let mut world = World::new(1, 1, &config);
    tell(&mut world, ClusterCall::Start { stream: 1 });
    tell(&mut world, ClusterCall::PeerUp { peer: 1 });
    let client = connect(&mut world, "7");
    subscribe(&mut world, client, CHANNEL);
    let members: Vec<Identity> = (0..50).map(|n| member(n, "8")).collect();
    told(&mut world, 1, &[whole(&members)]);
    assert!(world.cores[0].metrics().get(Metric::DropMember) > 0);
    world.send(client, "presence", &json!({"channel": CHANNEL}).to_string());
    world.pass(PRESENCE_ASK_MS + 32);
    assert_eq!(partial(&mut world), 1, "what was left out is said");
}
