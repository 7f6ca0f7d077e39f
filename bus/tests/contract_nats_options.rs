//! What an operator can choose on NATS, against the real server: interest by slot, several streams, TLS,
//! credentials, whether an unwatched stream is believed; and what `check` says.

mod live;
#[path = "live/nats.rs"]
mod nats;

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use live::proxy::Proxies;
use live::{Broker, Live, Start};
use nats::{Nats, Version};
use ringmain_bus::backend::{Interest, Reply, ends};
use ringmain_bus::nats::{Login, NatsOptions, check};
use ringmain_bus::suite::{Cluster as _, Probe};
use ringmain_bus::types::{BusError, Health, PublicationId, PublishError, Since};
use ringmain_bus::{ChannelOptions, HistoryQuery};

const ROOM: ChannelOptions =
    ChannelOptions { history_size: 50, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };

fn with(options: NatsOptions) -> Nats {
    Nats::new(Version::Newest, 1, options, "")
}

mod slots {
    use super::*;

    fn cluster() -> Live<Nats> {
        Live::new(with(NatsOptions { interest: Interest::Slots, ..NatsOptions::default() }), 2)
    }

    ringmain_bus::contract_tests!(cluster();
        p1_all_nodes_see_one_order,
        p2_arrivals_chain_from_the_opened_position,
        p6_a_repeated_key_answers_the_first_position,
        p7_no_publication_between_the_opened_position_and_the_arrivals,
        e1_ephemeral_order_per_publisher,
        e3_a_channel_opened_again_at_once_misses_nothing,
        c5_a_closed_channel_is_quiet,
        c6_ones_own_publication_comes_once,
        c3_many_channels_come_back,
        c3_thousands_of_channels_come_back,
        e3_a_cut_is_told_to_ephemeral_channels,
    );
}

mod streams {
    use super::*;

    fn cluster() -> Live<Nats> {
        Live::new(with(NatsOptions { streams: 3, in_memory: true, ..NatsOptions::default() }), 2)
    }

    ringmain_bus::contract_tests!(cluster();
        p4_what_was_accepted_is_read_back,
        p11_after_clear_offsets_go_on_in_the_same_epoch,
        c7_commands_need_no_open,
        c3_many_channels_come_back,
        p13_wiped_data_is_told_to_quiet_channels,
    );
}

/// Users' channels go by slot: several of one slot, and others, each get their own.
#[test]
fn users_of_one_slot_get_their_own() {
    let mut probe = Probe::new(Live::new(with(NatsOptions::default()), 2));
    let run = probe.name("users");
    for options in [ROOM, ChannelOptions::EPHEMERAL] {
        let names: Vec<String> =
            (0..40).map(|n| format!("user:#{n}.{} *>{run}", options.history_size)).collect();
        for name in &names {
            probe.open_all(name, &options);
        }
        let mut said = Vec::new();
        for (n, name) in names.iter().enumerate() {
            said.push(probe.data(n % 2, name));
            probe.publish(n % 2, name, &options);
        }
        for (name, data) in names.iter().zip(&said) {
            for node in 0..2 {
                probe.settle("its own publication", |probe| probe.arrivals(node, name) == [data.as_str()]);
            }
        }
    }
}

/// Publishes and hears on a node of its own.
fn works(nats: Nats) {
    let mut probe = Probe::new(Live::new(nats, 1));
    let name = probe.name("works");
    probe.open(0, &name, &ROOM);
    let data = probe.data(0, &name);
    probe.publish(0, &name, &ROOM);
    probe.settle("the arrival", |probe| probe.arrivals(0, &name) == [data.as_str()]);
}

/// A server that refuses a node: it stays down, and says so at once to every command.
fn is_refused(nats: Nats) {
    let mut cluster = Live::new(nats, 1);
    let (begun, name) = (cluster.now().mono_ms, "refused");
    while cluster.now().mono_ms < begun + 1_500 {
        cluster.pass(100);
        assert_eq!(cluster.node(0).health(), Health::Down);
    }
    let options = ROOM;
    let now = cluster.now();
    let channel = ringmain_bus::Channel { id: ringmain_bus::ChannelId(0), name, options: &options };
    let token = ringmain_bus::Token(1);
    let id = PublicationId::Node { incarnation: 1, sequence: 1 };
    let publication = ringmain_proto::message::Publication::default();
    let published = cluster.node(0).publish(now, token, channel, id, &publication).done();
    assert_eq!(published, Some(Err(PublishError::Unavailable)));
    let read = cluster.node(0).read(now, token, channel, &HistoryQuery::TOP, &mut |_| ()).done();
    assert_eq!(read, Some(Err(BusError::Unavailable)));
}

fn secured(login: Login, extra: &str) -> Nats {
    Nats::new(Version::Newest, 1, NatsOptions { login, ..NatsOptions::default() }, extra)
}

/// An nkey made for this test.
const NKEY_SEED: &str = "SUAACAQDAQCQMBYIBEFAWDANBYHRAEISCMKBKFQXDAMRUGY4DUPB6IC5CQ";
const NKEY: &str = "UB43KVROR7TFJ6KAPCYRF2FJROTZAH4FHLTJLPWX4DRZCC5NASLGJBFE";

#[test]
fn credentials_open_the_server() {
    let password = |password: &str| Login::Password("ringmain".into(), password.into());
    let by_password = "authorization { user: ringmain, password: right }";
    works(secured(password("right"), by_password));
    is_refused(secured(password("wrong"), by_password));
    is_refused(secured(Login::None, by_password));
    works(secured(Login::Token("right".into()), "authorization { token: right }"));
    works(secured(
        Login::Nkey(NKEY_SEED.into()),
        &format!("authorization {{ users: [ {{ nkey: {NKEY} }} ] }}"),
    ));
}

/// `cert.pem` and `key.pem` for 127.0.0.1, signed by itself.
fn make_certificate(directory: &Path) {
    let arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1 \
                     -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE \
                     -keyout key.pem -out cert.pem";
    let made = Command::new("openssl").args(arguments.split_whitespace()).current_dir(directory).output();
    let made = made.expect("no openssl here: apt-get install openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[test]
fn tls_with_certificates_of_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    make_certificate(directory.path());
    let file = |name: &str| directory.path().join(name);
    let (certificate, key) = (file("cert.pem"), file("key.pem"));
    let extra = format!(
        "tls {{ cert_file: \"{0}\", key_file: \"{1}\", ca_file: \"{0}\", verify: true }}",
        certificate.display(),
        key.display(),
    );
    let trusting = NatsOptions { tls: true, tls_ca: Some(certificate.clone()), ..NatsOptions::default() };
    let known = NatsOptions { tls_identity: Some((certificate, key)), ..trusting.clone() };
    works(Nats::new(Version::Newest, 1, known, &extra));
    is_refused(Nats::new(Version::Newest, 1, trusting, &extra));
    is_refused(Nats::new(Version::Newest, 1, NatsOptions::default(), &extra));
}

/// Servers that outlive their nodes.
struct Kept(Rc<Nats>, bool);

impl Broker for Kept {
    fn backend(&self, _node: usize, proxies: &Arc<Proxies>) -> Start {
        let options = NatsOptions { trust_unwatched: self.1, ..self.0.options(proxies) };
        Box::new(|ends| Box::pin(ringmain_bus::nats::run(options, ends)))
    }
}

/// All nodes end, and others begin: nobody has watched the stream meanwhile. Positions are void, unless the operator
/// trusts the brokers that far; history is read either way.
#[test]
fn a_stream_that_nobody_watched_is_believed_only_where_that_is_chosen() {
    let nats = Rc::new(with(NatsOptions::default()));
    let name = format!("unwatched-{}", std::process::id());
    let nodes = |trusts: bool| Probe::new(Live::new(Kept(nats.clone(), trusts), 2));
    let mut first = nodes(false);
    let position = first.publish(0, &name, &ROOM).position;
    assert_eq!(first.top(1, &name, &ROOM), position);
    drop(first);
    let mut trusting = nodes(true);
    assert_eq!(trusting.top(0, &name, &ROOM), position);
    drop(trusting);
    let mut doubting = nodes(false);
    let top = doubting.top(0, &name, &ROOM);
    assert_ne!(top.epoch, position.epoch);
    assert_eq!(doubting.top(1, &name, &ROOM), top);
}

/// A node that begins while another watches believes it: a rolling restart loses no position.
#[test]
fn a_node_that_begins_beside_another_changes_nothing() {
    let nats = Rc::new(with(NatsOptions::default()));
    let name = format!("beside-{}", std::process::id());
    let mut first = Probe::new(Live::new(Kept(nats.clone(), false), 1));
    let position = first.publish(0, &name, &ROOM).position;
    first.open(0, &name, &ROOM);
    let mut second = Probe::new(Live::new(Kept(nats.clone(), false), 1));
    assert_eq!(second.top(0, &name, &ROOM), position);
    drop(first);
    let mut third = Probe::new(Live::new(Kept(nats, false), 1));
    assert_eq!(third.top(0, &name, &ROOM), position);
    assert_eq!(second.top(0, &name, &ROOM), position);
    assert!(second.health_events(0).iter().all(|(_, health)| *health == Health::Up));
}

#[test]
fn check_says_what_is_given_up() {
    let nats = with(NatsOptions::default());
    let proxies = Arc::new(Proxies::default());
    let options = nats.options(&proxies);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut probe = Probe::new(Live::new(nats, 1));
    let name = probe.name("check");
    probe.publish(0, &name, &ROOM);
    let warnings = runtime.block_on(check(&options));
    assert!(warnings.iter().any(|warning| warning.what.contains("has 1 copies")), "{warnings:?}");
    assert!(warnings.iter().any(|warning| warning.mend.contains("sync_interval")), "{warnings:?}");
    let larger = NatsOptions { history_size_max: options.history_size_max * 2, ..options.clone() };
    let more = runtime.block_on(check(&larger));
    assert_eq!(more.len(), warnings.len() + usize::from(options.streams), "{more:?}");
    let other = NatsOptions { streams: options.streams + 1, ..options.clone() };
    let of_other = runtime.block_on(check(&other));
    assert!(of_other.iter().any(|warning| warning.mend.contains("streams=2")), "{of_other:?}");
    drop(probe);
    let unreachable = runtime.block_on(check(&options));
    assert!(unreachable[0].what.contains("cannot be used"), "{unreachable:?}");
}

/// A node that spreads channels over more streams or fewer would look for them elsewhere: it does not get ready.
#[test]
fn a_node_of_another_count_of_streams_does_not_get_ready() {
    let nats = with(NatsOptions::default());
    let options = nats.options(&Arc::new(Proxies::default()));
    let is_ready = |streams: u16, within: Duration| {
        let options = NatsOptions { streams, ..options.clone() };
        live::block_on(async move {
            let (mut hub, backend) = ends(Arc::default());
            tokio::task::spawn_local(ringmain_bus::nats::run(options, backend));
            let ready = async { while !matches!(hub.replies.recv().await, Some(Reply::Reachable(true))) {} };
            tokio::time::timeout(within, ready).await.is_ok()
        })
    };
    assert!(is_ready(2, Duration::from_secs(30)));
    for other in [1, 3] {
        assert!(!is_ready(other, Duration::from_secs(4)), "{other}");
    }
    assert!(is_ready(2, Duration::from_secs(30)));
}

/// P12: a stream keeps messages for a few seconds here. The position of a quiet channel that is open lives on all the
/// same, and with it a node that was away gets what it missed; the stream's epoch lives on, too.
#[test]
fn the_position_of_an_open_channel_outlives_the_streams_age() {
    const RETENTION_MS: u64 = 4_000;
    let brief = ChannelOptions { history_size: 10, history_ttl_ms: 2_000, meta_ttl_ms: RETENTION_MS };
    let nats = with(NatsOptions { retention_ms: RETENTION_MS, ..NatsOptions::default() });
    let mut probe = Probe::new(Live::new(nats, 2));
    let name = probe.name("age");
    probe.open_all(&name, &brief);
    let position = probe.publish(0, &name, &brief).position;
    probe.settle_arrivals();
    probe.run_for(3 * RETENTION_MS);
    assert_eq!(probe.top(0, &name, &brief), position);
    probe.cut_off(1, |probe| assert_eq!(probe.publish(0, &name, &brief).position.epoch, position.epoch));
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(1, &name).len(), 2);
    assert!(!probe.was_told(0, &name) && !probe.was_told(1, &name));
}

/// A history longer than what is read together, with a neighbour in between, on servers that give messages in runs and on
/// one that gives them one by one.
#[test]
fn a_deep_history_is_read() {
    for version in [Version::Newest, Version::Debian] {
        let size = match version {
            Version::Newest => 1_500,
            Version::Debian => 200,
        };
        let deep = ChannelOptions { history_size: size, ..ROOM };
        let options = NatsOptions { history_size_max: size, streams: 1, ..NatsOptions::default() };
        let mut probe = Probe::new(Live::new(Nats::new(version, 1, options, ""), 1));
        let (name, neighbour) = (probe.name("deep"), probe.name("deep-neighbour"));
        let mut said = Vec::new();
        for n in 0..size + 50 {
            said.push(probe.data(0, &name));
            let token = probe.send_publish(0, &name, &deep);
            if n % 3 == 0 {
                probe.send_publish(0, &neighbour, &deep);
            }
            probe.published(0, token).expect("a healthy bus accepts publications");
        }
        let kept = &said[50..];
        let mut read = |since, limit, reverse| {
            let query = HistoryQuery { since, limit, reverse };
            let (page, publications) = probe.read(0, &name, &deep, &query).expect("a healthy bus reads");
            let (offsets, data): (Vec<u64>, Vec<String>) = publications.into_iter().unzip();
            (page, offsets, data)
        };
        let (page, offsets, data) = read(None, 5_000, false);
        assert_eq!((data.as_slice(), page.more), (kept, false));
        let (page, _, data) = read(None, 7, false);
        assert_eq!((data.as_slice(), page.more), (&kept[..7], true));
        let (page, _, mut data) = read(None, 7, true);
        data.reverse();
        assert_eq!((data.as_slice(), page.more), (&kept[kept.len() - 7..], true));
        for (at, limit) in [(0, 5_000), (kept.len() / 2, 5_000), (kept.len() - 2, 5_000), (20, 3)] {
            for epoch in [None, Some(page.top.epoch)] {
                let (page, _, data) = read(Some(Since { offset: offsets[at], epoch }), limit, false);
                let rest = &kept[at + 1..];
                let end = rest.len().min(limit as usize);
                assert_eq!((data.as_slice(), page.more), (&rest[..end], end < rest.len()), "{at} {limit}");
                assert!(page.floor <= offsets[at], "nothing is missing");
            }
        }
    }
}

/// A history of so many bytes that it is read in several runs.
#[test]
fn a_heavy_history_is_read() {
    let mut probe = Probe::new(Live::new(with(NatsOptions::default()), 1));
    let name = probe.name("heavy");
    let mut said = Vec::new();
    for n in 0..60 {
        let data = format!("{name}/{n}/{}", "x".repeat(60_000));
        let token = probe.send_publish_as(0, &name, &ROOM, PublicationId::Key(&format!("{n}")), &data);
        probe.published(0, token).expect("a healthy bus accepts publications");
        said.push(data);
    }
    let kept = &said[60 - ROOM.history_size as usize..];
    let mut read = |since| {
        let query = HistoryQuery { since, limit: 1_000, reverse: false };
        let (page, publications) = probe.read(0, &name, &ROOM, &query).expect("a healthy bus reads");
        assert!(!page.more);
        let (offsets, data): (Vec<u64>, Vec<String>) = publications.into_iter().unzip();
        (offsets, data)
    };
    let (offsets, data) = read(None);
    assert!(data == kept);
    let (_, data) = read(Some(Since { offset: offsets[9], epoch: None }));
    assert!(data == kept[10..]);
}

/// A larger history is configured later: the stream is made to keep it. What it dropped before is not forgotten.
#[test]
fn a_stream_is_raised_to_what_is_wanted() {
    let nats = Rc::new(with(NatsOptions { history_size_max: 3, ..NatsOptions::default() }));
    let name = format!("raised-{}", std::process::id());
    let mut probe = Probe::new(Live::new(Kept(nats.clone(), true), 1));
    let trimmed: Vec<u64> = (0..8).map(|_| probe.publish(0, "trimmed", &ROOM).position.offset).collect();
    drop(probe);
    let nats = Rc::new(Rc::into_inner(nats).expect("no node has it").wanting(20));
    let mut probe = Probe::new(Live::new(Kept(nats, true), 1));
    for _ in 0..20 {
        probe.publish(0, &name, &ROOM);
    }
    let all = HistoryQuery { since: None, limit: 100, reverse: false };
    assert_eq!(probe.read(0, &name, &ROOM, &all).expect("history is on").1.len(), 20);
    let (page, kept) = probe.read(0, "trimmed", &ROOM, &all).expect("history is on");
    assert!(kept.len() < 8 && page.floor > trimmed[0], "{page:?}");
}

/// A channel whose messages lie far apart in the stream, and unevenly: its history is found whole, with its floor.
#[test]
fn a_sparse_channel_is_read_across_a_busy_one() {
    let small = ChannelOptions { history_size: 5, ..ROOM };
    let mut probe = Probe::new(Live::new(with(NatsOptions { streams: 1, ..NatsOptions::default() }), 2));
    let (sparse, busy) = (probe.name("sparse"), probe.name("busy"));
    let mut published = Vec::new();
    for n in 0..12 {
        let data = probe.data(0, &sparse);
        published.push((probe.publish(0, &sparse, &small).position.offset, data));
        for _ in 0..n * 15 {
            let _ = probe.send_publish(1, &busy, &ROOM);
        }
        probe.settle_answers();
    }
    let all = HistoryQuery { since: None, limit: 100, reverse: false };
    let (page, kept) = probe.read(1, &sparse, &small, &all).expect("history is on");
    assert_eq!((kept, page.floor), (published[7..].to_vec(), published[6].0));
    for n in 0..12 {
        let since = Some(Since { offset: published[n].0, epoch: None });
        let query = HistoryQuery { since, ..all };
        let (page, after) = probe.read(1, &sparse, &small, &query).expect("not compared");
        assert_eq!(after, published[(n + 1).max(7)..], "after {n}");
        assert_eq!(page.floor <= published[n].0, n >= 6, "after {n}: {page:?}");
    }
}
