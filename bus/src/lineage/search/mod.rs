//! The rule exhausted: every order of steps and faults that the bounds allow, and what breaks without a clause.
//!
//! Owns: the search and its bounds. Must not know: the rule; it calls it. Nothing in production calls this.
//!
//! # What is modelled
//!
//! One channel; a master and one or two replicas that lag by any number of writes; two nodes, each with one
//! subscriber, two connections to the owner that it believes in (commands and answers, subscription), and a
//! list of kept acks. Any server can be made the owner at any time, also one that is stale, and the old
//! master again; the others go on as masters until they learn of it, each node goes on with the old owner
//! until it does. Each way of each connection keeps its order, everything else is free. A pause is the
//! absence of steps, and a death for good too. A publish that lay in a socket when its connection was closed
//! is executed at any time later, or never. Servers in one shard pass messages on by links of their own, so
//! a stale master's reaches the subscribers of its successor (`strays`). The canary is not a message: a node
//! sees another life, or a lost key, at any time after it happened.
//!
//! Offsets are dense. Not modelled: several channels, slot migration, ids that expire before the history,
//! lists that are full, a publish that is given up as unknown, clocks.
//!
//! # What is checked
//!
//! In every state: no (epoch, offset) was delivered or acknowledged for two publications; what a subscriber
//! gets follows what it got before, none twice, since it was told last. In every state in which only faults
//! and new publications are left: each subscriber stands at the top of the owner's stream; what it got since
//! it was told is what the stream holds there; each acknowledged publication was delivered to it or executed
//! before it was told; nothing waits for an answer. And steps that need neither faults nor new publications
//! never go on for ever (the graph of them has no cycle), so every run gets there once faults stop.
//!
//! An ack dies with its node if it was not confirmed: it is excused, as the contract says.
//!
//! # What breaks without a clause
//!
//! Shortest runs, in steps of this model. `tests/lineage_search.rs` holds them, but for the two that take
//! long: `exhaust_epochs -- --breadth 1 --servers 2 --strays 1 --without StaleArrivals` and `--breadth 1
//! --servers 2 --publications 1 --promotions 2 --without ConfirmedLife`.
//!
//! | without | violation | steps |
//! |---|---|---|
//! | L1 [`Clause::Ids`] | a publication twice | 8 |
//! | L3 [`Clause::Renewal`] | one name for two | 11 |
//! | L4 [`Clause::FreshNonces`] | one name for two | 16 |
//! | L5 [`Clause::RenewalByReads`] | a position in no epoch | 6 |
//! | L6 [`Clause::CurrentState`] | a publish retried for ever | 8 |
//! | L7 [`Clause::Branches`] | a publication twice | 11 |
//! | L8 [`Clause::Reach`] | a silent hole | 8 |
//! | L9 [`Clause::SubscriptionFirst`] | a tail missed | 8 |
//! | L9 [`Clause::Waiting`] | a tail missed | 9 |
//! | L12 [`Clause::StaleArrivals`] | a publication twice | 14 |
//! | L9, L14, L15 [`Clause::ClosedConnections`], [`Clause::AckEpochs`], [`Clause::AckOwners`] | an ack lost in silence | 16 |
//! | L16 [`Clause::AllReplicas`] | an ack lost in silence | 16 |
//! | L16 [`Clause::ConfirmedLife`] | an ack lost in silence | 17 |
//! | L17 [`Clause::PublishingAgain`] | an ack lost in silence | 14 |
//!
//! Of the three named together any one is enough. Within the bounds tried nothing breaks without
//! [`Clause::Telling`], [`Clause::JudgingAgain`] or [`Clause::AckLives`] alone: the re-read that follows an
//! owner change tells the same, later. They are kept; that they are needed is not shown here.
//!
//! **Not covered by the rule:** a master that starts again from an old disk, as a master. What all replicas
//! had confirmed is then lost with nobody left who kept it: an ack is lost in silence after 13 steps
//! (`--old-disks 1`). A broker must not let a master come back older than its replicas.
//!
//! # What was searched
//!
//! `cargo test` visits 731,586 states of the whole rule in twelve bounds without a violation, and 121,963 until
//! something breaks without a clause: 36 s in a debug build beside other work. By the example
//! (`cargo run --release -p ringmain-bus --example exhaust_epochs -- --publications 3`), each complete and
//! without a violation, one thread beside other work:
//!
//! | options | servers, publications, promotions | states | transitions | time |
//! |---|---|---|---|---|
//! | `--publications 3` | 3, 3, 1 | 11,310,713 | 49,007,669 | 206.5 s |
//! | `--publications 1 --promotions 2` | 3, 1, 2 | 2,712,889 | 11,623,189 | 20.0 s |
//! | `--servers 2 --publications 1 --promotions 2 --strays 1` | 2, 1, 2 | 3,301,928 | 13,753,425 | 33.1 s |

mod check;
mod encode;
mod node;
mod server;
mod state;
mod step;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

pub use check::Violation;
pub use step::Step;

use state::State;

/// How much may happen in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Servers, the first is the master at the start: 2 or 3.
    pub servers: u8,
    /// Publications, given to the two nodes in turn: at most 4.
    pub publications: u8,
    /// Entries of history that a key keeps.
    pub history: u64,
    /// Promotions of a server that is not the owner, current or stale, and of the old master again.
    pub promotions: u8,
    /// Connections of a node that are cut, what was sent may be executed later.
    pub cuts: u8,
    /// Publications that travel from one server to another's subscribers by the servers' own links.
    pub strays: u8,
    /// Keys lost on a master (expired, flushed).
    pub flushes: u8,
    /// Masters that start again with their data and a new replication id.
    pub restarts: u8,
    /// Masters that start again with the data of the beginning: what the rule does not cover.
    pub old_disks: u8,
    /// Nodes that die with what they kept; their subscribers come back with their positions.
    pub crashes: u8,
    /// Whether a run starts before the key exists and before anybody is subscribed.
    pub fresh: bool,
    /// Give up beyond this many states.
    pub states_max: usize,
}

impl Bounds {
    /// No faults yet.
    pub const CALM: Bounds = Bounds {
        servers: 3,
        publications: 2,
        history: 4,
        promotions: 0,
        cuts: 0,
        strays: 0,
        flushes: 0,
        restarts: 0,
        old_disks: 0,
        crashes: 0,
        fresh: false,
        states_max: usize::MAX,
    };
}

/// A clause that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clause {
    /// L3. Without: a promoted master goes on in the epoch that it finds.
    Renewal,
    /// L4. Without: a node's attempts share a nonce.
    FreshNonces,
    /// L5. Without: a read of a position creates and renews nothing.
    RenewalByReads,
    /// L6. Without: an id that was seen is answered with the key's state of then.
    CurrentState,
    /// L1. Without: nothing remembers ids, a publish tried again is another one.
    Ids,
    /// L7. Without: a position in an earlier epoch is good wherever that was left.
    Branches,
    /// L8. Without: a position is good though the history does not reach back to it.
    Reach,
    /// L9. Without: the position is read before the subscription is confirmed.
    SubscriptionFirst,
    /// L9. Without: arrivals do not wait for the read.
    Waiting,
    /// L9. Without: after an owner change the old connections' answers and arrivals count.
    ClosedConnections,
    /// L11. Without: an arrival that left our epoch below our cursor is dropped.
    Telling,
    /// L12. Without: a stale master's arrival is delivered if its offset fits.
    StaleArrivals,
    /// L13. Without: an arrival of another epoch than the one read is delivered if its offset fits.
    JudgingAgain,
    /// L14. Without: acks of any epoch are passed on.
    AckEpochs,
    /// L10 and L15. Without: acks of any life are passed on, and a new life is not read.
    AckLives,
    /// L15. Without: acks of servers that are not the owner are passed on.
    AckOwners,
    /// L16. Without: one replica's confirmation is enough.
    AllReplicas,
    /// L16. Without: a confirmation in any life is enough.
    ConfirmedLife,
    /// L17. Without: kept acks are not published again.
    PublishingAgain,
}

impl Clause {
    /// All of them.
    pub const ALL: [Clause; 19] = [
        Clause::Renewal,
        Clause::FreshNonces,
        Clause::RenewalByReads,
        Clause::CurrentState,
        Clause::Ids,
        Clause::Branches,
        Clause::Reach,
        Clause::SubscriptionFirst,
        Clause::Waiting,
        Clause::ClosedConnections,
        Clause::Telling,
        Clause::StaleArrivals,
        Clause::JudgingAgain,
        Clause::AckEpochs,
        Clause::AckLives,
        Clause::AckOwners,
        Clause::AllReplicas,
        Clause::ConfirmedLife,
        Clause::PublishingAgain,
    ];
}

/// The rule, whole or with clauses left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule(u32);

impl Rule {
    /// Every clause.
    pub const WHOLE: Rule = Rule(0);

    /// Leaves one out.
    #[must_use]
    pub const fn without(self, clause: Clause) -> Rule {
        Rule(self.0 | 1 << clause as u32)
    }

    fn lacks(self, clause: Clause) -> bool {
        self.0 & 1 << clause as u32 != 0
    }
}

/// In which order states are visited: breadth finds shortest runs, depth needs less memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Fewest steps first.
    Breadth,
    /// Newest first.
    Depth,
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Different states visited.
    pub states: usize,
    /// Steps tried.
    pub transitions: usize,
    /// Different states in which nothing is left to do but faults and new publications.
    pub quiescent: usize,
    /// Whether nothing was left out.
    pub complete: bool,
    /// The first violation, with the steps that lead to it.
    pub violation: Option<(Violation, Vec<Step>)>,
}

/// The steps that lead to each state, as a tree; grows by one entry a state.
struct Paths(Vec<(u32, Step)>);

impl Paths {
    fn add(&mut self, parent: u32, step: Step) -> u32 {
        self.0.push((parent, step));
        u32::try_from(self.0.len()).expect("fewer than 2^32 states")
    }

    fn to(&self, mut index: u32) -> Vec<Step> {
        let mut steps = Vec::new();
        while let Some(&(parent, step)) = index.checked_sub(1).and_then(|at| self.0.get(at as usize)) {
            steps.push(step);
            index = parent;
        }
        steps.reverse();
        steps
    }

    fn to_by(&self, index: u32, step: Step) -> Vec<Step> {
        let mut steps = self.to(index);
        steps.push(step);
        steps
    }
}

/// Visits every state that `bounds` allow, by `rule`, until something is violated.
pub fn search(bounds: &Bounds, rule: Rule, order: Order) -> Report {
    let mut search = Search::new();
    let first = State::new(bounds, rule);
    search.visited.insert(first.fingerprint(), 0);
    let mut frontier = VecDeque::from([(first, 0)]);
    while let Some((state, index)) = next(&mut frontier, order) {
        if let Err((violation, steps)) = search.visit(&state, index, &mut frontier) {
            search.report.violation = Some((violation, steps));
            break;
        }
        if search.report.states > bounds.states_max {
            search.report.complete = false;
            break;
        }
    }
    let mut report = search.report;
    if report.complete && report.violation.is_none() {
        report.violation = endless(&search.progress, report.states)
            .map(|state| (Violation::NeverCalm, search.paths.to(state)));
    }
    report
}

fn next(frontier: &mut VecDeque<(State, u32)>, order: Order) -> Option<(State, u32)> {
    match order {
        Order::Breadth => frontier.pop_front(),
        Order::Depth => frontier.pop_back(),
    }
}

struct Search {
    visited: HashMap<u128, u32>,
    paths: Paths,
    /// From state to state by steps that must happen.
    progress: Vec<(u32, u32)>,
    report: Report,
}

impl Search {
    fn new() -> Search {
        let report = Report { states: 1, transitions: 0, quiescent: 0, complete: true, violation: None };
        Search { visited: HashMap::new(), paths: Paths(Vec::new()), progress: Vec::new(), report }
    }

    fn visit(
        &mut self,
        state: &State,
        index: u32,
        frontier: &mut VecDeque<(State, u32)>,
    ) -> Result<(), (Violation, Vec<Step>)> {
        let steps = state.steps();
        if !steps.iter().any(|step| step.must_happen()) {
            self.report.quiescent += 1;
            state.check_quiescent().map_err(|violation| (violation, self.paths.to(index)))?;
        }
        for step in steps {
            self.report.transitions += 1;
            let mut after = state.clone();
            after.apply(step).map_err(|violation| (violation, self.paths.to_by(index, step)))?;
            let to = match self.visited.entry(after.fingerprint()) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    self.report.states += 1;
                    let to = *new.insert(self.paths.add(index, step));
                    frontier.push_back((after, to));
                    to
                }
            };
            if step.must_happen() {
                self.progress.push((index, to));
            }
        }
        Ok(())
    }
}

/// A state from which steps that must happen lead around for ever, if there is one: what is left when the
/// states that lead nowhere are taken away again and again.
fn endless(progress: &[(u32, u32)], states: usize) -> Option<u32> {
    let mut ways_out = vec![0u32; states];
    for (from, _) in progress {
        ways_out[*from as usize] += 1;
    }
    // Edges by their end.
    let mut first = vec![0u32; states + 1];
    progress.iter().for_each(|(_, to)| first[*to as usize + 1] += 1);
    for index in 0..states {
        first[index + 1] += first[index];
    }
    let mut next = first.clone();
    let mut from_of = vec![0u32; progress.len()];
    for (from, to) in progress {
        from_of[next[*to as usize] as usize] = *from;
        next[*to as usize] += 1;
    }
    let mut calm: Vec<u32> = (0..states as u32).filter(|state| ways_out[*state as usize] == 0).collect();
    while let Some(state) = calm.pop() {
        for at in first[state as usize]..first[state as usize + 1] {
            let from = from_of[at as usize];
            ways_out[from as usize] -= 1;
            if ways_out[from as usize] == 0 {
                calm.push(from);
            }
        }
    }
    // What is left leads there; follow it until it is there.
    let mut at = (0..states as u32).find(|state| ways_out[*state as usize] != 0)?;
    let mut seen = std::collections::HashSet::new();
    while seen.insert(at) {
        let mut ways = progress.iter().filter(|(from, _)| *from == at);
        at = ways.find(|(_, to)| ways_out[*to as usize] != 0)?.1;
    }
    Some(at)
}
