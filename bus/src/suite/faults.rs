//! The clauses about faults: what is lost is filled, told, or unknown; never silent.

use crate::contract::LOSS_VISIBLE_MS_MAX;
use crate::epoch::Position;
use crate::position::{Judgement, Reason, judge};
use crate::suite::ephemeral::EPHEMERAL;
use crate::suite::stream::{ALL, ROOM};
use crate::suite::{Answer, Faults, Probe, Seen};
use crate::types::{BusError, ChannelOptions, Health, HistoryQuery, PublicationId, PublishError, Since};

/// What a loop may notice late, in milliseconds: the probe's nap, and a scheduler's.
const GRAIN_MS: u64 = 50;

const SMALL: ChannelOptions =
    ChannelOptions { history_size: 3, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };

/// Whether a node was told of another epoch, and of nothing less.
fn was_told_epoch<C: Faults>(probe: &Probe<C>, node: usize, name: &str) -> bool {
    probe.seen(node, name).iter().any(|seen| matches!(seen, Seen::EpochChanged(_)))
}

/// Judges a position as a recovering client's would be.
fn judged<C: Faults>(probe: &mut Probe<C>, name: &str, position: Position) -> Judgement {
    let (page, _) = probe.read(0, name, &ROOM, &HistoryQuery::TOP).expect("no epoch was claimed");
    judge(Since { offset: position.offset, epoch: Some(position.epoch) }, &page)
}

/// P1: a node publishes all the time while the broker goes and comes: what is accepted stands in the order of its asking.
pub fn p1_what_waits_for_the_broker_keeps_its_order(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let name = probe.name("p1-outage");
    let mut asked = Vec::new();
    let mut publish_until = |probe: &mut Probe<_>, health: Health, more: u32| {
        let mut left = more;
        while left > 0 {
            asked.push(probe.send_publish(0, &name, &ROOM));
            probe.run_for(4);
            left -= u32::from(probe.health(0) == health);
        }
    };
    for paused in [true, false] {
        publish_until(&mut probe, Health::Up, 5);
        if paused {
            probe.cluster.pause_broker();
        } else {
            probe.cluster.kill_broker();
        }
        publish_until(&mut probe, Health::Down, 2);
        probe.cluster.restore_broker();
        publish_until(&mut probe, Health::Up, 20);
    }
    probe.settle_up();
    let mut last = Position::NONE;
    for token in asked {
        let Ok(accepted) = probe.published(0, token) else { continue };
        let position = accepted.position;
        assert!(position.epoch != last.epoch || position.offset > last.offset, "{position:?} after {last:?}");
        last = position;
    }
    assert!(last.offset > 0);
}

/// P2: arrivals lost in the middle are read from history; nobody is told anything.
pub fn p2_a_hole_is_filled_from_history(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p2-hole"), probe.last());
    probe.open(last, &name, &ROOM);
    for _ in 0..3 {
        probe.publish(0, &name, &ROOM);
    }
    probe.settle_arrivals();
    probe.cluster.lose_arrivals(last, 4);
    for _ in 0..8 {
        probe.publish(0, &name, &ROOM);
    }
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(last, &name).len(), 11);
    assert!(!probe.was_told(last, &name));
}

/// P2: a node was away for more than one read of history gives.
pub fn p2_a_long_hole_is_filled_from_history(cluster: impl Faults) {
    const LONG: ChannelOptions =
        ChannelOptions { history_size: 1000, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p2-long"), probe.last());
    probe.open(last, &name, &LONG);
    probe.cut_off(last, |probe| {
        for _ in 0..300 {
            probe.publish(0, &name, &LONG);
        }
    });
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(last, &name).len(), 300);
    assert!(!probe.was_told(last, &name));
}

/// P2: the last ones are lost, and nothing is published any more.
pub fn p2_a_lost_tail_is_found_without_a_later_message(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p2-tail"), probe.last());
    probe.open(last, &name, &ROOM);
    probe.publish(0, &name, &ROOM);
    probe.settle_arrivals();
    probe.cluster.lose_arrivals(last, 3);
    for _ in 0..3 {
        probe.publish(0, &name, &ROOM);
    }
    probe.settle("the lost tail", |probe| probe.arrivals(last, &name).len() == 4);
    assert!(!probe.was_told(last, &name));
}

/// P2: a hole that history does not reach back over is a gap.
pub fn p2_a_hole_beyond_history_is_told(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p2-gap"), probe.last());
    probe.open(last, &name, &SMALL);
    probe.cut_off(last, |probe| {
        for _ in 0..10 {
            probe.publish(0, &name, &SMALL);
        }
    });
    probe.settle_arrivals();
    assert!(probe.seen(last, &name).iter().any(|seen| matches!(seen, Seen::Gap(_))));
    let after = probe.publish(0, &name, &SMALL).position;
    probe.settle("the next arrival", |probe| probe.cursor(last, &name) == Some(after));
}

/// P3: the failover takes publications, and new ones are accepted: the probe compares every name.
pub fn p3_a_failover_reuses_no_name(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p3-failover"), probe.last());
    probe.open(last, &name, &ROOM);
    for _ in 0..4 {
        probe.publish(0, &name, &ROOM);
    }
    probe.cluster.stop_replication();
    for _ in 0..4 {
        probe.publish(0, &name, &ROOM);
    }
    probe.cluster.fail_over();
    probe.run_for(GRAIN_MS);
    probe.settle_up();
    for _ in 0..6 {
        probe.publish(0, &name, &ROOM);
    }
    probe.settle_arrivals();
    let (_, publications) = probe.read(last, &name, &ROOM, &ALL).expect("no epoch was claimed");
    assert!(publications.len() >= 6);
    probe.check_accepted(last, &name, &ROOM);
}

/// P4: every node with the channel open is told, and a position that counted on the lost is not
/// recoverable.
pub fn p4_accepted_publications_that_a_failover_took_are_told(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("p4-failover"), probe.last() + 1);
    probe.open_all(&name, &ROOM);
    probe.publish(0, &name, &ROOM);
    probe.settle_arrivals();
    probe.cluster.stop_replication();
    let lost = probe.publish(0, &name, &ROOM).position;
    probe.settle_arrivals();
    probe.cluster.fail_over();
    for node in 0..nodes {
        probe.settle("word of the loss", |probe| was_told_epoch(probe, node, &name));
    }
    probe.settle_arrivals();
    assert_eq!(judged(&mut probe, &name, lost), Judgement::NotRecoverable(Reason::OtherEpoch));
}

/// P5: the answer is lost. Either the bus says that it does not know, or it found out; the stream has the
/// publication once.
pub fn p5_a_lost_answer_is_unknown_or_the_publication_stands_once(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p5"), probe.last());
    probe.open(last, &name, &ROOM);
    probe.cluster.lose_answers(0, 1);
    let data = probe.data(0, &name);
    let result = probe.try_publish(0, &name, &ROOM);
    assert!(matches!(result, Err(PublishError::Unknown) | Ok(_)), "{result:?}");
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(last, &name), [data.as_str()], "the broker accepted it");
}

/// P5: unknown, and published again under the same id.
pub fn p5_unknown_published_again_stands_once(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("p5-again"), probe.last());
    probe.open(last, &name, &ROOM);
    for (sequence, fault) in (1..).zip([false, true, false, true]) {
        let key = format!("again-{sequence}");
        let data = probe.data(0, &name);
        let mut result = Err(PublishError::Unknown);
        let mut attempts = 0;
        while result.is_err() {
            if attempts == 0 && fault {
                probe.cluster.lose_answers(0, 1);
            }
            let token = probe.send_publish_as(0, &name, &ROOM, PublicationId::Key(&key), &data);
            if attempts == 0 && !fault {
                probe.run_for(sequence);
                probe.cluster.cut(0);
            }
            result = probe.published(0, token);
            probe.settle_up();
            attempts += 1;
        }
    }
    probe.settle_arrivals();
    assert_eq!(probe.arrivals(last, &name).len(), 4);
    assert_eq!(probe.read(0, &name, &ROOM, &ALL).expect("no error").1.len(), 4);
}

/// P7: opened while arrivals get lost and connections are cut.
pub fn p7_opening_during_faults_misses_nothing(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    for round in 0..10u64 {
        let name = probe.name(&format!("p7-faults-{round}"));
        for step in 0..12 {
            if step == round {
                let _ = probe.send_open(last, &name, &ROOM);
            }
            if step == round + 1 {
                probe.cluster.lose_arrivals(last, 2);
            }
            if step == round + 2 && round % 3 == 0 {
                probe.cluster.cut(last);
            }
            let _ = probe.send_publish(0, &name, &ROOM);
            probe.run_for(3);
        }
        // The chain is the probe's; that it ends at the top is this.
        probe.settle_arrivals();
    }
}

/// P13: nothing is published after the wipe, and still all are told.
pub fn p13_wiped_data_is_told_to_quiet_channels(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("p13-quiet"), probe.last() + 1);
    probe.open_all(&name, &ROOM);
    let old = probe.publish(0, &name, &ROOM).position;
    probe.settle_arrivals();
    probe.cluster.wipe();
    for node in 0..nodes {
        probe.settle("word of another epoch", |probe| was_told_epoch(probe, node, &name));
    }
    assert_eq!(judged(&mut probe, &name, old), Judgement::NotRecoverable(Reason::OtherEpoch));
}

/// P13: published at once after the wipe; the probe fails at an arrival whose epoch was not told.
pub fn p13_wiped_data_is_told_before_new_arrivals(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("p13"), probe.last() + 1);
    probe.open_all(&name, &ROOM);
    for _ in 0..3 {
        probe.publish(0, &name, &ROOM);
    }
    probe.cluster.wipe();
    let mut new = Position::NONE;
    probe.settle("a publication in the new life", |probe| probe.now_ms() > 0);
    while new == Position::NONE {
        match probe.try_publish(0, &name, &ROOM) {
            Ok(accepted) => new = accepted.position,
            Err(error) => assert!(error.is_temporary() || error == PublishError::Unknown),
        }
    }
    probe.settle_arrivals();
    for node in 0..nodes {
        assert!(was_told_epoch(&probe, node, &name));
        assert_eq!(probe.cursor(node, &name), Some(new));
    }
}

/// E3: lost on the way to a node, and nothing after it.
pub fn e3_ephemeral_loss_is_told(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("e3-loss"), probe.last());
    probe.open(last, &name, &EPHEMERAL);
    probe.cluster.lose_arrivals(last, 1);
    probe.publish(0, &name, &EPHEMERAL);
    probe.settle("word of the loss", |probe| probe.was_told(last, &name));
    let data = probe.data(0, &name);
    probe.publish(0, &name, &EPHEMERAL);
    probe.settle("the next arrival", |probe| probe.arrivals(last, &name).contains(&data.as_str()));
}

/// E3: any doubt on a connection is told, whether something was lost or not.
pub fn e3_a_cut_is_told_to_ephemeral_channels(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    let names: Vec<String> = (0..5).map(|n| probe.name(&format!("e3-cut-{n}"))).collect();
    for name in &names {
        probe.open(last, name, &EPHEMERAL);
    }
    probe.cut_off(last, |_| ());
    for name in &names {
        probe.settle("word of the cut", |probe| probe.was_told(last, name));
    }
}

/// C1: one of each kind in flight when the broker dies, at many moments.
pub fn c1_commands_in_flight_at_a_loss_are_answered(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    for round in 0..8 {
        let name = probe.name(&format!("c1-loss-{round}"));
        let publish = probe.send_publish(last, &name, &ROOM);
        let open = probe.send_open(last, &name, &ROOM);
        let read = probe.send_read(last, &name, &ROOM, &ALL);
        let clear = probe.send_clear(last, &format!("{name}-cleared"), &ROOM);
        probe.run_for(round * 5);
        if round % 2 == 0 {
            probe.cluster.kill_broker();
        } else {
            probe.cluster.pause_broker();
        }
        probe.settle_answers();
        let answer = |token| probe.answered(last, token).expect("all are answered");
        // A temporary error says that it was not accepted, so that it never shows up: the last read below looks for it.
        assert!(matches!(
            answer(publish),
            Answer::Published(Ok(_) | Err(PublishError::Unknown | PublishError::Unavailable))
        ));
        let late = BusError::Unavailable;
        assert!(matches!(answer(open), Answer::Opened(Ok(_))) || *answer(open) == Answer::Opened(Err(late)));
        assert!(matches!(answer(read), Answer::Read(Ok(_))) || *answer(read) == Answer::Read(Err(late)));
        assert!(
            matches!(answer(clear), Answer::Cleared(Ok(_))) || *answer(clear) == Answer::Cleared(Err(late))
        );
        probe.cluster.restore_broker();
        probe.settle_up();
        probe.read(last, &name, &ROOM, &ALL).expect("a healthy bus reads");
    }
}

/// Waits until every node is down, and returns the longest that it took, what the machine was late apart.
fn time_to_down<C: Faults>(probe: &mut Probe<C>) -> u64 {
    let (lost_ms, late_ms) = (probe.now_ms(), probe.cluster.late_ms());
    for node in 0..=probe.last() {
        probe.settle_down(node);
        assert_eq!(probe.health(node), Health::Down);
    }
    let down_ms = (0..=probe.last()).filter_map(|node| probe.health_events(node).last().map(|(at, _)| *at));
    let took_ms = down_ms.max().unwrap_or_default() - lost_ms;
    took_ms.saturating_sub(probe.cluster.late_ms() - late_ms)
}

/// C2: killed.
pub fn c2_a_dead_broker_is_visible(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    probe.cluster.kill_broker();
    let took_ms = time_to_down(&mut probe);
    assert!(took_ms <= LOSS_VISIBLE_MS_MAX + GRAIN_MS, "{took_ms} ms");
}

/// C2: silent, with its connections open; at several moments of the watch.
pub fn c2_a_silent_broker_is_visible(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    for round in 0..5 {
        probe.run_for(round * 60);
        probe.cluster.pause_broker();
        let took_ms = time_to_down(&mut probe);
        assert!(took_ms <= LOSS_VISIBLE_MS_MAX + GRAIN_MS, "{took_ms} ms");
        probe.cluster.restore_broker();
        probe.settle_up();
    }
}

/// C2: while down, every command fails at once as temporary, and adds nothing.
pub fn c2_while_down_everything_fails_as_temporary(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("c2"), probe.last());
    let top = probe.publish(0, &name, &ROOM).position;
    probe.cluster.kill_broker();
    time_to_down(&mut probe);
    for node in [0, last] {
        let publish = probe.send_publish(node, &name, &ROOM);
        let open = probe.send_open(node, &name, &ROOM);
        let read = probe.send_read(node, &name, &ROOM, &ALL);
        let clear = probe.send_clear(node, &name, &ROOM);
        let unavailable = BusError::Unavailable;
        assert_eq!(probe.answered(node, publish), Some(&Answer::Published(Err(PublishError::Unavailable))));
        assert_eq!(probe.answered(node, open), Some(&Answer::Opened(Err(unavailable))));
        assert_eq!(probe.answered(node, read), Some(&Answer::Read(Err(unavailable))));
        assert_eq!(probe.answered(node, clear), Some(&Answer::Cleared(Err(unavailable))));
    }
    probe.cluster.restore_broker();
    probe.settle_up();
    if !probe.cluster.restart_is_a_new_life() {
        assert_eq!(probe.top(last, &name, &ROOM), top);
        return;
    }
    let since = Since { offset: top.offset, epoch: Some(top.epoch) };
    let query = HistoryQuery { since: Some(since), ..ALL };
    let (page, publications) = probe.read(last, &name, &ROOM, &query).expect("it came from that epoch");
    assert_eq!((page.top.offset, publications.len()), (top.offset, 0), "nothing was added");
    let made_up = Since { offset: top.offset + 1, ..since };
    let query = HistoryQuery { since: Some(made_up), ..query };
    assert_eq!(
        probe.read(last, &name, &ROOM, &query).map(|(page, _)| page),
        Err(BusError::UnrecoverableEpoch { current: page.top })
    );
}

/// C3: cut off for a while, it has what it missed before it says that it is up.
pub fn c3_a_cut_node_catches_up_by_itself(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (probe.name("c3-cut"), probe.last());
    probe.open(last, &name, &ROOM);
    probe.cut_off(last, |probe| {
        for _ in 0..5 {
            probe.publish(0, &name, &ROOM);
        }
    });
    probe.settle_up();
    assert_eq!(probe.arrivals(last, &name).len(), 5, "whole before it is up");
    assert!(!probe.was_told(last, &name));
}

/// C3: the broker dies and comes back with its data: positions hold, and everything works without a
/// restart or another open.
pub fn c3_all_is_whole_after_the_broker_is_back(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let (name, nodes) = (probe.name("c3"), probe.last() + 1);
    probe.open_all(&name, &ROOM);
    for round in 0..3 {
        probe.publish(0, &name, &ROOM);
        if round == 1 {
            probe.cluster.pause_broker();
        } else {
            probe.cluster.kill_broker();
        }
        time_to_down(&mut probe);
        probe.cluster.restore_broker();
        probe.settle_up();
        probe.publish(nodes - 1, &name, &ROOM);
    }
    probe.settle_arrivals();
    for node in 0..nodes {
        assert_eq!(probe.arrivals(node, &name).len(), 6);
        let gap = probe.seen(node, &name).iter().any(|seen| matches!(seen, Seen::Gap(_)));
        let lives =
            probe.seen(node, &name).iter().filter(|seen| matches!(seen, Seen::EpochChanged(_))).count();
        assert!(!gap, "nothing was lost");
        // Killed twice, paused once.
        let told = if probe.cluster.restart_is_a_new_life() { 2..4 } else { 0..1 };
        assert!(told.contains(&lives), "{lives} lives were told");
    }
}

/// C3: many channels, some of which moved while the node was away.
pub fn c3_many_channels_come_back(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    let names: Vec<String> = (0..200).map(|n| probe.name(&format!("c3-many-{n}"))).collect();
    for name in &names {
        probe.open(last, name, &ROOM);
    }
    probe.cut_off(last, |probe| {
        for name in names.iter().step_by(3) {
            probe.publish(0, name, &ROOM);
        }
    });
    probe.settle_up();
    for (n, name) in names.iter().enumerate() {
        assert_eq!(probe.arrivals(last, name).len(), usize::from(n % 3 == 0), "{name}");
    }
}

/// C3: so many that a backend may ask for their positions together. Quiet channels, those that moved meanwhile, that were
/// never published on or were cleared. Not among the suite's own, for it takes long.
pub fn c3_thousands_of_channels_come_back(cluster: impl Faults) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    let names: Vec<String> = (0..3_000).map(|n| probe.name(&format!("c3-thousands-{n}"))).collect();
    // As many at a time as a port takes.
    for names in names.chunks(probe.cluster.commands_max()) {
        for name in names {
            probe.send_open(last, name, &ROOM);
        }
        probe.settle_answers();
        for name in names.iter().step_by(3) {
            probe.send_publish(0, name, &ROOM);
        }
        probe.settle_answers();
        for name in names.iter().step_by(50) {
            probe.send_clear(0, name, &ROOM);
        }
        probe.settle_answers();
    }
    probe.settle_arrivals();
    let before: Vec<usize> = names.iter().map(|name| probe.arrivals(last, name).len()).collect();
    for _ in 0..2 {
        probe.cut_off(last, |probe| {
            for name in names.iter().step_by(50) {
                probe.publish(0, name, &ROOM);
            }
        });
    }
    for (n, name) in names.iter().enumerate() {
        let missed = 2 * usize::from(n % 50 == 0);
        assert_eq!(probe.arrivals(last, name).len(), before[n] + missed, "{name}");
        assert!(!probe.was_told(last, name), "{name} lost nothing");
    }
    for name in names.iter().step_by(100) {
        probe.publish(0, name, &ROOM);
    }
    probe.settle_arrivals();
}
