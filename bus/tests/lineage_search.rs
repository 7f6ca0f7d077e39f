//! Epochs have a lineage: the rule holds in every run within these bounds, and without a clause it does not.
//!
//! Prints the states visited: `cargo test -p ringmain-bus --test lineage_search -- --nocapture`. Larger
//! bounds are an example's, `exhaust_epochs`.

use ringmain_bus::lineage::search::{Bounds, Clause, Order, Report, Rule, Violation, search};

/// One publication, two servers.
const SMALL: Bounds = Bounds { servers: 2, publications: 1, ..Bounds::CALM };
/// Two publications, one by each node.
const PAIR: Bounds = Bounds { publications: 2, ..SMALL };

fn run(label: &str, bounds: &Bounds, rule: Rule) -> Report {
    let report = search(bounds, rule, Order::Breadth);
    println!("{label}: {} states, {} transitions", report.states, report.transitions);
    assert!(report.complete, "{label}");
    report
}

fn check_whole(label: &str, bounds: &Bounds) {
    let report = run(label, bounds, Rule::WHOLE);
    assert!(report.quiescent > 0, "{label}");
    assert_eq!(report.violation, None, "{label}");
}

#[test]
fn the_rule_holds_over_a_promotion() {
    check_whole("three servers", &Bounds { servers: 3, promotions: 1, ..SMALL });
    check_whole("a cut", &Bounds { promotions: 1, cuts: 1, ..SMALL });
    check_whole("a stray", &Bounds { promotions: 1, strays: 1, ..SMALL });
    check_whole("a dead node", &Bounds { promotions: 1, crashes: 1, ..SMALL });
    check_whole("from nothing", &Bounds { promotions: 1, fresh: true, ..SMALL });
}

#[test]
fn the_rule_holds_over_a_promotion_between_two_publications() {
    check_whole("two publications", &Bounds { promotions: 1, ..PAIR });
}

#[test]
fn the_rule_holds_over_what_befalls_one_master() {
    check_whole("three publications", &Bounds { publications: 3, cuts: 1, ..SMALL });
    check_whole("short history", &Bounds { cuts: 2, history: 1, ..PAIR });
    check_whole("a restart and a cut", &Bounds { restarts: 1, cuts: 1, ..SMALL });
    check_whole("a lost key", &Bounds { flushes: 1, cuts: 1, ..SMALL });
    check_whole("a lost key and a restart", &Bounds { flushes: 1, restarts: 1, ..SMALL });
    check_whole("dead nodes", &Bounds { crashes: 2, ..PAIR });
}

/// Searches without `clauses`, and expects a violation like `expected` after so many steps.
fn check_without(clauses: &[Clause], bounds: &Bounds, steps: usize, expected: Violation) {
    let rule = clauses.iter().fold(Rule::WHOLE, |rule, clause| rule.without(*clause));
    let report = run(&format!("without {clauses:?}"), bounds, rule);
    let (violation, run) = report.violation.unwrap_or_else(|| panic!("nothing breaks without {clauses:?}"));
    assert_eq!((violation, run.len()), (expected, steps), "without {clauses:?}: {run:?}");
}

#[test]
fn without_a_clause_of_the_script_something_breaks() {
    use Clause::*;
    let two_names = Violation::OneNameForTwo { publications: (0, 1) };
    check_without(&[Renewal], &Bounds { promotions: 1, ..PAIR }, 11, two_names);
    check_without(&[FreshNonces], &Bounds { promotions: 1, fresh: true, ..PAIR }, 16, two_names);
    let adrift = Violation::NotHealed { node: 0 };
    check_without(&[RenewalByReads], &Bounds { promotions: 1, fresh: true, ..PAIR }, 6, adrift);
    check_without(&[CurrentState], &Bounds { promotions: 1, ..SMALL }, 8, Violation::NeverCalm);
    check_without(&[Ids], &Bounds { cuts: 1, ..PAIR }, 8, Violation::Twice { publication: 0 });
}

#[test]
fn without_a_clause_of_positions_something_breaks() {
    use Clause::*;
    let cut = Bounds { cuts: 1, ..PAIR };
    check_without(&[Branches], &Bounds { promotions: 1, ..SMALL }, 11, Violation::Twice { publication: 0 });
    let hole = Violation::OutOfOrder { publication: 1 };
    check_without(&[Reach], &Bounds { history: 1, ..cut }, 8, hole);
    check_without(&[SubscriptionFirst], &cut, 8, Violation::NotHealed { node: 0 });
    check_without(&[Waiting], &cut, 9, Violation::NotHealed { node: 1 });
}

#[test]
fn without_a_clause_of_acks_something_is_lost() {
    use Clause::*;
    let lost = |node| Violation::LostInSilence { publication: 0, node };
    let promotion = Bounds { promotions: 1, ..SMALL };
    check_without(&[PublishingAgain], &promotion, 14, lost(0));
    check_without(&[AllReplicas], &Bounds { servers: 3, ..promotion }, 16, lost(0));
    // Each of the three alone is enough to keep a stale master's ack away.
    check_without(&[ClosedConnections, AckEpochs, AckOwners], &promotion, 16, lost(1));
}

#[test]
fn a_master_that_starts_from_an_old_disk_is_not_covered() {
    let lost = Violation::LostInSilence { publication: 0, node: 0 };
    check_without(&[], &Bounds { old_disks: 1, ..SMALL }, 13, lost);
}
