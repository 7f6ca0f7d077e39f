//! Several nodes on a simulated broker, on virtual time: cores, the cluster's services, and clients that see what
//! they do to each other. Nodes die, stand still, are cut off and come back; messages get lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringmain::control::cluster::commands::{CommandError, LINGER_MS};
use ringmain::control::cluster::message::{AnswerPart, NodeInfo, Question};
use ringmain::control::cluster::ticket::{self, Ticket};
use ringmain::control::cluster::{Cluster, ClusterOptions, DEAD_MS, Effect, HEARTBEAT_MS, PlaceError};
use ringmain::core::api::{Answer, Call, ControlCommand, REPORT_TOKEN, UserSelector};
use ringmain::core::cluster::{PRESENCE_ASK_MS, slot_of};
use ringmain::core::config::Secret;
use ringmain::core::engine::Engine;
use ringmain_bus::Bus as _;
use ringmain_bus::sim::{SimBroker, SimOptions, SimPort};
use ringmain_proto::time::Now;
use serde_json::{Value, json};

use crate::cluster::{quiet_config, users};
use crate::harness::{Dice, World};
use crate::protocol::token;

const CHANNEL: &str = "room:cluster";

struct Node {
    world: World,
    cluster: Cluster,
    port: SimPort,
    /// It does nothing.
    paused: bool,
    /// Ends of commands and questions, by ticket.
    told: BTreeMap<u64, Result<(), CommandError>>,
    surveyed: BTreeMap<u64, (Vec<AnswerPart>, bool)>,
}

struct Nodes {
    broker: SimBroker,
    nodes: Vec<Node>,
    now: Now,
    ticket: u64,
}

fn options(node: usize) -> ClusterOptions {
    ClusterOptions {
        node: node as u128 + 1,
        name: format!("node-{node}"),
        address: format!("node-{node}.example:8000"),
        capacity: 100,
        slot_groups: 4_096,
        shards: 2,
        ticket_key: Some(Secret("key".into())),
    }
}

impl Nodes {
    fn new(count: usize, seed: u64) -> Nodes {
        let (broker, ports) = SimBroker::new(&SimOptions::new(seed), count);
        let mut nodes = Vec::new();
        for (index, port) in ports.into_iter().enumerate() {
            let mut config = quiet_config();
            // These clients answer no pings.
            config.client.ping_interval_ms = 3_600_000;
            let world = World::new(2, seed * 10 + index as u64, &config);
            let cluster = Cluster::new(options(index), world.now);
            let (told, surveyed) = (BTreeMap::new(), BTreeMap::new());
            nodes.push(Node { world, cluster, port, paused: false, told, surveyed });
        }
        let now = nodes[0].world.now;
        let mut nodes = Nodes { broker, nodes, now, ticket: 0 };
        nodes.until("all know each other", |nodes| {
            nodes.nodes.iter().all(|node| node.cluster.figures().peers as usize == count - 1)
        });
        nodes
    }

    fn step(&mut self) {
        self.now.mono_ms += 1;
        self.now.unix_ms += 1;
        self.broker.step(self.now.mono_ms);
        for node in &mut self.nodes {
            if !node.paused {
                node.turn(self.now);
            }
        }
    }

    fn pass(&mut self, ms: u64) {
        (0..ms).for_each(|_| self.step());
    }

    /// Lets time pass until something holds; how long it took.
    fn until(&mut self, what: &str, mut holds: impl FnMut(&mut Nodes) -> bool) -> u64 {
        for passed in 0..30_000 {
            if holds(self) {
                return passed;
            }
            self.step();
        }
        panic!("it never came to pass that {what}");
    }

    fn connect(&mut self, node: usize, user: &str) -> usize {
        let connect = json!({"token": token(&json!({"sub": user}))}).to_string();
        self.nodes[node].world.connected(0, &connect).0
    }

    /// A user of a node, in the channel.
    fn subscribed(&mut self, node: usize, user: &str) -> usize {
        let client = self.connect(node, user);
        let body = json!({"channel": CHANNEL, "join_leave": true}).to_string();
        let reply = self.nodes[node].world.ask(client, "subscribe", &body);
        assert!(reply.get("error").is_none(), "{reply}");
        client
    }

    fn close(&mut self, node: usize, client: usize) {
        self.nodes[node].world.frame(client, 8, &[]);
    }

    /// Joins and leaves that a client was pushed since the last look, as `+user` and `-user`, its own join not.
    fn pushes(&mut self, node: usize, client: usize) -> Vec<String> {
        let values = self.nodes[node].world.take_json(client);
        let push = |value: Value, kind: &str| value["push"][kind]["info"]["user"].as_str().map(str::to_owned);
        values
            .into_iter()
            .filter_map(|value| {
                let joined = push(value.clone(), "join").map(|user| format!("+{user}"));
                joined.or_else(|| push(value, "leave").map(|user| format!("-{user}")))
            })
            .collect()
    }

    /// Who is in the channel as an API call at a node sees it, and whether that is partial.
    fn presence(&mut self, node: usize) -> (Vec<String>, bool) {
        self.presence_of(node, CHANNEL)
    }

    fn presence_of(&mut self, node: usize, channel: &str) -> (Vec<String>, bool) {
        self.ticket += 1;
        let token = 1_000_000 + self.ticket;
        let home = usize::from(ringmain::core::api::home_of(channel, 2));
        let now = self.now;
        let call = Call::Presence { channel: channel.into() };
        self.nodes[node].world.cores[home].control(ControlCommand { token, call }, now);
        let mut found = None;
        self.until("a question is answered", |nodes| {
            let answers = &mut nodes.nodes[node].world.answers;
            let position = answers.iter().position(|answer| answer.token == token);
            found = position.map(|position| answers.swap_remove(position));
            found.is_some()
        });
        match found.expect("answered").result {
            Ok(Answer::Presence { members, partial }) => {
                let mut users: Vec<String> = members.into_iter().map(|member| member.user).collect();
                users.sort();
                (users, partial)
            }
            other => panic!("{other:?}"),
        }
    }

    fn expect_presence(&mut self, expected: &[&str]) {
        for node in 0..self.nodes.len() {
            if !self.nodes[node].paused {
                let (users, partial) = self.presence(node);
                assert_eq!(
                    (&users[..], partial),
                    (&expected.iter().map(|user| (*user).to_owned()).collect::<Vec<_>>()[..], false),
                    "node {node}"
                );
            }
        }
    }

    /// A command at a node: carried out there, and told to the others. Gives its ticket.
    fn command(&mut self, node: usize, call: &Call) -> u64 {
        self.ticket += 1;
        let (ticket, now) = (self.ticket, self.now);
        let node = &mut self.nodes[node];
        node.each(call, now);
        node.cluster.command(now, ticket, call);
        ticket
    }

    fn is_open(&self, node: usize, client: usize) -> bool {
        self.nodes[node].world.clients[client].gone.is_none()
    }
}

impl Node {
    fn each(&mut self, call: &Call, now: Now) {
        for core in &mut self.world.cores {
            core.control(ControlCommand { token: REPORT_TOKEN, call: call.clone() }, now);
        }
    }

    fn turn(&mut self, now: Now) {
        self.world.now = now;
        self.world.run();
        let (unasked, answers) = std::mem::take(&mut self.world.answers)
            .into_iter()
            .partition(|answer| answer.token == REPORT_TOKEN);
        self.world.answers = answers;
        let unasked: Vec<ringmain::core::api::ControlAnswer> = unasked;
        for answer in unasked {
            if let Ok(Answer::Report(report)) = answer.result {
                self.cluster.report(now, answer.shard, &report);
            }
        }
        for effect in self.cluster.poll(now, &mut self.port) {
            match effect {
                Effect::Shard(shard, call) => {
                    let command = ControlCommand { token: REPORT_TOKEN, call: Call::Cluster(call) };
                    self.world.cores[usize::from(shard)].control(command, now);
                }
                Effect::Command(shard, call) => {
                    let command = ControlCommand { token: REPORT_TOKEN, call };
                    self.world.cores[usize::from(shard)].control(command, now);
                }
                Effect::Told { ticket, result } => {
                    self.told.insert(ticket, result);
                }
                Effect::Surveyed { ticket, parts, partial } => {
                    self.surveyed.insert(ticket, (parts, partial));
                }
                Effect::Survey { to, id, question } => {
                    let part = match question {
                        Question::Info => AnswerPart::Info(NodeInfo::default()),
                        Question::Channels { .. } => {
                            AnswerPart::Channels((0..1_000).map(|n| (format!("room:{n}"), 1)).collect())
                        }
                    };
                    self.cluster.answer_survey(to, id, part);
                }
            }
        }
        self.world.run();
    }
}

fn disconnect(user: &str) -> Call {
    let selector = UserSelector { user: user.into(), ..UserSelector::default() };
    Call::Disconnect { selector, code: 3503, reason: Arc::from("force disconnect") }
}

#[test]
fn presence_is_one_over_all_nodes() {
    let mut nodes = Nodes::new(3, 1);
    let first = nodes.subscribed(0, "a");
    nodes.pass(200);
    let second = nodes.subscribed(1, "b");
    nodes.pass(200);
    // Node 2 holds nothing of the channel: it asks.
    nodes.expect_presence(&["a", "b"]);
    assert_eq!(nodes.pushes(0, first), ["+a", "+b"]);
    assert_eq!(nodes.pushes(1, second), ["+b"], "a was there before");
    let third = nodes.subscribed(2, "a");
    let at_once =
        nodes.nodes[2].world.send(third, "presence_stats", &json!({"channel": CHANNEL}).to_string());
    nodes.pass(200);
    let replies = nodes.nodes[2].world.take_json(third);
    let stats = replies.iter().find(|reply| reply["id"] == at_once).expect("an answer when all have told");
    assert_eq!(stats["presence_stats"], json!({"num_clients": 3, "num_users": 2}));
    nodes.close(1, second);
    nodes.pass(200);
    assert_eq!(nodes.pushes(0, first), ["+a", "-b"]);
    nodes.expect_presence(&["a", "a"]);
    assert_eq!(nodes.presence_of(1, "room:none"), (Vec::new(), false));
}

#[test]
fn a_node_that_dies_takes_its_members_along_and_comes_back_with_them() {
    let mut nodes = Nodes::new(3, 2);
    let here = nodes.subscribed(0, "a");
    nodes.subscribed(1, "b");
    nodes.pass(100);
    nodes.subscribed(2, "c");
    nodes.pass(300);
    assert_eq!(nodes.pushes(0, here), ["+a", "+b", "+c"]);
    nodes.nodes[2].paused = true;
    nodes.broker.isolate(nodes.now.mono_ms, 2);
    let took = nodes.until("node 2 is gone", |nodes| nodes.nodes[0].cluster.figures().peers == 1);
    assert!((DEAD_MS - HEARTBEAT_MS..=DEAD_MS + 100).contains(&took), "after {took} ms");
    nodes.pass(500);
    assert_eq!(nodes.pushes(0, here), ["-c"], "once");
    nodes.expect_presence(&["a", "b"]);
    nodes.pass(7_000);
    // It was only away: it does not go on as if nothing had been.
    nodes.broker.rejoin(2);
    nodes.nodes[2].paused = false;
    nodes.until("it is back", |nodes| nodes.nodes.iter().all(|node| node.cluster.figures().peers == 2));
    nodes.pass(1_000);
    assert_eq!(nodes.nodes[2].cluster.figures().pauses, 1);
    assert_eq!(nodes.pushes(0, here), ["+c"], "once");
    nodes.expect_presence(&["a", "b", "c"]);
}

#[test]
fn a_node_that_stood_still_with_its_connection_up_learns_what_it_missed() {
    let mut nodes = Nodes::new(2, 3);
    let here = nodes.subscribed(0, "a");
    let there = nodes.subscribed(1, "b");
    nodes.pass(300);
    nodes.nodes[0].paused = true;
    nodes.pass(400);
    nodes.subscribed(1, "c");
    nodes.close(1, there);
    nodes.pass(10_000);
    nodes.nodes[0].paused = false;
    nodes.pass(100);
    // It held nobody for gone: it was itself that was away.
    assert_eq!(nodes.nodes[0].cluster.figures().peers, 1);
    nodes.pass(2_000);
    let mut pushes = nodes.pushes(0, here);
    pushes.sort();
    assert_eq!(pushes, ["+a", "+b", "+c", "-b"]);
    nodes.expect_presence(&["a", "c"]);
}

#[test]
fn lost_messages_are_noticed_and_asked_for() {
    for seed in 10..15 {
        let mut nodes = Nodes::new(3, seed);
        let here = nodes.subscribed(0, "watcher");
        nodes.pass(300);
        let mut clients = Vec::new();
        for round in 0..20 {
            nodes.broker.lose_arrivals((round % 3) as usize, 3);
            if round % 7 == 3 {
                nodes.broker.cut(nodes.now.mono_ms, (round % 3) as usize);
            }
            let node = 1 + (round % 2) as usize;
            clients.push((node, nodes.subscribed(node, &format!("u{round:02}"))));
            nodes.pass(40);
            if round % 3 == 2 {
                let (node, client) = clients.remove(0);
                nodes.close(node, client);
            }
            nodes.pass(20);
        }
        nodes.pass(6_000);
        let mut expected = vec!["watcher".to_owned()];
        expected.extend((6..20).map(|round| format!("u{round:02}")));
        expected.sort();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        nodes.expect_presence(&expected);
        // Whatever was lost, joins and leaves add up to who is there.
        let mut seen: BTreeMap<String, i32> = BTreeMap::new();
        for push in nodes.pushes(0, here) {
            let count = seen.entry(push[1..].to_owned()).or_default();
            *count += if push.starts_with('+') { 1 } else { -1 };
            assert!((0..=1).contains(count), "{push} came twice");
        }
        let there: Vec<&str> =
            seen.iter().filter(|(_, count)| **count == 1).map(|(user, _)| user.as_str()).collect();
        assert_eq!(there, expected, "seed {seed}");
        assert!(nodes.nodes.iter().any(|node| node.cluster.figures().doubts > 0), "something was lost");
    }
}

#[test]
fn a_question_to_a_node_that_is_silent_is_answered_in_time_and_as_partial() {
    let mut nodes = Nodes::new(3, 4);
    nodes.subscribed(1, "b");
    nodes.subscribed(2, "c");
    nodes.pass(300);
    nodes.nodes[2].paused = true;
    let begun = nodes.now.mono_ms;
    assert_eq!(nodes.presence(0), (vec!["b".to_owned()], true));
    assert!(nodes.now.mono_ms - begun <= PRESENCE_ASK_MS + 50);
}

#[test]
fn commands_reach_every_connection_of_a_user_on_every_node_once() {
    let mut nodes = Nodes::new(3, 5);
    let clients: Vec<(usize, usize)> = (0..3).map(|node| (node, nodes.connect(node, "7"))).collect();
    let other = nodes.connect(1, "8");
    nodes.until("slots are held", |nodes| {
        nodes.nodes.iter().all(|node| node.cluster.slots().any(|slot| slot == slot_of("7")))
    });
    nodes.pass(200);
    let selector = || UserSelector { user: "7".into(), ..UserSelector::default() };
    let subscribe =
        Call::Subscribe { selector: selector(), channel: CHANNEL.into(), options: Default::default() };
    let ticket = nodes.command(0, &subscribe);
    nodes.pass(200);
    assert_eq!(nodes.nodes[0].told.get(&ticket), Some(&Ok(())));
    assert_eq!(nodes.presence(2).0, ["7", "7", "7"]);
    for (node, client) in &clients {
        let pushes = nodes.nodes[*node].world.take_json(*client);
        let subscribed = pushes.iter().filter(|push| push["push"].get("subscribe").is_some()).count();
        assert_eq!(subscribed, 1, "{pushes:?}");
    }
    nodes.command(1, &Call::Refresh { selector: selector(), expired: false, expire_at: Some(1_900_000_000) });
    nodes.pass(200);
    for (node, client) in &clients {
        let pushes = nodes.nodes[*node].world.take_json(*client);
        assert_eq!(pushes.iter().filter(|push| push["push"].get("refresh").is_some()).count(), 1);
    }
    nodes.command(2, &Call::Unsubscribe { selector: selector(), channel: CHANNEL.into() });
    nodes.pass(200);
    assert_eq!(nodes.presence(0).0, Vec::<String>::new());
    nodes.command(0, &disconnect("7"));
    nodes.pass(200);
    for (node, client) in clients {
        assert!(!nodes.is_open(node, client), "on node {node}");
    }
    assert!(nodes.is_open(1, other));
    let figures = nodes.nodes[1].cluster.figures();
    assert_eq!(figures.commands, 3, "{figures:?}");
}

#[test]
fn a_command_about_anonymous_connections_reaches_all() {
    let mut nodes = Nodes::new(2, 6);
    let (anonymous, _) = nodes.nodes[1].world.connected(0, "{}");
    let known = nodes.connect(1, "7");
    nodes.command(0, &disconnect(""));
    nodes.pass(200);
    assert!(!nodes.is_open(1, anonymous) && nodes.is_open(1, known));
}

#[test]
fn a_publication_without_history_is_delivered_on_every_node_once() {
    let mut nodes = Nodes::new(3, 26);
    let clients: Vec<usize> = (0..3).map(|node| nodes.subscribed(node, "7")).collect();
    nodes.pass(200);
    let call = Call::Publish {
        channel: CHANNEL.into(),
        data: br#"{"n":1}"#.as_slice().into(),
        tags: Vec::new(),
        skip_history: true,
        idempotency_key: None,
    };
    let home = usize::from(ringmain::core::api::home_of(CHANNEL, 2));
    let (now, ticket) = (nodes.now, 900);
    nodes.nodes[0].world.cores[home].control(ControlCommand { token: REPORT_TOKEN, call: call.clone() }, now);
    nodes.nodes[0].cluster.command(now, ticket, &call);
    nodes.pass(200);
    assert_eq!(nodes.nodes[0].told.get(&ticket), Some(&Ok(())));
    for (node, client) in clients.into_iter().enumerate() {
        let values = nodes.nodes[node].world.take_json(client);
        let data: Vec<&Value> = values.iter().map(|value| &value["push"]["pub"]["data"]).collect();
        assert_eq!(data.iter().filter(|data| ***data == json!({"n": 1})).count(), 1, "{values:?}");
    }
}

#[test]
fn a_node_that_begins_carries_out_nothing_that_was_meant_before() {
    let mut nodes = Nodes::new(2, 27);
    nodes.command(0, &disconnect(""));
    nodes.pass(1_000);
    // The process of node 1 starts anew, and somebody connects before it has heard of the others.
    let (options, now) = (ClusterOptions { node: 77, ..options(1) }, nodes.now);
    nodes.nodes[1].cluster = Cluster::new(options, now);
    let (anonymous, _) = nodes.nodes[1].world.connected(0, "{}");
    nodes.broker.cut(nodes.now.mono_ms, 1);
    nodes.pass(5_000);
    assert!(nodes.is_open(1, anonymous));
    assert_eq!(nodes.nodes[1].cluster.figures().commands, 0);
}

#[test]
fn a_command_that_got_lost_is_given_again_and_meets_nobody_who_came_later() {
    let mut nodes = Nodes::new(2, 7);
    let before = nodes.connect(1, "7");
    nodes.pass(500);
    // Nothing reaches node 1 for a while that is too short for it to be given up.
    nodes.broker.isolate(nodes.now.mono_ms, 1);
    nodes.pass(30);
    nodes.command(0, &disconnect("7"));
    nodes.pass(100);
    assert!(nodes.is_open(1, before), "it is lost");
    nodes.broker.rejoin(1);
    nodes.until("it is carried out", |nodes| !nodes.is_open(1, before));
    let later = nodes.connect(1, "7");
    nodes.pass(3_000);
    nodes.broker.cut(nodes.now.mono_ms, 1);
    nodes.pass(3_000);
    assert!(nodes.is_open(1, later), "each command is carried out once");

    // A node that begins to hold the slot asks too, but what was meant for those before is not for those who come.
    let mut nodes = Nodes::new(3, 8);
    nodes.command(0, &disconnect("7"));
    nodes.pass(2_000);
    let later = nodes.connect(2, "7");
    nodes.pass(2_000);
    assert!(nodes.is_open(2, later));
    // One that connected just before is met, although its slot was not heard when the command was given.
    let just_before = nodes.connect(1, "7");
    nodes.step();
    nodes.command(0, &disconnect("7"));
    nodes.pass(1_000);
    assert!(!nodes.is_open(1, just_before));
    assert!(!nodes.is_open(2, later));
}

#[test]
fn a_command_without_a_bus_is_refused_and_one_that_waits_is_told() {
    let mut nodes = Nodes::new(2, 9);
    let client = nodes.connect(1, "7");
    nodes.pass(500);
    nodes.broker.kill(nodes.now.mono_ms);
    nodes.pass(1_500);
    let lost = nodes.command(0, &disconnect("8"));
    nodes.pass(3_200);
    assert_eq!(nodes.nodes[0].told.get(&lost), Some(&Err(CommandError::Unavailable)));
    let kept = nodes.command(0, &disconnect("7"));
    nodes.pass(1_000);
    nodes.broker.start();
    nodes.until("it is told", |nodes| nodes.nodes[0].told.contains_key(&kept));
    assert_eq!(nodes.nodes[0].told[&kept], Ok(()));
    nodes.until("it is carried out", |nodes| !nodes.is_open(1, client));
}

#[test]
fn a_slot_is_left_some_time_after_its_last_user() {
    let mut nodes = Nodes::new(2, 21);
    let client = nodes.connect(0, "7");
    nodes.pass(100);
    let holds = |nodes: &Nodes| nodes.nodes[0].cluster.slots().collect::<Vec<_>>();
    assert_eq!(holds(&nodes), [slot_of("7")]);
    nodes.close(0, client);
    nodes.pass(LINGER_MS - 1_000);
    assert_eq!(holds(&nodes), [slot_of("7")]);
    let again = nodes.connect(0, "7");
    nodes.pass(2_000);
    assert_eq!(holds(&nodes), [slot_of("7")]);
    nodes.close(0, again);
    nodes.pass(LINGER_MS + 100);
    assert!(holds(&nodes).is_empty());
}

#[test]
fn every_node_is_asked_and_a_silent_one_is_said() {
    let mut nodes = Nodes::new(3, 22);
    let ask = |nodes: &mut Nodes, question: Question| {
        nodes.ticket += 1;
        let (ticket, now) = (nodes.ticket, nodes.now);
        let Node { cluster, port, .. } = &mut nodes.nodes[0];
        cluster.survey(now, port, ticket, question);
        nodes.until("all have answered", |nodes| nodes.nodes[0].surveyed.contains_key(&ticket));
        nodes.nodes[0].surveyed.remove(&ticket).expect("answered")
    };
    let (parts, partial) = ask(&mut nodes, Question::Info);
    assert_eq!((parts.len(), partial), (2, false));
    let (parts, partial) = ask(&mut nodes, Question::Channels { pattern: String::new() });
    let channels: usize = parts
        .iter()
        .map(|part| match part {
            AnswerPart::Channels(channels) => channels.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!((channels, partial), (2_000, false));
    nodes.nodes[1].paused = true;
    let (parts, partial) = ask(&mut nodes, Question::Info);
    assert_eq!((parts.len(), partial), (1, true));
}

#[test]
fn all_nodes_place_a_user_alike_and_none_on_a_node_that_goes() {
    let mut nodes = Nodes::new(3, 23);
    nodes.pass(1_000);
    let place = |nodes: &mut Nodes, node: usize, user: &str| {
        let now = nodes.now;
        nodes.nodes[node].cluster.place(now, user)
    };
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for user in (0..3_000).map(|n| n.to_string()) {
        let placed = place(&mut nodes, 0, &user).expect("a place");
        assert_eq!(place(&mut nodes, 1, &user).map(|placed| placed.node), Ok(placed.node.clone()));
        let ticket = ticket::verify(&placed.ticket, &Secret("key".into()), nodes.now.unix_s()).expect("good");
        let exp = placed.expires;
        assert_eq!(ticket, Ticket { sub: user, node: placed.node.clone(), address: placed.address, exp });
        *counts.entry(placed.node).or_default() += 1;
    }
    assert!(counts.values().all(|count| (700..1_300).contains(count)), "{counts:?}");
    nodes.nodes[2].cluster.set_load(5, false);
    nodes.pass(200);
    for node in 0..3 {
        for user in (0..200).map(|n| n.to_string()) {
            assert_ne!(place(&mut nodes, node, &user).expect("a place").node, "node-2");
        }
    }
    let Node { cluster, port, .. } = &mut nodes.nodes[1];
    cluster.leave(nodes.now, port);
    nodes.pass(100);
    assert_eq!(nodes.nodes[0].cluster.figures().peers, 1, "it need not be waited for");
    assert_eq!(place(&mut nodes, 0, "7").expect("a place").node, "node-0");
    let mut keyless = Cluster::new(ClusterOptions { ticket_key: None, ..options(0) }, nodes.now);
    assert_eq!(keyless.place(nodes.now, "7"), Err(PlaceError::NoKey));
    let mut nowhere = Cluster::new(ClusterOptions { address: String::new(), ..options(0) }, nodes.now);
    assert_eq!(nowhere.place(nodes.now, "7"), Err(PlaceError::Nowhere));
}

#[test]
fn a_broker_that_forgets_everything_costs_nobody_his_presence() {
    let mut nodes = Nodes::new(2, 24);
    let here = nodes.subscribed(0, "a");
    nodes.subscribed(1, "b");
    nodes.pass(300);
    nodes.broker.kill(nodes.now.mono_ms);
    nodes.broker.wipe();
    nodes.pass(500);
    nodes.broker.start();
    nodes.pass(3_000);
    nodes.expect_presence(&["a", "b"]);
    assert_eq!(nodes.pushes(0, here), ["+a", "+b"], "a short absence is nobody's leave");
    // A long one is, and ends.
    nodes.broker.kill(nodes.now.mono_ms);
    nodes.pass(DEAD_MS + 500);
    assert_eq!(nodes.pushes(0, here), ["-b"]);
    nodes.broker.start();
    nodes.pass(3_000);
    assert_eq!(nodes.pushes(0, here), ["+b"]);
    nodes.expect_presence(&["a", "b"]);
}

#[test]
fn a_client_asks_on_any_node() {
    let mut nodes = Nodes::new(2, 25);
    nodes.subscribed(0, "a");
    let client = nodes.subscribed(1, "b");
    nodes.pass(200);
    let id = nodes.nodes[1].world.send(client, "presence", &json!({"channel": CHANNEL}).to_string());
    nodes.pass(5);
    let replies = nodes.nodes[1].world.take_json(client);
    let reply = replies.iter().find(|reply| reply["id"] == id).expect("at once, for the channel is held");
    assert_eq!(users(&reply["presence"]), ["a", "b"]);
}

/// Nodes that stand still, cuts, losses, a broker that goes and forgets: in the end every node shows who is there, and
/// what a subscriber was told on the way adds up to it.
fn disturbed(seed: u64) {
    let mut nodes = Nodes::new(3, seed);
    let mut dice = Dice::new(seed);
    let here = nodes.subscribed(0, "watcher");
    nodes.pass(300);
    let mut there: Vec<(usize, usize, String)> = Vec::new();
    for round in 0..40 {
        let node = dice.below(3) as usize;
        let now_ms = nodes.now.mono_ms;
        match dice.below(10) {
            0 => nodes.broker.cut(now_ms, node),
            1 => nodes.broker.lose_arrivals(node, 1 + dice.below(8) as u32),
            2 => nodes.broker.lose_answers(node, 1 + dice.below(4) as u32),
            // The watcher's node runs, for its subscriber is what is looked at.
            3 if node != 0 => nodes.nodes[node].paused = true,
            4 => nodes.nodes.iter_mut().for_each(|node| node.paused = false),
            5 if dice.below(4) == 0 => {
                nodes.broker.kill(now_ms);
                if dice.below(2) == 0 {
                    nodes.broker.wipe();
                }
                nodes.pass(dice.below(4_000));
                nodes.broker.start();
            }
            _ => {}
        }
        let can_open = nodes.nodes[node].port.health() == ringmain_bus::Health::Up;
        if !nodes.nodes[node].paused && can_open {
            let user = format!("u{round:02}");
            let client = nodes.subscribed(node, &user);
            there.push((node, client, user));
        }
        if dice.below(3) == 0 && !there.is_empty() {
            let (node, client, user) = there.swap_remove(dice.below(there.len() as u64) as usize);
            if nodes.nodes[node].paused {
                there.push((node, client, user));
            } else {
                nodes.close(node, client);
            }
        }
        nodes.pass(dice.below(300));
    }
    nodes.nodes.iter_mut().for_each(|node| node.paused = false);
    nodes.pass(8_000);
    let mut expected: Vec<&str> = there.iter().map(|(_, _, user)| user.as_str()).chain(["watcher"]).collect();
    expected.sort_unstable();
    nodes.expect_presence(&expected);
    let mut told: BTreeMap<String, i32> = BTreeMap::new();
    for push in nodes.pushes(0, here) {
        let count = told.entry(push[1..].to_owned()).or_default();
        *count += if push.starts_with('+') { 1 } else { -1 };
        assert!((0..=1).contains(count), "{push} came twice");
    }
    let told: Vec<&str> =
        told.iter().filter(|(_, count)| **count == 1).map(|(user, _)| user.as_str()).collect();
    assert_eq!(told, expected);
}

#[test]
fn whatever_happens_in_the_end_every_node_shows_who_is_there() {
    for seed in 100..105 {
        if let Err(panic) = std::panic::catch_unwind(|| disturbed(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_shard_that_could_not_be_told_everything_is_told_anew() {
    let mut nodes = Nodes::new(2, 31);
    let here = nodes.subscribed(0, "a");
    nodes.subscribed(1, "b");
    nodes.pass(300);
    for shard in 0..2 {
        let now = nodes.now;
        nodes.nodes[0].cluster.shard_overrun(now, shard);
    }
    nodes.subscribed(1, "c");
    nodes.close(0, here);
    let again = nodes.subscribed(0, "d");
    nodes.pass(3_000);
    nodes.expect_presence(&["b", "c", "d"]);
    assert!(nodes.nodes[0].cluster.slots().any(|slot| slot == slot_of("d")));
    nodes.command(1, &disconnect("d"));
    nodes.pass(500);
    assert!(!nodes.is_open(0, again));
}
