//! Clauses C1 and C4 for backends that answer late: commands and arrivals that wait.

use crate::epoch::Position;
use crate::suite::ephemeral::EPHEMERAL;
use crate::suite::stream::{ALL, ROOM};
use crate::suite::{Answer, Late, Probe};
use crate::types::{BusError, ChannelOptions, PublishError};

/// C1: closed or forgotten before the answer: it comes all the same.
pub fn c1_commands_of_a_channel_closed_meanwhile_are_answered(cluster: impl Late) {
    let mut probe = Probe::new(cluster);
    let last = probe.last();
    for round in 0..10 {
        let name = probe.name(&format!("c1-closed-{round}"));
        let open = probe.send_open(last, &name, &ROOM);
        let publish = probe.send_publish(last, &name, &ROOM);
        let read = probe.send_read(last, &name, &ROOM, &ALL);
        let clear = probe.send_clear(last, &name, &ROOM);
        probe.run_for(round * 3);
        if round % 2 == 0 {
            probe.close(last, &name);
        } else {
            probe.forget(last, &name);
        }
        probe.settle_answers();
        assert!(matches!(probe.answered(last, open), Some(Answer::Opened(_))));
        assert!(matches!(probe.answered(last, publish), Some(Answer::Published(Ok(_)))));
        assert!(matches!(probe.answered(last, read), Some(Answer::Read(Ok(_)))));
        assert!(matches!(probe.answered(last, clear), Some(Answer::Cleared(Ok(_)))));
    }
}

/// C4: as many commands as may wait, then one more of each kind.
pub fn c4_commands_at_the_limit_are_taken_and_above_it_refused(cluster: impl Late) {
    let mut probe = Probe::new(cluster);
    let name = probe.name("c4");
    let most = probe.cluster.commands_max();
    let taken: Vec<_> = (0..most).map(|_| probe.send_publish(0, &name, &ROOM)).collect();
    assert!(taken.iter().all(|token| probe.answered(0, *token).is_none()), "nothing answers inline here");
    let publish = probe.send_publish(0, &name, &ROOM);
    let read = probe.send_read(0, &name, &ROOM, &ALL);
    let clear = probe.send_clear(0, &name, &ROOM);
    let open = probe.send_open(0, &name, &ROOM);
    let overloaded = BusError::Overloaded;
    assert_eq!(probe.answered(0, publish), Some(&Answer::Published(Err(PublishError::Overloaded))));
    assert_eq!(probe.answered(0, read), Some(&Answer::Read(Err(overloaded))));
    assert_eq!(probe.answered(0, clear), Some(&Answer::Cleared(Err(overloaded))));
    assert_eq!(probe.answered(0, open), Some(&Answer::Opened(Err(overloaded))));
    probe.settle_answers();
    for token in taken {
        assert!(matches!(probe.answered(0, token), Some(Answer::Published(Ok(_)))));
    }
    probe.publish(0, &name, &ROOM);
}

/// Publishes more on a channel than the last node, which has it open and does not poll, has room for; gives its name.
/// Where the broker was lost meanwhile, on a machine that is too busy, on another channel again.
fn overrun<C: Late>(probe: &mut Probe<C>, what: &str, options: &ChannelOptions) -> String {
    let (last, commands_max) = (probe.last(), probe.cluster.commands_max());
    let mut answers = Vec::new();
    for attempt in 0..10 {
        let name = probe.name(&format!("{what}-{attempt}"));
        probe.open(last, &name, options);
        probe.set_deaf(last, true);
        let mut tokens = Vec::new();
        for n in 0..probe.cluster.overrun_publications() + 1 {
            tokens.push(probe.send_publish(0, &name, options));
            if n % commands_max == commands_max - 1 {
                probe.settle_answers();
            }
        }
        probe.settle_answers();
        probe.set_deaf(last, false);
        probe.settle_up();
        let failed = |token| match probe.answered(0, token) {
            Some(Answer::Published(Ok(_))) => None,
            answer => Some(format!("{answer:?}")),
        };
        match tokens.into_iter().find_map(failed) {
            None => return name,
            Some(answer) => answers.push(answer),
        }
    }
    panic!("never were all publications accepted: {answers:?}");
}

/// C4: it gets everything, or a gap in front of what it gets; and ends at the top.
pub fn c4_a_node_that_does_not_poll_gets_all_or_is_told(cluster: impl Late) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (overrun(&mut probe, "c4-deaf", &ROOM), probe.last());
    probe.settle_arrivals();
    let count = probe.cluster.overrun_publications() + 1;
    assert!(probe.arrivals(last, &name).len() == count || probe.was_told(last, &name));
    let after = probe.publish(0, &name, &ROOM).position;
    probe.settle("the next arrival", |probe| probe.cursor(last, &name) == Some(after));
}

/// C4 with E3: what an ephemeral channel lost cannot be read again, so it is told.
pub fn c4_a_node_that_does_not_poll_is_told_of_ephemeral_loss(cluster: impl Late) {
    let mut probe = Probe::new(cluster);
    let (name, last) = (overrun(&mut probe, "c4-deaf-e", &EPHEMERAL), probe.last());
    let count = probe.cluster.overrun_publications() + 1;
    probe.settle("all of it, or word of a loss", |probe| {
        probe.arrivals(last, &name).len() == count || probe.was_told(last, &name)
    });
    assert_eq!(probe.cursor(last, &name), Some(Position::NONE));
    let data = probe.data(0, &name);
    probe.publish(0, &name, &EPHEMERAL);
    probe.settle("the next arrival", |probe| probe.arrivals(last, &name).contains(&data.as_str()));
}
