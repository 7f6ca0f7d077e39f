//! Nodes whose bus is a broker: answers late, faults, clients that follow every message.
//!
//! Two nodes of two shards stand on a simulated broker, on virtual time. Clients publish and follow one channel;
//! when they are told that something may be missing (unsubscribe 2500, or a subscription that was not recovered),
//! they go on from where they are put. Whatever happens: nobody gets a publication twice or out of order, and
//! nobody misses one without having been told.

use ringmain::core::api::{Answer, Call, ControlCommand, REPORT_TOKEN};
use ringmain::core::cluster::{ClusterCall, News, PresenceItem};
use ringmain::core::config::CoreConfig;
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;
use ringmain_bus::nonce::Nonces;
use ringmain_bus::sim::{SimBroker, SimOptions};
use ringmain_proto::time::Now;
use serde_json::{Value, json};

use crate::cluster::quiet_config;
use crate::harness::World;

const CHANNEL: &str = "room:late";
const NODES: usize = 2;
const SHARDS: u16 = 2;

/// A follower of the channel.
struct Follower {
    node: usize,
    client: usize,
    /// Epoch and offset, as the SDK keeps them.
    position: Option<(String, u64)>,
    /// The subscribe command that is not answered yet, and whether it asked for recovery.
    asked: Option<(u64, bool)>,
    subscribed: bool,
    /// What it got, and `None` where it was told that something may be missing.
    got: Vec<Option<u64>>,
    /// Its own publications by command: accepted, refused, or no answer yet.
    sent: Vec<(u64, u64)>,
}

struct Nodes {
    broker: SimBroker,
    worlds: Vec<World>,
    followers: Vec<Follower>,
    now: Now,
    dice: Nonces,
    published: u64,
    accepted: Vec<u64>,
}

fn large_history() -> CoreConfig {
    let mut config = quiet_config();
    for namespace in config.namespaces.values_mut() {
        namespace.history_size = 1_000;
        namespace.presence = false;
        namespace.join_leave = false;
    }
    config.client.recovery_publications_max = 1_000;
    config
}

impl Nodes {
    fn new(seed: u64) -> Nodes {
        let options = SimOptions { latency_ms: (0, 15), ..SimOptions::new(seed) };
        let (broker, ports) = SimBroker::new(&options, NODES * usize::from(SHARDS));
        let mut ports = ports.into_iter();
        let mut worlds = Vec::new();
        for node in 0..NODES {
            let mut world = World::new(SHARDS, seed * 10 + node as u64, &large_history());
            for (shard, core) in world.cores.iter_mut().enumerate() {
                let incarnation = (node * 10 + shard + 1) as u64;
                core.use_bus(Box::new(ports.next().expect("one for each shard")), incarnation);
            }
            worlds.push(world);
        }
        let now = worlds[0].now;
        let dice = Nonces::new(!seed);
        let (followers, accepted) = (Vec::new(), Vec::new());
        let mut nodes = Nodes { broker, worlds, followers, now, dice, published: 0, accepted };
        nodes.pass(100);
        for _ in 0..2 {
            (0..NODES * usize::from(SHARDS)).for_each(|at| nodes.join(at));
        }
        nodes.pass(200);
        nodes
    }

    fn join(&mut self, at: usize) {
        let (node, shard) = (at % NODES, at / NODES);
        let (client, _) = self.worlds[node].connected(shard, "{}");
        let got = vec![None];
        let sent = Vec::new();
        let follower = Follower { node, client, position: None, asked: None, subscribed: false, got, sent };
        self.followers.push(follower);
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now.mono_ms += 1;
            self.now.unix_ms += 1;
            self.broker.step(self.now.mono_ms);
            for world in &mut self.worlds {
                world.now = self.now;
                world.run();
            }
            for follower in 0..self.followers.len() {
                self.follow(follower);
            }
        }
    }

    /// Reads what a follower was sent; subscribes where it is not.
    fn follow(&mut self, at: usize) {
        let Follower { node, client, .. } = self.followers[at];
        for value in self.worlds[node].take_json(client) {
            self.heard(at, &value);
        }
        let follower = &mut self.followers[at];
        if follower.subscribed || follower.asked.is_some() {
            return;
        }
        let mut request = json!({"channel": CHANNEL, "recoverable": true});
        if let Some((epoch, offset)) = &follower.position {
            request["recover"] = true.into();
            request["epoch"] = epoch.as_str().into();
            request["offset"] = (*offset).into();
        }
        let id = self.worlds[node].send(client, "subscribe", &request.to_string());
        follower.asked = Some((u64::from(id), follower.position.is_some()));
    }

    fn heard(&mut self, at: usize, value: &Value) {
        let follower = &mut self.followers[at];
        let id = value["id"].as_u64().unwrap_or(0);
        if let Some((_, recovers)) = follower.asked.filter(|(asked, _)| *asked == id) {
            follower.asked = None;
            if let Some(result) = value.get("subscribe") {
                follower.subscribed = true;
                follower.answered(result, recovers);
            } else {
                assert_eq!(value["error"]["temporary"], true, "{value}");
            }
        } else if let Some(at) = follower.sent.iter().position(|(sent, _)| *sent == id) {
            let (_, number) = follower.sent.swap_remove(at);
            if value.get("publish").is_some() {
                self.accepted.push(number);
            }
        } else if let Some(publication) = value["push"].get("pub") {
            assert!(follower.subscribed, "a publication before the subscription: {value}");
            follower.take(publication);
        } else if let Some(told) = value["push"].get("unsubscribe") {
            assert_eq!(told["code"], 2500, "{value}");
            follower.subscribed = false;
        } else {
            assert_eq!(*value, json!({}), "a ping");
            let Follower { node, client, .. } = self.followers[at];
            self.worlds[node].text(client, "{}");
        }
    }

    fn publish(&mut self) {
        let at = self.dice.below(self.followers.len() as u64) as usize;
        let Follower { node, client, .. } = self.followers[at];
        let number = self.published;
        self.published += 1;
        let body = json!({"channel": CHANNEL, "data": {"n": number}}).to_string();
        let id = self.worlds[node].send(client, "publish", &body);
        self.followers[at].sent.push((u64::from(id), number));
    }

    /// What the channel holds at last, in its order.
    fn truth(&mut self) -> Vec<u64> {
        let Follower { node, client, .. } = self.followers[0];
        let body = json!({"channel": CHANNEL, "limit": 1_000});
        let id = self.worlds[node].send(client, "history", &body.to_string());
        for _ in 0..1_000 {
            self.now.mono_ms += 1;
            self.broker.step(self.now.mono_ms);
            self.worlds.iter_mut().for_each(|world| {
                world.now = self.now;
                world.run();
            });
            for value in self.worlds[node].take_json(client) {
                if value["id"] == id {
                    let publications = value["history"]["publications"].as_array().expect("publications");
                    return publications.iter().map(number).collect();
                }
            }
        }
        panic!("no history");
    }
}

fn number(publication: &Value) -> u64 {
    publication["data"]["n"].as_u64().expect("a number")
}

impl Follower {
    fn take(&mut self, publication: &Value) {
        self.got.push(Some(number(publication)));
        if let Some((_, offset)) = &mut self.position {
            *offset = publication["offset"].as_u64().expect("an offset");
        }
    }

    fn answered(&mut self, result: &Value, recovers: bool) {
        let epoch = result["epoch"].as_str().unwrap_or("").to_owned();
        let offset = result["offset"].as_u64().unwrap_or(0);
        if !recovers || result["recovered"] != true {
            self.got.push(None);
        }
        self.position = Some((epoch, offset));
        for publication in result["publications"].as_array().into_iter().flatten() {
            self.take(publication);
        }
    }

    /// Everything in order, once, and whole between two times of having been told. What a failover took, and what
    /// was seen behind that, had to be told; it may have come again since.
    fn check(&self, truth: &[u64], who: &str) {
        let mut seen = std::collections::BTreeSet::new();
        let mut last: Option<usize> = None;
        let segments: Vec<_> = self.got.split(Option::is_none).collect();
        for (at, segment) in segments.iter().enumerate() {
            let mut told = true;
            for number in segment.iter().flatten() {
                let Some(place) = truth.iter().position(|kept| kept == number) else {
                    assert!(at + 1 < segments.len(), "{who}: {number} is gone and that was not told");
                    break;
                };
                let follows = last.is_none_or(|last| place == last + 1 || told && place > last);
                let shown =
                    || format!("{who}: {number} after {last:?}, told {told}: {:?} of {truth:?}", self.got);
                // The same publication behind what is gone, tried again: of a life that is gone itself.
                let gone = segment.iter().flatten().any(|number| !truth.contains(number));
                assert!(follows && seen.insert(number) || gone, "{}", shown());
                (last, told) = (Some(place), false);
            }
        }
    }
}

/// A run with a fault in the middle of traffic.
fn check(seed: u64, fails_over: bool, fault: impl Fn(&mut Nodes)) {
    let mut nodes = Nodes::new(seed);
    for step in 0..120 {
        nodes.publish();
        let pause = nodes.dice.below(6);
        nodes.pass(pause);
        if step % 40 == 20 {
            fault(&mut nodes);
        }
    }
    nodes.pass(8_000);
    nodes.publish();
    nodes.pass(500);
    let truth = nodes.truth();
    for (at, follower) in nodes.followers.iter().enumerate() {
        let who = format!("seed {seed}, follower {at}");
        assert!(follower.subscribed && follower.sent.is_empty(), "{who} waits for ever");
        follower.check(&truth, &who);
        assert_eq!(follower.got.last(), Some(&truth.last().copied()), "{who} is behind");
    }
    if !fails_over {
        let lost: Vec<_> = nodes.accepted.iter().filter(|number| !truth.contains(number)).collect();
        assert!(lost.is_empty(), "seed {seed}: accepted and gone: {lost:?}");
    }
    assert!(nodes.accepted.len() > 20, "seed {seed}: {} were accepted", nodes.accepted.len());
}

#[test]
fn without_faults_everybody_gets_everything() {
    for seed in 0..10 {
        check(seed, false, |_| ());
    }
}

#[test]
fn followers_that_come_back_miss_nothing() {
    for seed in 10..20 {
        check(seed, false, |nodes| {
            // Each leaves and comes back at once, while publications are under way.
            for at in 0..nodes.followers.len() {
                let Follower { node, client, subscribed, .. } = nodes.followers[at];
                if subscribed {
                    let body = json!({"channel": CHANNEL}).to_string();
                    let id = nodes.worlds[node].send(client, "unsubscribe", &body);
                    nodes.worlds[node].run();
                    for value in nodes.worlds[node].take_json(client) {
                        if value["id"] != id {
                            nodes.heard(at, &value);
                        }
                    }
                    nodes.followers[at].subscribed = false;
                }
                nodes.publish();
                let pause = nodes.dice.below(3);
                nodes.pass(pause);
            }
        });
    }
}

#[test]
fn a_cut_connection_is_healed() {
    for seed in 20..30 {
        check(seed, false, |nodes| {
            let port = nodes.dice.below(4) as usize;
            nodes.broker.cut(nodes.now.mono_ms, port);
        });
    }
}

#[test]
fn lost_arrivals_are_found() {
    for seed in 30..40 {
        check(seed, false, |nodes| (0..4).for_each(|port| nodes.broker.lose_arrivals(port, 3)));
    }
}

#[test]
fn a_dead_broker_is_waited_for() {
    for seed in 40..50 {
        check(seed, false, |nodes| {
            nodes.broker.kill(nodes.now.mono_ms);
            for _ in 0..10 {
                nodes.publish();
                nodes.pass(100);
            }
            nodes.broker.start();
        });
    }
}

#[test]
fn a_paused_broker_is_waited_for() {
    for seed in 50..60 {
        check(seed, false, |nodes| {
            nodes.broker.pause();
            for _ in 0..10 {
                nodes.publish();
                nodes.pass(200);
            }
            nodes.broker.start();
        });
    }
}

#[test]
fn what_a_failover_takes_is_told() {
    for seed in 60..75 {
        check(seed, true, |nodes| {
            nodes.broker.take_replica();
            for _ in 0..5 {
                nodes.publish();
                nodes.pass(7);
            }
            nodes.broker.fail_over(nodes.now.mono_ms);
        });
    }
}

/// Who is in the channels, by what is told of it: a join before each leave, no join twice.
#[derive(Default)]
struct Present(std::collections::BTreeSet<String>);

impl Present {
    fn note(&mut self, joined: bool, who: &str) {
        let changed = if joined { self.0.insert(who.into()) } else { self.0.remove(who) };
        assert!(changed, "{who}: {}", if joined { "joined twice" } else { "left without having joined" });
    }
}

/// Takes what the shards report, their number in the place of the stream.
fn take_news(world: &mut World, told: &mut Present) {
    for answer in std::mem::take(&mut world.answers) {
        let Ok(Answer::Report(report)) = answer.result else { panic!("nothing else was asked") };
        for news in &report.news {
            let News::Changed(item) = news else { continue };
            let (channel, member, joined) = match item {
                PresenceItem::Joined { channel, member, .. } => (channel, member, true),
                PresenceItem::Left { channel, member, .. } => (channel, member, false),
                PresenceItem::Whole { .. } => continue,
            };
            told.note(joined, &format!("{channel} {:?}", &member.as_bytes()[..16]));
        }
        let call = Call::Cluster(ClusterCall::Ack { stream: report.stream, sequence: report.sequence });
        let now = world.now;
        world.cores[report.stream as usize].control(ControlCommand { token: REPORT_TOKEN, call }, now);
    }
}

/// A node in a cluster on a broker of its own, and what is told of those who are there.
struct Crowd {
    broker: SimBroker,
    world: World,
    dice: Nonces,
    clients: Vec<usize>,
    told: Present,
}

impl Crowd {
    fn new(seed: u64, config: &CoreConfig) -> Crowd {
        let options = SimOptions { latency_ms: (0, 15), ..SimOptions::new(seed) };
        let (broker, ports) = SimBroker::new(&options, usize::from(SHARDS));
        let mut world = World::new(SHARDS, seed, config);
        for (shard, port) in ports.into_iter().enumerate() {
            world.cores[shard].use_bus(Box::new(port), shard as u64 + 1);
            let call = Call::Cluster(ClusterCall::Start { stream: shard as u32 });
            let now = world.now;
            world.cores[shard].control(ControlCommand { token: REPORT_TOKEN, call }, now);
        }
        let (dice, clients, told) = (Nonces::new(!seed), Vec::new(), Present::default());
        let mut crowd = Crowd { broker, world, dice, clients, told };
        crowd.pass(100);
        crowd
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.world.now.mono_ms += 1;
            self.world.now.unix_ms += 1;
            self.broker.step(self.world.now.mono_ms);
            self.world.run();
            take_news(&mut self.world, &mut self.told);
        }
    }

    /// The connection breaks.
    fn hang_up(&mut self, client: usize) {
        let world = &mut self.world;
        let (shard, slot, now) = (world.clients[client].shard, world.clients[client].slot, world.now);
        world.cores[shard].broken(slot, 104, now);
    }

    /// Somebody comes, does something with one of so many channels, or goes.
    fn step(&mut self, channels: u64) {
        let Some(at) = self.dice.below(self.clients.len() as u64 + 1).checked_sub(1) else {
            let shard = self.dice.below(u64::from(SHARDS)) as usize;
            return self.clients.push(self.world.connected(shard, "{}").0);
        };
        let client = self.clients[at as usize];
        let channel = format!("room:{}", self.dice.below(channels));
        let mut body = json!({"channel": channel});
        let method = match self.dice.below(12) {
            0..=4 => {
                body["join_leave"] = true.into();
                if self.dice.below(2) == 0 {
                    body["recover"] = true.into();
                    body["epoch"] = "".into();
                }
                "subscribe"
            }
            5 | 6 => "unsubscribe",
            7 => {
                body["data"] = json!({});
                "publish"
            }
            8 => "history",
            9 => ["presence", "presence_stats"][self.dice.below(2) as usize],
            _ => {
                self.clients.swap_remove(at as usize);
                return self.hang_up(client);
            }
        };
        self.world.send(client, method, &body.to_string());
    }

    /// Everybody goes; nothing is left.
    fn end(mut self) {
        for client in std::mem::take(&mut self.clients) {
            self.hang_up(client);
        }
        // Longer than a question to the broker may take.
        self.pass(5_000);
        assert!(self.told.0.is_empty(), "{:?} are told to be here", self.told.0);
        for core in &mut self.world.cores {
            assert_eq!(core.metrics().get(Metric::Subscriptions), 0);
            assert_eq!(core.metrics().get(Metric::Channels), 0);
        }
    }
}

/// Clients subscribe to channels that the bus has to open, and go at any moment: before it has, between a recovery's
/// question and its answer, afterwards. A node in a cluster tells of all of them, and nothing is left of who has gone.
#[test]
fn who_goes_while_a_channel_is_opened_leaves_nothing() {
    for seed in 0..30 {
        let mut crowd = Crowd::new(seed, &quiet_config());
        let watcher = crowd.world.connected(0, "{}").0;
        for channel in 0..3 {
            let body = json!({"channel": format!("room:{channel}"), "join_leave": true});
            crowd.world.send(watcher, "subscribe", &body.to_string());
        }
        for _ in 0..300 {
            crowd.step(12);
            let ms = crowd.dice.below(6);
            crowd.pass(ms);
        }
        for client in std::mem::take(&mut crowd.clients) {
            crowd.hang_up(client);
        }
        crowd.pass(100);
        let mut seen = Present::default();
        for value in crowd.world.take_json(watcher) {
            for (kind, joined) in [("join", true), ("leave", false)] {
                if let Some(who) = value["push"][kind]["info"]["client"].as_str() {
                    let channel = value["push"]["channel"].as_str().unwrap_or("");
                    seen.note(joined, &format!("{channel} {who}"));
                }
            }
        }
        // The watcher sees itself.
        assert_eq!(seen.0.len(), 3, "{:?}", seen.0);
        crowd.clients.push(watcher);
        crowd.end();
    }
}

/// The same while the broker fails in all its ways, and with so few channels that there is no room for all.
#[test]
fn a_crowd_on_a_broker_that_fails_leaves_nothing() {
    for seed in 0..30 {
        let mut config = quiet_config();
        config.limits.channels_per_shard = 4;
        let mut crowd = Crowd::new(seed, &config);
        for _ in 0..300 {
            let now_ms = crowd.world.now.mono_ms;
            match crowd.dice.below(60) {
                0 => crowd.broker.kill(now_ms),
                1 => crowd.broker.pause(),
                2 => crowd.broker.cut(now_ms, crowd.dice.below(2) as usize),
                3 => crowd.broker.lose_arrivals(0, 3),
                4..10 => crowd.broker.start(),
                _ => crowd.step(12),
            }
            let ms = [crowd.dice.below(6), crowd.dice.below(400)][usize::from(crowd.dice.below(20) == 0)];
            crowd.pass(ms);
        }
        crowd.broker.start();
        crowd.pass(3_000);
        crowd.end();
    }
}
